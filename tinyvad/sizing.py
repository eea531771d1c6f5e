"""Does a network fit at an input size? A float graph, settings and a target in; memory plan, budget and latency out.

The memory plan of a network depends on shapes alone, so a size is tried by quantising with made-up ranges, writing the
.tflite, reading it back and planning that, which takes a tenth of a second (up to a second where only a plan of row bands
fits). ``tinyvad.choosing`` decides with it; ``tinyvad.build`` uses the same functions for what it made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinyvad.backbones.source import Backbone
from tinyvad.detectors import NATIVE, Scorer, parts_scratch, score_bytes
from tinyvad.detectors.student_teacher import StudentTeacherScorer
from tinyvad.embedding import POOL, tap_scratch_bytes
from tinyvad.firmware_sim import budget as budgets
from tinyvad.firmware_sim import latency, runtimes
from tinyvad.firmware_sim.memory import Arena, align, arena
from tinyvad.firmware_sim.offline_plan import planned_tflite
from tinyvad.firmware_sim.plans import plan as plan_rows
from tinyvad.firmware_sim.targets import RAM_KINDS, Target, spans
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.graph.quantize import ChannelStatistics, affine_range, quantize
from tinyvad.graph.schedule import Schedule
from tinyvad.graph.scratch import scratch_of
from tinyvad.graph.tflite_file import TfliteFile, read_tflite
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.project import PAIRED, TRAINED, Project

SIZES = tuple(range(224, 63, -16))  # input sizes that are tried when none is given, largest first
EXPECTED_VALUES = 48  # of a cell, before the method is known
ON_CHIP = {"tcm", "sram"}
SCORER_BYTES = 8192  # RAM of the scorer, before it is known: an 8-byte code's tables


@dataclass(frozen=True, eq=False)
class Network:
    """A network as the .tflite that ships (or one of the same shapes).

    Attributes:
        graph: int8, read back from the file. file: as TFLM reads it. arena: TFLM's plan with its reference kernels.
    """

    graph: Graph
    file: TfliteFile
    arena: Arena


@dataclass(frozen=True)
class ScorerMemory:
    """RAM that scoring needs.

    Attributes:
        grid: cells. embed: scratch of making each tap's part. scorer: scratch of the scorer.
        alone: all of ``tvad_score``, for a runtime in which scoring has a place of its own.
        parts: bytes of each tap's part, () where it has the grid's cells.
    """

    grid: tuple[int, int]
    embed: tuple[int, ...]
    scorer: int
    alone: int
    parts: tuple[int, ...] = ()


def read_network(model: bytes) -> Network:
    """From the bytes of a .tflite file."""
    file = read_tflite(model)
    return Network(import_tflite(model), file, arena(file))


def plan_network(graph: Graph) -> Network:
    """A float graph as the int8 file that it becomes; sizes do not depend on the numbers, so none are needed."""
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-1.0, 1.0, 0.0)))
        for name in graph.activations
    }
    return read_network(planned_tflite(quantize(graph, blank, affine_range(-1, 1), bias_correction=False)))


def scorer_memory(
    taps: Sequence[tuple[int, int, int]], grid: tuple[int, int], scorer: Scorer, pool: int = POOL
) -> ScorerMemory:
    """Of a scorer whose taps are (h, w, C) maps; ``pool``: width of the embedding's pooling."""
    rows = np.array([(*tap, 0, 0, 0, pool, 0) for tap in taps])  # section TAPS
    embed = tuple(tap_scratch_bytes((h, w), grid, pool) for h, w, _ in taps)
    parts: tuple[int, ...] = ()
    if scorer.kind in NATIVE:
        embed, parts = (0,) * len(taps), tuple(math.prod(tap) for tap in taps)
    return ScorerMemory(grid, embed, parts_scratch(rows, scorer), score_bytes(rows, grid, scorer), parts)


def expected_scorer_memory(taps: Sequence[Tensor], grid: int | None, method: str | None = None) -> ScorerMemory:
    """Before anything is fitted: the grid that the default method prefers, and room for the scorer.

    A student and its teacher are known exactly; the map of another network that is trained is the grid.
    """
    shapes = [(tap.shape[1], tap.shape[2], tap.shape[3]) for tap in taps]
    if method in PAIRED:
        pairs = shapes[: len(shapes) // 2]
        finest = max((h, w) for h, w, _ in pairs)
        return scorer_memory(shapes, finest, StudentTeacherScorer(tuple(pairs), finest, 0))
    if method in TRAINED:
        own = shapes[0][:2]
        return ScorerMemory(own, (tap_scratch_bytes(own, own, 1),), SCORER_BYTES, SCORER_BYTES + 4 * own[0] * own[1])
    maps = sorted((tap.shape[1], tap.shape[2]) for tap in taps)
    cells = (grid, grid) if grid is not None else maps[min(1, len(maps) - 1)]
    embed = tuple(tap_scratch_bytes((tap.shape[1], tap.shape[2]), cells, POOL) for tap in taps)
    return ScorerMemory(cells, embed, SCORER_BYTES, SCORER_BYTES + 4 * cells[0] * cells[1])


def arena_limit(target: Target, frame: str | None, learning: int = 0) -> int:
    """Bytes that an arena of our runtime may have on a target: the largest span on the chip, once all else is placed.

    Memory outside the chip counts only where there is no other: a plan of row bands in fast memory beats whole maps there.
    """
    items = runtimes.tinyvad_needs(_NO_SCHEDULE, _NO_MODEL, 0, target, frame, learning).ram
    placed = budgets.make_budget(target, [item for item in items if item.owner != "arena"], [])
    blocks = [span for span in spans(target, RAM_KINDS) if set(span.kinds) <= ON_CHIP] or spans(target, RAM_KINDS)
    free = {span.name: span.size for span in blocks}
    for item in placed.ram:
        if item.region in free:
            free[item.region] -= align(item.nbytes)
    return max(free.values()) // 32 * 32


_NO_SCHEDULE = Schedule("layerwise", (), {}, 0, 0, 0, ())
_NO_MODEL = runtimes.ModelFlash(0, 0, 0)


def plan_memory(
    network: Network, memory: ScorerMemory, project: Project, target: Target | None, learning: int = 0
) -> Schedule:
    """The memory plan of our runtime: as set, or the fastest that fits the target (without one: in place)."""
    limit = None if target is None else arena_limit(target, project.frame, learning)
    strategy = project.plan
    if strategy == "patch":
        limit = None  # asked for by name, it is the smallest
    elif strategy == "auto" and target is None:
        strategy = "inplace-dw"
    kernels = scratch_of("scalar" if target is None else runtimes.packing_of(target))
    return plan_rows(
        network.graph, memory.grid, strategy, project.frame, memory.scorer, memory.embed, limit, kernels, memory.parts
    )


def needs(
    network: Network,
    memory: ScorerMemory,
    schedule: Schedule | None,
    bank_bytes: int,
    target: Target,
    frame: str | None,
    learning: int = 0,
) -> runtimes.Needs:
    """RAM and flash of a build; ``schedule`` None: TFLM runs the network. ``learning``: the workspace for it, bytes."""
    if schedule is None:
        planned = runtimes.tflm_arena(network.file, target)
        return runtimes.tflm_needs(planned, network.file.size, memory.alone, bank_bytes, target, frame)
    model = runtimes.model_flash_bytes(network.graph, schedule, runtimes.packing_of(target))
    return runtimes.tinyvad_needs(schedule, model, bank_bytes, target, frame, learning)


def bank_in_flash(bank_bytes: int, tasks: int, target: Target | None) -> int:
    """Flash that a bank takes: itself, or two slots of whole erase units where the device may learn (docs/SPEC.md)."""
    return bank_bytes if tasks == 1 or target is None else 2 * budgets.slot_area(bank_bytes, target)


def bank_limit(
    flash: Sequence[budgets.Item], target: Target | None, bank_bytes: int | None, tasks: int = 1
) -> int | None:
    """Bytes that the bank may take: the user's bound and what the target's flash leaves, whichever is less.

    Args:
        flash: what else the build keeps there.
        tasks: products that the build is made for; more than one need two slots.

    Raises:
        CheckFailed: the flash does not even hold the network.
    """
    limits = [] if bank_bytes is None else [bank_bytes]
    if target is not None and target.flash_bytes is not None:
        without = [item for item in flash if item.owner != "bank.tvb"]
        remedy = "use a smaller --backbone, earlier --layers or a larger --target"
        budgets.make_budget(target, [], without).check(remedy)
        left = target.flash_bytes - sum(item.nbytes for item in without)
        limits.append(left if tasks == 1 else left // 2 // target.flash_erase * target.flash_erase)
    return min(limits) if limits else None


class Trial:
    """A backbone at one input size, planned as far as it is asked for.

    Args:
        target: None plans nothing but the network itself.
    """

    def __init__(self, backbone: Backbone, size: int, project: Project, target: Target | None) -> None:
        self.backbone, self.size, self.project, self.target = backbone, size, project, target

    @cached_property
    def network(self) -> Network:
        return plan_network(self.backbone.graph_at(self.size))

    @property
    def taps(self) -> list[Tensor]:
        return [self.network.graph.tensors[name] for name in self.network.graph.outputs]

    @cached_property
    def memory(self) -> ScorerMemory:
        return expected_scorer_memory(self.taps, self.project.grid, self.project.method)

    @cached_property
    def schedule(self) -> Schedule | None:
        """None where TFLM runs the network."""
        if self.project.runtime == "tflm":
            return None
        return plan_memory(self.network, self.memory, self.project, self.target)

    @cached_property
    def needs(self) -> runtimes.Needs:
        assert self.target is not None
        return needs(self.network, self.memory, self.schedule, 0, self.target, self.project.frame)

    @cached_property
    def ram(self) -> budgets.Budget:
        assert self.target is not None
        return budgets.make_budget(self.target, self.needs.ram, [])

    @property
    def arena_bytes(self) -> int:
        return next(item.nbytes for item in self.needs.ram if item.owner == "arena")

    @cached_property
    def milliseconds(self) -> float | None:
        """Estimated time of an image on the target with the default method, None where there is no figure."""
        if self.target is None:
            return None
        if self.project.runtime == "tflm":
            known = "cmsis_nn" in self.target.mac_per_cycle
            return latency.estimate(self.network.graph.macs(), self.target)["ms"] if known else None
        taps = [(tap.shape[1], tap.shape[2], tap.shape[3]) for tap in self.taps]
        depth, grid = sum(channels for *_, channels in taps), self.memory.grid
        frame = None if self.project.frame is None else budgets.parse_frame(self.project.frame)[:2]
        paired = self.project.method in PAIRED
        if paired:
            pairs = StudentTeacherScorer(tuple(taps[: len(taps) // 2]), grid, 0)
            scored = latency.scorer_work(pairs, depth, grid)
        else:  # the default method's
            scored = latency.gaussian_work(grid[0] * grid[1], depth, min(depth, EXPECTED_VALUES), 4, True)
        work = latency.combined(
            latency.frame_work((self.size, self.size), frame),
            latency.network_work(self.network.graph),
            latency.embedding_work(taps, grid, native=paired),
            scored,
        )
        found = latency.estimate_runtime(work, self.target)
        return None if found is None else found["ms"]

    def bank_limit(self) -> int | None:
        """Bytes that the bank may take. Raises CheckFailed if the flash does not hold the network."""
        flash = self.needs.flash if self.target is not None else []
        return bank_limit(flash, self.target, self.project.bank_bytes, self.project.device_tasks)

    def too_slow(self, limit: float) -> str:
        """One line if the network takes more than ``limit`` milliseconds, '' if not."""
        if self.milliseconds is None or self.milliseconds <= limit:
            return ""
        return f"about {self.milliseconds:,.0f} ms an image, allowed are {limit:,.0f}"
