"""Logistic and hard-swish on int8, as TFLM computes them: two int8 grids in, the results of all 256 inputs out.

An int8 value has 256 values, so any function of it is a table that is worked out once. A table's index is the value's bit
pattern: 0 to 127, then -128 to -1.

Sources: for logistic gemmlowp's fixed-point exp (a Taylor polynomial around -1/8, then one factor a bit) and reciprocal
(three steps of Newton and Raphson), called as TFLite's reference_integer_ops do; for hard-swish TFLite's reference
kernel, 16 bits wide.
"""

from __future__ import annotations

import math

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide,
)
from tinyvad.graph.ir import Quantization

ONE = (1 << 31) - 1  # 1.0 with 31 fractional bits, as near as int32 comes
LOGISTIC_BITS = 4  # of the input's integer part: it saturates from 15 on
INT16_MAX = (1 << 15) - 1
EVERY_VALUE = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)  # (256,) in the order of a table


def logistic_table(x: Quantization) -> np.ndarray:
    """(256,) int8 of 1 / (1 + exp(-x)) on its fixed grid, scale 1/256 and zero point -128."""
    multiplier, shift = quantize_multiplier(float(x.scale[0]) * (1 << (31 - LOGISTIC_BITS)))
    centred = EVERY_VALUE - int(x.zero_point[0])
    radius = math.floor(math.ldexp(15.0, 31 - LOGISTIC_BITS - shift))
    inside = np.clip(centred, 1 - radius, radius - 1)
    fixed = multiply_by_quantized_multiplier(inside, multiplier, shift)  # 27 fractional bits
    result = np.minimum(rounding_divide(_logistic(fixed), 31 - 8), 255)
    return (np.where(centred <= -radius, 0, np.where(centred >= radius, 255, result)) - 128).astype(np.int8)


def hard_swish_table(x: Quantization, y: Quantization, where: str) -> np.ndarray:
    """(256,) int8 of x * relu6(x + 3) / 6.

    Raises:
        InputError: the two scales are too far apart for the 16 bits of the kernel (``where`` names the node).
    """
    high_resolution = np.float32(1 / 128) * np.float32(x.scale[0])
    out_multiplier, out_shift = _int16_multiplier(float(high_resolution / np.float32(y.scale[0])))
    gate_multiplier, gate_shift = _int16_multiplier(float(high_resolution / np.float32(3 / 32768)))
    if not (-15 <= out_shift <= 0 and -15 <= gate_shift <= 31):
        raise InputError(
            f"{where}: scales {float(x.scale[0]):g} and {float(y.scale[0]):g} are beyond hard-swish's 16 bits; "
            "quantise again with an output scale of 1/64 to 256 times the input's"
        )
    value = (EVERY_VALUE - int(x.zero_point[0])) << 7
    scaled = _high_mul16(value, out_multiplier)
    gate = value
    if gate_shift > 0:  # all but the last bit of the shift before the product, where it keeps most digits
        gate = _saturated16(gate << (gate_shift - 1))
    gate = _high_mul16(gate, gate_multiplier)
    gate = _saturated16(gate << 1) if gate_shift > 0 else rounding_divide(gate, -gate_shift)
    gate = (gate + (1 << 15)) >> 1  # [-1, 1] to [0, 1]
    product = np.trunc(gate * scaled / (1 << 15)).astype(np.int64)  # towards zero, which cancels the bias from above
    out = rounding_divide(product, -out_shift) + int(y.zero_point[0])
    return np.clip(out, -128, 127).astype(np.int8)


def _logistic(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), 27 fractional bits in, 31 out."""
    positive = _reciprocal_of_one_plus(_exp(-np.abs(x)))
    return np.where(x > 0, positive, np.where(x < 0, ONE - positive, 1 << 30))


def _exp(x: np.ndarray) -> np.ndarray:
    """exp(x) of -16 < x <= 0, 27 fractional bits in, 31 out."""
    quarter = 1 << 25
    fraction = (x & (quarter - 1)) - quarter  # in [-1/4, 0)
    result = _exp_of_fraction(fraction << LOGISTIC_BITS)
    rest = fraction - x  # a multiple of 1/4: each of its bits is a factor
    for power in range(-2, LOGISTIC_BITS):
        factor = round(math.exp(-(2.0**power)) * (1 << 31))
        result = np.where(rest & (1 << (27 + power)), _high_mul(result, factor), result)
    return np.where(x == 0, ONE, result)


def _exp_of_fraction(x: np.ndarray) -> np.ndarray:
    """exp(x) of -1/4 <= x < 0, 31 fractional bits in and out: its Taylor polynomial of degree 4 around -1/8."""
    middle, third = round(math.exp(-1 / 8) * (1 << 31)), round((1 << 31) / 3)
    d = x + (1 << 28)
    d2 = _high_mul(d, d)
    d3, d4 = _high_mul(d2, d), _high_mul(d2, d2)
    # d + d2/2 + d3/6 + d4/24
    rest = rounding_divide(_high_mul(rounding_divide(d4, 2) + d3, third) + d2, 1)
    return middle + _high_mul(d + rest, middle)


def _reciprocal_of_one_plus(x: np.ndarray) -> np.ndarray:
    """1 / (1 + x) of 0 <= x <= 1, 31 fractional bits in and out; inside, 29."""
    half = (x + ONE + 1) >> 1  # (1 + x) / 2
    guess = round(48 / 17 * (1 << 29)) + _high_mul(half, round(-32 / 17 * (1 << 29)))
    for _ in range(3):
        guess = guess + (_high_mul(guess, (1 << 29) - _high_mul(half, guess)) << 2)
    return np.minimum(guess << 1, ONE)


def _high_mul(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """The rounded high half of 2 a b, 32 bits wide."""
    return (a * b + (1 << 30)) >> 31


def _high_mul16(a: np.ndarray, b: int) -> np.ndarray:
    return (a * b + (1 << 14)) >> 15


def _saturated16(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -INT16_MAX - 1, INT16_MAX)


def _int16_multiplier(factor: float) -> tuple[int, int]:
    """``quantize_multiplier`` with 16 bits."""
    multiplier, shift = quantize_multiplier(factor)
    return min((multiplier + (1 << 15)) >> 16, INT16_MAX), shift
