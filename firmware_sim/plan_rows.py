"""Which rows of its operands each row of a tensor needs: an int8 Graph in, a ``Network`` out, the planner's view of it.

A network is a list of works in order: the first makes the network's input from the camera's pixels, the others are the
graph's nodes. Of each the planner needs to know how far into its operands the first n output rows reach, from which row on
the others still read, whether it can be made a few rows at a time, and in whose place it may write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinyvad.errors import InputError
from tinyvad.firmware_sim.memory import align
from tinyvad.graph.ir import Graph, Node, Tensor
from tinyvad.graph.schedule import FRAME, INPUT_PIXELS
from tinyvad.graph.shapes import nearest_indices

ROW_BY_ROW = ("conv2d", "depthwise_conv2d", "average_pool", "max_pool", "pad", "resize_nearest")
ELEMENTWISE = ("add", "mul", "relu", "relu6", "logistic", "hard_swish", "concat")
WHOLE = ("mean", "fully_connected", "reshape")  # each output value may need all rows
IN_PLACE = ("add", "mul", "relu", "relu6", "logistic", "hard_swish")


@dataclass(frozen=True, eq=False)
class Operand:
    """An operand of a work.

    Attributes:
        value: its name.
        start: (n + 1,) int64 for n output rows; rows r and later read operand rows from start[r] on.
        ahead: (b,) int64 -> (b,) int64; output rows before row r read operand rows before ahead(r). Not clipped to the map:
            for rows above it (r <= 0) it says how much earlier the operand must be begun.
    """

    value: str
    start: np.ndarray
    ahead: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Work:
    """What makes one value.

    Attributes:
        index: of the node in the graph, -1 for the frame.
        op, output: what, and the name of what it makes.
        operands: that are no constants; ``positions``: of each among the node's inputs.
        scratch: bytes.
        by_rows: it can be made a few rows at a time.
        in_place: operands in whose place it may write row by row, at the same bytes.
        whole_in_place: operand in whose place it may write if the whole map is made at once, '' for none.
    """

    index: int
    op: str
    output: str
    operands: tuple[Operand, ...]
    positions: tuple[int, ...]
    scratch: int
    by_rows: bool
    in_place: tuple[str, ...] = ()
    whole_in_place: str = ""


@dataclass(eq=False)
class Value:
    """An activation: ``rows`` rows of ``row_bytes``; ``maker`` and ``readers`` are works, the pixels' maker is -1.

    ``tap`` is its number among the graph's outputs, None if it is not tapped.
    """

    name: str
    rows: int
    row_bytes: int
    is_map: bool
    maker: int
    tap: int | None
    readers: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the whole, aligned as buffers are."""
        return align(self.rows * self.row_bytes)

    @property
    def last_reader(self) -> int:
        """The last work that reads it, its maker if none does."""
        return max([self.maker, *self.readers])


@dataclass(frozen=True, eq=False)
class Network:
    """Works in order and every value by name; the values of the taps are ``taps``."""

    works: list[Work]
    values: dict[str, Value]
    taps: tuple[str, ...]


def read_network(
    graph: Graph, has_frame: bool, frame_scratch: int, layer_scratch: Callable[[Graph, Node], int]
) -> Network:
    """The planner's view of an int8 graph.

    Args:
        has_frame: the pixels lie in a camera's memory, not in the arena.
        frame_scratch: bytes for making rows of the input.
        layer_scratch: bytes that a node's kernel needs.

    Raises:
        InputError: not int8, several inputs, an output tapped twice or not made, or an op that cannot be planned.
    """
    if len(graph.inputs) != 1:
        raise InputError(f"graph {graph.name}: has {len(graph.inputs)} inputs; a firmware's network has one")
    for name in graph.activations:
        if graph.tensors[name].dtype != "int8":
            raise InputError(f"graph {graph.name}: tensor {name} is {graph.tensors[name].dtype}; only int8 can be planned")
    source = graph.tensors[graph.inputs[0]]
    if len(source.shape) != 4:
        raise InputError(f"graph {graph.name}: input {source.name} has shape {source.shape}; it must be (1, H, W, C)")
    if len(set(graph.outputs)) != len(graph.outputs) or not set(graph.outputs) <= set(graph.activations):
        raise InputError(f"graph {graph.name}: an output is tapped twice or is not made by it: {', '.join(graph.outputs)}")

    values = {name: _value(graph, graph.tensors[name], i) for i, name in enumerate(graph.activations)}
    first = Work(-1, FRAME, source.name, (), (), frame_scratch, by_rows=True)
    if not has_frame:
        rows = source.shape[1]
        pixels = Value(INPUT_PIXELS, rows, values[source.name].row_bytes, True, -1, None)
        values[INPUT_PIXELS] = pixels
        operands = (_same_rows(INPUT_PIXELS, rows),)
        first = Work(-1, FRAME, source.name, operands, (0,), frame_scratch, by_rows=True, in_place=(INPUT_PIXELS,))
    works = [first, *(_work(graph, i, node, layer_scratch) for i, node in enumerate(graph.nodes))]
    for i, work in enumerate(works):
        for name in dict.fromkeys(operand.value for operand in work.operands):
            values[name].readers.append(i)
    return Network(works, values, tuple(graph.outputs))


def _value(graph: Graph, tensor: Tensor, maker: int) -> Value:
    is_map = len(tensor.shape) == 4
    rows = tensor.shape[1] if is_map else 1
    tap = graph.outputs.index(tensor.name) if tensor.name in graph.outputs else None
    return Value(tensor.name, rows, tensor.nbytes // rows, is_map, maker, tap)


def _work(graph: Graph, index: int, node: Node, layer_scratch: Callable[[Graph, Node], int]) -> Work:
    if node.op not in (*ROW_BY_ROW, *ELEMENTWISE, *WHOLE):
        raise InputError(f"{node.op} -> {node.output}: the firmware has no such operation; tap an earlier layer")
    positions = tuple(i for i, name in enumerate(node.inputs) if name not in graph.constants)
    names = [node.inputs[i] for i in positions]
    if node.op == "concat" and len(names) < len(node.inputs):
        raise InputError(f"concat -> {node.output}: a constant operand cannot be planned; tap an earlier layer")
    in_place: Sequence[str] = ()
    if node.op in IN_PLACE:  # of a product the second operand may be one vector for the whole map
        in_place = [name for name in (node.inputs if node.op == "add" else node.inputs[:1]) if name in names]
    return Work(
        index, node.op, node.output, tuple(_operand(graph, node, name) for name in names), positions,
        layer_scratch(graph, node),
        by_rows=node.op not in WHOLE and len(graph.tensors[node.output].shape) == 4,
        in_place=tuple(in_place),
        whole_in_place=names[0] if _shrinks_in_place(graph, node) else "",
    )  # fmt: skip


def _shrinks_in_place(graph: Graph, node: Node) -> bool:
    """A depthwise kernel takes a channel's input rows away before it writes that channel's output rows."""
    if node.op != "depthwise_conv2d" or node.inputs[0] in graph.constants:
        return False
    x, y = graph.tensors[node.inputs[0]].shape, graph.tensors[node.output].shape
    kernel_h, dilation_h = graph.tensors[node.inputs[1]].shape[1], node.attributes.get("dilation", (1, 1))[0]
    return y[1] <= x[1] and y[2] <= x[2] and node.attributes["pads"][0] <= (kernel_h - 1) * dilation_h


def _operand(graph: Graph, node: Node, name: str) -> Operand:
    shape, out = graph.tensors[name].shape, graph.tensors[node.output].shape
    size = shape[1] if len(shape) == 4 else 1
    made = out[1] if len(out) == 4 else 1
    if node.op in WHOLE or len(out) != 4 or (node.op in ELEMENTWISE and size != made):  # also a gate (1, 1, C)
        return Operand(name, np.where(np.arange(made + 1) < made, 0, size), lambda row: np.where(row > 0, size, 0))
    if node.op in ELEMENTWISE:
        return _same_rows(name, size)
    if node.op == "resize_nearest":
        flags = [bool(node.attributes.get(key)) for key in ("align_corners", "half_pixel_centers")]
        source = np.append(nearest_indices(size, made, *flags), size)
        return Operand(
            name, source, lambda row: np.where(row > 0, source[np.clip(row, 1, made) - 1] + 1, row * size // made)
        )
    stride, top, kernel, dilation = 1, node.attributes["pads"][0], 1, 1
    if node.op != "pad":
        stride, dilation = node.attributes["stride"][0], node.attributes.get("dilation", (1, 1))[0]
        kernel = node.attributes["kernel"][0] if "kernel" in node.attributes else graph.tensors[node.inputs[1]].shape[1]
    start = np.clip(np.arange(made + 1) * stride - top, 0, size)
    start[made] = size
    return Operand(name, start, lambda row: (row - 1) * stride - top + dilation * (kernel - 1) + 1)


def _same_rows(name: str, size: int) -> Operand:
    return Operand(name, np.arange(size + 1), lambda row: row)
