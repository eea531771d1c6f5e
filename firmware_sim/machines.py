"""QEMU's boards for the cores of the targets, and the fences (MPU regions) that give a board a target's limits.

Flows in: a ``Chip``. Flows out: the board that runs its code, the chip's blocks of RAM at the board's addresses, and values
for the MPU's registers. Source: QEMU 7.2 (hw/arm/mps2.c, mps2-tz.c), Armv7-M and Armv8-M Architecture Reference Manuals.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.c_project import Chip, Memory

KIB, MIB = 1 << 10, 1 << 20
MAX_REGIONS = 8  # of every modelled MPU; one of them is the fence behind the arena


@dataclass(frozen=True)
class Machine:
    """A board of QEMU.

    Attributes:
        name: for ``-M``. core: what it models.
        tick: instructions a tick of SysTick under ``-icount shift=0``: a nanosecond each, at the board's clock.
        flash: where code and constants go. ram: blocks for the target's RAM. own: RAM of the test program.
        boot: where the core looks for its first two vectors, if that is not the flash.
        armv8: its MPU has base and limit registers.
    """

    name: str
    core: str
    tick: float
    flash: Memory
    ram: tuple[Memory, ...]
    own: Memory
    boot: Memory | None = None
    armv8: bool = False


_MPS2_RAM = Memory("RAM", 0x20000000, 4 * MIB)
_MPS2_FLASH = Memory("FLASH", 0x00000000, 4 * MIB)
_AN385 = Machine(
    "mps2-an385", "cortex-m3", 40.0, _MPS2_FLASH,
    (_MPS2_RAM, Memory("PSRAM", 0x21000000, 8 * MIB)), Memory("OWN", 0x21800000, MIB),
)  # fmt: skip
_AN500 = Machine(
    "mps2-an500", "cortex-m7", 40.0, _MPS2_FLASH,
    (_MPS2_RAM, Memory("PSRAM", 0x60000000, 8 * MIB)), Memory("OWN", 0x60800000, MIB),
)  # fmt: skip
_AN505 = Machine(
    "mps2-an505", "cortex-m33", 50.0, Memory("FLASH", 0x10000000, 4 * MIB),
    (Memory("RAM", 0x38000000, 4 * MIB),), Memory("OWN", 0x80000000, MIB), armv8=True,
)  # fmt: skip
_AN547 = Machine(
    "mps3-an547", "cortex-m55", 31.25, Memory("FLASH", 0x28000000, 8 * MIB), (Memory("RAM", 0x21000000, 4 * MIB),),
    Memory("OWN", 0x20000000, 512 * KIB), Memory("BOOT", 0x00000000, 512 * KIB), armv8=True,
)  # fmt: skip
# Code of Armv6-M runs on a Cortex-M3 unchanged; there it has an MPU, and unaligned accesses can be made to fault.
MACHINES = {
    "cortex-m0": _AN385,
    "cortex-m0plus": _AN385,
    "cortex-m3": _AN385,
    "cortex-m4": dataclasses.replace(_AN385, name="mps2-an386", core="cortex-m4"),
    "cortex-m7": _AN500,
    "cortex-m33": _AN505,
    "cortex-m55": _AN547,
}
NO_UNALIGNED = ("cortex-m0", "cortex-m0plus")


def machine_for(chip: Chip) -> Machine:
    """The board that runs the chip's code.

    Raises:
        InputError: QEMU has none.
    """
    if chip.core not in MACHINES:
        raise InputError(f"target {chip.name}: no emulated board for {chip.core}; use one of {', '.join(MACHINES)}")
    return MACHINES[chip.core]


def on_machine(chip: Chip, machine: Machine) -> Chip:
    """The same blocks of RAM, as large as on the chip, at the board's addresses.

    Raises:
        CheckFailed: the board has too little memory.
    """
    free = {block.name: block.base for block in machine.ram}
    moved = {}
    for memory in sorted(chip.ram, key=lambda memory: -memory.size):
        size = -(-memory.size // 4096) * 4096 if machine.armv8 else _power_of_two(memory.size)
        unit = 4096 if machine.armv8 else size  # Armv7-M wants a region at a multiple of its size
        for block in machine.ram:
            base = -(-free[block.name] // unit) * unit
            if base + memory.size <= block.base + block.size:
                free[block.name] = base + size
                moved[memory.name] = Memory(memory.name, base, memory.size)
                break
        else:
            raise CheckFailed(
                f"{memory.name} of {chip.name} has {memory.size // KIB} KiB, more than {machine.name} has left for it"
            )
    flash = Memory(chip.flash.name, machine.flash.base, min(machine.flash.size, 2 * _power_of_two(chip.flash.size)))
    return dataclasses.replace(chip, flash=flash, ram=tuple(moved[memory.name] for memory in chip.ram))


def mpu_values(chip: Chip, machine: Machine) -> tuple[list[tuple[int, int]], int]:
    """Values of (RBAR, RASR or RLAR) a region, and the number of the region with the arena.

    On Armv7-M a region is a power of two in size and may leave out eighths; on Armv8-M it has a limit in steps of 32 bytes.

    Raises:
        CheckFailed: the target's memory needs more regions than there are.
    """
    values: list[tuple[int, int]] = []
    arena = 0
    for memory, is_ram in [(chip.flash, False), *((memory, True) for memory in (*chip.ram, machine.own))]:
        if memory.name == chip.arena_in:
            arena = len(values)
        if machine.armv8:
            access = 0b010 | 1 if is_ram else 0b110  # read and write but never execute; read only
            values.append((memory.base | access, (memory.base + memory.size - 32) | 1))
        else:
            values += [_armv7_region(*piece, is_ram) for piece in _pieces(memory.base, memory.size)]
    if len(values) >= MAX_REGIONS:
        needs = f"{len(values) + 1} MPU regions, {machine.name} has {MAX_REGIONS}"
        raise CheckFailed(f"the memory of {chip.name} needs {needs}")
    return values, arena


def _armv7_region(base: int, log2: int, without: int, is_ram: bool) -> tuple[int, int]:
    """RBAR and RASR: normal memory, read and write but never execute (RAM), or read only (flash)."""
    access = 1 << 28 | 0b011 << 24 if is_ram else 0b110 << 24
    return base, access | 0b011 << 16 | without << 8 | (log2 - 1) << 1 | 1


def _pieces(base: int, size: int) -> list[tuple[int, int, int]]:
    """(base, log2 of the size, mask of the eighths left out) of regions that cover exactly these addresses."""
    whole = _power_of_two(size)
    if whole >= 256 and base % whole == 0 and size % (whole // 8) == 0:
        return [(base, whole.bit_length() - 1, 0xFF & ~((1 << size * 8 // whole) - 1))]
    part = min(whole // 2, base & -base if base else whole // 2)
    return [(base, part.bit_length() - 1, 0), *_pieces(base + part, size - part)]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
