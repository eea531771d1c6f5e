"""The matrix that is stored of every run, and continual learning's metrics as functions of it.

Flows in: R[i][j], a metric (a higher one is better) of evaluation unit j, one category, after step i was learnt; NaN where
it was not evaluated or is not defined. Flows out: floats, and JSON. Nothing is evaluated twice: every number of a table can
be worked out again from the stored matrix, and each metric has one sentence that is printed under the table.

Two rules hold in all of them (what is NaN says nothing): units and steps whose value is NaN where it is needed are left
out, and a mean of nothing is NaN. A step with several units counts once in the metrics over steps, as A[i][s], the mean of
its units; in those over units each unit counts once. Sources: Lopez-Paz and Ranzato, GEM (NeurIPS 2017); Chaudhry et al.,
Riemannian Walk (ECCV 2018); Tang et al., IUF (ECCV 2024).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyvad.errors import InputError


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """One metric of one run.

    Attributes:
        metric: its name, such as 'image_AUROC'.
        steps: (T) names of the steps learnt, in order.
        units: (U) names of the evaluation units.
        step_of: (U) the step in which each unit is learnt.
        values: (T, U) float64.
        chance: (U) float64, what each unit scores without any learning (AUROC .5, F1 its floor), or None.
    """

    metric: str
    steps: tuple[str, ...]
    units: tuple[str, ...]
    step_of: tuple[int, ...]
    values: np.ndarray
    chance: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.units))
        if 0 in shape or self.values.shape != shape or len(self.step_of) != shape[1]:
            raise InputError(f"matrix of {self.metric}: values {self.values.shape} for {shape[0]} steps x {shape[1]} units")
        if any(not 0 <= step < shape[0] for step in self.step_of):
            raise InputError(f"matrix of {self.metric}: a unit's step {self.step_of} is outside 0..{shape[0] - 1}")
        if np.isinf(self.values).any():
            raise InputError(f"matrix of {self.metric}: a value is infinite; leave NaN where there is none")
        if self.chance is not None and self.chance.shape != (shape[1],):
            raise InputError(f"matrix of {self.metric}: {self.chance.shape} chance levels for {shape[1]} units")

    @property
    def by_step(self) -> np.ndarray:
        """(T, T) float64: A[i][s], the mean of step s's units after step i; NaN where none was evaluated."""
        owner = np.array(self.step_of)
        return np.stack([_mean(self.values[:, owner == step], axis=1) for step in range(len(self.steps))], axis=1)

    def after(self, step: int) -> ScoreMatrix:
        """The matrix as it was when ``step`` was the last one learnt; for the curve of a metric over the steps."""
        if not 0 <= step < len(self.steps):
            raise InputError(f"matrix of {self.metric}: step {step} is outside 0..{len(self.steps) - 1}")
        kept = [unit for unit, owner in enumerate(self.step_of) if owner <= step]
        return ScoreMatrix(
            self.metric,
            self.steps[: step + 1],
            tuple(self.units[unit] for unit in kept),
            tuple(self.step_of[unit] for unit in kept),
            self.values[: step + 1, kept],
            None if self.chance is None else self.chance[kept],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN is None."""
        return {
            "metric": self.metric,
            "steps": list(self.steps),
            "units": list(self.units),
            "step_of": list(self.step_of),
            "values": [[None if np.isnan(value) else float(value) for value in row] for row in self.values],
            "chance": None if self.chance is None else [None if np.isnan(v) else float(v) for v in self.chance],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ScoreMatrix:
        """The inverse of ``to_dict``, to the bit.

        Raises:
            InputError: a field is missing, of a wrong type or shape.
        """
        try:
            chance = data["chance"]
            return ScoreMatrix(
                str(data["metric"]),
                tuple(str(name) for name in data["steps"]),
                tuple(str(name) for name in data["units"]),
                tuple(int(step) for step in data["step_of"]),
                np.array(data["values"], np.float64),  # None becomes NaN
                None if chance is None else np.array(chance, np.float64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"a stored matrix is damaged ({type(error).__name__}: {error}); run it again") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> ScoreMatrix:
        """Raises InputError as ``from_dict``, and for what is no JSON."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"a stored matrix is no JSON ({error}); run it again") from error
        return ScoreMatrix.from_dict(data)


def square(
    values: npt.ArrayLike, metric: str = "image_AUROC", names: Sequence[str] = (), chance: npt.ArrayLike | None = None
) -> ScoreMatrix:
    """A matrix of T steps with one unit each.

    Args:
        values: (T, T).
        names: of steps and units; numbered if left out.
        chance: (T) or one for all.
    """
    array = np.array(values, np.float64)
    steps = tuple(names) or tuple(str(step) for step in range(len(array)))
    levels = None if chance is None else np.broadcast_to(np.asarray(chance, np.float64), len(steps))
    return ScoreMatrix(metric, steps, steps, tuple(range(len(steps))), array, levels)


def average_final(matrix: ScoreMatrix) -> float:
    """Mean over all units of the score after the last step."""
    return float(_mean(matrix.values[-1]))


def relative_forgetting(matrix: ScoreMatrix) -> float:
    """Mean over the units of earlier steps of the share lost since their best from their own step on (0: left out)."""
    best = _best(matrix.values, matrix.step_of)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(best == 0, np.nan, 1 - matrix.values[-1] / best)  # what never worked can't be forgotten
    return float(_mean(lost))


def acc_steps(matrix: ScoreMatrix) -> float:
    """Mean over the steps, each counting once, of the mean final score of the step's units (IUF)."""
    return float(_mean(matrix.by_step[-1]))


def fm_steps(matrix: ScoreMatrix) -> float:
    """Mean over all steps but the last of the best mean score of its units, from its own step on, minus the final (IUF)."""
    steps = matrix.by_step
    return float(_mean(_best(steps, range(len(steps))) - steps[-1]))


def fm_units(matrix: ScoreMatrix) -> float:
    """Mean over the units learnt before the last step of the best score from their own step on, minus the final one."""
    return float(_mean(_best(matrix.values, matrix.step_of) - matrix.values[-1]))


def chaudhry_forgetting(matrix: ScoreMatrix) -> float:
    """Mean over all steps but the last of the best earlier mean score, before it was learnt too, minus the final."""
    steps = matrix.by_step
    best = _best(steps, [0] * (len(steps) - 1) + [len(steps) - 1])
    return float(_mean(best - steps[-1]))


def backward_transfer(matrix: ScoreMatrix) -> float:
    """Mean over all steps but the last of the final mean score minus the one just after the step was learnt."""
    steps = matrix.by_step
    return float(_mean((steps[-1] - np.diagonal(steps))[:-1]))


def forward_transfer(matrix: ScoreMatrix) -> float:
    """Mean over the units after the first step of the score just before they are learnt, minus chance."""
    if matrix.chance is None:
        return float("nan")
    later = [(unit, step) for unit, step in enumerate(matrix.step_of) if step > 0]
    gains = [matrix.values[step - 1, unit] - matrix.chance[unit] for unit, step in later]
    return float(_mean(np.array(gains)))


class Summary(NamedTuple):
    """A metric of the matrix and the sentence that defines it."""

    function: Callable[[ScoreMatrix], float]
    sentence: str


SUMMARIES = {
    name: Summary(function, (function.__doc__ or "").strip())
    for name, function in (
        ("average_final", average_final),
        ("relative_forgetting", relative_forgetting),
        ("ACC", acc_steps),
        ("FM", fm_steps),
        ("FM_units", fm_units),
        ("forgetting_chaudhry", chaudhry_forgetting),
        ("BWT", backward_transfer),
        ("FWT", forward_transfer),
    )
}


def summarise(matrix: ScoreMatrix) -> dict[str, float | None]:
    """All metrics of ``SUMMARIES`` by name; None where a metric is not defined."""
    values = {name: summary.function(matrix) for name, summary in SUMMARIES.items()}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def confusion(true: npt.ArrayLike, chosen: npt.ArrayLike, tasks: int) -> np.ndarray:
    """How often items of each task were given to each task.

    Args:
        true: (n,) true task of each image.
        chosen: (n,) the task that was chosen, or (n, H, W) where every patch chooses.
        tasks: how many there are.

    Returns:
        (tasks, tasks) int64, row: true, column: chosen; counts of images, or of patches.

    Raises:
        InputError: lengths differ, or a task is out of range.
    """
    truth, choice = np.asarray(true), np.asarray(chosen)
    if truth.ndim != 1 or choice.ndim < 1 or len(choice) != len(truth):
        raise InputError(f"routing: {choice.shape} chosen tasks for {truth.shape} images")
    counts = np.zeros((tasks, tasks), np.int64)
    if truth.size:
        if min(truth.min(), choice.min()) < 0 or max(truth.max(), choice.max()) >= tasks:
            raise InputError(f"routing: a task number is outside 0..{tasks - 1}")
        np.add.at(counts, (np.repeat(truth, choice[0].size), choice.reshape(-1)), 1)
    return counts


def routing_accuracy(counts: np.ndarray) -> float:
    """Share of images (patches) that were scored by their own task, the mean over tasks; from ``confusion``."""
    return float(_mean(routing_per_task(counts)))


def routing_per_task(counts: np.ndarray) -> np.ndarray:
    """(tasks,) share of each task's items that went to it; NaN for a task without items."""
    totals = counts.sum(1)
    return np.where(totals > 0, np.diagonal(counts) / np.maximum(totals, 1), np.nan)


def _best(values: np.ndarray, first: Sequence[int] | range) -> np.ndarray:
    """(columns,) the largest of each column from row ``first`` to the last but one; NaN where there is none."""
    best = np.full(values.shape[1], np.nan)
    for column, row in enumerate(first):
        seen = values[row:-1, column]
        seen = seen[~np.isnan(seen)]
        if seen.size:
            best[column] = seen.max()
    return best


def _mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of what is not NaN, NaN where there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's "mean of empty slice"
        return np.asarray(np.nanmean(values, axis=axis) if values.size else np.full(_reduced(values, axis), np.nan))


def _reduced(values: np.ndarray, axis: int | None) -> tuple[int, ...]:
    return () if axis is None else values.shape[:axis] + values.shape[axis + 1 :]
