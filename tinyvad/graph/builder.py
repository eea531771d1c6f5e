"""Builds a Graph node by node, with shapes inferred on the way; backbones and importers use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tinyvad.graph.ir import Graph, Node, Tensor
from tinyvad.graph.shapes import infer_shape


class GraphBuilder:
    """Adds nodes one by one and infers their shapes; backbones and importers build with it.

    Example::

        b = GraphBuilder("net", (1, 224, 224, 3))
        x = b.add("conv2d", [b.input, b.constant("w", w), b.constant("b", bias)], "stem", stride=(2, 2), ...)
        graph = b.finish([x])
    """

    def __init__(self, name: str, input_shape: tuple[int, ...], input_name: str = "input") -> None:
        self.graph = Graph(name, [input_name], [], [], {input_name: Tensor(input_name, tuple(input_shape))}, {})

    @property
    def input(self) -> str:
        return self.graph.inputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        self.graph.constants[name] = value
        self.graph.tensors[name] = Tensor(name, tuple(value.shape), value.dtype.name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.graph.tensors[name].shape

    def add(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        node = Node(op, tuple(inputs), output, attributes)
        shape = infer_shape(node, [self.graph.tensors[name].shape for name in node.inputs])
        self.graph.nodes.append(node)
        self.graph.tensors[output] = Tensor(output, shape)
        return output

    def finish(self, outputs: Iterable[str]) -> Graph:
        self.graph.outputs = list(outputs)
        self.graph.check()
        return self.graph
