"""The next bank of a build: the current one and the features of new good images in, the bank that has learnt them out.

Nothing that tasks share is fitted anew: embedding and projection stay. What happens to the tasks depends on the kind:

    PADM PADF PADC   a new task: exact sums of its images, a scorer of its own, the others stay byte for byte
                     an old one: the sums are merged with those kept on disk (its state), the scorer made from all
    CORE PQPC        with c tasks each has floor(M / c) rows: the others are cut to their first rows, which is free, and
                     take the threshold that their ladder has for that size; an old task is extended from its rows, and in
                     PQPC keeps its codebooks; a new one gets its own

Thresholds come from good images that the scorer has not seen, as in a build: by cross-fitting over the new images, for a
single one from shifted copies. In a memory bank that of an old task never falls. In the others it comes from the held-out
scores of all its images so far, less those by a scorer that knew fewer than half of them: fed one image at a time, the
Gaussians of the first few are so narrow that their scores would hide every defect for good.

Source: compact PaDiM with one projection (``tinyvad.detectors.task_gaussians``), PatchCoreCL++ (``task_memory``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np

from tinyvad.continual.next_memory import learn_memory, share_of
from tinyvad.continual.opened_bank import (
    NewImages,
    Next,
    Opened,
    Settings,
    placed,
    rule_of,
    scored,
    self_test,
    too_large,
    write,
)
from tinyvad.detectors.bank_tasks import BankTask
from tinyvad.detectors.routing import prototype
from tinyvad.detectors.task_gaussians import Space, TaskStatistics, collect_task, scorer_of
from tinyvad.detectors.tasks import MAX_TASKS
from tinyvad.detectors.triangular import TriangularScorer
from tinyvad.errors import InputError
from tinyvad.fitting import deal, image_scores, threshold_of

HELD = "held"  # of a state: (m, 2) int64, how many images a scorer knew, and the score that it gave to another one


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
    return learn_memory(opened, name, new, settings, slot_bytes, state)


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
        held = [held_rows(image_scores(scorer, new.copies.embeddings(embedding)), 1)]
    else:
        held = [held_rows(image_scores(scorer_of(space, whole.without(part)), new.store.embeddings(embedding, fold)),
                          whole.count - part.count) for part, fold in zip(parts, folds, strict=True)]  # fmt: skip
    earlier = None if old is None or saved is None else _held_of(saved, name)
    rows = np.concatenate(held if earlier is None else [earlier, *held])
    rows = rows[2 * rows[:, 0] >= whole.count]
    scores.append(rows[:, 1])
    threshold = max(threshold_of(found, settings.quantile) for found in scores)
    if old is not None and earlier is None:  # chosen otherwise: by hand, or on labelled images
        threshold = max(threshold, old.threshold)
    channels = embedding.taps[-1].channels
    task = BankTask(
        name, whole.count, threshold, rule_of(new, old, settings, highest=earlier is None),
        prototype(whole.total[-channels:], whole.count), state=state,
    )  # fmt: skip
    tasks, scorers, number = placed(opened, number, task, scorer)
    data = write(opened, tasks, scorers, self_test(opened, scorers, number, new))
    if len(data) > slot_bytes:
        raise too_large(len(tasks), len(data), slot_bytes)
    return Next(data, number, statistics=whole, held=None if old is not None and earlier is None else rows)


def held_rows(scores: np.ndarray, images: int) -> np.ndarray:
    """(m, 2) int64, rows of ``HELD``, of m scores by a scorer that knew so many images."""
    return np.stack([np.full(len(scores), images), scores], 1).astype(np.int64)


def _held_of(saved: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """The held-out scores in a task's state, None if it has none; InputError if they are no such rows."""
    rows = saved.get(HELD)
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype != np.int64 or rows.min(initial=0) < 0):
        raise InputError(f"learning state of {name!r}: {HELD} is {rows.dtype}{rows.shape}; learn the product anew")
    return rows


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
    sections = opened.bank.sections
    if "TEST" not in sections:
        raise InputError(f"{opened.bank.name}: no self-test (section TEST); make the build again")
    vectors, rows = sections["TEST"], sections["GOLD"].astype(np.int64)
    kept = [(vector, task - (task > number), cell) for vector, (task, cell, _) in zip(vectors, rows, strict=True)
            if task != number]  # fmt: skip
    kept = kept or [(vectors[0], len(tasks) - 1, rows[0, 1])]  # any vector tests any task
    return Next(write(opened, tasks, scorers, scored(scorers, kept, opened.embedding.grid)), number)


def added_bytes(opened: Opened, name: str) -> int:
    """Bytes that a new task adds to a PaDiM bank, to within the alignment of its sections; 0 for a memory bank."""
    if not opened.of_gaussians:
        return 0
    own = sum(opened.bank.sections[tag].nbytes for tag in ("MEAN", "SCAL", "TABL", "CHOL") if tag in opened.bank.sections)
    return own // len(opened.tasks) + 4 + 16 + opened.tasks[0].prototype.nbytes + len(name.encode())


def check_room(opened: Opened, name: str, slot_bytes: int) -> None:
    """Before any image is read: CheckFailed if a new task can't fit, InputError beyond 255 tasks."""
    count = len(opened.tasks) + 1
    if count > MAX_TASKS:
        raise InputError(f"a bank holds at most {MAX_TASKS} products; forget one, or make a second build")
    nbytes = opened.bank.nbytes + added_bytes(opened, name)
    if opened.of_gaussians and nbytes > slot_bytes:
        raise too_large(count, nbytes, slot_bytes)
    if not opened.of_gaussians:
        share_of(opened, None, slot_bytes)
