"""Weights for a definition: arrays by name, random ones for tests, or those of an imported network.

Flows in: a Graph whose constants are placeholders. Flows out: the same Graph with values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.passes import fold_batchnorm, normalise, prune

WEIGHTED = ("conv2d", "depthwise_conv2d", "fully_connected")


def with_weights(graph: Graph, weights: Mapping[str, np.ndarray]) -> Graph:
    """The graph with every constant replaced by the array of its name; arrays of other names are ignored.

    Raises:
        InputError: an array is missing or has another shape than the constant.
    """
    for name, constant in graph.constants.items():
        if name not in weights:
            raise InputError(f"weights for {graph.name}: no array {name} {constant.shape}; give all of them")
        if weights[name].shape != constant.shape:
            raise InputError(
                f"weights for {graph.name}: {name} has shape {weights[name].shape}, the definition "
                f"{constant.shape}; give the weights of this network and width"
            )
    return graph.copy(constants={name: np.asarray(weights[name], np.float32) for name in graph.constants})


def random_weights(graph: Graph, seed: int) -> Graph:
    """He-initialised weights, batch norm as the identity, everything else as the definition has it (biases zero, those of
    a gate 3): for tests and timings and to start training from, no good features.

    Source: He et al., Delving Deep into Rectifiers (ICCV 2015), eq. 10: std = sqrt(2 / inputs that a unit sees).
    """
    rng = np.random.default_rng(seed)
    values = {name: np.array(array, np.float32) for name, array in graph.constants.items()}
    for node in graph.nodes:
        if node.op == "batch_norm":
            values[node.inputs[1]] += 1
        elif node.op in WEIGHTED:
            shape = values[node.inputs[1]].shape
            fan_in = np.prod(shape[1:3] if node.op == "depthwise_conv2d" else shape[1:])
            he = np.float32(np.sqrt(2 / fan_in))
            gate = np.float32(1 / 6 if _reads_gated(graph, node) else 1)
            values[node.inputs[1]] = he * gate * rng.standard_normal(shape, np.float32)
    return with_weights(graph, values)


def _reads_gated(graph: Graph, node: Node) -> bool:
    """True for the layer behind a hard-sigmoid gate, whose values definitions hold six times as large."""
    product = graph.producer(node.inputs[0])
    gate = graph.producer(product.inputs[1]) if product is not None and product.op == "mul" else None
    return gate is not None and gate.attributes.get("activation") == "relu6"


def with_weights_from(definition: Graph, imported: Graph) -> Graph:
    """The definition, batch norms folded away, with the weights and biases of an imported float network.

    Layers are matched in execution order and must agree in kind, weight shape, stride, padding and activation;
    layers that the imported network has beyond the definition's last (a classifier) are ignored. The constant factor of
    a gate (a hard-sigmoid's 1/6) goes into the weights of the layer behind the gate, as in the definitions.

    Args:
        definition: what a ``build`` returned.
        imported: a float32 Graph of the same network, batch norms folded or not; at any input size, as symmetric
            padding does not depend on it (files with TensorFlow's SAME padding are refused).

    Raises:
        InputError: a layer differs or is missing (named, with both shapes), or the weights are not float32.
    """
    folded, source = fold_batchnorm(definition), _without_gate_factors(normalise(imported))
    layers = [node for node in folded.nodes if node.op in WEIGHTED]
    givers = [node for node in source.nodes if node.op in WEIGHTED]
    constants = dict(folded.constants)
    for i, layer in enumerate(layers):
        mine = _summary(folded, layer)
        theirs = f"{givers[i].output}, {_summary(source, givers[i])}" if i < len(givers) else "no layer at all"
        if not theirs.endswith(f", {mine}"):
            raise InputError(
                f"weights for {definition.name}: layer {i} is {layer.output}, {mine}, but in {imported.name} it is "
                f"{theirs}; give the weights of this network, or use that file itself as the backbone"
            )
        for name, given in zip(layer.inputs[1:], givers[i].inputs[1:]):
            constants[name] = source.constants[given]
            if constants[name].dtype != np.float32:
                raise InputError(f"{imported.name}: {given} is {constants[name].dtype}; give a float32 network")
    return folded.copy(constants=constants)


def _without_gate_factors(graph: Graph) -> Graph:
    """(x * (k * gate)) w + b as (x * gate) (k w) + b, wherever one k for all channels stands behind a gate."""
    graph = graph.copy()
    for node in list(graph.nodes):
        factor = _gate_factor(graph, node)
        product = _only_reader(graph, node.output) if factor else None
        layer = _only_reader(graph, product.output) if product is not None else None
        if product is None or layer is None or product.op != "mul" or layer.op not in WEIGHTED:
            continue
        ungated = product.replace(inputs=tuple(node.inputs[0] if name == node.output else name for name in product.inputs))
        graph.nodes = [ungated if other is product else other for other in graph.nodes if other is not node]
        graph.constants[layer.inputs[1]] = graph.constants[layer.inputs[1]] * np.float32(factor)
    return prune(graph)


def _gate_factor(graph: Graph, node: Node) -> float:
    """k if ``node`` is y = k * x on a map of one pixel, with one k for all channels, else 0."""
    if node.op != "depthwise_conv2d" or node.attributes.get("activation", "none") != "none":
        return 0.0
    weights, bias = (graph.constants[name] for name in node.inputs[1:])
    if graph.tensors[node.output].shape[1:3] != (1, 1) or weights.shape[1:3] != (1, 1) or bias.any():
        return 0.0
    return float(weights.flat[0]) if np.all(weights == weights.flat[0]) else 0.0


def _only_reader(graph: Graph, tensor: str) -> Node | None:
    readers = graph.consumers(tensor)
    return readers[0] if len(readers) == 1 and tensor not in graph.outputs else None


def _summary(graph: Graph, node: Node) -> str:
    """Kind, weight shape and geometry of a layer as one line to compare and to print."""
    keys = [key for key in ("stride", "pads", "activation") if key in node.attributes]
    geometry = " ".join(f"{key} {node.attributes[key]}" for key in keys)
    return f"{node.op} {graph.tensors[node.inputs[1]].shape} {geometry}"
