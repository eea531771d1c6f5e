"""SimpleNet: a small discriminator tells adapted features of good images from the same features with noise.

    pooled taps --adaptor, 1x1--> q (H, W, d) --1x1, batch norm, leaky ReLU, w2--> D(q); the anomaly map is -D(q)
                                  q + noise ---------- the same ---------------> D(q')

Flows in: pooled maps of good images. Flows out: trained adaptor and discriminator. The loss is
mean max(0, margin - D(q)) + mean max(0, margin + D(q')).

The noise has one size in all directions of q, so features must be on one scale, or it drowns some and vanishes in others:
each channel of the pooled maps is divided by its standard deviation over the first task's good images. ``sigma`` then
counts in units of a feature's own spread, whatever the backbone.

When nothing is trained any more, all before the leaky ReLU is linear: adaptor, first layer and batch norm are one
convolution a tap. With leaky(y) = relu(y) - 0.2 relu(-y), the exported network ends in relu([y, -y]), and the last layer is
the scorer's.

Source: Liu et al., SimpleNet: A Simple Network for Image Anomaly Detection and Localization, CVPR 2023; margin and hidden
width as in the edge benchmark. Batch norm sees clean and noisy features together, as in the paper's code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyvad.detectors import adaptor
from tinyvad.detectors.adaptor import Moments
from tinyvad.graph.ir import Graph, Node, Tensor
from tinyvad.training.network import EPSILON, Arrays, Network
from tinyvad.training.recipe import Recipe
from tinyvad.training.trainable import Items

# The paper's noise, 0.015, and the benchmark's, 0.05, are absolute. In spreads of MCUNet's features 0.05 teaches nothing:
# the loss stays at two margins. Made-up defects on good images (tinyvad.synthetic; bottle | casting, 160 pixels, 40 epochs)
# are found with an image AUROC of 0.64 | 0.48 at 0.05, 0.79 | 0.55 at 0.2, 0.84 | 0.69 at 0.5 and 0.86 | 0.66 at 1.
SIGMA, MARGIN = 0.5, 0.8
SLOPE = 0.2  # of the leaky ReLU
HIDDEN_SHARE = 1.5  # h = int(d / 1.5)
W1, SCALE, OFFSET, W2 = (f"discriminator/{part}" for part in ("weights", "scale", "offset", "output"))
NORMED = "discriminator/normed"


class SimpleNet:
    """SimpleNet as a ``TrainedDetector``.

    Args:
        backbone: float Graph, normalised, whose outputs are the taps.
        grid: cells a side of the map; None takes the finest tap's.
        seed: of the first weights and of the training.
        sigma: of the noise, in units of a feature's standard deviation. margin: of the hinges.

    Raises:
        InputError: taps that the grid can't take.
    """

    method = "simplenet"
    targets: Graph | None = None

    def __init__(
        self, backbone: Graph, grid: int | None = None, seed: int = 0, sigma: float = SIGMA, margin: float = MARGIN
    ) -> None:
        self.grid = adaptor.grid_of(backbone, grid)
        self.sigma, self.margin, self.tasks_ = sigma, margin, 0
        self.trunk: Graph | None = adaptor.pooled_trunk(backbone, self.grid)
        self.recipe = Recipe(
            optimiser="adamw", learning_rate=2e-4, learning_rates={"adaptor/": 1e-4}, weight_decay=1e-5, batch=8,
            epochs=160, seed=seed,
        )  # fmt: skip
        self._inputs = [self.trunk.tensors[name] for name in self.trunk.outputs]
        channels = [tensor.shape[3] for tensor in self._inputs]
        depth = sum(channels)
        hidden = max(int(depth / HIDDEN_SHARE), 1)
        rng = np.random.default_rng(seed)
        weights = np.split(_xavier(rng, depth, depth), np.cumsum(channels)[:-1], axis=1)  # (d, C) a tap
        ones = [np.ones(count) for count in channels]
        self._moments: list[Moments] = [(np.zeros(count), np.ones(count)) for count in channels]  # until ``prepare``
        self._adaptor = adaptor.summed_maps(self._inputs, self.grid, weights, np.zeros(depth), "adaptor", scales=ones)
        self._discriminator = _discriminator(
            self._adaptor.tensors[self._adaptor.outputs[0]], _xavier(rng, hidden, depth), _xavier(rng, 1, hidden)
        )
        graph = adaptor.join(self._adaptor, self._discriminator, "simplenet")
        graph.constants[W2] = self._discriminator.constants[W2]  # the network ends before it
        graph.tensors[W2] = self._discriminator.tensors[W2]
        # a bias before a batch norm would have no influence; the scales are measured, not trained
        frozen = ("adaptor/zeros", "adaptor/scale", "discriminator/bias")
        trained = {name: array for name, array in graph.constants.items() if not name.startswith(frozen)}
        statistics = {f"{NORMED}.mean": np.zeros(hidden, np.float32), f"{NORMED}.variance": np.ones(hidden, np.float32)}
        self.network = Network(graph, trained, statistics)

    def prepare(self, items: Items) -> None:
        """Measure the features' spread, on the first task only."""
        if self.tasks_ == 0:
            self._set_moments(adaptor.moments(items, len(self._inputs)))
        self.tasks_ += 1

    def loss(self, parameters: Arrays, statistics: Arrays, batch: list[np.ndarray], rng: np.random.Generator | None) -> Any:
        """Hinges of clean and noisy features. Without ``rng`` the noise is the same every time, so that values compare."""
        from tinyvad.training import losses, ops

        q = self._adapted(parameters, batch)
        shape, dtype = q.shape, batch[0].dtype
        noise = np.zeros((2, *shape), dtype)  # (2, n, H, W, d)
        draw = np.random.default_rng(self.recipe.seed) if rng is None else rng
        noise[1] = draw.standard_normal(shape, dtype) * dtype.type(self.sigma)
        both = ops.reshape(ops.add(ops.reshape(q, (1, *shape)), noise), (2 * shape[0], *shape[1:]))  # clean ones first
        scores, statistics = self._scores(parameters, statistics, both, train=rng is not None)
        return losses.hinge(scores[: shape[0]], scores[shape[0] :], self.margin), statistics

    def maps(self, batch: list[np.ndarray]) -> np.ndarray:
        """(n, H, W) float64: -D(q)."""
        parameters, statistics = self.network.parameters, self.network.statistics
        scores, _ = self._scores(parameters, statistics, self._adapted(parameters, batch), train=False)
        return -np.asarray(scores, np.float64)

    def graph(self) -> Graph:
        """Image -> (1, H, W, 2h) float map relu([y, -y]) of what the leaky ReLU reads."""
        assert self.trunk is not None
        p = {name: array.astype(np.float64) for name, array in self.network.parameters.items()}
        mean, variance = (self.network.statistics[f"{NORMED}.{part}"].astype(np.float64) for part in ("mean", "variance"))
        factor = p[SCALE] / np.sqrt(variance + EPSILON)  # (h,)
        first = factor[:, None] * p[W1][:, 0, 0]  # (h, d)
        offset = first @ p["adaptor/bias"] - factor * mean + p[OFFSET]
        weights = []
        for i, (_, spread) in enumerate(self._moments):
            merged = first @ p[f"adaptor/weights{i}"][:, 0, 0] / spread  # (h, C)
            weights.append(np.concatenate([merged, -merged]))
        bias = np.concatenate([offset, -offset])
        return adaptor.exported(self.trunk, self._moments, self.grid, weights, bias, "discriminator", "relu")

    def output_layer(self) -> tuple[np.ndarray, float]:
        """Weights (2h,) float32 and offset: -D = offset - sum over channels of weight * ``graph()``'s map."""
        last = self.network.parameters[W2].reshape(-1)
        return np.concatenate([last, -SLOPE * last]).astype(np.float32), 0.0

    def arrays(self) -> Arrays:
        """Parameters, running statistics, the features' means and spreads, and the number of tasks."""
        own = {f"simplenet/moments{i}": np.stack(pair) for i, pair in enumerate(self._moments)}  # (2, C) float64
        own["simplenet/tasks"] = np.array([self.tasks_], np.int64)
        return {**self.network.parameters, **self.network.statistics, **own}

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()``."""
        pairs = (arrays[f"simplenet/moments{i}"] for i in range(len(self._inputs)))
        self._set_moments([(mean, spread) for mean, spread in pairs])
        parameters, statistics = (
            {name: arrays[name] for name in old} for old in (self.network.parameters, self.network.statistics)
        )
        self.network = self.network.with_values(parameters, statistics)
        self.tasks_ = int(arrays["simplenet/tasks"][0])

    def _set_moments(self, found: list[Moments]) -> None:
        self._moments = found
        scales = [1 / spread.reshape(1, 1, 1, -1) for _, spread in found]
        new = {f"adaptor/scale{i}": scale.astype(np.float32) for i, scale in enumerate(scales)}
        self._adaptor = self._adaptor.copy(constants={**self._adaptor.constants, **new})
        graph = self.network.graph.copy(constants={**self.network.graph.constants, **new})
        self.network = Network(graph, self.network.parameters, self.network.statistics)

    def _adapted(self, parameters: Any, batch: list[np.ndarray]) -> Any:
        from tinyvad.training import forward

        (q,), _ = forward.run(self._adaptor, parameters, {}, batch, train=False)
        return q

    def _scores(self, parameters: Any, statistics: Arrays, q: Any, train: bool) -> tuple[Any, Arrays]:
        """D of (n, H, W, d) features -> (n, H, W), and the new running statistics."""
        from tinyvad.training import forward

        (normed,), statistics = forward.run(self._discriminator, parameters, statistics, [q], train=train)
        return _last_layer(normed, parameters[W2]), statistics


def _last_layer(normed: Any, weights: Any) -> Any:
    """w2 . leaky(y): (n, H, W, h) and (1, 1, 1, h) -> (n, H, W)."""
    from tinyvad.training import ops

    return ops.conv2d(ops.leaky_relu(normed, SLOPE), weights)[..., 0]


def _discriminator(q: Tensor, first: np.ndarray, last: np.ndarray) -> Graph:
    """(1, H, W, d) -> (1, H, W, h), batch norm included; the last layer's weights (1, 1, 1, h) only stand beside it."""
    hidden = len(first)
    graph = adaptor.point_convolution(q, first, np.zeros(hidden), "discriminator")
    (linear,) = graph.outputs
    for name, value in ((SCALE, np.ones(hidden)), (OFFSET, np.zeros(hidden)), (W2, last.reshape(1, 1, 1, -1))):
        graph.constants[name] = value.astype(np.float32)
        graph.tensors[name] = Tensor(name, value.shape)
    graph.nodes.append(Node("batch_norm", (linear, SCALE, OFFSET), NORMED, {"activation": "none"}))
    graph.tensors[NORMED] = Tensor(NORMED, graph.tensors[linear].shape)
    return graph.copy(outputs=[NORMED])


def _xavier(rng: np.random.Generator, out: int, into: int) -> np.ndarray:
    """(out, into) of Xavier's normal start."""
    return rng.normal(0, np.sqrt(2 / (out + into)), (out, into))
