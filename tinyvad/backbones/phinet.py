"""PhiNet: four numbers and an input size in, Graph out, with tensors ``stem``, ``block2``, ``block3``, ...

The names are the module indices of the reference code (0 pads, 1 is the stem), so ``block6`` is what others call layer 6.
``blockM`` with M > 2 is the paper's block id M - 2.

``alpha`` scales channels, ``t_zero`` the channels inside blocks and ``beta`` how these grow from the first block (1) to
the last (beta); ``num_layers`` counts ids. Quirks of the reference code are kept, as trained weights depend on them:
the stem is depthwise + 1x1 without a batch norm between, padded as TensorFlow's SAME; a stride 2 depthwise convolution
pads one pixel on every side, whatever its kernel; squeeze-and-excitation has no biases.

Source: Paissan et al., PhiNets: A Scalable Backbone for Low-power AI at the Edge (ACM TECS 2022), and its published
code, micromind (micromind/networks/phinet.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import numpy as np

from tinyvad.backbones.assign import with_weights
from tinyvad.backbones.blocks import Excite, bottleneck, classifier, conv, conv_bn, divisible, squeeze_excite
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph

BASE = (48, 24, 24, 48)  # channels at alpha 1: stem, block2, ids 1 and 2, id 3; doubled at each downsampling id after that


def build(
    alpha: float = 0.2,
    beta: float = 1.0,
    t_zero: float = 6,
    num_layers: int = 7,
    downsampling_layers: Collection[int] = (5, 7),
    input_size: int = 224,
    weights: Mapping[str, np.ndarray] | None = None,
    include_top: bool = False,
    classes: int = 1000,
    divisor: int = 8,
    conv5_percent: float = 0.0,
    squeeze_excite: bool = True,
    hard_swish: bool = True,
    compatibility: bool = False,
    base: tuple[int, int, int, int] = BASE,
    full_stem: bool = False,
    name: str = "phinet",
) -> Graph:
    """PhiNet for a (1, input_size, input_size, 3) image.

    Args:
        alpha: multiplies channels, which are rounded to a multiple of ``divisor``.
        beta, t_zero: block id i of N expands by t_zero * (1 + (beta - 1) * i / N).
        num_layers: N, ids 1 to N; ids 1 and 3 have stride 2.
        downsampling_layers: ids above 3 that have stride 2 and double the channels.
        weights: constant name -> float32 array, all of them; None leaves placeholders.
        include_top: add the classifier; else the output is the last block's.
        conv5_percent: the share of last ids whose depthwise convolution is 5x5.
        squeeze_excite, hard_swish: without them, no gates and ReLU6.
        compatibility: neither of them, for small chips.
        base: channels at alpha 1, see ``BASE``.
        full_stem: a plain 3x3 stride 2 convolution as stem (not the reference code's ``conv2d_input``, which has stride 1
            and drops block2): the separable one leaves three filters to look at the full resolution, one a colour.

    Raises:
        InputError: ``weights`` misses a constant or has one of another shape.
    """
    activation = "hard_swish" if hard_swish and not compatibility else "relu6"
    stem, second, first, third = (divisible(int(channels * alpha), divisor) for channels in base)
    b = GraphBuilder(name, (1, input_size, input_size, 3))

    before = input_size % 2  # SAME: an even size is padded behind only
    stem_pads = (before, 1, before, 1)
    if full_stem:
        x = conv_bn(b, b.input, "stem", stem, 3, 2, activation, pads=stem_pads)
    else:
        x = conv(b, b.input, "stem.depthwise", 3, 3, 2, op="depthwise_conv2d", pads=stem_pads, bias=None)
        x = conv_bn(b, x, "stem", stem, activation=activation)
    x = bottleneck(b, x, "block2", 3, None, second, 1, activation)

    doublings = 0
    for i in range(1, num_layers + 1):
        down = i in (1, 3) or (i > 3 and i in downsampling_layers)
        doublings += down and i > 3
        channels = (first, first, third)[i - 1] if i <= 3 else divisible(int(base[3] * 2**doublings * alpha), divisor)
        kernel = 5 if i > 3 and i / num_layers > 1 - conv5_percent else 3
        middle = divisible(int(expansion(i, num_layers, beta, t_zero) * b.shape(x)[3]), divisor)
        excite = None
        if squeeze_excite and not compatibility:
            excite = _gate(middle, divisor, activation)
        pads = (1, 1, 1, 1) if down else None
        x = bottleneck(b, x, f"block{i + 2}", kernel, middle, channels, 2 if down else 1, activation, excite, pads)
    graph = b.finish([classifier(b, x, classes) if include_top else x])
    return graph if weights is None else with_weights(graph, weights)


def build_mcu(
    input_size: int = 144,
    weights: Mapping[str, np.ndarray] | None = None,
    include_top: bool = False,
    classes: int = 1000,
) -> Graph:
    """``phinet-mcu``, our own PhiNet for chips with 200 KB for the arena: no gates, ReLU6, 96 to 160 pixels.

    Cut after the last tap (blocks 4, 7 and 11: 16, 32 and 56 channels at strides 4, 8 and 16) it takes 21 million
    multiply-accumulates and an arena of 176,256 bytes at 144 pixels, 17 million and 139,264 bytes at 128. Why so:

    * The arena's peak is where the map is large: 16 channels in and out of block2's depthwise convolution, then 8 + 24
      in block3. Hence only 8 channels at stride 2, half of PhiNet's proportion (``base``), and t_zero 3 instead of 6.
    * The stem is a full convolution, as no other layer sees the fine texture.
    * Three blocks at stride 8 and four at stride 16: the deepest tap sees 267 pixels, the middle one 59. 5x5 kernels in
      the last three blocks, where the map is small, cost 0.7 million. A 5x5 at stride 2 would lose a row, so not there.
    """
    return build(
        alpha=0.3,
        beta=1.0,
        t_zero=3,
        num_layers=9,
        downsampling_layers=(6,),
        input_size=input_size,
        weights=weights,
        include_top=include_top,
        classes=classes,
        conv5_percent=0.33,
        compatibility=True,
        base=(48, 24, 48, 96),
        full_stem=True,
        name="phinet-mcu",
    )


def expansion(i: int, num_layers: int, beta: float, t_zero: float) -> float:
    """How many times wider block id ``i`` is inside (the paper's equation for the expansion factor)."""
    return (t_zero * beta) * i / num_layers + t_zero * (num_layers - i) / num_layers


def _gate(middle: int, divisor: int, activation: str) -> Excite:
    reduced = divisible(max(1, int(middle / 6)), divisor)
    return partial(squeeze_excite, channels=reduced, activation=activation, gate="logistic")
