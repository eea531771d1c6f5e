"""Small pieces of the page: lists of facts, marks, swatches. Plain values in, finished markup out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tinyvad.report.text import KINDS, NONE, clean, escape

KIND_MEANINGS = {
    "exact": "Computed to the byte: sizes of files and tables, and the plan of the arena, which the runtime follows.",
    "modelled": "Measured on other firmware, or a model of another runtime's structures; good to some hundred bytes.",
    "estimated": "From published figures or a reserve of the target's preset. Measure it on the device.",
}


def plain(value: Any) -> str:
    """A setting as text: lists with commas, thousands marked, yes and no, nested values as JSON."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)) and not any(isinstance(item, (dict, list, tuple)) for item in value):
        return ", ".join(plain(item) for item in value) or NONE
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else clean(value)


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A list of names and plain values; pairs with the value None are left out."""
    rows = [f"<dt>{escape(name)}</dt><dd>{escape(plain(value))}</dd>" for name, value in pairs if value is not None]
    return f'<dl class="facts">{"".join(rows)}</dl>' if rows else ""


def card(title: str, *content: str, css: str = "") -> str:
    """A box with a heading; '' if it would be empty."""
    inside = "".join(content)
    return f'<div class="card {css}"><h3>{escape(title)}</h3>{inside}</div>' if inside else ""


def section(anchor: str, title: str, intro: str, *content: str) -> str:
    """A part of the page; '' if it has no content. ``intro`` is finished markup."""
    inside = "\n".join(part for part in content if part)
    if not inside:
        return ""
    lead = f'<p class="intro">{intro}</p>' if intro else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}\n{inside}\n</section>'


def details(summary: str, content: str) -> str:
    """Content that opens on demand, and is always open on paper."""
    return f"<details><summary>{escape(summary)}</summary><div>{content}</div></details>"


def kind_mark(kind: Any) -> str:
    """The word of a kind in its frame: solid, dashed or dotted."""
    css = kind if kind in KINDS else ""
    return f'<span class="kind {css}">{escape(kind)}</span>' if kind else ""


def swatch(colour: str, kind: str = "exact", width: int = 14) -> str:
    """A small square in a colour class, with the pattern of its kind."""
    veil = f'<rect width="{width}" height="14" rx="3" fill="url(#{kind})"/>' if kind in KINDS[1:] else ""
    return (
        f'<svg class="swatch" width="{width}" height="14" aria-hidden="true">'
        f'<rect class="{colour}" width="{width}" height="14" rx="3"/>{veil}</svg>'
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(colour class, plain text) pairs in a row."""
    items = "".join(f"<li>{swatch(colour)}{escape(name)}</li>" for colour, name in entries)
    return f'<ul class="legend">{items}</ul>'


def kinds_legend() -> str:
    """What exact, modelled and estimated mean, with their patterns."""
    items = "".join(
        f"<div>{swatch('c0', kind, 34)}<div><dt>{kind}</dt><dd>{escape(meaning)}</dd></div></div>"
        for kind, meaning in KIND_MEANINGS.items()
    )
    return f'<dl class="kinds">{items}</dl>'
