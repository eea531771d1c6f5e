"""Replay memories: shares, clean items of the right task, uniform draws, exact sizes, and what a mixed batch is made of."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tinyvad.continual.replay import Replay, ReplayBuffer
from tinyvad.errors import InputError
from tinyvad.training.items import ArrayItems


def items_of(task: int, count: int) -> ArrayItems:
    """Item i of a task: a 2 x 2 x 1 map of the value 1000 task + i, and a target that is its negative."""
    maps = np.broadcast_to((1000 * task + np.arange(count, dtype=np.float32))[:, None, None, None], (count, 2, 2, 1))
    return ArrayItems([maps.copy(), -maps])


def numbers(buffer: ReplayBuffer, task: str) -> list[int]:
    """Values of a task's kept items."""
    (maps,) = buffer.decode(task)
    assert np.all(maps == maps[:, :1, :1])
    return maps[:, 0, 0, 0].astype(int).tolist()


def filled(max_size: int, counts: list[int], seed: int = 0) -> ReplayBuffer:
    buffer, rng = ReplayBuffer(max_size), np.random.default_rng(seed)
    for task, count in enumerate(counts):
        buffer.update(f"t{task}", items_of(task, count), rng)
    return buffer


@settings(max_examples=80, deadline=None)
@given(
    max_size=st.integers(1, 12),
    counts=st.lists(st.integers(1, 15), min_size=1, max_size=8),
    resizes=st.dictionaries(st.integers(0, 7), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_shares_and_clean_items(max_size, counts, resizes, seed):
    buffer, rng = ReplayBuffer(max_size), np.random.default_rng(seed)
    before: list[set[int]] = []
    for task, count in enumerate(counts):
        buffer.update(f"t{task}", items_of(task, count), rng)
        if task in resizes:
            buffer.resize(resizes[task], rng)
        sizes, share = buffer.sizes, buffer.max_size // (task + 1)
        assert sum(sizes) <= buffer.max_size
        kept = [numbers(buffer, f"t{number}") for number in range(task + 1)]
        for number, values in enumerate(kept):
            assert len(set(values)) == len(values) == sizes[number]
            assert set(values) <= set(range(1000 * number, 1000 * number + counts[number]))  # of the right task alone
            if number < task:
                assert set(values) <= before[number]  # nothing that was removed comes back
        before = [set(values) for values in kept]
        if share and not resizes:
            assert sizes == [min(share, known) for known in counts[: task + 1]]
        if not share:
            assert sizes[-1] == 1 and max(sizes) <= 1
            assert resizes or sum(sizes) == buffer.max_size


@pytest.mark.parametrize(("max_size", "expected"), [(7, [1] * 5), (10, [2] * 5), (3, None)])
def test_sizes_differ_by_at_most_one(max_size, expected):
    sizes = filled(max_size, [30] * 5).sizes
    assert max(sizes) - min(sizes) <= 1
    assert sizes == expected or (expected is None and sum(sizes) == 3 and sizes[-1] == 1)


def test_every_item_is_kept_with_the_same_probability():
    """One task of 20 items, 5 kept: the reservoir. Its survivors when a second task comes: random removal. 2000 seeds."""
    first, survivors = Counter(), Counter()
    for seed in range(2000):
        buffer, rng = ReplayBuffer(5), np.random.default_rng(seed)
        buffer.update("a", items_of(0, 20), rng)
        first.update(numbers(buffer, "a"))
        buffer.update("b", items_of(1, 20), rng)
        survivors.update(numbers(buffer, "a"))
    assert sum(first.values()) == 10_000 and sum(survivors.values()) == 4_000
    # draws of a seed are without replacement, which makes the counts more even than chi-square's own: too small can't fail
    for counts in (first, survivors):
        assert chisquare([counts[number] for number in range(20)]).pvalue > 1e-3


def test_resize_keeps_a_random_part():
    seen: Counter = Counter()
    for seed in range(1500):
        buffer, rng = filled(8, [8], seed), np.random.default_rng(seed)
        buffer.resize(2, rng)
        assert buffer.max_size == 2 and len(numbers(buffer, "t0")) == 2
        seen.update(numbers(buffer, "t0"))
    assert chisquare([seen[number] for number in range(8)]).pvalue > 1e-3


def test_a_larger_memory_is_filled_by_the_tasks_to_come():
    buffer, rng = filled(4, [9, 9]), np.random.default_rng(1)
    buffer.resize(30, rng)
    assert buffer.sizes == [2, 2]
    buffer.update("t2", items_of(2, 20), rng)
    assert buffer.sizes == [2, 2, 10]


def test_more_tasks_than_places_keep_random_ones():
    kept: Counter = Counter()
    for seed in range(900):
        sizes = filled(2, [3, 3, 3], seed).sizes
        assert sum(sizes) == 2 and sizes[2] == 1
        kept[sizes.index(1)] += 1
    assert chisquare([kept[0], kept[1]]).pvalue > 1e-3


def test_the_same_seed_gives_the_same_bytes():
    one, other, third = (filled(10, [20, 7, 30], seed).arrays() for seed in (5, 5, 6))
    assert list(one) == list(other)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert any(one[name].tobytes() != third[name].tobytes() for name in one)


def test_float32_maps_are_kept_bit_for_bit():
    maps = np.random.default_rng(1).normal(size=(6, 3, 4, 5)).astype(np.float32)
    maps[0, 0, 0, :4] = [-0.0, 1e-45, 3e38, 1 / 3]
    buffer = ReplayBuffer(6)
    buffer.update("a", ArrayItems([maps]), np.random.default_rng(0))
    assert buffer.decode("a")[0].tobytes() == maps.tobytes()


def test_overwriting_a_batch_in_place_changes_nothing():
    items = items_of(0, 4)
    buffer = ReplayBuffer(4)
    buffer.update("a", items, np.random.default_rng(0))
    for array in items.arrays:
        array[:] = -1
    assert numbers(buffer, "a") == [0, 1, 2, 3]
    buffer.decode("a")[0][:] = -1
    assert numbers(buffer, "a") == [0, 1, 2, 3]


@pytest.mark.parametrize("form", ["float32", "int8", "rotated-4", "pca-99", "pq"])
def test_several_maps_an_item(form):
    rng = np.random.default_rng(2)
    maps = [rng.normal(size=(12, side, side, channels)).astype(np.float32) for side, channels in ((6, 4), (3, 8))]
    target = np.zeros((12, 2), np.float32)
    buffer = ReplayBuffer(5, form, maps=2)
    buffer.update("a", ArrayItems([*maps, target]), rng)
    buffer.update("b", ArrayItems([*maps, target]), rng)
    decoded = buffer.decode("a")
    assert [array.shape for array in decoded] == [(2, 6, 6, 4), (2, 3, 3, 8)]
    # both maps are of the same items
    nearest = [np.square(whole[None] - found[:, None]).sum((2, 3, 4)).argmin(1) for whole, found in zip(maps, decoded)]
    assert np.array_equal(*nearest)


@pytest.mark.parametrize("form", ["float32", "int8", "int8-map", "int4", "rotated-4", "pca-95", "pca-int8", "pq"])
def test_a_stored_memory_goes_on_as_if_it_had_never_stopped(form):
    def learn(buffer: ReplayBuffer, task: int, rng: np.random.Generator) -> None:
        items = np.random.default_rng(task).normal(size=(9, 3, 3, 4)).astype(np.float32)
        buffer.update(f"line {task}/left", ArrayItems([items]), rng)

    whole, rng = ReplayBuffer(24, form), np.random.default_rng(0)
    for task in range(11):  # more than ten: numbers, not names, order them
        learn(whole, task, rng)
    file = io.BytesIO()
    np.savez(file, **whole.arrays())
    file.seek(0)
    restored, again = ReplayBuffer(24, form), np.random.default_rng()
    with np.load(file) as found:
        restored.restore({name: found[name] for name in reversed(found.files)})
    again.bit_generator.state = rng.bit_generator.state
    for buffer, generator in ((whole, rng), (restored, again)):
        learn(buffer, 11, generator)
    assert restored.tasks == whole.tasks == [f"line {task}/left" for task in range(12)]
    assert restored.sizes == whole.sizes == [2] * 12
    assert {name: array.tobytes() for name, array in restored.arrays().items()} == {
        name: array.tobytes() for name, array in whole.arrays().items()
    }


@pytest.mark.parametrize(("form", "count", "shape", "expected"), [
    ("image", 100, (256, 256, 3), 19_660_800),
    ("image", 40, (224, 224, 3), 6_021_120),
    ("float32", 100, (32, 32, 24), 9_830_400),
    ("int8-map", 100, (32, 32, 24), 2_457_600 + 800),
])  # fmt: skip
def test_published_bytes(form, count, shape, expected):
    """The thesis' 19.66, 9.83 and 2.46 MB, and the benchmark's 5.74 MiB."""
    values = np.zeros((count, *shape), np.uint8 if form == "image" else np.float32)
    buffer = ReplayBuffer(count, form)
    buffer.update("a", ArrayItems([values]), np.random.default_rng(0))
    assert buffer.nbytes() == expected == sum(len(array.tobytes()) for array in buffer.arrays().values())


def test_wrong_use_is_told():
    rng = np.random.default_rng(0)
    for make in (lambda: ReplayBuffer(0), lambda: ReplayBuffer(5, "int9"), lambda: filled(3, [2]).resize(0, rng)):
        with pytest.raises(InputError, match="replay memory"):
            make()
    buffer = filled(3, [2])
    with pytest.raises(InputError, match="already"):
        buffer.update("t0", items_of(0, 2), rng)
    with pytest.raises(InputError, match="no items"):
        buffer.update("t1", items_of(1, 0), rng)
    with pytest.raises(InputError, match="is float32, not int8"):
        ReplayBuffer(3, "int8").restore(buffer.arrays())
    with pytest.raises(InputError, match="2 items are restored, 1 fit"):
        ReplayBuffer(1).restore(buffer.arrays())
    with pytest.raises(InputError, match="no composition 'mix'"):
        Replay(items_of(0, 2), [], "mix")
    with pytest.raises(InputError, match="ratio"):
        Replay(items_of(0, 2), [], "replace", 1.5)


def composed(replay: Replay, indices: np.ndarray, rng: np.random.Generator) -> dict[int, list[int]]:
    """Drawn indices by the task of the items."""
    found: dict[int, list[int]] = {}
    for items, chosen in replay.compose(indices, rng):
        assert len(chosen)
        maps = items.take(chosen)[0][:, 0, 0, 0]
        task = int(maps[0]) // 1000
        assert task not in found and np.array_equal(maps, 1000 * task + chosen)
        found[task] = chosen.tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), max_size=4), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_concat_adds_as_many_old_items(sizes, batch, seed):
    old = [items_of(1 + task, size) for task, size in enumerate(sizes)]
    replay, rng = Replay(items_of(0, 30), old), np.random.default_rng(seed)
    indices = rng.permutation(30)[:batch]
    found = composed(replay, indices, rng)
    assert found.pop(0) == indices.tolist()  # the batch itself, in its order
    assert sum(map(len, found.values())) == (batch if sum(sizes) else 0)
    assert all(sizes[task - 1] for task in found)


def test_concat_draws_the_task_first_and_then_its_item():
    """Tasks of 2 and of 6 items come up equally often, and each of their items does."""
    replay, rng = Replay(items_of(0, 9), [items_of(1, 2), items_of(2, 6)]), np.random.default_rng(3)
    seen: Counter = Counter()
    for _ in range(1000):
        for task, chosen in composed(replay, np.arange(8), rng).items():
            seen.update((task, index) for index in chosen if task)
    counts = np.array([seen[task, index] for task, size in ((1, 2), (2, 6)) for index in range(size)])
    assert counts.sum() == 8000
    assert chisquare(counts, 8000 * np.array([1 / 4] * 2 + [1 / 12] * 6)).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), max_size=4), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_replace_keeps_the_size_of_the_batch(sizes, batch, seed):
    old = [items_of(1 + task, size) for task, size in enumerate(sizes)]
    replay, rng = Replay(items_of(0, 30), old, "replace"), np.random.default_rng(seed)
    indices = rng.permutation(30)[:batch]
    found = composed(replay, indices, rng)
    assert sum(map(len, found.values())) == batch
    tasks = [task for task, size in enumerate(sizes, 1) if size]
    present = found.pop(0, [])
    assert set(present) <= set(indices.tolist()) and len(set(present)) == len(present)
    assert len(present) == (batch - batch // 2 if tasks else batch)
    quotas = [len(found.get(task, [])) for task in tasks]
    assert not tasks or max(quotas) - min(quotas) <= 1
    for task, drawn in found.items():
        assert len(set(drawn)) == min(len(drawn), len(set(drawn))) and len(set(drawn)) >= min(len(drawn), sizes[task - 1])


def test_replace_draws_every_place_and_remainder_alike():
    replay, rng = Replay(items_of(0, 8), [items_of(task, 5) for task in (1, 2, 3)], "replace"), np.random.default_rng(4)
    kept, larger = Counter(), Counter()
    for _ in range(1500):
        found = composed(replay, np.arange(8), rng)
        kept.update(found[0])
        larger.update(task for task in (1, 2, 3) if len(found[task]) == 2)  # 4 places for 3 tasks: one has two
    assert sum(larger.values()) == 1500
    assert chisquare([kept[index] for index in range(8)]).pvalue > 1e-3
    assert chisquare([larger[task] for task in (1, 2, 3)]).pvalue > 1e-3


def test_without_old_items_the_batch_is_what_it_was():
    for composition in ("concat", "replace"):
        replay, rng = Replay(items_of(0, 9), [items_of(1, 0)], composition), np.random.default_rng(0)
        before = rng.bit_generator.state
        assert composed(replay, np.array([4, 2]), rng) == {0: [4, 2]}
        assert rng.bit_generator.state == before  # fine-tuning draws the same numbers
