"""CFA's centres in integers: the words of the SPEC in plain Python, the float anomaly map within a tolerance, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_banks import centres as random_centres

from tinyvad.detectors.centres import TABLE, CentresScorer
from tinyvad.errors import InputError


def by_hand(scorer: CentresScorer, cells: np.ndarray) -> np.ndarray:
    """(H, W) of one image (H, W, D) by the SPEC, in Python's integers."""
    scores = np.zeros(cells.shape[:2], np.uint32)
    table, span = [int(value) for value in scorer.table], 1 << scorer.step_bits

    def exp(difference: int) -> int:
        at, part = divmod(difference, span)
        return table[-1] if at >= TABLE - 1 else (table[at] * (span - part) + table[at + 1] * part) // span

    for i in range(cells.shape[0]):
        for j in range(cells.shape[1]):
            moved = [
                (int(e) + int(r) + int(c) + (1 << scorer.shift) // 2) // (1 << scorer.shift)
                for e, r, c in zip(cells[i, j], scorer.offsets[i], scorer.offsets[scorer.grid[0] + j], strict=True)
            ]
            far = sorted(sum((v - int(c)) ** 2 for v, c in zip(moved, row, strict=True)) for row in scorer.centres)
            first, *others = (math.isqrt(squared << 24) for squared in far[:3])
            weight = (1 << 16) + sum(exp(other - first) for other in others)
            scores[i, j] = first * ((2**32 - 1) // weight) >> 16
    return scores


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shift=st.integers(0, 7), count=st.integers(3, 40), depth=st.integers(1, 30))
def test_it_is_the_words_of_the_spec(seed: int, shift: int, count: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    scorer = random_centres(rng, (2, 3), count, depth, shift)
    cells = rng.integers(-128, 128, (2, 2, 3, depth)).astype(np.int8)
    found = scorer.score(cells)
    for image, scores in zip(cells, found, strict=True):
        np.testing.assert_array_equal(scores, by_hand(scorer, image))


def softmin_score(delta: np.ndarray) -> np.ndarray:
    """softmin(delta)_1 * delta_1 of (..., 3) ascending distances, in float64."""
    return delta[..., 0] / np.exp(delta[..., :1] - delta).sum(-1)


@settings(max_examples=60, deadline=None)
@given(step=st.floats(1e-6, 1000), seed=st.integers(0, 2**32 - 1))
def test_the_score_of_given_distances_is_the_softmins(step: float, seed: int) -> None:
    """As near as the module says: the same integer distances, exp and division in float64."""
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 50 * step, (5, 4))
    scorer = CentresScorer.of_centres(points, np.zeros((2, 4)), np.zeros((2, 4)), step)
    unit_of_v = step * 2.0**scorer.shift
    first = rng.integers(0, 1 << int(rng.integers(1, 31)), 500)
    near = (rng.uniform(0, 20, (500, 2)) / unit_of_v + np.sqrt(first)[:, None]) ** 2  # where exp is not 0
    squared = np.sort(np.concatenate([first[:, None], near.astype(np.int64)], 1), axis=1).clip(0, (1 << 31) - 2)
    exact = softmin_score(np.sqrt(squared) * unit_of_v)
    found = scorer.scores_of(squared) * scorer.unit
    assert (np.abs(found - exact) <= (5e-4 + scorer.unit) * exact + 2 * scorer.unit).all()


def test_far_and_equal_centres_are_the_closed_forms() -> None:
    """Two more centres at the same distance: a third of it. Two far away: all of it. At a centre: 0."""
    step = 0.05
    far = np.array([[100.0, 0], [0, 100], [-100, 0], [0, -100]]) * step
    scorer = CentresScorer.of_centres(far, np.zeros((1, 2)), np.zeros((3, 2)), step)
    (all_equal, at_one, near_one), = scorer.score(np.array([[[[0, 0], [100, 0], [60, 0]]]], np.int8))[0:1, 0]
    assert all_equal * scorer.unit == pytest.approx(100 * step / 3, rel=1e-3)
    assert at_one == 0
    others = (math.hypot(60, 100) - 40) * step  # of the next two, beyond the nearest
    assert near_one * scorer.unit == pytest.approx(40 * step / (1 + 2 * math.exp(-others)), rel=1e-3)


def test_it_follows_the_float_map_with_its_coordinates() -> None:
    """Maps, centres, coordinate parts of a descriptor as CFA has them; every rounding is within half a unit a value."""
    rng = np.random.default_rng(3)
    grid, depth = (5, 4), 24
    rows = np.linspace(-1, 1, grid[0])[:, None] * rng.normal(0, 0.3, depth)
    columns = np.linspace(-1, 1, grid[1])[:, None] * rng.normal(0, 0.3, depth)
    step = 1.2 * 3.5 / 127
    cells = rng.normal(0, 0.9, (6, *grid, depth)).clip(-4, 4)
    phi = cells + rows[:, None] + columns
    points = phi[:5].mean(0).reshape(-1, depth) + 0.8  # not around 0
    quantised = np.clip(np.rint(cells / step), -127, 127).astype(np.int8)
    scorer = CentresScorer.of_centres(points, rows, columns, step)
    assert scorer.shift == 0
    distances = np.sort(np.linalg.norm(phi[..., None, :] - points, axis=-1), axis=-1)[..., :3]
    exact, found = softmin_score(distances), scorer.score(quantised) * scorer.unit
    # a distance is off by half a unit for each of four roundings a value at most; the softmin's slope is below 1.2
    assert np.abs(found - exact).max() < 1.2 * 4 * 0.5 * step * depth**0.5
    assert np.abs(found - exact).mean() < 0.02 * exact.mean()
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.998


def test_centres_beyond_int8_are_shifted() -> None:
    step = 0.1
    points = np.array([[400.0, 0], [-400, 0], [0, 300], [0, -300]]) * step
    scorer = CentresScorer.of_centres(points, np.zeros((1, 2)), np.full((1, 2), 200 * step), step)
    assert scorer.shift == 2 and scorer.unit == step * 4 / 4096
    far = np.sort(np.linalg.norm(np.array([100.0 + 200, 50 + 200]) * step - points, axis=1))[:3]
    found = scorer.score(np.array([[[[100, 50]]]], np.int8)).item() * scorer.unit
    assert found == pytest.approx(float(softmin_score(far)), rel=0.02)


def test_distances_at_the_32_bit_bound() -> None:
    """12 values as far from a centre as the check allows, and one more, which it refuses."""
    reach = math.isqrt(((1 << 31) - 2) // 12) - 256
    offsets = np.zeros((2, 12), np.int16)
    offsets[0] = reach
    points = np.full((3, 12), -128, np.int8)
    scorer = CentresScorer(points, offsets, np.zeros(TABLE, np.uint32), (1, 1))
    scorer.check()
    worst = np.full((1, 1, 1, 12), 127, np.int8)
    squared = 12 * (reach + 127 + 128) ** 2
    assert scorer.nearest(worst).tolist() == [[[[squared] * 3]]]
    assert scorer.score(worst).item() == math.isqrt(squared << 24) * 65535 >> 16
    with pytest.raises(InputError, match="pass 32 bits"):
        replace(scorer, offsets=offsets + np.int16(1)).check()


def test_sections_come_back() -> None:
    rng = np.random.default_rng(4)
    scorer = random_centres(rng, (3, 4), 9, 12, 2)
    again = CentresScorer.from_sections(scorer.sections(), (3, 4), 12)
    for name in ("centres", "offsets", "table"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scorer, name))
    assert (again.shift, again.step_bits, again.unit) == (scorer.shift, scorer.step_bits, scorer.unit)
    assert scorer.macs((3, 4)) == 12 * 9 * 12 and scorer.scratch_bytes() == 32


@pytest.mark.parametrize(
    ("tag", "change", "words"),
    [
        ("CFG ", lambda a: np.array([2, 12, 0, 0], np.int32), "CFG"),
        ("CFG ", lambda a: np.array([9, 11, 0, 0], np.int32), "CFG"),
        ("CFG ", lambda a: np.array([9, 12, 8, 0], np.int32), "CFG"),
        ("CFG ", lambda a: np.array([9, 12, 0, 20], np.int32), "CFG"),
        ("TABL", lambda a: a + np.uint32(65536), "TABL"), ("TABL", lambda a: a[:-1], "TABL"),
        ("BIAS", lambda a: a[:-1], "BIAS"), ("BIAS", lambda a: np.full_like(a, -32768), "BIAS"),
        ("BANK", lambda a: a[:, :-1], "BANK"), ("SCAL", lambda a: -a, "SCAL"),
    ],
)  # fmt: skip
def test_malformed_sections_are_named(tag: str, change: object, words: str) -> None:
    sections = random_centres(np.random.default_rng(4), (3, 4), 9, 12).sections()
    with pytest.raises(InputError, match=words):
        CentresScorer.from_sections({**sections, tag: change(sections[tag])}, (3, 4), 12)  # type: ignore[operator]


def test_what_cannot_be_quantised_is_refused() -> None:
    points, rows, columns = np.eye(4), np.zeros((2, 4)), np.zeros((3, 4))
    for given_points, words in (
        (points[:2], "2 centres; a bank needs 3"), (points * np.nan, "not finite"), (points * 1e9, "reach"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            CentresScorer.of_centres(given_points, rows, columns, 0.1)
    with pytest.raises(InputError, match="reach"):
        CentresScorer.of_centres(points, rows + 1e5, columns, 0.1)
    with pytest.raises(InputError, match="not finite"):
        CentresScorer.of_centres(points, rows, columns, 0.0)


def test_other_embeddings_are_refused() -> None:
    scorer = random_centres(np.random.default_rng(0), (2, 2), 4, 3)
    for wrong in (np.zeros((1, 2, 2, 4), np.int8), np.zeros((1, 3, 2, 3), np.int8), np.zeros((1, 2, 2, 3), np.int16)):
        with pytest.raises(InputError, match="the bank needs int8"):
            scorer.score(wrong)
