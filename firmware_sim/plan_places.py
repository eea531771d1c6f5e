"""Where buffers lie in the arena: pieces with lifetimes in, offsets out.

Pieces that lie in each other's place form a group, whose inner distances are given. Groups are placed one after another,
each at the lowest offset where none of its pieces meets the bytes of a piece that is live at the same time. Which order is
best no one knows beforehand, so several are tried, and the groups that stick out at the top are then moved ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyvad.firmware_sim.memory import ALIGNMENT, align
from tinyvad.firmware_sim.plan_steps import NO_STAGE, Piece

REORDERINGS = 24


@dataclass(frozen=True)
class Placement:
    """Offset of every piece by name, and the end of the highest."""

    offsets: dict[str, int]
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Problem:
    """Pieces by number: sizes, whether two are ever live at once, distance from the start of their group."""

    sizes: np.ndarray  # (n,) int64, aligned
    meets: np.ndarray  # (n, n) bool
    shifts: np.ndarray  # (n,) int64, 0 for the lowest of a group
    groups: list[list[int]]
    first: np.ndarray  # (n,) int64 steps
    last: np.ndarray


def place(pieces: Sequence[Piece], enough: int = 0) -> Placement:
    """The best placement found; stops at the first that ends at or below ``enough``."""
    pieces = [piece for piece in pieces if not piece.inside]
    if not pieces:
        return Placement({}, 0)
    problem = _problem(pieces)
    orders = _orders(problem)
    best_order, (best, best_end) = orders[0], _fill(problem, orders[0])
    for order in orders[1:]:
        if best_end <= enough:
            break
        offsets, end = _fill(problem, order)
        if end < best_end:
            best_order, best, best_end = order, offsets, end
    order, offsets, end = best_order, best, best_end
    for _ in range(REORDERINGS):
        if best_end <= enough:
            break
        tops = offsets + problem.sizes
        high = [g for g in order if max(int(tops[i]) for i in problem.groups[g]) == end]
        order = high + [g for g in order if g not in high]
        offsets, end = _fill(problem, order)
        if end < best_end:
            best, best_end = offsets, end
    return Placement({piece.name: int(offset) for piece, offset in zip(pieces, best, strict=True)}, best_end)


def live_bytes(pieces: Sequence[Piece], at: Sequence[tuple[int, int]]) -> int:
    """The most bytes that are live at one step; pieces that share memory count once.

    Args:
        at: (stage, work) of each step.
    """
    pieces = [piece for piece in pieces if not piece.inside]
    problem = _problem(pieces)
    stages, works = np.array(at, np.int64).reshape(-1, 2).T  # (steps,) each
    step = np.arange(len(at))
    total = np.zeros(len(at), np.int64)
    for group in problem.groups:
        low, high = np.full(len(at), 1 << 40), np.zeros(len(at), np.int64)
        for i in group:
            piece = pieces[i]
            live = (step >= piece.first_use) & (step <= piece.last_use)
            if piece.stage != NO_STAGE:
                live &= (stages != piece.stage) | ((works >= piece.first_work) & (works <= piece.last_work))
            low[live] = np.minimum(low[live], problem.shifts[i])
            high[live] = np.maximum(high[live], problem.shifts[i] + problem.sizes[i])
        total += np.maximum(high - low, 0)
    return int(total.max(initial=0))


def _problem(pieces: Sequence[Piece]) -> _Problem:
    number = {piece.name: i for i, piece in enumerate(pieces)}
    sizes = np.array([align(piece.nbytes) for piece in pieces])
    first, last = (np.array([getattr(piece, key) for piece in pieces]) for key in ("first_use", "last_use"))
    stage, low, high = (
        np.array([getattr(piece, key) for piece in pieces]) for key in ("stage", "first_work", "last_work")
    )
    meets = (first[:, None] <= last) & (first <= last[:, None])
    same = (stage[:, None] == stage) & (stage != NO_STAGE)  # between the bands of one stage
    meets &= ~same | ((low[:, None] <= high) & (low <= high[:, None]))
    heads, shifts = [], []
    for i in range(len(pieces)):
        head, shift = i, 0
        while pieces[head].base:
            shift += pieces[head].shift
            head = number[pieces[head].base]
        heads.append(head)
        shifts.append(shift)
    groups = [[i for i in range(len(pieces)) if heads[i] == head] for head in dict.fromkeys(heads)]
    distance = np.array(shifts)
    for group in groups:
        distance[group] -= distance[group].min()
    return _Problem(sizes, meets, distance, groups, first, last)


def _orders(problem: _Problem) -> list[list[int]]:
    """Orders of the groups: the largest first, the largest times longest-lived, the ones of the fullest step."""
    numbers = range(len(problem.groups))
    ends = problem.shifts + problem.sizes
    size = [int(ends[group].max()) for group in problem.groups]
    life = [int(problem.last[group].max() - problem.first[group].min()) + 1 for group in problem.groups]
    steps = int(problem.last.max()) + 1
    change = np.zeros(steps + 1, np.int64)
    np.add.at(change, problem.first, problem.sizes)
    np.add.at(change, problem.last + 1, -problem.sizes)
    live = np.cumsum(change)
    fullest = [
        max(int(live[problem.first[i] : problem.last[i] + 1].max()) for i in group) for group in problem.groups
    ]
    return [
        sorted(numbers, key=lambda g: -size[g]),
        sorted(numbers, key=lambda g: (-fullest[g], -size[g])),
        sorted(numbers, key=lambda g: (-fullest[g], -life[g])),
        sorted(numbers, key=lambda g: -size[g] * life[g]),
        sorted(numbers, key=lambda g: (-life[g], -size[g])),
    ]


def _fill(problem: _Problem, order: list[int]) -> tuple[np.ndarray, int]:
    """(n,) offsets with the groups placed in this order, and the end of the highest."""
    offsets = np.full(len(problem.sizes), -1, np.int64)
    top = 0
    for g in order:
        group = problem.groups[g]
        taken: list[tuple[int, int]] = []  # starts of the group that are not possible: after the first, before the second
        for i in group:
            others = np.nonzero(problem.meets[i] & (offsets >= 0))[0]
            low = offsets[others] - problem.sizes[i] - problem.shifts[i]
            high = offsets[others] + problem.sizes[others] - problem.shifts[i]
            taken.extend(zip(low.tolist(), high.tolist(), strict=True))
        start = 0
        for low, high in sorted(taken):
            if low >= start:
                break
            start = max(start, high)
        for i in group:
            offsets[i] = start + problem.shifts[i]
            top = max(top, int(offsets[i] + problem.sizes[i]))
    return offsets, top


assert ALIGNMENT == 16  # places are multiples of it because all sizes and distances are
