"""Which network and which input size fit: settings and a target in, a ``Choice`` out, or one line that says what to change.

The memory plan of a network depends on shapes alone, so a size is tried by quantising with made-up ranges, writing the
.tflite and planning it, which takes a tenth of a second.

The rule of ``--backbone auto``, the default. Candidates are the filter bank and every network that tinyvad brings trained
weights for. Each gets the largest input size whose memory plan fits the target's RAM (or the given ``--image-size``). Out
are those that then have less than ``MIN_AUTO_SIZE`` pixels, and those whose .tflite leaves no room for any bank in the
target's flash. Among the rest the highest feature quality wins, at equal quality the least flash. Feature quality is on the
network's card: the share of a large network's features, trained on ImageNet, that can be read linearly off its taps on
held-out images, at one size for all. So quality comes first and the input size only excludes: a better network at
96 px is taken before a worse one at 224. Without a target the highest quality wins. If nothing is left, the candidate with
the largest input is taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tinyvad import fitting
from tinyvad.backbones.source import (
    AUTO,
    DEFAULT_BACKBONE,
    Backbone,
    auto_candidates,
    check_auto,
    open_backbone,
)
from tinyvad.errors import TinyvadError
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim import budget as budgets
from tinyvad.firmware_sim.memory import Arena, arena
from tinyvad.firmware_sim.targets import Target, list_targets
from tinyvad.graph.ir import Graph
from tinyvad.graph.quantize import ChannelStatistics, affine_range, quantize
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.project import Project

SIZES = tuple(range(224, 63, -16))  # input sizes that are tried when none is given, largest first
SCORER_BYTES = 4096  # RAM of the scorer, before it is known
MIN_AUTO_SIZE = 96  # pixels: below, small defects are gone before any network sees them


@dataclass(frozen=True)
class Candidate:
    """A network that ``auto`` looked at.

    Attributes:
        quality: of its card.
        image_size: pixels, None if no size fits.
        arena_bytes: TFLM's, planned at that size (at the smallest that is tried where none fits). None without a target.
        flash_bytes: planned, the .tflite and its bank. None without a target, and where no bank was planned.
        why_not: one line, "" for the one that was chosen by the rule.
        chosen: True for one.
    """

    name: str
    quality: float
    image_size: int | None
    arena_bytes: int | None = None
    flash_bytes: int | None = None
    why_not: str = ""
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """A network, its input size in pixels, and what ``auto`` looked at (nothing if the user named the network)."""

    backbone: Backbone
    size: int
    tried: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a network takes once quantised: the arena, and bytes of the .tflite."""

    arena: Arena
    model_bytes: int


def plan_network(graph: Graph) -> Plan:
    """Plan a float graph as the int8 file that it becomes; that does not depend on the numbers, so none are needed."""
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-1.0, 1.0, 0.0)))
        for name in graph.activations
    }
    data = to_tflite(quantize(graph, blank, affine_range(-1, 1), bias_correction=False))
    return Plan(arena(read_tflite(data)), len(data))


def plan_arena(graph: Graph) -> Arena:
    """The arena alone of ``plan_network``."""
    return plan_network(graph).arena


def ram_budget(graph: Graph, target: Target, frame: str | None, scorer_bytes: int = SCORER_BYTES) -> budgets.Budget:
    """RAM of a graph on a target, before anything is fitted."""
    return budgets.make_budget(target, budgets.ram_items(plan_arena(graph), scorer_bytes, target, frame), [])


def bank_limit(model_bytes: int, target: Target | None, bank_bytes: int | None) -> int | None:
    """Bytes that the bank may take: the user's bound and what the target's flash leaves, whichever is less.

    Raises:
        CheckFailed: the flash does not even hold the network.
    """
    limits = [] if bank_bytes is None else [bank_bytes]
    if target is not None and target.flash_bytes is not None:
        without = budgets.flash_items(model_bytes, 0, target)
        remedy = "use a smaller --backbone, earlier --layers or a larger --target"
        budgets.make_budget(target, [], without).check(remedy)
        limits.append(target.flash_bytes - sum(item.nbytes for item in without))
    return min(limits) if limits else None


def choose_network(project: Project, target: Target | None, n_good: int) -> Choice:
    """The network that the user names, or the one that ``auto`` picks (see the module's text), and its input size.

    Args:
        n_good: number of good images, on which the size of a bank depends.

    Raises:
        InputError: a wrong backbone, layers or weights (see ``open_backbone``).
        CheckFailed: no size fits: region, number, limit and a remedy that works.
    """
    spec = project.backbone or DEFAULT_BACKBONE
    if spec != AUTO:
        layers = list(project.layers) if project.layers else None
        backbone = open_backbone(spec, layers, project.weights, project.mean, project.std)
        return Choice(backbone, choose_size(project, backbone, target))
    check_auto(project.layers, project.weights, project.mean, project.std)
    backbones = [open_backbone(name) for name in auto_candidates()]  # the highest quality first
    tried = [_candidate(backbone, project, target, n_good) for backbone in backbones]
    best = min(range(len(tried)), key=lambda i: _order(tried[i]))
    for i, one in enumerate(tried):
        if i == best:
            tried[i] = replace(one, chosen=True)
        elif not one.why_not:
            tie = one.quality == tried[best].quality
            tried[i] = replace(one, why_not="same quality, more flash" if tie else "lower quality")
    return Choice(backbones[best], tried[best].image_size or choose_size(project, backbones[best], target), tuple(tried))


def _order(one: Candidate) -> tuple[float, ...]:
    """The smallest is chosen: by the rule; among those that it excludes the largest input, then the least RAM."""
    if not one.why_not:
        return 0, -one.quality, one.flash_bytes or 0
    if one.image_size is not None:
        return 1, -one.image_size, -one.quality
    return 2, one.arena_bytes or 0


def _candidate(backbone: Backbone, project: Project, target: Target | None, n_good: int) -> Candidate:
    """What a network takes on a target, and why it is out if it is."""
    assert backbone.quality is not None  # it has a card
    size = project.image_size
    if target is None:
        return Candidate(backbone.name, backbone.quality, size or SIZES[0])
    fitting_size = next((s for s in ([size] if size else SIZES) if _fits(backbone, s, target, project.frame)), None)
    graph = backbone.graph_at(fitting_size or size or SIZES[-1])
    plan = plan_network(graph)
    ram = budgets.make_budget(target, budgets.ram_items(plan.arena, SCORER_BYTES, target, project.frame), [])
    planned = next(item.nbytes for item in ram.ram if item.owner == "arena")
    found = Candidate(backbone.name, backbone.quality, fitting_size, planned)
    if ram.problems:
        return replace(found, why_not=f"at {size or SIZES[-1]} px {ram.problems[0]}")
    assert fitting_size is not None
    if size is None and fitting_size < MIN_AUTO_SIZE:
        return replace(found, why_not=f"no more than {fitting_size} px fit, wanted are {MIN_AUTO_SIZE}")
    try:
        bank = fitting.plan_method(
            project.method, [graph.tensors[name] for name in graph.outputs], fitting_size, n_good,
            bank_limit(plan.model_bytes, target, project.bank_bytes), project.grid, project.dimensions, project.seed,
        )  # fmt: skip
    except TinyvadError as error:
        return replace(found, why_not=str(error).split(": use ")[0])
    return replace(found, flash_bytes=plan.model_bytes + bank.bank_bytes)


def choose_size(project: Project, backbone: Backbone, target: Target | None) -> int:
    """The given input size if it fits, else the largest of ``SIZES`` that does.

    Raises:
        CheckFailed: region, number, limit and a remedy that works.
    """
    if target is None:
        return project.image_size or SIZES[0]
    size = project.image_size
    if size is None:
        size = _largest_fitting(backbone, target, project.frame)
        if size is not None:
            return size
        size = SIZES[-1]
    budget = ram_budget(backbone.graph_at(size), target, project.frame)
    if budget.problems:
        smaller = _largest_fitting(backbone, target, project.frame)
        remedies = [] if smaller is None else [f"--image-size {smaller} or less"]
        remedies += ["a smaller --frame"] if project.frame is not None else []
        remedies += _other_target(backbone, size, project)
        budget.check("use " + ", ".join(remedies) + (", or " if remedies else "") + "a smaller --backbone")
    return size


def _largest_fitting(backbone: Backbone, target: Target, frame: str | None) -> int | None:
    return next((s for s in SIZES if _fits(backbone, s, target, frame)), None)


def _fits(backbone: Backbone, size: int, target: Target, frame: str | None) -> bool:
    return not ram_budget(backbone.graph_at(size), target, frame).problems


def _other_target(backbone: Backbone, size: int, project: Project) -> list[str]:
    """'--target NAME' of the preset with the least RAM on which this size fits, if there is one."""
    for target in sorted(list_targets(), key=lambda target: target.ram_bytes):
        if _fits(backbone, size, target, project.frame):
            return [f"--target {target.name}"]
    return []
