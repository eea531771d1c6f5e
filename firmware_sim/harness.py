"""What the test program board/board.c reads and writes: pictures in, results and tensors out, as two files.

Flows in: pictures as the camera would write them. Flows out: a ``Run``. All numbers are little-endian uint32::

    request.bin = "TVR1" images image_bytes flags layers, layers bytes (1: write this layer's rows), the images
    result.bin  = records: tag nbytes, nbytes of head, then its data
        OPEN status self_test stack_bytes              of tvad_open and tvad_self_test
        STCK stack_bytes                               of them and of tvad_run
        TICK step layer ticks                          first picture, if asked for; layer 65535: a move
        ROWS image layer row rows                      then rows x out_w x out_c int8
        DONE image status score label row column h w task   then h x w uint32, if status is 0
        FALT exception CFSR HFSR address pc lr sp      the program has died
        END.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyvad.errors import CheckFailed
from tinyvad.export.c_model import Slot
from tinyvad.graph.schedule import NODE

REQUEST, RESULT = "request.bin", "result.bin"
SOURCES = Path(__file__).parent / "board"
TRACE, COUNT = 1, 2
FENCES = {"arena": 1 << 4, "stack": 2 << 4, "flash": 3 << 4, "unaligned": 4 << 4}
MOVE_LAYER = 0xFFFF
# tvad_status, docs in runtime/tvad.h
STATUS = (
    "ok", "magic", "size", "crc", "field", "section", "backbone", "arena", "frame", "alignment", "learn", "full", "store",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """What the runtime made of n pictures.

    Attributes:
        scores, labels, tasks: (n,) uint32. places: (n, 2) row and column of the highest cell. maps: (n, H, W) uint32.
        tensors: int8 (n, h, w, C) of every traced tensor by name.
        ticks: (layer, ticks) a step of the first picture.
        stack_bytes: the deepest of tvad_open, tvad_self_test and tvad_run; 0 on a PC.
    """

    scores: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray
    places: np.ndarray
    maps: np.ndarray
    tensors: dict[str, np.ndarray]
    ticks: list[tuple[int, int]]
    stack_bytes: int


@dataclass
class _Read:
    done: list[tuple[int, ...]] = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    rows: list[tuple[int, int, int, bytes]] = field(default_factory=list)  # image, layer, row, bytes
    ticks: list[tuple[int, int]] = field(default_factory=list)
    opened: tuple[int, int] = (0, 0)
    stack: int = 0
    fault: tuple[int, ...] = ()
    ended: bool = False


class Fault(Exception):
    """The program died: exception number, CFSR, HFSR, address, pc, lr, sp."""

    def __init__(self, facts: tuple[int, ...]) -> None:
        super().__init__(f"exception {facts[0]}")
        self.exception, self.cfsr, self.hfsr, self.address, self.pc, self.lr, self.sp = facts


def write_request(folder: Path, pictures: np.ndarray, slots: list[Slot], traced: set[str], flags: int = 0) -> None:
    """Write request.bin for (n, nbytes) uint8 ``pictures``; rows of the tensors in ``traced`` come back."""
    wanted = bytes(_traces(slots, i) in traced for i in range(len(slots)))
    flags |= TRACE if traced else 0
    head = b"TVR1" + struct.pack("<4I", *pictures.shape, flags, len(slots))
    (folder / REQUEST).write_bytes(head + wanted + pictures.tobytes())
    (folder / RESULT).unlink(missing_ok=True)


def _traces(slots: list[Slot], index: int) -> str:
    """The tensor that is whole once this layer is done, '' for none: a concat is with its last operand."""
    slot = slots[index]
    following = slots[index + 1] if index + 1 < len(slots) else None
    same = following is not None and (following.kind, following.index) == (slot.kind, slot.index)
    return slot.layer.name if slot.kind == NODE and not same else ""


def read_result(folder: Path, slots: list[Slot], n: int) -> Run:
    """Read result.bin of a run over ``n`` pictures.

    Raises:
        Fault: the program died on a fault. CheckFailed: the runtime refused bank or picture, or the result is cut short.
    """
    path = folder / RESULT
    read = _records(path.read_bytes() if path.exists() else b"", slots)
    if read.fault:
        raise Fault(read.fault)
    for what, status in zip(("bank.tvb", "the bank's self-test"), read.opened, strict=True):
        if status:
            raise CheckFailed(f"{what} is refused by the C runtime: error {_status(status)}; please report this")
    for image, status, *_ in read.done:
        if status:
            raise CheckFailed(f"tvad_run refuses picture {image}: error {_status(status)}; please report this")
    if not read.ended or len(read.done) != n:
        raise CheckFailed(f"the firmware stopped after {len(read.done)} of {n} pictures without a word; please report this")
    done = np.array(read.done, np.int64)  # (n, 9)
    scores, labels, tasks = done[:, [2, 3, 8]].T.astype(np.uint32)
    return Run(
        scores, labels, tasks, done[:, 4:6], np.stack(read.maps), _tensors(read.rows, slots, n), read.ticks, read.stack,
    )  # fmt: skip


def _status(number: int) -> str:
    return f"{number} ({STATUS[number]})" if number < len(STATUS) else str(number)


def _records(data: bytes, slots: list[Slot]) -> _Read:
    read, at = _Read(), 0
    while at + 8 <= len(data):
        tag, nbytes = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        head = struct.unpack_from(f"<{nbytes // 4}I", data, at + 8) if at + 8 + nbytes <= len(data) else ()
        at += 8 + nbytes
        if tag == b"OPEN":
            read.opened = head[0], head[1]
        elif tag == b"STCK":
            read.stack = head[0]
        elif tag == b"TICK":
            read.ticks.append((head[1], head[2]))
        elif tag == b"ROWS":
            image, layer, row, rows = head
            _, width, channels = slots[layer].layer.out_shape
            read.rows.append((image, layer, row, data[at : at + rows * width * channels]))
            at += rows * width * channels
        elif tag == b"DONE":
            read.done.append(head)
            if head[1] == 0:
                size = head[6] * head[7]
                read.maps.append(np.frombuffer(data[at : at + 4 * size], "<u4").reshape(head[6], head[7]))
                at += 4 * size
        elif tag == b"FALT":
            read.fault = head
        elif tag == b"END.":
            read.ended = True
    return read


def _tensors(rows: list[tuple[int, int, int, bytes]], slots: list[Slot], n: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for image, layer, row, data in rows:
        name, shape = slots[layer].layer.name, slots[layer].layer.out_shape
        tensor = tensors.setdefault(name, np.zeros((n, *shape), np.int8))
        values = np.frombuffer(data, np.int8).reshape(-1, *shape[1:])
        tensor[image, row : row + len(values)] = values
    return tensors
