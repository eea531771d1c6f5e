"""SimpleNet: loss and maps against plain NumPy, the exported network against the training's own forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_detectors_adaptor import backbone, slow_embedding
from test_detectors_cfa import PIXELS, items_of, pictures

from tinyvad.calibration import quantize_on
from tinyvad.detectors.simplenet import NORMED, W2, SimpleNet
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.export.onnx import to_onnx
from tinyvad.images import apply_table
from tinyvad.training import forward
from tinyvad.training.items import ArrayItems
from tinyvad.training.loop import train
from tinyvad.training.network import EPSILON
from tinyvad.training.tape import value_and_gradients

HIDDEN = 12  # int(18 / 1.5)


def fresh(**settings: Any) -> SimpleNet:
    return SimpleNet(backbone(np.random.default_rng(0)), seed=3, **settings)


def settled(detector: SimpleNet, rng: np.random.Generator) -> SimpleNet:
    """Running statistics, scale and offset as after some training."""
    parameters, statistics = dict(detector.network.parameters), dict(detector.network.statistics)
    for name in ("discriminator/scale", "discriminator/offset", "adaptor/bias"):
        parameters[name] = (parameters[name] + rng.normal(0, 0.3, parameters[name].shape)).astype(np.float32)
    statistics[f"{NORMED}.mean"] = rng.normal(0, 1, HIDDEN).astype(np.float32)
    statistics[f"{NORMED}.variance"] = rng.uniform(0.5, 2, HIDDEN).astype(np.float32)
    detector.network = detector.network.with_values(parameters, statistics)
    return detector


def slow_scores(detector: SimpleNet, images: np.ndarray, spreads: list[np.ndarray]) -> np.ndarray:
    """D (n, H, W) float64, the paper's way."""
    p = {name: array.astype(np.float64) for name, array in detector.network.parameters.items()}
    adaptor = np.concatenate([p[f"adaptor/weights{i}"][:, 0, 0] for i in range(3)], 1)
    mean, variance = (detector.network.statistics[f"{NORMED}.{part}"].astype(np.float64) for part in ("mean", "variance"))
    found = []
    for image in images:
        taps, _ = forward.run(backbone(np.random.default_rng(0)), {}, {}, [PIXELS.float_input(image)[None]], train=False)
        z = slow_embedding([tap[0].astype(np.float64) for tap in taps], detector.grid) / np.concatenate(spreads)
        q = z @ adaptor.T + p["adaptor/bias"]
        y = (q @ p["discriminator/weights"][:, 0, 0].T - mean) / np.sqrt(variance + EPSILON)
        y = y * p["discriminator/scale"] + p["discriminator/offset"]
        found.append(np.where(y > 0, y, 0.2 * y) @ p[W2].reshape(-1))
    return np.stack(found)


@pytest.mark.parametrize("cells", [None, 4])
def test_maps_are_minus_the_discriminator(cells: int | None, rng: np.random.Generator) -> None:
    """Features are divided by their spread over the first task; the map is -D, in its shape, without smoothing."""
    detector = settled(fresh(grid=cells), rng)
    images = pictures(rng, 20)
    items = items_of(detector, images)
    spreads = [array.std((0, 1, 2), dtype=np.float64) for array in items.arrays]
    spreads = [np.maximum(spread, 0.01 * spread.max()) for spread in spreads]
    detector.prepare(items)
    found = detector.maps(items.take(np.arange(20)))
    assert found.shape == (20, *detector.grid) and found.dtype == np.float64
    np.testing.assert_allclose(found, -slow_scores(detector, images, spreads), rtol=0, atol=1e-4)
    detector.prepare(items_of(detector, pictures(rng, 3)))  # a second task changes nothing
    np.testing.assert_array_equal(detector.maps(items.take(np.arange(20))), found)


def test_without_noise_the_loss_is_at_least_two_margins(rng: np.random.Generator) -> None:
    """Batch norm by its statistics: the hinges are margin - D and margin + D; equality where every |D| <= margin."""
    detector = settled(fresh(sigma=0.0), rng)
    items = items_of(detector, pictures(rng, 8))
    detector.prepare(items)
    batch = items.take(np.arange(8))
    largest = np.abs(detector.maps(batch)).max()
    for margin, equal in ((largest * 1.01, True), (largest * 0.9, False)):
        detector.margin = margin
        loss = float(detector.loss(detector.network.parameters, detector.network.statistics, batch, None)[0])
        assert bool(loss == pytest.approx(2 * margin, rel=1e-6)) == equal
        assert loss > 2 * margin * (1 - 1e-6)


def test_separated_scores_have_no_loss_and_no_gradient(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of 0 against noise of 5: a discriminator that prefers the former by more than the margins."""
    detector = fresh(sigma=0.05)
    parameters = {name: np.zeros_like(array) for name, array in detector.network.parameters.items()}
    parameters["discriminator/weights"][:] = np.eye(HIDDEN, 18)[:, None, None]
    parameters["discriminator/scale"][:] = 1
    parameters["discriminator/offset"][:] = 1
    parameters[W2][:] = 1
    statistics = detector.network.statistics  # mean 0, variance 1
    batch = [np.zeros((2, *array.shape[1:]), np.float32) for array in items_of(detector, pictures(rng, 1)).arrays]

    class Down:
        def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.full(shape, -100, dtype)  # times sigma 0.05: -5 everywhere

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Down())
    loss, _, gradients = value_and_gradients(lambda p: detector.loss(p, statistics, batch, None), parameters)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    detector.margin = 20.0  # D is 12 and 12 * 0.2 * -4 = -9.6: both hinges are open now
    loss, _, gradients = value_and_gradients(lambda p: detector.loss(p, statistics, batch, None), parameters)
    assert loss == pytest.approx(20 - 12 + 20 - 9.6, rel=1e-4) and gradients[W2].any()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_finite_differences(training: bool, rng: np.random.Generator) -> None:
    detector = settled(fresh(sigma=0.5), rng)
    items = items_of(detector, pictures(rng, 4))
    detector.prepare(items)
    batch = [array.astype(np.float64) for array in items.take(np.arange(2))]
    p = {name: array.astype(np.float64) for name, array in detector.network.parameters.items()}
    statistics = {name: array.astype(np.float64) for name, array in detector.network.statistics.items()}

    def loss(parameters: Any) -> Any:
        return detector.loss(parameters, statistics, batch, np.random.default_rng(7) if training else None)

    value, moved, gradients = value_and_gradients(loss, p)
    assert value > 0 and gradients.keys() == p.keys()
    same = [np.array_equal(moved[name], array) for name, array in statistics.items()]
    assert not any(same) if training else all(same)
    for name, array in p.items():
        direction, step = rng.normal(size=array.shape), 1e-6
        ends = [float(loss({**p, name: array + sign * step * direction})[0]) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (gradients[name] * direction).sum() == pytest.approx(slope, rel=1e-4, abs=1e-8), name


def test_evaluation_repeats_its_noise_and_training_does_not(rng: np.random.Generator) -> None:
    detector = fresh()
    items = items_of(detector, pictures(rng, 4))
    detector.prepare(items)
    batch, network = items.take(np.arange(4)), detector.network
    fixed = [float(detector.loss(network.parameters, network.statistics, batch, None)[0]) for _ in range(2)]
    drawn = [float(detector.loss(network.parameters, network.statistics, batch, rng)[0]) for _ in range(2)]
    assert fixed[0] == fixed[1] and drawn[0] != drawn[1]


def test_batch_norm_sees_clean_and_noisy_features_together(rng: np.random.Generator) -> None:
    detector = fresh(sigma=2.0)
    items = items_of(detector, pictures(rng, 4))
    detector.prepare(items)
    batch = items.take(np.arange(4))
    (q,), _ = forward.run(detector._adaptor, detector.network.parameters, {}, batch, train=False)
    noise = 2 * np.random.default_rng(7).standard_normal(q.shape, np.float32)
    both = np.concatenate([q, q + noise]) @ detector.network.parameters["discriminator/weights"][:, 0, 0].T
    _, moved = detector.loss(detector.network.parameters, detector.network.statistics, batch, np.random.default_rng(7))
    np.testing.assert_allclose(moved[f"{NORMED}.mean"], 0.1 * both.mean((0, 1, 2)), rtol=0, atol=1e-5)
    expected = 0.9 + 0.1 * both.reshape(-1, HIDDEN).var(0, ddof=1)
    np.testing.assert_allclose(moved[f"{NORMED}.variance"], expected, rtol=1e-4)


def test_training_lowers_the_loss_and_repeats(rng: np.random.Generator) -> None:
    images = pictures(rng, 8)
    results = []
    for _ in range(2):
        detector = fresh(sigma=0.5)
        items = items_of(detector, images)
        results.append((train(detector, items, None, replace(detector.recipe, epochs=25, learning_rate=1e-3)), detector))
    (first, detector), (_, again) = results
    assert first.history[-1].loss < 0.9 * first.history[0].loss
    arrays = detector.arrays()
    assert all(array.tobytes() == again.arrays()[name].tobytes() for name, array in arrays.items())
    other = SimpleNet(backbone(np.random.default_rng(0)), seed=9, sigma=0.5)
    other.restore(arrays)
    batch = items.take(np.arange(3))
    np.testing.assert_array_equal(other.maps(batch), detector.maps(batch))
    for name, array in detector.graph().constants.items():
        np.testing.assert_array_equal(other.graph().constants[name], array)


def test_adaptor_and_discriminator_learn_at_their_own_rates() -> None:
    detector = fresh()
    factors = detector.recipe.factors(detector.network.parameters)
    assert factors == {name: 0.5 for name in detector.network.parameters if name.startswith("adaptor/")}
    assert set(detector.network.parameters) - set(factors) == {
        "discriminator/weights", "discriminator/scale", "discriminator/offset", W2,
    }  # fmt: skip


def test_a_constant_channel_is_not_divided_by_nothing(rng: np.random.Generator) -> None:
    detector = fresh()
    arrays = [array.copy() for array in items_of(detector, pictures(rng, 4)).arrays]
    arrays[0][:] = 1.5  # the whole tap
    arrays[1][..., 2] = 0
    detector.prepare(ArrayItems(arrays))
    spreads = [detector.arrays()[f"simplenet/moments{i}"][1] for i in range(2)]
    np.testing.assert_array_equal(spreads[0], 1)
    assert spreads[1][2] == pytest.approx(0.01 * arrays[1].std((0, 1, 2)).max(), rel=1e-3)


@pytest.fixture
def trained(rng: np.random.Generator) -> tuple[SimpleNet, np.ndarray]:
    detector, images = fresh(sigma=0.5), pictures(rng, 16)
    train(detector, items_of(detector, images), None, replace(detector.recipe, epochs=25, learning_rate=1e-3))
    return detector, images


def scores_of(detector: SimpleNet, maps: np.ndarray) -> np.ndarray:
    weights, offset = detector.output_layer()
    assert weights.shape == (2 * HIDDEN,) and weights.dtype == np.float32
    return offset - maps.astype(np.float64) @ weights


def test_onnx_is_the_training_forward(trained: tuple[SimpleNet, np.ndarray]) -> None:
    """Adaptor, first layer and batch norm are one convolution a tap; two ReLUs are the leaky one."""
    detector, images = trained
    graph = detector.graph()
    assert graph.tensors[graph.outputs[0]].shape == (1, 8, 8, 2 * HIDDEN)
    (found,) = OnnxEngine(to_onnx(graph).SerializeToString(), 1).features(
        np.stack([PIXELS.float_input(image) for image in images])
    )
    assert not (np.minimum(found[..., :HIDDEN], found[..., HIDDEN:])).any()
    batch = items_of(detector, images).take(np.arange(len(images)))
    (normed,), _ = forward.run(
        detector.network.graph, detector.network.parameters, detector.network.statistics, batch, train=False
    )
    np.testing.assert_allclose(found[..., :HIDDEN] - found[..., HIDDEN:], normed, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores_of(detector, found), detector.maps(batch), rtol=1e-5, atol=1e-5)


def test_int8_keeps_the_map(trained: tuple[SimpleNet, np.ndarray]) -> None:
    detector, images = trained
    calibrated = quantize_on(detector.graph(), PIXELS, images)
    (levels,) = Int8Engine(calibrated.graph, 1).features(apply_table(images, calibrated.table))
    grid = calibrated.graph.tensors[calibrated.graph.outputs[0]].quantization
    assert grid is not None
    found = scores_of(detector, (levels - grid.zero_point) * grid.scale)
    real = detector.maps(items_of(detector, images).take(np.arange(len(images))))
    noise = ((found - real) ** 2).mean() / real.var()
    assert -10 * np.log10(noise) > 15
