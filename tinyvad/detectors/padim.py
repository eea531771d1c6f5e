"""PaDiM, PaDiM-Lite and compact PaDiM: one Gaussian a grid cell, the Mahalanobis distance as anomaly score.

Flows in: embeddings (n, H, W, D), int8 for the device or float32 for study. Flows out: distance maps (n, H, W), and an
integer scorer for the bank.

* ``padim``: a full covariance, eps = 0.01 on its diagonal, a fixed random subset of the channels if asked for.
  Source: Defard et al. 2021, section III.
* ``padim-lite``: its diagonal only. Source: PaDiM-Lite of the edge papers.
* ``padim-compact``: features averaged onto a coarse grid, projected on the leading eigenvectors of the covariance
  within positions (pooled over the grid), a full covariance a cell shrunk towards the pooled one, stored as a 4-bit
  Cholesky factor. A fifteenth of PaDiM's bytes at nearly its quality.

Real units: an int8 embedding is multiplied by the embedding's ``steps`` before eps is added, so that eps means the same
as in the papers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from tinyvad.detectors.gaussian import GaussianStatistics, collect
from tinyvad.detectors.triangular import (
    Projection,
    TriangularScorer,
    make_projection,
    make_scorer,
)
from tinyvad.errors import InputError

EPSILON = 0.01
COMPACT_EPSILON = 0.02  # share of the mean variance
VARIANCE_FLOOR = 1e-4  # real units; far below any direction that moves, it keeps good images that are all the same usable


class Padim:
    """PaDiM (``diagonal=False``) and PaDiM-Lite (``diagonal=True``).

    Args:
        steps: (D,) real value of one unit of each embedding element; 1.0 for float features.
        diagonal: keep variances only.
        channels: size of the random channel subset; None keeps all.
        epsilon: added to the variances, in real units.
        bits: 4 or 8 bits a factor entry on the device.
        seed: draws the subset.

    Attributes:
        statistics_: the mergeable sums. indices_: (d,) the channel subset.
    """

    def __init__(
        self,
        steps: np.ndarray | float = 1.0,
        diagonal: bool = False,
        channels: int | None = None,
        epsilon: float = EPSILON,
        bits: int = 8,
        seed: int = 0,
    ) -> None:
        self.name = "padim-lite" if diagonal else "padim"
        self.steps, self.diagonal, self.channels = steps, diagonal, channels
        self.epsilon, self.bits, self.seed = epsilon, bits, seed

    def fit(self, embeddings: Iterable[np.ndarray]) -> Padim:
        """Sum up a stream of (n, H, W, D) embeddings, one pass."""
        return self.fit_statistics(self.collect(embeddings))

    def collect(self, embeddings: Iterable[np.ndarray]) -> GaussianStatistics:
        """The sums of the chosen channels over a stream of (n, H, W, D) embeddings."""

        def subsets() -> Iterator[np.ndarray]:
            for batch in embeddings:
                if not hasattr(self, "indices_"):
                    self.depth_ = batch.shape[-1]
                    self.indices_: np.ndarray = draw_channels(self.depth_, self.channels, self.seed)
                yield batch if len(self.indices_) == batch.shape[-1] else batch[..., self.indices_]

        return collect(subsets(), self.diagonal)

    def fit_statistics(self, statistics: GaussianStatistics) -> Padim:
        """Use sums that ``collect`` made, or that were merged from such."""
        self.statistics_: GaussianStatistics = statistics
        return self

    def _real_steps(self) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.steps, np.float64), self.depth_)[self.indices_]

    def covariance_(self) -> np.ndarray:
        """(H, W, d, d) in real units with epsilon on the diagonal; (H, W, d) variances for PaDiM-Lite."""
        return real_covariance(self.statistics_, self._real_steps(), self.epsilon)

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W) float32 Mahalanobis distances in floating point, the study form."""
        t = (embeddings[..., self.indices_] - self.statistics_.mean) * self._real_steps()
        if self.diagonal:
            return np.sqrt((t**2 / self.covariance_()).sum(-1)).astype(np.float32)
        return mahalanobis(t, self.covariance_())

    def to_scorer(self) -> TriangularScorer:
        """The integer form for the bank; the embeddings must have been int8."""
        steps = self._real_steps()
        indices = None if len(steps) == self.depth_ else self.indices_
        return padim_scorer(self.statistics_, steps, self.epsilon, self.bits, indices)


def draw_channels(depth: int, channels: int | None, seed: int) -> np.ndarray:
    """(d,) uint16 ascending: a fixed random subset of ``depth`` channels, all of them for None.

    Raises:
        InputError: more channels than there are.
    """
    if channels is None:
        return np.arange(depth, dtype=np.uint16)
    if not 1 <= channels <= depth:
        raise InputError(f"channels = {channels}: the embedding has {depth}; choose 1 to {depth}")
    chosen = np.random.default_rng(seed).choice(depth, channels, replace=False)
    return np.sort(chosen).astype(np.uint16)


def real_covariance(statistics: GaussianStatistics, steps: np.ndarray, epsilon: float) -> np.ndarray:
    """(H, W, d, d) covariances in real units plus epsilon * I; (H, W, d) variances of diagonal statistics."""
    covariance = statistics.covariance()
    if statistics.diagonal:
        return covariance * steps**2 + epsilon
    return covariance * steps[:, None] * steps + epsilon * np.eye(len(steps))


def padim_scorer(
    statistics: GaussianStatistics, steps: np.ndarray, epsilon: float, bits: int, indices: np.ndarray | None
) -> TriangularScorer:
    """The integer PaDiM, or PaDiM-Lite of diagonal statistics, of the d channels that ``statistics`` and ``steps`` have."""
    with threadpool_limits(1, user_api="blas"):
        covariance = real_covariance(statistics, steps, epsilon)
        in_units = covariance / (steps**2 if statistics.diagonal else steps[:, None] * steps)
        return make_scorer(statistics.mean, in_units, 0 if statistics.diagonal else bits, indices)


class PadimCompact:
    """Compact PaDiM; see the module's text.

    Args:
        dimensions: d, directions kept; at most D.
        steps: (D,) real value of one unit of each embedding element (sets what "variance" the PCA ranks).
        bits: 4 or 8 bits a factor entry.
        shrinkage: weight of the pooled covariance; None takes 0.05, or d / (n + d) with at most 2d images.
        epsilon: share of the mean pooled variance added to every direction.
        headroom: factor on the room that the device's int8 values leave for means far from the average: 2.0 lets those
            of other products lie twice as far out, for a coarser unit.

    Attributes:
        statistics_: the mergeable sums of the full embedding.
    """

    name = "padim-compact"

    def __init__(
        self,
        dimensions: int,
        steps: np.ndarray | float = 1.0,
        bits: int = 4,
        shrinkage: float | None = None,
        epsilon: float = COMPACT_EPSILON,
        headroom: float = 1.0,
    ) -> None:
        self.dimensions, self.steps, self.bits = dimensions, steps, bits
        self.shrinkage, self.epsilon, self.headroom = shrinkage, epsilon, headroom

    def fit(self, embeddings: Iterable[np.ndarray]) -> PadimCompact:
        """Sum up a stream of (n, H, W, D) embeddings, one pass."""
        return self.fit_statistics(self.collect(embeddings))

    def collect(self, embeddings: Iterable[np.ndarray]) -> GaussianStatistics:
        """The sums over a stream of (n, H, W, D) embeddings."""
        return collect(embeddings)

    def fit_statistics(self, statistics: GaussianStatistics) -> PadimCompact:
        """Use sums that were collected (or merged) before."""
        self.statistics_ = statistics
        depth = statistics.first.shape[-1]
        if not 1 <= self.dimensions <= depth:
            raise InputError(f"dimensions = {self.dimensions}: the embedding has {depth}; choose 1 to {depth}")
        return self

    def directions_(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(U (D, d) that whitens the pooled covariance, pooled variances lam (d,), grand mean (D,), their trace / D).

        In int8 embedding units in, pooled standard deviations out.
        """
        steps = np.broadcast_to(np.asarray(self.steps, np.float64), self.statistics_.first.shape[-1])
        pooled = self.statistics_.covariance().mean((0, 1)) * steps[:, None] * steps  # (D, D) real units
        lam, vectors = np.linalg.eigh(pooled)
        lam, vectors = lam[::-1][: self.dimensions], vectors[:, ::-1][:, : self.dimensions]
        # an eigenvector's sign is arbitrary: make its largest entry positive, so that every machine stores the same
        signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
        lam = np.maximum(lam, VARIANCE_FLOOR)
        u = steps[:, None] * vectors * signs / np.sqrt(lam)
        return u, lam, self.statistics_.mean.mean((0, 1)), np.trace(pooled) / len(steps)

    def _regularised(self, u: np.ndarray, lam: np.ndarray, mean_variance: float) -> np.ndarray:
        """(H, W, d, d) covariances of U'x, shrunk towards the pooled one (the identity here)."""
        weight = self.shrinkage
        if weight is None:
            weight = pooled_weight(self.statistics_.count, self.dimensions)
        inside = np.matmul(np.matmul(u.T, self.statistics_.covariance()), u)
        return (1 - weight) * inside + np.diag(weight + self.epsilon * mean_variance / lam)

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W) float32 distances in floating point, the study form."""
        u, lam, _, mean_variance = self.directions_()
        t = (embeddings - self.statistics_.mean) @ u
        return mahalanobis(t, self._regularised(u, lam, float(mean_variance)))

    def to_scorer(self) -> TriangularScorer:
        """The integer form for the bank; the embeddings must have been int8."""
        with threadpool_limits(1, user_api="blas"):
            u, lam, offset, mean_variance = self.directions_()
            step = self._unit(u, offset)
            projection, u = make_projection(u, offset, step)
            covariance = self._regularised(u, lam, float(mean_variance)) / step**2
            return make_scorer(_projected_mean(projection, u, self.statistics_.mean, offset, step), covariance,
                               self.bits, projection=projection)  # fmt: skip

    def projection_(self) -> Projection:
        """What ``to_scorer`` projects with, on its own."""
        with threadpool_limits(1, user_api="blas"):
            u, _, offset, _ = self.directions_()
            return make_projection(u, offset, self._unit(u, offset))[0]

    def _unit(self, u: np.ndarray, offset: np.ndarray) -> float:
        """Pooled standard deviations that one unit of y stands for."""
        spread = np.abs((self.statistics_.mean - offset) @ u).max()
        return float((1.25 * self.headroom * spread + 6.0) / 127)


def pooled_weight(images: int, dimensions: int) -> float:
    """Share of the pooled covariance in each cell's: little once the images are more than twice the dimensions."""
    return 0.05 if images > 2 * dimensions else dimensions / (images + dimensions)


def _projected_mean(
    projection: Projection, u: np.ndarray, mean: np.ndarray, offset: np.ndarray, step: float
) -> np.ndarray:
    """(H, W, d) means in units of y, through the rounded weights and bias that the device uses."""
    column_scale = np.abs(u).max(0) / np.maximum(np.abs(projection.weights.astype(np.float64)).max(0), 1)
    return (mean @ u + projection.bias * column_scale) / step


def mahalanobis(t: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(n, H, W, d) deviations and (H, W, d, d) covariances -> (n, H, W) float32 distances."""
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    z = np.matmul(whiten, t.transpose(1, 2, 3, 0))  # (H, W, d, n)
    return np.sqrt((z**2).sum(2)).transpose(2, 0, 1).astype(np.float32)


def compact_bytes(grid: tuple[int, int], depth: int, dimensions: int, bits: int = 4) -> int:
    """Bytes of a compact bank's arrays: G*G*(3d + d(d-1)*bits/16) + D*d, two tables and 12 bytes a direction."""
    cells, d = grid[0] * grid[1], dimensions
    pairs = d * (d - 1) // 2
    return cells * (3 * d + (pairs * bits + 7) // 8) + depth * d + 2048 + 12 * d
