"""What the int8 kernels compute, written down as slowly and plainly as possible: NumPy int64, one window at a time.

The readable twin of ``tinyvad/kernels/int8.py`` and of the exact engine's steps. It shares no code with the library but
the Graph's classes. The rescaling is gemmlowp's definition, with its divisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvad.graph.ir import Graph, Node


def run(graph: Graph, image: np.ndarray) -> dict[str, np.ndarray]:
    """Every int8 activation, without batch axis, of one (H, W, C) int8 image."""
    values = {graph.inputs[0]: image}
    constants = {name: array[0] for name, array in graph.constants.items() if array.ndim and len(array)}
    for node in graph.nodes:
        scales, zeros = grids(graph, node)
        inputs = [values.get(name, constants.get(name)) for name in node.inputs]
        result = compute(graph, node, inputs, scales, zeros)
        low, high = limits(node.attributes.get("activation", "none"), scales[-1], zeros[-1])
        values[node.output] = np.clip(result, low, high).astype(np.int8)
    return values


def grids(graph: Graph, node: Node) -> tuple[list[float], list[int]]:
    """Scales and zero points of a node's inputs and output (the first of each, for per-channel weights)."""
    found = [graph.tensors[name].quantization for name in (*node.inputs, node.output)]
    return [float(q.scale[0]) for q in found if q], [int(q.zero_point[0]) for q in found if q]


def limits(activation: str, scale: float, zero_point: int) -> tuple[int, int]:
    low = max(-128, zero_point) if activation != "none" else -128
    six = math.floor(float(np.float32(6) / np.float32(scale)) + 0.5)
    return low, min(127, zero_point + six) if activation == "relu6" else 127


def compute(graph: Graph, node: Node, inputs: list[Any], scales: list[float], zeros: list[int]) -> np.ndarray:
    """The node's output before its activation, int64, zero point added."""
    attributes, out_zero = node.attributes, zeros[-1]
    x = inputs[0].astype(np.int64) - zeros[0]
    match node.op:
        case "conv2d" | "depthwise_conv2d" | "fully_connected":
            weights, bias = (graph.constants[name].astype(np.int64) for name in node.inputs[1:])
            quantization = graph.tensors[node.inputs[1]].quantization
            assert quantization is not None
            if node.op == "fully_connected":
                acc = weights @ x + bias
            elif node.op == "conv2d":
                acc = windows(x, weights.shape[1:3], attributes, lambda p: (p * weights).sum((1, 2, 3))) + bias
            else:
                acc = windows(x, weights.shape[1:3], attributes, lambda p: (p * weights[0]).sum((0, 1))) + bias
            factors = [scales[0] * float(w) / scales[-1] for w in quantization.scale]
            factors *= acc.shape[-1] if len(factors) == 1 else 1
            return np.stack([rescaled(acc[..., c], f) for c, f in enumerate(factors)], -1) + out_zero
        case "add":
            y = inputs[1].astype(np.int64) - zeros[1]
            twice = 2 * max(scales[:2])
            total = rescaled(x << 20, scales[0] / twice) + rescaled(y << 20, scales[1] / twice)
            return rescaled(total, twice / ((1 << 20) * scales[2])) + out_zero
        case "mul":
            y = inputs[1].astype(np.int64) - zeros[1]
            return rescaled(x * y, scales[0] * scales[1] / scales[2]) + out_zero
        case "average_pool":
            return windows(inputs[0].astype(float), attributes["kernel"], attributes, average, np.nan).astype(np.int64)
        case "max_pool":
            return windows(inputs[0], attributes["kernel"], attributes, lambda p: p.max((0, 1)), -128)
        case "mean":
            n = x.shape[0] * x.shape[1]
            multiplier, shift = fixed_point(scales[0] / scales[1])
            bits = min(n.bit_length() - 1, 32, 31 + shift)
            return shifted(x.sum((0, 1), keepdims=True), (multiplier << bits) // n, shift - bits) + out_zero
        case "relu":
            return np.maximum(rescaled(x, scales[0] / scales[1]), 0) + out_zero
        case "relu6":
            return np.clip(inputs[0], *limits("relu6", scales[0], zeros[0]))
        case "logistic":
            return np.vectorize(lambda v: logistic(int(v), scales[0]))(x) + out_zero
        case "hard_swish":
            return np.vectorize(lambda v: hard_swish(int(v), *scales))(x) + out_zero
        case "pad":
            top, bottom, left, right = attributes["pads"]
            return np.pad(x, ((top, bottom), (left, right), (0, 0))) + out_zero
        case "concat":
            return np.concatenate(inputs, -1)
        case "reshape":
            return inputs[0].reshape(attributes["shape"][1:])
        case "resize_nearest":
            rows, columns = (nearest(a, b) for a, b in zip(x.shape, attributes["size"]))
            return inputs[0][rows][:, columns]
    raise AssertionError(node.op)


def average(window: np.ndarray) -> np.ndarray:
    """Mean (C,) of a (kh, kw, C) window whose places outside the map are nan, rounded half away from zero."""
    count = int(np.isfinite(window[..., 0]).sum())
    total = np.nansum(window, (0, 1)).astype(np.int64)
    return np.sign(total) * ((np.abs(total) + count // 2) // count)


def nearest(size: int, out: int) -> list[int]:
    """Source row of each output row: the ratio and its multiples in float32."""
    ratio = np.float32(size) / np.float32(out)
    return [min(int(np.floor(np.float32(i) * ratio)), size - 1) for i in range(out)]


def logistic(value: int, scale: float) -> int:
    """256 / (1 + exp(-scale * value)) as gemmlowp's fixed point has it; fractions are written as their 31 bits."""
    one = (1 << 31) - 1
    multiplier, shift = fixed_point(scale * 2**27)
    radius = math.floor(15 * 2**27 / 2**shift)
    if abs(value) >= radius:
        return 255 if value > 0 else 0
    x = int(shifted(np.array(value), multiplier, shift))  # 4 integer bits, 27 fractional ones
    if x == 0:
        return 128

    def times(a: int, b: int) -> int:
        return truncated(a * b + (1 << 30 if a * b >= 0 else 1 - (1 << 30)), 1 << 31)

    # exp(-|x|) = exp(fraction) * exp(-1/4 * bits), fraction in [-1/4, 0), where its Taylor polynomial around -1/8 is good
    fraction = -abs(x) % (1 << 25) - (1 << 25)
    d = fraction * 16 + (1 << 28)
    d2 = times(d, d)
    d3, d4 = times(d2, d), times(d2, d2)
    rest = halved(times(halved(d4, 2) + d3, 715827883) + d2, 1)
    exp = 1895147668 + times(1895147668, d + rest)
    quarters = (fraction + abs(x)) >> 25
    for bit, factor in enumerate((1672461947, 1302514674, 790015084, 290630308, 39332535, 720401)):
        exp = times(exp, factor) if quarters >> bit & 1 else exp
    # 1 / (1 + exp) by Newton and Raphson on half of the denominator, 29 fractional bits
    half = truncated(exp + one + 1, 2)
    guess = 1515870810 + times(half, -1010580540)
    for _ in range(3):
        guess += 4 * times(guess, (1 << 29) - times(half, guess))
    positive = min(2 * guess, one)
    return min(halved(positive if x > 0 else one - positive, 23), 255)


def hard_swish(value: int, scale: float, out_scale: float) -> int:
    """x * relu6(x + 3) / 6 in 16 bits, on the output's grid."""
    high_resolution = np.float32(scale) / np.float32(128)
    m_out, s_out = fixed_point(float(high_resolution / np.float32(out_scale)))
    m_gate, s_gate = fixed_point(float(high_resolution / np.float32(3 / 32768)))
    m_out, m_gate = (min((m + (1 << 15)) >> 16, 32767) for m in (m_out, m_gate))

    def times(a: int, b: int) -> int:
        return truncated(a * b + (1 << 14 if a * b >= 0 else 1 - (1 << 14)), 1 << 15)

    def left(a: int, bits: int) -> int:
        return max(-32768, min(32767, a * 2**bits))

    x = value * 128
    gate = times(left(x, s_gate - 1), m_gate) if s_gate > 0 else times(x, m_gate)
    gate = left(gate, 1) if s_gate > 0 else halved(gate, -s_gate)
    product = truncated(((gate + 32768) >> 1) * times(x, m_out), 1 << 15)
    return halved(product, -s_out)


def truncated(a: int, b: int) -> int:
    """a / b as in C, towards zero."""
    return abs(a) // b if a >= 0 else -(abs(a) // b)


def halved(a: int, times: int) -> int:
    """a / 2**times, rounded, halves away from zero."""
    return truncated(2 * a + (1 if a >= 0 else -1) * 2**times, 2 * 2**times)


def fixed_point(factor: float) -> tuple[int, int]:
    """``factor`` as multiplier * 2**(shift - 31), multiplier in [2**30, 2**31)."""
    fraction, shift = math.frexp(factor)
    multiplier = math.floor(fraction * (1 << 31) + 0.5)
    if multiplier == 1 << 31:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def rescaled(acc: np.ndarray, factor: float) -> np.ndarray:
    """acc * factor, rounded twice: to the high 32 bits of the doubled product, then by the right shift."""
    return shifted(acc, *fixed_point(factor))


def shifted(acc: np.ndarray, multiplier: int, shift: int) -> np.ndarray:
    product = (acc << max(shift, 0)) * multiplier
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.sign(product + nudge) * (np.abs(product + nudge) >> 31)  # C's division truncates towards zero
    right = max(-shift, 0)
    remainder, threshold = high & ((1 << right) - 1), (((1 << right) - 1) >> 1) + (high < 0)
    return (high >> right) + (remainder > threshold)


def windows(
    x: np.ndarray, kernel: Any, attributes: dict[str, Any], function: Callable[..., np.ndarray], fill: float = 0
) -> np.ndarray:
    """``function`` of each (kh, kw, C) window of the padded (H, W, C) map."""
    top, bottom, left, right = attributes["pads"]
    (stride_h, stride_w), (dilation_h, dilation_w) = attributes["stride"], attributes.get("dilation", (1, 1))
    padded = np.pad(x, ((top, bottom), (left, right), (0, 0)), constant_values=fill)
    reach_h, reach_w = dilation_h * (kernel[0] - 1) + 1, dilation_w * (kernel[1] - 1) + 1
    rows = range(0, padded.shape[0] - reach_h + 1, stride_h)
    columns = range(0, padded.shape[1] - reach_w + 1, stride_w)
    return np.array(
        [[function(padded[i : i + reach_h : dilation_h, j : j + reach_w : dilation_w]) for j in columns] for i in rows]
    )
