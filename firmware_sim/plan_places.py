"""Where buffers lie in the arena: pieces with lifetimes in, offsets out.

Pieces that lie in each other's place form a group, whose inner distances are given. Groups are placed one after another,
each at the lowest offset where none of its pieces meets the bytes of a piece that is live at the same time. Which order is
best no one knows beforehand: a few are tried, and while the best is above what is live at once, groups at the top change
places with others before them in the order. The random choices are the same in every run.

Source: the greedy planner is TFLM's, the search by changing the order is that of Arm's Vela (hillclimb allocator).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyvad.firmware_sim.memory import align
from tinyvad.firmware_sim.plan_steps import NO_STAGE, Piece

TRIES = 400  # changes of each of the orders; one takes a tenth of a millisecond
WORSE, HOW_OFTEN = 1.03, 0.1  # a tenth of the changes may make it worse by so much, to get out of dead ends


@dataclass(frozen=True)
class Placement:
    """Offset of every piece by name, and the end of the highest."""

    offsets: dict[str, int]
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Problem:
    """Pieces by number, and groups of them.

    Attributes:
        sizes: (n,) int64, aligned. first, last: (n,) int64 steps. shifts: (n,) int64, distance from the group's start.
        groups: pieces of each.
        lengths: of each group.
        near: for each group the others that it can meet, with ranges of distances between their starts, ends excluded,
            at which they do.
    """

    sizes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    shifts: np.ndarray
    groups: list[list[int]]
    lengths: list[int]
    near: list[list[tuple[int, list[tuple[int, int]]]]]


def place(pieces: Sequence[Piece], enough: int = 0) -> Placement:
    """The best placement found; stops at the first that ends at or below ``enough``."""
    pieces = [piece for piece in pieces if not piece.inside]
    if not pieces:
        return Placement({}, 0)
    problem = _problem(pieces)
    chance = random.Random(0)
    tried = sorted(((*_fill(problem, order)[::-1], order) for order in _orders(problem)), key=lambda one: one[0])
    best_end, best, _ = tried[0]
    for end, starts, order in tried:
        for _ in range(TRIES):
            if best_end <= enough:
                break
            changed = _changed(problem, order, starts, end, chance)
            new_starts, new_end = _fill(problem, changed)
            if new_end <= end * (WORSE if chance.random() < HOW_OFTEN else 1):
                order, starts, end = changed, new_starts, new_end
            if new_end < best_end:
                best, best_end = new_starts, new_end
    offsets = {
        pieces[i].name: start + int(problem.shifts[i])
        for group, start in zip(problem.groups, best, strict=True) for i in group
    }  # fmt: skip
    return Placement(offsets, best_end)


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
    first, last, stage, low, high = (
        np.array([getattr(piece, key) for piece in pieces])
        for key in ("first_use", "last_use", "stage", "first_work", "last_work")
    )
    meets = (first[:, None] <= last) & (first <= last[:, None])  # (n, n): live at once
    same = (stage[:, None] == stage) & (stage != NO_STAGE)  # idle between the bands of one stage
    meets &= ~same | ((low[:, None] <= high) & (low <= high[:, None]))
    heads, distances = [], []
    for i in range(len(pieces)):
        head, distance = i, 0
        while pieces[head].base:
            distance += pieces[head].shift
            head = number[pieces[head].base]
        heads.append(head)
        distances.append(distance)
    groups = [[i for i in range(len(pieces)) if heads[i] == head] for head in dict.fromkeys(heads)]
    shifts = np.array(distances)
    for group in groups:
        shifts[group] -= shifts[group].min()
    lengths = [int((shifts[group] + sizes[group]).max()) for group in groups]
    group_of = np.zeros(len(pieces), np.int64)
    for g, group in enumerate(groups):
        group_of[group] = g
    near: list[dict[int, list[tuple[int, int]]]] = [{} for _ in groups]
    for i, j in zip(*np.nonzero(meets), strict=True):
        g, h = int(group_of[i]), int(group_of[j])
        if g != h:
            apart = int(shifts[j] - shifts[i])
            near[g].setdefault(h, []).append((apart - int(sizes[i]), apart + int(sizes[j])))
    return _Problem(sizes, first, last, shifts, groups, lengths, [list(others.items()) for others in near])


def _orders(problem: _Problem) -> list[list[int]]:
    """Orders of the groups: the largest first, those of the fullest step, the largest times longest-lived, ..."""
    numbers = range(len(problem.groups))
    size = problem.lengths
    life = [int(problem.last[group].max() - problem.first[group].min()) + 1 for group in problem.groups]
    steps = int(problem.last.max()) + 1
    change = np.zeros(steps + 1, np.int64)
    np.add.at(change, problem.first, problem.sizes)
    np.add.at(change, problem.last + 1, -problem.sizes)
    live = np.cumsum(change)  # (steps + 1,) bytes
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


def _changed(problem: _Problem, order: list[int], starts: list[int], end: int, chance: random.Random) -> list[int]:
    """An order in which a group that reaches the top comes earlier: to the front, before a neighbour, or in its stead."""
    top = chance.choice([g for g in order if starts[g] + problem.lengths[g] == end])
    at = order.index(top)
    before = {order[i]: i for i in range(at)}
    others = [before[g] for g, _ in problem.near[top] if g in before]
    to = chance.choice(others) if others else 0
    kind = chance.random()
    changed = list(order)
    if kind < 0.45:
        changed[at], changed[to] = changed[to], changed[at]
    else:
        changed.insert(to if kind < 0.9 else 0, changed.pop(at))
    return changed


def _fill(problem: _Problem, order: list[int]) -> tuple[list[int], int]:
    """Start of every group when they are placed in this order, and the end of the highest."""
    starts = [-1] * len(order)
    end = 0
    for g in order:
        taken = sorted(
            (starts[h] + low, starts[h] + high) for h, ranges in problem.near[g] if starts[h] >= 0 for low, high in ranges
        )
        start = 0
        for low, high in taken:
            if low >= start:
                break
            start = max(start, high)
        starts[g] = start
        end = max(end, start + problem.lengths[g])
    return starts, end
