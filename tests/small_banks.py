"""Small banks of every kind, made of random integers, not fitted: readers and scorers must agree on every bank that is well
formed, and random ones reach their corners sooner.

``python tests/small_banks.py FOLDER`` writes them as the first inputs of the fuzzer (export/fuzz).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bank import Header, pack_meta, read_bank, write_bank
from tinyvad.detectors import Scorer, check_bank
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import ProductQuantizer
from tinyvad.detectors.triangular import Projection, TriangularScorer
from tinyvad.embedding import Embedding, Tap, tap_matrix
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier


@dataclass(frozen=True, eq=False)
class Small:
    """A bank in memory and what it was made of."""

    data: bytes
    embedding: Embedding
    scorer: Scorer
    sections: dict[str, np.ndarray]
    header: Header

    def maps(self, rng: np.random.Generator, extreme: bool = False) -> list[np.ndarray]:
        """Random tapped maps [(h, w, C)] int8; ``extreme`` ones hold the two ends of the range only."""
        shapes = [(*tap.size, tap.channels) for tap in self.embedding.taps]
        if extreme:
            return [rng.choice(np.array([-128, 127], np.int8), shape) for shape in shapes]
        return [rng.integers(-128, 128, shape).astype(np.int8) for shape in shapes]

    def expected(self, maps: list[np.ndarray]) -> np.ndarray:
        """(grid_h, grid_w) uint32: Python's scores."""
        return self.scorer.score(self.embedding.integer([q[None] for q in maps]))[0]


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


def quantised(rng: np.random.Generator, rows: int, depth: int, subspaces: int, bits: int) -> PatchCoreLiteScorer:
    centroids = min(1 << bits, rows)
    books = rng.integers(-128, 128, (subspaces, centroids, depth // subspaces)).astype(np.int8)
    codes = rng.integers(0, centroids, (rows, subspaces)).astype(np.uint8)
    return PatchCoreLiteScorer(ProductQuantizer(books, rng.permutation(depth).astype(np.uint16), bits), codes, 0.25)


def memory(rng: np.random.Generator, rows: int, depth: int) -> PatchCoreScorer:
    return PatchCoreScorer(rng.integers(-128, 128, (rows, depth)).astype(np.int8), 0.25)


def bank_of(
    rng: np.random.Generator, embedding: Embedding, scorer: Scorer, golden: int = 2, align: int = 16
) -> Small:
    """The bank of an embedding and a scorer, as a build writes it."""
    grid = embedding.grid
    test = rng.integers(-127, 128, (golden, embedding.depth)).astype(np.int8)
    places = rng.integers(0, grid[0] * grid[1], golden)
    gold = [[0, place, _score_at(scorer, grid, vector, place)] for vector, place in zip(test, places)]
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


def _score_at(scorer: Scorer, grid: tuple[int, int], vector: np.ndarray, place: int) -> int:
    cells = np.zeros((1, *grid, len(vector)), np.int8)
    cells[0].reshape(-1, len(vector))[place] = vector
    return int(scorer.score(cells).reshape(-1)[place])


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
    }
    return {name: bank_of(rng, e, scorer) for name, scorer in scorers.items()}


def scores_of(data: bytes, maps: list[np.ndarray]) -> np.ndarray:
    """(grid_h, grid_w) uint32: what Python gives for a bank as the device reads it, TAPS without STEP."""
    bank = read_bank(data)
    rows, scorer = check_bank(bank)
    parts = []
    for row, q in zip(rows.tolist(), maps, strict=True):
        a, b = (tap_matrix(size, cells, row[6])[0] for size, cells in zip(row[:2], bank.header.grid_size))
        sums = np.einsum("ih,hwc,jw->ijc", a, q.astype(np.int64) - row[3], b, optimize=True)
        parts.append(np.clip(multiply_by_quantized_multiplier(sums, row[4], row[5]), -127, 127).astype(np.int8))
    return scorer.score(np.concatenate(parts, -1)[None])[0]


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
        for name, small in every_kind(rng, grid).items():
            (folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}").write_bytes(small.data + rng.bytes(64))


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
