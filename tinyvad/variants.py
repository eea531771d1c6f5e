"""What a variant of a build costs, planned without fitting: a backbone, an input size and settings in, a ``Point`` out.

Sizes depend on shapes alone, so a network is quantised with made-up ranges, and its scorer was fitted on nothing.

A point is on the front if no other that fits is at least as good in everything and better in something: less RAM, flash
and latency; more image AUROC. Where that is not known, a larger input, a larger bank and a higher feature quality count
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyvad import fitting
from tinyvad.backbones.source import Backbone
from tinyvad.detectors import Scorer
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import ProductQuantizer
from tinyvad.detectors.triangular import Projection, TriangularScorer
from tinyvad.firmware_sim import latency, runtimes
from tinyvad.firmware_sim.budget import parse_frame
from tinyvad.firmware_sim.targets import Target
from tinyvad.graph.schedule import Schedule
from tinyvad.project import Project
from tinyvad.sizing import ScorerMemory, arena_limit, plan_memory, plan_network, scorer_memory
from tinyvad.sizing import needs as needs_of


@dataclass(frozen=True)
class Point:
    """A variant.

    Attributes:
        ram_bytes, flash_bytes, ms: planned and estimated; ms None for a core without a figure.
        quality: of the backbone's card, None without one.
        problem: the limit that it breaks, '' if it fits.
        auroc: image AUROC on the labelled test images, made_up that of made-up defects; None where not measured.
        front: on the Pareto front.
    """

    backbone: str
    image_size: int
    method: str
    grid: tuple[int, int]
    settings: dict[str, Any]
    bank_bytes: int
    ram_bytes: int
    flash_bytes: int
    ms: float | None
    strategy: str
    quality: float | None
    problem: str = ""
    auroc: float | None = None
    made_up: float | None = None
    front: bool = False


@dataclass(frozen=True)
class Setting:
    """What a sweep holds fixed.

    Attributes:
        n_good: images that a bank is made of. image_size: where no axis says.
        method, grid, bank_bytes: None leaves the choice to the rules of a build.
    """

    target: Target
    runtime: str
    frame: str | None
    n_good: int
    image_size: int
    method: str | None = None
    grid: int | None = None
    bank_bytes: int | None = None
    seed: int = 0


class Planned:
    """A network at a size, planned as the int8 file that it becomes; what several settings share is made once."""

    def __init__(self, backbone: Backbone, size: int) -> None:
        self.backbone, self.size = backbone, size
        self.network = plan_network(backbone.graph_at(size))
        self.tensors = [self.network.graph.tensors[name] for name in self.network.graph.outputs]
        self._schedules: dict[tuple[ScorerMemory, str | None, int, str], Schedule] = {}
        self._flashes: dict[tuple[str, int], runtimes.ModelFlash] = {}

    def point(self, setting: Setting) -> tuple[Point, fitting.MethodPlan]:
        """The variant of a setting.

        Raises:
            CheckFailed: no bank of the method is as small as asked. InputError: see ``fitting.plan_method``.
        """
        bank = fitting.plan_method(
            setting.method, self.tensors, self.size, setting.n_good, setting.bank_bytes, setting.grid, seed=setting.seed
        )
        shapes = [(tensor.shape[1], tensor.shape[2], tensor.shape[3]) for tensor in self.tensors]
        depth = sum(channels for *_, channels in shapes)
        scorer = blank_scorer(bank, depth)
        target, frame, time_of = setting.target, setting.frame, None
        memory = scorer_memory(shapes, bank.grid, scorer)
        if setting.runtime == "tflm":
            strategy = "tflm-greedy"
            needs = needs_of(self.network, memory, None, bank.bank_bytes, target, frame)
            if "cmsis_nn" in target.mac_per_cycle:
                time_of = latency.estimate(self.network.arena.macs + scorer.macs(bank.grid), target)
        else:
            schedule = self._schedule(memory, target, frame)
            strategy, key = schedule.strategy, (runtimes.packing_of(target), len(schedule.steps))
            if key not in self._flashes:
                self._flashes[key] = runtimes.model_flash_bytes(self.network.graph, schedule, key[0])
            needs = runtimes.tinyvad_needs(schedule, self._flashes[key], bank.bank_bytes, target, frame)
            work = latency.combined(
                latency.frame_work((self.size, self.size), None if frame is None else parse_frame(frame)[:2]),
                latency.network_work(self.network.graph),
                latency.embedding_work(shapes, bank.grid),
                latency.scorer_work(scorer, depth, bank.grid),
            )
            time_of = latency.estimate_runtime(work, target)
        budget = needs.on(target)
        point = Point(
            self.backbone.name, self.size, bank.method, bank.grid, bank.settings, bank.bank_bytes, budget.ram_used,
            budget.flash_used, None if time_of is None else time_of["ms"], strategy, self.backbone.quality,
            budget.problems[0] if budget.problems else "",
        )  # fmt: skip
        return point, bank

    def _schedule(self, memory: ScorerMemory, target: Target, frame: str | None) -> Schedule:
        key = memory, frame, arena_limit(target, frame), runtimes.packing_of(target)
        if key not in self._schedules:
            self._schedules[key] = plan_memory(self.network, memory, Project(frame=frame), target)
        return self._schedules[key]


def blank_scorer(plan: fitting.MethodPlan, depth: int) -> Scorer:
    """A scorer of a plan's shapes that was fitted on nothing, to ask what it takes; its zeros cost no memory."""
    if plan.method.startswith("patchcore"):
        rows = plan.settings["bank_size"]
        if plan.method == "patchcore":
            return PatchCoreScorer(np.zeros((rows, depth), np.int8))
        subspaces, bits = plan.settings["subspaces"], plan.settings["bits"]
        books = np.zeros((subspaces, min(1 << bits, rows), depth // subspaces), np.int8)
        quantizer = ProductQuantizer(books, np.arange(depth, dtype=np.uint16), bits)
        return PatchCoreLiteScorer(quantizer, np.zeros((rows, subspaces), np.uint8))
    values = plan.settings.get("dimensions") or plan.settings.get("channels") or depth
    bits = plan.settings.get("bits", 0)
    mean, table = np.zeros((*plan.grid, values), np.int8), np.zeros(256, np.uint32)
    codes = mean.view(np.uint8)
    factor = np.zeros((*plan.grid, values * (values - 1) // 2), np.int8) if bits else None
    indices = np.arange(values, dtype=np.uint16) if plan.method == "padim" and values < depth else None
    projection = None
    if plan.method == "padim-compact":
        zeros = np.zeros(values, np.int64)
        projection = Projection(np.zeros((depth, values), np.int8), zeros, zeros, zeros)
    return TriangularScorer(
        mean, codes, table, bits, codes if bits else None, table if bits else None, factor, indices, projection
    )


def mark_front(points: Sequence[Point]) -> list[Point]:
    """The points with ``front`` set, see the module's text."""
    costs = [np.array([*_costs(point), *_lacks(point, points)]) for point in points]
    marked = []
    for i, point in enumerate(points):
        beaten = point.problem != "" or any(
            points[j].problem == "" and (other <= costs[i]).all() and (other < costs[i]).any()
            for j, other in enumerate(costs)
        )
        marked.append(replace(point, front=not beaten))
    return marked


def _costs(point: Point) -> tuple[float, ...]:
    return point.ram_bytes, point.flash_bytes, point.ms or 0.0


def _lacks(point: Point, points: Sequence[Point]) -> tuple[float, ...]:
    """What a point is worth, the smaller the better: AUROC where any is known, else what usually raises it."""
    if any(one.auroc is not None for one in points):
        return (-(point.auroc or 0.0),)
    if any(one.made_up is not None for one in points):
        return -(point.made_up or 0.0), -point.bank_bytes
    return -(point.quality or 0.0), -point.image_size, -point.bank_bytes
