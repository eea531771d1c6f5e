"""The integer scorer of all PaDiM variants: squared Mahalanobis distances from a triangular factor, cell by cell.

Flows in: int8 embeddings (n, H, W, D). Flows out: (n, H, W) uint32, the squared distance in 1/256 (Q8). C computes the
same integers (docs/SPEC.md, kinds PADM, PADF, PADC). A cell p stores its mean m, and W = L^-1 of its covariance
C = L L' as W = diag(a) (I + N) with N strictly lower triangular:

1. y = x (identity), x[indices] (a fixed subset) or sat8(requantise(U' x + bias)) (a projection)      int8
2. t = y - m                                                                                          9 bits
3. inner_i = sum_{j<i} q_ij t_j, N_ij = s_i q_ij with q of 4 or 8 bits (none in the diagonal form)     < 2**23
4. v_i = 2**8 t_i + round(inner_i S[s code] / 2**(SHIFT - 8))                                          Q8, int32
5. r_i = sat(round(v_i A[a code] / 2**SHIFT))                                                          Q8, 21 bits
6. distance squared = (sum_i r_i**2) >> 8                                                              Q8, sat uint32

a and s are 8-bit codes into two tables of 256 uint32, spaced evenly in log2. Source: reference study of compact PaDiM
banks; triangular factor of a covariance: Golub & Van Loan, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinyvad.bank import pack_nibbles, unpack_nibbles
from tinyvad.detectors.sections import take_section
from tinyvad.embedding import align
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import (
    multiply_by_quantized_multiplier,
    quantize_multipliers,
    round_half_away,
)

TABLE_SHIFT = 16
MAX_VALUES = 512  # d: inner sums stay below 2**24
CELLS_AT_ONCE = 2  # that the runtime projects together
RESIDUAL_LIMIT = (1 << 20) - 1
UNIT = 1.0 / 16.0  # distance = sqrt(Q8 value) / 16


@dataclass(frozen=True, eq=False)
class Projection:
    """y = sat8(requantise(x . weights + bias)): weights (D, d) int8, bias (d,) int32, one multiplier a column."""

    weights: np.ndarray
    bias: np.ndarray
    multipliers: np.ndarray
    shifts: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """(..., D) int8 -> (..., d) int8."""
        exact = np.float32 if len(self.weights) * 128 * 128 < 1 << 24 else np.float64  # that holds every sum
        acc = x.astype(exact) @ self.weights.astype(exact)
        y = multiply_by_quantized_multiplier(acc.astype(np.int64) + self.bias, self.multipliers, self.shifts)
        return np.clip(y, -127, 127).astype(np.int8)


@dataclass(frozen=True, eq=False)
class TriangularScorer:
    """What the bank stores and the device computes; see the module's text.

    Attributes:
        kind: 'PADM' (bits 0), 'PADF' (no projection) or 'PADC' (projection).
        mean: (H, W, d) int8.
        a_code: (H, W, d) uint8; s_code: (H, W, d) uint8 or None when bits is 0.
        factor: (H, W, d * (d - 1) / 2) int8, rows of the strictly lower triangle one after another, or None.
        bits: 0, 4 or 8.
        a_table, s_table: (256,) uint32, value * 2**16.
        indices: (d,) uint16 subset of the embedding, or None.
        projection: or None.
    """

    mean: np.ndarray
    a_code: np.ndarray
    a_table: np.ndarray
    bits: int
    s_code: np.ndarray | None = None
    s_table: np.ndarray | None = None
    factor: np.ndarray | None = None
    indices: np.ndarray | None = None
    projection: Projection | None = None

    unit, root, sigma = UNIT, True, 4.0

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(self.sections())

    @property
    def kind(self) -> str:
        if self.bits == 0:
            return "PADM"
        return "PADC" if self.projection is not None else "PADF"

    @property
    def grid(self) -> tuple[int, int]:
        return self.mean.shape[0], self.mean.shape[1]

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32 squared distances in Q8."""
        if embeddings.dtype != np.int8:
            raise InputError(f"the integer scorer takes int8 embeddings, not {embeddings.dtype}")
        if self.projection is not None:
            y = self.projection.apply(embeddings)
        else:
            y = embeddings if self.indices is None else embeddings[..., self.indices]
        t = y.astype(np.int64) - self.mean  # (n, H, W, d)
        v = t << 8
        if self.factor is not None and self.s_code is not None and self.s_table is not None:
            # (H, W, d, d) . (H, W, d, n): exact in float32, as |inner| <= 128 * 255 * 511 < 2**24
            inner = np.matmul(self._lower, t.transpose(1, 2, 3, 0).astype(np.float32)).transpose(3, 0, 1, 2)
            v = v + _scale(inner.astype(np.int64), self.s_table[self.s_code], TABLE_SHIFT - 8)
        v = np.clip(v, -(1 << 31), (1 << 31) - 1)
        r = np.clip(_scale(v, self.a_table[self.a_code]), -RESIDUAL_LIMIT, RESIDUAL_LIMIT)
        return np.minimum((r * r).sum(-1) >> 8, (1 << 32) - 1).astype(np.uint32)

    @cached_property
    def _lower(self) -> np.ndarray:
        """(H, W, d, d) float32: the factor with zeros on and above the diagonal."""
        assert self.factor is not None
        d = self.mean.shape[-1]
        full = np.zeros((*self.grid, d, d), np.float32)
        i, j = np.tril_indices(d, -1)
        full[..., i, j] = self.factor
        return full

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of one image."""
        cells, d = self.mean[..., 0].size, self.mean.shape[-1]
        project = self.projection.weights.size if self.projection is not None else 0
        return cells * (project + (d * (d + 1) // 2 if self.bits else d))

    def scratch_bytes(self) -> int:
        """Scratch of the runtime: int16 vectors of two cells before and after the projection, one cell's twice in the order
        of SIMD, and its inner sums."""
        d = self.mean.shape[-1]
        vectors = 2 * CELLS_AT_ONCE * align(len(self.projection.weights), 2) if self.projection is not None else 0
        return align(vectors) + align(2 * CELLS_AT_ONCE * d) + (align(4 * align(d, 8) + 4 * d) if self.bits else 0)

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections, in file order (docs/SPEC.md)."""
        d = self.mean.shape[-1]
        mode = 2 if self.projection is not None else int(self.indices is not None)
        codes, tables = [self.a_code], [self.a_table]
        if self.s_code is not None and self.s_table is not None:
            codes.append(self.s_code)
            tables.append(self.s_table)
        result = {
            "CFG ": np.array([d, self.bits, mode, TABLE_SHIFT], np.int32),
            "MEAN": self.mean,
            "SCAL": np.concatenate(codes, -1),
            "TABL": np.stack(tables),
        }
        if self.factor is not None:
            result["CHOL"] = pack_nibbles(self.factor) if self.bits == 4 else self.factor
        if self.projection is not None:
            p = self.projection
            result["PROJ"] = p.weights
            result["BIAS"] = np.stack([p.bias, p.multipliers, p.shifts]).astype(np.int32)
        if self.indices is not None:
            result["INDX"] = self.indices
        return result

    @classmethod
    def from_sections(cls, sections: Mapping[str, np.ndarray], grid: tuple[int, int], depth: int) -> TriangularScorer:
        """Rebuild from a bank's sections.

        Raises:
            InputError: a section is missing or has another shape, dtype or range than the kind needs.
        """
        config = take_section(sections, "CFG ", (4,), "int32")
        d, bits, mode, table_shift = (int(v) for v in config)
        if bits not in (0, 4, 8) or mode not in (0, 1, 2) or table_shift != TABLE_SHIFT or not 1 <= d <= MAX_VALUES:
            raise InputError(f"bank section CFG : values {config.tolist()} are not those of a PaDiM bank")
        mean = take_section(sections, "MEAN", (*grid, d), "int8")
        codes = take_section(sections, "SCAL", (*grid, d if bits == 0 else 2 * d), "uint8")
        tables = take_section(sections, "TABL", (1 if bits == 0 else 2, 256), "uint32")
        projection = indices = factor = s_code = s_table = None
        if bits:
            pairs = d * (d - 1) // 2
            if bits == 4:
                factor = unpack_nibbles(take_section(sections, "CHOL", (*grid, (pairs + 1) // 2), "uint8"), pairs)
            else:
                factor = take_section(sections, "CHOL", (*grid, pairs), "int8")
            s_code, s_table = codes[..., d:], tables[1]
        if mode == 2:
            numbers = take_section(sections, "BIAS", (3, d), "int32").astype(np.int64)
            projection = Projection(take_section(sections, "PROJ", (depth, d), "int8"), *numbers)
            _check_projection(projection)
        if mode == 1:
            indices = take_section(sections, "INDX", (d,), "uint16")
        if (mode == 0 and d != depth) or (indices is not None and indices.max() >= depth):
            raise InputError(f"bank section CFG : d = {d} does not go with an embedding of {depth} values")
        return cls(mean, codes[..., :d], tables[0], bits, s_code, s_table, factor, indices, projection)


def _check_projection(projection: Projection) -> None:
    """What the device demands of BIAS, so that no sum passes 32 bits; InputError names the direction."""
    reach = np.abs(projection.bias) + 127 * np.abs(projection.weights.astype(np.int64)).sum(0)  # (d,), |e| <= 127
    right = (projection.shifts >= -31) & (projection.shifts <= 30) & (projection.multipliers >= 0)
    most = (1 << 31) - 1 >> np.clip(projection.shifts, 0, 30)
    wrong = np.flatnonzero(~right | (reach > most))
    if wrong.size:
        raise InputError(f"bank section BIAS: direction {wrong[0]} passes 32 bits; build the bank again")


def _scale(x: np.ndarray, table_values: np.ndarray, shift: int = TABLE_SHIFT) -> np.ndarray:
    """round(x * value / 2**shift), halves up: (x * value + 2**(shift - 1)) >> shift in int64."""
    return (x * table_values.astype(np.int64) + (1 << (shift - 1))) >> shift


def log_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive values -> (uint8 codes of the same shape, (256,) uint32 table of value * 2**16), even steps in log2."""
    logs = np.log2(np.maximum(values, 1e-9))
    low, high = float(logs.min()), float(logs.max())
    step = max((high - low) / 255, 1e-9)
    codes = np.clip(round_half_away((logs - low) / step), 0, 255).astype(np.uint8)
    table = round_half_away(np.exp2(low + step * np.arange(256)) * (1 << TABLE_SHIFT))
    return codes, np.clip(table, 0, (1 << 32) - 1).astype(np.uint32)


def make_scorer(
    mean: np.ndarray,
    covariance: np.ndarray,
    bits: int,
    indices: np.ndarray | None = None,
    projection: Projection | None = None,
) -> TriangularScorer:
    """Quantise Gaussians that are given in the int8 units of y.

    Args:
        mean: (H, W, d) float64, in units of y.
        covariance: (H, W, d, d) float64 in units of y squared, positive definite; (H, W, d) variances for bits 0.
        bits: 0 (diagonal), 4 or 8 bits a factor entry.
    """
    m = np.clip(round_half_away(mean), -127, 127).astype(np.int8)
    if bits == 0:
        a_code, a_table = log_codes(1 / np.sqrt(covariance))
        return TriangularScorer(m, a_code, a_table, 0, indices=indices, projection=projection)
    d = mean.shape[-1]
    w = np.linalg.inv(np.linalg.cholesky(covariance))  # (H, W, d, d) lower triangular
    a = w.diagonal(axis1=-2, axis2=-1)  # (H, W, d)
    i, j = np.tril_indices(d, -1)
    n = np.zeros_like(w)
    n[..., i, j] = (w / a[..., None])[..., i, j]
    largest = (1 << (bits - 1)) - 1
    s = np.maximum(np.abs(n).max(-1) / largest, 2.0**-TABLE_SHIFT)
    s[..., 0] = s[..., 1:].min() if d > 1 else s[..., 0]  # the first row has no entries: keep it out of the range
    a_code, a_table = log_codes(a)
    s_code, s_table = log_codes(s)
    step = (s_table[s_code] / (1 << TABLE_SHIFT))[..., None]
    q = np.clip(round_half_away(n / step), -largest, largest).astype(np.int8)[..., i, j]
    return TriangularScorer(m, a_code, a_table, bits, s_code, s_table, q, indices, projection)


def make_projection(u: np.ndarray, offset: np.ndarray, step: float) -> tuple[Projection, np.ndarray]:
    """Quantise y = U'(x - offset) / step; returns the projection and the U that its integers stand for.

    Args:
        u: (D, d) float64, acting on int8 embedding units.
        offset: (D,) float64, int8 embedding units.
        step: value of one unit of y.
    """
    column_scale = np.abs(u).max(0) / 127  # (d,)
    weights = round_half_away(u / column_scale)
    u_rounded = weights * column_scale
    bias = round_half_away(-(offset @ u_rounded) / column_scale).astype(np.int64)
    multipliers, shifts = quantize_multipliers(column_scale / step)
    return Projection(weights.astype(np.int8), bias, multipliers, shifts), u_rounded
