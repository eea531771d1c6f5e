"""Trained detectors over tasks: compressed replay is replay, joint is a fresh training, and stopping changes nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("autograd")

from small_student import LAYERS, SIZE, teacher

from tinyvad.continual.base import Context, Frozen
from tinyvad.continual.methods import METHODS, is_trained, make_method, settings_of
from tinyvad.continual.trained import WAYS, ImageItems, JoinedTaskItems, TrainedMethod
from tinyvad.detectors.student import Paste
from tinyvad.errors import InputError
from tinyvad.fitting_trained import held_out
from tinyvad.images import Preprocessing
from tinyvad.training.items import ArrayItems, numpy_engine
from tinyvad.training.loop import train

IMAGES = 11  # a task; two are held out
SETTINGS: dict[str, Any] = {"epochs": 2, "learning_rate": 0.1, "batch": 3}
PASTE = {**SETTINGS, "shared": "shared"}


def method(name: str, seed: int = 0, **settings: Any) -> TrainedMethod:
    given = {**(PASTE if name.startswith("paste") else SETTINGS), **settings}
    if "replay" in name:
        given = {"size": 6, **given}
    frozen = Frozen(teacher(), Preprocessing(SIZE, SIZE), numpy_engine)
    found = make_method(name, Context(np.ones(1), 1, seed=seed, frozen=frozen), settings_of(name, given, "test"))
    assert isinstance(found, TrainedMethod)
    return found


def pictures(task: int, count: int = IMAGES) -> np.ndarray:
    """(count, 12, 12, 3) uint8 of a task: noise around a colour of its own."""
    rng = np.random.default_rng([task, 7])
    colour = rng.integers(40, 215, 3)
    return np.clip(rng.normal(colour, 25, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def items(learner: TrainedMethod, task: int, count: int = IMAGES) -> ImageItems:
    return ImageItems(pictures(task, count), learner._frozen, learner.detector)


def taught(name: str, tasks: int, **settings: Any) -> TrainedMethod:
    learner = method(name, **settings)
    for task in range(tasks):
        learner.learn(f"product {task}", items(learner, task))
    return learner


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


# --- replay


@pytest.mark.parametrize("mode", ["concat", "replace"])
@pytest.mark.parametrize("detector", ["paste", "cfa", "simplenet"])
def test_compressed_replay_in_float32_is_replay_of_images_to_the_bit(detector: str, mode: str) -> None:
    by_image = taught(f"{detector}-replay", 3, mode=mode)
    by_map = taught(f"{detector}-compressed-replay", 3, mode=mode, form="float32")
    assert same(by_image.detector.arrays(), by_map.detector.arrays())
    shown = items(by_map, 0).take(np.arange(IMAGES))
    assert np.array_equal(by_image.score(shown).maps, by_map.score(shown).maps)
    assert not same(by_map.detector.arrays(), taught(f"{detector}-fine-tuning", 3).detector.arrays())


def test_other_forms_are_near_and_smaller() -> None:
    exact = taught("paste-compressed-replay", 3, form="float32")
    coarse = taught("paste-compressed-replay", 3, form="int8")
    assert coarse.replay_nbytes() < 0.3 * exact.replay_nbytes()
    far = [np.abs(a - b).max() for a, b in zip(*(m.detector.arrays().values() for m in (exact, coarse)), strict=True)]
    assert 0 < max(far) < 0.1


def test_the_memory_holds_clean_trained_images_of_the_right_tasks_in_equal_shares() -> None:
    learner = method("paste-replay", size=7)
    for task in range(3):
        learner.learn(f"product {task}", items(learner, task))
        buffer = learner._buffer
        assert buffer is not None and buffer.sizes == [7 // (task + 1)] * (task + 1)
        for number, name in enumerate(buffer.tasks):
            own = pictures(number)
            trained = np.setdiff1d(np.arange(IMAGES), held_out(IMAGES, 0.2, 0))
            assert len(trained) == 9
            for image in buffer.decode(name)[0]:
                assert any(np.array_equal(image, own[i]) for i in trained)  # and never one that is held out


def test_more_tasks_than_items() -> None:
    learner = taught("paste-replay", 4, size=2)
    assert learner._buffer is not None and sum(learner._buffer.sizes) <= 2
    assert np.isfinite(learner.score(items(learner, 0).take(np.arange(3))).maps).all()


def test_one_product_learnt_twice() -> None:
    learner = method("paste-compressed-replay")
    for number in range(2):
        learner.learn("bottle", items(learner, number))
    assert learner.task_names == ["bottle", "bottle"]
    assert learner._buffer is not None and learner._buffer.sizes == [3, 3]


# --- bounds


def test_joint_is_a_fresh_training_on_the_union() -> None:
    learner = taught("paste-joint", 3)
    fresh = Paste(teacher(), LAYERS, "shared", 0)
    rows = [items(learner, task).take(np.arange(IMAGES)) for task in range(3)]
    out = held_out(IMAGES, 0.2, 0)
    kept = np.setdiff1d(np.arange(IMAGES), out)
    union, held = (
        ArrayItems([np.concatenate([part[i][chosen] for part in rows]) for i in range(len(rows[0]))])
        for chosen in (kept, out)
    )
    train(fresh, union, held, learner.recipe(2))
    assert same(fresh.arrays(), learner.detector.arrays())


def test_fine_tuning_goes_on_from_the_last_task_and_keeps_nothing() -> None:
    learner = method("paste-fine-tuning")
    by_hand = Paste(teacher(), LAYERS, "shared", 0)
    for task in range(2):
        one = items(learner, task)
        recipe = learner.recipe(task)
        learner.learn(f"product {task}", one)
        out = held_out(IMAGES, 0.2, 0)
        parts = [ArrayItems(one.take(chosen)) for chosen in (np.setdiff1d(np.arange(IMAGES), out), out)]
        train(by_hand, *parts, recipe)
        assert same(by_hand.arrays(), learner.detector.arrays())
    assert learner.replay_nbytes() == 0


def test_the_frozen_part_never_changes() -> None:
    learner = method("paste-replay")
    trunk = learner.detector.trunk
    assert trunk is not None
    before = {name: array.tobytes() for name, array in trunk.constants.items()}
    for task in range(2):
        learner.learn(f"product {task}", items(learner, task))
    trained = learner.detector.graph().constants
    assert all(trained[name].tobytes() == value for name, value in before.items())


# --- state


def files_of(learner: TrainedMethod) -> dict[str, np.ndarray]:
    """Its state, once through a file."""
    file = io.BytesIO()
    np.savez(file, **learner.state())  # type: ignore[arg-type]
    with np.load(io.BytesIO(file.getvalue())) as read:
        return {name: read[name] for name in read.files}


@pytest.mark.parametrize(
    "name", [*(f"paste-{way}" for way in WAYS), "cfa-compressed-replay", "simplenet-replay", "stfpm-ewc"]
)
def test_a_sixth_task_after_five_that_were_saved_is_the_sixth_of_six(name: str) -> None:
    given = {"form": "int8"} if name == "paste-compressed-replay" else {}
    whole = taught(name, 5, **given)
    saved = files_of(whole)
    again = method(name, **given)
    again.restore(saved)
    assert again.task_names == whole.task_names
    for learner in (whole, again):
        learner.learn("the sixth", items(learner, 5))
    assert same(whole.state(), again.state())


@pytest.mark.parametrize("name", [f"paste-{way}" for way in WAYS])
def test_bytes_are_those_of_the_state(name: str) -> None:
    learner = taught(name, 2)
    state = learner.state()
    assert learner.nbytes() == sum(array.nbytes for array in state.values())
    kept = sum(array.nbytes for key, array in state.items() if key.startswith(("replay/", "images/")))
    assert learner.replay_nbytes() == kept
    image = 3 * SIZE * SIZE
    expected = {"paste-replay": 6 * image, "paste-compressed-replay": 6 * 6 * 6 * 4 * 4, "paste-joint": 2 * IMAGES * image}
    assert kept == expected.get(name, 0)


@pytest.mark.parametrize("name", ["paste-compressed-replay", "paste-si", "paste-joint"])
def test_a_training_stopped_in_the_middle_of_a_task_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == total // 2 + 1:  # in the second of two epochs
            raise KeyboardInterrupt

    whole = taught(name, 3)
    begun = taught(name, 2)
    saved = files_of(begun)
    with pytest.raises(KeyboardInterrupt):
        begun.learn("product 2", items(begun, 2), checkpoint=tmp_path / "c.npz", tell=stop)
    assert (tmp_path / "c.npz").exists()
    again = method(name)
    again.restore(saved)
    again.learn("product 2", items(again, 2), checkpoint=tmp_path / "c.npz")
    assert not (tmp_path / "c.npz").exists()
    assert same(again.state(), whole.state())


# --- settings


def test_every_trained_detector_has_every_way() -> None:
    names = {f"{detector}-{way}" for detector in ("stfpm", "paste", "cfa", "simplenet") for way in WAYS}
    assert names == {name for name in METHODS if is_trained(name)}
    for name in names:
        make_method(name, Context(np.ones(1), 1), settings_of(name, {}, "test"))  # checks settings without a network


def test_a_part_of_the_images_evenly_chosen() -> None:
    learner = method("paste-joint", images=4, held_out=0.0)
    learner.learn("a", items(learner, 0))
    assert np.array_equal(learner.state()["images/0000"], pictures(0)[[0, 3, 7, 10]])


def test_settings_reach_the_recipe() -> None:
    context = Context(np.ones(1), 1, frozen=method("simplenet-replay")._frozen)
    paper: Any = make_method("simplenet-replay", context, settings_of("simplenet-replay", {}, "test"))
    assert replace(paper.recipe(0), seed=0) == replace(paper.detector.recipe, seed=0)
    changed = method("paste-joint", patience=3, held_out=0.4).recipe(1)
    assert (changed.epochs, changed.learning_rate, changed.batch, changed.patience, changed.held_out) == (2, 0.1, 3, 3, 0.4)
    assert changed.seed != method("paste-joint").recipe(0).seed  # each task draws anew


@pytest.mark.parametrize(("name", "given", "message"), [
    ("paste-replay", {"mode": "mix"}, "mode is 'mix'; choose concat or replace"),
    ("paste-replay", {"size": 0}, "max_size is 0"),
    ("cfa-compressed-replay", {"form": "jpeg"}, "no form called 'jpeg'"),
    ("stfpm-joint", {"images": 0}, "images is 0; give at least 1"),
    ("stfpm-joint", {"held_out": 1.0}, "held_out is 1.0; give a share from 0 to below 1"),
    ("paste-ewc", {"strength": -2}, "strength is -2; give a number from 0 on"),
    ("paste-ewc", {"decay": 7}, "decay is 7; give a number from 0 to 1"),
    ("stfpm-joint", {"shared": "block5"}, "stfpm-joint takes no setting 'shared'"),
    ("paste-joint", {"learning_rate": "high"}, "learning_rate is 'high'; expected a whole number or a number"),
])  # fmt: skip
def test_wrong_settings_are_told_before_anything_runs(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_method(name, Context(np.ones(1), 1), settings_of(name, given, "test"))


def test_several_products_as_one_task() -> None:
    learner = method("paste-replay")
    both = JoinedTaskItems([items(learner, 0, 3), items(learner, 1, 4)])
    wanted = np.array([5, 0, 2, 3])
    expected = np.concatenate([pictures(0, 3), pictures(1, 4)])[wanted]
    assert np.array_equal(both.images(wanted), expected)
    again = ImageItems(expected, learner._frozen, learner.detector)
    for ours, theirs in zip(both.take(wanted), again.take(np.arange(4)), strict=True):
        assert np.array_equal(ours, theirs)
    learner.learn("both", both)
    assert learner.task_names == ["both"]
