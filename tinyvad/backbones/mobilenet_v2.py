"""MobileNetV2: width and input size in, Graph out, with torchvision's names ``features.0`` to ``features.18``.

Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks (CVPR 2018), table 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tinyvad.backbones.assign import with_weights
from tinyvad.backbones.blocks import classifier, conv_bn, divisible, inverted_residual
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph

STAGES = (  # expansion, channels at width 1, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def build(
    width: float = 1.0,
    input_size: int = 224,
    weights: Mapping[str, np.ndarray] | None = None,
    include_top: bool = False,
    head_channels: int | None = None,
    classes: int = 1000,
) -> Graph:
    """MobileNetV2 for a (1, input_size, input_size, 3) image.

    Args:
        width: multiplies every channel count, rounded to a multiple of 8.
        weights: constant name -> float32 array, all of them; None leaves placeholders of zero.
        include_top: add the classifier; else the output is ``features.18``.
        head_channels: channels of ``features.18``; None is torchvision's 1280 * max(1, width).

    Raises:
        InputError: ``weights`` misses a constant or has one of another shape.
    """
    name = "mobilenet-v2" if width == 1 else f"mobilenet-v2-{width:g}"
    b = GraphBuilder(name, (1, input_size, input_size, 3))
    x = conv_bn(b, b.input, "features.0", divisible(32 * width), kernel=3, stride=2)
    index = 0
    for expand, channels, repeats, first_stride in STAGES:
        for repeat in range(repeats):
            index += 1
            stride = first_stride if repeat == 0 else 1
            x = inverted_residual(b, x, f"features.{index}", 3, expand, divisible(channels * width), stride)
    x = conv_bn(b, x, "features.18", head_channels or divisible(1280 * max(1.0, width)))
    graph = b.finish([classifier(b, x, classes) if include_top else x])
    return graph if weights is None else with_weights(graph, weights)
