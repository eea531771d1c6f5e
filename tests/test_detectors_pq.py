"""Product quantisation against exhaustive search on decoded vectors, scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from tinyvad.detectors import product_quantizer
from tinyvad.detectors.channel_groups import _swap, covariance, group_channels
from tinyvad.detectors.distances import exact_dtype, nearest, pairwise_squared
from tinyvad.detectors.kmeans import assign, assign_reference, kmeans, seed_centroids
from tinyvad.detectors.product_quantizer import (
    COARSE,
    ProductQuantizer,
    distortion,
    fit_quantizer,
    pack_codes,
    unpack_codes,
)
from tinyvad.errors import InputError


def features(rng: np.random.Generator, n: int, depth: int, dtype: type = np.int8) -> np.ndarray:
    """(n, depth) correlated rows, as features are."""
    x = (rng.normal(size=(n, depth // 2)) * rng.exponential(1, (n, 1))) @ rng.normal(size=(depth // 2, depth)) * 8
    return np.clip(np.rint(x), -128, 127).astype(dtype) if dtype == np.int8 else x.astype(dtype)


def brute(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """(q,) float64 smallest squared distances by direct differences."""
    return ((queries.astype(np.float64)[:, None] - bank.astype(np.float64)[None]) ** 2).sum(-1).min(1)


def random_quantizer(
    rng: np.random.Generator, subspaces: int, centroids: int, width: int, dtype: type
) -> tuple[ProductQuantizer, np.ndarray, np.ndarray]:
    """A quantiser with random codebooks, 50 queries and 300 codes, over the whole range of values."""
    depth = subspaces * width

    def draw(*shape: int) -> np.ndarray:
        x = rng.integers(-128, 128, shape)
        return x.astype(np.int8) if dtype == np.int8 else (x + rng.normal(size=shape)).astype(np.float32)

    order = rng.permutation(depth).astype(np.uint16)
    quantizer = ProductQuantizer(draw(subspaces, centroids, width), order, 8 if centroids > 16 else 4)
    return quantizer, draw(50, depth), rng.integers(0, centroids, (300, subspaces)).astype(np.uint8)


SHAPES = [(8, 256, 10), (16, 16, 5), (1, 7, 3), (5, 255, 1), (3, 1, 4)]


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize(("subspaces", "centroids", "width"), SHAPES)
def test_search_equals_its_reference_to_the_last_bit(rng, dtype, subspaces, centroids, width):
    quantizer, queries, codes = random_quantizer(rng, subspaces, centroids, width, dtype)
    found, expected = quantizer.search(queries, codes), quantizer.search_reference(queries, codes)
    assert found.dtype == expected.dtype == (np.uint32 if dtype == np.int8 else np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("subspaces", "centroids", "width"), SHAPES)
def test_search_is_exhaustive_search_on_decoded_vectors(rng, subspaces, centroids, width):
    quantizer, queries, codes = random_quantizer(rng, subspaces, centroids, width, np.int8)
    np.testing.assert_array_equal(quantizer.search(queries, codes), brute(queries, quantizer.decode(codes)))
    quantizer, queries, codes = random_quantizer(rng, subspaces, centroids, width, np.float32)
    np.testing.assert_allclose(quantizer.search(queries, codes), brute(queries, quantizer.decode(codes)), rtol=1e-5)


def test_search_of_extremes_is_exact():
    quantizer = ProductQuantizer(np.full((4, 1, 64), -128, np.int8), np.arange(256, dtype=np.uint16), 8)
    assert quantizer.search(np.full((1, 256), 127, np.int8), np.zeros((1, 4), np.uint8)) == 256 * 255**2


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 129, 1000])
def test_search_does_not_depend_on_the_number_of_threads(rng, monkeypatch, n):
    quantizer, _, codes = random_quantizer(rng, 4, 16, 3, np.int8)
    queries = rng.integers(-128, 128, (n, 12)).astype(np.int8)
    expected = quantizer.search_reference(queries, codes)
    for count in (1, 2, 5):
        monkeypatch.setattr(product_quantizer, "threads", lambda count=count: count)
        np.testing.assert_array_equal(quantizer.search(queries, codes), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_assign_equals_its_reference_and_takes_the_lowest_of_equals(rng, dtype):
    vectors = rng.integers(-4, 5, (101, 2)).astype(dtype)
    centroids = rng.integers(-4, 5, (37, 2)).astype(dtype)  # with repetitions
    for found, expected in zip(assign(vectors, centroids), assign_reference(vectors, centroids), strict=True):
        np.testing.assert_array_equal(found, expected)
    neighbors = NearestNeighbors(n_neighbors=1).fit(centroids).kneighbors(vectors)[0][:, 0]
    np.testing.assert_allclose(assign(vectors, centroids)[1], neighbors**2, atol=1e-9)


def test_kmeans_is_as_good_as_scikit_learns(rng):
    vectors = features(rng, 3000, 12)
    ours = assign(vectors.astype(np.float32), kmeans(vectors, 64, np.random.default_rng(0)).astype(np.float32))[1].sum()
    theirs = [KMeans(64, n_init=1, max_iter=25, random_state=seed).fit(vectors).inertia_ for seed in range(3)]
    assert ours < 1.03 * np.mean(theirs)


def test_kmeans_finds_separated_means_exactly(rng):
    means = np.array([[0, 0], [100, 0], [0, 100], [-100, -100]])
    noise = np.array([[1, 0], [-1, 0], [0, 2], [0, -2]])
    vectors = (means[:, None] + noise).reshape(-1, 2).astype(np.int8)
    found = kmeans(vectors, 4, rng)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], means[np.lexsort(means.T)].astype(float))


def test_kmeans_fills_empty_clusters(rng, monkeypatch):
    vectors = np.repeat(np.array([[0], [1], [2], [50], [90]], np.int8), 20, axis=0)
    # all seeds alike: every cluster but one starts empty
    monkeypatch.setattr("tinyvad.detectors.kmeans.seed_centroids", lambda points, count, rng: points[[0] * count])
    assert sorted(set(kmeans(vectors, 5, rng)[:, 0])) == [0, 1, 2, 50, 90]


def test_more_centroids_than_distinct_vectors(rng):
    vectors = np.repeat(np.array([[0], [1], [2]], np.int8), 20, axis=0)
    assert set(kmeans(vectors, 9, rng)[:, 0]) == {0, 1, 2}


def test_seeds_follow_squared_distances():
    # from 0, the vector at 30 is 9 times as likely as the one at 10; never a vector that is chosen already
    vectors = np.array([[0], [10], [30]], np.float32)
    second = [seed_centroids(vectors, 2, np.random.default_rng(seed))[:, 0] for seed in range(4000)]
    after_zero = np.array([pair[1] for pair in second if pair[0] == 0])
    assert not (after_zero == 0).any()
    assert (after_zero == 30).mean() == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_codes_are_the_nearest_centroids(rng, dtype, bits):
    bank = features(rng, 600, 12, dtype)
    quantizer = fit_quantizer(bank, 3, bits, rng)
    codes = quantizer.encode(bank)
    assert codes.dtype == np.uint8 and codes.shape == (600, 3) and quantizer.codebooks.shape == (3, 1 << bits, 4)
    assert quantizer.codebooks.dtype == dtype
    parts = bank[:, quantizer.indices].reshape(600, 3, 4).astype(np.float64)
    gap = ((parts[:, :, None] - quantizer.codebooks.astype(np.float64)) ** 2).sum(-1)  # (600, 3, V)
    chosen = np.take_along_axis(gap, codes[..., None].astype(int), 2)[..., 0]
    np.testing.assert_allclose(chosen, gap.min(-1), rtol=1e-5, atol=1e-9)
    error = ((bank.astype(np.float64) - quantizer.decode(codes)) ** 2).sum(1).mean()
    assert distortion(quantizer, bank) == pytest.approx(error, rel=1e-5)


def test_enough_centroids_leave_no_distortion(rng):
    values = rng.integers(-128, 128, (4, 16, 3))  # 16 distinct sub-vectors a subspace
    bank = values[np.arange(4), rng.integers(0, 16, (500, 4))].reshape(500, 12).astype(np.int8)
    quantizer = fit_quantizer(bank, 4, 4, rng, group=False)
    codes = quantizer.encode(bank)
    np.testing.assert_array_equal(quantizer.decode(codes), bank)
    queries = features(rng, 90, 12)
    np.testing.assert_array_equal(quantizer.search(queries, codes), brute(queries, bank))


def test_distortion_falls_with_more_centroids_and_subspaces(rng):
    bank = features(rng, 1500, 24)
    by_bits = [distortion(fit_quantizer(bank, 4, bits, np.random.default_rng(0)), bank) for bits in (4, 8)]
    assert by_bits[1] < by_bits[0]
    by_subspaces = [distortion(fit_quantizer(bank, m, 8, np.random.default_rng(0)), bank) for m in (2, 4, 8, 24)]
    assert (np.diff(by_subspaces) < 0).all()


def test_fit_does_not_depend_on_the_number_of_threads(rng, monkeypatch):
    bank = features(rng, 400, 12)
    fitted = []
    for count in (1, 3):
        monkeypatch.setattr(product_quantizer, "threads", lambda count=count: count)
        fitted.append(fit_quantizer(bank, 4, 4, np.random.default_rng(7)))
    np.testing.assert_array_equal(fitted[0].codebooks, fitted[1].codebooks)
    np.testing.assert_array_equal(fitted[0].indices, fitted[1].indices)


def test_normal_features_train_the_codebooks_too(rng):
    normal = features(rng, 4000, 16)
    unusual = normal[np.argsort(-(normal.astype(int) ** 2).sum(1))[:400]]  # what a greedy bank is made of
    alone, together = (fit_quantizer(unusual, 4, 4, np.random.default_rng(0), rows) for rows in (None, normal[:2000]))
    assert distortion(together, normal[2000:]) < 0.9 * distortion(alone, normal[2000:])


@pytest.mark.parametrize("coarse", COARSE)
def test_two_stages_with_everything_in_the_shortlist_are_exhaustive(rng, coarse):
    quantizer, queries, codes = random_quantizer(rng, 4, 16, 3, np.int8)
    expected = brute(queries, quantizer.decode(codes))
    np.testing.assert_array_equal(quantizer.search_two_stage(queries, codes, len(codes), coarse), expected)
    assert (quantizer.search_two_stage(queries, codes, 20, coarse) >= expected).all()


def test_distance_tables_need_a_shortlist_of_one(rng):
    quantizer, queries, codes = random_quantizer(rng, 4, 16, 3, np.int8)
    np.testing.assert_array_equal(quantizer.search_two_stage(queries, codes, 1), quantizer.search(queries, codes))
    assert (quantizer.search_two_stage(queries, codes, 1, "index") > quantizer.search(queries, codes)).any()


@pytest.mark.parametrize(("coarse", "k"), [("pca", 1), ("adc", 0)])
def test_two_stage_bad_input(rng, coarse, k):
    quantizer, queries, codes = random_quantizer(rng, 4, 16, 3, np.int8)
    with pytest.raises(InputError, match="two-stage"):
        quantizer.search_two_stage(queries, codes, k, coarse)


def test_subspaces_must_divide(rng):
    with pytest.raises(InputError, match=r"use one of \[1, 2, 3, 4, 6, 12\]"):
        fit_quantizer(features(rng, 50, 12), 5, 8, rng)
    with pytest.raises(InputError, match="5 bits"):
        fit_quantizer(features(rng, 50, 12), 4, 5, rng)


@pytest.mark.parametrize("subspaces", [1, 2, 5, 8])
def test_packed_codes_come_back_and_the_low_nibble_is_first(rng, subspaces):
    codes = rng.integers(0, 16, (9, subspaces)).astype(np.uint8)
    packed = pack_codes(codes, 4)
    assert packed.shape == (9, (subspaces + 1) // 2) and (packed[:, 0] & 15 == codes[:, 0]).all()
    np.testing.assert_array_equal(unpack_codes(packed, subspaces, 4), codes)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 8), subspaces, 8), codes)


def test_groups_bring_copies_of_a_channel_together(rng):
    hidden = rng.normal(size=(500, 4)) * 30
    copies = hidden[:, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]] + rng.normal(size=(500, 12))
    order = group_channels(covariance(np.rint(copies).astype(np.int8)), 4)
    assert order.dtype == np.uint16 and sorted(order) == list(range(12))
    assert {frozenset(group % 4) for group in order.reshape(4, 3)} == {frozenset({i}) for i in range(4)}


def test_swap_gives_the_change_of_the_determinant(rng):
    a = rng.normal(size=(40, 7))
    matrix = a.T @ a
    group, others = np.array([0, 2, 5]), np.array([1, 3, 4, 6])
    change = _swap(matrix, group, others, np.linalg.inv(matrix[np.ix_(group, group)]))
    old = np.linalg.slogdet(matrix[np.ix_(group, group)])[1]
    for i, k in np.ndindex(3, 4):
        swapped = group.copy()
        swapped[i] = others[k]
        assert change[i, k] == pytest.approx(np.linalg.slogdet(matrix[np.ix_(swapped, swapped)])[1] - old)


def test_grouping_never_raises_the_distortion(rng):
    for _ in range(3):
        bank = features(rng, 300, 12)[:, rng.permutation(12)]
        with_groups, without = (fit_quantizer(bank, 4, 4, np.random.default_rng(1), group=g) for g in (True, False))
        assert distortion(with_groups, bank) <= distortion(without, bank)


def test_covariance_is_numpys(rng):
    x = features(rng, 300, 6)
    np.testing.assert_allclose(covariance(x), np.cov(x, rowvar=False, ddof=0) + np.eye(6) / 12, rtol=1e-9)
    assert np.linalg.cholesky(covariance(np.ones((5, 3), np.float32))).shape == (3, 3)  # constant channels too


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_exhaustive_search_equals_scikit_learn(rng, dtype):
    bank, queries = features(rng, 300, 20, dtype), features(rng, 90, 20, dtype)
    squared, rows = nearest(queries, bank)
    oracle = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank.astype(float))
    expected, index = oracle.kneighbors(queries.astype(float))
    np.testing.assert_allclose(np.sqrt(squared), expected[:, 0], rtol=1e-6)
    direct = ((queries.astype(float) - bank[rows].astype(float)) ** 2).sum(1)
    np.testing.assert_allclose(direct, squared, rtol=1e-9, atol=1e-6)
    if dtype == np.float32:
        np.testing.assert_array_equal(rows, index[:, 0])


def test_exhaustive_search_is_exact_in_both_float_types(rng):
    small = rng.integers(-40, 41, (64, 30)).astype(np.int8)
    large = rng.integers(-128, 128, (64, 900)).astype(np.int8)
    assert exact_dtype(small, small[:9]) is np.float32 and exact_dtype(large, large[:9]) is np.float64
    for x in (small, large):
        wide = x.astype(object)
        for part, matrix in pairwise_squared(x, x[:9]):
            exact = ((wide[part, None] - wide[None, :9]) ** 2).sum(-1)
            assert (matrix.astype(np.int64) == exact).all()


def test_exhaustive_search_works_in_tiles(rng, monkeypatch):
    from tinyvad.detectors import distances

    bank, queries = features(rng, 40, 8), features(rng, 70, 8)
    expected = nearest(queries, bank)
    monkeypatch.setattr(distances, "TILE", 100)
    np.testing.assert_array_equal(nearest(queries, bank)[0], expected[0])
    np.testing.assert_array_equal(nearest(queries, bank)[1], expected[1])
