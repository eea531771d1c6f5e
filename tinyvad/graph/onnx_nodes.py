"""One function an ONNX op: a node whose inputs are known in, nodes of our Graph out.

Flows in: an ``OnnxNode`` and the ``Conversion`` so far, whose values are activations (``Value``) or constants. Flows
out: the node's output as a ``Value``; ``Unsupported`` says why there is none. ``CONVERTERS`` lists what is supported.

The order of an activation's axes in the ONNX file is kept as letters (``NCHW``, ``NHWC``, ``NC``); its tensor in the
Graph is always NHWC. A Transpose only changes the letters; an op that needs an axis looks for its letter.

Source: the ONNX operator specification, opset 7 and later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.shapes import window_size

FLOAT_TYPES = (1, 10, 11, 16)  # TensorProto's float, float16, double, bfloat16
UNBOUNDED = 1e30  # a Clip at a float type's largest value is no Clip


class Unsupported(Exception):
    """Why a node can't be converted, without its name."""


@dataclass(frozen=True)
class OnnxNode:
    """An ONNX node in Python's types; absent optional inputs are empty strings."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclass(frozen=True)
class Value:
    """An activation: its tensor in the Graph and, letter by letter, the order of its axes in the ONNX file.

    ``flat`` is (C, H, W) where the ONNX file flattened an NCHW map of several pixels: ours is flattened from NHWC.
    """

    tensor: str
    order: str
    flat: tuple[int, int, int] | None = None


@dataclass
class Conversion:
    """What is known so far.

    Attributes:
        builder: the Graph so far.
        values: activations by ONNX name.
        constants: arrays by ONNX name.
        affine: tensors that come from arithmetic with constants (not from a BatchNormalization).
    """

    builder: GraphBuilder
    values: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    affine: set[str] = field(default_factory=set)

    def activation(self, node: OnnxNode, index: int = 0, order: str | None = None) -> Value:
        """The activation that is input ``index``; with ``order``, one whose axes stand so."""
        name = node.inputs[index]
        if name not in self.values:
            raise Unsupported(f"its input {name} is a constant, where an activation is supported")
        value = self.values[name]
        if order is not None and value.order != order:
            raise Unsupported(f"its input {name} has axes {value.order}, where {order} is supported")
        return value

    def constant(self, node: OnnxNode, index: int) -> np.ndarray | None:
        """The constant that is input ``index``, None where there is no such input."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        if node.inputs[index] not in self.constants:
            raise Unsupported(f"its input {node.inputs[index]} is computed, where a constant is supported")
        return self.constants[node.inputs[index]]

    def floats(self, node: OnnxNode, index: int) -> np.ndarray:
        """The constant that is input ``index`` as float64, which must be there and finite."""
        array = self.constant(node, index)
        if array is None:
            raise Unsupported(f"input {index} is missing")
        if not np.isfinite(array).all():
            raise Unsupported(f"its constant {node.inputs[index]} holds values that are not finite")
        return array.astype(np.float64)

    def ints(self, node: OnnxNode, attribute: str, index: int) -> list[int] | None:
        """Integers that older opsets keep in an attribute and newer ones in input ``index``; None if in neither."""
        if attribute in node.attributes:
            return [int(number) for number in node.attributes[attribute]]
        array = self.constant(node, index)
        return None if array is None else [int(number) for number in array.reshape(-1)]

    def shape(self, value: Value) -> tuple[int, ...]:
        """The activation's shape as the ONNX file sees it."""
        shape = self.builder.shape(value.tensor)
        if len(shape) != 4:
            return shape
        return tuple(shape["NHWC".index(letter)] for letter in value.order)

    def store(self, name: str, value: np.ndarray) -> str:
        """Add a float32 constant to the Graph; it must be finite."""
        with np.errstate(over="ignore"):
            rounded = value.astype(np.float32)
        if not np.isfinite(rounded).all():
            raise Unsupported("its weights are not finite in float32")
        return self.builder.constant(name, rounded)

    def scale_offset(self, x: str, scale: np.ndarray, offset: np.ndarray, output: str, activation: str = "none") -> str:
        """Append y = x * scale + offset; scale and offset (C,) or scalars."""
        channels = self.builder.shape(x)[-1]
        names = [
            self.store(f"{output}:{word}", np.broadcast_to(value, channels))
            for word, value in (("scale", scale), ("offset", offset))
        ]
        return self.builder.add("batch_norm", [x, *names], output, activation=activation)


def _conv(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node, 0, "NCHW")
    weights = c.floats(node, 1)  # (O, I / group, kh, kw)
    if weights.ndim != 4:
        raise Unsupported(f"its weights have {weights.ndim - 2} spatial axes, where 2 are supported")
    group, channels, out = int(node.attributes.get("group", 1)), c.builder.shape(x.tensor)[3], weights.shape[0]
    depthwise = group > 1 and group == channels == out
    if group != 1 and not depthwise:
        raise Unsupported(
            f"group {group} with {channels} channels in and {out} out, where group 1 (conv2d) and "
            "group = channels in = channels out (depthwise) are supported"
        )
    kernel = (weights.shape[2], weights.shape[3])
    stride, dilation = _pair(node, "strides"), _pair(node, "dilations")
    pads = _pads(c, node, x, kernel, stride, dilation)
    bias = c.floats(node, 2) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(out)
    inputs = [
        x.tensor,
        c.store(f"{node.output}:weights", weights.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))),
        c.store(f"{node.output}:bias", bias),
    ]
    op = "depthwise_conv2d" if depthwise else "conv2d"
    c.builder.add(op, inputs, node.output, stride=stride, pads=pads, dilation=dilation, activation="none")
    return Value(node.output, "NCHW")


def _pair(node: OnnxNode, attribute: str) -> tuple[int, int]:
    numbers = node.attributes.get(attribute, [1, 1])
    if len(numbers) != 2:
        raise Unsupported(f"{attribute} {list(numbers)}, where two numbers are supported")
    return int(numbers[0]), int(numbers[1])


def _pads(
    c: Conversion,
    node: OnnxNode,
    x: Value,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) from ``pads`` (top, left, bottom, right) or ``auto_pad``."""
    auto = node.attributes.get("auto_pad", b"NOTSET").decode()
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads: list[int] = []
        for size, k, s, d in zip(c.builder.shape(x.tensor)[1:3], kernel, stride, dilation):
            total = max((math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0)
            smaller, larger = total // 2, total - total // 2
            pads += [smaller, larger] if auto == "SAME_UPPER" else [larger, smaller]
        return pads[0], pads[1], pads[2], pads[3]
    top, left, bottom, right = node.attributes.get("pads", [0, 0, 0, 0]) if auto == "NOTSET" else [0, 0, 0, 0]
    if min(top, left, bottom, right) < 0:
        raise Unsupported("negative pads, where pads of 0 and more are supported")
    return int(top), int(bottom), int(left), int(right)


def _pool(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node, 0, "NCHW")
    kernel, stride = _pair(node, "kernel_shape"), _pair(node, "strides")
    if _pair(node, "dilations") != (1, 1):
        raise Unsupported("dilated pooling, where dilation 1 is supported")
    top, bottom, left, right = _pads(c, node, x, kernel, stride)
    counted = node.op == "AveragePool" and bool(node.attributes.get("count_include_pad", 0))
    tensor = x.tensor
    if counted and (top or bottom or left or right):  # zeros that count are a pad op of their own, as in TFLite
        tensor = c.builder.add("pad", [tensor], f"{node.output}:pad", pads=(top, bottom, left, right))
        top = bottom = left = right = 0
    _, height, width, _ = c.builder.shape(tensor)
    if node.attributes.get("ceil_mode", 0):
        extra_h = _ceil_extra(height, kernel[0], stride[0], top, bottom)
        extra_w = _ceil_extra(width, kernel[1], stride[1], left, right)
        if counted and (extra_h or extra_w):
            raise Unsupported("ceil_mode with count_include_pad, where one of the two is supported")
        bottom, right = bottom + extra_h, right + extra_w
    attributes: dict[str, Any] = {"kernel": kernel, "stride": stride, "pads": (top, bottom, left, right)}
    if node.op == "AveragePool":
        attributes["count_include_pad"] = False
    op = "average_pool" if node.op == "AveragePool" else "max_pool"
    c.builder.add(op, [tensor], node.output, activation="none", **attributes)
    return Value(node.output, "NCHW")


def _ceil_extra(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Padding to add at the end so that a last, partial window fits; it must start before the end of the input."""
    windows = math.ceil((size + before + after - kernel) / stride) + 1
    if (windows - 1) * stride >= size + before:
        windows -= 1
    extra = (windows - 1) * stride + kernel - (size + before + after)
    return max(extra, 0) if windows > window_size(size, kernel, stride, before, after) else 0


def _global_average(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    if x.order not in ("NCHW", "NCWH"):
        raise Unsupported(f"its input has axes {x.order}, where NCHW is supported")
    return Value(c.builder.add("mean", [x.tensor], node.output), x.order)


def _reduce_mean(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    axes = c.ints(node, "axes", 1) or []
    letters = {x.order[axis] for axis in axes if -len(x.order) <= axis < len(x.order)}
    if letters != {"H", "W"}:
        raise Unsupported(f"mean over axes {axes} of {x.order}, where the mean over H and W is supported")
    if node.attributes.get("keepdims", 1):
        return Value(c.builder.add("mean", [x.tensor], node.output), x.order)
    mean = c.builder.add("mean", [x.tensor], f"{node.output}:mean")
    return Value(c.builder.add("reshape", [mean], node.output, shape=(1, c.builder.shape(mean)[3])), "NC")


def _batch_norm(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    if x.order not in ("NCHW", "NC") or x.flat or node.attributes.get("training_mode", 0):
        raise Unsupported(f"its input has axes {x.order}, where NCHW and NC at inference are supported")
    gamma, beta, mean, variance = (c.floats(node, index) for index in range(1, 5))  # (C,) each
    with np.errstate(all="ignore"):  # a variance that is not positive ends as a constant that is not finite
        scale = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
        offset = beta - mean * scale
    c.scale_offset(x.tensor, scale, offset, node.output)
    return Value(node.output, x.order)


def _arithmetic(c: Conversion, node: OnnxNode) -> Value:
    """Add, Sub, Mul, Div of two activations or of an activation and one number a channel."""
    first, second = node.inputs
    if first in c.values and second in c.values:
        return _binary(c, node)
    x = c.values[first if first in c.values else second]
    vector = _per_channel(c, x, c.floats(node, 1 if first in c.values else 0))
    one, zero = np.float64(1), np.float64(0)
    if node.op == "Add":
        scale, offset = one, vector
    elif node.op == "Mul":
        scale, offset = vector, zero
    elif node.op == "Sub":
        scale, offset = (one, -vector) if first in c.values else (-one, vector)
    elif first in c.values and np.all(vector != 0):
        scale, offset = 1 / vector, zero
    else:
        raise Unsupported("division by an activation or by 0, where division by constants is supported")
    c.affine.add(c.scale_offset(x.tensor, scale, offset, node.output))
    return Value(node.output, x.order, x.flat)


def _per_channel(c: Conversion, x: Value, constant: np.ndarray) -> np.ndarray:
    """``constant``, broadcast over every axis of ``x`` but C, as (C,) or (1,)."""
    rank = len(x.order)
    if constant.ndim <= rank:
        aligned = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
        axis = x.order.index("C")
        elsewhere = constant.size // aligned.shape[axis] if constant.size else 0
        if elsewhere == 1 and aligned.shape[axis] in (1, c.shape(x)[axis]) and not (x.flat and constant.size > 1):
            return aligned.reshape(-1)
    raise Unsupported(f"a constant of shape {constant.shape}, where one number, or one a channel, is supported")


def _binary(c: Conversion, node: OnnxNode) -> Value:
    if node.op not in ("Add", "Mul"):
        raise Unsupported("both inputs are computed, where Add and Mul of two activations are supported")
    x, y = c.activation(node, 0), c.activation(node, 1)
    shapes = c.builder.shape(x.tensor), c.builder.shape(y.tensor)
    if x.order != y.order or x.flat != y.flat:
        raise Unsupported(f"axes {x.order} and {y.order}, where equal ones are supported")
    if shapes[0] != shapes[1] and len(shapes[0]) == 4 and shapes[0][:3] == (1, 1, 1):
        x, y = y, x  # a gate goes second
    c.builder.add(node.op.lower(), [x.tensor, y.tensor], node.output, activation="none")
    return Value(node.output, x.order, x.flat)


def _sum(c: Conversion, node: OnnxNode) -> Value:
    """A Sum is a chain of Adds."""
    total, *rest = node.inputs
    for i, name in enumerate(rest):
        output = node.output if i == len(rest) - 1 else f"{node.output}:{i}"
        c.values[output] = _arithmetic(c, OnnxNode("Add", node.name, (total, name), (output,), {}))
        total = output
    return c.values[total]


def _unary(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    op = {"Relu": "relu", "Sigmoid": "logistic", "HardSwish": "hard_swish"}[node.op]
    return Value(c.builder.add(op, [x.tensor], node.output), x.order, x.flat)


def _clip(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    bounds = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        bound = c.constant(node, index)
        bounds.append(float(bound.reshape(-1)[0]) if bound is not None else float(node.attributes.get(name, default)))
    low, high = bounds
    if low == 0 and high >= UNBOUNDED:
        return Value(c.builder.add("relu", [x.tensor], node.output), x.order, x.flat)
    if low == 0 and high == 6:
        return Value(c.builder.add("relu6", [x.tensor], node.output), x.order, x.flat)
    if low <= -UNBOUNDED and high >= UNBOUNDED:
        return x
    raise Unsupported(f"bounds {low:g} and {high:g}, where 0 and 6 (ReLU6) and 0 and none (ReLU) are supported")


def _hard_sigmoid(c: Conversion, node: OnnxNode) -> Value:
    """clip(a x + b, 0, 1) = relu6(6 a x + 6 b) / 6."""
    x = c.activation(node)
    # 1 / 6 as float32 becomes exactly 1 here, and 3 stays 3: hard-swish is recognised by them
    alpha, beta = (np.round(6 * node.attributes.get(key, value), 6) for key, value in (("alpha", 0.2), ("beta", 0.5)))
    gate = c.scale_offset(x.tensor, alpha, beta, f"{node.output}:gate", "relu6")
    return Value(c.scale_offset(gate, np.float64(1 / 6), np.float64(0), node.output), x.order, x.flat)


def _concat(c: Conversion, node: OnnxNode) -> Value:
    values = [c.activation(node, index) for index in range(len(node.inputs))]
    orders, axis = {value.order for value in values}, int(node.attributes["axis"])
    order = values[0].order
    if len(orders) > 1 or len(order) != 4 or order[axis] != "C":
        raise Unsupported(f"axis {axis} of {', '.join(sorted(orders))}, where the channels of maps are supported")
    c.builder.add("concat", [value.tensor for value in values], node.output, axis=3)
    return Value(node.output, order)


def _pad(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    mode = node.attributes.get("mode", b"constant").decode()
    fill = c.constant(node, 2)
    number = float(fill.reshape(-1)[0]) if fill is not None and fill.size else float(node.attributes.get("value", 0))
    if mode != "constant" or number != 0 or len(x.order) != 4:
        raise Unsupported(f"mode {mode} with value {number:g}, where zeros around maps are supported")
    pads = c.ints(node, "pads", 1) or []
    axes = c.constant(node, 3)
    letters = [x.order[int(axis)] for axis in axes] if axes is not None else list(x.order)
    by_letter = {letter: (pads[i], pads[i + len(letters)]) for i, letter in enumerate(letters)}
    around = [*by_letter.get("H", (0, 0)), *by_letter.get("W", (0, 0))]
    elsewhere = [*by_letter.get("N", (0, 0)), *by_letter.get("C", (0, 0))]
    if any(elsewhere) or min(around) < 0:
        raise Unsupported(f"pads {pads} on axes {''.join(letters)}, where pads of 0 and more on H and W are supported")
    if not any(around):
        return x
    return Value(c.builder.add("pad", [x.tensor], node.output, pads=tuple(around)), x.order)


def _resize(c: Conversion, node: OnnxNode) -> Value:
    """Nearest neighbours, as far as TFLite's floor(i * in / out) gives the same pixels."""
    x = c.activation(node, 0, "NCHW")
    modern = node.op == "Resize" and len(node.inputs) > 2
    scales = c.constant(node, 2 if modern else 1)
    sizes = c.constant(node, 3)
    _, _, height, width = c.shape(x)
    if scales is not None and scales.size == 4:
        size = (math.floor(height * float(scales[2])), math.floor(width * float(scales[3])))
    elif sizes is not None and sizes.size == 4:
        size = (int(sizes[2]), int(sizes[3]))
    else:
        raise Unsupported("no scales or sizes for four axes, where those are supported")
    mode = node.attributes.get("mode", b"nearest").decode()
    where = node.attributes.get("coordinate_transformation_mode", b"half_pixel").decode() if modern else "asymmetric"
    rounding = node.attributes.get("nearest_mode", b"round_prefer_floor").decode() if modern else "floor"
    whole = min(size) > 0 and size[0] % height == 0 and size[1] % width == 0
    same = (where == "asymmetric" and rounding == "floor") or (
        whole and where in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")
    )
    if mode != "nearest" or not same:
        raise Unsupported(
            f"mode {mode}, {where}, {rounding}, where nearest with asymmetric floor, or half_pixel by whole factors, "
            "is supported"
        )
    return Value(c.builder.add("resize_nearest", [x.tensor], node.output, size=size), x.order)


def _gemm(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node, 0, "NC")
    if node.attributes.get("transA", 0):
        raise Unsupported("transA 1, where 0 is supported")
    weights = c.floats(node, 1) * node.attributes.get("alpha", 1.0)
    weights = weights if node.attributes.get("transB", 0) else weights.T  # (O, I)
    bias = np.zeros(weights.shape[0])
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = np.broadcast_to(c.floats(node, 2).reshape(-1) * node.attributes.get("beta", 1.0), weights.shape[0])
    return _fully_connected(c, node, x, weights, bias)


def _matmul(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    weights = c.floats(node, 1)  # (I, O)
    if weights.ndim != 2 or x.order[-1] != "C":
        raise Unsupported(f"axes {x.order} times constant {weights.shape}, where C last times (I, O) is supported")
    bias = np.zeros(weights.shape[1])
    if x.order == "NC":
        return _fully_connected(c, node, x, weights.T, bias)
    names = [c.store(f"{node.output}:weights", weights.T[:, None, None]), c.store(f"{node.output}:bias", bias)]
    attributes = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "activation": "none"}
    return Value(c.builder.add("conv2d", [x.tensor, *names], node.output, **attributes), x.order)


def _fully_connected(c: Conversion, node: OnnxNode, x: Value, weights: np.ndarray, bias: np.ndarray) -> Value:
    """weights (O, I), bias (O,); columns move from NCHW to NHWC order where the input was flattened from a map."""
    if weights.shape[1] != c.builder.shape(x.tensor)[1]:
        raise Unsupported(
            f"weights for {weights.shape[1]} inputs, where {c.builder.shape(x.tensor)[1]} come in at this input size"
        )
    if x.flat is not None:
        weights = weights.reshape(-1, *x.flat).transpose(0, 2, 3, 1).reshape(weights.shape)
    names = [c.store(f"{node.output}:weights", weights), c.store(f"{node.output}:bias", bias)]
    return Value(c.builder.add("fully_connected", [x.tensor, *names], node.output, activation="none"), "NC")


def _transpose(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    axes = node.attributes.get("perm") or list(range(len(x.order)))[::-1]
    order = "".join(x.order[axis] for axis in axes)
    if len(order) == 2 and order != "NC":
        raise Unsupported("a transposed vector, where maps can be transposed")
    return Value(x.tensor, order, x.flat)


def _identity(c: Conversion, node: OnnxNode) -> Value:
    if node.op == "Cast" and node.attributes["to"] not in FLOAT_TYPES:
        raise Unsupported("a cast of an activation to integers, where floats are supported")
    training = c.constant(node, 2) if node.op == "Dropout" else None
    if training is not None and training.any():
        raise Unsupported("training_mode, where inference is supported")
    return c.activation(node)


def _flatten(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    shape, axis = c.shape(x), int(node.attributes.get("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return _reshaped(c, node, x, (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _squeeze(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    shape, axes = c.shape(x), c.ints(node, "axes", 1)
    if axes is None:  # all axes of size 1; the batch is one of them only because we fix it
        axes = [axis for axis in range(1, len(shape)) if shape[axis] == 1]
    dropped = {axis % len(shape) for axis in axes}
    return _reshaped(c, node, x, tuple(size for axis, size in enumerate(shape) if axis not in dropped))


def _unsqueeze(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    shape = list(c.shape(x))
    axes = c.ints(node, "axes", 1) or []
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return _reshaped(c, node, x, tuple(shape))


def _reshape(c: Conversion, node: OnnxNode) -> Value:
    x = c.activation(node)
    old, new = c.shape(x), c.ints(node, "shape", 1) or []
    if not node.attributes.get("allowzero", 0):
        new = [old[axis] if size == 0 and axis < len(old) else size for axis, size in enumerate(new)]
    if new.count(-1) == 1:
        rest = -math.prod(new)
        new = [math.prod(old) // rest if size == -1 and rest else size for size in new]
    return _reshaped(c, node, x, tuple(new))


def _reshaped(c: Conversion, node: OnnxNode, x: Value, new: tuple[int, ...]) -> Value:
    """``x`` in the ONNX shape ``new``: the same, flattened, or a vector that changes its rank or its axes' order."""
    old = c.shape(x)
    if new == old:
        return x
    refusal = Unsupported(
        f"{old} ({x.order}) to {new}, where flattening and (1, C, 1, 1) to (1, C) and back are supported"
    )
    if math.prod(new) != math.prod(old) or new[:1] != (1,):
        raise refusal
    is_vector = len(old) == 2 or math.prod(old) == old[x.order.index("C")]
    if len(new) == 2:
        if not is_vector and x.order not in ("NCHW", "NHWC"):
            raise refusal
        flat = (old[1], old[2], old[3]) if not is_vector and x.order == "NCHW" else None
        return Value(c.builder.add("reshape", [x.tensor], node.output, shape=new), "NC", flat)
    channels = math.prod(old)
    if len(new) != 4 or not is_vector or x.flat or channels not in new[1:]:
        raise refusal
    axis = new.index(channels, 1)
    order = "NHW"[:axis] + "C" + "NHW"[axis:]
    if len(old) == 4:
        return Value(x.tensor, order)
    return Value(c.builder.add("reshape", [x.tensor], node.output, shape=(1, 1, 1, channels)), order)


CONVERTERS: dict[str, Callable[[Conversion, OnnxNode], Value]] = {
    "Add": _arithmetic,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Cast": _identity,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _arithmetic,
    "Dropout": _identity,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary,
    "Identity": _identity,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mul": _arithmetic,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _unary,
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": _unary,
    "Squeeze": _squeeze,
    "Sub": _arithmetic,
    "Sum": _sum,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}
