"""The PaDiM family over tasks: one model merged, or one model a task.

Flows in: int8 embeddings (n, H, W, D), one task after another. Flows out: distance maps in real units, and the task that
each image or patch was scored by.

* ``PadimUni``: one Gaussian a cell for all tasks, by exact merge of integer sums; the spread between the tasks' means goes
  into the covariance. Source: the edge benchmark's corrected UniModal.
* ``PadimMulti``: a Gaussian a cell and task; patch, image or prototype chooses the task. Source: its MultiModal.
* ``PadimSeparate``: a batch detector a task, which share nothing.

Every form of the detector: ``padim`` (full covariance), ``padim-lite`` (variances), ``padim-compact`` (full covariance in a
projection, which ``PadimUni`` and ``PadimMulti`` fix with the first task). All score in the device's integers.
Bounds are in ``tinyvad.continual.padim_bounds``, the published biased mean in ``padim_original``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tinyvad.continual.base import Context, Scored
from tinyvad.detectors.padim import Padim, PadimCompact
from tinyvad.detectors.routing import nearest_prototype, prototype, signatures
from tinyvad.detectors.task_gaussians import Space, TaskStatistics, collect_task, scorer_of
from tinyvad.detectors.tasks import join_tasks, split_tasks
from tinyvad.detectors.triangular import TABLE_SHIFT, UNIT, TriangularScorer
from tinyvad.errors import InputError

FORMS = {"padim": "PADF", "padim-lite": "PADM", "padim-compact": "PADC"}  # and the kind of their banks
SELECT = ("patch", "image", "prototype")
NO_TASK = -1  # in Scored.tasks where one model serves all tasks


@dataclass(frozen=True)
class Form:
    """Which PaDiM.

    Attributes:
        name: one of ``FORMS``.
        dimensions: d of padim-compact; channels of the random subset of the others, None for all.
        bits: 4 or 8 bits a factor entry; None takes 4 for padim-compact and 8 for padim.
        headroom: of padim-compact's projection where later tasks use it too.
    """

    name: str = "padim-compact"
    dimensions: int | None = None
    bits: int | None = None
    headroom: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise InputError(f"no PaDiM form called {self.name}; choose one of {', '.join(FORMS)}")
        if self.name == "padim-compact" and self.dimensions is None:
            raise InputError("padim-compact needs its number of dimensions, for example 40")

    def detector(self, context: Context) -> Padim | PadimCompact:
        """The unfitted batch detector."""
        if self.name == "padim-compact":
            assert self.dimensions is not None
            return PadimCompact(self.dimensions, context.steps, self.bits or 4)
        lite = self.name == "padim-lite"
        return Padim(context.steps, lite, self.dimensions, bits=self.bits or 8, seed=context.seed)

    def space(self, context: Context, embeddings: Iterable[np.ndarray]) -> Space:
        """What all tasks see, fixed by the first one's embeddings (only padim-compact looks at them)."""
        if self.name == "padim-compact":
            assert self.dimensions is not None
            statistics = PadimCompact(self.dimensions, context.steps).collect(embeddings)
            return Space.compact(statistics, self.dimensions, context.steps, self.bits or 4, self.headroom)
        bits = 0 if self.name == "padim-lite" else self.bits or 8
        return Space.plain(context.steps, bits, self.dimensions, context.seed)


class PadimMethod:
    """What the methods have in common.

    Attributes:
        task_names: tasks learnt, in order.
    """

    def __init__(self, context: Context, form: Form) -> None:
        self.context, self.form = context, form
        self.task_names: list[str] = []

    def _save(self) -> dict[str, np.ndarray]:
        """All that is learnt but the names, once there is something."""
        raise NotImplementedError

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo ``_save``; the names are there."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        """All that is learnt: ``tasks``, the names; a bank's sections; sums."""
        return {"tasks": np.array(self.task_names, np.str_), **(self._save() if self.task_names else {})}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a ``state()`` of the same method, form and context."""
        self.task_names = [str(name) for name in state["tasks"]]
        if self.task_names:
            self._load(state)

    def nbytes(self) -> int:
        """Bytes of all of ``state`` but the names."""
        return sum(array.nbytes for name, array in self.state().items() if name != "tasks")

    def check_task(self, task: int | None) -> None:
        """InputError unless there is something to score with, and task ``task`` if it is known."""
        if not self.task_names:
            raise InputError("nothing is learnt yet; learn a task before scoring")
        if task is not None and not 0 <= task < len(self.task_names):
            raise InputError(f"task {task}: there are {len(self.task_names)}, numbered from 0")


class OneModel(PadimMethod):
    """One scorer for every image, whatever its task.

    Attributes:
        scorer: of all that is learnt.
    """

    scorer: TriangularScorer

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Score (n, H, W, D) int8 by the one model; ``tasks`` is ``NO_TASK`` where it is not given: nothing is chosen."""
        self.check_task(task)
        chosen = NO_TASK if task is None else task
        return Scored(distances(self.scorer.score(embeddings)), np.full(len(embeddings), chosen, np.int64))

    def device_nbytes(self) -> int:
        """Bytes of the sections that scoring on a device needs, the threshold included."""
        return _bytes(self.scorer.sections()) + 4

    def _save(self) -> dict[str, np.ndarray]:
        return to_state(self.scorer.sections())

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.scorer = _scorer(from_state(arrays), self.context)


class PadimUni(OneModel):
    """UniModal: exact merge of all tasks' sums; bytes do not grow with the tasks."""

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Add a task's sums and make the scorer anew."""
        if not self.task_names:
            self.space = self.form.space(self.context, embeddings)
        statistics = collect_task(self.space, embeddings)
        self.statistics: TaskStatistics = self.statistics.merge(statistics) if self.task_names else statistics
        self.scorer = scorer_of(self.space, self.statistics)
        self.task_names.append(task)

    def _save(self) -> dict[str, np.ndarray]:
        return {**super()._save(), **self.statistics.arrays()}

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._load(arrays)
        self.space = Space.of(self.scorer, self.context.steps)
        self.statistics = TaskStatistics.from_arrays(self.space, arrays)


class ModelPerTask(PadimMethod):
    """A scorer a task; the nearest prototype chooses.

    Attributes:
        scorers: (T,). prototypes: (T, C) int32. images: (T,) seen.
    """

    def __init__(self, context: Context, form: Form) -> None:
        super().__init__(context, form)
        self.scorers: list[TriangularScorer] = []
        self.prototypes = np.zeros((0, context.last_channels), np.int32)
        self.images: list[int] = []

    def _add(self, task: str, scorer: TriangularScorer, signature_total: np.ndarray, images: int) -> None:
        self.task_names.append(task)
        self.scorers.append(scorer)
        self.images.append(images)
        self.prototypes = np.concatenate([self.prototypes, prototype(signature_total, images)[None]])

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Score (n, H, W, D) int8, every image by the known task's or the nearest prototype's scorer alone."""
        self.check_task(task)
        if task is None:
            tasks = nearest_prototype(signatures(embeddings, self.context.last_channels), self.prototypes)
        else:
            tasks = np.full(len(embeddings), task, np.int64)
        maps = np.zeros(embeddings.shape[:3])
        for number in np.unique(tasks):
            its = tasks == number
            maps[its] = distances(self.scorers[number].score(embeddings[its]))
        return Scored(maps, tasks)


class PadimSeparate(ModelPerTask):
    """The bound of no sharing: a batch detector a task, with a projection of its own where it has one."""

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Fit a detector for this task alone."""
        scorer = self.form.detector(self.context).fit(embeddings).to_scorer()
        totals = [(signatures(batch, self.context.last_channels).sum(0), len(batch)) for batch in embeddings]
        self._add(task, scorer, np.sum([total for total, _ in totals], 0), sum(count for _, count in totals))

    def device_nbytes(self) -> int:
        """Bytes of the sections that scoring on a device needs, with thresholds and prototypes."""
        return sum(_bytes(scorer.sections()) + 4 for scorer in self.scorers) + self.prototypes.nbytes

    def _save(self) -> dict[str, np.ndarray]:
        result = {"prototypes": self.prototypes, "images": np.array(self.images, np.int32)}
        for number, scorer in enumerate(self.scorers):
            result.update(to_state(scorer.sections(), number))
        return result

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.prototypes, self.images = arrays["prototypes"], arrays["images"].tolist()
        self.scorers = [_scorer(from_state(arrays, number), self.context) for number in range(len(self.task_names))]


class PadimMulti(ModelPerTask):
    """MultiModal: a model a task in one space, as one bank.

    Args:
        select: what chooses the task where it is not known: 'patch' takes every cell's smallest distance, 'image' the task
            with the smallest mean squared distance over the cells, 'prototype' the nearest mean signature (the device's).
        log_determinant: 'image' adds the mean log-determinant of the task's covariances (minus twice the Gaussian
            log-likelihood, up to a constant).
    """

    def __init__(self, context: Context, form: Form, select: str = "patch", log_determinant: bool = False) -> None:
        super().__init__(context, form)
        if select not in SELECT:
            raise InputError(f"no task selection called {select}; choose one of {', '.join(SELECT)}")
        self.select, self.log_determinant = select, log_determinant

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Add a scorer and a prototype; the first task fixes the space. Nothing of earlier tasks changes."""
        if not self.task_names:
            self.space = self.form.space(self.context, embeddings)
        statistics = collect_task(self.space, embeddings)
        total = statistics.total[-self.context.last_channels :]
        self._add(task, scorer_of(self.space, statistics), total, statistics.count)

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Score (n, H, W, D) int8; a known task is scored by its own model alone."""
        if task is not None or self.select == "prototype":
            return super().score(embeddings, task)
        self.check_task(task)
        maps = np.stack([scorer.score(embeddings) for scorer in self.scorers])  # (T, n, H, W) uint32
        if self.select == "patch":
            return Scored(distances(maps.min(0)), maps.argmin(0))
        criterion = maps.mean((2, 3), dtype=np.float64) * UNIT**2  # (T, n)
        if self.log_determinant:
            criterion += np.array([log_determinant(scorer).mean() for scorer in self.scorers])[:, None]
        tasks = criterion.argmin(0)  # (n,)
        return Scored(distances(maps[tasks, np.arange(len(embeddings))]), tasks)

    def device_nbytes(self) -> int:
        """Bytes of the one bank's sections, with prototypes, task rows and thresholds."""
        return _bytes(self._sections()) + 4 * len(self.scorers)

    def _sections(self) -> dict[str, np.ndarray]:
        return join_tasks(self.scorers, self.images, self.prototypes)

    def _save(self) -> dict[str, np.ndarray]:
        return to_state(self._sections())

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        sections, tasks = from_state(arrays), len(self.task_names)
        height, width = sections["MEAN"].shape[:2]
        grid = (height // tasks, width)
        parts = split_tasks(FORMS[self.form.name], sections, grid, tasks, self.context.last_channels)
        self.scorers = [_scorer(part, self.context) for part in parts]
        self.space = Space.of(self.scorers[0], self.context.steps)
        self.prototypes, self.images = sections["PROT"], sections["TASK"][:, 2].tolist()


def to_state(sections: Mapping[str, np.ndarray], number: int = 0) -> dict[str, np.ndarray]:
    """The sections of bank ``number`` under names that a file can have."""
    return {f"bank{number}_{tag.strip()}": array for tag, array in sections.items()}


def from_state(state: Mapping[str, np.ndarray], number: int = 0) -> dict[str, np.ndarray]:
    """Undo ``to_state``: the sections of bank ``number`` by tag."""
    prefix = f"bank{number}_"
    return {name[len(prefix) :].ljust(4): array for name, array in state.items() if name.startswith(prefix)}


def _scorer(sections: Mapping[str, np.ndarray], context: Context) -> TriangularScorer:
    height, width = sections["MEAN"].shape[:2]
    return TriangularScorer.from_sections(sections, (height, width), len(context.steps))


def _bytes(sections: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in sections.values())


def distances(squared: np.ndarray) -> np.ndarray:
    """Squared distances in Q8 -> float64 distances in real units."""
    return np.sqrt(squared.astype(np.float64)) * UNIT


def log_determinant(scorer: TriangularScorer) -> np.ndarray:
    """(H, W) log-determinants of the covariances of y that the stored factors stand for: W = diag(a) (I + N)."""
    a = np.maximum(scorer.a_table[scorer.a_code], 1) / (1 << TABLE_SHIFT)  # (H, W, d)
    return -2 * np.log(a).sum(-1)
