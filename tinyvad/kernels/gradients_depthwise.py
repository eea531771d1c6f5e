"""Depthwise convolution and its derivative by the weights, sixteen channels at a time.

Flows in: maps (N, H, W, C) float32 or float64. Flows out: maps, and gradients of the weights. Sixteen channels of one map
are laid out as a plane (rows, columns, 16) with its zero border, small enough for a core's own cache; over it runs one
loop without a test, four neighbouring outputs at a time. The derivative by the input is a convolution again: of the
gradient, spread out by the stride, with the weights turned round.

A unit of work is one map's sixteen channels: unit = map * ceil(C / 16) + group. Sums have one order (``lanes``): results
are the same on any number of threads. Readable twin: ``scipy.ndimage`` in ``tests/test_training_ops.py``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from tinyvad.kernels.lanes import LANES, add, load, mul, splat, store

TOGETHER = 4  # neighbouring outputs; planes of outputs are as wide as a multiple of it


@njit(cache=True, nogil=True)
def lay_out(
    x: np.ndarray, image: int, channel: int, spread: tuple[int, int], corner: tuple[int, int], size: tuple[int, int],
    plane: np.ndarray,
) -> None:  # fmt: skip
    """Channels ``channel`` to + 15 of x[image] -> plane, flat (*size, 16); zero where there is nothing.

    Row y and column x of the map go to row y * spread[0] + corner[0] and column x * spread[1] + corner[1].
    """
    _, rows, columns, channels = x.shape
    height, width = size
    plane[: height * width * LANES] = 0
    flat = x.reshape(-1)
    here = min(LANES, channels - channel)
    for y in range(rows):
        to_y = y * spread[0] + corner[0]
        if to_y < 0 or to_y >= height:
            continue
        for c in range(columns):
            to_x = c * spread[1] + corner[1]
            if to_x < 0 or to_x >= width:
                continue
            source = ((image * rows + y) * columns + c) * channels + channel
            target = (to_y * width + to_x) * LANES
            if here == LANES:
                store(plane, target, load(flat, source))
            else:
                for i in range(here):
                    plane[target + i] = flat[source + i]


@njit(cache=True, nogil=True)
def depthwise(
    x: np.ndarray, weights: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int],
    spread: tuple[int, int], corner: tuple[int, int], first: int, last: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Units first to last - 1 of a depthwise convolution.

    Args:
        x: (N, H, W, C). spread: how far its rows and columns are moved apart first, with zeros between; (1, 1): not.
        weights: flat (groups, kernel_h, kernel_w, 16), zeros where there is no channel.
        corner: zero rows above and columns to the left of the map; negative ones cut off.
        out: (N, Ho, Wo, C), which ``units`` of it are written.
    """
    kernel_h, kernel_w = kernel
    stride_h, stride_w = stride
    dilation_h, dilation_w = dilation
    _, out_h, out_w, channels = out.shape
    groups = (channels + LANES - 1) // LANES
    wide = (out_w + TOGETHER - 1) // TOGETHER * TOGETHER
    height = (out_h - 1) * stride_h + dilation_h * (kernel_h - 1) + 1
    width = (wide - 1) * stride_w + dilation_w * (kernel_w - 1) + 1
    plane = np.empty(height * width * LANES, x.dtype)
    row = np.empty(wide * LANES, x.dtype)
    flat = out.reshape(-1)
    step = stride_w * LANES
    zero = splat(x.dtype.type(0))
    for unit in range(first, last):
        image, group = unit // groups, unit % groups
        lay_out(x, image, group * LANES, spread, corner, (height, width), plane)
        here = min(LANES, channels - group * LANES)
        for oy in range(out_h):
            for ox in range(0, wide, TOGETHER):
                at = group * kernel_h * kernel_w * LANES
                a, b, c, d = zero, zero, zero, zero
                for ky in range(kernel_h):
                    place = ((oy * stride_h + ky * dilation_h) * width + ox * stride_w) * LANES
                    for _ in range(kernel_w):
                        w = load(weights, at)
                        a = add(a, mul(w, load(plane, place)))
                        b = add(b, mul(w, load(plane, place + step)))
                        c = add(c, mul(w, load(plane, place + 2 * step)))
                        d = add(d, mul(w, load(plane, place + 3 * step)))
                        at += LANES
                        place += dilation_w * LANES
                store(row, ox * LANES, a)
                store(row, (ox + 1) * LANES, b)
                store(row, (ox + 2) * LANES, c)
                store(row, (ox + 3) * LANES, d)
            target = ((image * out_h + oy) * out_w) * channels + group * LANES
            for ox in range(out_w):
                if here == LANES:
                    store(flat, target, load(row, ox * LANES))
                else:
                    for i in range(here):
                        flat[target + i] = row[ox * LANES + i]
                target += channels


@njit(cache=True, nogil=True)
def depthwise_weights(
    g: np.ndarray, x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int],
    corner: tuple[int, int], first: int, last: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Units first to last - 1 of the derivative by the weights, map by map.

    Args:
        g: (N, Ho, Wo, C) gradient of the result. x: (N, H, W, C) what went in. corner: as in ``depthwise``.
        out: flat (N, groups, kernel_h, kernel_w, 16).
    """
    kernel_h, kernel_w = kernel
    stride_h, stride_w = stride
    dilation_h, dilation_w = dilation
    _, out_h, out_w, channels = g.shape
    groups = (channels + LANES - 1) // LANES
    wide = (out_w + TOGETHER - 1) // TOGETHER * TOGETHER
    height = (out_h - 1) * stride_h + dilation_h * (kernel_h - 1) + 1
    width = (wide - 1) * stride_w + dilation_w * (kernel_w - 1) + 1
    plane = np.empty(height * width * LANES, x.dtype)
    above = np.empty(out_h * wide * LANES, x.dtype)  # the gradient, laid out alike
    step = stride_w * LANES
    zero = splat(x.dtype.type(0))
    for unit in range(first, last):
        image, group = unit // groups, unit % groups
        lay_out(x, image, group * LANES, (1, 1), corner, (height, width), plane)
        lay_out(g, image, group * LANES, (1, 1), (0, 0), (out_h, wide), above)
        at = unit * kernel_h * kernel_w * LANES
        for ky in range(kernel_h):
            for kx in range(kernel_w):
                a, b, c, d = zero, zero, zero, zero
                source = 0
                for oy in range(out_h):
                    place = ((oy * stride_h + ky * dilation_h) * width + kx * dilation_w) * LANES
                    for _ in range(0, wide, TOGETHER):
                        a = add(a, mul(load(above, source), load(plane, place)))
                        b = add(b, mul(load(above, source + LANES), load(plane, place + step)))
                        c = add(c, mul(load(above, source + 2 * LANES), load(plane, place + 2 * step)))
                        d = add(d, mul(load(above, source + 3 * LANES), load(plane, place + 3 * step)))
                        source += TOGETHER * LANES
                        place += TOGETHER * step
                store(out, at, add(add(a, b), add(c, d)))
                at += LANES
