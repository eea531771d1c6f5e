"""A build's bank taken apart into its tasks, and put together again as the next generation.

Flows in: a ``Bank``; then tasks and scorers, some of them new, and features of the images that were learnt. Flows out:
``Opened``; then the bytes of the next bank, with a self-test of the tasks that were learnt last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tinyvad.bank import Bank
from tinyvad.detectors import Scorer, check_bank
from tinyvad.detectors.bank_tasks import BankTask, Learning, bank_of_tasks, task_entries
from tinyvad.detectors.task_gaussians import TaskStatistics
from tinyvad.embedding import Embedding
from tinyvad.errors import CheckFailed, InputError
from tinyvad.fitting import PATCHCORE_CANDIDATES, QUANTILE, TapStore
from tinyvad.slots import next_generation

GOLDEN = 4  # vectors of the self-test: of the tasks learnt last


class Settings(NamedTuple):
    """What a build's manifest says that learning needs: of the threshold, and of a memory bank's candidates."""

    quantile: float = QUANTILE
    max_candidates: int = PATCHCORE_CANDIDATES
    seed: int = 0

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Settings:
        method = manifest["method"]["settings"]
        found = cls(
            manifest["settings"].get("quantile", QUANTILE), method.get("max_candidates", PATCHCORE_CANDIDATES),
            method.get("seed", 0),
        )  # fmt: skip
        for name, kind, low, high in (
            ("quantile", (int, float), 0.5, 1), ("max_candidates", int, 1, np.inf), ("seed", int, 0, np.inf)
        ):  # fmt: skip
            value = getattr(found, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise InputError(f"manifest.json: {name} is {value!r}, no number from {low} to {high}; build again")
        return found


@dataclass(frozen=True, eq=False)
class NewImages:
    """One engine's features of the images to learn, and of shifted copies if there is only one (else None)."""

    store: TapStore
    copies: TapStore | None = None


@dataclass(frozen=True, eq=False)
class Opened:
    """A bank taken apart.

    Attributes:
        tasks, scorers: one a task. embedding: of all. learning: LRN, if the bank has it.
    """

    bank: Bank
    embedding: Embedding
    tasks: tuple[BankTask, ...]
    scorers: tuple[Scorer, ...]
    learning: Learning | None

    @property
    def of_gaussians(self) -> bool:
        return self.bank.header.kind.startswith("PAD")

    def number(self, name: str) -> int | None:
        """A task's number, None if the bank has none of that name."""
        return next((i for i, task in enumerate(self.tasks) if task.name == name), None)


@dataclass(frozen=True, eq=False)
class Next:
    """A bank to be written.

    Attributes:
        data: its bytes. task: its number of the task that was learnt. gives_way: what the others lost, '' if nothing.
        statistics: the task's sums, for its state; None in a memory bank. held: with them, see ``next_bank.HELD``.
    """

    data: bytes
    task: int
    gives_way: str = ""
    statistics: TaskStatistics | None = None
    held: np.ndarray | None = None


def open_tasks(bank: Bank, layers: Sequence[str]) -> Opened:
    """Take a bank apart.

    Raises:
        InputError: it is not valid, or was made without what learning needs.
    """
    _, found = check_bank(bank)
    if found.prototypes is None:
        raise InputError(f"{bank.name}: no section PROT, so no second product can be told apart; make the build again")
    table, ladders = bank.sections["TASK"], bank.sections.get("LADR")
    tasks = []
    for i, (entry, row) in enumerate(zip(task_entries(bank), table, strict=True)):
        steps = None if ladders is None else ladders[i]
        tasks.append(BankTask(entry["name"], int(row[2]), int(found.thresholds[i]), entry["threshold_rule"],
                              found.prototypes[i], steps, entry["state"]))  # fmt: skip
    learning = Learning(*(int(n) for n in bank.sections["LRN "][:5])) if "LRN " in bank.sections else None
    embedding = Embedding.from_sections(bank.sections, bank.header.grid_size, layers)
    return Opened(bank, embedding, tuple(tasks), found.scorers, learning)


def too_large(tasks: int, nbytes: int, limit: int) -> CheckFailed:
    """The one line when a bank of so many tasks does not fit its slot."""
    return CheckFailed(
        f"bank of {tasks} products {nbytes:,} B > {limit:,} B of its slot: make room with `tinyvad learn --forget NAME`, "
        f"or build with --tasks {tasks} or more, a smaller --dimensions or --grid, or more --bank-bytes"
    )


def rule_of(new: NewImages, old: BankTask | None, settings: Settings, highest: bool = True) -> str:
    """Where a threshold comes from, for people. ``highest``: that of an old task never falls."""
    if new.copies is not None and old is None:
        return "shifted copies of the only good image"
    so_far = ", the highest so far" if old is not None and highest else ""
    return f"{settings.quantile:g} quantile of held-out good images{so_far}"


def placed(
    opened: Opened, number: int | None, task: BankTask, scorer: Scorer
) -> tuple[list[BankTask], list[Scorer], int]:
    """All tasks and scorers with the new ones in their place."""
    tasks, scorers = list(opened.tasks), list(opened.scorers)
    if number is None:
        return [*tasks, task], [*scorers, scorer], len(tasks)
    tasks[number], scorers[number] = task, scorer
    return tasks, scorers, number


def self_test(
    opened: Opened, scorers: Sequence[Scorer], number: int, new: NewImages
) -> tuple[np.ndarray, np.ndarray]:
    """TEST and GOLD: the worst cell of the first new image for the task that was learnt, then rows of other tasks."""
    first = next(iter(new.store.embeddings(opened.embedding, np.arange(1))))  # (1, H, W, D)
    cell = int(scorers[number].score(first).argmax())
    chosen = [(first.reshape(-1, first.shape[3])[cell], number, cell)]
    vectors, rows = opened.bank.sections.get("TEST"), opened.bank.sections.get("GOLD")
    if vectors is not None and rows is not None:
        chosen += [(vector, int(task), int(cell)) for vector, (task, cell, _) in zip(vectors, rows, strict=True)
                   if task != number]  # fmt: skip
    return scored(scorers, chosen[:GOLDEN], opened.embedding.grid)


def scored(
    scorers: Sequence[Scorer], chosen: Sequence[tuple[np.ndarray, int, int]], grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """TEST (n, D) int8 and GOLD (n, 3) uint32 of (vector, task, cell) each."""
    gold = []
    for vector, task, cell in chosen:
        cells = np.zeros((1, *grid, len(vector)), np.int8)
        cells[0, cell // grid[1], cell % grid[1]] = vector
        gold.append((task, cell, scorers[task].score(cells).reshape(-1)[cell]))
    return np.stack([vector for vector, _, _ in chosen]), np.array(gold, np.uint32)


def write(
    opened: Opened, tasks: Sequence[BankTask], scorers: Sequence[Scorer], golden: tuple[np.ndarray, np.ndarray]
) -> bytes:
    """The bank of the next generation; all but tasks and scorers is that of the opened one."""
    header = replace(opened.bank.header, generation=next_generation(opened.bank))
    return bank_of_tasks(header, opened.bank.sections, scorers, tasks, golden, opened.bank.meta, opened.learning)
