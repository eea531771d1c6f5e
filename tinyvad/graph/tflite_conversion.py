"""The Graph while a .tflite file is converted into it: what is known so far, and the ways to add to it.

The converters of single operators (``tflite_nodes``) get one ``Conversion`` and one operator, and add nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, Quantization, Tensor
from tinyvad.graph.shapes import Shape, infer_shape
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator, TfliteTensor

_ACTIVATIONS = {"NONE": "none", "RELU": "relu", "RELU6": "relu6"}


def same_pads(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """(before, after) padding of TFLite's SAME along one axis: ceil(size / stride) windows, the odd one behind."""
    windows = -(-size // stride)
    total = max((windows - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


class Conversion:
    """The graph while it grows: ``values`` maps the file's tensor indices to the graph's tensor names."""

    def __init__(self, file: TfliteFile, dequantize: bool, input_size: tuple[int, int] | None) -> None:
        self.file, self.dequantize, self.input_size = file, dequantize, input_size
        self.names = _unique_names(file)
        image = file.tensors[file.inputs[0]]
        shape = image.shape
        if input_size is not None:
            if len(shape) != 4:
                raise InputError(f"{file.path_name}: input {image.name} is {shape}; only (1, H, W, C) can be resized")
            shape = (shape[0], *input_size, shape[3])
        if any(size < 1 for size in shape[1:]):
            raise InputError(f"{file.path_name}: input {image.name} has shape {shape}; give input_size")
        name = self.names[image.index]
        self.graph = Graph(Path(file.path_name).stem, [name], [], [], {}, {})
        self.graph.tensors[name] = self.tensor(image, name, (1, *shape[1:]), is_input=True)
        self.values: dict[int, str] = {image.index: name}

    def error(self, operator: TfliteOperator, what: str) -> InputError:
        return InputError(f"{self.file.path_name}: {operator.op} -> {self.names[operator.outputs[0]]} {what}")

    def find(self, name: str) -> int:
        if name not in self.names:
            made = [self.names[operator.outputs[0]] for operator in self.file.operators if operator.outputs]
            raise InputError(f"{self.file.path_name} has no tensor {name}; it has {', '.join(made[:8])}, ...")
        return self.names.index(name)

    def tensor(self, stored: TfliteTensor, name: str, shape: Shape, is_input: bool = False) -> Tensor:
        """Description of an activation. Only the graph's input may be uint8: a quantize node will make it int8."""
        if self.dequantize:
            return Tensor(name, shape)
        if stored.dtype == "float32":
            return Tensor(name, shape)
        if stored.dtype != "int8" and not (is_input and stored.dtype == "uint8"):
            raise InputError(
                f"{self.file.path_name}: {name} is {stored.dtype}, not int8 or float32; import it with dequantize"
            )
        quantization, limits = stored.quantization, np.iinfo(stored.dtype)
        if quantization is None or quantization.scale.size != 1 or not 0 < quantization.scale[0] < np.inf:
            raise InputError(f"{self.file.path_name}: {name} is {stored.dtype} but has no scale that is one number above 0")
        if not limits.min <= quantization.zero_point[0] <= limits.max:
            raise InputError(f"{self.file.path_name}: {name} has zero point {quantization.zero_point[0]} in {stored.dtype}")
        return Tensor(name, shape, stored.dtype, stored.quantization)

    def value(self, operator: TfliteOperator, position: int = 0) -> str:
        """Name of an operand in the graph; constants are added as they are met."""
        index = operator.inputs[position] if position < len(operator.inputs) else -1
        if index in self.values:
            return self.values[index]
        if index < 0 or self.file.tensors[index].data is None:
            raise self.error(operator, f"input {position} is left out or not computed from the image")
        return self.add_constant(index)

    def shape(self, name: str) -> Shape:
        return self.graph.tensors[name].shape

    def fresh(self, name: str) -> str:
        """``name`` for a value that the file does not have, changed where the file does have it."""
        while name in self.names:
            name += "_"
        return name

    def array(self, operator: TfliteOperator, position: int) -> np.ndarray:
        """Values of an operand that must be constant (weights, axes, paddings)."""
        index = operator.inputs[position] if position < len(operator.inputs) else -1
        data = self.file.tensors[index].data if index >= 0 else None
        if data is None:
            raise self.error(operator, f"input {position} must be a constant of the file")
        return data

    def add_constant(self, index: int) -> str:
        stored = self.file.tensors[index]
        data = stored.data
        assert data is not None
        name, quantization = self.names[index], stored.quantization
        # negative scales are fine: published files have them where a batch norm's factor was negative
        if quantization is not None and not np.isfinite(quantization.scale).all():
            raise InputError(f"{self.file.path_name}: constant {name} has scales that are no numbers")
        if self.dequantize or stored.dtype == "float16":
            data, quantization = real_values(data, quantization), None
        self.set_constant(name, data, quantization)
        self.values[index] = name
        return name

    def set_constant(self, name: str, data: np.ndarray, quantization: Quantization | None = None) -> str:
        self.graph.constants[name] = data
        self.graph.tensors[name] = Tensor(name, data.shape, data.dtype.name, quantization)
        return name

    def add(
        self, operator: TfliteOperator, op: str, inputs: Sequence[str], name: str | None = None, **attributes: Any
    ) -> str:
        """Add a node for the operator's output; with ``name``, a value on the way to it that the file does not name."""
        stored = self.file.tensors[operator.outputs[0]]
        output = self.names[stored.index] if name is None else name
        node = Node(op, tuple(inputs), output, attributes)
        shape = infer_shape(node, [self.shape(i) for i in inputs])
        agrees = name is not None or self.input_size is not None or -1 in stored.shape or shape == stored.shape
        if not agrees:
            raise self.error(operator, f"has shape {stored.shape} in the file, but its inputs make {shape}")
        self.graph.nodes.append(node)
        self.graph.tensors[output] = self.tensor(stored, output, shape)
        if name is None:
            self.values[stored.index] = output
        return output

    def activation(self, operator: TfliteOperator) -> str:
        name = operator.options.get("activation", "NONE")
        if name not in _ACTIVATIONS:
            raise self.error(operator, f"has the fused activation {name}; only NONE, RELU and RELU6 are supported")
        return _ACTIVATIONS[name]

    def windows(self, operator: TfliteOperator, x: str, kernel: tuple[int, int]) -> dict[str, Any]:
        """Attributes that convolutions and pools share."""
        options = operator.options
        stride = (options["stride_h"], options["stride_w"])
        dilation = (options.get("dilation_h", 1), options.get("dilation_w", 1))
        if min(*stride, *dilation, *kernel) < 1 or len(self.shape(x)) != 4:
            raise self.error(operator, f"has stride {stride}, dilation {dilation}, kernel {kernel} on {self.shape(x)}")
        pads = (0, 0, 0, 0)
        if options["padding"] == "SAME":
            rows, columns = map(same_pads, self.shape(x)[1:3], kernel, stride, dilation)
            pads = (*rows, *columns)
        return {"stride": stride, "pads": pads, "activation": self.activation(operator)}


def _unique_names(file: TfliteFile) -> list[str]:
    names: list[str] = []
    seen: set[str] = set()
    for tensor in file.tensors:
        name = tensor.name or f"tensor_{tensor.index}"
        while name in seen:
            name += f"#{tensor.index}"
        names.append(name)
        seen.add(name)
    return names


def real_values(data: np.ndarray, quantization: Quantization | None) -> np.ndarray:
    """What quantised values stand for, float32; a float array unchanged."""
    if quantization is None or data.dtype.kind == "f":
        return data.astype(np.float32)
    scale, zero_point = quantization.scale.astype(np.float64), quantization.zero_point
    if quantization.axis is not None:
        shape = [1] * data.ndim
        shape[quantization.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    real = (data.astype(np.int64) - zero_point) * scale
    if real.size and np.abs(real).max() > np.finfo(np.float32).max:
        raise ValueError("dequantised values beyond float32")
    return real.astype(np.float32)
