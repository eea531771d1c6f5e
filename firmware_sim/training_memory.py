"""Bytes of RAM of one training step, by owner, without running it: the tape of ``tinyvad.training``, walked on paper.

Flows in: a detector that is trained (``tinyvad.training.trainable``) and a batch size. Flows out: ``Memory``, modelled.

A derivative reads some maps of the way forward, and these must stay: the input of a convolution and of a batch norm, the
output of an activation, the other factor of a product. Walked through are both ways, entry by entry: what is kept, which
values and gradients are on their way, and what the partial sums of a weight's gradient take. All in float32. Updating is in
place: parameters, their gradients and the optimiser's memory exist once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node
from tinyvad.training.network import Network

FLOAT = 4  # bytes
STATES = {"sgd": 1, "adamw": 3, "stable-adamw": 2}  # arrays that an optimiser remembers, as large as the parameters
LAYERS = ("conv2d", "depthwise_conv2d", "fully_connected")
LANES = 16  # channels at once of a depthwise gradient


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM of one step.

    Attributes:
        parameters: and running statistics. optimiser: what it remembers. batch: the step's inputs and targets.
        kept: maps that the way back reads, when the way forward has ended.
        passing: the most that is needed on top: gradients of parameters and maps, maps on their way, partial sums.
    """

    parameters: int
    optimiser: int
    batch: int
    kept: int
    passing: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimiser + self.batch + self.kept + self.passing


@dataclass(frozen=True)
class _Op:
    """One entry of the tape.

    Attributes:
        inputs: read; ``moving``: those that get a gradient. keeps: values that its derivative reads.
        extra: other bytes that it keeps. trained: bytes of the gradients of its parameters.
        work: bytes of partial sums on the way back, ``forward_work`` on the way forward.
        is_sum: gradients pass as they are.
    """

    inputs: tuple[str, ...]
    output: str
    moving: tuple[str, ...]
    keeps: tuple[str, ...]
    extra: int = 0
    trained: int = 0
    work: int = 0
    forward_work: int = 0
    is_sum: bool = False


@dataclass(frozen=True, eq=False)
class _Array:
    """An array on its way; a sum hands the same one on to both of its parts."""

    nbytes: int


def training_memory(detector: Any, batch: int) -> Memory:
    """RAM of a step of ``batch`` images.

    Raises:
        InputError: a batch of no image.
    """
    if batch < 1:
        raise InputError(f"a training step of {batch} images; give at least 1")
    network: Network = detector.network
    graph = network.graph
    sizes = {name: FLOAT * math.prod(graph.tensors[name].shape) * batch for name in graph.activations}
    copies = copies_of(detector)
    sizes = {name: size * copies.get(name, 1) for name, size in sizes.items()}
    ops = _tape(network, sizes, batch)
    parameters = sum(array.size for array in network.parameters.values()) * FLOAT
    statistics = sum(array.size for array in network.statistics.values()) * FLOAT
    targets = () if detector.targets is None else (detector.targets.tensors[name] for name in detector.targets.outputs)
    inputs = (graph.tensors[name] for name in graph.inputs)
    given = FLOAT * batch * sum(math.prod(tensor.shape) for tensor in (*inputs, *targets))
    kept, peak = _walk(graph, ops, sizes, *_loss_bytes(detector, batch))
    recipe = detector.recipe
    states = 0 if recipe.optimiser == "sgd" and not recipe.momentum else STATES[recipe.optimiser]
    return Memory(parameters + statistics, states * parameters, given, kept, peak - kept)


def copies_of(detector: Any) -> dict[str, int]:
    """Names of values that are there more than once an image: SimpleNet's discriminator sees good and noisy features."""
    graph: Graph = detector.network.graph
    if detector.method != "simplenet":
        return {}
    own = [node for node in graph.nodes if node.output.startswith("discriminator/")]
    return dict.fromkeys([*(node.output for node in own), *(node.inputs[0] for node in own)], 2)


def positions_of(graph: Graph) -> Iterable[tuple[int, int]]:
    """(positions, channels) of every output."""
    for name in graph.outputs:
        shape = graph.tensors[name].shape
        yield math.prod(shape[:-1]), shape[-1]


def _loss_bytes(detector: Any, batch: int) -> tuple[int, int]:
    """What the loss keeps, and what it needs on top for a while.

    Pairs of maps: three float64 a position; four for a while. CFA: of each position and six centres number, weight and
    sign; before these, products of ``CFA_ROWS`` positions with all centres, and the centres turned. SimpleNet: a sign a
    hidden value; the leaky ReLU's output, its gradient, the two parts of that and their sum.
    """
    outputs = [(count * batch, channels) for count, channels in positions_of(detector.network.graph)]
    if detector.method == "cfa":
        from tinyvad.training.losses import CFA_ROWS

        ((count, channels),) = outputs
        found = FLOAT * (min(CFA_ROWS, count) + channels) * len(detector.centres_) + 72 * count
        return 102 * count, max(found - 102 * count, 0)
    if detector.method == "simplenet":
        values = 2 * sum(count * channels for count, channels in outputs)
        return values, (4 * FLOAT + 1) * values
    return 24 * sum(count for count, _ in outputs), 32 * max(count for count, _ in outputs)


def moving_values(network: Network) -> set[str]:
    """Values that depend on a parameter: they get a gradient."""
    moving: set[str] = set()
    for node in network.graph.nodes:
        if any(name in moving or name in network.parameters for name in node.inputs):
            moving.add(node.output)
    return moving


def _tape(network: Network, sizes: dict[str, int], batch: int) -> list[_Op]:
    """The graph as the tape has it. An activation inside a node is an entry of its own; ``sizes`` gets what is between."""
    ops, moving = [], moving_values(network)
    for node in network.graph.nodes:
        inputs = tuple(name for name in node.inputs if name in sizes)
        fused = node.op != "batch_norm" and node.attributes.get("activation", "none") != "none"
        output = f"{node.output}:linear" if fused else node.output
        sizes[output] = sizes[node.output]
        going = tuple(name for name in inputs if name in moving)
        trained = [name for name in node.inputs if name in network.parameters]
        op = _Op(
            inputs, output, going, (), trained=FLOAT * sum(network.parameters[name].size for name in trained),
            forward_work=_windows(network.graph, node), is_sum=node.op == "add",
        )  # fmt: skip
        if going or trained:
            op = _derivative(network, node, op, bool(trained), sizes, batch)
        ops.append(op)
        if fused:
            moves = node.output in moving
            ops.append(_Op((output,), node.output, (output,) if moves else (), (node.output,) if moves else ()))
    return ops


def _derivative(network: Network, node: Node, op: _Op, is_trained: bool, sizes: dict[str, int], batch: int) -> _Op:
    """``op`` with what its derivative keeps and needs."""
    if node.op in LAYERS:
        keeps = op.inputs[:1] if node.inputs[1] in network.parameters else ()
        turned = _grouped(network.graph.tensors[node.inputs[1]].shape) if node.op == "depthwise_conv2d" else 0
        return replace(op, keeps=keeps, extra=turned, work=_partial_sums(network.graph, node, batch) if keeps else 0)
    if node.op in ("batch_norm", "hard_swish"):
        return replace(op, keeps=op.inputs[:1])
    if node.op in ("relu", "relu6", "logistic"):
        return replace(op, keeps=(op.output,))
    if node.op == "mul":
        others = {name for i, name in enumerate(node.inputs) if node.inputs[1 - i] in op.moving and name in sizes}
        return replace(op, keeps=tuple(others))
    return replace(op, extra=sizes[op.output] if node.op == "max_pool" else 0)


def _grouped(weights: tuple[int, ...]) -> int:
    """Bytes of depthwise weights (1, kh, kw, C) with channels filled up to whole groups."""
    return FLOAT * weights[1] * weights[2] * LANES * -(-weights[3] // LANES)


def _windows(graph: Graph, node: Node) -> int:
    """One image's windows side by side, of a convolution that is no 1x1."""
    if node.op != "conv2d" or graph.tensors[node.inputs[1]].shape[1:3] == (1, 1):
        return 0
    _, height, width, _ = graph.tensors[node.output].shape
    return FLOAT * height * width * math.prod(graph.tensors[node.inputs[1]].shape[1:])


def _partial_sums(graph: Graph, node: Node, batch: int) -> int:
    """Of a weight's gradient: one product a block of rows (1x1), or one an image."""
    from tinyvad.training.blocks import block_rows

    weights = graph.tensors[node.inputs[1]].shape
    out = graph.tensors[node.output].shape
    if node.op == "depthwise_conv2d":
        return batch * _grouped(weights)
    if node.op == "conv2d" and weights[1:3] != (1, 1):
        return FLOAT * batch * math.prod(weights) + _windows(graph, node)
    rows = batch * (math.prod(out[1:3]) if len(out) == 4 else 1)
    blocks = -(-rows // block_rows(rows, max(weights[0], weights[-1])))
    return FLOAT * blocks * math.prod(weights) if blocks > 1 else 0


def _bytes(*arrays: dict[str, _Array]) -> int:
    return sum(array.nbytes for array in {array for some in arrays for array in some.values()})


def _walk(
    graph: Graph, ops: list[_Op], sizes: dict[str, int], loss_kept: int, loss_work: int
) -> tuple[int, int]:
    """Bytes kept when the way forward has ended, and the most at any moment; the batch itself is not in them."""
    own = {name: size for name, size in sizes.items() if name not in graph.inputs}

    def total(names: Iterable[str]) -> int:
        return sum(own.get(name, 0) for name in set(names))

    last_use = {name: i for i, op in enumerate(ops) for name in op.inputs}
    kept: set[str] = set()
    alive: set[str] = set()
    extra = peak = 0
    for i, op in enumerate(ops):  # forward
        alive.add(op.output)
        peak = max(peak, total((*kept, *alive, *op.keeps)) + extra + op.forward_work)
        kept.update(op.keeps)
        extra += op.extra
        alive = {name for name in alive if last_use.get(name, -1) > i or name in graph.outputs}
    kept.update(graph.outputs)  # which the loss reads
    at_end = total(kept) + extra + loss_kept
    peak = max(peak, at_end + loss_work)
    # the first entry of the tape that reads a kept value is the last one to do so on the way back
    readers = {
        name: min(i for i, op in enumerate(ops) if name in op.keeps or name == op.output) for name in kept if name in own
    }
    gradients: dict[str, _Array] = {}  # on their way, by the value that they are of
    done = 0  # of parameters
    for i in range(len(ops) - 1, -1, -1):  # backward
        op = ops[i]
        standing = total(kept) + extra + loss_kept + done
        if op.output in graph.outputs:
            peak = max(peak, standing + _bytes(gradients) + own[op.output] * (1 + (op.output in gradients)))
            gradients[op.output] = _Array(own[op.output])
        if op.output not in gradients:
            continue
        made = {name: gradients[op.output] if op.is_sum else _Array(own.get(name, 0)) for name in op.moving}
        peak = max(peak, standing + _bytes(gradients, made) + op.trained + op.work)
        done += op.trained
        gradients.pop(op.output)
        for name, part in made.items():
            if name in gradients:  # two ways lead here: their sum is a third array
                peak = max(peak, standing + op.trained + _bytes(gradients, made) + part.nbytes)
                part = _Array(part.nbytes)
            gradients[name] = part
        extra -= op.extra
        kept = {name for name in kept if readers.get(name, i) < i}
    return at_end, peak
