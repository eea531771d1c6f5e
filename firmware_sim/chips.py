"""A target and a plan's sizes in, the ``Chip`` of its linker script out: which block of RAM holds what.

The blocks are the target's spans; items are placed as ``budget.make_budget`` places them.
"""

from __future__ import annotations

from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.c_project import CORES, Chip, Memory
from tinyvad.firmware_sim.budget import Item, make_budget, slot_area
from tinyvad.firmware_sim.targets import FLASH_KINDS, Target, spans

DATA_BYTES = 1024  # .data and .bss: the bank's descriptor and the application's few variables


def chip_of(
    target: Target, arena_bytes: int, frame_bytes: int = 0, slot_bytes: int = 0, learning_bytes: int = 0
) -> Chip | None:
    """The chip with the arena, stack and camera frame placed; None for a core that gets no firmware of its own.

    Args:
        slot_bytes: of the largest bank, where the device learns; each slot is whole erase sectors. 0: no slots.
        learning_bytes: RAM that learning takes (``tinyvad.detectors.device_learning.learning_bytes``).

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
        *([Item("learning", learning_bytes, "exact")] if learning_bytes else []),
    ]
    budget = make_budget(target, items, [])
    budget.check("use a smaller --image-size, or a larger --target")
    placed = {item.owner: item.region for item in budget.ram}
    used = [span for span in budget.spans if span.name in placed.values()]
    name = {span.name: span.name.replace("+", "_") for span in (*used, *flash)}
    size, area = flash[0].size, slot_area(slot_bytes, target)
    if area:
        size = size // target.flash_erase * target.flash_erase  # the slots begin on sectors
        if size <= 2 * area:
            raise CheckFailed(f"two slots of {area} B > {size} B of flash on {target.label}: use a smaller --bank-bytes")
    return Chip(
        target.name,
        target.title,
        target.core,
        target.isa.fpu,
        Memory(name[flash[0].name], flash[0].base, size),
        tuple(Memory(name[span.name], span.base, span.size) for span in used),
        stack_in=name[placed["stack"]],
        arena_in=name[placed["arena"]],
        frame_in=name[placed["camera frame"]] if frame_bytes else "",
        stack_bytes=target.reserve.stack,
        slot_bytes=area,
        learning_in=name[placed["learning"]] if learning_bytes else "",
        learning_bytes=learning_bytes,
    )
