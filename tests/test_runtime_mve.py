"""The Helium kernels on an emulated Cortex-M55 against the exact engine: every output byte, no byte outside the buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from mve_board import Case, run_cases

from tinyvad.engines.int8 import Int8Engine
from tinyvad.export import packing_mve
from tinyvad.export.layers import Layer, layer_of
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.scratch import layer_scratch
from tinyvad.graph.scratch_mve import depthwise_scratch_mve

Expected = tuple[Case, np.ndarray]


def quantized(graph: Graph, name: str, scale: float, zero_point: int) -> None:
    grid = Quantization.per_tensor(float(np.float32(scale)), zero_point)
    graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=grid)


def weighted(
    rng: np.random.Generator, op: str, entry: tuple[int, ...], shape: tuple[int, ...], taps: int, **attributes: Any
) -> Graph:
    """Input -> op with random int8 weights; outputs use most of their range, a few channels saturate or round to little."""
    builder = GraphBuilder("one layer", (1, *entry))
    graph = builder.graph
    quantized(graph, builder.input, 0.05, int(rng.integers(-128, 128)))
    channels = shape[3] if op == "depthwise_conv2d" else shape[0]
    weights = builder.constant("weights", rng.integers(-127, 128, shape).astype(np.int8))
    bias = builder.constant("bias", rng.integers(-9000, 9000, channels).astype(np.int32))
    scale = np.float32(0.02) * np.exp(rng.normal(0, 1, channels)).astype(np.float32)
    axis = 3 if op == "depthwise_conv2d" else 0
    graph.tensors["weights"] = dataclasses.replace(
        graph.tensors["weights"], quantization=Quantization(scale, np.zeros(channels, np.int64), axis)
    )
    activation = str(rng.choice(["none", "relu", "relu6"]))
    builder.add(op, [builder.input, weights, bias], "out", activation=activation, **attributes)
    wanted_range = 0.05 * 0.02 * 70 * 70 * taps**0.5 * 3
    quantized(graph, "out", wanted_range / 128 * float(np.exp(rng.normal(0, 0.5))), int(rng.integers(-128, 128)))
    return builder.finish(["out"])


def expected(rng: np.random.Generator, graph: Graph) -> tuple[Layer, np.ndarray, np.ndarray]:
    """The layer, its input and what the exact engine makes of it."""
    image = rng.integers(-128, 128, graph.tensors[graph.inputs[0]].shape[1:]).astype(np.int8)
    wanted = Int8Engine(graph, threads=1).all_tensors(image)["out"]
    return layer_of(graph, graph.nodes[-1], "mve"), image, wanted.reshape(-1, *graph.tensors["out"].shape[-2:])


def planned(graph: Graph) -> int:
    """The planner's bytes of scratch: Helium's own formula where it has one, else that of all instruction sets."""
    node = graph.nodes[-1]
    return (depthwise_scratch_mve if node.op == "depthwise_conv2d" else layer_scratch)(graph, node)


def check(cases: list[Expected]) -> None:
    for ran, (case, wanted) in zip(run_cases([case for case, _ in cases]), cases, strict=True):
        np.testing.assert_array_equal(ran.output, wanted, err_msg=str(case))
        if case.planned:
            enough = ran.scratch == case.planned if case.layer.op == "DEPTHWISE" else ran.scratch <= case.planned
            assert enough, f"{ran.scratch} bytes of scratch, {case.planned} planned: {case.layer}"


def rows_read(layer: Layer, row: int, rows: int) -> tuple[int, int]:
    """First and past the last input row that these output rows depend on; at least one."""
    first = row * layer.stride[0] - layer.pad[0]
    last = first + (rows - 1) * layer.stride[0] + (layer.kernel[0] - 1) * layer.dilation
    low = min(max(first, 0), layer.in_shape[0] - 1)
    return low, max(min(last + 1, layer.in_shape[0]), low + 1)


def windows(rng: np.random.Generator, graph: Graph) -> list[Expected]:
    """All rows of a layer, and some rows with only the input rows that they need."""
    layer, image, wanted = expected(rng, graph)
    row = int(rng.integers(0, len(wanted)))
    rows = int(rng.integers(1, len(wanted) - row + 1))
    part = Case(layer, [image], row, rows, (rows_read(layer, row, rows),), at_end=bool(rng.random() < 0.5))
    whole = Case(layer, [image], at_end=bool(rng.random() < 0.7), planned=planned(graph))
    return [(whole, wanted), (part, wanted[row : row + rows])]


# lengths around the vector's 16 lanes and the kernels' own limits; channels around their blocks of two and four
LENGTHS = (1, 3, 7, 8, 15, 16, 17, 24, 27, 31, 32, 33, 40, 48, 63, 64, 65, 96, 130)
CHANNELS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 19)


def test_pointwise(rng: np.random.Generator) -> None:
    cases = []
    for i, length in enumerate(LENGTHS * 3):
        entry = (int(rng.integers(1, 5)), int(rng.integers(1, 8)), length)
        shape = (CHANNELS[(i * 7 + 3) % len(CHANNELS)], 1, 1, length)
        cases += windows(rng, weighted(rng, "conv2d", entry, shape, length, stride=(1, 1), pads=(0, 0, 0, 0)))
    check(cases)


def test_fully_connected(rng: np.random.Generator) -> None:
    cases = []
    for length in LENGTHS:
        shape = (int(rng.choice(CHANNELS)), length)
        cases.append(weighted(rng, "fully_connected", (length,), shape, length))
    check([(Case(layer, [image.reshape(1, 1, -1)]), wanted.reshape(1, 1, -1))
           for layer, image, wanted in (expected(rng, graph) for graph in cases)])  # fmt: skip


def geometry(rng: np.random.Generator, kernel: tuple[int, int], dilation: int) -> dict[str, Any]:
    reach = [(k - 1) * dilation + 1 for k in kernel]
    pads = tuple(int(rng.integers(0, reach[axis])) for axis in (0, 0, 1, 1))
    stride = tuple(int(s) for s in rng.choice([1, 1, 2, 3], 2))
    return {"stride": stride, "pads": pads, "dilation": (dilation, dilation)}


def size_for(rng: np.random.Generator, kernel: tuple[int, int], dilation: int, most: int) -> tuple[int, int]:
    height, width = ((k - 1) * dilation + 1 + int(rng.integers(0, most)) for k in kernel)
    return height, width


@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions(rng: np.random.Generator, dilation: int) -> None:
    cases = []
    for kernel in ((1, 1), (3, 3), (2, 2), (1, 3), (3, 1), (5, 5), (2, 5)):
        for channels in (1, 3, 4, 8, 17):
            size = size_for(rng, kernel, dilation, 9)
            shape = (int(rng.choice(CHANNELS)), *kernel, channels)
            attributes = geometry(rng, kernel, dilation)
            if kernel == (1, 1):
                attributes["stride"] = (2, 1)
            cases += windows(rng, weighted(rng, "conv2d", (*size, channels), shape, channels * kernel[0] * kernel[1],
                                           **attributes))  # fmt: skip
    check(cases)


def test_a_wide_stem_is_gathered_in_parts(rng: np.random.Generator) -> None:
    graph = weighted(rng, "conv2d", (9, 81, 3), (16, 3, 3, 3), 27, stride=(2, 2), pads=(1, 1, 1, 1), dilation=(1, 1))
    check(windows(rng, graph))


KERNELS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (9, 9), (3, 1), (1, 5), (7, 5), (2, 7), (6, 8))


@pytest.mark.parametrize("dilation", [1, 3])
def test_depthwise(rng: np.random.Generator, dilation: int) -> None:
    cases = []
    for kernel in KERNELS if dilation == 1 else KERNELS[:5]:
        for channels in (1, 7, 8, 9, 20):
            size = size_for(rng, kernel, dilation, 13)
            graph = weighted(rng, "depthwise_conv2d", (*size, channels), (1, *kernel, channels), kernel[0] * kernel[1],
                             **geometry(rng, kernel, dilation))  # fmt: skip
            cases += windows(rng, graph)
    check(cases)


def test_depthwise_in_place(rng: np.random.Generator) -> None:
    """Outputs no larger than inputs, in the input's place, rows packed at its front."""
    cases = []
    for kernel in ((3, 3), (5, 5), (7, 7), (2, 3)):
        for stride in ((1, 1), (2, 2), (1, 2), (3, 1)):
            channels = int(rng.choice([3, 8, 13, 16]))
            size = size_for(rng, kernel, 1, 14)
            pads = ((kernel[0] - 1) // 2, kernel[0] // 2, (kernel[1] - 1) // 2, kernel[1] // 2)
            graph = weighted(rng, "depthwise_conv2d", (*size, channels), (1, *kernel, channels), kernel[0] * kernel[1],
                             stride=stride, pads=pads, dilation=(1, 1))  # fmt: skip
            layer, image, wanted = expected(rng, graph)
            cases.append((Case(layer, [image], in_place=1, at_end=False), wanted))
            if image.shape == wanted.shape:
                cases.append((Case(layer, [image], in_place=1), wanted))
    check(cases)


@pytest.mark.parametrize(("width", "channels"), [(150, 7), (400, 4), (1500, 2)])
def test_depthwise_of_wide_maps_takes_fewer_channels_at_once(rng: np.random.Generator, width: int, channels: int) -> None:
    attributes = {"stride": (1, 1), "pads": (3, 3, 3, 3), "dilation": (1, 1)}
    graph = weighted(rng, "depthwise_conv2d", (7, width, channels), (1, 7, 7, channels), 49, **attributes)
    layer, image, wanted = expected(rng, graph)
    check([(Case(layer, [image], in_place=1, planned=planned(graph)), wanted), *windows(rng, graph)])
    assert planned(graph) <= 8192 or width == 1500


def test_sums_of_maps(rng: np.random.Generator) -> None:
    cases: list[Expected] = []
    for i in range(40):
        shape = tuple(int(s) for s in rng.integers(1, 8, 3))
        builder = GraphBuilder("sum", (1, *shape))
        graph = builder.graph
        builder.add("logistic", [builder.input], "second")
        builder.add("add", [builder.input, "second"], "out", activation=str(rng.choice(["none", "relu", "relu6"])))
        for name in (builder.input, "second", "out"):
            quantized(graph, name, float(np.exp(rng.normal(-3, 1))), int(rng.integers(-128, 128)))
        if i % 4 == 0:  # equal scales: no second rounding of either operand
            quantized(graph, "second", float(np.float32(0.05)), 3)
            quantized(graph, builder.input, float(np.float32(0.05)), -7)
        builder.finish(["out"])
        operands = [rng.integers(-128, 128, shape).astype(np.int8) for _ in range(2)]
        layer = layer_of(graph, graph.nodes[-1], "mve")
        wanted = sum_of(layer, operands)
        row = int(rng.integers(0, shape[0]))
        held = ((0, shape[0]), (row, shape[0]))
        cases += [(Case(layer, operands, in_place=i % 3), wanted), (Case(layer, operands, row, 0, held), wanted[row:])]
    check(cases)


def test_sums_of_maps_at_halves(rng: np.random.Generator) -> None:
    """No second rounding of the operands, (a + b) / 2 for the sum: 1 off a negative operand would show at every half."""
    operands = [rng.integers(-128, 128, (8, 8, 8)).astype(np.int8) for _ in range(2)]
    half = 1 << 30  # as a multiplier: 2**30 / 2**31
    layer = Layer("ADD", "out", (8, 8, 8), (8, 8, 8), bias=np.array([half, 0, half, 0, half, -19], np.int32))
    check([(Case(layer, operands), sum_of(layer, operands))])


def sum_of(layer: Layer, operands: list[np.ndarray]) -> np.ndarray:
    """TFLite's add: both operands to 2**20 times a common scale, then to the output's."""
    assert layer.bias is not None
    a, b = (
        multiply_by_quantized_multiplier((x.astype(np.int64) - zero) << 20, *layer.bias[2 * i : 2 * i + 2])
        for i, (x, zero) in enumerate(zip(operands, layer.zeros, strict=False))
    )
    out = multiply_by_quantized_multiplier(a + b, *layer.bias[4:6]) + layer.zeros[2]
    return np.clip(out, *layer.limits).astype(np.int8)


def rescaling_edges(rng: np.random.Generator, shifts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums, multipliers, shifts) int64 whose results fit int8: exact halves and their neighbours, and any others."""
    shift = rng.choice(shifts, count)
    multiplier = rng.choice([1 << 30, (1 << 31) - 1, -(1 << 30), -(1 << 31) + 1, 3 << 29], count)
    anything = rng.random(count) < 0.5
    multiplier[anything] = rng.integers(1 << 30, 1 << 31, count)[anything]
    result = rng.integers(-250, 251, count) / 2.0  # halves
    sums = np.rint(result * 2.0**31 / multiplier / 2.0**shift)
    limit = (2.0**31 - 1) / 2.0 ** np.maximum(shift, 0)
    sums = np.clip(sums + rng.integers(-2, 3, count), -limit, limit).astype(np.int64)
    return sums, multiplier, shift


@pytest.mark.parametrize("shifts", [np.arange(-31, 0), np.arange(-31, 31), np.arange(-4, 3)])
def test_rescaling_equals_double_rounding_at_its_edges(rng: np.random.Generator, shifts: np.ndarray) -> None:
    """Sums come in as biases of layers whose weights are 0; 1x1 of each path, and depthwise."""
    cases: list[Expected] = []
    count = 2048
    for length, kind in ((8, "CONV_1X1"), (16, "CONV_1X1"), (20, "CONV_1X1"), (40, "CONV_1X1"), (0, "DEPTHWISE")):
        sums, multiplier, shift = rescaling_edges(rng, shifts, count)
        shift8 = shift.astype(np.int8)
        zeros = (0, 0, int(rng.integers(-3, 4)))
        wanted = multiply_by_quantized_multiplier(sums, multiplier, shift) + zeros[2]
        constants = {"bias": sums.astype(np.int32), "multiplier": multiplier.astype(np.int32), "shift": shift8}
        if kind == "DEPTHWISE":
            weights, entry = packing_mve.pack_depthwise(np.zeros((3, 3, count), np.int8)), (3, 3, count)
            layer = Layer(kind, "out", entry, (1, 1, count), (3, 3), zeros=zeros, weights=weights, **constants)
        else:
            weights, entry = packing_mve.pack_conv_1x1(np.zeros((count, length), np.int8)), (1, 1, length)
            layer = Layer(kind, "out", entry, (1, 1, count), zeros=zeros, weights=weights, **constants)
        image = rng.integers(-128, 128, entry).astype(np.int8)
        cases.append((Case(layer, [image]), np.clip(wanted, -128, 127).astype(np.int8).reshape(1, 1, -1)))
        inside = np.abs(wanted) < 127
        assert inside.mean() > 0.6  # most results are not hidden by saturation
    check(cases)


# instructions a MAC, a twelfth above what was counted, by op, input shape, output channels, kernel, stride
GATES = {
    ("conv2d", (176, 176, 3), 16, 3, 2): 0.55,
    ("conv2d", (44, 44, 16), 80, 1, 1): 0.29,
    ("conv2d", (22, 22, 24), 120, 1, 1): 0.38,
    ("conv2d", (11, 11, 48), 240, 1, 1): 0.33,
    ("conv2d", (11, 11, 240), 40, 1, 1): 0.19,
    ("depthwise_conv2d", (44, 44, 80), 80, 3, 1): 0.92,
    ("depthwise_conv2d", (22, 22, 120), 120, 5, 1): 0.48,
    ("depthwise_conv2d", (44, 44, 80), 80, 5, 2): 0.66,
    ("depthwise_conv2d", (44, 44, 80), 80, 7, 1): 0.35,
    ("depthwise_conv2d", (11, 11, 240), 240, 7, 1): 0.47,
}


def test_instruction_counts(rng: np.random.Generator) -> None:
    """Layers of MCUNet-in3 at 176 pixels; counts repeat exactly. Over all of it CMSIS-NN takes 0.99 a MAC, this 0.34."""
    cases, macs = [], []
    for op, entry, channels, kernel, stride in GATES:
        shape = (1, kernel, kernel, channels) if op == "depthwise_conv2d" else (channels, kernel, kernel, entry[2])
        taps = kernel * kernel * (1 if op == "depthwise_conv2d" else entry[2])
        pad = kernel // 2
        graph = weighted(rng, op, entry, shape, taps, stride=(stride, stride), pads=(pad,) * 4, dilation=(1, 1))
        graph.nodes[0] = graph.nodes[0].with_attributes(activation="none")
        layer = layer_of(graph, graph.nodes[0], "mve")
        cases.append(Case(layer, [rng.integers(-128, 128, entry).astype(np.int8)], fenced=False))
        macs.append(taps * int(np.prod(layer.out_shape)))
    for ran, (name, gate), count in zip(run_cases(cases), GATES.items(), macs, strict=True):
        assert ran.instructions / count <= gate, f"{name}: {ran.instructions / count:.3f} instructions a MAC, gate {gate}"
    maps = [rng.integers(-128, 128, (44, 44, 16)).astype(np.int8) for _ in range(2)]
    bias = np.array([1518500250, -1, 1734500250, -1, 1250123456, -18], np.int32)
    (ran,) = run_cases([Case(Layer("ADD", "out", (44, 44, 16), (44, 44, 16), bias=bias), maps, fenced=False)])
    assert ran.instructions / maps[0].size <= 5.2
