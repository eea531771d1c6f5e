"""Which values of a network can be tapped, what they are called, and which are taken when nobody says.

A **block end** is the value in which a block of a network leaves its result. It is a map of more than one pixel,
before any global pooling, and either

* an ``add`` (the end of a residual block, with or without ReLU) or a ``concat``, or
* a 1x1 ``conv2d`` without activation (the linear projection of MobileNetV2, MobileNetV3, MCUNet, PhiNet),

and it is neither only read by an ``add`` (then that add ends the block) nor read by an activation, gate or batch norm
(then the block isn't over). Networks without any (VGG, MobileNetV1) have one block a layer: every map that is followed
by no activation and doesn't come from a pad or pool.

**Default layers**: the last block end at stride 4, at stride 8 and at stride 16. For MCUNet-in3 these are blocks 4, 7
and 13 (from 0), for MobileNetV2 torchvision's features 3, 6 and 13, for ResNet layer1, layer2 and layer3.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, node_macs

DEFAULT_STRIDES = (4, 8, 16)
ELEMENTWISE = ("relu", "relu6", "logistic", "hard_swish", "mul", "batch_norm")
LONG_NAME = 60  # characters; longer names are offered as block:N


class TapCandidate(NamedTuple):
    """A block end: its tensor, its stride relative to the input, and its size."""

    name: str
    stride: int
    channels: int
    height: int
    width: int


class LayerRow(NamedTuple):
    """One node of the graph; ``block`` counts the block ends from 0, None for any other value."""

    name: str
    op: str
    shape: tuple[int, ...]
    stride: int | None
    macs: int
    parameters: int
    block: int | None


def tap_candidates(graph: Graph) -> list[TapCandidate]:
    """The block ends (see the module's text) in the order in which the network makes them."""
    strides = _strides(graph)
    maps = [node for node in graph.nodes if _is_map(graph, node, strides)]
    ends = [node for node in maps if _ends_block(graph, node)]
    if not ends:
        moves_values = ("pad", "average_pool", "max_pool", "resize_nearest", "quantize", "dequantize")
        ends = [node for node in maps if node.op not in moves_values and not _goes_on(graph, node)]
    candidates = []
    for node in ends:
        _, height, width, channels = graph.tensors[node.output].shape
        candidates.append(TapCandidate(node.output, strides[node.output] or 0, channels, height, width))
    return candidates


def default_layers(graph: Graph) -> list[str]:
    """The last block end at each of the strides 4, 8 and 16; a stride without one is left out.

    Raises:
        InputError: no block end at any of them.
    """
    last = {candidate.stride: candidate.name for candidate in tap_candidates(graph)}
    layers = [last[stride] for stride in DEFAULT_STRIDES if stride in last]
    if not layers:
        raise InputError(
            f"graph {graph.name}: no block ends at stride 4, 8 or 16, so there are no default layers; choose with "
            "--layers among those that `tinyvad backbones PATH` lists"
        )
    return layers


def layer_table(graph: Graph) -> list[LayerRow]:
    """One row a node: name, op, output shape, stride, multiply-accumulates, constants, index among the block ends."""
    strides = _strides(graph)
    blocks = {candidate.name: i for i, candidate in enumerate(tap_candidates(graph))}
    rows = []
    for node in graph.nodes:
        parameters = sum(int(graph.constants[name].size) for name in node.inputs if name in graph.constants)
        shape, macs = graph.tensors[node.output].shape, node_macs(graph, node)
        rows.append(
            LayerRow(node.output, node.op, shape, strides[node.output], macs, parameters, blocks.get(node.output))
        )
    return rows


def resolve_layer(graph: Graph, text: str, aliases: Mapping[str, str] | None = None) -> str:
    """The tensor that ``text`` names.

    Tried in this order: a value's exact name; a name in ``aliases`` (other names of the same values, see
    ``tinyvad.graph.onnx_import``); ``block:N``, the N-th block end from 0; a module's path as PyTorch's exporter spells
    it (``layer2`` or ``blocks.3``), which means the last block end inside that module, or its last value if none.

    Raises:
        InputError: nothing is called so; the message has the nearest names and how to list all.
    """
    values = [node.output for node in graph.nodes]
    if text in values:
        return text
    if aliases and aliases.get(text) in values:
        return aliases[text]
    candidates = [candidate.name for candidate in tap_candidates(graph)]
    if text.startswith("block:"):
        number = text.removeprefix("block:")
        if number.isascii() and number.isdigit() and int(number) < len(candidates):
            return candidates[int(number)]
        raise InputError(
            f"graph {graph.name}: no layer {text}; it has block:0 to block:{len(candidates) - 1}, "
            "listed by `tinyvad backbones PATH`"
        )
    for names in (candidates, values):
        inside = [name for name in names if f"/{text.strip('/')}/" in f"/{name}"]
        if inside and text.strip("/"):
            return inside[-1]
    near = difflib.get_close_matches(text, values, n=3, cutoff=0.4) or candidates[-3:]
    shown = [
        f"block:{candidates.index(name)}" if name in candidates and len(name) > LONG_NAME else name for name in near
    ]
    nearest = f"nearest: {', '.join(shown)}; " if shown else ""
    raise InputError(f"graph {graph.name}: no layer {text}; {nearest}`tinyvad backbones PATH` lists all")


def _strides(graph: Graph) -> dict[str, int | None]:
    """Stride of each activation relative to the input, along the height; None after global pooling and for vectors."""
    strides: dict[str, int | None] = dict.fromkeys(graph.inputs, 1)
    for node in graph.nodes:
        inputs = [stride for name in node.inputs if (stride := strides.get(name)) is not None]
        shape = graph.tensors[node.output].shape
        if not inputs or len(shape) != 4 or node.op in ("mean", "reshape"):
            strides[node.output] = None
        elif node.op == "resize_nearest":
            strides[node.output] = round(max(inputs) * graph.tensors[node.inputs[0]].shape[1] / shape[1])
        else:
            strides[node.output] = max(inputs) * node.attributes.get("stride", (1, 1))[0]
    return strides


def _is_map(graph: Graph, node: Node, strides: Mapping[str, int | None]) -> bool:
    """A value with a stride and more than one pixel."""
    shape = graph.tensors[node.output].shape
    return strides[node.output] is not None and shape[1] * shape[2] > 1


def _ends_block(graph: Graph, node: Node) -> bool:
    if node.op == "conv2d":
        kernel = graph.tensors[node.inputs[1]].shape[1:3]
        if kernel != (1, 1) or node.attributes.get("activation", "none") != "none":
            return False
    elif node.op not in ("add", "concat"):
        return False
    readers = graph.consumers(node.output)
    only_added = bool(readers) and all(reader.op == "add" for reader in readers) and node.output not in graph.outputs
    return not only_added and not _goes_on(graph, node)


def _goes_on(graph: Graph, node: Node) -> bool:
    """An activation, gate or batch norm follows: the value is not the last of its layer."""
    return any(reader.op in ELEMENTWISE for reader in graph.consumers(node.output))
