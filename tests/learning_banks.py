"""Banks that a device can learn on, and stores of flash to write them to, for the tests of both languages."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from small_banks import SIZES, small_embedding

from tinyvad.bank import Bank, Header, pack_meta, read_bank, write_bank
from tinyvad.detectors.coreset import farthest_first
from tinyvad.embedding import Embedding

REQUIRED = ("LUT ", "TAPS", "THRS", "CFG ", "BANK", "TASK", "PROT")
CHANNELS = (5, 4, 3)
DEPTH = sum(CHANNELS)


@dataclass(frozen=True, eq=False)
class Learnable:
    """A CORE bank of products that are clouds around centres of their own."""

    data: bytes
    embedding: Embedding

    @property
    def bank(self) -> Bank:
        return read_bank(self.data)


def product(rng: np.random.Generator, grid: tuple[int, int], images: int, spread: int = 12) -> np.ndarray:
    """(images, H, W, D) int8: every cell has its own mean, every image is near it."""
    mean = rng.integers(-90, 91, (1, *grid, DEPTH))
    return (mean + rng.integers(-spread, spread + 1, (images, *grid, DEPTH))).clip(-127, 127).astype(np.int8)


def learnable(
    rng: np.random.Generator, grid: tuple[int, int] = (3, 4), tasks: int = 1, rows: int = 20, most_rows: int = 40,
    most_tasks: int = 4, per_image: int = 4, tau2: int = 900, slot_bytes: int = 65536, pairs: int = 5, align: int = 16,
    generation: int = 7, golden: int = 3,
) -> Learnable:  # fmt: skip
    """A bank of ``tasks`` products of up to ``rows`` rows in greedy order, as a PC writes it."""
    embedding = small_embedding(rng, grid, CHANNELS, SIZES)
    clouds = [product(rng, grid, 3).reshape(-1, DEPTH) for _ in range(tasks)]
    parts = [cloud[farthest_first(cloud, rows).order] for cloud in clouds]
    sizes = np.array([len(part) for part in parts])
    table = np.column_stack([np.cumsum(sizes) - sizes, sizes, np.full(tasks, 3), np.zeros(tasks)]).astype(np.int32)
    steps = [[(max(1, size >> i), 1000 * (i + 1) + t) for i in range(pairs)] for t, size in enumerate(sizes)]
    test = rng.integers(-127, 128, (golden, DEPTH)).astype(np.int8)
    cells = grid[0] * grid[1]
    gold = [(i % tasks, i % cells, _nearest(test[i], parts[i % tasks])) for i in range(golden)]
    sections = {
        "LUT ": rng.integers(-128, 128, (3, 256)).astype(np.int8),
        **embedding.sections(),
        "THRS": np.array([1000 + t for t in range(tasks)], np.uint32),
        "CFG ": np.array([sizes.sum(), DEPTH, 0, 8], np.int32),
        "SCAL": np.array([0.25]),
        "BANK": np.concatenate(parts),
        "TASK": table,
        "PROT": rng.integers(-100 * cells, 100 * cells, (tasks, CHANNELS[-1])).astype(np.int32),
        "LADR": np.array(steps, np.uint32),
        "LRN ": np.array([slot_bytes, most_tasks, most_rows, per_image, tau2, 0, 0, 0], np.uint32),
        **({"TEST": test, "GOLD": np.array(gold, np.uint32)} if golden else {}),
        "META": pack_meta({"method": "patchcore", "tasks": [{"name": f"old {t}"} for t in range(tasks)]}),
    }
    header = Header(
        "CORE", zlib.crc32(b"network"), (32, 48), grid, len(CHANNELS), generation=generation, updatable=True, align=align
    )
    return Learnable(write_bank(header, sections, REQUIRED), embedding)


def _nearest(vector: np.ndarray, rows: np.ndarray) -> int:
    difference = rows.astype(np.int64) - vector
    return int((difference * difference).sum(1).min())
