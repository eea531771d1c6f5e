"""The next bank of a build: the current one and the features of new good images in, the bank that has learnt them out.

Nothing of the build is fitted anew: embedding, projection, codebooks stay. What happens to the tasks depends on the kind:

    PADM PADF PADC   a new task: exact sums of its images, a scorer of its own, the others stay byte for byte
                     an old one: the sums are merged with those kept on disk (its state), the scorer made from all
    CORE PQPC        with c tasks each has floor(M / c) rows: the others are cut to their first rows, which is free, and
                     take the threshold that their ladder has for that size; an old task is extended from its rows

Thresholds come from good images that the scorer has not seen, as in a build: by cross-fitting over the new images, for a
single one from shifted copies. That of an old task never falls.

Source: compact PaDiM with one projection (``tinyvad.detectors.task_gaussians``), PatchCoreCL++ (``task_memory``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from tinyvad.bank import Bank
from tinyvad.detectors import Scorer, check_bank
from tinyvad.detectors.bank_tasks import BankTask, Learning, bank_of_tasks
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.routing import prototype, signatures
from tinyvad.detectors.task_gaussians import Space, TaskStatistics, collect_task, scorer_of
from tinyvad.detectors.task_memory import (
    TaskMemory,
    extend,
    ladder,
    ladder_of_scores,
    ladder_sizes,
    nested_scores,
    select,
    shares,
    stack_ladders,
    threshold_at,
)
from tinyvad.detectors.tasks import MAX_TASKS
from tinyvad.detectors.triangular import TriangularScorer
from tinyvad.embedding import Embedding
from tinyvad.errors import CheckFailed, InputError
from tinyvad.fitting import PATCHCORE_CANDIDATES, PATCHCORE_LARGEST, QUANTILE, TapStore, deal, image_scores, threshold_of
from tinyvad.slots import next_generation

GOLDEN = 4  # vectors of the self-test: of the tasks learnt last
MemoryScorer = (PatchCoreScorer, PatchCoreLiteScorer)


class Settings(NamedTuple):
    """What a build's manifest says that learning needs: of the threshold, and of a memory bank's candidates."""

    quantile: float = QUANTILE
    max_candidates: int = PATCHCORE_CANDIDATES
    seed: int = 0

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Settings:
        method = manifest["method"]["settings"]
        return cls(
            manifest["settings"].get("quantile", QUANTILE), method.get("max_candidates", PATCHCORE_CANDIDATES),
            method.get("seed", 0),
        )  # fmt: skip


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
        statistics: the task's sums, for its state; None in a memory bank.
    """

    data: bytes
    task: int
    gives_way: str = ""
    statistics: TaskStatistics | None = None


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
    for i, (entry, row) in enumerate(zip(_entries(bank, len(table)), table, strict=True)):
        steps = None if ladders is None else ladders[i]
        tasks.append(BankTask(entry["name"], int(row[2]), int(found.thresholds[i]), entry["threshold_rule"],
                              found.prototypes[i], steps, entry["state"]))  # fmt: skip
    learning = Learning(*(int(n) for n in bank.sections["LRN "][:5])) if "LRN " in bank.sections else None
    embedding = Embedding.from_sections(bank.sections, bank.header.grid_size, layers)
    return Opened(bank, embedding, tuple(tasks), found.scorers, learning)


def _entries(bank: Bank, count: int) -> list[dict[str, Any]]:
    """META's row of every task, checked."""
    entries = bank.meta.get("tasks")
    kinds: dict[str, Any] = {"name": str, "threshold_rule": str, "state": (str, type(None))}
    right = isinstance(entries, list) and len(entries) == count and all(
        isinstance(entry, dict) and all(name in entry and isinstance(entry[name], kind) for name, kind in kinds.items())
        for entry in entries
    )  # fmt: skip
    if not right or not isinstance(entries, list):
        raise InputError(f"{bank.name}: META does not describe its {count} tasks; make the build again")
    return entries


def learn_task(
    opened: Opened, name: str, new: NewImages, saved: Mapping[str, np.ndarray] | None, settings: Settings,
    slot_bytes: int, state: str | None,
) -> Next:  # fmt: skip
    """The bank that has learnt the new images as a new task, or as more of an old one.

    Args:
        name: of the task. saved: arrays of an old task's state; None of a new one.
        slot_bytes: what the bank may take. state: name of the file in which the caller keeps the task's state.

    Raises:
        CheckFailed: the bank would pass ``slot_bytes`` and nothing can give way.
        InputError: an old task of a PaDiM bank without its sums.
    """
    if opened.of_gaussians:
        return _learn_gaussians(opened, name, new, saved, settings, slot_bytes, state)
    return _learn_memory(opened, name, new, settings, slot_bytes, state)


def _learn_gaussians(
    opened: Opened, name: str, new: NewImages, saved: Mapping[str, np.ndarray] | None, settings: Settings,
    slot_bytes: int, state: str | None,
) -> Next:  # fmt: skip
    number, embedding = opened.number(name), opened.embedding
    assert isinstance(opened.scorers[0], TriangularScorer)
    space = Space.of(opened.scorers[0], embedding.steps)
    old = None if number is None else opened.tasks[number]
    before = None if old is None or saved is None else TaskStatistics.from_arrays(space, saved)
    folds = deal(new.store.count)
    parts = [collect_task(space, new.store.embeddings(embedding, fold)) for fold in folds]
    whole = reduce(TaskStatistics.merge, parts if before is None else [before, *parts])
    scorer = scorer_of(space, whole)
    scores = [image_scores(scorer, new.store.embeddings(embedding))]  # as in a build: what was fitted must pass
    if new.copies is not None and before is None:
        scores.append(image_scores(scorer, new.copies.embeddings(embedding)))
    else:
        held = [image_scores(scorer_of(space, whole.without(part)), new.store.embeddings(embedding, fold))
                for part, fold in zip(parts, folds, strict=True)]  # fmt: skip
        scores.append(np.concatenate(held))
    threshold = max(threshold_of(found, settings.quantile) for found in scores)
    channels = embedding.taps[-1].channels
    task = BankTask(
        name, whole.count, max(threshold, 0 if old is None else old.threshold), _rule(new, old, settings),
        prototype(whole.total[-channels:], whole.count), state=state,
    )  # fmt: skip
    tasks, scorers, number = _placed(opened, number, task, scorer)
    data = _write(opened, tasks, scorers, _golden(opened, scorers, number, new))
    if len(data) > slot_bytes:
        raise too_large(len(tasks), len(data), slot_bytes)
    return Next(data, number, statistics=whole)


def _learn_memory(
    opened: Opened, name: str, new: NewImages, settings: Settings, slot_bytes: int, state: str | None
) -> Next:
    number, embedding = opened.number(name), opened.embedding
    old = None if number is None else opened.tasks[number]
    first = opened.scorers[0]
    assert isinstance(first, MemoryScorer)
    share = shares(_all_rows(opened, slot_bytes), len(opened.tasks) + (number is None))
    quantizer = first.quantizer if isinstance(first, PatchCoreLiteScorer) else None
    known = None if number is None or old is None else _memory_of(opened.scorers[number], old.images)

    def fit(stream: Iterable[np.ndarray]) -> TaskMemory:
        if known is None:
            return select(stream, share, settings.max_candidates, settings.seed, quantizer)
        return extend(known, stream, share, settings.max_candidates, settings.seed, quantizer)

    memory = fit(new.store.embeddings(embedding))
    steps = _ladder(memory, known, new, embedding, fit, settings.quantile)
    if old is not None and old.ladder is not None:
        steps[:, 1] = np.maximum(steps[:, 1], [threshold_at(old.ladder, int(rows)) for rows in steps[:, 0]])
    images, channels = new.store.count, embedding.taps[-1].channels
    total = sum((signatures(batch, channels).sum(0) for batch in new.store.embeddings(embedding)), np.int64(0))
    if old is not None:  # its exact sum is not kept: the rounded mean stands for it
        total = total + old.prototype.astype(np.int64) * old.images
        images += old.images
    threshold = max(threshold_at(steps, len(memory.rows)), 0 if old is None else old.threshold)
    steps[:, 1] = np.maximum(np.maximum.accumulate(steps[:, 1]), threshold)  # a cut never lowers a threshold
    task = BankTask(name, images, threshold, _rule(new, old, settings), prototype(np.asarray(total), images), steps, state)
    tasks, scorers, number = _placed(opened, number, task, _scorer_of(memory, first))
    most = max(_rows(scorer) for scorer in opened.scorers)
    while True:
        tasks, scorers = _cut_all(tasks, scorers, share)
        data = _write(opened, tasks, scorers, _golden(opened, scorers, number, new))
        if len(data) <= slot_bytes:
            break
        over = -(-(len(data) - slot_bytes) // _row_bytes(scorers[0]))
        share -= max(1, over // len(tasks))
        if share < 1:
            raise too_large(len(tasks), len(data), slot_bytes)
    gives_way = f"rows a product {most:,} -> {share:,}" if share < most else ""
    return Next(data, number, gives_way)


def _ladder(
    memory: TaskMemory, known: TaskMemory | None, new: NewImages, embedding: Embedding, fit: Any, quantile: float
) -> np.ndarray:
    """(L, 2) uint32 thresholds of a memory at all sizes that it may be cut to."""
    sizes = ladder_sizes(len(memory.rows))
    everything = nested_scores(memory, sizes, new.store.embeddings(embedding))
    threshold = lambda scores: threshold_of(scores, quantile)  # noqa: E731
    if new.store.count > 1:
        take = lambda numbers: new.store.embeddings(embedding, numbers)  # noqa: E731
        steps = ladder(take, deal(new.store.count), len(memory.rows), fit, threshold)
    elif known is not None:
        held = nested_scores(known, sizes, new.store.embeddings(embedding))
        steps = ladder_of_scores(sizes, held, threshold)
    else:
        assert new.copies is not None
        steps = ladder_of_scores(sizes, nested_scores(memory, sizes, new.copies.embeddings(embedding)), threshold)
    steps[:, 1] = np.maximum(steps[:, 1], ladder_of_scores(sizes, everything, threshold)[:, 1])
    return steps


def forget_task(opened: Opened, name: str) -> Next:
    """The bank without one of its tasks.

    Raises:
        InputError: there is no such task, or no other one.
    """
    number = opened.number(name)
    if number is None:
        raise InputError(f"the build has no product {name!r}; it has {', '.join(task.name for task in opened.tasks)}")
    if len(opened.tasks) == 1:
        raise InputError(f"{name!r} is the only product of the build; learn another one before forgetting it")
    tasks = [task for i, task in enumerate(opened.tasks) if i != number]
    scorers = [scorer for i, scorer in enumerate(opened.scorers) if i != number]
    vectors, rows = opened.bank.sections["TEST"], opened.bank.sections["GOLD"].astype(np.int64)
    kept = [(vector, task - (task > number), cell) for vector, (task, cell, _) in zip(vectors, rows, strict=True)
            if task != number]  # fmt: skip
    kept = kept or [(vectors[0], len(tasks) - 1, rows[0, 1])]  # any vector tests any task
    return Next(_write(opened, tasks, scorers, _scored(scorers, kept, opened.embedding.grid)), number)


def added_bytes(opened: Opened, name: str) -> int:
    """Bytes that a new task adds to a PaDiM bank, to within the alignment of its sections; 0 for a memory bank."""
    if not opened.of_gaussians:
        return 0
    own = sum(opened.bank.sections[tag].nbytes for tag in ("MEAN", "SCAL", "TABL", "CHOL") if tag in opened.bank.sections)
    return own // len(opened.tasks) + 4 + 16 + opened.tasks[0].prototype.nbytes + len(name.encode())


def too_large(tasks: int, nbytes: int, limit: int) -> CheckFailed:
    """The one line when a bank of so many tasks does not fit its slot."""
    return CheckFailed(
        f"bank of {tasks} products {nbytes:,} B > {limit:,} B of its slot: make room with `tinyvad learn --forget NAME`, "
        f"or build with --tasks {tasks} or more, a smaller --dimensions or --grid, or more --bank-bytes"
    )


def check_room(opened: Opened, name: str, slot_bytes: int) -> None:
    """Before any image is read: CheckFailed if a new task can't fit, InputError beyond 255 tasks."""
    count = len(opened.tasks) + 1
    if count > MAX_TASKS:
        raise InputError(f"a bank holds at most {MAX_TASKS} products; forget one, or make a second build")
    nbytes = opened.bank.nbytes + added_bytes(opened, name)
    if opened.of_gaussians and nbytes > slot_bytes:
        raise too_large(count, nbytes, slot_bytes)


def _rule(new: NewImages, old: BankTask | None, settings: Settings) -> str:
    if new.copies is not None and old is None:
        return "shifted copies of the only good image"
    return f"{settings.quantile:g} quantile of held-out good images" + ("" if old is None else ", the highest so far")


def _placed(
    opened: Opened, number: int | None, task: BankTask, scorer: Scorer
) -> tuple[list[BankTask], list[Scorer], int]:
    """All tasks and scorers with the new ones in their place."""
    tasks, scorers = list(opened.tasks), list(opened.scorers)
    if number is None:
        return [*tasks, task], [*scorers, scorer], len(tasks)
    tasks[number], scorers[number] = task, scorer
    return tasks, scorers, number


def _rows(scorer: Scorer) -> int:
    assert isinstance(scorer, MemoryScorer)
    return len(scorer.codes) if isinstance(scorer, PatchCoreLiteScorer) else len(scorer.bank)


def _all_rows(opened: Opened, slot_bytes: int) -> int:
    """M: rows of all tasks together, from LRN; of a build that did not plan for several, what its slot holds."""
    if opened.learning is not None:
        return opened.learning.rows
    there, each = sum(_rows(scorer) for scorer in opened.scorers), _row_bytes(opened.scorers[0])
    return max(there, min(PATCHCORE_LARGEST, there + (slot_bytes - opened.bank.nbytes) // each))


def _row_bytes(scorer: Scorer) -> int:
    if isinstance(scorer, PatchCoreLiteScorer):
        return (scorer.codes.shape[1] * scorer.quantizer.bits + 7) // 8
    assert isinstance(scorer, PatchCoreScorer)
    return scorer.bank.shape[1]


def _memory_of(scorer: Scorer, images: int) -> TaskMemory:
    if isinstance(scorer, PatchCoreLiteScorer):
        return TaskMemory(scorer.quantizer.decode(scorer.codes), images, scorer.codes)
    assert isinstance(scorer, PatchCoreScorer)
    return TaskMemory(scorer.bank, images)


def _scorer_of(memory: TaskMemory, like: Scorer) -> Scorer:
    """A memory as a scorer of the same bank as ``like``."""
    if memory.codes is None:
        assert isinstance(like, PatchCoreScorer)
        return replace(like, bank=memory.rows)
    assert isinstance(like, PatchCoreLiteScorer)
    return replace(like, codes=memory.codes)


def _cut_all(
    tasks: Sequence[BankTask], scorers: Sequence[Scorer], rows: int
) -> tuple[list[BankTask], list[Scorer]]:
    """Every task within ``rows`` rows, with the threshold for its size; ladders of one length."""
    shorter: list[BankTask] = []
    banks: list[Scorer] = []
    for task, scorer in zip(tasks, scorers, strict=True):
        if _rows(scorer) > rows:
            if task.ladder is None:
                raise InputError(f"{task.name!r} has no thresholds for fewer rows (section LADR); make the build again")
            task = replace(task, threshold=threshold_at(task.ladder, rows))
            if isinstance(scorer, PatchCoreLiteScorer):
                scorer = replace(scorer, codes=scorer.codes[:rows])
            elif isinstance(scorer, PatchCoreScorer):
                scorer = replace(scorer, bank=scorer.bank[:rows])
        shorter.append(task)
        banks.append(scorer)
    ladders = [task.ladder for task in shorter if task.ladder is not None]
    if len(ladders) == len(shorter):
        shorter = [replace(task, ladder=steps) for task, steps in zip(shorter, stack_ladders(ladders), strict=True)]
    return shorter, banks


def _golden(
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
    return _scored(scorers, chosen[:GOLDEN], opened.embedding.grid)


def _scored(
    scorers: Sequence[Scorer], chosen: Sequence[tuple[np.ndarray, int, int]], grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """TEST (n, D) int8 and GOLD (n, 3) uint32 of (vector, task, cell) each."""
    gold = []
    for vector, task, cell in chosen:
        cells = np.zeros((1, *grid, len(vector)), np.int8)
        cells[0, cell // grid[1], cell % grid[1]] = vector
        gold.append((task, cell, scorers[task].score(cells).reshape(-1)[cell]))
    return np.stack([vector for vector, _, _ in chosen]), np.array(gold, np.uint32)


def _write(
    opened: Opened, tasks: Sequence[BankTask], scorers: Sequence[Scorer], golden: tuple[np.ndarray, np.ndarray]
) -> bytes:
    header = replace(opened.bank.header, generation=next_generation(opened.bank))
    return bank_of_tasks(header, opened.bank.sections, scorers, tasks, golden, opened.bank.meta, opened.learning)
