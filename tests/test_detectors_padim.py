"""PaDiM and its variants against numpy.cov, scipy's Mahalanobis distance and each other; integers against floats."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from sklearn.metrics import roc_auc_score

from tinyvad.detectors.gaussian import collect
from tinyvad.detectors.padim import Padim, PadimCompact
from tinyvad.detectors.triangular import TriangularScorer, log_codes
from tinyvad.errors import InputError


def correlated(rng: np.random.Generator, n: int, grid: tuple[int, int], d: int, scale: float = 12.0) -> np.ndarray:
    """(n, H, W, d) int8 draws whose cells share most of their covariance, as the cells of real features do."""
    mix = (rng.normal(size=(d, d)) + 0.3 * rng.normal(size=(*grid, d, d))) / np.sqrt(d)
    x = np.einsum("nhwi,hwij->nhwj", rng.normal(size=(n, *grid, d)), mix) * scale + rng.normal(size=(*grid, d)) * 4
    return np.clip(np.rint(x), -127, 127).astype(np.int8)


def test_statistics_equal_numpy_cov(rng):
    x = rng.normal(3, 2, (17, 2, 3, 5))
    statistics = collect([x])
    for h in range(2):
        for w in range(3):
            np.testing.assert_allclose(statistics.covariance()[h, w], np.cov(x[:, h, w], rowvar=False), atol=1e-10)
            np.testing.assert_allclose(statistics.mean[h, w], x[:, h, w].mean(0), atol=1e-12)


def test_integer_sums_are_exact_in_any_order_and_split(rng):
    x = rng.integers(-127, 128, (3000, 1, 2, 4)).astype(np.int8)
    wide = x.astype(object)
    exact = np.einsum("nhwi,nhwj->hwij", wide, wide)
    shuffled = x[rng.permutation(len(x))]
    merged = collect([shuffled[:1000]]).merge(collect([shuffled[1000:1001], shuffled[1001:]]))
    for statistics in (collect([x]), merged):
        assert (statistics.second.astype(object) == exact).all()
        assert statistics.count == 3000


def test_diagonal_statistics_are_the_diagonal(rng):
    x = rng.integers(-127, 128, (40, 2, 2, 6)).astype(np.int8)
    full, lite = collect([x]), collect([x], diagonal=True)
    np.testing.assert_array_equal(lite.covariance(), full.covariance().diagonal(axis1=-2, axis2=-1))


def test_padim_equals_scipy(rng):
    x = rng.normal(size=(30, 2, 2, 4)).astype(np.float32)
    probe = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    scores = Padim().fit([x[:11], x[11:]]).score(probe)
    for n, h, w in np.ndindex(3, 2, 2):
        covariance = np.cov(x[:, h, w].astype(float), rowvar=False) + 0.01 * np.eye(4)
        expected = scipy_mahalanobis(probe[n, h, w], x[:, h, w].mean(0), np.linalg.inv(covariance))
        assert scores[n, h, w] == pytest.approx(expected, rel=1e-5)


def test_score_of_the_mean_is_zero(rng):
    x = rng.normal(size=(20, 1, 1, 3))
    assert Padim().fit([x]).score(x.mean(0, keepdims=True))[0, 0, 0] == pytest.approx(0, abs=1e-6)


def test_lite_equals_padim_in_one_dimension(rng):
    x = rng.normal(size=(20, 2, 2, 1))
    np.testing.assert_allclose(Padim(diagonal=True).fit([x]).score(x), Padim().fit([x]).score(x), rtol=1e-6)


def test_channel_subset_is_fixed_by_the_seed_and_stored(rng):
    x = rng.normal(size=(20, 2, 2, 12))
    a, b = (Padim(channels=5, seed=3).fit([x]) for _ in range(2))
    np.testing.assert_array_equal(a.indices_, b.indices_)
    assert len(set(a.indices_.tolist())) == 5
    with pytest.raises(InputError, match="channels = 13"):
        Padim(channels=13).fit([x])


def test_compact_with_all_directions_is_the_mahalanobis_distance(rng):
    """With d = D and no regularisation the projection is invertible, so the distance is PaDiM's."""
    x = correlated(rng, 200, (2, 2), 6).astype(np.float64)
    compact = PadimCompact(6, shrinkage=0.0, epsilon=0.0).fit([x])
    plain = Padim(epsilon=0.0).fit([x])
    np.testing.assert_allclose(compact.score(x[:9]), plain.score(x[:9]), rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_compact_is_close_to_float(rng, bits):
    data = correlated(rng, 400, (3, 3), 24)
    fitted = PadimCompact(12, bits=bits).fit([data[:300]])
    # defects along a random direction: the ranking, what the detector is for, must survive quantisation
    bad = np.clip(data[300:].astype(int) + np.rint(rng.normal(0, 8, 24)).astype(int), -127, 127).astype(np.int8)
    probe = np.concatenate([data[300:], bad])
    exact, integer = fitted.score(probe), np.sqrt(fitted.to_scorer().score(probe).astype(float)) / 16
    assert np.corrcoef(exact.ravel(), integer.ravel())[0, 1] > (0.99 if bits == 8 else 0.98)
    labels = np.repeat([0, 1], 100)
    drop = roc_auc_score(labels, exact.max((1, 2))) - roc_auc_score(labels, integer.max((1, 2)))
    assert drop < 0.02


def test_integer_scores_equal_python_integers(rng):
    """The scorer's steps written out with Python's unbounded integers, one cell at a time."""
    data = correlated(rng, 150, (2, 2), 10)
    scorer = PadimCompact(7).fit([data]).to_scorer()
    probe = np.concatenate([data[:3], np.full((1, 2, 2, 10), -127, np.int8), np.full((1, 2, 2, 10), 127, np.int8)])
    scores = scorer.score(probe)
    p = scorer.projection
    for n, h, w in np.ndindex(len(probe), 2, 2):
        x = [int(v) for v in probe[n, h, w]]
        y = []
        for k in range(7):
            acc = sum(xi * int(u) for xi, u in zip(x, p.weights[:, k])) + int(p.bias[k])
            shift = int(p.shifts[k])
            high = ((acc << max(shift, 0)) * int(p.multipliers[k]) + (1 << 30)) >> 31
            right = max(-shift, 0)
            remainder = high & ((1 << right) - 1)
            high = (high >> right) + (remainder > (((1 << right) - 1) >> 1) + (high < 0))
            y.append(max(-127, min(127, high)))
        t = [yi - int(m) for yi, m in zip(y, scorer.mean[h, w])]
        rows = [int(q) for q in scorer.factor[h, w]]
        total = 0
        for i in range(7):
            inner = sum(rows[i * (i - 1) // 2 + j] * t[j] for j in range(i))
            v = (t[i] << 8) + ((inner * int(scorer.s_table[scorer.s_code[h, w, i]]) + (1 << 7)) >> 8)
            r = (v * int(scorer.a_table[scorer.a_code[h, w, i]]) + (1 << 15)) >> 16
            total += max(-(2**20 - 1), min(2**20 - 1, r)) ** 2
        assert int(scores[n, h, w]) == min(total >> 8, 2**32 - 1)


@pytest.mark.parametrize("make", [
    lambda: Padim(diagonal=True), lambda: Padim(channels=6), lambda: Padim(bits=4), lambda: PadimCompact(5),
])  # fmt: skip
def test_sections_round_trip(rng, make):
    data = correlated(rng, 80, (2, 3), 9)
    scorer = make().fit([data]).to_scorer()
    again = TriangularScorer.from_sections(scorer.sections(), (2, 3), 9)
    np.testing.assert_array_equal(again.score(data), scorer.score(data))
    assert again.kind == scorer.kind


def test_from_sections_names_what_is_wrong(rng):
    sections = PadimCompact(5).fit([correlated(rng, 80, (2, 3), 9)]).to_scorer().sections()
    for tag in ("CFG ", "MEAN", "SCAL", "TABL", "CHOL", "PROJ", "BIAS"):
        with pytest.raises(InputError, match=f"section {tag}"):
            TriangularScorer.from_sections({k: v for k, v in sections.items() if k != tag}, (2, 3), 9)
    with pytest.raises(InputError, match="section MEAN"):
        TriangularScorer.from_sections(sections, (3, 3), 9)


def test_log_codes_cover_the_range_within_half_a_step():
    values = np.array([0.01, 0.5, 1.0, 80.0])
    codes, table = log_codes(values)
    step = np.log2(80.0 / 0.01) / 255
    np.testing.assert_allclose(np.log2(table[codes] / 65536), np.log2(values), atol=step / 2 + 1e-2)


def test_far_away_saturates_instead_of_wrapping():
    x = np.zeros((50, 1, 1, 64), np.int8)
    x[::2] = 1
    scorer = Padim(diagonal=True, steps=1e-3, epsilon=1e-12).fit([x]).to_scorer()
    near, far = scorer.score(np.zeros((1, 1, 1, 64), np.int8)), scorer.score(np.full((1, 1, 1, 64), 127, np.int8))
    assert far > near
    assert far[0, 0, 0] <= 2**32 - 1


def test_a_part_comes_off_exactly(rng):
    data = correlated(rng, 60, (2, 2), 5)
    whole, part, rest = collect([data]), collect([data[:20]]), collect([data[20:]])
    less = whole.without(part)
    assert less.count == 40
    np.testing.assert_array_equal(less.first, rest.first)
    np.testing.assert_array_equal(less.second, rest.second)
