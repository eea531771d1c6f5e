"""Replay memories: a few good items of every task, kept to be trained on again while later tasks are learnt.

Flows in: a task's clean items after it was trained, and with each step of a later task the numbers of its batch. Flows
out: the kept items, and the batches in which old and new items are mixed. An item is an image (uint8) or the list of maps
that the frozen trunk makes of it; ``replay_forms`` says how it is stored.

Rules. Of R items and T tasks each task holds floor(R / T), or all that it has; with R < T the newest task and R - 1 random
old ones hold one each. A new task fills its share by reservoir sampling, the old ones shrink by random removal. Items are
stored from the task's own clean data, never from a batch, which may hold old tasks' items.

Source: replay and compressed replay of PaSTe, with its two ways to mix a batch; the reservoir is algorithm R, Vitter 1985.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyvad.continual.replay_forms import FORMS, Encoded, decode, encode
from tinyvad.detectors.reservoir import Reservoir
from tinyvad.detectors.trained import Items
from tinyvad.errors import InputError
from tinyvad.training.network import Arrays

COMPOSITIONS = ("concat", "replace")
RATIO = 0.5  # of a batch that ``replace`` takes for old items


class ReplayBuffer:
    """At most ``max_size`` items over all tasks; see the module's text.

    Args:
        max_size: R, items.
        form: how an item is stored, one of ``replay_forms.FORMS``; 'image' for uint8 images.
        maps: how many of an item's arrays are stored: the first ones (the targets, which come after them, never are).

    Attributes:
        tasks: names of the tasks learnt so far, in order.

    Raises:
        InputError: no such form, or max_size below 1.
    """

    def __init__(self, max_size: int, form: str = "float32", maps: int = 1) -> None:
        if form not in FORMS:
            raise InputError(f"replay memory: no form called {form!r}; there are {', '.join(FORMS)}")
        self.max_size = _checked(max_size)
        self.form = form
        self.maps = maps
        self.tasks: list[str] = []
        self._kept: list[list[Encoded]] = []  # of each task, of each map

    @property
    def sizes(self) -> list[int]:
        """Items of each task."""
        return [len(kept[0]) for kept in self._kept]

    def update(self, task: str, items: Items, rng: np.random.Generator) -> None:
        """Take in a task that was just trained.

        Args:
            task: its name. items: its clean items. rng: draws what is kept.

        Raises:
            InputError: a task that is in the memory already, or without items.
        """
        if task in self.tasks:
            raise InputError(f"replay memory: task {task!r} is in it already; give every task a name of its own")
        if not len(items):
            raise InputError(f"replay memory: task {task!r} has no items; give at least one good image")
        shares = self._shares(len(self.tasks) + 1, rng)
        self._shrink(shares[:-1], rng)
        reservoir = Reservoir(shares[-1], int(rng.integers(1 << 63)))
        reservoir.add(np.arange(len(items))[:, None])
        chosen = np.sort(reservoir.sample()[:, 0])
        self._kept.append([encode(self.form, array, rng) for array in items.take(chosen)[: self.maps]])
        self.tasks.append(task)

    def resize(self, max_size: int, rng: np.random.Generator) -> None:
        """Another R: each task keeps a random part of its items; what was removed before does not come back.

        Raises:
            InputError: max_size below 1.
        """
        self.max_size = _checked(max_size)
        if self.tasks:
            self._shrink(self._shares(len(self.tasks), rng), rng)

    def decode(self, task: str) -> list[np.ndarray]:
        """[(k, H, W, C)] stored maps of a task's items, float32; uint8 of the form 'image'."""
        return [decode(self.form, encoded) for encoded in self._kept[self.tasks.index(task)]]

    def nbytes(self) -> int:
        """Bytes of all that is kept: those of ``arrays()``."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> Arrays:
        """All that is kept: '<task's number>/<task>/<map>/<form>/<rows or shared>/<name>' -> array."""
        return {
            f"{number}/{task}/{index}/{self.form}/{name}": array
            for number, (task, kept) in enumerate(zip(self.tasks, self._kept, strict=True))
            for index, encoded in enumerate(kept)
            for name, array in encoded.arrays().items()
        }

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()`` of a memory of the same form and no larger one.

        Raises:
            InputError: another form, or more items than ``max_size``.
        """
        found: dict[tuple[int, str], dict[int, Arrays]] = {}
        for key, array in arrays.items():
            number, rest = key.split("/", 1)
            task, index, form, part, name = rest.rsplit("/", 4)
            if form != self.form:
                raise InputError(f"replay memory: what is restored is {form}, not {self.form}; use form {form!r}")
            found.setdefault((int(number), task), {}).setdefault(int(index), {})[f"{part}/{name}"] = array
        ordered = sorted(found)
        self.tasks = [task for _, task in ordered]
        self._kept = [[Encoded.of_arrays(found[key][index]) for index in sorted(found[key])] for key in ordered]
        if sum(self.sizes) > self.max_size:
            raise InputError(f"replay memory: {sum(self.sizes)} items are restored, {self.max_size} fit; use the old size")

    def _shares(self, tasks: int, rng: np.random.Generator) -> list[int]:
        """Items that each of so many tasks may hold."""
        if tasks <= self.max_size:
            return [self.max_size // tasks] * tasks
        holders = [number for number, size in enumerate(self.sizes[: tasks - 1]) if size]
        stay = rng.permutation(holders)[: self.max_size - 1]
        return [int(number in stay) for number in range(tasks - 1)] + [1]

    def _shrink(self, shares: Sequence[int], rng: np.random.Generator) -> None:
        """Remove random items of the first tasks beyond their shares."""
        for kept, share in zip(self._kept, shares, strict=False):
            if len(kept[0]) > share:
                stay = np.sort(rng.choice(len(kept[0]), share, replace=False))
                kept[:] = [encoded.take(stay) if share else Encoded(encoded.take(stay).rows, {}) for encoded in kept]


class Replay:
    """Mixes old items into the batches of a new task.

    Args:
        current: the new task's items. old: each old task's, as the loss wants them; tasks without items are left out.
        composition: 'concat' (thesis): as many old items beside the batch, the task of each drawn first, then its item.
            'replace' (benchmark): old items in place of a random part ``ratio`` of the batch, the same number of each task,
            the remainder from random ones.

    Raises:
        InputError: another composition, or a ratio that is no share.
    """

    def __init__(self, current: Items, old: Sequence[Items], composition: str = "concat", ratio: float = RATIO) -> None:
        if composition not in COMPOSITIONS:
            raise InputError(f"replay: no composition {composition!r}; choose one of {', '.join(COMPOSITIONS)}")
        if not 0 <= ratio <= 1:
            raise InputError(f"replay: ratio is {ratio}; give the share of a batch to replace, from 0 to 1")
        self.current = current
        self.old = [items for items in old if len(items)]
        self.composition = composition
        self.ratio = ratio

    def compose(self, indices: np.ndarray, rng: np.random.Generator) -> list[tuple[Items, np.ndarray]]:
        """One step's batch.

        Args:
            indices: (b,) of the current items. rng: draws the old ones.

        Returns:
            items and the (k,) indices to take from them: of the new task first (unless none is left), then of old ones.
        """
        if not self.old:
            return [(self.current, indices)]
        if self.composition == "concat":
            counts = np.bincount(rng.integers(len(self.old), size=len(indices)), minlength=len(self.old))
            drawn = [rng.integers(len(items), size=count) for items, count in zip(self.old, counts, strict=True)]
        else:
            number = int(len(indices) * self.ratio)
            indices = np.sort(rng.permutation(indices)[: len(indices) - number])
            counts = np.full(len(self.old), number // len(self.old))
            counts[rng.permutation(len(self.old))[: number % len(self.old)]] += 1
            pairs = [(len(items), int(count)) for items, count in zip(self.old, counts, strict=True)]
            drawn = [_draw(size, count, rng) for size, count in pairs]
        parts: list[tuple[Items, np.ndarray]] = [(self.current, indices), *zip(self.old, drawn, strict=True)]
        return [(items, chosen) for items, chosen in parts if len(chosen)]


def _draw(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of ``size`` items; where there are too few, all of them again and again before one comes oftener."""
    if count <= size:
        return rng.choice(size, count, replace=False)
    return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]


def _checked(max_size: int) -> int:
    if max_size < 1:
        raise InputError(f"replay memory: max_size is {max_size}; give at least 1 item")
    return max_size
