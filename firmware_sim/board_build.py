"""Compile a build's firmware once and link it twice: for the chip, and for the emulated board with the test program.

Flows in: a build and a target. Flows out: a ``Board``: a temporary folder with both ELF files and what they take. Both have
the very same objects; only main.c gives way to board/board.c, which talks to us by semihosting.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.c import project_files
from tinyvad.export.c_project import Chip, link_script
from tinyvad.firmware_sim.chips import chip_of
from tinyvad.firmware_sim.firmware import Firmware, read_firmware
from tinyvad.firmware_sim.harness import SOURCES
from tinyvad.firmware_sim.machines import NO_UNALIGNED, Machine, machine_for, mpu_values, on_machine
from tinyvad.firmware_sim.targets import Target
from tinyvad.model import read_manifest

CROSS = "arm-none-eabi-"
QEMU = "qemu-system-arm"
TOOLS = (f"{CROSS}gcc", f"{CROSS}size", f"{CROSS}nm", "make", QEMU)
PACKAGES = f"gcc-arm-none-eabi, libnewlib-arm-none-eabi, make and {QEMU}"
ELF, EMULATED = "firmware.elf", "emulated.elf"

_OWN = "    .harness (NOLOAD) : { *(.harness) } > OWN"
_BOOT = "    .boot : { LONG(stack_top) LONG(Reset_Handler | 1) } > BOOT"  # bit 0: Thumb code
_MAKE = f"""\
include Makefile
PARTS := $(filter-out obj/main.o,$(OBJECTS)) obj/board.o obj/semihosting.o
{EMULATED}: $(PARTS) emulated.ld
\t$(CC) $(LDFLAGS:link.ld=emulated.ld) $(PARTS) -o $@
"""
_SECTIONS = (".vectors", ".model", ".bank", ".slot", ".text", ".stack", ".data", ".bss", ".frame", ".learning", ".arena")


@dataclass(frozen=True, eq=False)
class Board:
    """Firmware that is ready to run.

    Attributes:
        folder: temporary, with both ELF files. chip: at its own addresses. machine: what runs it.
        sections: bytes of the chip's ELF file by section.
    """

    folder: Path
    firmware: Firmware
    chip: Chip
    machine: Machine
    sections: dict[str, int]


def missing_tools() -> str:
    """One line that says what to install, '' if everything is there."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not missing:
        return ""
    return f"needs {', '.join(missing)}: run `make firmware-tools`, or install Debian's {PACKAGES}"


@contextmanager
def build_board(build: Path, target: Target) -> Iterator[Board]:
    """Compile and link; the folder vanishes with the block.

    Raises:
        InputError: no firmware, no tools, or a core that is not emulated. CheckFailed: it does not fit the target.
    """
    if line := missing_tools():
        raise InputError(f"the firmware {line}")
    firmware = read_firmware(build)
    frame_bytes = 0 if firmware.camera is None else firmware.camera.nbytes
    chip = chip_of(target, firmware.arena_bytes, frame_bytes, firmware.slot_bytes, firmware.learning_bytes)
    if chip is None:
        raise InputError(f"target {target.label}: firmware is emulated for Cortex-M only, not for {target.core}")
    machine = machine_for(chip)
    if (firmware.packed_for == "mve") != (chip.core == "cortex-m55"):
        raise InputError(f"{build}: {chip.core} reads weights in another order; build with --target {target.label}")
    with tempfile.TemporaryDirectory(prefix="tinyvad-board-") as temporary:
        folder = Path(temporary)
        shutil.copytree(firmware.folder, folder, dirs_exist_ok=True)
        if not (folder / "link.ld").is_file() or (read_manifest(build)["target"] or {}).get("name") != target.name:
            names = sorted(path.name for path in (folder / "runtime").iterdir())
            for name, data in project_files(chip, names).items():
                (folder / name).write_bytes(data)
        command(["make", "-s", "-j2", ELF], folder, f"firmware for {target.label} does not link")
        _link_emulated(folder, chip, machine)
        yield Board(folder, firmware, chip, machine, _sections(folder))


def command(words: list[str], folder: Path, what: str) -> str:
    """The output of a tool, or CheckFailed with the one line of its errors that says most."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stderr.splitlines()]
    overflow = [line for line in lines if "will not fit" in line or "overflowed" in line]
    if overflow:
        text = "; ".join(re.sub(r"^.*ld: (\S+\.elf )?", "", line) for line in overflow)
        raise CheckFailed(f"{what}: {text}; use a smaller --image-size or --bank-bytes, or a larger --target")
    raise CheckFailed(f"{what}: {first_error(lines)}")


def first_error(lines: list[str]) -> str:
    """Of a compiler's and linker's lines the one that says most."""
    told = [line for line in lines if "undefined reference" in line]
    told += [line for line in lines if "error" in line.lower() and "ld returned" not in line]
    return (told or lines or ["no message"])[0].strip()


def _link_emulated(folder: Path, chip: Chip, machine: Machine) -> None:
    moved = on_machine(chip, machine)
    values, arena = mpu_values(moved, machine)
    rows = ", ".join(f"{{ {base:#x}u, {rest:#x}u }}" for base, rest in values)
    (folder / "board_config.h").write_text(
        f"#define BOARD_MPU {{ {rows} }}\n#define BOARD_ARENA_REGION {arena}u\n"
        f"#define BOARD_TRAP_UNALIGNED {int(chip.core in NO_UNALIGNED)}\n"
    )
    boot = () if machine.boot is None else (machine.boot,)
    sections = "\n".join([_OWN, *([_BOOT] if boot else [])])
    (folder / "emulated.ld").write_text(link_script(moved, (machine.own, *boot), sections))
    for name in ("board.c", "board.h", "semihosting.c"):
        shutil.copy(SOURCES / name, folder)
    (folder / "emulated.mk").write_text(_MAKE)
    command(["make", "-s", "-f", "emulated.mk", EMULATED], folder, f"firmware for {machine.name} does not link")


def _sections(folder: Path) -> dict[str, int]:
    text = command([f"{CROSS}size", "-A", ELF], folder, f"cannot read {ELF}")
    rows = re.findall(r"^(\.\w+)\s+(\d+)\s+\d+$", text, re.MULTILINE)
    return {name: int(size) for name, size in rows if name in _SECTIONS}
