"""ONNX files in, float Graphs out: what PyTorch, timm, torchvision (NCHW) and Keras, tf2onnx (NHWC) export.

The nodes are converted one by one (``tinyvad.graph.onnx_nodes``). Nodes whose inputs are all constants are computed
with ONNX's own reference evaluator, so shape arithmetic vanishes. A node that can't be converted is remembered with
its reason, and what depends on it is left out; it becomes an error only if a wanted output needs it. So a network with
an exotic head can still be tapped before the head.

The Graph reads *normalised* pixels, (pixel / 255 - mean) / std: arithmetic in front of the first layer (a uint8 input,
a rescaling layer) is taken out of the graph and into its ``Preprocessing``. Tensors keep the names of the ONNX values.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.onnx_nodes import CONVERTERS, Conversion, OnnxNode, Unsupported, Value
from tinyvad.graph.passes import normalise, prune, resolve_layer, truncate

MAX_BYTES = 2**31 - 1  # protobuf's own limit
OLDEST_OPSET = 7  # before it, arithmetic broadcasts by other rules
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what nodes of damaged files raise
PIXEL_TYPES = {"uint8": 0, "int8": -128}  # what a black pixel is in an integer input
GUESSES = {  # (layout, channels): what exporters of that layout usually trained with
    ("NCHW", 3): ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet, as torchvision and timm
    ("NCHW", 1): ((0.449,), (0.226,)),  # their mean over the channels
    ("NHWC", 3): ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # [-1, 1], as Keras's MobileNets
    ("NHWC", 1): ((0.5,), (0.5,)),
}


@dataclass(frozen=True)
class Preprocessing:
    """What the Graph reads: (pixel / 255 - mean) / std, RGB.

    Attributes:
        mean, std: one number a channel, in units of pixel / 255.
        layout: the ONNX file's own input layout, "NCHW" or "NHWC".
        dtype: the ONNX file's own input type, a NumPy dtype name.
        source: where mean and std come from: "metadata" (the file says so), "graph" (arithmetic on pixels in front of
            the network, or an integer input) or "guess" (from the layout, see ``guess_preprocessing``).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str
    dtype: str
    source: str


@dataclass(frozen=True)
class OnnxImport:
    """A converted file.

    Attributes:
        graph: the normalised float Graph.
        preprocessing: what its input means.
        aliases: other names of its tensors (values that only pass them on, ONNX node names), for ``resolve_layer``.
        skipped: one line for each node that could not be converted; what depends on it is left out too.
    """

    graph: Graph
    preprocessing: Preprocessing
    aliases: dict[str, str]
    skipped: list[str]


def import_onnx(
    path: str | Path, input_size: int | tuple[int, int] | None = None, outputs: list[str] | None = None
) -> Graph:
    """The normalised float Graph of an ``.onnx`` file; arguments and errors as ``load_onnx``."""
    return load_onnx(path, input_size, outputs).graph


def load_onnx(
    path: str | Path, input_size: int | tuple[int, int] | None = None, outputs: list[str] | None = None
) -> OnnxImport:
    """Convert an ``.onnx`` file that has one image input.

    Args:
        path: the file; weights in external files are read from beside it.
        input_size: pixels, one number or (height, width); None takes the file's own fixed size. The batch is always 1.
        outputs: the values to keep, in this order: names of ONNX values, of ONNX nodes, or what ``resolve_layer``
            knows (``block:7``, ``layer2``). An ONNX value in front of a batch norm or activation is kept as that very
            value. None keeps the file's outputs, or, where some can't be converted, the last values that can.

    Raises:
        InputError: the file is missing, broken, too large or no image network; no size is known; an output is unknown
            or needs a node that is not supported (node, op and what is supported are named); nothing can be converted.
    """
    path = Path(path)
    model = _read(path)
    source = _image_input(model, path)
    guess = guess_preprocessing(model)
    builder = GraphBuilder(path.stem, _input_shape(source, guess.layout, input_size, path), source.name)
    conversion = Conversion(builder, {source.name: Value(source.name, guess.layout)})
    failed, skipped = _convert_all(model, conversion)
    names = _names(model, conversion)
    graph = builder.graph
    for name in outputs or []:
        if name in failed:
            raise InputError(f"{path}: {name} needs {failed[name]}; tap a layer before it")
    if not graph.nodes:
        raise InputError(f"{path}: nothing can be converted: {skipped[0] if skipped else 'no layer reads the image'}")
    leaves = [node.output for node in graph.nodes if not graph.consumers(node.output)]
    wholes = [names[out.name] for out in model.graph.output if out.name in names]
    kept = wholes if len(wholes) == len(model.graph.output) else [*wholes, *leaves]
    exact = [names[name] for name in outputs or [] if name in names]
    if outputs is not None:
        kept = exact if len(exact) == len(outputs) else [*exact, *leaves]
    graph = prune(builder.finish(dict.fromkeys(kept)))
    graph, preprocessing = _absorb_affine(graph, conversion.affine, guess)
    graph = normalise(graph)
    if outputs is not None:
        graph = truncate(graph, [resolve_layer(graph, name, names) for name in outputs])
    aliases = {alias: name for alias, name in names.items() if alias != name and graph.producer(name) is not None}
    return OnnxImport(graph, preprocessing, aliases, skipped)


def guess_preprocessing(model: onnx.ModelProto) -> Preprocessing:
    """What the model's own input means, from its metadata, its type and its layout.

    ``mean`` and ``std`` in ``metadata_props`` (a JSON list or numbers with commas, in units of pixel / 255) are taken
    as they are. An integer input means the pixel itself. Else the layout tells the exporter's habits: NCHW (PyTorch,
    timm) means ImageNet's mean and std, NHWC (Keras) means [-1, 1].

    Raises:
        InputError: the model has not exactly one 4-D input, or its metadata can't be read.
    """
    source = _image_input(model, Path("the model"))
    dims = _dims(source)
    layout = "NHWC" if dims[3] in (1, 3) and dims[1] not in (1, 3) else "NCHW"
    channels = dims[layout.index("C")] or 3
    dtype = _dtype(source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "mean" in metadata and "std" in metadata:
        mean, std = (_numbers(metadata[key], key, channels) for key in ("mean", "std"))
        if min(std) <= 0:
            raise InputError(f"the model's metadata std is {metadata['std']}; it must be above 0")
        return Preprocessing(mean, std, layout, dtype, "metadata")
    if dtype in PIXEL_TYPES:  # the input is 255 * (pixel / 255) + black
        mean = (-PIXEL_TYPES[dtype] / 255,) * channels
        return Preprocessing(mean, (1 / 255,) * channels, layout, dtype, "graph")
    mean, std = GUESSES.get((layout, channels), ((0.5,) * channels, (0.5,) * channels))
    return Preprocessing(mean, std, layout, dtype, "guess")


def _numbers(text: str, key: str, channels: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in json.loads(f"[{text.strip().strip('[]')}]"))
    except (ValueError, TypeError):
        numbers = ()
    numbers = numbers * channels if len(numbers) == 1 else numbers
    if len(numbers) != channels or not np.isfinite(numbers).all():
        raise InputError(f"the model's metadata {key} is {text[:80]}; it must be {channels} numbers")
    return numbers


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of an .onnx file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes, but one ONNX file holds {MAX_BYTES} at most; export a smaller network")
    try:
        model = onnx.load(str(path))
        if not model.graph.node:
            raise ValueError("it holds no nodes")
        if len(model.functions):
            model = inline_local_functions(model)
    except Exception as error:  # onnx, protobuf and the system each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable ONNX model: {reason}; export it again") from error
    opset = _opset(model)
    if opset < OLDEST_OPSET:
        raise InputError(f"{path}: opset {opset} < {OLDEST_OPSET}; export it again with opset 13 or later")
    return model


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _image_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """The one input that is not an initializer; it must be 4-D."""
    initializers = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    if len(inputs) != 1:
        raise InputError(f"{path}: {len(inputs)} inputs, where one image input is supported")
    if len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise InputError(f"{path}: input {inputs[0].name} is not 4-D (N, 3, H, W) or (N, H, W, 3)")
    return inputs[0]


def _dims(source: onnx.ValueInfoProto) -> list[int]:
    """The input's dimensions, 0 for those left open."""
    return [max(int(dim.dim_value), 0) for dim in source.type.tensor_type.shape.dim]


def _dtype(source: onnx.ValueInfoProto) -> str:
    number = source.type.tensor_type.elem_type
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(number).name)
    except (KeyError, ValueError) as error:
        raise InputError(f"the model's input {source.name} has the unknown element type {number}") from error


def _input_shape(
    source: onnx.ValueInfoProto, layout: str, input_size: int | tuple[int, int] | None, path: Path
) -> tuple[int, ...]:
    dims = dict(zip(layout, _dims(source)))
    if input_size is None:
        input_size = (dims["H"], dims["W"])
        if 0 in input_size:
            raise InputError(f"{path}: its input has no fixed height and width; give --image-size")
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height < 1 or width < 1:
        raise InputError(f"{path}: image size {height}x{width}; it must be 1 pixel or more")
    return (1, int(height), int(width), dims["C"] or 3)


def _convert_all(model: onnx.ModelProto, conversion: Conversion) -> tuple[dict[str, str], list[str]]:
    """Convert what can be; returns the reason by ONNX value for all others, and one line a node that failed itself."""
    failed: dict[str, str] = {}
    skipped: list[str] = []
    opset, nodes = _opset(model), conversion.builder.graph.nodes
    for initializer in model.graph.initializer:
        try:
            conversion.constants[initializer.name] = numpy_helper.to_array(initializer)
        except DAMAGED as error:
            failed[initializer.name] = f"initializer {initializer.name}, which can't be read: {error}"
            skipped.append(failed[initializer.name])
    for proto in model.graph.node:
        reason = next((failed[name] for name in proto.input if name in failed), None)
        if reason is None:
            nodes_before = len(nodes)
            try:
                _convert(proto, conversion, opset)
            except (Unsupported, InputError, *DAMAGED) as error:
                del nodes[nodes_before:]  # what it had begun
                damage = "" if isinstance(error, (Unsupported, InputError)) else "damaged attributes or inputs: "
                label = proto.name or next(iter(proto.output), "without a name")
                reason = f"node {label} ({proto.op_type}): {damage}{' '.join(str(error).split())}"
                skipped.append(reason)
        if reason is not None:
            failed.update({name: reason for name in proto.output if name})
    return failed, skipped


def _convert(proto: onnx.NodeProto, conversion: Conversion, opset: int) -> None:
    """Convert one node: to a constant if all that it reads is constant, else by its op's function."""
    read = [name for name in proto.input if name]
    for name in read:
        if name not in conversion.constants and name not in conversion.values:
            raise Unsupported(f"its input {name} is made by nothing before it")
    standard = proto.domain in ("", "ai.onnx")
    if standard and proto.op_type == "Shape" and read[0] in conversion.values:
        shape = np.array(conversion.shape(conversion.values[read[0]]), np.int64)
        bounds = {attribute.name: attribute.i for attribute in proto.attribute}
        conversion.constants[proto.output[0]] = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
        return
    if standard and all(name in conversion.constants for name in read):
        conversion.constants.update(_evaluate(proto, {name: conversion.constants[name] for name in read}, opset))
        return
    if not standard or proto.op_type not in CONVERTERS:
        raise Unsupported(f"not among the supported ops {', '.join(sorted(CONVERTERS))}")
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in proto.attribute}
    node = OnnxNode(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), attributes)
    conversion.values[node.output] = CONVERTERS[node.op](conversion, node)


def _evaluate(proto: onnx.NodeProto, inputs: dict[str, np.ndarray], opset: int) -> dict[str, np.ndarray]:
    has_body = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in proto.attribute)
    if has_body or proto.op_type.startswith(("Random", "Multinomial", "Bernoulli")):
        raise Unsupported("a loop, a branch or a random value, where plain constants are supported")
    empty = onnx.helper.make_empty_tensor_value_info
    used, made = [empty(name) for name in inputs], [empty(name) for name in proto.output if name]
    alone = onnx.helper.make_model(
        onnx.helper.make_graph([proto], "node", used, made), opset_imports=[onnx.helper.make_opsetid("", opset)]
    )
    try:
        results = ReferenceEvaluator(alone).run(None, inputs)
    except Exception as error:  # any op of ONNX may fail in its own way
        raise Unsupported(f"its constant value can't be computed ({type(error).__name__})") from error
    return {value.name: np.asarray(result) for value, result in zip(made, results)}


def _names(model: onnx.ModelProto, conversion: Conversion) -> dict[str, str]:
    """The tensor behind each ONNX value and ONNX node name."""
    names = {
        node.name: conversion.values[node.output[0]].tensor
        for node in model.graph.node
        if node.name and node.output and node.output[0] in conversion.values
    }
    names.update({name: value.tensor for name, value in conversion.values.items()})
    made = {node.output for node in conversion.builder.graph.nodes}
    return {alias: name for alias, name in names.items() if name in made}


def _absorb_affine(graph: Graph, affine: Iterable[str], guess: Preprocessing) -> tuple[Graph, Preprocessing]:
    """Take arithmetic y = a x + b on the image out of the graph and into its preprocessing.

    Exact, where folding it into the first convolution would be wrong at the padded border. If nothing says what x is,
    small a or large b mean pixels in [0, 255], anything else pixels / 255.
    """
    name = graph.inputs[0]
    channels = graph.tensors[name].shape[3]
    scale, offset = np.ones(channels), np.zeros(channels)
    allowed = set(affine)
    while True:
        readers = graph.consumers(name)
        if len(readers) != 1 or readers[0].output not in allowed or readers[0].output in graph.outputs:
            break
        node = readers[0]
        factor, addend = (graph.constants[constant].astype(np.float64) for constant in node.inputs[1:])
        if not factor.all():
            break
        scale, offset = scale * factor, offset * factor + addend
        nodes = [
            other.replace(inputs=tuple(name if read == node.output else read for read in other.inputs))
            for other in graph.nodes
            if other is not node
        ]
        graph = prune(graph.copy(nodes=nodes))
    if np.all(scale == 1) and not offset.any():
        return graph, guess
    mean, std = np.array(guess.mean), np.array(guess.std)
    source = guess.source
    if source == "guess":
        is_byte = np.abs(scale).max() <= 0.1 or np.abs(offset).max() > 10
        mean, std = np.zeros(channels), np.full(channels, 1 / 255 if is_byte else 1.0)
        source = "graph"
    # y = a (u - mean) / std + b = (u - (mean - b std / a)) / (std / a), u = pixel / 255
    new_mean, new_std = mean - offset * std / scale, std / scale
    return graph, dataclasses.replace(
        guess, mean=tuple(new_mean.tolist()), std=tuple(new_std.tolist()), source=source
    )
