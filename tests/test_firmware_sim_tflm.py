"""What TFLM's users get: an offline plan that the interpreter follows, and its kernels for Arm counted."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from test_firmware_sim_memory import tflm_arenas

from tinyvad.backbones.source import open_backbone
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.cmsis_nn_kernels import INSTRUCTION_SETS, instruction_set, scratch_nbytes
from tinyvad.firmware_sim.memory import align, arena, lower_bound, plan_tflm_greedy, tflite_buffers
from tinyvad.firmware_sim.offline_plan import offline_plan, planned_tflite
from tinyvad.firmware_sim.targets import load_target
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.quantize import ChannelStatistics, affine_range, quantize
from tinyvad.graph.tflite_file import TfliteFile, read_tflite
from tinyvad.graph.tflite_import import import_tflite


@functools.cache
def backbone(name: str, size: int) -> Graph:
    """Int8 with made-up ranges: its plan depends on shapes alone."""
    graph = open_backbone(name, weights="random").graph_at(size)
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-1.0, 1.0, 0.0)))
        for name in graph.activations
    }
    return quantize(graph, blank, affine_range(-1, 1), bias_correction=False)


# --- the offline plan ---


def test_the_interpreter_follows_an_offline_plan(tmp_path: Path) -> None:
    """The head is what we say, smaller than its own, and no output changes."""
    graphs = [backbone("mcunet-in3", 96), backbone("phinet-mcu", 96)]
    plain, planned = [to_tflite(graph, "x") for graph in graphs], [planned_tflite(graph, "x") for graph in graphs]
    heads = [answer[0] for answer in tflm_arenas(tmp_path, plain + planned)]
    ours = [arena(read_tflite(model)) for model in plain + planned]
    assert heads == [figures.head_bytes for figures in ours]
    assert {figures.head_kind for figures in ours} == {"exact"}
    assert heads[2] < heads[0] and heads[3] < heads[1]
    assert heads[2] == ours[2].lower_bound_bytes  # there is no better one
    images = np.random.default_rng(3).integers(-128, 128, (2, 96, 96, 3)).astype(np.int8)
    for before, after in zip(plain, planned, strict=True):
        for x, y in zip(TflmEngine(before).features(images), TflmEngine(after).features(images), strict=True):
            np.testing.assert_array_equal(x, y)
        for x, y in zip(TflmEngine(before).features(images), LitertEngine(after).features(images), strict=True):
            np.testing.assert_array_equal(x, y)
        assert [t.name for t in read_tflite(after).tensors] == [t.name for t in read_tflite(before).tensors]
        assert to_tflite(import_tflite(after), "x") == before  # but for the plan, the same file


def test_the_default_network_gains_what_greedy_loses() -> None:
    file = read_tflite(to_tflite(backbone("mcunet-in3", 176)))
    offsets = offline_plan(file)
    assert offsets is not None
    buffers = tflite_buffers(file)
    fixed = [dataclasses.replace(buffer, offset=offsets[buffer.name]) for buffer in buffers]
    assert plan_tflm_greedy(buffers).head_bytes == 371_712  # published beside TFLM's own figure, reference/embedded.md
    assert plan_tflm_greedy(fixed).head_bytes == lower_bound(buffers) == 340_736


def test_no_plan_where_greedy_loses_nothing() -> None:
    graph = backbone("mcunet-in1", 96)
    assert offline_plan(read_tflite(to_tflite(graph))) is None
    assert planned_tflite(graph) == to_tflite(graph)


@pytest.mark.parametrize("offsets", [{"nothing": 0}, {"input": 8}, {"input": -16}])
def test_offsets_that_no_file_can_have(offsets: dict[str, int]) -> None:
    with pytest.raises(InputError, match="plan again"):
        to_tflite(backbone("mcunet-in1", 96), offsets=offsets)


# --- kernels for Arm ---


def one_layer(op: str, kernel: int, channels: int, stride: int = 1, out: int = 0, dilation: int = 1) -> TfliteFile:
    """A file of one operator on a 44x44 map."""
    b = GraphBuilder("one", (1, 44, 44, channels))
    around = (dilation * (kernel // 2),) * 4 if stride == 1 else (0, 1, 0, 1)  # as TFLite's SAME, so that no kernel changes
    attributes = {"stride": (stride, stride), "pads": around, "activation": "none"}
    if op == "average_pool":
        y = b.add(op, [b.input], "y", kernel=(kernel, kernel), **{**attributes, "pads": (0, 0, 0, 0)})
    else:
        shape = (out, kernel, kernel, channels) if op == "conv2d" else (1, kernel, kernel, channels)
        w = b.constant("w", np.zeros(shape, np.int8))
        o = b.constant("b", np.zeros(out or channels, np.int32))
        y = b.add(op, [b.input, w, o], "y", dilation=(dilation, dilation), **attributes)
    graph = b.finish([y])
    for name, tensor in graph.tensors.items():
        dtype = "int32" if name == "b" else "int8"
        graph.tensors[name] = dataclasses.replace(tensor, dtype=dtype, quantization=Quantization.per_tensor(0.5, 0))
    return read_tflite(to_tflite(graph))


@pytest.mark.parametrize(("layer", "expected"), [  # the figures that CMSIS-NN itself gave, reference/kernels.md section 7
    (("conv2d", 3, 3, 2, 16), (112, 112, 128)),  # the stem: M3, M4 and M7, M55
    (("conv2d", 1, 96, 1, 480), (0, 0, 0)),
    (("depthwise_conv2d", 3, 80, 1), (0, 0, 4464)),
    (("depthwise_conv2d", 3, 288, 1), (0, 0, 4464)),
    (("depthwise_conv2d", 5, 64, 1), (0, 3200, 12400)),
    (("depthwise_conv2d", 7, 80, 1), (0, 7840, 24304)),
    (("depthwise_conv2d", 7, 480, 1), (0, 47040, 24304)),
    # by hand: 5 * 5 * 6 = 150 values; two windows of 152 int16, four of 160 int8
    (("conv2d", 5, 6, 1, 8), (608, 608, 640)),
    (("average_pool", 2, 24, 2), (0, 96, 0)),  # int32 sums of 24 channels
    (("depthwise_conv2d", 5, 64, 1, 0, 2), (0, 0, 0)),  # dilated: the plain kernel
])  # fmt: skip
def test_scratch_of_cmsis_nn(layer: tuple[str, int, int, int], expected: tuple[int, int, int]) -> None:
    file = one_layer(*layer)
    op = next(op for op in file.operators if op.op != "PAD")
    for isa, nbytes in zip(INSTRUCTION_SETS, expected, strict=True):
        assert scratch_nbytes(file, op, isa) == ([nbytes] if nbytes else [])


def test_an_arena_with_cmsis_nn() -> None:
    """One 7x7 layer of 80 channels: input, output and scratch are live at once; a handle for it in the tail."""
    file = one_layer("depthwise_conv2d", 7, 80)
    plain, maps = arena(file), 44 * 44 * 80
    assert (plain.head_bytes, plain.head_kind) == (2 * maps, "exact")
    for isa, scratch in zip(INSTRUCTION_SETS, (0, 7840, 24304), strict=True):
        figures = arena(file, "cmsis_nn", isa)
        assert (figures.head_bytes, figures.head_kind) == (2 * maps + align(scratch), "modelled")
        assert [buffer.owner for buffer in figures.buffers].count("scratch") == (scratch > 0)
        assert figures.tail_bytes_modelled[4].get("scratch_handles", 0) == (4 if scratch else 0)


def test_the_sums_of_weights_of_a_fully_connected_layer_under_helium() -> None:
    b = GraphBuilder("fc", (1, 64))
    constants = [b.constant("w", np.zeros((40, 64), np.int8)), b.constant("b", np.zeros(40, np.int32))]
    y = b.add("fully_connected", [b.input, *constants], "y", activation="none")
    graph = b.finish([y])
    for name, tensor in graph.tensors.items():
        dtype = "int32" if name == "b" else "int8"
        graph.tensors[name] = dataclasses.replace(tensor, dtype=dtype, quantization=Quantization.per_tensor(0.5, 0))
    file = read_tflite(to_tflite(graph))
    tails = [arena(file, "cmsis_nn", isa).tail_bytes_modelled[4].get("channel_multipliers", 0) for isa in INSTRUCTION_SETS]
    assert tails == [0, 0, 4 * 40]


def test_instruction_sets_of_targets() -> None:
    names = ("rp2040", "stm32f746", "nrf52840", "corstone-300")
    assert [instruction_set(load_target(name).isa) for name in names] == ["scalar", "dsp", "dsp", "mve"]


def test_unknown_kernels() -> None:
    file = one_layer("average_pool", 2, 24, 2)
    for kernels, isa in (("fast", "dsp"), ("cmsis_nn", "neon")):
        with pytest.raises(InputError, match="cmsis_nn"):
            arena(file, kernels, isa)
