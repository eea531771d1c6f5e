"""Which stages to make: all that are possible in, the ones with the lowest peak or the cheapest that fit out.

What a stage keeps and costs does not depend on the other stages, so both are shortest paths over the works: the smallest
largest peak, and then the smallest sum of costs among stages whose peak is small enough.
"""

from __future__ import annotations

from tinyvad.firmware_sim.plan_stages import Stage, Stages

BANDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)  # rows that are tried


def choose(stages: Stages, limit: int | None = None) -> list[Stage] | None:
    """The cheapest stages whose peak is at most ``limit``, None if there are none; without a limit those of lowest peak."""
    works, values = stages.net.works, stages.net.values
    n = len(works)
    singles = [stages.single(i) for i in range(n)]
    if limit is None:
        limit = _lowest_peak(stages, singles)
    best: list[tuple[int, Stage] | None] = [None] * (n + 1)  # cost up to work i, and the stage that ends there
    too_large: int | None = None  # the last work so far that must not be a stage of its own
    for past in range(1, n + 1):
        found = [singles[past - 1]]
        if found[0].peak > limit:
            found, too_large = [], past - 1
        rows = values[works[past - 1].output].rows
        for band in (band for band in BANDS if band < max(rows, 2) and too_large is not None):  # a map of one row, too
            banded = list(stages.ending(past, band, limit, too_large))  # others are dearer than their works one by one
            if not banded:
                break
            found += banded
        for stage in found:
            before = best[stage.first] if stage.first else (0, stage)
            if before is not None:
                total, so_far = before[0] + stage.cost, best[past]
                if so_far is None or total < so_far[0]:
                    best[past] = (total, stage)
    chosen: list[Stage] = []
    past = n
    while past > 0:
        end = best[past]
        if end is None:
            return None
        chosen.append(end[1])
        past = end[1].first
    return chosen[::-1]


def _lowest_peak(stages: Stages, singles: list[Stage]) -> int:
    """The lowest peak that any choice of stages has: those of one row at a time keep least."""
    n = len(singles)
    worst = max(stage.peak for stage in singles)
    lowest = [0] + [worst] * n  # of works 0 to i - 1
    for past in range(1, n + 1):
        found = [singles[past - 1], *stages.ending(past, 1, worst)]
        lowest[past] = min(max(lowest[stage.first], stage.peak) for stage in found)
    return lowest[n]
