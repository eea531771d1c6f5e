"""Read any .tflite file into plain dataclasses: a path or bytes in, tensors, operators and constants out.

Nothing is interpreted here: operators keep TFLite's own names and options, so that files which tinyvad
cannot run can still be inspected and planned. The schema accessors come from the PyPI package ``tflite``.
They trust the file, and a flatbuffer is offsets all the way down; so this reader bounds every length by the
size of the file and their sum by a small multiple of it, and raises one InputError whatever goes wrong.

Source of the format: tensorflow/compiler/mlir/lite/schema/schema.fbs (identifier ``TFL3``, version 3).
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tflite
from flatbuffers.number_types import Int32Flags

from tinyvad.errors import InputError
from tinyvad.graph.ir import Quantization

# Values of BuiltinOperator etc. are spelled once, in the schema package.
_TENSOR_TYPES = {v: k.lower() for k, v in vars(tflite.TensorType).items() if k.isupper()}
_PADDINGS = {v: k for k, v in vars(tflite.Padding).items() if k.isupper()}
_ACTIVATIONS = {v: k for k, v in vars(tflite.ActivationFunctionType).items() if k.isupper()}
_OPTIONS = {v: k for k, v in vars(tflite.BuiltinOptions).items() if k.endswith("Options")}
_OPTIONS_2 = {v: k for k, v in vars(tflite.BuiltinOptions2).items() if k.endswith("Options")}

# What the flatbuffers runtime raises on offsets that lead nowhere.
_BROKEN = (struct.error, ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError)

# Writers may let tables share a vector or a string, so the sum of all lengths can exceed the file's size; a
# file made to exhaust the reader exceeds it by orders of magnitude.
_SHARING = 16


@dataclass(frozen=True, eq=False)
class TfliteTensor:
    """One tensor of the subgraph.

    Attributes:
        index: position in the file's tensor list, which operators refer to.
        name: the writer's name, may be empty or repeated.
        shape: dimensions as stored; -1 where dynamic, ``()`` for a scalar.
        dtype: NumPy name ('int8', 'float32', ...), or 'string', 'int4', 'bfloat16', 'resource', 'variant'.
        quantization: None when the file gives no scale.
        data: constants only: a read-only array in ``shape`` (int4 unpacked to int8), or the flat bytes as
            uint8 where the stored form is no such array (strings, sparse, bfloat16); None if not constant.
        is_variable: state kept between invocations.
        buffer: index of the file's buffer; constants may share one.
        buffer_nbytes: stored bytes of that buffer, 0 if not constant.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None
    data: np.ndarray | None
    is_variable: bool
    buffer: int = 0
    buffer_nbytes: int = 0


@dataclass(frozen=True)
class TfliteOperator:
    """One operator in execution order.

    Attributes:
        index: position in the subgraph.
        op: builtin name ('CONV_2D') or the custom code.
        inputs: tensor indices, -1 for an optional input that is left out.
        outputs: tensor indices.
        options: every field of the operator's options table under its snake_case name, with these friendlier:
            padding 'SAME'|'VALID', activation 'NONE'|'RELU'|'RELU6'|..., stride_h/w, dilation_h/w,
            filter_h/w. Vectors are tuples. Custom operators: ``custom_options`` as bytes.
        version: operator version.
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]
    version: int


@dataclass(frozen=True, eq=False)
class TfliteFile:
    """First subgraph of a .tflite file; ``inputs`` and ``outputs`` are tensor indices, ``size`` is bytes."""

    path_name: str
    description: str
    tensors: list[TfliteTensor]
    operators: list[TfliteOperator]
    inputs: list[int]
    outputs: list[int]
    metadata: dict[str, bytes]
    size: int
    n_subgraphs: int = 1


def read_tflite(source: str | Path | bytes) -> TfliteFile:
    """Read a .tflite file, or its bytes.

    Raises:
        InputError: the file cannot be read, is no .tflite, or is damaged (named, with what is wrong).
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "<bytes>", bytes(source)
    else:
        name = str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot read {name}: {reason}; give the path of a .tflite file") from error
    if len(data) < 8 or data[4:8] != b"TFL3":
        what = "is empty" if not data else f"is no .tflite file ({len(data)} bytes, no 'TFL3' at byte 4)"
        raise InputError(f"{name} {what}; give a model converted to TensorFlow Lite")
    try:
        return _Reader(name, data).read()
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} is a damaged or truncated .tflite file ({reason}); convert or copy it again"
        ) from error


@dataclass
class _Reader:
    """One pass over one file; ``budget`` is what may still be read, in bytes (see ``_SHARING``)."""

    name: str
    data: bytes
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        self.budget = _SHARING * len(self.data) + 4096

    def read(self) -> TfliteFile:
        model = tflite.Model.GetRootAs(self.data, 0)
        if model.Version() != 3:
            raise ValueError(f"schema version {model.Version()}, expected 3")
        n_subgraphs = model.SubgraphsLength()
        if n_subgraphs < 1:
            raise ValueError("no subgraph")
        buffers = [self.buffer(buffer) for buffer in self.tables(model, "Buffers")]
        graph = model.Subgraphs(0)
        tensors = [self.tensor(i, t, buffers) for i, t in enumerate(self.tables(graph, "Tensors"))]
        codes = [self.operator_code(code) for code in self.tables(model, "OperatorCodes")]
        operators = [self.operator(i, op, codes, len(tensors)) for i, op in enumerate(self.tables(graph, "Operators"))]
        metadata = {}
        for entry in self.tables(model, "Metadata"):
            value = _item(buffers, entry.Buffer(), "metadata buffer")
            metadata[self.text(entry, "Name")] = b"" if value is None else value.tobytes()
        return TfliteFile(
            path_name=self.name,
            description=self.text(model, "Description"),
            tensors=tensors,
            operators=operators,
            inputs=list(self.indices(graph, "Inputs", len(tensors), 0)),
            outputs=list(self.indices(graph, "Outputs", len(tensors), 0)),
            metadata=metadata,
            size=len(self.data),
            n_subgraphs=n_subgraphs,
        )

    def spend(self, nbytes: int, what: str) -> None:
        if nbytes > len(self.data):
            raise ValueError(f"{what}: {nbytes} bytes in a file of {len(self.data)}")
        self.budget -= nbytes
        if self.budget < 0:
            raise ValueError(f"{what}: its parts add up to more than {_SHARING} times the file")

    def tables(self, table: Any, name: str) -> Iterator[Any]:
        """The tables of vector ``name``, each at least an offset and a vtable offset long."""
        length = getattr(table, f"{name}Length")()
        for i in range(length):
            self.spend(8, name)
            yield getattr(table, name)(i)

    def vector(self, table: Any, name: str) -> np.ndarray | None:
        """A vector of scalars as a read-only array, None if absent or empty."""
        length = getattr(table, f"{name}Length")()
        if length == 0:
            return None
        self.spend(length, name)
        array = getattr(table, f"{name}AsNumpy")()
        self.spend(array.nbytes, name)
        return array

    def text(self, table: Any, name: str) -> str:
        value = getattr(table, name)() or b""
        self.spend(len(value), name)
        return value.decode("utf-8", errors="replace")

    def indices(self, table: Any, name: str, n: int, lowest: int) -> tuple[int, ...]:
        array = self.vector(table, name)
        values = () if array is None else tuple(int(v) for v in array)
        for value in values:
            if not lowest <= value < n:
                raise ValueError(f"{name}: tensor {value} of {n}")
        return values

    def buffer(self, buffer: Any) -> np.ndarray | None:
        """Bytes (n,) uint8, None if empty. Offsets above 1 point behind the flatbuffer (files over 2 GB)."""
        offset, size = int(buffer.Offset()), int(buffer.Size())
        if offset > 1 and size > 0:
            self.spend(size, "Buffer")
            return np.frombuffer(self.data, np.uint8, count=size, offset=offset)
        return self.vector(buffer, "Data")

    def tensor(self, index: int, tensor: Any, buffers: list[np.ndarray | None]) -> TfliteTensor:
        name = self.text(tensor, "Name")
        shape_vector = self.vector(tensor, "Shape")
        shape = () if shape_vector is None else tuple(int(v) for v in shape_vector)
        code = tensor.Type()
        dtype = _TENSOR_TYPES.get(code, f"type{code}")
        raw = _item(buffers, tensor.Buffer(), f"buffer of tensor {index}")
        data = None
        if raw is not None:
            flat = dtype in ("string", "bfloat16", "resource", "variant") or dtype.startswith("type")
            data = raw if flat or tensor.Sparsity() is not None else _constant(raw, shape, dtype, index, name)
        return TfliteTensor(
            index=index,
            name=name,
            shape=shape,
            dtype=dtype,
            quantization=self.quantization(tensor, shape),
            data=data,
            is_variable=tensor.IsVariable(),
            buffer=tensor.Buffer(),
            buffer_nbytes=0 if raw is None else raw.nbytes,
        )

    def quantization(self, tensor: Any, shape: tuple[int, ...]) -> Quantization | None:
        parameters = tensor.Quantization()
        scale = None if parameters is None else self.vector(parameters, "Scale")
        if scale is None:
            return None
        stored = self.vector(parameters, "ZeroPoint")
        zero_point = np.zeros(len(scale), np.int64) if stored is None else stored.astype(np.int64)
        if len(zero_point) == 1 and len(scale) > 1:
            zero_point = np.repeat(zero_point, len(scale))
        if len(zero_point) != len(scale):
            raise ValueError(f"{len(scale)} scales but {len(zero_point)} zero points")
        axis = parameters.QuantizedDimension() if len(scale) > 1 else None
        if axis is not None and not (0 <= axis < len(shape) and shape[axis] == len(scale)):
            raise ValueError(f"{len(scale)} scales along axis {axis} of shape {shape}")
        return Quantization(scale.astype(np.float32), zero_point, axis)

    def operator_code(self, code: Any) -> tuple[str, int]:
        """Operator name and version."""
        # Old writers fill the one-byte field, new ones the int32 beside it too; as in TFLite, the larger
        # holds. (The package's BuiltinCode() trusts the old field for codes below 127, filled or not.)
        number = max(code.DeprecatedBuiltinCode(), code._tab.GetSlot(10, 0, Int32Flags))
        if number == tflite.BuiltinOperator.CUSTOM:
            return self.text(code, "CustomCode") or "CUSTOM", code.Version()
        return tflite.utils.BUILTIN_OPCODE2NAME.get(number, f"BUILTIN_{number}"), code.Version()

    def operator(self, index: int, op: Any, codes: list[tuple[str, int]], n_tensors: int) -> TfliteOperator:
        name, version = _item(codes, op.OpcodeIndex(), f"code of operator {index}")
        return TfliteOperator(
            index=index,
            op=name,
            inputs=self.indices(op, "Inputs", n_tensors, -1),
            outputs=self.indices(op, "Outputs", n_tensors, 0),
            options=self.options(op),
            version=version,
        )

    def options(self, op: Any) -> dict[str, Any]:
        """Every accessor of the operator's options table, called."""
        class_name = _OPTIONS.get(op.BuiltinOptionsType())
        table = op.BuiltinOptions() if class_name else None
        if table is None:
            class_name = _OPTIONS_2.get(op.BuiltinOptions2Type())
            table = op.BuiltinOptions2() if class_name else None
        options: dict[str, Any] = {}
        if table is not None and class_name is not None:
            accessors = getattr(tflite, class_name)()
            accessors.Init(table.Bytes, table.Pos)
            for accessor, is_vector in _accessors(class_name):
                key = _option_key(accessor)
                if is_vector:
                    array = self.vector(accessors, accessor)
                    options[key] = () if array is None else tuple(array.tolist())
                else:
                    options[key] = self.option(key, getattr(accessors, accessor)())
        custom = self.vector(op, "CustomOptions")
        if custom is not None:
            options["custom_options"] = custom.tobytes()
        return options

    def option(self, key: str, value: Any) -> Any:
        if key == "padding":
            return _PADDINGS.get(value, f"UNKNOWN_{value}")
        if key == "activation":
            return _ACTIVATIONS.get(value, f"UNKNOWN_{value}")
        if isinstance(value, bytes):
            self.spend(len(value), key)
            return value.decode("utf-8", errors="replace")
        return value


@functools.cache
def _accessors(class_name: str) -> tuple[tuple[str, bool], ...]:
    """(accessor, is it a vector) for every field of an options class of the schema package."""
    found = vars(getattr(tflite, class_name))
    names = [n for n in found if n[0].isupper() and n != "Init" and not n.startswith("GetRootAs")]
    names = [n for n in names if not n.endswith("BufferHasIdentifier")]
    vectors = {n for n in names if f"{n}Length" in found}
    helpers = {n + suffix for n in vectors for suffix in ("Length", "AsNumpy", "IsNone")}
    return tuple((n, n in vectors) for n in names if n not in helpers)


@functools.cache
def _option_key(accessor: str) -> str:
    """'DilationWFactor' -> 'dilation_w', 'FusedActivationFunction' -> 'activation', 'Beta' -> 'beta'."""
    if accessor == "FusedActivationFunction":
        return "activation"
    if accessor.startswith("Filter"):
        return {"FilterHeight": "filter_h", "FilterWidth": "filter_w"}[accessor]
    if accessor.startswith("Dilation"):
        accessor = accessor.removesuffix("Factor")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", accessor).lower()


def _item(items: list[Any], index: int, what: str) -> Any:
    if not 0 <= index < len(items):
        raise ValueError(f"{what}: number {index} of {len(items)}")
    return items[index]


def _constant(raw: np.ndarray, shape: tuple[int, ...], dtype: str, index: int, name: str) -> np.ndarray:
    """Bytes (n,) uint8 as a read-only array of ``shape``; int4 pairs, low nibble first, become int8."""
    if any(size < 0 for size in shape):
        raise ValueError(f"constant tensor {index} ({name}) has the dynamic shape {shape}")
    count = 1
    for size in shape:
        count *= size  # Python integers: a hostile shape must not wrap around
    expected = (count + 1) // 2 if dtype == "int4" else count * np.dtype(dtype).itemsize
    if raw.nbytes != expected:
        raise ValueError(f"tensor {index} ({name}) of shape {shape} {dtype} needs {expected} bytes, has {raw.nbytes}")
    if dtype == "int4":
        nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:count]  # (count,) uint8, 0..15
        array = ((nibbles.astype(np.int8) ^ 8) - 8).reshape(shape)
    else:
        array = raw.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
        if not array.flags.aligned:  # flatbuffers promise alignment, hand-made files may not keep it
            array = array.copy()
    array.flags.writeable = False
    return array
