"""MCUNet in0 to in4: a table of ``mcunet.toml`` in, Graph out, with tensors ``stem``, ``block0``, ``block1``, ...

Every network is a 3x3 stride 2 stem and a chain of inverted residuals that a search chose for one memory budget;
no squeeze-and-excitation, no hard-swish, ReLU6 only.

Source: Lin et al., MCUNet: Tiny Deep Learning on IoT Devices (NeurIPS 2020), and its published configurations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.backbones.assign import with_weights
from tinyvad.backbones.blocks import classifier, conv_bn, inverted_residual
from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@cache
def table() -> dict[str, Any]:
    """``mcunet.toml`` as a dict: network -> resolution, stem, blocks, published figures."""
    return tomllib.loads(Path(__file__).with_name("mcunet.toml").read_text("utf-8"))


def build(
    net: str,
    input_size: int | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    include_top: bool = False,
    classes: int = 1000,
) -> Graph:
    """MCUNet ``net`` (in0 ... in4) for a (1, input_size, input_size, 3) image.

    Args:
        input_size: None is the resolution it was searched for.
        weights: constant name -> float32 array, all of them; None leaves placeholders of zero.
        include_top: add the classifier; else the output is the last block's.

    Raises:
        InputError: no such network; ``weights`` misses a constant or has one of another shape.
    """
    if net not in table():
        raise InputError(f"no MCUNet called {net}; choose one of {', '.join(table())}")
    config = table()[net]
    size = input_size or config["resolution"]
    b = GraphBuilder(f"mcunet-{net}", (1, size, size, 3))
    x = conv_bn(b, b.input, "stem", config["stem"], kernel=3, stride=2)
    for index, (kernel, expand, channels, stride) in enumerate(config["blocks"]):
        x = inverted_residual(b, x, f"block{index}", kernel, expand, channels, stride)
    graph = b.finish([classifier(b, x, classes) if include_top else x])
    return graph if weights is None else with_weights(graph, weights)
