"""Output shapes: node and input shapes in, output shape out (NHWC, batch 1)."""

from __future__ import annotations

import dataclasses

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node

Shape = tuple[int, ...]


def window_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1) -> int:
    """Number of windows along one axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


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
    if op in ("conv2d", "depthwise_conv2d"):
        out, kernel_h, kernel_w, last = inputs[1]
        channels = out if op == "conv2d" else last
        if x[3] != last:
            raise InputError(f"{op} -> {node.output}: {x[3]} channels in, but weights for {last}")
        return (x[0], *_windows(node, x, (kernel_h, kernel_w)), channels)
    if op in ("average_pool", "max_pool"):
        return (x[0], *_windows(node, x, node.attributes["kernel"]), x[3])
    if op == "fully_connected":
        return (x[0], inputs[1][0])
    if op in ("add", "mul"):
        if inputs[1] != x and not (op == "mul" and inputs[1] == (x[0], 1, 1, x[3])):
            raise InputError(f"{op} -> {node.output}: shapes {x} and {inputs[1]} differ")
        return x
    if op == "mean":
        return (x[0], 1, 1, x[3])
    if op == "pad":
        top, bottom, left, right = node.attributes["pads"]
        return (x[0], x[1] + top + bottom, x[2] + left + right, x[3])
    if op == "resize_nearest":
        return (x[0], *node.attributes["size"], x[3])
    if op == "concat":
        return (*x[:3], sum(shape[3] for shape in inputs))
    if op == "reshape":
        return tuple(node.attributes["shape"])
    if op in ("batch_norm", "relu", "relu6", "logistic", "hard_swish", "quantize", "dequantize"):
        return x
    raise InputError(f"unknown operation {op} (tensor {node.output})")


def infer_shapes(graph: Graph, input_shape: Shape | None = None) -> Graph:
    """The same graph with every activation's shape computed anew, for another input size if one is given."""
    tensors = dict(graph.tensors)
    if input_shape is not None:
        name = graph.inputs[0]
        tensors[name] = dataclasses.replace(tensors[name], shape=tuple(input_shape))
    for node in graph.nodes:
        shape = infer_shape(node, [tensors[name].shape for name in node.inputs])
        tensors[node.output] = dataclasses.replace(tensors[node.output], shape=shape)
    return graph.copy(tensors=tensors)
