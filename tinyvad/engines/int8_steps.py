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

from tinyvad.engines.int8_constants import (
    TABLE_OPS,
    add_constants,
    mean_constants,
    mul_constants,
    table_of,
    zero_point,
)
from tinyvad.engines.int8_grid import Step, Values, activation_limits, check_same_scale, int8_quantization, window_geometry
from tinyvad.engines.int8_weighted import depthwise_step, matrix_step
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier
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
    constants = add_constants(graph, node)
    a_zero, b_zero, out_zero = (zero_point(graph, name) for name in (*node.inputs, node.output))
    low, high = activation_limits(node, int8_quantization(graph, node.output))
    left, right = (_getter(graph, name) for name in node.inputs)

    def step(values: Values) -> np.ndarray:
        x = left(values)
        out = np.empty(x.shape, np.int8)
        kernels.add(
            x.ravel(), right(values).ravel(), a_zero, b_zero, *constants, out_zero, low, high, out.ravel(),
        )  # fmt: skip
        return out

    return step


def _mul_step(graph: Graph, node: Node) -> Step:
    multiplier, shift = mul_constants(graph, node)
    a_zero, b_zero, out_zero = (zero_point(graph, name) for name in (*node.inputs, node.output))
    low, high = activation_limits(node, int8_quantization(graph, node.output))
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
    name = node.inputs[0]
    _, height, width, _ = graph.tensors[name].shape
    multiplier, shift = mean_constants(graph, node)
    zero, out_zero = zero_point(graph, name), zero_point(graph, node.output)

    def step(values: Values) -> np.ndarray:
        acc = values[name].sum((0, 1), dtype=np.int64, keepdims=True) - height * width * zero  # (1, 1, C)
        scaled = multiply_by_quantized_multiplier(acc, multiplier, shift) + out_zero
        return np.clip(scaled, -128, 127).astype(np.int8)

    return step


def _table_step(graph: Graph, node: Node) -> Step:
    """Any function of one int8 value."""
    table, name = table_of(graph, node), node.inputs[0]
    return lambda values: table[values[name].view(np.uint8)]


def _pad_step(graph: Graph, node: Node) -> Step:
    name = node.inputs[0]
    top, _, left, _ = node.attributes["pads"]
    check_same_scale(graph, node)
    value = zero_point(graph, node.output)
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
    **dict.fromkeys(TABLE_OPS, _table_step),
    "pad": _pad_step,
    "concat": _concat_step,
    "reshape": _reshape_step,
    "resize_nearest": _resize_step,
}
