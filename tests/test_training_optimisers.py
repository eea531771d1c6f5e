"""Optimisers against numbers worked out by hand, against PyTorch's (noted here), and against the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinyvad.errors import InputError
from tinyvad.training.optimisers import SGD, AdamW, StableAdamW, optimiser_of
from tinyvad.training.recipe import Recipe

START = [1.0, -2.0, 3.0]
GRADIENTS = [[0.5, -2.0, 0.1], [1.5, 0.3, -0.2], [-4.0, 0.01, 0.3], [0.2, 0.2, 0.2]]


def after(optimiser, gradients=GRADIENTS, start=START, dtype=np.float64):
    parameters = {"p": np.array(start, dtype)}
    for gradient in gradients:
        parameters = optimiser.step(parameters, {"p": np.array(gradient, dtype)})
    return parameters["p"]


def test_sgd_by_hand():
    """A constant gradient of 1: the buffer is 1, 1.9, 2.71, so p falls by a tenth of each."""
    optimiser, p = SGD(0.1), {"p": np.array([1.0])}
    for expected in (0.9, 0.71, 0.439):
        p = optimiser.step(p, {"p": np.array([1.0])})
        assert p["p"][0] == pytest.approx(expected, rel=1e-12)
    plain = SGD(0.5, momentum=0, weight_decay=0.1).step({"p": np.array([2.0])}, {"p": np.array([1.0])})
    assert plain["p"][0] == pytest.approx(2 - 0.5 * (1 + 0.2))


@pytest.mark.parametrize(("optimiser", "expected"), [  # made with PyTorch 2.13 in float64: torch.optim of the same name
    (SGD(0.1, 0.9, 0.01), [1.153135888351, -1.399019536802, 2.915748732913]),
    (SGD(0.1, 0.0), [1.18, -1.851, 2.96]),
    (AdamW(0.1, 0.05), [0.848542383941386, -1.73615685228477, 2.79183158584886]),
    (AdamW(0.1, 0.05, amsgrad=True), [0.848542383941386, -1.73617741969789, 2.79183158584886]),
    (AdamW(0.1, 0.05, decoupled=False), [0.861697972815688, -1.75557634270529, 2.69319250641339]),
])  # fmt: skip
def test_as_pytorch(optimiser, expected):
    np.testing.assert_allclose(after(optimiser), expected, rtol=1e-12)


def test_first_step_of_adam_is_the_rate():
    """m / sqrt(v) is the sign of the first gradient, whatever its size."""
    moved = after(AdamW(0.1, weight_decay=0, epsilon=0), [[1e-3, -5.0, 200.0]])
    np.testing.assert_allclose(moved, [0.9, -1.9, 2.9], rtol=1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_stable_adamw_is_algorithm_2(amsgrad):
    """The paper's scalar recursion with its corrected betas, written out once more."""
    rate, decay, (first, second), epsilon = 0.1, 0.05, (0.9, 0.999), 1e-8
    p, v, u, largest = np.array(START), np.zeros(3), np.zeros(3), np.zeros(3)
    clipped = []
    for t, gradient in enumerate(GRADIENTS, 1):
        g = np.array(gradient)
        beta1 = first * (1 - first ** (t - 1)) / (1 - first**t)
        beta2 = second * (1 - second ** (t - 1)) / (1 - second**t)
        v, u = beta1 * v + (1 - beta1) * g, beta2 * u + (1 - beta2) * g * g
        largest = np.maximum(largest, u * (1 - second**t))  # AMSGrad compares the sums before their correction
        square = largest / (1 - second**t) if amsgrad else u
        rms = math.sqrt(np.mean(g * g / np.maximum(square, epsilon**2)))
        clipped.append(rms > 1)
        now = rate / max(1, rms)
        p = p - now * decay * p - now * v / (np.sqrt(square) + epsilon)
    assert any(clipped) and not all(clipped)
    np.testing.assert_allclose(after(StableAdamW(rate, decay, amsgrad=amsgrad)), p, rtol=1e-10)


def test_stable_adamw_shortens_the_step_after_a_jump():
    """After a thousand gradients of 1, one of 100 moves Adam by far more than the rate, StableAdamW at most by it."""
    steps = []
    for optimiser in (AdamW(0.01, 0, (0.0, 0.999)), StableAdamW(0.01, 0, (0.0, 0.999))):
        before = after(optimiser, [[1.0]] * 1000, [0.0])
        now = optimiser.step({"p": before}, {"p": np.array([100.0])})["p"]
        steps.append(float(before[0] - now[0]))
    assert steps[0] > 0.1 and steps[1] <= 0.01 + 1e-12


OPTIMISERS = [
    lambda: SGD(0.05, 0.9, 1e-3), lambda: AdamW(0.05, amsgrad=True), lambda: AdamW(0.05, decoupled=False),
    lambda: StableAdamW(0.05),
]  # fmt: skip


@pytest.mark.parametrize("make", OPTIMISERS)
def test_restored_in_between_gives_the_same_bytes(make, rng):
    gradients = rng.normal(size=(6, 3)).astype(np.float32)
    through = after(make(), gradients, dtype=np.float32)
    first, second = make(), make()
    half = after(first, gradients[:3], dtype=np.float32)
    kept = {name: array.copy() for name, array in first.arrays().items()}
    assert all(isinstance(array, np.ndarray) for array in kept.values())
    after(first, gradients[:2], dtype=np.float32)  # the first goes on: what was kept must not
    second.restore(kept)
    assert after(second, gradients[3:], half, np.float32).tobytes() == through.tobytes()
    assert through.dtype == np.float32


@pytest.mark.parametrize("make", OPTIMISERS)
def test_nothing_is_changed_in_place_and_the_rest_stays(make):
    parameters = {"p": np.ones(3, np.float32), "other": np.ones(2, np.float32)}
    gradients = {"p": np.ones(3, np.float32)}
    optimiser = make()
    for _ in range(2):
        updated = optimiser.step(parameters, gradients)
    assert (parameters["p"] == 1).all() and (gradients["p"] == 1).all() and (updated["p"] < 1).all()
    assert updated["other"] is parameters["other"]


@pytest.mark.parametrize("make", OPTIMISERS)
def test_finds_the_bottom_of_a_bowl(make):
    """Gradient of (p - 3)^2 / 2; what is left is the weight decay's pull."""
    optimiser, p = make(), {"p": np.array([0.0])}
    for i in range(800):
        p = optimiser.step(p, {"p": p["p"] - 3}, 1.0 if i < 400 else 0.1)
    assert p["p"][0] == pytest.approx(3, abs=0.2)


def test_a_factor_a_name_scales_its_rate():
    parameters = {"a": np.array([0.0]), "b": np.array([0.0])}
    gradients = {"a": np.array([1.0]), "b": np.array([1.0])}
    moved = SGD(0.1).step(parameters, gradients, {"b": 2.0})
    assert moved["a"][0] == pytest.approx(-0.1) and moved["b"][0] == pytest.approx(-0.2)


def test_optimiser_of_a_recipe():
    sgd = optimiser_of(Recipe(learning_rate=0.4, momentum=0.8, weight_decay=0.1))
    assert isinstance(sgd, SGD) and (sgd.learning_rate, sgd.momentum, sgd.weight_decay) == (0.4, 0.8, 0.1)
    adamw = optimiser_of(Recipe(optimiser="adamw", learning_rate=1e-3))
    assert isinstance(adamw, AdamW) and not adamw.stable and adamw.decoupled
    stable = optimiser_of(Recipe(optimiser="stable-adamw"))
    assert isinstance(stable, AdamW) and stable.stable
    with pytest.raises(InputError, match="use sgd, adamw or stable-adamw"):
        optimiser_of(Recipe(optimiser="lbfgs"))
