"""Feature-selective scoring and training of PaSTe: what comparing only a product's important channels does to quality.

    python benchmarks/feature_selective.py --data DIR --products bottle,toothbrush --weights FILE.onnx [--out FILE.md]

One student is fine-tuned on the products one after the other (the recipe of the detector; a fifth of the good images
chooses the epoch), then every product is scored with its own masks. 'scoring' masks a student that was trained on all
channels; 'training too' masks its loss as well. Controls: as many channels at random, and the least important ones. Every
figure is the mean over products and seeds, with the range of the seeds; nothing is smoothed, the image score is the map's
maximum.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from machine import machine

from tinyvad.backbones.source import open_backbone
from tinyvad.detectors.feature_importance import (
    Moments,
    importance,
    top_mask,
    without_clashing,
    without_shared,
)
from tinyvad.detectors.student import Paste
from tinyvad.files import write_text
from tinyvad.fitting_trained import held_out as chosen_for_holding_out
from tinyvad.images import Dataset, Preprocessing, find_datasets, load_images, read_mask, resize_mask
from tinyvad.metrics import auroc, f1_max
from tinyvad.model import upsample
from tinyvad.training.items import ChosenItems, FrozenItems
from tinyvad.training.loop import train
from tinyvad.training.student import student_layers

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_F1Max")
Masks = list[np.ndarray]  # one a layer
Rule = Callable[[list["Task"]], list[Masks]]


@dataclass(frozen=True, eq=False)
class Task:
    """A product: its items, split, and what its features look like."""

    dataset: Dataset
    train: ChosenItems
    held: ChosenItems
    test: FrozenItems
    moments: list[Moments]
    values: list[np.ndarray]  # importance, one a layer
    marked: list[int]  # test images whose pixels are known; none if the product has no masks
    masks: list[np.ndarray]  # (S, S) bool, one each


def read_task(dataset: Dataset, detector: Paste, preprocessing: Preprocessing) -> Task:
    def items(paths: list[Path]) -> FrozenItems:
        images = (preprocessing.float_input(image) for _, image in load_images(paths, preprocessing))
        return FrozenItems(detector.trunk, detector.targets, images)

    good = items(dataset.train_good)
    held = chosen_for_holding_out(len(good), detector.recipe.held_out, 0)
    kept = np.setdiff1d(np.arange(len(good)), held)
    moments = [Moments() for _ in detector.layers]
    for i in range(0, len(kept), 16):
        for sums, maps in zip(moments, good.take(kept[i : i + 16])[1:], strict=True):
            sums.update(maps)
    values = [importance(sums, np.random.default_rng(0)).values for sums in moments]
    size = (preprocessing.height, preprocessing.width)
    has_masks = any(sample.mask is not None for sample in dataset.test)
    marked = [i for i, s in enumerate(dataset.test) if has_masks and (s.label == 0 or s.mask is not None)]
    samples = [dataset.test[i] for i in marked]
    masks = [np.zeros(size, bool) if s.mask is None else resize_mask(read_mask(s.mask), *size) for s in samples]
    test = items([sample.path for sample in dataset.test])
    return Task(dataset, ChosenItems(good, kept), ChosenItems(good, held), test, moments, values, marked, masks)


def most(keep: float) -> Rule:
    return lambda tasks: [[top_mask(values, keep) for values in task.values] for task in tasks]


def least(keep: float) -> Rule:
    """As many channels of a cell as ``most`` keeps, those of the smallest importance."""
    return lambda tasks: [
        [_ranked(values, mask.sum(-1)) for values, mask in zip(task.values, masks)]
        for task, masks in zip(tasks, most(keep)(tasks))
    ]


def at_random(keep: float, seed: int) -> Rule:
    """As many channels of a cell as ``most`` keeps, any."""
    rng = np.random.default_rng(seed)
    return lambda tasks: [
        [_ranked(rng.random(values.shape), mask.sum(-1)) for values, mask in zip(task.values, masks)]
        for task, masks in zip(tasks, most(keep)(tasks))
    ]


def _ranked(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(H, W, C) bool: the ``counts`` smallest values of each cell."""
    return values.argsort(-1).argsort(-1) < counts[..., None]


def first_rule(keep: float) -> Rule:
    return lambda tasks: _by_task([without_shared(layer) for layer in zip(*most(keep)(tasks))])


def second_rule(keep: float, apart: bool) -> Rule:
    def masks(tasks: list[Task]) -> list[Masks]:
        layers = []
        for i, layer in enumerate(zip(*most(keep)(tasks))):
            lows, highs = [task.moments[i].low for task in tasks], [task.moments[i].high for task in tasks]
            layers.append(without_clashing(layer, lows, highs, apart=apart))
        return _by_task(layers)

    return masks


def _by_task(layers: list[list[np.ndarray]]) -> list[Masks]:
    return [list(masks) for masks in zip(*layers)]


def measured(detector: Paste, task: Task, masks: Masks | None, size: int) -> dict[str, float]:
    """Metrics of a product's test images, compared at its masks."""
    detector.masks = masks
    parts = [detector.maps(task.test.take(np.arange(i, min(i + 16, len(task.test))))) for i in range(0, len(task.test), 16)]
    maps = upsample(np.concatenate(parts), (size, size), 0.0)
    labels = np.array([sample.label for sample in task.dataset.test])
    found = {"image_AUROC": auroc(labels, maps.max((1, 2)))}
    if task.marked:
        pixels, scores = np.stack(task.masks).ravel(), maps[task.marked].ravel()
        found |= {"pixel_AUROC": auroc(pixels, scores), "pixel_F1Max": f1_max(pixels, scores)[0]}
    return found


def stream(make: Callable[[int], Paste], tasks: list[Task], masks: list[Masks | None], seed: int, epochs: int) -> Paste:
    """The student after all products; ``masks`` of its loss."""
    detector = make(seed)
    for task, chosen in zip(tasks, masks, strict=True):
        detector.masks = chosen
        train(detector, task.train, task.held, replace(detector.recipe, seed=seed, epochs=epochs))
    return detector


def row(name: str, share: float, found: list[list[dict[str, float]]]) -> str:
    """``found[seed][task]`` as a line: mean over tasks, then mean and spread over seeds."""
    cells = []
    for metric in METRICS:
        seeds = [np.mean([task[metric] for task in tasks if metric in task]) for tasks in found]
        cells.append(f"{np.mean(seeds):.3f} ({min(seeds):.3f} to {max(seeds):.3f})")
    return f"| {name} | {share:.1%} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--products", required=True)
    parser.add_argument("--backbone", default="mcunet-in3")
    parser.add_argument("--weights")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    shared, layers = student_layers(open_backbone(a.backbone, None, a.weights).graph_at(a.image_size))
    backbone = open_backbone(a.backbone, layers, a.weights)
    graph = backbone.graph_at(a.image_size)

    def make(seed: int) -> Paste:
        return Paste(graph, layers, shared, seed)

    preprocessing = Preprocessing(a.image_size, a.image_size, backbone.mean, backbone.std)
    datasets = {dataset.name: dataset for dataset in find_datasets(a.data)}
    names = a.products.split(",")
    tasks = [read_task(datasets[name], make(0), preprocessing) for name in names]
    seeds = range(a.seeds)
    none: list[Masks | None] = [None] * len(tasks)
    plain = [stream(make, tasks, none, seed, a.epochs) for seed in seeds]
    rules: list[tuple[str, Rule, bool]] = [
        *((f"top {keep} %", most(keep), keep in (10, 20)) for keep in (5, 10, 15, 20, 40, 60, 80)),
        ("20 % at random", at_random(20, 0), True),
        ("the least important 20 %", least(20), True),
        ("top 20 %, rule 1: shared ones dropped", first_rule(20), True),
        ("top 20 %, rule 2: shared and apart dropped", second_rule(20, True), True),
        ("top 20 %, rule 2: shared and overlapping dropped", second_rule(20, False), True),
    ]
    rows = [row("all, plain fine-tuning", 1.0, [[measured(d, t, None, a.image_size) for t in tasks] for d in plain])]
    for name, rule, too in rules:
        masks = rule(tasks)
        kept = float(np.mean([mask.mean() for chosen in masks for mask in chosen]))
        found = [[measured(d, t, m, a.image_size) for t, m in zip(tasks, masks)] for d in plain]
        rows.append(row(f"scoring: {name}", kept, found))
        if too:
            trained = [stream(make, tasks, list(masks), seed, a.epochs) for seed in seeds]
            found = [[measured(d, t, m, a.image_size) for t, m in zip(tasks, masks)] for d in trained]
            rows.append(row(f"training too: {name}", kept, found))
        print("\n".join(rows[-2:]), flush=True)
    alone: list[str] = []
    for name, rule in (("all", None), ("top 20 %", most(20)), ("20 % at random", at_random(20, 0))):
        chosen = none if rule is None else list(rule(tasks))
        kept = float(np.mean([1.0 if masks is None else np.mean([mask.mean() for mask in masks]) for masks in chosen]))
        found = []
        for seed in seeds:
            own = [stream(make, [t], [m], seed, a.epochs) for t, m in zip(tasks, chosen)]
            found.append([measured(d, t, m, a.image_size) for d, t, m in zip(own, tasks, chosen)])
        alone.append(row(name, kept, found))
    head = f"| masks | channels kept | {' | '.join(METRICS)} |\n|{'---|' * (2 + len(METRICS))}"
    lines = [
        "# Feature-selective PaSTe",
        "",
        machine(["numpy", "autograd"]),
        "",
        f"`feature_selective.py --data DIR --products {a.products} --seeds {a.seeds}`: {a.epochs} epochs, "
        f"{a.backbone}, {a.image_size} px, shared {shared}, layers {', '.join(layers)}; {os.cpu_count()} cores. Mean over "
        f"products, then mean and range over {a.seeds} seeds.",
        "",
        f"## One student, fine-tuned on {', then '.join(names)}",
        "",
        head,
        *rows,
        "",
        "## A student a product",
        "",
        head,
        *alone,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if a.out is not None:
        write_text(a.out, text)


if __name__ == "__main__":
    main()
