"""Explicit padding into TFLite's two paddings: a Graph in, an equal Graph out whose windows are all SAME or VALID.

The Graph carries ``pads = (top, bottom, left, right)``; a ``.tflite`` knows only VALID (none) and SAME (as much as
makes the output ceil(size / stride), the odd one at the end). What fits neither is mended in the cheapest exact way:

* **convolutions: a larger kernel.** PyTorch pads a 7x7 stride 2 window by 3 on both sides; on an even size SAME pads 2
  and 3. An 8x8 kernel whose last row and column are zero has SAME's padding 3 and 3, and the same windows. Zero weights
  add nothing, in int8 neither ((x - zero_point) * 0), so the result is equal bit for bit.
* **anything else: a ``pad`` op** in front. It copies the whole map, input and output are alive at once, and that is
  where the arena's peak stands in networks that came from PyTorch; hence the last choice.

Pooling does not count padding (TFLite's SAME does not either): only zeros that count, or that cannot win a maximum,
may become a ``pad`` op.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.shapes import window_size
from tinyvad.graph.tflite_conversion import same_pads

NO_PADS = (0, 0, 0, 0)


class Axis(NamedTuple):
    """One axis of a window op: ``out`` windows of ``kernel`` taps, the first one ``before`` the map's edge."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    before: int

    def needs_no_padding(self) -> bool:
        """Are these VALID's windows? (Padding behind that no window reads does not matter.)"""
        return self.before == 0 and self.out == window_size(self.size, self.kernel, self.stride, 0, 0, self.dilation)

    def after(self) -> int:
        """Padding behind the map that some window reads."""
        end = (self.out - 1) * self.stride + self.dilation * (self.kernel - 1) + 1 - self.before
        return max(end - self.size, 0)

    def same_zeros(self) -> tuple[int, int] | None:
        """Fewest zero taps (before, after) the kernel that make these windows SAME's, None if none do."""
        if self.out != -(-self.size // self.stride):
            return None
        reach = self.dilation * (self.kernel - 1) + 1
        for zeros in range(2 * self.before + reach + self.stride + 1):
            padded, _ = same_pads(self.size, self.kernel + zeros, self.stride, self.dilation)
            for front in range(zeros + 1):
                if padded == self.before + front * self.dilation:
                    return front, zeros - front
        return None


def lower_pads(graph: Graph) -> Graph:
    """The same function with no pads but those of SAME and VALID; also for another exporter that knows only these.

    Args:
        graph: float or int8 Graph with explicit pads; shapes are those of the size it will run at.

    Returns:
        Graph: kernels grown by zeros and ``pad`` nodes added where needed, each window op's ``pads`` those of VALID
        (all zero) or of SAME. Outputs are equal, bit for bit in int8.

    Raises:
        InputError: a pool whose padding TFLite cannot express.
    """
    lowered = graph.copy(nodes=[])
    for node in graph.nodes:
        if node.op in ("conv2d", "depthwise_conv2d"):
            kernel = graph.tensors[node.inputs[1]].shape[1:3]
            lowered.nodes += _lower_conv(lowered, node, _axes(graph, node, (kernel[0], kernel[1])), graph.nodes)
        elif node.op in ("average_pool", "max_pool"):
            lowered.nodes += _lower_pool(lowered, node, _axes(graph, node, node.attributes["kernel"]))
        else:
            lowered.nodes.append(node)
    used = {name for node in lowered.nodes for name in node.inputs} | set(lowered.outputs)
    for name in graph.constants:
        if name not in used:
            del lowered.constants[name], lowered.tensors[name]
    return lowered


def fresh_name(graph: Graph, name: str) -> str:
    """``name``, or ``name`` with underscores behind where the graph has a tensor of that name."""
    while name in graph.tensors:
        name += "_"
    return name


def _axes(graph: Graph, node: Node, kernel: tuple[int, int]) -> tuple[Axis, Axis]:
    before = node.attributes["pads"][0::2]  # top, left
    dilation = node.attributes.get("dilation", (1, 1))
    size, out = graph.tensors[node.inputs[0]].shape[1:3], graph.tensors[node.output].shape[1:3]
    rows, columns = zip(size, out, kernel, node.attributes["stride"], dilation, before, strict=True)
    return Axis(*rows), Axis(*columns)


def _lower_conv(graph: Graph, node: Node, axes: tuple[Axis, Axis], all_nodes: list[Node]) -> list[Node]:
    if all(axis.needs_no_padding() for axis in axes):
        return [node.with_attributes(pads=NO_PADS)]
    rows, columns = (axis.same_zeros() for axis in axes)
    if rows is None or columns is None:
        return _behind_pad(graph, node, axes)
    x, weights, bias = node.inputs
    if rows != (0, 0) or columns != (0, 0):
        # (O or 1, kh, kw, I or C) -> (O or 1, kh + a + b, kw + a + b, I or C)
        grown = np.pad(graph.constants[weights], ((0, 0), rows, columns, (0, 0)))
        # weights that another node reads too stay as they are for it
        is_shared = sum(other.inputs.count(weights) for other in all_nodes) > 1
        name = fresh_name(graph, f"{weights}_{grown.shape[1]}x{grown.shape[2]}") if is_shared else weights
        graph.constants[name] = grown
        graph.tensors[name] = dataclasses.replace(graph.tensors[weights], name=name, shape=grown.shape)
        weights = name
    kernel = graph.tensors[weights].shape[1:3]
    return [node.replace(inputs=(x, weights, bias)).with_attributes(pads=_same(axes, kernel))]


def _lower_pool(graph: Graph, node: Node, axes: tuple[Axis, Axis]) -> list[Node]:
    if all(axis.needs_no_padding() for axis in axes):
        return [node.with_attributes(pads=NO_PADS)]
    zeros_count = node.op == "average_pool" and node.attributes.get("count_include_pad", False)
    if not zeros_count and all(axis.same_zeros() == (0, 0) for axis in axes):
        return [node.with_attributes(pads=_same(axes, node.attributes["kernel"]))]
    if zeros_count or (node.op == "max_pool" and _never_negative(graph, node.inputs[0])):
        return _behind_pad(graph, node, axes)
    raise InputError(
        f"{node.op} -> {node.output}: pads {tuple(node.attributes['pads'])} on a {axes[0].size}x{axes[1].size} map are "
        "neither TFLite's SAME nor VALID; use another --image-size or tap an earlier layer"
    )


def _same(axes: tuple[Axis, Axis], kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
    rows, columns = (
        same_pads(axis.size, taps, axis.stride, axis.dilation) for axis, taps in zip(axes, kernel, strict=True)
    )
    return (*rows, *columns)


def _behind_pad(graph: Graph, node: Node, axes: tuple[Axis, Axis]) -> list[Node]:
    """A pad op, then the node without padding."""
    rows, columns = axes
    x = graph.tensors[node.inputs[0]]
    pads = (rows.before, rows.after(), columns.before, columns.after())
    shape = (x.shape[0], x.shape[1] + sum(pads[:2]), x.shape[2] + sum(pads[2:]), x.shape[3])
    padded = fresh_name(graph, f"{node.output}_padded")
    graph.tensors[padded] = dataclasses.replace(x, name=padded, shape=shape)
    attributes = {"pads": NO_PADS, "count_include_pad": False} if node.op == "average_pool" else {"pads": NO_PADS}
    inputs = (padded, *node.inputs[1:])
    return [Node("pad", (x.name,), padded, {"pads": pads}), node.replace(inputs=inputs).with_attributes(**attributes)]


def _never_negative(graph: Graph, name: str) -> bool:
    """Is every value of the tensor known to be 0 or more, so that a padded 0 cannot win a maximum?"""
    quantization = graph.tensors[name].quantization
    if quantization is not None and int(quantization.zero_point[0]) == np.iinfo(graph.tensors[name].dtype).min:
        return True
    producer = graph.producer(name)
    return producer is not None and (
        producer.op in ("relu", "relu6", "logistic") or producer.attributes.get("activation", "none") != "none"
    )
