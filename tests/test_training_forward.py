"""A whole Graph: against the float engine in evaluation, against central differences in training."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("autograd", reason="training needs autograd: pip install 'tinyvad[train]'")

from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.training import blocks, forward, losses, ops
from tinyvad.training.network import EPSILON, MOMENTUM, Network
from tinyvad.training.optimisers import SGD
from tinyvad.training.tape import value_and_gradients

SAME = {"dilation": (1, 1), "activation": "none"}


class Small:
    """Builds a network like MCUNet's blocks: convolutions without bias, each with a batch norm behind it."""

    def __init__(self, size: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.builder = GraphBuilder("small", (1, size, size, 3), "image")
        self.statistics: dict[str, np.ndarray] = {}

    def constant(self, name: str, values: np.ndarray) -> str:
        return self.builder.constant(name, values.astype(np.float32))

    def conv(self, x: str, name: str, out: int, kernel: int, stride: int = 1, activation: str = "relu6") -> str:
        """A dense convolution to ``out`` channels, or a depthwise one where ``out`` is 0."""
        channels = self.builder.shape(x)[3]
        shape = (out or 1, kernel, kernel, channels)
        fan = np.prod(shape[1:] if out else shape[1:3])
        weights = self.constant(f"{name}/w", self.rng.normal(size=shape) / np.sqrt(fan))
        out, op = out or channels, "conv2d" if out else "depthwise_conv2d"
        zeros = self.constant(f"{name}/zeros", np.zeros(out))
        settings = {"stride": (stride, stride), "pads": (kernel // 2,) * 4, **SAME}
        linear = self.builder.add(op, [x, weights, zeros], f"{name}/linear", **settings)
        scale = self.constant(f"{name}/scale", self.rng.uniform(0.5, 2, out))
        offset = self.constant(f"{name}/offset", self.rng.normal(size=out))
        self.statistics[f"{name}.mean"] = self.rng.normal(size=out).astype(np.float32) * 0.1
        self.statistics[f"{name}.variance"] = self.rng.uniform(0.5, 2, out).astype(np.float32)
        return self.builder.add("batch_norm", [linear, scale, offset], name, activation=activation)

    def block(self, x: str, name: str, wide: int, out: int, kernel: int, stride: int = 1) -> str:
        y = self.conv(x, f"{name}/expand", wide, 1)
        y = self.conv(y, f"{name}/depth", 0, kernel, stride)
        y = self.conv(y, f"{name}/project", out, 1, activation="none")
        same = self.builder.shape(y) == self.builder.shape(x)
        return self.builder.add("add", [x, y], name, activation="none") if same else y


def mcunet_like(size: int = 20, seed: int = 3) -> Network:
    net = Small(size, seed)
    x = net.conv("image", "stem", 8, 3, 2)
    x = net.block(x, "a", 20, 8, 5)
    b = net.block(x, "b", 36, 12, 3, 2)
    c = net.block(b, "c", 24, 12, 7)
    parameters = {name: array for name, array in net.builder.graph.constants.items() if not name.endswith("/zeros")}
    return Network(net.builder.finish([x, c, b]), parameters, net.statistics)


def with_every_op(size: int = 12) -> Network:
    """The operations that MCUNet lacks, in one chain."""
    net = Small(size, 5)
    add, rng = net.builder.add, net.rng
    x = net.conv("image", "stem", 6, 3, 1, "relu")
    x = add("hard_swish", [x], "swish")
    pooled = add("average_pool", [x], "average", kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1), count_include_pad=False)
    largest = add("max_pool", [x], "largest", kernel=(2, 2), stride=(2, 2), pads=(0, 0, 0, 0), activation="none")
    x = add("concat", [pooled, largest], "both", axis=3)
    gate = add("mean", [x], "mean")
    squeeze = net.constant("squeeze/w", rng.normal(size=(12, 1, 1, 12)))
    bias = net.constant("squeeze/b", rng.normal(size=12))
    one = {"stride": (1, 1), "pads": (0, 0, 0, 0), **SAME}
    gate = add("conv2d", [gate, squeeze, bias], "squeeze", **{**one, "activation": "relu"})
    gate = add("logistic", [gate], "gate")
    x = add("mul", [x, gate], "gated", activation="none")
    x = add("pad", [x], "padded", pads=(1, 0, 0, 1))
    x = add("resize_nearest", [x], "resized", size=(9, 10))
    flat = add("reshape", [x], "flat", shape=(1, 9 * 10 * 12))
    weights = net.constant("head/w", rng.normal(size=(4, 9 * 10 * 12)) / 30)
    head = add("fully_connected", [flat, weights, net.constant("head/b", rng.normal(size=4))], "head", activation="relu")
    parameters = {name: array for name, array in net.builder.graph.constants.items() if not name.endswith("/zeros")}
    return Network(net.builder.finish([x, head]), parameters, net.statistics)


def as_plain(network: Network) -> Graph:
    """Batch norms as the rest of tinyvad knows them, y = x * scale + offset, by the running statistics."""
    graph = network.graph.copy(constants=dict(network.graph.constants))
    for node in graph.nodes:
        if node.op == "batch_norm":
            scale, offset = (graph.constants[name].astype(np.float64) for name in node.inputs[1:])
            mean, variance = (network.statistics[f"{node.output}.{what}"] for what in ("mean", "variance"))
            factor = scale / np.sqrt(variance.astype(np.float64) + EPSILON)
            graph.constants[node.inputs[1]] = factor.astype(np.float32)
            graph.constants[node.inputs[2]] = (offset - mean * factor).astype(np.float32)
    return graph


@pytest.mark.parametrize("network", [mcunet_like(), with_every_op()], ids=["mcunet-like", "every op"])
def test_evaluation_is_the_float_engine_of_the_folded_graph(rng, network):
    from tinyvad.graph.passes import normalise

    images = rng.normal(size=(3, *network.graph.tensors["image"].shape[1:])).astype(np.float32)
    outputs, statistics = forward.run(network.graph, network.parameters, network.statistics, [images], train=False)
    expected = OnnxEngine(to_onnx(normalise(as_plain(network))).SerializeToString()).features(images)
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))
        assert ours.dtype == np.float32
    assert all(statistics[name] is array for name, array in network.statistics.items())


def test_an_image_does_not_depend_on_its_batch(rng):
    network = mcunet_like()
    images = rng.normal(size=(3, 20, 20, 3)).astype(np.float32)
    together, _ = forward.run(network.graph, network.parameters, network.statistics, [images], train=False)
    for i in range(3):
        alone, _ = forward.run(network.graph, network.parameters, network.statistics, [images[i : i + 1]], train=False)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("network", [mcunet_like(12), with_every_op(8)], ids=["mcunet-like", "every op"])
def test_gradients_of_the_whole_network(rng, network, train):
    """One direction over all parameters, and single elements of each, against central differences in float64."""
    parameters = {name: array.astype(np.float64) for name, array in network.parameters.items()}
    statistics = {name: array.astype(np.float64) for name, array in network.statistics.items()}
    images = rng.normal(size=(2, *network.graph.tensors["image"].shape[1:]))
    shapes = [np.shape(y) for y in forward.run(network.graph, parameters, statistics, [images], train)[0]]
    weights = [rng.normal(size=shape) for shape in shapes]

    def loss(values):
        outputs, moved = forward.run(network.graph, values, statistics, [images], train)
        return sum((ops.mul(y, w).sum() for y, w in zip(outputs, weights, strict=True)), 0.0), moved

    _, _, gradients = value_and_gradients(loss, parameters)

    def slope(directions, step=1e-6):
        ends = [
            loss({name: array + sign * step * directions.get(name, 0) for name, array in parameters.items()})[0]
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * step)

    whole = {name: rng.normal(size=array.shape) for name, array in parameters.items()}
    expected = slope(whole, 1e-8)  # short, so that few values pass the corner of a ReLU
    assert sum((gradients[name] * whole[name]).sum() for name in whole) == pytest.approx(expected, rel=1e-4)
    for name, array in parameters.items():
        place = np.unravel_index(rng.integers(array.size), array.shape)
        single = np.zeros(array.shape)
        single[place] = 1
        assert gradients[name][place] == pytest.approx(slope({name: single}), rel=1e-4, abs=1e-5), name


def test_running_statistics_follow_the_batch(rng):
    """PyTorch's rule: a tenth of the batch's mean and unbiased variance."""
    network = mcunet_like()
    images = rng.normal(size=(2, 20, 20, 3)).astype(np.float32)
    _, moved = forward.run(network.graph, network.parameters, network.statistics, [images], train=True)
    linear = ops.conv2d(images, network.parameters["stem/w"], stride=(2, 2), pads=(1, 1, 1, 1)).reshape(-1, 8)
    for what, now in (("mean", linear.mean(0)), ("variance", linear.var(0, ddof=1))):
        expected = (1 - MOMENTUM) * network.statistics[f"stem.{what}"] + MOMENTUM * now
        np.testing.assert_allclose(moved[f"stem.{what}"], expected, rtol=1e-4, atol=1e-6)
    assert set(moved) == set(network.statistics) and all(moved[name].dtype == np.float32 for name in moved)
    assert not any(np.array_equal(moved[name], network.statistics[name]) for name in moved)


def test_frozen_constants_stay_off_the_tape(rng):
    """Only what stands in the parameters is trained; the graph's own constants take the rest's place unchanged."""
    network = mcunet_like()
    images = rng.normal(size=(2, 20, 20, 3)).astype(np.float32)
    chosen = {name: array for name, array in network.parameters.items() if name.startswith("c/")}
    before = {name: array.tobytes() for name, array in network.graph.constants.items()}

    def loss(values):
        outputs, moved = forward.run(network.graph, values, network.statistics, [images], train=True)
        assert not hasattr(outputs[0], "_node") and hasattr(outputs[1], "_node")  # a trunk in front has no tape at all
        return losses.normalised_feature_loss(outputs[1:2], [np.ones(outputs[1].shape, np.float32)]), moved

    _, _, gradients = value_and_gradients(loss, chosen)
    assert set(gradients) == set(chosen) and all(gradient.any() for gradient in gradients.values())
    assert before == {name: array.tobytes() for name, array in network.graph.constants.items()}


def test_training_lowers_the_loss_with_the_same_bytes_on_any_number_of_threads(rng, monkeypatch):
    monkeypatch.setattr(blocks, "WORTH", 0)
    network = mcunet_like(48)
    images = rng.normal(size=(4, 48, 48, 3)).astype(np.float32)
    shapes = [(4, *network.graph.tensors[name].shape[1:]) for name in network.graph.outputs]
    teacher = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    results = []
    for count in (1, 3):
        parameters, statistics, optimiser, history = network.parameters, network.statistics, SGD(0.05, 0.9), []
        with blocks.threads(count):
            for _ in range(4):

                def loss(values, statistics=statistics):
                    outputs, moved = forward.run(network.graph, values, statistics, [images], train=True)
                    return losses.normalised_feature_loss(outputs, teacher), moved

                value, statistics, gradients = value_and_gradients(loss, parameters)
                parameters = optimiser.step(parameters, gradients)
                history.append(value)
        assert history[-1] < history[0]
        results.append((*history, *(array.tobytes() for array in (*parameters.values(), *statistics.values()))))
    assert results[0] == results[1]


def test_wrong_inputs_are_one_line(rng):
    network = mcunet_like()
    images = rng.normal(size=(1, 20, 20, 3)).astype(np.float32)

    def run(inputs=(images,), graph=network.graph, statistics=network.statistics, train=True):
        return forward.run(graph, network.parameters, statistics, list(inputs), train)

    with pytest.raises(InputError, match="takes 1 inputs, not 2"):
        run((images, images))
    with pytest.raises(InputError, match=r"float arrays \(n, 20, 20, 3\), not float32 \(1, 10, 20, 3\)"):
        run((images[:, :10],))
    with pytest.raises(InputError, match="not uint8"):
        run((images.astype(np.uint8),))
    with pytest.raises(InputError, match=r"stem has no statistics stem\.mean"):
        run(statistics={})
    odd = network.graph.copy()
    odd.nodes[0] = odd.nodes[0].replace(op="quantize")
    with pytest.raises(InputError, match="quantize -> stem/linear cannot be trained"):
        run(graph=odd)
    tiny = mcunet_like(2)  # the last map has one position
    with pytest.raises(InputError, match="sees 1 value a channel"):
        forward.run(tiny.graph, tiny.parameters, tiny.statistics, [images[:, :2, :2]], True)
