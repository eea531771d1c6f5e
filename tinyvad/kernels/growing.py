"""Inner loops of a bank that grows: distances to it, the rows that stay when it is thinned out, its closest pairs.

Flows in: flat rows (n * width,) int8 or float32, width a multiple of 16. Flows out: squared distances, int32 or float32,
in the one order of additions of ``tinyvad.kernels.coreset``, so results depend neither on threads nor on the processor.
The readable twins stand in ``tinyvad.continual.growing_bank``; they agree to the last bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from tinyvad.kernels.coreset import squared_distance


@njit(cache=True, nogil=True)
def nearest(rows: np.ndarray, width: int, count: int, queries: np.ndarray, distance: np.ndarray) -> None:
    """Lower distance (q,) to the squared distance of each query to the nearest of the first ``count`` rows."""
    for i in range(distance.size):
        for k in range(count):
            distance[i] = min(distance[i], squared_distance(queries, i, rows, k, width))


@njit(cache=True, nogil=True)
def separated(rows: np.ndarray, width: int, count: int, limit: float) -> np.ndarray:
    """(count,) bool: rows that are more than ``limit`` (squared) away from every earlier row that is kept."""
    keep = np.ones(count, np.bool_)
    for i in range(count):
        for k in range(i):
            if keep[k] and squared_distance(rows, i, rows, k, width) <= limit:
                keep[i] = False
                break
    return keep


@njit(cache=True, nogil=True)
def nearest_earlier(rows: np.ndarray, width: int, i: int, distance: np.ndarray, partner: np.ndarray) -> None:
    """Set distance[i] and partner[i] to row i's nearest earlier row, the lowest of equals; row 0 has none."""
    for k in range(i):
        squared = squared_distance(rows, i, rows, k, width)
        if partner[i] < 0 or squared < distance[i]:
            distance[i] = squared
            partner[i] = k
