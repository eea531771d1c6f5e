"""Write a .tflite file straight from a Graph, without TensorFlow: a float or int8 Graph in, bytes out.

The same Graph gives the same bytes. Buffers start at multiples of 16 bytes, so that a device reads weights in place.
Tensors keep their names and stand in the order in which the network makes them (TFLM's memory planner breaks ties by
that order); the file's outputs are the graph's, several where several layers are tapped.

Source: tensorflow/compiler/mlir/lite/schema/schema.fbs (version 3, identifier ``TFL3``), through the builder functions
of the PyPI package ``tflite``; operator versions from tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
import tflite

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, Tensor

from .tflite_pads import NO_PADS, fresh_name, lower_pads

__all__ = ["lower_pads", "to_tflite"]

ALIGNMENT = 16
SCHEMA_VERSION = 3
OFFLINE_PLAN = "OfflineMemoryAllocation"

# op -> operator, options table, version in float32, version in int8
_OPERATORS: dict[str, tuple[str, str, int, int]] = {
    "conv2d": ("CONV_2D", "Conv2DOptions", 1, 3),
    "depthwise_conv2d": ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", 1, 3),
    "fully_connected": ("FULLY_CONNECTED", "FullyConnectedOptions", 1, 4),
    "add": ("ADD", "AddOptions", 1, 2),
    "mul": ("MUL", "MulOptions", 1, 2),
    "average_pool": ("AVERAGE_POOL_2D", "Pool2DOptions", 1, 2),
    "max_pool": ("MAX_POOL_2D", "Pool2DOptions", 1, 2),
    "mean": ("MEAN", "ReducerOptions", 1, 2),
    "pad": ("PAD", "PadOptions", 1, 2),
    "resize_nearest": ("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions", 1, 2),
    "concat": ("CONCATENATION", "ConcatenationOptions", 1, 2),
    "reshape": ("RESHAPE", "ReshapeOptions", 1, 1),
    "relu": ("RELU", "", 1, 2),
    "relu6": ("RELU6", "", 1, 2),
    "logistic": ("LOGISTIC", "", 1, 2),
    "hard_swish": ("HARD_SWISH", "HardSwishOptions", 1, 1),
    "quantize": ("QUANTIZE", "QuantizeOptions", 1, 1),
    "dequantize": ("DEQUANTIZE", "DequantizeOptions", 1, 2),
}
# TFLite's kernels copy these values, so input and output must share scale and zero point. (TFLM's relu6 copies too,
# where LiteRT's rescales. Reshape copies as well, but published files have one in front of the logits whose two sides
# differ; what they compute is the copy.)
_COPIES_VALUES = ("average_pool", "max_pool", "pad", "resize_nearest", "concat", "relu6")
_EXTRA_NAMES = {"pad": "paddings", "mean": "axes", "resize_nearest": "size", "reshape": "shape"}
_TYPES = {"float32": "FLOAT32", "int8": "INT8", "uint8": "UINT8", "int32": "INT32"}
_ACTIVATIONS = {"none": "NONE", "relu": "RELU", "relu6": "RELU6"}


@dataclass(frozen=True)
class _Operator:
    """What the file says of one node: ``inputs`` and ``output`` name tensors, ``options`` the fields of its table."""

    code: int
    version: int
    inputs: tuple[str, ...]
    output: str
    table: str
    options: dict[str, int] = field(default_factory=dict)


def to_tflite(graph: Graph, description: str = "", offsets: Mapping[str, int] | None = None) -> bytes:
    """The bytes of a .tflite file that computes ``graph``.

    Args:
        graph: float32 Graph with batch norms folded, or int8 Graph whose tensors carry their quantisation. Explicit
            pads are lowered first (``lower_pads``).
        description: free text kept in the file.
        offsets: where TFLM is to put tensors, bytes from its arena's start by tensor name; it plans the others itself.

    Raises:
        InputError: an op, dtype, padding or quantisation that a .tflite cannot hold, or an offset of no tensor of the file.
    """
    graph = lower_pads(graph)
    graph.check()
    operators = [_operator(graph, node) for node in graph.nodes]  # adds the operators' own constants to the graph
    names = list(dict.fromkeys([*graph.inputs, *(name for o in operators for name in (*o.inputs, o.output))]))
    index = {name: i for i, name in enumerate(names)}
    codes = list(dict.fromkeys((o.code, o.version) for o in operators))
    constants = [name for name in names if name in graph.constants]
    buffer_of = {name: i + 1 for i, name in enumerate(constants)}  # buffer 0 is empty: "no constant"

    b = flatbuffers.Builder(1 << 20)
    empty = _table(b, "Buffer", {})
    buffers = [empty] + [_table(b, "Buffer", {"Data": _buffer_data(b, graph.constants[name])}) for name in constants]
    metadata = []
    if offsets is not None:
        buffers.append(_table(b, "Buffer", {"Data": _buffer_data(b, _offline_plan(names, graph, offsets))}))
        fields = {"Name": b.CreateString(OFFLINE_PLAN), "Buffer": len(buffers) - 1}
        metadata = [_table(b, "Metadata", fields)]
    tensors = [_tensor(b, graph.tensors[name], buffer_of.get(name, 0)) for name in names]
    written = [_write_operator(b, operator, codes, index) for operator in operators]
    subgraph = _table(
        b,
        "SubGraph",
        {
            "Tensors": _offsets(b, tensors),
            "Inputs": _numbers(b, [index[name] for name in graph.inputs], np.int32),
            "Outputs": _numbers(b, [index[name] for name in graph.outputs], np.int32),
            "Operators": _offsets(b, written),
            "Name": b.CreateString("main"),
        },
    )
    # readers from before 2.4 look only at the one-byte field, later ones take the larger of the two
    code_tables = [
        _table(b, "OperatorCode", {"DeprecatedBuiltinCode": min(code, 127), "Version": v, "BuiltinCode": code})
        for code, v in codes
    ]
    model = _table(
        b,
        "Model",
        {
            "Version": SCHEMA_VERSION,
            "OperatorCodes": _offsets(b, code_tables),
            "Subgraphs": _offsets(b, [subgraph]),
            "Description": b.CreateString(description),
            "Buffers": _offsets(b, buffers),
            **({"Metadata": _offsets(b, metadata)} if metadata else {}),
        },
    )
    b.Finish(model, file_identifier=b"TFL3")
    return bytes(b.Output())


def _offline_plan(names: list[str], graph: Graph, offsets: Mapping[str, int]) -> np.ndarray:
    """int32 as TFLM reads it: version, number of subgraphs, number of tensors, an offset each, -1 where it may choose."""
    for name, offset in offsets.items():
        if name not in names or name in graph.constants or offset < 0 or offset % ALIGNMENT:
            raise InputError(f"graph {graph.name}: offset {offset} for tensor {name}; plan again for this very graph")
    return np.array([1, 1, len(names), *(offsets.get(name, -1) for name in names)], np.int32)


def _operator(graph: Graph, node: Node) -> _Operator:
    """The operator of one node; constants that TFLite keeps as inputs (a shape, paddings) are added to the graph."""
    if node.op not in _OPERATORS:
        hint = "fold it first (fold_batchnorm)" if node.op == "batch_norm" else "tap an earlier layer"
        raise InputError(f"cannot write {node.op} -> {node.output} to a .tflite: {hint}")
    code, table, float_version, int8_version = _OPERATORS[node.op]
    _check_types(graph, node)
    is_int8 = graph.tensors[node.inputs[0]].dtype == "int8"
    version = int8_version if is_int8 else float_version
    inputs, options = node.inputs, _options(graph, node)
    # versions that only some attributes ask for
    if node.op == "depthwise_conv2d" and not is_int8 and options["DilationHFactor"] * options["DilationWFactor"] > 1:
        version = 2
    if node.op == "resize_nearest" and any(options.values()):
        version = 3
    weights = graph.tensors[inputs[1]].quantization if node.op == "fully_connected" else None
    if weights is not None and weights.scale.size > 1:
        version = 12
    extra = _extra_input(graph, node)
    if extra is not None:
        name = fresh_name(graph, f"{node.output}_{_EXTRA_NAMES[node.op]}")
        graph.constants[name] = extra
        graph.tensors[name] = Tensor(name, extra.shape, "int32")
        inputs = (*inputs, name)
    return _Operator(getattr(tflite.BuiltinOperator, code), version, inputs, node.output, table, options)


def _extra_input(graph: Graph, node: Node) -> np.ndarray | None:
    """int32 constant that TFLite takes as a second input."""
    if node.op == "pad":
        top, bottom, left, right = node.attributes["pads"]
        return np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
    if node.op == "mean":
        return np.array([1, 2], np.int32)
    if node.op == "resize_nearest":
        return np.array(node.attributes["size"], np.int32)
    if node.op == "reshape":
        return np.array(graph.tensors[node.output].shape, np.int32)
    return None


def _options(graph: Graph, node: Node) -> dict[str, int]:
    """Fields of the operator's options table, under the schema's names."""
    attributes = node.attributes
    options: dict[str, int] = {}
    if node.op in ("conv2d", "depthwise_conv2d", "average_pool", "max_pool"):
        options["Padding"] = tflite.Padding.VALID if attributes["pads"] == NO_PADS else tflite.Padding.SAME
        options["StrideH"], options["StrideW"] = attributes["stride"]
    if node.op in ("conv2d", "depthwise_conv2d"):
        options["DilationHFactor"], options["DilationWFactor"] = attributes.get("dilation", (1, 1))
    if node.op == "depthwise_conv2d":
        options["DepthMultiplier"] = 1
    if node.op in ("average_pool", "max_pool"):
        options["FilterHeight"], options["FilterWidth"] = attributes["kernel"]
    if node.op == "mean":
        options["KeepDims"] = True
    if node.op == "concat":
        options["Axis"] = attributes.get("axis", 3)
    if node.op == "resize_nearest":
        options["AlignCorners"] = attributes.get("align_corners", False)
        options["HalfPixelCenters"] = attributes.get("half_pixel_centers", False)
    if _OPERATORS[node.op][1] and hasattr(tflite, f"{_OPERATORS[node.op][1]}AddFusedActivationFunction"):
        activation = _ACTIVATIONS[attributes.get("activation", "none")]
        options["FusedActivationFunction"] = getattr(tflite.ActivationFunctionType, activation)
    return options


def _check_types(graph: Graph, node: Node) -> None:
    """What the kernels would not check and compute wrongly, or refuse without naming the tensor."""
    where = f"{node.op} -> {node.output}"
    for name in (*node.inputs, node.output):
        tensor = graph.tensors[name]
        if tensor.dtype not in _TYPES:
            raise InputError(f"{where}: {name} is {tensor.dtype}; a .tflite is written in float32 or int8")
        if tensor.dtype in ("int8", "uint8") and tensor.quantization is None:
            raise InputError(f"{where}: {name} is {tensor.dtype} without scale and zero point; run quantize first")
    out = graph.tensors[node.output].quantization
    if node.op in _COPIES_VALUES and out is not None:
        for name in node.inputs:
            x = graph.tensors[name].quantization
            if x is None or x.scale[0] != out.scale[0] or x.zero_point[0] != out.zero_point[0]:
                raise InputError(f"{where}: {name} must have the output's scale and zero point")
    if node.op == "logistic" and out is not None and (out.scale[0] != 1 / 256 or out.zero_point[0] != -128):
        raise InputError(f"{where}: int8 output must have scale 1/256 and zero point -128")


def _write_operator(
    b: flatbuffers.Builder, operator: _Operator, codes: list[tuple[int, int]], index: dict[str, int]
) -> int:
    fields: dict[str, Any] = {
        "OpcodeIndex": codes.index((operator.code, operator.version)),
        "Inputs": _numbers(b, [index[name] for name in operator.inputs], np.int32),
        "Outputs": _numbers(b, [index[operator.output]], np.int32),
    }
    if operator.table:
        fields["BuiltinOptionsType"] = getattr(tflite.BuiltinOptions, operator.table)
        fields["BuiltinOptions"] = _table(b, operator.table, operator.options)
    return _table(b, "Operator", fields)


def _tensor(b: flatbuffers.Builder, tensor: Tensor, buffer: int) -> int:
    fields = {
        "Shape": _numbers(b, tensor.shape, np.int32),
        "Type": getattr(tflite.TensorType, _TYPES[tensor.dtype]),
        "Buffer": buffer,
        "Name": b.CreateString(tensor.name),
    }
    if tensor.quantization is not None:
        quantization = {
            "Scale": _numbers(b, tensor.quantization.scale, np.float32),
            "ZeroPoint": _numbers(b, tensor.quantization.zero_point, np.int64),
            "QuantizedDimension": tensor.quantization.axis or 0,
        }
        fields["Quantization"] = _table(b, "QuantizationParameters", quantization)
    return _table(b, "Tensor", fields)


def _table(b: flatbuffers.Builder, name: str, fields: dict[str, Any]) -> int:
    """Write one table of the schema; ``fields`` holds numbers, and offsets of vectors, strings and tables."""
    getattr(tflite, f"{name}Start")(b)
    for key, value in fields.items():
        getattr(tflite, f"{name}Add{key}")(b, value)
    return getattr(tflite, f"{name}End")(b)


def _numbers(b: flatbuffers.Builder, values: Any, dtype: type[np.generic]) -> int:
    return b.CreateNumpyVector(np.ascontiguousarray(values, dtype))


def _offsets(b: flatbuffers.Builder, offsets: list[int]) -> int:
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return b.EndVector()


def _buffer_data(b: flatbuffers.Builder, array: np.ndarray) -> int:
    """A byte vector whose first byte lies at a multiple of 16 in the file."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    b.StartVector(1, len(data), ALIGNMENT)
    b.head = b.Head() - len(data)  # filled from the back, as the builder does for its own vectors
    b.Bytes[b.Head() : b.Head() + len(data)] = data
    return b.EndVector()
