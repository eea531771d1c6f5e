"""How good are the scores: AUROC, average precision, F1-max for images and pixels, AUPRO for regions.

Flows in: labels (0 normal, 1 anomalous) and scores, or masks and anomaly maps; a higher score is more anomalous.
Flows out: floats in 0..1, or the dicts that go into reports, with None where a class is absent.

Every figure is exact over all distinct scores: no binning, no resampled thresholds, no rescaling of maps, no added
epsilon. They agree with scikit-learn (``roc_auc_score``, ``average_precision_score``, the best F1 of
``precision_recall_curve``). Since TP only grows at the score of an anomalous item, only those scores are tried as
thresholds; the normal ones, by far the most, are sorted once and looked up. AUPRO: Bergmann et al., "The MVTec
Anomaly Detection Dataset", IJCV 2021: mean over regions of the overlap, against the false positive rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinyvad.errors import InputError

Masks = Sequence[np.ndarray] | np.ndarray  # N masks (H, W), bool or 0 and not 0; sizes may differ between images
Maps = Sequence[np.ndarray] | np.ndarray  # N anomaly maps (H, W), each of its mask's size


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that an anomalous item scores above a normal one, ties counting half.

    Args:
        labels: (n,) 0 normal, 1 anomalous.
        scores: (n,) real numbers, higher is more anomalous.

    Returns:
        0..1, not flipped below 0.5; NaN if a class is absent.

    Raises:
        InputError: shapes differ, a label is neither 0 nor 1, a score is NaN.
    """
    return _auroc(*_by_class(labels, scores))


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the precision-recall curve as steps, sum of (R_i - R_(i-1)) * P_i; arguments as for ``auroc``."""
    return _average_precision(*_by_class(labels, scores))


def f1_max(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[float, float]:
    """The best F1 = 2TP / (2TP + FP + FN) over all thresholds, and the highest threshold that reaches it.

    An item is called anomalous when its score >= threshold. The threshold is chosen on the very labels that it is
    judged by, so the figure is an upper bound of what a device reaches. Arguments as for ``auroc``.

    Returns:
        (F1, threshold), (NaN, NaN) if a class is absent.
    """
    return _f1_max(*_by_class(labels, scores))


def f1_floor(labels: npt.ArrayLike) -> float:
    """F1 of calling everything anomalous, 2q / (1 + q) with the anomalous share q: print it beside every F1.

    Args:
        labels: any shape, 0 normal, 1 anomalous.

    Returns:
        0..1; NaN if a class is absent.
    """
    flags = _flags(np.asarray(labels))
    positives = int(np.count_nonzero(flags))
    if positives in (0, flags.size):
        return math.nan
    return 2 * positives / (positives + flags.size)


def aupro(masks: Masks, maps: Maps, limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false positive rate of ``limit``, divided by ``limit``.

    Regions are the 8-connected components of each mask. At a threshold, PRO is the mean over all regions of all
    images of the share of the region that scores >= threshold; FPR is the share of all normal pixels, those of
    good images included, that do. Trapezoids over all distinct thresholds, interpolated at ``limit``. A constant
    map gives limit / 2.

    Args:
        masks: N masks (H, W), not 0 = anomalous; good images have all-zero masks.
        maps: N maps (H, W) of the same sizes, higher is more anomalous.
        limit: 0 < limit <= 1.

    Returns:
        0..1; NaN if there is no anomalous or no normal pixel.

    Raises:
        InputError: shapes differ, a score is NaN, limit out of range.
    """
    if not 0 < limit <= 1:
        raise InputError(f"AUPRO's limit {limit} must be above 0 and at most 1")
    return _aupro(*_pixels(masks, maps), limit)


def image_metrics(labels: npt.ArrayLike, scores: npt.ArrayLike) -> dict[str, float | int | None]:
    """All image-level figures; arguments as for ``auroc``.

    Returns:
        ``image_AUROC image_F1Max image_AP image_F1_floor`` (None if a class is absent), ``n_normal n_anomalous``.
    """
    anomalous, normal = _by_class(labels, scores)
    return {
        "image_AUROC": _none_if_nan(_auroc(anomalous, normal)),
        "image_F1Max": _none_if_nan(_f1_max(anomalous, normal)[0]),
        "image_AP": _none_if_nan(_average_precision(anomalous, normal)),
        "image_F1_floor": _none_if_nan(f1_floor(labels)),
        "n_normal": len(normal),
        "n_anomalous": len(anomalous),
    }


def pixel_metrics(masks: Masks, maps: Maps) -> dict[str, float | None]:
    """All pixel-level figures, over the pixels of all images together; arguments as for ``aupro``.

    Leave out anomalous images that have no mask: their pixels are of unknown class.

    Returns:
        ``pixel_AUROC pixel_F1Max pixel_AP pixel_AUPRO``, each None if a class is absent.
    """
    anomalous, weights, normal = _pixels(masks, maps)
    return {
        "pixel_AUROC": _none_if_nan(_auroc(anomalous, normal)),
        "pixel_F1Max": _none_if_nan(_f1_max(anomalous, normal)[0]),
        "pixel_AP": _none_if_nan(_average_precision(anomalous, normal)),
        "pixel_AUPRO": _none_if_nan(_aupro(anomalous, weights, normal, 0.3)),
    }


def label_regions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the 8-connected regions of a mask in the order of their first pixels, row by row.

    Runs of pixels in each row are the items; runs of neighbouring rows that touch, corners included, are joined by
    hooking the higher root to the lower until nothing changes.

    Args:
        mask: (H, W), not 0 = in a region.

    Returns:
        (H, W) int32 with 0 outside and 1..count inside, and count.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask != 0
    change = np.diff(padded, axis=1)  # (H, W + 1) 1 where a run starts, -1 just past its end
    rows, starts = np.nonzero(change == 1)  # (runs,) in raster order
    ends = np.nonzero(change == -1)[1]  # (runs,) exclusive
    # one key for (row, column); a run of the next row touches run i if its end >= starts[i], its start <= ends[i]
    row_keys = rows * (width + 2)
    low = np.searchsorted(row_keys + ends, row_keys + (width + 2) + starts, "left")
    high = np.searchsorted(row_keys + starts, row_keys + (width + 2) + ends, "right")
    touching = high - low  # (runs,)
    upper = np.repeat(np.arange(len(rows)), touching)  # (pairs,)
    lower = np.arange(len(upper)) + np.repeat(low - np.cumsum(touching) + touching, touching)  # (pairs,)
    root = np.arange(len(rows))
    while not np.array_equal(root[upper], root[lower]):
        first, second = root[upper], root[lower]
        np.minimum.at(root, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(root, root[root]):
            root = root[root]
    numbers = np.cumsum(root == np.arange(len(rows)))[root]  # (runs,) a root is its region's first run
    steps = np.zeros((height, width + 1), np.int32)
    steps[rows, starts] = numbers
    steps[rows, ends] = -numbers  # a run never starts where another ends
    return np.cumsum(steps, axis=1, dtype=np.int32)[:, :-1], int(numbers.max(initial=0))


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _flags(labels: np.ndarray) -> np.ndarray:
    """Labels as bool, refusing anything but 0 and 1."""
    flags = labels.astype(bool)
    if not np.array_equal(flags, labels):
        raise InputError("labels must be 0 (normal) or 1 (anomalous)")
    return flags


def _sorted(scores: np.ndarray) -> np.ndarray:
    """Ascending in place; NaN sorts last, so one look finds it."""
    scores.sort()
    if scores.size and np.isnan(scores[-1]):
        raise InputError("a score is NaN: metrics need a number for every item")
    return scores


def _by_class(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Ascending scores of the anomalous and of the normal items."""
    flags, values = np.asarray(labels), np.asarray(scores)
    if flags.shape != values.shape or flags.ndim != 1:
        raise InputError(f"labels {flags.shape} and scores {values.shape} must be two lists of one length")
    flags = _flags(flags)
    return _sorted(values[flags]), _sorted(values[~flags])


def _pixels(masks: Masks, maps: Maps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending scores of anomalous pixels, the weight of each in PRO, and ascending scores of normal pixels.

    A pixel of a region of a pixels weighs 1/a here; ``_aupro`` divides by the number of regions, the weights' sum.
    """
    if len(masks) != len(maps):
        raise InputError(f"{len(masks)} masks for {len(maps)} anomaly maps: one each is needed")
    anomalous: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    normal: list[np.ndarray] = []
    for index, (mask, scores) in enumerate(zip(masks, maps)):
        if mask.ndim != 2 or mask.shape != scores.shape:
            raise InputError(f"mask {index} is {mask.shape}, its map {scores.shape}: both must be the same (H, W)")
        if not np.any(mask):
            normal.append(scores.ravel())
            continue
        regions, _ = label_regions(mask)
        inside = regions > 0
        anomalous.append(scores[inside])
        weights.append(1 / np.bincount(regions[inside])[regions[inside]])
        normal.append(scores[~inside])
    values = _joined(anomalous)
    order = np.argsort(values)
    return _sorted(values[order]), _joined(weights)[order], _sorted(_joined(normal))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0)


def _counts(anomalous: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds, highest first, at the distinct anomalous scores, with TP and FP of score >= threshold."""
    thresholds, first = np.unique(anomalous, return_index=True)
    true_positives = len(anomalous) - first
    false_positives = len(normal) - np.searchsorted(normal, thresholds, "left")
    return thresholds[::-1], true_positives[::-1], false_positives[::-1]


def _auroc(anomalous: np.ndarray, normal: np.ndarray) -> float:
    if not len(anomalous) or not len(normal):
        return math.nan
    below = int(np.searchsorted(normal, anomalous, "left").sum(dtype=np.int64))
    below_or_equal = int(np.searchsorted(normal, anomalous, "right").sum(dtype=np.int64))
    return (below + below_or_equal) / (2 * len(anomalous) * len(normal))


def _average_precision(anomalous: np.ndarray, normal: np.ndarray) -> float:
    if not len(anomalous) or not len(normal):
        return math.nan
    _, true_positives, false_positives = _counts(anomalous, normal)
    recall_steps = np.diff(true_positives, prepend=0) / len(anomalous)
    return float(np.sum(recall_steps * (true_positives / (true_positives + false_positives))))


def _f1_max(anomalous: np.ndarray, normal: np.ndarray) -> tuple[float, float]:
    if not len(anomalous) or not len(normal):
        return math.nan, math.nan
    thresholds, true_positives, false_positives = _counts(anomalous, normal)
    f1 = 2 * true_positives / (true_positives + false_positives + len(anomalous))  # TP + FN = all anomalous
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def _aupro(anomalous: np.ndarray, weights: np.ndarray, normal: np.ndarray, limit: float) -> float:
    if not len(anomalous) or not len(normal):
        return math.nan
    thresholds, first = np.unique(anomalous, return_index=True)
    covered = np.cumsum(np.add.reduceat(weights, first)[::-1])  # highest threshold first
    pro_after = covered / covered[-1]  # (thresholds,) PRO once this threshold's pixels count
    pro_before = np.concatenate([[0.0], pro_after[:-1]])
    # going down, normal scores above the threshold move FPR alone; those equal to it move it along with PRO
    fpr_before = ((len(normal) - np.searchsorted(normal, thresholds, "right")) / len(normal))[::-1]
    fpr_after = ((len(normal) - np.searchsorted(normal, thresholds, "left")) / len(normal))[::-1]
    fpr = np.concatenate([[0.0], np.stack([fpr_before, fpr_after], 1).ravel(), [1.0]])
    pro = np.concatenate([[0.0], np.stack([pro_before, pro_after], 1).ravel(), [1.0]])
    width = np.diff(fpr)
    kept = np.clip(limit - fpr[:-1], 0, width)  # the part of each segment left of the limit
    slope = np.divide(np.diff(pro), width, out=np.zeros_like(width), where=width > 0)
    return float(np.sum(kept * (pro[:-1] + slope * kept / 2)) / limit)
