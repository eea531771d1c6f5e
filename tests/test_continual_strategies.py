"""EWC, SI, MAS, LwF: closed forms of one parameter, finite differences, and fine-tuning to the bit without strength."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("autograd")

from finite_differences import numerical
from small_student import SIZE, Line, paste

from tinyvad.continual.strategies import DAMPING, EWC, MAS, SI, FineTuning, LwF, norm_parameters
from tinyvad.errors import InputError
from tinyvad.training import forward
from tinyvad.training.items import ArrayItems, FrozenItems
from tinyvad.training.loop import train
from tinyvad.training.losses import normalised_feature_loss
from tinyvad.training.network import Arrays
from tinyvad.training.tape import value_and_gradients

ONE = ArrayItems([np.zeros((1, 1, 1, 1), np.float32)])
KINDS = {"ewc": EWC, "si": SI, "mas": MAS, "lwf": LwF}


def items(detector: Any, seed: int, count: int = 7) -> ArrayItems:
    rng = np.random.default_rng(seed)
    frozen = FrozenItems(detector.trunk, detector.targets, rng.normal(size=(count, SIZE, SIZE, 3)).astype(np.float32))
    return ArrayItems(frozen.take(np.arange(count)))


def taught(strategy: FineTuning | None, tasks: int = 2) -> Arrays:
    """What the small PaSTe has learnt after so many tasks."""
    detector = paste()
    for seed in range(tasks):
        train(detector, items(detector, seed), None, detector.recipe, strategy=strategy)
    return detector.arrays()


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.fixture(scope="module")
def plain() -> Arrays:
    return taught(None)


# --- all of them


@pytest.mark.parametrize("kind", KINDS)
def test_without_strength_it_is_fine_tuning_to_the_bit(kind: str, plain: Arrays) -> None:
    assert same(taught(KINDS[kind](0.0)), plain)
    assert not same(taught(KINDS[kind](1.0)), plain)  # and with it, it is not


@pytest.mark.parametrize("kind", ["ewc", "si", "mas"])
def test_nothing_pulls_at_the_anchor_and_a_spring_does_elsewhere(kind: str) -> None:
    detector = paste()
    strategy: Any = KINDS[kind](3.0)
    train(detector, items(detector, 0), None, detector.recipe, strategy=strategy)
    here = detector.network.parameters
    value, gradients = strategy.penalty(here)
    assert value == 0 and all(not gradient.any() for gradient in gradients.values())
    assert all((importance >= 0).all() for importance in strategy.importance.values())
    moved = {name: array + np.float32(0.25) for name, array in here.items()}
    value, gradients = strategy.penalty(moved)
    away = {name: moved[name].astype(np.float64) - here[name] for name in here}  # 0.25 but for rounding
    factor = 3.0 / 2 if kind == "ewc" else 3.0
    expected = factor * sum((strategy.importance[n].astype(np.float64) * away[n] ** 2).sum() for n in gradients)
    assert value == pytest.approx(expected, rel=1e-5) and value > 0
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, 2 * factor * strategy.importance[name] * away[name], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_what_is_kept_and_restoring_goes_on_the_same_way(kind: str) -> None:
    detector, strategy = paste(), KINDS[kind](2.0)
    train(detector, items(detector, 0), None, detector.recipe, strategy=strategy)
    arrays = {name: array.copy() for name, array in strategy.arrays().items()}
    trained = sum(array.size for array in detector.network.parameters.values())
    assert strategy.nbytes() == sum(len(array.tobytes()) for array in arrays.values())
    norms = norm_parameters(detector.network.graph)
    normed = sum(detector.network.parameters[name].size for name in norms)
    statistics = sum(array.nbytes for array in detector.network.statistics.values())
    expected = {"ewc": 8 * trained, "si": 8 * trained - 4 * normed, "mas": 8 * trained + 8, "lwf": 4 * trained + statistics}
    assert strategy.nbytes() == expected[kind]

    again, restored = paste(), KINDS[kind](2.0)
    again.restore(detector.arrays())
    restored.restore(arrays)
    for one, its in ((detector, strategy), (again, restored)):
        train(one, items(one, 1), None, one.recipe, strategy=its)
    assert same(again.arrays(), detector.arrays()) and same(restored.arrays(), strategy.arrays())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_stopped_in_its_second_task_ends_the_same(kind: str, tmp_path: Any) -> None:
    whole = taught(KINDS[kind](1.0))

    def stop(stage: str, done: int, total: int) -> None:
        if done == 4:  # in the second of two epochs of three steps
            raise KeyboardInterrupt

    detector, strategy = paste(), KINDS[kind](1.0)
    train(detector, items(detector, 0), None, detector.recipe, strategy=strategy)
    before = detector.arrays(), strategy.arrays()
    with pytest.raises(KeyboardInterrupt):
        train(detector, items(detector, 1), None, detector.recipe, strategy=strategy, checkpoint=tmp_path / "c", tell=stop)
    detector, strategy = paste(), KINDS[kind](1.0)
    detector.restore(before[0])
    strategy.restore(before[1])
    train(detector, items(detector, 1), None, detector.recipe, strategy=strategy, checkpoint=tmp_path / "c")
    assert same(detector.arrays(), whole)


def test_wrong_settings() -> None:
    for kind in KINDS.values():
        with pytest.raises(InputError, match="strength is -1; give a number from 0 on"):
            kind(-1)
    with pytest.raises(InputError, match=r"decay is 1\.5; give a number from 0 to 1"):
        EWC(1.0, 1.5)


# --- EWC


def test_ewc_of_two_parabolas_ends_where_joint_training_would() -> None:
    """Task 1: a/2 (x - p)^2, task 2: b/2 (x - q)^2, strength 1 and importance a: the optimum is (a p + b q) / (a + b)."""
    a, p, b, q = 3.0, -1.0, 2.0, 4.0
    line, strategy = Line(lambda x: 0.5 * a * (x - p) ** 2, start=7.0), EWC(1.0)
    train(line, ONE, None, line.recipe, strategy=strategy)
    assert line.network.parameters["p"][0] == pytest.approx(p, abs=1e-9)
    assert strategy.anchor["p"] == line.network.parameters["p"]
    strategy.importance["p"] = np.array([a])  # what the squared gradient at the optimum, 0, does not know
    line.of = lambda x: 0.5 * b * (x - q) ** 2
    train(line, ONE, None, line.recipe, strategy=strategy)
    assert line.network.parameters["p"][0] == pytest.approx((a * p + b * q) / (a + b), abs=1e-9)


def test_ewc_takes_each_images_gradient_not_the_batchs() -> None:
    detector, strategy = paste(), EWC(1.0)
    data = items(detector, 3, 4)
    strategy.end_task(detector, data)
    exact = in_float64(detector)
    fisher = {name: np.zeros(array.shape) for name, array in exact.items()}
    summed = {name: np.zeros(array.shape) for name, array in exact.items()}
    for i in range(4):
        batch = [array.astype(np.float64) for array in data.take(np.array([i]))]
        slopes = numerical(lambda p, b=batch: float(detector.loss(p, detector.network.statistics, b, None)[0]), exact)
        for name, slope in slopes.items():
            fisher[name] += slope**2 / 4
            summed[name] += slope / 4
    for name, expected in fisher.items():
        np.testing.assert_allclose(strategy.importance[name], expected, rtol=2e-3, atol=1e-6 * expected.max() + 1e-12)
    assert sum((f - summed[n] ** 2).sum() for n, f in fisher.items()) > 0.1 * sum(f.sum() for f in fisher.values())


def test_ewc_adds_up_tasks_with_its_decay() -> None:
    detector = paste()
    first, second, both = EWC(1.0), EWC(1.0), EWC(1.0, 0.25)
    for strategy, seeds in ((first, [0]), (second, [1]), (both, [0, 1])):
        for seed in seeds:
            strategy.end_task(detector, items(detector, seed))
    for name, importance in both.importance.items():
        np.testing.assert_allclose(importance, 0.25 * first.importance[name] + second.importance[name], rtol=1e-5)


# --- SI


def test_si_adds_up_what_the_loss_fell_by_on_a_line() -> None:
    """Loss g x: each step lowers it by exactly -g step, so that omega is what it fell by, and the way is known."""
    slope, rate, steps = 3.0, 0.05, 40
    line = Line(lambda x: slope * x, start=2.0)
    recipe = replace(line.recipe, epochs=steps, learning_rate=rate)
    strategy = SI(1.0)
    train(line, ONE, None, recipe, strategy=strategy)
    way = -slope * rate * steps
    fell = -slope * way
    assert line.network.parameters["p"][0] == pytest.approx(2.0 + way)
    assert strategy.importance["p"][0] == pytest.approx(fell / (way**2 + DAMPING), rel=1e-6)
    assert not strategy.path and not strategy.start  # let go of after the task


def test_si_adds_up_what_the_loss_fell_by_to_first_order() -> None:
    """A student's parameters but for its norms: with half the steps the sum comes twice as near."""
    detector = paste()
    data = items(detector, 0, 3)
    rng = np.random.default_rng(0)
    batch, statistics = data.take(np.arange(3)), detector.network.statistics
    errors = []
    for rate in (0.02, 0.01):
        strategy = SI(1.0)
        parameters = dict(detector.network.parameters)
        strategy.begin_task(detector, data)
        first = last = 0.0
        for step in range(3):
            last, _, gradients = value_and_gradients(lambda p: detector.loss(p, statistics, batch, rng), parameters)
            first = last if step == 0 else first
            if step == 2:
                break
            after = dict(parameters)
            for name in strategy.path:  # norms stay where they are
                after[name] = parameters[name] - np.float32(rate) * gradients[name]
            strategy.after_step(gradients, parameters, after)
            parameters = after
        errors.append(sum(float(path.sum()) for path in strategy.path.values()) / (first - last) - 1)
    assert abs(errors[1]) < 0.2 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.2)


def test_si_takes_the_tasks_gradient_alone_and_never_falls() -> None:
    """Second task: a flat loss. The spring alone moves p, which is nobody's gain: importance stays."""
    line, strategy = Line(lambda x: 3.0 * x, start=2.0), SI(1.0)
    recipe = replace(line.recipe, epochs=20)
    train(line, ONE, None, recipe, strategy=strategy)
    before = strategy.importance["p"].copy()
    strategy.anchor["p"] = strategy.anchor["p"] + 1.0
    line.of = lambda x: 0.0 * x
    start = line.network.parameters["p"].copy()
    train(line, ONE, None, recipe, strategy=strategy)
    assert line.network.parameters["p"] > start
    assert np.array_equal(strategy.importance["p"], before)


def test_si_leaves_norms_free() -> None:
    detector, strategy = paste(), SI(1.0)
    train(detector, items(detector, 0), None, detector.recipe, strategy=strategy)
    norms = norm_parameters(detector.network.graph)
    assert len(norms) == 4  # scale and offset of two convolutions
    assert strategy.importance.keys() == detector.network.parameters.keys() - norms


# --- MAS


def test_mas_is_the_mean_over_images_of_absolute_slopes() -> None:
    detector, strategy = paste(), MAS(1.0)
    data = items(detector, 4, 3)
    strategy.end_task(detector, data)
    exact, network = in_float64(detector), detector.network
    expected = {name: np.zeros(array.shape) for name, array in exact.items()}

    def length(parameters: Arrays, h: np.ndarray) -> float:
        maps, _ = forward.run(network.graph, parameters, network.statistics, [h], train=False)
        return float(sum((array**2).sum() for array in maps))

    for i in range(3):
        h = data.take(np.array([i]))[0].astype(np.float64)
        for name, slope in numerical(lambda p, x=h: length(p, x), exact).items():
            expected[name] += np.abs(slope) / 3
    for name, importance in strategy.importance.items():
        np.testing.assert_allclose(importance, expected[name], rtol=2e-3, atol=1e-6 * expected[name].max() + 1e-9)
    assert max(array.max() for array in expected.values()) > 1  # of maps as they are: normalised ones would give 0


def test_mas_is_the_mean_over_tasks() -> None:
    detector = paste()
    alone = []
    for seed in range(3):
        one = MAS(1.0)
        one.end_task(detector, items(detector, seed))
        alone.append(one.importance)
    all_three = MAS(1.0)
    for seed in range(3):
        all_three.end_task(detector, items(detector, seed))
    for name, importance in all_three.importance.items():
        np.testing.assert_allclose(importance, np.mean([one[name] for one in alone], axis=0), rtol=1e-5)


# --- LwF


def test_lwf_adds_the_distance_from_the_old_students_maps() -> None:
    detector, strategy = paste(), LwF(0.5)
    network = detector.network
    strategy.end_task(detector, items(detector, 0))
    batch = items(detector, 1, 4).take(np.arange(4))
    own = float(detector.loss(network.parameters, network.statistics, batch, None)[0])
    same_network = strategy.loss(detector, network.parameters, network.statistics, batch, None)[0]
    assert float(same_network) == own  # nothing has moved: no distance
    rng = np.random.default_rng(0)
    moved = {name: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32) for name, a in network.parameters.items()}
    maps = [
        forward.run(network.graph, p, network.statistics, batch[:1], train=False)[0] for p in (moved, network.parameters)
    ]
    expected = float(detector.loss(moved, network.statistics, batch, None)[0]) + 0.5 * float(normalised_feature_loss(*maps))
    assert float(strategy.loss(detector, moved, network.statistics, batch, None)[0]) == pytest.approx(expected, rel=1e-12)


def test_lwf_of_other_detectors_is_the_mean_squared_difference() -> None:
    detector, strategy = paste(), LwF(2.0)
    network = detector.network
    strategy.end_task(detector, items(detector, 0))
    detector.method = "simplenet"  # outputs are compared as they are
    batch = [array.astype(np.float64) for array in items(detector, 1, 2).take(np.arange(2))]
    exact = in_float64(detector)
    rng = np.random.default_rng(0)
    moved = {name: array + 0.1 * rng.normal(size=array.shape) for name, array in exact.items()}

    def loss(parameters: Arrays) -> Any:
        return strategy.loss(detector, parameters, network.statistics, batch, None)[0]

    new, old = (
        forward.run(network.graph, p, network.statistics, batch[:1], train=False)[0] for p in (moved, strategy.parameters)
    )
    squares = sum(float(((n - o) ** 2).sum()) for n, o in zip(new, old, strict=True))
    expected = float(detector.loss(moved, network.statistics, batch, None)[0]) + 2.0 * squares / sum(o.size for o in old)
    assert float(loss(moved)) == pytest.approx(expected, rel=1e-9)
    slopes = numerical(lambda p: float(loss(p)), moved)
    _, _, gradients = value_and_gradients(lambda p: (loss(p), None), moved)
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, rtol=1e-5, atol=1e-7)


def in_float64(detector: Any) -> Arrays:
    """The detector's parameters, to differentiate numerically."""
    return {name: array.astype(np.float64) for name, array in detector.network.parameters.items()}
