"""What the steps of the int8 engine share: a tensor's int8 grid, what an activation lets through on it, windows.

A step takes the activations so far, by name and without batch axis, and returns its node's output. All that does not
depend on the image (multipliers, folded biases, tables) is worked out once, when the step is made.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import round_half_away
from tinyvad.graph.ir import Graph, Node, Quantization

INT32_MAX = (1 << 31) - 1

Values = dict[str, np.ndarray]
Step = Callable[[Values], np.ndarray]


def activation_limits(node: Node, quantization: Quantization) -> tuple[int, int]:
    """Smallest and largest int8 value that the node's fused activation lets through."""
    zero_point = int(quantization.zero_point[0])
    activation = node.attributes.get("activation", "none")
    low, high = -128, 127
    if activation in ("relu", "relu6"):
        low = max(low, zero_point)
    if activation == "relu6":
        high = min(high, zero_point + steps_to_six(quantization))
    return low, high


def steps_to_six(quantization: Quantization) -> int:
    """6.0 in units of the scale; the quotient is a float32, as in TFLite."""
    return int(round_half_away(np.float32(6.0) / np.float32(quantization.scale[0])))


def int8_quantization(graph: Graph, name: str) -> Quantization:
    """Scale and zero point of an int8 activation or of weights."""
    tensor = graph.tensors[name]
    if tensor.quantization is None:
        raise InputError(f"graph {graph.name}: tensor {name} is not quantised; run quantize first")
    if tensor.dtype != "int8":
        raise InputError(f"graph {graph.name}: tensor {name} is {tensor.dtype}; the int8 engine takes int8")
    scale = tensor.quantization.scale
    # weights may have negative scales: one of MIT's published MCUNet files does, and TFLite's arithmetic takes them
    if not np.isfinite(scale).all() or (name not in graph.constants and scale[0] <= 0):
        raise InputError(f"graph {graph.name}: tensor {name} has scale {scale.min():g}; it must be positive and finite")
    return tensor.quantization


def check_same_scale(graph: Graph, node: Node) -> None:
    """Raise InputError unless an op that copies values has one grid on both sides."""
    out = int8_quantization(graph, node.output)
    for name in node.inputs:
        x = int8_quantization(graph, name)
        if x.scale[0] != out.scale[0] or x.zero_point[0] != out.zero_point[0]:
            raise InputError(f"{node.op} -> {node.output}: {name} must have the output's scale and zero point")


def window_geometry(node: Node) -> np.ndarray:
    """(stride_h, stride_w, top, left, dilation_h, dilation_w) int64, as the kernels take it."""
    top, _, left, _ = node.attributes["pads"]
    return np.array([*node.attributes["stride"], top, left, *node.attributes.get("dilation", (1, 1))], np.int64)
