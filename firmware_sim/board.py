"""A build's firmware on an emulated Cortex-M, with the target's memory fenced in: images in, scores, tensors, counts out.

The objects are those that go to the chip (``board_build``). The MPU allows the target's flash and RAM and nothing else: the
first byte behind the arena or below the stack faults, and the fault is told (``board_faults``). Instructions are ticks of
SysTick under ``-icount``, where every instruction takes a nanosecond: the same in every run, and no cycles.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyvad.errors import CheckFailed
from tinyvad.firmware_sim.board_build import EMULATED, QEMU, Board, build_board
from tinyvad.firmware_sim.board_faults import explain
from tinyvad.firmware_sim.firmware import pictures
from tinyvad.firmware_sim.harness import COUNT, FENCES, MOVE_LAYER, Fault, Run, read_result, write_request
from tinyvad.firmware_sim.targets import Target

TIMEOUT = 600.0  # seconds for one run under QEMU


@dataclass(frozen=True)
class LayerCount:
    """Instructions of one layer of the first picture, all its steps together; ``op`` 'MOVE' is the plan's own copying."""

    name: str
    op: str
    macs: int
    instructions: int


@dataclass(frozen=True, eq=False)
class BoardResult:
    """What the emulated board did.

    Attributes:
        run: results and traced tensors of every picture.
        machine: QEMU's name of the board.
        layers: in the order of model.c; empty if not counted.
        stack_bytes: the deepest that open, self-test and run went below their caller.
        sections: bytes of the chip's firmware.elf by section.
    """

    run: Run
    machine: str
    layers: list[LayerCount]
    stack_bytes: int
    sections: dict[str, int]

    @property
    def code_bytes(self) -> int:
        """Flash of runtime, start-up and application, without model and bank."""
        return self.sections.get(".text", 0) + self.sections.get(".vectors", 0)

    @property
    def instructions(self) -> int:
        """Of one picture, from frame to label."""
        return sum(layer.instructions for layer in self.layers)


def run(
    build: Path, target: Target, images: np.ndarray, trace: set[str] | None = None, count: bool = True
) -> BoardResult:
    """Score (n, S, S, 3) uint8 images on the emulated board.

    Args:
        build: a build with firmware/.
        target: whose memory is enforced; usually the build's own.
        trace: names of tensors to bring back whole; None: the tapped ones.
        count: also count instructions, on the first image.

    Raises:
        InputError: no firmware, no tools, or a core that is not emulated.
        CheckFailed: it does not link within the target's memory, touches what it must not, or does not end.
    """
    with build_board(build, target) as board:
        return execute(board, images, trace, count)


def execute(
    board: Board, images: np.ndarray, trace: set[str] | None = None, count: bool = True, fence: str | None = None
) -> BoardResult:
    """Run a linked board (see ``run``); ``fence`` names one of ``harness.FENCES`` to break on purpose."""
    slots = board.firmware.slots
    if trace is None:
        trace = set(board.firmware.taps)
    flags = (COUNT if count else 0) | (FENCES[fence] if fence else 0)
    write_request(board.folder, pictures(board.firmware, images), slots, trace, flags)
    words = [
        QEMU, "-M", board.machine.name, "-nodefaults", "-display", "none", "-semihosting-config",
        "enable=on,target=native", *(["-icount", "shift=0,sleep=off"] if count else []), "-kernel", EMULATED,
    ]  # fmt: skip
    try:
        done = subprocess.run(words, cwd=board.folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        where = f"within {TIMEOUT:g} s on {board.machine.name}"
        raise CheckFailed(f"the firmware did not end {where}; give fewer images") from error
    try:
        result = read_result(board.folder, slots, len(images))
    except Fault as fault:
        raise CheckFailed(explain(board, fault)) from fault
    except CheckFailed as error:
        said = " ".join(done.stderr.split())[:200]
        raise CheckFailed(f"{error} ({board.machine.name}{': ' + said if said else ''})") from error
    counts = _counts(board, result) if count else []
    return BoardResult(result, board.machine.name, counts, result.stack_bytes, board.sections)


def _counts(board: Board, result: Run) -> list[LayerCount]:
    ticks: dict[int, int] = {}
    for layer, passed in result.ticks:
        ticks[layer] = ticks.get(layer, 0) + passed
    counts = []
    for number, passed in sorted(ticks.items()):
        instructions = round(passed * board.machine.tick)
        if number == MOVE_LAYER:
            counts.append(LayerCount("rows that are kept", "MOVE", 0, instructions))
        else:
            slot = board.firmware.slots[number]
            counts.append(LayerCount(slot.layer.name, slot.layer.op, slot.macs, instructions))
    return counts
