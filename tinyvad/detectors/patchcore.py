"""PatchCore and PatchCore-Lite: a bank of normal patch vectors, the distance to the nearest one as anomaly score.

Flows in: embeddings (n, H, W, D), int8 for the device or float32 for study. Flows out: distance maps (n, H, W), and an
integer scorer for the bank (``tinyvad.detectors.nearest``).

* ``patchcore``: a greedy coreset of the patch vectors. Source: Roth et al. 2022, section 3.
* ``patchcore-lite``: the coreset product-quantised. Source: PatchCore-Lite of the edge papers, whose coarse search among
  code numbers is replaced by the exact search with distance tables.

Not all patch vectors are candidates for the coreset: of more than ``max_candidates``, that many are drawn uniformly
(``Reservoir``). State that number next to any result.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.distances import nearest, pairwise_squared
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import check_subspaces, fit_quantizer
from tinyvad.detectors.reservoir import Reservoir
from tinyvad.errors import InputError

__all__ = ["PatchCore", "PatchCoreLite", "PatchCoreLiteScorer", "PatchCoreScorer"]


class PatchCore:
    """PatchCore.

    Args:
        bank_size: K, vectors in the bank; fewer where the candidates repeat.
        max_candidates: patch vectors kept for the selection, at least ``bank_size``.
        seed: draws the candidates.
        step: real units of one unit of the embeddings, the same for all channels; 1.0 for float features.
        neighbors: b of the re-weighted image score; 1 for none, the ports of the paper use 9. Maps ignore it.

    Attributes:
        memory_bank_: (K, D), the embeddings' dtype, in greedy order.
    """

    name = "patchcore"

    def __init__(
        self,
        bank_size: int = 1000,
        max_candidates: int = 50_000,
        seed: int = 0,
        step: float = 1.0,
        neighbors: int = 1,
    ) -> None:
        if not 1 <= bank_size <= max_candidates:
            raise InputError(f"bank size {bank_size}: give 1 to {max_candidates} (max_candidates)")
        if neighbors < 1 or not step > 0:
            raise InputError(f"neighbors {neighbors}, step {step}: both must be positive")
        self.bank_size, self.max_candidates, self.seed = bank_size, max_candidates, seed
        self.step, self.neighbors = step, neighbors

    def fit(self, embeddings: Iterable[np.ndarray]) -> PatchCore:
        """Select the bank from a stream of (n, H, W, D) embeddings, one pass, ``max_candidates`` rows in memory.

        Raises:
            InputError: an empty stream, a batch of another dtype or depth, values that are not finite.
        """
        self._select(embeddings)
        return self

    def _select(self, embeddings: Iterable[np.ndarray]) -> np.ndarray:
        """Fill the bank; returns the candidates (n, D)."""
        reservoir = Reservoir(self.max_candidates, self.seed)
        first: np.ndarray | None = None
        for batch in embeddings:
            if batch.ndim != 4 or batch.dtype not in (np.int8, np.float32) or batch.shape[3] == 0:
                raise InputError(f"embeddings are {batch.dtype}{batch.shape}; give (n, H, W, D) int8 or float32")
            first = batch if first is None else first
            if batch.dtype != first.dtype or batch.shape[3] != first.shape[3]:
                was, now = f"{first.dtype}, D = {first.shape[3]}", f"{batch.dtype}{batch.shape}"
                raise InputError(f"embeddings changed from {was} to {now}; give one kind")
            reservoir.add(batch.reshape(-1, batch.shape[3]))
        if reservoir.seen == 0:
            raise InputError("fitting needs at least one good image")
        candidates = reservoir.sample()
        self.memory_bank_: np.ndarray = candidates[farthest_first(candidates, self.bank_size).order]
        return candidates

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) of the bank's dtype -> (n, H, W) float32 distances in real units, exact for int8."""
        return self._real(nearest(self._rows(embeddings), self.memory_bank_)[0], embeddings)

    def _rows(self, embeddings: np.ndarray) -> np.ndarray:
        bank = self.memory_bank_
        if embeddings.ndim != 4 or embeddings.dtype != bank.dtype or embeddings.shape[3] != bank.shape[1]:
            found = f"{embeddings.dtype}{embeddings.shape}"
            raise InputError(f"embeddings are {found}; the bank needs {bank.dtype} (n, H, W, {bank.shape[1]})")
        return embeddings.reshape(-1, bank.shape[1])

    def _real(self, squared: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        distances = np.sqrt(squared.astype(np.float64)) * self.step
        return distances.astype(np.float32).reshape(embeddings.shape[:3])

    def image_scores(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) -> (n,) float32: the largest distance s* of the map, weighted if ``neighbors`` > 1.

        The weight is 1 - exp(||z - m*||) / sum over the b bank vectors m nearest to m* of exp(||z - m||), with z the
        worst patch and m* its nearest vector. Source: Roth et al. 2022, eq. 7, with b as in the common ports.
        """
        maps = self.score(embeddings).reshape(len(embeddings), -1)
        worst = maps.argmax(1)
        largest = maps[np.arange(len(maps)), worst]
        if self.neighbors == 1:
            return largest
        patches = embeddings.reshape(*maps.shape, -1)[np.arange(len(maps)), worst]  # (n, D)
        _, closest = nearest(patches, self.memory_bank_)
        to_bank = np.concatenate([m for _, m in pairwise_squared(patches, self.memory_bank_)])
        weights = np.empty(len(maps))
        for part, around in pairwise_squared(self.memory_bank_[closest], self.memory_bank_):
            around[np.arange(len(around)), closest[part]] = -1  # m* is the first of its own neighbours
            neighbors = np.argsort(around, axis=1, kind="stable")[:, : self.neighbors]
            distances = np.sqrt(np.take_along_axis(to_bank[part], neighbors, 1).astype(np.float64)) * self.step
            shares = np.exp(distances - distances.max(1, keepdims=True))
            weights[part] = 1 - shares[:, 0] / shares.sum(1)
        return (weights * largest).astype(np.float32)

    def to_scorer(self) -> PatchCoreScorer:
        """The integer form for the bank; the embeddings must have been int8."""
        return PatchCoreScorer(self._integer_bank(), self.step)

    def _integer_bank(self) -> np.ndarray:
        if self.memory_bank_.dtype != np.int8:
            raise InputError(f"{self.name} was fitted on {self.memory_bank_.dtype} embeddings; the device form needs int8")
        return self.memory_bank_


class PatchCoreLite(PatchCore):
    """PatchCore-Lite; see ``PatchCore`` for the arguments that both have.

    Args:
        subspaces: M, a divisor of D.
        bits: 4 or 8, of one code.
        group: let channels that go together share a subspace where that lowers the error.
        centroids: V of the codebooks however few rows there are; None: fewer with few rows. See ``fit_quantizer``.

    Attributes:
        quantizer_: the trained ``ProductQuantizer``. codes_: (K, M) uint8 of memory_bank_, in greedy order.
    """

    name = "patchcore-lite"

    def __init__(
        self,
        bank_size: int = 10_000,
        subspaces: int = 8,
        bits: int = 8,
        max_candidates: int = 50_000,
        seed: int = 0,
        step: float = 1.0,
        group: bool = True,
        centroids: int | None = None,
    ) -> None:
        super().__init__(bank_size, max_candidates, seed, step)
        self.subspaces, self.bits, self.group, self.centroids = subspaces, bits, group, centroids

    def fit(self, embeddings: Iterable[np.ndarray]) -> PatchCoreLite:
        """Select the bank as PatchCore does, then train the quantiser and encode the bank.

        Raises:
            InputError: as PatchCore, or ``subspaces`` does not divide D, or ``bits`` is not 4 or 8.
        """
        candidates = self._select(embeddings)
        check_subspaces(candidates.shape[1], self.subspaces, self.bits)
        rng = np.random.default_rng(self.seed)
        self.quantizer_ = fit_quantizer(
            self.memory_bank_, self.subspaces, self.bits, rng, candidates, self.group, centroids=self.centroids
        )
        self.codes_: np.ndarray = self.quantizer_.encode(self.memory_bank_)
        return self

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) of the bank's dtype -> (n, H, W) float32 distances to the decoded vectors, in real units."""
        return self._real(self.quantizer_.search(self._rows(embeddings), self.codes_), embeddings)

    def image_scores(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) -> (n,) float32: the largest distance of the map; the paper's Lite form has no weights."""
        return self.score(embeddings).reshape(len(embeddings), -1).max(1)

    def to_scorer(self) -> PatchCoreLiteScorer:  # type: ignore[override]
        """The integer form for the bank; the embeddings must have been int8."""
        self._integer_bank()
        return PatchCoreLiteScorer(self.quantizer_, self.codes_, self.step)
