"""Kernels of the runtime on an emulated Cortex-M55: layers in, outputs and instruction counts out. See mve_board.c."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tinyvad.export.layers import OPS, Layer

TESTS = Path(__file__).resolve().parent
RUNTIME = TESTS.parent / "export" / "runtime"
CORE = ("-mcpu=cortex-m55", "-mthumb", "-mfloat-abi=hard")
WARNINGS = (
    "-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Wundef", "-Werror",
)  # fmt: skip
INSTRUCTIONS_PER_TICK = 31.25  # SysTick of mps3-an547 counts 32 MHz, -icount shift=0 gives every instruction 1 ns
FAULT = 0xFFFFFFFF
LINK = """\
MEMORY
{
    ITCM (rx) : ORIGIN = 0x00000000, LENGTH = 512K
    DTCM (rw) : ORIGIN = 0x20000000, LENGTH = 512K
}
ENTRY(Reset_Handler)
SECTIONS
{
    .text : { KEEP(*(.vectors)) *(.text .text.*) *(.rodata .rodata.*) } > ITCM
    .data : { *(.data .data.*) } > ITCM
    .bss : { *(.bss .bss.* COMMON) } > DTCM
    stack_top = ORIGIN(DTCM) + LENGTH(DTCM);
}
"""


@dataclass(frozen=True, eq=False)
class Case:
    """A layer and what to run it on.

    Attributes:
        inputs: (h, w, C) int8 operands, whole. row, rows: what to make; rows 0: all from ``row`` on.
        in_rows: first and past the last row of each operand that its buffer holds.
        in_place: 1 or 2: the output lies in this operand's place.
        planned: the planner's bytes of scratch.
        at_end: buffers end where their memory ends; else they begin where it begins.
    """

    layer: Layer
    inputs: list[np.ndarray]
    row: int = 0
    rows: int = 0
    in_rows: tuple[tuple[int, int], ...] = ()
    in_place: int = 0
    planned: int = 0
    at_end: bool = True
    fenced: bool = True


@dataclass(frozen=True, eq=False)
class Ran:
    """What a case gave: (rows, w, C) int8, bytes of scratch, instructions (to 31)."""

    output: np.ndarray
    scratch: int
    instructions: float


@dataclass
class Tools:
    """The compiler's sizes of .text by file; the program."""

    program: Path
    text: dict[str, int] = field(default_factory=dict)


def skip_without_tools() -> None:
    """Skip the test unless compiler and emulator are here."""
    missing = [tool for tool in ("arm-none-eabi-gcc", "qemu-system-arm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on this machine (Debian: gcc-arm-none-eabi, qemu-system-arm)")


@functools.lru_cache
def program(optimise: str = "-O3") -> Tools:
    """The program with all kernels that it runs, compiled once a process."""
    skip_without_tools()
    folder = Path(tempfile.mkdtemp(prefix="tvad-mve-"))
    (folder / "board.ld").write_text(LINK)
    objects, text = [], {}
    for source in (TESTS / "mve_board.c", RUNTIME / "tvad_clamp_outputs.c", *sorted(RUNTIME.glob("tvad_*_mve.c"))):
        objects.append(folder / f"{source.stem}.o")
        _command("arm-none-eabi-gcc", *CORE, *WARNINGS, optimise, "-ffunction-sections", "-I", RUNTIME, "-c", source,
                 "-o", objects[-1])  # fmt: skip
        text[source.stem] = int(_command("arm-none-eabi-size", objects[-1]).splitlines()[1].split()[0])
    elf = folder / "board.elf"
    _command("arm-none-eabi-gcc", *CORE, "-nostartfiles", "--specs=nano.specs", "--specs=nosys.specs", "-Wl,--gc-sections",
             "-Wl,--no-warn-rwx-segments", "-T", folder / "board.ld", *objects, "-o", elf)  # fmt: skip
    return Tools(elf, text)


def run_cases(cases: list[Case], optimise: str = "-O3", timeout: int = 120) -> list[Ran]:
    """Run all cases on the emulated board.

    Raises:
        AssertionError: a kernel touched a byte outside its buffers, or the program stopped; the case is named.
    """
    elf = program(optimise).program
    with tempfile.TemporaryDirectory(prefix="tvad-mve-") as folder:
        (Path(folder) / "cases.bin").write_bytes(struct.pack("<I", len(cases)) + b"".join(map(_packed, cases)))
        words = [
            "qemu-system-arm", "-M", "mps3-an547", "-nographic", "-icount", "shift=0",
            "-semihosting-config", "enable=on,target=native", "-kernel", str(elf),
        ]  # fmt: skip
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
        data = (Path(folder) / "outputs.bin").read_bytes()
    results, at = [], 0
    for i, case in enumerate(cases):
        assert at + 16 <= len(data), f"stopped at case {i}, exit code {done.returncode} {done.stderr}: {case.layer}"
        scratch, ticks, nbytes, pc = struct.unpack_from("<4I", data, at)
        assert scratch != FAULT, f"case {i}: fault {ticks:#x} at address {nbytes:#x}, pc {pc:#x}: {case}"
        output = np.frombuffer(data, np.int8, nbytes, at + 16).reshape(-1, *case.layer.out_shape[1:])
        results.append(Ran(output, scratch, ticks * INSTRUCTIONS_PER_TICK))
        at += 16 + nbytes
    return results


def _packed(case: Case) -> bytes:
    layer, rows = case.layer, case.rows or case.layer.out_shape[0] - case.row
    held = list(case.in_rows) + [(0, len(array)) for array in case.inputs[len(case.in_rows) :]]
    operands = [np.ascontiguousarray(a[low:high]) for a, (low, high) in zip(case.inputs, held, strict=True)]
    constants = [layer.arrays.get(name, np.zeros(0, np.int8)) for name in ("weights", "bias", "multiplier", "shift")]
    first_rows = [low for low, _ in held] + [0]
    sizes = [array.nbytes for array in (*constants, *operands)] + [0] * (2 - len(operands))
    out_bytes = rows * layer.out_shape[1] * layer.out_shape[2]
    fields = (
        OPS[layer.op], *layer.kernel, *layer.stride, *layer.pad, layer.dilation, *layer.in_shape, *layer.out_shape,
        *layer.zeros, *layer.limits, *sizes, out_bytes, case.in_place, case.row, rows, *first_rows[:2], case.row,
        case.at_end, case.fenced,
    )  # fmt: skip
    return struct.pack(f"<{len(fields)}i", *fields) + b"".join(array.tobytes() for array in (*constants, *operands))


def _command(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
