"""What a build costs, as text: ``{title, warnings, budget, memory, latency}`` in, a table, Markdown, JSON or JUnit out.

``budget`` is ``Budget.to_dict()``, ``memory`` the arena's figures, ``latency`` an estimate or None. The six columns
are those of ST's model zoo: Activation RAM (with input and output), Runtime RAM (everything else in RAM), Weights
Flash (the files that are read in place), Code Flash (everything else in flash), and the totals. ``compare`` sets a
profile against an older one, for continuous integration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tinyvad.errors import InputError
from tinyvad.report.text import NONE, clean, count, size, target_label, weakest


class Section(NamedTuple):
    """A small table: its title, column heads, rows of plain text, and which columns stand flush right."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: tuple[int, ...]


def columns(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ST's columns: name -> ``{'bytes', 'kind'}``; the two totals are the sums of their parts, and the budget's.

    Without the arena's figures the whole arena counts as activations.
    """
    budget, memory = report.get("budget") or {}, report.get("memory") or {}
    ram, flash = budget.get("ram") or [], budget.get("flash") or []
    arena = [item for item in ram if item["owner"] == "arena"]
    total_ram = sum(item["nbytes"] for item in ram)
    activation = memory.get("head_bytes")
    kind = memory.get("head_kind") or "modelled"
    if activation is None:
        activation, kind = sum(item["nbytes"] for item in arena), weakest(item["kind"] for item in arena)
    activation = min(activation, total_ram)
    files = [item for item in flash if PurePosixPath(item["owner"]).suffix]
    code = [item for item in flash if not PurePosixPath(item["owner"]).suffix]

    def column(nbytes: int, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"bytes": nbytes, "kind": weakest(item["kind"] for item in items)}

    return {
        "Activation RAM": {"bytes": activation, "kind": kind},
        "Runtime RAM": column(total_ram - activation, ram),
        "Weights Flash": column(sum(item["nbytes"] for item in files), files),
        "Code Flash": column(sum(item["nbytes"] for item in code), code),
        "Total RAM": column(total_ram, ram),
        "Total Flash": column(sum(item["nbytes"] for item in flash), flash),
    }


def verdict(budget: dict[str, Any]) -> str:
    """'fits', 'does not fit', or 'no target' where there is no budget."""
    return "no target" if "fits" not in budget else "fits" if budget["fits"] else "does not fit"


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of a profile: totals, owners, regions, latency; those without data are left out. Cells are raw text."""
    budget, memory = report.get("budget") or {}, report.get("memory") or {}
    result = []
    if budget.get("ram") or budget.get("flash"):
        figures = columns(report)
        result.append(
            Section(
                "Totals, KiB",
                ("", *figures),
                [
                    ("KiB", *(f"{figure['bytes'] / 1024:.2f}" for figure in figures.values())),
                    ("kind", *(figure["kind"] for figure in figures.values())),
                ],
                tuple(range(1, 7)),
            )
        )
    for name in ("ram", "flash"):
        items = budget.get(name) or []
        if items:
            available = budget.get(f"{name}_available")
            rows = [_item_row(item, available) for item in items]
            used = sum(item["nbytes"] for item in items)
            kind = weakest(item["kind"] for item in items)
            rows.append(("total", count(used), _share(used, available), kind, f"of {size(available)}", ""))
            head = ("owner", "bytes", "share", "kind", "where", "note")
            result.append(Section({"ram": "RAM", "flash": "Flash"}[name], head, rows, (1, 2)))
    regions = budget.get("regions") or []
    if regions:
        rows = [
            (
                str(region["name"]),
                f"{region['base']:#010x}",
                count(region["used"]),
                count(region["bytes"] - region["used"]),
                count(region["bytes"]),
                _share(region["used"], region["bytes"]),
            )
            for region in regions
        ]
        result.append(
            Section("Regions of RAM", ("region", "base", "used", "free", "bytes", "share"), rows, (2, 3, 4, 5))
        )
    if memory.get("head_bytes") is not None:
        kind = memory.get("head_kind") or "modelled"
        rows = [("head", count(memory["head_bytes"]), kind, "activations and scratch")]
        if memory.get("lower_bound_bytes") is not None:
            rows.append(
                ("lower bound", count(memory["lower_bound_bytes"]), "exact", "no plan of whole buffers needs less")
            )
        for name, nbytes in (memory.get("tail") or {}).items():
            rows.append((f"tail: {name}", count(nbytes), "modelled", ""))
        result.append(Section("Arena", ("part", "bytes", "kind", "note"), rows, (1,)))
    latency = report.get("latency")
    if latency:
        rows = [
            (
                target_label(budget) or NONE,
                str(latency.get("engine") or NONE),
                f"{latency['ms']:.0f}" if latency.get("ms") is not None else NONE,
                str(latency.get("kind") or "estimated"),
                str(latency.get("source") or ""),
            )
        ]
        result.append(Section("Latency", ("board", "engine", "ms", "kind", "source"), rows, (2,)))
    return result


def to_table(report: dict[str, Any]) -> str:
    """A profile for a terminal."""
    budget = report.get("budget") or {}
    lines = [_flat(_line(report)), *(f"  warning: {_flat(warning)}" for warning in report.get("warnings") or [])]
    lines += [f"  {_flat(problem)}" for problem in budget.get("problems") or []]
    for section in sections(report):
        rows = [section.head, *(tuple(_flat(cell) for cell in row) for row in section.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(section.head))]
        lines += ["", section.title]
        for row in rows:
            cells = [
                cell.rjust(width) if i in section.right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ]
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def to_markdown(report: dict[str, Any]) -> str:
    """A profile as Markdown, for a pull request's comment."""
    budget = report.get("budget") or {}
    lines = [f"### {_cell(_line(report))}"]
    for warning in report.get("warnings") or []:
        lines += ["", f"**Warning:** {_cell(warning)}"]
    problems = budget.get("problems") or []
    lines += ["", *(f"- {_cell(problem)}" for problem in problems)] if problems else []
    for section in sections(report):
        lines += ["", f"**{section.title}**", "", "| " + " | ".join(section.head) + " |"]
        lines.append(
            "|" + "|".join("---:" if i in section.right else "---" for i in range(len(section.head))) + "|"
        )
        lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in section.rows]
    return "\n".join(lines) + "\n"


def to_json(report: dict[str, Any]) -> str:
    """A profile as one JSON object, its own keys and ``columns``; also the baseline that ``compare`` reads."""
    return json.dumps({**report, "columns": columns(report)}, indent=2, sort_keys=True) + "\n"


def to_junit(report: dict[str, Any]) -> str:
    """A profile as JUnit XML: a test case a limit (each region of RAM, the placing of every item, flash).

    A case fails where its limit is broken; a broken limit that belongs to none of them fails a case of its own.
    """
    budget = report.get("budget") or {}
    problems = [_flat(problem) for problem in budget.get("problems") or []]
    lost = [item for item in budget.get("ram") or [] if budget.get("regions") and not item.get("region")]
    cases: list[tuple[str, str]] = []  # name, failure or ''
    for region in budget.get("regions") or []:
        over = region["used"] > region["bytes"]
        failure = f"{count(region['used'])} B > {count(region['bytes'])} B in {region['name']}" if over else ""
        cases.append((f"RAM {region['name']}", failure))
    if budget.get("regions"):
        named = [line for line in problems if any(line.startswith(f"{_flat(item['owner'])} ") for item in lost)]
        missing = [f"{item['owner']} {size(item['nbytes'])} has no place in RAM" for item in lost]
        cases.append(("RAM: every item lies in one region", "\n".join(named or missing)))
    used, available = budget.get("flash_used") or 0, budget.get("flash_available")
    if available is not None:
        over = used > available
        lines = [line for line in problems if "flash" in line] or [f"flash {size(used)} > {size(available)}"]
        cases.append(("flash", "\n".join(lines) if over else ""))
    grown = [_flat(line) for line in report.get("growth") or []]
    if "growth" in report:
        cases.append(("growth over the baseline", "\n".join(grown)))
    told = "\n".join(failure for _, failure in cases if failure)
    rest = [line for line in problems if line not in told]
    if rest or (budget.get("fits") is False and not told):
        cases.append(("other limits", "\n".join(rest) or "does not fit"))

    suite = ElementTree.Element(
        "testsuite",
        name=_flat(f"tinyvad profile: {report.get('title') or 'build'}"),
        tests=str(len(cases)),
        failures=str(sum(bool(failure) for _, failure in cases)),
        errors="0",
        skipped="0",
    )
    group = _flat(f"tinyvad.profile.{budget.get('target') or 'build'}")
    for name, failure in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=_flat(name))
        if failure:
            text = clean(failure)
            ElementTree.SubElement(case, "failure", message=text.split("\n")[0], type="OverBudget").text = text
    warnings = [clean(warning) for warning in report.get("warnings") or []]
    if warnings:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(f"warning: {warning}" for warning in warnings)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def compare(current: dict[str, Any], baseline: dict[str, Any], max_growth: float) -> list[str]:
    """What grew too much since a baseline: one line an owner or total of RAM and flash, [] if nothing did.

    Something grew too much if its bytes are more than (1 + max_growth) times the baseline's, computed exactly; what
    the baseline does not have grew from 0.

    Args:
        current, baseline: profiles, as ``to_json`` writes them.
        max_growth: fraction, 0.03 for 3 %.

    Raises:
        InputError: ``max_growth`` is negative or not finite; a profile has no budget; they are of two targets.
    """
    if not (math.isfinite(max_growth) and max_growth >= 0):
        raise InputError(f"max-growth {max_growth} must be 0 or more, e.g. 3% or 0.03")
    new, old = (_owners(profile, name) for profile, name in ((current, "this profile"), (baseline, "the baseline")))
    targets = [_flat(str(profile["budget"].get("target"))) for profile in (current, baseline)]
    if targets[0] != targets[1]:
        raise InputError(
            f"the baseline is of target {targets[1]}, this profile of {targets[0]}: write a baseline for each target "
            "with `tinyvad profile BUILD --format json`"
        )
    share = Fraction(str(max_growth))
    problems = []
    for name, nbytes in new.items():
        before = old.get(name, 0)
        allowed = math.floor(before * (1 + share))
        if nbytes > allowed:
            grown = f"{before:,} B + {float(100 * share):g} %" if before else "0 B: it is new"
            problems.append(
                f"{_flat(name)} {nbytes:,} B > {allowed:,} B allowed (baseline {grown}): make it smaller, or accept "
                "it with a new baseline from `tinyvad profile BUILD --format json`"
            )
    return problems


def _owners(profile: dict[str, Any], name: str) -> dict[str, int]:
    """'RAM arena' -> bytes, and the totals; items of one owner are added up."""
    budget = profile.get("budget") if isinstance(profile, dict) else None
    try:
        if not isinstance(budget, dict):
            raise KeyError("budget")
        found: dict[str, int] = {}
        for key, label in (("ram", "RAM"), ("flash", "flash")):
            for item in budget[key]:
                owner = f"{label} {item['owner']}"
                found[owner] = found.get(owner, 0) + int(item["nbytes"])
            found[f"{label} total"] = int(budget[f"{key}_used"])
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{name}: field {error} is missing or of another kind; write it with `tinyvad profile BUILD --format json`"
        ) from error


def _item_row(item: dict[str, Any], available: int | None) -> tuple[str, ...]:
    where = str(item.get("region") or "")
    if item.get("address") is not None:
        where = f"{where} {item['address']:#010x}".strip()
    share = _share(item["nbytes"], available)
    return str(item["owner"]), count(item["nbytes"]), share, str(item["kind"]), where, str(item.get("note") or "")


def _share(part: int, whole: int | None) -> str:
    return f"{100 * part / whole:.1f} %" if whole else NONE


def _line(report: dict[str, Any]) -> str:
    budget = report.get("budget") or {}
    label = target_label(budget)
    return f"{report.get('title') or 'build'}: {verdict(budget)}{f' {label}' if label else ''}"


def _flat(text: Any) -> str:
    """Clean text on one line."""
    return " ".join(clean(text).split())


def _cell(text: str) -> str:
    """Text that stays in its cell: no line breaks, and Markdown's and HTML's marks escaped."""
    flat = _flat(text)
    for mark, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*"), ("_", "\\_")):
        flat = flat.replace(mark, safe)
    return flat
