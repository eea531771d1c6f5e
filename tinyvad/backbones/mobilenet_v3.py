"""MobileNetV3: variant, width and input size in, Graph out, with torchvision's names ``features.0``, ``features.1``, ...

Squeeze-and-excitation comes after the depthwise convolution's activation, with ReLU and a hard-sigmoid gate
(``tinyvad.backbones.blocks.squeeze_excite`` says how the gate's 1/6 is kept out of the graph). Hard-swish is used in the
stem, in the deeper blocks and in the head.

Source: Howard et al., Searching for MobileNetV3 (ICCV 2019), tables 1 and 2; torchvision for names and roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from tinyvad.backbones.assign import with_weights
from tinyvad.backbones.blocks import bottleneck, conv_bn, divisible, global_pool, linear, squeeze_excite
from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph

RE, HS = "relu", "hard_swish"
# kernel, channels inside, channels out, squeeze-and-excitation, activation, stride
SMALL = (
    (3, 16, 16, True, RE, 2),
    (3, 72, 24, False, RE, 2),
    (3, 88, 24, False, RE, 1),
    (5, 96, 40, True, HS, 2),
    (5, 240, 40, True, HS, 1),
    (5, 240, 40, True, HS, 1),
    (5, 120, 48, True, HS, 1),
    (5, 144, 48, True, HS, 1),
    (5, 288, 96, True, HS, 2),
    (5, 576, 96, True, HS, 1),
    (5, 576, 96, True, HS, 1),
)
LARGE = (
    (3, 16, 16, False, RE, 1),
    (3, 64, 24, False, RE, 2),
    (3, 72, 24, False, RE, 1),
    (5, 72, 40, True, RE, 2),
    (5, 120, 40, True, RE, 1),
    (5, 120, 40, True, RE, 1),
    (3, 240, 80, False, HS, 2),
    (3, 200, 80, False, HS, 1),
    (3, 184, 80, False, HS, 1),
    (3, 184, 80, False, HS, 1),
    (3, 480, 112, True, HS, 1),
    (3, 672, 112, True, HS, 1),
    (5, 672, 160, True, HS, 2),
    (5, 960, 160, True, HS, 1),
    (5, 960, 160, True, HS, 1),
)
VARIANTS = {"small": (SMALL, 1024), "large": (LARGE, 1280)}  # blocks, width of the head's hidden layer


def build(
    variant: str,
    width: float = 1.0,
    input_size: int = 224,
    weights: Mapping[str, np.ndarray] | None = None,
    include_top: bool = False,
    classes: int = 1000,
) -> Graph:
    """MobileNetV3 for a (1, input_size, input_size, 3) image.

    Args:
        variant: "small" (``features.0`` to ``features.12``) or "large" (to ``features.16``).
        width: multiplies every channel count, rounded to a multiple of 8.
        weights: constant name -> float32 array, all of them; None leaves placeholders (zero, the gates' biases 3).
        include_top: add the classifier; else the output is the last ``features``.

    Raises:
        InputError: no such variant; ``weights`` misses a constant or has one of another shape.
    """
    if variant not in VARIANTS:
        raise InputError(f"no MobileNetV3 called {variant}; choose one of {', '.join(VARIANTS)}")
    blocks, hidden = VARIANTS[variant]
    name = f"mobilenet-v3-{variant}" if width == 1 else f"mobilenet-v3-{variant}-{width:g}"
    b = GraphBuilder(name, (1, input_size, input_size, 3))
    x = conv_bn(b, b.input, "features.0", divisible(16 * width), kernel=3, stride=2, activation=HS)
    for index, (kernel, inside, channels, gated, activation, stride) in enumerate(blocks, start=1):
        middle = divisible(inside * width)
        excite = partial(squeeze_excite, channels=divisible(middle // 4)) if gated else None
        expand = None if middle == b.shape(x)[3] else middle
        out = divisible(channels * width)
        x = bottleneck(b, x, f"features.{index}", kernel, expand, out, stride, activation, excite)
    x = conv_bn(b, x, f"features.{len(blocks) + 1}", 6 * b.shape(x)[3], activation=HS)
    if include_top:
        x = linear(b, global_pool(b, x), "classifier.0", divisible(hidden * width), activation=HS)
        x = linear(b, x, "classifier", classes)
    graph = b.finish([x])
    return graph if weights is None else with_weights(graph, weights)
