"""The blocks that the backbones share: a GraphBuilder and sizes in, nodes appended to it out.

A convolution is followed by a ``batch_norm`` node (scale = gamma, offset = beta once the running statistics are
folded in), so that a definition can be trained; its own bias stays zero and is not counted by ``parameters``.
Padding is symmetric, kernel // 2, as in PyTorch, where the networks come from, unless ``pads`` says otherwise.

Weights start as zeros that occupy no memory; ``tinyvad.backbones.assign`` fills them. A bias that a network does not
have but the Graph asks for is called ``<layer>.no_bias``: it stays zero, in training too, and is not counted.

Sources: Sandler et al., MobileNetV2 (CVPR 2018), table 1; Howard et al., Searching for MobileNetV3 (ICCV 2019), sections
5.2 and 5.3; Hu et al., Squeeze-and-Excitation Networks (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph

NO_BIAS = ".no_bias"
Excite = Callable[[GraphBuilder, str, str], str]  # builder, value, name of the result -> that name
Pads = tuple[int, int, int, int]  # top, bottom, left, right


def divisible(channels: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of ``divisor``, never more than 10 % down (the MobileNet rule)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def parameters(definition: Graph) -> int:
    """Trainable values as papers count them: all constants but biases that the network lacks or a batch norm follows."""
    normed = {node.inputs[0] for node in definition.nodes if node.op == "batch_norm"}
    uncounted = {node.inputs[-1] for node in definition.nodes if node.output in normed}
    uncounted |= {name for name in definition.constants if name.endswith(NO_BIAS)}
    return definition.parameters() - sum(definition.constants[name].size for name in uncounted)


def placeholder(*shape: int, value: float = 0) -> np.ndarray:
    """``shape`` filled with one value, float32, read only, four bytes in all."""
    return np.broadcast_to(np.float32(value), shape)


def conv(
    b: GraphBuilder,
    x: str,
    name: str,
    channels: int,
    kernel: int = 1,
    stride: int = 1,
    activation: str = "none",
    output: str = "",
    op: str = "conv2d",
    pads: Pads | None = None,
    bias: float | None = 0.0,
) -> str:
    """Append a convolution without batch norm; the value is called ``output`` (``name`` if empty).

    ``op`` is conv2d or depthwise_conv2d, which keeps the channel count of ``x``. ``pads`` None is kernel // 2 on every
    side. ``bias`` is the value that biases start from, None for a network that has none.
    """
    into = b.shape(x)[3]
    shape = (channels, kernel, kernel, into) if op == "conv2d" else (1, kernel, kernel, channels)
    weights = b.constant(f"{name}.weights", placeholder(*shape))
    biases = b.constant(f"{name}{NO_BIAS if bias is None else '.bias'}", placeholder(channels, value=bias or 0.0))
    geometry = {"stride": (stride, stride), "pads": pads or (kernel // 2,) * 4, "dilation": (1, 1)}
    fused = "none" if activation == "hard_swish" else activation
    y = f"{name}.conv" if activation == "hard_swish" else output or name
    y = b.add(op, [x, weights, biases], y, **geometry, activation=fused)
    return b.add("hard_swish", [y], output or name) if activation == "hard_swish" else y


def conv_bn(
    b: GraphBuilder,
    x: str,
    name: str,
    channels: int,
    kernel: int = 1,
    stride: int = 1,
    activation: str = "relu6",
    output: str = "",
    op: str = "conv2d",
    pads: Pads | None = None,
) -> str:
    """Append convolution + batch norm (+ activation); the value is called ``output`` (``name`` if empty).

    ``op`` and ``pads`` are those of ``conv``. ``activation`` is none, relu, relu6, or hard_swish, which is a node of its
    own behind the value ``name.norm``.
    """
    y = conv(b, x, name, channels, kernel, stride, output=f"{name}.conv", op=op, pads=pads)
    scale = b.constant(f"{name}.scale", placeholder(channels))
    offset = b.constant(f"{name}.offset", placeholder(channels))
    if activation == "hard_swish":
        y = b.add("batch_norm", [y, scale, offset], f"{name}.norm", activation="none")
        return b.add("hard_swish", [y], output or name)
    return b.add("batch_norm", [y, scale, offset], output or name, activation=activation)


def squeeze_excite(
    b: GraphBuilder, x: str, name: str, channels: int, activation: str = "relu", gate: str = "hard_sigmoid"
) -> str:
    """Append global average, 1x1 convolution to ``channels`` and back, and multiply ``x`` by the gate that comes out.

    Inner values are ``name.pool``, ``name.squeeze`` and ``name.gate``.

    Args:
        gate: "hard_sigmoid" is MobileNetV3's relu6(v + 3) / 6, whose convolutions have biases. It is built as relu6 with
            biases that start at 3 and is 6 times the published gate: the 1/6 belongs to the projection that follows,
            where the batch norm makes it immaterial to training. "logistic" is PhiNet's, without biases.
    """
    into = b.shape(x)[3]
    hard = gate == "hard_sigmoid"
    y = b.add("mean", [x], f"{name}.pool")
    y = conv(b, y, f"{name}.squeeze", channels, activation=activation, bias=0.0 if hard else None)
    if hard:
        y = conv(b, y, f"{name}.gate", into, activation="relu6", bias=3.0)
    else:
        y = conv(b, y, f"{name}.gate", into, output=f"{name}.gate.conv", bias=None)
        y = b.add("logistic", [y], f"{name}.gate")
    return b.add("mul", [x, y], name, activation="none")


def bottleneck(
    b: GraphBuilder,
    x: str,
    name: str,
    kernel: int,
    middle: int | None,
    channels: int,
    stride: int,
    activation: str = "relu6",
    excite: Excite | None = None,
    pads: Pads | None = None,
) -> str:
    """Append 1x1 expand to ``middle`` channels (none if None), depthwise, linear 1x1 project, and the shortcut where
    shapes agree.

    The block's value is called ``name``; inner ones ``name.expand``, ``name.depthwise``, ``name.excite`` and, if there is
    a shortcut, ``name.project``.

    Args:
        excite: what gates the depthwise convolution's value, a ``squeeze_excite`` with its sizes; None for nothing.
        pads: of the depthwise convolution, None for kernel // 2 on every side.
    """
    into = b.shape(x)[3]
    y = x if middle is None else conv_bn(b, x, f"{name}.expand", middle, activation=activation)
    y = conv_bn(b, y, f"{name}.depthwise", middle or into, kernel, stride, activation, op="depthwise_conv2d", pads=pads)
    if excite is not None:
        y = excite(b, y, f"{name}.excite")
    shortcut = stride == 1 and into == channels
    y = conv_bn(b, y, f"{name}.project", channels, activation="none", output="" if shortcut else name)
    return b.add("add", [x, y], name, activation="none") if shortcut else y


def inverted_residual(b: GraphBuilder, x: str, name: str, kernel: int, expand: int, channels: int, stride: int) -> str:
    """Append the ``bottleneck`` of MobileNetV2 and MCUNet, ``expand`` times as wide inside; ``expand`` 1 adds no layer."""
    middle = None if expand == 1 else b.shape(x)[3] * expand
    return bottleneck(b, x, name, kernel, middle, channels, stride)


def global_pool(b: GraphBuilder, x: str) -> str:
    """Append the mean over the map, flattened to (1, channels); the value is called ``pool.flat``."""
    return b.add("reshape", [b.add("mean", [x], "pool")], "pool.flat", shape=(1, b.shape(x)[3]))


def linear(b: GraphBuilder, x: str, name: str, channels: int, activation: str = "none") -> str:
    """Append a fully connected layer with bias; before a hard_swish its own value is ``name.linear``."""
    weights = b.constant(f"{name}.weights", placeholder(channels, b.shape(x)[1]))
    bias = b.constant(f"{name}.bias", placeholder(channels))
    if activation == "hard_swish":
        y = b.add("fully_connected", [x, weights, bias], f"{name}.linear", activation="none")
        return b.add("hard_swish", [y], name)
    return b.add("fully_connected", [x, weights, bias], name, activation=activation)


def classifier(b: GraphBuilder, x: str, classes: int) -> str:
    """Append the ImageNet head: global average, fully connected; the value ``classifier`` is (1, classes)."""
    return linear(b, global_pool(b, x), "classifier", classes)
