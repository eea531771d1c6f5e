"""From good images to an integer scorer and a threshold, with the features of the exact engine.

Flows in: tapped int8 maps of good images (kept on disk while a build runs), the method and the bytes it may take.
Flows out: the embedding, the fitted scorer, held-out scores and the threshold.

The default method, by a rule that looks at no defect: ``padim-compact`` from five good images on, ``patchcore`` below
(a nearest neighbour needs no covariance). ``padim-compact`` takes the first of these forms whose bank fits the bytes: the
stride-8 grid with d = 48 or 40, which gives the finer heat map; the deepest tap's grid with the largest d of
``DIMENSIONS`` (or with d = 32, before its half falls below six cells a side); half that grid; then half and quarter
grids with ``SMALL_DIMENSIONS``. The other methods take the deepest tap's grid. Reason: in the reference study the image
AUROC of compact banks rises with d up to about 48 to 64, falls quickly below 40, and hardly depends on the grid, which
the heat map needs.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import IO, Any

import numpy as np

from tinyvad.detectors import METHODS, Scorer, task_memory
from tinyvad.detectors.padim import Padim, PadimCompact, compact_bytes
from tinyvad.detectors.student_teacher import Pairs
from tinyvad.detectors.task_gaussians import Space, TaskStatistics, collect_task, scorer_of
from tinyvad.embedding import POOL, Embedding, make_taps
from tinyvad.errors import CheckFailed, InputError
from tinyvad.graph.ir import Tensor
from tinyvad.project import PAIRED, TRAINED

DIMENSIONS = (64, 56, 48, 40)
SMALL_DIMENSIONS = (32, 24, 16, 8)
FINE_DIMENSIONS = (48, 40)
FEWEST_CELLS = 6  # a side: rather than a coarser map, fewer directions
FINE_STRIDE = 8
FEWEST_FOR_GAUSSIANS = 5
FOLDS = 5
LEAVE_ONE_OUT_UP_TO = 10
QUANTILE = 0.99
LARGEST_SCORE = (1 << 32) - 1
BATCH = 64
TASK_OVERHEAD = 432  # of every further product: its row of TASK and THRS, META with the longest name; PROT, LADR on top
BANK_OVERHEAD = 4096  # header, section table, taps, input table, thresholds, golden vectors and names
DEFAULT_BANK_BYTES = 4 << 20  # where neither a target nor the user sets a limit
PATCHCORE_CANDIDATES = 50_000
PATCHCORE_LARGEST = 10_000
CFA_TABLE = 2048  # bytes of exp
CFA_FEWEST = 8  # centres


class TapStore:
    """Tapped int8 maps of many images in an unnamed temporary file; memory stays that of one batch.

    Args:
        tensors: the tapped tensors, which give shapes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [tensor.shape[1:] for tensor in tensors]
        self._sizes = [int(np.prod(shape)) for shape in self.shapes]
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the store
        self.count = 0

    def append(self, maps: Sequence[np.ndarray]) -> None:
        """Add [(n, h, w, c)] int8 maps of n images."""
        n = len(maps[0])
        rows = np.concatenate([m.reshape(n, -1) for m in maps], axis=1)  # (n, bytes of one image)
        self._file.seek(0, 2)
        self._file.write(rows.tobytes())
        self.count += n

    def batches(self, indices: np.ndarray | None = None) -> Iterator[list[np.ndarray]]:
        """[(n, h, w, c)] maps of the chosen images (default: all), up to ``BATCH`` at a time."""
        self._file.flush()
        rows: np.ndarray = np.memmap(self._file, np.int8, "r", shape=(self.count, sum(self._sizes)))
        chosen = np.arange(self.count) if indices is None else indices
        for start in range(0, len(chosen), BATCH):
            block = rows[chosen[start : start + BATCH]]
            parts = np.split(block, np.cumsum(self._sizes)[:-1], axis=1)
            yield [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def embeddings(self, embedding: Embedding | Pairs, indices: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """(n, H, W, D) int8 embeddings of the chosen images, a batch at a time."""
        for maps in self.batches(indices):
            yield embedding.integer(maps)


@dataclass(frozen=True)
class MethodPlan:
    """A method with everything chosen; ``bank_bytes`` is an upper estimate, settings go into the manifest.

    Attributes:
        tasks: products that ``bank_bytes`` holds. rows: memory bank's rows in all of them, 0 without a memory bank.
    """

    method: str
    grid: tuple[int, int]
    settings: dict[str, Any]
    bank_bytes: int
    tasks: int = 1
    rows: int = 0

    @property
    def common_step(self) -> bool:
        """True if distances between vectors count, so that all taps share one unit."""
        return self.method.startswith("patchcore")

    @property
    def pool(self) -> int:
        """Width of the embedding's average pooling; a network that was trained has it inside, or needs none."""
        return 1 if self.method in TRAINED else POOL


def plan_method(
    method: str | None,
    tensors: Sequence[Tensor],
    input_size: int,
    n_images: int,
    limit: int | None,
    grid: int | None = None,
    dimensions: int | None = None,
    seed: int = 0,
    tasks: int = 1,
    of_flash: bool = False,
) -> MethodPlan:
    """Choose method, grid and size under a limit of bank bytes (see the module's text).

    Args:
        method: None picks by the stated rule.
        tensors: the tapped tensors. input_size: pixels of the network's input.
        limit: bytes that the whole bank file may take.
        grid, dimensions: the user's choice of cells a side, and of d for padim-compact.
        tasks: products that the bank must have room for.
        of_flash: the limit is what the target's flash leaves, so that no --bank-bytes can raise it.

    Raises:
        InputError: no such method, or dimensions beyond the embedding.
        CheckFailed: not even the smallest form fits (number, limit, remedy).
    """
    if method is not None and method not in METHODS:
        raise InputError(f"no method called {method}; choose one of {', '.join(METHODS)}")
    if method is None:
        method = "padim-compact" if n_images >= FEWEST_FOR_GAUSSIANS else "patchcore"
    depth = sum(tensor.shape[3] for tensor in tensors)
    if dimensions is not None and not 2 <= dimensions <= depth:
        raise InputError(f"--dimensions {dimensions}: the embedding has {depth}; choose 2 to {depth}")
    of_ladder = 8 * task_memory.LADDER if method.startswith("patchcore") else 0
    overhead = BANK_OVERHEAD + (tasks - 1) * (TASK_OVERHEAD + of_ladder + 4 * tensors[-1].shape[3])
    room = (DEFAULT_BANK_BYTES if limit is None else limit) - overhead
    if method in TRAINED:
        return _plan_trained(method, tensors, room, overhead, tasks)
    smallest = 0
    for cells, choices in _shapes(method, tensors, input_size, grid, dimensions):
        for settings, each, shared, rows in _forms(method, depth, cells, n_images, room, choices, seed, tasks):
            if each * tasks + shared <= room:
                return MethodPlan(method, cells, settings, each * tasks + shared + overhead, tasks, rows)
            smallest = each * tasks + shared
    needs = -(-(smallest + overhead) // 1024)
    of_tasks = "" if tasks == 1 else f" of {tasks} products"
    remedies = [] if tasks == 1 else ["fewer --tasks"]
    remedies += ["another --method", "a larger --target" if of_flash else f"--bank-bytes {needs}K or more"]
    raise CheckFailed(
        f"bank of {method}{of_tasks} {needs} KiB > {(room + overhead) // 1024} KiB: use {', '.join(remedies[:-1])} or "
        + remedies[-1]
    )


def _plan_trained(method: str, tensors: Sequence[Tensor], room: int, overhead: int, tasks: int) -> MethodPlan:
    """Of a network that is trained: its map is the grid, and the bank holds next to nothing but CFA's centres.

    Raises:
        CheckFailed: not even that fits.
    """
    depth, grid = tensors[0].shape[3], (tensors[0].shape[1], tensors[0].shape[2])
    settings: dict[str, Any] = {}
    nbytes = least = depth if method == "simplenet" else 0
    if method in PAIRED:  # the student's maps come first
        grid = max((tensor.shape[1], tensor.shape[2]) for tensor in tensors[: len(tensors) // 2])
    elif method == "cfa":
        shared = 2 * depth * sum(grid) + CFA_TABLE
        centres = min(grid[0] * grid[1], max(room - shared, 0) // depth)
        settings, nbytes, least = {"centres": centres}, shared + centres * depth, shared + CFA_FEWEST * depth
    if least > room:
        needs, has = -(-(overhead + least) // 1024), max(room + overhead, 0) // 1024
        raise CheckFailed(
            f"bank of {method} {needs} KiB > {has} KiB: use --bank-bytes {needs}K or more, another --method or "
            "a larger --target"
        )
    return MethodPlan(method, grid, settings, overhead + nbytes, tasks)


def _shapes(
    method: str, tensors: Sequence[Tensor], input_size: int, grid: int | None, dimensions: int | None
) -> Iterator[tuple[tuple[int, int], Sequence[int]]]:
    """(grid, choices of d) in the order of preference."""
    large: tuple[int, ...] = DIMENSIONS
    small: tuple[int, ...] = SMALL_DIMENSIONS
    fine_choices: tuple[int, ...] = FINE_DIMENSIONS
    if dimensions is not None:
        large = small = fine_choices = (dimensions,)
    if grid is not None:
        yield (grid, grid), (*large, *small)
        return
    maps = sorted({(tensor.shape[1], tensor.shape[2]) for tensor in tensors})
    fine = [cells for cells in maps[1:] if cells[0] * FINE_STRIDE <= input_size]
    if method == "padim-compact" and fine:
        yield fine[-1], fine_choices
    grids = list(_grids(maps[0]))
    yield grids[0], large
    if len(grids) > 1 and min(grids[1]) < FEWEST_CELLS:
        yield grids[0], small[:1]
    for cells in grids[1:2]:
        yield cells, large
    for cells in grids[1:] or grids:
        yield cells, small


def _grids(grid: tuple[int, int]) -> Iterator[tuple[int, int]]:
    while True:
        yield grid
        if max(grid) <= 2:
            return
        grid = (max(grid[0] // 2, 1), max(grid[1] // 2, 1))


def _forms(
    method: str, depth: int, grid: tuple[int, int], n_images: int, room: int, dimensions: Sequence[int], seed: int,
    tasks: int,
) -> Iterable[tuple[dict[str, Any], int, int, int]]:
    """Settings of a method on a grid, best first; bytes of one product, bytes that all share, rows of a memory bank."""
    cells = grid[0] * grid[1]
    if method == "padim-compact":
        choices = sorted({min(d, depth) for d in dimensions}, reverse=True)
        shared = [depth * d + 12 * d for d in choices]
        return [
            ({"dimensions": d, "bits": 4}, compact_bytes(grid, depth, d) - common, common, 0)
            for d, common in zip(choices, shared, strict=True)
        ]
    if method == "padim-lite":
        return [({}, cells * 2 * depth + 1024, 0, 0)]
    if method == "padim":
        channels = [depth, *(d for d in (*DIMENSIONS, *SMALL_DIMENSIONS) if d < depth)]
        return [
            (
                {"channels": d if d < depth else None, "bits": 8, "seed": seed},
                cells * (3 * d + d * (d - 1) // 2) + 2048, 2 * d, 0,
            )
            for d in channels
        ]  # fmt: skip
    from tinyvad.detectors.nearest import SHARED_BYTES, bank_bytes, core_size_for_budget, lite_size_for_budget

    # a memory bank's rows are dealt out among its products, so its bytes do not grow with them
    available = min(n_images * cells, PATCHCORE_LARGEST)
    common = {"max_candidates": PATCHCORE_CANDIDATES, "seed": seed}
    if method == "patchcore":
        least = SHARED_BYTES + tasks * depth  # a row a product
        if room < least:
            return [({}, 0, least, 0)]
        rows = min(core_size_for_budget(room, depth), PATCHCORE_LARGEST)
        size = min(available, rows)
        return [({"bank_size": size, **common}, 0, (size if tasks == 1 else rows) * depth, rows)]
    try:
        rows, subspaces, bits = lite_size_for_budget(room, depth, PATCHCORE_LARGEST, tasks)
    except CheckFailed:
        return [({}, 0, bisect_left(range(1 << 30), True, key=partial(_lite_fits, depth=depth, tasks=tasks)), 0)]
    size = min(available, rows)
    settings = {"bank_size": size, "subspaces": subspaces, "bits": bits, **common}
    if tasks == 1:
        return [(settings, 0, bank_bytes(size, depth, subspaces, bits), rows)]
    own = (1 << bits) * depth + 2 * depth  # codebooks and channel order; V is fixed, however few images come first
    return [({**settings, "centroids": 1 << bits}, own, rows * ((subspaces * bits + 7) // 8), rows)]


def _lite_fits(room: int, depth: int, tasks: int) -> bool:
    from tinyvad.detectors.nearest import lite_size_for_budget

    try:
        lite_size_for_budget(room, depth, PATCHCORE_LARGEST, tasks)
    except CheckFailed:
        return False
    return True


def make_detector(plan: MethodPlan, embedding: Embedding) -> Any:
    """The unfitted detector of a plan."""
    settings = dict(plan.settings)
    if plan.method == "padim-compact":
        return PadimCompact(steps=embedding.steps, **settings)
    if plan.method.startswith("padim"):
        return Padim(steps=embedding.steps, diagonal=plan.method == "padim-lite", **settings)
    from tinyvad.detectors.patchcore import PatchCore, PatchCoreLite

    kind = PatchCoreLite if plan.method == "patchcore-lite" else PatchCore
    return kind(step=float(embedding.steps[0]), **settings)


class _Learnable:
    """A PaDiM detector of a build for several products: the first of them fixes the bank's ``Space``."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def collect(self, embeddings: Iterable[np.ndarray]) -> TaskStatistics:
        return collect_task(self.space, embeddings)

    def fit_statistics(self, statistics: TaskStatistics) -> _Learnable:
        self.statistics_ = statistics
        return self

    def to_scorer(self) -> Scorer:
        return scorer_of(self.space, self.statistics_)


def make_space(store: TapStore, embedding: Embedding, plan: MethodPlan) -> Space:
    """How a PaDiM bank for several products sees an embedding, from the good images of the first."""
    settings = dict(plan.settings)
    if plan.method == "padim-compact":
        statistics = PadimCompact(steps=embedding.steps, **settings).collect(store.embeddings(embedding))
        return Space.compact(statistics, settings["dimensions"], embedding.steps, settings["bits"])
    if plan.method == "padim-lite":
        return Space.plain(embedding.steps, bits=0)
    return Space.plain(embedding.steps, settings["bits"], settings["channels"], settings["seed"])


def make_embedding(store: TapStore, tensors: Sequence[Tensor], plan: MethodPlan) -> Embedding:
    """The embedding whose units hold what the good images showed."""
    unit = Embedding(make_taps(tensors, [127 / 1.2] * len(tensors), False), plan.grid, plan.pool)
    limits = np.zeros(len(tensors))
    offsets = np.cumsum([0, *(tensor.shape[3] for tensor in tensors)])
    for maps in store.batches():
        real = [(m.astype(np.float32) - tap.zero_point) * tap.scale for m, tap in zip(maps, unit.taps, strict=True)]
        pooled = np.abs(unit.real(real)).max((0, 1, 2))  # (D,)
        limits = np.maximum(limits, [pooled[a:b].max() for a, b in pairwise(offsets)])
    return Embedding(make_taps(tensors, limits.tolist(), plan.common_step), plan.grid, plan.pool)


@dataclass(frozen=True, eq=False)
class Fit:
    """What ``fit_and_hold_out`` gives.

    Attributes:
        scorer: fitted on all images. held_out: (m,) int64 scores of good images by scorers that have not seen them.
        statistics: exact sums of all images in the space of a bank for several products, else None.
        ladder: (L, 2) uint32, of a memory bank: the thresholds that its prefixes would have (LADR), else None.
    """

    scorer: Scorer
    held_out: np.ndarray
    statistics: TaskStatistics | None = None
    ladder: np.ndarray | None = None


def fit_and_hold_out(
    store: TapStore,
    embedding: Embedding,
    plan: MethodPlan,
    quantile: float = QUANTILE,
    copies: TapStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fit on all images, and score good images by scorers that have not seen them.

    Cross-fitting: the images are dealt into folds in turn, each fold is scored by a detector fitted on the rest. Up to
    ten images every fold is one image (leave one image out), else there are five. A single image can't be held out: its
    shifted ``copies`` are scored instead (see ``shifted_copies``). The sums of the PaDiM family are exact, so a fold is
    taken off the whole instead of summing up the rest anew.
    """
    if plan.method.startswith("patchcore"):
        return _fit_memory(store, embedding, plan, quantile, copies, progress)
    learnable = plan.tasks > 1
    detector: Any = _Learnable(make_space(store, embedding, plan)) if learnable else make_detector(plan, embedding)
    folds = deal(store.count)
    parts = [detector.collect(store.embeddings(embedding, fold)) for fold in folds]
    whole = reduce(type(parts[0]).merge, parts)
    scorer: Scorer = detector.fit_statistics(whole).to_scorer()
    statistics = whole if learnable else None
    if copies is not None:
        return Fit(scorer, image_scores(scorer, copies.embeddings(embedding)), statistics)
    scores = np.zeros(store.count, np.int64)
    for done, (held, part) in enumerate(zip(folds, parts, strict=True)):
        blind = detector.fit_statistics(whole.without(part)).to_scorer()
        scores[held] = image_scores(blind, store.embeddings(embedding, held))
        if progress is not None:
            progress(done + 1, len(folds))
    return Fit(scorer, scores, statistics)


def deal(n: int) -> list[np.ndarray]:
    """Numbers of the images of each fold of a cross-fit over n images."""
    count = n if n <= LEAVE_ONE_OUT_UP_TO else FOLDS
    return [np.arange(fold, n, count) for fold in range(count)]


def _fit_memory(
    store: TapStore,
    embedding: Embedding,
    plan: MethodPlan,
    quantile: float,
    copies: TapStore | None,
    progress: Callable[[int, int], None] | None,
) -> Fit:
    """``fit_and_hold_out`` of the memory banks, whose prefixes are scored along."""
    detector = make_detector(plan, embedding).fit(store.embeddings(embedding))
    scorer: Scorer = detector.to_scorer()
    sizes = task_memory.ladder_sizes(len(detector.memory_bank_))
    if copies is not None:
        scores = task_memory.nested_scores(_memory(detector), sizes, copies.embeddings(embedding))
    else:
        scores = np.zeros((len(sizes), store.count), np.int64)
        folds = deal(store.count)
        for done, held in enumerate(folds):
            rest = np.setdiff1d(np.arange(store.count), held)
            blind = _memory(make_detector(plan, embedding).fit(store.embeddings(embedding, rest)))
            scores[:, held] = task_memory.nested_scores(blind, sizes, store.embeddings(embedding, held))
            if progress is not None:
                progress(done + 1, len(folds))
    ladder = task_memory.ladder_of_scores(sizes, scores, lambda row: threshold_of(row, quantile))
    return Fit(scorer, scores[0], None, ladder)


def _memory(detector: Any) -> task_memory.TaskMemory:
    """What a PatchCore detector stores; of a quantised one the decoded vectors, whose distances are its own."""
    codes = getattr(detector, "codes_", None)
    return task_memory.TaskMemory(detector.memory_bank_ if codes is None else detector.quantizer_.decode(codes), 0, codes)


def shifted_copies(image: np.ndarray) -> np.ndarray:
    """(16, S, S, 3) uint8: an image moved by 2 pixels in eight directions (edges repeated), darker and brighter by 3 %.

    What a camera and a fixture do to one and the same good part: the least that a threshold must let through.
    """
    wide = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge").astype(np.int64)
    height, width, _ = image.shape
    moves = [(dy, dx) for dy in (0, 2, 4) for dx in (0, 2, 4) if (dy, dx) != (2, 2)]
    moved = np.stack([wide[dy : dy + height, dx : dx + width] for dy, dx in moves])
    return np.concatenate([np.clip((moved * gain + 50) // 100, 0, 255) for gain in (97, 103)]).astype(np.uint8)


def image_scores(scorer: Scorer, embeddings: Iterable[np.ndarray]) -> np.ndarray:
    """(n,) int64: the largest squared distance of each image."""
    return np.concatenate([scorer.score(batch).max((1, 2)).astype(np.int64) for batch in embeddings])


def threshold_of(scores: np.ndarray, quantile: float = QUANTILE) -> int:
    """The smallest integer that at most a share of 1 - quantile of the good images reaches (at most the largest score)."""
    ordered = np.sort(scores)[::-1]
    allowed = int((1 - quantile) * len(scores) + 1e-9)
    return min(int(ordered[allowed]) + 1, LARGEST_SCORE)
