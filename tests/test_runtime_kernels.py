"""The runtime's kernels without weights against the exact engine: random layers, any rows of them, in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from c_runtime import library, run_layer

from tinyvad.engines.int8 import Int8Engine
from tinyvad.export.layers import Layer, layer_of
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization

SOURCES = (
    "tvad_copy", "tvad_lookup", "tvad_mean", "tvad_mul", "tvad_pad", "tvad_pool", "tvad_resize_nearest",
)  # fmt: skip
SAME = None  # the first operand's scale


def quantized(graph: Graph, name: str, scale: float, zero_point: int) -> None:
    grid = Quantization.per_tensor(float(np.float32(scale)), zero_point)
    graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=grid)


def pick(rng: np.random.Generator, low: float, high: float) -> tuple[float, int]:
    return float(np.exp(rng.uniform(np.log(low), np.log(high)))), int(rng.integers(-128, 128))


def single(
    rng: np.random.Generator, op: str, entry: tuple[int, int, int], scale: tuple[float, int] | None, **attributes: Any
) -> Graph:
    """Input -> op -> output."""
    builder = GraphBuilder("one layer", (1, *entry))
    grid = pick(rng, 1e-2, 0.2)
    quantized(builder.graph, builder.input, *grid)
    builder.add(op, [builder.input], "out", **attributes)
    quantized(builder.graph, "out", *(scale or grid))
    return builder.finish(["out"])


def check_windows(rng: np.random.Generator, layer: Layer, inputs: list[np.ndarray], wanted: np.ndarray) -> None:
    """All rows, and some rows with all of the input."""
    wanted = wanted.reshape(layer.out_shape)
    row = int(rng.integers(0, len(wanted)))
    rows = int(rng.integers(1, len(wanted) - row + 1))
    for first, count in ((0, len(wanted)), (row, rows)):
        found = run_layer(layer, inputs, lib=library(SOURCES), row=first, rows=count)
        np.testing.assert_array_equal(found, wanted[first : first + count], err_msg=str(layer))


def check(rng: np.random.Generator, graph: Graph) -> tuple[Layer, np.ndarray, np.ndarray]:
    """The layer, its input and its output, after the kernel made the same output."""
    image = rng.integers(-128, 128, graph.tensors[graph.inputs[0]].shape[1:]).astype(np.int8)
    wanted = Int8Engine(graph, threads=1).all_tensors(image)["out"]
    layer = layer_of(graph, graph.nodes[-1])
    check_windows(rng, layer, [image], wanted)
    return layer, image, wanted


def a_shape(rng: np.random.Generator, least: int = 1) -> tuple[int, int, int]:
    height, width, channels = (int(size) for size in rng.integers((least, least, 1), (12, 12, 20)))
    return height, width, channels


@pytest.mark.parametrize("op", ["average_pool", "max_pool"])
def test_pools(rng: np.random.Generator, op: str) -> None:
    for _ in range(120):
        shape = a_shape(rng)
        kernel = tuple(int(rng.integers(1, size + 1)) for size in shape[:2])
        pads = tuple(int(rng.integers(0, kernel[axis])) for axis in (0, 0, 1, 1))
        stride = tuple(int(s) for s in rng.integers(1, 4, 2))
        attributes: dict[str, Any] = {"kernel": kernel, "stride": stride, "pads": pads}
        if op == "average_pool":
            attributes["count_include_pad"] = False
        check(rng, single(rng, op, shape, SAME, activation=str(rng.choice(["none", "relu", "relu6"])), **attributes))


def test_a_pool_reads_only_the_rows_of_its_windows(rng: np.random.Generator) -> None:
    """Output rows 2 and 3 of 3x3 windows, stride 2, one row of padding: input rows 3 to 7."""
    graph = single(rng, "max_pool", (13, 5, 3), SAME, kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    layer, image, wanted = check(rng, graph)
    found = run_layer(layer, [image], lib=library(SOURCES), row=2, rows=2, in_rows=(3, 8))
    np.testing.assert_array_equal(found, wanted[2:4])


@pytest.mark.parametrize(("values", "wanted"), [
    ([1, 2], 2), ([-1, -2], -2), ([1, 0], 1), ([-1, 0], -1), ([3, -3], 0), ([127, 127], 127), ([-128, -127], -128),
])  # fmt: skip
def test_averages_round_halves_away_from_zero(values: list[int], wanted: int) -> None:
    layer = Layer("AVERAGE_POOL", "out", (1, 2, 1), (1, 1, 1), kernel=(1, 2))
    found = run_layer(layer, [np.array(values, np.int8).reshape(1, 2, 1)], lib=library(SOURCES))
    assert found.ravel().tolist() == [wanted]


def test_means(rng: np.random.Generator) -> None:
    for _ in range(120):
        check(rng, single(rng, "mean", a_shape(rng), pick(rng, 3e-3, 0.5)))
    check(rng, single(rng, "mean", (61, 53, 1), pick(rng, 1e-3, 0.1)))


@pytest.mark.parametrize("op", ["relu", "relu6", "logistic", "hard_swish"])
def test_lookups(rng: np.random.Generator, op: str) -> None:
    for _ in range(30):
        scale = {"relu6": SAME, "logistic": (1 / 256, -128)}.get(op, pick(rng, 1e-2, 0.2))
        layer, image, wanted = check(rng, single(rng, op, a_shape(rng), scale))
        found = run_layer(layer, [image], lib=library(SOURCES), in_place=0)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("broadcast", [True, False])
def test_products(rng: np.random.Generator, broadcast: bool) -> None:
    for _ in range(120):
        shape = a_shape(rng)
        builder = GraphBuilder("product", (1, *shape))
        graph = builder.graph
        quantized(graph, builder.input, *pick(rng, 1e-2, 0.2))
        if broadcast:
            builder.add("mean", [builder.input], "second")
            quantized(graph, "second", *pick(rng, 1e-2, 0.2))
        else:
            builder.add("hard_swish", [builder.input], "second")
            quantized(graph, "second", *pick(rng, 1e-2, 0.2))
        builder.add("mul", [builder.input, "second"], "out", activation=str(rng.choice(["none", "relu", "relu6"])))
        quantized(graph, "out", *pick(rng, 1e-5 if rng.random() < 0.2 else 1e-3, 0.3))
        builder.finish(["out"])
        image = rng.integers(-128, 128, shape).astype(np.int8)
        values = Int8Engine(graph, threads=1).all_tensors(image)
        layer = layer_of(graph, graph.nodes[-1])
        operands = [image, values["second"].reshape((1, 1, -1) if broadcast else shape)]
        check_windows(rng, layer, operands, values["out"])
        found = run_layer(layer, operands, lib=library(SOURCES), in_place=0)
        np.testing.assert_array_equal(found, values["out"])


def test_padding(rng: np.random.Generator) -> None:
    for _ in range(60):
        pads = tuple(int(p) for p in rng.integers(0, 5, 4))
        check(rng, single(rng, "pad", a_shape(rng), SAME, pads=pads))


def test_nearest_resizes(rng: np.random.Generator) -> None:
    for _ in range(60):
        flags = {key: bool(rng.random() < 0.3) for key in ("align_corners", "half_pixel_centers")}
        size = tuple(int(s) for s in rng.integers(1, 30, 2))
        check(rng, single(rng, "resize_nearest", a_shape(rng), SAME, size=size, **flags))


def test_reshapes(rng: np.random.Generator) -> None:
    for _ in range(20):
        height, width, channels = a_shape(rng)
        graph = single(rng, "reshape", (height, width, channels), SAME, shape=(1, height * width * channels))
        image = rng.integers(-128, 128, (1, 1, height * width * channels)).astype(np.int8)
        for in_place in (None, 0):
            found = run_layer(layer_of(graph, graph.nodes[0]), [image], lib=library(SOURCES), in_place=in_place)
            np.testing.assert_array_equal(found, image)


def test_concat_copies_each_operand_into_its_channels(rng: np.random.Generator) -> None:
    """Every operand alone writes its own channels and leaves the others."""
    for _ in range(30):
        height, width, _ = a_shape(rng)
        parts = [rng.integers(-128, 128, (height, width, int(c))).astype(np.int8) for c in rng.integers(1, 9, 3)]
        channels = sum(part.shape[2] for part in parts)
        first = 0
        for part in parts:
            layer = Layer("COPY", "out", part.shape, (height, width, channels), channel=first)  # type: ignore[arg-type]
            row = int(rng.integers(0, height))
            found = run_layer(layer, [part], lib=library(SOURCES), row=row, rows=height - row)
            untouched = np.full((height - row, width, channels), 0x5A, np.int8)  # what run_layer fills buffers with
            untouched[:, :, first : first + part.shape[2]] = part[row:]
            np.testing.assert_array_equal(found, untouched)
            first += part.shape[2]
