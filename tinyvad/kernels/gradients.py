"""Inner loops of training: batch norm with its activation, clipped activations, hard-swish, and the feature loss.

Flows in: C-ordered float32 or float64 arrays seen as (R, C): R positions of all maps of a batch, C channels. Flows out:
results and gradients in the same type. Positions come in blocks of ``step`` rows, ``first`` to ``last`` - 1 of them a
call; sums over positions are made block by block, and what calls these kernels adds the blocks up in float64 and in
order, so that no result depends on how the blocks were shared out. Readable twins: ``tests/test_training_ops.py`` and
``tests/test_training_losses.py`` compare each with plain NumPy, SciPy and finite differences.

Convolutions are in ``gradients_depthwise`` and ``gradients_windows``. Comparisons are written so that NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def moments(x: np.ndarray, step: int, first: int, last: int, means: np.ndarray, squares: np.ndarray) -> None:
    """Per block and channel: mean, and sum of squared distances to it. x (R, C) -> means, squares (blocks, C)."""
    rows, channels = x.shape
    mean = np.empty(channels, x.dtype)
    square = np.empty(channels, x.dtype)
    for block in range(first, last):
        start = block * step
        stop = min(start + step, rows)
        mean[:] = 0
        square[:] = 0
        for r in range(start, stop):
            for c in range(channels):
                mean[c] += x[r, c]
        for c in range(channels):
            mean[c] /= x.dtype.type(stop - start)
        for r in range(start, stop):
            for c in range(channels):
                distance = x[r, c] - mean[c]
                square[c] += distance * distance
        means[block] = mean
        squares[block] = square


@njit(cache=True, nogil=True)
def scale_clip(
    x: np.ndarray, scale: np.ndarray, offset: np.ndarray, low: Any, high: Any, start: int, stop: int, y: np.ndarray
) -> None:
    """y = min(max(x * scale + offset, low), high) of rows start to stop; x, y (R, C), scale, offset (C,)."""
    channels = x.shape[1]
    for r in range(start, stop):
        for c in range(channels):
            value = x[r, c] * scale[c] + offset[c]
            value = low if value < low else value
            y[r, c] = high if value > high else value


@njit(cache=True, nogil=True)
def norm_sums(
    g: np.ndarray, x: np.ndarray, scale: np.ndarray, offset: np.ndarray, mean: np.ndarray, low: Any, high: Any,
    step: int, first: int, last: int, sums: np.ndarray, products: np.ndarray,
) -> None:  # fmt: skip
    """Per block and channel, sums of d and d * (x - mean), d = g where low < x * scale + offset < high, else 0.

    g, x (R, C); scale, offset, mean (C,) -> sums, products (blocks, C).
    """
    rows, channels = x.shape
    total = np.empty(channels, x.dtype)
    product = np.empty(channels, x.dtype)
    zero = x.dtype.type(0)
    for block in range(first, last):
        total[:] = 0
        product[:] = 0
        for r in range(block * step, min((block + 1) * step, rows)):
            for c in range(channels):
                value = x[r, c] * scale[c] + offset[c]
                d = zero if (value <= low) | (value >= high) else g[r, c]
                total[c] += d
                product[c] += d * (x[r, c] - mean[c])
        sums[block] = total
        products[block] = product


@njit(cache=True, nogil=True)
def norm_gradient(
    g: np.ndarray, x: np.ndarray, scale: np.ndarray, offset: np.ndarray, slope: np.ndarray, shift: np.ndarray,
    low: Any, high: Any, start: int, stop: int, dx: np.ndarray,
) -> None:  # fmt: skip
    """dx = scale * d - x * slope - shift of rows start to stop, d as in ``norm_sums``; all (R, C) or (C,)."""
    channels = x.shape[1]
    zero = x.dtype.type(0)
    for r in range(start, stop):
        for c in range(channels):
            value = x[r, c] * scale[c] + offset[c]
            d = zero if (value <= low) | (value >= high) else g[r, c]
            dx[r, c] = d * scale[c] - (x[r, c] * slope[c] + shift[c])


@njit(cache=True, nogil=True)
def clip_gradient(g: np.ndarray, y: np.ndarray, low: Any, high: Any, start: int, stop: int, dx: np.ndarray) -> None:
    """dx = g where low < y < high, else 0; flat arrays, elements start to stop."""
    zero = g.dtype.type(0)
    for i in range(start, stop):
        dx[i] = zero if (y[i] <= low) | (y[i] >= high) else g[i]


@njit(cache=True, nogil=True)
def hard_swish(x: np.ndarray, start: int, stop: int, y: np.ndarray) -> None:
    """y = x * min(max(x + 3, 0), 6) / 6; flat arrays, elements start to stop."""
    zero, three, six = x.dtype.type(0), x.dtype.type(3), x.dtype.type(6)
    for i in range(start, stop):
        gate = x[i] + three
        gate = zero if gate < zero else gate
        gate = six if gate > six else gate
        y[i] = x[i] * gate / six


@njit(cache=True, nogil=True)
def hard_swish_gradient(g: np.ndarray, x: np.ndarray, start: int, stop: int, dx: np.ndarray) -> None:
    """dx = g * (0 below -3, 1 above 3, (2 x + 3) / 6 between); flat arrays, elements start to stop."""
    zero, one, three, six = x.dtype.type(0), x.dtype.type(1), x.dtype.type(3), x.dtype.type(6)
    for i in range(start, stop):
        slope = (x[i] + x[i] + three) / six
        slope = zero if x[i] <= -three else slope
        slope = one if x[i] >= three else slope
        dx[i] = g[i] * slope


@njit(cache=True, nogil=True)
def direction_distance(
    student: np.ndarray, teacher: np.ndarray, least: float, start: int, stop: int, distance: np.ndarray, kept: np.ndarray
) -> None:
    """||t / |t| - s / |s|||^2 of rows start to stop; student, teacher (R, C).

    Args:
        least: norms below it count as it.
        distance: (R,) float64, out.
        kept: (R, 3) float64, out, for the way back: 1 / |t|, 1 / |s| (0 for norms below ``least``), cosine.
    """
    channels = student.shape[1]
    for r in range(start, stop):
        of_s, of_t, dot = 0.0, 0.0, 0.0
        for c in range(channels):
            s, t = np.float64(student[r, c]), np.float64(teacher[r, c])
            of_s += s * s
            of_t += t * t
            dot += s * t
        of_s, of_t = np.sqrt(of_s), np.sqrt(of_t)
        by_s, by_t = 1.0 / (least if of_s < least else of_s), 1.0 / (least if of_t < least else of_t)
        total = 0.0
        for c in range(channels):
            difference = teacher[r, c] * by_t - student[r, c] * by_s
            total += difference * difference
        distance[r] = total
        kept[r, 0], kept[r, 1], kept[r, 2] = by_t, 0.0 if of_s < least else by_s, dot * by_s * by_t


@njit(cache=True, nogil=True)
def direction_gradient(
    g: float, student: np.ndarray, teacher: np.ndarray, kept: np.ndarray, start: int, stop: int, out: np.ndarray
) -> None:
    """-2 g (t^ - cos s^) / |s| of rows start to stop: ``direction_distance`` by the student; out (R, C)."""
    channels = student.shape[1]
    for r in range(start, stop):
        by_t, by_s, cosine = kept[r]
        of_t, of_s = -2.0 * g * by_s * by_t, 2.0 * g * by_s * by_s * cosine
        for c in range(channels):
            out[r, c] = teacher[r, c] * of_t + student[r, c] * of_s
