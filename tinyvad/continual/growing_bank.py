"""A memory bank that takes in one image at a time and never more rows than its capacity: the incremental k-center.

Flows in: one image's patch vectors (P, D), int8 or float32. Flows out: the bank's rows in the order in which they came.

Of each image the patch farthest from the bank is added, then the next, with distances brought up to date inside the
image, until all patches lie within tau of the bank or ``limit`` are added. Distances are squared, integers for int8. A
full bank follows one of three rules:

* ``freeze``: nothing more is added; for int8 this is ``tinyvad.detectors.online``, what a device does.
* ``doubling``: tau is doubled (from 0: set to the smallest distance between two rows) and rows within tau of an earlier
  one are dropped, until the bank fits. Without a limit an image, after every image: rows are more than tau apart, and all
  patches ever seen lie within 2 tau of a row. Each doubling comes from K + 1 vectors more than tau_before apart, so that
  no K vectors cover the patches seen within tau_before / 2; hence the bank covers within 8 times the optimum.
* ``merge``: the later of the two closest rows is dropped, the new one itself if that is it. The bank stays full and its
  closest pair only moves apart, but nothing is promised about coverage.

Source: incremental k-center clustering and the doubling algorithm (Charikar et al. 1997), used as online PatchCore does.
"""

from __future__ import annotations

import numpy as np

from tinyvad.detectors.coreset import MAX_DEPTH, WIDTH, squared_distances
from tinyvad.detectors.online import NO_ROWS
from tinyvad.errors import InputError

WHEN_FULL = ("freeze", "doubling", "merge")


class GrowingBank:
    """See the module's text.

    Args:
        depth: D. dtype: int8 or float32.
        capacity: K, most rows; None for no limit.
        when_full: one of ``WHEN_FULL``.
        tau2: squared novelty distance in units of the embedding; an integer for int8.

    Attributes:
        count: rows in the bank. capacity, tau2: as they are now.
    """

    def __init__(self, depth: int, dtype: np.dtype, capacity: int | None, when_full: str, tau2: float = 0) -> None:
        if when_full not in WHEN_FULL or (capacity is not None and capacity < 1) or not tau2 >= 0:
            raise InputError(f"growing bank: capacity {capacity}, {when_full!r}, tau {tau2}; use one of {WHEN_FULL}")
        if dtype not in (np.int8, np.float32) or not 1 <= depth <= MAX_DEPTH:
            raise InputError(f"growing bank of {dtype}, {depth} values; give int8 or float32 and 1 to {MAX_DEPTH}")
        self.capacity, self.when_full, self.tau2 = capacity, when_full, tau2
        self.count = 0
        self._depth, self._dtype = depth, np.dtype(dtype)
        self._width = depth + -depth % WIDTH
        self._rows = np.zeros((16, self._width), dtype)  # the first ``count`` count; grows up to capacity + 1
        self._partners: tuple[np.ndarray, np.ndarray] | None = None  # nearest earlier row of each: distance, number

    @property
    def rows(self) -> np.ndarray:
        """(count, D), in order of arrival."""
        return self._rows[: self.count, : self._depth].copy()

    def load(self, rows: np.ndarray) -> None:
        """Start from (k, D) rows."""
        self._rows = np.zeros((max(len(rows), 16), self._width), self._dtype)
        self._rows[: len(rows), : self._depth] = rows
        self.count, self._partners = len(rows), None

    def add(self, patches: np.ndarray, limit: int | None = None) -> tuple[int, float]:
        """Take in one image's (P, D) patches.

        Args:
            limit: most rows that the image may add.

        Returns:
            rows added (later dropped ones included), and the largest squared distance of a patch to the bank before.

        Raises:
            InputError: patches of another dtype or depth, or not finite.
        """
        from tinyvad.kernels import growing

        padded = self._padded(patches)
        distance = self._distances(padded)
        novelty, added = distance.max(), 0
        while limit is None or added < limit:
            farthest = int(distance.argmax())
            if distance[farthest] <= self.tau2 and self.count > 0:
                break
            full = self.count == self.capacity
            if full and self.when_full == "freeze":
                break
            if full and self.when_full == "merge":
                gap, later = self._closest()
                if distance[farthest] <= gap:
                    break  # the new row would be the one to go, and so would every nearer one
                gone = self._rows[later].copy()
                self._drop(later)
                of_gone = np.full(len(padded), self._far(), distance.dtype)
                growing.nearest(gone, self._width, 1, padded.ravel(), of_gone)
                lost = distance == of_gone  # patches whose nearest row may be the one that went
                distance[lost] = self._distances(padded[lost])
            self._append(padded[farthest])
            added += 1
            if full and self.when_full == "doubling":
                self._thin()
                distance = self._distances(padded)
            else:
                growing.nearest(padded[farthest], self._width, 1, padded.ravel(), distance)
        return added, novelty.item()

    def novelty(self, patches: np.ndarray) -> float:
        """The largest squared distance of (P, D) patches to the bank."""
        return self._distances(self._padded(patches)).max().item()

    def shrink(self, capacity: int | None) -> None:
        """Set the capacity; a bank that holds more gives up rows by its own rule (``freeze``: the last ones)."""
        self.capacity = capacity
        if capacity is None:
            return
        if self.when_full == "freeze":
            self.count = min(self.count, capacity)
        elif self.when_full == "doubling":
            self._thin()
        while self.count > capacity:
            self._drop(self._closest()[1])

    def _far(self) -> float:
        return NO_ROWS if self._dtype == np.int8 else np.inf

    def _padded(self, patches: np.ndarray) -> np.ndarray:
        if patches.ndim != 2 or patches.dtype != self._dtype or patches.shape[1] != self._depth or len(patches) == 0:
            found = f"{patches.dtype}{patches.shape}"
            raise InputError(f"patches are {found}; the bank needs {self._dtype} (P, {self._depth})")
        if self._dtype == np.float32 and not np.isfinite(patches).all():
            raise InputError("patches hold values that are not finite; check the features")
        return np.ascontiguousarray(np.pad(patches, ((0, 0), (0, self._width - self._depth))))

    def _distances(self, padded: np.ndarray) -> np.ndarray:
        """(P, W) -> (P,) int32 or float32 squared distances to the bank."""
        from tinyvad.kernels import growing

        distance = np.full(len(padded), self._far(), np.int32 if self._dtype == np.int8 else np.float32)
        growing.nearest(self._rows.ravel(), self._width, self.count, padded.ravel(), distance)
        return distance

    def _append(self, row: np.ndarray) -> None:
        if self.count == len(self._rows):
            most = 2 * self.count if self.capacity is None else min(2 * self.count, self.capacity + 1)
            more = np.zeros((max(most, self.count + 1) - self.count, self._width), self._dtype)
            self._rows = np.concatenate([self._rows, more])
        self._rows[self.count] = row
        self.count += 1

    def _thin(self) -> None:
        """Double tau and drop rows within it of an earlier one, until the bank fits."""
        from tinyvad.kernels import growing

        while self.capacity is not None and self.count > self.capacity:
            self.tau2 = 4 * self.tau2 if self.tau2 > 0 else self._closest()[0]
            keep = growing.separated(self._rows.ravel(), self._width, self.count, float(self.tau2))
            kept = self._rows[: self.count][keep]
            self._rows[: len(kept)] = kept
            self.count, self._partners = len(kept), None

    def _closest(self) -> tuple[float, int]:
        """Squared distance of the closest two rows and the number of the later one; of equals the last to come.

        A single row has no partner: the distance is ``NO_ROWS`` or infinite, as that to an empty bank.
        """
        from tinyvad.kernels import growing

        distance, partner = self._partners or (np.empty(0, np.int32), np.empty(0, np.int64))
        known, rows = len(distance), self._rows.ravel()
        missing = np.full(self.count - known, self._far(), np.int32 if self._dtype == np.int8 else np.float32)
        distance = np.concatenate([distance, missing]).astype(missing.dtype)
        partner = np.concatenate([partner, np.full(len(missing), -1, np.int64)])
        for i in range(known, self.count):
            growing.nearest_earlier(rows, self._width, i, distance, partner)
        self._partners = distance, partner
        later = self.count - 1 - int(distance[::-1].argmin())
        return distance[later].item(), later

    def _drop(self, row: int) -> None:
        """Take out one row; those after it move up."""
        from tinyvad.kernels import growing

        assert self._partners is not None  # _closest was asked which
        self._rows[row : self.count - 1] = self._rows[row + 1 : self.count]
        self.count -= 1
        distance, partner = (np.delete(values, row) for values in self._partners)
        orphans = np.flatnonzero(partner == row)
        partner[partner > row] -= 1
        partner[orphans] = -1
        for i in orphans:
            growing.nearest_earlier(self._rows.ravel(), self._width, int(i), distance, partner)
        self._partners = distance, partner


def nearest_reference(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(K, W) rows, (q, W) queries -> (q,) squared distances: what ``kernels.growing.nearest`` must equal."""
    return np.min([squared_distances(queries, row) for row in rows], axis=0)


def separated_reference(rows: np.ndarray, limit: float) -> np.ndarray:
    """(K, W) -> (K,) bool: what ``kernels.growing.separated`` must equal."""
    kept: list[int] = []
    for i, row in enumerate(rows):
        if not kept or squared_distances(rows[kept], row).min() > limit:
            kept.append(i)
    return np.isin(np.arange(len(rows)), kept)


def nearest_earlier_reference(rows: np.ndarray, i: int) -> tuple[float, int]:
    """Row i > 0 of (K, W): what ``kernels.growing.nearest_earlier`` must equal."""
    squared = squared_distances(rows[:i], rows[i])
    return squared.min().item(), int(squared.argmin())
