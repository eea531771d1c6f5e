"""The Graph: one small description of a network, to run, to quantise, to export and to plan.

Flows in: backbone definitions and importers build Graphs. Flows out: passes rewrite them, engines run them, exporters
write them, the planner reads shapes and lifetimes from them.

Conventions (those of TFLite, so that nothing is translated twice):

* activations are NHWC with batch 1; ``(1, H, W, C)``
* ``conv2d`` weights are ``(O, kh, kw, I)``, ``depthwise_conv2d`` weights ``(1, kh, kw, C)``, ``fully_connected`` ``(O, I)``
* padding is explicit, ``pads = (top, bottom, left, right)``; the pad value is real 0.0 (the zero point in int8)
* ReLU and ReLU6 are an attribute ``activation`` of the op that produces the value

=================== ============================== ============================================================
op                  inputs                         attributes
=================== ============================== ============================================================
conv2d              x, weights, bias               stride (sh, sw), pads, dilation (dh, dw), activation
depthwise_conv2d    x, weights, bias               stride, pads, dilation, activation
fully_connected     x, weights, bias               activation
batch_norm          x, scale (C,), offset (C,)     activation          (y = x * scale + offset; folded before use)
add, mul            x, y                           activation          (mul: y may be (1, 1, 1, C))
average_pool        x                              kernel, stride, pads, activation, count_include_pad (bool)
max_pool            x                              kernel, stride, pads, activation
mean                x                              (over H and W, keeps dims)
pad                 x                              pads
resize_nearest      x                              size (H, W), align_corners, half_pixel_centers (default False)
concat              x, y, ...                      axis 3
reshape             x                              shape
relu, relu6         x                              (only when they cannot be fused)
logistic, hard_swish x
quantize            x                              (uint8 or float32 in, int8 out; only at a graph's ends)
dequantize          x
=================== ============================== ============================================================
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyvad.errors import InputError


@dataclass(frozen=True, eq=False)
class Quantization:
    """Affine quantisation, real = scale * (q - zero_point).

    Attributes:
        scale: (1,) or, for per-channel weights, (C,) float32, > 0.
        zero_point: (1,) or (C,) int64; 0 for weights and biases.
        axis: the channel axis of ``scale``, None when per tensor.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None

    @staticmethod
    def per_tensor(scale: float, zero_point: int) -> Quantization:
        return Quantization(np.array([scale], np.float32), np.array([zero_point], np.int64))


@dataclass(frozen=True, eq=False)
class Tensor:
    """Name, shape, dtype (a NumPy dtype name) and quantisation of one value of the graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Node:
    """One operation: ``inputs`` and ``output`` name tensors of the graph."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Node:
        return dataclasses.replace(self, **changes)

    def with_attributes(self, **attributes: Any) -> Node:
        return dataclasses.replace(self, attributes={**self.attributes, **attributes})


@dataclass
class Graph:
    """Nodes in topological order, every tensor by name, constants as NumPy arrays."""

    name: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    tensors: dict[str, Tensor]
    constants: dict[str, np.ndarray]

    def copy(self, **changes: Any) -> Graph:
        """A graph that shares constants but not its lists and dicts with this one."""
        fields: dict[str, Any] = {
            "name": self.name,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "nodes": list(self.nodes),
            "tensors": dict(self.tensors),
            "constants": dict(self.constants),
        }
        return Graph(**{**fields, **changes})

    def producer(self, tensor: str) -> Node | None:
        return next((node for node in self.nodes if node.output == tensor), None)

    def consumers(self, tensor: str) -> list[Node]:
        return [node for node in self.nodes if tensor in node.inputs]

    @property
    def activations(self) -> list[str]:
        """Names of all values that are not constants: the inputs, then outputs in node order."""
        return [*self.inputs, *(node.output for node in self.nodes)]

    def macs(self) -> int:
        """Multiply-accumulates of one image, padding counted: conv, depthwise and fully connected only."""
        return sum(node_macs(self, node) for node in self.nodes)

    def parameters(self) -> int:
        """Number of constant values."""
        return sum(int(array.size) for array in self.constants.values())

    def check(self) -> None:
        """Raise InputError if a tensor is missing, produced twice, used before it is made, or an output is not made."""
        known = set(self.inputs) | set(self.constants)
        for node in self.nodes:
            for name in node.inputs:
                if name not in known:
                    raise InputError(f"graph {self.name}: {node.op} -> {node.output} reads {name}, which nothing makes")
            if node.output in known:
                raise InputError(f"graph {self.name}: {node.output} is produced twice")
            known.add(node.output)
        for name in self.outputs:
            if name not in known:
                raise InputError(f"graph {self.name}: output {name} is not made by any node")
        for name in known:
            if name not in self.tensors:
                raise InputError(f"graph {self.name}: tensor {name} has no description")


def node_macs(graph: Graph, node: Node) -> int:
    """Multiply-accumulates of one node (0 for anything but conv, depthwise, fully connected)."""
    if node.op == "fully_connected":
        return int(np.prod(graph.tensors[node.inputs[1]].shape))
    if node.op not in ("conv2d", "depthwise_conv2d"):
        return 0
    _, height, width, channels = graph.tensors[node.output].shape
    _, kernel_h, kernel_w, in_channels = graph.tensors[node.inputs[1]].shape
    per_output = kernel_h * kernel_w * (in_channels if node.op == "conv2d" else 1)
    return height * width * channels * per_output
