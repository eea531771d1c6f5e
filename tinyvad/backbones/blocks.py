"""The blocks that MobileNetV2 and MCUNet share: a GraphBuilder and sizes in, nodes appended to it out.

A convolution is followed by a ``batch_norm`` node (scale = gamma, offset = beta once the running statistics are
folded in), so that a definition can be trained; its own bias stays zero and is not counted by ``parameters``.
Padding is symmetric, kernel // 2, as in PyTorch, where both networks come from.

Weights start as zeros that occupy no memory; ``tinyvad.backbones.weights`` fills them.

Source: Sandler et al., MobileNetV2 (CVPR 2018), table 1; Lin et al., MCUNet (NeurIPS 2020).
"""

from __future__ import annotations

import numpy as np

from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph


def divisible(channels: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of ``divisor``, never more than 10 % down (the MobileNet rule)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def parameters(definition: Graph) -> int:
    """Trainable values as papers count them: all constants but the biases in front of a batch norm."""
    normed = {node.inputs[0] for node in definition.nodes if node.op == "batch_norm"}
    biases = [node.inputs[-1] for node in definition.nodes if node.output in normed]
    return definition.parameters() - sum(definition.constants[name].size for name in biases)


def placeholder(*shape: int) -> np.ndarray:
    """Zeros of ``shape``, float32, read only, four bytes in all."""
    return np.broadcast_to(np.float32(0), shape)


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
) -> str:
    """Append convolution + batch norm (+ activation); the value is called ``output`` (``name`` if empty).

    ``op`` is conv2d or depthwise_conv2d, which keeps the channel count of ``x``.
    """
    into = b.shape(x)[3]
    shape = (channels, kernel, kernel, into) if op == "conv2d" else (1, kernel, kernel, channels)
    weights = b.constant(f"{name}.weights", placeholder(*shape))
    bias = b.constant(f"{name}.bias", placeholder(channels))
    geometry = {"stride": (stride, stride), "pads": (kernel // 2,) * 4, "dilation": (1, 1)}
    y = b.add(op, [x, weights, bias], f"{name}.conv", **geometry, activation="none")
    scale = b.constant(f"{name}.scale", placeholder(channels))
    offset = b.constant(f"{name}.offset", placeholder(channels))
    return b.add("batch_norm", [y, scale, offset], output or name, activation=activation)


def inverted_residual(b: GraphBuilder, x: str, name: str, kernel: int, expand: int, channels: int, stride: int) -> str:
    """Append 1x1 expand, depthwise, linear 1x1 project, and the shortcut where shapes agree.

    The block's value is called ``name``; inner ones ``name.expand`` (absent for ``expand`` 1), ``name.depthwise``
    and, if there is a shortcut, ``name.project``.
    """
    into = b.shape(x)[3]
    y = x if expand == 1 else conv_bn(b, x, f"{name}.expand", into * expand)
    y = conv_bn(b, y, f"{name}.depthwise", into * expand, kernel, stride, op="depthwise_conv2d")
    shortcut = stride == 1 and into == channels
    y = conv_bn(b, y, f"{name}.project", channels, activation="none", output="" if shortcut else name)
    return b.add("add", [x, y], name, activation="none") if shortcut else y


def classifier(b: GraphBuilder, x: str, classes: int) -> str:
    """Append the ImageNet head: global average, fully connected; the value ``classifier`` is (1, classes)."""
    channels = b.shape(x)[3]
    y = b.add("reshape", [b.add("mean", [x], "pool")], "pool.flat", shape=(1, channels))
    weights = b.constant("classifier.weights", placeholder(classes, channels))
    bias = b.constant("classifier.bias", placeholder(classes))
    return b.add("fully_connected", [y, weights, bias], "classifier", activation="none")
