"""Does a build fit its target? Every byte of RAM and flash by owner, placed in regions, against the limits.

Flows in: the planned arena, the scorer's needs, file sizes and a target. Flows out: a ``Budget``: items with the kind of
each figure (exact, modelled, estimated), where each lies, and one line for every limit that is broken.

RAM items are placed whole: an arena must lie in one span of neighbouring regions. The largest goes first, into the
fullest span that still holds it, so that large spans stay free for large items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tinyvad.errors import CheckFailed
from tinyvad.firmware_sim.memory import Arena, align
from tinyvad.firmware_sim.targets import FLASH_KINDS, RAM_KINDS, Span, Target, spans

CODE_BYTES = 64 * 1024  # flash of interpreter, kernels and scorer: an estimate, from vendors' published sizes
FRAME_FORMATS = {"rgb888": 3, "rgb565": 2, "grey": 1}  # bytes a pixel


@dataclass(frozen=True)
class Item:
    """Some bytes and who needs them; ``kind`` is 'exact', 'modelled' or 'estimated'."""

    owner: str
    nbytes: int
    kind: str
    note: str = ""
    region: str = ""
    address: int | None = None


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
            "ram": [vars(item) for item in self.ram],
            "flash": [vars(item) for item in self.flash],
            "regions": [
                {"name": span.name, "base": span.base, "bytes": span.size,
                 "used": sum(item.nbytes for item in self.ram if item.region == span.name)}
                for span in self.spans
            ],
        }  # fmt: skip


def frame_bytes(frame: str | None) -> int:
    """Bytes of a camera frame 'WIDTHxHEIGHT-FORMAT'; None: the camera writes the network's input tensor itself."""
    from tinyvad.errors import InputError

    if frame is None:
        return 0
    try:
        size, form = frame.lower().split("-")
        width, height = (int(part) for part in size.split("x"))
        if width < 1 or height < 1:
            raise ValueError
        return width * height * FRAME_FORMATS[form]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"frame {frame!r}: write WIDTHxHEIGHT-FORMAT with one of {', '.join(FRAME_FORMATS)}, e.g. 320x240-rgb565"
        ) from error


def ram_items(arena: Arena, scorer_bytes: int, target: Target, frame: str | None = None) -> list[Item]:
    """What a build keeps in RAM on a target."""
    head = Item("activations (arena head)", arena.head_bytes, arena.head_kind, "TFLM's greedy plan, taps as outputs")
    tail_bytes = arena.tail_bytes(target.pointer_bytes)
    items = [
        Item("arena", align(head.nbytes) + tail_bytes, "modelled",
             f"head {arena.head_bytes:,} B {arena.head_kind} + TFLM's persistent tail {tail_bytes:,} B modelled"),
        Item("scorer", scorer_bytes, "modelled", "one cell's vectors, tables and the score map"),
        Item("stack", target.reserve.stack, "estimated", "reserve of the target preset"),
    ]  # fmt: skip
    if target.reserve.ram:
        items.append(Item("application", target.reserve.ram, "estimated", "reserve of the target preset"))
    if frame is not None:
        items.append(Item("camera frame", frame_bytes(frame), "exact", frame))
    return items


def flash_items(model_bytes: int, bank_bytes: int, target: Target) -> list[Item]:
    """What a build keeps in flash on a target."""
    return [
        Item("backbone.tflite", model_bytes, "exact", "weights, biases and the graph, read in place"),
        Item("bank.tvb", bank_bytes, "exact", "memory bank, read in place"),
        Item("code", CODE_BYTES, "estimated", "TFLM interpreter, its kernels and the scorer"),
        Item("start-up and application", target.reserve.flash, "estimated", "reserve of the target preset"),
    ]


def make_budget(target: Target, ram: list[Item], flash: list[Item]) -> Budget:
    """Place RAM items in spans, add up flash, and say what does not fit."""
    blocks = spans(target, RAM_KINDS)
    used = dict.fromkeys(range(len(blocks)), 0)
    placed, problems = [], []
    for item in sorted(ram, key=lambda item: -item.nbytes):
        free = {i: block.size - used[i] for i, block in enumerate(blocks)}
        fitting = [i for i in free if free[i] >= align(item.nbytes)]
        if not fitting:
            largest = max(free, key=lambda i: free[i])
            problems.append(
                f"{item.owner} {kib(item.nbytes)} > {kib(free[largest])} of RAM left in {blocks[largest].name} on "
                f"{target.label}"
            )
            placed.append(item)
            continue
        best = min(fitting, key=lambda i: free[i])
        address = blocks[best].base + used[best]
        used[best] += align(item.nbytes)
        placed.append(_placed(item, blocks[best].name, address))
    total, available = sum(item.nbytes for item in flash), target.flash_bytes
    if available is not None and total > available:
        rest = sum(item.nbytes for item in flash if item.owner != "bank.tvb")
        names = "+".join(region.name for region in target.regions if region.kind in FLASH_KINDS)
        bank = total - rest
        if available >= rest:
            problems.append(f"bank {kib(bank)} > {kib(available - rest)} of flash left in {names} on {target.label}")
        else:
            problems.append(f"flash {kib(rest)} without a bank > {kib(available)} in {names} on {target.label}")
    return Budget(target, tuple(placed), tuple(flash), tuple(problems), tuple(blocks))


def _placed(item: Item, region: str, address: int) -> Item:
    return Item(item.owner, item.nbytes, item.kind, item.note, region, address)


def kib(nbytes: int) -> str:
    """'412 KiB', with one digit below 10 KiB; rounded up, so that a limit never looks kept when it is not."""
    value = nbytes / 1024
    if value < 10:
        return f"{-(-nbytes * 10 // 1024) / 10:.1f} KiB"
    return f"{-(-nbytes // 1024)} KiB"
