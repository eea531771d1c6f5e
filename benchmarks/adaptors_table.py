"""CFA and SimpleNet, a model a category, beside the published figures of CFA.

    python benchmarks/adaptors_table.py --data DIR --mcunet FILE.onnx --published FILE.csv --out DIR

MCUNet-in3, taps 2, 6 and 14, the methods' own recipes. Trained on train/good alone: a fifth of it is held out and chooses
the epoch; nothing is chosen on test images. Maps are resized to the network's input and smoothed (sigma 4); the image score
is the largest value. "int8": the same scoring, in float, of the maps that the exact int8 engine gives. Writes adaptors.md.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from tinyvad.backbones.source import open_backbone
from tinyvad.calibration import CALIBRATION_IMAGES, quantize_on
from tinyvad.detectors.cfa import Cfa, anomaly_map
from tinyvad.detectors.simplenet import SimpleNet
from tinyvad.engines.int8 import Int8Engine
from tinyvad.files import write_text
from tinyvad.images import Preprocessing, apply_table, find_datasets, read_mask
from tinyvad.metrics import image_metrics, pixel_metrics
from tinyvad.model import upsample
from tinyvad.resize import resize_mask
from tinyvad.training.items import ChosenItems, FrozenItems
from tinyvad.training.loop import train

BATCH = 8
TAPS = (2, 6, 14)
SHOWN = (("image_AUROC", "img_roc_auc"), ("pixel_F1Max", "f1_pxl"), ("pixel_AUROC", "per_pixel_rocauc"))
CASES: tuple[tuple[type[Cfa] | type[SimpleNet], int], ...] = ((Cfa, 28), (SimpleNet, 28), (Cfa, 56))  # cells a side


def measure(kind: type[Cfa] | type[SimpleNet], cells: int, arguments: argparse.Namespace, category: str) -> dict[str, Any]:
    """Train on a category and test, in float and with the int8 network."""
    (dataset,) = find_datasets(arguments.data / category)
    size = arguments.image_size
    backbone = open_backbone(arguments.mcunet, [f"block:{number}" for number in TAPS])
    preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
    detector = kind(backbone.graph_at(size), cells, arguments.seed)

    def pictures(paths: Sequence[Path]) -> Iterator[np.ndarray]:
        return (preprocessing.uint8_input(path) for path in paths)

    def frozen(paths: Sequence[Path]) -> FrozenItems:
        return FrozenItems(detector.trunk, None, (preprocessing.float_input(picture) for picture in pictures(paths)))

    good, test = frozen(dataset.train_good), frozen([sample.path for sample in dataset.test])
    order = np.random.default_rng(arguments.seed).permutation(len(good))
    held = max(round(detector.recipe.held_out * len(good)), 1)
    recipe = replace(detector.recipe, seed=arguments.seed)
    trained = train(detector, ChosenItems(good, np.sort(order[held:])), ChosenItems(good, np.sort(order[:held])), recipe)
    chosen = np.linspace(0, len(good) - 1, min(CALIBRATION_IMAGES, len(good))).round().astype(int)
    calibrated = quantize_on(detector.graph(), preprocessing, pictures([dataset.train_good[i] for i in chosen]))
    engine = Int8Engine(calibrated.graph)
    grid = calibrated.graph.tensors[calibrated.graph.outputs[0]].quantization
    assert grid is not None
    real, levels = [], []
    for start in range(0, len(test), BATCH):
        rows = np.arange(start, min(start + BATCH, len(test)))
        real.append(detector.maps(test.take(rows)))
        images = np.stack(list(pictures([dataset.test[i].path for i in rows])))
        (found,) = engine.features(apply_table(images, calibrated.table))
        levels.append(scored(detector, (found - grid.zero_point) * grid.scale))
    labels = [sample.label for sample in dataset.test]
    empty = np.zeros((size, size), bool)
    masks = [empty if s.mask is None else resize_mask(read_mask(s.mask), size, size) for s in dataset.test]
    row: dict[str, Any] = {"method": detector.method, "cells": cells, "category": category, "trained": trained}
    for name, maps in (("float", real), ("int8", levels)):
        shown = upsample(np.concatenate(maps), (size, size))
        row[name] = image_metrics(labels, shown.max((1, 2))) | pixel_metrics(masks, shown)
    return row


def scored(detector: Cfa | SimpleNet, maps: np.ndarray) -> np.ndarray:
    """(n, H, W) anomaly maps of the exported network's maps."""
    if isinstance(detector, SimpleNet):
        weights, offset = detector.output_layer()
        return offset - maps @ weights
    rows, columns = detector.coordinate_offsets()
    return anomaly_map((maps + rows[:, None] + columns).astype(np.float32), detector.centres())


def line(row: dict[str, Any], published: dict[str, str] | None) -> str:
    trained = row["trained"]
    cells = [row["method"], f"{row['cells']} x {row['cells']}", row["category"]]
    for ours, theirs in SHOWN:
        told = f"{row['float'][ours]:.3f} / {row['int8'][ours]:.3f}"
        cells.append(told if published is None else f"{told} / {float(published[theirs]):.3f}")
    cells += [f"{trained.best + 1} of {len(trained.history)}", f"{trained.seconds_per_epoch:.1f}"]
    return "| " + " | ".join([*cells, f"{trained.peak_bytes / 1e6:.0f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of categories")
    parser.add_argument("--categories", default="bottle,toothbrush")
    parser.add_argument("--mcunet", type=Path, required=True)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.published.open() as file:
        published = {
            (row["ad_model"], row["category"]): row
            for row in csv.DictReader(file)
            if row["backbone"] == "MCUNet" and row["feature_layers"] == str(list(TAPS))
        }
    lines = [
        "# CFA and SimpleNet, a model a category",
        "",
        machine(["numpy", "numba", "autograd"]),
        "",
        *(__doc__ or "").splitlines()[2:],
        "",
        "Each figure: float / int8 / published, where there is one (a run of the public PaSTe benchmark, 56 x 56 cells).",
        "",
        "| method | map | category | image AUROC | pixel F1 | pixel AUROC | best epoch of | s / epoch | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, cells in CASES:
        for category in arguments.categories.split(","):
            row = measure(kind, cells, arguments, category)
            lines.append(line(row, published.get((row["method"], category))))
            print(lines[-1], flush=True)
            write_text(arguments.out / "adaptors.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
