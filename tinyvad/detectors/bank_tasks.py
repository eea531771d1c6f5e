"""A bank of one or several tasks, put together: what every task brings, and all sections in the order of the file.

Flows in: the header, the sections that all tasks share, a scorer and a ``BankTask`` a task. Flows out: the bytes of the
bank. `tinyvad build` writes the first bank with it, `tinyvad learn` every later one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyvad.bank import Bank, Header, pack_meta, write_bank
from tinyvad.detectors import Scorer
from tinyvad.detectors.tasks import TASK_SECTIONS, join_tasks
from tinyvad.errors import InputError

SHARED = ("LUT ", "TAPS", "STEP")  # of the embedding, the same for all tasks and generations


@dataclass(frozen=True, eq=False)
class BankTask:
    """One task of a bank.

    Attributes:
        name: of the product. images: good images learnt.
        threshold: integer; a score at or above it is anomalous. rule: where it comes from, for people.
        prototype: (C,) int32, mean signature (``tinyvad.detectors.routing``).
        ladder: (L, 2) uint32 rows and threshold once the task is cut to them, or None (see LADR).
        state: name of the file of exact sums beside the bank, None where there is none.
    """

    name: str
    images: int
    threshold: int
    rule: str
    prototype: np.ndarray
    ladder: np.ndarray | None = None
    state: str | None = None


@dataclass(frozen=True)
class Learning:
    """What a device must know to learn (LRN in docs/SPEC.md).

    Attributes:
        slot_bytes: of one slot. tasks: the most that are planned for. rows: of a memory bank in all tasks, else 0.
        per_image: rows that one image may add. novelty: squared distance that a row must exceed to be added.
    """

    slot_bytes: int
    tasks: int
    rows: int = 0
    per_image: int = 0
    novelty: int = 0


def bank_of_tasks(
    header: Header,
    shared: Mapping[str, np.ndarray],
    scorers: Sequence[Scorer],
    tasks: Sequence[BankTask],
    golden: tuple[np.ndarray, np.ndarray],
    meta: Mapping[str, Any],
    learning: Learning | None = None,
) -> bytes:
    """The bytes of a bank.

    Args:
        shared: at least the sections of ``SHARED``. scorers: one a task, of one bank.
        golden: TEST (n, D) int8 and GOLD (n, 3) uint32.
        meta: further keys of META; ``task`` and ``tasks`` are added.

    Raises:
        InputError: an array that the format can't hold, or scorers that differ in what they must share.
    """
    prototypes = np.stack([task.prototype for task in tasks])
    sections = {
        **{tag: shared[tag] for tag in SHARED},
        "THRS": np.array([task.threshold for task in tasks], np.uint32),
        **join_tasks(scorers, [task.images for task in tasks], prototypes),
    }
    ladders = [task.ladder for task in tasks if task.ladder is not None]
    if len(ladders) == len(tasks):
        sections["LADR"] = np.stack(ladders).astype(np.uint32)
    if learning is not None:
        numbers = (learning.slot_bytes, learning.tasks, learning.rows, learning.per_image, learning.novelty, 0, 0, 0)
        sections["LRN "] = np.array(numbers, np.uint32)
    sections["TEST"], sections["GOLD"] = golden
    named = [
        {"name": task.name, "images": task.images, "threshold_rule": task.rule, "state": task.state} for task in tasks
    ]
    sections["META"] = pack_meta({**meta, "task": tasks[0].name, "tasks": named})
    return write_bank(header, sections, ("LUT ", "TAPS", "THRS", *TASK_SECTIONS, *scorers[0].required))


def task_entries(bank: Bank) -> list[dict[str, Any]]:
    """META's row of every task: ``name``, ``threshold_rule`` and ``state``, checked.

    A device that learns can't write META: the tasks that it has added are called "task 2" and so on, like all tasks of a
    bank whose META lists none; "task 2 (2)" if a product is called that already.

    Raises:
        InputError: META lists other tasks than the bank has, or two of one name.
    """
    count, meta = len(bank.sections["THRS"]), bank.meta
    listed = meta.get("tasks", [{"name": meta["task"]}] if "task" in meta else [])
    entries = [entry if isinstance(entry, dict) else {} for entry in listed] if isinstance(listed, list) else []
    if bank.header.updatable or "tasks" not in meta:
        rule = "learnt on the device" if bank.header.updatable else ""
        taken = [entry.get("name") for entry in entries]
        for i in range(len(entries) + 1, count + 1):
            name = f"task {i}"
            while name in taken:
                name += f" ({i})"
            entries.append({"name": name, "threshold_rule": rule})
    entries = [{"name": None, "threshold_rule": "", "state": None, **entry} for entry in entries]
    kinds: dict[str, Any] = {"name": str, "threshold_rule": str, "state": (str, type(None))}
    right = all(isinstance(entry[name], kind) for entry in entries for name, kind in kinds.items())
    if not right or len(entries) != count or len({entry["name"] for entry in entries}) != count:
        raise InputError(f"{bank.name}: META does not describe its {count} tasks; make the build again")
    return entries
