"""Builds small .tflite files for tests through the schema's object API of ai-edge-litert, not through our exporter."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
import pytest

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs ai-edge-litert's schema")


class TfliteBuilder:
    """Collects tensors and operators; ``finish`` returns the bytes. Nothing is checked: tests build bad files too."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.description = "synthetic"
        self.model.buffers = [schema.BufferT()]  # buffer 0 is empty by convention
        self.model.operatorCodes = []
        self.model.metadata = []
        self.graph = schema.SubGraphT()
        self.graph.tensors = []
        self.graph.operators = []
        self.model.subgraphs = [self.graph]

    def buffer(self, data: bytes) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: str = "int8",
        data: np.ndarray | None = None,
        scale: Any = 0.05,
        zero_point: Any = 0,
        axis: int = 0,
        variable: bool = False,
    ) -> int:
        """Adds a tensor, returns its index; ``scale=None`` leaves quantisation out."""
        tensor = schema.TensorT()
        tensor.shape = list(shape)
        tensor.type = getattr(schema.TensorType, dtype.upper())
        tensor.name = f"t{len(self.graph.tensors)}"
        tensor.isVariable = variable
        tensor.buffer = 0 if data is None else self.buffer(np.ascontiguousarray(data).tobytes())
        if scale is not None and dtype != "float32":
            scales = np.atleast_1d(np.asarray(scale, np.float32))
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = scales.tolist()
            tensor.quantization.zeroPoint = np.broadcast_to(zero_point, scales.shape).astype(int).tolist()
            tensor.quantization.quantizedDimension = axis
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def op(self, name: str, inputs: list[int], outputs: list[int], options: str = "", **fields: Any) -> None:
        """Adds an operator; ``options`` is the schema's class ('Conv2DOptions'), ``fields`` its camelCase fields."""
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, name, schema.BuiltinOperator.CUSTOM)
        code.builtinCode = number
        code.deprecatedBuiltinCode = min(number, 127)
        code.version = 1
        if number == schema.BuiltinOperator.CUSTOM:
            code.customCode = name
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs = list(inputs)
        operator.outputs = list(outputs)
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
            for field, value in fields.items():
                assert hasattr(operator.builtinOptions, field), f"{options} has no {field}"
                setattr(operator.builtinOptions, field, value)
        self.graph.operators.append(operator)

    def metadata(self, name: str, data: bytes) -> None:
        entry = schema.MetadataT()
        entry.name = name
        entry.buffer = self.buffer(data)
        self.model.metadata.append(entry)

    def finish(self, inputs: list[int], outputs: list[int]) -> bytes:
        self.graph.inputs = list(inputs)
        self.graph.outputs = list(outputs)
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
