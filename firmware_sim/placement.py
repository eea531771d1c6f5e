"""Which memory each item goes to: owners and sizes in, a span of the target for each out.

Items are placed whole. Where there is a choice, a stack goes to tightly coupled memory, anything else to SRAM, and a camera
frame leaves the fast memory to the others; PSRAM and DRAM are for what has no room elsewhere. Several orders are tried, so
that a preference never costs a fit: what no order holds has no place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tinyvad.firmware_sim.memory import align
from tinyvad.firmware_sim.targets import Span

FRAME = "camera frame"
SLOW = ("psram", "dram")
_FASTEST_FIRST = ("sram", "flash", "tcm", "xip", *SLOW)
_OF_STACKS = ("tcm", "sram", *SLOW)


class Spot(NamedTuple):
    """Number of the span and address of an item; both None if it has no place."""

    span: int | None
    address: int | None


def place_items(items: Sequence[tuple[str, int]], blocks: Sequence[Span]) -> list[Spot]:
    """A spot for each (owner, bytes), in the order of the items.

    Args:
        blocks: of one use, RAM or flash.
    """
    by_size = sorted(range(len(items)), key=lambda i: -items[i][1])
    frames_last = sorted(by_size, key=lambda i: items[i][0] == FRAME)
    tried = [
        _fill(items, blocks, order, by_kind) for by_kind in (True, False) for order in (frames_last, by_size)
    ]
    best = min(tried, key=lambda spots: _badness(items, blocks, spots))
    lost = any(spot.span is None for spot in best)
    return tried[-1] if lost else best  # the largest first shows best what there is no room for


def _fill(items: Sequence[tuple[str, int]], blocks: Sequence[Span], order: list[int], by_kind: bool) -> list[Spot]:
    """One after another, each into the fullest span that holds it: of the preferred kind, or of any."""
    used = [0] * len(blocks)
    spots = [Spot(None, None)] * len(items)
    for i in order:
        owner, nbytes = items[i]
        holds = [b for b, block in enumerate(blocks) if block.size - used[b] >= align(nbytes)]
        if holds:
            b = min(holds, key=lambda b: (by_kind and _rank(owner, blocks[b]), blocks[b].size - used[b]))
            spots[i] = Spot(b, blocks[b].base + used[b])
            used[b] += align(nbytes)
    return spots


def _rank(owner: str, block: Span) -> int:
    order = _OF_STACKS if owner.endswith("stack") else _FASTEST_FIRST
    return min(order.index(kind) for kind in block.kinds)


def _badness(items: Sequence[tuple[str, int]], blocks: Sequence[Span], spots: list[Spot]) -> tuple[int, int, int]:
    """Items without a place, bytes in slow memory, bytes of frames there."""
    lost = sum(spot.span is None for spot in spots)
    slow = [
        (owner, nbytes) for (owner, nbytes), spot in zip(items, spots, strict=True)
        if spot.span is not None and set(blocks[spot.span].kinds) <= set(SLOW)
    ]  # fmt: skip
    frames = sum(nbytes for owner, nbytes in slow if owner == FRAME)
    return lost, sum(nbytes for _, nbytes in slow) - frames, frames
