"""Metrics: against scikit-learn, scipy, a slow AUPRO over all thresholds, and answers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from tinyvad.errors import InputError
from tinyvad.metrics import (
    aupro,
    auroc,
    average_precision,
    f1_floor,
    f1_max,
    image_metrics,
    label_regions,
    pixel_metrics,
)

EIGHT = np.ones((3, 3), int)


def labelled_scores(seed: int, tied: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.r_[0, 1, rng.random(rng.integers(0, 200)) < rng.random()]).astype(int)
    scores = rng.normal(labels, 1.0)
    return labels, np.round(scores * 2) if tied else scores


def slow_aupro(masks: np.ndarray, maps: np.ndarray, limit: float) -> float:
    """The definition, one threshold at a time; the curve at ``limit`` by np.interp."""
    regions = []
    for mask, scores in zip(masks, maps):
        numbers, count = ndimage.label(mask, structure=EIGHT)
        regions += [scores[numbers == k] for k in range(1, count + 1)]
    normal = maps[~masks]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        fpr.append((normal >= threshold).mean())
        pro.append(np.mean([(region >= threshold).mean() for region in regions]))
    # split so that vertical steps beyond the limit do not matter
    inside = [k for k, value in enumerate(fpr) if value <= limit]
    x, y = [fpr[k] for k in inside], [pro[k] for k in inside]
    if x[-1] < limit:
        after = len(inside)
        y.append(y[-1] + (pro[after] - y[-1]) * (limit - x[-1]) / (fpr[after] - x[-1]))
        x.append(limit)
    return sum((x[k + 1] - x[k]) * (y[k] + y[k + 1]) / 2 for k in range(len(x) - 1)) / limit


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_scikit_learn_agrees(seed: int, tied: bool) -> None:
    labels, scores = labelled_scores(seed, tied)
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    best, threshold = f1_max(labels, scores)
    assert best == pytest.approx(f1.max(), abs=1e-12)
    assert threshold == thresholds[f1 >= f1.max() - 1e-12].max()
    called = scores >= threshold
    true_positives = (called & (labels == 1)).sum()
    assert best == pytest.approx(2 * true_positives / (called.sum() + labels.sum()), abs=1e-15)


def test_known_small_answers() -> None:
    labels, scores = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]
    assert auroc(labels, scores) == 0.75  # three of four pairs in order
    assert average_precision(labels, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert f1_max(labels, scores) == (0.8, 0.35)
    assert f1_floor(labels) == pytest.approx(2 / 3)
    assert auroc([0, 1], [1.0, 0.0]) == 0.0  # not flipped
    assert auroc([0, 1, 1], [5, 5, 5]) == 0.5
    assert f1_max([1, 0], [2.0, 2.0]) == (pytest.approx(2 / 3), 2.0)
    assert auroc([0, 1], [-math.inf, math.inf]) == 1.0


@pytest.mark.parametrize(("normal", "anomalous", "floor"), [(20, 63, 0.863), (100, 100, 0.667), (58, 92, 0.760)])
def test_f1_floor_is_the_f1_of_all_anomalous(normal: int, anomalous: int, floor: float) -> None:
    labels = [0] * normal + [1] * anomalous
    assert f1_floor(labels) == pytest.approx(floor, abs=5e-4)
    assert f1_max(labels, np.zeros(len(labels)))[0] == pytest.approx(f1_floor(labels), abs=1e-15)


def test_perfect_map_has_aupro_one(rng: np.random.Generator) -> None:
    masks = np.zeros((3, 20, 20), bool)
    masks[0, 2:5, 3:9] = masks[0, 10:12, 10:12] = masks[1, :4, 16:] = True
    assert aupro(masks, masks.astype(np.float32)) == 1.0
    assert aupro(masks, masks + 0.5 * rng.random(masks.shape)) == pytest.approx(1.0, abs=1e-12)


def test_constant_map_has_aupro_015() -> None:
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 1:3, 1:3] = True
    assert aupro(masks, np.full(masks.shape, 7.0)) == pytest.approx(0.15, abs=1e-15)
    assert aupro(masks, np.zeros(masks.shape), limit=1.0) == pytest.approx(0.5, abs=1e-15)


def test_one_region_on_a_line_by_hand() -> None:
    # 10 normal pixels and a region of 4 in one row; scores from high to low:
    # region 9, normal 8, region 7, region and normal 6, normal 5 4 3 2, region 1, normal 0 ...
    mask = np.array([[1, 1, 1, 1] + [0] * 10], bool)
    scores = np.array([[9, 7, 6, 1, 8, 6, 5, 4, 3, 2, 0, 0, 0, 0]], float)
    # (FPR, PRO): (0, 1/4) (.1, 1/4) (.1, 2/4) (.2, 3/4 along a slope) (.3, 3/4)
    expected = (0.1 * 0.25 + 0.1 * (0.5 + 0.75) / 2 + 0.1 * 0.75) / 0.3
    assert aupro([mask], [scores]) == pytest.approx(expected, abs=1e-15)
    # a limit inside a slope: half of the second step
    half = (0.1 * 0.25 + 0.05 * (0.5 + 0.625) / 2) / 0.15
    assert aupro([mask], [scores], limit=0.15) == pytest.approx(half, abs=1e-15)


def test_small_regions_weigh_as_much_as_large_ones() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:4] = True  # 40 pixels, found
    mask[9, 9] = True  # 1 pixel, scores below everything
    scores = np.where(mask, 1.0, 0.5)
    scores[9, 9] = 0.0
    assert aupro([mask], [scores]) == pytest.approx(0.5, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([2, 10, 1000]))
def test_aupro_equals_its_definition(seed: int, limit: float, levels: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 7, 9)) < 0.15
    masks[0, 0, 0], masks[1] = True, False
    maps = np.round((rng.random(masks.shape) + 0.3 * masks) * levels)
    assert aupro(masks, maps, limit) == pytest.approx(slow_aupro(masks, maps, limit), abs=1e-12)


def test_pixel_metrics_equal_the_flat_ones(rng: np.random.Generator) -> None:
    masks = [rng.random(size) < 0.1 for size in ((12, 9), (30, 20), (8, 8))]  # sizes may differ
    masks[2][:] = False
    maps = [np.round(rng.normal(mask, 1.0), 1).astype(np.float32) for mask in masks]
    labels = np.concatenate([mask.ravel() for mask in masks])
    scores = np.concatenate([scores.ravel() for scores in maps])
    result = pixel_metrics(masks, maps)
    assert list(result) == ["pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO"]
    assert result["pixel_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["pixel_AP"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert result["pixel_F1Max"] == f1_max(labels, scores)[0]
    assert result["pixel_AUPRO"] == aupro(masks, maps)


@pytest.mark.parametrize("change", [lambda s: 3 * s - 7, np.exp, lambda s: s**3, lambda s: (s * 8).astype(np.int64)])
def test_increasing_maps_change_nothing(rng: np.random.Generator, change) -> None:  # type: ignore[no-untyped-def]
    masks = rng.random((4, 16, 16)) < 0.1
    maps = np.round(rng.normal(masks, 1.0) * 8) / 8  # exact in every one of these changes
    before, after = pixel_metrics(masks, maps), pixel_metrics(masks, change(maps))
    assert before == after
    labels, scores = masks.any(axis=(1, 2)) * [1, 0, 1, 1], maps.max(axis=(1, 2))
    assert image_metrics(labels, scores) == image_metrics(labels, change(scores))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_regions_equal_scipy(height: int, width: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    expected, count = ndimage.label(mask, structure=EIGHT)
    regions, found = label_regions(mask)
    assert found == count and regions.dtype == np.int32 and np.array_equal(regions, expected)


def test_regions_of_a_spiral_and_a_comb() -> None:
    comb = np.zeros((40, 81), bool)
    comb[:, ::2] = True  # 41 teeth, joined only by the last row
    comb[-1] = True
    assert label_regions(comb)[1] == 1 and label_regions(comb[:-1])[1] == 41
    spiral = np.zeros((41, 41), bool)
    for k in range(0, 20, 2):
        spiral[k, k : 41 - k] = spiral[k : 41 - k, 40 - k] = spiral[40 - k, k : 41 - k] = True
        spiral[k + 2 : 41 - k, k] = True
        spiral[k + 2, k : k + 2] = True
    expected, count = ndimage.label(spiral, structure=EIGHT)
    assert label_regions(spiral)[1] == count and np.array_equal(label_regions(spiral)[0], expected)


def test_image_metrics_keys_and_counts() -> None:
    result = image_metrics([0, 1, 1], [0.0, 1.0, 2.0])
    assert result == {
        "image_AUROC": 1.0,
        "image_F1Max": 1.0,
        "image_AP": 1.0,
        "image_F1_floor": 0.8,
        "n_normal": 1,
        "n_anomalous": 2,
    }


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1, 1]])
def test_an_absent_class_gives_none(labels: list[int]) -> None:
    scores = np.arange(len(labels), dtype=float)
    result = image_metrics(labels, scores)
    assert [result[key] for key in ("image_AUROC", "image_F1Max", "image_AP", "image_F1_floor")] == [None] * 4
    assert (result["n_normal"], result["n_anomalous"]) == (labels.count(0), labels.count(1))
    assert math.isnan(auroc(labels, scores)) and math.isnan(f1_max(labels, scores)[1])


@pytest.mark.parametrize("masks", [np.zeros((2, 4, 4), bool), np.ones((2, 4, 4), bool), np.zeros((0, 4, 4), bool)])
def test_an_absent_pixel_class_gives_none(masks: np.ndarray) -> None:
    assert set(pixel_metrics(masks, np.zeros(masks.shape)).values()) == {None}


def test_bad_input_is_named() -> None:
    mask = np.zeros((4, 4), bool)
    for call, message in [
        (lambda: auroc([0, 1], [0.0]), "one length"),
        (lambda: auroc([0, 2], [0.0, 1.0]), "labels must be 0"),
        (lambda: f1_floor([0, 3]), "labels must be 0"),
        (lambda: average_precision([0, 1], [0.0, math.nan]), "NaN"),
        (lambda: aupro([mask], [np.zeros((4, 5))]), "mask 0"),
        (lambda: aupro([mask], []), "1 masks for 0"),
        (lambda: aupro([mask], [np.full((4, 4), math.nan)]), "NaN"),
        (lambda: aupro([mask], [np.zeros((4, 4))], limit=0), "limit 0"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_arguments_are_left_as_they_were(rng: np.random.Generator) -> None:
    labels, scores = np.array([0, 1, 0, 1]), rng.random(4)
    masks, maps = rng.random((2, 5, 5)) < 0.3, rng.random((2, 5, 5))
    copies = [array.copy() for array in (labels, scores, masks, maps)]
    image_metrics(labels, scores)
    pixel_metrics(masks, maps)
    pixel_metrics(np.zeros_like(masks), maps)
    assert all(np.array_equal(a, b) for a, b in zip(copies, (labels, scores, masks, maps)))
