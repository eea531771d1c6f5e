"""STFPM and PaSTe: what must hold whatever the weights. Oracles: closed forms and onnxruntime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("autograd")
from tinyvad.backbones.source import open_backbone
from tinyvad.detectors.student import Paste, Stfpm, distance_product
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import truncate
from tinyvad.training.items import FrozenItems
from tinyvad.training.loop import train
from tinyvad.training.network import EPSILON
from tinyvad.training.student import student_layers

SIZE = 64
EVERYTHING = np.arange(4)


@pytest.fixture(scope="module")
def backbone() -> Graph:
    return open_backbone("mcunet-in1").graph_at(SIZE)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(4, SIZE, SIZE, 3)).astype(np.float32)


def detectors(backbone: Graph) -> list[Stfpm]:
    shared, layers = student_layers(backbone)
    return [Stfpm(backbone, layers), Paste(backbone, layers, shared)]


def all_items(detector: Stfpm, images: np.ndarray) -> list[np.ndarray]:
    return FrozenItems(detector.trunk, detector.targets, images).take(np.arange(len(images)))


def perfect(detector: Stfpm) -> None:
    """Give the student what the teacher has: weights as they are, the bias as the batch norm's offset."""
    parameters = dict(detector.network.parameters)
    values = {"mean": 0.0, "variance": 1 - EPSILON}
    statistics = {n: np.full_like(a, values[n.rpartition(".")[2]]) for n, a in detector.network.statistics.items()}
    for node in detector.targets.nodes:
        if f"{node.output}/weights" in parameters:
            weights, bias = (detector.targets.constants[name] for name in node.inputs[1:])
            parameters.update({f"{node.output}/weights": weights, f"{node.output}/offset": bias})
    detector.network = detector.network.with_values(parameters, statistics)


def evaluated(detector: Stfpm, batch: list[np.ndarray]) -> float:
    return float(detector.loss(detector.network.parameters, detector.network.statistics, batch, None)[0])


def test_a_student_that_equals_the_teacher_has_no_loss_and_no_map(backbone, images):
    for detector in detectors(backbone):
        batch = all_items(detector, images)
        perfect(detector)
        assert evaluated(detector, batch) < 1e-8
        assert detector.maps(batch).max() < 1e-15
        assert distance_product(batch[1:], batch[1:]).max() == 0


def test_scaling_the_teacher_changes_nothing(backbone, images):
    for detector in detectors(backbone):
        stored, *targets = all_items(detector, images)
        scaled = [stored, *(np.float32(factor) * t for factor, t in zip((0.25, 8, 1024), targets, strict=True))]
        assert evaluated(detector, scaled) == evaluated(detector, [stored, *targets])
        np.testing.assert_array_equal(detector.maps(scaled), detector.maps([stored, *targets]))


def test_the_loss_is_at_most_four_a_layer_and_reaches_it_where_all_is_opposite(backbone, images):
    for detector in detectors(backbone):
        stored, *targets = all_items(detector, images)
        for seed in range(3):
            rng = np.random.default_rng(seed)
            random = [rng.normal(size=t.shape).astype(np.float32) for t in targets]
            assert 0 <= evaluated(detector, [stored, *random]) <= 4 * len(targets)
        perfect(detector)
        assert evaluated(detector, [stored, *(-t for t in targets)]) == pytest.approx(4 * len(targets))
        assert detector.maps([stored, *(-t for t in targets)]) == pytest.approx(2 ** len(targets))


def test_the_product_does_not_depend_on_the_order_of_the_layers(backbone, images, rng):
    detector = Stfpm(backbone)
    targets = all_items(detector, images)[1:]
    student = [t + rng.normal(size=t.shape).astype(np.float32) for t in targets]
    order = [2, 0, 1]
    turned = distance_product([student[i] for i in order], [targets[i] for i in order])
    np.testing.assert_allclose(turned, distance_product(student, targets), rtol=1e-12)
    assert turned.shape == (4, 16, 16)  # the finest layer's


def test_a_map_is_the_bilinear_product_of_one_minus_cosine():
    """One layer of a right angle everywhere, one of 0 and 60 degrees in two columns that four are made of."""
    one = np.zeros((1, 4, 4, 2), np.float32)
    one[..., 0] = 3
    other = one[..., ::-1]
    coarse = one[:, :2, :2]
    turned = np.where(np.arange(2)[:, None] == 0, [2.0, 0.0], [1.0, 3**0.5])  # a column each
    turned = np.broadcast_to(turned, (1, 2, 2, 2)).astype(np.float32)
    expected = np.array([0, 0.25, 0.75, 1]) * 0.5  # centres at 0, 1/4, 3/4, 1 between the two columns' own
    found = distance_product([one, coarse], [other, turned])
    np.testing.assert_allclose(found, np.broadcast_to(expected, (1, 4, 4)), atol=1e-6)


def test_paste_is_an_stfpm_whose_first_layers_are_the_teachers(backbone, images, rng):
    stfpm, paste = detectors(backbone)
    network = paste.network
    network = network.with_values(
        {n: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32) for n, a in network.parameters.items()},
        {n: rng.uniform(0.5, 2, a.shape).astype(np.float32) for n, a in network.statistics.items()},
    )
    paste.network = network
    perfect(stfpm)
    whole = stfpm.network
    stfpm.network = whole.with_values(
        {**whole.parameters, **network.parameters}, {**whole.statistics, **network.statistics}
    )
    one, other = all_items(stfpm, images), all_items(paste, images)
    assert evaluated(stfpm, one) == pytest.approx(evaluated(paste, other), abs=1e-6)
    np.testing.assert_allclose(stfpm.maps(one), paste.maps(other), atol=1e-6)


def test_counts_are_those_of_teacher_and_tail(backbone):
    """The trunk is in the network once: B + (B - B_k) multiply-accumulates, parameters of the teacher and of the tail."""
    shared, layers = student_layers(backbone)
    paste = Paste(backbone, layers, shared)
    teacher = truncate(backbone, layers)
    whole, first = teacher.macs(), truncate(teacher, [shared]).macs()
    graph = paste.graph()
    assert graph.macs() == whole + (whole - first)
    norms = sum(len(a) for a in paste.network.statistics.values()) // 2  # scale and offset become one bias
    trained = sum(a.size for a in paste.network.parameters.values())
    assert graph.parameters() == teacher.parameters() + trained - norms
    assert Stfpm(backbone, layers).graph().macs() == 2 * whole


def test_mobilenet_v2_costs_what_the_paper_counts():
    """PaSTe, MobileNetV2 at 224: 5.112 MiB with the batch norms of both, 337.7 M multiply-accumulates (methods.md, 7)."""
    layers = ["features.7", "features.10", "features.14"]
    paste = Paste(open_backbone("mobilenet-v2", layers, "random").graph_at(224))
    assert paste.shared == "features.6"
    trained = sum(array.size for array in paste.network.parameters.values())
    assert round(4 * (697_792 + trained) / 2**20, 3) == 5.112
    assert round(paste.graph().macs() / 1e6, 1) == 337.7


def test_the_exported_graph_holds_the_same_maps(backbone, images, rng):
    for detector in detectors(backbone):
        network = detector.network
        detector.network = network.with_values(
            network.parameters, {n: rng.uniform(0.5, 2, a.shape).astype(np.float32) for n, a in network.statistics.items()}
        )
        graph = detector.graph()
        half = len(graph.outputs) // 2
        assert graph.outputs[half:] == list(detector.layers)
        found = OnnxEngine(to_onnx(graph).SerializeToString()).features(images)
        expected = detector.maps(all_items(detector, images))
        np.testing.assert_allclose(distance_product(found[:half], found[half:]), expected, atol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_frozen_parts_as_they_are(backbone, images):
    for detector in detectors(backbone):
        frozen = [graph for graph in (detector.teacher, detector.trunk, detector.targets) if graph is not None]
        before = [{name: array.tobytes() for name, array in graph.constants.items()} for graph in frozen]
        items = FrozenItems(detector.trunk, detector.targets, images)
        rows = [array.tobytes() for array in items.take(EVERYTHING)]
        first = detector.network
        untouched = {name: array.tobytes() for name, array in first.parameters.items()}
        trained = train(detector, items, None, replace(detector.recipe, batch=2, epochs=8))
        assert trained.history[-1].loss < 0.8 * trained.history[0].loss
        assert before == [{name: array.tobytes() for name, array in graph.constants.items()} for graph in frozen]
        assert [array.tobytes() for array in items.take(EVERYTHING)] == rows
        assert {name: array.tobytes() for name, array in first.parameters.items()} == untouched
        changed = trained.network.parameters
        assert set(changed) == set(untouched)
        assert all(changed[name].tobytes() != untouched[name] for name in changed)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_train(backbone, images, count):
    detector = Paste(backbone, *student_layers(backbone)[::-1])
    items = FrozenItems(detector.trunk, detector.targets, images[:count])
    trained = train(detector, items, None, replace(detector.recipe, epochs=3))
    assert all(np.isfinite(array).all() for array in trained.network.parameters.values())


def test_training_depends_on_the_seed_alone(backbone, images):
    def result(seed: int) -> dict[str, bytes]:
        detector = Paste(backbone, seed=seed)
        items = FrozenItems(detector.trunk, detector.targets, images)
        train(detector, items, None, replace(detector.recipe, batch=2, epochs=1))
        return {name: array.tobytes() for name, array in detector.arrays().items()}

    assert result(0) == result(0)
    assert result(0) != result(1)


def test_what_was_learnt_can_be_put_back(backbone, images):
    trained = Paste(backbone, seed=1)
    batch = all_items(trained, images)
    train(trained, FrozenItems(trained.trunk, trained.targets, images), None, replace(trained.recipe, epochs=1))
    again = Paste(backbone, seed=2)
    again.restore(trained.arrays())
    np.testing.assert_array_equal(again.maps(batch), trained.maps(batch))


def test_layers_that_go_with_no_student_are_told(backbone):
    with pytest.raises(InputError, match="block4 is not behind block6"):
        Paste(backbone, ["block4", "block9"], "block6")
    with pytest.raises(InputError, match="no layer nowhere"):
        Paste(backbone, ["block4"], "nowhere")
