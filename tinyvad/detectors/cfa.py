"""CFA: a descriptor that draws every patch to its nearest centres of the good images and away from the next ones.

    pooled taps --1x1 coordinate convolution--> phi (H, W, d) --distances to the centres--> anomaly map

Flows in: pooled maps of good images. Flows out: the trained descriptor, and the centres, which stay where the untrained
descriptor put them: position by position the mean over the training images. The map is softmin(delta)_1 * delta_1 of the
three smallest distances delta: the nearest one, less where others are as near.

The coordinate convolution adds row and column, both scaled to [-1, 1], times a learnt vector each. These parts depend on
nothing but the position, so the exported network leaves them out and the scorer adds them (``coordinate_offsets``).

On a stream of tasks the bank is the running mean of the tasks' banks, each by the descriptor of its time; the descriptor
goes on training. Centres averaged over products blur: expect little of it, as the edge benchmark found.

Source: Lee et al., CFA: Coupled-hypersphere-based Feature Adaptation, IEEE Access 2022; its settings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyvad.detectors.adaptor import BATCH, Moments, exported, grid_of, moments, pooled_trunk, summed_maps
from tinyvad.detectors.kmeans import kmeans
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.training.network import Arrays, Network
from tinyvad.training.recipe import Recipe
from tinyvad.training.trainable import Items

NEAREST, FURTHER = 3, 3  # K centres attract, the next J repel
NU, ALPHA = 1e-3, 0.1
FIRST_RADIUS = 1e-5
ROW, COLUMN, RADIUS = "descriptor/row", "descriptor/column", "descriptor/radius"


class Cfa:
    """CFA as a ``TrainedDetector``.

    Args:
        backbone: float Graph, normalised, whose outputs are the taps.
        grid: cells a side of the map; None takes the finest tap's.
        seed: of the first weights, of k-means and of the training.
        centres: K, found by k-means in the H * W of the bank; None keeps all.

    Attributes:
        bank_: (H, W, d) float32, mean of phi by position, over the tasks.
        centres_: (K, d) float32. tasks_: how many tasks the bank holds.

    Raises:
        InputError: taps that the grid can't take, or too few centres.
    """

    method = "cfa"
    targets: Graph | None = None

    def __init__(self, backbone: Graph, grid: int | None = None, seed: int = 0, centres: int | None = None) -> None:
        self.grid = grid_of(backbone, grid)
        cells = self.grid[0] * self.grid[1]
        self._count = cells if centres is None else centres
        if not NEAREST + FURTHER <= self._count <= cells:
            raise InputError(
                f"cfa: {self._count} centres on a grid of {cells} cells; there must be {NEAREST + FURTHER} to {cells}"
            )
        self.trunk: Graph | None = pooled_trunk(backbone, self.grid)
        self.recipe = Recipe(
            optimiser="adamw", learning_rate=1e-3, weight_decay=5e-4, batch=4, epochs=30, seed=seed
        )
        maps = [self.trunk.tensors[name] for name in self.trunk.outputs]
        channels = [tensor.shape[3] for tensor in maps]
        depth = sum(channels)  # gamma_d = 1
        reach = (depth + 2) ** -0.5  # of the uniform start, PyTorch's for a convolution that reads depth + 2 values
        rng = np.random.default_rng(seed)
        weights = [rng.uniform(-reach, reach, (depth, c)) for c in channels]
        row, column, bias = rng.uniform(-reach, reach, (3, depth))
        graph = summed_maps(maps, self.grid, weights, bias, "descriptor")
        for name, value in ((ROW, row), (COLUMN, column), (RADIUS, np.array([FIRST_RADIUS]))):
            graph.constants[name] = value.astype(np.float32)
            graph.tensors[name] = Tensor(name, value.shape)
        trained = {name: array for name, array in graph.constants.items() if name != "descriptor/zeros"}
        self.network = Network(graph, trained, {})
        self.bank_ = np.zeros((*self.grid, depth), np.float32)
        self.centres_ = np.zeros((self._count, depth), np.float32)
        self.tasks_ = 0
        self._moments: list[Moments] = [(np.zeros(c), np.ones(c)) for c in channels]  # until ``prepare``; for int8 alone

    def prepare(self, items: Items) -> None:
        """Take the bank of a new task into the running mean; the centres follow. ``items`` are this task's alone."""
        total = np.zeros(self.bank_.shape)
        for start in range(0, len(items), BATCH):
            total += self.descriptors(items.take(np.arange(start, min(start + BATCH, len(items))))).sum(0, dtype=np.float64)
        if self.tasks_ == 0:
            self._moments = moments(items, len(self._moments))
        self.tasks_ += 1
        share = 1 / self.tasks_
        self.bank_ = ((1 - share) * self.bank_ + share * total / len(items)).astype(np.float32)
        rows = self.bank_.reshape(-1, self.bank_.shape[2])  # (P, d)
        if self._count < len(rows):
            rows = kmeans(rows, self._count, np.random.default_rng(self.recipe.seed)).astype(np.float32)
        self.centres_ = rows.copy()

    def loss(self, parameters: Arrays, statistics: Arrays, batch: list[np.ndarray], rng: np.random.Generator | None) -> Any:
        """Attraction to the K nearest centres beyond the radius, repulsion of the next J; see ``losses.cfa_loss``."""
        from tinyvad.training import losses, ops

        phi = self._phi(parameters, batch)
        radius = ops.reshape(parameters[RADIUS], ())
        value = losses.cfa_loss(phi, self.centres_, radius, attract=NEAREST, repel=FURTHER, nu=NU, alpha=ALPHA)
        return value, statistics

    def descriptors(self, batch: list[np.ndarray]) -> np.ndarray:
        """phi, (n, H, W, d) float32, of items by the present descriptor, coordinates included."""
        return np.asarray(self._phi(self.network.parameters, batch))

    def maps(self, batch: list[np.ndarray]) -> np.ndarray:
        """(n, H, W) float64: softmin weight of the nearest centre times its distance."""
        return anomaly_map(self.descriptors(batch), self.centres_)

    def graph(self) -> Graph:
        """Image -> (1, H, W, d), phi without its coordinate part."""
        assert self.trunk is not None
        trained = self.network.parameters
        weights = [trained[f"descriptor/weights{i}"][:, 0, 0] for i in range(len(self._moments))]
        return exported(self.trunk, self._moments, self.grid, weights, trained["descriptor/bias"], "descriptor")

    def centres(self) -> np.ndarray:
        """(K, d) float32: what phi, coordinate part included, is compared with."""
        return self.centres_

    def coordinate_offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """(H, d) and (W, d) float32: phi = ``graph()``'s map + rows[i] + columns[j]."""
        rows, columns = self._coordinates(np.float32)
        return rows * self.network.parameters[ROW], columns * self.network.parameters[COLUMN]

    def arrays(self) -> Arrays:
        """Parameters, bank, centres, the features' means and spreads, and the number of tasks."""
        own = {f"cfa/moments{i}": np.stack(pair) for i, pair in enumerate(self._moments)}  # (2, C) float64
        own |= {"cfa/bank": self.bank_, "cfa/centres": self.centres_, "cfa/tasks": np.array([self.tasks_], np.int64)}
        return {**self.network.parameters, **own}

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()``."""
        self.network = self.network.with_values({name: arrays[name] for name in self.network.parameters}, {})
        self.bank_, self.centres_ = arrays["cfa/bank"], arrays["cfa/centres"]
        pairs = (arrays[f"cfa/moments{i}"] for i in range(len(self._moments)))
        self._moments = [(mean, spread) for mean, spread in pairs]
        self.tasks_ = int(arrays["cfa/tasks"][0])

    def _phi(self, parameters: Any, batch: list[np.ndarray]) -> Any:
        from tinyvad.training import forward, ops

        (phi,), _ = forward.run(self.network.graph, parameters, {}, batch, train=False)
        rows, columns = self._coordinates(batch[0].dtype)
        return ops.add(ops.add(phi, ops.mul(parameters[ROW], rows[:, None])), ops.mul(parameters[COLUMN], columns))

    def _coordinates(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """(H, 1) and (W, 1), -1 to 1."""
        rows, columns = (np.linspace(-1, 1, size, dtype=dtype) if size > 1 else np.zeros(1, dtype) for size in self.grid)
        return rows[:, None], columns[:, None]


def anomaly_map(phi: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n, H, W) float64 of descriptors (n, H, W, d): softmin(delta)_1 * delta_1 of the three smallest distances delta."""
    from tinyvad.training import losses

    _, squared = losses.nearest_centres(phi.reshape(-1, phi.shape[-1]), centres, NEAREST)  # (n*H*W, 3)
    distances = np.sqrt(squared.astype(np.float64))
    weight = 1 / np.exp(distances[:, :1] - distances).sum(1)
    return (weight * distances[:, 0]).reshape(phi.shape[:3])
