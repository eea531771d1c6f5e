"""The LiteRT and TFLM engines, and with them what every int8 op computes: an integer oracle, op by op.

The oracle is TFLite's int8 specification written out in NumPy: gemmlowp's double rounding, clamps, zero points.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integer_interpreter import fixed_point, shifted

from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine, ample_arena
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.tflite_file import read_tflite

pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
pytest.importorskip("tflite_micro", reason="needs TFLM")

Scale = tuple[float, int]  # scale, zero point


def requantized(acc: np.ndarray, factor: float) -> np.ndarray:
    """acc * factor, rounded twice: to the high 32 bits of the doubled product, then by the right shift."""
    return shifted(np.asarray(acc, np.int64), *fixed_point(factor))


def clamped(values: np.ndarray, out: Scale, activation: str) -> np.ndarray:
    scale, zero_point = out
    low = max(-128, zero_point) if activation != "none" else -128
    high = min(127, zero_point + math.floor(6 / scale + 0.5)) if activation == "relu6" else 127
    return np.clip(values + zero_point, low, high).astype(np.int8)


def windows_of(x: np.ndarray, kernel: tuple[int, int], attributes: dict[str, Any]) -> np.ndarray:
    """x (H, W, C) int64, zero point taken off -> (Ho, Wo, kh, kw, C); outside the map, 0."""
    top, bottom, left, right = attributes["pads"]
    (sh, sw), (dh, dw) = attributes["stride"], attributes.get("dilation", (1, 1))
    x = np.pad(x, ((top, bottom), (left, right), (0, 0)))
    reach = (dh * (kernel[0] - 1) + 1, dw * (kernel[1] - 1) + 1)
    view = np.lib.stride_tricks.sliding_window_view(x, reach, (0, 1))[::sh, ::sw, :, ::dh, ::dw]
    return view.transpose(0, 1, 3, 4, 2)


def per_tensor(name: str, graph: Graph, scale: Scale) -> None:
    """Make a tensor of ``graph`` int8."""
    quantization = Quantization.per_tensor(*scale)
    graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=quantization)


def pick_scale(rng: np.random.Generator, low: float = 1e-3, high: float = 0.5) -> Scale:
    """A scale as float32 holds it, and a zero point."""
    scale = np.float32(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(scale), int(rng.integers(-128, 128))


def weighted_graph(op: str, rng: np.random.Generator) -> tuple[Graph, Callable[[np.ndarray], np.ndarray]]:
    """A conv, depthwise or fully connected graph with per-channel weights, and what it must compute."""
    size, channels, out = rng.integers(5, 11, 2), int(rng.integers(1, 7)), int(rng.integers(1, 7))
    kernel = tuple(int(k) for k in rng.integers(1, 5, 2))
    shape: tuple[int, ...] = {
        "conv2d": (out, *kernel, channels),
        "depthwise_conv2d": (1, *kernel, channels),
        "fully_connected": (out, channels),
    }[op]
    axis, count = (3, channels) if op == "depthwise_conv2d" else (0, out)
    x_scale, out_scale = pick_scale(rng), pick_scale(rng, 0.05, 2)
    scales = np.exp(rng.uniform(np.log(1e-4), np.log(0.1), count)).astype(np.float32)
    weights = rng.integers(-127, 128, shape).astype(np.int8)
    bias = rng.integers(-3000, 3000, count).astype(np.int32)
    attributes: dict[str, Any] = {"activation": str(rng.choice(["none", "relu", "relu6"]))}
    if op != "fully_connected":
        attributes |= {"stride": (1, 1), "pads": tuple(int(p) for p in rng.integers(0, 3, 4))}
        attributes |= {"dilation": (2, 1)} if rng.random() < 0.3 else {"stride": (2, int(rng.integers(1, 3)))}
    image = (1, channels) if op == "fully_connected" else (1, *(int(s) for s in size), channels)
    b = GraphBuilder("one", image)
    inputs = [b.input, b.constant("w", weights), b.constant("b", bias)]
    graph = b.finish([b.add(op, inputs, "out", **attributes)])
    per_tensor("input", graph, x_scale)
    per_tensor("out", graph, out_scale)
    zeros = np.zeros(count, np.int64)
    bias_scales = np.float32(x_scale[0]) * scales
    for name, quantization in (("w", Quantization(scales, zeros, axis)), ("b", Quantization(bias_scales, zeros, 0))):
        if count == 1:
            quantization = dataclasses.replace(quantization, axis=None)
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], quantization=quantization)

    def oracle(q: np.ndarray) -> np.ndarray:
        x, w = q.astype(np.int64) - x_scale[1], weights.astype(np.int64)
        if op == "fully_connected":
            acc = w @ x + bias
        elif op == "conv2d":
            acc = np.einsum("hwabc,oabc->hwo", windows_of(x, kernel, attributes), w) + bias  # type: ignore[arg-type]
        else:
            acc = np.einsum("hwabc,abc->hwc", windows_of(x, kernel, attributes), w[0]) + bias  # type: ignore[arg-type]
        factors = [x_scale[0] * float(scale) / out_scale[0] for scale in scales]
        values = np.stack([requantized(acc[..., c], factor) for c, factor in enumerate(factors)], -1)
        return clamped(values, out_scale, attributes["activation"])

    return graph, oracle


def pool_graph(op: str, rng: np.random.Generator) -> tuple[Graph, Callable[[np.ndarray], np.ndarray]]:
    size, k, stride = int(rng.integers(4, 10)), int(rng.integers(1, 5)), int(rng.integers(1, 3))
    scale, total = pick_scale(rng), max((-(-size // stride) - 1) * stride + k - size, 0)
    pads = (total // 2, total - total // 2) * 2 if rng.random() < 0.7 else (0, 0, 0, 0)
    attributes: dict[str, Any] = {"kernel": (k, k), "stride": (stride, stride), "pads": pads}
    attributes["activation"] = str(rng.choice(["none", "relu", "relu6"]))
    extra = {"count_include_pad": False} if op == "average_pool" else {}
    b = GraphBuilder("one", (1, size, size, 3))
    graph = b.finish([b.add(op, [b.input], "out", **attributes, **extra)])
    per_tensor("input", graph, scale)
    per_tensor("out", graph, scale)

    def oracle(q: np.ndarray) -> np.ndarray:
        inside = windows_of(np.ones_like(q, np.int64), (k, k), attributes)
        values = windows_of(q.astype(np.int64), (k, k), attributes)
        if op == "max_pool":
            result = np.where(inside > 0, values, -128).max((2, 3))
        else:
            sums, n = values.sum((2, 3)), inside.sum((2, 3))
            result = np.where(sums > 0, (sums + n // 2) // n, -((-sums + n // 2) // n))  # half away from zero
        return clamped(result - scale[1], scale, attributes["activation"])

    return graph, oracle


def two_input_graph(op: str, rng: np.random.Generator) -> tuple[Graph, Callable[[np.ndarray], np.ndarray]]:
    """A sum or product with a constant map of its own scale."""
    a, b_scale = pick_scale(rng), pick_scale(rng)
    unit = a[0] * b_scale[0] * 100 if op == "mul" else max(a[0], b_scale[0])
    out = (float(np.float32(unit * np.exp(rng.uniform(-1, 2)))), int(rng.integers(-128, 128)))
    activation = str(rng.choice(["none", "relu", "relu6"]))
    other = rng.integers(-128, 128, (1, 8, 9, 3)).astype(np.int8)
    b = GraphBuilder("one", other.shape)
    graph = b.finish([b.add(op, [b.input, b.constant("other", other)], "out", activation=activation)])
    for name, scale in (("input", a), ("other", b_scale), ("out", out)):
        per_tensor(name, graph, scale)

    def oracle(q: np.ndarray) -> np.ndarray:
        x, y = q.astype(np.int64) - a[1], other[0].astype(np.int64) - b_scale[1]
        if op == "mul":
            return clamped(requantized(x * y, a[0] * b_scale[0] / out[0]), out, activation)
        twice = 2 * max(a[0], b_scale[0])
        total = requantized(x << 20, a[0] / twice) + requantized(y << 20, b_scale[0] / twice)
        return clamped(requantized(total, twice / ((1 << 20) * out[0])), out, activation)

    return graph, oracle


def mean_graph(op: str, rng: np.random.Generator) -> tuple[Graph, Callable[[np.ndarray], np.ndarray]]:
    height, width = (int(size) for size in rng.integers(1, 13, 2))
    x_scale = pick_scale(rng)
    out = (float(np.float32(x_scale[0] * np.exp(rng.uniform(-2, 0.5)))), int(rng.integers(-128, 128)))
    b = GraphBuilder("one", (1, height, width, 5))
    graph = b.finish([b.add(op, [b.input], "out")])
    per_tensor("input", graph, x_scale)
    per_tensor("out", graph, out)

    def oracle(q: np.ndarray) -> np.ndarray:
        """The division by n is folded into the multiplier, with as many more bits as n has."""
        n = height * width
        multiplier, shift = fixed_point(x_scale[0] / out[0])
        bits = min(n.bit_length() - 1, 32, 31 + shift)
        acc = q.astype(np.int64).sum((0, 1), keepdims=True) - n * x_scale[1]
        return clamped(shifted(acc, (multiplier << bits) // n, shift - bits), out, "none")

    return graph, oracle


def nearest(size: int, out: int) -> np.ndarray:
    """Source index of each output: floor(i * ratio) with the ratio in float32, so that 6 -> 74 is not i * 6 // 74."""
    steps = np.arange(out, dtype=np.float32) * (np.float32(size) / np.float32(out))
    return np.minimum(np.floor(steps).astype(int), size - 1)


def copy_graph(op: str, rng: np.random.Generator) -> tuple[Graph, Callable[[np.ndarray], np.ndarray]]:
    """Ops that only move values, and the two standalone activations."""
    scale = pick_scale(rng, 0.02, 0.1)
    out = (float(np.float32(scale[0] * 1.7)), 5) if op == "relu" else scale
    b = GraphBuilder("one", (1, 5, 6, 4))
    inputs, attributes = [b.input], {}
    if op == "concat":
        inputs, attributes = [b.input, b.add("relu6", [b.input], "clipped"), b.input], {"axis": 3}
        per_tensor("clipped", b.graph, scale)
    elif op == "pad":
        attributes = {"pads": (1, 0, 2, 3)}
    elif op == "reshape":
        attributes = {"shape": (1, 6, 5, 4)}
    elif op == "resize_nearest":
        attributes = {"size": (int(rng.integers(1, 20)), 74)}
    graph = b.finish([b.add(op, inputs, "out", **attributes)])
    per_tensor("input", graph, scale)
    per_tensor("out", graph, out)

    def oracle(q: np.ndarray) -> np.ndarray:
        relu6 = clamped(q.astype(np.int64) - scale[1], scale, "relu6")
        if op == "concat":
            return np.concatenate([q, relu6, q], -1)
        if op == "pad":
            return np.pad(q, ((1, 0), (2, 3), (0, 0)), constant_values=scale[1])
        if op == "reshape":
            return q.reshape(6, 5, 4)
        if op == "resize_nearest":
            return q[nearest(5, attributes["size"][0])][:, nearest(6, attributes["size"][1])]
        if op == "relu":
            return clamped(requantized(q.astype(np.int64) - scale[1], scale[0] / out[0]), out, "relu")
        return relu6

    return graph, oracle


MAKERS = {
    "conv2d": weighted_graph,
    "depthwise_conv2d": weighted_graph,
    "fully_connected": weighted_graph,
    "average_pool": pool_graph,
    "max_pool": pool_graph,
    "add": two_input_graph,
    "mul": two_input_graph,
    "mean": mean_graph,
    **dict.fromkeys(("pad", "reshape", "concat", "resize_nearest", "relu", "relu6"), copy_graph),
}


@pytest.mark.parametrize("op", MAKERS)
def test_both_engines_compute_the_integer_oracle(op: str, rng: np.random.Generator) -> None:
    for _ in range(12):
        graph, oracle = MAKERS[op](op, rng)
        model = to_tflite(graph)
        images = rng.integers(-128, 128, (2, *graph.tensors["input"].shape[1:])).astype(np.int8)
        wanted = np.stack([oracle(image) for image in images])
        litert, tflm = LitertEngine(model), TflmEngine(model)
        assert tflm.exact and (litert.exact or op in ("fully_connected", "mul", "relu"))
        assert op != "fully_connected" or not litert.exact
        for engine in (litert, tflm) if litert.exact else (tflm,):
            (found,) = engine.features(images)
            np.testing.assert_array_equal(found, wanted, err_msg=f"{engine.name}: {graph.nodes} {graph.tensors}")


def test_fully_connected_is_rounded_twice_on_the_device_only(rng: np.random.Generator) -> None:
    """TFLM's fully connected layers round as convolutions do; LiteRT's reference kernel rounds acc * factor once."""
    weights = rng.integers(-2, 3, (8, 16)).astype(np.int8)
    bias = rng.integers(-50, 50, 8).astype(np.int32)
    b = GraphBuilder("one", (1, 16))
    inputs = [b.input, b.constant("w", weights), b.constant("b", bias)]
    graph = b.finish([b.add("fully_connected", inputs, "out", activation="none")])
    for name, scale in (("input", (1.0, 3)), ("w", (0.3, 0)), ("out", (1.0, 3))):
        quantization = Quantization.per_tensor(*scale)
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=quantization)
    graph.tensors["b"] = dataclasses.replace(graph.tensors["b"], quantization=Quantization.per_tensor(0.3, 0))
    images = rng.integers(-40, 40, (50, 16)).astype(np.int8)
    acc = (images.astype(np.int64) - 3) @ weights.astype(np.int64).T + bias
    factor = float(np.float32(0.3))
    litert, tflm = LitertEngine(to_tflite(graph)), TflmEngine(to_tflite(graph))
    assert not litert.exact and tflm.exact
    twice, once = requantized(acc, factor), np.floor(np.abs(acc * factor) + 0.5) * np.sign(acc)
    assert (twice != once).mean() > 0.1
    np.testing.assert_array_equal(tflm.features(images)[0], np.clip(twice + 3, -128, 127))
    np.testing.assert_array_equal(litert.features(images)[0], np.clip(once + 3, -128, 127))


def one_times_three_tenths(op: str) -> bytes:
    """A model of one weight: 1 * 0.3. Rounded twice, 0.6 -> 1, then halved, away from zero -> 1; rounded once: 0."""
    shape = (1, 1) if op == "fully_connected" else (1, 1, 1, 1)
    b = GraphBuilder("one", shape)
    inputs = [b.input, b.constant("w", np.ones(shape, np.int8)), b.constant("b", np.zeros(1, np.int32))]
    window = {"stride": (1, 1), "pads": (0, 0, 0, 0)} if op == "conv2d" else {}
    graph = b.finish([b.add(op, inputs, "out", activation="none", **window)])
    per_tensor("input", graph, (1.0, 0))
    per_tensor("out", graph, (1.0, 0))
    for name in ("w", "b"):
        quantization = Quantization.per_tensor(0.3, 0)
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], quantization=quantization)
    return to_tflite(graph)


def test_smallest_models_on_which_the_engines_differ() -> None:
    found = {}
    for op, image in (("fully_connected", np.ones((1, 1), np.int8)), ("conv2d", np.ones((1, 1, 1, 1), np.int8))):
        model = one_times_three_tenths(op)
        engines = (TflmEngine(model), LitertEngine(model), LitertEngine(model, "default"))
        assert [engine.exact for engine in engines] == [True, op == "conv2d", False]
        found[op] = [int(engine.features(image)[0].item()) for engine in engines]
    assert found == {"fully_connected": [1, 0, 0], "conv2d": [1, 1, 0]}


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_quantize_at_the_input(dtype: str, rng: np.random.Generator) -> None:
    b = GraphBuilder("one", (1, 4, 4, 3))
    graph = b.finish([b.add("quantize", [b.input], "out")])
    per_tensor("out", graph, (0.5, -3))
    if dtype == "uint8":
        quantization = Quantization.per_tensor(0.5, 125)
        graph.tensors["input"] = dataclasses.replace(graph.tensors["input"], dtype="uint8", quantization=quantization)
        images = rng.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
        wanted = images.astype(int) - 128
    else:
        images = rng.normal(0, 30, (2, 4, 4, 3)).astype(np.float32)
        steps = np.sign(images) * np.floor(np.abs(images / np.float32(0.5)) + 0.5)  # half away from zero
        wanted = np.clip(steps - 3, -128, 127)
    for engine in (LitertEngine(to_tflite(graph)), TflmEngine(to_tflite(graph))):
        np.testing.assert_array_equal(engine.features(images)[0], wanted)


def two_taps(rng: np.random.Generator) -> Graph:
    """conv -> conv -> conv, taps: the second, then the first."""
    b = GraphBuilder("taps", (1, 6, 6, 3))
    x = b.input
    for i in range(3):
        w = b.constant(f"w{i}", rng.integers(-3, 4, (3, 3, 3, 3)).astype(np.int8))
        bias = b.constant(f"b{i}", rng.integers(-50, 50, 3).astype(np.int32))
        x = b.add("conv2d", [x, w, bias], f"c{i}", stride=(1, 1), pads=(1, 1, 1, 1), activation="relu")
        for name in (w, bias):
            quantization = Quantization.per_tensor(0.05 if name == w else 0.005, 0)
            b.graph.tensors[name] = dataclasses.replace(b.graph.tensors[name], quantization=quantization)
    for name in ("input", "c0", "c1", "c2"):
        per_tensor(name, b.graph, (0.1, -20))
    return b.finish(["c1", "c0"])


def test_taps_come_in_the_graphs_order_from_every_engine(rng: np.random.Generator) -> None:
    model = to_tflite(two_taps(rng))
    images = rng.integers(-128, 128, (3, 6, 6, 3)).astype(np.int8)
    whole = [LitertEngine(model).all_tensors(image) for image in images]
    assert list(whole[0]) == ["input", "c0", "c1", "c2"]
    np.testing.assert_array_equal(whole[0]["input"], images[0])
    for engine in (LitertEngine(model), TflmEngine(model)):
        maps = engine.features(images)
        assert [m.shape for m in maps] == [(3, 6, 6, 3)] * 2 and {m.dtype.name for m in maps} == {"int8"}
        for name, found in zip(("c1", "c0"), maps, strict=True):
            np.testing.assert_array_equal(found, np.stack([values[name] for values in whole]))


def test_all_tensors_with_default_kernels(rng: np.random.Generator) -> None:
    engine = LitertEngine(to_tflite(two_taps(rng)), "default")
    assert list(engine.all_tensors(np.zeros((6, 6, 3), np.int8))) == ["input", "c0", "c1", "c2"]


@pytest.mark.parametrize("engine", [LitertEngine, TflmEngine])
def test_wrong_images_are_refused(engine: Any, rng: np.random.Generator) -> None:
    runner = engine(to_tflite(two_taps(rng)))
    for images in (np.zeros((1, 6, 7, 3), np.int8), np.zeros((1, 6, 6, 3), np.uint8), np.zeros((0, 6, 6, 3), np.int8)):
        with pytest.raises(InputError, match=r"takes int8 images of \(6, 6, 3\), not"):
            runner.features(images)


@pytest.mark.parametrize("engine", [LitertEngine, TflmEngine])
def test_files_are_read_and_bad_ones_named(engine: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(to_tflite(two_taps(rng)))
    assert len(engine(path).features(np.zeros((1, 6, 6, 3), np.int8))) == 2
    with pytest.raises(InputError, match=r"missing\.tflite"):
        engine(tmp_path / "missing.tflite")
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"model\.tflite"):
        engine(path)


@pytest.mark.parametrize(
    ("engine", "modules", "extra"),
    [
        (LitertEngine, ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"), "litert"),
        (TflmEngine, ("tflite_micro",), "sim"),
    ],
)
def test_missing_package_says_what_to_install(
    engine: Any, modules: tuple[str, ...], extra: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'tinyvad\[{extra}\]'"):
        engine(to_tflite(two_taps(rng)))


def test_tflm_with_too_small_an_arena(rng: np.random.Generator) -> None:
    model = to_tflite(two_taps(rng))
    with pytest.raises(InputError, match="in an arena of 1024 bytes"):
        TflmEngine(model, arena_bytes=1024)
    assert ample_arena(read_tflite(model)) > 1 << 20


def test_published_network_is_equal_in_both(shared: Path, rng: np.random.Generator) -> None:
    model = (shared / "weights/mcunet_in3_imagenet_int8.tflite").read_bytes()
    images = rng.integers(-128, 128, (1, 176, 176, 3)).astype(np.int8)
    np.testing.assert_array_equal(LitertEngine(model).features(images), TflmEngine(model).features(images))
