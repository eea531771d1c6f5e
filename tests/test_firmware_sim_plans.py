"""Plans of our own runtime, followed step by step in one arena: random networks by rows, real ones by numbers."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_interpreter import check_rows, run

from tinyvad.backbones.source import open_backbone
from tinyvad.calibration import quantize_on
from tinyvad.demo import render_part
from tinyvad.embedding import Embedding, make_taps
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.plans import STRATEGIES, plan
from tinyvad.graph import scratch as kernels
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Node, Quantization
from tinyvad.graph.passes import prune
from tinyvad.graph.quantize import ChannelStatistics, affine_range, quantize
from tinyvad.graph.schedule import EMBED, FRAME, MOVE, NODE, SCORE, Schedule, Step
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Preprocessing, apply_table

GRID = (5, 4)
FRAMES = (None, "40x30-rgb565")
SCORER = 200  # bytes of scratch, as other numbers here: any will do


def layer_scratch(graph: Graph, node: Node) -> int:
    """Not our kernels' but some for every window op."""
    return 3 * graph.tensors[node.output].shape[-1] * (1 + len(node.inputs)) if "pads" in node.attributes else 0


def planned(graph: Graph, strategy: str, frame: str | None, limit: int | None = None) -> Schedule:
    embed = [16 * (i + 1) for i in range(len(graph.outputs))]
    return plan(graph, GRID, strategy, frame, SCORER, embed, limit, layer_scratch)


def scratch_of(graph: Graph, frame: str | None) -> functools.partial[int]:
    return functools.partial(_scratch, graph, frame)


def _scratch(graph: Graph, frame: str | None, step: Step) -> int:
    if step.kind == NODE:
        return layer_scratch(graph, graph.nodes[step.index])
    if step.kind == FRAME:
        return 0 if frame is None else kernels.frame_scratch(30, 40, *graph.tensors[graph.inputs[0]].shape[1:3])
    return 16 * (step.index + 1) if step.kind == EMBED else SCORER


# --- random networks ---


@st.composite
def networks(draw: st.DrawFn) -> Graph:
    """Int8 graphs of up to twelve nodes of every kind, with branches; only shapes matter, so that constants are zeros."""
    height, width = draw(st.integers(4, 21)), draw(st.integers(1, 5))
    b = GraphBuilder("random", (1, height, width, draw(st.integers(1, 3))))
    names = [b.input]
    for i in range(draw(st.integers(1, 12))):
        recent = st.sampled_from(names[-4:])
        x = draw(recent)
        shape = b.shape(x)
        op = draw(st.sampled_from(
            ["conv2d", "depthwise_conv2d", "depthwise_conv2d", "add", "add", "mul", "relu", "hard_swish", "average_pool",
             "pad", "resize_nearest", "concat", "gate", "conv2d"]
        ))  # fmt: skip
        name = f"{op}{i}"
        if op in ("conv2d", "depthwise_conv2d", "average_pool"):
            kernel, dilation = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 1, 2]))
            if op == "average_pool":
                dilation = 1
            stride = draw(st.sampled_from([1, 1, 1, 2, 3]))
            reach = dilation * (kernel - 1) + 1
            pads = (draw(st.integers(0, kernel - 1)), draw(st.integers(0, kernel - 1)), kernel - 1, kernel - 1)
            if min(shape[1] + pads[0] + pads[1], shape[2] + 2 * kernel - 2) < reach:
                continue
            attributes = {"stride": (stride, draw(st.sampled_from([1, stride]))), "pads": pads, "activation": "none"}
            if op == "average_pool":
                names.append(b.add(op, [x], name, kernel=(kernel, kernel), **attributes))
                continue
            channels = draw(st.integers(1, 8)) if op == "conv2d" else shape[3]
            weights = (channels, kernel, kernel, shape[3]) if op == "conv2d" else (1, kernel, kernel, shape[3])
            w = b.constant(f"w{i}", np.zeros(weights, np.int8))
            o = b.constant(f"b{i}", np.zeros(channels, np.int32))
            names.append(b.add(op, [x, w, o], name, dilation=(dilation, dilation), **attributes))
        elif op in ("add", "mul", "concat"):
            others = [n for n in names if b.shape(n) == shape]
            operands = [x, draw(st.sampled_from(others))]
            names.append(b.add(op, operands, name, **({"axis": 3} if op == "concat" else {"activation": "none"})))
        elif op == "pad":
            names.append(b.add("pad", [x], name, pads=(draw(st.integers(0, 2)), draw(st.integers(0, 2)), 1, 0)))
        elif op == "resize_nearest":
            size = (draw(st.integers(1, 2 * shape[1])), shape[2])
            names.append(b.add("resize_nearest", [x], name, size=size, half_pixel_centers=draw(st.booleans())))
        elif op == "gate":
            gate = b.add("logistic", [b.add("mean", [x], f"mean{i}")], name)
            names.append(b.add("mul", [x, gate], f"gated{i}", activation="none"))
        else:
            names.append(b.add(op, [x], name))
    taps = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    graph = prune(b.finish(taps))
    one = Quantization.per_tensor(1.0, 0)
    for name in graph.activations:
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=one)
    return graph


@settings(max_examples=120, deadline=None)
@given(networks(), st.sampled_from(FRAMES))
def test_random_networks_row_by_row(graph: Graph, frame: str | None) -> None:
    sizes = []
    for strategy in STRATEGIES:
        schedule = planned(graph, strategy, frame)
        check_rows(graph, schedule, scratch_of(graph, frame))
        sizes.append(schedule.lower_bound_bytes)
    assert sizes[2] <= sizes[1] <= sizes[0]


@settings(max_examples=60, deadline=None)
@given(networks(), st.floats(0, 1))
def test_any_limit_is_kept_if_a_plan_can(graph: Graph, share: float) -> None:
    least, most = (planned(graph, strategy, None) for strategy in ("patch", "layerwise"))
    limit = int(least.arena_bytes + share * (most.arena_bytes - least.arena_bytes))
    for strategy in ("patch", "auto"):
        found = planned(graph, strategy, None, limit)
        check_rows(graph, found, scratch_of(graph, None))
        assert found.arena_bytes <= max(limit, least.arena_bytes)
        assert len(found.steps) <= len(least.steps) or found.arena_bytes > limit


# --- real networks, real numbers ---


@functools.cache
def real(name: str, size: int) -> tuple[Graph, np.ndarray, Embedding]:
    """An int8 network as it is read back from its file, an input, and an embedding on ``GRID``."""
    backbone = open_backbone(name, weights="random")
    preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
    parts = [render_part(np.random.default_rng(seed), size, None)[0] for seed in range(2)]
    calibrated = quantize_on(backbone.graph_at(size), preprocessing, parts[:1])
    graph = import_tflite(to_tflite(calibrated.graph))
    taps = make_taps([graph.tensors[tap] for tap in graph.outputs], [1.0] * len(graph.outputs), False)
    return graph, apply_table(parts[1], calibrated.table), Embedding(taps, GRID)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    ("name", "size"),
    [("mcunet-in3", 64), ("mcunet-in1", 75), ("mobilenet-v2-0.35", 64), ("mobilenet-v3-small", 69), ("phinet-mcu", 48),
     ("filter-bank", 57)],
)  # fmt: skip
def test_every_row_is_the_exact_engines(name: str, size: int, frame: str | None, strategy: str) -> None:
    graph, image, embedding = real(name, size)
    schedule = planned(graph, strategy, frame)
    check_rows(graph, schedule, scratch_of(graph, frame))
    run(graph, schedule, image, embedding, scratch_of(graph, frame), np.random.default_rng(1))


# --- what the plans are for ---


@functools.cache
def trunk(*layers: str) -> Graph:
    """MCUNet-in3 at 176 px, cut after the last of the layers (or of the default ones)."""
    graph = open_backbone("mcunet-in3", list(layers) or None, weights="random").graph_at(176)
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-1.0, 1.0, 0.0)))
        for name in graph.activations
    }
    return import_tflite(to_tflite(quantize(graph, blank, affine_range(-1, 1), bias_correction=False)))


CAMERA = "320x240-rgb565"


@pytest.mark.parametrize("layers", [(), ("block4", "block7", "block17")], ids=["default", "whole trunk"])
@pytest.mark.parametrize(
    ("strategy", "frame", "most"),
    [("inplace-dw", None, 260_000), ("inplace-dw", CAMERA, 260_000), ("patch", None, 112_000), ("patch", CAMERA, 80_000)],
)
def test_mcunet_in3_at_176_pixels(layers: tuple[str, ...], strategy: str, frame: str | None, most: int) -> None:
    """TinyEngine's published 260 KB, and far less by rows; with the scratch of our kernels, every row where it belongs."""
    graph = trunk(*layers)
    schedule = plan(graph, (11, 11), strategy, frame, 1000, (2000,) * 3)

    def scratch(step: Step) -> int:
        if step.kind == NODE:
            return kernels.layer_scratch(graph, graph.nodes[step.index])
        if step.kind == FRAME:
            return 0 if frame is None else kernels.frame_scratch(240, 320, 176, 176)
        return 2000 if step.kind == EMBED else 1000

    check_rows(graph, schedule, scratch)
    assert schedule.activation_bytes <= most
    assert schedule.arena_bytes <= most + 12_000  # the embedding's parts and the scorer
    assert schedule.extra_macs == 0


def chain(height: int = 12) -> GraphBuilder:
    """An input of (1, height, 4, 16): 64 bytes a row."""
    return GraphBuilder("chain", (1, height, 4, 16))


def as_int8(b: GraphBuilder, taps: list[str]) -> Graph:
    graph = b.finish(taps)
    for name in graph.activations:
        one = Quantization.per_tensor(1.0, 0)
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=one)
    return graph


def depthwise(b: GraphBuilder, x: str, name: str, kernel: int = 3, stride: int = 1) -> str:
    w = b.constant(f"{name}.w", np.zeros((1, kernel, kernel, 16), np.int8))
    o = b.constant(f"{name}.b", np.zeros(16, np.int32))
    geometry = {"stride": (stride, stride), "pads": (kernel // 2,) * 4, "dilation": (1, 1)}
    return b.add("depthwise_conv2d", [x, w, o], name, activation="none", **geometry)


def no_scratch(graph: Graph, node: Node) -> int:
    return 0


def bare(graph: Graph, strategy: str, frame: str | None = None) -> Schedule:
    """With a score map of one cell, so that parts take 16 bytes each and the map another 16."""
    return plan(graph, (1, 1), strategy, frame, layer_scratch=no_scratch)


def test_sizes_by_hand() -> None:
    """768 bytes a map, 64 a row; a depthwise layer of stride 1, one of stride 2 (6 rows of 2 pixels, 192 bytes)."""
    b = chain()
    y = depthwise(b, depthwise(b, b.input, "one"), "two", stride=2)
    graph = as_int8(b, [y])
    assert bare(graph, "layerwise").activation_bytes == 768 + 768
    in_place = bare(graph, "inplace-dw")
    assert in_place.activation_bytes == 768
    assert [in_place.places[name].offset for name in ("input", "one", "two")] == [0, 0, 0]
    by_rows = bare(graph, "patch", "4x12-rgb888")
    # a row of two needs two more of one, which read four rows of the input; the output is whole when it is embedded
    assert by_rows.activation_bytes == by_rows.arena_bytes == 192 + 4 * 64 + 3 * 64
    assert (by_rows.places["input"].rows, by_rows.places["one"].rows) == (4, 3)
    assert [step.output.tensor for step in by_rows.steps].count("one") > 6  # first rows come before the first of two


def test_a_residual_block_by_rows_is_written_on_its_input() -> None:
    """x + depthwise(x's expansion): y takes x's place, of the others only rows are there."""
    b = chain(48)
    x = b.add("relu", [b.input], "x")
    y = b.add("add", [x, depthwise(b, b.add("relu", [x], "wide"), "dw")], "y", activation="none")
    graph = as_int8(b, [y])
    schedule = bare(graph, "patch")
    assert schedule.places["y"].offset == schedule.places["x"].offset == schedule.places["input pixels"].offset
    assert schedule.activation_bytes == 48 * 64 + 3 * 64 + 64  # one map, three rows of wide, one of dw


def test_what_is_made_in_the_place_of_a_sum_is_there_from_its_first_operand_on() -> None:
    """left + conv(twin), left made in the sum's place: twin, which dies in between, may not have those bytes."""
    b = chain(48)
    left = b.add("relu", [b.input], "left")
    twin = b.add("relu6", [b.input], "twin")
    w, o = b.constant("w", np.zeros((16, 1, 1, 16), np.int8)), b.constant("o", np.zeros(16, np.int32))
    geometry = {"stride": (1, 1), "pads": (0,) * 4, "dilation": (1, 1), "activation": "none"}
    total = b.add("add", [left, b.add("conv2d", [twin, w, o], "right", **geometry)], "total", activation="none")
    graph = as_int8(b, [b.add("conv2d", [total, w, o], "y", **geometry)])
    for strategy in STRATEGIES:
        check_rows(graph, bare(graph, strategy, "4x48-rgb888"), lambda step: 0)
    places = bare(graph, "patch", "4x48-rgb888").places
    assert places["left"].alias_of == "total" and places["total"].rows == places["twin"].rows == 1


def test_an_operand_that_is_read_once_more_below_is_not_written_on() -> None:
    """y = x + dw(x): dw's next row reads rows of x that y's rows would lie on, but for whole maps y may take x's place."""
    b = chain(48)
    x = b.add("relu", [b.input], "x")
    y = b.add("add", [x, depthwise(b, x, "dw")], "y", activation="none")
    graph = as_int8(b, [y])
    for strategy in STRATEGIES:
        check_rows(graph, bare(graph, strategy), lambda step: 0)
    in_place = bare(graph, "inplace-dw")
    assert in_place.places["y"].alias_of in ("x", "dw")
    by_rows = bare(graph, "patch").places
    assert by_rows["y"].offset != by_rows["x"].offset or by_rows["dw"].rows == 48


def test_a_tap_lives_on_only_if_it_is_read() -> None:
    b = chain()
    x = depthwise(b, b.input, "x")
    y = depthwise(b, x, "y")
    graph = as_int8(b, [x, y])
    for strategy in STRATEGIES:
        schedule = bare(graph, strategy)
        kinds = [(step.kind, step.output.tensor) for step in schedule.steps if step.kind != MOVE]
        assert kinds.index((EMBED, "embedding of x")) == max(i for i, kind in enumerate(kinds) if kind == (NODE, "x")) + 1
        assert kinds[-2:] == [(EMBED, "embedding of y"), (SCORE, "score map")]
        assert schedule.places["y"].last_use == len(schedule.steps) - 2
        for part in ("embedding of x", "embedding of y", "score map"):
            assert schedule.places[part].last_use == len(schedule.steps) - 1


def test_auto_works_in_place_if_that_fits() -> None:
    graph = trunk()
    wanted = {400_000: "inplace-dw", 300_000: "inplace-dw", 200_000: "patch", 1000: "patch"}
    found = {limit: plan(graph, (11, 11), "auto", CAMERA, limit=limit) for limit in wanted}
    assert {limit: schedule.strategy for limit, schedule in found.items()} == wanted
    assert found[200_000].arena_bytes <= 200_000
    assert found[1000].arena_bytes == plan(graph, (11, 11), "patch", CAMERA).arena_bytes > 1000  # the least there is
    assert len(found[200_000].steps) < len(found[1000].steps) / 4


def test_what_cannot_be_planned() -> None:
    graph = as_int8(b := chain(), [depthwise(b, b.input, "y")])
    with pytest.raises(InputError, match="strategy 'best'"):
        bare(graph, "best")
    with pytest.raises(InputError, match="320x240-rgb565"):
        bare(graph, "patch", "320x240")
    with pytest.raises(InputError, match="scratch for 2 taps"):
        plan(graph, (1, 1), "patch", embed_scratch=(1, 2), layer_scratch=no_scratch)
    with pytest.raises(InputError, match="only int8"):
        bare(graph.copy(tensors={**graph.tensors, "y": dataclasses.replace(graph.tensors["y"], dtype="float32")}), "patch")
    with pytest.raises(InputError, match="no map"):
        b = chain()
        bare(as_int8(b, [b.add("reshape", [b.input], "y", shape=(1, 768))]), "patch")
    with pytest.raises(InputError, match="tapped twice"):
        bare(graph.copy(outputs=["y", "y"]), "patch")
