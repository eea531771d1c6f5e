"""The greedy coreset against the plain loop, brute force and the properties that define it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from tinyvad.detectors.coreset import (
    MAX_DEPTH,
    farthest_first,
    farthest_first_reference,
    farthest_from_mean,
    squared_distances,
)
from tinyvad.detectors.reservoir import Reservoir
from tinyvad.errors import InputError


def clusters(rng: np.random.Generator, n: int, depth: int, dtype: type) -> np.ndarray:
    """(n, depth) rows in a few clusters with far outliers, as features are."""
    x = rng.normal(size=(6, depth))[rng.integers(0, 6, n)] * 40 + rng.normal(size=(n, depth)) * rng.exponential(8, (n, 1))
    return np.clip(np.rint(x), -128, 127).astype(dtype) if dtype == np.int8 else x.astype(dtype)


def all_distances(x: np.ndarray) -> np.ndarray:
    """(n, n) float64 Euclidean distances by direct differences."""
    wide = x.astype(np.float64)
    return np.sqrt(((wide[:, None] - wide[None]) ** 2).sum(-1))


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("depth", [1, 16, 77])
@pytest.mark.parametrize("n", [1, 63, 64, 500])
def test_kernel_equals_the_plain_loop_to_the_last_bit(rng, dtype, depth, n):
    x = clusters(rng, n, depth, dtype)
    fast, plain = farthest_first(x, 120), farthest_first_reference(x, 120)
    np.testing.assert_array_equal(fast.order, plain.order)
    np.testing.assert_array_equal(fast.radii, plain.radii)
    assert fast.radii.dtype == plain.radii.dtype == (np.int32 if dtype == np.int8 else np.float32)


def test_kernel_equals_the_plain_loop_with_many_equal_distances(rng):
    x = rng.integers(-1, 2, (700, 5)).astype(np.int8)  # at most 243 distinct rows
    fast, plain = farthest_first(x, 700), farthest_first_reference(x, 700)
    np.testing.assert_array_equal(fast.order, plain.order)
    np.testing.assert_array_equal(fast.radii, plain.radii)


def test_float_distances_are_those_of_float64(rng):
    x = clusters(rng, 50, 300, np.float32)
    padded = np.pad(x, ((0, 0), (0, 4)))
    np.testing.assert_allclose(squared_distances(padded, padded[7]), all_distances(x)[7] ** 2, rtol=1e-5)


def test_int8_extremes_are_exact():
    x = np.array([[-128] * 300, [127] * 300, [0] * 300], np.int8)
    assert farthest_first(x, 3, start=0).radii.tolist() == [300 * 255**2, 300 * 127**2, 0]


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_every_step_takes_the_farthest_row(rng, dtype):
    x = clusters(rng, 150, 9, dtype)
    distances = all_distances(x)
    order, radii = farthest_first(x, 60, start=5)
    assert order[0] == 5
    for k in range(1, 60):
        nearest = distances[:, order[:k]].min(1)
        assert np.sqrt(radii[k - 1]) == pytest.approx(nearest.max(), rel=1e-5)
        assert nearest[order[k]] == pytest.approx(nearest.max(), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_prefix(rng, dtype):
    x = clusters(rng, 400, 12, dtype)
    order, radii = farthest_first(x, 100)
    for k in (1, 2, 37, 99):
        shorter = farthest_first(x, k)
        np.testing.assert_array_equal(shorter.order, order[:k])
        np.testing.assert_array_equal(shorter.radii, radii[:k])


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_radii_never_increase_and_separate_the_chosen(rng, dtype):
    x = clusters(rng, 300, 8, dtype)
    order, radii = farthest_first(x, 80)
    assert (np.diff(radii) <= 0).all()
    chosen = all_distances(x[order])
    for k in range(2, 81):
        pairs = chosen[:k, :k][np.triu_indices(k, 1)]
        assert pairs.min() >= np.sqrt(radii[k - 2]) * (1 - 1e-5)  # the radius at which the k-th was taken


def test_at_most_twice_the_optimal_covering_radius(rng):
    for _ in range(20):
        x = rng.normal(size=(11, 2)).astype(np.float32)
        distances = all_distances(x)
        order, _ = farthest_first(x, 5)
        for k in range(1, 6):
            best = min(distances[:, list(centres)].min(1).max() for centres in combinations(range(11), k))
            assert distances[:, order[:k]].min(1).max() <= 2 * best + 1e-6


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_compressing_a_bank_again_only_cuts_it_off(rng, dtype):
    x = clusters(rng, 500, 10, dtype)
    bank = x[farthest_first(x, 90).order]
    again = farthest_first(bank, 30, start=0)
    np.testing.assert_array_equal(again.order, np.arange(30))
    other = farthest_first(bank, 30, start=17)
    assert set(other.order) != set(range(30))  # which is why the start must stay the same


def test_duplicates_are_never_taken(rng):
    x = np.repeat(rng.permutation(np.arange(-20, 20))[:, None], 7, axis=0).astype(np.int8)
    order, radii = farthest_first(x, 200)
    assert len(order) == 40 and len(np.unique(x[order])) == 40
    assert radii[-1] == 0 and (radii[:-1] > 0).all()
    assert len(farthest_first(np.zeros((5, 3), np.float32), 4).order) == 1


def test_start_is_the_row_farthest_from_the_mean_exactly(rng):
    assert farthest_from_mean(np.array([[0], [0], [9], [-9]], np.int8)) == 2  # of equals the lowest
    x = rng.integers(-128, 128, (3000, 40)).astype(np.int8)
    wide = x.astype(object)
    exact = ((len(x) * wide - wide.sum(0)) ** 2).sum(1)
    assert farthest_from_mean(x) == int(np.argmax(exact)) == farthest_first(x, 1).order[0]
    assert farthest_from_mean(x.astype(np.float32)) == farthest_from_mean(x)


@pytest.mark.parametrize(
    ("rows", "count", "start", "words"),
    [
        (np.zeros((3, 2)), 1, None, "float64"),
        (np.zeros((0, 2), np.int8), 1, None, r"\(0, 2\)"),
        (np.zeros(4, np.int8), 1, None, r"\(4,\)"),
        (np.zeros((3, 2), np.int8), 0, None, "size 0"),
        (np.zeros((3, 2), np.int8), 1, 3, "0 to 2"),
        (np.full((3, 2), np.nan, np.float32), 1, None, "not finite"),
        (np.zeros((1, MAX_DEPTH + 1), np.int8), 1, None, str(MAX_DEPTH)),
    ],
)
def test_bad_input_is_named(rows, count, start, words):
    with pytest.raises(InputError, match=words):
        farthest_first(rows, count, start)


def test_reservoir_keeps_all_of_a_short_stream_in_order():
    reservoir = Reservoir(10, seed=0)
    for part in np.split(np.arange(7)[:, None], [2, 3]):
        reservoir.add(part)
    np.testing.assert_array_equal(reservoir.sample()[:, 0], np.arange(7))


def test_reservoir_does_not_depend_on_the_batches(rng):
    stream = np.arange(5000)[:, None]
    samples = []
    for cuts in ([], [1], [37, 38, 2000], list(range(0, 5000, 7))):
        reservoir = Reservoir(40, seed=3)
        for part in np.split(stream, cuts):
            reservoir.add(part)
        assert reservoir.seen == 5000
        samples.append(reservoir.sample())
    for sample in samples[1:]:
        np.testing.assert_array_equal(sample, samples[0])
    assert len(np.unique(samples[0])) == 40


def test_reservoir_is_uniform():
    counts = np.zeros(60)
    for seed in range(3000):
        reservoir = Reservoir(15, seed)
        reservoir.add(np.arange(60)[:, None])
        counts[reservoir.sample()[:, 0]] += 1
    # binomial with mean 750 and standard deviation 24: five of them leave no room for a slope
    assert np.abs(counts - 750).max() < 120
