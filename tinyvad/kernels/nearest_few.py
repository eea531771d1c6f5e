"""The few nearest centres of every row, and the gradient of sums over them: the inner loops of CFA's loss.

Flows in: C-ordered rows (R, d) and centres (K, d), float32 or float64, and their products (R, K), which BLAS makes faster
than any loop. Flows out: numbers of the nearest centres and squared distances, taken from differences. Rows first to
last - 1 a call, each on its own: no result depends on how the rows were shared out. Readable twins:
``tests/test_kernels_nearest_few.py``.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def nearest_few(
    rows: np.ndarray, centres: np.ndarray, products: np.ndarray, squares: np.ndarray, first: int, last: int,
    indices: np.ndarray, distances: np.ndarray,
) -> None:  # fmt: skip
    """Fill indices (R, n) and distances (R, n), nearest first, equals by number.

    The n smallest of squares[k] - 2 products[r, k] are chosen, squares (K,) being the centres' squared lengths.
    """
    count = indices.shape[1]
    two = rows.dtype.type(2)
    least = np.empty(count, rows.dtype)
    for r in range(first, last):
        found = 0
        for k in range(len(squares)):
            value = squares[k] - two * products[r, k]
            if found == count and not value < least[count - 1]:
                continue
            place = min(found, count - 1)  # the largest goes
            while place > 0 and value < least[place - 1]:
                least[place] = least[place - 1]
                indices[r, place] = indices[r, place - 1]
                place -= 1
            least[place] = value
            indices[r, place] = k
            found = min(found + 1, count)
        for i in range(count):
            k = indices[r, i]
            total = rows.dtype.type(0)
            for c in range(rows.shape[1]):
                difference = rows[r, c] - centres[k, c]
                total += difference * difference
            place = i
            while place > 0 and (
                total < distances[r, place - 1] or (total == distances[r, place - 1] and k < indices[r, place - 1])
            ):
                distances[r, place] = distances[r, place - 1]
                indices[r, place] = indices[r, place - 1]
                place -= 1
            distances[r, place] = total
            indices[r, place] = k


@njit(cache=True, nogil=True)
def distance_gradient(
    rows: np.ndarray, centres: np.ndarray, indices: np.ndarray, weights: np.ndarray, first: int, last: int, out: np.ndarray
) -> None:
    """out (R, d) = sum over i of weights[r, i] * (rows[r] - centres[indices[r, i]]), in the order of i."""
    for r in range(first, last):
        for c in range(rows.shape[1]):
            out[r, c] = 0
        for i in range(indices.shape[1]):
            weight = weights[r, i]
            if weight != 0:
                k = indices[r, i]
                for c in range(rows.shape[1]):
                    out[r, c] += weight * (rows[r, c] - centres[k, c])
