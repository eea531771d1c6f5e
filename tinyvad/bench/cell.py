"""One cell: a method goes through a stream of tasks and is tested on all products seen after each.

Flows in: a ``Cell``. Flows out: plain values for JSON: a matrix R a metric, how images were routed, bytes after each task;
and, apart from them, seconds. The same cell gives the same values on any machine of the same kind, in any company.

Features are those of the exact int8 engine; the network is calibrated and the embedding's ranges are set on the first task,
as in a build. Figures are those of ``tinyvad eval``: image scores are the largest cell, pixels those of the smoothed map.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bench.features import Network, Pictures, SeveralTaps, open_network, open_taps
from tinyvad.bench.grid import Cell, open_stream
from tinyvad.bench.run import Done
from tinyvad.continual.base import Context, ContinualMethod
from tinyvad.continual.matrix import ScoreMatrix
from tinyvad.continual.methods import make_method
from tinyvad.continual.streams import Stream, mask_of
from tinyvad.embedding import Embedding
from tinyvad.evaluate import quality
from tinyvad.fitting import MethodPlan, TapStore, make_embedding
from tinyvad.images import Dataset, find_datasets
from tinyvad.metrics import f1_floor
from tinyvad.model import upsample

FORMAT = "tinyvad-bench-cell/1"


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings (n, H, W, D) int8 of stored maps, as often as they are asked for."""

    store: TapStore
    embedding: Embedding

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.store.embeddings(self.embedding)


@dataclass(frozen=True, eq=False)
class Tested:
    """A unit's test images: ``marked`` are those whose pixels are known, ``masks`` theirs."""

    labels: np.ndarray
    marked: np.ndarray
    masks: list[np.ndarray]


def run_cell(cell: Cell) -> Done:
    """Run one cell.

    Raises:
        InputError: images that can't be read, or settings that don't fit the embedding. CheckFailed: a budget too small.
    """
    clock = Clock()
    root, cache = Path(cell.data), Path(cell.cache)
    stream = open_stream(cell.stream, cell.order, cell.seed, datasets_of(root))
    good = [Pictures(unit, unit.dataset.train_good, root, stream.seed) for unit in stream.units]
    bad = [Pictures(unit, [s.path for s in unit.dataset.test], root, stream.seed) for unit in stream.units]
    first = [pictures for pictures, step in zip(good, stream.step_of) if step == 0]
    network = open_network(cell.backbone.name, cell.backbone.image_size, first, cache)
    train = [open_taps(network, pictures, cache) for pictures in good]
    test = [open_taps(network, pictures, cache) for pictures in bad]
    steps = range(len(stream.tasks))
    clock.lap("features")
    learnt = [SeveralTaps([train[u] for u, owner in enumerate(stream.step_of) if owner == step]) for step in steps]
    embedding = embedding_of(learnt[0], network, cell)
    context = Context(embedding.steps, network.tensors[-1].shape[3], len(stream.tasks), cell.seed)
    method = make_method(cell.method.name, context, json.loads(cell.method.settings))
    size = (cell.backbone.image_size, cell.backbone.image_size)
    pixels = any(name.startswith("pixel") for name in cell.metrics)
    known = [tested(stream, u, size if pixels else None) for u in range(len(stream.units))]
    clock.lap("masks")
    values = {name: np.full((len(stream.tasks), len(stream.units)), np.nan) for name in cell.metrics}
    before: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
    routing: list[float | None] = []
    counts: list[list[int]] = []
    nbytes, device_nbytes = [], []
    for step, task in enumerate(stream.tasks):
        method.learn(task.product, Embedded(learnt[step], embedding))
        clock.lap(f"learn {step}")
        shares, counts = [], []
        for unit in (u for u, owner in enumerate(stream.step_of) if owner <= step):
            maps, chosen = scored(method, Embedded(test[unit], embedding), stream.given_task(unit))
            right = stream.tasks[stream.step_of[unit]].product
            shares.append(share_right(chosen, method.task_names, right))
            counts.append(np.bincount(chosen[chosen >= 0], minlength=len(method.task_names)).tolist())
            clock.lap(f"score {step}")
            if unit not in before or not np.array_equal(before[unit][0], maps):  # else the same maps, the same figures
                before[unit] = (maps, figures(known[unit], maps, size))
            for name in cell.metrics:
                value = before[unit][1][name]
                values[name][step, unit] = np.nan if value is None else value
            clock.lap(f"metrics {step}")
        routing.append(None if None in shares else float(np.mean([s for s in shares if s is not None])))
        nbytes.append(method.nbytes())
        device = getattr(method, "device_nbytes", None)
        device_nbytes.append(None if device is None else device())
    chance = {name: chance_of(name, known) for name in cell.metrics}
    names = [task.name for task in stream.tasks], [unit.name for unit in stream.units]
    matrices = [
        ScoreMatrix(name, tuple(names[0]), tuple(names[1]), stream.step_of, values[name], chance[name])
        for name in cell.metrics
    ]
    result = {
        "format": FORMAT,
        "stream": cell.stream.name,
        "protocol": cell.stream.protocol,
        "order": cell.order_name,
        "task_identity": stream.task_identity,
        "seed": cell.seed,
        "method": cell.method.name,
        "label": cell.method.label,
        "settings": json.loads(cell.method.settings),
        "backbone": cell.backbone.label,
        "image_size": cell.backbone.image_size,
        "grid": list(embedding.grid),
        "depth": embedding.depth,
        "matrices": [matrix.to_dict() for matrix in matrices],
        "routing": routing,
        "routed": {"tasks": list(method.task_names), "counts": counts if routing[-1] is not None else None},
        "bytes": nbytes,
        "device_bytes": None if None in device_nbytes else device_nbytes,
    }
    return Done(result, clock.seconds)


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last call was spent on ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@lru_cache(maxsize=2)
def datasets_of(root: Path) -> list[Dataset]:
    """The categories, looked up once a process."""
    return find_datasets(root)


def embedding_of(first: TapStore, network: Network, cell: Cell) -> Embedding:
    """The embedding whose units hold what the first task showed, on the cell's grid or that of the coarsest tapped map."""
    tensors = network.tensors
    coarsest = min((tensor.shape[1], tensor.shape[2]) for tensor in tensors)
    grid = coarsest if cell.method.grid is None else (cell.method.grid, cell.method.grid)
    return make_embedding(first, tensors, MethodPlan(cell.method.name, grid, {}, 0))


def tested(stream: Stream, number: int, size: tuple[int, int] | None) -> Tested:
    """Labels and masks of a unit's test images; no masks where the category has none, or without ``size``."""
    unit = stream.units[number]
    samples = unit.dataset.test
    labels = np.array([sample.label for sample in samples])
    if size is None or all(sample.mask is None for sample in samples):
        return Tested(labels, np.zeros(0, np.int64), [])
    masks = [mask_of(unit, sample, *size) for sample in samples]
    marked = np.array([i for i, mask in enumerate(masks) if mask is not None])
    return Tested(labels, marked, [mask for mask in masks if mask is not None])


def scored(method: ContinualMethod, embeddings: Embedded, task: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, H, W) maps, and the tasks that were chosen: (n,) or (n, H, W)."""
    parts = [method.score(batch, task) for batch in embeddings]
    return np.concatenate([part.maps for part in parts]), np.concatenate([part.tasks for part in parts])


def figures(known: Tested, maps: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """All figures of a unit, those of ``tinyvad eval``."""
    return quality(known.labels, maps.max((1, 2)), known.masks, list(upsample(maps[known.marked], size)))


def share_right(chosen: np.ndarray, names: Sequence[str], right: str) -> float | None:
    """Share of images (or patches) that were scored by a task of their own product; None where nothing was chosen."""
    if (chosen < 0).any():
        return None
    return float(np.mean([names[task] == right for task in chosen.reshape(-1)]))


def chance_of(metric: str, known: Sequence[Tested]) -> np.ndarray | None:
    """(U) what each unit scores without any learning: AUROC .5, F1 its floor; None for the others."""
    if metric.endswith("AUROC"):
        return np.full(len(known), 0.5)
    if metric == "image_F1Max":
        return np.array([f1_floor(one.labels) for one in known])
    if metric == "pixel_F1Max":
        return np.array([f1_floor(np.array(one.masks).reshape(-1)) if one.masks else np.nan for one in known])
    return None
