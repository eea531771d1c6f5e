"""A uniform sample of a stream of unknown length, in bounded memory: rows in, at most ``capacity`` of them out.

Every row of the stream is kept with the same probability. The sample depends on the seed and the order of the rows, not
on how the stream is cut into batches. Source: algorithm R, Vitter 1985 (Random sampling with a reservoir).
"""

from __future__ import annotations

import numpy as np


class Reservoir:
    """Keeps ``capacity`` rows; until it is full, all of them in order.

    Attributes:
        seen: rows added so far.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self._rng = np.random.default_rng(seed)
        self._rows: np.ndarray | None = None  # (capacity, D)

    def add(self, rows: np.ndarray) -> None:
        """Offer (m, D) rows."""
        if self._rows is None:
            self._rows = np.empty((self.capacity, rows.shape[1]), rows.dtype)
        filling = min(max(self.capacity - self.seen, 0), len(rows))
        self._rows[self.seen : self.seen + filling] = rows[:filling]
        # the row number t (from 0) of the stream takes slot floor(u * (t + 1)) if there is such a slot
        numbers = np.arange(self.seen + filling, self.seen + len(rows))
        slots = (self._rng.random(len(numbers)) * (numbers + 1)).astype(np.int64)
        taken = np.flatnonzero(slots < self.capacity)
        self._rows[slots[taken]] = rows[filling + taken]  # of rows for one slot, the last stays
        self.seen += len(rows)

    def sample(self) -> np.ndarray:
        """(k, D), k = min(seen, capacity); the stream must not have been empty."""
        assert self._rows is not None
        return self._rows[: min(self.seen, self.capacity)]
