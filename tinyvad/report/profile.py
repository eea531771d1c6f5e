"""What a build costs, as text: ``{title, warnings, profiles}`` in, a table, Markdown or JSON out.

A profile is ``{runtime, budget, memory, latency}`` of one target and runtime: ``budget`` is ``Budget.to_dict()``,
``memory`` the arena's figures, ``latency`` an estimate or None; of a trained network ``training``, what a step would
take (``tinyvad.firmware_sim.training_step``). The writers also take a report with the keys of one
profile, as report.json has them. The six columns are those of ST's model zoo: Activation RAM (with input and output),
Runtime RAM (everything else in RAM), Weights Flash (what is read in place), Code Flash (everything else in flash), and the
totals.

``growth`` sets profiles against older ones, ``junit`` writes them for continuous integration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tinyvad.firmware_sim.training_step import figure_rows
from tinyvad.report.text import NONE, count, flat, size, target_label, weakest

DETAILED = 2  # profiles; of more than these a terminal gets the overview alone
COMMENT = 60_000  # characters; a comment on GitHub holds 65,536


class Section(NamedTuple):
    """A small table: its title, column heads, rows of plain text, and which columns stand flush right."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: tuple[int, ...]


def profiles_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One report a target and runtime, each with the title and the warnings of the whole."""
    common = {"title": report.get("title"), "warnings": report.get("warnings")}
    return [{**common, **profile} for profile in report.get("profiles") or []] or [report]


def columns(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ST's columns: name -> ``{'bytes', 'kind'}``; the two totals are the sums of their parts, and the budget's."""
    budget = report.get("budget") or {}
    result = {}
    for key, names in (("ram", ("Activation RAM", "Runtime RAM")), ("flash", ("Weights Flash", "Code Flash"))):
        leaves: list[dict[str, Any]] = [leaf for item in budget.get(key) or [] for leaf in item.get("parts") or [item]]
        for name in names:
            # what names no column of its own is runtime or code
            result[name] = _sum(leaf for leaf in leaves if (leaf.get("column") or names[1]) == name)
    for key, name in (("ram", "Total RAM"), ("flash", "Total Flash")):
        result[name] = _sum(budget.get(key) or [])
    return result


def _sum(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found = list(items)
    return {"bytes": sum(item["nbytes"] for item in found), "kind": weakest(item["kind"] for item in found)}


def verdict(budget: dict[str, Any]) -> str:
    """'fits', 'does not fit', or 'no target' where there is no budget."""
    return "no target" if "fits" not in budget else "fits" if budget["fits"] else "does not fit"


def overview(profiles: Sequence[dict[str, Any]]) -> Section:
    """A row a target and runtime: ST's columns in KiB, the latency estimate, the change since a baseline."""
    changed = any("baseline" in profile for profile in profiles)
    head = ("target", "runtime", "fits", *columns({}), "ms")
    rows = []
    for profile in profiles:
        budget, latency = profile.get("budget") or {}, profile.get("latency") or {}
        row = [target_label(budget) or NONE, str(profile.get("runtime") or NONE), "yes" if budget.get("fits") else "NO"]
        row += [f"{figure['bytes'] / 1024:.1f}" for figure in columns(profile).values()]
        row.append(f"{latency['ms']:.0f}" if latency.get("ms") is not None else NONE)
        if changed:
            row += [_change(profile, key) for key in ("ram_used", "flash_used")]
        rows.append(tuple(row))
    head = (*head, "RAM change", "Flash change") if changed else head
    return Section("RAM and flash in KiB, latency estimated", head, rows, tuple(range(3, len(head))))


def _change(profile: dict[str, Any], key: str) -> str:
    """'+1,024 B (+0.4 %)', 'none' or 'new' since the baseline."""
    before = (profile.get("baseline") or {}).get(key)
    if before is None:
        return "new"
    change = profile["budget"][key] - before
    if not change:
        return "none"
    return f"{change:+,} B" + (f" ({100 * change / before:+.1f} %)" if before else "")


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
            if name == "flash":  # the linker sets the addresses there
                items = [{**item, "address": None} for item in items]
            rows = [row for item in items for row in _item_rows(item, available)]
            used = sum(item["nbytes"] for item in items)
            kind = weakest(item["kind"] for item in items)
            rows.append(("total", count(used), _share(used, available), kind, f"of {size(available)}", ""))
            head = ("owner", "bytes", "share", "kind", "where", "note")
            result.append(Section({"ram": "RAM", "flash": "Flash"}[name], head, rows, (1, 2)))
    for key, name in (("regions", "Regions of RAM"), ("flash_regions", "Regions of flash")):
        regions = budget.get(key) or []
        if regions:
            head = ("region", "base", "used", "free", "bytes", "share")
            result.append(Section(name, head, [_region_row(region) for region in regions], (2, 3, 4, 5)))
    result += _arena(memory)
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
    training = report.get("training")
    if training:
        title = f"A training step of {training['method']}, batch {training['batch']} ({training['kind']})"
        result.append(Section(title, ("what", "value"), [*figure_rows(training)], (1,)))
    return result


def _arena(memory: dict[str, Any]) -> list[Section]:
    if memory.get("head_bytes") is None:
        return []
    note = f"{memory['strategy']} plan" if memory.get("strategy") else "activations and scratch"
    kind = str(memory.get("head_kind") or "modelled")
    rows: list[tuple[str, ...]] = [("head", count(memory["head_bytes"]), kind, note)]
    if memory.get("lower_bound_bytes") is not None:
        rows.append(("lower bound", count(memory["lower_bound_bytes"]), "exact", "no plan of these buffers needs less"))
    for name, nbytes in (memory.get("tail") or {}).items():
        rows.append((f"tail: {name}", count(nbytes), "modelled", ""))
    return [Section("Arena", ("part", "bytes", "kind", "note"), rows, (1,))]


def to_table(report: dict[str, Any]) -> str:
    """Profiles for a terminal."""
    profiles = profiles_of(report)
    several = len(profiles) > 1
    blocks = [_heading(report, profiles), *_lines(overview(profiles))] if several else []
    for profile in profiles[: DETAILED if len(profiles) <= DETAILED else 0]:
        blocks += ["", *_one_table(profile, not several)] if several else _one_table(profile, True)
    return "\n".join(blocks) + "\n"


def _one_table(profile: dict[str, Any], warn: bool) -> list[str]:
    budget = profile.get("budget") or {}
    warnings = profile.get("warnings") or [] if warn else []
    lines = [flat(_line(profile)), *(f"  warning: {flat(warning)}" for warning in warnings)]
    lines += [f"  {flat(problem)}" for problem in budget.get("problems") or []]
    for section in sections(profile):
        lines += ["", section.title, *_lines(section)]
    return lines


def _lines(section: Section) -> list[str]:
    """A section's rows as aligned text."""
    rows = [section.head, *(tuple(flat(cell) for cell in row) for row in section.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(section.head))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i in section.right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def to_markdown(report: dict[str, Any]) -> str:
    """Profiles as Markdown, for a pull request's comment; of several, the details are folded away."""
    profiles = profiles_of(report)
    if len(profiles) == 1:
        return "\n".join([f"### {_cell(_line(report | profiles[0]))}", *_one_markdown(report | profiles[0])]) + "\n"
    lines = [f"### {_cell(_heading(report, profiles).splitlines()[0])}"]
    lines += [line for warning in report.get("warnings") or [] for line in ("", f"**Warning:** {_cell(warning)}")]
    grown = [
        f"{target_label(profile.get('budget') or {})} {profile.get('runtime') or ''}: {line}"
        for profile in profiles
        for line in profile.get("growth") or []
    ]
    lines += ["", *(f"- {_cell(line)}" for line in grown)] if grown else []
    lines += ["", *_markdown_rows(overview(profiles))]
    left_out = 0
    for profile in profiles:
        details = ["", f"<details><summary>{_cell(_line(profile))}</summary>"]
        details += [*_one_markdown({**profile, "warnings": []}), "", "</details>"]
        if sum(map(len, lines)) + sum(map(len, details)) > COMMENT:
            left_out += 1
        else:
            lines += details
    if left_out:
        lines += ["", f"Details of {left_out} more: `tinyvad profile --format json`."]
    return "\n".join(lines) + "\n"


def _one_markdown(profile: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for warning in profile.get("warnings") or []:
        lines += ["", f"**Warning:** {_cell(warning)}"]
    problems = [*((profile.get("budget") or {}).get("problems") or []), *(profile.get("growth") or [])]
    lines += ["", *(f"- {_cell(problem)}" for problem in problems)] if problems else []
    for section in sections(profile):
        lines += ["", f"**{section.title}**", "", *_markdown_rows(section)]
    return lines


def _markdown_rows(section: Section) -> list[str]:
    right = ("---:" if i in section.right else "---" for i in range(len(section.head)))
    head = ["| " + " | ".join(section.head) + " |", "|" + "|".join(right) + "|"]
    return head + ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in section.rows]


def to_json(report: dict[str, Any]) -> str:
    """Profiles as one JSON object, its own keys and ``columns``; also the baseline that ``growth`` reads."""
    if report.get("profiles"):
        value = {**report, "profiles": [{**profile, "columns": columns(profile)} for profile in report["profiles"]]}
    else:
        value = {**report, "columns": columns(report)}
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _item_rows(item: dict[str, Any], available: int | None) -> list[tuple[str, ...]]:
    """An item, and its parts below it."""
    parts = [{**part, "owner": f"{PART}{part['owner']}"} for part in item.get("parts") or []]
    return [_item_row(row, available) for row in (item, *parts)]


PART = "· "  # before the owner of a part


def _item_row(item: dict[str, Any], available: int | None) -> tuple[str, ...]:
    where = str(item.get("region") or "")
    if item.get("address") is not None:
        where = f"{where} {item['address']:#010x}".strip()
    share = _share(item["nbytes"], available)
    return str(item["owner"]), count(item["nbytes"]), share, str(item["kind"]), where, str(item.get("note") or "")


def _region_row(region: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(region["name"]),
        f"{region['base']:#010x}",
        count(region["used"]),
        count(region["bytes"] - region["used"]),
        count(region["bytes"]),
        _share(region["used"], region["bytes"]),
    )


def _share(part: int, whole: int | None) -> str:
    return f"{100 * part / whole:.1f} %" if whole else NONE


def _heading(report: dict[str, Any], profiles: Sequence[dict[str, Any]]) -> str:
    """What there is, how many fit, warnings; a line each."""
    fitting = sum(bool((profile.get("budget") or {}).get("fits")) for profile in profiles)
    lines = [f"{flat(report.get('title') or 'build')}: {fitting} of {len(profiles)} fit"]
    return "\n".join([*lines, *(f"  warning: {flat(warning)}" for warning in report.get("warnings") or [])])


def _line(report: dict[str, Any]) -> str:
    budget = report.get("budget") or {}
    label = target_label(budget)
    runtime = f", runtime {report['runtime']}" if report.get("runtime") else ""
    return f"{report.get('title') or 'build'}: {verdict(budget)}{f' {label}' if label else ''}{runtime}"


def _cell(text: str) -> str:
    """Text that stays in its cell: no line breaks, and Markdown's and HTML's marks escaped."""
    one = flat(text)
    for mark, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*"), ("_", "\\_")):
        one = one.replace(mark, safe)
    return one
