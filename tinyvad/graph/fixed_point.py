"""Fixed-point multipliers and TFLite's integer rescaling, in plain Python and NumPy (the reference of kernels and C).

A real factor m becomes ``multiplier * 2**(shift - 31)`` with a multiplier of 31 bits and a sign. Source: TFLite's
QuantizeMultiplier and MultiplyByQuantizedMultiplier, double rounding.
"""

from __future__ import annotations

import math

import numpy as np

from tinyvad.errors import InputError


def round_half_away(x: np.ndarray | float) -> np.ndarray:
    """Round to the nearest integer, halves away from zero (C's round), as float64."""
    x = np.asarray(x, np.float64)
    whole = np.trunc(x)
    # not floor(|x| + 0.5): that sum is itself rounded, and takes 0.49999999999999994 to 1
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(1.0, x), whole)


def quantize_multiplier(factor: float) -> tuple[int, int]:
    """Real factor -> (multiplier, shift): |multiplier| in [2**30, 2**31] or 0; positive shifts left.

    Magnitudes below 2**-32 become 0, as in TFLite. A factor is negative where weights have a negative scale.

    Raises:
        InputError: the factor, a quotient of scales, is not finite.
    """
    if not math.isfinite(factor):
        raise InputError(f"values cannot be rescaled by {factor}; quantisation scales must be finite and not 0")
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


def multiply_by_quantized_multiplier(
    x: np.ndarray | int, multiplier: np.ndarray | int, shift: np.ndarray | int
) -> np.ndarray:
    """x * multiplier * 2**(shift - 31), rounded twice as TFLite does; integer arrays that broadcast, int64 out.

    x * 2**shift must stay within int32 where shift > 0, as on the device; the callers see to it.
    """
    a, m, s = (np.asarray(value, np.int64) for value in (x, multiplier, shift))
    left, right = np.maximum(s, 0), np.maximum(-s, 0)
    return rounding_divide(((a << left) * m + (1 << 30)) >> 31, right)


def rounding_divide(x: np.ndarray, power: np.ndarray | int) -> np.ndarray:
    """x / 2**power, rounded to the nearest integer, halves away from zero (gemmlowp's RoundingDivideByPOT); int64."""
    mask = (np.int64(1) << np.asarray(power, np.int64)) - 1
    return (x >> power) + ((x & mask) > (mask >> 1) + (x < 0))
