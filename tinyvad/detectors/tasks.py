"""A bank of several tasks: its sections in, a scorer for each task out; images to their task, and scored by it alone.

What is learnt lies one task after another in the arrays of ``LEARNT``; all else is shared. A task's scorer is made of views
of its rows, so it is the scorer of a bank that holds this task alone, integer for integer (docs/SPEC.md, "Several tasks").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyvad.detectors.routing import nearest_prototype, signatures
from tinyvad.detectors.sections import take_section
from tinyvad.errors import InputError

if TYPE_CHECKING:
    from tinyvad.detectors import Scorer

MAX_TASKS = 255
MAX_CELLS = 65536  # of a grid with prototypes: keeps the device's sums within their widths
TASK_SECTIONS = ("TASK", "PROT")  # REQUIRED where they are
LEARNT = {  # by kind; TASK says how many rows a task has, but for those of ``EQUAL``
    "PADM": ("MEAN", "SCAL", "TABL"), "PADF": ("MEAN", "SCAL", "TABL", "CHOL"), "PADC": ("MEAN", "SCAL", "TABL", "CHOL"),
    "CORE": ("BANK",), "PQPC": ("CODE", "INDX", "CBK "),
    "STFP": (), "LINR": (), "CFAS": (),  # one network for all tasks; a task has one row
}  # fmt: skip
MEMORY_BANKS = ("CORE", "PQPC")  # kinds whose tasks have any number of rows
EQUAL = ("TABL", "INDX", "CBK ")  # of what is learnt: as many rows for every task
_REMEDY = "build the bank again"


@dataclass(frozen=True, eq=False)
class TaskScorers:
    """The scorers of a bank.

    Attributes:
        scorers: one a task; views of the bank's arrays.
        thresholds: (T,) int64; an image of task t whose largest distance is at or above thresholds[t] is anomalous.
        prototypes: (T, C) int32, or None in a bank of one task.
        last_channels: C, channels of the last tapped tensor.
    """

    scorers: tuple[Scorer, ...]
    thresholds: np.ndarray
    prototypes: np.ndarray | None
    last_channels: int

    @property
    def largest(self) -> Scorer:
        """The scorer that takes longest, which bounds an image's time; unit and scratch are the same for all."""
        return max(self.scorers, key=lambda scorer: scorer.macs((1, 1)))

    def route(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n,) int64: the task of every image, that of the nearest prototype.

        Of a bank without an embedding: the last tapped maps (n, h, w, C) int8.
        """
        if self.prototypes is None or len(self.scorers) == 1:
            return np.zeros(len(embeddings), np.int64)
        return nearest_prototype(signatures(embeddings, self.last_channels), self.prototypes)

    def score(self, embeddings: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """(n, H, W, D) embeddings and (n,) task numbers -> (n, H, W) uint32 scores, each by its own task."""
        maps = np.empty(embeddings.shape[:3], np.uint32)
        for task in np.unique(tasks):
            its = tasks == task
            maps[its] = self.scorers[task].score(embeddings[its])
        return maps


def read_thresholds(sections: Mapping[str, np.ndarray]) -> np.ndarray:
    """THRS as (T,) int64; InputError if it is missing, malformed or of more than 255 tasks."""
    found = sections.get("THRS")
    if found is None or found.ndim != 1 or found.dtype != np.uint32:
        raise InputError(f"section THRS is missing or no row of uint32; {_REMEDY}")
    if len(found) > MAX_TASKS:
        raise InputError(f"section THRS has {len(found)} tasks, at most {MAX_TASKS}; {_REMEDY}")
    return found.astype(np.int64)


def split_tasks(
    kind: str, sections: Mapping[str, np.ndarray], grid: tuple[int, int], tasks: int, channels: int,
    summed: tuple[int, int] | None = None,
) -> list[Mapping[str, np.ndarray]]:
    """The sections of every task as those of a bank that holds it alone: views, but for CFG's number of rows.

    Args:
        kind: of the bank. tasks: T. channels: C of the last tapped tensor.
        summed: positions that a signature adds up, and the largest value; None: the grid's cells, 127.

    Raises:
        InputError: TASK, PROT or LADR is missing or malformed, or an array has not the rows of T tasks.
    """
    if "LADR" in sections:
        _check_ladder(kind, sections["LADR"], tasks)
    if "LRN " in sections and take_section(sections, "LRN ", (8,), "uint32")[5:].any():
        raise InputError(f"bank section LRN : the last three numbers are not 0; {_REMEDY}")
    if tasks == 1 and not any(tag in sections for tag in TASK_SECTIONS):
        return [sections]
    rows = take_section(sections, "TASK", (tasks, 4), "int32").astype(np.int64)
    prototypes = take_section(sections, "PROT", (tasks, channels), "int32")
    cells, largest = summed or (grid[0] * grid[1], 127)
    if cells > MAX_CELLS or np.abs(prototypes.astype(np.int64)).max() > largest * cells:
        raise InputError(f"bank section PROT: beyond {largest} times {cells} cells, of at most {MAX_CELLS}; {_REMEDY}")
    config = take_section(sections, "CFG ", (4,), "int32")
    ends = rows[:, 1].cumsum()
    each = _rows_of_task(kind, grid)
    whole = tasks * each if each else int(config[0])
    wrong = (rows[:, 0] != ends - rows[:, 1]) | (rows[:, 1] < 1) | (rows[:, 2] < 0) | (rows[:, 3] != 0)
    if each:
        wrong |= rows[:, 1] != each
    if wrong.any() or ends[-1] != whole:
        at = int(wrong.argmax()) if wrong.any() else tasks - 1
        raise InputError(f"bank section TASK, row {at}: {rows[at].tolist()} does not share out {whole} rows; {_REMEDY}")
    lengths = {tag: _rows_in(sections, tag, whole, tasks) for tag in LEARNT[kind] if tag in sections}
    return [_one_task(sections, lengths, config, rows[t], t, each > 0) for t in range(tasks)]


def _rows_of_task(kind: str, grid: tuple[int, int]) -> int:
    """Rows that every task of a bank has, 0 where TASK alone says it."""
    if kind in MEMORY_BANKS:
        return 0
    return grid[0] if kind.startswith("PAD") else 1


def _one_task(
    sections: Mapping[str, np.ndarray], lengths: Mapping[str, int], config: np.ndarray, row: np.ndarray, task: int,
    is_equal: bool,
) -> Mapping[str, np.ndarray]:  # fmt: skip
    first, count = int(row[0]), int(row[1])
    one = dict(sections)
    for tag, each in lengths.items():
        one[tag] = sections[tag][task * each : (task + 1) * each] if each else sections[tag][first : first + count]
    if not is_equal:
        one["CFG "] = np.array([count, *config[1:]], np.int32)
    return one


def _rows_in(sections: Mapping[str, np.ndarray], tag: str, whole: int, tasks: int) -> int:
    """A task's rows in a section of ``EQUAL``, 0 in one that TASK shares out; InputError if the tasks do not fill it."""
    shape = sections[tag].shape
    right = len(shape) > 0 and (shape[0] % tasks == 0 if tag in EQUAL else shape[0] == whole)
    if not right:
        of_rows = "" if tag in EQUAL else f" of {whole} rows"
        raise InputError(f"bank section {tag}: shape {shape} does not go with {tasks} tasks{of_rows}; {_REMEDY}")
    return shape[0] // tasks if tag in EQUAL else 0


def _check_ladder(kind: str, ladder: np.ndarray, tasks: int) -> None:
    """LADR: pairs (rows, threshold) a task, rows at least 1 and never rising; memory banks only."""
    if kind not in MEMORY_BANKS or ladder.ndim != 3 or ladder.dtype != np.uint32:
        raise InputError(f"bank section LADR: {ladder.dtype.name}{ladder.shape} in a {kind} bank; {_REMEDY}")
    if ladder.shape[0] != tasks or ladder.shape[2] != 2:
        raise InputError(f"bank section LADR: shape {ladder.shape}, expected ({tasks}, L, 2); {_REMEDY}")
    rows = ladder[:, :, 0].astype(np.int64)
    if rows.min() < 1 or (np.diff(rows, axis=1) > 0).any():
        raise InputError(f"bank section LADR: rows must be at least 1 and never rise; {_REMEDY}")


def join_tasks(scorers: Sequence[Scorer], images: Sequence[int], prototypes: np.ndarray) -> dict[str, np.ndarray]:
    """Bank sections of T tasks, in file order: the opposite of ``split_tasks``.

    Args:
        scorers: one a task, of one kind, that share all but what is learnt.
        images: seen by each task. prototypes: (T, C) int32.

    Raises:
        InputError: the scorers differ in what they must share.
    """
    kind, parts = scorers[0].kind, [scorer.sections() for scorer in scorers]
    counts = [len(part[LEARNT[kind][0]]) if LEARNT[kind] else 1 for part in parts]
    joined: dict[str, np.ndarray] = {}
    for tag, first in parts[0].items():
        arrays = [part[tag] for part in parts]
        if tag in LEARNT[kind]:
            if len({array.shape[1:] for array in arrays}) > 1:
                raise InputError(f"tasks of one bank differ in the shape of section {tag}; learn them with one build")
            joined[tag] = np.concatenate(arrays)
            continue
        if tag == "CFG " and kind in MEMORY_BANKS:
            arrays = [np.array([sum(counts), *array[1:]], array.dtype) for array in arrays]
        if not all(np.array_equal(array, arrays[0]) for array in arrays):
            raise InputError(f"tasks of one bank differ in section {tag}; learn them with one build")
        joined[tag] = arrays[0] if tag == "CFG " else first
    firsts = np.cumsum([0, *counts[:-1]])
    table = [[first, count, seen, 0] for first, count, seen in zip(firsts, counts, images, strict=True)]
    return {**joined, "TASK": np.array(table, np.int32), "PROT": np.asarray(prototypes, np.int32)}
