"""Charts as SVG text: scores in, one ``<svg>`` element out; the elements that ``svg_memory`` draws with, too.

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

from tinyvad.report.text import count, escape, number

BINS = 44
MANY = 400  # no rug of single scores above this
LOG_RATIO = 40  # scores that spread by more than this factor get a logarithmic axis
LANE, BARS, TOP = 116, 58, 24  # pixels: a series, its bars, the room for the threshold's label


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
    bottom = TOP + len(lanes) * LANE
    if threshold is not None and has_threshold:
        place = percentage(x(along(start)))
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
        base = TOP + i * LANE + 40 + BARS
        counts = Counter(math.floor((along(score) - along(start)) / step) for score in scores)
        parts.append(f'<line class="base" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
        parts += _bars(lane, counts, along(start), step, x, base, logarithmic)
        if len(scores) <= MANY:
            parts += [
                f'<line class="rug {lane.css}" x1="{percentage(x(along(s)))}" x2="{percentage(x(along(s)))}" '
                f'y1="{base + 3}" y2="{base + 10}"/>'
                for s in sorted(scores)
            ]
    for i, (lane, scores) in enumerate(lanes):
        parts.append(_lane_label(lane, scores, threshold if has_threshold else None, TOP + i * LANE + 16))
    for tick in _log_ticks(low, high) if logarithmic else ticks(left, right, 6):
        parts.append(x_tick(x(along(tick)), bottom, f"{tick:.4g}"))
    title = "pred_score, logarithmic" if logarithmic else "pred_score, higher is more anomalous"
    parts.append(f'<text class="muted" x="50%" y="{bottom + 36}" text-anchor="middle">{title}</text>')
    summary = "; ".join(
        f"{lane.name}: {len(scores)} from {number(min(scores))} to {number(max(scores))}" for lane, scores in lanes
    )
    return element("chart", bottom + 42, f"Scores. {summary}. Threshold: {number(threshold)}.", parts)


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
            f'<rect class="bar {lane.css}{" wrong" if wrong else ""}" x="{percentage(place)}" y="{base - height:.1f}" '
            f'width="{percentage(width)}" height="{height:.1f}"><title>{images} from {number(first)} to {number(last)}'
            "</title></rect>"
        )
        if index == top_bin:
            parts.append(
                f'<text class="muted halo" x="{percentage(place + width / 2)}" y="{base - height - 4:.1f}" '
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


def colour_bar(colours: Sequence[str], limit: float, threshold: float | None) -> str:
    """The heat maps' scale: ``colours`` as hex from 0 to ``limit``, with a tick at the threshold."""
    stops = "".join(
        f'<stop offset="{percentage(100 * i / (len(colours) - 1))}" stop-color="#{value}"/>'
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
            f'<line class="limit" x1="{percentage(place)}" x2="{percentage(place)}" y1="15" y2="36"/>'
            f'<text class="strong" x="{percentage(place)}" y="10" text-anchor="{anchor}">'
            f"threshold {escape(number(threshold))}</text>"
        )
    return element("scale", 50, f"Colours from 0 to {number(limit)}, threshold {number(threshold)}.", parts)


def element(css: str, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{css}" width="100%" height="{height:.0f}" role="img" '
        f'aria-label="{escape(label)}">' + "\n".join(parts) + "</svg>"
    )


def percentage(value: float) -> str:
    return f"{value:.3f}%"


def x_tick(place: float, y: float, label: str) -> str:
    return (
        f'<line class="base" x1="{percentage(place)}" x2="{percentage(place)}" y1="{y}" y2="{y + 5}"/>'
        f'<text class="muted" x="{percentage(place)}" y="{y + 18}" text-anchor="middle">{escape(label)}</text>'
    )


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
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
