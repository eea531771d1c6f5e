"""CFA: bank, loss and map against plain NumPy; its network in ONNX and int8 against the training's own forward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from test_detectors_adaptor import backbone, slow_embedding

from tinyvad.calibration import quantize_on
from tinyvad.detectors.cfa import COLUMN, RADIUS, ROW, Cfa, anomaly_map
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.images import Preprocessing, apply_table
from tinyvad.training import forward
from tinyvad.training.items import ArrayItems, FrozenItems
from tinyvad.training.loop import train
from tinyvad.training.tape import value_and_gradients

PIXELS = Preprocessing(16, 16)


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """(n, 16, 16, 3) uint8: a wavy texture that shifts a little from image to image."""
    x = np.arange(16)
    waves = [np.sin(x[:, None] * 0.7 + rng.normal(0, 0.2)) + np.cos(x * 0.5 + rng.normal(0, 0.2)) for _ in range(count)]
    grey = 128 + 40 * np.stack(waves)[..., None] * [1, 0.8, 0.5]
    return np.clip(grey + rng.normal(0, 6, (count, 16, 16, 3)), 0, 255).astype(np.uint8)


def items_of(detector: Cfa, images: np.ndarray) -> ArrayItems:
    frozen = FrozenItems(detector.trunk, None, (PIXELS.float_input(image) for image in images))
    return ArrayItems(frozen.take(np.arange(len(frozen))))


@pytest.fixture
def detector(rng: np.random.Generator) -> Cfa:
    return Cfa(backbone(rng), seed=3)


def slow_phi(detector: Cfa, images: np.ndarray, net_rng: np.random.Generator) -> np.ndarray:
    """(n, H, W, d) float64, the paper's way: pooled and resized taps, two coordinate channels, one 1x1 convolution."""
    net = backbone(net_rng)
    p = {name: array.astype(np.float64) for name, array in detector.network.parameters.items()}
    taps_of = (p[f"descriptor/weights{i}"][:, 0, 0] for i in range(3))
    matrix = np.concatenate([*taps_of, p[ROW][:, None], p[COLUMN][:, None]], 1)
    height, width = detector.grid
    rows, columns = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    found = []
    for image in images:
        taps, _ = forward.run(net, {}, {}, [PIXELS.float_input(image)[None]], train=False)
        embedding = slow_embedding([tap[0].astype(np.float64) for tap in taps], detector.grid)
        where = np.stack(np.broadcast_arrays(rows[:, None], columns[None]), 2)
        found.append(np.concatenate([embedding, where], 2) @ matrix.T + p["descriptor/bias"])
    return np.stack(found)


@pytest.mark.parametrize("cells", [None, 4])
def test_descriptors_and_bank_are_the_papers(cells: int | None, rng: np.random.Generator) -> None:
    """gamma_c = 1: the centres are the means of the descriptors, position by position."""
    detector, images = Cfa(backbone(np.random.default_rng(0)), cells, seed=3), pictures(rng, 19)
    items = items_of(detector, images)
    expected = slow_phi(detector, images, np.random.default_rng(0))
    np.testing.assert_allclose(detector.descriptors(items.take(np.arange(19))), expected, rtol=0, atol=1e-5)
    detector.prepare(items)
    cells_of = detector.grid[0] * detector.grid[1]
    assert detector.centres().shape == (cells_of, 18) and detector.centres().dtype == np.float32
    np.testing.assert_allclose(detector.centres(), expected.mean(0).reshape(cells_of, 18), rtol=0, atol=1e-5)


def test_maps_are_brute_force(detector: Cfa, rng: np.random.Generator) -> None:
    items = items_of(detector, pictures(rng, 12))
    detector.prepare(items)
    batch = items.take(np.arange(5))
    phi = detector.descriptors(batch).astype(np.float64)
    distances = np.sort(cdist(phi.reshape(-1, 18), detector.centres()), axis=1)[:, :3]
    softmin = np.exp(-distances[:, 0]) / np.exp(-distances).sum(1)
    expected = (softmin * distances[:, 0]).reshape(5, 8, 8)
    found = detector.maps(batch)
    assert found.shape == (5, 8, 8) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_map_is_zero_on_the_centres(rng: np.random.Generator) -> None:
    centres = rng.normal(size=(9, 4)).astype(np.float32)
    assert not anomaly_map(centres.reshape(1, 3, 3, 4), centres).any()


def loss_at(detector: Cfa, distances: list[float], radius: float) -> float:
    """The loss of one position whose six nearest centres lie at these squared distances."""
    detector.centres_ = (np.sqrt(distances)[:, None] * np.eye(6, 18)).astype(np.float32)
    p = {name: np.zeros_like(array, np.float64) for name, array in detector.network.parameters.items()}
    p[RADIUS] = np.array([radius])
    shapes = [detector.network.graph.tensors[name].shape for name in detector.network.graph.inputs]
    return float(detector.loss(p, {}, [np.zeros(shape) for shape in shapes], None)[0])


def test_loss_is_zero_only_with_three_inside_and_three_outside(detector: Cfa) -> None:
    """Radius^2 = 1, alpha = 0.1: the nearest within 1, the next beyond 0.9."""
    assert loss_at(detector, [0.2, 0.5, 0.75, 0.95, 1.5, 2], 1.0) == 0
    assert loss_at(detector, [0.2, 0.5, 1.25, 1.5, 1.5, 2], 1.0) == pytest.approx(1e3 * 0.25 / 3, rel=1e-5)
    assert loss_at(detector, [0.2, 0.5, 0.625, 0.75, 1.5, 2], 1.0) == pytest.approx(1e3 * 0.15 / 3, rel=1e-5)
    assert loss_at(detector, [0, 0, 0, 0, 0, 0], 0.3) == 0  # radius^2 < alpha: nothing is pushed


def test_gradients_are_finite_differences(detector: Cfa, rng: np.random.Generator) -> None:
    items = items_of(detector, pictures(rng, 6))
    detector.prepare(items)
    batch = [array.astype(np.float64) for array in items.take(np.arange(2))]
    p = {name: array.astype(np.float64) for name, array in detector.network.parameters.items()}
    p[RADIUS][:] = 0.5  # both hinges are at work

    def value(parameters: dict[str, np.ndarray]) -> float:
        return float(detector.loss(parameters, {}, batch, rng)[0])

    loss, statistics, gradients = value_and_gradients(lambda q: detector.loss(q, {}, batch, rng), p)
    assert loss == value(p) > 0 and statistics == {} and gradients.keys() == p.keys()
    for name, array in p.items():
        direction = rng.normal(size=array.shape)
        step = 1e-6
        ends = [value({**p, name: array + sign * step * direction}) for sign in (1, -1)]
        assert (gradients[name] * direction).sum() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4), name


def test_bank_of_three_tasks_is_their_mean(detector: Cfa, rng: np.random.Generator) -> None:
    """The descriptor is not trained in between; the tasks count alike however many images they have."""
    tasks = [items_of(detector, pictures(rng, count)) for count in (3, 20, 7)]
    alone = []
    for task in tasks:
        single = Cfa(backbone(np.random.default_rng(0)), seed=3)
        single.prepare(task)
        alone.append(single.centres())
        detector.prepare(task)
    np.testing.assert_allclose(detector.centres(), np.mean(alone, 0), rtol=0, atol=1e-6)
    assert detector.tasks_ == 3


def test_fewer_centres_by_kmeans(rng: np.random.Generator) -> None:
    detector = Cfa(backbone(rng), seed=3, centres=10)
    items = items_of(detector, pictures(rng, 8))
    detector.prepare(items)
    assert detector.centres().shape == (10, 18)
    rows = detector.bank_.reshape(-1, 18).astype(np.float64)
    owner = cdist(rows, detector.centres()).argmin(1)
    for k in np.unique(owner):  # k-means has settled: each centre is the mean of its rows
        np.testing.assert_allclose(detector.centres()[k], rows[owner == k].mean(0), atol=1e-4)
    for count in (5, 65):
        with pytest.raises(InputError, match=f"cfa: {count} centres on a grid of 64 cells; there must be 6 to 64"):
            Cfa(backbone(rng), centres=count)


def test_training_lowers_the_loss_and_repeats(rng: np.random.Generator) -> None:
    images = pictures(rng, 10)
    results = []
    for _ in range(2):
        detector = Cfa(backbone(np.random.default_rng(0)), seed=5)
        items = items_of(detector, images)
        results.append((train(detector, items, None, replace(detector.recipe, epochs=15)), detector))
    (first, detector), (_, again) = results
    assert first.history[-1].loss < 0.9 * first.history[0].loss
    arrays = detector.arrays()
    assert arrays.keys() == again.arrays().keys()
    assert all(array.tobytes() == again.arrays()[name].tobytes() for name, array in arrays.items())
    fresh = Cfa(backbone(np.random.default_rng(0)), seed=6)
    fresh.restore(arrays)
    batch = items.take(np.arange(3))
    np.testing.assert_array_equal(fresh.maps(batch), detector.maps(batch))
    assert fresh.tasks_ == 1


@pytest.fixture
def trained(rng: np.random.Generator) -> tuple[Cfa, np.ndarray]:
    detector, images = Cfa(backbone(np.random.default_rng(0)), seed=5), pictures(rng, 16)
    train(detector, items_of(detector, images), None, replace(detector.recipe, epochs=2))
    return detector, images


def test_onnx_is_the_training_forward(trained: tuple[Cfa, np.ndarray]) -> None:
    """graph()'s map and the coordinate offsets make up the descriptor."""
    detector, images = trained
    engine = OnnxEngine(to_onnx(detector.graph()).SerializeToString(), 1)
    (found,) = engine.features(np.stack([PIXELS.float_input(image) for image in images]))
    rows, columns = detector.coordinate_offsets()
    assert rows.shape == (8, 18) and columns.shape == (8, 18)
    expected = detector.descriptors(items_of(detector, images).take(np.arange(len(images))))
    np.testing.assert_allclose(found + rows[:, None] + columns, expected, rtol=0, atol=1e-5)


def test_int8_keeps_descriptor_and_map(trained: tuple[Cfa, np.ndarray]) -> None:
    detector, images = trained
    calibrated = quantize_on(detector.graph(), PIXELS, images)
    (levels,) = Int8Engine(calibrated.graph, 1).features(apply_table(images, calibrated.table))
    grid = calibrated.graph.tensors[calibrated.graph.outputs[0]].quantization
    assert grid is not None
    rows, columns = detector.coordinate_offsets()
    phi = (levels.astype(np.float64) - grid.zero_point) * grid.scale + rows[:, None] + columns
    expected = detector.descriptors(items_of(detector, images).take(np.arange(len(images))))
    noise = ((phi - expected) ** 2).mean() / (expected - expected.mean((0, 1, 2))).var()
    assert -10 * np.log10(noise) > 25
    maps = anomaly_map(phi.astype(np.float32), detector.centres())
    real = detector.maps(items_of(detector, images).take(np.arange(len(images))))
    assert np.corrcoef(maps.ravel(), real.ravel())[0, 1] > 0.99
