"""One Gaussian a grid cell: the statistics that all PaDiM variants share, and exact merging.

Flows in: a stream of embeddings (n, H, W, D). Flows out: n, mean and covariance a cell. Stored are the raw sums
(n, sum x, sum x x') in float64. On int8 embeddings every sum is an integer below 2**53, so it is exact: the order of the
images, the number of threads and the number of merges change nothing, not even the last bit. On float features float64
leaves twelve good digits, which the tests hold against the textbook forms.

Source: PaDiM (Defard et al. 2021, section III.B); merging by sums is equal to the pairwise form of Chan et al. (1979).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinyvad.errors import InputError

# float32 products of int8 values add up exactly while a batch has at most this many images
EXACT_BATCH = (1 << 24) // (128 * 128)


@dataclass
class GaussianStatistics:
    """Sums over images, a cell: ``count`` images, ``first`` (H, W, D), ``second`` (H, W, D, D) or (H, W, D) diagonal."""

    count: int
    first: np.ndarray
    second: np.ndarray

    @property
    def diagonal(self) -> bool:
        return self.second.ndim == self.first.ndim

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Statistics of both sets of images together; exact, associative, order-free on int8 embeddings."""
        return GaussianStatistics(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    def without(self, other: GaussianStatistics) -> GaussianStatistics:
        """The inverse of ``merge``: statistics without a part that they contain; exact on int8 embeddings."""
        return GaussianStatistics(
            self.count - other.count, self.first - other.first, self.second - other.second
        )

    @property
    def mean(self) -> np.ndarray:
        """(H, W, D) float64."""
        return self.first / self.count

    def covariance(self) -> np.ndarray:
        """(H, W, D, D) float64, divisor n - 1 (zeros for one image); (H, W, D) variances when diagonal."""
        outer = self.first**2 if self.diagonal else self.first[..., :, None] * self.first[..., None, :]
        # n * second - outer is exact in integers; one division at the end
        return (self.count * self.second - outer) / (self.count * max(self.count - 1, 1))


def upper_triangle(matrices: np.ndarray) -> np.ndarray:
    """(..., d, d) -> (..., d * (d + 1) / 2): the upper triangle, row after row."""
    i, j = np.triu_indices(matrices.shape[-1])
    return matrices[..., i, j]


def symmetric(triangle: np.ndarray, d: int) -> np.ndarray:
    """Undo ``upper_triangle`` of symmetric matrices: (..., d * (d + 1) / 2) -> (..., d, d)."""
    i, j = np.triu_indices(d)
    full = np.empty((*triangle.shape[:-1], d, d), triangle.dtype)
    full[..., i, j] = triangle
    full[..., j, i] = triangle
    return full


def collect(embeddings: Iterable[np.ndarray], diagonal: bool = False) -> GaussianStatistics:
    """Sum up a stream of (n, H, W, D) embeddings, int8 or float. Memory: the sums and one batch.

    Raises:
        InputError: the stream is empty.
    """
    total: GaussianStatistics | None = None
    for batch in embeddings:
        for start in range(0, len(batch), EXACT_BATCH):
            part = _sums(batch[start : start + EXACT_BATCH], diagonal)
            if total is None:
                total = part
            else:
                total.count += part.count
                total.first += part.first
                total.second += part.second
    if total is None:
        raise InputError("fitting needs at least one good image")
    return total


def _sums(x: np.ndarray, diagonal: bool) -> GaussianStatistics:
    wide = x.astype(np.float64)
    first = wide.sum(0)
    if diagonal:
        return GaussianStatistics(len(x), first, (wide**2).sum(0))
    exact = np.float32 if x.dtype == np.int8 else np.float64
    cells = x.astype(exact).transpose(1, 2, 3, 0)  # (H, W, D, n)
    second = np.matmul(cells, cells.swapaxes(-1, -2)).astype(np.float64)  # (H, W, D, D)
    return GaussianStatistics(len(x), first, second)
