"""One cell: a method goes through a stream of tasks and is tested on all products seen after each.

Flows in: a ``Cell``. Flows out: plain values for JSON: a matrix R a metric, how images were routed, bytes after each task;
and, apart from them, seconds. The same cell gives the same values on any machine of the same kind, in any company.

Features are those of the exact int8 engine; the network is calibrated and the embedding's ranges are set on the first task,
as in a build. Detectors that are trained learn from what the float network's frozen parts make of the images, and are
scored in float. Figures are those of ``tinyvad eval``: image scores are the largest cell, pixels those of the map at the
network's size, smoothed where the detector's build smooths it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bench.features import Network, Pictures, SeveralTaps, open_network, open_taps
from tinyvad.bench.frozen import open_frozen, open_items
from tinyvad.bench.grid import Cell, StreamSpec, data_key_of, open_stream
from tinyvad.bench.run import Done
from tinyvad.continual.base import Context, ContinualMethod
from tinyvad.continual.matrix import ScoreMatrix
from tinyvad.continual.methods import is_trained, make_method
from tinyvad.continual.streams import Stream, Unit, mask_of
from tinyvad.continual.trained import JoinedTaskItems, TrainedMethod
from tinyvad.embedding import Embedding
from tinyvad.errors import InputError
from tinyvad.evaluate import quality
from tinyvad.fitting import MethodPlan, TapStore, make_embedding
from tinyvad.images import find_datasets
from tinyvad.metrics import f1_floor
from tinyvad.model import SMOOTHING_SIGMA, upsample
from tinyvad.project import PAIRED
from tinyvad.training.blocks import threads

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
    """A unit's test images: ``marked`` are those whose pixels are known, ``masks`` theirs.

    ``batches`` are what a method scores: embeddings, or the arrays of a trained detector's items.
    """

    batches: Iterable[Any]
    labels: np.ndarray
    marked: np.ndarray
    masks: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A method that has learnt nothing yet, and all that it will see.

    Attributes:
        learnt: of each step, what ``learn`` takes. tests: a unit each.
        grid: (H, W) of the maps, None: known when something is scored. depth: elements of an embedding, None: it has none.
        sigma: of the smoothing of maps, pixels of the network's input.
    """

    method: ContinualMethod
    learnt: list[Any]
    tests: list[Tested]
    grid: tuple[int, int] | None
    depth: int | None
    sigma: float = SMOOTHING_SIGMA


@dataclass
class Results:
    """What is noted after each step; ``values`` (T, U) a metric; ``counts`` a row a unit: images that each task got."""

    values: dict[str, np.ndarray]
    routing: list[float | None] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    device_nbytes: list[int | None] = field(default_factory=list)
    replay_nbytes: list[int] = field(default_factory=list)


@threads(1)  # cells run side by side: each trains on one core
def run_cell(cell: Cell) -> Done:
    """Run one cell.

    Raises:
        InputError: images that can't be read, or settings that don't fit the embedding. CheckFailed: a budget too small.
    """
    clock = Clock()
    root = Path(cell.data)
    stream = stream_of(cell.stream, cell.order, cell.seed, root, cell.data_key)
    good = [Pictures(unit, unit.dataset.train_good, root, stream.seed) for unit in stream.units]
    prepared = (prepare_trained if is_trained(cell.method.name) else prepare)(cell, stream, good, clock)
    method, tests = prepared.method, prepared.tests
    shape = (len(stream.tasks), len(stream.units))
    results = Results({name: np.full(shape, np.nan) for name in cell.metrics})
    before: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
    for step, task in enumerate(stream.tasks):
        method.learn(task.product, prepared.learnt[step])
        clock.lap(f"learn {step}")
        shares = []
        results.counts = []
        for number in range(shape[1]):
            if stream.step_of[number] > step:
                continue
            maps, chosen = scored(method, tests[number].batches, stream.given_task(number))
            shares.append(None if stream.task_identity else share_right(chosen, method.task_names, product(stream, number)))
            results.counts.append(np.bincount(chosen[chosen >= 0], minlength=len(method.task_names)).tolist())
            clock.lap(f"score {step}")
            if number not in before or not np.array_equal(before[number][0], maps):  # else the same maps, the same figures
                before[number] = (maps, figures(tests[number], maps, cell.backbone.image_size, prepared.sigma))
            for name in cell.metrics:
                value = before[number][1][name]
                results.values[name][step, number] = np.nan if value is None else value
            clock.lap(f"metrics {step}")
        results.routing.append(None if None in shares else float(np.mean([s for s in shares if s is not None])))
        results.nbytes.append(method.nbytes())
        device_nbytes = getattr(method, "device_nbytes", None)  # the PaDiM family can tell
        results.device_nbytes.append(None if device_nbytes is None else device_nbytes())
        if isinstance(method, TrainedMethod):
            results.replay_nbytes.append(method.replay_nbytes())
    grid = prepared.grid or before[0][0].shape[1:]
    return Done(stored(cell, stream, prepared, grid, results), clock.seconds)


def prepare(cell: Cell, stream: Stream, good: Sequence[Pictures], clock: Clock) -> Prepared:
    """A method on int8 embeddings."""
    first = [pictures for pictures, step in zip(good, stream.step_of) if step == 0]
    backbone, cache = cell.backbone, Path(cell.cache)
    network = open_network(backbone.name, backbone.source, backbone.image_size, first, cache, backbone.layers)
    stores = [open_taps(network, pictures, cache) for pictures in good]
    learnt = [SeveralTaps(parts) for parts in by_step(stores, stream)]
    maps = [open_taps(network, pictures, cache) for pictures in test_pictures(cell, stream)]
    clock.lap("features")
    embedding = embedding_of(learnt[0], network, cell)
    context = Context(embedding.steps, network.tensors[-1].shape[3], len(stream.tasks), cell.seed)
    method = make_method(cell.method.name, context, json.loads(cell.method.settings))
    tests = [tested(unit, Embedded(store, embedding), cell) for unit, store in zip(stream.units, maps)]
    return Prepared(method, [Embedded(store, embedding) for store in learnt], tests, embedding.grid, embedding.depth)


def prepare_trained(cell: Cell, stream: Stream, good: Sequence[Pictures], clock: Clock) -> Prepared:
    """A detector that is trained, on float maps."""
    frozen = open_frozen(cell.backbone, cell.method.grid)
    context = Context(np.ones(1), 1, len(stream.tasks), cell.seed, frozen)
    method = make_method(cell.method.name, context, json.loads(cell.method.settings))
    assert isinstance(method, TrainedMethod)
    sets, shown = (
        [open_items(method.detector, frozen, pictures, Path(cell.cache)) for pictures in group]
        for group in (good, test_pictures(cell, stream))
    )
    learnt = [JoinedTaskItems(parts) for parts in by_step(sets, stream)]
    tests = [tested(unit, items, cell) for unit, items in zip(stream.units, shown)]
    clock.lap("features")
    return Prepared(method, learnt, tests, None, None, 0.0 if method.name in PAIRED else SMOOTHING_SIGMA)


def by_step(parts: Sequence[Any], stream: Stream) -> list[list[Any]]:
    """What belongs to the units of each step."""
    return [[part for part, owner in zip(parts, stream.step_of) if owner == step] for step in range(len(stream.tasks))]


def test_pictures(cell: Cell, stream: Stream) -> list[Pictures]:
    """The test images of each unit."""
    root = Path(cell.data)
    return [Pictures(unit, [sample.path for sample in unit.dataset.test], root, stream.seed) for unit in stream.units]


def stored(
    cell: Cell, stream: Stream, prepared: Prepared, grid: Sequence[int], results: Results
) -> dict[str, Any]:
    """What a cell's file holds."""
    method, tests = prepared.method, prepared.tests
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
        "grid": list(grid),
        "depth": prepared.depth,
        "matrices": [matrix.to_dict() for matrix in matrices],
        "routing": results.routing,
        "routed": {"tasks": list(method.task_names), "counts": results.counts if routes else None},
        "bytes": results.nbytes,
        "device_bytes": None if None in results.device_nbytes else results.device_nbytes,
        **({"replay_bytes": results.replay_nbytes} if results.replay_nbytes else {}),
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


def tested(unit: Unit, batches: Iterable[Any], cell: Cell) -> Tested:
    """Labels and masks of a unit's test images; no masks where it has none or nobody asks for figures of pixels."""
    samples, size = unit.dataset.test, cell.backbone.image_size
    labels = np.array([sample.label for sample in samples])
    asked = any(metric.startswith("pixel") for metric in cell.metrics)
    if not asked or all(sample.mask is None for sample in samples):
        return Tested(batches, labels, np.zeros(0, np.int64), [])
    masks = [mask_of(unit, sample, size, size) for sample in samples]
    marked = np.array([i for i, mask in enumerate(masks) if mask is not None])
    return Tested(batches, labels, marked, [mask for mask in masks if mask is not None])


def product(stream: Stream, number: int) -> str:
    """Under which name a unit was learnt."""
    return stream.tasks[stream.step_of[number]].product


def scored(method: ContinualMethod, batches: Iterable[Any], task: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, H, W) maps, and the tasks that were chosen: (n,) or (n, H, W)."""
    parts = [method.score(batch, task) for batch in batches]
    return np.concatenate([part.maps for part in parts]), np.concatenate([part.tasks for part in parts])


def figures(test: Tested, maps: np.ndarray, size: int, sigma: float) -> dict[str, Any]:
    """All figures of a unit, those of ``tinyvad eval``."""
    return quality(test.labels, maps.max((1, 2)), test.masks, list(upsample(maps[test.marked], (size, size), sigma)))


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
