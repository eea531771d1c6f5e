"""A .tflite file into a Graph: float files to float Graphs, int8 files to int8 Graphs as they are, or dequantised.

Only what the wanted outputs need is converted, so that a network with a head that tinyvad does not know can be tapped
before it. SAME padding becomes explicit pads for the input's size; constants keep the file's bytes.

With ``dequantize`` an int8 or uint8 file becomes a float Graph: weights and biases as the real numbers that they stand
for, QUANTIZE and DEQUANTIZE left out. The clipping to each tensor's range goes with the quantisation; fused ReLUs stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, Quantization, Tensor
from tinyvad.graph.shapes import Shape, infer_shape
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator, TfliteTensor, read_tflite

_ACTIVATIONS = {"NONE": "none", "RELU": "relu", "RELU6": "relu6"}
# What a damaged file makes the converters stumble over: options or inputs that are not there, shapes without axes.
_DAMAGED = (KeyError, IndexError, ValueError, ZeroDivisionError)


def same_pads(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """(before, after) padding of TFLite's SAME along one axis: ceil(size / stride) windows, the odd one behind."""
    windows = -(-size // stride)
    total = max((windows - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def import_tflite(
    source: str | Path | bytes,
    dequantize: bool = False,
    outputs: Sequence[str] | None = None,
    input_size: tuple[int, int] | None = None,
) -> Graph:
    """Read a .tflite file, or its bytes, as a Graph.

    Args:
        source: path or bytes.
        dequantize: give a float Graph of an int8 or uint8 file.
        outputs: names of the wanted tensors, the file's outputs by default; the rest of the file is not converted.
        input_size: (H, W) to run at instead of the file's own; padding and shapes follow.

    Returns:
        Graph with the file's tensor names (made unique where the file repeats one).

    Raises:
        InputError: the file can't be read, an output does not exist, or needs an operator, a dtype or an option that
            the Graph does not have (operator and tensor are named).
    """
    file = read_tflite(source)
    if len(file.inputs) != 1:
        raise InputError(f"{file.path_name}: {len(file.inputs)} inputs; only networks with one image input can be used")
    importer = _Importer(file, dequantize, input_size)
    wanted = file.outputs if outputs is None else [importer.find(name) for name in outputs]
    for operator in _needed(file, wanted):
        convert = _CONVERTERS.get(operator.op)
        if convert is None:
            raise importer.error(operator, "is not supported; tap an earlier tensor")
        try:
            convert(importer, operator)
        except _DAMAGED as error:
            raise importer.error(operator, f"is damaged ({type(error).__name__}: {error})") from error
    for index in wanted:
        if index not in importer.values:
            raise InputError(f"{file.path_name}: output {importer.names[index]} is not computed from the input")
    graph = importer.graph
    graph.outputs = list(dict.fromkeys(importer.values[index] for index in wanted))
    graph.check()
    return graph


def _needed(file: TfliteFile, wanted: list[int]) -> list[TfliteOperator]:
    """The operators that the wanted tensors depend on, in the file's order."""
    needed = set(wanted)
    operators = []
    for operator in reversed(file.operators):
        if needed.intersection(operator.outputs):
            operators.append(operator)
            # a reshape's target may be computed from shapes alone; the importer infers it
            needed.update(operator.inputs[:1] if operator.op == "RESHAPE" else operator.inputs)
    return operators[::-1]


class _Importer:
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
        self.graph.tensors[name] = self.tensor(image, name, (1, *shape[1:]), any_type=True)
        self.values: dict[int, str] = {image.index: name}

    def error(self, operator: TfliteOperator, what: str) -> InputError:
        return InputError(f"{self.file.path_name}: {operator.op} -> {self.names[operator.outputs[0]]} {what}")

    def find(self, name: str) -> int:
        if name not in self.names:
            made = [self.names[operator.outputs[0]] for operator in self.file.operators if operator.outputs]
            raise InputError(f"{self.file.path_name} has no tensor {name}; it has {', '.join(made[:8])}, ...")
        return self.names.index(name)

    def tensor(self, stored: TfliteTensor, name: str, shape: Shape, any_type: bool = False) -> Tensor:
        """Description of an activation. Only a graph's input may hold what a quantize node will make int8."""
        if self.dequantize:
            return Tensor(name, shape)
        if stored.dtype == "float32":
            return Tensor(name, shape)
        if stored.dtype != "int8" and not any_type:
            raise InputError(
                f"{self.file.path_name}: {name} is {stored.dtype}, not int8 or float32; import it with dequantize"
            )
        if stored.quantization is None:
            raise InputError(f"{self.file.path_name}: {name} is {stored.dtype} without scale and zero point")
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
        if self.dequantize or stored.dtype == "float16":
            data, quantization = _real_values(data, quantization), None
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


def _real_values(data: np.ndarray, quantization: Quantization | None) -> np.ndarray:
    """What quantised values stand for, float32; a float array unchanged."""
    if quantization is None or data.dtype.kind == "f":
        return data.astype(np.float32)
    scale, zero_point = quantization.scale.astype(np.float64), quantization.zero_point
    if quantization.axis is not None:
        shape = [1] * data.ndim
        shape[quantization.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return ((data.astype(np.int64) - zero_point) * scale).astype(np.float32)


def _weights(state: _Importer, operator: TfliteOperator, x: str, axis: int = 0) -> str:
    """Weights as a constant of the graph, of the type that goes with the input's; ``axis`` is the output channels'."""
    state.array(operator, 1)
    name = state.value(operator, 1)
    tensor, wanted = state.graph.tensors[name], state.graph.tensors[x].dtype
    if tensor.dtype != wanted:
        raise state.error(operator, f"has {wanted} inputs and {tensor.dtype} weights; import it with dequantize")
    quantization = tensor.quantization
    if wanted == "int8" and (quantization is None or quantization.zero_point.any()):
        raise state.error(operator, "has int8 weights whose zero point is not 0; import it with dequantize")
    if quantization is not None and quantization.axis not in (None, axis):
        raise state.error(operator, f"has weight scales along axis {quantization.axis}, not {axis}")
    return name


def _bias(state: _Importer, operator: TfliteOperator, x: str, weights: str) -> str:
    """Bias (O,) as a constant; zeros where the file leaves it out. Its scale is s_in * s_w whether stored or not."""
    output = state.file.tensors[operator.outputs[0]]
    stored = state.file.tensors[operator.inputs[2]] if len(operator.inputs) > 2 and operator.inputs[2] >= 0 else None
    data = np.zeros(output.shape[-1], np.int32) if stored is None else state.array(operator, 2)
    name = f"{state.names[output.index]}_bias" if stored is None else state.names[stored.index]
    x_stored, w_stored = (state.file.tensors[i] for i in operator.inputs[:2])
    quantization = None if stored is None else stored.quantization
    if quantization is None and x_stored.quantization is not None and w_stored.quantization is not None:
        scale = x_stored.quantization.scale[0] * w_stored.quantization.scale  # (1,) or (O,) float32
        quantization = Quantization(scale, np.zeros(scale.size, np.int64), 0 if scale.size > 1 else None)
    if data.shape != (output.shape[-1],):
        raise state.error(operator, f"has a bias of shape {data.shape} for {output.shape[-1]} channels")
    if state.graph.tensors[x].dtype == "float32":
        return state.set_constant(name, _real_values(data, quantization))
    if data.dtype != np.int32:
        raise state.error(operator, f"has a {data.dtype} bias; int8 layers take int32")
    return state.set_constant(name, data, quantization)


def _conv(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    weights = _weights(state, operator, x)
    _add_conv(state, operator, "conv2d", x, weights)


def _depthwise(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    weights = _weights(state, operator, x, axis=3)
    shape = state.shape(weights)  # (1, kh, kw, C * multiplier)
    if len(shape) != 4 or shape[3] == state.shape(x)[-1]:
        _add_conv(state, operator, "depthwise_conv2d", x, weights)
        return
    if state.shape(x)[-1] != 1:
        raise state.error(operator, f"has a depth multiplier of {shape[3] / state.shape(x)[-1]:g}; only 1 is supported")
    # every output channel sees the one input channel: an ordinary convolution, (1, kh, kw, O) -> (O, kh, kw, 1)
    quantization = state.graph.tensors[weights].quantization
    if quantization is not None and quantization.axis is not None:
        quantization = dataclasses.replace(quantization, axis=0)
    turned = np.ascontiguousarray(state.graph.constants[weights].transpose(3, 1, 2, 0))
    _add_conv(state, operator, "conv2d", x, state.set_constant(weights, turned, quantization))


def _add_conv(state: _Importer, operator: TfliteOperator, op: str, x: str, weights: str) -> None:
    shape = state.shape(weights)
    if len(shape) != 4:
        raise state.error(operator, f"has weights of shape {shape}")
    bias = _bias(state, operator, x, weights)
    dilation = (operator.options["dilation_h"], operator.options["dilation_w"])
    attributes = state.windows(operator, x, (shape[1], shape[2]))
    state.add(operator, op, [x, weights, bias], dilation=dilation, **attributes)


def _fully_connected(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    weights = _weights(state, operator, x)
    if operator.options.get("weights_format") or operator.options.get("keep_num_dims"):
        raise state.error(operator, "has shuffled weights or keeps its dimensions; only the plain form is supported")
    bias = _bias(state, operator, x, weights)
    shape, columns = state.shape(x), state.shape(weights)[-1]
    if int(np.prod(shape)) != columns:
        raise state.error(operator, f"takes {columns} values, but its input is {shape}; tap an earlier tensor")
    if len(shape) != 2:
        x = _flatten(state, operator, x, columns)
    state.add(operator, "fully_connected", [x, weights, bias], activation=state.activation(operator))


def _flatten(state: _Importer, operator: TfliteOperator, x: str, columns: int) -> str:
    flat = state.add(operator, "reshape", [x], f"{state.names[operator.outputs[0]]}_flat", shape=(1, columns))
    state.graph.tensors[flat] = dataclasses.replace(state.graph.tensors[x], name=flat, shape=(1, columns))
    return flat


def _add(state: _Importer, operator: TfliteOperator) -> None:
    inputs = [state.value(operator, 0), state.value(operator, 1)]
    state.add(operator, "add", inputs, activation=state.activation(operator))


def _mul(state: _Importer, operator: TfliteOperator) -> None:
    """A product; a constant or (1, 1, 1, C) operand stands second."""
    x, y = state.value(operator, 0), state.value(operator, 1)
    if x in state.graph.constants or int(np.prod(state.shape(x))) < int(np.prod(state.shape(y))):
        x, y = y, x
    channels = state.shape(x)[-1]
    if y in state.graph.constants and state.shape(y) in ((), (1,), (channels,)):
        whole = np.ascontiguousarray(np.broadcast_to(state.graph.constants[y], (1, 1, 1, channels)))
        y = state.set_constant(y, whole, state.graph.tensors[y].quantization)
    state.add(operator, "mul", [x, y], activation=state.activation(operator))


def _pool(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    kernel = (operator.options["filter_h"], operator.options["filter_w"])
    attributes = state.windows(operator, x, kernel)
    if operator.op == "AVERAGE_POOL_2D":
        state.add(operator, "average_pool", [x], kernel=kernel, count_include_pad=False, **attributes)
    else:
        state.add(operator, "max_pool", [x], kernel=kernel, **attributes)


def _mean(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    axes = {int(axis) % 4 for axis in state.array(operator, 1).reshape(-1)}
    if len(state.shape(x)) != 4 or axes != {1, 2}:
        raise state.error(operator, f"averages axes {sorted(axes)} of {state.shape(x)}; only H and W are supported")
    if operator.options.get("keep_dims"):
        state.add(operator, "mean", [x])
        return
    kept = state.add(operator, "mean", [x], f"{state.names[operator.outputs[0]]}_kept")
    state.add(operator, "reshape", [kept], shape=(1, state.shape(x)[3]))


def _pad(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    paddings = state.array(operator, 1)
    if len(state.shape(x)) != 4 or paddings.shape != (4, 2) or paddings[[0, 3]].any() or paddings.min() < 0:
        raise state.error(operator, f"has paddings {paddings.tolist()}; only rows and columns can be padded")
    (top, bottom), (left, right) = paddings[1:3].tolist()
    state.add(operator, "pad", [x], pads=(top, bottom, left, right))


def _resize(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    height, width = (int(size) for size in state.array(operator, 1))
    if state.input_size is not None:
        stored = state.file.tensors[operator.inputs[0]].shape
        if height % stored[1] or width % stored[2]:
            raise state.error(operator, f"resizes {stored[1:3]} to {(height, width)}; keep the file's own input size")
        height, width = height // stored[1] * state.shape(x)[1], width // stored[2] * state.shape(x)[2]
    flags: dict[str, Any] = {
        key: True for key in ("align_corners", "half_pixel_centers") if operator.options.get(key)
    }
    state.add(operator, "resize_nearest", [x], size=(height, width), **flags)


def _concat(state: _Importer, operator: TfliteOperator) -> None:
    inputs = [state.value(operator, i) for i in range(len(operator.inputs))]
    axis, activation = operator.options["axis"], state.activation(operator)
    if axis not in (3, -1) or activation != "none":
        raise state.error(operator, f"joins axis {axis} with activation {activation}; only channels can be joined")
    state.add(operator, "concat", inputs, axis=3)


def _reshape(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    shape: Sequence[int] = state.file.tensors[operator.outputs[0]].shape
    if operator.op == "RESHAPE" and state.input_size is not None:  # the output's stored shape is of another size
        constant = state.file.tensors[operator.inputs[1]].data if len(operator.inputs) > 1 else None
        shape = operator.options.get("new_shape", ()) if constant is None else constant.reshape(-1).tolist()
    size, known = int(np.prod(state.shape(x))), int(np.prod([s for s in shape if s >= 0]))
    resolved = tuple(size // max(known, 1) if s < 0 else int(s) for s in shape)
    if int(np.prod(resolved)) != size or sum(s < 0 for s in shape) > 1:
        raise state.error(operator, f"cannot turn {state.shape(x)} into {tuple(shape)}; tap an earlier tensor")
    state.add(operator, "reshape", [x], shape=resolved)


def _elementwise(state: _Importer, operator: TfliteOperator) -> None:
    state.add(operator, operator.op.lower(), [state.value(operator)])


def _quantize(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    if state.dequantize:
        state.values[operator.outputs[0]] = x
        return
    if x not in state.graph.inputs or state.graph.tensors[x].dtype not in ("uint8", "float32"):
        raise state.error(operator, "changes the scale in the middle of the network; import it with dequantize")
    state.add(operator, "quantize", [x])


def _dequantize(state: _Importer, operator: TfliteOperator) -> None:
    x = state.value(operator)
    if x in state.graph.constants:  # weights stored in float16 or int8, used in float
        tensor = state.graph.tensors[x]
        state.set_constant(x, _real_values(state.graph.constants[x], tensor.quantization))
        state.values[operator.outputs[0]] = x
    elif state.dequantize:
        state.values[operator.outputs[0]] = x
    else:
        state.add(operator, "dequantize", [x])


_CONVERTERS: dict[str, Callable[[_Importer, TfliteOperator], None]] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _fully_connected,
    "ADD": _add,
    "MUL": _mul,
    "AVERAGE_POOL_2D": _pool,
    "MAX_POOL_2D": _pool,
    "MEAN": _mean,
    "PAD": _pad,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "CONCATENATION": _concat,
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "RELU": _elementwise,
    "RELU6": _elementwise,
    "LOGISTIC": _elementwise,
    "HARD_SWISH": _elementwise,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
}
