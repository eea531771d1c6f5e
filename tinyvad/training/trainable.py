"""What a detector must offer to be trained by gradients, and what it is trained on.

A frozen part turns images into *items* once: lists of float32 arrays, one row an image. ``trunk`` makes the maps that
compressed replay stores, ``targets`` what else the loss needs from them. Only ``network`` is trained.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from tinyvad.graph.ir import Graph
from tinyvad.training.network import Arrays, Network
from tinyvad.training.recipe import Recipe


class Items(Protocol):
    """Good images as the training sees them: n items, each a row of every array."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """[(k, ...)] float32 of the chosen items: the stored maps, then the targets."""


class TrainedDetector(Protocol):
    """A detector whose network is trained.

    Attributes:
        method: 'stfpm', 'paste', 'cfa' or 'simplenet'.
        trunk: frozen, normalised float Graph from the image to the stored maps (its outputs); None: the image itself.
        targets: frozen, normalised float Graph from the stored maps (its inputs) to what the loss compares with; None if
            there is nothing.
        network: what is trained; its inputs are the stored maps. Replaced, never changed in place.
        recipe: the paper's.
    """

    method: str
    trunk: Graph | None
    targets: Graph | None
    network: Network
    recipe: Recipe

    def prepare(self, items: Items) -> None:
        """What is fixed before the first step from the items of a task (CFA's centres); may do nothing."""

    def loss(self, parameters: Arrays, statistics: Arrays, batch: list[np.ndarray], rng: np.random.Generator | None) -> Any:
        """(scalar, new running statistics) in training mode, differentiable by autograd in ``parameters``.

        ``rng`` None: evaluation mode, batch norms by their running statistics, no noise; the statistics come back as given.
        """

    def maps(self, batch: list[np.ndarray]) -> np.ndarray:
        """(n, H, W) float64 anomaly maps of items by the present network, in evaluation mode; higher is more anomalous."""

    def graph(self) -> Graph:
        """The whole network from the image to what the integer scorer reads, batch norms folded: to quantise and export."""

    def arrays(self) -> Arrays:
        """All that is learnt, by name: what a checkpoint and a build's state hold."""

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()``."""
