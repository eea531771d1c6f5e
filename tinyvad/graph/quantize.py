"""Post-training int8 quantisation: a float Graph and what was seen on calibration images in, an int8 Graph out.

The rules, all of them:

* **Ranges.** Each activation's range is the smallest and largest value seen on the calibration images (good images
  only), widened to hold 0. The tapped tensors get ``TAP_MARGIN`` more, as defects reach further than good images.
* **Weights** are symmetric, one scale an output channel, [-127, 127]; biases int32 with scale s_in * s_w.
* **Equalisation** (Nagel et al. 2019, section 4.1, for ReLU6): where a ReLU6 tensor feeds only a depthwise or a
  pointwise convolution, each channel is scaled up towards the full range before it is rounded, and the next weights are
  scaled down by as much. Per-channel weights make this free on both sides of a depthwise convolution; in front of a
  pointwise one the square root of the factor is taken, which shares the error between its activations and weights.
* **Bias correction** (Nagel et al. 2019, section 4.2): the mean error that rounding the weights causes on the calibration
  images is taken off the bias.

Source of the arithmetic: TFLite's int8 quantisation specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import round_half_away
from tinyvad.graph.ir import Graph, Node, Quantization, Tensor

TAP_MARGIN = 1.25
EQUALISATION_HEADROOM = 1.25
SAME_SCALE_OPS = ("average_pool", "max_pool", "pad", "reshape", "resize_nearest")
WEIGHTED_OPS = ("conv2d", "depthwise_conv2d", "fully_connected")


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """What calibration saw of one tensor, channel by channel: (C,) float64 arrays."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray

    def scaled(self, factors: np.ndarray, ceiling: float) -> ChannelStatistics:
        """The statistics after channel c is multiplied by factors[c] > 0 and clipped to [0, ceiling]."""
        return ChannelStatistics(
            np.clip(self.low * factors, 0, ceiling),
            np.clip(self.high * factors, 0, ceiling),
            np.clip(self.mean * factors, 0, ceiling),
        )


Statistics = Mapping[str, ChannelStatistics]


def equalize(graph: Graph, statistics: Statistics) -> tuple[Graph, dict[str, ChannelStatistics]]:
    """Scale the channels of ReLU6 tensors up to the full range; returns the new graph and its statistics.

    A channel whose largest value was h is scaled by t <= 6 / (h * headroom); the clamp at 6 then stands at 6 / t in the
    old units, above everything that the calibration images reached.
    """
    constants, new_statistics = dict(graph.constants), dict(statistics)
    for node in graph.nodes:
        consumers = graph.consumers(node.output)
        if (
            node.op not in ("conv2d", "depthwise_conv2d")
            or node.attributes.get("activation") != "relu6"
            or node.output in graph.outputs
            or len(consumers) != 1
            or consumers[0].op not in ("conv2d", "depthwise_conv2d")
        ):
            continue
        consumer = consumers[0]
        seen = np.maximum(statistics[node.output].high, 1e-6) * EQUALISATION_HEADROOM
        factors = np.clip(6.0 / seen, 1.0, 1e3)  # (C,)
        if consumer.op == "conv2d":
            factors = np.sqrt(factors)
        weights, bias, following = node.inputs[1], node.inputs[2], consumer.inputs[1]
        by_output = factors[:, None, None, None] if node.op == "conv2d" else factors
        constants[weights] = (constants[weights] * by_output).astype(np.float32)
        constants[bias] = (constants[bias] * factors).astype(np.float32)
        constants[following] = (constants[following] / factors).astype(np.float32)
        new_statistics[node.output] = statistics[node.output].scaled(factors, 6.0)
    return graph.copy(constants=constants), new_statistics


def quantize(
    graph: Graph, statistics: Statistics, input_quantization: Quantization, bias_correction: bool = True
) -> Graph:
    """The int8 twin of a float graph (batch norms folded, activations fused).

    Args:
        graph: float Graph.
        statistics: what calibration saw of every activation, by tensor name.
        input_quantization: scale and zero point of the network's input.
        bias_correction: take the mean error of the rounded weights off the biases.

    Returns:
        Graph whose activations are int8 and whose weights and biases are int8 and int32 constants.

    Raises:
        InputError: an activation without statistics, or a batch norm that was not folded.
    """
    tensors, constants = dict(graph.tensors), dict(graph.constants)
    quantizations = _activation_quantizations(graph, statistics, input_quantization)
    for name, quantization in quantizations.items():
        tensors[name] = dataclasses.replace(tensors[name], dtype="int8", quantization=quantization)
    for node in graph.nodes:
        if node.op == "batch_norm":
            raise InputError(f"batch_norm -> {node.output} could not be folded into the layer before it")
        if node.op in WEIGHTED_OPS:
            means = statistics[node.inputs[0]].mean if bias_correction else None
            _quantize_weights(node, quantizations[node.inputs[0]], means, tensors, constants)
    return graph.copy(tensors=tensors, constants=constants)


def _activation_quantizations(graph: Graph, statistics: Statistics, first: Quantization) -> dict[str, Quantization]:
    """Scale and zero point of every activation; ops that only move values share those of their input."""
    ranges: dict[str, Quantization] = {graph.inputs[0]: first}
    for node in graph.nodes:
        if node.op in SAME_SCALE_OPS:
            ranges[node.output] = ranges[node.inputs[0]]
        else:
            ranges[node.output] = _range(graph, statistics, node)
    for node in graph.nodes:
        if node.op == "concat":  # TFLite's concat copies: its inputs take the range of the whole
            for name in node.inputs:
                ranges[name] = ranges[node.output]
    return ranges


def _range(graph: Graph, statistics: Statistics, node: Node) -> Quantization:
    name = node.output
    if name not in statistics:
        raise InputError(f"graph {graph.name}: calibration saw nothing of {name}")
    seen = statistics[name]
    margin = TAP_MARGIN if name in graph.outputs else 1.0
    low, high = float(seen.low.min()) * margin, float(seen.high.max()) * margin
    return affine_range(low, min(high, 6.0) if node.attributes.get("activation") == "relu6" else high)


def affine_range(low: float, high: float) -> Quantization:
    """The int8 scale and zero point whose 256 steps cover [low, high] and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / 255.0, 1e-8))
    zero_point = int(np.clip(round_half_away(-128 - low / float(scale)), -128, 127))
    return Quantization.per_tensor(float(scale), zero_point)


def _quantize_weights(
    node: Node,
    x: Quantization,
    means: np.ndarray | None,
    tensors: dict[str, Tensor],
    constants: dict[str, np.ndarray],
) -> None:
    _, w_name, b_name = node.inputs
    weights, bias = constants[w_name].astype(np.float64), constants[b_name].astype(np.float64)
    axis = 3 if node.op == "depthwise_conv2d" else 0
    others = tuple(i for i in range(weights.ndim) if i != axis)
    largest = np.abs(weights).max(others)  # (C,)
    in_scale = float(x.scale[0])
    # a channel of tiny weights and a large bias needs a coarser scale, or its bias leaves int32
    scale = np.maximum(np.maximum(largest / 127, np.abs(bias) / (in_scale * (1 << 30))), 1e-12)
    scale = scale.astype(np.float32)  # (C,)
    shape = [1] * weights.ndim
    shape[axis] = -1
    rounded = np.clip(round_half_away(weights / scale.reshape(shape).astype(np.float64)), -127, 127)
    if means is not None:
        error = rounded * scale.reshape(shape).astype(np.float64) - weights
        mean_error = error.sum((0, 1, 2)) * means if axis == 3 else error.sum(others[:-1]) @ means
        bias = bias - mean_error
    bias_scale = np.float32(in_scale) * scale
    tensors[w_name] = Tensor(
        w_name, weights.shape, "int8", Quantization(scale, np.zeros(scale.size, np.int64), axis)
    )
    tensors[b_name] = Tensor(
        b_name, bias.shape, "int32", Quantization(bias_scale, np.zeros(scale.size, np.int64), 0)
    )
    constants[w_name] = rounded.astype(np.int8)
    limit = (1 << 31) - 1
    constants[b_name] = np.clip(round_half_away(bias / bias_scale), -limit, limit).astype(np.int32)
