"""Bounds of the PaDiM family over tasks: all images at once, and the last task alone.

Flows in: int8 embeddings (n, H, W, D), one task after another. Flows out: distance maps in real units.

``PadimJoint`` is the bound of one model: all that a fit needs of all images are their sums, which it keeps. For the forms
without a projection it equals ``PadimUni``; with padim-compact its projection too comes from all tasks.
``PadimFineTuning`` is the lower bound: each task replaces the model of the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tinyvad.continual.base import Scored
from tinyvad.continual.padim import OneModel
from tinyvad.detectors.gaussian import GaussianStatistics


class PadimJoint(OneModel):
    """The bound of one model: the batch detector on all images of all tasks at once, from their merged sums."""

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Add a task's sums of the embedding itself and fit anew, projection included."""
        detector = self.form.detector(self.context)
        statistics = detector.collect(embeddings)
        if self.task_names:
            statistics = self.statistics.merge(statistics)
        self.statistics: GaussianStatistics = statistics
        self.scorer = detector.fit_statistics(statistics).to_scorer()
        self.task_names.append(task)

    def _save(self) -> dict[str, np.ndarray]:
        s = self.statistics
        return {**super()._save(), "count": np.array(s.count, np.int64), "first": s.first, "second": s.second}

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._load(arrays)
        self.statistics = GaussianStatistics(int(arrays["count"]), arrays["first"], arrays["second"])


class PadimFineTuning(OneModel):
    """The lower bound: the batch detector of the last task, all earlier ones forgotten."""

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Replace the model."""
        self.scorer = self.form.detector(self.context).fit(embeddings).to_scorer()
        self.task_names.append(task)

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Score (n, H, W, D) int8 by the last task's model."""
        maps, _ = super().score(embeddings, task)
        return Scored(maps, np.full(len(embeddings), len(self.task_names) - 1, np.int64))
