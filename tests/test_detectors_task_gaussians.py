"""Sums of a task and the scorer made of them: against numpy.cov, the batch detectors, and merges in any split and order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from tinyvad.detectors.gaussian import GaussianStatistics, collect
from tinyvad.detectors.padim import Padim, PadimCompact
from tinyvad.detectors.routing import signatures
from tinyvad.detectors.task_gaussians import Space, TaskStatistics, collect_task, scorer_of, task_bytes
from tinyvad.detectors.tasks import join_tasks
from tinyvad.errors import InputError

GRID, DEPTH = (2, 3), 9
STEPS = np.random.default_rng(5).uniform(0.02, 0.08, DEPTH)


def product(seed: int, n: int, depth: int = DEPTH, grid: tuple[int, int] = GRID) -> np.ndarray:
    """(n, H, W, depth) int8 good images of a made-up product: cells with means and spreads of their own."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(depth, depth)) / np.sqrt(depth)
    mean = rng.normal(0, 12, (*grid, depth))
    spread = rng.uniform(5, 20, (*grid, 1))
    return np.clip(np.rint(rng.normal(size=(n, *grid, depth)) @ mix * spread + mean), -127, 127).astype(np.int8)


def spaces() -> dict[str, Space]:
    first = collect([product(0, 90)])
    return {
        "padim": Space.plain(STEPS), "padim-4-subset": Space.plain(STEPS, 4, channels=5, seed=2),
        "padim-lite": Space.plain(STEPS, 0), "padim-compact": Space.compact(first, 6, STEPS),
    }  # fmt: skip


SPACES = spaces()
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def same(a: TaskStatistics, b: TaskStatistics) -> None:
    first, second = a.arrays(), b.arrays()
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_array_equal(array, second[name])


def same_scorer(a, b) -> None:
    first, second = a.sections(), b.sections()
    assert list(first) == list(second)
    for tag, array in first.items():
        np.testing.assert_array_equal(array, second[tag])


@pytest.mark.parametrize("n", [1, 4, 80])
@pytest.mark.parametrize(("space", "detector"), [
    (SPACES["padim"], lambda: Padim(STEPS)), (SPACES["padim-lite"], lambda: Padim(STEPS, diagonal=True)),
    (SPACES["padim-4-subset"], lambda: Padim(STEPS, channels=5, bits=4, seed=2)),
])  # fmt: skip
def test_without_a_projection_a_task_is_what_the_batch_detector_fits(space, detector, n):
    images = product(1, n)
    same_scorer(scorer_of(space, collect_task(space, [images[:3], images[3:]])), detector().fit([images]).to_scorer())


@every_space
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_merge_of_any_split_and_order_is_the_joint_fit(space, data):
    n = 24
    images = product(2, n)
    order = data.draw(st.permutations(range(n)))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=6)))
    parts = [collect_task(space, [images[part]]) for part in np.split(np.array(order), cuts)]  # single images among them
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    backwards = parts[-1]
    for part in parts[-2::-1]:
        backwards = part.merge(backwards)
    joint = collect_task(space, [images])
    same(merged, joint)
    same(backwards, joint)
    same_scorer(scorer_of(space, merged), scorer_of(space, joint))


@every_space
def test_a_part_comes_off_and_no_images_change_nothing(space):
    images = product(3, 30)
    whole, part = collect_task(space, [images]), collect_task(space, [images[:11]])
    same(whole.without(part), collect_task(space, [images[11:]]))
    nothing = part.without(part)
    assert nothing.count == 0
    same(whole.merge(nothing), whole)
    same(nothing.merge(whole), whole)


@pytest.mark.parametrize("n", [8, 70])
def test_the_compact_scorer_is_the_stated_covariance(n):
    """C_p = (1 - l) S_p + l mean S + eps v N, written out with numpy.cov; every term is made large enough to show."""
    space = replace(Space.compact(collect([product(0, 90)]), 5, STEPS, bits=8), epsilon=0.4, shrinkage=0.3)
    images = product(4, n)
    scorer = scorer_of(space, collect_task(space, [images]))
    p = space.projection
    y = space.see(images).astype(float)
    own = np.array([[np.cov(y[:, h, w], rowvar=False) for w in range(3)] for h in range(2)])
    v = np.mean([np.var(images[:, h, w].astype(float) * STEPS, axis=0, ddof=1) for h, w in np.ndindex(2, 3)])
    assert collect_task(space, [images]).mean_variance(STEPS) == pytest.approx(v, rel=1e-12)
    noise = np.zeros((5, 5))
    for c in range(DEPTH):  # what a unit of real change of channel c does to y
        effect = p.weights[c] / STEPS[c] * p.multipliers * 2.0 ** (p.shifts - 31)
        noise += np.outer(effect, effect)
    probe = product(4, 5) // 2
    t = space.see(probe) - np.round(y.mean(0))
    for h, w in np.ndindex(2, 3):
        covariance = 0.7 * own[h, w] + 0.3 * own.mean((0, 1)) + 0.4 * v * noise
        expected = np.sqrt(np.einsum("ni,ij,nj->n", t[:, h, w], np.linalg.inv(covariance), t[:, h, w]))
        found = np.sqrt(scorer.score(probe)[:, h, w].astype(float)) / 16
        np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("epsilon", [0.02, 1.0])
def test_the_first_product_scores_as_compact_padim_does(epsilon):
    """Only rounding differs: y is an integer before its covariance is taken, not after."""
    images, probe = product(0, 90), product(0, 140)[90:]
    batch = PadimCompact(6, STEPS, bits=8, epsilon=epsilon).fit([images])
    scorer = batch.to_scorer()
    again = scorer_of(Space.of(scorer, STEPS, epsilon=epsilon), collect_task(Space.of(scorer, STEPS), [images]))
    expected, found = (np.sqrt(s.score(probe).astype(float)) / 16 for s in (scorer, again))
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=0.02)


def test_white_noise_means_the_same_whatever_the_units():
    """The embedding in other units, the same real values: the same distances, so the noise is counted in real units."""
    images, probe = product(6, 60) // 2, product(6, 70)[60:] // 2
    maps = []
    for factor in (1, 2):
        first = collect([product(0, 90) // 2 * factor])
        space = replace(Space.compact(first, 6, STEPS / factor, bits=8), epsilon=0.5)
        maps.append(np.sqrt(scorer_of(space, collect_task(space, [images * factor])).score(probe * factor)) / 16)
    np.testing.assert_allclose(maps[0], maps[1], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("n", [1, 3])
def test_few_or_equal_images_still_give_a_scorer(n):
    space = SPACES["padim-compact"]
    images = np.repeat(product(7, 1), n, axis=0)
    scorer = scorer_of(space, collect_task(space, [images]))
    assert (scorer.score(images) == 0).all()
    other = product(8, 2)
    assert (scorer.score(other).max((1, 2)) > 0).all()


@every_space
def test_arrays_are_compact_and_come_back(space):
    statistics = collect_task(space, [product(9, 40)])
    arrays, d = statistics.arrays(), space.dimensions
    same(TaskStatistics.from_arrays(space, arrays), statistics)
    assert {array.dtype.name for array in arrays.values()} <= {"int32", "int64"}
    assert arrays["second"].dtype == np.int32
    assert arrays["second"].shape[2] == (d if space.bits == 0 else d * (d + 1) // 2)
    many = replace(statistics, y=GaussianStatistics(40, statistics.y.first, statistics.y.second + 2.0**40))
    assert many.arrays()["second"].dtype == np.int64
    same(TaskStatistics.from_arrays(space, many.arrays()), many)


@every_space
def test_a_damaged_state_is_named(space):
    arrays = collect_task(space, [product(9, 4)]).arrays()
    for name in arrays:
        with pytest.raises(InputError, match=f"state, {name}: missing"):
            TaskStatistics.from_arrays(space, {k: v for k, v in arrays.items() if k != name})
        with pytest.raises(InputError, match=f"state, {name}:"):
            TaskStatistics.from_arrays(space, {**arrays, name: arrays[name].astype(np.float64)})
        with pytest.raises(InputError, match="learning state"):
            TaskStatistics.from_arrays(space, {**arrays, name: arrays[name][..., None]})


@every_space
def test_task_bytes_are_those_of_a_joined_bank(space):
    scorers = [scorer_of(space, collect_task(space, [product(seed, 30)])) for seed in (10, 11, 12)]
    own, shared = task_bytes(space, GRID)
    for count in (1, 3):
        bank = join_tasks(scorers[:count], [30] * count, np.zeros((count, 4), np.int32))
        learnt = {tag: array for tag, array in bank.items() if tag not in ("TASK", "PROT")}
        assert sum(array.nbytes for array in learnt.values()) == count * own + shared
    alone = join_tasks(scorers[:1], [30], np.zeros((1, 4), np.int32))
    for tag, array in scorers[0].sections().items():
        np.testing.assert_array_equal(alone[tag], array)


@every_space
def test_the_space_of_a_scorer_is_the_space_it_was_made_in(space):
    statistics = collect_task(space, [product(13, 30)])
    again = Space.of(scorer_of(space, statistics), STEPS)
    assert (again.bits, again.dimensions, again.epsilon) == (space.bits, space.dimensions, space.epsilon)
    same(collect_task(again, [product(13, 30)]), statistics)
    same_scorer(scorer_of(again, statistics), scorer_of(space, statistics))


def test_the_total_holds_the_signatures():
    images = product(14, 20)
    for space in SPACES.values():
        np.testing.assert_array_equal(collect_task(space, [images]).total[-4:], signatures(images, 4).sum(0))


def test_headroom_keeps_the_means_of_later_products_from_saturating():
    first, later = product(0, 90), np.clip(product(15, 50).astype(int) * 3, -127, 127).astype(np.int8)
    cut = []
    for headroom in (1.0, 4.0):
        space = Space.compact(collect([first]), 6, STEPS, headroom=headroom)
        assert np.abs(space.see(first).mean(0)).max() < 127 / headroom
        cut.append((np.abs(space.see(later)) == 127).mean())
    assert cut[1] < cut[0]


def test_threads_do_not_change_a_bit():
    images = product(16, 60, depth=96, grid=(4, 4))
    steps = np.full(96, 0.05)
    made = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            space = Space.compact(collect([images]), 64, steps)
            made.append(scorer_of(space, collect_task(space, [images[:40]])))
    same_scorer(*made)


def test_what_can_not_be_learnt_is_refused():
    space = SPACES["padim-compact"]
    with pytest.raises(InputError, match="float32"):
        collect_task(space, [product(0, 2).astype(np.float32)])
    with pytest.raises(InputError, match="depth 5, expected int8 of depth 9"):
        collect_task(space, [product(0, 2)[..., :5]])
    with pytest.raises(InputError, match="at least one"):
        collect_task(space, [])
    scorer = scorer_of(space, collect_task(space, [product(0, 30)]))
    for weights in (np.zeros((DEPTH, 6), np.int8), np.ones((DEPTH, 6), np.int8)):
        with pytest.raises(InputError, match="PROJ: its directions depend"):
            Space.of(replace(scorer, projection=replace(scorer.projection, weights=weights)), STEPS)
    with pytest.raises(InputError, match="can't learn"):
        Space.of(replace(scorer, bits=0, s_code=None, s_table=None, factor=None), STEPS)


def test_float_sums_merge_to_numpy_cov_with_a_positive_between_task_term(rng):
    tasks = [rng.normal(5 * i, 1 + i, (n, 2, 2, 4)) for i, n in enumerate((1, 7, 30))]
    parts = [collect([task]) for task in tasks]
    merged = parts[0].merge(parts[1].merge(parts[2]))
    other = parts[2].merge(parts[0]).merge(parts[1])
    everything = np.concatenate(tasks)
    for h, w in np.ndindex(2, 2):
        expected = np.cov(everything[:, h, w], rowvar=False)
        for found in (merged, other):
            np.testing.assert_allclose(found.covariance()[h, w], expected, rtol=1e-6)
        within = sum(np.cov(task[:, h, w], rowvar=False) * (len(task) - 1) for task in tasks[1:])
        between = merged.covariance()[h, w] * (len(everything) - 1) - within
        assert np.linalg.eigvalsh(between).min() > -1e-8 * np.trace(between)
        assert np.trace(between) > 0
    lite = collect([tasks[0]], diagonal=True)
    for task in tasks[1:]:
        lite = lite.merge(collect([task], diagonal=True))
    np.testing.assert_allclose(lite.covariance(), merged.covariance().diagonal(axis1=-2, axis2=-1), rtol=1e-10)
