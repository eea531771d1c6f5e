"""Students: choice of layers, shape, random start, folding, joining. Oracles: the papers' counts and onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.backbones.source import open_backbone
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import truncate
from tinyvad.training.student import fold, join, layer_before, student_layers, student_of, tail

SIZE = 64


def network(name: str, size: int = SIZE, layers: list[str] | None = None, weights: str | None = "random") -> Graph:
    return open_backbone(name, layers, weights).graph_at(size)


def by_onnx(graph: Graph, x: np.ndarray) -> list[np.ndarray]:
    return OnnxEngine(to_onnx(graph).SerializeToString()).features(x)


def unsettled(student, rng):
    """The student with other values in everything that is learnt, statistics included."""
    parameters = {n: (a + 0.3 * rng.normal(size=a.shape)).astype(np.float32) for n, a in student.parameters.items()}
    statistics = {n: rng.uniform(0.5, 2, a.shape).astype(np.float32) for n, a in student.statistics.items()}
    return student.with_values(parameters, statistics)


@pytest.mark.parametrize("size", [96, 150, 224])
@pytest.mark.parametrize(("name", "shared", "layers"), [
    ("mobilenet-v2", "features.6", ["features.7", "features.10", "features.13"]),
    ("mcunet-in3", "block5", ["block6", "block9", "block13"]),
])  # fmt: skip
def test_the_default_layers_are_the_papers_up_to_stride_16(name, shared, layers, size):
    assert student_layers(network(name, size)) == (shared, layers)


def test_default_layers_look_at_nothing_behind_stride_16():
    whole = network("mobilenet-v2", layers=["features.3", "features.17"])
    assert student_layers(whole) == ("features.6", ["features.7", "features.10", "features.13"])


@pytest.mark.parametrize("name", ["mcunet-in1", "phinet-mcu", "mobilenet-v3-small", "mobilenet-v2-0.35", "filter-bank"])
def test_default_layers_make_a_student_for_every_backbone(name):
    graph = network(name, weights=None)
    shared, layers = student_layers(graph)
    order = graph.activations
    assert 1 <= len(layers) <= 3
    assert order.index(shared) < order.index(layers[0])
    assert tail(graph, layers, shared).inputs == [shared]


def test_a_network_of_one_block_has_no_default_layers(rng):
    builder = GraphBuilder("one", (1, 8, 8, 3))
    weights = builder.constant("w", rng.normal(size=(4, 1, 1, 3)).astype(np.float32))
    bias = builder.constant("b", np.zeros(4, np.float32))
    geometry = {"stride": (4, 4), "pads": (0, 0, 0, 0), "dilation": (1, 1)}
    graph = builder.finish([builder.add("conv2d", [builder.input, weights, bias], "end", **geometry)])
    with pytest.raises(InputError, match=r"1 block ends up to stride 16.*--shared"):
        student_layers(graph)
    with pytest.raises(InputError, match="nothing to share; tap deeper"):
        layer_before(graph, ["end"])


def test_the_layer_before_is_the_last_block_end_in_front_of_all_taps():
    graph = network("mobilenet-v2", layers=["features.7", "features.10", "features.14"])
    assert layer_before(graph, ["features.10", "features.7", "features.14"]) == "features.6"


def test_a_student_has_the_papers_number_of_parameters(rng):
    """MobileNetV2, taps 7, 10, 14: 697,792 values with the batch norms' (methods.md), of which 55,488 up to block 6."""
    layers = ["features.7", "features.10", "features.14"]
    graph = network("mobilenet-v2", layers=layers)
    for start, expected in ((None, 697_792), ("features.6", 697_792 - 55_488)):
        student = student_of(graph, layers, start, rng)
        assert sum(array.size for array in student.parameters.values()) == expected
        assert student.graph.inputs == [start or graph.inputs[0]]
        assert student.graph.outputs == layers


def test_every_convolution_gets_a_batch_norm_that_carries_its_activation(rng):
    teacher = network("mobilenet-v2-0.35")
    student = student_of(teacher, teacher.outputs, None, rng).graph
    for node in teacher.nodes:
        if node.op == "add":
            continue
        norm = student.producer(node.output)
        conv = student.producer(norm.inputs[0])
        assert (norm.op, conv.op) == ("batch_norm", node.op)
        assert norm.attributes["activation"] == node.attributes["activation"]
        assert conv.attributes == {**node.attributes, "activation": "none"}
        assert not student.constants[conv.inputs[2]].any()


def test_the_start_is_torchvisions(rng):
    teacher = network("mobilenet-v2")
    student = student_of(teacher, teacher.outputs, None, rng)
    for node in student.graph.nodes:
        if node.op not in ("conv2d", "depthwise_conv2d"):
            continue
        weights = student.parameters[node.inputs[1]]
        outputs = weights.shape[0] if node.op == "conv2d" else weights.shape[3]
        spread = np.sqrt(2 / (outputs * weights.shape[1] * weights.shape[2]))
        error = 1 / np.sqrt(2 * weights.size)  # of a spread estimated from so many values, relative
        assert abs(weights.std() / spread - 1) < 6 * error
    for name, array in {**student.parameters, **student.statistics}.items():
        if name.endswith(("/scale", ".variance")):
            assert np.all(array == 1)
        if name.endswith(("/offset", ".mean")):
            assert np.all(array == 0)


def test_the_start_depends_on_the_seed_alone():
    teacher = network("mcunet-in1")
    one, same, other = (student_of(teacher, teacher.outputs, None, np.random.default_rng(s)).parameters for s in (3, 3, 4))
    weights = [name for name in one if name.endswith("/weights")]
    assert all(one[name].tobytes() == same[name].tobytes() for name in one)
    assert all(one[name].tobytes() != other[name].tobytes() for name in weights)


def test_gates_keep_a_bias_and_start_half_open(rng):
    teacher = network("mobilenet-v3-small", weights=None)
    student = student_of(teacher, teacher.outputs, None, rng)
    shapes = {name: tensor.shape for name, tensor in student.graph.tensors.items()}
    gates = [node for node in student.graph.nodes if node.op == "conv2d" and shapes[node.output][1:3] == (1, 1)]
    assert len(gates) == 12  # two in each of six blocks
    for node in gates:
        bias = student.parameters[node.inputs[2]]
        assert np.all(bias == (3 if node.attributes["activation"] == "relu6" else 0))


@pytest.mark.parametrize("name", ["mcunet-in1", "mobilenet-v3-small", "phinet-mcu"])
def test_fold_equals_forward_in_evaluation_and_onnxruntime(name, rng):
    forward = pytest.importorskip("tinyvad.training.forward")
    teacher = network(name, weights=None)
    shared, layers = student_layers(teacher)
    for start in (None, shared):
        student = unsettled(student_of(teacher, layers, start, rng), rng)
        folded = fold(student)
        assert all(node.op != "batch_norm" for node in folded.nodes)
        x = rng.normal(size=(2, *student.graph.tensors[student.graph.inputs[0]].shape[1:])).astype(np.float32)
        own, same = forward.run(student.graph, student.parameters, student.statistics, [x], train=False)
        assert same == student.statistics
        for a, b in zip(own, by_onnx(folded, x), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_join_gives_the_students_and_the_teachers_maps(rng):
    teacher = network("mcunet-in1", weights=None)
    shared, layers = student_layers(teacher)
    teacher = truncate(teacher, layers)
    student = fold(unsettled(student_of(teacher, layers, shared, rng), rng))
    joined = join(teacher, student)
    assert joined.outputs == [*(f"student/{name}" for name in layers), *layers]
    assert joined.parameters() == teacher.parameters() + student.parameters()
    assert joined.macs() == teacher.macs() + student.macs()
    x = rng.normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    h = by_onnx(truncate(teacher, [shared]), x)[0]
    expected = [*by_onnx(student, np.ascontiguousarray(h)), *by_onnx(teacher, x)]
    for a, b in zip(by_onnx(joined, x), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_joining_leaves_both_graphs_as_they_were(rng):
    teacher = network("mcunet-in1")
    student = fold(student_of(teacher, teacher.outputs, None, rng))
    before = [(list(g.nodes), sorted(g.tensors), sorted(g.constants), list(g.outputs)) for g in (teacher, student)]
    join(teacher, student)
    assert before == [(list(g.nodes), sorted(g.tensors), sorted(g.constants), list(g.outputs)) for g in (teacher, student)]


def test_a_student_of_another_network_cannot_be_joined(rng):
    teacher, other = network("mcunet-in1"), network("mobilenet-v2-0.35")
    with pytest.raises(InputError, match=r"does not make features\.3"):
        join(teacher, fold(student_of(other, other.outputs, None, rng)))


def test_tails_start_where_nothing_leads_around():
    graph = network("mobilenet-v2-0.35")
    inside = next(node.inputs for node in graph.nodes if node.op == "add")  # of the first residual block, around ...
    with pytest.raises(InputError, match=r"is read behind .* too"):
        tail(graph, ["features.13"], graph.producer(inside[1]).inputs[0])  # ... its depthwise part
    with pytest.raises(InputError, match=r"features\.3 is not behind features\.6"):
        tail(graph, ["features.3", "features.13"], "features.6")
    with pytest.raises(InputError, match="no layer nothing"):
        tail(graph, ["features.13"], "nothing")
