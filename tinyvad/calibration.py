"""Calibration: a float network and typical images in, its int8 twin and the table of its input out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tinyvad.engines import threads
from tinyvad.engines.onnx import OnnxEngine, calibrate
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.ir import Graph
from tinyvad.graph.quantize import ChannelStatistics, affine_range, equalize, quantize
from tinyvad.images import Preprocessing, input_table

CALIBRATION_IMAGES = 64  # good images, evenly chosen, that a build calibrates on


@dataclass(frozen=True, eq=False)
class Calibrated:
    """An int8 network and what its pixels become.

    Attributes:
        graph: int8 Graph.
        table: (3, 256) int8, the network's input of every pixel value, a channel.
        scale, zero_point: of the input.
    """

    graph: Graph
    table: np.ndarray
    scale: float
    zero_point: int


def quantize_on(graph: Graph, preprocessing: Preprocessing, images: Iterable[np.ndarray]) -> Calibrated:
    """Quantise a normalised float graph by what its tensors hold on (H, W, 3) uint8 images, in a stream.

    Raises:
        InputError: no image.
    """
    every = graph.copy(outputs=[node.output for node in graph.nodes])
    engine = OnnxEngine(to_onnx(every).SerializeToString(), threads())
    means: list[np.ndarray] = []

    def inputs() -> Iterator[np.ndarray]:
        for image in images:
            real = preprocessing.float_input(image)
            means.append(real.mean((0, 1), dtype=np.float64))
            yield real[None]

    statistics = calibrate(engine, inputs())
    ends = preprocessing.float_input(np.array([[[0] * 3, [255] * 3]], np.uint8))[0].astype(np.float64)  # (2, 3)
    statistics[graph.inputs[0]] = ChannelStatistics(ends.min(0), ends.max(0), np.mean(means, 0))
    first = affine_range(float(ends.min()), float(ends.max()))
    scale, zero_point = float(first.scale[0]), int(first.zero_point[0])
    table = input_table(preprocessing.mean, preprocessing.std, scale, zero_point)
    return Calibrated(quantize(*equalize(graph, statistics), first), table, scale, zero_point)
