"""Padding, pooling and resizing that can be differentiated.

Flows in: maps (n, H, W, C) float32 or float64. Flows out: maps in the same type. Averages are depthwise convolutions with
constant weights; a resized value is a sum of two by two neighbours (one of them for ``resize_nearest``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvad.graph.shapes import nearest_indices, window_size
from tinyvad.kernels import gradients_windows as kernels
from tinyvad.training.blocks import run_blocks
from tinyvad.training.convolutions import NO_PADS, Pads, Pair, depthwise_conv2d
from tinyvad.training.tape import differentiable, plain


def _pad_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    top, _, left, _ = kwargs["pads"]
    _, height, width, _ = args[0].shape
    return lambda g: (g[:, top : top + height, left : left + width],)


@differentiable(_pad_backward)
def _pad(x: np.ndarray, *, pads: Pads) -> np.ndarray:
    top, bottom, left, right = pads
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def pad(x: Any, pads: Pads) -> Any:
    """Zeros around a map: (top, bottom, left, right)."""
    return _pad(x, pads=tuple(pads))


def average_pool(
    x: Any, kernel: Pair, stride: Pair, pads: Pads = NO_PADS, count_include_pad: bool = False
) -> Any:
    """Mean over windows (n, Ho, Wo, C); without ``count_include_pad`` over the positions inside the map only."""
    value = plain(x)
    channels, dtype = value.shape[3], value.dtype
    y = depthwise_conv2d(x, np.full((1, *kernel, channels), 1 / (kernel[0] * kernel[1]), dtype), stride=stride, pads=pads)
    if count_include_pad or not any(pads):
        return y
    rows, columns = (
        _inside(size, *along)
        for size, *along in zip(value.shape[1:3], kernel, stride, pads[::2], pads[1::2], strict=True)
    )
    counted = np.maximum(rows[:, None] * columns, 1)[None, :, :, None]  # (1, Ho, Wo, 1)
    return y * (kernel[0] * kernel[1] / counted).astype(dtype)


def _inside(size: int, kernel: int, stride: int, before: int, after: int) -> np.ndarray:
    """(out,) positions of each window that lie inside the axis."""
    start = np.arange(window_size(size, kernel, stride, before, after)) * stride - before
    return np.minimum(start + kernel, size) - np.maximum(start, 0)


def _max_pool_backward(
    argnums: tuple[int, ...], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x = args[0]
    images, height, width, channels = x.shape
    _, chosen = _max_pool_with_places(x, **kwargs)
    dtype = x.dtype
    del x, args

    def back(g: np.ndarray) -> tuple[Any, ...]:
        g = np.ascontiguousarray(g)
        dx = np.zeros((images, height * width, channels), dtype)
        run_blocks(lambda first, last: kernels.add_chosen(g, chosen, first, last, dx), images, g.size)
        return (dx.reshape(images, height, width, channels),)

    return back


def _max_pool_with_places(x: np.ndarray, *, kernel: Pair, stride: Pair, pads: Pads) -> tuple[np.ndarray, np.ndarray]:
    x = np.ascontiguousarray(x)
    out_h = window_size(x.shape[1], kernel[0], stride[0], pads[0], pads[1])
    out_w = window_size(x.shape[2], kernel[1], stride[1], pads[2], pads[3])
    geometry = np.array([*kernel, *stride, pads[0], pads[2], 1, 1], np.int64)
    y = np.empty((len(x), out_h, out_w, x.shape[3]), x.dtype)
    chosen = np.empty(y.shape, np.int32)
    run_blocks(lambda first, last: kernels.max_pool(x, geometry, first, last, y, chosen), len(x), y.size)
    return y, chosen


@differentiable(_max_pool_backward)
def _max_pool(x: np.ndarray, *, kernel: Pair, stride: Pair, pads: Pads) -> np.ndarray:
    return _max_pool_with_places(x, kernel=kernel, stride=stride, pads=pads)[0]


def max_pool(x: Any, kernel: Pair, stride: Pair, pads: Pads = NO_PADS) -> Any:
    """Largest value of each window (n, Ho, Wo, C); the gradient goes to the first of equals."""
    return _max_pool(x, kernel=tuple(kernel), stride=tuple(stride), pads=tuple(pads))


def _resize_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    shape, dtype = args[0].shape, args[0].dtype
    rows, columns, row_parts, column_parts = args[1:]
    del args

    def back(g: np.ndarray) -> tuple[Any, ...]:
        g, dx = np.ascontiguousarray(g), np.zeros(shape, dtype)

        def work(first: int, last: int) -> None:
            kernels.add_resized(g, rows, columns, row_parts, column_parts, first, last, dx)

        run_blocks(work, len(g), g.size)
        return (dx,)

    return back


@differentiable(_resize_backward)
def _resize(
    x: np.ndarray, rows: np.ndarray, columns: np.ndarray, row_parts: np.ndarray, column_parts: np.ndarray
) -> np.ndarray:
    x = np.ascontiguousarray(x)
    y = np.empty((len(x), len(rows), len(columns), x.shape[3]), x.dtype)

    def work(first: int, last: int) -> None:
        kernels.resize(x, rows, columns, row_parts, column_parts, first, last, y)

    run_blocks(work, len(x), y.size)
    return y


def resize_nearest(x: Any, size: Pair, align_corners: bool = False, half_pixel_centers: bool = False) -> Any:
    """(n, H, W, C) -> (n, *size, C), each a copy of one value (``tinyvad.graph.shapes.nearest_indices``)."""
    value = plain(x)
    parts = []
    for length, out in zip(value.shape[1:3], size, strict=True):
        index = nearest_indices(length, out, align_corners, half_pixel_centers)
        parts.append((np.stack([index, index], 1), np.tile(np.array([1, 0], value.dtype), (out, 1))))
    (rows, row_parts), (columns, column_parts) = parts
    return _resize(x, rows, columns, row_parts, column_parts)


def resize_bilinear(x: Any, size: Pair) -> Any:
    """(n, H, W, C) -> (n, *size, C), half-pixel centres, no smoothing when it shrinks (PyTorch, align_corners=False)."""
    value = plain(x)
    parts = []
    for length, out in zip(value.shape[1:3], size, strict=True):
        place = np.clip((np.arange(out) + 0.5) * length / out - 0.5, 0, length - 1)  # (out,) float64
        low = place.astype(np.int64)
        part = place - low
        between = np.stack([low, np.minimum(low + 1, length - 1)], 1)  # (out, 2)
        parts.append((between, np.stack([1 - part, part], 1).astype(value.dtype)))
    (rows, row_parts), (columns, column_parts) = parts
    return _resize(x, rows, columns, row_parts, column_parts)
