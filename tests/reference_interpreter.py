"""The Graph's meaning, written down once more as slowly and plainly as possible: float64, one window at a time.

Tests compare exporters, importers and passes with it. It shares no code with the library but the Graph's own classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinyvad.graph.ir import Graph, Node, Quantization


def run(graph: Graph, image: np.ndarray, on_grid: bool = False) -> dict[str, np.ndarray]:
    """Every value of ``graph`` for one (1, H, W, C) image; with ``on_grid`` each is rounded to its own quantisation."""

    def settle(name: str, value: np.ndarray) -> np.ndarray:
        tensor = graph.tensors[name]
        assert value.shape == tensor.shape, (name, value.shape, tensor.shape)
        if not on_grid or tensor.quantization is None:
            return value
        limits = np.iinfo(tensor.dtype)
        scale, zero_point = float(tensor.quantization.scale[0]), int(tensor.quantization.zero_point[0])
        return scale * (np.clip(np.rint(value / scale) + zero_point, limits.min, limits.max) - zero_point)

    values = {name: dequantized(array, graph.tensors[name].quantization) for name, array in graph.constants.items()}
    values[graph.inputs[0]] = settle(graph.inputs[0], image.astype(np.float64))
    for node in graph.nodes:
        result = compute(node, [values[name] for name in node.inputs])
        activation = node.attributes.get("activation", "none")
        if activation != "none":
            result = np.clip(result, 0, 6 if activation == "relu6" else np.inf)
        values[node.output] = settle(node.output, result)
    return values


def dequantized(array: np.ndarray, quantization: Quantization | None) -> np.ndarray:
    if quantization is None:
        return array.astype(np.float64)
    shape = [1] * array.ndim
    if quantization.axis is not None:
        shape[quantization.axis] = -1
    scale = quantization.scale.astype(np.float64).reshape(shape)
    return scale * (array.astype(np.float64) - quantization.zero_point.reshape(shape))


def compute(node: Node, inputs: list[np.ndarray]) -> np.ndarray:
    x, attributes = inputs[0], node.attributes
    match node.op:
        case "conv2d":
            return windows(x, inputs[1].shape[1:3], attributes, lambda p: (p * inputs[1]).sum((1, 2, 3))) + inputs[2]
        case "depthwise_conv2d":
            return windows(x, inputs[1].shape[1:3], attributes, lambda p: (p * inputs[1][0]).sum((0, 1))) + inputs[2]
        case "fully_connected":
            return x @ inputs[1].T + inputs[2]
        case "batch_norm":
            return x * inputs[1] + inputs[2]
        case "add":
            return x + inputs[1]
        case "mul":
            return x * inputs[1]
        case "average_pool":
            counted = attributes.get("count_include_pad")
            average = np.mean if counted else np.nanmean
            return windows(x, attributes["kernel"], attributes, lambda p: average(p, (0, 1)), 0 if counted else np.nan)
        case "max_pool":
            return windows(x, attributes["kernel"], attributes, lambda p: p.max((0, 1)), -np.inf)
        case "mean":
            return x.mean((1, 2), keepdims=True)
        case "pad":
            top, bottom, left, right = attributes["pads"]
            return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        case "resize_nearest":
            rows, columns = (nearest_rows(old, new, attributes) for old, new in zip(x.shape[1:3], attributes["size"]))
            return x[:, rows][:, :, columns]
        case "concat":
            return np.concatenate(inputs, 3)
        case "reshape":
            return x.reshape(attributes["shape"])
        case "relu":
            return np.maximum(x, 0)
        case "relu6":
            return np.clip(x, 0, 6)
        case "logistic":
            return 1 / (1 + np.exp(-x))
        case "hard_swish":
            return x * np.clip(x + 3, 0, 6) / 6
        case "quantize" | "dequantize":
            return x
    raise AssertionError(node.op)


def nearest_rows(size: int, out: int, attributes: dict[str, Any]) -> list[int]:
    """Source row of each output row, in float32 as TFLite computes it: 37 of 6 -> 74 is 2, not 37 * 6 // 74 = 3."""
    corners, offset = attributes.get("align_corners", False), 0.5 if attributes.get("half_pixel_centers") else 0.0
    ends = 1 if corners and out > 1 else 0
    ratio = np.float32(size - ends) / np.float32(out - ends)
    places = [np.float32(i + offset) * ratio for i in range(out)]
    return [min(math.floor(float(place) + (0.5 if corners else 0.0)), size - 1) for place in places]


def windows(x: np.ndarray, kernel: Any, attributes: dict[str, Any], function: Any, fill: float = 0.0) -> np.ndarray:
    """``function`` of each (kh, kw, C) window of the padded map."""
    top, bottom, left, right = attributes["pads"]
    (stride_h, stride_w), (dilation_h, dilation_w) = attributes["stride"], attributes.get("dilation", (1, 1))
    padded = np.pad(x[0], ((top, bottom), (left, right), (0, 0)), constant_values=fill)
    reach_h, reach_w = dilation_h * (kernel[0] - 1) + 1, dilation_w * (kernel[1] - 1) + 1
    rows = range(0, padded.shape[0] - reach_h + 1, stride_h)
    columns = range(0, padded.shape[1] - reach_w + 1, stride_w)
    return np.array(
        [[function(padded[i : i + reach_h : dilation_h, j : j + reach_w : dilation_w]) for j in columns] for i in rows]
    )[None]
