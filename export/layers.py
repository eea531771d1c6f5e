"""A node of an int8 Graph as the C runtime's ``tvad_layer``: numbers and arrays, not yet text.

Flows in: a Graph, a node, the way its weights are packed. Flows out: a ``Layer`` whose fields are those of the struct in
``runtime/tvad_model.h``. Multipliers and tables come from ``tinyvad.engines.int8_constants``, as the exact engine's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from tinyvad.engines.int8_constants import (
    TABLE_OPS,
    add_constants,
    folded_bias,
    mean_constants,
    mul_constants,
    requantisation,
    table_of,
    zero_point,
)
from tinyvad.engines.int8_grid import INT32_MAX, activation_limits, check_same_scale, int8_quantization
from tinyvad.errors import InputError
from tinyvad.export import packing
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.shapes import nearest_indices

PACKINGS = ("scalar", "mve")  # for plain C and DSP; for Helium

# op of tvad_model.h and its number
OPS = {
    "FRAME": 0, "CONV_1X1": 1, "CONV": 2, "DEPTHWISE": 3, "FULLY_CONNECTED": 4, "ADD": 5, "MUL": 6, "AVERAGE_POOL": 7,
    "MAX_POOL": 8, "MEAN": 9, "LOOKUP": 10, "COPY": 11, "PAD": 12, "RESIZE_NEAREST": 13, "EMBED": 14, "SCORE": 15,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """Fields of ``tvad_layer``.

    Attributes:
        op: a key of ``OPS``. name: of the output tensor.
        in_shape, out_shape: (h, w, C).
        kernel, stride: (h, w); pad: (top, left).
        zeros: zero points of first operand, second operand, output. limits: (low, high).
        weights: packed int8, LOOKUP's table or RESIZE_NEAREST's uint16 indices; bias, multiplier int32; shift int8.
    """

    op: str
    name: str
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: int = 1
    channel: int = 0
    zeros: tuple[int, int, int] = (0, 0, 0)
    limits: tuple[int, int] = (-128, 127)
    broadcast: bool = False
    weights: np.ndarray | None = None
    bias: np.ndarray | None = None
    multiplier: np.ndarray | None = None
    shift: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The constants that lie in flash, by the struct's field."""
        names = ("weights", "bias", "multiplier", "shift")
        return {name: array for name in names if (array := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of its constants in flash."""
        return sum(array.nbytes for array in self.arrays.values())


def map_shape(graph: Graph, name: str) -> tuple[int, int, int]:
    """(h, w, C) of a tensor; a vector is a map of one element."""
    shape = graph.tensors[name].shape[1:]
    padded = (1,) * (3 - len(shape)) + tuple(int(size) for size in shape)
    return padded[0], padded[1], padded[2]


def layer_of(graph: Graph, node: Node, packed_for: str = "scalar", operand: int = 0) -> Layer:
    """The layer of a node.

    Args:
        packed_for: one of ``PACKINGS``. operand: which operand of a concat this layer copies.

    Raises:
        InputError: an op or an operand that the C runtime does not have, by name.
    """
    activations = [name for name in node.inputs if name not in graph.constants]
    if node.op in ("add", "mul", "concat") and len(activations) < len(node.inputs):
        raise InputError(f"{node.op} -> {node.output}: the C runtime takes no constant operand; tap an earlier layer")
    first = activations[operand]
    zeros = [zero_point(graph, name) for name in (first, activations[-1], node.output)]
    ends: dict[str, Any] = {
        "name": node.output, "in_shape": map_shape(graph, first), "out_shape": map_shape(graph, node.output),
        "zeros": (zeros[0], zeros[1], zeros[2]), "limits": activation_limits(node, int8_quantization(graph, node.output)),
    }  # fmt: skip
    if node.op in ("conv2d", "depthwise_conv2d", "fully_connected"):
        return _weighted(graph, node, packed_for, ends)
    if node.op == "add":
        return Layer("ADD", **ends, bias=np.array(add_constants(graph, node), np.int32))
    if node.op == "mul":
        broadcast = map_shape(graph, activations[1])[:2] == (1, 1) and ends["in_shape"][:2] != (1, 1)
        return Layer("MUL", **ends, broadcast=broadcast, bias=np.array(mul_constants(graph, node), np.int32))
    if node.op in ("average_pool", "max_pool"):
        return _pool(graph, node, ends)
    if node.op == "mean":
        return Layer("MEAN", **ends, bias=np.array(mean_constants(graph, node), np.int32))
    if node.op in TABLE_OPS:
        return Layer("LOOKUP", **ends, weights=table_of(graph, node))
    if node.op == "reshape":
        return Layer("COPY", **{**ends, "in_shape": ends["out_shape"]})
    check_same_scale(graph, node)
    if node.op == "concat":
        channel = sum(map_shape(graph, name)[2] for name in activations[:operand])
        return Layer("COPY", **ends, channel=channel)
    if node.op == "pad":
        top, _, left, _ = node.attributes["pads"]
        return Layer("PAD", **ends, pad=(top, left))
    if node.op == "resize_nearest":
        flags = [bool(node.attributes.get(key)) for key in ("align_corners", "half_pixel_centers")]
        sizes = zip(ends["in_shape"][:2], ends["out_shape"][:2], strict=True)
        indices = np.concatenate([nearest_indices(size, out, *flags) for size, out in sizes])
        return Layer("RESIZE_NEAREST", **ends, weights=indices.astype(np.uint16))
    raise InputError(f"{node.op} -> {node.output}: the C runtime has no {node.op}; tap an earlier layer")


def _weighted(graph: Graph, node: Node, packed_for: str, ends: dict[str, Any]) -> Layer:
    weights = graph.constants[node.inputs[1]]
    multipliers, shifts, *_ = requantisation(graph, node)
    if int(np.abs(multipliers).max()) > INT32_MAX:
        raise InputError(f"{node.op} -> {node.output}: a multiplier does not fit 32 bits; quantise again")
    _check_raw_sums(graph, node)
    pack = _packer(packed_for)
    constants: dict[str, Any] = {
        "bias": folded_bias(graph, node).astype(np.int32),
        "multiplier": multipliers.astype(np.int32),
        "shift": shifts.astype(np.int8),
    }
    if node.op == "fully_connected":
        return Layer("FULLY_CONNECTED", **ends, **constants, weights=pack.pack_fully_connected(weights))
    top, _, left, _ = node.attributes["pads"]
    stride = tuple(int(s) for s in node.attributes["stride"])
    dilations = {int(d) for d in node.attributes.get("dilation", (1, 1))}
    kernel = (int(weights.shape[1]), int(weights.shape[2]))
    if len(dilations) > 1 and kernel != (1, 1):
        raise InputError(f"{node.op} -> {node.output}: the C runtime takes one dilation for both axes")
    geometry: dict[str, Any] = {"kernel": kernel, "stride": stride, "pad": (top, left), "dilation": dilations.pop()}
    if node.op == "depthwise_conv2d":
        return Layer("DEPTHWISE", **ends, **geometry, **constants, weights=pack.pack_depthwise(weights[0]))
    if kernel == (1, 1) and stride == (1, 1) and not any(node.attributes["pads"]):
        return Layer("CONV_1X1", **ends, **constants, weights=pack.pack_conv_1x1(weights[:, 0, 0]))
    return Layer("CONV", **ends, **geometry, **constants, weights=pack.pack_conv(weights))


def _check_raw_sums(graph: Graph, node: Node) -> None:
    """The runtime sums raw values onto the folded bias: refuse a layer in which that could leave int32."""
    weights = graph.constants[node.inputs[1]].astype(np.int64)
    others = (0, 1, 2) if node.op == "depthwise_conv2d" else tuple(range(1, weights.ndim))
    worst = int((np.abs(weights).sum(others) * 128 + np.abs(folded_bias(graph, node))).max())
    if worst > INT32_MAX:
        raise InputError(f"{node.op} -> {node.output}: sums of raw values can reach {worst}, beyond int32 ({INT32_MAX})")


def _packer(packed_for: str) -> ModuleType:
    if packed_for == "mve":
        from tinyvad.export import packing_mve

        return packing_mve
    return packing


def _pool(graph: Graph, node: Node, ends: dict[str, Any]) -> Layer:
    check_same_scale(graph, node)
    pads = node.attributes["pads"]
    if node.op == "average_pool" and node.attributes.get("count_include_pad") and any(pads):
        raise InputError(f"average_pool -> {node.output}: padding that counts is a separate pad op in int8")
    return Layer(
        "AVERAGE_POOL" if node.op == "average_pool" else "MAX_POOL", **ends, kernel=tuple(node.attributes["kernel"]),
        stride=tuple(node.attributes["stride"]), pad=(pads[0], pads[2]),
    )  # fmt: skip
