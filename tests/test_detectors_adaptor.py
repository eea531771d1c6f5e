"""The adaptor's graphs against the papers' steps in plain NumPy: pool, resize, concatenate, one 1x1 convolution."""

from __future__ import annotations

import numpy as np
import pytest
from reference_interpreter import run as slow_run

from tinyvad.detectors.adaptor import exported, grid_of, join, moments, pooled_trunk, summed_maps
from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.shapes import nearest_indices
from tinyvad.training.items import ArrayItems


def backbone(rng: np.random.Generator, size: int = 16, channels: tuple[int, ...] = (5, 6, 7)) -> Graph:
    """A small network with a tap after each stride 2 convolution."""
    b = GraphBuilder("net", (1, size, size, 3))
    x, into, taps = b.input, 3, []
    for i, count in enumerate(channels):
        weights = b.constant(f"w{i}", rng.normal(0, 0.5, (count, 3, 3, into)).astype(np.float32))
        bias = b.constant(f"b{i}", rng.normal(0, 0.5, count).astype(np.float32))
        attributes = {"stride": (2, 2), "pads": (0, 1, 0, 1), "dilation": (1, 1), "activation": "relu6"}
        x = b.add("conv2d", [x, weights, bias], f"tap{i}", **attributes)
        into = count
        taps.append(x)
    return b.finish(taps)


def slow_pool(x: np.ndarray) -> np.ndarray:
    """(H, W, C): 3x3 mean with zeros around, divisor 9."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    return np.mean([padded[i : i + x.shape[0], j : j + x.shape[1]] for i in range(3) for j in range(3)], 0)


def slow_embedding(taps: list[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """(H, W, sum of C): pooled taps on the grid, side by side."""
    parts = []
    for tap in taps:
        pooled = slow_pool(tap)
        if pooled.shape[0] > grid[0]:
            k = pooled.shape[0] // grid[0]
            pooled = pooled.reshape(grid[0], k, grid[1], k, -1).mean((1, 3))
        rows, columns = (nearest_indices(a, b) for a, b in zip(pooled.shape[:2], grid, strict=True))
        parts.append(pooled[rows][:, columns])
    return np.concatenate(parts, 2)


@pytest.mark.parametrize("cells", [None, 4, 8, 2, 12])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_one_convolution_a_tap_is_that_of_all(cells: int | None, activation: str, rng: np.random.Generator) -> None:
    net = backbone(rng)
    grid = grid_of(net, cells)
    assert grid == ((8, 8) if cells is None else (cells, cells))
    trunk = pooled_trunk(net, grid)
    matrix, bias = rng.normal(size=(9, 18)).astype(np.float32), rng.normal(size=9).astype(np.float32)
    maps = [trunk.tensors[name] for name in trunk.outputs]
    tail = summed_maps(maps, grid, np.split(matrix, [5, 11], 1), bias, "adaptor", activation)
    whole = join(trunk, tail, "whole")
    image = rng.normal(size=(1, 16, 16, 3))
    taps = slow_run(net, image)
    expected = slow_embedding([taps[name][0] for name in net.outputs], grid) @ matrix.T.astype(np.float64) + bias
    if activation == "relu":
        expected = np.maximum(expected, 0)
    found = slow_run(whole, image)[whole.outputs[0]][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cells", [None, 3, 5])
def test_a_single_tap(cells: int | None, rng: np.random.Generator) -> None:
    """Its convolution carries the activation, before the cells are copied."""
    net = backbone(rng, 6, (4,))
    grid = grid_of(net, cells)
    trunk = pooled_trunk(net, grid)
    matrix, bias, scale = rng.normal(size=(2, 4)), rng.normal(size=2), rng.uniform(1, 2, 4)
    maps = [trunk.tensors[name] for name in trunk.outputs]
    tail = summed_maps(maps, grid, [matrix], bias, "a", "relu", [scale])
    image = rng.normal(size=(1, 6, 6, 3))
    expected = slow_embedding([slow_run(net, image)["tap0"][0]], grid) * scale @ matrix.T + bias
    whole = join(trunk, tail, "whole")
    np.testing.assert_allclose(slow_run(whole, image)[whole.outputs[0]][0], np.maximum(expected, 0), rtol=0, atol=1e-5)


def test_exported_graph_computes_the_same(rng: np.random.Generator) -> None:
    """Whatever means and spreads the pooled channels are brought to 0 and 1 by."""
    net = backbone(rng)
    trunk = pooled_trunk(net, (8, 8))
    weights, bias = [rng.normal(size=(9, c)) for c in (5, 6, 7)], rng.normal(size=9)
    statistics = [(rng.normal(size=c), rng.uniform(0.1, 2, c)) for c in (5, 6, 7)]
    maps = [trunk.tensors[name] for name in trunk.outputs]
    plain = join(trunk, summed_maps(maps, (8, 8), weights, bias, "a", "relu"), "a")
    image = rng.normal(size=(1, 16, 16, 3))
    whole = exported(trunk, statistics, (8, 8), weights, bias, "a", "relu")
    assert [node.op for node in whole.nodes] == [node.op for node in plain.nodes]
    expected, found = (slow_run(graph, image) for graph in (plain, whole))
    np.testing.assert_allclose(found[whole.outputs[0]], expected[plain.outputs[0]], rtol=0, atol=1e-5)
    mean, spread = statistics[1]
    np.testing.assert_allclose(found["tap1/pooled"], (expected["tap1/pooled"] - mean) / spread, rtol=0, atol=1e-4)


def test_moments_are_numpys(rng: np.random.Generator) -> None:
    arrays = [rng.normal(2, 3, (37, 4, 5, 6)).astype(np.float32), rng.normal(size=(37, 2, 2, 3)).astype(np.float32)]
    arrays[1][..., 0] *= 1e-4
    first, second = moments(ArrayItems([*arrays, np.zeros((37, 1))]), 2)
    np.testing.assert_allclose(first[0], arrays[0].mean((0, 1, 2), dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(first[1], arrays[0].std((0, 1, 2), dtype=np.float64), rtol=1e-9)
    assert second[1][0] == pytest.approx(0.01 * arrays[1].std((0, 1, 2), dtype=np.float64).max())


def test_a_grid_that_does_not_divide_counts_zeros(rng: np.random.Generator) -> None:
    """7 cells onto 4: the last cell averages one column of the map and one of zeros, as the pooling does at its border."""
    net = backbone(rng, 14, (2,))
    trunk = pooled_trunk(net, grid_of(net, 4))
    image = rng.normal(size=(1, 14, 14, 3))
    values = slow_run(trunk, image)
    around = np.pad(values["tap0"][0], ((1, 3), (1, 3), (0, 0)))  # (11, 11, 2)
    pooled = np.mean([around[i : i + 8, j : j + 8] for i in range(3) for j in range(3)], 0)
    expected = pooled.reshape(4, 2, 4, 2, 2).mean((1, 3))
    np.testing.assert_allclose(values["tap0/pooled"][0], expected, rtol=0, atol=1e-6)


def test_grids_that_cannot_be_had(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="layer tap0: a map of 8 cells a side can't be averaged onto 5; use --grid 4 or 8"):
        grid_of(backbone(rng), 5)
    with pytest.raises(InputError, match=r"can't be averaged onto 0; use --grid 1$"):
        grid_of(backbone(rng), 0)
    b = GraphBuilder("net", (1, 4, 4, 3))
    flat = b.finish([b.add("reshape", [b.input], "flat", shape=(1, 48))])
    with pytest.raises(InputError, match="layer flat is no map"):
        grid_of(flat)


def test_graphs_that_do_not_fit_together(rng: np.random.Generator) -> None:
    net = backbone(rng)
    trunk = pooled_trunk(net, (8, 8))
    maps = [trunk.tensors[name] for name in trunk.outputs]
    tail = summed_maps(maps, (8, 8), [np.ones((1, c)) for c in (5, 6, 7)], np.zeros(1), "a")
    with pytest.raises(InputError, match="reads tap0/pooled, which graph net does not make"):
        join(net, tail, "x")
    with pytest.raises(InputError, match="both have a tensor a/weights0"):
        join(join(trunk, tail, "x").copy(), tail, "y")
