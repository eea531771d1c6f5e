"""The integer scorer of CFA: how far a described patch is from its nearest centre, if no other is as near (bank kind CFAS).

Flows in: int8 embeddings (n, H, W, D) of the network's only tap, the descriptor without its coordinate part. Flows out:
(n, H, W) uint32 scores in steps of ``unit``, softmin(delta)_1 * delta_1 of the three smallest distances delta, in integers:

    v      = (e + offsets[i] + offsets[H + j] + half) >> shift         grid row i, column j; half = 2^shift / 2
    delta  = floor(sqrt(2^24 * |v - centre|^2)), the three smallest, ascending; 12 bits behind the point
    E_k    = exp table at delta_k - delta_1, 16 bits behind the point, interpolated, for k = 2, 3
    score  = (delta_1 * ((2^32 - 1) // (2^16 + E_2 + E_3))) >> 16

``offsets`` hold the descriptor's coordinate part less the middle of the centres, so that the centres fill int8. ``shift``
is 0 but for centres that reach beyond int8 in units of the embedding.

Of the same three distances in floating point the score is off by no more than a part of 0.0005 + unit, and two steps.
C: export/runtime/tvad_score_centres.c.

Source: Lee et al., CFA, IEEE Access 2022, equation of the anomaly score; the fixed-point form is ours, docs/SPEC.md, CFAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinyvad.detectors.distances import pairwise_squared
from tinyvad.detectors.sections import positive_unit, take_section
from tinyvad.embedding import align
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import round_half_away

NEAREST = 3
FRACTION = 12  # bits behind the point of a distance
TABLE = 512  # values of exp, the last one for all that is further
ONE = 1 << 16  # exp(0) in the table
FAR = 11.8  # exp(-FAR) rounds to 0 in the table
MAX_SHIFT = 7  # of v
MAX_STEP = 19  # bits of a difference of distances between two values of the table
LARGEST_VALUE = (1 << 15) - 1  # of |v - centre|
LARGEST_SUM = (1 << 31) - 2  # of a squared distance
_REMEDY = "build the bank again"


@dataclass(frozen=True, eq=False)
class CentresScorer:
    """Centres and what their distances are turned into scores with.

    Attributes:
        centres: (K, D) int8, K >= 3.
        offsets: (H + W, D) int16: added to every vector of a grid row, then of a grid column.
        table: (512,) uint32, exp(-i 2^step_bits unit) * 2^16.
        grid: (H, W).
        shift: of v, 0 to 7. step_bits: 0 to 19.
        unit: real value of one step of the score.
    """

    centres: np.ndarray
    offsets: np.ndarray
    table: np.ndarray
    grid: tuple[int, int]
    shift: int = 0
    step_bits: int = 0
    unit: float = 1.0
    kind = "CFAS"
    required = ("CFG ", "BIAS", "TABL", "BANK")
    root, sigma = False, 4.0

    @classmethod
    def of_centres(cls, centres: np.ndarray, rows: np.ndarray, columns: np.ndarray, step: float) -> CentresScorer:
        """Quantise CFA's centres: distances of map + rows[i] + columns[j] to them.

        Args:
            centres: (K, D) float. rows: (H, D) and columns: (W, D) float, the descriptor's coordinate part.
            step: real value of one unit of the embedding.

        Raises:
            InputError: fewer than three centres, numbers that are not finite, or centres far beyond the embedding's reach.
        """
        floats = [np.asarray(a, np.float64) for a in (centres, rows, columns)]
        if len(floats[0]) < NEAREST:
            raise InputError(f"cfa: {len(floats[0])} centres; a bank needs {NEAREST}: use a finer grid or more centres")
        if not (all(np.isfinite(a).all() for a in floats) and np.isfinite(step) and step > 0):
            raise InputError("cfa: the descriptor or its centres are not finite; train again with a smaller learning rate")
        points, down, across = (a / step for a in floats)
        middle = (points.max(0) + points.min(0)) / 2  # (D,)
        reach = float(np.abs(points - middle).max())
        shift = next((s for s in range(MAX_SHIFT + 1) if reach <= 127 << s), None)
        offsets = round_half_away(np.concatenate([down - middle, across]))
        if shift is None or np.abs(offsets).max() > LARGEST_VALUE:
            furthest = max(reach, float(np.abs(offsets).max()))
            raise InputError(
                f"cfa: centres and coordinates reach {furthest:.0f} units of the features, int8; train on more images"
            )
        unit = step * 2.0 ** (shift - FRACTION)
        step_bits = next((b for b in range(MAX_STEP) if (TABLE - 1) * unit * (1 << b) >= FAR), MAX_STEP)
        table = round_half_away(ONE * np.exp(-unit * (1 << step_bits) * np.arange(TABLE))).astype(np.uint32)
        quantised = round_half_away((points - middle) / (1 << shift)).astype(np.int8)
        grid = (len(down), len(across))
        made = cls(quantised, offsets.astype(np.int16), table, grid, shift, step_bits, unit)
        made.check()
        return made

    def check(self) -> None:
        """Raise InputError if a distance could pass its width; the device checks the same."""
        largest = np.abs(self.offsets.astype(np.int64))
        most = 128 + int(largest[: self.grid[0]].max()) + int(largest[self.grid[0] :].max())
        apart = ((most + (1 << self.shift >> 1)) >> self.shift) + 128
        depth = self.centres.shape[1]
        if apart > LARGEST_VALUE or depth * apart**2 > LARGEST_SUM:
            raise InputError(
                f"bank section BIAS: {depth} values, {apart} from a centre at most, pass 32 bits; train on more images"
            )

    def queries(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W, D) int16: v."""
        depth = self.centres.shape[1]
        if embeddings.dtype != np.int8 or embeddings.shape[1:] != (*self.grid, depth):
            found = f"{embeddings.dtype}{embeddings.shape}"
            raise InputError(f"embeddings are {found}; the bank needs int8 (n, {self.grid[0]}, {self.grid[1]}, {depth})")
        rows, columns = self.offsets[: self.grid[0]].astype(np.int32), self.offsets[self.grid[0] :].astype(np.int32)
        moved = embeddings + (rows[:, None] + columns + (1 << self.shift >> 1))
        return (moved >> self.shift).astype(np.int16)

    def nearest(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W, 3) int64: the three smallest squared distances, ascending."""
        queries = self.queries(embeddings).reshape(-1, self.centres.shape[1])
        found = np.empty((len(queries), NEAREST), np.int64)
        for part, squared in pairwise_squared(queries, self.centres):
            found[part] = np.sort(np.partition(squared, NEAREST - 1, axis=1)[:, :NEAREST], axis=1)
        return found.reshape(*embeddings.shape[:3], NEAREST)

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32."""
        return self.scores_of(self.nearest(embeddings))

    def scores_of(self, squared: np.ndarray) -> np.ndarray:
        """(..., 3) int64 ascending squared distances below 2^31 -> (...) uint32."""
        shifted = squared << 2 * FRACTION  # below 2^55
        delta = np.sqrt(shifted.astype(np.float64)).astype(np.int64)
        delta -= delta * delta > shifted  # the root may have been rounded up
        others = self._exp(delta[..., 1:] - delta[..., :1]).sum(-1)
        return ((delta[..., 0] * (((1 << 32) - 1) // (ONE + others))) >> 16).astype(np.uint32)

    def _exp(self, differences: np.ndarray) -> np.ndarray:
        """2^16 exp(-difference * unit), int64, interpolated between values of the table."""
        table, span = self.table.astype(np.int64), 1 << self.step_bits
        at = np.minimum(differences >> self.step_bits, TABLE - 1)
        part = np.where(at < TABLE - 1, differences & (span - 1), 0)
        return (table[at] * (span - part) + table[np.minimum(at + 1, TABLE - 1)] * part) >> self.step_bits

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of one image."""
        return grid[0] * grid[1] * self.centres.size

    def scratch_bytes(self) -> int:
        """Scratch of the runtime: one cell's v, int16."""
        return align(2 * self.centres.shape[1])

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections, in file order."""
        return {
            "CFG ": np.array([*self.centres.shape, self.shift, self.step_bits], np.int32),
            "SCAL": np.array([self.unit]),
            "BIAS": self.offsets,
            "TABL": self.table,
            "BANK": self.centres,
        }

    @classmethod
    def from_sections(
        cls, sections: Mapping[str, np.ndarray], grid: tuple[int, int], depth: int
    ) -> CentresScorer:
        """Rebuild from a bank's sections, for embeddings of ``depth`` values.

        Raises:
            InputError: a section is missing or has another shape, dtype or range than the kind needs.
        """
        count, values, shift, step_bits = take_section(sections, "CFG ", (4,), "int32").tolist()
        if count < NEAREST or values != depth or not (0 <= shift <= MAX_SHIFT and 0 <= step_bits <= MAX_STEP):
            raise InputError(
                f"bank section CFG : {count} centres of {values} values, shifts {shift} and {step_bits}; "
                f"expected {NEAREST} or more of {depth}, shifts up to {MAX_SHIFT} and {MAX_STEP}; {_REMEDY}"
            )
        table = take_section(sections, "TABL", (TABLE,), "uint32")
        if table.max() > ONE:
            raise InputError(f"bank section TABL: {table.max()} is more than {ONE}; {_REMEDY}")
        centres = take_section(sections, "BANK", (count, depth), "int8")
        offsets = take_section(sections, "BIAS", (grid[0] + grid[1], depth), "int16")
        made = cls(centres, offsets, table, grid, shift, step_bits, positive_unit(sections))
        made.check()
        return made
