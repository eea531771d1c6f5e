"""The C scorers against the Python ones: every grid score of every method, plain C and the SMLAD paths, bit for bit."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c_runtime import RUNTIME, WARNINGS, Guarded
from c_scorer import DSP, SOURCES, STATUS, OpenBank
from c_structs import CResult
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_banks import (
    Small,
    bank_of,
    centres,
    every_kind,
    linear,
    memory,
    python_accepts,
    quantised,
    small_embedding,
    triangular,
)

from tinyvad.bank import read_bank, write_bank
from tinyvad.detectors import Scorer, check_bank, parts_scratch, score_bytes
from tinyvad.detectors.centres import CentresScorer
from tinyvad.detectors.linear import LinearScorer
from tinyvad.detectors.padim import Padim, PadimCompact
from tinyvad.detectors.patchcore import PatchCore, PatchCoreLite
from tinyvad.detectors.triangular import TriangularScorer
from tinyvad.embedding import Embedding, Tap

PATHS = pytest.mark.parametrize("flags", [(), DSP], ids=["plain", "dsp"])
CORES = ("cortex-m0plus", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55")


def check(small: Small, maps: list[np.ndarray], flags: tuple[str, ...]) -> np.ndarray:
    """Score maps in C, both ways; demand Python's integers. Returns them."""
    b = OpenBank(small.data, flags)
    assert b.status == "OK" and b.self_test() == "OK"
    expected = small.expected(maps)
    whole, result = b.score(maps)
    apart, same, parts = b.score_parts(maps)
    if small.embedding.native:
        for part, tap in zip(parts, maps, strict=True):
            np.testing.assert_array_equal(part, tap)
    else:
        np.testing.assert_array_equal(np.concatenate(parts, -1), small.embedding.integer([q[None] for q in maps])[0])
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(apart, expected)
    for found in (result, same):
        assert found.score == expected.max()
        assert found.row * expected.shape[1] + found.column == expected.argmax()
        assert found.label == int(expected.max() >= small.sections["THRS"][0])
    return expected


@PATHS
@pytest.mark.parametrize("seed", range(8))
def test_every_kind_on_random_maps(seed: int, flags: tuple[str, ...]) -> None:
    rng = np.random.default_rng(seed)
    grid = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    within = 0
    for small in every_kind(rng, grid).values():
        for extreme in (False, True):
            scores = check(small, small.maps(rng, extreme), flags)
            within += int(((scores > 0) & (scores < 2**32 - 1)).any())
    assert within >= 12  # most kinds neither 0 nor saturated


@PATHS
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1), grid=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    channels=st.lists(st.integers(1, 21), min_size=1, max_size=4), pool=st.sampled_from([1, 3, 5, 7]),
    values=st.integers(2, 70), bits=st.sampled_from([0, 4, 8]), mode=st.integers(0, 2),
)  # fmt: skip
def test_triangular_factors_of_any_size(
    flags: tuple[str, ...], seed: int, grid: tuple[int, int], channels: list[int], pool: int, values: int, bits: int,
    mode: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    sizes = tuple((int(h), int(w)) for h, w in rng.integers(1, 20, (len(channels), 2)))
    e = small_embedding(rng, grid, tuple(channels), sizes, pool)
    d = e.depth if mode == 0 else min(values, e.depth) if mode == 1 else values
    small = bank_of(rng, e, triangular(rng, grid, e.depth, d, bits if d > 1 else 0, mode))
    check(small, small.maps(rng), flags)


@PATHS
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1), grid=st.tuples(st.integers(1, 5), st.integers(1, 7)), width=st.integers(1, 13),
    subspaces=st.integers(1, 11), rows=st.integers(1, 600), bits=st.sampled_from([0, 4, 8]),
)  # fmt: skip
def test_memory_banks_of_any_size(
    flags: tuple[str, ...], seed: int, grid: tuple[int, int], width: int, subspaces: int, rows: int, bits: int
) -> None:
    rng = np.random.default_rng(seed)
    depth = width * subspaces
    first = int(rng.integers(1, depth)) if depth > 1 else 1
    e = small_embedding(rng, grid, (first, depth - first) if depth > 1 else (1,))
    scorer: Scorer = quantised(rng, rows, depth, subspaces, bits) if bits else memory(rng, rows, depth)
    small = bank_of(rng, e, scorer)
    check(small, small.maps(rng), flags)


@PATHS
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1), grid=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=3), count=st.integers(3, 300), shift=st.integers(0, 7),
)  # fmt: skip
def test_layers_and_centres_of_any_size(
    flags: tuple[str, ...], seed: int, grid: tuple[int, int], channels: list[int], count: int, shift: int
) -> None:
    rng = np.random.default_rng(seed)
    e = small_embedding(rng, grid, tuple(channels))
    for scorer in (linear(rng, e.depth), centres(rng, grid, count, e.depth, shift)):
        small = bank_of(rng, e, scorer)
        check(small, small.maps(rng, extreme=seed % 4 == 0), flags)


# -- fitted detectors ----------------------------------------------------------------------------------------------------


@functools.lru_cache
def scene() -> tuple[Embedding, list[list[np.ndarray]]]:
    """Taps of three sizes, and the maps of 60 images, [(h, w, C)] int8 each: a part that moves a little, and noise."""
    rng = np.random.default_rng(3)
    shapes = ((22, 22, 16), (11, 11, 24), (6, 6, 40))
    mixes = [rng.normal(size=(6, c)) for _, _, c in shapes]
    images = []
    for _ in range(60):
        dy, dx, light = rng.normal(0, 0.3, 3)
        maps = []
        for (h, w, c), mix in zip(shapes, mixes):
            y, x = np.meshgrid(np.linspace(-2, 2, h) + dy, np.linspace(-2, 2, w) + dx, indexing="ij")
            fields = np.stack([y, x, np.sin(2 * y), np.cos(3 * x), np.hypot(y, x), np.full((h, w), 1 + light)], -1)
            maps.append(np.clip(np.rint(12 * fields @ mix + rng.normal(0, 3, (h, w, c))), -128, 127).astype(np.int8))
        images.append(maps)
    taps = tuple(Tap(f"t{i}", (h, w), c, 0.02, -3, 0.02) for i, (h, w, c) in enumerate(shapes))
    return Embedding(taps, (11, 11)), images


METHODS: dict[str, Callable[[], Any]] = {
    "padim-lite": lambda: Padim(diagonal=True),
    "padim": lambda: Padim(bits=8),
    "padim, 40 channels": lambda: Padim(bits=8, channels=40),
    "padim-compact": lambda: PadimCompact(24),
    "patchcore": lambda: PatchCore(200),
    "patchcore-lite 8 bits": lambda: PatchCoreLite(600, subspaces=8, bits=8),
    "patchcore-lite 4 bits": lambda: PatchCoreLite(200, subspaces=40, bits=4),
}


_PARTS = 0.04 * np.random.default_rng(6).normal(size=(2, 11, 80))  # of the coordinates: rows, columns
# scorers of trained networks, made from what a network gives for good images, (n, H, W, D)
TRAINED: dict[str, Callable[[np.ndarray], Scorer]] = {
    "cfa": lambda vectors: CentresScorer.of_centres(0.02 * vectors.mean(0).reshape(-1, 80), _PARTS[0], _PARTS[1], 0.02),
    "simplenet": lambda vectors: LinearScorer.of_layer(vectors.mean((0, 1, 2)), 0.0, 0.02, [vectors]),
}


@functools.lru_cache
def fitted(method: str) -> Small:
    embedding, images = scene()
    vectors = embedding.integer([np.stack(maps) for maps in zip(*images[:50])])
    scorer = TRAINED[method](vectors) if method in TRAINED else METHODS[method]().fit([vectors]).to_scorer()
    return bank_of(np.random.default_rng(0), embedding, scorer, golden=4)


@PATHS
@pytest.mark.parametrize("method", [*METHODS, *TRAINED])
def test_every_method_on_what_it_was_made_for(method: str, flags: tuple[str, ...]) -> None:
    small, (_, images) = fitted(method), scene()
    rng = np.random.default_rng(1)
    for maps in images[48:54]:
        scores = check(small, maps, flags)
        assert (scores < 2**32 - 1).all()
        defect = [q.copy() for q in maps]
        defect[0][8:13, 4:9] = rng.integers(-128, 128, (5, 5, 16))
        defect[2][3] = 90
        found = check(small, defect, flags)
        assert method == "simplenet" or found.max() > scores.max()  # a linear layer alone tells nothing


# -- edges ---------------------------------------------------------------------------------------------------------------


LARGEST = (2**20 - 1) ** 2 >> 8  # of one residual


@PATHS
def test_residuals_run_through_the_ends_of_their_range(flags: tuple[str, ...]) -> None:
    """v = -16 * 256 times A = 2^24 is -2^36, so r = -2^20, one beyond its end; codes run through As on both sides of it."""
    rng = np.random.default_rng(0)
    e = Embedding((Tap("t", (16, 16), 1, 0.5, 0, 0.5),), (16, 16), 1)
    a = np.array([(1 << 24) + (k - 128) * 4096 for k in range(256)], np.uint32)
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    small = bank_of(rng, e, TriangularScorer(np.full((16, 16, 1), 16, np.int8), codes, a, 0))
    for value in (0, 15, 16, 17, 32, 33):
        scores = check(small, [np.full((16, 16, 1), value, np.int8)], flags)
        assert (LARGEST in scores) == (value in (0, 32, 33))
        assert (scores == 2**32 - 1).sum() == 0


@PATHS
@pytest.mark.parametrize("bits", [4, 8])
def test_factors_saturate_on_their_way(flags: tuple[str, ...], bits: int) -> None:
    """v runs beyond +-2^31 as S does; the first residual is 0, and A so small that the second one stays in range."""
    rng = np.random.default_rng(0)
    e = Embedding((Tap("t", (16, 16), 2, 0.5, 0, 0.5),), (16, 16), 1)
    a = np.array([16 + k % 24 for k in range(255)] + [0], np.uint32)
    s = np.array([2**32 - 1 - (k << 24) for k in range(256)], np.uint32)
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    factor = np.where(numbers % 2, 7, -8).astype(np.int8) if bits == 4 else np.where(numbers % 2, 127, -128).astype(np.int8)
    scorer = TriangularScorer(
        np.zeros((16, 16, 2), np.int8), np.concatenate([numbers * 0 + 255, numbers // 2], -1), a, bits,
        np.concatenate([numbers, numbers], -1), s, factor,
    )  # fmt: skip
    small = bank_of(rng, e, scorer)
    seen: set[int] = set()
    for value in (-127, -20, -1, 0, 1, 20, 127):
        maps = [np.dstack([np.full((16, 16), value), np.zeros((16, 16))]).astype(np.int8)]
        seen |= set(check(small, maps, flags).ravel().tolist())
    ends = {((2**31 - 1) * k + 2**15 >> 16) ** 2 >> 8 for k in range(16, 32)}  # v = 2^31 - 1, r = v A / 2^16
    assert ends & seen and LARGEST in seen and len(seen) > 100
    check(small, small.maps(rng), flags)


@PATHS
def test_sums_at_the_32_bit_bound(flags: tuple[str, ...]) -> None:
    """A map so fine that 255 times a row of both matrices just stays below 2^31, all values at an end."""
    rng = np.random.default_rng(0)
    e = Embedding((Tap("t", (960, 970), 1, 0.05, -128, 0.2),), (3, 5))
    small = bank_of(rng, e, memory(rng, 2, 1))
    check(small, [np.full((960, 970, 1), 127, np.int8)], flags)


@PATHS
def test_distances_to_centres_at_the_32_bit_bound(flags: tuple[str, ...]) -> None:
    """12 values as far apart as tvad_open allows; one more unit it refuses, and so does Python."""
    rng = np.random.default_rng(0)
    e = Embedding((Tap("t", (1, 1), 12, 0.5, 0, 0.5),), (1, 1), 1)
    offsets = np.zeros((2, 12), np.int16)
    offsets[0] = math.isqrt(((1 << 31) - 2) // 12) - 256
    points = np.full((3, 12), -128, np.int8)
    small = bank_of(rng, e, CentresScorer(points, offsets, np.zeros(512, np.uint32), (1, 1)))
    check(small, [np.full((1, 1, 12), 127, np.int8)], flags)
    data = write_bank(small.header, {**small.sections, "BIAS": offsets + np.int16(1)}, ())
    assert OpenBank(data, flags).status == "FIELD" and not python_accepts(data)


def test_a_long_axis_onto_one_cell_and_one_value_onto_many() -> None:
    rng = np.random.default_rng(0)
    for size, grid in (((4096, 1), (1, 80)), ((1, 4096), (70, 5)), ((37, 5), (1, 1)), ((2, 3), (9, 40)), ((1, 1), (5, 5))):
        e = small_embedding(rng, grid, (3,), (size,))
        small = bank_of(rng, e, triangular(rng, grid, 3, 3, 4, 0))
        check(small, small.maps(rng), ())


def test_of_equal_scores_the_first_cell_and_at_the_threshold_anomalous() -> None:
    rng = np.random.default_rng(0)
    e = Embedding((Tap("t", (4, 5), 1, 1.0, 0, 1.0),), (4, 5), 1)
    small = bank_of(rng, e, memory(rng, 1, 1))
    bank = int(small.sections["BANK"][0, 0])
    q = np.full((4, 5, 1), bank, np.int8)
    far = -100 if bank > 0 else 100
    q[1, 3] = q[2, 0] = q[3, 4] = far
    score = (far - bank) ** 2
    for threshold, label in ((score - 1, 1), (score, 1), (score + 1, 0), (0, 1), (2**32 - 1, 0)):
        data = write_bank(small.header, {**small.sections, "THRS": np.array([threshold], np.uint32)}, ())
        _, result = OpenBank(data).score([q])
        assert (result.score, result.row, result.column, result.label) == (score, 1, 3, label)


def test_scratch_is_planned_to_the_byte_and_less_is_refused() -> None:
    rng = np.random.default_rng(2)
    banks = [small for _ in range(4) for small in every_kind(rng, tuple(rng.integers(1, 30, 2).tolist())).values()]
    for small in [*banks, *(fitted(method) for method in (*METHODS, *TRAINED))]:
        b = OpenBank(small.data)
        rows, scorers = check_bank(read_bank(small.data))
        scorer = scorers.scorers[0]
        bank = ctypes.byref(b.bank)
        need = b.lib.tvad_score_bytes(bank)
        grid = small.embedding.grid
        assert need == score_bytes(rows, grid, scorer) == score_bytes(rows, grid, small.scorer)
        assert b.lib.tvad_score_parts_scratch(bank) == parts_scratch(rows, scorer)
        for i, tap in enumerate(small.embedding.taps):
            assert b.lib.tvad_embed_scratch(bank, i) == small.embedding.scratch_bytes(tap)
        work, result = Guarded(need + 16), CResult()
        for address, size in ((work.address, need - 1), (work.address + 8, need), (None, need)):
            assert STATUS[b.lib.tvad_score(bank, None, address, size, ctypes.byref(result))] == "ARENA"
            assert STATUS[b.lib.tvad_self_test(bank, address, size)] == "ARENA"


def test_the_self_test_finds_another_score_and_needs_none() -> None:
    rng = np.random.default_rng(0)
    for small in every_kind(rng).values():
        gold = small.sections["GOLD"].copy()
        gold[1, 2] ^= 1
        assert OpenBank(write_bank(small.header, {**small.sections, "GOLD": gold}, ())).self_test() == "CRC"
        sections = {tag: array for tag, array in small.sections.items() if tag not in ("TEST", "GOLD")}
        assert OpenBank(write_bank(small.header, sections, ())).self_test() == "OK"


def test_pixels_become_the_networks_input_in_place() -> None:
    rng = np.random.default_rng(0)
    small = every_kind(rng)["patchcore"]
    b = OpenBank(small.data)
    pixels = rng.integers(0, 256, (7, 5, 3)).astype(np.uint8)
    expected = small.sections["LUT "][np.arange(3), pixels]
    buffer = pixels.copy()
    b.lib.tvad_input(ctypes.byref(b.bank), buffer.ctypes.data, buffer.ctypes.data, 35)
    np.testing.assert_array_equal(buffer.view(np.int8), expected)


# -- for the chip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_it_compiles_for_every_core_without_warnings_heap_or_floats(core: str, tmp_path: Path) -> None:
    gcc = shutil.which("arm-none-eabi-gcc")
    if gcc is None:
        pytest.skip("needs arm-none-eabi-gcc (Debian: gcc-arm-none-eabi)")
    sources = [str(RUNTIME / f"{name}.c") for name in SOURCES]
    flags = [f"-mcpu={core}", "-mthumb", f"-mfloat-abi={'hard' if core == 'cortex-m55' else 'soft'}", "-O2"]
    command = [gcc, *flags, *WARNINGS, "-fstack-usage", "-c", *sources]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    uses = [line.split("\t") for path in tmp_path.glob("*.su") for line in path.read_text().splitlines()]
    assert len(uses) > 20 and {use[2] for use in uses} == {"static"}  # no VLA, no alloca
    assert max(int(use[1]) for use in uses) <= 384
    objects = [str(path) for path in tmp_path.glob("*.o")]
    names = subprocess.run(["arm-none-eabi-nm", "-u", *objects], capture_output=True, text=True, check=True).stdout.split()
    foreign = {name for name in names if name not in ("U",) and not name.startswith("tvad_") and not name.endswith(":")}
    allowed = {"memcpy", "memset", "__aeabi_uidiv", "__aeabi_uidivmod", "__aeabi_idiv", "__aeabi_idivmod",
               "__aeabi_uldivmod", "__aeabi_lmul", "__aeabi_llsl", "__aeabi_lasr",
               "__aeabi_llsr", "__gnu_thumb1_case_uqi", "__gnu_thumb1_case_sqi", "__gnu_thumb1_case_uhi",
               "__gnu_thumb1_case_shi"}  # fmt: skip
    assert foreign <= allowed
