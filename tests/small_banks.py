"""Small banks of every kind, made of random integers, not fitted: readers and scorers must agree on every bank that is well
formed, and random ones reach their corners sooner.

``python tests/small_banks.py FOLDER`` writes them as the first inputs of the fuzzer (export/fuzz).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bank import Header, pack_meta, read_bank, write_bank
from tinyvad.detectors import Scorer, check_bank
from tinyvad.detectors.centres import TABLE, CentresScorer
from tinyvad.detectors.linear import LinearScorer
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import ProductQuantizer
from tinyvad.detectors.student_teacher import Pairs, StudentTeacherScorer
from tinyvad.detectors.triangular import Projection, TriangularScorer
from tinyvad.embedding import Embedding, Tap, tap_matrix
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier


@dataclass(frozen=True, eq=False)
class Small:
    """A bank in memory and what it was made of."""

    data: bytes
    embedding: Embedding | Pairs
    scorer: Scorer
    sections: dict[str, np.ndarray]
    header: Header
    tasks: tuple[Scorer, ...] = ()  # of a bank of several, else there is only ``scorer``

    def maps(self, rng: np.random.Generator, extreme: bool = False) -> list[np.ndarray]:
        """Random tapped maps [(h, w, C)] int8; ``extreme`` ones hold the two ends of the range only."""
        shapes = [(*tap.size, tap.channels) for tap in self.embedding.taps]
        if extreme:
            return [rng.choice(np.array([-128, 127], np.int8), shape) for shape in shapes]
        return [rng.integers(-128, 128, shape).astype(np.int8) for shape in shapes]

    def task(self, maps: list[np.ndarray]) -> int:
        """The task of an image, by the words of the SPEC."""
        if not self.tasks:
            return 0
        channels = self.embedding.taps[-1].channels
        vectors = self.routed(maps)[0, ..., -channels:].reshape(-1, channels)
        signature = [sum(int(v) for v in channel) for channel in vectors.T]
        far = [sum((a - int(b)) ** 2 for a, b in zip(signature, row, strict=True)) for row in self.sections["PROT"]]
        return far.index(min(far))

    def routed(self, maps: list[np.ndarray]) -> np.ndarray:
        """(1, ...) int8, whose last values make an image's signature: its embedding, else its last map."""
        return maps[-1][None] if self.embedding.native else self.embedding.integer([q[None] for q in maps])

    def embeddings(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """What the scorer takes, of n random images."""
        if self.embedding.native:
            return self.embedding.integer([np.stack(maps) for maps in zip(*(self.maps(rng) for _ in range(n)))])
        return rng.integers(-127, 128, (n, *self.embedding.grid, self.embedding.depth)).astype(np.int8)

    def threshold(self, maps: list[np.ndarray]) -> int:
        return int(self.sections["THRS"][self.task(maps)])

    def expected(self, maps: list[np.ndarray]) -> np.ndarray:
        """(grid_h, grid_w) uint32: the scores of the image's own task, by that task's scorer alone."""
        scorer = self.tasks[self.task(maps)] if self.tasks else self.scorer
        return scorer.score(self.embedding.integer([q[None] for q in maps]))[0]


LEARNT = {  # by the first letters of the kind
    "PAD": ("MEAN", "SCAL", "TABL", "CHOL"), "COR": ("BANK",), "PQP": ("CODE", "INDX", "CBK "),
}  # fmt: skip
SIZES = ((9, 7), (4, 5), (2, 3))  # finer than, about equal to and coarser than most grids


def small_embedding(
    rng: np.random.Generator, grid: tuple[int, int], channels: tuple[int, ...], sizes: Any = SIZES, pool: int = 3
) -> Embedding:
    taps = tuple(
        Tap(f"t{i}", size, c, float(rng.uniform(0.01, 0.1)), int(rng.integers(-128, 128)), float(rng.uniform(0.01, 0.1)))
        for i, (size, c) in enumerate(zip(sizes, channels))
    )
    return Embedding(taps, grid, pool)


def triangular(
    rng: np.random.Generator, grid: tuple[int, int], depth: int, values: int, bits: int, mode: int
) -> TriangularScorer:
    """Any PaDiM scorer; its tables span the range up to saturation."""
    pairs = values * (values - 1) // 2
    reach_of_tables = 1 << rng.integers(10, 33, (2, 1))  # of A and of S
    table = np.sort(rng.integers(0, reach_of_tables, (2, 256))).astype(np.uint32)
    projection = None
    if mode == 2:
        factors = rng.integers(1 << 30, 1 << 31, values)
        projection = Projection(
            rng.integers(-128, 128, (depth, values)).astype(np.int8), rng.integers(-(1 << 16), 1 << 16, values), factors,
            rng.integers(-14, -5, values),
        )  # fmt: skip
    codes = rng.integers(0, 256, (2, *grid, values)).astype(np.uint8)
    reach = 8 if bits == 4 else 128
    return TriangularScorer(
        rng.integers(-128, 128, (*grid, values)).astype(np.int8), codes[0], table[0], bits,
        codes[1] if bits else None, table[1] if bits else None,
        rng.integers(-reach, reach, (*grid, pairs)).astype(np.int8) if bits else None,
        rng.choice(depth, values, replace=False).astype(np.uint16) if mode == 1 else None, projection,
    )  # fmt: skip


def quantised(
    rng: np.random.Generator, rows: int, depth: int, subspaces: int, bits: int, centroids: int | None = None
) -> PatchCoreLiteScorer:
    """A scorer with random codebooks; ``centroids`` None: as many as there are rows, up to all that the bits name."""
    centroids = min(1 << bits, rows) if centroids is None else centroids
    books = rng.integers(-128, 128, (subspaces, centroids, depth // subspaces)).astype(np.int8)
    codes = rng.integers(0, centroids, (rows, subspaces)).astype(np.uint8)
    return PatchCoreLiteScorer(ProductQuantizer(books, rng.permutation(depth).astype(np.uint16), bits), codes, 0.25)


def memory(rng: np.random.Generator, rows: int, depth: int) -> PatchCoreScorer:
    return PatchCoreScorer(rng.integers(-128, 128, (rows, depth)).astype(np.int8), 0.25)


def linear(rng: np.random.Generator, depth: int) -> LinearScorer:
    """A layer whose scores are cut off at 0 on some random cells."""
    return LinearScorer(rng.integers(-128, 128, depth).astype(np.int8), int(rng.integers(0, 1 << 13)), 0.25)


def centres(rng: np.random.Generator, grid: tuple[int, int], count: int, depth: int, shift: int = 0) -> CentresScorer:
    """Centres of random features; a table of any numbers, most of the time steps of it that matter."""
    unit, step_bits = float(rng.uniform(0.001, 0.1)), int(rng.integers(0, 16))
    table = rng.integers(0, (1 << 16) + 1, TABLE).astype(np.uint32)
    table[:2] = 1 << 16
    offsets = rng.integers(-(100 << shift), 100 << shift, (grid[0] + grid[1], depth)).astype(np.int16)
    points = rng.integers(-128, 128, (count, depth)).astype(np.int8)
    return CentresScorer(points, offsets, table, grid, shift, step_bits, unit)


def student(
    rng: np.random.Generator, grid: tuple[int, int], channels: tuple[int, ...] = (3, 3), sizes: Any = ((7, 5), (3, 4))
) -> tuple[Pairs, StudentTeacherScorer]:
    """A student's and a teacher's maps, and their scorer; the last map has twelve positions."""
    taps = tuple(
        Tap(f"{who}{i}", size, c, float(rng.uniform(0.01, 0.1)), int(rng.integers(-128, 128)), 0.1)
        for who in "st" for i, (size, c) in enumerate(zip(sizes, channels))
    )  # fmt: skip
    pairs = Pairs(tuple(replace(tap, step=tap.scale) for tap in taps), grid)
    most = len(channels) * (pairs.bits + 1) - 32  # with it nothing is cut off
    return pairs, StudentTeacherScorer(pairs.layers, grid, int(np.clip(most + rng.integers(-4, 3), 0, 31)))


def bank_of(
    rng: np.random.Generator, embedding: Embedding | Pairs, scorer: Scorer, golden: int = 2, align: int = 16
) -> Small:
    """The bank of an embedding and a scorer, as a build writes it."""
    grid = embedding.grid
    test = rng.integers(-127, 128, (golden, embedding.depth)).astype(np.int8)
    places = rng.integers(0, grid[0] * grid[1], golden)
    gold = [[0, place, _score_at(scorer, embedding, vector, place)] for vector, place in zip(test, places)]
    sections: dict[str, np.ndarray] = {
        "LUT ": rng.integers(-128, 128, (3, 256)).astype(np.int8),
        **embedding.sections(),
        "THRS": np.array([rng.integers(0, 1 << 20)], np.uint32),
        **scorer.sections(),
        **({"TEST": test, "GOLD": np.array(gold, np.uint32)} if golden else {}),
        "META": pack_meta({"method": scorer.kind}),
    }
    header = Header(scorer.kind, 0x12345678, (32, 48), grid, len(embedding.taps), generation=3, align=align)
    data = write_bank(header, sections, ("LUT ", "TAPS", "THRS", *scorer.required))
    return Small(data, embedding, scorer, sections, header)


def bank_of_tasks(
    rng: np.random.Generator, embedding: Embedding | Pairs, scorers: list[Scorer], golden: int = 3, ladder: int = 3
) -> Small:
    """A bank of several tasks, its sections put together by the words of the SPEC."""
    grid, count, kind = embedding.grid, len(scorers), scorers[0].kind
    parts = [scorer.sections() for scorer in scorers]
    learnt = LEARNT.get(kind[:3], ())
    sections = {tag: np.concatenate([p[tag] for p in parts]) if tag in learnt else a for tag, a in parts[0].items()}
    rows_of = {"PADM": "MEAN", "PADF": "MEAN", "PADC": "MEAN", "CORE": "BANK", "PQPC": "CODE"}.get(kind)
    each = [len(p[rows_of]) if rows_of else 1 for p in parts]
    if kind in ("CORE", "PQPC"):
        sections["CFG "] = np.array([sum(each), *parts[0]["CFG "][1:]], np.int32)
        falling = np.sort(rng.integers(1, 50, (count, ladder)), axis=1)[:, ::-1]
        sections["LADR"] = np.stack([falling, rng.integers(0, 1 << 20, (count, ladder))], -1).astype(np.uint32)
    rows = [[sum(each[:t]), each[t], int(rng.integers(0, 99)), 0] for t in range(count)]
    channels, size = embedding.taps[-1].channels, embedding.taps[-1].size if embedding.native else grid
    cells = size[0] * size[1]
    spread = max(1, int(127 * cells**0.5))  # as wide as the signatures of random images: every task comes
    sections["TASK"] = np.array(rows, np.int32)
    sections["PROT"] = rng.integers(-spread, spread + 1, (count, channels)).clip(-127 * cells, 127 * cells).astype(np.int32)
    test = rng.integers(-127, 128, (golden, embedding.depth)).astype(np.int8)
    asked = [(i % count, int(rng.integers(grid[0] * grid[1]))) for i in range(golden)]
    gold = [[t, at, _score_at(scorers[t], embedding, vector, at)] for vector, (t, at) in zip(test, asked, strict=True)]
    sections = {
        "LUT ": rng.integers(-128, 128, (3, 256)).astype(np.int8),
        **embedding.sections(),
        "THRS": rng.integers(0, 1 << 20, count).astype(np.uint32),
        **sections,
        "LRN ": np.array([1 << 20, 9, 1 << 12, 4, 99, 0, 0, 0], np.uint32),
        **({"TEST": test, "GOLD": np.array(gold, np.uint32)} if golden else {}),
        "META": pack_meta({"tasks": [{"name": f"part {t}"} for t in range(count)]}),
    }  # fmt: skip
    header = Header(kind, 0x12345678, (32, 48), grid, len(embedding.taps), generation=3)
    data = write_bank(header, sections, ("LUT ", "TAPS", "THRS", "TASK", "PROT", *scorers[0].required))
    return Small(data, embedding, scorers[0], sections, header, tuple(scorers))


def _score_at(scorer: Scorer, embedding: Embedding | Pairs, vector: np.ndarray, place: int) -> int:
    return int(scorer.score(embedding.with_vector(vector, place)).reshape(-1)[place])


def every_kind(rng: np.random.Generator, grid: tuple[int, int] = (3, 4)) -> dict[str, Small]:
    """A small bank of every kind, with and without a projection or chosen channels, in 4 and 8 bits."""
    e = small_embedding(rng, grid, (5, 4, 3))
    scorers: dict[str, Scorer] = {
        "padim-lite": triangular(rng, grid, 12, 12, 0, 0),
        "padim-lite chosen": triangular(rng, grid, 12, 5, 0, 1),
        "padim-lite projected": triangular(rng, grid, 12, 5, 0, 2),
        "padim": triangular(rng, grid, 12, 12, 8, 0),
        "padim chosen": triangular(rng, grid, 12, 11, 8, 1),
        "padim 4 bits": triangular(rng, grid, 12, 12, 4, 0),
        "padim-compact": triangular(rng, grid, 12, 10, 4, 2),
        "padim-compact 8 bits": triangular(rng, grid, 12, 3, 8, 2),
        "patchcore": memory(rng, 20, 12),
        "patchcore-lite": quantised(rng, 300, 12, 4, 8),
        "patchcore-lite few rows": quantised(rng, 20, 12, 6, 8),
        "patchcore-lite 4 bits": quantised(rng, 30, 12, 3, 4),
        "patchcore-lite 4 bits, few rows": quantised(rng, 9, 12, 6, 4),
        "linear": linear(rng, 12),
        "centres": centres(rng, grid, 20, 12),
        "centres shifted": centres(rng, grid, 3, 12, 5),
    }
    made = {name: bank_of(rng, e, scorer) for name, scorer in scorers.items()}
    return {**made, "student": bank_of(rng, *student(rng, grid))}


def every_kind_of_tasks(rng: np.random.Generator, count: int, grid: tuple[int, int] = (3, 4)) -> dict[str, Small]:
    """``every_kind`` with ``count`` tasks that share projection and chosen channels."""
    e = small_embedding(rng, grid, (5, 4, 3))

    def gaussians(values: int, bits: int, mode: int) -> list[Scorer]:
        made = [triangular(rng, grid, 12, values, bits, mode) for _ in range(count)]
        return [replace(one, projection=made[0].projection, indices=made[0].indices) for one in made]

    def memories() -> list[Scorer]:
        return [memory(rng, int(rows), 12) for rows in rng.integers(1, 20, count)]

    def quantisers(centroids: int, subspaces: int, bits: int) -> list[Scorer]:
        made = [quantised(rng, int(rows), 12, subspaces, bits, centroids) for rows in rng.integers(1, 40, count)]
        return list(made)

    kinds: dict[str, list[Scorer]] = {
        "padim-lite": gaussians(12, 0, 0), "padim-lite chosen": gaussians(5, 0, 1), "padim chosen": gaussians(11, 8, 1),
        "padim-compact": gaussians(10, 4, 2), "padim-compact 8 bits": gaussians(3, 8, 2), "patchcore": memories(),
        "patchcore-lite": quantisers(256, 4, 8), "patchcore-lite 4 bits": quantisers(7, 6, 4),
        "patchcore-lite of one centroid": quantisers(1, 3, 8), "linear": [linear(rng, 12)] * count,
        "centres": [centres(rng, grid, 15, 12)] * count,
    }  # fmt: skip
    pairs, one = student(rng, grid)
    return {
        **{name: bank_of_tasks(rng, e, scorers) for name, scorers in kinds.items()},
        "student": bank_of_tasks(rng, pairs, [one] * count),
    }


def scores_of(data: bytes, maps: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """(grid_h, grid_w) uint32 and the task: what Python gives for a bank as the device reads it, TAPS without STEP."""
    bank = read_bank(data)
    rows, scorers = check_bank(bank)
    if bank.header.kind == "STFP":
        tasks = scorers.route(maps[-1][None])
        taps = tuple(Tap("", (r[0], r[1]), r[2], 1.0, r[3], 1.0) for r in rows.tolist())
        return scorers.score(Pairs(taps, bank.header.grid_size).integer([q[None] for q in maps]), tasks)[0], int(tasks[0])
    parts = []
    for row, q in zip(rows.tolist(), maps, strict=True):
        a, b = (tap_matrix(size, cells, row[6])[0] for size, cells in zip(row[:2], bank.header.grid_size))
        sums = np.einsum("ih,hwc,jw->ijc", a, q.astype(np.int64) - row[3], b, optimize=True)
        parts.append(np.clip(multiply_by_quantized_multiplier(sums, row[4], row[5]), -127, 127).astype(np.int8))
    embedding = np.concatenate(parts, -1)[None]
    tasks = scorers.route(embedding)
    return scorers.score(embedding, tasks)[0], int(tasks[0])


def python_accepts(data: bytes) -> bool:
    """Does the Python reader open it, by the rules that the device has too?"""
    try:
        check_bank(read_bank(data))
    except InputError:
        return False
    return True


def write_seeds(folder: Path) -> None:
    """A file a bank, with a few values of tapped maps behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, grid in enumerate(((3, 4), (2, 2))):
        rng = np.random.default_rng(seed)
        several = {f"{name} of 3": small for name, small in every_kind_of_tasks(rng, 3, grid).items()}
        for name, small in {**every_kind(rng, grid), **several}.items():
            (folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}").write_bytes(small.data + rng.bytes(64))


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
