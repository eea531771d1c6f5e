"""STFPM and PaSTe in float, a model a category, beside the published figures of STFPM.

    python benchmarks/students_table.py --data DIR --mcunet FILE.onnx --mobilenet FILE.onnx --published FILE.csv --out DIR

Trained on train/good alone: a fifth of it is held out and chooses the epoch; nothing is chosen on test images. Two
recipes, both SGD, learning rate 0.4, momentum 0.9, weight decay 1e-4: the thesis' (batch 8, 10 epochs) and STFPM's own
(batch 32, 100 epochs). Image score: the largest value of the map at the network's input size. Writes students.md and
students.csv; rows that are in students.csv already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from tinyvad.backbones.source import Backbone, open_backbone
from tinyvad.detectors.student import Paste, Stfpm
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.export.onnx import to_onnx
from tinyvad.files import write_text
from tinyvad.images import Preprocessing, find_datasets, read_mask
from tinyvad.metrics import image_metrics, pixel_metrics
from tinyvad.model import upsample
from tinyvad.resize import resize_mask
from tinyvad.training.items import ChosenItems, FrozenItems
from tinyvad.training.loop import train

BATCH = 16
SHOWN = (("image_AUROC", "img_roc_auc"), ("pixel_F1Max", "f1_pxl"), ("pixel_AUROC", "per_pixel_rocauc"))
GOAL = 0.03
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One line: a detector, its taps in the papers' numbers, and the published taps nearest to them."""

    method: str
    network: str
    taps: tuple[int, ...]
    shared: int | None
    published: str


CASES = (
    Case("paste", "MCUNet", (6, 10, 14), 5, "[6, 9, 12]"),
    Case("paste", "MCUNet", (6, 9, 13), 5, "[6, 9, 12]"),  # tinyvad's own choice
    Case("stfpm", "MCUNet", (6, 9, 12), None, "[6, 9, 12]"),
    Case("stfpm", "MCUNet", (3, 6, 9), None, "[3, 6, 9]"),
    Case("paste", "MobileNet", (7, 10, 14), 6, "[7, 10, 13]"),
    Case("paste", "MobileNet", (7, 10, 13), 6, "[7, 10, 13]"),  # tinyvad's own choice
    Case("stfpm", "MobileNet", (7, 10, 13), None, "[7, 10, 13]"),
    Case("stfpm", "MobileNet", (4, 7, 10), None, "[4, 7, 10]"),
)
FIRST_END = {"MCUNet": 0, "MobileNet": 1}  # the papers' number of the first block end: MobileNetV2's 0 is its stem
RECIPES: dict[str, dict[str, Any]] = {"10 epochs": {}, "100 epochs": {"batch": 32, "epochs": 100, "patience": 100}}


def layer(case: Case, number: int) -> str:
    return f"block:{number - FIRST_END[case.network]}"


def opened(case: Case, files: dict[str, Path], size: int, seed: int) -> tuple[Stfpm, Backbone]:
    backbone = open_backbone(files[case.network], [layer(case, number) for number in case.taps])
    graph = backbone.graph_at(size)
    if case.shared is None:
        return Stfpm(graph, seed=seed), backbone
    return Paste(graph, shared=layer(case, case.shared), seed=seed), backbone


def inputs(paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[np.ndarray]:
    return (preprocessing.float_input(preprocessing.uint8_input(path)) for path in paths)


def measure(case: Case, recipe_name: str, category: Path, files: dict[str, Path], size: int, seed: int) -> Row:
    """Train on one category and test."""
    (dataset,) = find_datasets(category)
    detector, backbone = opened(case, files, size, seed)
    recipe = replace(detector.recipe, **RECIPES[recipe_name])
    preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
    items = FrozenItems(detector.trunk, detector.targets, inputs(dataset.train_good, preprocessing))
    order = np.random.default_rng(seed).permutation(len(items))
    held = max(round(recipe.held_out * len(items)), 1)
    start = time.perf_counter()
    trained = train(detector, ChosenItems(items, np.sort(order[held:])), ChosenItems(items, np.sort(order[:held])), recipe)
    seconds = time.perf_counter() - start
    quality = tested(detector, dataset, preprocessing)
    told: Row = {
        "method": case.method, "backbone": case.network, "taps": str(list(case.taps)), "shared": case.shared,
        "recipe": recipe_name, "size": size, "seed": seed, "category": dataset.name, "epochs": len(trained.history),
        "best": trained.best + 1, "loss": trained.history[trained.best].loss,
        "held_out": trained.history[trained.best].held_out, "seconds_per_epoch": seconds / len(trained.history),
        "peak_MB": trained.peak_bytes / 1e6,
    }  # fmt: skip
    return told | quality


def tested(detector: Stfpm, dataset: Any, preprocessing: Preprocessing) -> Row:
    """Metrics of the test images, by the exported float network in onnxruntime."""
    from tinyvad.detectors.student import distance_product

    engine = OnnxEngine(to_onnx(detector.graph()).SerializeToString(), threads=1)
    pairs = len(detector.layers)
    size = (preprocessing.height, preprocessing.width)
    shown: list[np.ndarray] = []
    paths = [sample.path for sample in dataset.test]
    for start in range(0, len(paths), BATCH):
        maps = engine.features(np.stack(list(inputs(paths[start : start + BATCH], preprocessing))))
        shown.extend(upsample(distance_product(maps[:pairs], maps[pairs:]), size, 0.0))
    labels = [sample.label for sample in dataset.test]
    empty = np.zeros(size, bool)
    masks = [empty if s.mask is None else resize_mask(read_mask(s.mask), *size) for s in dataset.test]
    return image_metrics(labels, [float(m.max()) for m in shown]) | pixel_metrics(masks, shown)


def published_rows(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["ad_model"] == "stfpm"]
    return {(row["backbone"], row["feature_layers"], row["category"]): row for row in rows}


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("method", "backbone", "taps", "recipe", "size", "seed", "category"))


def write(table: list[Row], published: dict[tuple[str, str, str], dict[str, str]], out: Path) -> None:
    with (out / "students.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    lines = [
        "# STFPM and PaSTe, a model a category",
        "",
        machine(["numpy", "numba", "autograd"]),
        "",
        *(__doc__ or "").splitlines()[2:],
        "",
        "Each figure: ours / published STFPM at the taps named / difference; bold below the published one by more than",
        f"{GOAL}. Published figures: one run of the public PaSTe benchmark, with other ImageNet weights of MobileNetV2.",
        "Seconds: other programs ran beside.",
        "",
        "How to read the bold ones: the published size is not stated; compare the rows at 256 px, where maps have finer",
        "cells. There are no published rows of PaSTe: what sharing costs is the difference to our STFPM at the same taps.",
        "",
        "| method | backbone | taps | shared | px | recipe | category | published at | image AUROC | pixel F1 | "
        "pixel AUROC | best epoch of | s / epoch | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    near = {(case.method, case.network, str(list(case.taps))): case.published for case in CASES}
    for row in sorted(table, key=lambda row: (row["backbone"], row["method"], row["taps"], row["category"], row["recipe"])):
        taps = near[row["method"], row["backbone"], row["taps"]]
        other = published.get((row["backbone"], taps, row["category"]))
        cells = []
        for ours, theirs in SHOWN:
            value = float(row[ours])
            cells.append(f"{value:.3f}" if other is None else compared(value, float(other[theirs])))
        cells.append(f"{row['best']} of {row['epochs']}")
        cells += [f"{float(row['seconds_per_epoch']):.1f}", f"{float(row['peak_MB']):.0f}"]
        names = ("method", "backbone", "taps", "shared", "size", "recipe", "category")
        lines.append("| " + " | ".join([*(str(row[name]) for name in names), taps, *cells]) + " |")
    write_text(out / "students.md", "\n".join(lines) + "\n")


def compared(ours: float, theirs: float) -> str:
    text = f"{ours:.3f} / {theirs:.3f} / {ours - theirs:+.3f}"
    return f"**{text}**" if ours < theirs - GOAL else text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of categories")
    parser.add_argument("--categories", default="bottle,toothbrush")
    parser.add_argument("--mcunet", type=Path, required=True)
    parser.add_argument("--mobilenet", type=Path, required=True)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--cases", help="numbers of the lines to make, from 0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = {"MCUNet": arguments.mcunet, "MobileNet": arguments.mobilenet}
    published = published_rows(arguments.published)
    table: list[Row] = []
    if (arguments.out / "students.csv").exists():
        with (arguments.out / "students.csv").open() as file:
            table = list(csv.DictReader(file))
    cases = [CASES[int(i)] for i in arguments.cases.split(",")] if arguments.cases else list(CASES)
    for recipe in arguments.recipes.split(","):
        for case in cases:
            for category in arguments.categories.split(","):
                known = {
                    "method": case.method, "backbone": case.network, "taps": str(list(case.taps)), "recipe": recipe,
                    "size": arguments.image_size, "seed": arguments.seed, "category": category,
                }  # fmt: skip
                if key_of(known) not in [key_of(row) for row in table]:
                    row = measure(case, recipe, arguments.data / category, files, arguments.image_size, arguments.seed)
                    table.append(row)
                    told = (*known, "best", "epochs", *(ours for ours, _ in SHOWN))
                    print({name: row[name] for name in told}, flush=True)
                    write(table, published, arguments.out)
    write(table, published, arguments.out)


if __name__ == "__main__":
    main()
