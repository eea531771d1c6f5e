"""Exhaustive nearest neighbours: queries and a memory bank in, squared distances out, as matrix products.

||x - m||**2 = ||x||**2 + ||m||**2 - 2 x.m turns the search into one matrix product a block. On int8 vectors (queries may be
int16) it is exact: float32 holds every integer below 2**24 and float64 every one below 2**53, so the smaller type that is
sure to hold them is used, and neither the order of additions nor the number of threads can matter. On float32 vectors the
sums are made in float64, so that what cancels leaves enough digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

TILE = 1 << 20  # distances in memory at a time


def exact_dtype(queries: np.ndarray, bank: np.ndarray) -> type[np.floating]:
    """The fastest float type in which all sums of ``pairwise_squared`` are good: exact where both are integers."""
    if queries.dtype not in (np.int8, np.int16) or bank.dtype != np.int8:
        return np.float64
    # partial sums of x.m stay below ||x|| ||m||, so no term passes (||x|| + ||m||)**2
    largest = [np.sqrt(_squares(a).max(initial=0)) for a in (queries, bank)]
    return np.float32 if (largest[0] + largest[1] + 1) ** 2 < 1 << 24 else np.float64


def _squares(vectors: np.ndarray) -> np.ndarray:
    """(n, D) -> (n,) float64 squared norms, exact for int8."""
    return np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)


def pairwise_squared(queries: np.ndarray, bank: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows of queries, (rows, K) float squared distances to all of the bank), a tile at a time."""
    dtype = exact_dtype(queries, bank)
    transposed, norms = bank.astype(dtype).T, _squares(bank).astype(dtype)
    step = max(1, TILE // len(bank))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        squared = (part.astype(dtype) * dtype(-2)) @ transposed
        squared += norms
        squared += _squares(part).astype(dtype)[:, None]
        yield slice(start, start + len(part)), np.maximum(squared, 0, out=squared)


def nearest(queries: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance (q,) float64 to, and row (q,) int64 of the nearest of (K, D) rows; of equals the lowest row."""
    squared, rows = np.empty(len(queries)), np.empty(len(queries), np.int64)
    for part, matrix in pairwise_squared(queries, bank):
        rows[part] = matrix.argmin(1)
        squared[part] = np.take_along_axis(matrix, rows[part, None], 1)[:, 0]
    return squared, rows
