"""Metrics of a model on labelled images.

Flows in: a ``Model`` and a ``Dataset``. Flows out: the metrics of DESIGN section 8 and every image's verdict. The
threshold is the model's own; F1Max alone looks for the best one, as its name says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.images import Dataset, Sample, read_mask, resize_mask
from tinyvad.metrics import image_metrics, pixel_metrics
from tinyvad.model import Model, Prediction


@dataclass(frozen=True, eq=False)
class Verdict:
    """One test image: what it is, and the integers of its grid map (the pictures are made from them again)."""

    sample: Sample
    pred_score: float
    pred_label: int
    raw_score: int
    grid_map: np.ndarray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``metrics`` with the JSON names of ``tinyvad eval``, verdicts in the order of the dataset, skipped files."""

    metrics: dict[str, Any]
    verdicts: list[Verdict]
    skipped: list[tuple[Path, str]]


def evaluate(
    model: Model,
    dataset: Dataset,
    on_error: str = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a dataset's test images.

    Raises:
        InputError: there are no test images, or one can't be read.
    """
    if not dataset.test:
        raise InputError(
            f"{dataset.root}: no test images; expected test/good and test/<defect>, or folders of defects beside good"
        )
    samples = {sample.path: sample for sample in dataset.test}
    skipped: list[tuple[Path, str]] = []
    verdicts, masks, maps = [], [], []
    has_masks = any(sample.mask is not None for sample in dataset.test)
    size = (model.preprocessing.height, model.preprocessing.width)
    start = time.perf_counter()
    seconds = 0.0
    for prediction in model.stream(list(samples), on_error=on_error, skipped=skipped):
        assert prediction.image_path is not None
        sample = samples[prediction.image_path]
        verdicts.append(_verdict(sample, prediction))
        if has_masks and (sample.label == 0 or sample.mask is not None):
            mask = np.zeros(size, bool) if sample.mask is None else resize_mask(read_mask(sample.mask), *size)
            masks.append(mask)
            maps.append(prediction.anomaly_map)
        seconds = time.perf_counter() - start
        if progress is not None:
            progress(len(verdicts), len(samples))
    labels = np.array([verdict.sample.label for verdict in verdicts])
    raw = np.array([verdict.raw_score for verdict in verdicts], np.int64)
    metrics: dict[str, Any] = dict(image_metrics(labels, raw))
    pixel_names = ("pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO")
    metrics.update(pixel_metrics(masks, maps) if masks else dict.fromkeys(pixel_names))
    predicted = raw >= model.threshold
    metrics["threshold"] = model.threshold_score
    metrics["false_alarms"] = int((predicted & (labels == 0)).sum())
    metrics["missed"] = int((~predicted & (labels == 1)).sum())
    metrics["seconds_per_image"] = seconds / len(verdicts)
    metrics["engine"] = model.engine.name
    return Evaluation(metrics, verdicts, skipped)


def _verdict(sample: Sample, prediction: Prediction) -> Verdict:
    return Verdict(sample, prediction.pred_score, prediction.pred_label, prediction.raw_score, prediction.grid_map)
