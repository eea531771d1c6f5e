"""Profiles as JUnit XML: a suite a target and runtime, a test case a limit (see ``profile`` for what comes in)."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from tinyvad.report.profile import profiles_of
from tinyvad.report.text import clean, count, flat, size


def to_junit(report: dict[str, Any]) -> str:
    """A case each region of RAM, the placing of every item, flash, and growth where there is a baseline.

    A case fails where its limit is broken; a broken limit that belongs to none of them fails a case of its own.
    """
    root = ElementTree.Element("testsuites")
    for profile in profiles_of(report):
        root.append(_suite(profile))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(report: dict[str, Any]) -> ElementTree.Element:
    budget = report.get("budget") or {}
    cases = _cases(report)
    suite = ElementTree.Element(
        "testsuite",
        name=flat(f"tinyvad profile: {report.get('title') or 'build'}"),
        tests=str(len(cases)),
        failures=str(sum(bool(failure) for _, failure in cases)),
        errors="0",
        skipped="0",
    )
    names = ("tinyvad.profile", budget.get("target") or "build", report.get("runtime"))
    group = ".".join(flat(name) for name in names if name)
    for name, failure in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=flat(name))
        if failure:
            text = clean(failure)
            ElementTree.SubElement(case, "failure", message=text.split("\n")[0], type="OverBudget").text = text
    warnings = [clean(warning) for warning in report.get("warnings") or []]
    if warnings:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(f"warning: {warning}" for warning in warnings)
    return suite


def _cases(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, failure or '') of every limit."""
    budget = report.get("budget") or {}
    problems = [flat(problem) for problem in budget.get("problems") or []]
    lost = [item for item in budget.get("ram") or [] if budget.get("regions") and not item.get("region")]
    cases: list[tuple[str, str]] = []
    for region in budget.get("regions") or []:
        over = region["used"] > region["bytes"]
        failure = f"{count(region['used'])} B > {count(region['bytes'])} B in {region['name']}" if over else ""
        cases.append((f"RAM {region['name']}", failure))
    if budget.get("regions"):
        named = [line for line in problems if any(line.startswith(f"{flat(item['owner'])} ") for item in lost)]
        missing = [f"{item['owner']} {size(item['nbytes'])} has no place in RAM" for item in lost]
        cases.append(("RAM: every item lies in one region", "\n".join(named or missing)))
    used, available = budget.get("flash_used") or 0, budget.get("flash_available")
    if available is not None:
        lines = [line for line in problems if "flash" in line] or [f"flash {size(used)} > {size(available)}"]
        cases.append(("flash", "\n".join(lines) if used > available else ""))
    if "growth" in report:
        cases.append(("growth over the baseline", "\n".join(flat(line) for line in report["growth"] or [])))
    told = "\n".join(failure for _, failure in cases if failure)
    rest = [line for line in problems if line not in told]
    if rest or (budget.get("fits") is False and not told):
        cases.append(("other limits", "\n".join(rest) or "does not fit"))
    return cases
