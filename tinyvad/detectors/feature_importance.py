"""PCA feature importance: which channels of a tapped map carry the variance of a product's good images, cell by cell.

Flows in: tapped maps (n, H, W, C) of one product's good images, a batch at a time. Flows out, for every layer: how many
principal components explain ``VARIANCE`` of a cell's variance, the importance of each channel there, masks of the most
important channels; and what masks do to maps (feature-selective scoring and training of a student-teacher detector).

Memory is that of the sums, H * W * C * C float64 a layer, whatever the number of images. All cells are worked on at once.

Source: the thesis behind PaSTe (chapter 4). Its two rules against conflicts between products are here too. The second one
drops shared features by a 30 % overlap of their ranges of values, which is read as the part that two ranges share of what
they span together. Whether more or less than that is the conflict is not clear to us: ``without_clashing`` does both. The
thesis drops 36 % and 5 % of the features; on our products only ranges that lie apart are as few
(benchmarks/results/feature_importance.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvad.errors import InputError

if TYPE_CHECKING:
    from tinyvad.training.trainable import Items

VARIANCE = 0.8  # share of a cell's variance that the components must explain
SAMPLED = 0.1  # share of the cells that the number of components is chosen on, and
PERCENTILE = 99  # how many of those cells it has to be enough for, in percent
KEEP = 10.0  # percent of a cell's channels that a mask keeps
OVERLAP = 0.3  # of two products' ranges of values: what the second rule draws its line at
CELLS_AT_ONCE = 1 << 23  # float64 values of covariances that are decomposed together
MOST_BYTES = 4 << 30  # of sums
BATCH = 16  # items read together


class Moments:
    """Sums of one layer's maps over images: exact for integers below 2**53 in all, whatever the batches.

    Attributes:
        count: images so far.
        low, high: (H, W, C) float64, the range of every value.
    """

    def __init__(self) -> None:
        self.count = 0
        self.low = self.high = np.empty((0, 0, 0))

    def update(self, maps: np.ndarray) -> None:
        """Add (n, H, W, C) maps of n images, integers or floats.

        Raises:
            InputError: another shape than before, values that are no numbers, or sums larger than ``MOST_BYTES``.
        """
        if not len(maps):
            return
        _, height, width, channels = maps.shape
        if self.count and maps.shape[1:] != self.shape:
            raise InputError(f"a tapped map is {maps.shape[1:]}, the ones before were {self.shape}")
        needed = height * width * channels**2 * 8
        if needed > MOST_BYTES:
            raise InputError(
                f"covariances of a {height}x{width}x{channels} map take {needed / 2**30:.1f} GiB, at most "
                f"{MOST_BYTES >> 30}; choose smaller layers with --layers"
            )
        values = np.asarray(maps, np.float64)
        if not np.isfinite(values).all():
            raise InputError("a tapped map holds NaN or infinity; check the network's weights")
        if self.count == 0:
            self._shift = values[0].copy()  # (H, W, C): small sums of squares even where the mean is far from 0
            self._sum = np.zeros((height * width, channels))
            self._products = np.zeros((height * width, channels, channels))
            self.low, self.high = self._shift.copy(), self._shift.copy()
        self.count += len(values)
        np.minimum(self.low, values.min(0), out=self.low)
        np.maximum(self.high, values.max(0), out=self.high)
        cells = (values - self._shift).reshape(len(values), -1, values.shape[3]).transpose(1, 2, 0)  # (P, C, n)
        cells = np.ascontiguousarray(cells)
        self._sum += cells.sum(2)
        self._products += cells @ cells.transpose(0, 2, 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the maps."""
        height, width, channels = self.low.shape
        return height, width, channels

    def covariance(self, cells: np.ndarray) -> np.ndarray:
        """(k, C, C) float64 of the chosen cells, by row and then column of the map; divisor ``count`` - 1.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"importance needs at least 2 good images of a product, not {self.count}")
        total = self._sum[cells]  # (k, C)
        return (self._products[cells] - total[:, :, None] * total[:, None, :] / self.count) / (self.count - 1)


@dataclass(frozen=True, eq=False)
class Importance:
    """One layer of one product.

    Attributes:
        components: r, what all cells of the layer are decomposed into.
        counts: (H, W) int64, components that a cell needs for ``VARIANCE`` of its own variance; 0 where nothing varies.
        values: (H, W, C) float64, importance of a channel within its cell: >= 0, sum 1, or all 0 where nothing varies.
        totals: (H, W) float64, the sums that ``values`` were divided by: how much a cell varies from image to image.
    """

    components: int
    counts: np.ndarray
    values: np.ndarray
    totals: np.ndarray


def component_counts(variances: np.ndarray, share: float = VARIANCE) -> np.ndarray:
    """(k,) int64: the fewest components that explain ``share`` of the variance; (k, C) variances, largest first."""
    known = np.cumsum(variances, axis=1)
    # a share of 1 must not fail by the last bit of a sum
    enough = known >= share * known[:, -1:] * (1 - 1e-12)
    return np.where(known[:, -1] > 0, enough.argmax(1) + 1, 0)


def components_of_layer(counts: np.ndarray, rng: np.random.Generator) -> int:
    """r: the 99th percentile of the counts of a random tenth of the cells, rounded up; at least 1."""
    chosen = rng.choice(counts.size, max(1, round(SAMPLED * counts.size)), replace=False)
    return max(1, math.ceil(np.percentile(counts.ravel()[chosen], PERCENTILE)))


def loadings(components: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """(k, C) importance |components|^T . variances, from (k, r, C) and (k, r); the components' signs don't matter."""
    return np.einsum("krc,kr->kc", np.abs(components), variances)


def importance(moments: Moments, rng: np.random.Generator) -> Importance:
    """Decompose every cell of a layer.

    Args:
        rng: chooses the cells that the number of components is read from.

    Raises:
        InputError: fewer than two images.
    """
    height, width, channels = moments.shape
    most = min(channels, moments.count - 1)  # the rank of n centred images
    blocks = np.array_split(np.arange(height * width), -(-height * width * channels**2 // CELLS_AT_ONCE))
    spectra = (np.linalg.eigvalsh(moments.covariance(cells))[:, ::-1][:, :most] for cells in blocks)
    counts = np.concatenate([component_counts(np.maximum(spectrum, 0)) for spectrum in spectra])
    components = min(components_of_layer(counts, rng), most)
    found = []
    for cells in blocks:
        variances, vectors = np.linalg.eigh(moments.covariance(cells))  # ascending; (k, C), (k, C, C) by column
        largest = slice(None, -components - 1, -1)
        found.append(loadings(vectors[:, :, largest].transpose(0, 2, 1), np.maximum(variances[:, largest], 0)))
    raw = np.concatenate(found)  # (P, C)
    # an eigenvector's last bits would give a channel without variance a trace of importance
    raw[(moments.high == moments.low).reshape(raw.shape)] = 0
    totals = raw.sum(1)
    values = np.divide(raw, totals[:, None], out=np.zeros_like(raw), where=totals[:, None] > 0)
    return Importance(
        components, counts.reshape(height, width), values.reshape(height, width, channels), totals.reshape(height, width)
    )


def top_mask(values: np.ndarray, keep: float = KEEP) -> np.ndarray:
    """(H, W, C) bool: the ``keep`` percent most important channels of each cell, those without importance never.

    Raises:
        InputError: ``keep`` is not above 0 and at most 100.
    """
    if not 0 < keep <= 100:
        raise InputError(f"keep is {keep:g} percent of the channels; it must be above 0 and at most 100")
    limits = np.percentile(values, 100 - keep, axis=-1, keepdims=True)
    return (values >= limits) & (values > 0)


def masks_of_items(items: Items, first: int, keep: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Masks (H, W, C) bool of the maps that a task's items hold.

    Args:
        first: the first of an item's arrays that is a teacher's map; the ones before it are what the student reads.
        keep: percent of a cell's channels. rng: see ``importance``.

    Raises:
        InputError: fewer than two items, or ``keep`` out of range.
    """
    moments: list[Moments] = []
    for start in range(0, len(items), BATCH):
        maps = items.take(np.arange(start, min(start + BATCH, len(items))))[first:]
        moments = moments or [Moments() for _ in maps]
        for sums, layer in zip(moments, maps, strict=True):
            sums.update(layer)
    return [top_mask(importance(sums, rng).values, keep) for sums in moments]


def chosen_by(masks: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, C) int64: by how many products a channel was chosen, from a layer's mask of each."""
    return np.stack(masks).astype(np.int64).sum(0)


def without_shared(masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A layer's masks of all products without what two or more of them chose: the first rule against conflicts."""
    alone = chosen_by(masks) < 2
    return [mask & alone for mask in masks]


def without_clashing(
    masks: Sequence[np.ndarray],
    lows: Sequence[np.ndarray],
    highs: Sequence[np.ndarray],
    *,
    apart: bool,
    overlap: float = OVERLAP,
) -> list[np.ndarray]:
    """A layer's masks without what two products chose and whose values clash there: the second rule.

    Args:
        masks, lows, highs: a product's mask and range of values, (H, W, C) each.
        apart: dropped from both if their ranges share at most ``overlap`` of what they span together, so that the products
            ask a student for different values; False: if they share more.
    """
    kept = [mask.copy() for mask in masks]
    for i in range(len(masks)):
        for j in range(i):
            shared = np.minimum(highs[i], highs[j]) - np.maximum(lows[i], lows[j])
            span = np.maximum(highs[i], highs[j]) - np.minimum(lows[i], lows[j])
            clash = masks[i] & masks[j] & ((shared > overlap * span) != apart)
            kept[i] &= ~clash
            kept[j] &= ~clash
    return kept


def mask_bytes(masks: Iterable[np.ndarray]) -> int:
    """Bytes of one product's masks at one bit a channel and cell."""
    return sum(-(-mask.size // 8) for mask in masks)


def masked(maps: Sequence[Any], masks: Sequence[np.ndarray]) -> list[Any]:
    """Maps [(n, H, W, C)], arrays or on the tape, with everything but the masks' channels set to 0; teacher's and student's
    alike, before they are normalised.

    Raises:
        InputError: a mask and its map differ in size.
    """
    for i, (values, mask) in enumerate(zip(maps, masks, strict=True)):
        if values.shape[1:] != mask.shape:
            raise InputError(f"mask {i} is {mask.shape}, but its map {values.shape[1:]}; make masks from the same layers")
    return [values * mask.astype(values.dtype) for values, mask in zip(maps, masks, strict=True)]
