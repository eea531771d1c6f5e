"""Metrics of a model on labelled images.

Flows in: a ``Model`` and one ``Dataset``, or one for each of its tasks. Flows out: metrics by name and every image's
verdict. The threshold is the model's own; F1Max alone looks for the best one, as its name says.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.images import Dataset, Sample, read_mask, resize_mask
from tinyvad.metrics import image_metrics, pixel_metrics
from tinyvad.model import Model, Prediction

PIXEL_METRICS = ("pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO")


@dataclass(frozen=True, eq=False)
class Verdict:
    """One test image: what it is, and the integers of its grid map (the pictures are made from them again)."""

    sample: Sample
    pred_score: float
    pred_label: int
    raw_score: int
    grid_map: np.ndarray
    task: str  # that it was scored by


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
    task: str | None = None,
) -> Evaluation:
    """Score a dataset's test images.

    Args:
        task: score all images by this one (known identity); None: the model finds each image's.

    Returns:
        The metrics ``image_AUROC image_F1Max image_AP n_normal n_anomalous image_F1_floor pixel_AUROC pixel_F1Max
        pixel_AP pixel_AUPRO threshold false_alarms missed seconds_per_image engine``; where the model has several tasks
        also ``routing_accuracy``: share of the images that it took for the task named like the dataset, None where
        ``task`` is given or there is no such task. ``threshold`` is that task's, else the first one's.

    Raises:
        InputError: there are no test images, one can't be read, or the model has no such task.
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
    for prediction in model.stream(list(samples), on_error=on_error, skipped=skipped, task=task):
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
    metrics: dict[str, Any] = quality(labels, raw, masks, maps)
    predicted = np.array([verdict.pred_label for verdict in verdicts]) == 1
    own = task or (dataset.name if dataset.name in model.task_names else model.task_names[0])
    metrics["threshold"] = model.task_threshold(model.task_number(own))
    metrics["false_alarms"] = int((predicted & (labels == 0)).sum())
    metrics["missed"] = int((~predicted & (labels == 1)).sum())
    metrics["seconds_per_image"] = seconds / len(verdicts)
    metrics["engine"] = model.engine.name
    if len(model.task_names) > 1:
        routed = task is None and dataset.name in model.task_names
        hits = [verdict.task == dataset.name for verdict in verdicts]
        metrics["routing_accuracy"] = sum(hits) / len(hits) if routed else None
    return Evaluation(metrics, verdicts, skipped)


def evaluate_tasks(
    model: Model,
    datasets: Sequence[Dataset],
    on_error: str = "stop",
    progress: Callable[[str, int, int], None] | None = None,
    task: str | None = None,
) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
    """``evaluate`` for all the tasks of a model that have a dataset of their name.

    Args:
        progress: name of the task, images done, images in all. task: as for ``evaluate``.

    Returns:
        The JSON object of ``tinyvad eval``, and the skipped files. ``tasks``: name -> metrics, in the model's order;
        ``mean``: the mean over tasks of every metric (None where a task has none); ``routing_accuracy``: share of all
        images that were taken for their own task, None where ``task`` is given; ``not_evaluated``: tasks without a
        dataset; ``engine``.

    Raises:
        InputError: no task has a dataset, or one can't be evaluated.
    """
    named = {dataset.name: dataset for dataset in datasets}
    found = [name for name in model.task_names if name in named]
    if not found:
        raise InputError(f"no category is named like a task ({', '.join(model.task_names)}); there are {', '.join(named)}")
    tasks: dict[str, dict[str, Any]] = {}
    skipped: list[tuple[Path, str]] = []
    hits = images = 0
    for name in found:
        tell = None if progress is None else functools.partial(progress, name)
        result = evaluate(model, named[name], on_error, tell, task)
        tasks[name] = result.metrics
        skipped += result.skipped
        hits += sum(verdict.task == name for verdict in result.verdicts)
        images += len(result.verdicts)
    return {
        "tasks": tasks,
        "mean": {key: _mean([metrics[key] for metrics in tasks.values()]) for key in tasks[found[0]] if key != "engine"},
        "routing_accuracy": hits / images if task is None else None,
        "not_evaluated": [name for name in model.task_names if name not in named],
        "engine": model.engine.name,
    }, skipped


def _mean(values: list[Any]) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))



def quality(
    labels: np.ndarray, scores: np.ndarray, masks: Sequence[np.ndarray], maps: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Image figures of all images, pixel figures of the marked ones: None each where there are no masks."""
    pixels = pixel_metrics(masks, maps) if len(masks) else dict.fromkeys(PIXEL_METRICS)
    return {**image_metrics(labels, scores), **pixels}


def _verdict(sample: Sample, prediction: Prediction) -> Verdict:
    return Verdict(
        sample, prediction.pred_score, prediction.pred_label, prediction.raw_score, prediction.grid_map, prediction.task
    )
