"""Convolutions and fully connected layers in exact integers: a node in, a function of the values out.

A sum of products of int8 values is an integer that float32 holds exactly as long as it stays within 2**24, so a float32
matrix product is an exact int8 one; longer sums are cut into pieces that are added in float64.
"""

from __future__ import annotations

import numpy as np

from tinyvad.engines.int8_constants import folded_bias, requantisation, zero_point
from tinyvad.engines.int8_grid import Step, Values, window_geometry
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node
from tinyvad.kernels import int8 as kernels

# float32 holds every integer up to 2**24: longest sum of (int8 * int8) products that stays exact
EXACT_SUM_LENGTH = (1 << 24) // (128 * 128)


def matrix_step(graph: Graph, node: Node) -> Step:
    """conv2d and fully_connected: patches times weights in exact float32, then requantised."""
    name, w_name, _ = node.inputs
    multipliers, shifts, out_zero, low, high = requantisation(graph, node)
    weights = graph.constants[w_name].astype(np.int64)  # (O, kh, kw, I) or (O, I)
    flat = weights.reshape(weights.shape[0], -1)  # (O, K)
    length = flat.shape[1]
    zero, bias = zero_point(graph, name), folded_bias(graph, node)
    matrix = np.ascontiguousarray(flat.T.astype(np.float32))  # (K, O)
    out_shape = graph.tensors[node.output].shape[1:]
    kernel_h, kernel_w = (1, 1) if node.op == "fully_connected" else weights.shape[1:3]
    is_pointwise = node.op == "fully_connected" or (
        (kernel_h, kernel_w) == (1, 1) and tuple(node.attributes["stride"]) == (1, 1) and not any(node.attributes["pads"])
    )
    geometry = None if is_pointwise else window_geometry(node)

    def step(values: Values) -> np.ndarray:
        x = values[name]
        if geometry is None:
            rows = x.reshape(-1, length).astype(np.float32)  # (R, K)
        else:
            rows = np.empty((out_shape[0] * out_shape[1], length), np.float32)
            kernels.patches(x, kernel_h, kernel_w, geometry, out_shape[0], out_shape[1], zero, rows)
        acc = rows[:, :EXACT_SUM_LENGTH] @ matrix[:EXACT_SUM_LENGTH]  # (R, O) float32, exact integers
        for k in range(EXACT_SUM_LENGTH, length, EXACT_SUM_LENGTH):  # longer sums are put together in float64
            acc = acc + (rows[:, k : k + EXACT_SUM_LENGTH] @ matrix[k : k + EXACT_SUM_LENGTH]).astype(np.float64)
        out = np.empty(acc.shape, np.int8)
        kernels.requantize(acc, bias, multipliers, shifts, out_zero, low, high, out)
        return out.reshape(out_shape)

    return step


def depthwise_step(graph: Graph, node: Node) -> Step:
    """depthwise_conv2d on float32 copies of the values, zero point taken off, so that padding is 0."""
    name, w_name, b_name = node.inputs
    multipliers, shifts, out_zero, low, high = requantisation(graph, node)
    weights = graph.constants[w_name][0].astype(np.float32)  # (kh, kw, C)
    if weights.shape[0] * weights.shape[1] > EXACT_SUM_LENGTH // 2:
        raise InputError(
            f"depthwise_conv2d -> {node.output}: a kernel of {weights.shape[0]}x{weights.shape[1]} values is not exact "
            f"here; at most {EXACT_SUM_LENGTH // 2} are"
        )
    zero = np.float32(zero_point(graph, name))
    bias = graph.constants[b_name].astype(np.int64)
    geometry, out_shape = window_geometry(node), graph.tensors[node.output].shape[1:]

    def step(values: Values) -> np.ndarray:
        x = np.subtract(values[name], zero, dtype=np.float32)
        out = np.empty(out_shape, np.int8)
        kernels.depthwise_conv(x, weights, bias, multipliers, shifts, geometry, out_zero, low, high, out)
        return out

    return step
