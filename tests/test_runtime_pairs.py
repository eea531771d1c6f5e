"""Student and teacher in C: every score is Python's, at any size and at the ends of every width; odd banks are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from c_scorer import DSP, OpenBank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_banks import Small, bank_of, bank_of_tasks, python_accepts, scores_of, student
from test_runtime_score import check
from test_runtime_tasks import check as check_tasks

from tinyvad.bank import Header, write_bank
from tinyvad.detectors.student_teacher import Pairs, StudentTeacherScorer

PATHS = pytest.mark.parametrize("flags", [(), DSP], ids=["plain", "dsp"])
KINDS = ("any", "ends", "zero", "half zero", "alike")


def maps_of(rng: np.random.Generator, small: Small, kind: str) -> list[np.ndarray]:
    """Tapped maps: any, at both ends, all or the student's at the zero point, or a student that imitates."""
    taps = small.embedding.taps
    half = len(taps) // 2
    maps = small.maps(rng, kind == "ends")
    for i, tap in enumerate(taps):
        if kind == "zero" or (kind == "half zero" and i < half):
            maps[i] = np.full_like(maps[i], tap.zero_point)
        elif kind == "alike" and i < half:
            real = maps[i + half].astype(int) - taps[i + half].zero_point + rng.integers(-2, 3, maps[i].shape)
            maps[i] = np.clip(real + tap.zero_point, -128, 127).astype(np.int8)
    return maps


@PATHS
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), layers=st.integers(1, 8),
    kind=st.sampled_from(KINDS), tasks=st.integers(1, 3),
)  # fmt: skip
def test_scores_of_any_shape(
    flags: tuple[str, ...], seed: int, grid: tuple[int, int], layers: int, kind: str, tasks: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = tuple((int(h), int(w)) for h, w in rng.integers(1, 14, (layers, 2)))
    sizes = tuple(grid if rng.random() < 0.3 else size for size in sizes)
    pairs, scorer = student(rng, grid, tuple(rng.integers(1, 41, layers).tolist()), sizes)
    small = bank_of(rng, pairs, scorer) if tasks == 1 else bank_of_tasks(rng, pairs, [scorer] * tasks)
    maps = maps_of(rng, small, kind)
    if tasks > 1:
        check_tasks(small, maps, flags)
        return
    scores = check(small, maps, flags)
    if kind == "zero":
        assert (scores == 0).all()


@PATHS
@pytest.mark.parametrize("kind", ["any", "ends"])
def test_sums_at_the_ends_of_their_widths(kind: str, flags: tuple[str, ...]) -> None:
    """4096 channels, 255 from the zero point, and maps that are far finer and far coarser than the grid."""
    rng = np.random.default_rng(0)
    for zeros in ((-128, -128), (127, 127), (-128, 127)):
        pairs, scorer = student(rng, (3, 2), (4096, 1, 2), ((1, 1), (200, 90), (1, 30)))
        taps = tuple(replace(tap, zero_point=zeros[i // 3]) for i, tap in enumerate(pairs.taps))
        small = bank_of(rng, Pairs(taps, pairs.grid), replace(scorer, shift=31))
        check(small, maps_of(rng, small, kind), flags)
        full = [np.full((*tap.size, tap.channels), -1 - tap.zero_point, np.int8) for tap in taps]
        for q, tap in zip(full, taps):
            q[...] = 127 if tap.zero_point == -128 else -128
        scores = check(small, full, flags)
        assert (scores == (0 if zeros[0] == zeros[1] else 2**32 - 1)).all()  # alike, or opposed in all pairs: 2^63 >> 31


def test_signatures_at_the_ends_of_their_range() -> None:
    """65536 positions of -128 against prototypes of +128 each: differences of 2^24, over 4096 channels squares of 2^60."""
    rng = np.random.default_rng(1)
    pairs, scorer = student(rng, (1, 1), (2,), ((256, 256),))
    small = bank_of_tasks(rng, pairs, [scorer] * 3)
    end = 128 * 65536
    prototypes = np.full((3, 2), end, np.int32)
    prototypes[1, 1] -= 1
    data = write_bank(small.header, {**small.sections, "PROT": prototypes}, ())
    maps = [np.full((256, 256, 2), -128, np.int8)] * 2
    _, result = OpenBank(data).score(maps)
    assert result.task == scores_of(data, maps)[1] == 1
    beyond = write_bank(small.header, {**small.sections, "PROT": prototypes + 1}, ())
    assert OpenBank(beyond).status == "FIELD" and not python_accepts(beyond)
    pairs, scorer = student(rng, (1, 1), (2,), ((256, 257),))
    with_more = bank_of_tasks(rng, pairs, [scorer] * 2).data
    assert OpenBank(with_more).status == "FIELD" and not python_accepts(with_more)
    assert OpenBank(bank_of(rng, pairs, scorer).data).status == "OK"  # one task needs no signature


def test_banks_whose_maps_do_not_pair_up_are_refused_by_both() -> None:
    rng = np.random.default_rng(2)
    pairs, scorer = student(rng, (4, 4), (3, 5, 2), ((4, 4), (3, 2), (2, 2)))
    small = bank_of(rng, pairs, scorer, golden=0)
    header, sections = small.header, small.sections
    assert OpenBank(small.data).status == "OK" and python_accepts(small.data)
    for row in range(6):
        for field, values in ((0, (1, 5)), (1, (1, 5)), (2, (1, 4)), (4, (1, 2**30)), (5, (-1, 1)), (6, (3,))):
            for value in values:
                taps = sections["TAPS"].copy()
                taps[row, field] = value
                data = write_bank(header, {**sections, "TAPS": taps}, ())
                alike = bool((taps[row % 3, :3] == taps[row % 3 + 3, :3]).all() and field < 3)
                assert (OpenBank(data).status == "OK") == python_accepts(data) == alike, (row, field, value)
    taps = sections["TAPS"].copy()
    taps[:, 6] = 3
    for changed in (
        {"TAPS": taps}, *({"CFG ": np.array(config, np.int32)} for config in (
            (2, 20, 3, 0), (3, 19, 3, 0), (3, 21, 3, 0), (3, 20, -1, 0), (3, 20, 32, 0), (3, 20, 3, 1), (6, 20, 3, 0))),
    ):  # fmt: skip
        data = write_bank(header, {**sections, **changed}, ())
        assert OpenBank(data).status == "FIELD" and not python_accepts(data)
    for shift in (0, 31):
        data = write_bank(header, {**sections, "CFG ": np.array((3, 20, shift, 0), np.int32)}, ())
        assert OpenBank(data).status == "OK" and python_accepts(data)
    for taps in (sections["TAPS"][:5], sections["TAPS"][:1]):
        odd = Header(**{**vars(header), "taps": len(taps)})
        data = write_bank(odd, {**sections, "TAPS": taps, "CFG ": np.array((len(taps) // 2, 20, 3, 0), np.int32)}, ())
        assert OpenBank(data).status == "FIELD" and not python_accepts(data)


def test_eight_pairs_and_no_more() -> None:
    rng = np.random.default_rng(3)
    pairs, scorer = student(rng, (2, 3), (2,) * 8, ((2, 3),) * 8)
    small = bank_of(rng, pairs, scorer)
    b = OpenBank(small.data)
    assert b.status == "OK" and (b.bank.values, b.bank.bits) == (8, 6)
    assert isinstance(small.scorer, StudentTeacherScorer) and small.scorer.unit == 2.0 ** (small.scorer.shift - 48)
    check(small, maps_of(rng, small, "any"), ())
