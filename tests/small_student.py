"""A small PaSTe (a teacher of a few convolutions) and detectors of one line, for tests of everything that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tinyvad.detectors.student import Paste
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.training.network import Arrays, Network
from tinyvad.training.recipe import Recipe

SIZE = 12  # pixels
LAYERS = ("middle", "deep")
PLAIN_DESCENT = Recipe(learning_rate=0.05, momentum=0.0, weight_decay=0.0, batch=1, epochs=200)


def teacher(seed: int = 0) -> Graph:
    """Image (1, 12, 12, 3) -> 'shared' (6, 6, 4) -> 'middle' (6, 6, 5) and 'deep' (3, 3, 6), random weights."""
    rng = np.random.default_rng(seed)
    builder = GraphBuilder("small", (1, SIZE, SIZE, 3))

    def conv(x: str, name: str, into: int, out: int, stride: int, activation: str) -> str:
        weights = builder.constant(f"{name}/w", rng.normal(0, 0.4, (out, 3, 3, into)).astype(np.float32))
        bias = builder.constant(f"{name}/b", rng.normal(0, 0.1, out).astype(np.float32))
        geometry: dict[str, Any] = {"stride": (stride, stride), "pads": (1, 1, 1, 1), "dilation": (1, 1)}
        if stride == 2:
            geometry["pads"] = (0, 1, 0, 1)
        return builder.add("conv2d", [x, weights, bias], name, activation=activation, **geometry)

    x = conv(builder.input, "shared", 3, 4, 2, "relu6")
    middle = conv(x, "middle", 4, 5, 1, "relu6")
    deep = conv(middle, "deep", 5, 6, 2, "none")
    return builder.finish([middle, deep])


def paste(seed: int = 0, **recipe: Any) -> Paste:
    """The student of ``teacher``, with a recipe of two short epochs."""
    detector = Paste(teacher(), LAYERS, "shared", seed)
    detector.recipe = replace(detector.recipe, batch=3, epochs=2, learning_rate=0.1, **recipe)
    return detector


@dataclass
class Line:
    """A detector of the parameter p (1,) whose loss is a function of it alone, whatever the images.

    Attributes:
        of: p -> the loss, on the tape.
    """

    of: Any
    start: float = 0.0
    method: str = "cfa"
    trunk: Graph | None = None
    targets: Graph | None = None
    recipe: Recipe = PLAIN_DESCENT
    network: Network = field(init=False)

    def __post_init__(self) -> None:
        graph = Graph("line", ["x"], ["x"], [], {"x": Tensor("x", (1, 1, 1, 1))}, {})
        self.network = Network(graph, {"p": np.array([self.start])}, {})

    def prepare(self, items: Any) -> None:
        pass

    def loss(self, parameters: Any, statistics: Arrays, batch: list[np.ndarray], rng: Any) -> Any:
        return self.of(parameters["p"][0]), statistics

    def arrays(self) -> Arrays:
        return dict(self.network.parameters)

    def restore(self, arrays: Arrays) -> None:
        self.network = self.network.with_values(dict(arrays), {})
