"""Farthest-first selection without computing most of the distances.

Flows in: rows (n, W) int8 or float32, W a multiple of 16. Flows out: their greedy order. The readable twin is
``tinyvad.detectors.coreset.farthest_first_reference``; the two agree to the last bit.

A row's distance to the chosen set only shrinks while the set grows, so an old value is an upper bound. A row is brought up
to date, centre by centre, only while its bound could still make it the farthest row, and whole blocks are passed over by
the bound of their rows. The order is exactly that of the plain loop, at 17 to 38 % of its distances on MCUNet features
(1,000 and 5,000 of 50,000 rows) and 9 to 19 % on random vectors. One thread; no result can depend on their number.

Source: Gonzalez 1985; lazy evaluation as in Minoux 1978 (accelerated greedy).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tinyvad.kernels.lanes import LANES, add_square, load, sub, total

BLOCK = 64  # rows that share one bound


@njit(cache=True, nogil=True)
def squared_distance(rows: np.ndarray, i: int, centres: np.ndarray, j: int, width: int) -> Any:
    """||rows[i] - centres[j]||**2 of flat arrays: sixteen sums of every sixteenth element, then their sum."""
    first = load(rows, i * width)
    sums = sub(first, first)
    for d in range(0, width, LANES):
        sums = add_square(sums, load(rows, i * width + d), load(centres, j * width + d))
    return total(sums)


@njit(cache=True, nogil=True)
def farthest_first(
    rows: np.ndarray, width: int, count: int, start: int, distance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy order of flat rows (n * width,) from ``start``.

    Args:
        distance: (n,) int32 for int8 rows, float32 for float32 rows: work space.

    Returns:
        order (k,) int64 and radii (k,): radii[i] is the largest squared distance of any row to order[: i + 1]. k is
        less than ``count`` where no row differs from the chosen ones any more.
    """
    n = distance.size
    zero = distance.dtype.type(0)
    order = np.empty(count, np.int64)
    radii = np.empty(count, distance.dtype)
    centres = np.empty(count * width, rows.dtype)  # (count, width): the chosen rows side by side
    met = np.ones(n, np.int32)  # how many of the centres a row's distance takes into account
    bound = np.empty((n + BLOCK - 1) // BLOCK, distance.dtype)

    order[0] = start
    centres[:width] = rows[start * width : (start + 1) * width]
    for block in range(bound.size):
        bound[block] = zero
        for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
            distance[i] = squared_distance(rows, i, centres, 0, width)
            bound[block] = max(bound[block], distance[i])

    for chosen in range(1, count + 1):
        radius = zero
        farthest = -1  # rows come in order, so of equals the lowest index stays
        for block in range(bound.size):
            if bound[block] <= radius:
                continue
            bound[block] = zero
            for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                nearest = distance[i]
                if nearest > radius:
                    centre = met[i]
                    while centre < chosen and nearest > radius:
                        nearest = min(nearest, squared_distance(rows, i, centres, centre, width))
                        centre += 1
                    distance[i] = nearest
                    met[i] = centre
                    if nearest > radius:
                        radius = nearest
                        farthest = i
                bound[block] = max(bound[block], nearest)
        radii[chosen - 1] = radius
        if farthest < 0:
            return order[:chosen], radii[:chosen]
        if chosen < count:
            order[chosen] = farthest
            centres[chosen * width : (chosen + 1) * width] = rows[farthest * width : (farthest + 1) * width]
    return order, radii
