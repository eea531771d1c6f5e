"""Which int8 grid each activation gets: a float Graph and what calibration saw of it in, scales and zero points out.

* **Ranges.** The smallest and largest value seen on the calibration images (good images only), widened to hold 0. Defects
  reach further than good images: the tapped tensors get ``TAP_MARGIN`` more, and those behind a ReLU6 ``RELU6_HEADROOM``
  more, up to 6. What only a hard-swish or logistic reads is cut where these are flat (worth 0.3 to 1.2 dB at the taps of
  MobileNetV3-small and PhiNet with random weights, normalised on photographs), and hard-swish makes nothing below -0.375.
* **Shared and fixed grids.** Ops that copy values share the grid of what they copy. The network's input has the grid of
  its pixels, a logistic's output the one that TFLite prescribes.
* **Not too fine.** Steps much finer than those of an op's own sums tell nothing, and a dead tensor would make its scale so
  small that the device's 32-bit sums overflow when they are shifted to it.
* **Agreement.** Where LiteRT's reference kernels and TFLM would round some value differently (``tinyvad.graph.agreement``),
  the scale is enlarged in steps of 0.1 % until they do not. Two of a hundred products need it. Power-of-two factors would
  agree as well, but cost up to half of the product's resolution.

Source of the arithmetic: TFLite's int8 quantisation specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.agreement import logistic_agrees, mul_agrees, relu_agrees
from tinyvad.graph.fixed_point import round_half_away
from tinyvad.graph.ir import Graph, Node, Quantization

TAP_MARGIN = 1.25
RELU6_HEADROOM = 1.5
SAME_SCALE_OPS = ("average_pool", "max_pool", "pad", "relu6", "reshape", "resize_nearest")
WEIGHTED_OPS = ("conv2d", "depthwise_conv2d", "fully_connected")
LOGISTIC_GRID = Quantization.per_tensor(1 / 256, -128)
HARD_SWISH_LEAST = -0.375  # at -1.5
# outside of these ranges of its input an op gives what it gives at their ends, to a tenth of a step
FLAT_OUTSIDE = {"hard_swish": (-3.0, np.inf), "logistic": (-8.0, 8.0)}
SMALLEST_SCALE = 1e-8
SMALLEST_HARD_SWISH_INPUT = 2.0**-16  # its kernel's 16 bits hold no finer gate
NUDGE, NUDGES = 1.001, 50
ROUNDS = 8  # more than one only where grids are shared


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """What calibration saw of one tensor, channel by channel: (C,) float64 arrays."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray

    def scaled(self, factors: np.ndarray, ceiling: float) -> ChannelStatistics:
        """The statistics after channel c is multiplied by factors[c] > 0 and clipped to [0, ceiling]."""
        return ChannelStatistics(
            np.clip(self.low * factors, 0, ceiling),
            np.clip(self.high * factors, 0, ceiling),
            np.clip(self.mean * factors, 0, ceiling),
        )


Statistics = Mapping[str, ChannelStatistics]


@dataclass
class _Group:
    """Tensors that share a grid: the range that it must hold, its scale so far, or the grid itself where it is fixed."""

    low: float
    high: float
    scale: float
    fixed: Quantization | None = None

    def grid(self) -> Quantization:
        return self.fixed or affine_range(self.low, self.high, self.scale)

    def enlarge(self, scale: float) -> None:
        if self.fixed is None:
            self.scale = max(self.scale, scale)


def affine_range(low: float, high: float, smallest_scale: float = SMALLEST_SCALE) -> Quantization:
    """The int8 scale and zero point whose 256 steps cover [low, high] and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / 255.0, smallest_scale))
    zero_point = int(np.clip(round_half_away(-128 - low / float(scale)), -128, 127))
    return Quantization.per_tensor(float(scale), zero_point)


def constant_grid(values: np.ndarray) -> Quantization:
    """The grid of an operand of add or mul that is a constant."""
    return affine_range(float(values.min()), float(values.max()))


def weight_scale(weights: np.ndarray, bias: np.ndarray, axis: int, in_scale: float) -> np.ndarray:
    """(O,) float32: the largest weight of a channel is 127 steps.

    A channel of tiny weights and a large bias gets a coarser scale, or its bias would leave int32.
    """
    weights, bias = weights.astype(np.float64), bias.astype(np.float64)
    largest = np.abs(weights).max(tuple(i for i in range(weights.ndim) if i != axis))
    return np.maximum(np.maximum(largest / 127, np.abs(bias) / (in_scale * (1 << 30))), 1e-12).astype(np.float32)


def output_axis(node: Node) -> int:
    """The axis of a weighted op's output channels in its weights."""
    return 3 if node.op == "depthwise_conv2d" else 0


def seen_of(graph: Graph, statistics: Statistics, name: str) -> ChannelStatistics:
    """What calibration saw of a tensor; InputError if nothing, or values that are not finite."""
    if name not in statistics:
        raise InputError(f"graph {graph.name}: calibration saw nothing of {name}")
    seen = statistics[name]
    if not (np.isfinite(seen.low).all() and np.isfinite(seen.high).all()):
        raise InputError(f"graph {graph.name}: calibration saw values of {name} that are not finite; the file is damaged")
    return seen


def activation_grids(graph: Graph, statistics: Statistics, first: Quantization) -> dict[str, Quantization]:
    """Scale and zero point of every activation; ``first`` is the input's.

    Raises:
        InputError: an activation without statistics, or a concat of the input or of a logistic's output with others.
    """
    group_of = _groups(graph, statistics, first)
    for _ in range(ROUNDS):
        before = [group.scale for group in group_of.values()]
        for node in graph.nodes:
            _settle(graph, node, group_of)
        if before == [group.scale for group in group_of.values()]:
            break
    return {name: group.grid() for name, group in group_of.items()}


def _groups(graph: Graph, statistics: Statistics, first: Quantization) -> dict[str, _Group]:
    """The group of every activation, on the scale that its range asks for."""
    leader = {name: name for name in graph.activations}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for node in graph.nodes:
        if node.op in SAME_SCALE_OPS or node.op == "concat":
            for name in node.inputs:
                if name in leader:
                    leader[find(name)] = find(node.output)
    members: dict[str, list[str]] = {}
    for name in graph.activations:
        members.setdefault(find(name), []).append(name)
    logistics = [node.output for node in graph.nodes if node.op == "logistic"]
    fixed = {find(name): (LOGISTIC_GRID, f"logistic -> {name}") for name in logistics}
    fixed[find(graph.inputs[0])] = (first, "the network's input")
    result = {}
    for head, names in members.items():
        if head in fixed:
            grid, owner = fixed[head]
            strange = [name for name in names if not _may_be_fixed(graph, name, grid)]
            if strange:
                raise InputError(f"{strange[-1]} must share the int8 grid of {owner} with it; tap an earlier layer")
            group = _Group(0.0, 0.0, float(grid.scale[0]), grid)
        else:
            ranges = [_range(graph, statistics, name) for name in names]
            low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
            group = _Group(low, high, float(affine_range(low, high).scale[0]))
        result.update(dict.fromkeys(names, group))
    return result


def _may_be_fixed(graph: Graph, name: str, grid: Quantization) -> bool:
    """Does a fixed grid hold the values of a tensor, as it made them or they are copies?"""
    node = graph.producer(name)
    if node is None:
        return grid is not LOGISTIC_GRID
    return node.op in (*SAME_SCALE_OPS, "concat") or (node.op == "logistic" and grid is LOGISTIC_GRID)


def _range(graph: Graph, statistics: Statistics, name: str) -> tuple[float, float]:
    """Smallest and largest real value that a tensor's grid should hold."""
    seen, node = seen_of(graph, statistics, name), graph.producer(name)
    tapped = name in graph.outputs
    margin = TAP_MARGIN if tapped else 1.0
    low, high = float(seen.low.min()) * margin, float(seen.high.max()) * margin
    if node is not None and node.attributes.get("activation") == "relu6":
        high = min(float(seen.high.max()) * max(margin, RELU6_HEADROOM), 6.0)
    if node is not None and node.op == "hard_swish":
        low = max(low, HARD_SWISH_LEAST)
    readers = {reader.op for reader in graph.consumers(name)}
    if len(readers) == 1 and not tapped and (op := readers.pop()) in FLAT_OUTSIDE:
        low, high = max(low, FLAT_OUTSIDE[op][0]), min(high, FLAT_OUTSIDE[op][1])
    return low, high


def _settle(graph: Graph, node: Node, group_of: Mapping[str, _Group]) -> None:
    """Enlarge the scale of what ``node`` makes (or, of logistic and hard-swish, reads) until it is fine with the op."""
    out, inputs = group_of[node.output], node.inputs

    def grid(name: str) -> Quantization:
        return group_of[name].grid() if name in group_of else constant_grid(graph.constants[name])

    scale = float(grid(inputs[0]).scale[0])
    match node.op:
        case "conv2d" | "depthwise_conv2d" | "fully_connected":
            weights, bias = (graph.constants[name] for name in inputs[1:])
            out.enlarge(scale * float(weight_scale(weights, bias, output_axis(node), scale).max()))
        case "mean":
            _, height, width, _ = graph.tensors[inputs[0]].shape
            out.enlarge(scale / (height * width))
        case "add":
            out.enlarge(max(scale, float(grid(inputs[1]).scale[0])) / (1 << 12))
        case "mul":
            out.enlarge(scale * float(grid(inputs[1]).scale[0]))
            _nudge(out, lambda: mul_agrees(grid(inputs[0]), grid(inputs[1]), out.grid()))
        case "relu":
            out.enlarge(scale / (1 << 12))
            _nudge(out, lambda: relu_agrees(grid(inputs[0]), out.grid()))
        case "hard_swish":
            group_of[inputs[0]].enlarge(SMALLEST_HARD_SWISH_INPUT)
            out.enlarge(float(grid(inputs[0]).scale[0]) / 64)
        case "logistic":
            _nudge(group_of[inputs[0]], lambda: logistic_agrees(grid(inputs[0])))


def _nudge(group: _Group, agrees: Callable[[], bool]) -> None:
    """Enlarge a group's scale until both kernels agree; leave it where that is not to be had."""
    scale = group.scale
    if group.fixed is not None:
        return
    for _ in range(NUDGES):
        if agrees():
            return
        group.scale *= NUDGE
    group.scale = scale
