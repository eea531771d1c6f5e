"""One converter for each TFLite operator: an operator of the file in, nodes added to the Graph (``Conversion``).

Options are those of TFLite's schema (see ``tflite_file``). A converter refuses, by operator and tensor, what the Graph
cannot say; it never approximates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyvad.graph.ir import Quantization
from tinyvad.graph.tflite_conversion import Conversion, real_values
from tinyvad.graph.tflite_file import TfliteOperator


def _weights(state: Conversion, operator: TfliteOperator, x: str, axis: int = 0) -> str:
    """Weights as a constant of the graph, of the type that goes with the input's; ``axis`` is the output channels'."""
    name = state.value(operator, 1)
    if name not in state.graph.constants:
        raise state.error(operator, "has weights that are computed from the image")
    tensor, wanted = state.graph.tensors[name], state.graph.tensors[x].dtype
    if tensor.dtype != wanted or wanted == "uint8":
        raise state.error(operator, f"has {wanted} inputs and {tensor.dtype} weights; import it with dequantize")
    quantization = tensor.quantization
    if wanted == "int8" and (quantization is None or quantization.zero_point.any()):
        raise state.error(operator, "has int8 weights whose zero point is not 0; import it with dequantize")
    if quantization is not None and quantization.axis not in (None, axis):
        raise state.error(operator, f"has weight scales along axis {quantization.axis}, not {axis}")
    return name


def _bias(state: Conversion, operator: TfliteOperator, x: str) -> str:
    """Bias (O,) as a constant; zeros where the file leaves it out. Its scale is s_in * s_w whether stored or not."""
    channels, is_int8 = state.file.tensors[operator.outputs[0]].shape[-1], state.graph.tensors[x].dtype == "int8"
    index = operator.inputs[2] if len(operator.inputs) > 2 else -1
    if index < 0:
        zeros = np.zeros(channels, np.int32 if is_int8 else np.float32)
        quantization = _bias_quantization(state, operator) if is_int8 else None
        return state.set_constant(state.fresh(f"{state.names[operator.outputs[0]]}_bias"), zeros, quantization)
    stored = state.file.tensors[index]
    if stored.quantization is None and stored.dtype == "int32" and stored.data is not None:
        quantization = _bias_quantization(state, operator)
        data = stored.data if is_int8 else real_values(stored.data, quantization)
        name = state.set_constant(state.names[index], data, quantization if is_int8 else None)
    else:
        name = state.value(operator, 2)
    tensor = state.graph.tensors[name]
    if tensor.shape != (channels,) or tensor.dtype != ("int32" if is_int8 else "float32"):
        raise state.error(operator, f"has a {tensor.dtype} bias of shape {tensor.shape} for {channels} channels")
    return name


def _bias_quantization(state: Conversion, operator: TfliteOperator) -> Quantization:
    x, weights = (state.file.tensors[index].quantization for index in operator.inputs[:2])
    if x is None or weights is None:
        raise state.error(operator, "has a bias without scale behind an input or weights without scale")
    scale = x.scale[0] * weights.scale  # (1,) or (O,) float32
    return Quantization(scale, np.zeros(scale.size, np.int64), 0 if scale.size > 1 else None)


def _conv(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    weights = _weights(state, operator, x)
    _add_conv(state, operator, "conv2d", x, weights)


def _depthwise(state: Conversion, operator: TfliteOperator) -> None:
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


def _add_conv(state: Conversion, operator: TfliteOperator, op: str, x: str, weights: str) -> None:
    shape = state.shape(weights)
    if len(shape) != 4:
        raise state.error(operator, f"has weights of shape {shape}")
    bias = _bias(state, operator, x)
    dilation = (operator.options["dilation_h"], operator.options["dilation_w"])
    attributes = state.windows(operator, x, (shape[1], shape[2]))
    state.add(operator, op, [x, weights, bias], dilation=dilation, **attributes)


def _fully_connected(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    weights = _weights(state, operator, x)
    if operator.options.get("weights_format") or operator.options.get("keep_num_dims"):
        raise state.error(operator, "has shuffled weights or keeps its dimensions; only the plain form is supported")
    bias = _bias(state, operator, x)
    shape, columns = state.shape(x), state.shape(weights)[-1]
    if int(np.prod(shape)) != columns:
        raise state.error(operator, f"takes {columns} values, but its input is {shape}; tap an earlier tensor")
    if len(shape) != 2:
        x = _flatten(state, operator, x, columns)
    state.add(operator, "fully_connected", [x, weights, bias], activation=state.activation(operator))


def _flatten(state: Conversion, operator: TfliteOperator, x: str, columns: int) -> str:
    name = state.fresh(f"{state.names[operator.outputs[0]]}_flat")
    flat = state.add(operator, "reshape", [x], name, shape=(1, columns))
    state.graph.tensors[flat] = dataclasses.replace(state.graph.tensors[x], name=flat, shape=(1, columns))
    return flat


def _two_operands(state: Conversion, operator: TfliteOperator) -> list[str]:
    inputs = [state.value(operator, 0), state.value(operator, 1)]
    types = [state.graph.tensors[name].dtype for name in inputs]
    if types[0] != types[1]:
        raise state.error(operator, f"joins {types[0]} and {types[1]} values; import it with dequantize")
    return inputs


def _add(state: Conversion, operator: TfliteOperator) -> None:
    inputs = _two_operands(state, operator)
    state.add(operator, "add", inputs, activation=state.activation(operator))


def _mul(state: Conversion, operator: TfliteOperator) -> None:
    """A product; a constant or (1, 1, 1, C) operand stands second."""
    x, y = _two_operands(state, operator)
    if x in state.graph.constants or int(np.prod(state.shape(x))) < int(np.prod(state.shape(y))):
        x, y = y, x
    channels = state.shape(x)[-1]
    if y in state.graph.constants and state.shape(y) in ((), (1,), (channels,)):
        whole = np.ascontiguousarray(np.broadcast_to(state.graph.constants[y], (1, 1, 1, channels)))
        y = state.set_constant(y, whole, state.graph.tensors[y].quantization)
    state.add(operator, "mul", [x, y], activation=state.activation(operator))


def _pool(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    kernel = (operator.options["filter_h"], operator.options["filter_w"])
    attributes = state.windows(operator, x, kernel)
    if operator.op == "AVERAGE_POOL_2D":
        state.add(operator, "average_pool", [x], kernel=kernel, count_include_pad=False, **attributes)
    else:
        state.add(operator, "max_pool", [x], kernel=kernel, **attributes)


def _mean(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    axes = {int(axis) % 4 for axis in state.array(operator, 1).reshape(-1)}
    if len(state.shape(x)) != 4 or axes != {1, 2}:
        raise state.error(operator, f"averages axes {sorted(axes)} of {state.shape(x)}; only H and W are supported")
    if operator.options.get("keep_dims"):
        state.add(operator, "mean", [x])
        return
    kept = state.add(operator, "mean", [x], state.fresh(f"{state.names[operator.outputs[0]]}_kept"))
    state.add(operator, "reshape", [kept], shape=(1, state.shape(x)[3]))


def _pad(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    paddings = state.array(operator, 1)
    if len(state.shape(x)) != 4 or paddings.shape != (4, 2) or paddings[[0, 3]].any() or paddings.min() < 0:
        raise state.error(operator, f"has paddings {paddings.tolist()}; only rows and columns can be padded")
    (top, bottom), (left, right) = paddings[1:3].tolist()
    state.add(operator, "pad", [x], pads=(top, bottom, left, right))


def _resize(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    height, width = (int(size) for size in state.array(operator, 1))
    if state.input_size is not None:
        stored = state.file.tensors[operator.inputs[0]].shape
        if height % stored[1] or width % stored[2]:
            raise state.error(operator, f"resizes {stored[1:3]} to {(height, width)}; keep the file's own input size")
        height, width = height // stored[1] * state.shape(x)[1], width // stored[2] * state.shape(x)[2]
    flags: dict[str, Any] = {key: True for key in ("align_corners", "half_pixel_centers") if operator.options.get(key)}
    state.add(operator, "resize_nearest", [x], size=(height, width), **flags)


def _concat(state: Conversion, operator: TfliteOperator) -> None:
    inputs = [state.value(operator, i) for i in range(len(operator.inputs))]
    axis, activation = operator.options["axis"], state.activation(operator)
    if axis not in (3, -1) or activation != "none":
        raise state.error(operator, f"joins axis {axis} with activation {activation}; only channels can be joined")
    state.add(operator, "concat", inputs, axis=3)


def _reshape(state: Conversion, operator: TfliteOperator) -> None:
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


def _elementwise(state: Conversion, operator: TfliteOperator) -> None:
    state.add(operator, operator.op.lower(), [state.value(operator)])


def _quantize(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    if state.dequantize:
        state.values[operator.outputs[0]] = x
        return
    if x not in state.graph.inputs or state.graph.tensors[x].dtype not in ("uint8", "float32"):
        raise state.error(operator, "changes the scale in the middle of the network; import it with dequantize")
    state.add(operator, "quantize", [x])


def _dequantize(state: Conversion, operator: TfliteOperator) -> None:
    x = state.value(operator)
    if x in state.graph.constants:  # weights stored in float16 or int8, used in float
        tensor = state.graph.tensors[x]
        state.set_constant(x, real_values(state.graph.constants[x], tensor.quantization))
        state.values[operator.outputs[0]] = x
    elif state.dequantize:
        state.values[operator.outputs[0]] = x
    else:
        state.add(operator, "dequantize", [x])


CONVERTERS: dict[str, Callable[[Conversion, TfliteOperator], None]] = {
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
