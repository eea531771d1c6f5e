"""The greedy coreset: patch vectors in, the order in which farthest-first selection takes them out.

Every prefix of the order is itself the selection of that size, so a bank stored in this order shrinks by cutting it off.
The selection starts at the row farthest from the mean, which needs no randomness, and equal distances go to the lowest
index. It stops where every row equals a chosen one: a bank never holds a vector twice.

int8 rows are compared in exact integers. float32 sums have one stated order (``squared_distances``), the kernel's too, so
the order depends neither on threads nor on the processor.

Source: Gonzalez 1985 (at most twice the optimal covering radius); PatchCore (Roth et al. 2022, algorithm 1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tinyvad.errors import InputError

WIDTH = 16  # rows are padded with zeros to a multiple of it: the lanes of tinyvad.kernels.lanes
MAX_DEPTH = (2**31 - 1) // 255**2  # squared int8 distances stay below 2**31


class Coreset(NamedTuple):
    """Result of ``farthest_first``.

    Attributes:
        order: (k,) int64 row numbers in greedy order.
        radii: (k,) int32 (int8 rows) or float32: squared distance of the worst covered row to order[: i + 1]; the next
            row to be taken is that far away. Never increases; 0 at the end where all distinct rows were taken.
    """

    order: np.ndarray
    radii: np.ndarray


def farthest_first(rows: np.ndarray, count: int, start: int | None = None) -> Coreset:
    """Take ``count`` rows, each the one farthest from those taken before.

    Args:
        rows: (n, D) int8 or float32, n > 0, finite.
        count: how many, at least 1; fewer come back where the rows repeat.
        start: the first row; the one farthest from the mean if None.

    Raises:
        InputError: wrong dtype, shape, count or start, or values that are not finite.
    """
    from tinyvad.kernels import coreset  # here, so that reading a bank does not load Numba

    padded, first = _checked(rows, count, start)
    distance = np.empty(len(rows), padded.dtype if padded.dtype == np.float32 else np.int32)
    count = min(count, len(rows))
    return Coreset(*coreset.farthest_first(padded.ravel(), padded.shape[1], count, first, distance))


def farthest_first_reference(rows: np.ndarray, count: int, start: int | None = None) -> Coreset:
    """The same in plain NumPy, every distance computed: what ``farthest_first`` must equal to the last bit."""
    padded, farthest = _checked(rows, count, start)
    order: list[int] = []
    radii: list[np.generic] = []
    nearest = squared_distances(padded, padded[farthest])  # (n,) to the chosen rows
    while True:
        order.append(farthest)
        nearest = np.minimum(nearest, squared_distances(padded, padded[farthest]))
        farthest = int(nearest.argmax())
        radii.append(nearest[farthest])
        if radii[-1] == 0 or len(order) == min(count, len(rows)):
            return Coreset(np.array(order, np.int64), np.array(radii))


def squared_distances(rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(n, W), (W,) -> (n,): sixteen sums of every sixteenth element, halved by adding the upper half to the lower."""
    dtype: np.dtype = np.dtype(np.int32 if rows.dtype == np.int8 else np.float32)
    difference = rows.astype(dtype) - row.astype(dtype)
    squares = (difference * difference).reshape(len(rows), -1, WIDTH)
    sums = np.zeros((len(rows), WIDTH), dtype)
    for part in range(squares.shape[1]):
        sums += squares[:, part]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def farthest_from_mean(rows: np.ndarray) -> int:
    """Row number of the (n, D) row farthest from the mean of all, the lowest of equals; exact for int8."""
    if rows.dtype == np.int8:
        # n * ||x - mean||**2 without what all rows share: n ||x||**2 - 2 x . sum, integers below 2**63
        wide = rows.astype(np.int64)
        return int((len(rows) * (wide * wide).sum(1) - 2 * (wide @ wide.sum(0))).argmax())
    centred = rows - rows.mean(0, dtype=np.float64)
    return int((centred * centred).sum(1).argmax())


def _checked(rows: np.ndarray, count: int, start: int | None) -> tuple[np.ndarray, int]:
    """Rows padded with zeros to a multiple of WIDTH columns, C order, and the start."""
    if rows.ndim != 2 or rows.dtype not in (np.int8, np.float32) or rows.size == 0:
        raise InputError(f"coreset rows are {rows.dtype}{rows.shape}; give (n, D) int8 or float32 with n, D > 0")
    if rows.shape[1] > MAX_DEPTH:
        raise InputError(f"coreset rows have {rows.shape[1]} values, at most {MAX_DEPTH}; tap fewer layers")
    if count < 1:
        raise InputError(f"coreset size {count}; give at least 1")
    if rows.dtype == np.float32 and not np.isfinite(rows).all():
        raise InputError("coreset rows hold values that are not finite; check the features")
    if start is None:
        start = farthest_from_mean(rows)
    if not 0 <= start < len(rows):
        raise InputError(f"coreset start {start} is no row; give 0 to {len(rows) - 1}")
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % WIDTH)))), start
