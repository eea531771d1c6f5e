"""Networks with gates and hard-swish, end to end: quantised, written, run by every engine, planned, exported as ONNX.

Two small networks: blocks of MobileNetV3 (ReLU in the squeeze, hard-sigmoid gates as ReLU6 whose 1/6 the projection has)
and of PhiNet (hard-swish in the squeeze, no biases, logistic gates).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import integer_interpreter
import numpy as np
import pytest
from reference_interpreter import run
from test_firmware_sim_memory import tflm_arenas

from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.onnx import OnnxEngine, calibrate
from tinyvad.engines.tflm import TflmEngine
from tinyvad.export.onnx import to_onnx, to_onnx_qdq
from tinyvad.export.tflite import lower_pads, to_tflite
from tinyvad.firmware_sim.budget import make_budget, ram_items
from tinyvad.firmware_sim.latency import estimate
from tinyvad.firmware_sim.memory import arena
from tinyvad.firmware_sim.targets import load_target
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.onnx_import import import_onnx
from tinyvad.graph.passes import prune
from tinyvad.graph.quantize import ChannelStatistics, affine_range, equalize, quantize
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.graph.tflite_import import import_tflite

NETWORKS = ("mobilenet_v3", "phinet")
SIZE = 40


def conv(
    b: GraphBuilder, x: str, name: str, out: int, kernel: int = 1, stride: int = 1, act: str = "none", bias: bool = True
) -> str:
    """conv2d, or depthwise_conv2d where ``out`` is 0; a hard-swish is an op of its own."""
    rng = np.random.default_rng(len(b.graph.nodes))
    channels = b.shape(x)[3]
    shape = (out, kernel, kernel, channels) if out else (1, kernel, kernel, channels)
    values = rng.normal(0, 1, out or channels) if bias else np.zeros(out or channels)
    weights = b.constant(f"{name}.w", rng.normal(0, 1, shape).astype(np.float32))
    names = [weights, b.constant(f"{name}.b", values.astype(np.float32))]
    fused = "none" if act == "hard_swish" else act
    geometry: dict[str, Any] = {"stride": (stride, stride), "pads": (kernel // 2,) * 4, "dilation": (1, 1)}
    last = f"{name}.linear" if act == "hard_swish" else name
    y = b.add("conv2d" if out else "depthwise_conv2d", [x, *names], last, activation=fused, **geometry)
    return b.add("hard_swish", [y], name) if act == "hard_swish" else y


def block(b: GraphBuilder, x: str, name: str, like: str, kernel: int, wide: int, out: int, stride: int, act: str) -> str:
    y = conv(b, x, f"{name}.expand", wide, act=act)
    y = conv(b, y, f"{name}.dw", 0, kernel, stride, act)
    squeeze = "relu" if like == "mobilenet_v3" else "hard_swish"
    s = conv(b, b.add("mean", [y], f"{name}.mean"), f"{name}.squeeze", 8, act=squeeze, bias=like == "mobilenet_v3")
    if like == "mobilenet_v3":
        gate = conv(b, s, f"{name}.gate", wide, act="relu6")
    else:
        gate = b.add("logistic", [conv(b, s, f"{name}.excite", wide, bias=False)], f"{name}.gate")
    y = b.add("mul", [y, gate], f"{name}.gated", activation="none")
    y = conv(b, y, f"{name}.project" if stride == 1 else name, out)
    return b.add("add", [x, y], name, activation="none") if stride == 1 else y


@functools.cache
def images() -> np.ndarray:
    """(12, SIZE, SIZE, 3) float32: smooth random pictures of variance 1."""
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, (12, SIZE + 8, SIZE + 8, 3))
    for axis in (1, 2):
        x = np.lib.stride_tricks.sliding_window_view(x, 9, axis).mean(-1)
    return (x / x.std()).astype(np.float32)


@functools.cache
def float_graph(like: str) -> Graph:
    """Random weights, scaled so that channels vary by about 1 over the pictures; gates around their middle."""
    b = GraphBuilder(like, (1, SIZE, SIZE, 3))
    x = conv(b, b.input, "stem", 8, 3, 2, "hard_swish")
    first = "relu" if like == "mobilenet_v3" else "hard_swish"
    x = one = block(b, x, "one", like, 3, 16, 8, 2, first)
    x = block(b, x, "two", like, 5, 24, 8, 1, "hard_swish")
    x = block(b, x, "three", like, 3, 24, 12, 2, "hard_swish")
    graph = b.finish([one, "two", x])
    for node in graph.nodes:
        if node.op not in ("conv2d", "depthwise_conv2d"):
            continue
        linear = node.with_attributes(activation="none")
        nodes = [linear if other is node else other for other in graph.nodes]
        (values,) = features(prune(graph.copy(nodes=nodes, outputs=[node.output])), images()[:8])
        flat = values.reshape(-1, values.shape[-1])  # (n * h * w, C)
        in_squeeze = b.shape(node.output)[1] == 1  # one vector a picture: its channels' own spread would be far too small
        spread = flat.std() if in_squeeze else np.maximum(flat.std(0), 0.1)  # () or (C,)
        scale = np.broadcast_to(1 / spread, flat.shape[1])
        weights, bias = (graph.constants[name] for name in node.inputs[1:])
        graph.constants[node.inputs[1]] = weights * (scale[:, None, None, None] if node.op == "conv2d" else scale)
        if bias.any():
            centre = 3 if node.output.endswith(".gate") else 0.3
            graph.constants[node.inputs[2]] = (centre - (flat.mean(0) - bias) * scale).astype(np.float32)
    return graph


def features(graph: Graph, pictures: np.ndarray) -> list[np.ndarray]:
    return OnnxEngine(to_onnx(graph).SerializeToString(), 1).features(pictures)


@functools.cache
def quantised(like: str) -> Graph:
    """Calibrated on the first eight pictures."""
    graph = float_graph(like)
    every = graph.copy(outputs=[node.output for node in graph.nodes])
    statistics = calibrate(OnnxEngine(to_onnx(every).SerializeToString(), 1), [images()[:8]])
    low, high, mean = (f(images()[:8], (0, 1, 2)) for f in (np.min, np.max, np.mean))
    statistics["input"] = ChannelStatistics(low, high, mean)
    return quantize(*equalize(graph, statistics), affine_range(float(images().min()), float(images().max())))


def grid(graph: Graph, name: str) -> Quantization:
    quantization = graph.tensors[name].quantization
    assert quantization is not None
    return quantization


def integers(graph: Graph, pictures: np.ndarray) -> np.ndarray:
    x = grid(graph, "input")
    return np.clip(np.rint(pictures / x.scale[0]) + x.zero_point[0], -128, 127).astype(np.int8)


@pytest.mark.parametrize("like", NETWORKS)
def test_every_tensor_is_that_of_tflm_and_litert(like: str, rng: np.random.Generator) -> None:
    """All of them, logistic included: the grids are such that the two agree. On pictures and on noise."""
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
    pytest.importorskip("tflite_micro", reason="needs TFLM")
    graph = quantised(like)
    model = to_tflite(graph.copy(outputs=[node.output for node in graph.nodes]))
    engine, litert = Int8Engine(import_tflite(model), 1), LitertEngine(model)
    assert litert.exact
    noise = rng.integers(-128, 128, (2, SIZE, SIZE, 3)).astype(np.int8)
    batch = np.concatenate([integers(graph, images()[8:10]), noise])
    tflm = dict(zip(engine.graph.outputs, TflmEngine(model).features(batch), strict=True))
    for i, image in enumerate(batch):
        found = engine.all_tensors(image)
        oracles = {"TFLM": {name: maps[i] for name, maps in tflm.items()}, "LiteRT": litert.all_tensors(image)}
        oracles["the graph before export"] = Int8Engine(graph, 1).all_tensors(image)
        if i in (0, 3):
            oracles["the plain interpreter"] = integer_interpreter.run(engine.graph, image)
        for oracle, wanted in oracles.items():
            assert set(graph.activations) <= set(wanted) | {"input"}
            for name in set(found) & set(wanted):
                np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{oracle}: {name}")


@pytest.mark.parametrize("like", NETWORKS)
def test_int8_taps_are_near_the_float_ones(like: str) -> None:
    """Random layers make noise louder from block to block: a chain of ReLU6 without gates has 29, 28 and 25 dB here."""
    graph = quantised(like)
    wanted, found = features(float_graph(like), images()[8:]), Int8Engine(graph, 1).features(integers(graph, images()[8:]))
    for name, least, a, b in zip(graph.outputs, (25, 22, 19), wanted, found, strict=True):
        real = (b.astype(np.float64) - grid(graph, name).zero_point[0]) * grid(graph, name).scale[0]
        ratio = 10 * np.log10((a.astype(np.float64) ** 2).sum() / ((a - real) ** 2).sum())
        assert ratio > least, f"{name}: {ratio:.1f} dB"


@pytest.mark.parametrize("like", NETWORKS)
def test_grids_of_gates_and_curves(like: str) -> None:
    graph, real = quantised(like), float_graph(like)
    for node in graph.nodes:
        out = grid(graph, node.output)
        low = (-128 - int(out.zero_point[0])) * float(out.scale[0])
        if node.op == "logistic":
            assert (float(out.scale[0]), int(out.zero_point[0])) == (1 / 256, -128)
        if node.op == "hard_swish":
            assert -0.40 < low < -0.3
            x = grid(graph, node.inputs[0])
            assert (-128 - int(x.zero_point[0])) * float(x.scale[0]) > -3.05
        if node.attributes.get("activation") == "relu6":
            assert low == 0 and 255 * float(out.scale[0]) <= 6.0001
        if not real.constants.get(node.inputs[-1], np.ones(1)).any():
            assert graph.constants[node.inputs[-1]].dtype == np.int32  # no bias: a constant of zeros, corrected


@pytest.mark.parametrize("like", NETWORKS)
def test_the_plan_is_tflms_to_the_byte(like: str, tmp_path: Path) -> None:
    models = [to_tflite(quantised(like)), to_tflite(prune(quantised(like).copy(outputs=["one", "one.gated", "one.gate"])))]
    for model, answer in zip(models, tflm_arenas(tmp_path, models)):
        figures = arena(read_tflite(model))
        assert figures.head_kind == "exact" and (figures.head_bytes, figures.tail_bytes(8)) == answer


@pytest.mark.parametrize("like", NETWORKS)
def test_budget_and_latency_take_them(like: str) -> None:
    graph, target = float_graph(like), load_target("stm32f746")
    figures = arena(read_tflite(to_tflite(quantised(like))))
    assert figures.macs == lower_pads(graph).macs()
    assert not make_budget(target, ram_items(figures, 4096, target, None), []).problems
    assert estimate(figures.macs, target)["ms"] > 0


@pytest.mark.parametrize("like", NETWORKS)
def test_float_onnx_there_and_back(like: str, tmp_path: Path) -> None:
    graph = float_graph(like)
    image = images()[:1]
    wanted = run(graph, image)
    for name, found in zip(graph.outputs, features(graph, image)):
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-4)
    to_onnx(graph, tmp_path / "net.onnx")
    again = import_onnx(tmp_path / "net.onnx", outputs=graph.outputs)
    assert [node.op for node in again.nodes] == [node.op for node in graph.nodes]
    for name, found in zip(graph.outputs, features(again, image)):
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("like", NETWORKS)
def test_qdq_onnx_is_near_the_exact_engine(like: str) -> None:
    """onnxruntime rounds otherwise, and differences grow from layer to layer: to one step on average at the last tap."""
    graph = quantised(like)
    exact = Int8Engine(graph, 1).features(integers(graph, images()[8:]))
    found = OnnxEngine(to_onnx_qdq(graph).SerializeToString(), 1).features(images()[8:])
    for name, a, b in zip(graph.outputs, exact, found, strict=True):
        steps = b / float(grid(graph, name).scale[0]) + int(grid(graph, name).zero_point[0])
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        assert np.abs(steps - a).mean() < 1.5 and np.abs(steps - a).max() <= 10, name
