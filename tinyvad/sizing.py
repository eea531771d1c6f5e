"""Which input size fits: a backbone and a target in, pixels out, or one line that says what to change.

The memory plan of a network depends on shapes alone, so a size is tried by quantising with made-up ranges, writing the
.tflite and planning it, which takes a tenth of a second.
"""

from __future__ import annotations

import numpy as np

from tinyvad.backbones.source import Backbone
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim import budget as budgets
from tinyvad.firmware_sim.memory import Arena, arena
from tinyvad.firmware_sim.targets import Target, list_targets
from tinyvad.graph.ir import Graph
from tinyvad.graph.quantize import ChannelStatistics, affine_range, quantize
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.project import Project

SIZES = tuple(range(224, 63, -16))  # input sizes that are tried when none is given, largest first


def plan_arena(graph: Graph) -> Arena:
    """Arena of a float graph once quantised; it does not depend on the numbers, so none are needed."""
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-1.0, 1.0, 0.0)))
        for name in graph.activations
    }
    return arena(read_tflite(to_tflite(quantize(graph, blank, affine_range(-1, 1), bias_correction=False))))


def ram_budget(graph: Graph, target: Target, frame: str | None, scorer_bytes: int = 4096) -> budgets.Budget:
    """RAM of a graph on a target, before anything is fitted."""
    return budgets.make_budget(target, budgets.ram_items(plan_arena(graph), scorer_bytes, target, frame), [])


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
    return next((s for s in SIZES if not ram_budget(backbone.graph_at(s), target, frame).problems), None)


def _other_target(backbone: Backbone, size: int, project: Project) -> list[str]:
    """'--target NAME' of the preset with the least RAM on which this size fits, if there is one."""
    for target in sorted(list_targets(), key=lambda target: target.ram_bytes):
        if not ram_budget(backbone.graph_at(size), target, project.frame).problems:
            return [f"--target {target.name}"]
    return []
