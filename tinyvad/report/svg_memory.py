"""Charts of memory as SVG text: a budget's items or an arena's buffers in, one ``<svg>`` element each out.

Bars place items one after another or by address; the map shows addresses over time. See ``svg`` for how they fit any
width and what colours them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tinyvad.report.svg import element, percentage, ticks, x_tick
from tinyvad.report.text import count, escape, size

MAP_HEIGHT, MAP_TOP = 320, 24  # pixels: the arena's head, the room for its name above
BAR_HEIGHT, REGION_HEIGHT = 26, 18


def stacked_bar(items: Sequence[dict[str, Any]], available: int | None, label: str) -> str:
    """Items one after another; if they need more than there is, a line marks the limit.

    Args:
        items: dicts with ``owner``, ``nbytes``, ``kind``; item i has the colour class ``c{i % 6}``.
        available: bytes there are, None without a limit.
        label: what it is, for those who hear it.
    """
    used = sum(item["nbytes"] for item in items)
    whole = max(used, available or 0, 1)
    height = BAR_HEIGHT
    parts = [f'<rect class="track" x="0" y="0" width="100%" height="{height}" rx="4"/>']
    at = 0
    for i, item in enumerate(items):
        parts.append(_piece(item, i, 100 * at / whole, 100 * item["nbytes"] / whole, BAR_HEIGHT))
        at += item["nbytes"]
    if available is not None and used > available:
        limit = 100 * available / whole
        parts.append(
            f'<rect class="over" x="{percentage(limit)}" y="1" width="{percentage(100 - limit)}" '
            f'height="{BAR_HEIGHT - 2}"/><line class="limit" x1="{percentage(limit)}" x2="{percentage(limit)}" '
            f'y1="-5" y2="{BAR_HEIGHT + 5}"/><text class="strong" x="{percentage(limit)}" y="{BAR_HEIGHT + 18}" '
            f'text-anchor="{"end" if limit > 50 else "start"}">all there is: {size(available)}</text>'
        )
        height += 20
    return element("stack", height, f"{label}: {size(used)} used of {size(available)}.", parts)


def region_bar(region: dict[str, Any], items: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Where items lie in a region, by address; ``items`` are (colour number, item with ``address``)."""
    whole = max(int(region.get("bytes") or 0), 1)
    base = int(region.get("base") or 0)
    parts = ['<rect class="track" x="0" y="0" width="100%" height="18" rx="3"/>']
    for i, item in items:
        offset = (item["address"] - base) if item.get("address") is not None else 0
        parts.append(_piece(item, i, 100 * offset / whole, 100 * item["nbytes"] / whole, REGION_HEIGHT))
    used = sum(item["nbytes"] for _, item in items)
    return element("stack", REGION_HEIGHT, f"{region.get('name')}: {size(used)} of {size(whole)} used.", parts)


def _piece(item: dict[str, Any], colour: int, place: float, width: float, height: int) -> str:
    box = f'x="{percentage(place)}" y="0" width="{percentage(width)}" height="{height}"'
    title = f"{item['owner']}: {count(item['nbytes'])} B, {item.get('kind', '')}"
    if item.get("address") is not None:
        title += f", at {item['address']:#010x}"
    veil = f'<rect {box} fill="url(#{item["kind"]})"/>' if item.get("kind") in ("modelled", "estimated") else ""
    return f'<g><title>{escape(title)}</title><rect class="piece c{colour % 6}" {box}/>{veil}</g>'


def memory_map(memory: dict[str, Any], taps: Sequence[str] = ()) -> str:
    """The arena's head over time: a rectangle a buffer, operators along x, addresses up; '' without buffers.

    Args:
        memory: ``buffers`` [{name, nbytes, first_use, last_use, offset, owner}], ``n_ops``, ``head_bytes``,
            ``head_kind``, ``lower_bound_bytes``. Step 0 is when the input is written, step i + 1 runs operator i.
        taps: names of tapped tensors, highlighted, like buffers whose owner is 'tap'.
    """
    buffers = [b for b in memory.get("buffers") or [] if b.get("offset") is not None and b["last_use"] >= 0]
    if not buffers:
        return ""
    steps = max(int(memory.get("n_ops") or 0), max(b["last_use"] for b in buffers)) + 1
    head, bound = memory.get("head_bytes"), memory.get("lower_bound_bytes")
    top = max(head or 0, bound or 0, max(b["offset"] + b["nbytes"] for b in buffers), 1)
    bottom = MAP_TOP + MAP_HEIGHT

    def y(address: float) -> float:
        return bottom - MAP_HEIGHT * address / top

    def x(step: float) -> float:
        return 100 * step / steps

    parts = []
    for tick in _byte_ticks(top):
        label = "0" if tick == 0 else size(tick)
        parts.append(
            f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="muted" x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for b in buffers:
        parts.append(_block(b, b["name"] in taps, x, y))
    peak, _ = peak_step(buffers)
    parts.append(
        f'<rect class="peak" x="{percentage(x(peak))}" y="{MAP_TOP}" width="{percentage(x(1))}" height="{MAP_HEIGHT}"/>'
    )
    for step in ticks(0, steps - 1, 8, whole=True):
        parts.append(x_tick(x(step + 0.5), bottom, "input" if step == 0 else str(round(step))))
    parts.append(f'<text class="muted" x="50%" y="{bottom + 36}" text-anchor="middle">operator, in order</text>')
    parts += _levels(head, memory.get("head_kind") or "modelled", bound, y)
    label = f"Memory over time: {len(buffers)} buffers, {steps - 1} operators, head {size(head)}. A table follows."
    return element("chart map", bottom + 42, label, parts)


def _levels(head: int | None, kind: str, bound: int | None, y: Callable[[float], float]) -> list[str]:
    """The lines of head and lower bound, with their names; one name for both where they are close or equal."""
    if head is None:
        return []
    names: dict[int, str] = {head: f"head {size(head)} ({kind})"}
    if bound is not None and bound == head:
        names[head] += " = lower bound"
    elif bound is not None and y(bound) - y(head) < 20:
        names[head] += f", lower bound {size(bound)}"
        names[bound] = ""
    elif bound is not None:
        names[bound] = f"lower bound {size(bound)}"
    return [
        f'<line class="{"head" if value == head else "bound"}" x1="0" x2="100%" y1="{y(value):.1f}" '
        f'y2="{y(value):.1f}"/><text class="strong halo" x="100%" dx="-2" y="{y(value) - 5:.1f}" '
        f'text-anchor="end">{escape(text)}</text>'
        for value, text in names.items()
    ]


def peak_step(buffers: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """The first step at which most bytes are alive, and how many; (0, 0) without buffers."""
    change: Counter[int] = Counter()
    for b in buffers:
        change[b["first_use"]] += b["nbytes"]
        change[b["last_use"] + 1] -= b["nbytes"]
    live = best = where = 0
    for step in sorted(change):
        live += change[step]
        if live > best:
            best, where = live, step
    return max(where, 0), best


def _block(b: dict[str, Any], tapped: bool, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    owner = b.get("owner") or "activations"
    css = "tap" if tapped or owner == "tap" else "scratch" if owner == "scratch" else "activation"
    first, last = max(b["first_use"], 0), b["last_use"]
    place, width = x(first), x(last + 1) - x(first)
    height = max(y(b["offset"]) - y(b["offset"] + b["nbytes"]), 1.0)
    what = "tapped layer" if css == "tap" else owner
    title = f"{b['name']}: {count(b['nbytes'])} B at offset {count(b['offset'])}, steps {first} to {last}, {what}"
    upper = y(b["offset"] + b["nbytes"])
    box = f'x="{percentage(place)}" y="{upper:.1f}" width="{percentage(width)}" height="{height:.1f}"'
    name = b["name"]
    # text in a nested svg, which cuts off what is too wide; 10 pixels to a percent is a page on a desk
    fits = height >= 16 and width * 10 > 7 * len(name) + 8
    text = f'<svg {box}><text class="name" x="6" y="13">{escape(name)}</text></svg>' if fits else ""
    return f'<g><title>{escape(title)}</title><rect class="block {css}" {box}/>{text}</g>'


def _byte_ticks(top: int) -> list[int]:
    """0 and multiples of a power of two of bytes up to ``top``, at most seven."""
    step = 1
    while top // step > 6:
        step *= 2
    return list(range(0, top + 1, step))
