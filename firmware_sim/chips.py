"""A target and a plan's sizes in, the ``Chip`` of its linker script out: which block of RAM holds what.

The blocks are the target's spans; items are placed as ``budget.make_budget`` places them.
"""

from __future__ import annotations

from tinyvad.errors import InputError
from tinyvad.export.c_project import CORES, Chip, Memory
from tinyvad.firmware_sim.budget import Item, make_budget
from tinyvad.firmware_sim.targets import FLASH_KINDS, Target, spans

DATA_BYTES = 1024  # .data and .bss: the bank's descriptor and the application's few variables


def chip_of(target: Target, arena_bytes: int, frame_bytes: int = 0) -> Chip | None:
    """The chip with the arena, stack and camera frame placed; None for a core that gets no firmware of its own.

    Raises:
        InputError: the target has no flash. CheckFailed: an item fits no block of RAM.
    """
    if target.core not in CORES:
        return None
    flash = spans(target, FLASH_KINDS)
    if not flash:
        raise InputError(f"target {target.label} has no flash region to link firmware for; add one of kind flash or xip")
    items = [
        Item("arena", arena_bytes, "exact"),
        Item("stack", target.reserve.stack + DATA_BYTES + target.reserve.ram, "estimated"),
        *([Item("camera frame", frame_bytes, "exact")] if frame_bytes else []),
    ]
    budget = make_budget(target, items, [])
    budget.check("use a smaller --image-size, or a larger --target")
    placed = {item.owner: item.region for item in budget.ram}
    used = [span for span in budget.spans if span.name in placed.values()]
    name = {span.name: span.name.replace("+", "_") for span in (*used, *flash)}
    return Chip(
        target.name,
        target.title,
        target.core,
        target.isa.fpu,
        Memory(name[flash[0].name], flash[0].base, flash[0].size),
        tuple(Memory(name[span.name], span.base, span.size) for span in used),
        stack_in=name[placed["stack"]],
        arena_in=name[placed["arena"]],
        frame_in=name[placed["camera frame"]] if frame_bytes else "",
        stack_bytes=target.reserve.stack,
    )
