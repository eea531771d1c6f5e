"""PaDiM over tasks as first published: running means of the tasks' means and of their inverse covariances.

Flows in: int8 embeddings (n, H, W, D), one task after another. Flows out: distance maps in real units, in float64.

    mu = (1/T) sum_t mu_t,   A = (1/T) sum_t Sigma_t^-1,   distance^2 = (x - mu)' A (x - mu)

Every task weighs the same whatever its number of images, and the spread between the tasks' means is missing: it is biased.
A baseline, to show what the exact merge (``PadimUni``) corrects. Source: the continual PaDiM that the edge benchmark
corrects; that it averages inverses is inferred from the benchmark's remark that covariances are to be averaged instead,
which ``of='cov'`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from threadpoolctl import threadpool_limits

from tinyvad.continual.base import Context, Scored
from tinyvad.continual.padim import NO_TASK, Form, PadimMethod
from tinyvad.detectors.gaussian import symmetric, upper_triangle
from tinyvad.detectors.padim import Padim, draw_channels
from tinyvad.detectors.task_gaussians import Space, task_bytes
from tinyvad.errors import InputError


class PadimOriginal(PadimMethod):
    """The biased running mean.

    Args:
        form: 'padim' or 'padim-lite'.
        of: 'inverse' averages inverse covariances, 'cov' covariances.
    """

    def __init__(self, context: Context, form: Form, of: str = "inverse") -> None:
        if form.name == "padim-compact":
            raise InputError("the original continual PaDiM has no compact form; use PadimUni or PadimMulti")
        if of not in ("inverse", "cov"):
            raise InputError(f"no average called {of}; choose inverse or cov")
        super().__init__(context, form)
        self.of = of
        self._lite = form.name == "padim-lite"
        self._indices = draw_channels(len(context.steps), form.dimensions, context.seed)

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Move both running means one task on."""
        detector = self.form.detector(self.context)
        assert isinstance(detector, Padim)
        with threadpool_limits(1, user_api="blas"):
            statistics = detector.fit(embeddings).statistics_
            matrix = detector.covariance_()
            if self.of == "inverse":
                matrix = self._invert(matrix)
            if not self._lite:  # exactly symmetric, as it is stored
                matrix = symmetric(upper_triangle(matrix), len(self._indices))
        t = len(self.task_names)
        if t:
            self.mean: np.ndarray = (self.mean * t + statistics.mean) / (t + 1)  # (H, W, d)
            self.matrix: np.ndarray = (self.matrix * t + matrix) / (t + 1)  # (H, W, d, d), lite (H, W, d)
        else:
            self.mean, self.matrix = statistics.mean, matrix
        self.task_names.append(task)

    def _invert(self, matrix: np.ndarray) -> np.ndarray:
        return 1 / matrix if self._lite else np.linalg.inv(matrix)

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Score (n, H, W, D) by the one model; a task that is known changes nothing."""
        self.check_task(task)
        t = (embeddings[..., self._indices] - self.mean) * self.context.steps[self._indices]  # (n, H, W, d)
        with threadpool_limits(1, user_api="blas"):
            a = self.matrix if self.of == "inverse" else self._invert(self.matrix)
            if self._lite:
                squared = (t * t * a).sum(-1)
            else:
                columns = t.transpose(1, 2, 3, 0)  # (H, W, d, n)
                squared = (columns * np.matmul(a, columns)).sum(2).transpose(2, 0, 1)
        chosen = NO_TASK if task is None else task
        return Scored(np.sqrt(np.maximum(squared, 0)), np.full(len(embeddings), chosen, np.int64))

    def device_nbytes(self) -> int:
        """Bytes of the sections that its one Gaussian a cell would take as integers, and a threshold."""
        bits = 0 if self._lite else self.form.bits or 8
        space = Space.plain(self.context.steps, bits, self.form.dimensions, self.context.seed)
        return sum(task_bytes(space, (self.mean.shape[0], self.mean.shape[1]))) + 4

    def _save(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "matrix": self.matrix if self._lite else upper_triangle(self.matrix)}

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.mean, self.matrix = arrays["mean"], arrays["matrix"]
        if not self._lite:
            self.matrix = symmetric(self.matrix, len(self._indices))
