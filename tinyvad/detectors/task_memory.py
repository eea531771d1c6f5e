"""Memory banks of several products (tasks) within one number of rows: what ``tinyvad learn`` does to CORE and PQPC banks.

Flows in: int8 embeddings (n, H, W, D) of one product, and the memories that there are. Flows out: a ``TaskMemory`` a task
and its ladder of thresholds; ``tinyvad.detectors.tasks`` makes the bank's sections of them.

With c tasks in M rows, each has M // c. A task's rows lie in greedy order (``tinyvad.detectors.coreset``), so a task gives
way to the next by being cut to its first rows, which is the same as selecting anew among its rows from row 0 on. Distances
grow with the cut, so each task keeps thresholds for the sizes that it may be cut to (section ``LADR``).

In a product-quantised bank every task has codebooks of its own, because those of one product serve another badly (figures:
``tinyvad.continual.patchcore``). A new task's rows are selected first, then its codebooks are trained on them, as
``PatchCoreLite`` does. More images of an old task are quantised first, with the task's codebooks, and selected as decoded
vectors: then the order is greedy among the vectors that are really stored.

Source: PatchCoreCL++ (banks of M / c vectors, cut to a prefix); Gonzalez 1985 for what a cut bank still covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.distances import nearest
from tinyvad.detectors.product_quantizer import ProductQuantizer
from tinyvad.detectors.reservoir import Reservoir
from tinyvad.errors import CheckFailed, InputError

LADDER = 16  # sizes of a ladder: halved every second step, down to 1 / 181


@dataclass(frozen=True, eq=False)
class TaskMemory:
    """One task's part of a memory bank.

    Attributes:
        rows: (K_t, D) int8 in greedy order, float32 for study; of a quantised bank the decoded vectors.
        images: how many images were seen.
        codes: (K_t, M) uint8 of ``rows`` in a quantised bank, else None. quantizer: that made them.
    """

    rows: np.ndarray
    images: int
    codes: np.ndarray | None = None
    quantizer: ProductQuantizer | None = None


def shares(total_rows: int, tasks: int) -> int:
    """Rows of each of ``tasks`` tasks in ``total_rows``: total_rows // tasks.

    Raises:
        CheckFailed: less than one row a task.
    """
    if total_rows < tasks:
        raise CheckFailed(f"memory bank of {total_rows} rows: no room for {tasks} products; build with more --bank-bytes")
    return total_rows // tasks


def cut(memory: TaskMemory, rows: int) -> TaskMemory:
    """The first ``rows`` rows of a task: the greedy coreset of that size, for nothing."""
    if rows < 1:
        raise InputError(f"task cut to {rows} rows; a task keeps at least 1")
    return replace(memory, rows=memory.rows[:rows], codes=None if memory.codes is None else memory.codes[:rows])


def select(
    embeddings: Iterable[np.ndarray],
    rows: int,
    max_candidates: int,
    seed: int,
    train: Callable[[np.ndarray, np.ndarray], ProductQuantizer] | None = None,
) -> TaskMemory:
    """Select a new task's memory from a stream of its embeddings, as ``PatchCore`` does, in one pass.

    Args:
        embeddings: batches (n, H, W, D), int8 or float32.
        rows: at most so many; fewer where patches repeat.
        max_candidates: patch vectors held for the selection, drawn uniformly where there are more.
        seed: of that draw.
        train: of a quantised bank: rows (K_t, D) and candidates (k, D) -> the task's codebooks.

    Raises:
        InputError: an empty stream, a batch of another kind than (n, H, W, D), values that are not finite.
    """
    candidates, images = draw_candidates(embeddings, max_candidates, seed)
    memory = choose(None, candidates, images, rows)
    return memory if train is None else quantised(memory, train(memory.rows, candidates))


def extend(
    memory: TaskMemory,
    embeddings: Iterable[np.ndarray],
    rows: int,
    max_candidates: int,
    seed: int,
) -> TaskMemory:
    """More images of a task that is already in the bank; its old images are not needed.

    Farthest-first selection over the old rows followed by the new candidates, from old row 0 on, cut to ``rows``. What
    that guarantees: if every old patch lay within r of the old rows, and the selection reaches radius p over old rows and
    new candidates together, then every old patch lies within r + p of the new rows and every new candidate within p; p
    is at most twice what the best choice of that many vectors could reach. Where ``rows`` holds everything, no old row is
    lost; and images that bring no new vector change nothing in a memory of distinct rows that ``select`` or ``extend``
    made. A quantised memory keeps its codebooks.

    Args:
        memory: what there is. The other arguments and errors are those of ``select``.
    """
    candidates, images = draw_candidates(embeddings, max_candidates, seed)
    return choose(memory, candidates, images, rows, memory.quantizer)


def draw_candidates(embeddings: Iterable[np.ndarray], max_candidates: int, seed: int) -> tuple[np.ndarray, int]:
    """(k, D) patch vectors of a stream, k <= ``max_candidates``, drawn as ``PatchCore`` draws them; and its images."""
    reservoir, images, kind = Reservoir(max_candidates, seed), 0, None
    for batch in embeddings:
        if batch.ndim != 4 or batch.dtype not in (np.int8, np.float32) or batch.shape[3] == 0:
            raise InputError(f"embeddings are {batch.dtype}{batch.shape}; give (n, H, W, D) int8 or float32")
        kind = (batch.dtype, batch.shape[3]) if kind is None else kind
        if kind != (batch.dtype, batch.shape[3]):
            was = f"{kind[0]}, D = {kind[1]}"
            raise InputError(f"embeddings changed from {was} to {batch.dtype}{batch.shape}; give one kind")
        reservoir.add(batch.reshape(-1, batch.shape[3]))
        images += len(batch)
    if images == 0:
        raise InputError("learning a product needs at least one good image")
    return reservoir.sample(), images


def choose(
    old: TaskMemory | None, candidates: np.ndarray, images: int, rows: int, quantizer: ProductQuantizer | None = None
) -> TaskMemory:
    """Selection from (k, D) candidates of ``images`` images that are drawn already, after the rows of an old memory.

    Args:
        quantizer: the candidates are selected as the vectors that its codes stand for.
    """
    codes = None
    if quantizer is not None:
        codes = quantizer.encode(candidates)  # (k, M) uint8
        candidates = quantizer.decode(codes)
    if old is not None:
        if candidates.dtype != old.rows.dtype or candidates.shape[1] != old.rows.shape[1]:
            found = f"{candidates.dtype}, {candidates.shape[1]} values"
            raise InputError(f"embeddings are {found}; the task has {old.rows.dtype}, {old.rows.shape[1]} values")
        candidates, images = np.concatenate([old.rows, candidates]), old.images + images
        if codes is not None and old.codes is not None:
            codes = np.concatenate([old.codes, codes])
    order = farthest_first(candidates, rows, None if old is None else 0).order
    return TaskMemory(candidates[order], images, None if codes is None else codes[order], quantizer)


def quantised(memory: TaskMemory, quantizer: ProductQuantizer) -> TaskMemory:
    """A memory in the codes of a quantiser: its rows become those that are stored."""
    codes = quantizer.encode(memory.rows)
    return replace(memory, rows=quantizer.decode(codes), codes=codes, quantizer=quantizer)


def ladder_sizes(rows: int) -> list[int]:
    """The sizes of a ladder: rows * 2**(-i / 2), i = 0 to 15, rounded, falling, without repetitions."""
    sizes = [int(rows * 2 ** (-i / 2) + 0.5) for i in range(LADDER)]
    return sorted({max(size, 1) for size in sizes}, reverse=True)


def nested_scores(memory: TaskMemory, sizes: Sequence[int], embeddings: Iterable[np.ndarray]) -> np.ndarray:
    """Image scores against every prefix of a memory in one pass over its rows.

    A prefix adds a block of rows to the one before it, so its distances are the running minimum over blocks.

    Args:
        sizes: falling row counts; one beyond the memory's rows means all of them.
        embeddings: (n, H, W, D) int8 batches.

    Returns:
        (len(sizes), images) int64 largest squared distance of each image.
    """
    found = []
    for batch in embeddings:
        queries = batch.reshape(-1, batch.shape[3])
        best = np.full(len(queries), np.inf)
        scores = np.zeros((len(sizes), len(batch)), np.int64)
        start = 0
        for i in reversed(range(len(sizes))):
            stop = min(sizes[i], len(memory.rows))
            if stop > start:
                best = np.minimum(best, nearest(queries, memory.rows[start:stop])[0])
            start = max(start, stop)
            scores[i] = best.reshape(len(batch), -1).max(1)
        found.append(scores)
    return np.concatenate(found, axis=1)


def ladder(
    embeddings: Callable[[np.ndarray], Iterable[np.ndarray]],
    folds: Sequence[np.ndarray],
    rows: int,
    fit: Callable[[Iterable[np.ndarray]], TaskMemory],
    threshold: Callable[[np.ndarray], int],
) -> np.ndarray:
    """Thresholds of a task for all sizes that it may be cut to, from good images that the memory has not seen.

    Cross-fitting: each fold is scored by a memory that was fitted on the other folds, at all sizes at once.

    Args:
        embeddings: image numbers -> batches (n, H, W, D) int8 of these images, new every time.
        folds: the image numbers of each fold, together 0 to n - 1; at least two folds.
        rows: of the task's memory, the largest size.
        fit: embeddings -> memory of at most ``rows`` rows: ``select`` or ``extend`` with everything else fixed.
        threshold: (n,) int64 scores of held-out good images -> the threshold.

    Returns:
        (L, 2) uint32 (rows, threshold), rows falling.
    """
    if len(folds) < 2:
        raise InputError("a single image can't be held out; give its shifted copies to ladder_of_scores instead")
    sizes = ladder_sizes(rows)
    numbers = np.sort(np.concatenate(folds))
    scores = np.zeros((len(sizes), len(numbers)), np.int64)
    for held in folds:
        blind = fit(embeddings(np.setdiff1d(numbers, held)))
        scores[:, np.searchsorted(numbers, held)] = nested_scores(blind, sizes, embeddings(held))
    return ladder_of_scores(sizes, scores, threshold)


def ladder_of_scores(sizes: Sequence[int], scores: np.ndarray, threshold: Callable[[np.ndarray], int]) -> np.ndarray:
    """(L, 2) uint32 from falling sizes and (L, n) held-out scores; see ``ladder`` and ``nested_scores``."""
    return np.array([(size, threshold(row)) for size, row in zip(sizes, scores, strict=True)], np.uint32)


def threshold_at(ladder: np.ndarray, rows: int) -> int:
    """The threshold of (L, 2) pairs for a task of ``rows`` rows: that of the pair with the most rows not above it."""
    fitting = np.flatnonzero(ladder[:, 0] <= rows)
    return int(ladder[fitting[0] if len(fitting) else -1, 1])


def novelty(rows: np.ndarray, share: int) -> int:
    """Squared distance from the row behind the first ``share`` rows to them: how finely a share covers a product.

    Args:
        rows: (K, D) int8 in greedy order; if there are no more than ``share``, the last row counts.
    """
    behind = min(share, len(rows) - 1)
    return int(nearest(rows[behind : behind + 1], rows[:behind])[0][0]) if behind else 0


def stack_ladders(ladders: Sequence[np.ndarray]) -> np.ndarray:
    """(T, L, 2) uint32, section ``LADR``: shorter ladders repeat their last pair."""
    length = max(len(steps) for steps in ladders)
    return np.stack([np.pad(steps, ((0, length - len(steps)), (0, 0)), mode="edge") for steps in ladders])
