"""Do LiteRT's reference kernels and TFLM compute the same integers? An op's int8 grids in, yes or no out.

They part where LiteRT works out a factor in float32 and TFLM in double (mul, relu), or where LiteRT makes a table in
float32 and TFLM computes in fixed point (logistic). Both then round, so their integers differ only where a value lies
within some 1e-5 of a tie; an int8 op has few enough values to look at all of them. ``tinyvad.graph.grids`` chooses grids on
which both agree, so that LiteRT can stand in for the device.
"""

from __future__ import annotations

import numpy as np

from tinyvad.graph.curves import EVERY_VALUE, logistic_table
from tinyvad.graph.fixed_point import multiply_by_quantized_multiplier, quantize_multiplier
from tinyvad.graph.ir import Quantization

# In steps of the logistic's output: LiteRT's float32 is off by up to 1.2e-5, TFLM's fixed point by less.
TIE = 1e-4


def mul_agrees(a: Quantization, b: Quantization, y: Quantization) -> bool:
    """Over all 65536 pairs of values."""
    left, right, out = (np.float32(q.scale[0]) for q in (a, b, y))
    products = np.outer(EVERY_VALUE - a.zero_point[0], EVERY_VALUE - b.zero_point[0])
    return _same(products, float(left) * float(right) / float(out), float(left * right / out), y)


def relu_agrees(x: Quantization, y: Quantization) -> bool:
    """Over all 256 values."""
    into, out = np.float32(x.scale[0]), np.float32(y.scale[0])
    return _same(EVERY_VALUE - x.zero_point[0], float(into) / float(out), float(into / out), y)


def logistic_agrees(x: Quantization) -> bool:
    """TFLM rounds to the nearest (with a scale above 1 it saturates too early), and no value lies near a tie."""
    real = (EVERY_VALUE - x.zero_point[0]) * float(x.scale[0])
    steps = 256 / (1 + np.exp(-np.clip(real, -20, 20)))
    is_nearest = np.array_equal(np.minimum(np.rint(steps), 255) - 128, logistic_table(x))
    return is_nearest and bool((np.abs(steps - np.floor(steps) - 0.5) > TIE).all())


def _same(sums: np.ndarray, double: float, single: float, y: Quantization) -> bool:
    """Are ``sums`` rescaled by two factors that differ by rounding the same int8 values?"""
    if double == single:
        return True
    if not 0 < double < 2.0**14:  # a product shifted beyond int32: undefined on the device
        return False
    one, other = (
        np.clip(multiply_by_quantized_multiplier(sums, *quantize_multiplier(factor)) + y.zero_point[0], -128, 127)
        for factor in (double, single)
    )
    return np.array_equal(one, other)
