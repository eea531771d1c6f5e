"""A student and a teacher compared in integers: their int8 maps in, anomaly scores out (bank kind STFP).

The network has both tails, its outputs are the student's maps s_1 .. s_L, then the teacher's t_1 .. t_L. Where the student
fails to imitate, their directions differ: 1 - cos of the two vectors at every position of every pair, resized to one grid,
multiplied over the pairs. ``Pairs`` goes from the maps to the distances of all pairs on the grid (it takes the place of the
embedding of other kinds), ``StudentTeacherScorer`` from those to scores.

All in integers, as docs/SPEC.md has it under STFP; C: export/runtime/tvad_score_pairs.c. The cosine knows no scale, so the
int8 values minus their zero points serve as they are, whatever the two tensors' quantisation.

Source: STFPM (Wang et al. 2021), PaSTe (Barusco et al. 2024); half the squared distance of normalised vectors is 1 - cos.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinyvad.detectors.sections import take_section
from tinyvad.embedding import MAX_DEPTH, MAX_TAPS, Tap, align, align_matrix, on_grid, tap_rows, tap_support
from tinyvad.errors import InputError
from tinyvad.graph.ir import Tensor

MOST_BITS = 20  # of a distance behind the point
MAX_SHIFT = 31  # of the product; with it no product passes 32 bits
SCORE_BITS = 16  # that the largest product of good images keeps: room for defects 65,536 times as far
_REMEDY = "make the build again"


def fraction_bits(pairs: int) -> int:
    """Bits behind the point of a distance: the product of all pairs, 2 ** (bits + 1) each, stays within 2 ** 63."""
    return min(MOST_BITS, 63 // pairs - 1)


def cosine_distances(s: np.ndarray, t: np.ndarray, bits: int) -> np.ndarray:
    """2 ** bits * (1 - cos), cut, of integer vectors (..., C): (...) int64, 0 to 2 ** (bits + 1).

    |values| <= 255 and C <= 4096, so that all sums stay below 2 ** 28. 0 where both vectors are 0, 2 ** bits where one is.
    """
    s, t = s.astype(np.int64), t.astype(np.int64)
    dot, ss, tt = ((a * b).sum(-1) for a, b in ((s, t), (s, s), (t, t)))
    product = ss * tt  # below 2 ** 56
    k = (62 - _bit_length(product)) >> 1
    p = product << (2 * k)  # of 61 or 62 bits, or 0
    root = _floor_sqrt(p)
    # |dot << k| <= root, as |dot| <= sqrt(product): the difference is never negative, the quotient at most 2
    distance = ((root - (dot << k)) << bits) // np.maximum(root, 1)
    return np.where(product > 0, distance, np.where((ss > 0) | (tt > 0), 1 << bits, 0))


def _bit_length(x: np.ndarray) -> np.ndarray:
    """Of 0 <= x < 2 ** 62, int64; 0 of 0."""
    found = np.frexp(x.astype(np.float64))[1].astype(np.int64)  # rounding to float64 may have made it a power of two
    return found - ((found > 0) & (x >> np.maximum(found - 1, 0) == 0))


def _floor_sqrt(x: np.ndarray) -> np.ndarray:
    """Largest integers whose square is at most 0 <= x < 2 ** 62, int64."""
    root = np.sqrt(x.astype(np.float64)).astype(np.int64)  # off by one at most
    root -= root * root > x
    return root + ((root + 1) * (root + 1) <= x)


@dataclass(frozen=True)
class Pairs:
    """From the tapped maps of student and teacher to distances on the grid.

    Attributes:
        taps: the student's L, then the teacher's L; the two of a pair have the same size and channels.
        grid: (grid_h, grid_w).
    """

    taps: tuple[Tap, ...]
    grid: tuple[int, int]
    pool = 1
    native = True  # a tap's part of what is scored is the tap itself

    def __post_init__(self) -> None:
        shapes = [(*tap.size, tap.channels) for tap in self.taps]
        check_pairs(shapes)
        if self.depth > MAX_DEPTH:
            raise InputError(f"student and teacher: {self.depth} channels; a bank takes {MAX_DEPTH}: use fewer --layers")

    @property
    def depth(self) -> int:
        """Channels of all taps together: values of a golden vector."""
        return sum(tap.channels for tap in self.taps)

    @property
    def bits(self) -> int:
        """Bits behind the point of a distance."""
        return fraction_bits(len(self.taps) // 2)

    @property
    def layers(self) -> tuple[tuple[int, int, int], ...]:
        """(h, w, C) of every pair."""
        return tuple((*tap.size, tap.channels) for tap in self.taps[: len(self.taps) // 2])

    def scratch_bytes(self, tap: Tap) -> int:
        """Scratch of the runtime's ``tvad_embed`` for a tap: it copies."""
        return 0

    def integer(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """(n, grid_h, grid_w, L) uint32 distances from the tapped int8 maps [(n, h, w, c)]: what the device computes."""
        half = len(self.taps) // 2
        found = []
        for s_tap, t_tap, s, t in zip(self.taps[:half], self.taps[half:], maps[:half], maps[half:], strict=True):
            pair = s.astype(np.int64) - s_tap.zero_point, t.astype(np.int64) - t_tap.zero_point
            found.append(self._on_grid(cosine_distances(*pair, self.bits)))
        return np.stack(found, axis=-1).astype(np.uint32)

    def _on_grid(self, distances: np.ndarray) -> np.ndarray:
        """(n, h, w) int64 -> (n, grid_h, grid_w) int64, rounded to nearest, halves up."""
        (rows, down), (columns, across) = (align_matrix(s, g) for s, g in zip(distances.shape[1:], self.grid, strict=True))
        # sums below 2 ** 21 * 2 ** 24, which float64 holds exactly
        sums = (rows.astype(np.float64) @ distances.astype(np.float64) @ columns.T.astype(np.float64)).astype(np.int64)
        return (sums + down * across // 2) // (down * across)

    def real(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """(n, grid_h, grid_w, L) float64 from float maps: the same without rounding, for study."""
        half = len(self.taps) // 2
        found = []
        for s, t in zip(maps[:half], maps[half:], strict=True):
            lengths = [np.linalg.norm(one.astype(np.float64), axis=-1) for one in (s, t)]
            apart = 1 - (s.astype(np.float64) * t).sum(-1) / np.maximum(lengths[0] * lengths[1], 1e-300)
            apart[(lengths[0] == 0) & (lengths[1] == 0)] = 0
            (rows, down), (columns, across) = (align_matrix(n, g) for n, g in zip(s.shape[1:3], self.grid, strict=True))
            found.append(rows @ apart @ columns.T / (down * across))
        return np.stack(found, axis=-1)

    def quantize_maps(self, maps: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float tapped maps on the taps' own int8 grids, so that a float engine meets the one integer scoring rule."""
        return [on_grid(values, tap.scale, tap.zero_point) for tap, values in zip(self.taps, maps, strict=True)]

    def with_vector(self, vector: np.ndarray, position: int) -> np.ndarray:
        """(1, grid_h, grid_w, L) uint32: distances of a golden vector (depth,) int8 at one cell, zeros elsewhere."""
        zeros = np.repeat([tap.zero_point for tap in self.taps], [tap.channels for tap in self.taps])
        values = np.split(vector.astype(np.int64) - zeros, np.cumsum([tap.channels for tap in self.taps])[:-1])
        half = len(values) // 2
        cells = np.zeros((1, *self.grid, half), np.uint32)
        place = divmod(int(position), self.grid[1])
        cells[0, place[0], place[1]] = [
            cosine_distances(s, t, self.bits) for s, t in zip(values[:half], values[half:], strict=True)
        ]
        return cells

    def vectors(self, maps: Sequence[np.ndarray], cells: Sequence[int]) -> np.ndarray:
        """(len(cells), depth) int8: what all taps of one image [(h, w, C)] have where the middles of grid cells lie."""
        found = []
        for cell in cells:
            i, j = divmod(int(cell), self.grid[1])
            parts = []
            for tap, q in zip(self.taps, maps, strict=True):
                row, column = ((2 * at + 1) * n // (2 * g) for at, n, g in zip((i, j), tap.size, self.grid, strict=True))
                parts.append(q[row, column])
            found.append(np.concatenate(parts))
        return np.stack(found).astype(np.int8)

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections TAPS, (2L, 8) int32, and STEP, (2L, 2) float64: scale twice."""
        rows = [(*tap.size, tap.channels, tap.zero_point, 0, 0, 1, 0) for tap in self.taps]
        return {
            "TAPS": np.array(rows, np.int32), "STEP": np.array([(tap.scale, tap.scale) for tap in self.taps], np.float64),
        }  # fmt: skip

    @classmethod
    def from_sections(cls, sections: Mapping[str, np.ndarray], grid: tuple[int, int], names: Sequence[str]) -> Pairs:
        """Rebuild from a bank's TAPS and STEP.

        Raises:
            InputError: a section is missing or malformed.
        """
        rows, steps = tap_rows(sections, grid, len(names)), take_section(sections, "STEP", (len(names), 2), "float64")
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            raise InputError(f"bank section STEP: scales must be positive and finite; {_REMEDY}")
        return cls(
            tuple(
                Tap(name, (int(r[0]), int(r[1])), int(r[2]), float(s[0]), int(r[3]), float(s[1]))
                for name, r, s in zip(names, rows, steps, strict=True)
            ),
            grid,
        )  # fmt: skip


def check_pairs(shapes: Sequence[tuple[int, int, int]]) -> None:
    """Raise InputError if (h, w, C) of all taps are not those of a student's maps, then of the teacher's same ones."""
    half = len(shapes) // 2
    if not 2 <= len(shapes) <= MAX_TAPS or len(shapes) % 2:
        raise InputError(f"student and teacher have {len(shapes)} maps; give an even number up to {MAX_TAPS}")
    for i, (s, t) in enumerate(zip(shapes[:half], shapes[half:], strict=True)):
        if tuple(s) != tuple(t):
            raise InputError(f"pair {i}: the student's map is {tuple(s)}, the teacher's {tuple(t)}; {_REMEDY}")


@dataclass(frozen=True)
class StudentTeacherScorer:
    """From distances of pairs to scores.

    Attributes:
        layers: (h, w, C) of every pair. grid: of the score map.
        shift: bits that the product of all pairs loses, so that it fits 32.
    """

    layers: tuple[tuple[int, int, int], ...]
    grid: tuple[int, int]
    shift: int
    kind = "STFP"
    required = ("CFG ",)
    root, sigma = False, 0.0

    @property
    def unit(self) -> float:
        """Of one step: the real score is the product of 1 - cos."""
        return math.ldexp(1.0, self.shift - len(self.layers) * fraction_bits(len(self.layers)))

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, L) uint32 distances -> (n, H, W) uint32."""
        if embeddings.dtype != np.uint32 or embeddings.shape[-1] != len(self.layers):
            found = f"{embeddings.dtype}{embeddings.shape}"
            raise InputError(f"distances are {found}; a student of {len(self.layers)} layers needs uint32 (n, H, W, L)")
        product = embeddings.astype(np.uint64).prod(-1)  # at most 2 ** 63
        return np.minimum(product >> np.uint64(self.shift), np.uint64((1 << 32) - 1)).astype(np.uint32)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of one image: a dot product and two lengths a position."""
        return sum(3 * math.prod(layer) for layer in self.layers)

    def positions(self) -> int:
        """Positions of all pairs, each with a root and a division."""
        return sum(h * w for h, w, _ in self.layers)

    def scratch_bytes(self) -> int:
        """Scratch of the runtime: distances of all pairs, uint32; a row of A_h and all rows of A_w of each, int32."""
        down, across = ([tap_support(layer[axis], self.grid[axis], 1) + 2 for layer in self.layers] for axis in (0, 1))
        return align(4 * self.positions()) + align(4 * (sum(down) + self.grid[1] * sum(across)))

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections, in file order."""
        return {"CFG ": np.array([len(self.layers), fraction_bits(len(self.layers)), self.shift, 0], np.int32)}

    @classmethod
    def from_sections(
        cls, sections: Mapping[str, np.ndarray], grid: tuple[int, int], depth: int
    ) -> StudentTeacherScorer:
        """Rebuild from a bank's sections, CFG and TAPS, whose channels add up to ``depth``.

        Raises:
            InputError: a section is missing or holds something else than a bank of this kind.
        """
        rows = sections["TAPS"].tolist()
        check_pairs([tuple(row[:3]) for row in rows])
        if any(row[4:] != [0, 0, 1, 0] for row in rows):
            raise InputError(f"bank section TAPS: a STFP bank has multiplier 0, shift 0 and pool 1; {_REMEDY}")
        pairs, bits, shift, zero = take_section(sections, "CFG ", (4,), "int32").tolist()
        wanted = (len(rows) // 2, fraction_bits(len(rows) // 2), 0)
        if (pairs, bits, zero) != wanted or not 0 <= shift <= MAX_SHIFT:
            raise InputError(f"bank section CFG : {pairs} pairs, {bits} bits, shift {shift}: not of its TAPS; {_REMEDY}")
        return cls(tuple((row[0], row[1], row[2]) for row in rows[:pairs]), grid, shift)


def pairs_of(tensors: Sequence[Tensor], grid: tuple[int, int] | None = None) -> Pairs:
    """Of the outputs of an int8 graph, the student's maps first.

    Args:
        grid: None: that of the student's finest map.

    Raises:
        InputError: a tensor that is no int8 map, or maps that do not pair up.
    """
    taps = []
    for tensor in tensors:
        if tensor.quantization is None or tensor.dtype != "int8" or len(tensor.shape) != 4:
            raise InputError(f"layer {tensor.name} is no int8 map but {tensor.dtype}{tensor.shape}; tap another layer")
        scale = float(tensor.quantization.scale[0])
        size, zero_point = (tensor.shape[1], tensor.shape[2]), int(tensor.quantization.zero_point[0])
        taps.append(Tap(tensor.name, size, tensor.shape[3], scale, zero_point, scale))
    finest = max((tap.size for tap in taps), key=lambda size: size[0] * size[1], default=(1, 1))
    return Pairs(tuple(taps), finest if grid is None else grid)


def golden_of(
    pairs: Pairs, scorer: StudentTeacherScorer, maps: Sequence[np.ndarray], cells: Sequence[int], task: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """TEST (n, depth) int8 and GOLD (n, 3) uint32 of one image's tapped maps [(h, w, C)] int8 at some grid cells."""
    vectors = pairs.vectors(maps, cells)
    scores = [scorer.score(pairs.with_vector(v, c)).flat[c] for v, c in zip(vectors, cells, strict=True)]
    return vectors, np.array([[task, cell, score] for cell, score in zip(cells, scores, strict=True)], np.uint32)


def choose_shift(pairs: Pairs, batches: Iterable[Sequence[np.ndarray]]) -> int:
    """The shift with which the largest score of good images has ``SCORE_BITS`` bits, or no defect can pass 32.

    Args:
        batches: of good images, [(n, h, w, C)] int8 each (``TapStore.batches()``).
    """
    largest = 0
    for maps in batches:
        largest = max(largest, int(pairs.integer(maps).astype(np.uint64).prod(-1).max(initial=0)))
    never = max(len(pairs.layers) * (pairs.bits + 1) - 32, 0)  # shift of the largest product there is
    return min(max(largest.bit_length() - SCORE_BITS, 0), never)
