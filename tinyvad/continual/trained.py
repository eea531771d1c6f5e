"""A detector that is trained, task after task: STFPM, PaSTe, CFA or SimpleNet with any way of not forgetting.

Flows in: the float network (``Frozen``), settings, and a task's good images as ``TaskItems``: what the frozen parts make of
them, and the images themselves where these are replayed. Flows out: anomaly maps by the one network of all tasks.

==================== ======================================================================================================
way                  what is trained on, and kept for the next task
==================== ======================================================================================================
fine-tuning          the new task alone; nothing is kept
replay               the new task mixed with images of old ones (uint8, run through the frozen parts again)
compressed-replay    the same with maps of the trunk, in a form of ``replay_forms``
ewc, si, mas, lwf    the new task with a term that holds the network back (``strategies``)
joint                all tasks so far, from new weights; all images are kept: the bound
==================== ======================================================================================================

The recipe is the detector's own unless settings change it. A share of each task's images is held out: the epoch with their
lowest loss is kept, and they are never replayed. Every task draws from a generator of its own: the state needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinyvad.continual.base import Context, Frozen, Scored
from tinyvad.continual.replay import COMPOSITIONS, Replay, ReplayBuffer
from tinyvad.continual.strategies import EWC, MAS, SI, FineTuning, LwF
from tinyvad.errors import InputError
from tinyvad.fitting_trained import held_out, open_detector
from tinyvad.project import Project
from tinyvad.training.items import ArrayItems, ChosenItems, JoinedItems
from tinyvad.training.network import Arrays
from tinyvad.training.recipe import Recipe
from tinyvad.training.trainable import Items, TrainedDetector

if TYPE_CHECKING:
    from tinyvad.training.loop import Trained

WAYS = ("fine-tuning", "joint", "replay", "compressed-replay", "ewc", "si", "mas", "lwf")
IMAGE = "image"  # the form of replay that stores images
RECIPE = ("epochs", "batch", "learning_rate", "patience", "held_out")  # settings that go into the recipe
NO_TASK = -1  # nothing is chosen: one network serves all tasks
Tell = Callable[[str, int, int], None]


class TaskItems(Items, Protocol):
    """A task's good images: the arrays of a detector, and the images that they were made of."""

    def images(self, indices: np.ndarray) -> np.ndarray:
        """(k, S, S, 3) uint8 of the chosen ones."""


class ImageItems:
    """Items that the frozen parts make of images in memory; each row is its image's alone.

    Args:
        pictures: (n, S, S, 3) uint8.
    """

    def __init__(self, pictures: np.ndarray, frozen: Frozen, detector: TrainedDetector) -> None:
        inputs = ([frozen.preprocessing.float_input(image)[None]] for image in pictures)
        stored = inputs if detector.trunk is None else map(frozen.engine(detector.trunk), inputs)
        self._items = with_targets(stored, frozen, detector)
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """Stored maps, then targets."""
        return self._items.take(indices)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """The images themselves."""
        return self._pictures[indices]


class TrainedMethod:
    """A ``ContinualMethod`` of ``TaskItems``; see the module's text.

    Args:
        context: without ``frozen`` only the settings are checked.
        detector: 'stfpm', 'paste', 'cfa' or 'simplenet'. way: of ``WAYS``.
        settings: epochs, batch, learning_rate, patience, held_out: of the recipe, None: the paper's. images: at most so
            many a task, evenly chosen, None: all. shared: PaSTe's. size, form, mode (replay): how many items, how they are
            stored, how they are mixed in. strength, decay: of the strategy.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(self, context: Context, detector: str, way: str, settings: Mapping[str, Any]) -> None:
        self.name, self.way, self.context, self.settings = detector, way, context, dict(settings)
        self.task_names: list[str] = []
        self.strategy = _strategy(way, settings)
        self._form = {"replay": IMAGE, "compressed-replay": settings.get("form", "")}.get(way)
        if context.frozen is not None:
            self.detector = self._fresh()
        self._buffer = self._empty_buffer()
        self._seen: list[TaskItems] = []  # joint: chosen images of all tasks
        if settings["images"] is not None and settings["images"] < 1:
            raise InputError(f"images is {settings['images']}; give at least 1")
        if settings.get("mode", COMPOSITIONS[0]) not in COMPOSITIONS:
            raise InputError(f"mode is {settings['mode']!r}; choose {' or '.join(COMPOSITIONS)}")
        if settings["held_out"] is not None and not 0 <= settings["held_out"] < 1:
            raise InputError(f"held_out is {settings['held_out']}; give a share from 0 to below 1")

    def learn(
        self, task: str, items: TaskItems, checkpoint: Path | None = None, tell: Tell | None = None
    ) -> Trained:
        """Train on a task.

        Args:
            checkpoint: a file to go on from after being stopped; it is removed at the end. tell: progress.

        Raises:
            InputError: no images, autograd is not installed. CheckFailed: the training diverged.
        """
        from tinyvad.training.loop import train

        number = len(self.task_names)
        chosen = _Chosen(items, _evenly(len(items), self.settings["images"]))
        sets: Sequence[TaskItems] = [chosen]
        if self.way == "joint":
            self._seen.append(chosen)
            sets, self.detector = self._seen, self._fresh()
        recipe = self.recipe(number)
        parts = [_split(one, recipe, self.context.seed) for one in sets]
        current: Items = JoinedItems([kept for kept, _ in parts])
        held: Items = JoinedItems([out for _, out in parts])
        replay = None
        if self._buffer is not None:
            held_tasks = [old for old, size in zip(self._buffer.tasks, self._buffer.sizes, strict=True) if size]
            replay = Replay(current, [self._replayed(old) for old in held_tasks], self.settings["mode"])
        trained = train(
            self.detector, current, held, recipe, strategy=self.strategy, replay=replay, checkpoint=checkpoint, tell=tell
        )
        if self._buffer is not None:
            stored: Items = parts[0][0] if self._form != IMAGE else _Images(parts[0][0])
            self._buffer.update(f"{number} {task}", stored, np.random.default_rng([self.context.seed, number, 1]))
        self.task_names.append(task)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return trained

    def score(self, batch: list[np.ndarray], task: int | None = None) -> Scored:
        """Maps of items (stored maps, targets); ``task`` changes nothing."""
        maps = self.detector.maps(batch)
        return Scored(maps, np.full(len(maps), NO_TASK))

    def nbytes(self) -> int:
        """Bytes of ``state()``: the trained network, replayed items (joint: all images), what the strategy keeps."""
        network = sum(array.nbytes for array in self.detector.arrays().values())
        return network + self.strategy.nbytes() + self.replay_nbytes() + len(_text(self.task_names))

    def replay_nbytes(self) -> int:
        """Bytes of the replayed items alone (joint: of all images)."""
        images = sum(len(items) for items in self._seen) * self._image_bytes()
        return images + (self._buffer.nbytes() if self._buffer is not None else 0)

    def state(self) -> dict[str, np.ndarray]:
        """All that is learnt, without the frozen network."""
        state = {"tasks": _text(self.task_names)}
        state |= {f"detector/{name}": array for name, array in self.detector.arrays().items()}
        state |= {f"strategy/{name}": array for name, array in self.strategy.arrays().items()}
        if self._buffer is not None:
            state |= {f"replay/{name}": array for name, array in self._buffer.arrays().items()}
        state |= {f"images/{i:04d}": items.images(np.arange(len(items))) for i, items in enumerate(self._seen)}
        return state

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over a ``state()`` of a method with the same settings and frozen network."""
        self.task_names = json.loads(state["tasks"].tobytes().decode())
        self.detector.restore(_below("detector/", state))
        self.strategy.restore(_below("strategy/", state))
        self._buffer = self._empty_buffer()
        if self._buffer is not None:
            self._buffer.restore(_below("replay/", state))
        pictures = sorted(_below("images/", state).items())
        self._seen = [ImageItems(array, self._frozen, self.detector) for _, array in pictures]

    @property
    def _frozen(self) -> Frozen:
        assert self.context.frozen is not None  # only the settings were to be checked
        return self.context.frozen

    def _fresh(self) -> TrainedDetector:
        frozen = self._frozen
        project = Project(
            method=self.name, layers=frozen.layers, shared=self.settings.get("shared"), grid=frozen.grid,
            seed=self.context.seed,
        )  # fmt: skip
        return open_detector(self.name, frozen.graph, project)

    def recipe(self, number: int) -> Recipe:
        """Of the task of that number: the detector's, with what the settings change."""
        given = {key: self.settings[key] for key in RECIPE if self.settings[key] is not None}
        seed = int(np.random.default_rng([self.context.seed, number]).integers(1 << 31))
        return replace(self.detector.recipe, seed=seed, **given)

    def _empty_buffer(self) -> ReplayBuffer | None:
        if self._form is None:
            return None
        stored = self.context.frozen is not None and self._form != IMAGE
        maps = len(self.detector.network.graph.inputs) if stored else 1
        return ReplayBuffer(self.settings["size"], self._form, maps)

    def _replayed(self, task: str) -> Items:
        """An old task's kept items as the loss wants them."""
        assert self._buffer is not None
        stored = self._buffer.decode(task)
        if self._form == IMAGE:
            return ImageItems(stored[0], self._frozen, self.detector)
        rows = ([array[i : i + 1] for array in stored] for i in range(len(stored[0])))
        return with_targets(rows, self._frozen, self.detector)

    def _image_bytes(self) -> int:
        return 3 * self._frozen.preprocessing.height * self._frozen.preprocessing.width


class JoinedTaskItems(JoinedItems):
    """Several products' items as one task."""

    def __init__(self, parts: Sequence[TaskItems]) -> None:
        super().__init__(parts)
        self._pictured = list(parts)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """(k, S, S, 3) uint8, in the order asked for."""
        part_of = np.searchsorted(self._starts, indices, "right") - 1
        chosen = zip(part_of, indices - self._starts[part_of], strict=True)
        return np.concatenate([self._pictured[part].images(np.array([row])) for part, row in chosen])


class _Chosen(ChosenItems):
    """Some of a task's items, with their images."""

    def __init__(self, items: TaskItems, indices: np.ndarray) -> None:
        super().__init__(items, indices)
        self._pictured = items

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._pictured.images(self._indices[indices])


class _Images:
    """A task's images as the only array of its items: what a memory of images stores."""

    def __init__(self, items: TaskItems) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        return [self._items.images(indices)]


def with_targets(stored: Iterable[list[np.ndarray]], frozen: Frozen, detector: TrainedDetector) -> ArrayItems:
    """Items of stored maps, [(1, h, w, c)] an image: the targets are worked out from them, one image at a time."""
    targets = frozen.engine(detector.targets) if detector.targets is not None else None
    rows = [[*maps, *targets(maps)] if targets is not None else maps for maps in stored]
    return ArrayItems([np.concatenate(arrays) for arrays in zip(*rows, strict=True)])


def _strategy(way: str, settings: Mapping[str, Any]) -> FineTuning:
    if way == "ewc":
        return EWC(settings["strength"], settings["decay"])
    kinds = {"si": SI, "mas": MAS, "lwf": LwF}
    return kinds[way](settings["strength"]) if way in kinds else FineTuning()


def _split(items: TaskItems, recipe: Recipe, seed: int) -> tuple[_Chosen, _Chosen]:
    """Items to train on, and held-out ones (none of very few)."""
    out = held_out(len(items), recipe.held_out, seed) if recipe.held_out else np.zeros(0, np.int64)
    return _Chosen(items, np.setdiff1d(np.arange(len(items)), out)), _Chosen(items, out)


def _evenly(count: int, most: int | None) -> np.ndarray:
    if most is None or count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


def _text(names: Sequence[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(list(names)).encode(), np.uint8)


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
