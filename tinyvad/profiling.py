"""``tinyvad profile``: RAM, flash and latency of a finished build on any targets, and what grew since a baseline.

Flows in: a build folder, targets, runtimes, a baseline JSON. Flows out: figures by region and owner, and problems. A build
is read once; plans that two targets share are made once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyvad.backbones.source import warnings_about
from tinyvad.detectors import NATIVE, Scorer, check_bank, score_bytes
from tinyvad.detectors.device_learning import workspace_bytes
from tinyvad.errors import InputError
from tinyvad.firmware_sim import latency, runtimes
from tinyvad.firmware_sim.budget import parse_frame
from tinyvad.firmware_sim.memory import Arena, arena
from tinyvad.firmware_sim.targets import Isa, Target, list_targets, load_target
from tinyvad.firmware_sim.training_step import on_target
from tinyvad.graph.ir import Graph
from tinyvad.graph.schedule import Schedule
from tinyvad.graph.tflite_file import TfliteFile, read_tflite
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.model import read_manifest
from tinyvad.project import TRAINED, Project
from tinyvad.report import profile as formats
from tinyvad.report.growth import compare_all
from tinyvad.report.junit import to_junit
from tinyvad.sizing import Network, arena_limit, bank_in_flash, plan_memory, scorer_memory
from tinyvad.slots import current

ALL = "all"
RUNTIMES = (*runtimes.RUNTIMES, "both")
REMEDY = "use a smaller --frame, or rebuild with a smaller --image-size, --bank-bytes or --grid"


@dataclass(eq=False)
class Loaded:
    """A build, read once, and the plans made for it so far."""

    folder: Path
    manifest: dict[str, Any]
    graph: Graph
    file: TfliteFile
    arena: Arena  # with TFLM's reference kernels
    scorer: Scorer
    tap_rows: Any  # (n, 8) int32, section TAPS
    grid: tuple[int, int]
    bank_bytes: int
    learning: int  # workspace of learning on the device
    schedules: dict[tuple[str | None, int, str], Schedule] = field(default_factory=dict)  # by frame, room, packing
    arenas: dict[tuple[bool, Isa], Arena] = field(default_factory=dict)
    flashes: dict[tuple[str, int], runtimes.ModelFlash] = field(default_factory=dict)  # by packing and steps

    @property
    def depth(self) -> int:
        return int(self.tap_rows[:, 2].sum())

    def bank_in_flash(self, target: Target) -> int:
        """Flash of the bank: as it is, or the two slots of a build that is made to learn."""
        learning = self.manifest["learning"]
        if self.manifest["method"]["name"] in TRAINED or learning["tasks"] == 1:
            return bank_in_flash(self.bank_bytes, 1, target)
        return bank_in_flash(learning["slot_bytes"], learning["tasks"], target)


def load_build(folder: Path) -> Loaded:
    """Read what a profile needs of a build.

    Raises:
        InputError: no build, or a damaged file of it.
    """
    manifest = read_manifest(folder)
    bank = current(folder)
    rows, scorers = check_bank(bank)
    path = folder / "backbone.tflite"
    file = read_tflite(path)
    grid = (int(bank.header.grid_size[0]), int(bank.header.grid_size[1]))
    return Loaded(
        folder, manifest, import_tflite(path.read_bytes()), file, arena(file), scorers.largest, rows, grid, bank.nbytes,
        workspace_bytes(bank),
    )  # fmt: skip


def profile(
    build: Path,
    target_names: Sequence[str] = (),
    runtime: str = "tinyvad",
    frame: str | None = None,
    baseline: Path | None = None,
    max_growth: str = "3%",
) -> tuple[list[str], dict[str, Any]]:
    """(problems, figures) of a build.

    Args:
        target_names: presets, aliases or files, or "all"; none: the one that it was built for.
        runtime: one of ``RUNTIMES``.
        frame: camera frame to keep in RAM; None takes the build's.

    Returns:
        One line a broken limit or grown figure; the keys of ``report.profile``: one profile's own, or several as
        'profiles'.

    Raises:
        InputError: no target known, a runtime that a build cannot use, a malformed baseline or growth.
    """
    loaded = load_build(build)
    value = figures(loaded, find_targets(loaded, target_names), runtime, frame)
    several = len(value["profiles"]) > 1
    problems = [
        (f"runtime {one['runtime']}: " if several else "") + f"{problem}: {REMEDY}"
        for one in value["profiles"]
        for problem in one["budget"]["problems"]
    ]
    if baseline is not None:
        problems += compare_all(value, _read_baseline(baseline), _fraction(max_growth))
    if not several:
        value |= value.pop("profiles")[0]  # the keys that a profile of one target always had
    return problems, value


def find_targets(loaded: Loaded, names: Sequence[str]) -> list[Target]:
    """Targets by name, each once.

    Raises:
        InputError: no such target, or none given for a build that was made for none.
    """
    if ALL in names:
        return list_targets()
    if not names:
        own = loaded.manifest["target"] or {}
        name = own.get("alias") or own.get("name")
        if name is None:
            raise InputError(f"{loaded.folder} was built for no target; give --target NAME (see `tinyvad targets`)")
        names = [name]
    found = {target.name: target for target in map(load_target, names)}
    return list(found.values())


def figures(loaded: Loaded, targets: Sequence[Target], runtime: str, frame: str | None = None) -> dict[str, Any]:
    """Title, warnings and a profile a target and runtime (see ``report.profile``)."""
    frame = frame or loaded.manifest["settings"]["frame"]
    chosen = runtimes.RUNTIMES if runtime == "both" else (runtime,)
    return {
        "title": loaded.manifest["task"],
        "warnings": warnings_about(loaded.manifest["backbone"]),
        "profiles": [_figures(loaded, target, one, frame) for target in targets for one in chosen],
    }


def _figures(loaded: Loaded, target: Target, runtime: str, frame: str | None) -> dict[str, Any]:
    if runtime == "tflm":
        scratch = score_bytes(loaded.tap_rows, loaded.grid, loaded.scorer)
        planned = _arena(loaded, target)
        needs = runtimes.tflm_needs(planned, loaded.file.size, scratch, loaded.bank_in_flash(target), target, frame)
        memory = runtimes.arena_facts(planned, target.pointer_bytes)
        macs = loaded.arena.macs + loaded.scorer.macs(loaded.grid)
        time = latency.estimate(macs, target) if "cmsis_nn" in target.mac_per_cycle else None
    else:
        schedule = _schedule(loaded, target, frame)
        packing = runtimes.packing_of(target)
        key = packing, len(schedule.steps)
        if key not in loaded.flashes:
            loaded.flashes[key] = runtimes.model_flash_bytes(loaded.graph, schedule, packing)
        needs = runtimes.tinyvad_needs(
            schedule, loaded.flashes[key], loaded.bank_in_flash(target), target, frame,
            loaded.learning,
        )  # fmt: skip
        memory = runtimes.plan_facts(schedule)
        time = latency.estimate_runtime(_work(loaded, frame), target)
    profiled = {"runtime": runtime, "budget": needs.on(target).to_dict(), "memory": memory, "latency": time}
    training = loaded.manifest.get("training", {}).get("adaptation")
    return profiled if training is None else {**profiled, "training": on_target(training, target)}


def _arena(loaded: Loaded, target: Target) -> Arena:
    """TFLM's arena; targets with the same instructions share it."""
    key = target.core.startswith("cortex-m"), target.isa
    if key not in loaded.arenas:
        loaded.arenas[key] = runtimes.tflm_arena(loaded.file, target)
    return loaded.arenas[key]


def _schedule(loaded: Loaded, target: Target, frame: str | None) -> Schedule:
    """The plan that a build for the target gets; targets with as much room for an arena share it."""
    key = frame, arena_limit(target, frame, loaded.learning), runtimes.packing_of(target)
    if key not in loaded.schedules:
        taps = [(int(row[0]), int(row[1]), int(row[2])) for row in loaded.tap_rows]
        memory = scorer_memory(taps, loaded.grid, loaded.scorer, int(loaded.tap_rows[0][6]))
        strategy = loaded.manifest["settings"].get("plan", "auto")
        network = Network(loaded.graph, loaded.file, loaded.arena)
        loaded.schedules[key] = plan_memory(
            network, memory, Project(frame=frame, plan=strategy), target, loaded.learning
        )
    return loaded.schedules[key]


def _work(loaded: Loaded, frame: str | None) -> latency.Workload:
    _, height, width, _ = loaded.graph.tensors[loaded.graph.inputs[0]].shape
    camera = None if frame is None else parse_frame(frame)[:2]
    taps = [(int(row[0]), int(row[1]), int(row[2])) for row in loaded.tap_rows]
    return latency.combined(
        latency.frame_work((height, width), camera),
        latency.network_work(loaded.graph),
        latency.embedding_work(taps, loaded.grid, int(loaded.tap_rows[0][6]), loaded.scorer.kind in NATIVE),
        latency.scorer_work(loaded.scorer, loaded.depth, loaded.grid),
    )


def render(value: dict[str, Any], form: str) -> str:
    """The figures as 'table', 'json', 'markdown' or 'junit' text."""
    writers = {
        "table": formats.to_table, "json": formats.to_json, "markdown": formats.to_markdown, "junit": to_junit,
    }  # fmt: skip
    return writers[form](value)


def _read_baseline(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(one["budget"]["ram"], list) for one in value.get("profiles", [value])):
            raise TypeError
    except OSError as error:
        raise InputError(f"cannot read the baseline {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
