"""PatchCore over tasks: cuts, selection anew, routing, budgets, codebooks, bounds, state."""

from __future__ import annotations

import io

import numpy as np
import pytest

from tinyvad.continual.base import Context
from tinyvad.continual.patchcore import (
    Budget,
    Codes,
    PatchCoreCL,
    PatchCoreFineTune,
    PatchCoreJoint,
    PatchCorePlus,
    PatchCoreSeparate,
)
from tinyvad.detectors.patchcore import PatchCore, PatchCoreLite
from tinyvad.errors import CheckFailed, InputError

CONTEXT = Context(np.full(12, 0.25), 4, tasks=4)
KINDS = {
    "plus": PatchCorePlus,
    "cl": PatchCoreCL,
    "separate": PatchCoreSeparate,
    "fine-tuning": PatchCoreFineTune,
    "joint": PatchCoreJoint,
}


def task(number: int, n: int = 12, dtype: type = np.int8, seed: int = 0) -> np.ndarray:
    """(n, 3, 4, 12) embeddings of a task, far from those of the other five."""
    rng = np.random.default_rng([number, seed])
    centre = np.random.default_rng(1).normal(size=(6, 12))[number] * 30
    x = rng.normal(size=(n, 3, 4, 12)) * 10 + centre
    return np.clip(np.rint(x), -127, 127).astype(np.int8) if dtype == np.int8 else x.astype(dtype)


def taught(method, tasks: int = 4, dtype: type = np.int8):
    for number in range(tasks):
        method.learn(f"product {number}", np.split(task(number, dtype=dtype), [5]))
    return method


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_selection_anew_from_a_fixed_start_is_the_cut(dtype):
    plus = taught(PatchCorePlus(CONTEXT, Budget(rows=120)), dtype=dtype)
    again = taught(PatchCoreCL(CONTEXT, Budget(rows=120)), dtype=dtype)
    for cut, chosen in zip(plus.memories, again.memories, strict=True):
        np.testing.assert_array_equal(cut.rows, chosen.rows)


def test_quantised_selection_anew_is_the_cut_for_tasks_selected_among_decoded_vectors():
    codes = Codes(4, 4, "first")
    plus = taught(PatchCorePlus(CONTEXT, Budget(rows=120), codes))
    again = taught(PatchCoreCL(CONTEXT, Budget(rows=120), codes))
    for cut, chosen in zip(plus.memories[1:], again.memories[1:], strict=True):
        np.testing.assert_array_equal(cut.codes, chosen.codes)


def test_selection_anew_from_another_start_is_not_the_cut():
    plus = taught(PatchCorePlus(CONTEXT, Budget(rows=120)))
    drawn = taught(PatchCoreCL(CONTEXT, Budget(rows=120), start="random"))
    assert any((a.rows != b.rows).any() for a, b in zip(plus.memories[:3], drawn.memories[:3], strict=True))
    repeated = taught(PatchCoreCL(CONTEXT, Budget(rows=120), start="random"))
    assert same(drawn.state(), repeated.state())


@pytest.mark.parametrize("codes", [None, Codes(4, 4, "first"), Codes(4, 4, "seen"), Codes(4, 4, "own")])
@pytest.mark.parametrize("kind", [PatchCorePlus, PatchCoreCL])
def test_banks_stay_in_the_budget_and_hold_their_tasks_patches(kind, codes):
    method = kind(CONTEXT, Budget(rows=100), codes)
    for number in range(4):
        method.learn(f"product {number}", [task(number)])
        sizes = [len(memory.rows) for memory in method.memories]
        assert max(sizes) <= 100 // (number + 1)
        if codes is None or codes.codebooks != "first":  # with the first task's codes, others' patches may share all codes
            assert sizes == [100 // (number + 1)] * (number + 1)
        if codes is None:
            for i, memory in enumerate(method.memories):
                patches = {row.tobytes() for row in task(i).reshape(-1, 12)}
                assert all(row.tobytes() in patches for row in memory.rows)


@pytest.mark.parametrize("number_format", ["plain", "first", "seen", "own"])
@pytest.mark.parametrize("name", ["plus", "cl", "separate"])
def test_a_budget_of_bytes_holds_to_the_byte(name, number_format):
    codes = None if number_format == "plain" else Codes(6, 4, number_format)
    budget = 3000
    method = KINDS[name](CONTEXT, Budget(nbytes=budget), codes)
    row = 12 if codes is None else 3
    books = 0 if codes is None else 16 * 12 + 2 * 12
    for number in range(4):
        method.learn(f"product {number}", [task(number, 40)])
        assert method.nbytes() <= budget
    one = 8 + (8 * 4 if method.route == "prototype" else 0)
    shared = books * (4 if number_format == "own" else 1)
    assert method.nbytes() == sum(len(m.rows) for m in method.memories) * row + shared + 4 * one
    if number_format != "first":  # with the first task's codes, others' patches may share all codes
        assert budget - method.nbytes() < 4 * row


@pytest.mark.parametrize("route", ["prototype", "score", "mean_nn"])
@pytest.mark.parametrize("codes", [None, Codes(6, 8)])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_images_find_their_task(route, codes, dtype):
    method = taught(PatchCoreCL(CONTEXT, Budget(rows=200), codes, route=route), dtype=dtype)
    for number in range(4):
        for images in (task(number, dtype=dtype), task(number, dtype=dtype, seed=1)):
            scored = method.score(images)
            assert (scored.tasks == number).all()
            np.testing.assert_array_equal(scored.maps, method.score(images, task=number).maps)


def test_one_defect_can_turn_the_lowest_score_but_not_the_mean():
    method = PatchCoreCL(CONTEXT, Budget(rows=1000))
    centres = [np.full((1, 1, 4, 12), 10, np.int8), np.full((1, 1, 4, 12), 50, np.int8)]
    for number, images in enumerate(centres):
        method.learn(str(number), [images])
    image = centres[0].copy()
    image[0, 0, 1] = 80  # nearer to task 1's vectors
    assert method.score(image).tasks == [1]
    method.route = "mean_nn"
    assert method.score(image).tasks == [0]


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_a_known_task_is_scored_as_patchcore_scores_its_bank(dtype):
    method = taught(PatchCoreSeparate(CONTEXT, Budget(rows=120), route="known"), dtype=dtype)
    for number in range(4):
        alone = PatchCore(30, step=0.25).fit([task(number, dtype=dtype)])
        np.testing.assert_array_equal(method.memories[number].rows, alone.memory_bank_)
        probe = task(number, dtype=dtype, seed=7)
        np.testing.assert_array_equal(method.score(probe, task=number).maps.astype(np.float32), alone.score(probe))
    with pytest.raises(InputError, match="give the task's number"):
        method.score(probe)


@pytest.mark.parametrize("name", ["plus", "cl", "fine-tuning", "joint"])
@pytest.mark.parametrize("codes", [None, Codes(6, 8)])
def test_a_single_task_is_patchcore(name, codes):
    method = KINDS[name](CONTEXT, Budget(rows=60), codes)
    method.learn("bottle", [task(0)])
    alone = PatchCore(60, step=0.25) if codes is None else PatchCoreLite(60, 6, 8, step=0.25)
    alone.fit([task(0)])
    probe = task(0, seed=3)
    np.testing.assert_array_equal(method.score(probe, task=0).maps.astype(np.float32), alone.score(probe))


def test_after_the_last_task_the_cut_banks_are_the_separate_ones():
    plus = taught(PatchCorePlus(CONTEXT, Budget(rows=120)))
    separate = taught(PatchCoreSeparate(CONTEXT, Budget(rows=120)))
    assert same(plus.state(), separate.state())


def test_fine_tuning_forgets_and_joint_does_not():
    tuned = taught(PatchCoreFineTune(CONTEXT, Budget(rows=120)))
    joint = taught(PatchCoreJoint(CONTEXT, Budget(rows=120)))
    np.testing.assert_array_equal(tuned.memories[0].rows, PatchCore(120).fit([task(3)]).memory_bank_)
    everything = [task(number) for number in range(4)]
    np.testing.assert_array_equal(joint.memories[0].rows, PatchCore(120).fit(everything).memory_bank_)
    assert joint.nbytes() == 120 * 12 + 8 + 4 * 12 * 12 * 12  # and all candidates
    old = task(0, seed=1)
    assert (tuned.score(old).maps.max((1, 2)) > 2 * joint.score(old).maps.max((1, 2))).all()
    assert (tuned.score(old).tasks == -1).all()


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("codes", [None, Codes(4, 4, "first"), Codes(4, 4, "seen"), Codes(4, 4, "own")])
def test_learning_on_from_a_saved_state_is_never_having_stopped(name, codes):
    def make():
        return KINDS[name](CONTEXT, Budget(rows=100), codes)

    whole = taught(make(), 6)
    stopped = taught(make(), 5)
    file = io.BytesIO()
    np.savez(file, **stopped.state())
    file.seek(0)
    resumed = make()
    with np.load(file) as saved:
        resumed.restore(dict(saved))
    resumed.learn("product 5", np.split(task(5), [5]))
    assert same(whole.state(), resumed.state())
    assert whole.nbytes() == resumed.nbytes()
    probe = task(2, seed=1)
    np.testing.assert_array_equal(whole.score(probe).maps, resumed.score(probe).maps)


@pytest.mark.parametrize("codes", [None, Codes(4, 4, "first"), Codes(4, 4, "seen"), Codes(4, 4, "own")])
def test_more_images_of_an_old_task_extend_its_bank(codes):
    method = taught(PatchCorePlus(CONTEXT, Budget(rows=120), codes), 3)
    before = method.memories[1].rows
    moved = np.clip(task(1, seed=5).astype(int) + 40, -127, 127).astype(np.int8)
    probe = np.clip(task(1, seed=6).astype(int) + 40, -127, 127).astype(np.int8)
    worst = method.score(probe, task=1).maps.max()
    method.learn("product 1", [moved])
    assert method.task_names == ["product 0", "product 1", "product 2"]
    assert len(before) <= len(method.memories[1].rows) <= 40 and method.memories[1].images == 24
    assert method.score(probe, task=1).maps.max() < worst
    assert len(method.quantizers) == (0 if codes is None else 3 if codes.codebooks == "own" else 1)


def test_wrong_use():
    with pytest.raises(InputError, match="different steps"):
        PatchCorePlus(Context(np.array([0.25, 0.5]), 1), Budget(rows=5))
    for bad in ({}, {"rows": 5, "nbytes": 5}, {"rows": 0}):
        with pytest.raises(InputError, match="budget"):
            Budget(**bad)
    for make in (lambda: Codes(4, 4, "mine"), lambda: PatchCorePlus(CONTEXT, Budget(rows=5), route="best"),
                 lambda: PatchCoreCL(CONTEXT, Budget(rows=5), start="zero")):
        with pytest.raises(InputError, match="use one of"):
            make()
    with pytest.raises(CheckFailed, match="no room for 3"):
        taught(PatchCorePlus(CONTEXT, Budget(rows=2)), 3)
    with pytest.raises(CheckFailed, match="no room for 2 tasks"):
        taught(PatchCorePlus(CONTEXT, Budget(nbytes=100)), 2)
    method = PatchCorePlus(CONTEXT, Budget(rows=5))
    with pytest.raises(InputError, match="nothing learnt"):
        method.score(task(0))
    method.learn("a", [task(0)])
    with pytest.raises(InputError, match="the bank needs int8"):
        method.score(task(0, dtype=np.float32))
