"""What a microcontroller does to learn a product, in Python: a bank and images' embeddings in, the next bank's bytes out.

The integer truth of ``export/runtime/tvad_learn.c``, ``tvad_next.c`` and ``tvad_write.c``: same rows, same thresholds, the
same bytes. A device has little RAM and no JSON, so it learns more simply than a PC (``tinyvad.detectors.task_memory``):

* an image's vectors are appended at once (``tinyvad.detectors.online``) and never leave again while the task is learnt;
* c tasks in M rows have M // c each. If all rows together would pass M, every other task is cut to its first M // c rows,
  and takes its threshold from its ladder (LADR); the learnt task never grows beyond M // c;
* the new threshold comes from the scores that the images had before they were learnt. An old task's is never lowered.
  The ladder of a new task has what this rule gave when the task had 1, 2, 4, 8 ... rows;
* CFG, THRS, TASK, PROT, LADR, BANK and GOLD's scores are made anew, LUT, TAPS, STEP, SCAL, LRN, TEST and META taken over as
  they are, and any other section is left out. META, which a device cannot write, then names fewer tasks than there are.

Source: methods.md 4.5 and 4.6 as cited in ``online`` and ``task_memory``; docs/SPEC.md, "Learning on".
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tinyvad.bank import Bank, write_bank
from tinyvad.detectors import check_bank
from tinyvad.detectors.distances import nearest
from tinyvad.detectors.online import (
    NO_ROWS,
    RECENT,
    Update,
    online_update,
    prequential_threshold,
    single_image_threshold,
)
from tinyvad.detectors.task_memory import threshold_at
from tinyvad.detectors.tasks import MAX_TASKS
from tinyvad.embedding import align
from tinyvad.errors import CheckFailed, InputError

MADE_ANEW = ("CFG ", "THRS", "TASK", "PROT", "LADR", "BANK", "GOLD")
TAKEN_OVER = ("LUT ", "TAPS", "STEP", "SCAL", "LRN ", "TEST", "META")
NEEDED = ("TASK", "PROT", "LADR", "LRN ")  # of a bank that a device can learn on
HEADER_BYTES, ENTRY_BYTES, PROGRAM_UNIT = 64, 32, 32
LAST_GENERATION = 2**32 - 1
LEARNER_BYTES, STORE_BYTES = 476, 24  # sizeof(tvad_learner) and of tvad_store with 32-bit pointers; a test compiles them


class Settings(NamedTuple):
    """The numbers of section LRN: bytes of a slot, most tasks, rows of all, rows an image adds at most, squared novelty."""

    slot_bytes: int
    tasks: int
    rows: int
    per_image: int
    tau2: int


class DeviceLearner:
    """One session: some good images of one product, learnt into a CORE bank.

    Attributes:
        task: number of the task in the new bank. images: learnt. skipped: by the gate.
        added: the vectors that the task has gained, (D,) int8 each.
    """

    def __init__(self, bank: Bank, task: int | None = None, gate: int = 0, room: int | None = None) -> None:
        """Begin.

        Args:
            bank: the current one. task: number of a task that is to know more images; None: a new one.
            gate: images whose novelty is larger are not learnt, but counted; 0: all are. It waits for the first rows.
            room: rows that the device has RAM for; None: as many as the bank may take.

        Raises:
            InputError: not a bank that a device can learn on, or no such task. CheckFailed: no room for a new task.
        """
        self.bank, self.settings, self.gate = bank, settings_of(bank), gate
        table = bank.sections["TASK"].astype(np.int64)
        self.is_new = task is None
        self.task = len(table) if task is None else task
        if not 0 <= self.task < len(table) + self.is_new:
            raise InputError(f"{bank.name}: no task {task}, it has {len(table)}; give 0 to {len(table) - 1}, or a new one")
        self.tasks = len(table) + self.is_new
        most = min(self.settings.tasks, MAX_TASKS)
        self.share = self.settings.rows // self.tasks
        if self.is_new and (self.tasks > most or self.share < 1):
            limit = f"{most} tasks and {self.settings.rows} rows"
            raise CheckFailed(f"{bank.name}: no room for task {self.tasks} in {limit}; learn into a new build")
        self.rows = rows_of(bank, None if self.is_new else self.task)
        room = self.share if room is None else room
        if self.is_new and room < 1:
            raise InputError(f"workspace for {room} rows; give room for at least one")
        self.capacity = max(len(self.rows), min(self.share, len(self.rows) + room))
        self.images = self.skipped = self.radius = self.spread = 0
        self.total = np.zeros(bank.sections["PROT"].shape[1], np.int64)
        self.added: list[np.ndarray] = []
        self._novelties: list[int] = []
        self._marks: list[int] = []  # thresholds when the task had at most 1, 2, 4 ... rows; 0: not known

    def learn(self, embedding: np.ndarray) -> Update:
        """Learn one image, (H, W, D) int8; an image that the gate stops adds nothing, whatever its novelty says.

        Raises:
            InputError: another shape or dtype than the bank's.
        """
        grid, depth = tuple(self.bank.header.grid_size), self.rows.shape[1]
        if embedding.shape != (*grid, depth) or embedding.dtype != np.int8:
            found = f"{embedding.dtype}{embedding.shape}"
            raise InputError(f"embedding {found}, expected int8{(*grid, depth)}; use the build that made the bank")
        patches = embedding.reshape(-1, depth)
        rows = np.concatenate([self.rows, *(row[None] for row in self.added)])
        update = online_update(rows, patches, self.settings.per_image, self.settings.tau2, self.capacity)
        if self.gate and len(rows) and update.novelty > self.gate:
            self.skipped += 1
            return Update(update.added[:0], update.novelty, update.novelty)
        if self.is_new:
            self._mark(len(rows))
        self._novelties.append(update.novelty)
        self.images += 1
        self.total += embedding[..., -len(self.total) :].sum((0, 1), dtype=np.int64)
        self.added += [patches[j].copy() for j in update.added]
        self.radius = update.radius
        if len(rows) == 0:
            self.spread = online_update(rows, patches, 1, 0, 1).radius
        return update

    def _mark(self, rows: int) -> None:
        """The ladder's sizes below ``rows`` are passed: keep the threshold of the images so far."""
        while 1 << len(self._marks) < rows:
            known = self._novelties and NO_ROWS not in self._recent()
            self._marks.append(prequential_threshold(self._novelties) if known else 0)

    def _recent(self) -> list[int]:
        return self._novelties[-min((len(self._novelties) + 1) // 2, RECENT) :]

    def commit(self, slot_bytes: int | None = None) -> bytes:
        """The next bank.

        Args:
            slot_bytes: of the device's slot, None: LRN's; the bank may take no more than either.

        Raises:
            CheckFailed: nothing learnt, no next generation, or the bank does not fit the slot.
        """
        header, sections = self.bank.header, self.bank.sections
        if self.images == 0:
            raise CheckFailed(f"{self.bank.name}: no image was learnt; give at least one")
        if header.generation == LAST_GENERATION:
            raise CheckFailed(f"{self.bank.name}: generation {LAST_GENERATION} has no successor; learn into a new build")
        sizes, thresholds, ladder = self._sizes(), self._thresholds(), self._ladder()
        old = sections["TASK"].astype(np.int64)
        parts = [sections["BANK"][first : first + size] for (first, _, _, _), size in zip(old, sizes)]
        grown = np.concatenate([self.rows, *(row[None] for row in self.added)])
        parts[self.task :] = [grown, *parts[self.task + 1 :]]
        table = np.zeros((self.tasks, 4), np.int64)
        table[:, 1], table[:, 0] = sizes, np.cumsum(sizes) - sizes
        table[: len(old), 2] = old[:, 2]
        table[self.task, 2] += self.images
        made = {
            "CFG ": np.array([sum(sizes), *sections["CFG "][1:]], np.int32),
            "THRS": thresholds.astype(np.uint32),
            "TASK": table.astype(np.int32),
            "PROT": self._prototypes(int(table[self.task, 2])),
            "LADR": ladder.astype(np.uint32),
            "BANK": np.concatenate(parts),
        }
        if "GOLD" in sections:
            made["GOLD"] = _gold(sections["TEST"], sections["GOLD"], parts)
        kept = [entry for entry in self.bank.entries if entry.tag in (*MADE_ANEW, *TAKEN_OVER)]
        required = [entry.tag for entry in kept if entry.required]
        next_header = replace(header, generation=header.generation + 1)
        data = write_bank(next_header, {tag: made.get(tag, sections[tag]) for tag in (e.tag for e in kept)}, required)
        limit = self.settings.slot_bytes
        if slot_bytes is not None:
            limit = min(limit, slot_bytes // PROGRAM_UNIT * PROGRAM_UNIT)
        if len(data) > limit:
            raise CheckFailed(f"new bank {len(data)} B > slot {limit} B; learn fewer rows, or build with larger slots")
        return data

    def _sizes(self) -> list[int]:
        """Rows of every task in the new bank."""
        sizes = [int(rows) for rows in self.bank.sections["TASK"][:, 1]] + [0] * self.is_new
        sizes[self.task] = len(self.rows) + len(self.added)
        if sum(sizes) > self.settings.rows:
            sizes = [size if t == self.task else min(size, self.share) for t, size in enumerate(sizes)]
        return sizes

    def _own_threshold(self) -> int:
        if NO_ROWS in self._recent():  # the first image of a new task alone
            return single_image_threshold(self.spread, self.radius, self.settings.tau2)
        return prequential_threshold(self._novelties)

    def _thresholds(self) -> np.ndarray:
        """(T,) int64."""
        old = self.bank.sections["THRS"].astype(np.int64)
        thresholds = np.append(old, 0) if self.is_new else old
        for t, (before, after) in enumerate(zip(self.bank.sections["TASK"][:, 1], self._sizes())):
            if t != self.task and after < before:
                thresholds[t] = threshold_at(self.bank.sections["LADR"][t], after)
        thresholds[self.task] = max(int(thresholds[self.task]), self._own_threshold())
        return thresholds

    def _ladder(self) -> np.ndarray:
        """(T, L, 2) int64: the learnt task's is new, the others' stay."""
        old = self.bank.sections["LADR"].astype(np.int64)
        length = old.shape[1]
        rows, threshold = len(self.rows) + len(self.added), int(self._thresholds()[self.task])
        pairs = [(rows, threshold)]
        if self.is_new:
            self._mark(rows)
            for power in reversed(range(len(self._marks))):
                if self._marks[power] == 0:
                    break
                pairs.append((1 << power, max(pairs[-1][1], self._marks[power])))
            return np.concatenate([old, [(pairs + pairs[-1:] * length)[:length]]])
        own = [(int(size), max(int(limit), threshold)) for size, limit in old[self.task]]
        if own[0][0] >= rows:
            pairs = []  # it has not grown: the sizes are right as they are
        ladder = old.copy()
        ladder[self.task] = (pairs + own)[:length]
        return ladder

    def _prototypes(self, images: int) -> np.ndarray:
        """(T, C) int32; an old task's mean goes on with its old prototype for the images that it has seen."""
        old = self.bank.sections["PROT"]
        total = self.total.copy()
        if not self.is_new:
            total += old[self.task].astype(np.int64) * (images - self.images)
        mean = np.sign(total) * ((2 * np.abs(total) + images) // (2 * images))  # halves away from zero
        prototypes = np.concatenate([old, mean[None]]) if self.is_new else old.copy()
        prototypes[self.task] = mean
        return prototypes.astype(np.int32)


def settings_of(bank: Bank) -> Settings:
    """What a bank lets a device learn.

    Raises:
        InputError: not a bank that a device can learn on; says what is missing.
    """
    check_bank(bank)
    missing = [tag for tag in NEEDED if tag not in bank.sections]
    if bank.header.kind != "CORE" or not bank.header.updatable or missing:
        what = f"kind {bank.header.kind}, updatable {bank.header.updatable}, without {missing or 'nothing'}"
        raise InputError(f"{bank.name}: {what}; a device learns on updatable CORE banks with {', '.join(NEEDED)}")
    settings = Settings(*(int(number) for number in bank.sections["LRN "][:5]))
    if settings.per_image < 1 or settings.rows < 1:
        raise InputError(f"{bank.name}: LRN lets an image add {settings.per_image} of {settings.rows} rows; build again")
    return settings


def rows_of(bank: Bank, task: int | None) -> np.ndarray:
    """(K_t, D) int8 rows of a task of a CORE bank; of no task, (0, D)."""
    first, count = (0, 0) if task is None else (int(number) for number in bank.sections["TASK"][task, :2])
    return bank.sections["BANK"][first : first + count]


def learning_bytes(cells: int, depth: int, channels: int, sections: int, rows: int) -> int:
    """The workspace of the runtime's learner, exactly (``tvad_learn_bytes``).

    Args:
        cells: of the grid. depth: D. channels: of the last tapped tensor. sections: of the bank. rows: that it can add.
    """
    distances = max(4 * cells, HEADER_BYTES + ENTRY_BYTES * sections)  # later the new bank's header and table
    return align(distances) + align(8 * channels) + align(max(2 * depth, 4 * channels)) + rows * depth


def workspace_bytes(bank: Bank) -> int:
    """The workspace that a build plans for learning on the device: room for one product's share of rows; 0 without."""
    if bank.header.kind != "CORE" or "LRN " not in bank.sections:
        return 0
    taps, settings = bank.sections["TAPS"], bank.sections["LRN "].astype(int)
    cells, share = bank.header.grid_size[0] * bank.header.grid_size[1], int(settings[2]) // max(int(settings[1]), 1)
    return align(learning_bytes(cells, int(taps[:, 2].sum()), int(taps[-1, 2]), len(bank.entries), max(share, 1)))


def rows_in_workspace(bank: Bank, nbytes: int) -> int:
    """Rows that fit a workspace of ``nbytes``; below 0 if it is too small for any session."""
    taps = bank.sections["TAPS"]
    depth, cells = int(taps[:, 2].sum()), bank.header.grid_size[0] * bank.header.grid_size[1]
    return (nbytes - learning_bytes(cells, depth, int(taps[-1, 2]), len(bank.entries), 0)) // depth


def _gold(test: np.ndarray, gold: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """(n, 3) uint32: the golden vectors' scores by the tasks' new rows."""
    scores = [nearest(vector[None], parts[task])[0][0] for vector, task in zip(test, gold[:, 0])]
    return np.column_stack([gold[:, :2], np.array(scores, np.uint32)]).astype(np.uint32)
