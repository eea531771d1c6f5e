"""What each op of an int8 Graph computes, in TFLite's integer arithmetic: a node in, a function of the values out.

Source: TFLite's int8 quantisation specification, its reference kernels and TFLM. Where the two differ TFLM, which runs
on the device, is followed: LiteRT's reference kernels round fully_connected once instead of twice, compute the factors of
mul and relu in float32 and make logistic's table in float32, which decides ties otherwise (``tests/test_engines_int8.py``
runs such ties).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from tinyvad.engines.int8_grid import (
    INT32_MAX,
    Step,
    Values,
    activation_limits,
    check_same_scale,
    int8_quantization,
    steps_to_six,
    window_geometry,
)
from tinyvad.engines.int8_weighted import depthwise_step, matrix_step
from tinyvad.errors import InputError
from tinyvad.graph.curves import EVERY_VALUE, hard_swish_table, logistic_table
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier, quantize_multiplier
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.shapes import nearest_indices
from tinyvad.kernels import int8 as kernels


def make_step(graph: Graph, node: Node) -> Step:
    """The function that computes ``node``'s output.

    Raises:
        InputError: an op that the integer engine does not have, or tensors that it can't take (named).
    """
    builder = _BUILDERS.get(node.op)
    if builder is None:
        raise InputError(f"the int8 engine has no {node.op} (tensor {node.output}); tap an earlier layer")
    return builder(graph, node)


def _getter(graph: Graph, name: str) -> Callable[[Values], np.ndarray]:
    """Reads an operand, which may be an int8 constant."""
    if name in graph.constants:
        constant = np.ascontiguousarray(graph.constants[name][0])
        return lambda values: constant
    return lambda values: values[name]


def _add_step(graph: Graph, node: Node) -> Step:
    a, b, y = (int8_quantization(graph, name) for name in (*node.inputs, node.output))
    twice_max = 2.0 * max(float(a.scale[0]), float(b.scale[0]))
    a_mult, a_shift = quantize_multiplier(float(a.scale[0]) / twice_max)
    b_mult, b_shift = quantize_multiplier(float(b.scale[0]) / twice_max)
    out_factor = twice_max / ((1 << 20) * float(y.scale[0]))
    if out_factor >= 1:
        raise InputError(f"add -> {node.output}: its scale {float(y.scale[0]):g} is too fine for the operands'")
    out_mult, out_shift = quantize_multiplier(out_factor)
    a_zero, b_zero, out_zero = (int(q.zero_point[0]) for q in (a, b, y))
    low, high = activation_limits(node, y)
    left, right = (_getter(graph, name) for name in node.inputs)

    def step(values: Values) -> np.ndarray:
        x = left(values)
        out = np.empty(x.shape, np.int8)
        kernels.add(
            x.ravel(), right(values).ravel(), a_zero, b_zero, a_mult, a_shift, b_mult, b_shift,
            out_mult, out_shift, out_zero, low, high, out.ravel(),
        )  # fmt: skip
        return out

    return step


def _mul_step(graph: Graph, node: Node) -> Step:
    a, b, y = (int8_quantization(graph, name) for name in (*node.inputs, node.output))
    multiplier, shift = quantize_multiplier(float(a.scale[0]) * float(b.scale[0]) / float(y.scale[0]))
    if 255 * 255 << max(shift, 0) > INT32_MAX:
        raise InputError(f"mul -> {node.output}: its scale {float(y.scale[0]):g} is too fine for the operands'")
    a_zero, b_zero, out_zero = (int(q.zero_point[0]) for q in (a, b, y))
    low, high = activation_limits(node, y)
    left, right = (_getter(graph, name) for name in node.inputs)

    def step(values: Values) -> np.ndarray:
        x = left(values)
        rows = x.reshape(-1, x.shape[-1])  # (R, C)
        factors = right(values).reshape(-1, x.shape[-1])  # (R, C) or (1, C)
        out = np.empty(rows.shape, np.int8)
        kernels.mul(rows, factors, a_zero, b_zero, multiplier, shift, out_zero, low, high, out)
        return out.reshape(x.shape)

    return step


def _pool_step(is_max: bool, graph: Graph, node: Node) -> Step:
    name = node.inputs[0]
    out_shape = graph.tensors[node.output].shape[1:]
    geometry = window_geometry(node)
    kernel_h, kernel_w = node.attributes["kernel"]
    low, high = activation_limits(node, int8_quantization(graph, node.output))
    check_same_scale(graph, node)
    pads = node.attributes["pads"]
    if not is_max and node.attributes.get("count_include_pad") and any(pads):
        raise InputError(f"average_pool -> {node.output}: padding that counts is a separate pad op in int8")
    if max(pads[:2]) >= kernel_h or max(pads[2:]) >= kernel_w:
        raise InputError(f"{node.op} -> {node.output}: pads {pads} leave {kernel_h}x{kernel_w} windows outside the map")

    def step(values: Values) -> np.ndarray:
        out = np.empty(out_shape, np.int8)
        kernels.pool(values[name], kernel_h, kernel_w, geometry, is_max, low, high, out)
        return out

    return step


def _mean_step(graph: Graph, node: Node) -> Step:
    """Mean over H and W: the division by n goes into the multiplier, with as many more bits as n has."""
    name = node.inputs[0]
    x, y = (int8_quantization(graph, tensor) for tensor in (name, node.output))
    _, height, width, _ = graph.tensors[name].shape
    n = height * width
    multiplier, shift = quantize_multiplier(float(x.scale[0]) / float(y.scale[0]))
    bits = min(n.bit_length() - 1, 32, 31 + shift)
    multiplier, shift = (multiplier << bits) // n, shift - bits
    if 255 * n << max(shift, 0) > INT32_MAX:
        raise InputError(f"mean -> {node.output}: its scale {float(y.scale[0]):g} is too fine for a {height}x{width} map")
    zero_point, out_zero = int(x.zero_point[0]), int(y.zero_point[0])

    def step(values: Values) -> np.ndarray:
        acc = values[name].sum((0, 1), dtype=np.int64, keepdims=True) - n * zero_point  # (1, 1, C)
        scaled = multiply_by_quantized_multiplier(acc, multiplier, shift) + out_zero
        return np.clip(scaled, -128, 127).astype(np.int8)

    return step


def _table_step(table: np.ndarray, name: str) -> Step:
    """Any function of one int8 value: ``table`` (256,) int8 in the order of ``tinyvad.graph.curves``."""
    return lambda values: table[values[name].view(np.uint8)]


def _relu_step(graph: Graph, node: Node) -> Step:
    x, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.output))
    multiplier, shift = quantize_multiplier(float(x.scale[0]) / float(y.scale[0]))
    if 255 << max(shift, 0) > INT32_MAX:
        raise InputError(f"relu -> {node.output}: its scale {float(y.scale[0]):g} is too fine for the operand's")
    zero_point = int(y.zero_point[0])
    scaled = multiply_by_quantized_multiplier(EVERY_VALUE - int(x.zero_point[0]), multiplier, shift) + zero_point
    return _table_step(np.clip(scaled, max(-128, zero_point), 127).astype(np.int8), node.inputs[0])


def _relu6_step(graph: Graph, node: Node) -> Step:
    """TFLM copies and clamps (LiteRT's reference kernel would rescale: both need the same scale on both sides)."""
    check_same_scale(graph, node)
    quantization = int8_quantization(graph, node.output)
    zero_point = int(quantization.zero_point[0])
    high = min(127, zero_point + steps_to_six(quantization))
    return _table_step(np.clip(EVERY_VALUE, zero_point, high).astype(np.int8), node.inputs[0])


def _logistic_step(graph: Graph, node: Node) -> Step:
    x, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.output))
    if y.scale[0] != 1 / 256 or y.zero_point[0] != -128:
        raise InputError(f"logistic -> {node.output}: int8 output must have scale 1/256 and zero point -128")
    return _table_step(logistic_table(x), node.inputs[0])


def _hard_swish_step(graph: Graph, node: Node) -> Step:
    x, y = (int8_quantization(graph, name) for name in (node.inputs[0], node.output))
    return _table_step(hard_swish_table(x, y, f"hard_swish -> {node.output}"), node.inputs[0])


def _pad_step(graph: Graph, node: Node) -> Step:
    name = node.inputs[0]
    top, _, left, _ = node.attributes["pads"]
    check_same_scale(graph, node)
    value = int(int8_quantization(graph, node.output).zero_point[0])
    height, width = graph.tensors[name].shape[1:3]
    out_shape = graph.tensors[node.output].shape[1:]

    def step(values: Values) -> np.ndarray:
        out = np.full(out_shape, value, np.int8)
        out[top : top + height, left : left + width] = values[name]
        return out

    return step


def _concat_step(graph: Graph, node: Node) -> Step:
    check_same_scale(graph, node)
    operands = [_getter(graph, name) for name in node.inputs]
    return lambda values: np.concatenate([operand(values) for operand in operands], axis=-1)


def _reshape_step(graph: Graph, node: Node) -> Step:
    """Copies the values, whatever the two scales are (published files have a reshape whose sides differ)."""
    shape = graph.tensors[node.output].shape[1:]
    return lambda values: values[node.inputs[0]].reshape(shape)


def _resize_step(graph: Graph, node: Node) -> Step:
    _, height, width, _ = graph.tensors[node.inputs[0]].shape
    check_same_scale(graph, node)
    flags = [bool(node.attributes.get(key)) for key in ("align_corners", "half_pixel_centers")]
    rows, columns = (
        nearest_indices(size, int(out), *flags) for size, out in zip((height, width), node.attributes["size"], strict=True)
    )
    return lambda values: np.ascontiguousarray(values[node.inputs[0]][rows][:, columns])


_BUILDERS: dict[str, Callable[[Graph, Node], Step]] = {
    "conv2d": matrix_step,
    "fully_connected": matrix_step,
    "depthwise_conv2d": depthwise_step,
    "add": _add_step,
    "mul": _mul_step,
    "average_pool": partial(_pool_step, False),
    "max_pool": partial(_pool_step, True),
    "mean": _mean_step,
    "relu": _relu_step,
    "relu6": _relu6_step,
    "logistic": _logistic_step,
    "hard_swish": _hard_swish_step,
    "pad": _pad_step,
    "concat": _concat_step,
    "reshape": _reshape_step,
    "resize_nearest": _resize_step,
}
