"""The bank and scorer half of the C runtime through ctypes, and small banks of every kind to try it on.

Structs mirror ``export/runtime/tvad.h``. Banks are made of random integers, not fitted: the readers and scorers must agree
on any bank that is well formed, and random ones reach their corners sooner.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from c_runtime import Guarded, library

from tinyvad.bank import Header, pack_meta, read_bank, write_bank
from tinyvad.detectors import Scorer, check_bank
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import ProductQuantizer
from tinyvad.detectors.triangular import Projection, TriangularScorer
from tinyvad.embedding import Embedding, Tap

SOURCES = (
    "tvad_bank", "tvad_bank_kind", "tvad_crc", "tvad_embed", "tvad_input", "tvad_score", "tvad_score_core",
    "tvad_score_padim", "tvad_score_pq", "tvad_status", "tvad_triangle",
)  # fmt: skip
DSP = ("-DTVAD_DSP_EMULATE=1",)  # the SMLAD paths, their instructions written out in C
STATUS = ("OK", "MAGIC", "SIZE", "CRC", "FIELD", "SECTION", "BACKBONE", "ARENA", "FRAME", "ALIGNMENT")


class CSection(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("nbytes", ctypes.c_uint32), ("dim", ctypes.c_uint32 * 3),
        ("dtype", ctypes.c_uint8), ("ndim", ctypes.c_uint8),
    )  # fmt: skip


class CBank(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in (
            "nbytes", "kind", "backbone_crc32", "header_crc32", "generation", "threshold")),
        *((name, ctypes.c_uint16) for name in ("input_h", "input_w", "grid_h", "grid_w", "depth", "values")),
        ("rows", ctypes.c_uint32), ("subspaces", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("bits", "mode", "taps")),
        ("tap_rows", ctypes.c_void_p), ("input_table", ctypes.c_void_p),
        *((name, CSection) for name in (
            "mean", "codes", "tables", "factor", "indices", "projection", "bias", "vectors", "codebook", "test", "gold")),
    )  # fmt: skip


class CResult(ctypes.Structure):
    _fields_ = (
        ("score", ctypes.c_uint32),
        *((name, ctypes.c_uint16) for name in ("row", "column", "grid_h", "grid_w")),
        ("label", ctypes.c_uint8), ("map", ctypes.c_void_p),
    )  # fmt: skip


@functools.lru_cache
def scorer_library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The bank and scorer sources alone: what who keeps another engine for the network compiles."""
    lib = library(SOURCES, flags)
    lib.tvad_open.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(CBank))
    lib.tvad_score_bytes.restype = ctypes.c_size_t
    lib.tvad_self_test.argtypes = (ctypes.POINTER(CBank), ctypes.c_void_p, ctypes.c_size_t)
    lib.tvad_score.argtypes = (
        ctypes.POINTER(CBank), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(CResult)
    )  # fmt: skip
    lib.tvad_embed.argtypes = (ctypes.POINTER(CBank), ctypes.c_uint32, *(ctypes.c_void_p,) * 3)
    lib.tvad_score_parts.argtypes = (ctypes.POINTER(CBank), *(ctypes.c_void_p,) * 3, ctypes.POINTER(CResult))
    lib.tvad_input.argtypes = (ctypes.POINTER(CBank), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    lib.tvad_status_text.restype = ctypes.c_char_p
    return lib


class OpenBank:
    """A bank that lies at a multiple of 4096, as opened by ``tvad_open``; ``status`` is one of ``STATUS``."""

    def __init__(self, data: bytes, flags: tuple[str, ...] = (), size: int | None = None, shift: int = 0) -> None:
        self.lib = scorer_library(flags)
        self.block = np.zeros(len(data) + 8192, np.uint8)
        start = -self.block.ctypes.data % 4096 + shift
        self.bytes = self.block[start : start + len(data)]
        self.bytes[:] = np.frombuffer(data, np.uint8)
        self.bank = CBank()
        code = self.lib.tvad_open(self.bytes.ctypes.data, len(data) if size is None else size, ctypes.byref(self.bank))
        self.status = STATUS[code]

    def score(self, taps: list[np.ndarray]) -> tuple[np.ndarray, CResult]:
        """(grid_h, grid_w) uint32 and the result of [(h, w, C)] int8, with exactly the scratch that is asked for."""
        work = Guarded(self.lib.tvad_score_bytes(ctypes.byref(self.bank)))
        buffers = [_guarded(tap) for tap in taps]
        result = CResult()
        pointers = (ctypes.c_void_p * len(taps))(*(buffer.address for buffer in buffers))
        status = self.lib.tvad_score(ctypes.byref(self.bank), pointers, work.address, work.nbytes, ctypes.byref(result))
        assert STATUS[status] == "OK"
        return self._finish(result, [work, *buffers], work), result

    def score_parts(self, taps: list[np.ndarray]) -> tuple[np.ndarray, CResult, list[np.ndarray]]:
        """The same in the two steps of ``tvad_run``; the parts of the embedding, (grid_h, grid_w, C) int8, too."""
        cells = self.bank.grid_h * self.bank.grid_w
        parts, kept = [], []
        for i, tap in enumerate(taps):
            part, source = Guarded(cells * tap.shape[2]), _guarded(tap)
            scratch = Guarded(self.lib.tvad_embed_scratch(ctypes.byref(self.bank), i))
            self.lib.tvad_embed(ctypes.byref(self.bank), i, source.address, part.address, scratch.address)
            kept += [part, source, scratch]
            parts.append(part)
        grid, work = Guarded(4 * cells), Guarded(self.lib.tvad_score_parts_scratch(ctypes.byref(self.bank)))
        result = CResult()
        pointers = (ctypes.c_void_p * len(taps))(*(part.address for part in parts))
        self.lib.tvad_score_parts(
            ctypes.byref(self.bank), pointers, grid.address, work.address, ctypes.byref(result)
        )  # fmt: skip
        shape = (self.bank.grid_h, self.bank.grid_w, -1)
        arrays = [part.bytes.view(np.int8).reshape(shape).copy() for part in parts]
        return self._finish(result, [*kept, grid, work], grid), result, arrays

    def _finish(self, result: CResult, guarded: list[Guarded], holder: Guarded) -> np.ndarray:
        for buffer in guarded:
            buffer.check()
        assert (result.grid_h, result.grid_w) == (self.bank.grid_h, self.bank.grid_w)
        cells = result.grid_h * result.grid_w
        assert result.map == holder.address
        return holder.bytes[: 4 * cells].copy().view(np.uint32).reshape(result.grid_h, result.grid_w)

    def self_test(self) -> str:
        work = Guarded(self.lib.tvad_score_bytes(ctypes.byref(self.bank)))
        status = self.lib.tvad_self_test(ctypes.byref(self.bank), work.address, work.nbytes)
        work.check()
        return STATUS[status]


def _guarded(array: np.ndarray) -> Guarded:
    buffer = Guarded(array.size)
    buffer.bytes[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
    return buffer


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
    table = np.sort(rng.integers(0, 1 << rng.integers(10, 33), (2, 256), np.uint64)).astype(np.uint32)
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
    rng: np.random.Generator, embedding: Embedding, scorer: Scorer, golden: int = 2, align: int = 16, table: Any = None
) -> Small:
    """The bank of an embedding and a scorer, as a build writes it."""
    grid = embedding.grid
    test = rng.integers(-127, 128, (golden, embedding.depth)).astype(np.int8)
    places = rng.integers(0, grid[0] * grid[1], golden)
    gold = [[0, place, _score_at(scorer, grid, vector, place)] for vector, place in zip(test, places)]
    sections = {
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


def python_accepts(data: bytes) -> bool:
    """Does the Python reader open it, by the rules that the device has too?"""
    from tinyvad.errors import InputError

    try:
        check_bank(read_bank(data))
    except InputError:
        return False
    return True
