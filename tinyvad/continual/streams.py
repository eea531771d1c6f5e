"""Streams of tasks: which images are learnt in which order, and on what everything is tested after each step.

Flows in: categories, as ``find_datasets`` reads them from any folder, and a protocol. Flows out: a ``Stream``: tasks in
order, each with its images to learn from, and evaluation units (one category each) with labelled images.

========================= ===========================================================================================
protocol                  tasks
========================= ===========================================================================================
class                     one category a task: as given, alphabetical or shuffled
14-1x1 (X-YxN)            X categories learnt together as step 0, then N steps of Y (IUF's protocols)
mvtec-10-1x5, thesis-10   a published order by its name (``published.protocols()``)
drift                     one category again and again, each time changed by a step of ``tinyvad.continual.drift``
variants                  a category, then others that count as new variants of the same product
========================= ===========================================================================================

In the last two all tasks have one ``product``: a method that merges learns it again under one name, and choosing another
task of the same product is no mistake in routing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyvad.continual.drift import Steps, check_steps, describe, drift_image, drift_mask
from tinyvad.continual.published import protocols
from tinyvad.errors import InputError
from tinyvad.images import Dataset, Preprocessing, Sample, load_images, read_image, read_mask, resize_mask

ORDERS = ("alphabetical", "given", "shuffled")


@dataclass(frozen=True, eq=False)
class Unit:
    """What is evaluated for itself: one category, perhaps changed by ``drift``.

    Attributes:
        name: unique in its stream.
        product: the product that it belongs to; the category's name, except in domain streams.
    """

    name: str
    dataset: Dataset
    product: str
    drift: Steps = ()


@dataclass(frozen=True, eq=False)
class Task:
    """What is learnt in one step: the good images of one or several units, together."""

    name: str
    units: tuple[Unit, ...]

    @property
    def product(self) -> str:
        """Under which name it is learnt: its product's, or its own if it has several."""
        products = {unit.product for unit in self.units}
        return products.pop() if len(products) == 1 else self.name

    @property
    def train_paths(self) -> list[Path]:
        return [path for unit in self.units for path in unit.dataset.train_good]


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in order.

    Attributes:
        name: the protocol, with the order.
        task_identity: at test time, a method is told which task an image belongs to.
        seed: of the order and of the drift's noise.
    """

    name: str
    tasks: tuple[Task, ...]
    task_identity: bool = False
    seed: int = 0
    units: tuple[Unit, ...] = field(init=False)
    step_of: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        owned = [(unit, step) for step, task in enumerate(self.tasks) for unit in task.units]
        object.__setattr__(self, "units", tuple(unit for unit, _ in owned))
        object.__setattr__(self, "step_of", tuple(step for _, step in owned))
        names = [unit.name for unit in self.units]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"stream {self.name}: {name} is there {names.count(name)} times; name each category once")
        for unit in self.units:
            if not unit.dataset.train_good:
                raise InputError(f"stream {self.name}: {unit.name} has no good images to learn from ({unit.dataset.root})")
            if len({sample.label for sample in unit.dataset.test}) < 2:
                raise InputError(
                    f"stream {self.name}: {unit.name} needs good and defective test images ({unit.dataset.root})"
                )

    def given_task(self, unit: int) -> int | None:
        """The task that a method is told for an image of ``unit``: its step, or None without task identity."""
        return self.step_of[unit] if self.task_identity else None

    def right_tasks(self, unit: int) -> tuple[int, ...]:
        """The tasks that may be chosen for an image of ``unit``: its own, and others with the same product."""
        own = self.units[unit].product
        return tuple(
            step for step, task in enumerate(self.tasks)
            if step == self.step_of[unit] or any(other.product == own for other in task.units)
        )  # fmt: skip


def class_incremental(
    datasets: Sequence[Dataset], order: str = "alphabetical", seed: int = 0, task_identity: bool = False
) -> Stream:
    """One category a task.

    Args:
        order: 'alphabetical', 'given' (as ``datasets``) or 'shuffled' by ``seed``.

    Raises:
        InputError: an unknown order, no category, one twice, or one without images to learn from or to test on.
    """
    return increments(datasets, 1, 1, len(datasets) - 1, order, seed, task_identity)


def increments(
    datasets: Sequence[Dataset],
    base: int,
    increment: int,
    steps: int,
    order: str = "alphabetical",
    seed: int = 0,
    task_identity: bool = False,
) -> Stream:
    """X-YxN: ``base`` categories together, then ``steps`` steps of ``increment``; arguments as ``class_incremental``.

    Raises:
        InputError: also if base + steps * increment is not the number of categories; says what would fit.
    """
    arranged = _arranged(datasets, order, seed)
    total = len(arranged)
    if total == 0:
        raise InputError("a stream needs at least one category")
    if base < 1 or increment < 1 or steps < 0:
        raise InputError(f"{base}-{increment}x{steps}: X and Y must be at least 1, N at least 0")
    if base + steps * increment != total:
        wanted = f"{base}-{increment}x{steps} needs {base + steps * increment} categories"
        raise InputError(f"{wanted}, there are {total}; {_fits(total, increment)}")
    bounds = [0, *range(base, total + 1, increment)]
    tasks = []
    for low, high in itertools.pairwise(bounds):
        units = tuple(Unit(dataset.name, dataset, dataset.name) for dataset in arranged[low:high])
        tasks.append(Task(", ".join(unit.name for unit in units), units))
    protocol = "class" if base == increment == 1 else f"{base}-{increment}x{steps}"
    name = f"{protocol} {order}" + (f" {seed}" if order == "shuffled" else "")
    return Stream(name, tuple(tasks), task_identity, seed)


def drifting(dataset: Dataset, schedule: Sequence[Sequence[tuple[str, float]]], seed: int = 0) -> Stream:
    """One product whose pictures change: a task for every step list of ``schedule``, on all images of the category.

    Args:
        schedule: (name, strength) lists, such as ``[[], [("brightness", 0.3)]]`` or ``drift.ramp("blur", [0, 0.5])``.

    Raises:
        InputError: no step, one twice, or a wrong one.
    """
    if not schedule:
        raise InputError(f"drift of {dataset.name}: the schedule is empty; give a list of [name, strength] a task")
    tasks = []
    for steps in schedule:
        checked = check_steps(steps)
        unit = Unit(f"{dataset.name}: {describe(checked)}", dataset, dataset.name, checked)
        tasks.append(Task(unit.name, (unit,)))
    return Stream(f"drift {dataset.name}", tuple(tasks), seed=seed)


def variants(datasets: Sequence[Dataset]) -> Stream:
    """One product that comes in new variants: the first category, then each other one as a variant of it, as given."""
    if not datasets:
        raise InputError("a stream of variants needs at least one category")
    product = datasets[0].name
    units = [Unit(dataset.name, dataset, product) for dataset in datasets]
    return Stream(f"variants {product}", tuple(Task(unit.name, (unit,)) for unit in units))


def published_stream(name: str, datasets: Sequence[Dataset], seed: int = 0, task_identity: bool | None = None) -> Stream:
    """A published protocol by its name, on the categories that it names (others are left out).

    Args:
        task_identity: None: as published.

    Raises:
        InputError: no such protocol, or a category is missing.
    """
    known = protocols()
    if name not in known:
        raise InputError(f"no protocol {name!r}; use class, X-YxN or one of {', '.join(known)}")
    protocol = known[name]
    by_name = {_plain(dataset.name): dataset for dataset in datasets}
    missing = [category for category in protocol.classes if _plain(category) not in by_name]
    if missing:
        raise InputError(
            f"protocol {name}: {len(missing)} of {len(protocol.classes)} categories are missing ({', '.join(missing)}); "
            "give the whole data set, or use class or X-YxN"
        )
    ordered = [by_name[_plain(category)] for category in protocol.classes]
    steps = (len(ordered) - protocol.base) // protocol.increment
    identity = protocol.task_identity if task_identity is None else task_identity
    stream = increments(ordered, protocol.base, protocol.increment, steps, "given", seed, identity)
    return Stream(name, stream.tasks, identity, seed)


def make_stream(
    protocol: str,
    datasets: Sequence[Dataset],
    order: str = "alphabetical",
    seed: int = 0,
    task_identity: bool = False,
    schedule: Sequence[Sequence[tuple[str, float]]] = (),
) -> Stream:
    """A stream by its protocol's name: class, X-YxN, drift, variants or a published one; see the other functions.

    Raises:
        InputError: as the function of that protocol; drift needs exactly one category.
    """
    if protocol == "class":
        return class_incremental(datasets, order, seed, task_identity)
    if protocol == "variants":
        return variants(_arranged(datasets, order, seed))
    if protocol == "drift":
        if len(datasets) != 1:
            raise InputError(f"drift changes one category, there are {len(datasets)}: name one of them")
        return drifting(datasets[0], schedule, seed)
    if found := re.fullmatch(r"(\d+)-(\d+) ?x ?(\d+)", protocol):
        base, increment, steps = (int(number) for number in found.groups())
        return increments(datasets, base, increment, steps, order, seed, task_identity)
    return published_stream(protocol, datasets, seed, task_identity or None)


def train_images(task: Task, preprocessing: Preprocessing, seed: int = 0) -> Iterator[np.ndarray]:
    """The good images of a task at the network's size, (height, width, 3) uint8, one in memory at a time.

    Drift is applied to the image as it lies in its file, before it is resized.
    """
    for unit in task.units:
        yield from unit_images(unit, unit.dataset.train_good, preprocessing, seed)


def unit_images(unit: Unit, paths: Sequence[Path], preprocessing: Preprocessing, seed: int = 0) -> Iterator[np.ndarray]:
    """Images of a unit at the network's size, changed by its drift."""
    if not unit.drift:
        yield from (image for _, image in load_images(list(paths), preprocessing))
        return
    for path in paths:
        yield preprocessing.uint8_input(drift_image(read_image(path, preprocessing.bit_depth), unit.drift, seed))


def mask_of(unit: Unit, sample: Sample, height: int, width: int) -> np.ndarray | None:
    """The mask of a test image, (height, width) bool, moved by the unit's drift; None if a defect has no mask."""
    if sample.mask is None:
        return None if sample.label else np.zeros((height, width), bool)
    return resize_mask(drift_mask(read_mask(sample.mask), unit.drift), height, width)


def _arranged(datasets: Sequence[Dataset], order: str, seed: int) -> list[Dataset]:
    if order not in ORDERS:
        raise InputError(f"order is {order!r}, must be one of {', '.join(ORDERS)}")
    if order == "given":
        return list(datasets)
    arranged = sorted(datasets, key=lambda dataset: dataset.name)
    if order == "shuffled":
        arranged = [arranged[index] for index in np.random.default_rng(seed).permutation(len(arranged))]
    return arranged


def _fits(total: int, increment: int) -> str:
    """What X and N would fit ``total`` categories with the same Y."""
    fitting = [f"{total - steps * increment}-{increment}x{steps}" for steps in range((total - 1) // increment, 0, -1)]
    return f"{', '.join(fitting[:2] + fitting[2:][-2:])} would fit" if fitting else f"{total}-1x0 would fit"


def _plain(name: str) -> str:
    """A category's name for comparing: without case, '_' for what parts words."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())
