"""The exact engine against LiteRT's reference kernels, TFLM and a plain integer interpreter: every tensor, every bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import integer_interpreter
import numpy as np
import pytest

from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.int8_weighted import EXACT_SUM_LENGTH
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.fixed_point import quantize_multiplier
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.graph.tflite_import import import_tflite

pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
pytest.importorskip("tflite_micro", reason="needs TFLM")

Scale = tuple[float, int]  # scale, zero point
VALID: dict[str, Any] = {"stride": (1, 1), "pads": (0, 0, 0, 0)}


class Net(GraphBuilder):
    """Builds int8 graphs: every tensor gets its scale as it is added."""

    def __init__(self, shape: tuple[int, ...], scale: Scale) -> None:
        super().__init__("net", shape)
        self.quantize(self.input, scale)

    def quantize(self, name: str, scale: Scale) -> str:
        self.set(name, Quantization.per_tensor(*scale))
        return name

    def set(self, name: str, quantization: Quantization) -> None:
        self.graph.tensors[name] = dataclasses.replace(self.graph.tensors[name], dtype="int8", quantization=quantization)

    def scale(self, name: str) -> Scale:
        quantization = self.graph.tensors[name].quantization
        assert quantization is not None
        return float(quantization.scale[0]), int(quantization.zero_point[0])

    def node(self, op: str, inputs: list[str], scale: Scale | None = None, **attributes: Any) -> str:
        """A node whose output has ``scale``, or its first input's."""
        name = self.add(op, inputs, f"{op}{len(self.graph.nodes)}", **attributes)
        return self.quantize(name, scale or self.scale(inputs[0]))

    def weighted(
        self, op: str, x: str, weights: np.ndarray, bias: np.ndarray, scales: np.ndarray, out: Scale, **attributes: Any
    ) -> str:
        """conv2d, depthwise_conv2d or fully_connected with scales (C,) or (1,)."""
        i, axis = len(self.graph.nodes), None
        if scales.size > 1:
            axis = 3 if op == "depthwise_conv2d" else 0
        w, b = self.constant(f"w{i}", weights.astype(np.int8)), self.constant(f"b{i}", bias.astype(np.int32))
        zeros = np.zeros(scales.size, np.int64)
        self.set(w, Quantization(scales.astype(np.float32), zeros, axis))
        bias_scales = np.float32(self.scale(x)[0]) * scales.astype(np.float32)
        bias_quantization = Quantization(bias_scales, zeros, 0 if axis is not None else None)
        self.graph.tensors[b] = dataclasses.replace(self.graph.tensors[b], quantization=bias_quantization)
        return self.node(op, [x, w, b], out, activation=attributes.pop("activation", "none"), **attributes)

    def int8_constant(self, value: np.ndarray, scale: Scale) -> str:
        return self.quantize(self.constant(f"c{len(self.graph.constants)}", value.astype(np.int8)), scale)


def pick_scale(rng: np.random.Generator, low: float = 1e-3, high: float = 0.5) -> Scale:
    scale = np.float32(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(scale), int(rng.integers(-128, 128))


def all_outputs(graph: Graph) -> Graph:
    """The same graph with every activation but the input as an output, for engines that keep nothing else."""
    return graph.copy(outputs=[node.output for node in graph.nodes])


def assert_exact(graph: Graph, rng: np.random.Generator, litert: bool = True, images: np.ndarray | None = None) -> None:
    """The engine's every tensor equals LiteRT's, TFLM's and the plain interpreter's."""
    model = to_tflite(all_outputs(graph))
    if images is None:
        images = rng.integers(-128, 128, (1, *graph.tensors[graph.inputs[0]].shape[1:])).astype(np.int8)
    read_back = Int8Engine(import_tflite(model), threads=1)
    tflm = dict(zip(read_back.graph.outputs, TflmEngine(model).features(images), strict=True))
    for i, image in enumerate(images):
        found = read_back.all_tensors(image)
        assert list(found) == read_back.graph.activations
        oracles = {"TFLM": {name: maps[i] for name, maps in tflm.items()}}
        oracles["the plain interpreter"] = integer_interpreter.run(read_back.graph, image)
        oracles["the graph before export"] = Int8Engine(graph, threads=1).all_tensors(image)
        if litert:
            oracles["LiteRT"] = LitertEngine(model).all_tensors(image)
        for oracle, wanted in oracles.items():
            assert set(graph.activations) <= set(wanted) | set(graph.inputs)
            for name in set(found) & set(wanted):
                np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{oracle}: {name} of {graph.nodes}")


def weighted_layer(net: Net, op: str, x: str, rng: np.random.Generator, coarser: float = 1.0) -> str:
    """Random weights with scales from tiny to large; the output's scale fits the sums, or is ``coarser`` than that."""
    channels, out = net.shape(x)[-1], int(rng.integers(1, 8))
    kernel = tuple(int(min(k, s)) for k, s in zip(rng.integers(1, 5, 2), net.shape(x)[1:3]))
    count = channels if op == "depthwise_conv2d" else out
    shape: tuple[int, ...] = {
        "conv2d": (out, *kernel, channels),
        "depthwise_conv2d": (1, *kernel, channels),
        "fully_connected": (out, channels),
    }[op]
    scales = np.exp(rng.uniform(np.log(1e-4), np.log(0.05), 1 if rng.random() < 0.3 else count)).astype(np.float32)
    scales *= rng.choice([1, -1], scales.size, p=[0.95, 0.05])  # published files have negative weight scales too
    length = int(np.prod(shape[1:])) // (channels if op == "depthwise_conv2d" else 1)
    unit = net.scale(x)[0] * float(np.abs(scales).max()) * np.sqrt(length) * 40
    attributes: dict[str, Any] = {}
    if op != "fully_connected":
        attributes = {"stride": (1, 1), "pads": tuple(int(p) for p in rng.integers(0, 3, 4))}
        attributes["dilation"] = (1, 1)
        if rng.random() < 0.3 and min(net.shape(x)[1:3]) >= 8:
            attributes["dilation"] = (2, int(rng.integers(1, 3)))
        else:
            attributes["stride"] = tuple(int(s) for s in rng.integers(1, 4, 2))
    return net.weighted(
        op, x, rng.integers(-127, 128, shape), rng.integers(-3000, 3000, count), scales,
        (float(np.float32(unit * coarser * np.exp(rng.uniform(-2, 2)))), int(rng.integers(-128, 128))),
        activation=str(rng.choice(["none", "relu", "relu6"])), **attributes,
    )  # fmt: skip


def pool_layer(net: Net, op: str, x: str, rng: np.random.Generator) -> str:
    """Padding as SAME's or none: TFLite's pools have no other."""
    size, kernel = net.shape(x)[1:3], tuple(int(min(k, s)) for k, s in zip(rng.integers(1, 5, 2), net.shape(x)[1:3]))
    stride = tuple(int(s) for s in rng.integers(1, 3, 2))
    pads: tuple[int, ...] = (0, 0, 0, 0)
    if rng.random() < 0.6:
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(size, stride, kernel)]
        pads = tuple(part for total in totals for part in (total // 2, total - total // 2))
    extra: dict[str, Any] = {"count_include_pad": False} if op == "average_pool" else {}
    activation = str(rng.choice(["none", "relu", "relu6"]))
    return net.node(op, [x], kernel=kernel, stride=stride, pads=pads, activation=activation, **extra)


def random_network(rng: np.random.Generator, length: int = 6) -> Graph:
    """Some ops in a row, on maps of odd sizes and few channels; adds and products join earlier values."""
    net = Net((1, *(int(n) for n in rng.integers(5, 16, 2)), int(rng.integers(1, 6))), pick_scale(rng))
    made = [net.input]
    ops = ["conv2d", "depthwise_conv2d"] * 3 + ["add", "mul", "average_pool", "max_pool", "concat"] * 2
    ops += ["pad", "resize_nearest", "relu", "relu6"]
    for op in [*rng.choice(ops, length).tolist(), str(rng.choice(["mean", "reshape", "conv2d"]))]:
        x = made[-1]
        height, width, channels = net.shape(x)[1:]
        if op in ("conv2d", "depthwise_conv2d"):
            y = weighted_layer(net, op, x, rng)
        elif op in ("average_pool", "max_pool"):
            y = pool_layer(net, op, x, rng)
        elif op in ("add", "mul"):
            same = [name for name in made if net.shape(name) == net.shape(x)]
            other = str(rng.choice(same))
            if op == "mul" and rng.random() < 0.5:
                other = net.int8_constant(rng.integers(-128, 128, (1, 1, 1, channels)), pick_scale(rng))
            a, b = net.scale(x)[0], net.scale(other)[0]
            unit = a * b * 100 if op == "mul" else max(a, b)
            out = (float(np.float32(unit * np.exp(rng.uniform(-1, 2)))), int(rng.integers(-128, 128)))
            y = net.node(op, [x, other], out, activation=str(rng.choice(["none", "relu", "relu6"])))
        elif op == "concat":
            y = net.node(op, [x, net.node("relu6", [x]), x], axis=3)
        elif op == "pad":
            y = net.node(op, [x], pads=tuple(int(p) for p in rng.integers(0, 4, 4)))
        elif op == "resize_nearest":
            y = net.node(op, [x], size=tuple(int(n) for n in rng.integers(1, 20, 2)))
        elif op == "relu":
            y = net.node(op, [x], (float(np.float32(net.scale(x)[0] * rng.uniform(0.3, 3))), int(rng.integers(-128, 128))))
        elif op == "mean":
            y = net.node(op, [x], (float(np.float32(net.scale(x)[0] * rng.uniform(0.1, 2))), int(rng.integers(-128, 128))))
        elif op == "reshape":
            y = net.node(op, [x], shape=(1, width, channels, height))
        else:
            y = net.node(op, [x])
        made.append(y)
    return net.finish([made[-1]])


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_are_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert_exact(random_network(rng), rng)


def test_random_networks_hold_every_op() -> None:
    ops = {node.op for seed in range(40) for node in random_network(np.random.default_rng(seed)).nodes}
    assert ops == {
        "conv2d", "depthwise_conv2d", "add", "mul", "average_pool", "max_pool", "mean", "relu", "relu6", "pad", "concat",
        "reshape", "resize_nearest",
    }  # fmt: skip


def pointwise(net: Net, x: str, out: int, rng: np.random.Generator, activation: str = "none", zero_point: int = 0) -> str:
    """A 1x1 convolution whose sums spread over the output's grid."""
    weights = rng.integers(-127, 128, (out, 1, 1, net.shape(x)[3]))
    grid = (float(np.float32(net.scale(x)[0] * 0.01 * 70 * np.sqrt(weights.shape[3]))), zero_point)
    arguments = (weights, rng.integers(-3000, 3000, out), np.full(out, 0.01), grid)
    return net.weighted("conv2d", x, *arguments, activation=activation, **VALID)


def gated_network(rng: np.random.Generator) -> Graph:
    """Hard-swish, squeeze and excite with both kinds of gate, a product of two maps, a shortcut; maps of one pixel too."""
    net = Net((1, *(int(n) for n in rng.integers(1, 9, 2)), int(rng.integers(1, 6))), pick_scale(rng, 0.01, 0.1))
    x, channels = net.input, net.shape(net.input)[3]
    for _ in range(3):
        scale = net.scale(x)[0]
        wide = float(np.float32(scale * rng.uniform(0.1, 2)))
        y = net.node("hard_swish", [x], (wide, int(rng.integers(-128, 128))))
        z = net.node("mean", [y], (float(np.float32(wide * rng.uniform(0.2, 1))), int(rng.integers(-128, 128))))
        if rng.random() < 0.5:
            z = net.node("hard_swish", [pointwise(net, z, int(rng.integers(1, 6)), rng)])
        else:
            z = pointwise(net, z, int(rng.integers(1, 6)), rng, "relu", -128)
        if rng.random() < 0.5:
            gate = pointwise(net, z, channels, rng, zero_point=int(rng.integers(-99, 99)))
            gate = net.node("logistic", [gate], (1 / 256, -128))
        else:
            gate = pointwise(net, z, channels, rng, "relu6", -128)
        other = gate if rng.random() < 0.8 else x
        unit = float(np.float32(wide * net.scale(other)[0] * rng.uniform(20, 255)))
        activation = str(rng.choice(["none", "relu", "relu6"]))
        y = net.node("mul", [y, other], (unit, int(rng.integers(-128, 128))), activation=activation)
        x = net.node("add", [y, x], (max(unit, scale), int(rng.integers(-60, 60))), activation="none")
    return net.finish([x])


@pytest.mark.parametrize("seed", range(24))
def test_random_gated_networks_are_exact(seed: int) -> None:
    """LiteRT too, where it says so: where the factors of all products and the tables of all logistics agree."""
    rng = np.random.default_rng(seed)
    graph = gated_network(rng)
    litert = LitertEngine(to_tflite(graph)).exact
    images = rng.integers(-128, 128, (2, *graph.tensors[graph.inputs[0]].shape[1:])).astype(np.int8)
    assert_exact(graph, rng, litert=litert, images=images)


def test_random_gated_networks_hold_what_they_should() -> None:
    graphs = [gated_network(np.random.default_rng(seed)) for seed in range(24)]
    assert sum(LitertEngine(to_tflite(graph)).exact for graph in graphs) > 12
    nodes = [(graph, node) for graph in graphs for node in graph.nodes]
    assert {"logistic", "hard_swish", "mul", "mean", "conv2d", "add"} == {node.op for _, node in nodes}
    products = {graph.tensors[node.inputs[1]].shape[1:3] == (1, 1) for graph, node in nodes if node.op == "mul"}
    values = {node.attributes["activation"] for _, node in nodes if node.op == "mul"}
    assert products == {False, True} and values == {"none", "relu", "relu6"}


@pytest.mark.parametrize("op", ["conv2d", "depthwise_conv2d", "fully_connected"])
def test_scales_of_every_size(op: str) -> None:
    """Factors from 1e-7 to 1e2: where all outputs are zero points, and where all are saturated."""
    shifts = []
    for seed, coarser in enumerate(np.exp(np.linspace(-11, 12, 16))):
        rng = np.random.default_rng(seed)
        shape = (1, 7) if op == "fully_connected" else (1, 6, 5, 4)
        net = Net(shape, pick_scale(rng, 0.01, 10))
        graph = net.finish([weighted_layer(net, op, net.input, rng, coarser)])
        assert_exact(graph, rng, litert=op != "fully_connected")
        x, w, y = (graph.tensors[name].quantization for name in (net.input, graph.nodes[0].inputs[1], graph.outputs[0]))
        assert x and w and y
        shifts += [quantize_multiplier(float(x.scale[0]) * float(s) / float(y.scale[0]))[1] for s in w.scale]
    assert max(shifts) > 3 and min(shifts) < -20


def test_sums_longer_than_float32_holds(rng: np.random.Generator) -> None:
    """Products of the largest values, of one sign, in sums of 4 * 1024 + 5 and 3 x 3 x 600: far beyond 2**24."""
    length = 4 * EXACT_SUM_LENGTH + 5
    net = Net((1, length), (0.05, -128))
    weights = np.full((3, length), 127) * np.array([[1], [-1], [1]])
    weights[2] = rng.integers(-127, 128, length)
    bias = np.array([5, -7, 100000])
    graph = net.finish([net.weighted("fully_connected", net.input, weights, bias, np.array([0.01]), (500.0, 3))])
    images = np.stack([np.full(length, 127), rng.integers(-128, 128, length), np.full(length, 126)]).astype(np.int8)
    assert_exact(graph, rng, litert=False, images=images)
    net = Net((1, 5, 5, 600), (0.05, 127))
    weights = rng.integers(-127, 128, (2, 3, 3, 600))
    weights[0] = 127
    graph = net.finish([net.weighted("conv2d", net.input, weights, bias[:2], np.array([0.01, 0.02]), (90.0, 3), **VALID)])
    images = np.stack([np.full((5, 5, 600), -128), rng.integers(-128, 128, (5, 5, 600))]).astype(np.int8)
    assert_exact(graph, rng, images=images)


def test_a_sum_whose_last_bit_float32_would_drop() -> None:
    """16384 * 1024 + 1 is the first integer that float32 lacks: the sum is cut before it gets there."""
    length = EXACT_SUM_LENGTH + 1
    net = Net((1, length), (1.0, 0))
    weights, images = np.full((1, length), -128), np.full((1, length), -128, np.int8)
    weights[0, -1], images[0, -1] = 1, 1
    bias = np.array([-(1 << 24)])
    graph = net.finish([net.weighted("fully_connected", net.input, weights, bias, np.array([1.0]), (1.0, 0))])
    assert Int8Engine(graph).features(images)[0].item() == 1


def test_one_pixel_one_channel(rng: np.random.Generator) -> None:
    net = Net((1, 1, 1, 1), (0.1, 7))
    x = net.weighted(
        "conv2d", net.input, np.array([[[[77]]]]), np.array([9]), np.array([0.01]), (0.05, -3),
        stride=(2, 2), pads=(0, 0, 0, 0),
    )  # fmt: skip
    x = net.node("average_pool", [x], kernel=(1, 1), **VALID)
    x = net.node("mean", [net.node("add", [x, x], (0.1, 2))], (0.2, 4))
    x = net.node("resize_nearest", [net.node("relu", [x], (0.1, -9))], size=(3, 2))
    assert_exact(net.finish([x]), rng, images=np.arange(-128, 128, 9, dtype=np.int8).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("op", ["add", "mul"])
def test_every_pair_of_values(op: str) -> None:
    """All 65536 pairs of int8 values at several scales, the second operand a constant map, then of one column."""
    values = np.arange(-128, 128)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        a, b = pick_scale(rng), pick_scale(rng)
        unit = a[0] * b[0] * 128 if op == "mul" else max(a[0], b[0]) * 2
        out = (float(np.float32(unit * rng.uniform(0.5, 2))), int(rng.integers(-40, 40)))
        net = Net((1, 256, 1, 256), a)
        other = np.broadcast_to(values, (1, 256, 1, 256)) if op == "add" or seed < 3 else values.reshape(1, 1, 1, 256)
        graph = net.finish([net.node(op, [net.input, net.int8_constant(other, b)], out, activation="none")])
        assert_exact(graph, rng, images=np.broadcast_to(values[:, None, None], (1, 256, 1, 256)).astype(np.int8))


# -- ties: where two ways to compute a real factor in float part by one unit in its last place --------------------------


def ties(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int32 sums whose product with each factor lies just above or just below some k + 1/2."""
    k = rng.integers(60, 120, factors.size)
    return np.ceil((k + 0.5) / factors).astype(np.int64) - rng.integers(0, 2, factors.size)


@pytest.mark.parametrize("op", ["conv2d", "depthwise_conv2d", "fully_connected"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_rounding_of_the_factor_of_weighted_ops(op: str, per_channel: bool, rng: np.random.Generator) -> None:
    """Biases alone, on ties: a factor that is off by 3e-8 shows."""
    differing = 0
    for _ in range(8):
        count = 60
        x_scale, out = pick_scale(rng), pick_scale(rng, 1, 10)
        scales = np.exp(rng.uniform(-9, -7, count if per_channel else 1)).astype(np.float32)
        doubles = np.broadcast_to(x_scale[0] * scales.astype(np.float64) / out[0], count)
        singles = np.broadcast_to((np.float32(x_scale[0]) * scales).astype(np.float64) / out[0], count)
        bias = ties(doubles, rng)
        assert bias.max() < 1 << 31
        shape: tuple[int, ...] = {"conv2d": (count, 1, 1, 1), "depthwise_conv2d": (1, 1, 1, count)}.get(op, (count, 1))
        window = {} if op == "fully_connected" else VALID
        channels = count if op == "depthwise_conv2d" else 1
        net = Net((1, channels) if op == "fully_connected" else (1, 1, 1, channels), x_scale)
        y = net.weighted(op, net.input, np.zeros(shape), bias, scales, out, **window)
        image = np.zeros((1, *net.shape(net.input)[1:]), np.int8)
        assert_exact(net.finish([y]), rng, litert=op != "fully_connected", images=image)
        one, other = (
            [int(integer_interpreter.rescaled(b, f)) for b, f in zip(bias, factors)] for factors in (doubles, singles)
        )
        differing += one != other
    assert differing >= 6  # the two ways to multiply the scales can be told apart


PRODUCTS = np.unique(np.outer(np.arange(256), np.arange(256)))


def products_and_factors(op: str, rng: np.random.Generator) -> tuple[list[float], np.ndarray, float, float]:
    """Random float32 scales [inputs..., output], the sums that occur, the factor in double and with a float32 step."""
    if op == "mul":
        a, b = pick_scale(rng)[0], pick_scale(rng)[0]
        out = float(np.float32(a * b * rng.uniform(50, 400)))
        return [a, b, out], PRODUCTS, a * b / out, float(np.float32(a) * np.float32(b)) / out
    a = pick_scale(rng)[0]
    out = float(np.float32(a * rng.uniform(0.6, 3)))
    values = np.arange(256) if op == "relu" else np.arange(127 * 64)
    return [a, out], values, a / out, float(np.float32(a) / np.float32(out))


@pytest.mark.parametrize("op", ["mul", "relu", "mean"])
def test_rounding_of_the_factor_of_other_ops(op: str, rng: np.random.Generator) -> None:
    """Scales are drawn until the two ways to compute the factor give two results for some value, which is then run.

    LiteRT's reference kernels compute those of mul and relu in float32; TFLM, which is followed, all in double.
    (``tests/test_graph_curves.py`` finds out on which grids the two agree.)
    """
    found = 0
    for _ in range(40_000 if op == "relu" else 4000):
        scales, values, double, single = products_and_factors(op, rng)
        if op == "mean":
            n = 64
            one, other = (
                integer_interpreter.shifted(values, (m << 6) // n, s - 6)
                for m, s in map(integer_interpreter.fixed_point, (double, single))
            )
        else:
            one, other = (integer_interpreter.rescaled(values, factor) for factor in (double, single))
        apart = np.flatnonzero((one != other) & (one < 127))
        if not apart.size:
            continue
        found += 1
        value = int(values[apart[0]])
        net = Net((1, 8, 8, 1), (scales[0], -128 if op != "mean" else 0))
        image = np.zeros((1, 8, 8, 1), np.int8)
        if op == "mul":
            factor = next(f for f in range(1, 256) if value % f == 0 and value // f < 256)
            image[:] = value // factor - 128
            constant = net.int8_constant(np.full((1, 1, 1, 1), factor - 128), (scales[1], -128))
            y = net.node(op, [net.input, constant], (scales[2], 0))
        elif op == "relu":
            image[:] = value - 128
            y = net.node(op, [net.input], (scales[1], 0))
        else:
            image.reshape(-1)[:] = value // 64
            image.reshape(-1)[: value % 64] += 1
            y = net.node(op, [net.input], (scales[1], 0))
        assert_exact(net.finish([y]), rng, litert=op == "mean", images=image)
        if found == 5:
            return
    raise AssertionError(f"only {found} cases found")


@pytest.mark.parametrize("op", ["relu6", "add"])
def test_six_on_a_tie(op: str, rng: np.random.Generator) -> None:
    """Scales for which 6 / scale is k + 1/2 in float32 and something else in double."""
    scales = (np.float32(6) / (np.arange(20, 120) + 0.5).astype(np.float32)).astype(np.float32)
    quotients = np.float32(6) / scales
    apart = scales[(quotients % 1 == 0.5) & ((6.0 / scales.astype(np.float64)) % 1 < 0.5)]
    assert len(apart) > 10
    for scale in apart[:10]:
        net = Net((1, 16, 16, 1), (float(scale), -100))
        if op == "relu6":
            y = net.node(op, [net.input])
        else:
            y = net.node(op, [net.input, net.input], activation="relu6")
        image = np.arange(-128, 128, dtype=np.int8).reshape(1, 16, 16, 1)
        assert_exact(net.finish([y]), rng, images=image)


# -- what published networks compute --------------------------------------------------------------------------------------


def without_input_quantize(graph: Graph) -> Graph:
    """The graph behind its first quantize op, whose int8 output becomes the input."""
    first = graph.nodes[0]
    if first.op != "quantize":
        return graph
    return graph.copy(inputs=[first.output], nodes=graph.nodes[1:])


def supported_graph(path: Path) -> Graph:
    """The longest front part of the file that the engine runs."""
    operators = read_tflite(path)
    for operator in reversed(operators.operators):
        name = operators.tensors[operator.outputs[0]].name
        try:
            graph = without_input_quantize(import_tflite(path, outputs=[name]))
            Int8Engine(graph)
            return graph
        except InputError:
            continue
    raise AssertionError(f"the engine runs nothing of {path.name}")


@pytest.mark.parametrize(
    ("file", "images", "most_of"),
    [
        ("mcunet_in3_imagenet_int8.tflite", 2, 122),
        ("mcunet_in4_imagenet_int8.tflite", 1, 114),
        ("mobilenet_v2_1.0_imagenet_ptq.tflite", 1, 64),
        ("zoo/ml_kws.tflite", 2, 12),
        ("zoo/ml_vww96.tflite", 2, 30),
        ("zoo/te_vww.tflite", 1, 50),
    ],
)
def test_published_networks_are_exact(
    shared: Path, rng: np.random.Generator, file: str, images: int, most_of: int
) -> None:
    path = shared / "weights" / file
    if not path.exists():
        pytest.skip(f"needs {file}")
    graph = supported_graph(path)
    assert len(graph.nodes) >= most_of
    engine, litert = Int8Engine(graph), LitertEngine(path)
    source = litert.file.tensors[litert.file.inputs[0]]
    for _ in range(images):
        pixels = rng.integers(0, 256, source.shape[1:])
        image = (pixels / 255).astype(np.float32) if source.dtype == "float32" else (
            pixels.astype(np.uint8) if source.dtype == "uint8" else (pixels - 128).astype(np.int8)
        )  # fmt: skip
        wanted = litert.all_tensors(image)
        found = engine.all_tensors(wanted[graph.inputs[0]])
        compared = [name for name in found if name in wanted]
        assert len(compared) >= most_of
        for name in compared:
            if graph.producer(name) and graph.producer(name).op == "fully_connected":  # type: ignore[union-attr]
                break  # LiteRT rounds once there, TFLM twice
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("file", ["mcunet_in3_imagenet_int8.tflite", "zoo/ml_kws.tflite"])
def test_published_networks_equal_tflm(shared: Path, rng: np.random.Generator, file: str) -> None:
    """Through the fully connected layer, where there is one; the softmax behind it is cut off by the export."""
    path = shared / "weights" / file
    if not path.exists():
        pytest.skip(f"needs {file}")
    graph = supported_graph(path)
    images = rng.integers(-128, 128, (1, *graph.tensors[graph.inputs[0]].shape[1:])).astype(np.int8)
    np.testing.assert_array_equal(Int8Engine(graph).features(images), TflmEngine(to_tflite(graph)).features(images))


# -- the engine's manners -------------------------------------------------------------------------------------------------


def two_taps(rng: np.random.Generator) -> Graph:
    net = Net((1, 9, 8, 3), (0.1, -5))
    a = weighted_layer(net, "conv2d", net.input, rng)
    b = weighted_layer(net, "conv2d", a, rng)
    weighted_layer(net, "depthwise_conv2d", b, rng)
    return net.finish([b, a])


def test_taps_come_in_the_graphs_order_whatever_the_threads(rng: np.random.Generator) -> None:
    graph = two_taps(rng)
    images = rng.integers(-128, 128, (7, 9, 8, 3)).astype(np.int8)
    alone = [Int8Engine(graph, 1).all_tensors(image) for image in images]
    for threads in (1, 2, 5):
        maps = Int8Engine(graph, threads).features(images)
        assert [m.dtype.name for m in maps] == ["int8", "int8"]
        for name, found in zip(graph.outputs, maps, strict=True):
            np.testing.assert_array_equal(found, np.stack([values[name] for values in alone]))


def test_images_are_not_changed_and_may_be_views(rng: np.random.Generator) -> None:
    graph = two_taps(rng)
    wide = rng.integers(-128, 128, (2, 9, 16, 3)).astype(np.int8)
    view = wide[:, :, ::2]
    view.setflags(write=False)
    kept = view.copy()
    np.testing.assert_array_equal(Int8Engine(graph).features(view)[0], Int8Engine(graph).features(kept)[0])
    np.testing.assert_array_equal(view, kept)


def test_a_tap_may_be_the_input(rng: np.random.Generator) -> None:
    graph = two_taps(rng)
    images = rng.integers(-128, 128, (2, 9, 8, 3)).astype(np.int8)
    first, _ = Int8Engine(graph.copy(outputs=["input", graph.outputs[0]])).features(images)
    np.testing.assert_array_equal(first, images)


def test_wrong_images_are_refused(rng: np.random.Generator) -> None:
    engine = Int8Engine(two_taps(rng))
    for images in (np.zeros((1, 9, 9, 3), np.int8), np.zeros((1, 9, 8, 3), np.uint8), np.zeros((0, 9, 8, 3), np.int8)):
        with pytest.raises(InputError, match=r"takes int8 images of \(9, 8, 3\), not u?int8 \(\d, 9, \d, 3\)"):
            engine.features(images)
    with pytest.raises(InputError, match="takes int8 images"):
        engine.all_tensors(np.zeros((9, 9, 3), np.int8))


def refused(graph: Graph, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        Int8Engine(graph)
    assert "\n" not in str(caught.value)


def test_graphs_that_cannot_be_exact_are_refused(rng: np.random.Generator) -> None:
    net = Net((1, 4, 4, 2), (0.1, 0))
    refused(net.finish([net.node("dequantize", [net.input])]), "the int8 engine has no dequantize .*tap an earlier layer")

    net = Net((1, 4, 4, 2), (0.1, 0))
    refused(net.finish([net.node("logistic", [net.input])]), "logistic0: int8 output must have scale 1/256 and zero")

    net = Net((1, 4, 4, 2), (0.1, 0))
    refused(net.finish([net.node("hard_swish", [net.input], (1e-4, 0))]), "hard_swish -> hard_swish0: .* 16 bits")

    float_net = GraphBuilder("f", (1, 4, 4, 2))
    refused(float_net.finish([float_net.add("pad", [float_net.input], "y", pads=(1, 1, 1, 1))]), "y is not quantised")

    net = Net((1, 4, 4, 2), (0.1, 0))
    refused(net.finish([net.node("pad", [net.input], (0.2, 0), pads=(1, 1, 1, 1))]), "must have the output's scale")

    net = Net((1, 4, 4, 2), (0.1, 0))
    y = net.node("average_pool", [net.input], kernel=(2, 2), stride=(1, 1), pads=(1, 0, 1, 0), count_include_pad=True)
    refused(net.finish([y]), "padding that counts")

    net = Net((1, 4, 4, 2), (0.1, 0))
    y = net.node("max_pool", [net.input], kernel=(2, 2), stride=(1, 1), pads=(2, 0, 0, 0))
    refused(net.finish([y]), "2x2 windows outside the map")

    net = Net((1, 30, 30, 1), (0.1, 0))
    y = net.weighted(
        "depthwise_conv2d", net.input, np.ones((1, 29, 29, 1)), np.zeros(1), np.array([0.1]), (0.1, 0), **VALID
    )
    refused(net.finish([y]), "29x29 values is not exact")

    net = Net((1, 4, 4, 2), (0.1, 0))
    net.graph.tensors["input"] = dataclasses.replace(net.graph.tensors["input"], dtype="uint8")
    y = net.node("relu6", [net.input], (0.1, 0))
    refused(net.finish([y]), "input is uint8")


@pytest.mark.parametrize("scale", [0.0, float("nan"), -0.1])
def test_scales_must_be_positive(scale: float) -> None:
    net = Net((1, 4, 4, 2), (0.1, 0))
    refused(net.finish([net.node("add", [net.input, net.input], (scale, 0))]), "add0 has scale .*positive and finite")


def test_sums_that_leave_32_bits_are_refused() -> None:
    """Where TFLite's int32 would overflow the device's result is undefined, so nothing could be exact."""

    def layer(bias: int, out_scale: float) -> Graph:
        net = Net((1, 1, 1, 1), (1.0, 0))
        inputs = np.array([[[[100]]]]), np.array([bias]), np.array([1.0])
        return net.finish([net.weighted("conv2d", net.input, *inputs, (out_scale, 0), **VALID)])

    most = (1 << 31) - 1 - 100 * 128
    Int8Engine(layer(most, 2.0**20))
    refused(layer(most + 1, 2.0**20), f"sums can reach {1 << 31}, beyond int32")
    refused(layer((1 << 27) - 100 * 128, 2.0**-4), "beyond int32")  # factor 16 = 2**5 / 2: a left shift of 5
    Int8Engine(layer((1 << 26) - 100 * 128 - 1, 2.0**-4))
    for op, operands in (("add", 2), ("mul", 2), ("mean", 1), ("relu", 1)):
        net = Net((1, 8, 8, 1), (1e6, 0))
        refused(net.finish([net.node(op, [net.input] * operands, (1e-9, 0))]), f"{op} -> {op}0: its scale .* too fine")
