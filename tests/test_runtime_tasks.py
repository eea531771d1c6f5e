"""Banks of several tasks in C: task, map, score and verdict are Python's, and RAM does not grow with the tasks."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from c_runtime import Guarded
from c_scorer import DSP, OpenBank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_banks import (
    Small,
    bank_of,
    bank_of_tasks,
    every_kind_of_tasks,
    memory,
    quantised,
    small_embedding,
    triangular,
)

from tinyvad.bank import read_bank, write_bank
from tinyvad.detectors import Scorer, check_bank, parts_scratch, score_bytes
from tinyvad.embedding import Embedding, Tap

PATHS = pytest.mark.parametrize("flags", [(), DSP], ids=["plain", "dsp"])


def check(small: Small, maps: list[np.ndarray], flags: tuple[str, ...] = ()) -> int:
    """Score maps in C, both ways, in no more room than is asked for; demand Python's integers. Returns the task."""
    b = OpenBank(small.data, flags)
    assert b.status == "OK" and b.self_test() == "OK"
    rows, scorers = check_bank(read_bank(small.data))
    assert b.lib.tvad_score_bytes(ctypes.byref(b.bank)) == score_bytes(rows, small.embedding.grid, small.scorer)
    assert b.lib.tvad_score_parts_scratch(ctypes.byref(b.bank)) == parts_scratch(rows, small.scorer)
    expected, task = small.expected(maps), small.task(maps)
    embeddings = small.embedding.integer([q[None] for q in maps])
    assert scorers.route(small.routed(maps)).tolist() == [task]
    np.testing.assert_array_equal(scorers.score(embeddings, np.array([task]))[0], expected)
    whole, result = b.score(maps)
    apart, same, _ = b.score_parts(maps)
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(apart, expected)
    for found in (result, same):
        assert (found.task, found.score) == (task, expected.max())
        assert found.row * expected.shape[1] + found.column == expected.argmax()
        assert found.label == int(expected.max() >= small.sections["THRS"][task])
    return task


@PATHS
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_kind_with_several_tasks(count: int, flags: tuple[str, ...]) -> None:
    rng = np.random.default_rng(count)
    seen = set()
    for small in every_kind_of_tasks(rng, count, (int(rng.integers(1, 9)), int(rng.integers(1, 9)))).values():
        assert OpenBank(small.data).bank.tasks == count
        seen |= {check(small, small.maps(rng, extreme), flags) for extreme in (False, False, False, True)}
    assert len(seen) > count / 2


@PATHS
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), grid=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    channels=st.lists(st.integers(1, 30), min_size=1, max_size=4), kind=st.sampled_from(["gaussian", "memory", "codes"]),
)  # fmt: skip
def test_tasks_of_any_shape(
    flags: tuple[str, ...], seed: int, count: int, grid: tuple[int, int], channels: list[int], kind: str
) -> None:
    """Wide last taps on few cells among them: there the signature takes the room, not the scorer."""
    rng = np.random.default_rng(seed)
    sizes = tuple((int(h), int(w)) for h, w in rng.integers(1, 20, (len(channels), 2)))
    e = small_embedding(rng, grid, tuple(channels), sizes)
    scorers: list[Scorer]
    if kind == "gaussian":
        d = int(rng.integers(1, e.depth + 1))
        bits = int(rng.choice([0, 4, 8])) if d > 1 else 0
        made = [triangular(rng, grid, e.depth, d, bits, int(rng.integers(1, 3)) if i == 0 else 1) for i in range(count)]
        scorers = [replace(one, projection=made[0].projection, indices=made[0].indices) for one in made]
    elif kind == "memory":
        scorers = [memory(rng, int(rows), e.depth) for rows in rng.integers(1, 9, count)]
    else:
        divisors = [m for m in range(1, e.depth + 1) if e.depth % m == 0]
        subspaces, bits = int(rng.choice(divisors)), int(rng.choice([4, 8]))
        centroids = int(rng.integers(1, 17 if bits == 4 else 257))
        rows = rng.integers(1, 9, count)
        scorers = [quantised(rng, int(each), e.depth, subspaces, bits, centroids) for each in rows]
    small = bank_of_tasks(rng, e, scorers, golden=2)
    check(small, small.maps(rng), flags)


@pytest.mark.parametrize("count", [2, 5])
def test_a_task_of_several_is_the_bank_of_that_task_alone(count: int) -> None:
    """The same images, sent to every task in turn by prototypes far from all others."""
    rng = np.random.default_rng(9)
    for small in every_kind_of_tasks(rng, count).values():
        maps = small.maps(rng)
        for task in range(count):
            alone = bank_of(rng, small.embedding, small.tasks[task], golden=0)
            threshold = small.sections["THRS"][task : task + 1]
            single = OpenBank(write_bank(alone.header, {**alone.sections, "THRS": threshold}, ()))
            prototypes = np.full_like(small.sections["PROT"], 127 * 12)
            prototypes[task] = small.routed(maps)[0, ..., -3:].sum((0, 1), dtype=np.int64)
            several = OpenBank(write_bank(small.header, {**small.sections, "PROT": prototypes}, ()))
            (mine, result), (expected, one) = several.score(maps), single.score(maps)
            np.testing.assert_array_equal(mine, expected)
            assert (result.task, one.task) == (task, 0)
            assert (result.score, result.row, result.column, result.label) == (one.score, one.row, one.column, one.label)


def test_ram_is_that_of_one_task() -> None:
    def needs(count: int) -> list[int]:
        opened = [OpenBank(small.data) for small in every_kind_of_tasks(np.random.default_rng(1), count).values()]
        lib = opened[0].lib
        sizes = (lib.tvad_score_bytes, lib.tvad_score_parts_scratch)
        return [size(ctypes.byref(b.bank)) for b in opened for size in sizes]

    assert needs(1) == needs(2) == needs(5) == needs(60)


def route(b: OpenBank, signature: np.ndarray) -> int:
    b.lib.tvad_route.restype = ctypes.c_uint32
    buffer = np.ascontiguousarray(signature, np.int32)
    return int(b.lib.tvad_route(ctypes.byref(b.bank), ctypes.c_void_p(buffer.ctypes.data)))


def test_routing_is_exact_at_the_ends_of_its_range() -> None:
    """65536 cells and 4096 channels of 127 against prototypes of -127: differences of 2^24, a sum of 2^60."""
    rng = np.random.default_rng(0)
    e = Embedding((Tap("t", (1, 1), 4096, 0.5, 0, 0.5),), (256, 256), 1)
    small = bank_of_tasks(rng, e, [memory(rng, 1, 4096) for _ in range(3)], golden=0)
    end = 127 * 65536
    prototypes = np.full((3, 4096), -end, np.int32)
    prototypes[1, 4095] += 1  # nearer by 2 * 2 * end in 2^60
    b = OpenBank(write_bank(small.header, {**small.sections, "PROT": prototypes}, ()))
    assert b.status == "OK"
    assert route(b, np.full(4096, end)) == 1
    assert route(b, np.full(4096, -end)) == 0
    prototypes[2] = prototypes[1]
    assert route(OpenBank(write_bank(small.header, {**small.sections, "PROT": prototypes}, ())), np.full(4096, end)) == 1
    larger = replace(small.header, grid_size=(256, 257))
    data = write_bank(larger, small.sections, ())
    assert OpenBank(data).status == "FIELD"


def test_a_signature_is_the_sum_of_the_last_part() -> None:
    rng = np.random.default_rng(0)
    small = every_kind_of_tasks(rng, 2)["patchcore"]
    b = OpenBank(small.data)
    parts = [rng.integers(-127, 128, (3, 4, c)).astype(np.int8) for c in (5, 4, 3)]
    pointers = (ctypes.c_void_p * 3)(*(part.ctypes.data for part in parts))
    room = Guarded(12)
    b.lib.tvad_signature(ctypes.byref(b.bank), pointers, ctypes.c_void_p(room.address))
    room.check()
    np.testing.assert_array_equal(room.bytes[:12].copy().view(np.int32), parts[2].sum((0, 1), dtype=np.int64))


def test_the_self_test_scores_by_the_task_that_gold_names() -> None:
    small = every_kind_of_tasks(np.random.default_rng(2), 3)["patchcore"]
    assert OpenBank(small.data).self_test() == "OK"
    gold = small.sections["GOLD"].copy()
    gold[:, 0] = (gold[:, 0] + 1) % 3
    assert OpenBank(write_bank(small.header, {**small.sections, "GOLD": gold}, ())).self_test() == "CRC"
