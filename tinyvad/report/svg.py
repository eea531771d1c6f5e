"""Charts as SVG text: scores and memory in, one ``<svg>`` element each out.

They are drawn for a page, not for a fixed width: places along x are percentages, along y pixels, so that text keeps
its size from a phone to paper. Colours are the classes and variables of ``report.css``, which knows light and dark;
the pattern ``#modelled`` and ``#estimated`` of ``patterns`` is laid over a colour to mark the kind of a figure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyvad.report.text import count, escape, number, size

BINS = 44
MANY = 400  # no rug of single scores above this
LOG_RATIO = 40  # scores that spread by more than this factor get a logarithmic axis
LANE, BARS, TOP = 116, 58, 24  # pixels: a series, its bars, the room for the threshold's label
MAP_HEIGHT, MAP_TOP = 320, 24


@dataclass(frozen=True)
class Series:
    """Scores of one kind of image; ``wrong`` names the side of the threshold where they should not be, if any."""

    name: str
    css: str
    scores: Sequence[float]
    wrong: str = ""  # '', 'above' or 'below'
    wrong_name: str = ""  # what one there is called, e.g. 'missed'


def patterns() -> str:
    """Hidden definitions that the charts of a page share; put it in front of them, once."""
    return (
        '<svg width="0" height="0" class="defs" aria-hidden="true"><defs>'
        '<pattern id="modelled" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="2.5" height="7" class="veil"/></pattern>'
        '<pattern id="estimated" width="6" height="6" patternUnits="userSpaceOnUse">'
        '<circle cx="3" cy="3" r="1.7" class="veil"/></pattern></defs></svg>'
    )


def histogram(series: Sequence[Series], threshold: float | None) -> str:
    """One lane of bars a series over a common axis, with the threshold across; '' if there is no finite score.

    A bin begins at the threshold, so no bar lies on both sides of it. Bars are as high as their count, each lane by
    its own highest one, but never invisible. Scores that spread widely get a logarithmic axis.
    """
    lanes = [(lane, [float(score) for score in lane.scores if math.isfinite(score)]) for lane in series]
    lanes = [(lane, scores) for lane, scores in lanes if scores]
    if not lanes:
        return ""
    has_threshold = threshold is not None and math.isfinite(threshold)
    values = [score for _, scores in lanes for score in scores]
    low, high = min(values), max(values)
    start = float(threshold) if threshold is not None and has_threshold else low
    low, high = min(low, start), max(high, start)
    logarithmic = low > 0 and high / low > LOG_RATIO

    def along(score: float) -> float:
        return math.log10(score) if logarithmic else score

    left, right = along(low), along(high)
    room = (right - left) * 0.03 or (abs(left) * 0.1 or 1.0)
    left, right = left - room, right + room
    step = (right - left) / BINS

    def x(position: float) -> float:
        return 100 * (position - left) / (right - left)

    parts: list[str] = []
    for i, (lane, scores) in enumerate(lanes):
        base = TOP + i * LANE + 40 + BARS
        counts = Counter(math.floor((along(score) - along(start)) / step) for score in scores)
        parts.append(f'<line class="base" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
        parts += _bars(lane, counts, along(start), step, x, base, logarithmic)
        if len(scores) <= MANY:
            parts += [
                f'<line class="rug {lane.css}" x1="{_pc(x(along(s)))}" x2="{_pc(x(along(s)))}" '
                f'y1="{base + 3}" y2="{base + 10}"/>'
                for s in sorted(scores)
            ]
    bottom = TOP + len(lanes) * LANE
    if threshold is not None and has_threshold:
        place = _pc(x(along(start)))
        anchor, dx = ("end", -6) if x(along(start)) > 60 else ("start", 6)
        tops = [4, *(TOP + i * LANE + 24 for i in range(len(lanes)))]  # interrupted, to leave the lanes' names free
        ends = [TOP, *(TOP + (i + 1) * LANE - 2 for i in range(len(lanes)))]
        parts += [
            f'<line class="threshold" x1="{place}" x2="{place}" y1="{y1}" y2="{y2}"/>' for y1, y2 in zip(tops, ends)
        ]
        parts.append(
            f'<text class="strong halo" x="{place}" dx="{dx}" y="14" text-anchor="{anchor}">'
            f"threshold {escape(number(threshold))}</text>"
        )
    for i, (lane, scores) in enumerate(lanes):
        parts.append(_lane_label(lane, scores, threshold if has_threshold else None, TOP + i * LANE + 16))
    for tick in _log_ticks(low, high) if logarithmic else _ticks(left, right, 6):
        parts.append(_x_tick(x(along(tick)), bottom, f"{tick:.4g}"))
    title = "pred_score, logarithmic" if logarithmic else "pred_score, higher is more anomalous"
    parts.append(f'<text class="muted" x="50%" y="{bottom + 36}" text-anchor="middle">{title}</text>')
    summary = "; ".join(
        f"{lane.name}: {len(scores)} from {number(min(scores))} to {number(max(scores))}" for lane, scores in lanes
    )
    return _svg("chart", bottom + 42, f"Scores. {summary}. Threshold: {number(threshold)}.", parts)


def _bars(
    lane: Series, counts: Counter[int], start: float, step: float, x: Any, base: float, logarithmic: bool
) -> list[str]:
    tallest = max(counts.values())
    top_bin = min(index for index, n in counts.items() if n == tallest)
    parts = []
    for index, n in sorted(counts.items()):
        edges = [start + index * step, start + (index + 1) * step]
        place, width = x(edges[0]), x(edges[1]) - x(edges[0])
        height = max(3.0, BARS * n / tallest)
        wrong = (lane.wrong == "above" and index >= 0) or (lane.wrong == "below" and index < 0)
        first, last = (10**edge if logarithmic else edge for edge in edges)
        images = "1 image" if n == 1 else f"{count(n)} images"
        parts.append(
            f'<rect class="bar {lane.css}{" wrong" if wrong else ""}" x="{_pc(place)}" y="{base - height:.1f}" '
            f'width="{_pc(width)}" height="{height:.1f}"><title>{images} from {number(first)} to {number(last)}'
            "</title></rect>"
        )
        if index == top_bin:
            parts.append(
                f'<text class="muted halo" x="{_pc(place + width / 2)}" y="{base - height - 4:.1f}" '
                f'text-anchor="middle">{count(n)}</text>'
            )
    return parts


def _lane_label(lane: Series, scores: list[float], threshold: float | None, y: float) -> str:
    detail = f"{count(len(scores))} image{'s' * (len(scores) != 1)}"
    css = "muted"
    if threshold is not None:
        above = sum(score >= threshold for score in scores)
        wrong = {"above": above, "below": len(scores) - above}.get(lane.wrong)
        if wrong is None:
            detail += f", {count(above)} above"
        else:
            detail += f", {count(wrong)} {lane.wrong_name}"
            css = "alarm" if wrong else "muted"
    return (
        f'<rect class="bar {lane.css}" x="0" y="{y - 10}" width="11" height="11"/>'
        f'<text class="strong halo" x="0" dx="18" y="{y}">{escape(lane.name)}</text>'
        f'<text class="{css} halo" x="100%" y="{y}" text-anchor="end">{escape(detail)}</text>'
    )


def stacked_bar(items: Sequence[dict[str, Any]], available: int | None, label: str) -> str:
    """Items one after another against a limit; what they are over it is crossed by the limit's line.

    Args:
        items: dicts with ``owner``, ``nbytes``, ``kind``; item i has the colour class ``c{i % 6}``.
        available: bytes there are, None without a limit.
        label: what it is, for those who hear it.
    """
    used = sum(item["nbytes"] for item in items)
    whole = max(used, available or 0, 1)
    parts = ['<rect class="track" x="0" y="0" width="100%" height="26" rx="4"/>']
    at = 0
    for i, item in enumerate(items):
        parts.append(_piece(item, i, 100 * at / whole, 100 * item["nbytes"] / whole))
        at += item["nbytes"]
    if available is not None and used > available:
        limit = 100 * available / whole
        parts.append(
            f'<rect class="over" x="{_pc(limit)}" y="1" width="{_pc(100 - limit)}" height="24"/>'
            f'<line class="limit" x1="{_pc(limit)}" x2="{_pc(limit)}" y1="-5" y2="31"/>'
            f'<text class="strong" x="{_pc(limit)}" y="44" text-anchor="{"end" if limit > 50 else "start"}">'
            f"all there is: {size(available)}</text>"
        )
    return _svg("stack", 46 if available is not None and used > available else 26, f"{label}: {size(used)} used of {size(available)}.", parts)


def region_bar(region: dict[str, Any], items: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Where items lie in a region, by address; ``items`` are (colour number, item with ``address``)."""
    whole = max(int(region.get("bytes") or 0), 1)
    base = int(region.get("base") or 0)
    parts = ['<rect class="track" x="0" y="0" width="100%" height="18" rx="3"/>']
    for i, item in items:
        offset = (item["address"] - base) if item.get("address") is not None else 0
        parts.append(_piece(item, i, 100 * offset / whole, 100 * item["nbytes"] / whole, 18))
    used = sum(item["nbytes"] for _, item in items)
    return _svg("stack", 18, f"{region.get('name')}: {size(used)} of {size(whole)} used.", parts)


def _piece(item: dict[str, Any], colour: int, place: float, width: float, height: int = 26) -> str:
    box = f'x="{_pc(place)}" y="0" width="{_pc(width)}" height="{height}"'
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
        f'<rect class="peak" x="{_pc(x(peak))}" y="{MAP_TOP}" width="{_pc(x(1))}" height="{MAP_HEIGHT}"/>'
    )
    for tick in _ticks(0, steps - 1, 8, whole=True):
        parts.append(_x_tick(x(tick + 0.5), bottom, "input" if tick == 0 else str(round(tick))))
    parts.append(f'<text class="muted" x="50%" y="{bottom + 36}" text-anchor="middle">operator, in order</text>')
    parts += _levels(head, memory.get("head_kind") or "modelled", bound, y)
    label = f"Memory over time: {len(buffers)} buffers, {steps - 1} operators, head {size(head)}. A table follows."
    return _svg("chart map", bottom + 42, label, parts)


def _levels(head: int | None, kind: str, bound: int | None, y: Any) -> list[str]:
    """The lines of head and lower bound, with their names; one name for both where they are close or equal."""
    if head is None:
        return []
    names = {head: f"head {size(head)} ({kind})"}
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


def _block(b: dict[str, Any], tapped: bool, x: Any, y: Any) -> str:
    owner = b.get("owner") or "activations"
    css = "tap" if tapped or owner == "tap" else "scratch" if owner == "scratch" else "activation"
    first, last = max(b["first_use"], 0), b["last_use"]
    place, width = x(first), x(last + 1) - x(first)
    height = max(y(b["offset"]) - y(b["offset"] + b["nbytes"]), 1.0)
    what = "tapped layer" if css == "tap" else owner
    title = (
        f"{b['name']}: {count(b['nbytes'])} B at offset {count(b['offset'])}, steps {first} to {last}, {what}"
    )
    box = f'x="{_pc(place)}" y="{y(b["offset"] + b["nbytes"]):.1f}" width="{_pc(width)}" height="{height:.1f}"'
    name = b["name"]
    # text in a nested svg, which cuts off what is too wide; 10 pixels to a percent is a page on a desk
    fits = height >= 16 and width * 10 > 7 * len(name) + 8
    text = f'<svg {box}><text class="name" x="6" y="13">{escape(name)}</text></svg>' if fits else ""
    return f'<g><title>{escape(title)}</title><rect class="block {css}" {box}/>{text}</g>'


def colour_bar(colours: Sequence[str], limit: float, threshold: float | None) -> str:
    """The heat maps' scale: ``colours`` as hex from 0 to ``limit``, with a tick at the threshold."""
    stops = "".join(
        f'<stop offset="{_pc(100 * i / (len(colours) - 1))}" stop-color="#{value}"/>'
        for i, value in enumerate(colours)
    )
    parts = [
        f'<defs><linearGradient id="heat">{stops}</linearGradient></defs>',
        '<rect x="0" y="18" width="100%" height="14" rx="3" fill="url(#heat)"/>',
        '<text class="muted" x="0" y="47">0</text>',
        f'<text class="muted" x="100%" y="47" text-anchor="end">{escape(number(limit))} and above</text>',
    ]
    if threshold is not None and 0 <= threshold <= limit:
        place = 100 * threshold / limit
        anchor = "start" if place < 30 else "end" if place > 70 else "middle"
        parts.append(
            f'<line class="limit" x1="{_pc(place)}" x2="{_pc(place)}" y1="15" y2="36"/>'
            f'<text class="strong" x="{_pc(place)}" y="10" text-anchor="{anchor}">'
            f"threshold {escape(number(threshold))}</text>"
        )
    return _svg("scale", 50, f"Colours from 0 to {number(limit)}, threshold {number(threshold)}.", parts)


def _svg(css: str, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{css}" width="100%" height="{height:.0f}" role="img" '
        f'aria-label="{escape(label)}">' + "\n".join(parts) + "</svg>"
    )


def _pc(value: float) -> str:
    return f"{value:.3f}%"


def _x_tick(place: float, y: float, label: str) -> str:
    return (
        f'<line class="base" x1="{_pc(place)}" x2="{_pc(place)}" y1="{y}" y2="{y + 5}"/>'
        f'<text class="muted" x="{_pc(place)}" y="{y + 18}" text-anchor="middle">{escape(label)}</text>'
    )


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most ``most`` + 1 round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    raw = max((high - low) / most, 1e-300)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with 2 and 5 between where there are few decades; at most about ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [factor * 10.0**k for k in decades for factor in factors if low <= factor * 10.0**k <= high]
    return ticks[:: -(-len(ticks) // 8) or 1]


def _byte_ticks(top: int) -> list[int]:
    """0 and multiples of a power of two of bytes up to ``top``, at most seven."""
    step = 1
    while top // step > 6:
        step *= 2
    return list(range(0, top + 1, step))
