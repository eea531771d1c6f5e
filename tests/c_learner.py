"""The learning half of the C runtime through ctypes: two slots of flash in memory, a learner on one of them.

``Flash`` holds the rules of NOR flash (a cell is programmed once after each erase, in whole units, the header last) and can
lose its power: after a given number of programmed bytes nothing changes any more, and what was under way is torn.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from c_runtime import Guarded, library
from c_scorer import SOURCES, STATUS
from c_structs import CBank

LEARNING = ("tvad_learn", "tvad_next", "tvad_write", "tvad_slots")
NEW_TASK = 0xFFFFFFFF
UNIT, HEADER = 32, 64
RECENT, MARKS = 64, 31

ERASE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32)
PROGRAM = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32
)


class CStore(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.c_void_p * 2), ("slot_bytes", ctypes.c_uint32), ("erase", ERASE), ("program", PROGRAM),
        ("user", ctypes.c_void_p),
    )  # fmt: skip


class CLearner(ctypes.Structure):
    _fields_ = (
        ("bank", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in (
            "task", "tasks", "images", "skipped", "novelty", "radius", "spread", "last_added", "old_rows", "added",
            "most_rows", "share", "capacity", "per_image", "tau2", "slot_bytes", "gate")),
        *((name, ctypes.c_void_p) for name in ("old", "distance", "total", "scratch", "rows")),
        ("marked", ctypes.c_uint32), ("marks", ctypes.c_uint32 * MARKS), ("recent", ctypes.c_uint32 * RECENT),
    )  # fmt: skip


@functools.lru_cache
def learning_library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    lib = library((*SOURCES, *LEARNING), flags)
    lib.tvad_learn_bytes.restype = ctypes.c_size_t
    lib.tvad_learn_bytes.argtypes = (ctypes.POINTER(CBank), ctypes.c_uint32)
    lib.tvad_open_newest.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(CBank), ctypes.POINTER(ctypes.c_uint32)
    )  # fmt: skip
    lib.tvad_learn_begin.argtypes = (
        ctypes.POINTER(CLearner), ctypes.POINTER(CBank), ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t
    )  # fmt: skip
    lib.tvad_learn_parts.argtypes = (ctypes.POINTER(CLearner), ctypes.c_void_p)
    lib.tvad_learn_commit.argtypes = (ctypes.POINTER(CLearner), ctypes.POINTER(CStore))
    return lib


class Flash:
    """Two slots; ``power`` bytes may still be programmed, None: no end."""

    def __init__(self, slot_bytes: int, align: int = 4096) -> None:
        self.slot_bytes = slot_bytes
        stride = -(-slot_bytes // align) * align
        self.block = np.full(2 * stride + align, 0xFF, np.uint8)
        start = -self.block.ctypes.data % align
        self.slots = [self.block[start + i * stride : start + i * stride + slot_bytes] for i in (0, 1)]
        self.blank = [np.ones(slot_bytes, bool) for _ in (0, 1)]
        self.power: int | None = None
        self.torn_erase: np.ndarray | None = None  # mask of the bytes that the last erase reaches
        self.calls: list[tuple[str, int, int]] = []
        self.wrong: list[str] = []
        self.fails = ""  # 'erase' or 'program': reports an error
        self.store = CStore(
            (ctypes.c_void_p * 2)(*(slot.ctypes.data for slot in self.slots)), slot_bytes, ERASE(self.erase),
            PROGRAM(self.program), None,
        )  # fmt: skip

    def put(self, slot: int, data: bytes) -> None:
        self.slots[slot][:] = 0xFF
        self.slots[slot][: len(data)] = np.frombuffer(data, np.uint8)
        self.blank[slot][:] = False

    def erase(self, user: int | None, slot: int) -> int:
        self.calls.append(("erase", slot, 0))
        if self.power == 0:
            return 0
        if self.torn_erase is not None:
            self.slots[slot][self.torn_erase] = 0xFF
            self.power = 0
            return 0
        self.slots[slot][:] = 0xFF
        self.blank[slot][:] = True
        return int(self.fails == "erase")

    def program(self, user: int | None, slot: int, offset: int, data: int, nbytes: int) -> int:
        before = [at for what, _, at in self.calls if what == "program"]
        fits = nbytes == UNIT and offset % UNIT == 0 and offset + nbytes <= self.slot_bytes
        if not fits or (before and offset <= before[-1] and not (offset == 0 and min(before) == HEADER)):
            self.wrong.append(f"{nbytes} bytes at {offset} after {before[-1:]}")  # ctypes swallows exceptions
            return 1
        self.calls.append(("program", slot, offset))
        count = nbytes if self.power is None else min(nbytes, self.power)
        if self.power is not None:
            self.power -= count
        if count:
            if not self.blank[slot][offset : offset + nbytes].all():
                self.wrong.append(f"programmed twice at {offset}")
            self.blank[slot][offset : offset + nbytes] = False
            self.slots[slot][offset : offset + count] = np.frombuffer(ctypes.string_at(data, count), np.uint8)
        return int(self.fails == "program" and offset > 500)

    def content(self, slot: int) -> bytes:
        """The file in a slot, as a PC would read it out: as long as its header says, else all of the slot."""
        data = self.slots[slot].tobytes()
        size = int.from_bytes(data[12:16], "little")
        return data[:size] if size <= len(data) else data

    def newest(self, lib: ctypes.CDLL) -> tuple[str, CBank, int]:
        bank, which = CBank(), ctypes.c_uint32(9)
        code = lib.tvad_open_newest(
            self.slots[0].ctypes.data, self.slots[1].ctypes.data, self.slot_bytes, bank, ctypes.byref(which)
        )
        return STATUS[code], bank, which.value


class Learner:
    """A session on the newest bank of a ``Flash`` with room for ``rows`` new rows; ``status`` is begin's."""

    def __init__(
        self, flash: Flash, task: int | None = None, gate: int = 0, rows: int = 100, flags: tuple[str, ...] = (),
        spare: int = 0,
    ) -> None:  # fmt: skip
        """spare: bytes more (or less) than are needed for that many rows."""
        self.lib, self.flash = learning_library(flags), flash
        opened, self.bank, self.which = flash.newest(self.lib)
        assert opened == "OK"
        self.work = Guarded(max(0, self.lib.tvad_learn_bytes(self.bank, rows) + spare), fill=0x5A)
        self.struct = CLearner()
        code = self.lib.tvad_learn_begin(
            self.struct, self.bank, NEW_TASK if task is None else task, gate, self.work.address, self.work.nbytes
        )
        self.status = STATUS[code]

    def learn(self, embedding: np.ndarray, channels: tuple[int, ...]) -> str:
        """(H, W, D) int8, split into the parts of the taps, each in a buffer of its own at an odd address."""
        ends = np.cumsum(channels)
        buffers = []
        for end, width in zip(ends, channels, strict=True):
            part = np.ascontiguousarray(embedding[..., end - width : end])
            block = np.zeros(part.size + 1, np.int8)
            block[1:] = part.ravel()
            buffers.append(block)
        pointers = (ctypes.c_void_p * len(buffers))(*(block.ctypes.data + 1 for block in buffers))
        status = STATUS[self.lib.tvad_learn_parts(self.struct, pointers)]
        self.work.check()
        assert not self.flash.wrong
        return status

    def commit(self) -> str:
        self.flash.calls = []
        status = STATUS[self.lib.tvad_learn_commit(self.struct, ctypes.byref(self.flash.store))]
        self.work.check()
        assert not self.flash.wrong
        return status
