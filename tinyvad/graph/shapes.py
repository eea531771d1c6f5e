"""Output shapes: node and input shapes in, output shape out (NHWC, batch 1)."""

from __future__ import annotations

import math

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Node

Shape = tuple[int, ...]

_MAPS = ("conv2d", "depthwise_conv2d", "average_pool", "max_pool", "mean", "pad", "resize_nearest")


def window_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1) -> int:
    """Number of windows along one axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def nearest_indices(size: int, out: int, align_corners: bool = False, half_pixel_centers: bool = False) -> np.ndarray:
    """(out,) int64: which of ``size`` rows each of ``out`` rows of a resize_nearest copies.

    The ratio and its multiples are float32, as in TFLite: from 6 to 74 rows, row 37 is a copy of row 2, not of
    37 * 6 // 74 = 3. With ``align_corners`` both ends match and indices are rounded; with ``half_pixel_centers`` row i
    stands at i + 1/2. Source: TFLite's reference RESIZE_NEAREST_NEIGHBOR.
    """
    ends = 1 if align_corners and out > 1 else 0
    ratio = np.float32(size - ends) / np.float32(out - ends)
    offset = np.float32(0.5 if half_pixel_centers else 0.0)
    position = (np.arange(out, dtype=np.float32) + offset) * ratio  # (out,) float32
    rounded = np.floor(position.astype(np.float64) + (0.5 if align_corners else 0.0))
    return np.minimum(rounded, size - 1).astype(np.int64)


def _windows(node: Node, shape: Shape, kernel: tuple[int, int]) -> tuple[int, int]:
    top, bottom, left, right = node.attributes["pads"]
    stride_h, stride_w = node.attributes["stride"]
    dilation_h, dilation_w = node.attributes.get("dilation", (1, 1))
    height = window_size(shape[1], kernel[0], stride_h, top, bottom, dilation_h)
    width = window_size(shape[2], kernel[1], stride_w, left, right, dilation_w)
    if height < 1 or width < 1:
        raise InputError(
            f"{node.op} -> {node.output}: a {kernel[0]}x{kernel[1]} window does not fit the {shape[1]}x{shape[2]} "
            "map; use a larger --image-size"
        )
    return height, width


def infer_shape(node: Node, inputs: list[Shape]) -> Shape:
    """Shape of ``node``'s output. Raises InputError for shapes that don't go together or an unknown op."""
    x = inputs[0]
    op = node.op
    where = f"{op} -> {node.output}"
    if op in _MAPS and len(x) != 4:
        raise InputError(f"{where}: needs a map (1, H, W, C), but its input is {x}; tap an earlier layer")
    if op in ("conv2d", "depthwise_conv2d"):
        out, kernel_h, kernel_w, last = inputs[1]
        channels = out if op == "conv2d" else last
        if x[3] != last:
            raise InputError(f"{where}: {x[3]} channels in, but weights for {last}")
        return (x[0], *_windows(node, x, (kernel_h, kernel_w)), channels)
    if op in ("average_pool", "max_pool"):
        return (x[0], *_windows(node, x, node.attributes["kernel"]), x[3])
    if op == "fully_connected":
        if x[1:] != inputs[1][1:]:
            raise InputError(f"{where}: {x[1:]} values in, but weights for {inputs[1][1:]}")
        return (x[0], inputs[1][0])
    if op in ("add", "mul"):
        if inputs[1] != x and not (op == "mul" and inputs[1] == (x[0], *(1,) * (len(x) - 2), x[-1])):
            raise InputError(f"{where}: shapes {x} and {inputs[1]} differ")
        return x
    if op == "mean":
        return (x[0], 1, 1, x[3])
    if op == "pad":
        top, bottom, left, right = node.attributes["pads"]
        return (x[0], x[1] + top + bottom, x[2] + left + right, x[3])
    if op == "resize_nearest":
        return (x[0], *node.attributes["size"], x[3])
    if op == "concat":
        if any(shape[:-1] != x[:-1] for shape in inputs):
            raise InputError(f"{where}: shapes {inputs} differ in more than channels")
        return (*x[:-1], sum(shape[-1] for shape in inputs))
    if op == "reshape":
        shape = tuple(node.attributes["shape"])
        if math.prod(shape) != math.prod(x):
            raise InputError(f"{where}: {x} has {math.prod(x)} values, {shape} has {math.prod(shape)}")
        return shape
    if op in ("batch_norm", "relu", "relu6", "logistic", "hard_swish", "quantize", "dequantize"):
        return x
    raise InputError(f"unknown operation {op} (tensor {node.output})")
