"""Passes: a Graph in, an equal but simpler Graph out; the one given is never changed.

``normalise`` is what an imported network goes through: batch norms folded into the weights before them, standalone
activations and zero padding fused into the op that can carry them, hard-swish and hard-sigmoid recognised, dead nodes
dropped.
``truncate`` keeps what a choice of layers needs. The layers themselves are described in ``tinyvad.graph.taps``, whose
functions can be imported from here too.

Two ops are merged only if nothing else reads the value between them and it isn't an output of the graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, Tensor
from tinyvad.graph.taps import (
    LayerRow,
    TapCandidate,
    default_layers,
    layer_table,
    resolve_layer,
    tap_candidates,
)

__all__ = [
    "LayerRow",
    "TapCandidate",
    "batchnorm_to_depthwise",
    "default_layers",
    "fold_batchnorm",
    "fuse_activations",
    "fuse_hard_sigmoid",
    "fuse_hard_swish",
    "fuse_pad",
    "layer_table",
    "normalise",
    "prune",
    "resolve_layer",
    "tap_candidates",
    "truncate",
]

# Ops that a per-channel scale and offset folds into, with the axis of the output channel in their first constant.
FOLD_AXIS = {"conv2d": 0, "depthwise_conv2d": 3, "fully_connected": 0, "batch_norm": 0}
CAN_ACTIVATE = (*FOLD_AXIS, "add", "mul", "average_pool", "max_pool")


def fold_batchnorm(graph: Graph) -> Graph:
    """Fold each batch_norm into the conv2d, depthwise_conv2d, fully_connected or batch_norm that feeds only it.

    With y = (w x + b) * s + o, the new weights are w * s and the new bias is b * s + o, computed in float64 and stored
    as float32. A batch norm after anything else (a concat, an add, a value that is also read elsewhere) stays.

    Raises:
        InputError: folded weights are not finite (the file is damaged).
    """
    graph = graph.copy()
    for norm in list(graph.nodes):
        producer = _only_producer(graph, norm.inputs[0]) if norm.op == "batch_norm" else None
        if producer is None or producer.op not in FOLD_AXIS or not _is_linear(producer):
            continue
        scale, offset = (graph.constants[name].astype(np.float64) for name in norm.inputs[1:])  # (C,), (C,)
        weights, bias = (graph.constants[name].astype(np.float64) for name in producer.inputs[-2:])
        shape = [1] * weights.ndim
        shape[FOLD_AXIS[producer.op]] = -1
        with np.errstate(over="ignore"):
            folded = (weights * scale.reshape(shape)).astype(np.float32), (bias * scale + offset).astype(np.float32)
        if not all(np.isfinite(array).all() for array in folded):
            raise InputError(f"graph {graph.name}: batch_norm -> {norm.output} makes weights that are not finite")
        new_names = [
            _add_constant(graph, producer, name, array) for name, array in zip(producer.inputs[-2:], folded)
        ]
        merged = producer.replace(inputs=(*producer.inputs[:-2], *new_names))
        _merge(graph, producer, norm, merged.with_attributes(activation=_activation(norm)))
    return prune(graph)


def fuse_activations(graph: Graph) -> Graph:
    """Make each standalone relu or relu6 an attribute of the op that feeds only it.

    Quantised values stay as they are: the fused op would round once where the two ops round twice.
    """
    graph = graph.copy()
    for node in list(graph.nodes):
        producer = _only_producer(graph, node.inputs[0]) if node.op in ("relu", "relu6") else None
        if producer is None or producer.op not in CAN_ACTIVATE or not _is_linear(producer):
            continue
        if graph.tensors[node.output].quantization is None:
            _merge(graph, producer, node, producer.with_attributes(activation=node.op))
    return graph


def fuse_hard_swish(graph: Graph) -> Graph:
    """Replace x * relu6(x + 3) / 6, as older exporters spell it, by hard_swish(x); the factor may stand anywhere."""
    graph = graph.copy()
    for node in list(graph.nodes):
        if node.op != "mul" or not _is_linear(node):
            continue
        for source, factor in _gated(graph, node):
            replaced = node
            readers = graph.consumers(node.output)
            if len(readers) == 1 and node.output not in graph.outputs and _uniform_scale(graph, readers[0]):
                replaced = readers[0]
                factor *= _uniform_scale(graph, replaced)
            if np.isclose(factor, 1 / 6, rtol=1e-5):
                swish = Node("hard_swish", (source,), replaced.output)
                graph = prune(graph.copy(nodes=[swish if other is replaced else other for other in graph.nodes]))
                break
    return graph


def fuse_hard_sigmoid(graph: Graph) -> Graph:
    """Move a scale in front of a product into the weights of the convolution behind: conv(x * (k g)) = conv'(x * g).

    A squeeze-and-excite gate relu6(g + 3) / 6 so becomes a ReLU6 of the gate's own convolution, whose bias holds the 3, and
    the 1/6 costs nothing, exactly. The scale may also stand behind the product. It stays where a value on the way is an
    output or is read by anything else, as that would change; the values on the way get new names, for they lose the factor.
    """
    graph = graph.copy()
    for norm in [node for node in graph.nodes if node.op == "batch_norm"]:
        scale, offset = (graph.constants[name] for name in norm.inputs[1:])  # (C,), (C,)
        way = _way_to_weights(graph, norm)
        if offset.any() or not _is_linear(norm) or not way:
            continue
        *between, reader = way
        name = norm.inputs[0]
        replaced: dict[int, Node] = {}  # by id: the nodes on the way and what they become
        for old, made in zip(between, (norm.output, *(node.output for node in between))):
            new = old.replace(inputs=tuple(name if read == made else read for read in old.inputs))
            name = f"{old.output}:unscaled"
            graph.tensors[name] = dataclasses.replace(graph.tensors[old.output], name=name)
            replaced[id(old)] = new.replace(output=name)
        weights = graph.constants[reader.inputs[1]]  # (..., C): all three keep the input's channels last
        scaled = _add_constant(graph, reader, reader.inputs[1], (weights * scale).astype(np.float32))
        replaced[id(reader)] = reader.replace(inputs=(name, scaled, *reader.inputs[2:]))
        graph.nodes = [replaced.get(id(node), node) for node in graph.nodes if node is not norm]
    return prune(graph)


def fuse_pad(graph: Graph) -> Graph:
    """Move a zero pad into the pads of each conv2d or depthwise_conv2d that reads it.

    Not into pools: max_pool pads with minus infinity, and an average over padding zeros needs a pad op of its own in
    TFLite. Not where the pad changes the quantisation.
    """
    graph = graph.copy()
    for pad in [node for node in graph.nodes if node.op == "pad"]:
        if not _same_quantization(graph.tensors[pad.inputs[0]], graph.tensors[pad.output]):
            continue
        for conv in graph.consumers(pad.output):
            if conv.op not in ("conv2d", "depthwise_conv2d") or pad.output in conv.inputs[1:]:
                continue
            pads = tuple(a + b for a, b in zip(conv.attributes["pads"], pad.attributes["pads"]))
            fused = conv.replace(inputs=(pad.inputs[0], *conv.inputs[1:])).with_attributes(pads=pads)
            graph.nodes = [fused if node is conv else node for node in graph.nodes]
    return prune(graph)


def batchnorm_to_depthwise(graph: Graph) -> Graph:
    """Turn every batch_norm on a map into the 1x1 depthwise_conv2d that it is, which every engine and export knows.

    For those that ``fold_batchnorm`` had to leave: before a convolution (DenseNet, ResNet v2) or the 1/6 of a
    hard-sigmoid.
    """
    graph = graph.copy()
    nodes = []
    for node in graph.nodes:
        if node.op == "batch_norm" and len(graph.tensors[node.output].shape) == 4:
            weights = graph.constants[node.inputs[1]].reshape(1, 1, 1, -1)
            name = _add_constant(graph, node, node.inputs[1], weights)
            attributes = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "activation": _activation(node)}
            node = Node("depthwise_conv2d", (node.inputs[0], name, node.inputs[2]), node.output, attributes)
        nodes.append(node)
    return graph.copy(nodes=nodes)


def prune(graph: Graph) -> Graph:
    """Drop the nodes, constants and tensors that no output needs; the inputs always stay."""
    needed = set(graph.outputs)
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
            nodes.append(node)
    needed.update(graph.inputs)
    return graph.copy(
        nodes=nodes[::-1],
        tensors={name: tensor for name, tensor in graph.tensors.items() if name in needed},
        constants={name: array for name, array in graph.constants.items() if name in needed},
    )


def truncate(graph: Graph, layers: list[str]) -> Graph:
    """The part of ``graph`` that makes ``layers``, which become its outputs in the order given.

    Args:
        layers: names that ``resolve_layer`` knows; each once.

    Raises:
        InputError: no layer, a layer twice, or an unknown one (with the nearest names and how to list them).
    """
    if not layers:
        raise InputError(f"graph {graph.name}: no layers to keep; give at least one with --layers")
    names = [resolve_layer(graph, layer) for layer in layers]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"graph {graph.name}: layer {layers[i]} is given twice; name each layer once")
    return prune(graph.copy(outputs=names))


def normalise(graph: Graph) -> Graph:
    """All passes, in a fixed order, until nothing changes; then the batch norms that are left become depthwise ops.

    Hard-sigmoids come last, as a hard-swish holds one.
    """
    count = -1
    while count != len(graph.nodes):
        count = len(graph.nodes)
        for step in (fold_batchnorm, fuse_activations, fuse_hard_swish, fuse_pad, prune):
            graph = step(graph)
    graph = fuse_pad(batchnorm_to_depthwise(fuse_hard_sigmoid(graph)))
    graph.check()
    return graph


def _activation(node: Node) -> str:
    return str(node.attributes.get("activation", "none"))


def _is_linear(node: Node) -> bool:
    return _activation(node) == "none"


def _only_producer(graph: Graph, tensor: str) -> Node | None:
    """The node that makes ``tensor``, if one reader is all that it has and it isn't an output."""
    if tensor in graph.outputs or len(graph.consumers(tensor)) != 1:
        return None
    return graph.producer(tensor)


def _merge(graph: Graph, producer: Node, follower: Node, merged: Node) -> None:
    """Put ``merged`` in the place of two nodes, making the follower's output; changes ``graph``, a pass's own copy."""
    merged = merged.replace(output=follower.output)
    graph.nodes = [merged if node is producer else node for node in graph.nodes if node is not follower]
    del graph.tensors[producer.output]


def _way_to_weights(graph: Graph, node: Node) -> list[Node]:
    """The products behind ``node`` and then the weighted op that reads them alone; empty where it isn't so.

    Vectors (1, C) may be turned into (1, 1, 1, C) on the way.
    """
    way: list[Node] = []
    name = node.output
    while name not in graph.outputs:
        readers = graph.consumers(name)
        if len(readers) != 1 or readers[0].inputs.count(name) != 1:
            break
        (reader,) = readers
        way.append(reader)
        if reader.op in FOLD_AXIS and reader.op != "batch_norm":
            return way if graph.tensors[name].quantization is None else []
        shape = graph.tensors[name].shape
        is_vector = reader.op == "reshape" and shape[-1] == graph.tensors[reader.output].shape[-1] == math.prod(shape)
        if not is_vector and (reader.op != "mul" or not _is_linear(reader)):
            break
        name = reader.output
    return []


def _add_constant(graph: Graph, reader: Node, name: str, value: np.ndarray) -> str:
    """Store ``value`` under ``name``, or under a new name where another node reads the old value too."""
    if graph.consumers(name) != [reader]:
        name = f"{name}:{reader.output}"
    graph.constants[name] = value
    graph.tensors[name] = Tensor(name, tuple(value.shape), value.dtype.name)
    return name


def _same_quantization(a: Tensor, b: Tensor) -> bool:
    if a.quantization is None or b.quantization is None:
        return a.quantization is b.quantization
    return np.array_equal(a.quantization.scale, b.quantization.scale) and np.array_equal(
        a.quantization.zero_point, b.quantization.zero_point
    )


def _uniform_scale(graph: Graph, node: Node | None) -> float:
    """k if ``node`` is y = k * x with one k for all channels, else 0."""
    if node is None or node.op != "batch_norm" or not _is_linear(node):
        return 0.0
    scale, offset = (graph.constants[name] for name in node.inputs[1:])
    return float(scale[0]) if not offset.any() and np.all(scale == scale[0]) else 0.0


def _gated(graph: Graph, mul: Node) -> Iterator[tuple[str, float]]:
    """Every (x, k) with mul = k * x * relu6(x + 3)."""
    operands: list[list[tuple[str, float]]] = []
    for name in mul.inputs:
        options = [(name, 1.0)]
        producer = graph.producer(name)
        factor = _uniform_scale(graph, producer)
        if producer is not None and factor:
            options.append((producer.inputs[0], factor))
        operands.append(options)
    for one, other in (operands, operands[::-1]):
        for source, source_factor in one:
            for gate, gate_factor in other:
                node = graph.producer(gate)
                if node is None or node.op != "batch_norm" or node.inputs[0] != source or _activation(node) != "relu6":
                    continue
                scale, offset = (graph.constants[name] for name in node.inputs[1:])
                if np.all(scale == 1) and np.all(offset == 3):
                    yield source, source_factor * gate_factor
