"""Graphs out as ONNX files: float for speed on PCs and Jetsons, QDQ for runtimes with int8 kernels.

Flows in: a Graph (NHWC, batch 1). Flows out: an ONNX model in NCHW, which onnxruntime and TensorRT run without
transposes: one input ``input`` (N, C, H, W) float32, normalised, with a free batch N, and one float32 output a tap,
named like it, (N, C, h, w); vectors are (N, C). ``tinyvad.engines.onnx`` turns both back to NHWC.

The model names its origin in ``metadata_props``: ``layers`` (JSON list) and ``tinyvad`` (version), and what the caller
adds, such as ``mean``, ``std`` and ``colour``. The same graph gives the same bytes.

``to_onnx_qdq`` surrounds every int8 activation with QuantizeLinear and DequantizeLinear, and stores int8 weights and
int32 biases behind a DequantizeLinear per channel. onnxruntime turns this into int8 kernels; they round otherwise than
TFLite, and the differences grow from layer to layer: a tap can differ from the exact engine by several steps of its
grid. TensorRT wants zero points of 0, which TFLite's grids don't have: give it the float file.

Source: the ONNX operator specification, opset 17, and onnxruntime's description of the QDQ format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tinyvad.errors import InputError
from tinyvad.files import write_bytes
from tinyvad.graph.ir import Graph, Node, Quantization
from tinyvad.graph.shapes import nearest_indices

OPSET, IR_VERSION = 17, 8  # what onnxruntime 1.18 and TensorRT 8.6 read
INPUT_NAME = "input"


def to_onnx(
    graph: Graph, path: str | Path | None = None, metadata: Mapping[str, Any] | None = None
) -> onnx.ModelProto:
    """A float graph as an ONNX model (see the module's text), written to ``path`` if one is given.

    Args:
        graph: float32 Graph.
        path: where to write it, whole or not at all.
        metadata: entries of ``metadata_props``; values that are not text are stored as JSON.

    Raises:
        InputError: the graph is quantised, or holds an op or a shape that ONNX has no counterpart for.
    """
    for name, tensor in graph.tensors.items():
        if tensor.quantization is not None:
            raise InputError(f"graph {graph.name}: {name} is quantised; export it with to_onnx_qdq, or the float graph")
    return _export(graph, path, metadata)


def to_onnx_qdq(
    graph: Graph, path: str | Path | None = None, metadata: Mapping[str, Any] | None = None
) -> onnx.ModelProto:
    """A quantised graph as an ONNX model in QDQ form (see the module's text); arguments as ``to_onnx``.

    The input is float and normalised, whatever the graph's own input type is; the outputs are float values on the tap's
    int8 grid.

    Raises:
        InputError: nothing in the graph is quantised, or it holds an op or a shape that ONNX has no counterpart for.
    """
    if all(graph.tensors[name].quantization is None for name in graph.activations):
        raise InputError(f"graph {graph.name}: nothing is quantised; export it with to_onnx, or quantise it first")
    return _export(graph, path, metadata)


def _export(graph: Graph, path: str | Path | None, metadata: Mapping[str, Any] | None) -> onnx.ModelProto:
    for i, name in enumerate(graph.outputs):
        if name in graph.outputs[:i]:
            raise InputError(f"graph {graph.name}: output {name} is given twice; name each output once")
    writer = _Writer(graph)
    for node in graph.nodes:
        writer.add(node)
    source, *more = graph.inputs
    if more:
        raise InputError(f"graph {graph.name}: {len(graph.inputs)} inputs; one is supported")
    model = helper.make_model(
        helper.make_graph(
            writer.nodes,
            graph.name,
            [_description(graph, source, INPUT_NAME)],
            [_description(graph, name, name) for name in graph.outputs],
            [numpy_helper.from_array(array, name) for name, array in writer.initializers.items()],
        ),
        producer_name="tinyvad",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    entries = {"layers": graph.outputs, "tinyvad": package_metadata.version("tinyvad"), **(metadata or {})}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
    helper.set_model_props(model, dict(sorted(texts.items())))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's errors share no base class of their own
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"graph {graph.name} does not make a valid ONNX model: {reason}") from error
    if path is not None:
        write_bytes(path, model.SerializeToString(deterministic=True))
    return model


def _description(graph: Graph, tensor: str, name: str) -> onnx.ValueInfoProto:
    _, *rest = graph.tensors[tensor].shape
    if len(rest) == 3:
        rest = [rest[2], rest[0], rest[1]]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *rest])


class _Writer:
    """The ONNX nodes and initializers so far. ``value[t]`` is the ONNX value that readers of our tensor t take."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        source = graph.inputs[0]
        if source != INPUT_NAME and INPUT_NAME in graph.tensors:
            raise InputError(f"graph {graph.name}: a tensor other than the input is called {INPUT_NAME}; rename it")
        self.value = {source: INPUT_NAME}
        quantization = graph.tensors[source].quantization
        if quantization is not None:
            self.value[source] = self._through_grid(INPUT_NAME, source, f"{source}:dequantized")
        if source in graph.outputs:
            raise InputError(f"graph {graph.name}: its input {source} is also an output; drop it from the outputs")

    def add(self, node: Node) -> None:
        """Append ``node``, its activation, and its way onto the int8 grid; the last value bears our tensor's name."""
        activation = str(node.attributes.get("activation", "none"))
        if node.op in ("relu", "relu6"):
            activation = node.op
        on_grid = self.graph.tensors[node.output].quantization is not None
        last = f"{node.output}:float" if on_grid else node.output
        before = last if activation == "none" else f"{node.output}:linear"
        if node.op in ("relu", "relu6"):
            before = self.value[node.inputs[0]]
        elif node.op in OPS:
            OPS[node.op](self, node, before)
        else:
            raise InputError(f"graph {self.graph.name}: {node.op} -> {node.output} has no ONNX counterpart here")
        if activation == "relu":
            self.append("Relu", [before], last)
        elif activation == "relu6":
            bounds = [self.constant("relu6:low", np.float32(0)), self.constant("relu6:high", np.float32(6))]
            self.append("Clip", [before, *bounds], last)
        self.value[node.output] = self._through_grid(last, node.output, node.output) if on_grid else node.output

    def append(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}:{output}", **attributes))
        return output

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.initializers[name] = np.ascontiguousarray(value).reshape(np.shape(value))
        return name

    def read(self, name: str) -> str:
        """The ONNX value of an input: an activation, or a constant of ours as it is laid out in ONNX."""
        if name in self.value:
            return self.value[name]
        array = self.graph.constants[name]
        return self.parameter(name, array.transpose(0, 3, 1, 2) if array.ndim == 4 else array, 1)

    def parameter(self, name: str, array: np.ndarray, axis: int) -> str:
        """Constant ``name``, laid out as ``array``; if quantised, behind a DequantizeLinear per channel of ``axis``."""
        quantization = self.graph.tensors[name].quantization
        if quantization is None:
            return self.constant(name, array.astype(np.float32))
        if name in self.initializers:  # a second reader
            return f"{name}:dequantized"
        names = [self.constant(name, array), *self._grid(name, quantization, array.dtype)]
        per_channel = {"axis": axis} if quantization.scale.size > 1 else {}
        return self.append("DequantizeLinear", names, f"{name}:dequantized", **per_channel)

    def _grid(self, name: str, quantization: Quantization, dtype: Any) -> list[str]:
        scale, zero_point = quantization.scale.astype(np.float32), quantization.zero_point.astype(dtype)
        if scale.size == 1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        names = [self.constant(f"{name}:scale", scale)]
        if dtype != np.int32:  # ONNX has no zero point for int32
            names.append(self.constant(f"{name}:zero_point", zero_point))
        return names

    def _through_grid(self, value: str, tensor: str, output: str) -> str:
        """``value`` rounded to the grid of ``tensor``, as float again."""
        description = self.graph.tensors[tensor]
        assert description.quantization is not None
        grid = self._grid(tensor, description.quantization, np.dtype(description.dtype))
        quantized = self.append("QuantizeLinear", [value, *grid], f"{tensor}:quantized")
        return self.append("DequantizeLinear", [quantized, *grid], output)


def _onnx_pads(node: Node) -> list[int]:
    """(top, left, bottom, right) from our (top, bottom, left, right)."""
    top, bottom, left, right = (int(number) for number in node.attributes["pads"])
    return [top, left, bottom, right]


def _pair(node: Node, attribute: str) -> list[int]:
    return [int(number) for number in node.attributes.get(attribute, (1, 1))]


def _conv(w: _Writer, node: Node, output: str) -> None:
    x, weights_name, bias_name = node.inputs
    weights = w.graph.constants[weights_name]
    depthwise = node.op == "depthwise_conv2d"
    weights = weights.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))  # (O, I / group, kh, kw)
    parameters = [w.parameter(weights_name, weights, 0), w.parameter(bias_name, w.graph.constants[bias_name], 0)]
    w.append(
        "Conv",
        [w.value[x], *parameters],
        output,
        kernel_shape=list(weights.shape[2:]),
        strides=_pair(node, "stride"),
        pads=_onnx_pads(node),
        dilations=_pair(node, "dilation"),
        group=weights.shape[0] if depthwise else 1,
    )


def _fully_connected(w: _Writer, node: Node, output: str) -> None:
    x, weights, bias = node.inputs
    parameters = [w.parameter(name, w.graph.constants[name], 0) for name in (weights, bias)]
    w.append("Gemm", [w.value[x], *parameters], output, transB=1)


def _batch_norm(w: _Writer, node: Node, output: str) -> None:
    rank = len(w.graph.tensors[node.output].shape)
    scale, offset = (
        w.constant(name, w.graph.constants[name].astype(np.float32).reshape(1, -1, *[1] * (rank - 2)))
        for name in node.inputs[1:]
    )
    scaled = w.append("Mul", [w.value[node.inputs[0]], scale], f"{node.output}:scaled")
    w.append("Add", [scaled, offset], output)


def _add(w: _Writer, node: Node, output: str) -> None:
    w.append("Add", [w.read(name) for name in node.inputs], output)


def _mul(w: _Writer, node: Node, output: str) -> None:
    w.append("Mul", [w.read(name) for name in node.inputs], output)


def _average_pool(w: _Writer, node: Node, output: str) -> None:
    w.append(
        "AveragePool",
        [w.value[node.inputs[0]]],
        output,
        kernel_shape=_pair(node, "kernel"),
        strides=_pair(node, "stride"),
        pads=_onnx_pads(node),
        count_include_pad=int(bool(node.attributes.get("count_include_pad"))),
    )


def _max_pool(w: _Writer, node: Node, output: str) -> None:
    sizes = {"kernel_shape": _pair(node, "kernel"), "strides": _pair(node, "stride")}
    w.append("MaxPool", [w.value[node.inputs[0]]], output, pads=_onnx_pads(node), **sizes)


def _mean(w: _Writer, node: Node, output: str) -> None:
    w.append("GlobalAveragePool", [w.value[node.inputs[0]]], output)


def _pad(w: _Writer, node: Node, output: str) -> None:
    top, left, bottom, right = _onnx_pads(node)
    pads = w.constant(f"{node.output}:pads", np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
    w.append("Pad", [w.value[node.inputs[0]], pads], output)


def _resize_nearest(w: _Writer, node: Node, output: str) -> None:
    """A Resize where each row is simply repeated, else a Gather along each axis of the rows that TFLite would copy."""
    x = w.value[node.inputs[0]]
    old, new = w.graph.tensors[node.inputs[0]].shape[1:3], [int(size) for size in node.attributes["size"]]
    flags = {key: bool(node.attributes.get(key)) for key in ("align_corners", "half_pixel_centers")}
    rows = [nearest_indices(a, b, **flags) for a, b in zip(old, new)]
    if all(b % a == 0 and np.array_equal(r, np.arange(b) // (b // a)) for a, b, r in zip(old, new, rows)):
        factors = np.array([1, 1, new[0] // old[0], new[1] // old[1]], np.float32)
        scales = w.constant(f"{node.output}:scales", factors)
        where = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        w.append("Resize", [x, "", scales], output, mode="nearest", **where)
        return
    for axis, target in ((2, f"{node.output}:rows"), (3, output)):
        x = w.append("Gather", [x, w.constant(f"{node.output}:{axis}", rows[axis - 2])], target, axis=axis)


def _concat(w: _Writer, node: Node, output: str) -> None:
    if int(node.attributes.get("axis", 3)) != 3:
        raise InputError(f"concat -> {node.output}: axis {node.attributes['axis']}; only channels (3) are supported")
    w.append("Concat", [w.read(name) for name in node.inputs], output, axis=1)


def _reshape(w: _Writer, node: Node, output: str) -> None:
    """Our elements stand in NHWC order: maps of several pixels are transposed before and after."""
    x, old, new = w.value[node.inputs[0]], w.graph.tensors[node.inputs[0]].shape, w.graph.tensors[node.output].shape
    if len(old) == 4 and old[1] * old[2] > 1:
        x = w.append("Transpose", [x], f"{node.output}:nhwc", perm=[0, 2, 3, 1])
    to_map = len(new) == 4
    must_turn = to_map and new[1] * new[2] > 1
    target = (new[3], new[1], new[2]) if to_map and not must_turn else new[1:]
    shape = w.constant(f"{node.output}:shape", np.array([-1, *target], np.int64))
    x = w.append("Reshape", [x, shape], f"{node.output}:reshaped" if must_turn else output)
    if must_turn:
        w.append("Transpose", [x], output, perm=[0, 3, 1, 2])


def _unary(w: _Writer, node: Node, output: str) -> None:
    w.append({"logistic": "Sigmoid", "hard_swish": "HardSwish"}[node.op], [w.value[node.inputs[0]]], output)


def _pass_on(w: _Writer, node: Node, output: str) -> None:
    """quantize and dequantize: values are float here, the grids stand at the tensors."""
    w.append("Identity", [w.value[node.inputs[0]]], output)


OPS = {
    "add": _add,
    "average_pool": _average_pool,
    "batch_norm": _batch_norm,
    "concat": _concat,
    "conv2d": _conv,
    "depthwise_conv2d": _conv,
    "dequantize": _pass_on,
    "fully_connected": _fully_connected,
    "hard_swish": _unary,
    "logistic": _unary,
    "max_pool": _max_pool,
    "mean": _mean,
    "mul": _mul,
    "pad": _pad,
    "quantize": _pass_on,
    "reshape": _reshape,
    "resize_nearest": _resize_nearest,
}
