"""Banks opened and scored on emulated Cortex-M cores: the instruction sets themselves, not their emulation in C.

M0+ code runs on an M3 whose unaligned accesses are made to fault, as on an M0+.
"""

from __future__ import annotations

import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from c_runtime import RUNTIME, WARNINGS
from c_scorer import SOURCES
from small_banks import Small, bank_of, every_kind, every_kind_of_tasks, memory, quantised, small_embedding, triangular
from test_runtime_score import fitted, scene

TESTS = Path(__file__).resolve().parent
BOARDS = {  # core: (QEMU's board, instructions a tick of SysTick under -icount shift=0)
    "cortex-m0plus": ("mps2-an385", 40.0), "cortex-m3": ("mps2-an385", 40.0), "cortex-m4": ("mps2-an386", 40.0),
    "cortex-m7": ("mps2-an500", 40.0), "cortex-m55": ("mps3-an547", 31.25),
}  # fmt: skip
LINK = """\
MEMORY
{
    CODE (rx) : ORIGIN = 0x00000000, LENGTH = 512K
    RAM (rw) : ORIGIN = 0x20000000, LENGTH = 512K
}
ENTRY(Reset_Handler)
SECTIONS
{
    .text : { KEEP(*(.vectors)) *(.text .text.*) *(.rodata .rodata.*) } > CODE
    .data : { *(.data .data.*) } > CODE
    .bss : { bss_start = .; *(.bss .bss.* COMMON) . = ALIGN(4); bss_end = .; } > RAM
    stack_top = ORIGIN(RAM) + LENGTH(RAM);
}
"""
# Instructions of tvad_score on a Cortex-M7, at most: a fifth above what was counted when this was written (GCC 12, -O2)
FITTED = {
    "padim-lite": 1_310_000, "padim, 40 channels": 1_830_000, "padim-compact": 2_170_000, "patchcore": 2_260_000,
    "patchcore-lite 8 bits": 17_200_000, "patchcore-lite 4 bits": 5_030_000,
    "cfa": 2_660_000, "simplenet": 820_000,
}  # fmt: skip


def cases(rng: np.random.Generator) -> list[tuple[Small, list[np.ndarray]]]:
    """Fitted banks on an image that they don't know, then small ones of every kind and of awkward sizes."""
    small = [*every_kind(rng, (3, 4)).values(), *every_kind(rng, (5, 2)).values()]
    several = every_kind_of_tasks(rng, 3, (4, 3))  # as many as the flash holds
    small += [several[name] for name in ("padim-lite", "padim-compact", "patchcore", "patchcore-lite 4 bits")]
    for depth, d, bits in ((37, 9, 8), (23, 8, 4), (40, 33, 4), (31, 17, 8)):
        e = small_embedding(rng, (2, 3), (depth - 20, 17, 3))
        small += [bank_of(rng, e, triangular(rng, (2, 3), depth, d, bits, mode)) for mode in (1, 2)]
    for width, subspaces, bits in ((1, 7, 8), (2, 9, 8), (2, 9, 4), (3, 5, 4), (5, 3, 8), (13, 2, 8)):
        e = small_embedding(rng, (2, 3), (width * subspaces - 4, 3, 1))
        small.append(bank_of(rng, e, quantised(rng, 40, width * subspaces, subspaces, bits)))
        small.append(bank_of(rng, e, memory(rng, 30, width * subspaces)))
    image = scene()[1][55]
    known = [(fitted(method), image) for method in FITTED]
    return known + [(s, s.maps(rng, extreme=i % 3 == 0)) for i, s in enumerate(small)]


def write_cases(chosen: list[tuple[Small, list[np.ndarray]]], path: Path) -> None:
    records, blob = [], b""
    known: dict[bytes, int] = {}  # maps of several cases are there once: the flash is small
    first = -(-32 * (len(chosen) + 1) // 4096) * 4096
    for i, (small, maps) in enumerate(chosen):
        blob += bytes(-len(blob) % 16)
        at, values = first + len(blob), b"".join(q.tobytes() for q in maps)
        blob += small.data
        if values not in known:
            known[values] = first + len(blob)
            blob += values
        records.append([i, at, len(small.data), known[values], 0, 0, 0, 0])
    table = np.array([*records, [2**32 - 1] + [0] * 7], np.uint32).tobytes()
    path.write_bytes(table + bytes(first - len(table)) + blob)


@pytest.mark.parametrize("core", BOARDS)
def test_scores_on_the_core_are_pythons(core: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    missing = [tool for tool in ("arm-none-eabi-gcc", "qemu-system-arm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on this machine (Debian: gcc-arm-none-eabi, qemu-system-arm)")
    board, per_tick = BOARDS[core]
    chosen = cases(np.random.default_rng(4))
    write_cases(chosen, tmp_path / "cases.bin")
    (tmp_path / "board.ld").write_text(LINK)
    (tmp_path / "cases.S").write_text(
        '.section .rodata\n.balign 4096\n.global cases\ncases: .incbin "cases.bin"\n.balign 4\n'
    )
    flags = [f"-mcpu={core}", "-mthumb", f"-mfloat-abi={'hard' if core == 'cortex-m55' else 'soft'}", "-O2"]
    flags += [*WARNINGS, *(["-DNO_UNALIGNED"] if core == "cortex-m0plus" else []), "-I", str(RUNTIME)]
    link = ["-nostartfiles", "--specs=nano.specs", "--specs=nosys.specs", "-Wl,--no-warn-rwx-segments", "-T", "board.ld"]
    sources = [str(TESTS / "scorer_board.c"), *(str(RUNTIME / f"{name}.c") for name in SOURCES), "cases.S"]
    command = ["arm-none-eabi-gcc", *flags, *link, *sources, "-o", "board.elf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = ["qemu-system-arm", "-M", board, "-nographic", "-icount", "shift=0", "-semihosting-config",
             "enable=on,target=native", "-kernel", "board.elf"]  # fmt: skip
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    lines = (ran.stdout + ran.stderr).split("\n")
    found = [[int(word) for word in line.split()] for line in lines if line[:1].isdigit()]
    assert "end" in lines and len(found) == len(chosen), ran.stdout[-300:] + ran.stderr[-300:]
    for i, ((small, maps), line) in enumerate(zip(chosen, found, strict=True)):
        scores = small.expected(maps)
        crc = zlib.crc32(scores.astype("<u4").tobytes())
        assert line[:5] == [i, 0, 0, int(scores.max()), crc], f"case {i}, {small.header.kind}"
        assert line[6] == small.task(maps)
    for method, line in zip(FITTED, found):
        record_property(method, line[5] * per_tick)
        if core == "cortex-m7":
            assert line[5] * per_tick <= FITTED[method], method
