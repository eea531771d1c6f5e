"""The grids of activations around gates and curves: agreement of the kernels, cut ranges, fixed grids, dead tensors.

Ranges, margins and shared grids in general: ``tests/test_graph_quantize.py``.
"""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.graph.agreement import logistic_agrees, mul_agrees, relu_agrees
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.grids import ChannelStatistics, activation_grids, affine_range
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.quantize import quantize

INPUT = affine_range(-1.0, 1.0)
CHANNELS = 4


def conv(b: GraphBuilder, x: str, name: str, activation: str = "none") -> str:
    rng = np.random.default_rng(len(b.graph.nodes))
    weights = rng.normal(0, 1, (CHANNELS, 1, 1, b.shape(x)[3])).astype(np.float32)
    names = [b.constant(f"{name}.w", weights), b.constant(f"{name}.b", np.zeros(CHANNELS, np.float32))]
    return b.add("conv2d", [x, *names], name, stride=(1, 1), pads=(0, 0, 0, 0), activation=activation)


def grids(graph: Graph, **ranges: tuple[float, float]) -> dict[str, Quantization]:
    """The grid of each activation; those that are not given were seen between -1 and 1."""
    statistics = {}
    for name in graph.activations:
        low, high = ranges.get(name, (-1.0, 1.0))
        channels = graph.tensors[name].shape[-1]
        statistics[name] = ChannelStatistics(np.full(channels, low), np.full(channels, high), np.zeros(channels))
    return activation_grids(graph, statistics, INPUT)


def ends(grid: Quantization) -> tuple[float, float]:
    scale, zero_point = float(grid.scale[0]), int(grid.zero_point[0])
    return scale * (-128 - zero_point), scale * (127 - zero_point)


def net() -> GraphBuilder:
    return GraphBuilder("net", (1, 4, 4, 3))


# --- agreement ---


def test_products_are_nudged_until_both_kernels_agree(rng: np.random.Generator) -> None:
    """Ranges are drawn until their plain grids disagree; the grid then grows by a few tenths of a percent."""
    b = net()
    x, gate = conv(b, b.input, "x"), conv(b, b.input, "gate", "relu6")
    graph = b.finish([conv(b, b.add("mul", [x, gate], "y", activation="none"), "end")])
    found = 0
    for _ in range(2000):
        ranges = {"x": (-rng.uniform(1, 5), rng.uniform(1, 5)), "gate": (0, rng.uniform(2, 4))}
        ranges["y"] = (-3, rng.uniform(1, 9))
        plain = [affine_range(*ranges["x"]), affine_range(0, 1.5 * ranges["gate"][1]), affine_range(*ranges["y"])]
        if mul_agrees(*plain):
            continue
        chosen = grids(graph, **ranges)
        np.testing.assert_array_equal(chosen["gate"].scale, plain[1].scale)
        assert mul_agrees(chosen["x"], chosen["gate"], chosen["y"])
        assert 1 < chosen["y"].scale[0] / plain[2].scale[0] < 1.02
        low, high = ends(chosen["y"])
        assert low <= ranges["y"][0] + chosen["y"].scale[0] / 2 and high >= ranges["y"][1] - chosen["y"].scale[0] / 2
        found += 1
        if found == 3:
            return
    raise AssertionError(f"only {found} found")


def test_products_that_share_a_grid_all_agree(rng: np.random.Generator) -> None:
    b = net()
    parts = []
    for i in range(4):
        x, gate = conv(b, b.input, f"x{i}"), conv(b, b.input, f"gate{i}", "relu6")
        parts.append(b.add("mul", [x, gate], f"y{i}", activation="none"))
    graph = b.finish([conv(b, b.add("concat", parts, "all", axis=3), "end")])
    for _ in range(30):
        ranges = {f"x{i}": (-rng.uniform(1, 5), rng.uniform(1, 5)) for i in range(4)}
        chosen = grids(graph, **ranges, **{f"gate{i}": (0.0, rng.uniform(1, 4)) for i in range(4)})
        assert len({float(chosen[name].scale[0]) for name in (*parts, "all")}) == 1
        assert all(mul_agrees(chosen[f"x{i}"], chosen[f"gate{i}"], chosen[f"y{i}"]) for i in range(4))


def test_relu_and_logistic_are_nudged() -> None:
    """Two of the grids on which LiteRT and TFLM are known to differ (``tests/test_graph_curves.py``)."""
    b = net()
    x = conv(b, b.input, "x")
    graph = b.finish([b.add("relu", [x], "y"), x])
    into, out = 0.037044573575258255, 0.025007419288158417
    ranges = {"x": (0.0, into * 255 / 1.25), "y": (0.0, out * 255 / 1.25)}  # taps have a margin of 1.25
    assert not relu_agrees(affine_range(0, into * 255), affine_range(0, out * 255))
    chosen = grids(graph, **ranges)
    assert relu_agrees(chosen["x"], chosen["y"]) and 1 < chosen["y"].scale[0] / out < 1.01

    b = net()
    graph = b.finish([b.add("logistic", [conv(b, b.input, "x")], "y")])
    low, high = ((q + 86) * 0.03466019034385681 for q in (-128, 127))
    assert not logistic_agrees(affine_range(low, high))
    chosen = grids(graph, x=(low, high))
    assert logistic_agrees(chosen["x"]) and 1 < chosen["x"].scale[0] / 0.03466019 < 1.01
    assert int(chosen["x"].zero_point[0]) == -86


# --- ranges ---


def test_what_only_a_curve_reads_is_cut_where_it_is_flat() -> None:
    b = net()
    x, y, z, t = (conv(b, b.input, name) for name in "xyzt")
    curves = [b.add("hard_swish", [name], f"{name}.hs") for name in (x, y, t)]
    other = b.add("add", [y, y], "sum", activation="none")  # y is read by a hard-swish and an add
    graph = b.finish([*curves, b.add("logistic", [z], "z.sigmoid"), other, t])
    chosen = grids(graph, x=(-9.0, 5.0), y=(-9.0, 5.0), z=(-20.0, 30.0), t=(-9.0, 5.0))
    assert ends(chosen["x"]) == pytest.approx((-3, 5), abs=0.02)
    assert ends(chosen["y"]) == pytest.approx((-9, 5), abs=0.03)
    assert ends(chosen["z"]) == pytest.approx((-8, 8), abs=0.1)
    assert ends(chosen["t"]) == pytest.approx((-9 * 1.25, 5 * 1.25), abs=0.05)  # a tap


def test_hard_swish_makes_nothing_below_three_eighths() -> None:
    b = net()
    y = b.add("hard_swish", [conv(b, b.input, "x")], "y")
    tapped = grids(b.finish([y]), x=(-2.0, 3.0), y=(-0.37, 2.8))
    assert ends(tapped["y"]) == pytest.approx((-0.375, 3.5), abs=0.008)


def test_a_product_with_relu6_ends_at_six() -> None:
    b = net()
    x, gate = conv(b, b.input, "x"), conv(b, b.input, "gate", "relu6")
    graph = b.finish([conv(b, b.add("mul", [x, gate], "y", activation="relu6"), "end")])
    assert ends(grids(graph, gate=(0.0, 3.0), y=(0.0, 5.5))["y"]) == pytest.approx((0, 6), abs=0.05)


def test_a_product_with_a_constant_agrees() -> None:
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
    b = net()
    factors = b.constant("k", np.array([0.3, -0.7, 1.1], np.float32).reshape(1, 1, 1, 3))
    graph = b.finish([b.add("mul", [b.input, factors], "y", activation="none")])
    model = to_tflite(quantize(graph, {"y": ChannelStatistics(np.full(3, -1.2), np.full(3, 1.3), np.zeros(3))}, INPUT))
    assert LitertEngine(model).exact


# --- fixed grids ---


def test_a_logistic_has_its_own_grid_and_what_copies_it_too() -> None:
    b = net()
    one, two = (b.add("logistic", [conv(b, b.input, f"x{i}")], f"s{i}") for i in range(2))
    window = {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}
    pooled = b.add("max_pool", [b.add("concat", [one, two], "all", axis=3)], "pooled", **window)
    chosen = grids(b.finish([pooled]))
    for name in (one, two, "pooled"):
        assert (float(chosen[name].scale[0]), int(chosen[name].zero_point[0])) == (1 / 256, -128)


def test_a_concat_of_a_logistic_with_something_else_is_refused() -> None:
    b = net()
    gate = b.add("logistic", [conv(b, b.input, "x")], "gate")
    graph = b.finish([b.add("concat", [gate, conv(b, b.input, "z")], "all", axis=3)])
    with pytest.raises(InputError, match="must share the int8 grid of logistic -> gate with it; tap an earlier layer"):
        grids(graph)
    b = net()
    gate = b.add("logistic", [b.input], "gate")
    with pytest.raises(InputError, match="must share the int8 grid of the network's input with it"):
        grids(b.finish([b.add("concat", [gate, b.input], "all", axis=3)]))


def test_a_logistic_of_the_input_is_left_as_it_is() -> None:
    b = net()
    chosen = grids(b.finish([b.add("logistic", [b.input], "gate")]))
    assert chosen["input"] is INPUT


# --- dead tensors ---


@pytest.mark.parametrize("seen", [0.0, 1e-12, 1e-6])
def test_tensors_that_were_always_zero_can_be_run(seen: float, rng: np.random.Generator) -> None:
    """As where a trained squeeze never wakes on good images: no scale so small that sums overflow, in any engine."""
    pytest.importorskip("tflite_micro", reason="needs TFLM")
    b = net()
    x = b.add("hard_swish", [conv(b, b.input, "x")], "x.hs")
    squeezed = conv(b, b.add("mean", [x], "mean"), "squeeze", "relu")
    y = b.add("mul", [x, conv(b, squeezed, "gate", "relu6")], "y", activation="none")
    y = b.add("add", [x, b.add("relu", [y], "y.relu")], "z", activation="none")
    gate = b.add("logistic", [conv(b, y, "last")], "last.gate")
    graph = b.finish([b.add("mul", [y, gate], "end", activation="none")])
    statistics = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], value) for value in (-seen, seen, 0.0)))
        for name in graph.activations
    }
    q = quantize(graph, statistics, INPUT)
    images = rng.integers(-128, 128, (3, 4, 4, 3)).astype(np.int8)
    np.testing.assert_array_equal(Int8Engine(q).features(images)[0], TflmEngine(to_tflite(q)).features(images)[0])
