"""Words for reports: values in, short readable text out, safe to put into HTML, SVG and XML.

File names, tensor names and defect names come from outside and may hold anything. ``clean`` makes them valid
characters, ``escape`` makes them harmless in markup; every page goes through one of the two.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tinyvad.firmware_sim.budget import kib

KINDS = ("exact", "modelled", "estimated")  # of a figure, from the strongest to the weakest
NONE = "–"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(value: Any) -> str:
    """``value`` as text that UTF-8 and XML 1.0 can hold: control characters and half surrogates become U+FFFD."""
    return _NOT_XML.sub("\ufffd", str(value))


def flat(value: Any) -> str:
    """``clean`` text on one line."""
    return " ".join(clean(value).split())


def escape(value: Any) -> str:
    """``clean`` text with ``& < > " '`` escaped, for markup and for attributes in quotes."""
    return html.escape(clean(value))


def size(nbytes: int | None) -> str:
    """'412 KiB', from 10 MiB up '12.5 MiB', from 1 GiB up '8.0 GiB', rounded up; '0'; '–' for None."""
    if nbytes is None:
        return NONE
    if nbytes < 10 * 1024**2:
        return kib(nbytes) if nbytes else "0"
    unit, name = (1024**2, "MiB") if nbytes < 1024**3 else (1024**3, "GiB")
    return f"{-(-nbytes * 10 // unit) / 10:,.1f} {name}"


def count(value: int | None) -> str:
    """'12,345'; '–' for None."""
    return NONE if value is None else f"{value:,}"


def millions(value: int | None) -> str:
    """'23.5 M', '812 k', '400'; '–' for None."""
    if value is None:
        return NONE
    if value >= 999_500:
        return f"{value / 1e6:,.1f} M"
    return f"{value / 1e3:.0f} k" if value >= 1000 else str(value)


def number(value: float | None) -> str:
    """A score with four significant digits; '–' for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:#.4g}"
    return f"{value:,.0f}" if "e+" in text and abs(value) < 1e7 else text.removesuffix(".")


def ratio(value: float | None) -> str:
    """A metric in 0..1 with three digits; what is not quite 1 never reads as 1."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:.3f}"
    return ">0.999" if text == "1.000" and value < 1 else text


def percent(part: float, whole: float | None) -> str:
    """'73 %', rounded up, so that 100 % is never less than full; '–' without a whole."""
    return f"{math.ceil(100 * part / whole)} %" if whole else NONE


def weakest(kinds: Iterable[str]) -> str:
    """The weakest of some kinds: a sum is only as good as its worst part; 'exact' for none."""
    return max((kind for kind in kinds if kind in KINDS), key=KINDS.index, default="exact")


def target_label(budget: dict[str, Any]) -> str:
    """'stm32f746', or 'cortex-m7 (stm32f746)' where an alias was used; '' without a target."""
    name, alias = budget.get("target"), budget.get("alias")
    return f"{alias} ({name})" if name and alias else str(name or "")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Iterable[int] = (),
    foot: Sequence[str] | None = None,
    row_classes: Sequence[str] | None = None,
    caption: str = "",
) -> str:
    """An HTML table in a box that scrolls sideways.

    Args:
        head: column titles, plain text.
        rows: cells as finished markup (escape them); the first of a row is its heading.
        numeric: columns to set flush right.
        foot: a row of totals, finished markup.
        row_classes: one CSS class a row, '' for none.
        caption: what the table shows, for those who hear it; plain text.
    """
    right = set(numeric)

    def cells(tag: str, values: Sequence[str], scope: str) -> str:
        out = []
        for i, value in enumerate(values):
            name = tag if tag == "th" or i else "th"
            attributes = f' scope="{scope if tag == "th" else "row"}"' if name == "th" else ""
            out.append(f"<{name}{attributes}{' class=n' if i in right else ''}>{value}</{name}>")
        return "".join(out)

    body = []
    for i, row in enumerate(rows):
        css = row_classes[i] if row_classes else ""
        body.append(f"<tr{f' class={css}' if css else ''}>{cells('td', row, 'row')}</tr>")
    return (
        '<div class="scroll"><table>'
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + f"<thead><tr>{cells('th', [escape(title) for title in head], 'col')}</tr></thead>"
        + "<tbody>" + "\n".join(body) + "</tbody>"
        + (f"<tfoot><tr>{cells('td', foot, 'row')}</tr></tfoot>" if foot else "")
        + "</table></div>"
    )  # fmt: skip
