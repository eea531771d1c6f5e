"""The embedding: tapped int8 maps in, one int8 vector a grid cell out, in integers that C repeats bit for bit.

Every tap passes one linear operator an axis: a box of three (the papers' 3x3 average pooling: zero padding, divisor
always 9), then the way onto the grid: the mean over the part of the map that a cell covers where the map is finer than
the grid, bilinear interpolation (half-pixel centres) where it is coarser. Both are rational, so the operator is a
matrix of integers and one common denominator, and the whole embedding of a tap is

    e = clamp(requantise(A_h . (q - zero_point) . A_w^T))

with TFLite's own fixed-point multiplier for ``tap scale / (denominators * step)``. ``step`` is the real value of one
unit of the embedding: the same for all taps where distances between vectors count (PatchCore), each tap's own where
the detector whitens anyway (PaDiM).

Source: PatchCore (Roth et al. 2022, section 3.1) and PaDiM (Defard et al. 2021, section III.A); the integer form is ours,
docs/SPEC.md section "TAPS".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier, quantize_multiplier
from tinyvad.graph.ir import Tensor

POOL = 3
HEADROOM = 1.2  # defects reach further than good images
INT32_MAX = (1 << 31) - 1
MAX_TAPS = 16  # tapped tensors of one bank (TVAD_MAX_TAPS)
MAX_DEPTH = 65535  # values of one cell's vector: 16 bits in the runtime
CHANNELS_AT_ONCE = 4  # that the runtime carries through both axes together

# one row of section TAPS, and what each field may be
TAP_FIELDS = ("height", "width", "channels", "zero point", "multiplier", "shift", "pool", "reserved")
TAP_RANGES = ((1, 4096), (1, 4096), (1, 4096), (-128, 127), (0, INT32_MAX), (-31, 30), (1, 7), (0, 0))


def pool_matrix(size: int, window: int = POOL) -> np.ndarray:
    """(size, size) int64: sums over a centred window of odd width, zeros outside; denominator ``window``."""
    i = np.arange(size)
    return (np.abs(i[:, None] - i[None]) <= window // 2).astype(np.int64)


def align_matrix(size: int, grid: int) -> tuple[np.ndarray, int]:
    """(grid, size) int64 and its denominator (every row's sum): area mean onto a coarser, bilinear onto a finer grid."""
    if size >= grid:
        # in units of 1 / (size * grid): cell i covers [i*size, (i+1)*size), element j covers [j*grid, (j+1)*grid)
        i, j = np.arange(grid)[:, None], np.arange(size)[None]
        overlap = np.minimum((i + 1) * size, (j + 1) * grid) - np.maximum(i * size, j * grid)
        return np.maximum(overlap, 0).astype(np.int64), size
    # in units of 1 / (2*grid): the cell's centre lies at (2i + 1) * size - grid elements
    matrix = np.zeros((grid, size), np.int64)
    position = np.clip((2 * np.arange(grid) + 1) * size - grid, 0, 2 * grid * (size - 1))
    low, part = position // (2 * grid), position % (2 * grid)
    rows = np.arange(grid)
    matrix[rows, low] += 2 * grid - part
    matrix[rows, np.minimum(low + 1, size - 1)] += part
    return matrix, 2 * grid


def tap_matrix(size: int, grid: int, pool: int = POOL) -> tuple[np.ndarray, int]:
    """Pooling and alignment of one axis as one (grid, size) int64 matrix and its denominator."""
    matrix, _ = align_matrix(size, grid)
    return matrix @ pool_matrix(size, pool), tap_denominator(size, grid, pool)


def tap_denominator(size: int, grid: int, pool: int = POOL) -> int:
    """What the rows of ``tap_matrix`` are divided by; no row's sum is larger."""
    return (size if size >= grid else 2 * grid) * pool


def tap_support(size: int, grid: int, pool: int = POOL) -> int:
    """Most values of an axis that one row of ``tap_matrix`` reaches; what the runtime keeps room for."""
    aligned = -(-size // grid) + (size % grid != 0) if size >= grid else 2
    return min(size, aligned + pool - 1)


@dataclass(frozen=True)
class Tap:
    """One tapped tensor and how it enters the embedding.

    Attributes:
        name: the tensor's name.
        size: (h, w) of its map.
        channels: its channels.
        scale, zero_point: its int8 quantisation.
        step: real value of one unit of this tap's part of the embedding.
    """

    name: str
    size: tuple[int, int]
    channels: int
    scale: float
    zero_point: int
    step: float


@dataclass(frozen=True)
class Embedding:
    """From tapped maps to (n, grid_h, grid_w, D) vectors.

    Attributes:
        taps: in the order of the graph's outputs; D is the sum of their channels.
        grid: (grid_h, grid_w).
        pool: width of the average pooling before alignment (odd; 1 for none).
    """

    taps: tuple[Tap, ...]
    grid: tuple[int, int]
    pool: int = POOL
    native = False  # a tap's part of what is scored is not the tap itself

    def __post_init__(self) -> None:
        if not 1 <= len(self.taps) <= MAX_TAPS or self.depth > MAX_DEPTH:
            raise InputError(
                f"{len(self.taps)} tapped tensors of {self.depth} channels; a bank takes 1 to {MAX_TAPS} and {MAX_DEPTH}"
            )
        for tap in self.taps:
            _, shift = self.multiplier(tap)
            reach = 255 * self._denominator(tap)  # of |q - zero point| times a row of A_h and one of A_w
            if reach > INT32_MAX:
                raise InputError(
                    f"layer {tap.name}: a {tap.size[0]}x{tap.size[1]} map is too fine for a {self.grid[0]}x{self.grid[1]} "
                    "grid in 32-bit sums; tap a later layer or use a finer grid"
                )
            if reach << max(shift, 0) > INT32_MAX:
                raise InputError(
                    f"layer {tap.name}: a step of {tap.step:g} is too fine for its scale {tap.scale:g} in 32-bit sums"
                )

    @property
    def depth(self) -> int:
        """D, the length of one vector."""
        return sum(tap.channels for tap in self.taps)

    @property
    def steps(self) -> np.ndarray:
        """(D,) float64: real value of one unit of each element."""
        return np.concatenate([np.full(tap.channels, tap.step) for tap in self.taps])

    def multiplier(self, tap: Tap) -> tuple[int, int]:
        """Fixed-point (multiplier, shift) of scale / (denominators * step), which turns a tap's sums into units."""
        return quantize_multiplier(tap.scale / (self._denominator(tap) * tap.step))

    def _denominator(self, tap: Tap) -> int:
        return math.prod(tap_denominator(s, g, self.pool) for s, g in zip(tap.size, self.grid, strict=True))

    def scratch_bytes(self, tap: Tap) -> int:
        """Scratch of the runtime's ``tvad_embed`` for a tap, exactly."""
        return tap_scratch_bytes(tap.size, self.grid, self.pool)

    def integer(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """(n, grid_h, grid_w, D) int8 from the tapped int8 maps [(n, h, w, c)]: what the device computes."""
        parts = []
        for tap, q in zip(self.taps, maps, strict=True):
            rows, _ = tap_matrix(tap.size[0], self.grid[0], self.pool)
            columns, _ = tap_matrix(tap.size[1], self.grid[1], self.pool)
            # float64 holds these integers (< 2**31) exactly, and multiplies matrices fast
            sums = _separable(q.astype(np.float64) - tap.zero_point, rows, columns)
            scaled = multiply_by_quantized_multiplier(sums.astype(np.int64), *self.multiplier(tap))
            parts.append(np.clip(scaled, -127, 127).astype(np.int8))
        return np.concatenate(parts, axis=-1)

    def real(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """(n, grid_h, grid_w, D) float32 from tapped float maps: the same operator without rounding, for study."""
        parts = []
        for tap, values in zip(self.taps, maps, strict=True):
            rows, row_denominator = tap_matrix(tap.size[0], self.grid[0], self.pool)
            columns, column_denominator = tap_matrix(tap.size[1], self.grid[1], self.pool)
            sums = _separable(values.astype(np.float64), rows, columns)
            parts.append((sums / (row_denominator * column_denominator)).astype(np.float32))
        return np.concatenate(parts, axis=-1)

    def quantize_maps(self, maps: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float tapped maps on the taps' own int8 grids, so that a float engine meets the one integer scoring rule."""
        return [on_grid(values, tap.scale, tap.zero_point) for tap, values in zip(self.taps, maps, strict=True)]

    def with_vector(self, vector: np.ndarray, position: int) -> np.ndarray:
        """(1, grid_h, grid_w, D) int8: a golden vector at one cell, zeros elsewhere."""
        cells = np.zeros((1, *self.grid, len(vector)), np.int8)
        cells[0, position // self.grid[1], position % self.grid[1]] = vector
        return cells

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections: TAPS, what the device needs, (n, 8) int32; STEP, (n, 2) float64 (scale, step)."""
        rows = [
            (*tap.size, tap.channels, tap.zero_point, *self.multiplier(tap), self.pool, 0) for tap in self.taps
        ]
        steps = [(tap.scale, tap.step) for tap in self.taps]
        return {"TAPS": np.array(rows, np.int32), "STEP": np.array(steps, np.float64)}

    @classmethod
    def from_sections(
        cls, sections: Mapping[str, np.ndarray], grid: tuple[int, int], names: Sequence[str]
    ) -> Embedding:
        """Rebuild from a bank's TAPS and STEP.

        Args:
            sections: arrays by tag. grid: (grid_h, grid_w). names: of the tapped tensors.

        Raises:
            InputError: a section is missing or malformed, or the two don't agree (section, row and field are named).
        """
        n = len(names)
        rows, steps = tap_rows(sections, grid, n), sections.get("STEP")
        if steps is None or steps.shape != (n, 2) or steps.dtype != np.float64:
            raise InputError(f"bank section STEP: expected float64 ({n}, 2) for the {n} tapped tensors")
        for i, pair in enumerate(steps):
            for field, value in zip(("scale", "step"), pair.tolist(), strict=True):
                if not (math.isfinite(value) and value > 0):
                    raise InputError(f"bank section STEP, row {i}: {field} is {value}; it must be positive and finite")
        taps = tuple(
            Tap(name, (int(r[0]), int(r[1])), int(r[2]), float(s[0]), int(r[3]), float(s[1]))
            for name, r, s in zip(names, rows, steps, strict=True)
        )
        embedding = cls(taps, grid, int(rows[0, 6]))
        for i, (row, tap) in enumerate(zip(rows, taps, strict=True)):
            for field, stored, expected in zip(TAP_FIELDS[4:6], row[4:6].tolist(), embedding.multiplier(tap), strict=True):
                if stored != expected:
                    raise InputError(
                        f"bank section TAPS, row {i}: {field} is {stored}, but section STEP and the grid give {expected}"
                    )
        return embedding


def tap_rows(sections: Mapping[str, np.ndarray], grid: tuple[int, int], count: int) -> np.ndarray:
    """A bank's TAPS, (count, 8) int32, after every check that the device makes of it (docs/SPEC.md); STEP is for tools.

    Raises:
        InputError: it is missing or malformed, or sums could pass 32 bits (row and field are named).
    """
    rows = sections.get("TAPS")
    if not 1 <= count <= MAX_TAPS or rows is None or rows.shape != (count, len(TAP_FIELDS)) or rows.dtype != np.int32:
        raise InputError(f"bank section TAPS: expected int32 ({count}, 8) for the {count} tapped tensors, 1 to {MAX_TAPS}")
    for i, row in enumerate(rows.tolist()):
        where = f"bank section TAPS, row {i}"
        for field, (low, high), value in zip(TAP_FIELDS, TAP_RANGES, row, strict=True):
            if not low <= value <= high:
                raise InputError(f"{where}: {field} is {value}; it must be {low} to {high}")
        height, width, channels, _, _, shift, pool, _ = row
        if pool % 2 == 0 or pool != rows[0, 6]:
            raise InputError(f"{where}: pool is {pool}; it must be odd and the same in all rows")
        reach = 255 * tap_denominator(height, grid[0], pool) * tap_denominator(width, grid[1], pool) << max(shift, 0)
        if max(reach, height * width * channels) > INT32_MAX:
            raise InputError(f"{where}: a {height}x{width}x{channels} map, shift {shift}, passes 32 bits on this grid")
    depth = int(rows[:, 2].sum())
    if depth > MAX_DEPTH:
        raise InputError(f"bank section TAPS: {depth} channels in all; at most {MAX_DEPTH}")
    return rows


def tap_scratch_bytes(size: tuple[int, int], grid: tuple[int, int], pool: int) -> int:
    """Scratch of ``tvad_embed``: what one row and all columns reach and with which weights, and four channels of one row of
    sums; all int32."""
    rows, columns = (tap_support(s, g, pool) + 2 for s, g in zip(size, grid, strict=True))
    return align(4 * (rows + grid[1] * columns + CHANNELS_AT_ONCE * size[1]))


def align(nbytes: int, step: int = 16) -> int:
    """``nbytes`` rounded up to the runtime's unit of scratch."""
    return -(-nbytes // step) * step


def on_grid(values: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """Float values as int8 on a tensor's own grid, clipped to it."""
    return np.clip(np.rint(values / scale) + zero_point, -128, 127).astype(np.int8)


def _separable(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """rows (G, h) . x (n, h, w, c) . columns^T (w, G') -> (n, G, G', c)."""
    n, h, w, c = x.shape
    x = (rows.astype(np.float64) @ x.reshape(n, h, w * c)).reshape(n, rows.shape[0], w, c)
    return np.matmul(columns.astype(np.float64), x)


def make_taps(tensors: Sequence[Tensor], pooled_limits: Sequence[float], common_step: bool) -> tuple[Tap, ...]:
    """Taps from the graph's output tensors and the largest |pooled value| of each on good images.

    The step is that limit / 127 with a fifth of headroom; with ``common_step`` the largest of them serves all taps. A
    tap that showed less than one unit of its own grid gets that unit as its limit.

    Raises:
        InputError: a tensor that isn't int8, or no map.
    """
    quantizations = []
    for tensor in tensors:
        if tensor.quantization is None or tensor.dtype != "int8":
            raise InputError(f"layer {tensor.name} is not an int8 tensor; tap a quantised layer")
        if len(tensor.shape) != 4:
            raise InputError(f"layer {tensor.name} is no map but {tensor.shape}; tap an earlier layer")
        quantizations.append((float(tensor.quantization.scale[0]), int(tensor.quantization.zero_point[0])))
    limits = [max(limit, scale) for limit, (scale, _) in zip(pooled_limits, quantizations, strict=True)]
    steps = [limit * HEADROOM / 127 for limit in limits]
    if common_step:
        steps = [max(steps)] * len(steps)
    return tuple(
        Tap(tensor.name, (tensor.shape[1], tensor.shape[2]), tensor.shape[3], scale, zero_point, step)
        for tensor, (scale, zero_point), step in zip(tensors, quantizations, steps, strict=True)
    )
