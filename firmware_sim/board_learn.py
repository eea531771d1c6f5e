"""A build's firmware learns a product on an emulated Cortex-M: good images in, the bank that it writes and scores out.

The objects are those that go to the chip, with board/learn.c in place of main.c; its slots are the chip's, and only the
driver in board/semihosting.c can write them (``board`` has the fences). All numbers are little-endian uint32::

    request.bin = "TVL1" learn score image_bytes task gate, the images: first those to learn, then those to score
    result.bin  = records: tag nbytes, nbytes of head, then its data
        OPEN status self_test slot generation                    before and after
        BEGN status                                              of tvad_learn_begin
        LRNT image status novelty radius added images skipped rows ticks
        COMM status ticks stack_bytes
        SLOT the whole bank in the newest slot
        DONE as in ``harness``, then END.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyvad.bank import read_bank
from tinyvad.detectors import check_bank
from tinyvad.detectors.device_learning import DeviceLearner, rows_in_workspace
from tinyvad.errors import CheckFailed, InputError
from tinyvad.firmware_sim.board import TIMEOUT
from tinyvad.firmware_sim.board_build import QEMU, Board, command
from tinyvad.firmware_sim.board_faults import explain
from tinyvad.firmware_sim.firmware import pictures, seen
from tinyvad.firmware_sim.harness import REQUEST, RESULT, SOURCES, STATUS, Fault
from tinyvad.images import apply_table
from tinyvad.model import Model

NEW_TASK = 2**32 - 1
ELF = "learning.elf"
READ_ONLY = ("mps3-an547",)  # boards whose flash QEMU has as ROM
_MAKE = f"""\
include Makefile
PARTS := $(filter-out obj/main.o,$(OBJECTS)) obj/learn.o obj/semihosting.o
{ELF}: $(PARTS) emulated.ld
\t$(CC) $(LDFLAGS:link.ld=emulated.ld) $(PARTS) -o $@
"""
# where the statuses stand in the head of a record, and what it says if one is not 0
_STATUSES = {b"OPEN": (0, 1), b"LRNT": (1,), b"DONE": (1,)}
_REFUSED = {b"OPEN": "a slot", b"LRNT": "learning a picture", b"DONE": "a picture"}


@dataclass(frozen=True, eq=False)
class LearningRun:
    """What the device made of n images to learn and m to score.

    Attributes:
        begun, committed: statuses of tvad_learn_begin and tvad_learn_commit, '' if it did not come to that.
        novelty, radius, added: (n,) int64.
        images, skipped: learnt, and left out by the gate.
        bank: the newest slot's bank afterwards. slot: its number.
        scores, labels, tasks: (m,) int64. maps: (m, H, W) uint32.
        instructions: of every tvad_learn_image (n,) int64; ``commit_instructions``: of the commit. 0 if not counted.
        stack_bytes: the deepest of both.
    """

    begun: str
    committed: str
    novelty: np.ndarray
    radius: np.ndarray
    added: np.ndarray
    images: int
    skipped: int
    bank: bytes
    slot: int
    scores: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray
    maps: np.ndarray
    instructions: np.ndarray
    commit_instructions: int
    stack_bytes: int


def learn_on_board(
    board: Board, good: np.ndarray, more: np.ndarray, task: int | None = None, gate: int = 0, count: bool = True
) -> LearningRun:
    """Learn ``good`` and then score ``more``, both (n, S, S, 3) uint8, on the emulated board.

    Args:
        board: of a build with slots (``board_build.build_board``). Every run begins with the build's own bank.
        task: number of the product, None: a new one. gate: as in ``DeviceLearner``. count: count instructions.

    Raises:
        InputError: the build has no slots, or its board's flash can't be written. CheckFailed: it does not link, faults,
            refuses a bank or a picture, or does not end.
    """
    if not board.firmware.slot_bytes or not board.firmware.learning_bytes:
        raise InputError("the firmware does not learn: build with --method patchcore, --tasks 2 or more, and --target")
    if board.machine.name in READ_ONLY:
        raise InputError(f"the flash of QEMU's {board.machine.name} can't be written: learning is not emulated on its core")
    for name in ("learn.c", "board.h", "semihosting.c"):
        shutil.copy(SOURCES / name, board.folder)
    (board.folder / "learning.mk").write_text(_MAKE)
    command(["make", "-s", "-f", "learning.mk", ELF], board.folder, f"firmware for {board.machine.name} does not link")
    both = pictures(board.firmware, np.concatenate([good, more]))
    number = NEW_TASK if task is None else task
    head = b"TVL1" + struct.pack("<5I", len(good), len(more), both.shape[1], number, gate)
    (board.folder / REQUEST).write_bytes(head + both.tobytes())
    (board.folder / RESULT).unlink(missing_ok=True)
    words = [
        QEMU, "-M", board.machine.name, "-nodefaults", "-display", "none", "-semihosting-config",
        "enable=on,target=native", *(["-icount", "shift=0,sleep=off"] if count else []), "-kernel", ELF,
    ]  # fmt: skip
    try:
        subprocess.run(words, cwd=board.folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        where = f"within {TIMEOUT:g} s on {board.machine.name}"
        raise CheckFailed(f"learning did not end {where}; give fewer images") from error
    path = board.folder / RESULT
    try:
        return _read(path.read_bytes() if path.exists() else b"", board.machine.tick if count else 0.0)
    except Fault as fault:
        raise CheckFailed(explain(board, fault, ELF)) from fault


def _records(data: bytes) -> Iterator[tuple[bytes, tuple[int, ...], bytes]]:
    """Tag, head and data of each record; the last is END. or the result is cut short."""
    at = 0
    while at + 8 <= len(data):
        tag, nbytes = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        body = data[at + 8 : at + 8 + nbytes]
        at += 8 + nbytes
        head = () if tag == b"SLOT" else struct.unpack(f"<{len(body) // 4}I", body[: len(body) // 4 * 4])
        if tag == b"DONE" and head[1] == 0:
            nbytes = 4 * head[6] * head[7]
            body = data[at : at + nbytes]
            at += nbytes
        yield tag, head, body


def _read(data: bytes, tick: float) -> LearningRun:
    heads: dict[bytes, list[tuple[int, ...]]] = {tag: [] for tag in (b"OPEN", b"BEGN", b"LRNT", b"COMM", b"DONE", b"END.")}
    bank, maps = b"", []
    for tag, head, body in _records(data):
        if tag == b"FALT":
            raise Fault(head)
        if tag == b"SLOT":
            bank = body
            continue
        for what, statuses in _STATUSES.items():
            if tag == what and any(head[at] for at in statuses):
                failed = _name(max(head[at] for at in statuses))
                raise CheckFailed(f"{_REFUSED[what]} is refused by the C runtime: error {failed}; please report this")
        heads[tag].append(head)
        if tag == b"DONE":
            maps.append(np.frombuffer(body, "<u4").reshape(head[6], head[7]))
    learnt = np.array(heads[b"LRNT"], np.int64).reshape(-1, 9)
    if not heads[b"END."] or len(heads[b"OPEN"]) != 2:
        raise CheckFailed(f"the firmware stopped after learning {len(learnt)} pictures without a word; please report this")
    done = np.array(heads[b"DONE"], np.int64).reshape(-1, 9)
    status, ticks, stack = heads[b"COMM"][0] if heads[b"COMM"] else (-1, 0, 0)
    return LearningRun(
        begun=_name(heads[b"BEGN"][0][0]), committed="" if status < 0 else _name(status),
        novelty=learnt[:, 2], radius=learnt[:, 3], added=learnt[:, 4],
        images=int(learnt[-1, 5]) if len(learnt) else 0, skipped=int(learnt[-1, 6]) if len(learnt) else 0,
        bank=bank, slot=heads[b"OPEN"][-1][2],
        scores=done[:, 2], labels=done[:, 3], tasks=done[:, 8], maps=np.array(maps),
        instructions=np.round(learnt[:, 8] * tick).astype(np.int64), commit_instructions=round(ticks * tick),
        stack_bytes=stack,
    )  # fmt: skip


def _name(status: int) -> str:
    return STATUS[status] if status < len(STATUS) else str(status)


def compare_learning(
    board: Board, model: Model, good: np.ndarray, more: np.ndarray, task: int | None = None, gate: int = 0
) -> dict[str, Any]:
    """Learn on the emulated board and in Python, and compare every number and every byte.

    Args:
        model: the build's, loaded. The others as for ``learn_on_board``.

    Returns:
        ``status`` 'equal' or 'differs', ``images``, ``rows`` (that were added), ``bank_bytes``, ``scores_compared``,
        ``instructions`` (of the dearest image), ``commit_instructions``, ``stack_bytes``; on a difference ``problem``.
    """
    run = learn_on_board(board, good, more, task, gate)
    learner = DeviceLearner(model.bank, task, gate, rows_in_workspace(model.bank, board.firmware.learning_bytes))
    embeddings = _embeddings(board, model, good)
    updates = [learner.learn(one) for one in embeddings]
    wanted = learner.commit(board.firmware.slot_bytes)
    _, scorers = check_bank(read_bank(wanted))
    scored = _embeddings(board, model, more)
    tasks = scorers.route(scored)
    maps = scorers.score(scored, tasks)
    peaks = maps.reshape(len(maps), -1).max(1).astype(np.int64)
    checks = {
        "what an image adds": np.array_equal(run.added, [len(update.added) for update in updates]),
        "the novelty of an image": np.array_equal(run.novelty, [update.novelty for update in updates]),
        "the images that are left out": (run.images, run.skipped) == (learner.images, learner.skipped),
        "the new bank": run.bank == wanted,
        "the task of a picture": np.array_equal(run.tasks, tasks),
        "a score": np.array_equal(run.maps, maps) and np.array_equal(run.scores, peaks),
        "a verdict": np.array_equal(run.labels, peaks >= scorers.thresholds[tasks]),
    }
    wrong = [what for what, equal in checks.items() if not equal]
    result: dict[str, Any] = {
        "status": "differs" if wrong else "equal",
        "images": run.images, "rows": int(run.added.sum()), "bank_bytes": len(run.bank), "scores_compared": int(maps.size),
        "instructions": int(run.instructions.max(initial=0)), "commit_instructions": run.commit_instructions,
        "stack_bytes": run.stack_bytes,
    }  # fmt: skip
    return {**result, "problem": f"learning on the device differs from Python in {wrong[0]}"} if wrong else result


def _embeddings(board: Board, model: Model, images: np.ndarray) -> np.ndarray:
    inputs = apply_table(seen(board.firmware, images), model.table)
    return model.embedding.integer(model.engine.features(inputs))
