"""A Graph as a trainable Keras 3 model, and the trained values back as a Graph.

Flows in: a backbone definition (batch norms not folded) whose outputs are the tapped layers. Flows out: a
``keras.Model`` (n, H, W, 3) -> one (n, h, w, c) map an output, made of Keras' own layers only, so that its TensorFlow,
torch and JAX back ends all train it; and, once trained, the float Graph with the batch norms folded into the weights.

Keras is imported when a function is called: importing tinyvad never loads it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tinyvad.backbones.assign import WEIGHTED, with_weights
from tinyvad.backbones.blocks import NO_BIAS
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node

EPSILON = 1e-3  # of batch norm: it ends in the folded weights, so any positive value serves
MOMENTUM = 0.99
# Where ReLU or hard-swish follows a batch norm, nothing bounds a channel, and int8 gives all channels of a tensor one step:
# the loudest drowns the quietest. ReLU6 tensors are equalised when they are quantised, which hard-swish does not allow
# (it is not homogeneous). So channels are kept alike while training, gamma and beta being their deviation and mean.
# Without it MobileNetV3-small ended with gammas of 0.06 to 4.5 in its first layer, and int8 taps at -6 to 0 dB.
GAMMA, BETA = (0.5, 1.5), (-2.0, 2.0)


def import_keras() -> Any:
    """The keras module.

    Raises:
        InputError: Keras or its back end is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's remarks on the processor are no news to anyone
    try:
        import keras
    except ImportError as error:
        raise InputError(
            f"training needs Keras 3 and a back end ({error}): pip install 'tinyvad[tensorflow]', or keras with torch or "
            "jax and KERAS_BACKEND set"
        ) from error
    if not hasattr(keras, "ops"):
        raise InputError(f"training needs Keras 3, this is {keras.__version__}: pip install 'keras>=3.5'")
    return keras


def to_keras(definition: Graph) -> Any:
    """A trainable model of a definition, with the definition's values as its weights.

    Args:
        definition: float Graph with ``batch_norm`` nodes and real weights (``random_weights``, say).

    Returns:
        keras.Model whose layers are called like the nodes they stand for ("/" for ".").

    Raises:
        InputError: an op that backbone definitions do not have.
    """
    keras = import_keras()
    layers = keras.layers
    inputs = layers.Input(definition.tensors[definition.inputs[0]].shape[1:], name="input")
    values: dict[str, Any] = {definition.inputs[0]: inputs}
    loads: list[tuple[Any, list[np.ndarray]]] = []  # layer, its initial weights
    for node in definition.nodes:
        x = [values[name] for name in node.inputs if name in values]
        name = node.output.replace(".", "-")
        if node.op in WEIGHTED:
            y, layer = _weighted(layers, definition, node, x[0], name)
            loads.append((layer, _keras_weights(definition, node, layer.use_bias)))
        elif node.op == "batch_norm":
            settings = {"epsilon": EPSILON, "momentum": MOMENTUM, "name": name}
            if _unbounded(definition, node):
                settings |= {"gamma_constraint": _within(keras, *GAMMA), "beta_constraint": _within(keras, *BETA)}
            layer = layers.BatchNormalization(**settings)
            y = layer(x[0])
            scale, offset = (definition.constants[constant] for constant in node.inputs[1:])
            # the running statistics of a new layer: mean 0, variance 1
            loads.append((layer, [scale * np.sqrt(1 + EPSILON), offset, np.zeros_like(scale), np.ones_like(scale)]))
        elif node.op in ("add", "mul"):
            y = (layers.Add if node.op == "add" else layers.Multiply)(name=name)(x)
        elif node.op == "mean":
            y = layers.GlobalAveragePooling2D(keepdims=True, name=name)(x[0])
        elif node.op in ("hard_swish", "logistic", "relu", "relu6"):
            kind = {"hard_swish": "hard_silu", "logistic": "sigmoid"}.get(node.op, node.op)
            y = layers.Activation(kind, name=name)(x[0])
        else:
            raise InputError(f"{definition.name}: {node.op} -> {node.output} cannot be trained; use a backbone by name")
        activation = node.attributes.get("activation", "none")
        if activation != "none":
            y = layers.Activation(activation, name=f"{name}-{activation}")(y)
        values[node.output] = y
    model = keras.Model(inputs, [values[name] for name in definition.outputs], name=definition.name)
    for layer, weights in loads:
        layer.set_weights(weights)
    return model


def from_keras(model: Any, definition: Graph) -> Graph:
    """The definition with the model's trained weights, moving statistics in its batch norms' scale and offset."""
    constants: dict[str, np.ndarray] = {}
    for node in definition.nodes:
        names = node.inputs[1:]
        if node.op in WEIGHTED:
            layer = model.get_layer(node.output.replace(".", "-"))
            kernel, *bias = layer.get_weights()
            constants[names[0]] = _ir_kernel(node, kernel)
            constants[names[1]] = bias[0] if bias else np.zeros(definition.tensors[names[1]].shape, np.float32)
        elif node.op == "batch_norm":
            gamma, beta, mean, variance = model.get_layer(node.output.replace(".", "-")).get_weights()
            scale = gamma / np.sqrt(variance + EPSILON)
            constants[names[0]], constants[names[1]] = scale, beta - mean * scale
    return with_weights(definition, constants)


def _unbounded(graph: Graph, norm: Node) -> bool:
    followers = graph.consumers(norm.output)
    swished = any(node.op in ("hard_swish", "relu") for node in followers)
    return swished or norm.attributes.get("activation") == "relu"


def _within(keras: Any, low: float, high: float) -> Any:
    """A constraint that clips each value after a step."""

    class Within(keras.constraints.Constraint):
        def __call__(self, values: Any) -> Any:
            return keras.ops.clip(values, low, high)

    return Within()


def _weighted(layers: Any, graph: Graph, node: Node, x: Any, name: str) -> tuple[Any, Any]:
    """The output of a convolution or fully connected node and its layer; biases that are none are left out: those in
    front of a batch norm, and those of layers published without."""
    followers = graph.consumers(node.output)
    normed = len(followers) == 1 and followers[0].op == "batch_norm"
    use_bias = not (normed or node.inputs[2].endswith(NO_BIAS))
    shape = graph.tensors[node.inputs[1]].shape
    if node.op == "fully_connected":
        layer = layers.Dense(shape[0], use_bias=use_bias, name=name)
        return layer(x), layer
    kernel, stride = shape[1:3], node.attributes["stride"]
    pads = node.attributes["pads"]
    same = stride == (1, 1) and tuple(pads) == (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    if any(pads) and not same:
        x = layers.ZeroPadding2D((tuple(pads[:2]), tuple(pads[2:])), name=f"{name}-pad")(x)
    settings = {
        "kernel_size": kernel, "strides": stride, "dilation_rate": node.attributes.get("dilation", (1, 1)),
        "padding": "same" if same else "valid", "use_bias": use_bias, "name": name,
    }  # fmt: skip
    if node.op == "conv2d":
        layer = layers.Conv2D(shape[0], **settings)
    else:
        layer = layers.DepthwiseConv2D(**settings)
    return layer(x), layer


def _keras_weights(graph: Graph, node: Node, use_bias: bool) -> list[np.ndarray]:
    values = graph.constants[node.inputs[1]]
    # (O, kh, kw, I) -> (kh, kw, I, O); depthwise (1, kh, kw, C) -> (kh, kw, C, 1)
    kernel = values.T if node.op == "fully_connected" else values.transpose(1, 2, 3, 0)
    return [kernel, graph.constants[node.inputs[2]]] if use_bias else [kernel]


def _ir_kernel(node: Node, kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel.T if node.op == "fully_connected" else kernel.transpose(3, 0, 1, 2))
