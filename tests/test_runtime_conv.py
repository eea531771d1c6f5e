"""The runtime's matrix kernels against the exact engine: random layers, any rows of them, plain C and the DSP path."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from c_runtime import RUNTIME, WARNINGS, compiler, library, run_layer

from tinyvad.engines.int8 import Int8Engine
from tinyvad.errors import InputError
from tinyvad.export.layers import Layer, layer_of
from tinyvad.export.packing import pack_conv_1x1
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.scratch import layer_scratch

SOURCES = (
    "tvad_clamp_outputs", "tvad_conv", "tvad_conv_1x1", "tvad_fully_connected", "tvad_matrix", "tvad_matrix_dsp",
)  # fmt: skip
PATHS = {"plain": (), "dsp": ("-DTVAD_DSP_EMULATE=1",)}
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
INT32 = np.iinfo(np.int32)


def kernels(path: str) -> ctypes.CDLL:
    return library(SOURCES, PATHS[path])


def weighted(
    rng: np.random.Generator, op: str, entry: tuple[int, ...], shape: tuple[int, ...], wild: bool = False, **attributes: Any
) -> Graph:
    """Input -> op -> output with random weights; wild: shifts of all kinds and multipliers of 0."""
    while True:
        builder = GraphBuilder("one layer", (1, *entry))
        length = int(np.prod(shape[1:]))
        scale = np.exp(rng.normal(0, 4 if wild else 0.7, shape[0]))
        scale[rng.random(shape[0]) < (0.1 if wild else 0)] = 1e-20
        builder.constant("weights", rng.integers(-127, 128, shape).astype(np.int8))
        builder.constant("bias", rng.integers(-20000, 20000, shape[0]).astype(np.int32))
        tensors = builder.graph.tensors
        builder.add(op, [builder.input, "weights", "bias"], "out", activation=str(rng.choice(ACTIVATIONS)), **attributes)
        out_scale = 74 * 74 * np.sqrt(length) / 60
        for name, grid in {
            "input": Quantization.per_tensor(1.0, int(rng.integers(-128, 128))),
            "weights": Quantization(scale.astype(np.float32), np.zeros(shape[0], np.int64), 0),
            "bias": Quantization(scale.astype(np.float32), np.zeros(shape[0], np.int64), 0),
            "out": Quantization.per_tensor(float(np.float32(out_scale)), int(rng.integers(-128, 128))),
        }.items():
            dtype = "int32" if name == "bias" else "int8"
            tensors[name] = dataclasses.replace(tensors[name], dtype=dtype, quantization=grid)
        graph = builder.finish(["out"])
        try:
            layer_of(graph, graph.nodes[-1])
        except InputError:  # a sum, shifted left, could leave int32
            continue
        return graph


ACTIVATIONS = ("none", "relu", "relu6")


def answer(rng: np.random.Generator, graph: Graph) -> tuple[Layer, np.ndarray, np.ndarray]:
    """The layer, an input and the exact engine's output."""
    image = rng.integers(-128, 128, graph.tensors["input"].shape[1:]).astype(np.int8)
    image.ravel()[: rng.integers(0, 3)] = -128
    layer = layer_of(graph, graph.nodes[-1])
    return layer, image, Int8Engine(graph, threads=1).all_tensors(image)["out"].reshape(layer.out_shape)


def needed_rows(layer: Layer, row: int, rows: int) -> tuple[int, int]:
    """First and past the last input row under the kernel, at least one row."""
    first = row * layer.stride[0] - layer.pad[0]
    past = first + (rows - 1) * layer.stride[0] + (layer.kernel[0] - 1) * layer.dilation + 1
    height = layer.in_shape[0]
    first = min(max(first, 0), height - 1)
    return first, max(min(past, height), first + 1)


def check(rng: np.random.Generator, graph: Graph, windows: bool = True) -> None:
    """Whole map and some rows of it with only the input rows that they need, on both paths."""
    layer, image, wanted = answer(rng, graph)
    scratch = layer_scratch(graph, graph.nodes[-1])
    row = int(rng.integers(0, len(wanted)))
    rows = int(rng.integers(1, len(wanted) - row + 1))
    for path in PATHS:
        found = run_layer(layer, [image], lib=kernels(path), scratch=scratch)
        np.testing.assert_array_equal(found, wanted, err_msg=f"{path}: {layer}")
        if windows:
            held = needed_rows(layer, row, rows)
            found = run_layer(layer, [image], lib=kernels(path), scratch=scratch, row=row, rows=rows, in_rows=held)
            np.testing.assert_array_equal(found, wanted[row : row + rows], err_msg=f"{path}, {row} {rows}: {layer}")


def random_conv(rng: np.random.Generator, most_channels: int = 9, wild: bool = False) -> Graph:
    kernel = rng.integers(1, 6, 2)
    dilation = int(rng.integers(1, 3))
    pads = tuple(int(rng.integers(0, (kernel[axis] - 1) * dilation + 1)) for axis in (0, 0, 1, 1))
    least = (kernel - 1) * dilation + 1
    size = [int(rng.integers(max(1, least[axis] - pads[2 * axis] - pads[2 * axis + 1]), 14)) for axis in (0, 1)]
    channels, outputs = (int(n) for n in rng.integers(1, most_channels, 2))
    stride = tuple(int(s) for s in rng.integers(1, 4, 2))
    return weighted(
        rng, "conv2d", (*size, channels), (outputs, *(int(k) for k in kernel), channels), wild,
        stride=stride, pads=pads, dilation=(dilation, dilation),
    )  # fmt: skip


def pointwise(rng: np.random.Generator, size: tuple[int, int], length: int, outputs: int, wild: bool = False) -> Graph:
    shape, plain = (outputs, 1, 1, length), {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1)}
    return weighted(rng, "conv2d", (*size, length), shape, wild, **plain)


@pytest.mark.parametrize("wild", [False, True])
def test_pointwise(rng: np.random.Generator, wild: bool) -> None:
    for length in (*range(1, 40), 48, 63, 80, 96):
        size = (int(rng.integers(1, 5)), int(rng.integers(1, 7)))
        check(rng, pointwise(rng, size, length, int(rng.integers(1, 20)), wild))


@pytest.mark.parametrize("length", [480, 1023, 1024, 1025, 1300])
def test_long_pointwise(rng: np.random.Generator, length: int) -> None:
    check(rng, pointwise(rng, (3, 3), length, 5))


@pytest.mark.parametrize("wild", [False, True])
def test_convolutions(rng: np.random.Generator, wild: bool) -> None:
    for _ in range(60):
        check(rng, random_conv(rng, wild=wild))


@pytest.mark.parametrize(("channels", "outputs"), [(3, 16), (75, 4), (76, 4), (130, 3)])
def test_three_by_three(rng: np.random.Generator, channels: int, outputs: int) -> None:
    """The stem's shape; as many values under a kernel as four pixels are gathered for, 680, and beyond that and 1024."""
    attributes: dict[str, Any] = {"stride": (2, 2), "pads": (1, 0, 0, 1), "dilation": (1, 1)}
    for size in ((9, 11), (8, 6)):
        check(rng, weighted(rng, "conv2d", (*size, channels), (outputs, 3, 3, channels), **attributes))


@pytest.mark.parametrize("wild", [False, True])
def test_fully_connected(rng: np.random.Generator, wild: bool) -> None:
    for _ in range(20):
        length, outputs = (int(n) for n in rng.integers(1, 90, 2))
        check(rng, weighted(rng, "fully_connected", (length,), (outputs, length), wild), windows=False)
    check(rng, weighted(rng, "fully_connected", (2100,), (3, 2100)), windows=False)


def test_any_multiplier(rng: np.random.Generator) -> None:
    """Multipliers that no scale gives, negative ones among them, with every shift."""
    for path in PATHS:
        layer, image, _ = answer(rng, pointwise(rng, (3, 7), 6, 256))
        weights = rng.integers(-128, 128, (256, 6)).astype(np.int8)
        layer = dataclasses.replace(
            layer, weights=pack_conv_1x1(weights), limits=(-100, 90),
            multiplier=rng.integers(INT32.min + 1, INT32.max, 256, endpoint=True).astype(np.int32),
            shift=rng.integers(-31, 8, 256).astype(np.int8),
        )  # fmt: skip
        assert layer.bias is not None and layer.multiplier is not None and layer.shift is not None
        sums = image.astype(np.int64) @ weights.T.astype(np.int64) + layer.bias
        scaled = multiply_by_quantized_multiplier(sums, layer.multiplier, layer.shift) + layer.zeros[2]
        found = run_layer(layer, [image], lib=kernels(path))
        np.testing.assert_array_equal(found, np.clip(scaled, -100, 90), err_msg=path)


def test_packing_by_hand() -> None:
    weights = np.arange(15, dtype=np.int8).reshape(3, 5)  # 3 outputs of 5 taps
    fours = [[0, 5, 2, 7, 1, 6, 3, 8], [4, 9, 0, 0, 0, 0, 0, 0], [10, 0, 12, 0, 11, 0, 13, 0], [14, 0, 0, 0, 0, 0, 0, 0]]
    assert pack_conv_1x1(weights).reshape(4, 8).tolist() == fours


RESCALE = """
#include "tvad_arithmetic.h"
void rescale(const int32_t *x, const int32_t *m, const int32_t *right, const int32_t *zero, int32_t *out, int32_t n);
void rescale(const int32_t *x, const int32_t *m, const int32_t *right, const int32_t *zero, int32_t *out, int32_t n)
{
    int32_t i;
    for (i = 0; i < n; i++) {
        out[i] = tvad_rescale(x[i], tvad_doubled(m[i]), right[i], zero[i]);
        out[n + i] = tvad_clamp(tvad_requantise(x[i], m[i], -right[i]) + zero[i], -128, 127);
    }
}
"""


def rescale_cases(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """(n,) sums, multipliers, right shifts, zero points: random ones, ends of the range, and sums beside halves."""
    multiplier = rng.integers(1 << 30, (1 << 31) - 1, n, endpoint=True)
    multiplier[: n // 16] = 1 << 30
    multiplier[n // 16 : n // 8] = (1 << 31) - 1
    right = rng.integers(1, 31, n, endpoint=True)
    zero = rng.integers(-128, 127, n, endpoint=True)
    halves = (rng.integers(-300, 300, n) * 2 + 1) << (right - 1)  # of the result's last place, before the division
    beside = (halves << 31) // multiplier + rng.integers(-2, 3, n)
    spread = rng.integers(INT32.min, INT32.max, n, endpoint=True) >> rng.integers(0, 31, n)
    ends = rng.choice([INT32.min, INT32.min + 1, INT32.max, INT32.max - 1, 0, 1, -1, 1 << 30, -(1 << 30)], n)
    sums = np.choose(rng.choice([0, 0, 1, 2], n), [beside, spread, ends]).clip(INT32.min, INT32.max)
    return tuple(array.astype(np.int32) for array in (sums, multiplier, right, zero))


@pytest.mark.parametrize("flags", PATHS.values(), ids=PATHS.keys())
def test_short_rescaling_is_exact(rng: np.random.Generator, tmp_path: Path, flags: tuple[str, ...]) -> None:
    n = 1 << 20
    source, built = tmp_path / "rescale.c", tmp_path / "rescale.so"
    source.write_text(RESCALE)
    command = [compiler(), *WARNINGS, *flags, "-O1", "-shared", "-fPIC", "-I", str(RUNTIME), "-o", str(built), str(source)]
    subprocess.run(command, check=True)
    sums, multiplier, right, zero = cases = rescale_cases(rng, n)
    out = np.empty((2, n), np.int32)
    ctypes.CDLL(str(built)).rescale(*(array.ctypes.data_as(ctypes.c_void_p) for array in (*cases, out)), n)
    wanted = (multiply_by_quantized_multiplier(sums, multiplier, -right) + zero).clip(-128, 127)
    np.testing.assert_array_equal(out[0], wanted)
    np.testing.assert_array_equal(out[1], wanted)
    assert len(np.unique(wanted)) == 256


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernel_instructions.py; skips without its tools."""
    for tool in ("arm-none-eabi-gcc", "qemu-system-arm"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: run `make firmware-tools`")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernel_instructions")


@pytest.mark.parametrize(("core", "optimise", "rows"), [
    ("cortex-m7", "-O3", 0), ("cortex-m7", "-O0", 2), ("cortex-m7", "-Os", 1), ("cortex-m4", "-O2", 3),
    ("cortex-m33", "-O3", 0), ("cortex-m3", "-O2", 2), ("cortex-m0plus", "-Os", 0),
])  # fmt: skip
def test_cores(rng: np.random.Generator, bench: ModuleType, core: str, optimise: str, rows: int) -> None:
    """The compiled kernels on emulated cores: a sum over all output bytes, each times its place."""
    layers, sums = [], []
    graphs = [random_conv(rng, wild=bool(i % 2)) for i in range(6)]
    for length in (1, 3, 4, 8, 13, 16, 24, 40, 56, 1030):
        graphs.append(pointwise(rng, (3, int(rng.integers(1, 8))), length, int(rng.integers(1, 12)), length == 13))
    graphs.append(weighted(rng, "fully_connected", (37,), (10, 37)))
    for graph in graphs:
        layer = layer_of(graph, graph.nodes[-1])
        image = bench.made_up_input(graph.tensors["input"].shape[1:])
        wanted = Int8Engine(graph, threads=1).all_tensors(image)["out"]
        sums.append(bench.checksum(wanted))
        layers.append(dataclasses.replace(layer, weights=graph.constants["weights"]))
    found = bench.measure(core, layers, rows, optimise)
    assert [m.checksum for m in found] == sums
    for graph, measured in zip(graphs, found, strict=True):
        assert measured.scratch <= layer_scratch(graph, graph.nodes[-1])


@pytest.mark.parametrize("core", ["cortex-m7", "cortex-m3", "cortex-m0plus"])
def test_rescaling_in_instructions(rng: np.random.Generator, bench: ModuleType, core: str) -> None:
    """Weights of 0, so that the bias is the sum: the core's own instructions on the cases of the short rescaling."""
    layers, sums = [], []
    for zero in (-128, -1, 0, 127):
        bias, multiplier, right, _ = rescale_cases(rng, 20000)
        wanted = (multiply_by_quantized_multiplier(bias, multiplier, -right) + zero).clip(-128, 127)
        layers.append(Layer(
            "CONV_1X1", "rescaled", (1, 4, 1), (1, 4, 20000), zeros=(0, 0, zero), bias=bias, multiplier=multiplier,
            shift=-right.astype(np.int8), weights=np.zeros((20000, 1, 1, 1), np.int8),
        ))  # fmt: skip
        sums.append(bench.checksum(np.tile(wanted, 4).astype(np.int8)))
    assert [m.checksum for m in bench.measure(core, layers)] == sums


# (core, most instructions a MAC to block 9 and over the trunk); MCUNet in3 at 176 pixels, -O3
GATES = [("cortex-m7", 2.0, 1.9), ("cortex-m4", 2.0, 1.9), ("cortex-m3", 9.0, 9.0), ("cortex-m0plus", 9.5, 9.0)]
KINDS = {"conv_1x1, K >= 40": 1.1, "conv_1x1, K < 40": 1.6, "conv 3x3 s2": 1.8}  # of the matrix kernels with DSP


@pytest.mark.parametrize(("core", "to_block_9", "trunk"), GATES)
def test_instructions(bench: ModuleType, core: str, to_block_9: float, trunk: float) -> None:
    """Counts are repeatable: a compiler or a change that spills registers in an inner loop is found here."""
    found = bench.measure(core, bench.trunk("in3", 176))
    assert bench.a_mac(found) <= trunk
    assert bench.a_mac([m for m in found if bench.block_of(m) <= 9]) <= to_block_9
    for kind, most in KINDS.items() if to_block_9 < 3 else ():
        assert bench.a_mac([m for m in found if m.kind == kind]) <= most, kind
