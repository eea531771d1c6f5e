"""The runtime's depthwise and add kernels against the exact engine: random layers, any rows, in place, all paths."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import mmap
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from c_runtime import CWindow, c_layer, library, run_layer

from tinyvad.backbones import mcunet
from tinyvad.engines.int8 import Int8Engine
from tinyvad.errors import InputError
from tinyvad.export.layers import Layer, layer_of
from tinyvad.export.packing import pack_depthwise
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.passes import fold_batchnorm
from tinyvad.graph.scratch import layer_scratch

SOURCES = ("tvad_add", "tvad_clamp_outputs", "tvad_depthwise", "tvad_depthwise_dsp")
PATHS = {
    "plain": (),
    "plain, no long multiplication": ("-DTVAD_LONG_MULTIPLY=0",),
    "dsp": ("-DTVAD_DSP_EMULATE=1",),
}
ACTIVATIONS = ("none", "none", "relu", "relu6")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def kernels(path: str) -> ctypes.CDLL:
    return library(SOURCES, PATHS[path])


def depthwise(
    rng: np.random.Generator, entry: tuple[int, int, int], kernel: tuple[int, int], wild: bool = False, **attributes: Any
) -> Graph:
    """Input -> depthwise -> output with random weights; wild: shifts of all kinds, negative multipliers and 0."""
    channels = entry[2]
    while True:
        builder = GraphBuilder("one layer", (1, *entry))
        scale = np.exp(rng.normal(0, 4 if wild else 0.7, channels))
        if wild:
            scale *= rng.choice([1, 1, -1], channels)
            scale[rng.random(channels) < 0.1] = 1e-20
        builder.constant("weights", rng.integers(-128, 128, (1, *kernel, channels)).astype(np.int8))
        builder.constant("bias", rng.integers(-20000, 20000, channels).astype(np.int32))
        names = [builder.input, "weights", "bias"]
        builder.add("depthwise_conv2d", names, "out", **{"activation": str(rng.choice(ACTIVATIONS)), **attributes})
        out_scale = 74 * 74 * np.sqrt(kernel[0] * kernel[1]) / 60
        for name, grid in {
            "input": Quantization.per_tensor(1.0, int(rng.integers(-128, 128))),
            "weights": Quantization(scale.astype(np.float32), np.zeros(channels, np.int64), 3),
            "bias": Quantization(scale.astype(np.float32), np.zeros(channels, np.int64), 0),
            "out": Quantization.per_tensor(float(np.float32(out_scale)), int(rng.integers(-128, 128))),
        }.items():
            tensor = builder.graph.tensors[name]
            dtype = "int32" if name == "bias" else "int8"
            builder.graph.tensors[name] = dataclasses.replace(tensor, dtype=dtype, quantization=grid)
        graph = builder.finish(["out"])
        try:
            layer_of(graph, graph.nodes[-1])
        except InputError:  # a sum, shifted left, could leave int32
            continue
        return graph


def same(kernel: int, stride: int = 1) -> dict[str, Any]:
    """Attributes of a layer as networks have them."""
    return {"stride": (stride, stride), "pads": (kernel // 2,) * 4, "dilation": (1, 1)}


def answer(rng: np.random.Generator, graph: Graph) -> tuple[Layer, list[np.ndarray], np.ndarray]:
    """The layer, its operands and the exact engine's output."""
    image = rng.integers(-128, 128, graph.tensors["input"].shape[1:]).astype(np.int8)
    image.ravel()[: rng.integers(0, 3)] = -128
    values = Int8Engine(graph, threads=1).all_tensors(image)
    node = graph.nodes[-1]
    operands = [values[name] for name in node.inputs if name in values]
    return layer_of(graph, node), operands, values["out"]


def needed_rows(layer: Layer, row: int, rows: int) -> tuple[int, int]:
    """First and past the last input row under the kernel, at least one row."""
    first = row * layer.stride[0] - layer.pad[0]
    past = first + (rows - 1) * layer.stride[0] + (layer.kernel[0] - 1) * layer.dilation + 1
    height = layer.in_shape[0]
    first = min(max(first, 0), height - 1)
    return first, max(min(past, height), first + 1)


def works_in_place(layer: Layer) -> bool:
    """What tvad_depthwise.c asks for."""
    reach = (layer.kernel[0] - 1) * layer.dilation
    return layer.out_shape[0] <= layer.in_shape[0] and layer.out_shape[1] <= layer.in_shape[1] and layer.pad[0] <= reach


def check(rng: np.random.Generator, graph: Graph) -> None:
    """Whole map, in place, and some rows with only the input rows that they need; scratch as the planner has it."""
    layer, operands, wanted = answer(rng, graph)
    scratch = layer_scratch(graph, graph.nodes[-1])
    row = int(rng.integers(0, len(wanted)))
    rows = int(rng.integers(1, len(wanted) - row + 1))
    held = needed_rows(layer, row, rows)
    for path in PATHS:
        lib = kernels(path)
        lib.tvad_depthwise_scratch.restype = ctypes.c_uint32
        assert lib.tvad_depthwise_scratch(ctypes.byref(c_layer(layer))) == scratch, layer
        found = run_layer(layer, operands, lib=lib, scratch=scratch)
        np.testing.assert_array_equal(found, wanted, err_msg=f"{path}: {layer}")
        found = run_layer(layer, operands, lib=lib, scratch=scratch, row=row, rows=rows, in_rows=held)
        np.testing.assert_array_equal(found, wanted[row : row + rows], err_msg=f"{path}, {row} {rows}: {layer}")
        if works_in_place(layer):
            found = run_layer(layer, operands, lib=lib, scratch=scratch, in_place=0)
            np.testing.assert_array_equal(found, wanted, err_msg=f"{path}, in place: {layer}")


def random_depthwise(rng: np.random.Generator, wild: bool) -> Graph:
    """Any kernel, stride, padding and dilation; half of them shapes that the path with SMLAD has."""
    if rng.random() < 0.5:
        kernel, dilation = (int(rng.integers(1, 12)), int(rng.choice([3, 5, 7]))), 1
        stride = tuple(int(s) for s in rng.integers(1, (4, 3)))
    else:
        kernel, dilation = (int(rng.integers(1, 12)), int(rng.integers(1, 12))), int(rng.integers(1, 3))
        stride = tuple(int(s) for s in rng.integers(1, 4, 2))
    reach = [(k - 1) * dilation for k in kernel]
    pads = tuple(int(rng.integers(0, reach[axis] + 3)) for axis in (0, 0, 1, 1))
    size = [int(rng.integers(max(1, reach[axis] + 1 - sum(pads[2 * axis : 2 * axis + 2])), 26)) for axis in (0, 1)]
    channels = int(rng.choice([1, 2, 3, 4, 5, 8, 11]))
    return depthwise(
        rng, (size[0], size[1], channels), kernel, wild, stride=stride, pads=pads, dilation=(dilation, dilation)
    )


@pytest.mark.parametrize("wild", [False, True])
def test_any_depthwise(rng: np.random.Generator, wild: bool) -> None:
    for _ in range(150):
        check(rng, random_depthwise(rng, wild))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_every_width(rng: np.random.Generator, kernel: int, stride: int) -> None:
    """Rows are cut into passes of four and three: all remainders, rings and whole maps, four channels, one, and three."""
    for width in range(3, 22):
        channels = (1, 3, 4, 7)[width % 4]
        attributes = {**same(kernel, stride), "pads": tuple(int(n) for n in rng.integers(0, kernel, 4))}
        if width + sum(attributes["pads"][2:]) < kernel:
            attributes = same(kernel, stride)
        check(rng, depthwise(rng, (int(rng.integers(kernel, 20)), width, channels), (kernel, kernel), **attributes))


@pytest.mark.parametrize(("size", "kernel", "stride", "channels"), [
    ((40, 40), 3, 1, 6), ((24, 88), 7, 2, 8), ((30, 44), 7, 1, 4), ((30, 44), 5, 2, 5), ((22, 22), 5, 1, 8),
    ((20, 96), 7, 1, 4), ((13, 300), 3, 1, 5), ((12, 300), 7, 1, 2), ((9, 1000), 5, 1, 2),
])  # fmt: skip
def test_large_maps(rng: np.random.Generator, size: tuple[int, int], kernel: int, stride: int, channels: int) -> None:
    """Rings of row pairs, of one channel where four are too wide, and maps that are too wide even for that."""
    check(rng, depthwise(rng, (*size, channels), (kernel, kernel), **same(kernel, stride)))


def test_extreme_sums(rng: np.random.Generator) -> None:
    """Largest values, taps and biases: beyond what a short rescaling takes, the kernel must use the long one."""
    for value, tap, zero in ((-128, -128, 127), (127, -128, -128), (-128, 127, 127)):
        graph = depthwise(rng, (9, 9, 8), (7, 7), **same(7))
        graph.constants["weights"][:] = tap
        biases = [0, 1 << 28, -(1 << 28), (1 << 30) - 4, 3 - (1 << 30), 1 << 30, -(1 << 30), 2_000_000_000]
        graph.constants["bias"][:] = biases
        graph.tensors["input"] = dataclasses.replace(
            graph.tensors["input"], quantization=Quantization.per_tensor(1.0, zero)
        )
        scale = np.full(8, np.float32(1e-6))
        graph.tensors["weights"] = dataclasses.replace(
            graph.tensors["weights"], quantization=Quantization(scale, np.zeros(8, np.int64), 3)
        )
        image = np.full((9, 9, 8), value, np.int8)
        wanted = Int8Engine(graph, threads=1).all_tensors(image)["out"]
        for path in PATHS:
            found = run_layer(layer_of(graph, graph.nodes[-1]), [image], lib=kernels(path))
            np.testing.assert_array_equal(found, wanted, err_msg=path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_reads_no_other_rows(rng: np.random.Generator) -> None:
    """Rows of a window lie beside pages that nobody may read. A child process does it: it would end with a signal."""
    cases = []
    for _ in range(60):
        kernel, stride, channels = (int(rng.choice(values)) for values in ((3, 5, 7), (1, 2), (1, 4, 5)))
        size = (int(rng.integers(kernel, 16)), int(rng.integers(kernel, 16)), channels)
        graph = depthwise(rng, size, (kernel, kernel), **same(kernel, stride))
        layer, [image], wanted = answer(rng, graph)
        row = int(rng.integers(0, len(wanted)))
        rows = int(rng.integers(1, len(wanted) - row + 1))
        cases += [(kernels(path), layer, image, wanted, row, rows) for path in PATHS]
    child = os.fork()
    if child == 0:
        ok = all(fenced(*case) for case in cases)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def fenced(lib: ctypes.CDLL, layer: Layer, image: np.ndarray, wanted: np.ndarray, row: int, rows: int) -> bool:
    """True if the outputs are right with the input rows at the begin and at the end of memory that may be read."""
    page, pages = mmap.PAGESIZE, 3
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    memory = mmap.mmap(-1, (pages + 2) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(base, page, 0) == 0 and libc.mprotect(base + (pages + 1) * page, page, 0) == 0
    first, past = needed_rows(layer, row, rows)
    held = np.ascontiguousarray(image[first:past])
    struct, right = c_layer(layer), True
    lib.tvad_depthwise_scratch.restype = ctypes.c_uint32
    scratch = np.empty(lib.tvad_depthwise_scratch(ctypes.byref(struct)) // 8 + 4, np.int64)
    for place in (base + page, base + (pages + 1) * page - held.size):
        ctypes.memmove(place, held.ctypes.data, held.size)
        out = np.empty((rows, *layer.out_shape[1:]), np.int8)
        window = CWindow(out=out.ctypes.data, row=row, rows=rows, out_first=row, scratch=scratch.ctypes.data + 15 & ~15)
        window.inputs[0], window.in_first[0] = place, first
        lib.tvad_depthwise(ctypes.byref(struct), ctypes.byref(window))
        right = right and bool((out == wanted[row : row + rows]).all())
    return right


def test_scratch_of_mcunet() -> None:
    """8 KiB are enough for every layer of MCUNet in3 at 176 pixels."""
    graph = fold_batchnorm(mcunet.build("in3", 176))
    found = {node.output: layer_scratch(graph, node) for node in graph.nodes if node.op == "depthwise_conv2d"}
    assert len(found) == 18
    assert max(found.values()) <= 8192


def test_packing_by_hand() -> None:
    weights = np.arange(12, dtype=np.int8).reshape(2, 3, 2)  # 2 x 3 taps of 2 channels
    assert pack_depthwise(weights).tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]


def addition(rng: np.random.Generator, entry: tuple[int, int, int]) -> Graph:
    """Input -> max_pool of 1 x 1; input + that -> output: two operands with the same values."""
    builder = GraphBuilder("one layer", (1, *entry))
    copy = builder.add("max_pool", [builder.input], "copy", kernel=(1, 1), stride=(1, 1), pads=(0, 0, 0, 0))
    builder.add("add", [builder.input, copy], "out", activation=str(rng.choice(ACTIVATIONS)))
    graph = builder.finish(["out"])
    out = float(np.float32(np.exp(rng.uniform(np.log(1e-4), np.log(10)))))
    grids = {name: Quantization.per_tensor(0.5, int(rng.integers(-128, 128))) for name in ("input", "copy")}
    grids["copy"] = grids["input"]
    grids["out"] = Quantization.per_tensor(out, int(rng.integers(-128, 128)))
    for name, grid in grids.items():
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=grid)
    return graph


def two_grids(rng: np.random.Generator, graph: Graph) -> None:
    """Give both operands of the addition grids of their own; the engine's add does not ask where values come from."""
    for name in ("input", "copy"):
        grid = Quantization.per_tensor(float(np.float32(np.exp(rng.uniform(-5, 1)))), int(rng.integers(-128, 128)))
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], quantization=grid)


def test_additions(rng: np.random.Generator) -> None:
    """With tables and without, some rows, in place of either operand."""
    from tinyvad.engines.int8_steps import make_step

    for _ in range(80):
        height, width, channels = entry = tuple(int(n) for n in rng.integers(1, (9, 12, 30)))
        graph = addition(rng, (height, width, channels))
        two_grids(rng, graph)
        operands = [rng.integers(-128, 128, entry).astype(np.int8) for _ in range(2)]
        node = graph.nodes[-1]
        layer, scratch = layer_of(graph, node), layer_scratch(graph, node)
        wanted = make_step(graph, node)({"input": operands[0], "copy": operands[1]})
        row = int(rng.integers(0, height))
        for path in PATHS:
            for in_place in (None, 0, 1):
                found = run_layer(layer, operands, lib=kernels(path), scratch=scratch, in_place=in_place)
                np.testing.assert_array_equal(found, wanted, err_msg=f"{path}, {in_place}: {layer}")
            found = run_layer(layer, operands, lib=kernels(path), scratch=scratch, row=row, rows=height - row)
            np.testing.assert_array_equal(found, wanted[row:], err_msg=f"{path}: {layer}")


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
    ("cortex-m33", "-O1", 0), ("cortex-m3", "-O2", 2), ("cortex-m0plus", "-Os", 0),
])  # fmt: skip
def test_cores(rng: np.random.Generator, bench: ModuleType, core: str, optimise: str, rows: int) -> None:
    """The compiled kernels on emulated cores: a sum over all output bytes, each times its place."""
    layers, sums, scratches = [], [], []
    graphs = [random_depthwise(rng, wild=bool(i % 2)) for i in range(12)]
    for i, width in enumerate(range(6, 24)):
        kernel = (3, 5, 7)[i % 3]
        graphs.append(depthwise(rng, (10 + i % 5, width, 4 + i % 6), (kernel, kernel), **same(kernel, 1 + i // 3 % 2)))
    for graph in graphs:
        node = graph.nodes[-1]
        image = bench.made_up_input(graph.tensors["input"].shape[1:])
        sums.append(bench.checksum(Int8Engine(graph, threads=1).all_tensors(image)["out"]))
        layers.append(dataclasses.replace(layer_of(graph, node), weights=graph.constants["weights"]))
        scratches.append(layer_scratch(graph, node))
    found = bench.measure(core, layers, rows, optimise)
    assert [m.checksum for m in found] == sums
    assert [m.scratch for m in found] == scratches


# instructions a MAC (add: an element) on a Cortex-M7 with -O3: what they are now, and a little
LIMITS = {(7, 1): 1.05, (7, 2): 1.45, (5, 1): 1.35, (5, 2): 2.0, (3, 1): 2.3, (3, 2): 3.9}


def test_instruction_counts(rng: np.random.Generator, bench: ModuleType) -> None:
    """Counts are repeatable: a compiler that spills in the inner loops, or moves loads around, is seen here."""
    layers = []
    for kernel, stride in LIMITS:
        graph = depthwise(rng, (44, 44, 8), (kernel, kernel), activation="none", **same(kernel, stride))
        layers.append(dataclasses.replace(layer_of(graph, graph.nodes[-1]), weights=graph.constants["weights"]))
    graph = addition(rng, (22, 22, 24))
    layers.append(dataclasses.replace(layer_of(graph, graph.nodes[-1]), limits=(-128, 127)))
    found = [measured.instructions / measured.macs for measured in bench.measure("cortex-m7", layers)]
    limits = [*LIMITS.values(), 15.0]
    assert all(ratio <= limit for ratio, limit in zip(found, limits, strict=True)), f"{np.round(found, 2)}, limits {limits}"
