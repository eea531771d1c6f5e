"""``tinyvad profile``: the memory of a finished build on any target, and what grew since a baseline.

Flows in: a build folder, a target, a baseline JSON. Flows out: figures by region and owner, and problems.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyvad.backbones.source import warnings_about
from tinyvad.detectors import load_scorer
from tinyvad.errors import InputError
from tinyvad.firmware_sim import budget as budgets
from tinyvad.firmware_sim.latency import estimate
from tinyvad.firmware_sim.memory import arena
from tinyvad.firmware_sim.targets import load_target
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.model import read_manifest
from tinyvad.report import profile as formats


def profile(
    build: Path, target_name: str | None, frame: str | None, baseline: Path | None, max_growth: str
) -> tuple[list[str], dict[str, Any]]:
    """(problems, figures) of a build on a target (default: the one it was built for).

    Raises:
        InputError: no target known, a malformed baseline or growth.
    """
    from tinyvad.bank import open_bank

    manifest = read_manifest(build)
    name = target_name or (manifest["target"] or {}).get("alias") or (manifest["target"] or {}).get("name")
    if name is None:
        raise InputError(f"{build} was built for no target; give --target NAME (see `tinyvad targets`)")
    target = load_target(name)
    bank = open_bank(build / "bank.tvb")
    depth = int(bank.sections["TAPS"][:, 2].sum())
    scorer = load_scorer(bank, depth)
    file = read_tflite(build / "backbone.tflite")
    plan = arena(file)
    frame = frame or manifest["settings"]["frame"]
    ram = budgets.ram_items(plan, scorer.ram_bytes(bank.header.grid_size), target, frame)
    budget = budgets.make_budget(target, ram, budgets.flash_items(file.size, bank.nbytes, target))
    macs = plan.macs + scorer.macs(bank.header.grid_size)
    value = {
        "title": manifest["task"],
        "warnings": warnings_about(manifest["backbone"]),
        "budget": budget.to_dict(),
        "memory": {
            "head_bytes": plan.head_bytes,
            "head_kind": plan.head_kind,
            "lower_bound_bytes": plan.lower_bound_bytes,
            "tail_bytes": plan.tail_bytes(target.pointer_bytes),
            "tail": plan.tail_bytes_modelled[target.pointer_bytes],
            "n_ops": plan.n_ops,
        },
        "latency": estimate(macs, target) if "cmsis_nn" in target.mac_per_cycle else None,
    }
    remedy = "use a smaller --frame, or rebuild with a smaller --image-size, --bank-bytes or --grid"
    problems = [f"{problem}: {remedy}" for problem in budget.problems]
    if baseline is not None:
        value["growth"] = formats.compare(value, _read_baseline(baseline), _fraction(max_growth))
        problems += value["growth"]
    return problems, value


def render(value: dict[str, Any], form: str) -> str:
    """The figures as 'table', 'json', 'markdown' or 'junit' text."""
    writers = {
        "table": formats.to_table, "json": formats.to_json, "markdown": formats.to_markdown, "junit": formats.to_junit,
    }  # fmt: skip
    return writers[form](value)


def _read_baseline(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value["budget"]["ram"], list):
            raise TypeError
    except OSError as error:
        raise InputError(f"cannot read the baseline {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no `tinyvad profile --format json` output; make it again") from error
    result: dict[str, Any] = value
    return result


def _fraction(text: str) -> float:
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if value < 0 or (value > 1 and not text.endswith("%")):
        raise InputError(f"--max-growth {text!r}: write a share such as 3% or 0.03")
    return value
