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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bench.features import Network, Pictures, SeveralTaps, open_network, open_taps
from tinyvad.bench.grid import Cell, StreamSpec, data_key_of, open_stream
from tinyvad.bench.run import Done
from tinyvad.continual.base import Context, ContinualMethod
from tinyvad.continual.matrix import ScoreMatrix
from tinyvad.continual.methods import make_method
from tinyvad.continual.streams import Stream, Unit, mask_of
from tinyvad.embedding import Embedding
from tinyvad.errors import InputError
from tinyvad.evaluate import quality
from tinyvad.fitting import MethodPlan, TapStore, make_embedding
from tinyvad.images import find_datasets
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

    maps: TapStore
    labels: np.ndarray
    marked: np.ndarray
    masks: list[np.ndarray]


@dataclass
class Results:
    """What is noted after each step; ``values`` (T, U) a metric; ``counts`` a row a unit: images that each task got."""

    values: dict[str, np.ndarray]
    routing: list[float | None] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    device_nbytes: list[int | None] = field(default_factory=list)


def run_cell(cell: Cell) -> Done:
    """Run one cell.

    Raises:
        InputError: images that can't be read, or settings that don't fit the embedding. CheckFailed: a budget too small.
    """
    clock = Clock()
    root, cache = Path(cell.data), Path(cell.cache)
    stream = stream_of(cell.stream, cell.order, cell.seed, root, cell.data_key)
    good = [Pictures(unit, unit.dataset.train_good, root, stream.seed) for unit in stream.units]
    first = [pictures for pictures, step in zip(good, stream.step_of) if step == 0]
    network = open_network(cell.backbone.name, cell.backbone.source, cell.backbone.image_size, first, cache)
    stores = [open_taps(network, pictures, cache) for pictures in good]
    learnt = [
        SeveralTaps([store for store, owner in zip(stores, stream.step_of) if owner == step])
        for step in range(len(stream.tasks))
    ]
    tests = [tested(unit, network, cell, stream.seed) for unit in stream.units]
    clock.lap("features")
    embedding = embedding_of(learnt[0], network, cell)
    context = Context(embedding.steps, network.tensors[-1].shape[3], len(stream.tasks), cell.seed)
    method = make_method(cell.method.name, context, json.loads(cell.method.settings))
    shape = (len(stream.tasks), len(stream.units))
    results = Results({name: np.full(shape, np.nan) for name in cell.metrics})
    before: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
    for step, task in enumerate(stream.tasks):
        method.learn(task.product, Embedded(learnt[step], embedding))
        clock.lap(f"learn {step}")
        shares = []
        results.counts = []
        for number in range(shape[1]):
            if stream.step_of[number] > step:
                continue
            maps, chosen = scored(method, Embedded(tests[number].maps, embedding), stream.given_task(number))
            shares.append(None if stream.task_identity else share_right(chosen, method.task_names, product(stream, number)))
            results.counts.append(np.bincount(chosen[chosen >= 0], minlength=len(method.task_names)).tolist())
            clock.lap(f"score {step}")
            if number not in before or not np.array_equal(before[number][0], maps):  # else the same maps, the same figures
                before[number] = (maps, figures(tests[number], maps, cell.backbone.image_size))
            for name in cell.metrics:
                value = before[number][1][name]
                results.values[name][step, number] = np.nan if value is None else value
            clock.lap(f"metrics {step}")
        results.routing.append(None if None in shares else float(np.mean([s for s in shares if s is not None])))
        results.nbytes.append(method.nbytes())
        device_nbytes = getattr(method, "device_nbytes", None)  # the PaDiM family can tell
        results.device_nbytes.append(None if device_nbytes is None else device_nbytes())
    return Done(stored(cell, stream, embedding, method, tests, results), clock.seconds)


def stored(
    cell: Cell, stream: Stream, embedding: Embedding, method: ContinualMethod, tests: Sequence[Tested], results: Results
) -> dict[str, Any]:
    """What a cell's file holds."""
    steps, units = tuple(task.name for task in stream.tasks), tuple(unit.name for unit in stream.units)
    matrices = [
        ScoreMatrix(name, steps, units, stream.step_of, results.values[name], chance_of(name, tests))
        for name in cell.metrics
    ]
    routes = results.routing[-1] is not None
    return {
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
        "routing": results.routing,
        "routed": {"tasks": list(method.task_names), "counts": results.counts if routes else None},
        "bytes": results.nbytes,
        "device_bytes": None if None in results.device_nbytes else results.device_nbytes,
    }


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


@lru_cache(maxsize=4)
def stream_of(spec: StreamSpec, order: str | tuple[str, ...], seed: int, root: Path, data_key: str) -> Stream:
    """A cell's stream, looked up once a process.

    Raises:
        InputError: this machine's data are others than those that the grid was read with.
    """
    stream = open_stream(spec, order, seed, find_datasets(root))
    if data_key_of(root, stream) != data_key:
        raise InputError(
            f"{root} holds other images here, or with other times of change, than where the grid was read: share the "
            "folder, or copy it with its times; if it has just changed, run again"
        )
    return stream


def embedding_of(first: TapStore, network: Network, cell: Cell) -> Embedding:
    """The embedding whose units hold what the first task showed, on the cell's grid or that of the coarsest tapped map."""
    tensors = network.tensors
    coarsest = min((tensor.shape[1], tensor.shape[2]) for tensor in tensors)
    grid = coarsest if cell.method.grid is None else (cell.method.grid, cell.method.grid)
    return make_embedding(first, tensors, MethodPlan(cell.method.name, grid, {}, 0))


def tested(unit: Unit, network: Network, cell: Cell, seed: int) -> Tested:
    """Maps, labels and masks of a unit's test images; no masks where it has none or nobody asks for figures of pixels."""
    samples = unit.dataset.test
    root, size = Path(cell.data), cell.backbone.image_size
    maps = open_taps(network, Pictures(unit, [sample.path for sample in samples], root, seed), Path(cell.cache))
    labels = np.array([sample.label for sample in samples])
    asked = any(metric.startswith("pixel") for metric in cell.metrics)
    if not asked or all(sample.mask is None for sample in samples):
        return Tested(maps, labels, np.zeros(0, np.int64), [])
    masks = [mask_of(unit, sample, size, size) for sample in samples]
    marked = np.array([i for i, mask in enumerate(masks) if mask is not None])
    return Tested(maps, labels, marked, [mask for mask in masks if mask is not None])


def product(stream: Stream, number: int) -> str:
    """Under which name a unit was learnt."""
    return stream.tasks[stream.step_of[number]].product


def scored(method: ContinualMethod, embeddings: Embedded, task: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, H, W) maps, and the tasks that were chosen: (n,) or (n, H, W)."""
    parts = [method.score(batch, task) for batch in embeddings]
    return np.concatenate([part.maps for part in parts]), np.concatenate([part.tasks for part in parts])


def figures(test: Tested, maps: np.ndarray, size: int) -> dict[str, Any]:
    """All figures of a unit, those of ``tinyvad eval``."""
    return quality(test.labels, maps.max((1, 2)), test.masks, list(upsample(maps[test.marked], (size, size))))


def share_right(chosen: np.ndarray, names: Sequence[str], right: str) -> float | None:
    """Share of images (or patches) that were scored by a task of their own product; None where nothing was chosen."""
    if (chosen < 0).any():
        return None
    return float(np.mean([names[task] == right for task in chosen.reshape(-1)]))


def chance_of(metric: str, tests: Sequence[Tested]) -> np.ndarray | None:
    """(U) what each unit scores without any learning: AUROC .5, F1 its floor; None for the others."""
    if metric.endswith("AUROC"):
        return np.full(len(tests), 0.5)
    if metric == "image_F1Max":
        return np.array([f1_floor(test.labels) for test in tests])
    if metric == "pixel_F1Max":
        return np.array([f1_floor(np.array(test.masks).reshape(-1)) if test.masks else np.nan for test in tests])
    return None
