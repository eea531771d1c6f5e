"""From a backbone's taps to one map of vectors: what CFA's descriptor and SimpleNet's adaptor have in common.

    tap --3x3 mean, zeros around--> pooled map --1x1 convolution--> (h, w, d) --nearest--> (H, W, d); summed over the taps

Flows in: a float Graph whose outputs are the taps. Flows out: the frozen trunk that ends in the pooled maps (the items of
training, and what compressed replay stores), and the trainable rest as a Graph.

The papers resize the pooled taps, concatenate them and take one 1x1 convolution. Such a convolution commutes with copying
cells, so that a sum of one convolution a tap at the tap's own size gives the same values for a fraction of the products
and of the memory. Bilinear resizing would commute too, but the device has no int8 kernel for it: taps coarser than the
grid are copied (nearest), those that are finer are averaged onto it in the pooling's own convolution.

Source: CFA (Lee et al. 2022), SimpleNet (Liu et al. 2023), sections on the patch features; the order of the steps is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.graph.passes import prune
from tinyvad.training.trainable import Items

POOL = 3
SMALLEST_SPREAD = 0.01
BATCH = 16  # images at once
Moments = tuple[np.ndarray, np.ndarray]
POINT = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1)}


def grid_of(backbone: Graph, cells: int | None = None) -> tuple[int, int]:
    """(H, W) of the map: the finest tap's, or ``cells`` a side.

    Raises:
        InputError: a tap is no map, or is finer than the grid and can't be averaged onto it.
    """
    sizes = [_map_size(backbone.tensors[name]) for name in backbone.outputs]
    grid = max(sizes) if cells is None else (cells, cells)
    for name, size in zip(backbone.outputs, sizes, strict=True):
        for have, want in zip(size, grid, strict=True):
            if have > want and (want < 1 or -(-have // _stride(have, want)) != want):
                possible = {-(-have // k) for k in range(1, have + 1)}
                near = sorted({max((g for g in possible if g < want), default=1), min(g for g in possible if g > want)})
                raise InputError(
                    f"layer {name}: a map of {have} cells a side can't be averaged onto {want}; "
                    f"use --grid {' or '.join(map(str, near))}"
                )
    return grid


def pooled_trunk(backbone: Graph, grid: tuple[int, int]) -> Graph:
    """The backbone followed by every tap's pooling: its outputs are '<tap>/pooled', in the order of the taps.

    A tap finer than the grid is averaged onto it: mean of the pooled values of k x k cells, one (k + 2) x (k + 2) depthwise
    convolution. Divisor 9 k^2 everywhere, as zeros count (``count_include_pad`` of the papers' code).
    """
    builder = _continue(backbone, f"{backbone.name}/pooled")
    outputs = []
    for name in backbone.outputs:
        height, width, channels = backbone.tensors[name].shape[1:]
        strides = (_stride(height, grid[0]), _stride(width, grid[1]))
        rows, columns = (np.convolve(np.ones(POOL), np.ones(k)) / (POOL * k) for k in strides)  # (k + 2,) each
        kernel = np.broadcast_to(np.outer(rows, columns)[None, :, :, None], (1, len(rows), len(columns), channels))
        weights = builder.constant(f"{name}/pooled/weights", kernel.astype(np.float32))
        bias = builder.constant(f"{name}/pooled/bias", np.zeros(channels, np.float32))
        after = [1 + -(-size // k) * k - size for size, k in zip((height, width), strides, strict=True)]
        pads = (1, after[0], 1, after[1])
        inputs = (name, weights, bias)
        outputs.append(
            builder.add("depthwise_conv2d", inputs, f"{name}/pooled", stride=strides, pads=pads, dilation=(1, 1))
        )
    return prune(builder.finish(outputs))


def summed_maps(
    maps: Sequence[Tensor],
    grid: tuple[int, int],
    weights: Sequence[np.ndarray],
    bias: np.ndarray,
    prefix: str,
    activation: str = "none",
    scales: Sequence[np.ndarray] | None = None,
) -> Graph:
    """Pooled maps -> (1, H, W, O): the sum over maps of a 1x1 convolution each, copied onto the grid.

    Args:
        maps: the pooled maps (1, h, w, C), none finer than the grid; the graph's inputs, by the same names.
        weights: (O, C) a map. bias: (O,).
        prefix: of all names; the constants are '<prefix>/weights<i>' and '<prefix>/bias'.
        activation: of the sum.
        scales: (C,) a map: multiply its channels first ('<prefix>/scale<i>').
    """
    inputs = {tensor.name: tensor for tensor in maps}
    builder = _continue(Graph(prefix, list(inputs), [], [], inputs, {}), prefix)
    last, total = len(maps) - 1, ""
    for i, (tensor, matrix) in enumerate(zip(maps, weights, strict=True)):
        x = tensor.name
        if scales is not None:
            factors = builder.constant(f"{prefix}/scale{i}", scales[i].reshape(1, 1, 1, -1).astype(np.float32))
            x = builder.add("mul", [x, factors], f"{prefix}/scaled{i}")
        kernel = builder.constant(f"{prefix}/weights{i}", matrix[:, None, None, :].astype(np.float32))
        if i == last:  # one convolution adds the bias, the last: the fewest int8 grids must hold it
            offset = builder.constant(f"{prefix}/bias", bias.astype(np.float32))
        elif i == 0:
            offset = builder.constant(f"{prefix}/zeros", np.zeros(len(bias), np.float32))
        own = activation if last == 0 else "none"
        x = builder.add("conv2d", [x, kernel, offset], f"{prefix}/map{i}", **POINT, activation=own)
        if tensor.shape[1:3] != grid:
            x = builder.add("resize_nearest", [x], f"{prefix}/copied{i}", size=grid)
        after = activation if i == last else "none"
        total = builder.add("add", [total, x], f"{prefix}/sum{i}", activation=after) if i else x
    return builder.finish([total])


def moments(items: Items, count: int) -> list[Moments]:
    """Mean and standard deviation (C,) float64 of every channel of the first ``count`` arrays, over items and positions.

    A spread is at least ``SMALLEST_SPREAD`` of its map's largest: what rests on good images is not blown up without limit.
    """
    sums: list[Any] = [0.0] * count
    squares: list[Any] = [0.0] * count
    total = len(items)
    for start in range(0, total, BATCH):
        batch = items.take(np.arange(start, min(start + BATCH, total)))
        for i, values in enumerate(batch[:count]):
            flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
            share = len(values) / total
            sums[i], squares[i] = sums[i] + share * flat.mean(0), squares[i] + share * (flat**2).mean(0)
    found = []
    for mean, square in zip(sums, squares, strict=True):
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        largest = spread.max()
        found.append((mean, np.maximum(spread, SMALLEST_SPREAD * largest) if largest > 0 else np.ones_like(spread)))
    return found


def exported(
    trunk: Graph,
    statistics: Sequence[Moments],
    grid: tuple[int, int],
    weights: Sequence[np.ndarray],
    bias: np.ndarray,
    prefix: str,
    activation: str = "none",
) -> Graph:
    """``trunk`` and ``summed_maps`` as one graph from the image, made for int8.

    The pooling brings each channel to mean 0 and spread 1, and the convolutions undo that. The values are the same; but
    one int8 grid then suits all channels of a pooled map, and what the taps add up to stays around 0 on the way.

    Args:
        statistics: (mean, spread) of the pooled maps, (C,) each; the other arguments as for ``summed_maps``.
    """
    constants, scaled, offset = dict(trunk.constants), [], bias.astype(np.float64)
    for name, (mean, spread), matrix in zip(trunk.outputs, statistics, weights, strict=True):
        constants[f"{name}/weights"] = (constants[f"{name}/weights"] / spread).astype(np.float32)
        constants[f"{name}/bias"] = (-mean / spread).astype(np.float32)
        scaled.append(matrix * spread)
        offset = offset + matrix @ mean
    maps = [trunk.tensors[name] for name in trunk.outputs]
    return join(trunk.copy(constants=constants), summed_maps(maps, grid, scaled, offset, prefix, activation), prefix)


def join(first: Graph, second: Graph, name: str) -> Graph:
    """One graph: ``second`` reads outputs of ``first`` by their names; its outputs are the whole's.

    Raises:
        InputError: it reads something else, or both have a tensor of one name.
    """
    builder = _continue(first, name)
    for source in second.inputs:
        if source not in builder.graph.tensors:
            raise InputError(f"graph {second.name} reads {source}, which graph {first.name} does not make")
    for constant, array in second.constants.items():
        if constant in builder.graph.tensors:
            raise InputError(f"graphs {first.name} and {second.name} both have a tensor {constant}; rename one")
        builder.constant(constant, array)
    for node in second.nodes:
        builder.add(node.op, node.inputs, node.output, **node.attributes)
    return prune(builder.finish(second.outputs))


def point_convolution(x: Tensor, weights: np.ndarray, bias: np.ndarray, prefix: str) -> Graph:
    """A 1x1 convolution of one map, '<prefix>/linear': (O, C) weights are '<prefix>/weights', (O,) bias '<prefix>/bias'."""
    builder = _continue(Graph(prefix, [x.name], [], [], {x.name: x}, {}), prefix)
    kernel = builder.constant(f"{prefix}/weights", weights[:, None, None, :].astype(np.float32))
    offset = builder.constant(f"{prefix}/bias", bias.astype(np.float32))
    return builder.finish([builder.add("conv2d", [x.name, kernel, offset], f"{prefix}/linear", **POINT, activation="none")])


def _continue(graph: Graph, name: str) -> GraphBuilder:
    """A builder that goes on with a copy of ``graph``."""
    builder = GraphBuilder(name, ())
    builder.graph = graph.copy(name=name)
    return builder


def _map_size(tensor: Tensor) -> tuple[int, int]:
    if len(tensor.shape) != 4:
        raise InputError(f"layer {tensor.name} is no map but {tensor.shape}; tap an earlier layer")
    return tensor.shape[1], tensor.shape[2]


def _stride(size: int, grid: int) -> int:
    """How many cells of a tap an axis of the grid averages."""
    return max(-(-size // max(grid, 1)), 1)
