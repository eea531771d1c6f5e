"""Windows of maps and places in between: im2col and back, max pooling, resizing, with their derivatives.

Flows in: C-ordered maps (N, H, W, C) float32 or float64, one of the N a call or images ``first`` to
``last`` - 1. Flows out: maps or (positions, window) matrices in the same type. Sums are made map by map in one order, so
results are the same on any number of threads. Readable twins: plain loops in ``tests/test_training_ops.py``.

geometry: (kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w) int64.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def patches(x: np.ndarray, geometry: np.ndarray, out_h: int, out_w: int, out: np.ndarray) -> None:
    """im2col of one map: x (H, W, C) -> out (out_h * out_w, kernel_h * kernel_w * C); 0 outside the map."""
    height, width, channels = x.shape
    kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w = geometry
    for oy in range(out_h):
        for ox in range(out_w):
            row = oy * out_w + ox
            for ky in range(kernel_h):
                y = oy * stride_h - top + ky * dilation_h
                for kx in range(kernel_w):
                    column = ox * stride_w - left + kx * dilation_w
                    start = (ky * kernel_w + kx) * channels
                    if 0 <= y < height and 0 <= column < width:
                        for c in range(channels):
                            out[row, start + c] = x[y, column, c]
                    else:
                        out[row, start : start + channels] = 0


@njit(cache=True, nogil=True)
def add_patches(rows: np.ndarray, geometry: np.ndarray, out_h: int, out_w: int, x: np.ndarray) -> None:
    """The way back of ``patches``: rows (out_h * out_w, kernel_h * kernel_w * C) are added to x (H, W, C)."""
    height, width, channels = x.shape
    kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w = geometry
    for oy in range(out_h):
        for ox in range(out_w):
            row = oy * out_w + ox
            for ky in range(kernel_h):
                y = oy * stride_h - top + ky * dilation_h
                if not 0 <= y < height:
                    continue
                for kx in range(kernel_w):
                    column = ox * stride_w - left + kx * dilation_w
                    if not 0 <= column < width:
                        continue
                    start = (ky * kernel_w + kx) * channels
                    for c in range(channels):
                        x[y, column, c] += rows[row, start + c]


@njit(cache=True, nogil=True)
def max_pool(x: np.ndarray, geometry: np.ndarray, first: int, last: int, y: np.ndarray, chosen: np.ndarray) -> None:
    """Largest value of each window and the place h * W + w it comes from, the first of equals.

    x (N, H, W, C) -> y (N, Ho, Wo, C) and chosen, the same shape, int32. Places outside the map don't count.
    """
    _, height, width, channels = x.shape
    _, out_h, out_w, _ = y.shape
    kernel_h, kernel_w, stride_h, stride_w, top, left, _, _ = geometry
    for image in range(first, last):
        for oy in range(out_h):
            for ox in range(out_w):
                y[image, oy, ox] = -np.inf
                chosen[image, oy, ox] = 0
                for row in range(max(oy * stride_h - top, 0), min(oy * stride_h - top + kernel_h, height)):
                    for column in range(max(ox * stride_w - left, 0), min(ox * stride_w - left + kernel_w, width)):
                        for c in range(channels):
                            value = x[image, row, column, c]
                            if value > y[image, oy, ox, c] or value != value:  # NaN stays NaN
                                y[image, oy, ox, c] = value
                                chosen[image, oy, ox, c] = row * width + column


@njit(cache=True, nogil=True)
def add_chosen(g: np.ndarray, chosen: np.ndarray, first: int, last: int, dx: np.ndarray) -> None:
    """The way back of ``max_pool``: g (N, Ho, Wo, C) is added to dx (N, H * W, C) at the places ``chosen``."""
    _, out_h, out_w, channels = g.shape
    for image in range(first, last):
        for oy in range(out_h):
            for ox in range(out_w):
                for c in range(channels):
                    dx[image, chosen[image, oy, ox, c], c] += g[image, oy, ox, c]


@njit(cache=True, nogil=True)
def resize(
    x: np.ndarray, rows: np.ndarray, columns: np.ndarray, row_parts: np.ndarray, column_parts: np.ndarray,
    first: int, last: int, y: np.ndarray,
) -> None:  # fmt: skip
    """Each output lies between two rows and two columns: x (N, H, W, C) -> y (N, Ho, Wo, C).

    Args:
        rows, columns: (Ho, 2), (Wo, 2) int64: the two on both sides.
        row_parts, column_parts: (Ho, 2), (Wo, 2), of x's type: their weights.
    """
    _, out_h, out_w, channels = y.shape
    for image in range(first, last):
        for oy in range(out_h):
            for ox in range(out_w):
                y[image, oy, ox] = 0
                for i in range(2):
                    for j in range(2):
                        part = row_parts[oy, i] * column_parts[ox, j]
                        if part != 0:
                            for c in range(channels):
                                y[image, oy, ox, c] += part * x[image, rows[oy, i], columns[ox, j], c]


@njit(cache=True, nogil=True)
def add_resized(
    g: np.ndarray, rows: np.ndarray, columns: np.ndarray, row_parts: np.ndarray, column_parts: np.ndarray,
    first: int, last: int, dx: np.ndarray,
) -> None:  # fmt: skip
    """The way back of ``resize``: g (N, Ho, Wo, C) is added to dx (N, H, W, C)."""
    _, out_h, out_w, channels = g.shape
    for image in range(first, last):
        for oy in range(out_h):
            for ox in range(out_w):
                for i in range(2):
                    for j in range(2):
                        part = row_parts[oy, i] * column_parts[ox, j]
                        if part != 0:
                            for c in range(channels):
                                dx[image, rows[oy, i], columns[ox, j], c] += part * g[image, oy, ox, c]
