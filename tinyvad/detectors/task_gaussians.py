"""Gaussians of product after product in one bank: a fixed view of the embedding, exact sums of it, one scorer a task.

Flows in: int8 embeddings (n, H, W, D) of a task's good images and the bank's ``Space``, which is the same for all tasks:
which channels the bank sees, or through which projection. Flows out: ``TaskStatistics``, integer sums of y, what the
scorer sees; from them the task's integer scorer. ``tinyvad.detectors.tasks`` joins scorers of one space to one bank.

The sums merge exactly, in any order, so more images of an old product come in at any time without the old images, and a
fold comes off the whole exactly. Nothing of one task enters another's scorer.

Behind a projection, y is fixed by the first product; a later one regularises in the same real units: with S_p its
covariance of y in cell p,

    C_p = (1 - l) S_p + l mean_p S_p + noise N,   noise = max(eps v, l VARIANCE_FLOOR),   N = A' A

where A = diag(1 / steps) U_y takes a real embedding to y, so that N is what unit white noise on the embedding gives in y,
and v is the mean variance of the embedding over cells and channels. For the first product N is diagonal and mean_p S_p the
identity up to the unit of y: the formula is that of compact PaDiM (``tinyvad.detectors.padim``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from tinyvad.detectors.gaussian import GaussianStatistics, collect, symmetric, upper_triangle
from tinyvad.detectors.padim import (
    COMPACT_EPSILON,
    EPSILON,
    VARIANCE_FLOOR,
    PadimCompact,
    draw_channels,
    padim_scorer,
    pooled_weight,
)
from tinyvad.detectors.triangular import Projection, TriangularScorer, make_scorer
from tinyvad.errors import InputError


@dataclass(frozen=True, eq=False)
class Space:
    """What a PADM, PADF or PADC bank sees of an embedding.

    Attributes:
        steps: (D,) float64, real value of one unit of each embedding element.
        bits: 0 (variances only), 4 or 8 bits a factor entry.
        indices: (d,) uint16 channels, or None. projection: or None; neither means the whole embedding.
        epsilon: added variance: in real units, or with a projection the share of the mean variance.
        shrinkage: weight l of the pooled covariance behind a projection; None takes ``pooled_weight``.
    """

    steps: np.ndarray
    bits: int
    indices: np.ndarray | None = None
    projection: Projection | None = None
    epsilon: float = EPSILON
    shrinkage: float | None = None

    @property
    def depth(self) -> int:
        """D."""
        return len(self.steps)

    @property
    def dimensions(self) -> int:
        """d, values of y."""
        if self.projection is not None:
            return self.projection.weights.shape[1]
        return self.depth if self.indices is None else len(self.indices)

    def see(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 embeddings -> (n, H, W, d) int8, the scorer's y."""
        if self.projection is not None:
            return self.projection.apply(embeddings)
        return embeddings if self.indices is None else embeddings[..., self.indices]

    @classmethod
    def of(
        cls, scorer: TriangularScorer, steps: np.ndarray, epsilon: float | None = None, shrinkage: float | None = None
    ) -> Space:
        """The space of a bank's scorer; ``epsilon`` None takes the method's own.

        Raises:
            InputError: the projection is not one that Gaussians can be fitted behind.
        """
        steps = np.array(steps, np.float64)
        compact = scorer.projection is not None
        if epsilon is None:
            epsilon = COMPACT_EPSILON if compact else EPSILON
        space = cls(steps, scorer.bits, scorer.indices, scorer.projection, epsilon, shrinkage)
        if compact:
            _check_projection(space)
        return space

    @classmethod
    def plain(
        cls, steps: np.ndarray, bits: int = 8, channels: int | None = None, seed: int = 0, epsilon: float = EPSILON
    ) -> Space:
        """PaDiM's (bits 4 or 8) and PaDiM-Lite's (bits 0): the whole embedding, or a random subset of its channels."""
        indices = None if channels in (None, len(steps)) else draw_channels(len(steps), channels, seed)
        return cls(np.array(steps, np.float64), bits, indices, epsilon=epsilon)

    @classmethod
    def compact(
        cls,
        statistics: GaussianStatistics,
        dimensions: int,
        steps: np.ndarray,
        bits: int = 4,
        headroom: float = 2.0,
    ) -> Space:
        """Compact PaDiM's: the projection that the first product's sums of the full embedding give.

        Args:
            headroom: see ``PadimCompact``; 2.0 leaves room for the means of products to come.
        """
        first = PadimCompact(dimensions, steps, bits, headroom=headroom).fit_statistics(statistics)
        return cls(np.array(steps, np.float64), bits, None, first.projection_(), COMPACT_EPSILON)


@dataclass(frozen=True, eq=False)
class TaskStatistics:
    """Integer sums over a task's images; all of them exact.

    Attributes:
        y: sums of what the scorer sees, full, or diagonal with bits 0.
        total: (D,) int64, sum of the embedding over images and cells (its tail is the sum of all signatures).
        cells: (H, W, D) int64, sum of the embedding over images; squares: (D,) int64, sum of its squares over images and
            cells. Both only behind a projection, where they give the embedding's mean variance.
    """

    y: GaussianStatistics
    total: np.ndarray
    cells: np.ndarray | None = None
    squares: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Images."""
        return self.y.count

    def merge(self, other: TaskStatistics) -> TaskStatistics:
        """Statistics of both sets of images together; exact, associative, order-free."""
        return self._combine(other, self.y.merge(other.y), 1)

    def without(self, other: TaskStatistics) -> TaskStatistics:
        """The inverse of ``merge``; exact."""
        return self._combine(other, self.y.without(other.y), -1)

    def _combine(self, other: TaskStatistics, y: GaussianStatistics, sign: int) -> TaskStatistics:
        cells = squares = None
        if self.cells is not None and other.cells is not None:
            cells = self.cells + sign * other.cells
        if self.squares is not None and other.squares is not None:
            squares = self.squares + sign * other.squares
        return TaskStatistics(y, self.total + sign * other.total, cells, squares)

    def mean_variance(self, steps: np.ndarray) -> float:
        """v: variance of the embedding in real units, mean over cells and channels; divisor n - 1, 0 for one image."""
        assert self.cells is not None and self.squares is not None
        n = self.count
        # n * sum of squares - square of the sum, summed over cells, a channel: exact in int64; one division at the end
        spread = n * self.squares - (self.cells * self.cells).sum((0, 1))  # (D,)
        each = spread / (n * max(n - 1, 1) * self.cells[..., 0].size)
        return float((each * steps**2).mean())

    def arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for a file: integers no wider than needed, of symmetric matrices the upper triangle."""
        second = self.y.second
        if not self.y.diagonal:
            second = upper_triangle(second)
        result = {"count": np.array(self.count, np.int64), "first": _narrow(self.y.first), "second": _narrow(second)}
        result["total"] = _narrow(self.total)
        if self.cells is not None and self.squares is not None:
            result["cells"], result["squares"] = _narrow(self.cells), _narrow(self.squares)
        return result

    @classmethod
    def from_arrays(cls, space: Space, arrays: Mapping[str, np.ndarray]) -> TaskStatistics:
        """Take back ``arrays()`` of statistics that were collected in ``space``.

        Raises:
            InputError: an array is missing, or has a shape or dtype that the space does not have.
        """
        d, depth = space.dimensions, space.depth
        count, first = _take(arrays, "count", ()), _take(arrays, "first", None)
        if first.ndim != 3 or first.shape[-1] != d or count < 0:
            found = f"{count} images, shape {first.shape}"
            raise InputError(f"learning state, first: {found}, expected (H, W, {d}); learn the product anew")
        grid = first.shape[:2]
        if space.bits == 0:
            second = _take(arrays, "second", (*grid, d)).astype(np.float64)
        else:
            second = symmetric(_take(arrays, "second", (*grid, d * (d + 1) // 2)).astype(np.float64), d)
        cells = squares = None
        if space.projection is not None:
            cells = _take(arrays, "cells", (*grid, depth)).astype(np.int64)
            squares = _take(arrays, "squares", (depth,)).astype(np.int64)
        y = GaussianStatistics(int(count), first.astype(np.float64), second)
        return cls(y, _take(arrays, "total", (depth,)).astype(np.int64), cells, squares)


def collect_task(space: Space, embeddings: Iterable[np.ndarray]) -> TaskStatistics:
    """Sum up a stream of (n, H, W, D) int8 embeddings, one pass. Memory: the sums and one batch.

    Raises:
        InputError: the stream is empty, or not int8, or has another depth than the space.
    """
    compact = space.projection is not None
    total = np.zeros(space.depth, np.int64)
    squares = np.zeros(space.depth, np.int64)
    cells: list[np.ndarray] = []  # one (H, W, D) int64 once the grid is known

    def seen() -> Iterator[np.ndarray]:
        for batch in embeddings:
            if batch.dtype != np.int8 or batch.shape[-1] != space.depth:
                found = f"{batch.dtype.name} of depth {batch.shape[-1]}"
                raise InputError(f"embeddings: {found}, expected int8 of depth {space.depth}; use the bank's own embedding")
            sums = batch.sum(0, dtype=np.int64)  # (H, W, D)
            total[:] += sums.sum((0, 1))
            if compact:
                squares[:] += np.square(batch, dtype=np.int32).sum((0, 1, 2), dtype=np.int64)
                cells[:] = [cells[0] + sums] if cells else [sums]
            yield space.see(batch)

    y = collect(seen(), diagonal=space.bits == 0)
    return TaskStatistics(y, total, cells[0], squares) if compact else TaskStatistics(y, total)


def scorer_of(space: Space, statistics: TaskStatistics) -> TriangularScorer:
    """The integer scorer of one task; see the module's text. Without a projection it is exactly ``Padim``'s."""
    if space.projection is None:
        steps = space.steps if space.indices is None else space.steps[space.indices]
        return padim_scorer(statistics.y, steps, space.epsilon, space.bits, space.indices)
    weight = space.shrinkage
    if weight is None:
        weight = pooled_weight(statistics.count, space.dimensions)
    noise = max(space.epsilon * statistics.mean_variance(space.steps), weight * VARIANCE_FLOOR)
    with threadpool_limits(1, user_api="blas"):
        inside = statistics.y.covariance()  # (H, W, d, d)
        covariance = (1 - weight) * inside + weight * inside.mean((0, 1)) + noise * _white_noise(space)
        return make_scorer(statistics.y.mean, covariance, space.bits, projection=space.projection)


def _white_noise(space: Space) -> np.ndarray:
    """N, (d, d): covariance of y for unit white noise on the real embedding, before y is rounded."""
    p = space.projection
    assert p is not None
    column_scale = p.multipliers * np.exp2(p.shifts - 31.0)  # units of y for one of the integer sum
    a = p.weights * column_scale / space.steps[:, None]  # (D, d)
    return a.T @ a


def _check_projection(space: Space) -> None:
    """InputError unless independent directions leave a covariance that can be inverted."""
    if space.bits == 0:
        raise InputError("bank section CFG : a diagonal bank behind a projection can't learn; build the bank again")
    noise = _white_noise(space)
    scale = np.sqrt(noise.diagonal())
    if not scale.all() or np.linalg.eigvalsh(noise / (scale[:, None] * scale))[0] < 1e-6:
        raise InputError("bank section PROJ: its directions depend on each other; build the bank again")


def task_bytes(space: Space, grid: tuple[int, int]) -> tuple[int, int]:
    """(section bytes that one task adds, without its rows of TASK, PROT and THRS; section bytes that all share)."""
    cells, d = grid[0] * grid[1], space.dimensions
    pairs = d * (d - 1) // 2
    own = cells * 2 * d + 1024  # MEAN, a codes, their table
    if space.bits:
        own += cells * (d + ((pairs + 1) // 2 if space.bits == 4 else pairs)) + 1024  # s codes, factor, their table
    shared = 16  # CFG
    if space.projection is not None:
        shared += space.depth * d + 12 * d
    elif space.indices is not None:
        shared += 2 * d
    return own, shared


def _narrow(array: np.ndarray) -> np.ndarray:
    """Integers as int32 where all of them fit, else int64."""
    fits = array.size == 0 or np.abs(array).max() < 1 << 31
    return array.astype(np.int32 if fits else np.int64)


def _take(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.dtype.kind != "i" or (shape is not None and array.shape != shape):
        found = "missing" if array is None else f"{array.dtype.name}{array.shape}"
        expected = "integers" if shape is None else f"integers {shape}"
        raise InputError(f"learning state, {name}: {found}, expected {expected}; learn the product anew")
    return array
