"""What is in a file, and what there is to choose from: plain values for JSON and a text for people, each time.

Flows in: a bank, model or build; nothing for the lists. Flows out: (value, text).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvad.errors import InputError

if TYPE_CHECKING:
    from tinyvad.bank import Bank

Shown = tuple[dict[str, Any], str]


def inspect(path: Path) -> Shown:
    """Fields of a .tvb, .tflite or build. Raises InputError for anything else or a malformed file."""
    if path.is_dir():
        return _build(path)
    suffix = path.suffix.lower()
    if suffix == ".tvb":
        return _bank(path)
    if suffix == ".tflite":
        from tinyvad.firmware_sim.memory import summary

        value = summary(path)
        return value, "\n".join(f"{key:<26} {_plain(item)}" for key, item in value.items())
    raise InputError(f"{path}: inspect reads a .tvb bank, a .tflite model or a build folder")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bank(path: Path) -> Shown:
    from tinyvad.bank import TAGS, open_bank

    bank = open_bank(path)
    header = vars(bank.header)
    sections = [entry._asdict() for entry in bank.section_table()]
    value = {"file": str(path), "bytes": bank.nbytes, "crc32": f"{bank.crc32:08x}", "header": header,
             "sections": sections, "meta": bank.meta}  # fmt: skip
    lines = [f"{path}: {bank.nbytes:,} bytes, crc32 {bank.crc32:08x}"]
    lines += [f"  {key:<16} {item}" for key, item in header.items()]
    lines.append("  tag  dtype shape              offset     bytes required")
    for s in sections:
        shape = "x".join(str(n) for n in s["shape"]) or "scalar"
        lines.append(
            f"  {s['tag']} {s['dtype']:<5} {shape:<16} {s['offset']:>8,} {s['nbytes']:>9,} "
            f"{'yes' if s['required'] else 'no ':<8} {TAGS.get(s['tag'], 'unknown')}"
        )
    lines += [f"  {key:<16} {_plain(item)}" for key, item in bank.meta.items() if key != "tasks"]
    tasks = _tasks(bank)
    return {**value, "tasks": tasks}, "\n".join(lines + _task_lines(tasks))


def _tasks(bank: Bank) -> list[dict[str, Any]]:
    """Every product of a bank: its name, images, threshold, and the bytes that are its own."""
    from tinyvad.detectors.bank_tasks import task_entries
    from tinyvad.detectors.tasks import EQUAL, LEARNT

    thresholds = bank.sections.get("THRS")
    if thresholds is None:
        return []
    count = len(thresholds)
    table = bank.sections.get("TASK")
    entries = task_entries(bank)
    own = [tag for tag in LEARNT[bank.header.kind] if tag in bank.sections]
    each = sum(bank.sections[tag].nbytes // count for tag in ("THRS", "TASK", "PROT", "LADR") if tag in bank.sections)
    rows = sum(bank.sections[tag].nbytes // len(bank.sections[tag]) for tag in own if tag not in EQUAL)
    equal = sum(bank.sections[tag].nbytes // count for tag in own if tag in EQUAL)
    tasks = []
    for i, (entry, threshold) in enumerate(zip(entries, thresholds, strict=False)):
        all_rows = len(bank.sections[own[0]]) if own else 1
        first, held, images = (0, all_rows, None) if table is None else table[i, :3].tolist()
        tasks.append({
            "name": entry["name"], "images": images, "threshold_raw": int(threshold),
            "threshold_rule": entry.get("threshold_rule"), "first_row": first, "rows": held,
            "bytes": held * rows + equal + each, "state": entry.get("state"),
        })  # fmt: skip
    return tasks


def _task_lines(tasks: list[dict[str, Any]]) -> list[str]:
    lines = [f"  {'product':<24} {'images':>7} {'threshold':>11} {'rows':>7} {'bytes':>9}  rule"]
    return lines + [
        f"  {task['name']:<24} {_plain(task['images']):>7} {task['threshold_raw']:>11,} {task['rows']:>7,} "
        f"{task['bytes']:>9,}  {task['threshold_rule'] or ''}"
        for task in tasks
    ]


def _slots(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Both slots of a build's banks: generation, or what is wrong; of the current int8 bank its products."""
    from tinyvad.slots import SLOTS, current, look

    value: dict[str, Any] = {"slots": {}, "products": [], "bank_bytes": None}
    lines = []
    for features, names in SLOTS.items():
        if not any((folder / name).exists() for name in names):
            continue
        try:
            now = Path(current(folder, features).name)
        except InputError:
            now = None
        rows = []
        for path, bank, problem in look(folder, features):
            row: dict[str, Any] = {"file": path.name, "valid": bank is not None, "current": path == now}
            if bank is None:
                row["problem"] = problem
                words = problem
            else:
                row |= {"generation": bank.header.generation, "crc32": f"{bank.crc32:08x}", "bytes": bank.nbytes}
                words = f"generation {bank.header.generation}, crc32 {bank.crc32:08x}, {bank.nbytes:,} B"
                if features == "int8" and row["current"]:
                    value |= {"products": _tasks(bank), "bank_bytes": bank.nbytes}
            rows.append(row)
            lines.append(f"  {'slot ' + features:<16} {path.name}: {words}{', current' if row['current'] else ''}")
        value["slots"][features] = rows
    return value, lines


def _build(path: Path) -> Shown:
    from tinyvad.backbones.source import warnings_about
    from tinyvad.model import read_manifest

    value = read_manifest(path)
    warnings = warnings_about(value["backbone"])
    lines = [f"{path}: {value['method']['name']} built on {value['task']}, tinyvad {value['tinyvad']}"]
    lines += [f"  warning          {warning}" for warning in warnings]
    for key, item in value.items():
        if key not in ("format", "tinyvad", "files"):
            lines.append(f"  {key:<16} {_plain(item)}")
    banks, of_slots = _slots(path)
    lines += of_slots
    if banks["products"]:
        room = value["learning"]["slot_bytes"]
        used = banks["bank_bytes"]
        lines.append(f"  {'bank':<16} {used:,} of {room:,} B of a slot, {used / max(room, 1):.0%}")
        lines += _task_lines(banks["products"])
    lines += [f"  {facts['bytes']:>11,} B  {facts['sha256'][:16]}  {name}" for name, facts in value["files"].items()]
    return {**value, **banks, "warnings": warnings}, "\n".join(lines)


def targets_table() -> Shown:
    """All presets, their RAM spans and flash, and the aliases."""
    from tinyvad.firmware_sim.targets import list_aliases, list_targets, spans

    rows, lines = [], [f"{'name':<18} {'core':<12} {'MHz':>5} {'largest RAM':>12} {'RAM':>10} {'flash':>10}  title"]
    for target in list_targets():
        largest = max(span.size for span in spans(target))
        rows.append({
            "name": target.name, "title": target.title, "core": target.core, "clock_mhz": target.clock_mhz,
            "largest_span_bytes": largest, "ram_bytes": target.ram_bytes, "flash_bytes": target.flash_bytes,
            "regions": [vars(region) for region in target.regions],
        })  # fmt: skip
        flash = "files" if target.flash_bytes is None else f"{target.flash_bytes // 1024:,} K"
        lines.append(
            f"{target.name:<18} {target.core:<12} {target.clock_mhz:>5g} {largest // 1024:>10,} K "
            f"{target.ram_bytes // 1024:>8,} K {flash:>10}  {target.title}"
        )
    aliases = list_aliases()
    lines.append("aliases: " + ", ".join(f"{alias} = {name}" for alias, name in aliases.items()))
    return {"targets": rows, "aliases": aliases}, "\n".join(lines)
