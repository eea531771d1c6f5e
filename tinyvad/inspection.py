"""What is in a file, and what there is to choose from: plain values for JSON and a text for people, each time.

Flows in: a bank, model or build; nothing for the lists. Flows out: (value, text).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyvad.errors import InputError

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
    lines += [f"  {key:<16} {_plain(item)}" for key, item in bank.meta.items()]
    return value, "\n".join(lines)


def _build(path: Path) -> Shown:
    from tinyvad.backbones.source import warnings_about
    from tinyvad.model import read_manifest

    value = read_manifest(path)
    warnings = warnings_about(value["backbone"])
    lines = [f"{path}: {value['method']['name']} for {value['task']}, tinyvad {value['tinyvad']}"]
    lines += [f"  warning          {warning}" for warning in warnings]
    for key, item in value.items():
        if key not in ("format", "tinyvad", "files"):
            lines.append(f"  {key:<16} {_plain(item)}")
    lines += [f"  {facts['bytes']:>11,} B  {facts['sha256'][:16]}  {name}" for name, facts in value["files"].items()]
    return {**value, "warnings": warnings}, "\n".join(lines)


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
