"""Does a build fit its target? Every byte of RAM and flash by owner, placed in regions, against the limits.

Flows in: the planned arena, the scorer's needs, file sizes and a target. Flows out: a ``Budget``: items with the kind of
each figure (exact, modelled, estimated), where each lies, and one line for every limit that is broken.

Items are placed whole (``placement``): an arena must lie in one span of neighbouring regions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tinyvad.errors import CheckFailed, InputError
from tinyvad.firmware_sim.memory import Arena, align
from tinyvad.firmware_sim.placement import place_items
from tinyvad.firmware_sim.targets import FLASH_KINDS, RAM_KINDS, Span, Target, spans
from tinyvad.images import FRAME_FORMATS

CODE_BYTES = 64 * 1024  # flash of interpreter, kernels and scorer: an estimate, from vendors' published sizes
COLUMNS = ("Activation RAM", "Runtime RAM", "Weights Flash", "Code Flash")  # of ST's model zoo


@dataclass(frozen=True)
class Item:
    """Some bytes and who needs them.

    Attributes:
        owner: who needs them.
        nbytes: how many.
        kind: 'exact', 'modelled' or 'estimated'.
        note: one line for people.
        region, address: where the item lies; '' and None where it has no place or needs none.
        column: the vendor's column that it counts for (``COLUMNS``); '' takes that of its memory, 'Runtime RAM' or
            'Code Flash'.
        parts: what it consists of where that has more than one owner; their bytes add up to ``nbytes``. An item is placed
            whole.
    """

    owner: str
    nbytes: int
    kind: str
    note: str = ""
    region: str = ""
    address: int | None = None
    column: str = ""
    parts: tuple[Item, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "parts": [part.to_dict() for part in self.parts]}


@dataclass(frozen=True)
class Budget:
    """RAM and flash of a build on a target.

    Attributes:
        ram, flash: items; placed ones name their region (span) and address.
        ram_bytes, flash_bytes: the target's totals; flash None where a file system holds the build.
        problems: one line a broken limit, empty when everything fits.
    """

    target: Target
    ram: tuple[Item, ...]
    flash: tuple[Item, ...]
    problems: tuple[str, ...]
    spans: tuple[Span, ...] = field(default=())

    @property
    def ram_used(self) -> int:
        return sum(item.nbytes for item in self.ram)

    @property
    def flash_used(self) -> int:
        return sum(item.nbytes for item in self.flash)

    def check(self, remedy: str) -> None:
        """Raise CheckFailed with the first broken limit and the remedy."""
        if self.problems:
            raise CheckFailed(f"{self.problems[0]}: {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: totals, items, regions."""
        return {
            "target": self.target.name,
            "alias": self.target.alias,
            "fits": not self.problems,
            "problems": list(self.problems),
            "ram_used": self.ram_used,
            "ram_available": self.target.ram_bytes,
            "flash_used": self.flash_used,
            "flash_available": self.target.flash_bytes,
            "ram": [item.to_dict() for item in self.ram],
            "flash": [item.to_dict() for item in self.flash],
            "regions": [
                {"name": span.name, "base": span.base, "bytes": span.size,
                 "used": sum(item.nbytes for item in self.ram if item.region == span.name)}
                for span in self.spans
            ],
            "flash_regions": [
                {"name": span.name, "base": span.base, "bytes": span.size,
                 "used": sum(item.nbytes for item in self.flash if item.region == span.name)}
                for span in spans(self.target, FLASH_KINDS)
            ],
        }  # fmt: skip


def parse_frame(frame: str) -> tuple[int, int, str]:
    """(height, width, format) of a camera frame 'WIDTHxHEIGHT-FORMAT'.

    Raises:
        InputError: anything else.
    """
    try:
        size, form = frame.lower().split("-")
        width, height = (int(part) for part in size.split("x"))
        if width < 1 or height < 1 or form not in FRAME_FORMATS:
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"frame {frame!r}: write WIDTHxHEIGHT-FORMAT with one of {', '.join(FRAME_FORMATS)}, e.g. 320x240-rgb565"
        ) from error
    return height, width, form


def frame_bytes(frame: str | None) -> int:
    """Bytes of a camera frame 'WIDTHxHEIGHT-FORMAT'; None: the camera writes the network's input tensor itself."""
    if frame is None:
        return 0
    height, width, form = parse_frame(frame)
    return height * width * FRAME_FORMATS[form]


def ram_items(arena: Arena, scorer_bytes: int, target: Target, frame: str | None = None) -> list[Item]:
    """What TFLM with our scorer keeps in RAM on a target."""
    head_bytes, tail_bytes = align(arena.head_bytes), arena.tail_bytes(target.pointer_bytes)
    parts = (
        Item("activations", head_bytes, arena.head_kind, "head: TFLM's greedy plan, taps as outputs", column=COLUMNS[0]),
        Item("persistent tail", tail_bytes, "modelled", "TFLM's structures, two int32 an output channel"),
    )
    note = f"head {arena.head_bytes:,} B {arena.head_kind} + TFLM's persistent tail {tail_bytes:,} B modelled"
    return [
        Item("arena", head_bytes + tail_bytes, "modelled", note, parts=parts),
        Item("scorer", scorer_bytes, "modelled", "one cell's vectors, tables and the score map"),
        *reserved_ram(target, frame, "stack"),
    ]


def reserved_ram(target: Target, frame: str | None, stack: str) -> list[Item]:
    """What the target preset reserves, its stack under the name ``stack``, and the camera frame if one is kept."""
    items = [Item(stack, target.reserve.stack, "estimated", "reserve of the target preset")]
    if target.reserve.ram:
        items.append(Item("application", target.reserve.ram, "estimated", "reserve of the target preset"))
    if frame is not None:
        items.append(Item("camera frame", frame_bytes(frame), "exact", frame))
    return items


def flash_items(model_bytes: int, bank_bytes: int, target: Target) -> list[Item]:
    """What TFLM with our scorer keeps in flash on a target."""
    model = "weights, biases and the graph, read in place"
    return [
        Item("backbone.tflite", model_bytes, "exact", model, column=COLUMNS[2]),
        bank_item(bank_bytes),
        Item("code", CODE_BYTES, "estimated", "TFLM interpreter, its kernels and the scorer"),
        Item("start-up and application", target.reserve.flash, "estimated", "reserve of the target preset"),
    ]


def bank_item(nbytes: int) -> Item:
    """The memory bank in flash; two slots of it where the device may learn."""
    return Item("bank.tvb", nbytes, "exact", "memory bank, read in place", column=COLUMNS[2])


def slot_area(nbytes: int, target: Target) -> int:
    """Flash of one slot for a bank of ``nbytes``: whole sectors of the size that is erased at once."""
    return -(-nbytes // target.flash_erase) * target.flash_erase


def make_budget(target: Target, ram: list[Item], flash: list[Item]) -> Budget:
    """Place items in spans (see ``placement``), add up flash, and say what does not fit."""
    blocks = spans(target, RAM_KINDS)
    placed, problems = _placed(sorted(ram, key=lambda item: -item.nbytes), blocks), []
    for i, item in enumerate(placed):
        if not item.region:  # what larger items leave is what there is for it
            free = {block.name: block.size for block in blocks}
            for other in placed[:i]:
                if other.region:
                    free[other.region] -= align(other.nbytes)
            most = max(free, key=lambda name: free[name])
            problems.append(f"{item.owner} {kib(item.nbytes)} > {kib(free[most])} of RAM left in {most} on {target.label}")
    total, available = sum(item.nbytes for item in flash), target.flash_bytes
    if available is not None and total > available:
        rest = sum(item.nbytes for item in flash if item.owner != "bank.tvb")
        names = "+".join(region.name for region in target.regions if region.kind in FLASH_KINDS)
        bank = total - rest
        if available >= rest:
            problems.append(f"bank {kib(bank)} > {kib(available - rest)} of flash left in {names} on {target.label}")
        else:
            problems.append(f"flash {kib(rest)} without a bank > {kib(available)} in {names} on {target.label}")
    return Budget(target, tuple(placed), tuple(_placed(flash, spans(target, FLASH_KINDS))), tuple(problems), tuple(blocks))


def _placed(items: list[Item], blocks: list[Span]) -> list[Item]:
    """Items with region and address, without where no span holds one."""
    spots = place_items([(item.owner, item.nbytes) for item in items], blocks)
    return [
        item if spot.span is None else replace(item, region=blocks[spot.span].name, address=spot.address)
        for item, spot in zip(items, spots, strict=True)
    ]


def kib(nbytes: int) -> str:
    """'412 KiB', with one digit below 10 KiB; rounded up, so that a limit never looks kept when it is not."""
    value = nbytes / 1024
    if value < 10:
        return f"{-(-nbytes * 10 // 1024) / 10:.1f} KiB"
    return f"{-(-nbytes // 1024)} KiB"
