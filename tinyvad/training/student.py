"""Students: networks shaped like a frozen teacher, or like its last part, with random weights and batch norms.

Flows in: a teacher, a float Graph as every importer leaves it (normalised: no batch norms, biases in the convolutions).
Flows out: a ``Network`` to train; after training a plain Graph again (``fold``), alone or side by side with the teacher
(``join``).

The batch norms that the teacher was trained with are gone from its Graph, so every convolution of a student gets one of its
own, which carries the activation. Convolutions of a single cell (the gates of squeeze-and-excitation) have nothing to
normalise over and keep a bias.

Source: STFPM (Wang et al. 2021), PaSTe (Barusco et al. 2024); the random start is that of torchvision's MobileNetV2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, Tensor, node_macs
from tinyvad.graph.passes import fold_batchnorm, prune
from tinyvad.graph.taps import DEFAULT_STRIDES, TapCandidate, resolve_layer, tap_candidates
from tinyvad.training.network import EPSILON, Arrays, Network

CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
GATE_OPEN = 3.0  # bias of a gate relu6(x + 3) / 6 whose sixth is in the weights behind it: half open at the start
COARSEST = max(DEFAULT_STRIDES)
SHARED_STRIDE = 8


def student_layers(graph: Graph) -> tuple[str, list[str]]:
    """The layer that teacher and student of PaSTe share last, and those that they are compared at, when nobody says.

    Looked at are the block ends up to stride 16. Shared are the blocks up to the first end that costs at least half of the
    multiply-accumulates and whose map, which replay stores, has stride 8 or more; tapped are the block end behind it,
    the last one, and the one in the middle of both. Costs are those of a pixel of the image: the choice does not depend on
    the input size. For MobileNetV2: 6 and 7, 10, 13 (PaSTe: 6 and 7, 10, 14), for MCUNet-in3: 5 and 6, 9, 13 (PaSTe: 5 and
    6, 10, 14); tinyvad's own weights end at 13.

    Raises:
        InputError: fewer than two block ends.
    """
    ends = [end for end in tap_candidates(graph) if end.stride <= COARSEST]
    if len(ends) < 2:
        raise InputError(
            f"graph {graph.name}: {len(ends)} block ends up to stride {COARSEST}, and a shared one and a tapped one are "
            "needed; name them with --shared and --layers (`tinyvad backbones PATH` lists all)"
        )
    costs = _cost_up_to(graph, ends)
    half = (i for i, cost in enumerate(costs) if 2 * cost >= costs[-1] and ends[i].stride >= SHARED_STRIDE)
    shared = min(next(half, len(ends)), len(ends) - 2)
    first, last = shared + 1, len(ends) - 1
    tapped = sorted({first, (first + last) // 2, last})
    return ends[shared].name, [ends[i].name for i in tapped]


def layer_before(graph: Graph, layers: Sequence[str]) -> str:
    """The last block end in front of all ``layers`` from which they can be made: what PaSTe shares when nobody says.

    Raises:
        InputError: there is none.
    """
    order = {name: i for i, name in enumerate(graph.activations)}
    first = min(order[name] for name in layers)
    for end in reversed(tap_candidates(graph)):
        if order[end.name] < first and _reaches_back(graph, end.name, layers) is None:
            return end.name
    raise InputError(
        f"graph {graph.name}: no block ends in front of layer {graph.activations[first]}, so there is nothing to share; "
        "tap deeper --layers, or use --method stfpm"
    )


def tail(graph: Graph, layers: Sequence[str], start: str | None) -> Graph:
    """The part of ``graph`` that makes ``layers`` from the value ``start`` (None: from the image), with the same names.

    Raises:
        InputError: an unknown layer, one that is not behind ``start``, or one that needs other values from before it.
    """
    names = [resolve_layer(graph, layer) for layer in layers]
    begin = graph.inputs[0] if start is None else resolve_layer(graph, start)
    order = {name: i for i, name in enumerate(graph.activations)}
    for name in names:
        if order[name] <= order[begin]:
            raise InputError(f"graph {graph.name}: layer {name} is not behind {begin}; tap deeper layers, or share fewer")
    beyond = _reaches_back(graph, begin, names)
    if beyond is not None:
        raise InputError(
            f"graph {graph.name}: {beyond} is read behind {begin} too, so that the tail can't start there; share another"
        )
    nodes = [node for node in graph.nodes if order[node.output] > order[begin]]
    return prune(graph.copy(inputs=[begin], outputs=names, nodes=nodes))


def student_of(teacher: Graph, layers: Sequence[str], start: str | None, rng: np.random.Generator) -> Network:
    """A student with random weights in the shape of ``teacher`` behind ``start``.

    Its values have the teacher's names; it reads ``start`` (or the image) and its outputs are ``layers``. Weights are drawn
    node by node: normal, variance 2 / (output channels * kernel cells), as torchvision's MobileNetV2 draws them; scales
    are 1, offsets and biases 0, means 0, variances 1.

    Raises:
        InputError: see ``tail``; or an op with weights that can't be trained.
    """
    part = tail(teacher, layers, start)
    graph = part.copy(nodes=[], constants={})
    parameters: Arrays = {}
    statistics: Arrays = {}

    def constant(name: str, value: np.ndarray, trained: bool = True) -> str:
        graph.constants[name] = value.astype(np.float32)
        graph.tensors[name] = Tensor(name, value.shape)
        if trained:
            parameters[name] = graph.constants[name]
        return name

    for node in part.nodes:
        if node.op not in (*CONVOLUTIONS, "fully_connected"):
            _keep_constants(part, graph, node)
            graph.nodes.append(node)
            continue
        x, old, _ = node.inputs
        out = node.output
        shape = part.constants[old].shape
        weights = constant(f"{out}/weights", _kaiming(shape, node.op, rng))
        channels = part.tensors[out].shape[-1]
        activation = node.attributes.get("activation", "none")
        if node.op == "fully_connected" or part.tensors[out].shape[1:3] == (1, 1):
            opened = GATE_OPEN if activation == "relu6" else 0.0
            bias = constant(f"{out}/bias", np.full(channels, opened))
            graph.nodes.append(node.replace(inputs=(x, weights, bias)))
            continue
        zeros = constant(f"{out}/zeros", np.zeros(channels), trained=False)
        linear = f"{out}/linear"
        graph.tensors[linear] = Tensor(linear, part.tensors[out].shape)
        graph.nodes.append(node.replace(inputs=(x, weights, zeros), output=linear).with_attributes(activation="none"))
        scale, offset = constant(f"{out}/scale", np.ones(channels)), constant(f"{out}/offset", np.zeros(channels))
        graph.nodes.append(Node("batch_norm", (linear, scale, offset), out, {"activation": activation}))
        statistics[f"{out}.mean"] = np.zeros(channels, np.float32)
        statistics[f"{out}.variance"] = np.ones(channels, np.float32)
    graph = prune(graph)
    graph.check()
    return Network(graph, parameters, statistics)


def fold(network: Network) -> Graph:
    """The network in evaluation as a plain Graph: trained values in place, batch norms in the convolutions before them.

    Raises:
        InputError: folded weights are not finite (the training diverged).
    """
    graph = network.graph.copy()
    graph.constants.update(network.parameters)
    for node in network.graph.nodes:
        if node.op != "batch_norm":
            continue
        scale, offset = (graph.constants[name].astype(np.float64) for name in node.inputs[1:])
        mean, variance = (network.statistics[f"{node.output}.{what}"].astype(np.float64) for what in ("mean", "variance"))
        plain = scale / np.sqrt(variance + EPSILON)  # stays float64 until it is folded
        graph.constants[node.inputs[1]], graph.constants[node.inputs[2]] = plain, offset - mean * plain
    return fold_batchnorm(graph)


def join(teacher: Graph, student: Graph, prefix: str = "student/") -> Graph:
    """Both as one Graph: the student reads the teacher's value of its input's name, and its own get ``prefix``.

    Outputs are the student's, then the teacher's of the same names.

    Raises:
        InputError: the teacher does not make what the student reads, or what it is compared with.
    """
    for name in (*student.inputs, *student.outputs):
        if name not in teacher.activations:
            raise InputError(f"graph {teacher.name} does not make {name}, which its student needs")
    kept = set(student.inputs)

    def renamed(name: str) -> str:
        return name if name in kept else prefix + name

    joined = teacher.copy(name=f"{teacher.name}/student")
    for name, array in student.constants.items():
        joined.constants[renamed(name)] = array
    for name, tensor in student.tensors.items():
        if name not in kept:
            joined.tensors[renamed(name)] = Tensor(renamed(name), tensor.shape, tensor.dtype)
    for node in student.nodes:
        joined.nodes.append(node.replace(inputs=tuple(map(renamed, node.inputs)), output=renamed(node.output)))
    joined.outputs = [*map(renamed, student.outputs), *student.outputs]
    joined = prune(joined)
    joined.check()
    return joined


def _keep_constants(part: Graph, graph: Graph, node: Node) -> None:
    """A factor that stays as it is; weights of an op that has no training are an error."""
    for name in node.inputs:
        if name not in part.constants:
            continue
        if node.op not in ("add", "mul"):
            raise InputError(f"graph {part.name}: {node.op} -> {node.output} can't be trained; let it be shared")
        graph.constants[name] = part.constants[name]


def _kaiming(shape: tuple[int, ...], op: str, rng: np.random.Generator) -> np.ndarray:
    """(O, kh, kw, I), (1, kh, kw, C) or (O, I): normal, variance 2 / (outputs * cells of the kernel)."""
    outputs = shape[-1] if op == "depthwise_conv2d" else shape[0]
    cells = int(np.prod(shape[1:3])) if len(shape) == 4 else 1
    return rng.normal(0.0, np.sqrt(2 / (outputs * cells)), shape)


def _reaches_back(graph: Graph, begin: str, layers: Sequence[str]) -> str | None:
    """A value from before ``begin``, not itself, that making ``layers`` needs; None if there is none."""
    order = {name: i for i, name in enumerate(graph.activations)}
    wanted = [name for name in layers if name != begin]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen or name == begin or name in graph.constants:
            continue
        if order[name] < order[begin]:
            return name
        seen.add(name)
        producer = graph.producer(name)
        wanted += producer.inputs if producer is not None else ()
    return None


def _cost_up_to(graph: Graph, ends: Sequence[TapCandidate]) -> list[float]:
    """Multiply-accumulates for a pixel of the image, from the image to each block end in the order of the network."""
    strides: dict[str, int] = dict.fromkeys(graph.inputs, 1)
    costs = []
    total = 0.0
    names = {end.name for end in ends}
    for node in graph.nodes:
        stride = max(strides.get(name, 1) for name in node.inputs) * node.attributes.get("stride", (1, 1))[0]
        strides[node.output] = stride
        shape = graph.tensors[node.output].shape
        if len(shape) == 4 and shape[1] * shape[2] > 1:
            total += node_macs(graph, node) / (shape[1] * shape[2] * stride**2)
        if node.output in names:
            costs.append(total)
    return costs
