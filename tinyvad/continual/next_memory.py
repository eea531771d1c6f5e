"""More images in a memory bank (CORE, PQPC): rows shared out anew, other tasks cut, thresholds from their ladders.

Flows in: the opened bank and the features of new good images. Flows out: the next bank, within the bytes of its slot. With
c tasks each has floor(M / c) rows; cutting a task to its first rows is free, and its ladder (LADR) has the threshold for
that size. If the bank would still pass its slot, all tasks give way alike. A new task of a quantised bank gets codebooks of
its own, trained as in a build, of the size of the others'.

Source: PatchCoreCL++ (``tinyvad.detectors.task_memory``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tinyvad.continual.opened_bank import NewImages, Next, Opened, Settings, placed, rule_of, self_test, too_large, write
from tinyvad.detectors import Scorer
from tinyvad.detectors.bank_tasks import BankTask
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import ProductQuantizer, fit_quantizer
from tinyvad.detectors.routing import prototype, signatures
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
from tinyvad.embedding import Embedding
from tinyvad.errors import InputError
from tinyvad.fitting import PATCHCORE_LARGEST, deal, threshold_of

MemoryScorer = (PatchCoreScorer, PatchCoreLiteScorer)


def learn_memory(
    opened: Opened, name: str, new: NewImages, settings: Settings, slot_bytes: int, state: str | None
) -> Next:
    number, embedding = opened.number(name), opened.embedding
    old = None if number is None else opened.tasks[number]
    first = opened.scorers[0]
    assert isinstance(first, MemoryScorer)
    share = share_of(opened, number, slot_bytes)
    known = None if number is None or old is None else _memory_of(opened.scorers[number], old.images)
    train = partial(_train, first.quantizer, settings.seed) if isinstance(first, PatchCoreLiteScorer) else None

    def fit(stream: Iterable[np.ndarray]) -> TaskMemory:
        if known is None:
            return select(stream, share, settings.max_candidates, settings.seed, train)
        return extend(known, stream, share, settings.max_candidates, settings.seed)

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
    mean = prototype(np.asarray(total), images)
    task = BankTask(name, images, threshold, rule_of(new, old, settings), mean, steps, state)
    tasks, scorers, number = placed(opened, number, task, _scorer_of(memory, first))
    most = max(_rows(scorer) for scorer in opened.scorers)
    while True:
        tasks, scorers = _cut_all(tasks, scorers, share)
        data = write(opened, tasks, scorers, self_test(opened, scorers, number, new))
        if len(data) <= slot_bytes:
            break
        rows = [_rows(scorer) for scorer in scorers]
        share = even(rows, sum(rows) - -(-(len(data) - slot_bytes) // _row_bytes(scorers[0])))
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


def _rows(scorer: Scorer) -> int:
    assert isinstance(scorer, MemoryScorer)
    return len(scorer.codes) if isinstance(scorer, PatchCoreLiteScorer) else len(scorer.bank)


def even(rows: Sequence[int], most: int) -> int:
    """The largest number that each of ``rows`` may be cut to for a sum of at most ``most``; 0 if there is none."""
    left = most
    for done, count in enumerate(sorted(rows)):
        share = max(left // (len(rows) - done), 0)
        if share < count:
            return share
        left -= count
    return max(rows)


def _train(like: ProductQuantizer, seed: int, rows: np.ndarray, candidates: np.ndarray) -> ProductQuantizer:
    """Codebooks of a new task of the same shape as another's, trained as ``PatchCoreLite`` does."""
    subspaces, centroids, _ = like.codebooks.shape
    rng = np.random.default_rng(seed)
    return fit_quantizer(rows, subspaces, like.bits, rng, candidates, centroids=centroids)


def share_of(opened: Opened, number: int | None, slot_bytes: int) -> int:
    """Rows that each task may have once images of task ``number``, None for a new one, are learnt.

    floor(M / c), M from LRN; less where the slot would not hold that, as in a quantised bank of more products than were
    planned, whose codebooks take the room.

    Raises:
        CheckFailed: not a row a task fits.
    """
    first, count = opened.scorers[0], len(opened.tasks) + (number is None)
    there, each = [_rows(scorer) for scorer in opened.scorers], _row_bytes(first)
    planned = shares(max(sum(there), PATCHCORE_LARGEST) if opened.learning is None else opened.learning.rows, count)
    rows = [min(one, planned) for one in there]
    at = count - 1 if number is None else number
    rows[at : at + 1] = [planned]
    own = 0
    if number is None and isinstance(first, PatchCoreLiteScorer):
        own = first.quantizer.codebooks.nbytes + first.quantizer.indices.nbytes
    fixed = opened.bank.nbytes - sum(there) * each + own
    share = even(rows, (slot_bytes - fixed) // each)
    if share < 1:
        raise too_large(count, fixed + count * each, slot_bytes)
    return share


def _row_bytes(scorer: Scorer) -> int:
    if isinstance(scorer, PatchCoreLiteScorer):
        return (scorer.codes.shape[1] * scorer.quantizer.bits + 7) // 8
    assert isinstance(scorer, PatchCoreScorer)
    return scorer.bank.shape[1]


def _memory_of(scorer: Scorer, images: int) -> TaskMemory:
    if isinstance(scorer, PatchCoreLiteScorer):
        return TaskMemory(scorer.quantizer.decode(scorer.codes), images, scorer.codes, scorer.quantizer)
    assert isinstance(scorer, PatchCoreScorer)
    return TaskMemory(scorer.bank, images)


def _scorer_of(memory: TaskMemory, like: Scorer) -> Scorer:
    """A memory as a scorer of the same bank as ``like``."""
    if memory.codes is None or memory.quantizer is None:
        assert isinstance(like, PatchCoreScorer)
        return replace(like, bank=memory.rows)
    assert isinstance(like, PatchCoreLiteScorer)
    return replace(like, codes=memory.codes, quantizer=memory.quantizer)


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
