"""The page's parts on memory: budget by owner and by region, the arena over time, the table of layers.

Flows in: the report's ``budget``, ``memory`` and ``layers``. Flows out: markup, '' where there is no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinyvad.report import svg_memory
from tinyvad.report.html_parts import card, details, kind_mark, kinds_legend, legend, section, swatch
from tinyvad.report.profile import columns
from tinyvad.report.text import NONE, count, escape, millions, percent, size, table, target_label


def budget_section(report: dict[str, Any]) -> str:
    """RAM and flash by owner as bars, RAM by region and address, the columns that vendors print."""
    budget = report.get("budget") or {}
    cards = [_resource(name, budget, key) for name, key in (("RAM", "ram"), ("Flash", "flash"))]
    if not any(cards):
        return ""
    label = target_label(budget)
    return section(
        "budget",
        "RAM and flash",
        f"What this build needs{' on ' if label else ''}{escape(label)}, by owner. The pattern says how sure a figure is.",
        f'<div class="grid two">{"".join(cards)}</div>',
        _regions(budget),
        card("How sure is a figure?", kinds_legend()),
        _vendor_columns(report),
    )  # fmt: skip


def _resource(name: str, budget: dict[str, Any], key: str) -> str:
    items = budget.get(key) or []
    if not items:
        return ""
    used, available = sum(item["nbytes"] for item in items), budget.get(f"{key}_available")
    if available is None:
        total = f"{size(used)} used, no limit"
    else:
        total = f"{size(used)} of {size(available)}, {percent(used, available)}"
    over = available is not None and used > available
    rows = []
    for i, item in enumerate(items):
        note = escape(item.get("note") or "")
        rows.append(
            f"<li>{swatch(f'c{i % 6}', item['kind'])}<span>{escape(item['owner'])}{kind_mark(item['kind'])}</span>"
            f'<span class="bytes">{size(item["nbytes"])}</span>'
            + (f'<span class="note">{note}</span>' if note else "")
            + "</li>"
        )
    return (
        f'<div class="card"><div class="budget-head"><h3>{name}</h3><span{" class=over" if over else ""}>'
        f"{escape(total)}</span></div>{svg_memory.stacked_bar(items, available, name)}"
        f'<ul class="items">{"".join(rows)}</ul></div>'
    )


def _regions(budget: dict[str, Any]) -> str:
    items = list(enumerate(budget.get("ram") or []))
    rows = []
    for region in budget.get("regions") or []:
        inside = [(i, item) for i, item in items if item.get("region") == region["name"]]
        used, whole = region["used"], region["bytes"]
        rows.append(
            f'<div class="region"><div><strong>{escape(region["name"])}</strong> '
            f'<code class="muted">{region["base"]:#010x}</code><br><span class="small muted">'
            f"{size(used)} of {size(whole)}, {percent(used, whole)}</span></div>"
            f"<div>{svg_memory.region_bar(region, inside)}</div></div>"
        )
    lost = [item for _, item in items if not item.get("region")]
    if rows and lost:
        names = ", ".join(f"{item['owner']} ({size(item['nbytes'])})" for item in lost)
        rows.append(f'<ul class="problems"><li>No region has room for: {escape(names)}</li></ul>')
    if not rows:
        return ""
    intro = '<p class="small muted">Each item lies whole in one region, drawn here by address.</p>'
    return card("RAM by region", intro, *rows)


def _vendor_columns(report: dict[str, Any]) -> str:
    figures = columns(report)
    cells = [f"{figure['bytes'] / 1024:,.2f}{kind_mark(figure['kind'])}" for figure in figures.values()]
    note = (
        "<p class=\"small muted\">The columns of ST's model zoo, in KiB. Activation RAM holds the network's input and "
        "output; Runtime RAM is everything else in RAM; Code Flash is everything in flash that is not read as data.</p>"
    )
    body = table(["KiB", *figures], [["this build", *cells]], range(1, 7), caption="Memory in a vendor's columns")
    return card("To compare with a vendor's table", note, body)


def memory_section(report: dict[str, Any]) -> str:
    """The arena's head over time, its parts, and every buffer as a table."""
    memory = report.get("memory") or {}
    buffers = memory.get("buffers") or []
    taps = (report.get("backbone") or {}).get("layers") or []
    chart = svg_memory.memory_map(memory, taps)
    parts = _arena(memory)
    if chart:
        entries = [("block activation", "activation"), ("block tap", "tapped layer, kept for the detector")]
        if any(b.get("owner") == "scratch" for b in buffers):
            entries.append(("block scratch", "scratch"))
        chart = card(
            "Buffers over time",
            legend(entries),
            f'<div class="map-box">{chart}</div>',
            f'<p class="small muted">{_peak(buffers, report.get("layers") or [])}</p>',
            details(f"All {len(buffers)} buffers as a table", _buffer_table(buffers, taps)),
        )
    return section(
        "memory",
        "Memory over time",
        "The arena's head: a rectangle is a buffer, as wide as it lives and as high as it is large. Buffers that live at "
        "different times share addresses.",
        chart,
        parts,
    )


def _peak(buffers: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> str:
    step, nbytes = svg_memory.peak_step(buffers)
    made = next((layer for layer in layers if layer.get("first_use") == step), None)
    where = f"operator {step}" if step else "the input"
    name = f" ({escape(made.get('op') or NONE)} <code>{escape(made.get('name'))}</code>)" if made else ""
    return (
        f"Most is alive at {where}{name}, the shaded column: {count(nbytes)} B. This is the place to save: a smaller "
        "<code>--image-size</code>, <code>--plan patch</code>, a narrower backbone."
    )


def _arena(memory: dict[str, Any]) -> str:
    head, bound, tail = (memory.get(key) for key in ("head_bytes", "lower_bound_bytes", "tail_bytes"))
    if head is None:
        return ""
    cells = [("head", head, memory.get("head_kind") or "modelled")]
    if bound is not None:
        cells.append(("lower bound", bound, "exact"))
    if tail:
        cells.append(("tail", tail, "modelled"))
    figures = "".join(
        f"<div><dt>{name}{kind_mark(kind)}</dt><dd>{size(value)}</dd><dt>{count(value)} B</dt></div>"
        for name, value, kind in cells
    )
    buckets = [
        [escape(name.replace("_", " ")), count(nbytes)] for name, nbytes in (memory.get("tail") or {}).items()
    ]
    parts = table(["part of the tail", "bytes"], buckets, (1,), caption="The arena's tail") if buckets else ""
    return card(
        "The arena", f'<dl class="metrics">{figures}</dl>', details("The tail in parts", parts) if parts else ""
    )


def _buffer_table(buffers: Sequence[dict[str, Any]], taps: Sequence[str]) -> str:
    rows, classes = [], []
    for b in buffers:
        tapped = b["name"] in taps or b.get("owner") == "tap"
        classes.append("tap" if tapped else "")
        rows.append(
            [
                f"<code>{escape(b['name'])}</code>",
                escape("tap" if tapped else b.get("owner") or "activations"),
                count(b["nbytes"]),
                _lifetime(b),
                count(b.get("offset")),
            ]
        )
    head = ["buffer", "owner", "bytes", "lifetime", "offset"]
    return f'<div class="layers">{table(head, rows, (2, 3, 4), None, classes, "Buffers of the arena")}</div>'


def layers_section(report: dict[str, Any]) -> str:
    """Every operator: shape, multiply-accumulates, bytes, lifetime; totals below."""
    layers = report.get("layers") or []
    taps = (report.get("backbone") or {}).get("layers") or []
    most = max((layer.get("macs") or 0 for layer in layers), default=0) or 1
    rows, classes = [], []
    for layer in layers:
        tapped = layer.get("name") in taps
        classes.append("tap" if tapped else "")
        macs = layer.get("macs") or 0
        bar = f'<span class="meter" style="width:{round(44 * macs / most)}px"></span>' if macs else ""
        rows.append(
            [
                f"<code>{escape(layer.get('name'))}</code>"
                + ('<span class="tag tap">tap</span>' if tapped else ""),
                escape(layer.get("op") or NONE),
                escape("×".join(str(side) for side in (layer.get("shape") or [])[1:]) or NONE),
                bar + millions(macs),
                count(layer.get("weights_bytes")),
                count(layer.get("output_bytes")),
                _lifetime(layer),
                count(layer.get("offset")),
            ]
        )
    if not rows:
        return ""
    totals = [sum(layer.get(key) or 0 for layer in layers) for key in ("macs", "weights_bytes")]
    foot = [f"{len(layers)} operators", "", "", millions(totals[0]), count(totals[1]), "", "", ""]
    head = ["layer", "operator", "output", "MACs", "weights, B", "output, B", "lifetime", "offset"]
    body = table(head, rows, (3, 4, 5, 6, 7), foot, classes, "Operators of the backbone")
    return section(
        "layers",
        "Layers",
        "Operators in the order in which they run. MACs count padding. A lifetime is from the operator that writes the "
        "output to the last one that reads it; offsets are bytes from the arena's base.",
        f'<div class="card layers">{body}</div>',
    )


def _lifetime(row: dict[str, Any]) -> str:
    first, last = row.get("first_use"), row.get("last_use")
    return NONE if first is None or last is None or last < 0 else f"{first}–{last}"
