"""Fixed-point multipliers and TFLite's integer rescaling, in plain Python and NumPy (the reference of kernels and C).

A real factor m > 0 becomes ``multiplier * 2**(shift - 31)`` with a 31-bit multiplier. Source: TFLite's
QuantizeMultiplier and MultiplyByQuantizedMultiplier, double rounding.
"""

from __future__ import annotations

import math

import numpy as np


def round_half_away(x: np.ndarray | float) -> np.ndarray:
    """Round to the nearest integer, halves away from zero (C's round), as float64."""
    x = np.asarray(x, np.float64)
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


def quantize_multiplier(factor: float) -> tuple[int, int]:
    """Real factor >= 0 -> (multiplier in [2**30, 2**31) or 0, shift; positive shifts left)."""
    if factor == 0.0:
        return 0, 0
    fraction, shift = math.frexp(float(factor))
    multiplier = int(round_half_away(fraction * (1 << 31)))
    if multiplier == 1 << 31:
        multiplier //= 2
        shift += 1
    if shift < -31:
        return 0, 0
    return multiplier, shift


def quantize_multipliers(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``quantize_multiplier`` for an array: (multipliers int64, shifts int64) of the same shape."""
    pairs = [quantize_multiplier(float(factor)) for factor in np.ravel(factors)]
    shape = np.shape(factors)
    return (
        np.array([m for m, _ in pairs], np.int64).reshape(shape),
        np.array([s for _, s in pairs], np.int64).reshape(shape),
    )


def multiply_by_quantized_multiplier(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """x * multiplier * 2**(shift - 31), rounded twice as TFLite does; integer arrays that broadcast, int64 out."""
    x, multiplier, shift = (np.asarray(a, np.int64) for a in (x, multiplier, shift))
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    high = ((x << left) * multiplier + (1 << 30)) >> 31
    mask = (np.int64(1) << right) - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))
