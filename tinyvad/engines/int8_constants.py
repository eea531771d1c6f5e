"""The integer constants of each op of an int8 Graph: worked out once here, used by the exact engine and by the C export.

Flows in: a node with its tensors' scales. Flows out: multipliers, shifts, zero points, limits and tables. Source: TFLite's
int8 kernels (Prepare) as TFLM has them; what differs elsewhere is told in ``tinyvad.engines.int8_steps``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tinyvad.engines.int8_grid import INT32_MAX, activation_limits, check_same_scale, int8_quantization, steps_to_six
from tinyvad.errors import InputError
from tinyvad.graph.curves import EVERY_VALUE, hard_swish_table, logistic_table
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier, quantize_multiplier, quantize_multipliers
from tinyvad.graph.ir import Graph, Node

TABLE_OPS = ("relu", "relu6", "logistic", "hard_swish")


class Requantisation(NamedTuple):
    """A weighted op's way from sums to int8: multipliers and shifts (C,) int64, output zero point, limits."""

    multipliers: np.ndarray
    shifts: np.ndarray
    zero_point: int
    low: int
    high: int


class AddConstants(NamedTuple):
    """Multiplier and shift of both operands and of their sum."""

    a_multiplier: int
    a_shift: int
    b_multiplier: int
    b_shift: int
    out_multiplier: int
    out_shift: int


def zero_point(graph: Graph, name: str) -> int:
    """Zero point of an int8 tensor."""
    return int(int8_quantization(graph, name).zero_point[0])


def requantisation(graph: Graph, node: Node) -> Requantisation:
    """Of a conv, depthwise or fully connected node.

    Raises:
        InputError: a sum, shifted left, could leave int32.
    """
    x, w, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.inputs[1], node.output))
    channels = graph.tensors[node.output].shape[-1]
    factors = np.float64(x.scale[0]) * w.scale.astype(np.float64) / np.float64(y.scale[0])
    multipliers, shifts = quantize_multipliers(np.broadcast_to(factors, channels))
    _check_range(graph, node, shifts)
    return Requantisation(multipliers, shifts, int(y.zero_point[0]), *activation_limits(node, y))


def _check_range(graph: Graph, node: Node, shifts: np.ndarray) -> None:
    """Raise InputError if a sum, shifted left, could leave int32: there the device's result is undefined."""
    weights, bias = (graph.constants[name] for name in node.inputs[1:])
    if weights.dtype != np.int8 or bias.dtype != np.int32:
        raise InputError(f"{node.op} -> {node.output}: weights {weights.dtype}, bias {bias.dtype}; must be int8, int32")
    others = (0, 1, 2) if node.op == "depthwise_conv2d" else tuple(range(1, weights.ndim))
    zero = zero_point(graph, node.inputs[0])
    largest = max(127 - zero, zero + 128)  # |x - zero point|
    sums = np.abs(weights.astype(np.int64)).sum(others) * largest + np.abs(bias.astype(np.int64))  # (C,)
    worst = max(int(s) << max(int(shift), 0) for s, shift in zip(sums, shifts, strict=True))
    if worst > INT32_MAX:
        raise InputError(
            f"{node.op} -> {node.output}: sums can reach {worst}, beyond int32 ({INT32_MAX}); "
            "quantise again with a larger output scale"
        )


def folded_bias(graph: Graph, node: Node) -> np.ndarray:
    """(C,) int64: bias - input zero point * sum of weights, so that sums may run over raw int8 values.

    Padding must then hold the zero point.
    """
    weights = graph.constants[node.inputs[1]].astype(np.int64)
    others = (0, 1, 2) if node.op == "depthwise_conv2d" else tuple(range(1, weights.ndim))
    return graph.constants[node.inputs[2]].astype(np.int64) - zero_point(graph, node.inputs[0]) * weights.sum(others)


def add_constants(graph: Graph, node: Node) -> AddConstants:
    """Of an add node."""
    a, b, y = (int8_quantization(graph, name) for name in (*node.inputs, node.output))
    twice_max = 2.0 * max(float(a.scale[0]), float(b.scale[0]))
    out_factor = twice_max / ((1 << 20) * float(y.scale[0]))
    if out_factor >= 1:
        raise InputError(f"add -> {node.output}: its scale {float(y.scale[0]):g} is too fine for the operands'")
    factors = (float(a.scale[0]) / twice_max, float(b.scale[0]) / twice_max, out_factor)
    return AddConstants(*(number for factor in factors for number in quantize_multiplier(factor)))


def mul_constants(graph: Graph, node: Node) -> tuple[int, int]:
    """(multiplier, shift) of a mul node."""
    a, b, y = (int8_quantization(graph, name) for name in (*node.inputs, node.output))
    multiplier, shift = quantize_multiplier(float(a.scale[0]) * float(b.scale[0]) / float(y.scale[0]))
    if 255 * 255 << max(shift, 0) > INT32_MAX:
        raise InputError(f"mul -> {node.output}: its scale {float(y.scale[0]):g} is too fine for the operands'")
    return multiplier, shift


def mean_constants(graph: Graph, node: Node) -> tuple[int, int]:
    """(multiplier, shift) of a mean over H and W: the multiplier divides by n, with as many more bits as n has."""
    x, y = (int8_quantization(graph, tensor) for tensor in (node.inputs[0], node.output))
    _, height, width, _ = graph.tensors[node.inputs[0]].shape
    n = height * width
    multiplier, shift = quantize_multiplier(float(x.scale[0]) / float(y.scale[0]))
    bits = min(n.bit_length() - 1, 32, 31 + shift)
    multiplier, shift = (multiplier << bits) // n, shift - bits
    if 255 * n << max(shift, 0) > INT32_MAX:
        raise InputError(f"mean -> {node.output}: its scale {float(y.scale[0]):g} is too fine for a {height}x{width} map")
    return multiplier, shift


def table_of(graph: Graph, node: Node) -> np.ndarray:
    """(256,) int8 of an op of ``TABLE_OPS``, in the order of the input's value as uint8."""
    return {"relu": _relu, "relu6": _relu6, "logistic": _logistic, "hard_swish": _hard_swish}[node.op](graph, node)


def _relu(graph: Graph, node: Node) -> np.ndarray:
    x, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.output))
    multiplier, shift = quantize_multiplier(float(x.scale[0]) / float(y.scale[0]))
    if 255 << max(shift, 0) > INT32_MAX:
        raise InputError(f"relu -> {node.output}: its scale {float(y.scale[0]):g} is too fine for the operand's")
    zero = int(y.zero_point[0])
    scaled = multiply_by_quantized_multiplier(EVERY_VALUE - int(x.zero_point[0]), multiplier, shift) + zero
    return np.clip(scaled, max(-128, zero), 127).astype(np.int8)


def _relu6(graph: Graph, node: Node) -> np.ndarray:
    """TFLM copies and clamps (LiteRT's reference kernel would rescale: both need the same scale on both sides)."""
    check_same_scale(graph, node)
    quantization = int8_quantization(graph, node.output)
    zero = int(quantization.zero_point[0])
    return np.clip(EVERY_VALUE, zero, min(127, zero + steps_to_six(quantization))).astype(np.int8)


def _logistic(graph: Graph, node: Node) -> np.ndarray:
    x, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.output))
    if y.scale[0] != 1 / 256 or y.zero_point[0] != -128:
        raise InputError(f"logistic -> {node.output}: int8 output must have scale 1/256 and zero point -128")
    return logistic_table(x)


def _hard_swish(graph: Graph, node: Node) -> np.ndarray:
    x, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.output))
    return hard_swish_table(x, y, f"hard_swish -> {node.output}")
