"""The inner loops of the exact int8 engine: TFLite's integer arithmetic, double rounding, NHWC.

Flows in: int8 maps, float32 copies of int8 values and integer requantisation constants. Flows out: int8 maps.
Source: the int8 arithmetic of TFLite's reference kernels (gemmlowp's SaturatingRoundingDoublingHighMul followed by
RoundingDivideByPOT). The readable twins of these loops are in ``tests/integer_interpreter.py``.

Sums of products are made in float32: every product and partial sum is an integer of at most 2**24, so float32 holds it
exactly and the order of additions does not matter (the engine checks the bound and splits longer sums).

All kernels are serial and release the GIL: the engine runs several images at once instead of several rows of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, inline="always")
def multiply_by_quantized_multiplier(x: Any, multiplier: Any, shift: Any) -> Any:
    """round(round(x * 2**left * multiplier / 2**31) / 2**right), shift = left - right; the second, half away from zero.

    The first rounding, SRDHM, truncates (a*b + nudge) / 2**31 with nudge 2**30 or 1 - 2**30 by sign; that is the
    same as the arithmetic shift (a*b + 2**30) >> 31 for every sign. No branches, so that loops over it vectorise.
    """
    high = ((np.int64(x) << max(shift, 0)) * np.int64(multiplier) + (np.int64(1) << 30)) >> 31
    right = max(-shift, 0)
    mask = (np.int64(1) << right) - 1
    return (high >> right) + np.int64((high & mask) > ((mask >> 1) + np.int64(high < 0)))


@njit(cache=True, nogil=True)
def requantize(
    acc: np.ndarray, bias: np.ndarray, multipliers: np.ndarray, shifts: np.ndarray,
    zero_point: int, low: int, high: int, out: np.ndarray,
) -> None:  # fmt: skip
    """acc (R, C) float32 or float64 holding int32 values -> out (R, C) int8, channel by channel."""
    rows, channels = acc.shape
    for r in range(rows):
        for c in range(channels):
            a = np.int64(np.int32(acc[r, c])) + bias[c]
            v = multiply_by_quantized_multiplier(a, multipliers[c], shifts[c]) + zero_point
            out[r, c] = np.int8(min(max(v, low), high))


@njit(cache=True, nogil=True)
def depthwise_conv(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray, multipliers: np.ndarray, shifts: np.ndarray,
    geometry: np.ndarray, zero_point: int, low: int, high: int, out: np.ndarray,
) -> None:  # fmt: skip
    """x (H, W, C) float32, zero point already taken off; weights (kh, kw, C) float32 -> out (Ho, Wo, C) int8.

    geometry: (stride_h, stride_w, top, left, dilation_h, dilation_w) int64. Positions outside the map hold real 0.
    """
    height, width, channels = x.shape
    kernel_h, kernel_w, _ = weights.shape
    stride_h, stride_w, top, left, dilation_h, dilation_w = geometry
    out_h, out_w, _ = out.shape
    acc = np.empty(channels, np.float32)
    for oy in range(out_h):
        for ox in range(out_w):
            acc[:] = 0
            for ky in range(kernel_h):
                y = oy * stride_h - top + ky * dilation_h
                if y < 0 or y >= height:
                    continue
                for kx in range(kernel_w):
                    xx = ox * stride_w - left + kx * dilation_w
                    if xx < 0 or xx >= width:
                        continue
                    for c in range(channels):
                        acc[c] += x[y, xx, c] * weights[ky, kx, c]
            for c in range(channels):
                a = np.int64(np.int32(acc[c])) + bias[c]
                v = multiply_by_quantized_multiplier(a, multipliers[c], shifts[c]) + zero_point
                out[oy, ox, c] = np.int8(min(max(v, low), high))


@njit(cache=True, nogil=True)
def patches(
    x: np.ndarray, kernel_h: int, kernel_w: int, geometry: np.ndarray, out_h: int, out_w: int,
    pad_value: int, out: np.ndarray,
) -> None:  # fmt: skip
    """im2col: x (H, W, C) int8 -> out (out_h * out_w, kernel_h * kernel_w * C) float32; outside the map, pad_value."""
    height, width, channels = x.shape
    stride_h, stride_w, top, left, dilation_h, dilation_w = geometry
    for oy in range(out_h):
        for ox in range(out_w):
            row = oy * out_w + ox
            for ky in range(kernel_h):
                y = oy * stride_h - top + ky * dilation_h
                for kx in range(kernel_w):
                    xx = ox * stride_w - left + kx * dilation_w
                    start = (ky * kernel_w + kx) * channels
                    inside = 0 <= y < height and 0 <= xx < width
                    for c in range(channels):
                        out[row, start + c] = x[y, xx, c] if inside else pad_value


@njit(cache=True, nogil=True)
def add(
    a: np.ndarray, b: np.ndarray, a_zero: int, b_zero: int, a_mult: int, a_shift: int, b_mult: int, b_shift: int,
    out_mult: int, out_shift: int, out_zero: int, low: int, high: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Flat int8 arrays a, b -> out: both inputs rescaled to 2**20 times a common scale, added, rescaled."""
    for i in range(a.size):
        left = multiply_by_quantized_multiplier((np.int64(a[i]) - a_zero) << 20, a_mult, a_shift)
        right = multiply_by_quantized_multiplier((np.int64(b[i]) - b_zero) << 20, b_mult, b_shift)
        value = multiply_by_quantized_multiplier(left + right, out_mult, out_shift) + out_zero
        out[i] = np.int8(min(max(value, low), high))


@njit(cache=True, nogil=True)
def mul(
    a: np.ndarray, b: np.ndarray, a_zero: int, b_zero: int, mult: int, shift: int,
    out_zero: int, low: int, high: int, out: np.ndarray,
) -> None:  # fmt: skip
    """a (R, C) int8 times b (R, C) or (1, C) int8 -> out (R, C) int8."""
    rows, channels = a.shape
    for r in range(rows):
        row = min(r, b.shape[0] - 1)
        for c in range(channels):
            product = (np.int64(a[r, c]) - a_zero) * (np.int64(b[row, c]) - b_zero)
            value = multiply_by_quantized_multiplier(product, mult, shift) + out_zero
            out[r, c] = np.int8(min(max(value, low), high))


@njit(cache=True, nogil=True)
def pool(
    x: np.ndarray, kernel_h: int, kernel_w: int, geometry: np.ndarray, is_max: bool, low: int, high: int, out: np.ndarray
) -> None:
    """Average (rounded half away from zero, over the positions inside the map) or maximum; x, out (H, W, C) int8."""
    height, width, channels = x.shape
    stride_h, stride_w, top, left, _, _ = geometry
    out_h, out_w, _ = out.shape
    for oy in range(out_h):
        y0 = max(oy * stride_h - top, 0)
        y1 = min(oy * stride_h - top + kernel_h, height)
        for ox in range(out_w):
            x0 = max(ox * stride_w - left, 0)
            x1 = min(ox * stride_w - left + kernel_w, width)
            count = (y1 - y0) * (x1 - x0)
            for c in range(channels):
                total = 0
                largest = -128
                for y in range(y0, y1):
                    for xx in range(x0, x1):
                        value = np.int64(x[y, xx, c])
                        total += value
                        largest = max(largest, value)
                if is_max:
                    value = largest
                elif total > 0:
                    value = (total + count // 2) // count
                else:
                    value = -((-total + count // 2) // count)
                out[oy, ox, c] = np.int8(min(max(value, low), high))
