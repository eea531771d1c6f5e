"""A sweep as text and as a picture: variants with their costs in, a table, Markdown or an SVG out.

Flows in: ``{target, alias, runtime, ram_available, flash_available, notes, points}``, points as in ``tinyvad.variants``.
The picture shows RAM against image AUROC where that was measured, else against flash; filled marks are on the Pareto front.
"""

from __future__ import annotations

from typing import Any

from tinyvad.report.svg import ticks
from tinyvad.report.text import NONE, escape, flat, number, ratio, size, target_label

WIDTH, HEIGHT = 760, 470  # pixels
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 56, 56
COLOURS = ("#3b6fb6", "#c2571a", "#2f8a5b", "#8a4fa0", "#a08a1c", "#4a8a94")  # a backbone each
HEAD = ("", "backbone", "px", "method", "grid", "bank KiB", "RAM KiB", "flash KiB", "ms", "AUROC", "plan", "problem")
NUMERIC = (2, 5, 6, 7, 8, 9)


def rows(value: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a variant, by RAM; the first cell marks the front with '*'."""
    return [_row(point) for point in sorted(value["points"], key=lambda point: (point["ram_bytes"], point["flash_bytes"]))]


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    found = point["auroc"] if point["auroc"] is not None else point["made_up"]
    settings = point["settings"].get("dimensions") or point["settings"].get("bank_size")
    return (
        "*" if point["front"] else "",
        flat(point["backbone"]),
        str(point["image_size"]),
        point["method"] + (f" {settings}" if settings else ""),
        f"{point['grid'][0]}x{point['grid'][1]}",
        *(f"{point[key] / 1024:.1f}" for key in ("bank_bytes", "ram_bytes", "flash_bytes")),
        NONE if point["ms"] is None else f"{point['ms']:.0f}",
        NONE if found is None else ratio(found) + ("" if point["auroc"] is not None else " made up"),
        point["strategy"],
        flat(point["problem"]),
    )


def headline(value: dict[str, Any]) -> str:
    """'12 variants on stm32f746, runtime tinyvad: 8 fit, 4 on the Pareto front (*)'."""
    points = value["points"]
    fitting, front = (sum(1 for p in points if test(p)) for test in (lambda p: not p["problem"], lambda p: p["front"]))
    label = target_label(value)
    measured = any(p.get("auroc") is not None for p in points)
    axes = "RAM, flash, time and image AUROC" if measured else "RAM, flash, time, input size, bank and quality"
    return (
        f"{len(points)} variants on {label}, runtime {value['runtime']}: {fitting} fit, {front} on the Pareto front (*) of "
        f"{axes}"
    )


def to_table(value: dict[str, Any]) -> str:
    """For a terminal."""
    cells = [HEAD, *rows(value)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
    lines = [headline(value)]
    for row in cells:
        padded = (cell.rjust(w) if i in NUMERIC else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join([*lines, *(f"  {note}" for note in value["notes"])]) + "\n"


def to_markdown(value: dict[str, Any]) -> str:
    """For a pull request or a document."""
    rule = "|".join("---:" if i in NUMERIC else "---" for i in range(len(HEAD)))
    lines = [f"### {headline(value)}", "", f"| {' | '.join(HEAD)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(cell.replace('|', '/').replace('*', '**yes**') for cell in row)} |" for row in rows(value)]
    return "\n".join([*lines, *(line for note in value["notes"] for line in ("", note))]) + "\n"


def picture(value: dict[str, Any]) -> str:
    """An SVG that stands alone: a mark a variant, and the best that each amount of RAM buys as a line."""
    points = value["points"]
    measured = next((key for key in ("auroc", "made_up") if any(p[key] is not None for p in points)), None)
    shown = [p for p in points if measured is None or p[measured] is not None]
    label = {"auroc": "image AUROC", "made_up": "AUROC of made-up defects", None: "flash, KiB"}[measured]

    def height_of(p: dict[str, Any]) -> float:
        return p["flash_bytes"] / 1024 if measured is None else p[measured]

    across, up = [p["ram_bytes"] / 1024 for p in shown], [height_of(p) for p in shown]
    x_low, x_high = _range(across)
    y_low, y_high = _range(up)

    def x(kib: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (kib - x_low) / (x_high - x_low)

    def y(height: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (height - y_low) / (y_high - y_low)

    parts = _axes(x_low, x_high, y_low, y_high, x, y, label)
    limits = [(value["ram_available"], x_low, x_high, "all RAM")]
    for nbytes, low, high, name in limits:
        if nbytes is not None and low < nbytes / 1024 < high:
            place = x(nbytes / 1024)
            parts.append(
                f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text x="{place - 4:.1f}" y="{TOP + 12}" text-anchor="end">{name}: {size(nbytes)}</text>'
            )
    if measured is not None:
        parts.append(_best_line(shown, height_of, x, y))
    names = list(dict.fromkeys(p["backbone"] for p in points))
    for p in sorted(shown, key=lambda p: p["front"]):
        colour = COLOURS[names.index(p["backbone"]) % len(COLOURS)]
        css = "front" if p["front"] else "out" if p["problem"] else "other"
        title = ", ".join(part for part in _row(p)[1:] if part)
        parts.append(
            f'<circle class="{css}" cx="{x(p["ram_bytes"] / 1024):.1f}" cy="{y(height_of(p)):.1f}" r="5.5" '
            f'stroke="{colour}" fill="{colour if p["front"] else "none"}"><title>{escape(title)}</title></circle>'
        )
    highest: dict[tuple[str, int], dict[str, Any]] = {}
    for p in shown:
        key = p["backbone"], p["image_size"]
        if key not in highest or height_of(p) > height_of(highest[key]):
            highest[key] = p
    for p in highest.values():
        where = f'x="{x(p["ram_bytes"] / 1024):.1f}" y="{y(height_of(p)) - 10:.1f}"'
        parts.append(f'<text {where} text-anchor="middle">{p["image_size"]} px</text>')
    for i, name in enumerate(names):
        parts.append(
            f'<circle cx="{LEFT + 6 + 150 * i}" cy="40" r="5.5" fill="{COLOURS[i % len(COLOURS)]}"/>'
            f'<text x="{LEFT + 18 + 150 * i}" y="44">{escape(name[:18])}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(headline(value))}"><style>{STYLE}</style>'
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<text class="title" x="{LEFT}" y="22">{escape(headline(value).replace("(*)", "(filled)"))}</text>'
        + "\n".join(parts)
        + "</svg>\n"
    )


STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}.page{fill:#fff}"
    ".grid{stroke:#e3e3e3}.limit{stroke:#b3261e;stroke-dasharray:5 4}.best{fill:none;stroke:#888;stroke-width:1.5}"
    "circle{stroke-width:1.8}.out{opacity:.35}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.page{fill:#16181c}.grid{stroke:#33363c}}"
)


def _range(values: list[float]) -> tuple[float, float]:
    """From below the smallest to above the largest."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x: Any, y: Any, label: str) -> list[str]:
    parts = []
    for tick in ticks(x_low, x_high, 8):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in ticks(y_low, y_high, 7):
        height = number(tick) if abs(tick) < 10 else f"{tick:g}"
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{height}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">RAM, KiB</text>')
    parts.append(
        f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'
    )
    return parts


def _best_line(points: list[dict[str, Any]], height_of: Any, x: Any, y: Any) -> str:
    """Steps: the highest that variants of at most so much RAM reach."""
    best, path = None, ""
    for p in sorted((p for p in points if not p["problem"]), key=lambda p: (p["ram_bytes"], -height_of(p))):
        place = f"{x(p['ram_bytes'] / 1024):.1f}"
        if best is None or height_of(p) > best:
            path += f"M{place} {y(height_of(p)):.1f}" if best is None else f"H{place}V{y(height_of(p)):.1f}"
            best = height_of(p)
    return f'<path class="best" d="{path}H{WIDTH - RIGHT}"/>' if path else ""
