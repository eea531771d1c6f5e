"""``tinyvad profile --sweep``: what variants of a build would cost and find, before any of them is built.

Flows in: a build or a backbone, axes such as ``image-size=96..224`` and ``bank-bytes=32K,64K``, a target. Flows out: a
``Point`` a variant with RAM, flash and latency, planned without fitting (sizes depend on shapes alone), and the Pareto
front. With labelled images each variant that fits is fitted and evaluated; with good images alone a network at a size
gets the AUROC of made-up defects (``tinyvad.probing``).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tinyvad import fitting
from tinyvad.backbones.source import AUTO, Backbone, open_backbone
from tinyvad.detectors import METHODS
from tinyvad.errors import CheckFailed, InputError
from tinyvad.files import write_text
from tinyvad.firmware_sim.targets import load_target
from tinyvad.images import Dataset, find_datasets
from tinyvad.model import BACKBONES, read_manifest
from tinyvad.project import TRAINED, parse_bytes
from tinyvad.report import sweep as report
from tinyvad.variants import Planned, Point, Setting, mark_front

PLANNED = tuple(method for method in METHODS if method not in TRAINED)  # a trained method's network is part of the plan
AXES = ("image-size", "bank-bytes", "grid", "backbone", "method")
STEP = 16  # pixels between the sizes of a range
SIZES = (32, 1024)
MOST_POINTS = 2000
IMAGE_SIZE = 160  # pixels, where neither an axis nor a build says
IMAGES = 100  # good images that are assumed where there are none to count: they bound a PatchCore bank
Tell = Callable[[str, int, int], None]


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Axes with their values, e.g. ``image-size=96..224``, ``96..224:32`` (a step), ``96,128``, ``bank-bytes=32K,64K``.

    Raises:
        InputError: an unknown axis, one given twice, or a value it cannot have.
    """
    axes: dict[str, list[Any]] = {}
    for text in (word for words in texts for word in words.split()):
        name, _, values = text.partition("=")
        name = name.strip().replace("_", "-")
        if name not in AXES or not values:
            raise InputError(f"--sweep {text!r}: write AXIS=VALUES with one of {', '.join(AXES)}")
        if name in axes:
            raise InputError(f"--sweep {name} is given twice; list its values with commas")
        found = [one for value in values.split(",") for one in _values(name, value.strip(), text)]
        axes[name] = list(dict.fromkeys(found))
    if not axes:
        raise InputError(f"--sweep has no axis: write AXIS=VALUES with one of {', '.join(AXES)}")
    return axes


def _values(axis: str, value: str, text: str) -> list[Any]:
    if axis == "bank-bytes":
        return [parse_bytes(value, f"--sweep {text}")]
    if axis == "method":
        if value not in METHODS:
            raise InputError(f"--sweep {text}: no method called {value}; choose among {', '.join(PLANNED)}")
        if value in TRAINED:
            raise InputError(f"--sweep {text}: {value} trains a network of its own; choose among {', '.join(PLANNED)}")
        return [value]
    if axis == "backbone":
        if value == AUTO:
            raise InputError(f"--sweep {text}: name the backbones (`tinyvad backbones` lists them)")
        return [value]
    low, high = SIZES if axis == "image-size" else (1, 128)
    ends, _, step = value.partition(":")
    first, dots, last = ends.partition("..")
    try:
        start, stop = int(first), int(last if dots else first)
        stride = int(step) if step else STEP if axis == "image-size" else 1
    except ValueError as error:
        raise InputError(f"--sweep {text}: {value!r} is no whole number and no range such as 96..224") from error
    if not low <= start <= stop <= high or stride < 1:
        raise InputError(f"--sweep {text}: choose {low} to {high}, the smaller first")
    return list(range(start, stop + 1, stride))


def run_sweep(
    builds: Sequence[Path], axes: Sequence[str], targets: Sequence[str], runtime: str, frame: str | None, form: str,
    backbone: str | None, data: Path | None, picture: Path | None, seconds: int, tell: Tell,
) -> str:  # fmt: skip
    """The sweep of the command line as text; see ``tinyvad profile --help``.

    Raises:
        InputError: wrong axes or settings, or images that can't be read.
    """
    values = parse_axes(axes)
    if len(builds) > 1 or len(targets) > 1 or form == "junit":
        several = "one BUILD" if len(builds) > 1 else "one --target"
        raise InputError(f"--sweep takes {'--format table, json or markdown' if form == 'junit' else several}")
    if picture is not None and picture.suffix.lower() != ".svg":
        raise InputError(f"--picture {picture}: the picture is an .svg; name it so")
    dataset = None if data is None else _dataset(data)
    setting, own = _setting(builds, targets, runtime, frame, dataset)
    backbones = [open_backbone(name) for name in values.get("backbone", [])]
    backbones = backbones or [own if own is not None and backbone is None else open_backbone(backbone)]
    points, plans = _plan(setting, backbones, values, tell)
    notes: list[str] = []
    if dataset is not None:
        points, notes = _measure(points, plans, backbones, dataset, seconds, tell)
    points = mark_front(points)
    value = {
        "target": setting.target.name,
        "alias": setting.target.alias,
        "runtime": setting.runtime,
        "frame": setting.frame,
        "ram_available": setting.target.ram_bytes,
        "flash_available": setting.target.flash_bytes,
        "axes": values,
        "notes": notes,
        "points": [asdict(point) for point in points],
    }
    if picture is not None:
        write_text(picture, report.picture(value))
    if form == "json":
        return json.dumps(value, indent=1) + "\n"
    return report.to_markdown(value) if form == "markdown" else report.to_table(value)


def _dataset(data: Path) -> Dataset:
    found = find_datasets(data)
    if len(found) > 1:
        names = ", ".join(str(data / one.name) for one in found[:3])
        raise InputError(f"--data {data} holds {len(found)} categories; a sweep takes one of them, e.g. {names}")
    return found[0]


def _setting(
    builds: Sequence[Path], targets: Sequence[str], runtime: str, frame: str | None, dataset: Dataset | None
) -> tuple[Setting, Backbone | None]:
    """What is fixed: the build's own choices, or a build's defaults; and the build's float network."""
    manifest: dict[str, Any] = read_manifest(builds[0]) if builds else {"target": None, "settings": {"frame": None}}
    own = manifest["target"] or {}
    name = targets[0] if targets else own.get("alias") or own.get("name")
    if name is None:
        raise InputError("a sweep needs a target: give --target NAME (see `tinyvad targets`), or a BUILD made for one")
    settings = manifest["settings"]
    setting = Setting(
        target=load_target(name),
        runtime="tinyvad" if runtime == "both" else runtime,
        frame=frame or settings["frame"],
        n_good=IMAGES if dataset is None else len(dataset.train_good),
        image_size=IMAGE_SIZE,
        grid=settings.get("grid"),
        bank_bytes=settings.get("bank_bytes"),
        seed=settings.get("seed", 0),
    )
    if not builds:
        return setting, None
    facts, pixels = manifest["backbone"], manifest["preprocessing"]
    if manifest["method"]["name"] in TRAINED:
        raise InputError(
            f"{builds[0]} has a trained network ({manifest['method']['name']}), which no sweep can change: leave BUILD out "
            "and name --target and --backbone"
        )
    mean, std = ((float(v[0]), float(v[1]), float(v[2])) for v in (pixels["mean"], pixels["std"]))
    network = open_backbone(builds[0] / BACKBONES["onnx"], facts["layers"], None, mean, std)
    network = replace(network, name=facts["name"], quality=facts.get("quality"))
    n_good = setting.n_good if dataset is not None else manifest.get("training", {}).get("n_good", IMAGES)
    return replace(setting, n_good=n_good, image_size=pixels["height"], method=manifest["method"]["name"]), network


Plans = list[tuple[Backbone, fitting.MethodPlan]]


def _plan(
    setting: Setting, backbones: Sequence[Backbone], axes: dict[str, list[Any]], tell: Tell
) -> tuple[list[Point], Plans]:
    """A point each variant that a method can have at all; what is smaller than its smallest bank is left out."""
    sizes = axes.get("image-size", [setting.image_size])
    rest = [axes.get(name, [None]) for name in ("bank-bytes", "grid", "method")]
    total = len(backbones) * len(sizes) * len(rest[0]) * len(rest[1]) * len(rest[2])
    if total > MOST_POINTS:
        raise InputError(f"--sweep asks for {total} variants, more than {MOST_POINTS}; use fewer values")
    points: dict[Any, Point] = {}
    plans: dict[Any, tuple[Backbone, fitting.MethodPlan]] = {}
    reason, done = "", 0
    for backbone, size in itertools.product(backbones, sizes):
        planned = Planned(backbone, size)
        for bank_bytes, grid, method in itertools.product(*rest):
            one = replace(
                setting, bank_bytes=bank_bytes or setting.bank_bytes, grid=grid or setting.grid,
                method=method or setting.method,
            )  # fmt: skip
            try:
                point, bank = planned.point(one)
            except CheckFailed as error:
                reason = str(error)
            else:
                key = point.backbone, size, point.method, point.grid, json.dumps(point.settings, sort_keys=True)
                points.setdefault(key, point)
                plans.setdefault(key, (backbone, bank))
            done += 1
            tell("plan", done, total)
    if not points:
        raise InputError(f"--sweep: no variant is possible: {reason}")
    return list(points.values()), list(plans.values())


def _measure(
    points: list[Point], plans: Plans, backbones: Sequence[Backbone], dataset: Dataset, seconds: int, tell: Tell
) -> tuple[list[Point], list[str]]:
    """The points that fit with their AUROC, within the time; a line on what was not measured."""
    from tinyvad.probing import Probe
    from tinyvad.rehearsal import Rehearsal

    labelled = len({sample.label for sample in dataset.test}) == 2
    notes = [] if labelled else ["no labelled defects: AUROC of made-up defects on good images, by network and size alone"]
    groups: dict[tuple[str, int], list[int]] = {}
    for i, point in enumerate(points):
        if not point.problem:
            groups.setdefault((point.backbone, point.image_size), []).append(i)
    result, start, longest, missed = list(points), time.monotonic(), 0.0, 0
    probe = None if labelled else Probe(dataset.train_good)
    for members in groups.values():
        begun = time.monotonic()
        if begun - start + longest > seconds:
            missed += len(members)
            continue
        backbone, size = plans[members[0]][0], points[members[0]].image_size
        stage = f"{backbone.name[:9]} {size} px"
        if probe is not None:
            figure = probe.score(backbone, size, partial(tell, stage))
            for i in members:
                result[i] = replace(points[i], made_up=figure)
        else:
            rehearsal = Rehearsal(backbone, size, dataset, tell=partial(tell, stage))
            for n, i in enumerate(members):
                result[i] = replace(points[i], auroc=rehearsal.auroc(plans[i][1]))
                tell(f"fit {size} px", n + 1, len(members))
        longest = max(longest, time.monotonic() - begun)
    if missed:
        notes.append(f"{missed} variants were not measured: {seconds} s were up; give more --seconds")
    return result, notes
