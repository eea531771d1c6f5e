"""Online PatchCore: k-center invariants on adversarial streams, the rules of a full bank, gate, tasks, memory, state."""

from __future__ import annotations

import io
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvad.continual.base import Context
from tinyvad.continual.growing_bank import (
    GrowingBank,
    nearest_earlier_reference,
    nearest_reference,
    separated_reference,
)
from tinyvad.continual.online import GATE_AFTER, GATE_WINDOW, QUARANTINE, OnlinePatchCore
from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.online import online_update
from tinyvad.detectors.product_quantizer import fit_quantizer
from tinyvad.errors import CheckFailed, InputError
from tinyvad.kernels import growing

CONTEXT = Context(np.full(12, 0.5), 4, tasks=3)


def images(n: int, seed: int = 0, centre: float = 0.0, spread: float = 12.0, dtype: type = np.int8) -> np.ndarray:
    """(n, 3, 4, 12) embeddings."""
    x = np.random.default_rng(seed).normal(size=(n, 3, 4, 12)) * spread + centre
    return np.clip(np.rint(x), -127, 127).astype(np.int8) if dtype == np.int8 else x.astype(dtype)


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, D), (K, D) -> (n, K) by direct differences, int64 for int8."""
    wide = np.int64 if a.dtype == np.int8 else np.float64
    difference = a.astype(wide)[:, None] - b.astype(wide)[None]
    return (difference * difference).sum(-1)


def closest_pair(rows: np.ndarray) -> float:
    return squared(rows, rows)[np.triu_indices(len(rows), 1)].astype(np.float64).min(initial=np.inf)


def best_radius(points: np.ndarray, count: int) -> float:
    """Squared radius of the best ``count`` of the points as centres, by trying all."""
    distances = squared(points, points)
    return min(distances[list(chosen)].min(0).max() for chosen in itertools.combinations(range(len(points)), count))


# kernels against their readable twins


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_kernels_equal_their_references(dtype):
    rng = np.random.default_rng(0)
    rows, queries = (np.zeros((n, 16), dtype) for n in (40, 11))
    rows[:, :12], queries[:, :12] = (images(n, n, dtype=dtype).reshape(-1, 12)[:k] for n, k in ((5, 40), (2, 11)))
    rows[30] = rows[3]
    wide = np.int32 if dtype == np.int8 else np.float32
    distance = np.full(11, 2**31 - 1 if dtype == np.int8 else np.inf, wide)
    growing.nearest(rows.ravel(), 16, 40, queries.ravel(), distance)
    np.testing.assert_array_equal(distance, nearest_reference(rows, queries))
    typical = float(np.median(squared(rows, rows)))
    for limit in (0, typical * 0.5, typical, typical * 1.3):
        expected = separated_reference(rows, limit)
        np.testing.assert_array_equal(growing.separated(rows.ravel(), 16, 40, limit), expected)
    assert 1 < expected.sum() < 30
    distance, partner = np.zeros(40, wide), np.full(40, -1)
    for i in rng.permutation(np.arange(1, 40)):
        growing.nearest_earlier(rows.ravel(), 16, i, distance, partner)
        assert (distance[i], partner[i]) == nearest_earlier_reference(rows, i)


# without a capacity


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("tau", [0.0, 10.0, 30.0])
def test_everything_seen_is_within_tau_and_rows_are_further_apart(dtype, tau):
    method = OnlinePatchCore(CONTEXT, None, tau=tau)
    stream = images(30, dtype=dtype)
    method.learn("a", np.split(stream, [7]))
    rows = method.state()["bank_0"]
    limit = (tau / 0.5) ** 2
    assert squared(stream.reshape(-1, 12), rows).min(1).max() <= limit * (1 + 1e-6)
    assert closest_pair(rows) > limit * (1 - 1e-6)
    assert method.growth[-1][1] == len(rows)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("when_full", ["freeze", "doubling", "merge"])
@pytest.mark.parametrize("capacity", [None, 20])
def test_the_same_image_twice_adds_nothing(dtype, when_full, capacity):
    method = OnlinePatchCore(CONTEXT, capacity, when_full, tau=2.0)
    for image in images(12, dtype=dtype):
        method.learn_image("a", image)
        before = method.state()["bank_0"]
        assert method.learn_image("a", image) == 0
        np.testing.assert_array_equal(method.state()["bank_0"], before)


def test_repeated_images_and_patches_make_no_difference():
    stream = images(10, spread=3)
    once, often = OnlinePatchCore(CONTEXT, None, tau=3.0), OnlinePatchCore(CONTEXT, None, tau=3.0)
    once.learn("a", [stream])
    often.learn("a", [stream[[0, 1, 0, 1, 2, 2, 3, 4, 3, 5, 6, 7, 8, 9, 0, 9]]])
    doubled = OnlinePatchCore(CONTEXT, None, tau=3.0)
    doubled.learn("a", [np.concatenate([stream, stream], axis=1)])
    for other in (often, doubled):
        np.testing.assert_array_equal(once.state()["bank_0"], other.state()["bank_0"])


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("tau", [0.0, 8.0, 20.0, 500.0])
def test_one_image_is_the_greedy_order_cut_at_tau(dtype, tau):
    image = images(1, dtype=dtype)[0]
    method = OnlinePatchCore(CONTEXT, None, tau=tau)
    method.learn_image("a", image)
    greedy = farthest_first(image.reshape(-1, 12), 12, start=0)
    first = int((greedy.radii > (tau / 0.5) ** 2).argmin()) + 1  # all radii from there on are within tau
    np.testing.assert_array_equal(method.state()["bank_0"], image.reshape(-1, 12)[greedy.order[:first]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 3000), st.integers(1, 40))
def test_freezing_is_what_a_device_does(seed, limit, tau2, capacity):
    bank = GrowingBank(12, np.dtype(np.int8), capacity, "freeze", tau2)
    rows = np.empty((0, 12), np.int8)
    for image in images(6, seed).reshape(6, 12, 12):
        expected = online_update(rows, image, limit, tau2, capacity)
        assert bank.add(image, limit) == (len(expected.added), expected.novelty)
        rows = np.concatenate([rows, image[expected.added]])
        np.testing.assert_array_equal(bank.rows, rows)


def test_a_limit_of_rows_an_image():
    method = OnlinePatchCore(CONTEXT, None, per_image=2)
    stream = images(9)
    assert [method.learn_image("a", image) for image in stream] == [2] * 9
    assert method.growth == [(i + 1, 2 * (i + 1)) for i in range(9)]
    # the two are the first of the greedy order over bank and image, not the two farthest from the bank
    rows = method.state()["bank_0"]
    first = stream[0].reshape(-1, 12)
    np.testing.assert_array_equal(rows[:2], first[farthest_first(first, 2, start=0).order])


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_automatic_tau_is_the_radius_of_the_first_image(dtype):
    stream = images(3, dtype=dtype)
    method = OnlinePatchCore(CONTEXT, None, tau="auto", auto_points=5)
    method.learn("a", [stream])
    greedy = farthest_first(stream[0].reshape(-1, 12), 5, start=0)
    assert method.state()["tau2_0"] == greedy.radii[-1]
    np.testing.assert_array_equal(method.state()["bank_0"][:5], stream[0].reshape(-1, 12)[greedy.order])
    assert squared(stream[0].reshape(-1, 12), method.state()["bank_0"][:5]).min(1).max() == pytest.approx(greedy.radii[-1])


# doubling


def streams() -> st.SearchStrategy[np.ndarray]:
    """(n, 3) int8 points: spreading out from one place, clusters, repeats, anything."""
    anything = st.lists(st.tuples(*[st.integers(-127, 127)] * 3), min_size=1, max_size=11)
    line = st.lists(st.integers(0, 254), min_size=1, max_size=11).map(lambda xs: [(x - 127, 0, 0) for x in xs])
    growing_gaps = st.integers(1, 3).map(lambda base: [(min(base * 2**i, 254) - 127, 0, 0) for i in range(9)])
    centres = st.lists(st.tuples(*[st.integers(-100, 100)] * 3), min_size=1, max_size=3)
    near = st.tuples(st.integers(0, 2), st.integers(-2, 2))
    clusters = st.tuples(centres, st.lists(near, min_size=1, max_size=11)).map(
        lambda drawn: [tuple(c + d for c in drawn[0][i % len(drawn[0])]) for i, d in drawn[1]]
    )
    repeats = st.lists(st.sampled_from([(0, 0, 0), (1, 0, 0), (0, 5, 0), (90, 0, 0)]), min_size=1, max_size=11)
    kinds = st.one_of(anything, line, growing_gaps, growing_gaps.map(lambda points: points[::-1]), clusters, repeats)
    return kinds.map(lambda points: np.array(points, np.int8))


class Recording(GrowingBank):
    """Remembers every tau squared that it had."""

    def __setattr__(self, name, value):
        if name == "tau2":
            self.taus = [*getattr(self, "taus", []), value]
        super().__setattr__(name, value)


@settings(max_examples=250, deadline=None)
@given(streams(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 0, 3, 50]), st.booleans())
def test_doubling_keeps_its_promises_after_every_image(points, capacity, per_image, start, floating):
    points = points.astype(np.float32) if floating else points
    bank = Recording(3, points.dtype, capacity, "doubling", start)
    for stop in range(per_image, len(points) + per_image, per_image):
        bank.add(points[stop - per_image : stop])
        seen = points[:stop]
        assert 1 <= bank.count <= capacity
        assert closest_pair(bank.rows) > bank.tau2
        covered = squared(seen, bank.rows).min(1).max()
        assert covered <= 4 * bank.tau2
        best = best_radius(seen, min(capacity, len(seen)))
        for before, after in itertools.pairwise(bank.taus):  # every overflow there was
            if before == 0:
                assert after in squared(seen, seen) and 4 * best >= after
            else:
                assert after == 4 * before and 4 * best > before  # squares of: optimum > tau_before / 2
        if len(bank.taus) > 1:
            assert covered <= 64 * best


def test_doubling_starts_at_the_closest_pair_of_the_first_rows_beyond_capacity():
    points = np.array([[0, 0], [10, 0], [0, 30], [0, 0], [4, 0], [60, 60]], np.int8)
    bank = GrowingBank(2, np.dtype(np.int8), 3, "doubling")
    for point in points[:4]:
        bank.add(point[None])
    assert bank.tau2 == 0 and bank.count == 3
    bank.add(points[4:5])
    assert bank.tau2 == 16  # (0, 0) and (4, 0)
    np.testing.assert_array_equal(bank.rows, points[:3])
    bank.add(points[5:])
    assert bank.tau2 == 256  # 64 keeps all four, so doubled again: (10, 0) falls to (0, 0)
    np.testing.assert_array_equal(bank.rows, points[[0, 2, 5]])


def test_doubling_of_one_row_ends():
    bank = GrowingBank(1, np.dtype(np.int8), 1, "doubling")
    for value in range(-127, 128):
        bank.add(np.array([[value]], np.int8))
    assert bank.count == 1 and 4 * bank.tau2 >= 254**2


# freeze and merge


def test_a_frozen_bank_stays():
    method = OnlinePatchCore(CONTEXT, 20, "freeze")
    method.learn("a", [images(2)])
    before = method.state()["bank_0"]
    assert len(before) == 20
    method.learn("a", [images(5, seed=9, centre=50)])
    np.testing.assert_array_equal(method.state()["bank_0"], before)


@settings(max_examples=150, deadline=None)
@given(streams(), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_merging_drops_the_later_of_the_closest_pair(points, capacity, per_image, floating):
    points = points.astype(np.float32) if floating else points
    bank = GrowingBank(3, points.dtype, capacity, "merge")
    rows: list[np.ndarray] = []
    for start in range(0, len(points), per_image):
        patches = points[start : start + per_image]
        while True:  # the rule as it is written down, everything computed anew
            distance = squared(patches, np.array(rows)).min(1) if rows else np.full(len(patches), np.inf)
            farthest = int(distance.argmax())
            if distance[farthest] == 0:
                break
            rows.append(patches[farthest])
            if len(rows) <= capacity:
                continue
            pairs = squared(np.array(rows), np.array(rows))
            gap, later = min((pairs[i, j], -j) for j in range(len(rows)) for i in range(j))
            rows.pop(-later)
            if -later == capacity:
                break  # the new one itself
        gap = closest_pair(bank.rows) if bank.count == capacity else 0
        bank.add(patches)
        np.testing.assert_array_equal(bank.rows, np.array(rows))
        if gap and bank.count == capacity > 1:
            assert closest_pair(bank.rows) >= gap  # never moves together


# tasks, gate, quantised banks


@pytest.mark.parametrize("when_full", ["freeze", "doubling", "merge"])
def test_a_bank_a_task_within_the_whole_capacity(when_full):
    method = OnlinePatchCore(CONTEXT, 60, when_full, per_task=True)
    for number in range(3):
        method.learn(str(number), [images(15, number, 40 * number - 40)])
        state = method.state()
        sizes = [len(state[f"bank_{i}"]) for i in range(number + 1)]
        assert max(sizes) <= 60 // (number + 1)
        if when_full != "doubling":
            assert sizes == [60 // (number + 1)] * (number + 1)
    for number in range(3):
        own = {row.tobytes() for row in images(15, number, 40 * number - 40).reshape(-1, 12)}
        assert all(row.tobytes() in own for row in state[f"bank_{number}"])
        probe = images(5, 7 + number, 40 * number - 40)
        scored = method.score(probe)
        assert (scored.tasks == number).all()
        expected = 0.5 * np.sqrt(squared(probe.reshape(-1, 12), state[f"bank_{number}"]).min(1)).reshape(5, 3, 4)
        np.testing.assert_allclose(scored.maps, expected, rtol=1e-12)
        np.testing.assert_array_equal(scored.maps, method.score(probe, task=number).maps)
    with pytest.raises(CheckFailed, match="no room for"):
        tight = OnlinePatchCore(CONTEXT, 1, when_full, per_task=True)
        tight.learn("a", [images(1)])
        tight.learn("b", [images(1)])


def test_a_shared_bank_needs_no_labels():
    named, other = OnlinePatchCore(CONTEXT, 50), OnlinePatchCore(CONTEXT, 50)
    for i, image in enumerate(images(20)):
        named.learn_image(f"task {i % 3}", image)
        other.learn_image("one", image)
    np.testing.assert_array_equal(named.state()["bank_0"], other.state()["bank_0"])
    assert named.task_names == ["task 0", "task 1", "task 2"]
    scored = named.score(images(4, 5))
    assert (scored.tasks == -1).all() and scored.maps.shape == (4, 3, 4)


@pytest.mark.parametrize("per_task", [False, True])
def test_the_gate_keeps_anomalous_images_out(per_task):
    good, bad = images(40, spread=4), images(8, 5, spread=4)
    bad[:, 1, 1] = 100
    method = OnlinePatchCore(CONTEXT, 100, gate="quarantine", per_task=per_task)
    method.learn("a", [good[:20], bad[:1], good[20:30], bad[1:], good[30:]])
    assert method.held_back == [20, *range(31, 38)]
    assert [number for number, _, _ in method.quarantine] == method.held_back
    assert method.score(bad).maps.max((1, 2)).min() > 4 * method.score(good).maps.max()
    before = method.nbytes()
    assert method.release(20) > 0
    assert before - method.nbytes() == bad[0].nbytes  # the bank was full already
    assert method.score(bad[:1]).maps[0, 1, 1] == 0
    with pytest.raises(InputError, match="image 20 is not in quarantine"):
        method.release(20)
    skipping = OnlinePatchCore(CONTEXT, 100, gate="skip", per_task=per_task)
    skipping.learn("a", [good[:20], bad, good[20:]])
    assert skipping.held_back == list(range(20, 28)) and not skipping.quarantine
    clean = OnlinePatchCore(CONTEXT, 100, per_task=per_task)
    clean.learn("a", [good])
    np.testing.assert_array_equal(skipping.state()["bank_0"], clean.state()["bank_0"])


def test_a_product_that_has_changed_opens_the_gate():
    good, other = images(30, spread=4), images(30, 5, centre=60, spread=4)
    method = OnlinePatchCore(CONTEXT, 100, gate="quarantine")
    method.learn("a", [good, other])
    assert method.held_back == list(range(30, 30 + len(method.held_back)))
    assert len(method.quarantine) == QUARANTINE <= len(method.held_back) <= GATE_WINDOW // 2 + 1
    assert method.score(other).maps.max() < method.score(images(1, 9, centre=60, spread=40)).maps.max()
    assert method.arrived == 60


def test_the_gate_is_open_until_it_has_a_limit():
    method = OnlinePatchCore(CONTEXT, None, gate="skip")
    stream = images(GATE_AFTER + 1, spread=4)
    stream[GATE_AFTER // 2 :, 0, 0] = np.arange(40, 40 + 10 * (GATE_AFTER + 1 - GATE_AFTER // 2), 10)[:, None]
    method.learn("a", [stream])
    assert not method.held_back


def test_a_quantised_bank_is_the_bank_of_the_decoded_patches():
    stream, probe = images(25), images(4, 8)
    quantizer = fit_quantizer(images(20, 3).reshape(-1, 12), 6, 8, np.random.default_rng(0))
    decoded = quantizer.decode(quantizer.encode(stream.reshape(-1, 12))).reshape(stream.shape)
    for when_full in ("freeze", "doubling", "merge"):
        coded = OnlinePatchCore(CONTEXT, 60, when_full, quantizer=quantizer)
        plain = OnlinePatchCore(CONTEXT, 60, when_full)
        coded.learn("a", [stream])
        plain.learn("a", [decoded])
        rows = quantizer.decode(coded.state()["bank_0"])
        np.testing.assert_array_equal(rows, plain.state()["bank_0"])
        np.testing.assert_array_equal(coded.score(probe).maps, plain.score(probe).maps)
        extra = (12 if when_full == "merge" else 0) * len(rows) + 8
        assert coded.nbytes() == 6 * len(rows) + quantizer.codebooks.nbytes + 24 + extra
        assert plain.nbytes() == 12 * len(rows) + extra


@pytest.mark.parametrize("when_full", ["freeze", "doubling", "merge"])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("per_task", [False, True])
def test_learning_on_from_a_saved_state_is_never_having_stopped(when_full, coded, per_task):
    quantizer = fit_quantizer(images(20, 3).reshape(-1, 12), 6, 4, np.random.default_rng(0)) if coded else None

    def make():
        return OnlinePatchCore(CONTEXT, 60, when_full, "auto", gate="quarantine", quantizer=quantizer, per_task=per_task)

    whole, stopped, resumed = make(), make(), make()
    tasks = [images(15, number, 30 * number) for number in range(6)]
    tasks[2][13, 1] = -100  # held back
    for number in range(5):
        whole.learn(str(number), [tasks[number]])
        stopped.learn(str(number), [tasks[number]])
    file = io.BytesIO()
    np.savez(file, **stopped.state())
    file.seek(0)
    with np.load(file) as saved:
        resumed.restore(dict(saved))
    for method in (whole, resumed):
        method.learn("5", [tasks[5]])
        method.learn("1", [tasks[1] + 3])
    a, b = whole.state(), resumed.state()
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)
    assert whole.nbytes() == resumed.nbytes() and (len(whole.quarantine) > 0 or not per_task)


@pytest.mark.parametrize("when_full", ["freeze", "doubling", "merge"])
def test_memory_does_not_grow_with_the_images(when_full):
    method = OnlinePatchCore(Context(np.ones(16), 4), 64, when_full)
    rng = np.random.default_rng(0)

    def peak(count: int) -> int:
        tracemalloc.reset_peak()
        for _ in range(count):
            method.learn_image("a", rng.integers(-50, 50, (2, 3, 16), np.int8))
        return tracemalloc.get_traced_memory()[1]

    method.learn("a", [rng.integers(-50, 50, (100, 2, 3, 16), np.int8)])  # compiles the kernels
    tracemalloc.start()
    try:
        first, later = peak(900), peak(9_000)
    finally:
        tracemalloc.stop()
    assert method.arrived == 10_000
    assert later <= first + 4_000  # less than half a byte an image


def test_wrong_use():
    with pytest.raises(InputError, match="'drop', tau 0; use"):
        OnlinePatchCore(CONTEXT, when_full="drop").learn("a", [images(1)])
    with pytest.raises(CheckFailed, match="0 rows"):
        OnlinePatchCore(CONTEXT, 0).learn("a", [images(1)])
    for wrong in ({"gate": "open"}, {"tau": "best"}, {"tau": -1.0}, {"per_image": 0}, {"auto_points": 0}):
        with pytest.raises(InputError, match="see OnlinePatchCore"):
            OnlinePatchCore(CONTEXT, **wrong)
    method = OnlinePatchCore(CONTEXT)
    with pytest.raises(InputError, match="nothing learnt"):
        method.score(images(1))
    with pytest.raises(InputError, match=r"give \(H, W, D\)"):
        method.learn_image("a", images(1))
    method.learn("a", [images(1)])
    with pytest.raises(InputError, match="the bank needs int8"):
        method.learn("a", [images(1, dtype=np.float32)])
    floating = OnlinePatchCore(CONTEXT)
    broken = images(1, dtype=np.float32)
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        floating.learn("a", [broken])
    assert not floating.task_names and not floating.state().keys() & {"bank_0"}
