"""PatchCore over a stream of tasks: a memory bank a task within one budget, and the bounds to compare with.

Flows in: embeddings (n, H, W, D), int8 or float32. Flows out: distances to the nearest vector of the chosen task's bank.

* ``PatchCorePlus`` (PatchCoreCL++): with c tasks in M rows each bank is the first M // c of its greedy order; the nearest
  prototype chooses the bank.
* ``PatchCoreCL``: old banks are selected anew among their own rows; every bank scores the image, the lowest image score
  (``score``, the paper's) or the lowest mean distance (``mean_nn``) chooses. With selection from row 0 (``start='fixed'``)
  the banks are PatchCorePlus' very own; published differences come from random starts and from the routing.
* ``PatchCoreSeparate``: M / T rows a task from the beginning, T known beforehand; no bank ever changes.
* ``PatchCoreFineTune``: M rows of the last task alone. ``PatchCoreJoint``: one coreset of M rows of all tasks' candidates,
  which it keeps.

The budget is a number of rows or of bytes (rows or codes, codebooks, prototype sums). Quantised banks share the codebooks
of the first task (``first``), have codebooks trained anew on all rows that there are at every task (``seen``; old rows are
decoded and encoded again), or their own (``own``), which costs V D bytes a task. Codebooks of one product do not serve
another: six products in 128 KB (MCUNet, 88 channels, 44 codes of 4 bits) reach a mean image AUROC of 0.75 with ``first``,
0.85 with ``seen``, 0.94 with ``own``; plain vectors 0.91.

Source: PatchCoreCL and PatchCoreCL++ of the continual-learning studies on edge devices; Roth et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from tinyvad.continual.base import Context, Scored
from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.distances import nearest
from tinyvad.detectors.product_quantizer import ProductQuantizer, fit_quantizer, pack_codes, unpack_codes
from tinyvad.detectors.routing import nearest_prototype, prototype, signatures
from tinyvad.detectors.task_memory import TaskMemory, choose, cut, draw_candidates, quantised, shares
from tinyvad.errors import CheckFailed, InputError

ROUTES = ("prototype", "score", "mean_nn", "known")
CODEBOOKS = ("first", "seen", "own")
STARTS = ("fixed", "random")


@dataclass(frozen=True)
class Budget:
    """Rows of all banks together, or bytes of all that is kept; exactly one of the two."""

    rows: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.nbytes is None) or (self.rows or self.nbytes or 0) < 1:
            raise InputError(f"budget of {self.rows} rows, {self.nbytes} B: give one of them, positive")


@dataclass(frozen=True)
class Codes:
    """Product quantisation: subspaces M, bits of a code, and whose codebooks (one of ``CODEBOOKS``)."""

    subspaces: int
    bits: int = 4
    codebooks: str = "own"

    def __post_init__(self) -> None:
        if self.codebooks not in CODEBOOKS:
            raise InputError(f"codebooks {self.codebooks!r}: use one of {CODEBOOKS}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's codes."""
        return (self.subspaces * self.bits + 7) // 8


class PatchCorePlus:
    """PatchCoreCL++; see the module's text. The other methods of this file are variations of it.

    Args:
        context: embeddings need one step for all channels.
        budget: of rows or bytes. codes: None stores plain vectors.
        route: 'prototype', 'score', 'mean_nn', or 'known': the task must be given.
        max_candidates: patch vectors of a task held for its selection.

    Attributes:
        task_names: tasks learnt. memories: a ``TaskMemory`` a task. quantizers: codebooks, one or one a task.
    """

    def __init__(
        self,
        context: Context,
        budget: Budget,
        codes: Codes | None = None,
        route: str = "prototype",
        max_candidates: int = 50_000,
    ) -> None:
        if route not in ROUTES:
            raise InputError(f"route {route!r}: use one of {ROUTES}")
        self.context, self.budget, self.codes, self.route = context, budget, codes, route
        self.max_candidates = max_candidates
        self._unit = common_unit(context)
        self.task_names: list[str] = []
        self.memories: list[TaskMemory] = []
        self.quantizers: list[ProductQuantizer] = []
        self._totals: list[np.ndarray] = []  # (C,) sums of signatures, where prototypes route

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Learn a task, or more images of one that is there already.

        Raises:
            InputError: no image, or embeddings of another kind. CheckFailed: the budget has no room for another task.
        """
        known = self.task_names.index(task) if task in self.task_names else None
        tasks = len(self.task_names) + (known is None)
        total = _Total(self.context.last_channels)
        candidates, images = draw_candidates(total.watch(embeddings), self.max_candidates, self.context.seed)
        rows = self._share(tasks, candidates)
        self.memories = [self._shrink(i, memory, rows) for i, memory in enumerate(self.memories)]
        self._learn_bank(known, candidates, images, rows)
        if known is None:
            self.task_names.append(task)
        if self.route == "prototype":
            assert total.sum is not None
            number = tasks - 1 if known is None else known
            self._totals[number : number + 1] = [total.sum if known is None else self._totals[known] + total.sum]

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Maps of the known task's bank, or of the one that ``route`` chooses.

        Raises:
            InputError: nothing learnt, embeddings of another kind, or no ``task`` where the route is 'known'.
        """
        if not self.task_names:
            raise InputError("nothing learnt yet; call learn first")
        if task is None and self.route == "known":
            raise InputError("route 'known': give the task's number")
        if task is not None:
            chosen = np.full(len(embeddings), task, np.int64)
        elif self.route == "prototype":
            seen = [memory.images for memory in self.memories]
            prototypes = np.stack([prototype(t, n) for t, n in zip(self._totals, seen, strict=True)])
            chosen = nearest_prototype(signatures(embeddings, self.context.last_channels), prototypes)
        else:
            maps = np.stack([score_bank(embeddings, memory.rows, self._unit) for memory in self.memories])  # (T, n, H, W)
            by_image = maps.max((2, 3)) if self.route == "score" else maps.mean((2, 3))
            chosen = by_image.argmin(0)
            return Scored(maps[chosen, np.arange(len(embeddings))], chosen)
        found = np.empty(embeddings.shape[:3])
        for number in np.unique(chosen):
            mine = chosen == number
            found[mine] = score_bank(embeddings[mine], self.memories[number].rows, self._unit)
        return Scored(found, chosen)

    def nbytes(self) -> int:
        """Rows or codes and image counts, codebooks with their channel orders, prototype sums where they route."""
        banks = sum(m.rows.nbytes if m.codes is None else pack_codes(m.codes, self._bits).nbytes for m in self.memories)
        books = sum(quantizer.codebooks.nbytes + quantizer.indices.nbytes for quantizer in self.quantizers)
        return banks + books + 8 * len(self.memories) + sum(values.nbytes for values in self._totals)

    def state(self) -> dict[str, np.ndarray]:
        """All that is learnt; see ``ContinualMethod``."""
        arrays: dict[str, np.ndarray] = {
            "task_names": np.array(self.task_names, np.str_),
            "images": np.array([memory.images for memory in self.memories], np.int64),
            "totals": np.array(self._totals),
        }
        for i, memory in enumerate(self.memories):
            arrays[f"bank_{i}"] = memory.rows if memory.codes is None else pack_codes(memory.codes, self._bits)
        for i, quantizer in enumerate(self.quantizers):
            arrays[f"codebooks_{i}"], arrays[f"indices_{i}"] = quantizer.codebooks, quantizer.indices
        return arrays

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over a ``state()``."""
        self.task_names = state["task_names"].tolist()
        self._totals = list(state["totals"])
        books = sum(name.startswith("codebooks_") for name in state)
        self.quantizers = [
            ProductQuantizer(state[f"codebooks_{i}"], state[f"indices_{i}"], self._bits) for i in range(books)
        ]
        self.memories = []
        for i, seen in enumerate(state["images"].tolist()):
            rows = state[f"bank_{i}"]
            if self.codes is None:
                self.memories.append(TaskMemory(rows, seen))
            else:
                codes = unpack_codes(rows, self.codes.subspaces, self.codes.bits)
                quantizer = self._quantizer(i)
                self.memories.append(TaskMemory(quantizer.decode(codes), seen, codes, quantizer))

    @property
    def _bits(self) -> int:
        return 8 if self.codes is None else self.codes.bits

    def _quantizer(self, task: int) -> ProductQuantizer:
        assert self.codes is not None
        return self.quantizers[task if self.codes.codebooks == "own" else 0]

    def _share(self, tasks: int, candidates: np.ndarray) -> int:
        """Rows of each of ``tasks`` tasks; ``candidates`` (k, D) tell what a vector takes."""
        if self.budget.rows is not None:
            return shares(self.budget.rows, tasks)
        assert self.budget.nbytes is not None
        depth, item = candidates.shape[1], candidates.itemsize
        left = self.budget.nbytes - tasks * (8 + (8 * self.context.last_channels if self.route == "prototype" else 0))
        row = depth * item
        if self.codes is not None:
            row = self.codes.row_bytes
            left -= ((1 << self.codes.bits) * item + 2) * depth * (tasks if self.codes.codebooks == "own" else 1)
        if left < tasks * row:
            raise CheckFailed(f"budget {self.budget.nbytes} B: no room for {tasks} tasks of {row} B a row; raise it")
        return left // (tasks * row)

    def _shrink(self, task: int, memory: TaskMemory, rows: int) -> TaskMemory:
        return cut(memory, rows)

    def _learn_bank(self, known: int | None, candidates: np.ndarray, images: int, rows: int) -> None:
        """Make or extend one bank of at most ``rows`` rows."""
        number = len(self.memories) if known is None else known
        trains = self.codes is not None and (
            not self.quantizers or self.codes.codebooks == "seen" or (self.codes.codebooks == "own" and known is None)
        )
        quantizer = None if self.codes is None or trains else self._quantizer(number)
        old = None if known is None else self.memories[known]
        self.memories[number : number + 1] = [choose(old, candidates, images, rows, quantizer)]
        if trains:
            self._train(number, candidates)

    def _train(self, number: int, candidates: np.ndarray) -> None:
        """Train codebooks, and encode the rows that they are for."""
        assert self.codes is not None
        shared = self.codes.codebooks != "own"
        mine = list(range(len(self.memories))) if shared else [number]
        rows = np.concatenate([self.memories[i].rows for i in mine])
        others = [self.memories[i].rows for i in mine if i != number]
        rng = np.random.default_rng(self.context.seed)
        normal = np.concatenate([*others, candidates])
        quantizer = fit_quantizer(rows, self.codes.subspaces, self.codes.bits, rng, normal)
        self.quantizers[0 if shared else number :] = [quantizer]
        for i in mine:
            self.memories[i] = quantised(self.memories[i], quantizer)


class PatchCoreCL(PatchCorePlus):
    """PatchCoreCL; see the module's text and ``PatchCorePlus``.

    Args:
        start: where the selection among an old bank's rows begins: 'fixed' (row 0) or 'random'.
    """

    def __init__(
        self,
        context: Context,
        budget: Budget,
        codes: Codes | None = None,
        route: str = "score",
        max_candidates: int = 50_000,
        start: str = "fixed",
    ) -> None:
        if start not in STARTS:
            raise InputError(f"start {start!r}: use one of {STARTS}")
        super().__init__(context, budget, codes, route, max_candidates)
        self.start = start

    def _shrink(self, task: int, memory: TaskMemory, rows: int) -> TaskMemory:
        first = 0
        if self.start == "random":
            rng = np.random.default_rng([self.context.seed, len(self.memories), task])
            first = int(rng.integers(len(memory.rows)))
        order = farthest_first(memory.rows, rows, first).order
        return replace(memory, rows=memory.rows[order], codes=None if memory.codes is None else memory.codes[order])


class PatchCoreSeparate(PatchCorePlus):
    """The bound of a bank a task of M / T rows, T = ``context.tasks``; see ``PatchCorePlus``."""

    def _share(self, tasks: int, candidates: np.ndarray) -> int:
        return super()._share(max(self.context.tasks, tasks), candidates)


class PatchCoreFineTune(PatchCorePlus):
    """The lower bound: all rows for the last task, nothing of those before; see ``PatchCorePlus``. It does not route."""

    def __init__(self, context: Context, budget: Budget, codes: Codes | None = None, max_candidates: int = 50_000) -> None:
        super().__init__(context, budget, codes, "known", max_candidates)

    def _share(self, tasks: int, candidates: np.ndarray) -> int:
        return super()._share(1, candidates)

    def _learn_bank(self, known: int | None, candidates: np.ndarray, images: int, rows: int) -> None:
        self.memories, self.quantizers = [], []
        super()._learn_bank(None, candidates, images, rows)

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Maps of the one bank; ``tasks`` is -1: none was chosen."""
        if not self.task_names:
            raise InputError("nothing learnt yet; call learn first")
        maps = score_bank(embeddings, self.memories[0].rows, self._unit)
        return Scored(maps, np.full(len(embeddings), -1))


class PatchCoreJoint(PatchCoreFineTune):
    """The upper bound: one coreset of all tasks' candidates, which are kept and counted; see ``PatchCorePlus``."""

    def __init__(self, context: Context, budget: Budget, codes: Codes | None = None, max_candidates: int = 50_000) -> None:
        super().__init__(context, budget, codes, max_candidates)
        self._candidates: np.ndarray | None = None  # (k, D)

    def _learn_bank(self, known: int | None, candidates: np.ndarray, images: int, rows: int) -> None:
        kept = self._candidates
        self._candidates = candidates if kept is None else np.concatenate([kept, candidates])
        super()._learn_bank(None, self._candidates, images, rows)

    def nbytes(self) -> int:
        """As ``PatchCorePlus``, and the candidates, which the budget does not hold."""
        return super().nbytes() + (0 if self._candidates is None else self._candidates.nbytes)

    def state(self) -> dict[str, np.ndarray]:
        """All that is learnt; see ``ContinualMethod``."""
        kept = {} if self._candidates is None else {"candidates": self._candidates}
        return {**super().state(), **kept}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over a ``state()``."""
        super().restore(state)
        self._candidates = state.get("candidates")


class _Total:
    """Sums the signatures of a stream that passes by."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.sum: np.ndarray | None = None  # (C,)

    def watch(self, embeddings: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in embeddings:
            part = signatures(batch, self.channels).sum(0)
            self.sum = part if self.sum is None else self.sum + part
            yield batch


def common_unit(context: Context) -> float:
    """Real units of one unit of every channel. Raises InputError where the channels' steps differ."""
    steps = np.unique(context.steps)
    if len(steps) != 1 or not steps[0] > 0:
        raise InputError(f"{len(steps)} different steps: PatchCore compares vectors; make the embedding with one step")
    return float(steps[0])


def score_bank(embeddings: np.ndarray, rows: np.ndarray, unit: float) -> np.ndarray:
    """(n, H, W, D), (K, D) of the same dtype -> (n, H, W) float64 distances to the nearest row in real units.

    Raises:
        InputError: embeddings of another dtype or depth than the bank.
    """
    if embeddings.ndim != 4 or embeddings.dtype != rows.dtype or embeddings.shape[3] != rows.shape[1]:
        found = f"{embeddings.dtype}{embeddings.shape}"
        raise InputError(f"embeddings are {found}; the bank needs {rows.dtype} (n, H, W, {rows.shape[1]})")
    squared, _ = nearest(embeddings.reshape(-1, rows.shape[1]), rows)
    return (np.sqrt(squared.astype(np.float64)) * unit).reshape(embeddings.shape[:3])
