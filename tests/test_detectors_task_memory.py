"""Banks of several tasks: cut, select, extend, the ladder of thresholds, sections, against brute force and PatchCore."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvad.detectors.coreset import farthest_first, farthest_first_reference
from tinyvad.detectors.nearest import PatchCoreLiteScorer
from tinyvad.detectors.patchcore import PatchCore, PatchCoreLite
from tinyvad.detectors.product_quantizer import ProductQuantizer, fit_quantizer
from tinyvad.detectors.task_memory import (
    choose,
    cut,
    extend,
    ladder,
    ladder_of_scores,
    ladder_sizes,
    nested_scores,
    select,
    shares,
    stack_ladders,
    threshold_at,
)
from tinyvad.errors import CheckFailed, InputError
from tinyvad.fitting import threshold_of


def maps(rng: np.random.Generator, n: int, centre: float = 0.0, dtype: type = np.int8) -> np.ndarray:
    """(n, 3, 4, 12) embeddings around ``centre``."""
    x = rng.normal(size=(n, 3, 4, 12)) * 15 + centre
    return np.clip(np.rint(x), -127, 127).astype(np.int8) if dtype == np.int8 else x.astype(dtype)


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, D), (K, D) -> (n, K) int64 or float64 by direct differences."""
    wide = np.int64 if a.dtype == np.int8 else np.float64
    difference = a.astype(wide)[:, None] - b.astype(wide)[None]
    return (difference * difference).sum(-1)


@pytest.fixture(scope="module")
def quantizer() -> ProductQuantizer:
    rows = maps(np.random.default_rng(5), 60).reshape(-1, 12)
    return fit_quantizer(rows, 4, 4, np.random.default_rng(0), group=True)


def test_shares_never_pass_the_whole():
    assert [shares(10, c) for c in (1, 2, 3, 10)] == [10, 5, 3, 1]
    with pytest.raises(CheckFailed, match="10 rows: no room for 11 products"):
        shares(10, 11)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_select_is_patchcore(rng, dtype):
    x = maps(rng, 20, dtype=dtype)
    batches = np.split(x, [3, 11])
    memory = select(iter(batches), 30, 100, seed=3)
    np.testing.assert_array_equal(memory.rows, PatchCore(30, max_candidates=100, seed=3).fit(iter(batches)).memory_bank_)
    assert memory.images == 20 and memory.codes is None


def test_a_cut_is_the_smaller_selection(rng):
    x = [maps(rng, 20)]
    large = select(x, 100, 10_000, 0)
    np.testing.assert_array_equal(cut(large, 37).rows, select(x, 37, 10_000, 0).rows)
    assert cut(large, 37).images == 20
    with pytest.raises(InputError, match="at least 1"):
        cut(large, 0)


def test_quantised_candidates_are_selected_as_decoded_vectors(rng, quantizer):
    x = maps(rng, 20)
    memory = choose(None, x.reshape(-1, 12), 20, 50, quantizer)
    decoded = quantizer.decode(quantizer.encode(x.reshape(-1, 12)))
    np.testing.assert_array_equal(memory.rows, decoded[farthest_first_reference(decoded, 50).order])
    np.testing.assert_array_equal(quantizer.decode(memory.codes), memory.rows)
    assert len(np.unique(memory.rows, axis=0)) == 50  # none is stored twice
    np.testing.assert_array_equal(cut(memory, 9).codes, memory.codes[:9])


def test_a_new_task_has_codebooks_of_its_own_and_keeps_them(rng, quantizer):
    """Rows, codebooks and codes are those of PatchCoreLite; more images are encoded with them, none trained anew."""
    x, more = maps(rng, 20), maps(rng, 4, 40)
    train = lambda rows, candidates: fit_quantizer(rows, 4, 4, np.random.default_rng(3), candidates)  # noqa: E731
    memory = select([x], 50, 100, 3, train)
    alone = PatchCoreLite(50, 4, 4, max_candidates=100, seed=3).fit([x])
    np.testing.assert_array_equal(memory.codes, alone.codes_)
    np.testing.assert_array_equal(memory.quantizer.codebooks, alone.quantizer_.codebooks)
    np.testing.assert_array_equal(memory.quantizer.indices, alone.quantizer_.indices)
    np.testing.assert_array_equal(memory.rows, alone.quantizer_.decode(alone.codes_))
    grown = extend(memory, [more], 60, 10_000, 0)
    assert grown.quantizer is memory.quantizer and len(grown.rows) == 60
    np.testing.assert_array_equal(grown.quantizer.decode(grown.codes), grown.rows)
    decoded = memory.quantizer.decode(memory.quantizer.encode(more.reshape(-1, 12)))
    together = np.concatenate([memory.rows, decoded])
    np.testing.assert_array_equal(grown.rows, together[farthest_first(together, 60, 0).order])


@pytest.mark.parametrize("coded", [False, True])
def test_images_that_bring_nothing_new_change_no_row(rng, quantizer, coded):
    coder = quantizer if coded else None
    x = maps(rng, 5)
    whole = choose(None, x.reshape(-1, 12), 5, 500, coder)  # every distinct vector
    again = extend(whole, [x[2:4]], 500, 10_000, 0)
    np.testing.assert_array_equal(again.rows, whole.rows)
    assert again.images == 7
    if coded:
        np.testing.assert_array_equal(again.codes, whole.codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_extend_covers_old_and_new_as_it_promises(old_rows, rows, seed):
    rng = np.random.default_rng(seed)
    old, new = maps(rng, 2, -20), maps(rng, 1, 20)
    memory = select([old], old_rows, 1000, 0)
    radius = np.sqrt(squared(old.reshape(-1, 12), memory.rows).min(1).max())
    grown = extend(memory, [new], rows, 1000, 0)
    together = np.concatenate([memory.rows, new.reshape(-1, 12)])
    reached = np.sqrt(squared(together, grown.rows).min(1).max())
    assert np.sqrt(squared(old.reshape(-1, 12), grown.rows).min(1).max()) <= radius + reached + 1e-9
    np.testing.assert_array_equal(grown.rows[0], memory.rows[0])
    np.testing.assert_array_equal(grown.rows, together[farthest_first(together, rows, 0).order])


def test_extending_far_rows_keeps_them_and_adds_the_new_region(rng):
    old, new = maps(rng, 10, -60), maps(rng, 10, 60)
    memory = select([old], 20, 1000, 0)
    grown = extend(memory, [new], 20, 1000, 0)
    assert len(grown.rows) == 20
    sides = grown.rows.astype(int).mean(1) > 0
    assert 5 < sides.sum() < 15
    known = {row.tobytes() for row in np.concatenate([memory.rows, new.reshape(-1, 12)])}
    assert all(row.tobytes() in known for row in grown.rows)


def test_float_and_int_rows_do_not_mix(rng):
    with pytest.raises(InputError, match="float32, 12 values; the task has int8"):
        extend(select([maps(rng, 2)], 5, 100, 0), [maps(rng, 2, dtype=np.float32)], 5, 100, 0)
    with pytest.raises(InputError, match="at least one good image"):
        select([], 5, 100, 0)
    with pytest.raises(InputError, match="give one kind"):
        select([maps(rng, 2), maps(rng, 2, dtype=np.float32)], 5, 100, 0)
    with pytest.raises(InputError, match=r"give \(n, H, W, D\)"):
        select([maps(rng, 2)[0]], 5, 100, 0)


def test_sizes_of_a_ladder():
    assert ladder_sizes(1024) == [1024, 724, 512, 362, 256, 181, 128, 91, 64, 45, 32, 23, 16, 11, 8, 6]
    assert ladder_sizes(5) == [5, 4, 3, 2, 1]
    assert ladder_sizes(1) == [1]


@pytest.mark.parametrize("coded", [False, True])
def test_nested_scores_are_searches_of_every_prefix(rng, quantizer, coded):
    x, probe = maps(rng, 20), maps(rng, 7, 5)
    memory = choose(None, x.reshape(-1, 12), 20, 60, quantizer if coded else None)
    sizes = [90, *ladder_sizes(60)]
    scores = nested_scores(memory, sizes, np.split(probe, [2]))
    assert scores.shape == (len(sizes), 7) and scores.dtype == np.int64
    for size, row in zip(sizes, scores, strict=True):
        if coded:
            expected = PatchCoreLiteScorer(quantizer, memory.codes[:size]).score(probe)
        else:
            expected = squared(probe.reshape(-1, 12), memory.rows[:size]).min(1).reshape(7, 3, 4)
        np.testing.assert_array_equal(row, expected.max((1, 2)))


def test_ladder_is_cross_fitting_at_every_size(rng):
    x = maps(rng, 13)
    folds = [np.arange(fold, 13, 5) for fold in range(5)]
    fit = partial(select, rows=30, max_candidates=10_000, seed=0)
    steps = ladder(lambda numbers: [x[numbers]], folds, 30, fit, threshold_of)
    assert steps.dtype == np.uint32
    np.testing.assert_array_equal(steps[:, 0], ladder_sizes(30))
    for size, threshold in steps:
        scores = np.zeros(13, np.int64)
        for held in folds:
            blind = PatchCore(int(size)).fit([np.delete(x, held, axis=0)]).to_scorer()
            scores[held] = blind.score(x[held]).max((1, 2))
        assert threshold == threshold_of(scores)
    assert (np.diff(steps[:, 1].astype(int)) >= 0).all()  # fewer rows, larger distances
    with pytest.raises(InputError, match="single image"):
        ladder(lambda numbers: [x[numbers]], [np.arange(1)], 30, fit, threshold_of)


def test_a_cut_task_takes_the_threshold_of_the_next_smaller_size():
    steps = np.array([[10, 50], [7, 60], [5, 70]], np.uint32)
    assert [threshold_at(steps, rows) for rows in (12, 10, 9, 7, 6, 5, 4, 1)] == [50, 50, 60, 60, 70, 70, 70, 70]
    stacked = stack_ladders([steps, steps[:1]])
    np.testing.assert_array_equal(stacked, [[[10, 50], [7, 60], [5, 70]], [[10, 50]] * 3])
    assert stacked.dtype == np.uint32
    np.testing.assert_array_equal(ladder_of_scores([3, 2], np.array([[1, 2], [3, 9]]), threshold_of), [[3, 3], [2, 10]])
