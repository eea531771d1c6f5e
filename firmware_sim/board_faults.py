"""A fault of the emulated firmware as one line: what it touched, where that is, and in which function.

Flows in: the core's fault registers, the ELF file's symbols. Source: Armv7-M Architecture Reference Manual, B3.2.15.
"""

from __future__ import annotations

import re

from tinyvad.firmware_sim.board_build import CROSS, EMULATED, Board, command
from tinyvad.firmware_sim.harness import Fault

# bits of CFSR
_ADDRESS_KNOWN, _STACKING = 0x80, 0x10  # memory management
_BUS_ADDRESS_KNOWN = 0x8000
_UNALIGNED = 1 << 24
_NEAR = 1 << 20  # bytes: farther off it is not called past the arena
_PAGE = 4096  # bytes below the stack that are blamed on it


def explain(board: Board, fault: Fault, elf: str = EMULATED) -> str:
    """One line for a person; ``elf``: the program that ran."""
    text = command([f"{CROSS}nm", "-n", elf], board.folder, f"cannot read {elf}")
    symbols = [(int(a, 16), kind, name) for a, kind, name in re.findall(r"^(\w+) (\w) (\S+)$", text, re.MULTILINE)]
    place = {name: address for address, _, name in symbols}
    functions = [(address, name) for address, kind, name in symbols if kind in "tTW"]
    names = [next((name for start, name in reversed(functions) if start <= at), "") for at in (fault.pc, fault.lr)]
    where = f" in {names[0]}" if names[0] else ""
    where += f", called by {names[1]}" if names[1] not in ("", names[0]) else ""
    address = fault.address
    known = bool(fault.cfsr & _ADDRESS_KNOWN)
    stack_end = place["stack_base"]
    if fault.cfsr & _STACKING or (known and stack_end - _PAGE <= address < stack_end):
        size = board.chip.stack_bytes
        return f"MPU fault: the stack of {size} bytes overflowed{where}; give the target more reserve.stack"
    if known:
        past = address - place["arena_end"] + 1
        near = f", {past} byte{'s' if past > 1 else ''} past the arena" if 0 < past < _NEAR else ""
        if 0 <= address - place["tvad_bank_bin"] < board.sections[".bank"]:
            near = ", in the bank, which is flash"
        return f"MPU fault: touched {address:#010x}{near}{where}; the firmware is wrong, please report this"
    if fault.cfsr & _UNALIGNED:
        return f"usage fault: an unaligned access{where}, which {board.chip.core} cannot do; please report this"
    if fault.cfsr & _BUS_ADDRESS_KNOWN:
        return f"bus fault: touched {address:#010x}{where}; the firmware is wrong, please report this"
    return f"fault {fault.exception}, CFSR {fault.cfsr:#010x}, HFSR {fault.hfsr:#010x}{where}; please report this"
