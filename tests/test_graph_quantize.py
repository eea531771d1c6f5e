"""Post-training quantisation in closed forms: grids, scales, biases, equalisation, rounding, and a network's taps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_interpreter import dequantized, run

from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.quantize import ChannelStatistics, affine_range, equalize, quantize
from tinyvad.graph.rounding import image_covariance, round_together

INPUT = affine_range(-1.0, 1.0)


def seen(low: Any, high: Any, mean: Any = 0.0, channels: int = 1) -> ChannelStatistics:
    low, high, mean = (np.broadcast_to(np.asarray(v, np.float64), channels) for v in (low, high, mean))
    return ChannelStatistics(low, high, mean)


def statistics_of(graph: Graph, images: np.ndarray) -> dict[str, ChannelStatistics]:
    """What calibration on (n, H, W, C) float images sees, by the plain interpreter."""
    runs = [run(graph, image[None]) for image in images]
    result = {}
    for name in graph.activations:
        values = np.stack([values[name].reshape(-1, values[name].shape[-1]) for values in runs])  # (n, h*w, C)
        result[name] = ChannelStatistics(values.min((0, 1)), values.max((0, 1)), values.mean((0, 1)))
    return result


def quantization(graph: Graph, name: str) -> Quantization:
    found = graph.tensors[name].quantization
    assert found is not None
    return found


def grid(graph: Graph, name: str) -> tuple[float, int]:
    found = quantization(graph, name)
    return float(found.scale[0]), int(found.zero_point[0])


def layer(b: GraphBuilder, op: str, x: str, weights: np.ndarray, bias: np.ndarray, name: str, **attributes: Any) -> str:
    if op != "fully_connected":
        attributes = {"stride": (1, 1), "pads": (0, 0, 0, 0), **attributes}
    w, bias_name = b.constant(f"{name}.w", weights.astype(np.float32)), b.constant(f"{name}.b", bias.astype(np.float32))
    return b.add(op, [x, w, bias_name], name, **{"activation": "none", **attributes})


# -- grids --------------------------------------------------------------------------------------------------------------


def test_zero_is_on_every_grid_and_the_ends_within_half_a_step(rng: np.random.Generator) -> None:
    for _ in range(2000):
        low, high = np.sort(rng.normal(0, 1, 2) * 10 ** rng.uniform(-3, 3))
        q = affine_range(low, high)
        scale, zero_point = float(q.scale[0]), int(q.zero_point[0])
        assert -128 <= zero_point <= 127 and scale > 0
        assert scale * (-128 - zero_point) <= min(low, 0) + scale * 0.501
        assert scale * (127 - zero_point) >= max(high, 0) - scale * 0.501
        assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, -128), (-255.0, 0.0, 1.0, 127), (-128.0, 127.0, 1.0, 0),
        (10.0, 51.0, 0.2, -128), (-51.0, -9.0, 0.2, 127),
    ],
)  # fmt: skip
def test_grids_in_closed_form(low: float, high: float, scale: float, zero_point: int) -> None:
    q = affine_range(low, high)
    assert (float(q.scale[0]), int(q.zero_point[0])) == (pytest.approx(scale), zero_point)


def test_a_tensor_of_zeros_has_a_grid() -> None:
    q = affine_range(0.0, 0.0)
    assert float(q.scale[0]) > 0 and int(q.zero_point[0]) == -128


# -- weights and biases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["conv2d", "depthwise_conv2d", "fully_connected"])
def test_weights_on_a_grid_stay_and_biases_have_the_product_scale(op: str, rng: np.random.Generator) -> None:
    channels, out = 4, 4
    windows: dict[str, tuple[int, ...]] = {"conv2d": (out, 3, 3, channels), "depthwise_conv2d": (1, 3, 3, channels)}
    shape = windows.get(op, (out, channels))
    axis = 3 if op == "depthwise_conv2d" else 0
    integers = rng.integers(-126, 127, shape)
    for c in range(out):  # each channel reaches 127, so that its scale is known
        integers[(0, 0, 0, c) if axis == 3 else (c,) + (0,) * (len(shape) - 1)] = 127
    scales = 2.0 ** -np.arange(4, 8)
    by_channel = [1] * len(shape)
    by_channel[axis] = -1
    b = GraphBuilder("net", (1, channels) if op == "fully_connected" else (1, 3, 3, channels))
    x = b.add("relu", [b.input], "x")  # not the network's first convolution, whose rounding is another
    bias = rng.normal(0, 3, out)
    graph = b.finish([layer(b, op, x, integers * scales.reshape(by_channel), bias, "y")])
    statistics = {"input": seen(-1, 1, 0, channels), "x": seen(0, 2, 0.7, channels), "y": seen(-9, 9, 0, out)}
    q = quantize(graph, statistics, INPUT)
    np.testing.assert_array_equal(q.constants["y.w"], integers)
    assert q.constants["y.w"].dtype == np.int8 and q.constants["y.b"].dtype == np.int32
    weights, biases = quantization(q, "y.w"), quantization(q, "y.b")
    np.testing.assert_array_equal(weights.scale, scales.astype(np.float32))
    assert weights.axis == axis and not weights.zero_point.any() and not biases.zero_point.any()
    product = np.float32(quantization(q, "x").scale[0]) * weights.scale
    np.testing.assert_array_equal(biases.scale, product)
    np.testing.assert_allclose(q.constants["y.b"] * product.astype(np.float64), bias, atol=product.max() * 0.51)


def test_weights_are_rounded_to_the_nearest_step(rng: np.random.Generator) -> None:
    b = GraphBuilder("net", (1, 5, 5, 6))
    weights = rng.normal(0, 1, (3, 1, 1, 6))
    graph = b.finish([layer(b, "conv2d", b.add("relu", [b.input], "x"), weights, np.zeros(3), "y")])
    q = quantize(graph, {"x": seen(0, 1, 0, 6), "y": seen(-3, 3, 0, 3)}, INPUT, bias_correction=False)
    steps = np.abs(weights).max((1, 2, 3)) / 127
    np.testing.assert_allclose(quantization(q, "y.w").scale, steps, rtol=1e-6)
    assert np.abs(q.constants["y.w"]).max((1, 2, 3)).tolist() == [127] * 3
    error = dequantized(q.constants["y.w"], quantization(q, "y.w")) - weights
    assert (np.abs(error).max((1, 2, 3)) <= steps * 0.5001).all()


def test_a_tiny_channel_with_a_large_bias_keeps_its_bias() -> None:
    b = GraphBuilder("net", (1, 2, 2, 1))
    weights, bias = np.array([1e-12, 0.0, 1.0]).reshape(3, 1, 1, 1), np.array([1000.0, -5.0, 2.0])
    graph = b.finish([layer(b, "conv2d", b.add("relu", [b.input], "x"), weights, bias, "y")])
    q = quantize(graph, {"x": seen(0, 1), "y": seen(-5, 1000, 0, 3)}, INPUT)
    assert np.abs(q.constants["y.b"].astype(np.int64)).max() <= (1 << 30) * 1.001
    np.testing.assert_allclose(dequantized(q.constants["y.b"], quantization(q, "y.b")), bias, rtol=1e-6)
    assert q.constants["y.w"].ravel().tolist() == [0, 0, 127]


def test_bias_correction_zeroes_the_mean_error(rng: np.random.Generator) -> None:
    """At the calibration mean the int8 weights and bias give what the float ones do, to half a step of the bias."""
    means = rng.uniform(0, 3, 8)
    for op, shape in (("conv2d", (5, 3, 3, 8)), ("depthwise_conv2d", (1, 3, 3, 8)), ("fully_connected", (5, 8))):
        b = GraphBuilder("net", (1, 8) if op == "fully_connected" else (1, 3, 3, 8))
        x = b.add("relu", [b.input], "x")
        out = 8 if op == "depthwise_conv2d" else 5
        graph = b.finish([layer(b, op, x, rng.normal(0, 1, shape), rng.normal(0, 1, out), "y")])
        statistics = {"x": ChannelStatistics(np.zeros(8), np.full(8, 4.0), means), "y": seen(-9, 9, 0, out)}
        image = np.broadcast_to(means, graph.tensors["input"].shape)
        wanted = run(graph, image)["y"].reshape(-1)
        errors = []
        for bias_correction in (True, False):
            q = quantize(graph, statistics, INPUT, bias_correction)
            found = run(q, image)["y"].reshape(-1)  # int8 weights as real numbers, activations not rounded
            errors.append(np.abs(found - wanted) / quantization(q, "y.b").scale)
        assert errors[0].max() <= 0.51 and errors[1].max() > 5


def test_weights_that_two_layers_share(rng: np.random.Generator) -> None:
    """Each layer gets its own, on the scales of its own input; the original is not left behind."""
    b = GraphBuilder("net", (1, 4, 4, 3))
    x = b.add("relu", [b.input], "x")
    y = layer(b, "conv2d", x, rng.normal(0, 1, (3, 1, 1, 3)), rng.normal(0, 1, 3), "y")
    z = b.add("conv2d", [y, "y.w", "y.b"], "z", stride=(1, 1), pads=(0, 0, 0, 0), activation="relu6")
    graph = b.finish([z])
    image = rng.uniform(0, 1, (1, 4, 4, 3))
    eg, es = equalize(graph, statistics_of(graph, image))
    np.testing.assert_array_equal(eg.constants["y.w"], graph.constants["y.w"])
    q = quantize(graph, es, INPUT)
    q.check()
    assert sorted(q.constants) == ["y.b:y", "y.b:z", "y.w:y", "y.w:z"] == sorted(set(q.tensors) - set(q.activations))
    ratio = quantization(q, "y.b:y").scale / quantization(q, "y.b:z").scale
    np.testing.assert_allclose(ratio, grid(q, "x")[0] / grid(q, "y")[0], rtol=1e-6)
    np.testing.assert_allclose(run(q, image)["z"], run(graph, image)["z"], atol=0.1)


# -- ranges -------------------------------------------------------------------------------------------------------------


def holds(graph: Graph, name: str, low: float, high: float) -> bool:
    scale, zero_point = grid(graph, name)
    return scale * (-128 - zero_point) <= low + scale * 0.501 and scale * (127 - zero_point) >= high - scale * 0.501


def test_ranges_hold_what_was_seen_and_taps_more(rng: np.random.Generator) -> None:
    b = GraphBuilder("net", (1, 6, 6, 3))
    x = layer(b, "conv2d", b.input, rng.normal(0, 1, (4, 3, 3, 3)), rng.normal(0, 1, 4), "inner")
    y = layer(b, "conv2d", x, rng.normal(0, 1, (4, 1, 1, 4)), rng.normal(0, 1, 4), "tap")
    graph = b.finish([y])
    statistics = statistics_of(graph, rng.uniform(-1, 1, (3, 6, 6, 3)))
    q = quantize(graph, statistics, INPUT)
    assert grid(q, "input") == (float(INPUT.scale[0]), int(INPUT.zero_point[0]))
    for name, margin in (("inner", 1.0), ("tap", 1.25)):
        low, high = float(statistics[name].low.min()) * margin, float(statistics[name].high.max()) * margin
        assert low < 0 < high and holds(q, name, low, high)
        assert grid(q, name)[0] == pytest.approx((high - low) / 255, rel=1e-6)


def test_relu6_has_headroom_up_to_six(rng: np.random.Generator) -> None:
    for high, wanted in ((1.0, 1.5), (3.9, 5.85), (5.0, 6.0), (6.0, 6.0)):
        b = GraphBuilder("net", (1, 4, 4, 1))
        x = layer(b, "conv2d", b.input, np.ones((1, 1, 1, 1)), np.zeros(1), "x", activation="relu6")
        graph = b.finish([b.add("add", [x, x], "y")])
        q = quantize(graph, {"input": seen(-1, 1), "x": seen(0, high), "y": seen(0, 2 * high)}, INPUT)
        assert grid(q, "x") == (pytest.approx(wanted / 255), -128)


def test_ops_that_copy_values_share_a_grid(rng: np.random.Generator) -> None:
    """Pads, pools, reshapes, resizes and relu6 of one tensor, one of them tapped."""
    b = GraphBuilder("net", (1, 8, 8, 2))
    x = layer(b, "conv2d", b.input, rng.normal(0, 1, (2, 3, 3, 2)), rng.normal(0, 1, 2), "x")
    window = {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}
    names = ["x", b.add("pad", [x], "pad", pads=(1, 1, 1, 1)), b.add("relu6", [x], "relu6")]
    names.append(b.add("average_pool", ["pad"], "pool", count_include_pad=False, **window))
    names.append(b.add("max_pool", ["relu6"], "max", **window))
    names.append(b.add("resize_nearest", ["pool"], "big", size=(9, 9)))
    names.append(b.add("reshape", ["max"], "flat", shape=(1, 18)))
    z = layer(b, "depthwise_conv2d", "big", rng.normal(0, 1, (1, 1, 1, 2)), np.zeros(2), "z")
    graph = b.finish([z, "pool", "flat"])
    statistics = statistics_of(graph, rng.uniform(-1, 1, (2, 8, 8, 2)))
    q = quantize(graph, statistics, INPUT)
    assert len({grid(q, name) for name in names}) == 1
    assert grid(q, "z") != grid(q, "x")
    for name in names:
        assert holds(q, name, float(statistics[name].low.min()), float(statistics[name].high.max()))
    assert holds(q, "pool", 0, 1.25 * float(statistics["pool"].high.max()))
    moved = b.finish([b.add("pad", [b.input], "first", pads=(1, 1, 1, 1))])
    assert grid(quantize(moved, {"first": seen(-50, 50, 0, 2), **statistics}, INPUT), "first") == grid(q, "input")


def test_inputs_of_a_concat_share_the_grid_of_the_whole(rng: np.random.Generator) -> None:
    """As in DenseNet: a concat of a concat, and a pool of one of the parts."""
    b = GraphBuilder("net", (1, 6, 6, 2))
    parts = [layer(b, "conv2d", b.input, rng.normal(0, 10.0**i, (2, 3, 3, 2)), np.zeros(2), f"part{i}") for i in range(3)]
    window = {"kernel": (1, 1), "stride": (1, 1), "pads": (0, 0, 0, 0)}
    pooled = b.add("max_pool", [parts[0]], "pooled", **window)
    first = b.add("concat", [pooled, parts[1]], "first", axis=3)
    whole = b.add("concat", [first, parts[2]], "whole", axis=3)
    other = layer(b, "conv2d", b.input, rng.normal(0, 1, (2, 3, 3, 2)), np.zeros(2), "other")
    graph = b.finish([whole, other])
    statistics = statistics_of(graph, rng.uniform(-1, 1, (2, 6, 6, 2)))
    q = quantize(graph, statistics, INPUT)
    shared = [*parts, pooled, first, whole]
    assert len({grid(q, name) for name in shared}) == 1 and grid(q, other) != grid(q, whole)
    low, high = float(statistics["whole"].low.min()), float(statistics["whole"].high.max())
    assert holds(q, "whole", low * 1.25, high * 1.25)


def test_a_concat_of_the_input_is_refused(rng: np.random.Generator) -> None:
    b = GraphBuilder("net", (1, 6, 6, 2))
    x = layer(b, "conv2d", b.input, rng.normal(0, 1, (2, 1, 1, 2)), np.zeros(2), "x")
    graph = b.finish([b.add("concat", [x, b.input], "y", axis=3)])
    with pytest.raises(InputError, match="x must share the int8 grid of the network's input with it; tap an earlier"):
        quantize(graph, statistics_of(graph, rng.uniform(-1, 1, (1, 6, 6, 2))), INPUT)


def test_constant_operands_get_a_grid() -> None:
    b = GraphBuilder("net", (1, 2, 2, 3))
    factors = np.array([0.5, -1.0, 2.0], np.float32).reshape(1, 1, 1, 3)
    graph = b.finish([b.add("mul", [b.input, b.constant("c", factors)], "y", activation="none")])
    q = quantize(graph, {"y": seen(-2, 2, 0, 3)}, INPUT)
    assert q.constants["c"].dtype == np.int8
    np.testing.assert_allclose(dequantized(q.constants["c"], quantization(q, "c")), factors, atol=3 / 255 / 2)


def test_what_cannot_be_quantised(rng: np.random.Generator) -> None:
    b = GraphBuilder("net", (1, 2, 2, 3))
    scale, offset = b.constant("s", np.ones(3, np.float32)), b.constant("o", np.ones(3, np.float32))
    graph = b.finish([b.add("batch_norm", [b.input, scale, offset], "y")])
    with pytest.raises(InputError, match="batch_norm -> y could not be folded"):
        quantize(graph, {"y": seen(0, 1, 0, 3)}, INPUT)
    with pytest.raises(InputError, match="graph net: calibration saw nothing of y"):
        quantize(graph, {}, INPUT)
    with pytest.raises(InputError, match="calibration saw values of y that are not finite"):
        quantize(graph, {"y": seen(0, np.nan, 0, 3)}, INPUT)


# -- equalisation -------------------------------------------------------------------------------------------------------


def relu6_net(rng: np.random.Generator, spread: float) -> Graph:
    """expand, depthwise, project as in MobileNetV2, with channels whose sizes differ by factors of e**spread."""
    b = GraphBuilder("net", (1, 7, 7, 3))
    sizes = np.exp(rng.normal(-1, spread, 8))
    expand = rng.normal(0, 0.4, (8, 1, 1, 3)) * sizes[:, None, None, None]
    x = layer(b, "conv2d", b.input, expand, rng.uniform(0, 0.3, 8) * sizes, "expand", activation="relu6")
    deep = rng.normal(0, 0.3, (1, 3, 3, 8)) * np.exp(rng.normal(0, spread, 8))
    x = layer(b, "depthwise_conv2d", x, deep, np.full(8, 0.1), "deep", activation="relu6", pads=(1, 1, 1, 1))
    return b.finish([layer(b, "conv2d", x, rng.normal(0, 1, (4, 1, 1, 8)), np.zeros(4), "project")])


@pytest.mark.parametrize("seed", range(6))
def test_equalising_does_not_change_the_function_where_nothing_is_clipped(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = relu6_net(rng, 1.0)
    images = rng.uniform(-1, 1, (3, 7, 7, 3))
    statistics = statistics_of(graph, images)
    equal, new = equalize(graph, statistics)
    assert not np.array_equal(equal.constants["expand.w"], graph.constants["expand.w"])
    for image in images:
        before, after = run(graph, image[None]), run(equal, image[None])
        # every value below 6 / headroom in the old units is below the clamp in the new ones
        np.testing.assert_allclose(after["project"], before["project"], rtol=1e-5, atol=1e-5)
    for name in ("expand", "deep"):
        factors = new[name].high / statistics[name].high
        exact = statistics_of(equal, images)[name]
        np.testing.assert_allclose(exact.high, new[name].high, rtol=1e-5)
        np.testing.assert_allclose(exact.mean, new[name].mean, rtol=1e-4)
        assert (factors >= 1 - 1e-6).all() and new[name].high.max() <= 6.0001
    # in front of a depthwise convolution the reach, 1.5 times what was seen but at least half the largest, becomes 6
    high = statistics["expand"].high
    reach = 1.5 * np.maximum(high, 0.5 * high.max())
    np.testing.assert_allclose(new["expand"].high / high, np.maximum(6 / reach, 1), rtol=1e-6)


def test_a_channel_that_rests_on_good_images_may_still_wake() -> None:
    """It was never above 0, but it can carry half of what the largest did before the new clamp stops it."""
    b = GraphBuilder("net", (1, 1, 1, 2))
    x = layer(b, "conv2d", b.input, np.eye(2).reshape(2, 1, 1, 2), np.zeros(2), "x", activation="relu6")
    graph = b.finish([layer(b, "depthwise_conv2d", x, np.ones((1, 1, 1, 2)), np.zeros(2), "y")])
    statistics = statistics_of(graph, np.array([[[[1.0, -1.0]]]]))
    equal, _ = equalize(graph, statistics)
    for image in ([1.5, 0.0], [0.0, 0.75], [1.5, 0.75]):
        np.testing.assert_allclose(run(equal, np.array(image).reshape(1, 1, 1, 2))["y"].ravel(), image, rtol=1e-6)
    clamped = run(equal, np.array([9.0, 9.0]).reshape(1, 1, 1, 2))["y"].ravel()
    np.testing.assert_allclose(clamped, [1.5, 0.75], rtol=1e-6)


def test_what_is_read_elsewhere_is_not_equalised(rng: np.random.Generator) -> None:
    graph = relu6_net(rng, 1.0)
    statistics = statistics_of(graph, rng.uniform(-1, 1, (1, 7, 7, 3)))
    tapped, _ = equalize(graph.copy(outputs=["expand", "project"]), statistics)
    np.testing.assert_array_equal(tapped.constants["expand.w"], graph.constants["expand.w"])
    b = GraphBuilder("net", (1, 2, 2, 2))
    x = layer(b, "conv2d", b.input, np.eye(2).reshape(2, 1, 1, 2), np.zeros(2), "x", activation="relu6")
    y = layer(b, "depthwise_conv2d", x, np.ones((1, 1, 1, 2)), np.zeros(2), "y")
    both = b.finish([b.add("add", [x, y], "sum")])
    kept, _ = equalize(both, statistics_of(both, rng.uniform(0, 1, (1, 2, 2, 2))))
    np.testing.assert_array_equal(kept.constants["x.w"], both.constants["x.w"])
    with pytest.raises(InputError, match="calibration saw nothing of expand"):
        equalize(graph, {})


# -- rounding with feedback ---------------------------------------------------------------------------------------------


def expected_error(errors: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return np.einsum("ok,kl,ol->o", errors, covariance, errors)


def test_independent_inputs_are_rounded_to_the_nearest(rng: np.random.Generator) -> None:
    weights = rng.uniform(-130, 130, (5, 9))
    wanted = np.clip(np.sign(weights) * np.floor(np.abs(weights) + 0.5), -127, 127)
    np.testing.assert_array_equal(round_together(weights, np.diag(rng.uniform(0.1, 5, 9))), wanted)


def test_equal_inputs_keep_the_sum(rng: np.random.Generator) -> None:
    """Where all inputs are one value, only the weights' sum counts: it is off by half a step at most."""
    weights = rng.uniform(-100, 100, (20, 12))
    rounded = round_together(weights, np.ones((12, 12)) + 1e-6 * np.eye(12))
    assert np.abs(rounded.sum(1) - weights.sum(1)).max() <= 0.501
    assert np.abs(rounded - weights).max() < 1.01
    nearest = np.rint(weights).sum(1) - weights.sum(1)
    assert np.abs(nearest).max() > 1


def test_near_the_best_of_all_roundings(rng: np.random.Generator) -> None:
    """Every choice of floor and ceiling of six weights is tried."""
    covariance = image_covariance(2, 1, 3)
    weights = rng.uniform(-20, 20, (30, 6))
    choices = np.array(list(itertools.product((0, 1), repeat=6)))
    best = np.min([expected_error(np.floor(weights) + choice - weights, covariance) for choice in choices], 0)
    found = expected_error(round_together(weights, covariance) - weights, covariance)
    nearest = expected_error(np.rint(weights) - weights, covariance)
    assert found.mean() < 1.5 * best.mean() and found.mean() < 0.4 * nearest.mean()


def test_integers_stay_in_range(rng: np.random.Generator) -> None:
    rounded = round_together(rng.uniform(-140, 140, (4, 27)), image_covariance(3, 3, 3))
    assert np.abs(rounded).max() == 127 and (rounded == np.rint(rounded)).all()


def test_covariance_of_an_image_patch() -> None:
    covariance = image_covariance(2, 3, 3)
    assert covariance.shape == (18, 18) and np.linalg.eigvalsh(covariance).min() > 0
    np.testing.assert_array_equal(covariance, covariance.T)
    at = {(y, x, c): (y * 3 + x) * 3 + c for y in range(2) for x in range(3) for c in range(3)}
    assert covariance[at[0, 0, 0], at[0, 0, 0]] == 1
    assert covariance[at[0, 0, 0], at[0, 1, 0]] == covariance[at[0, 0, 0], at[1, 0, 0]] == 0.95
    assert covariance[at[0, 0, 0], at[1, 2, 0]] == pytest.approx(0.95**3)
    assert covariance[at[0, 0, 0], at[1, 2, 1]] == pytest.approx(0.9 * 0.95**3)


def test_the_first_convolution_keeps_flat_areas(rng: np.random.Generator) -> None:
    """On images of one colour a plain rounding is off by the sum of 27 errors, this one by about one."""
    b = GraphBuilder("net", (1, 3, 3, 3))
    weights = rng.normal(0, 1, (64, 3, 3, 3))
    graph = b.finish([layer(b, "conv2d", b.input, weights, np.zeros(64), "y")])
    q = quantize(graph, {"input": seen(-1, 1, 0, 3), "y": seen(-9, 9, 0, 64)}, INPUT)
    steps = quantization(q, "y.w").scale.astype(np.float64)
    found = (dequantized(q.constants["y.w"], quantization(q, "y.w")) - weights).sum((1, 2, 3)) / steps
    units = weights / steps[:, None, None, None]
    plain = (np.rint(units) - units).sum((1, 2, 3))
    assert np.abs(found).max() < 0.75 and found.std() < 0.3 * plain.std()


# -- whole networks -----------------------------------------------------------------------------------------------------


def signal_to_noise(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()))


def test_a_small_network_in_int8_is_near_the_float_one(rng: np.random.Generator) -> None:
    from tinyvad.engines.int8 import Int8Engine

    graph = relu6_net(rng, 0.5)
    images = rng.uniform(-1, 1, (8, 7, 7, 3))
    q = quantize(*equalize(graph, statistics_of(graph, images)), INPUT)
    scale, zero_point = grid(q, "input")
    integers = np.clip(np.rint(images / scale) + zero_point, -128, 127).astype(np.int8)
    (found,) = Int8Engine(q).features(integers)
    tap, zero = grid(q, "project")
    wanted = np.stack([run(graph, image[None])["project"][0] for image in images])
    assert signal_to_noise(wanted, (found.astype(np.float64) - zero) * tap) > 30


def test_taps_of_a_published_network_on_photographs(shared: Path) -> None:
    """MCUNet-in3 at 96 pixels, calibrated on 8 photographs, judged on 8 others: over 18 dB at every tap."""
    photographs = sorted((shared / "data_natural").glob("*.jpg"))
    weights = shared / "weights" / "mcunet_in3_imagenet_f32.onnx"
    if len(photographs) < 16 or not weights.exists():
        pytest.skip("needs ../shared/data_natural and mcunet_in3_imagenet_f32.onnx")
    from PIL import Image

    from tinyvad.backbones.source import open_backbone
    from tinyvad.engines.int8 import Int8Engine
    from tinyvad.engines.onnx import OnnxEngine, calibrate
    from tinyvad.export.onnx import to_onnx

    backbone = open_backbone(str(weights))
    graph = backbone.graph_at(96)
    step = len(photographs) // 16
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB").resize((96, 96))) for p in photographs[: 16 * step : step]])
    images = ((pixels / 255 - backbone.mean) / backbone.std).astype(np.float32)
    every = graph.copy(outputs=[node.output for node in graph.nodes])
    statistics = calibrate(OnnxEngine(to_onnx(every).SerializeToString()), images[:8, None])
    first = affine_range(float(images.min()), float(images.max()))
    statistics[graph.inputs[0]] = ChannelStatistics(
        images.min((0, 1, 2)), images.max((0, 1, 2)), images[:8].mean((0, 1, 2), dtype=np.float64)
    )
    q = quantize(*equalize(graph, statistics), first)
    scale, zero_point = float(first.scale[0]), int(first.zero_point[0])
    integers = np.clip(np.rint(images[8:] / scale) + zero_point, -128, 127).astype(np.int8)
    found = Int8Engine(q).features(integers)
    wanted = OnnxEngine(to_onnx(graph).SerializeToString()).features(images[8:])
    for name, a, b in zip(graph.outputs, wanted, found, strict=True):
        tap, zero = grid(q, name)
        ratio = signal_to_noise(a.astype(np.float64), (b.astype(np.float64) - zero) * tap)
        assert ratio > 18, f"{name}: {ratio:.1f} dB"

