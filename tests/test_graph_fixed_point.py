"""Fixed-point rescaling against gemmlowp's definition in exact fractions, and against its own kernel."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    quantize_multipliers,
    round_half_away,
)
from tinyvad.kernels import int8 as kernels

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1


def half_away(x: Fraction) -> int:
    """Nearest integer, halves away from zero."""
    whole = math.floor(abs(x) + Fraction(1, 2))
    return whole if x >= 0 else -whole


def doubling_high_mul(a: int, b: int) -> int:
    """gemmlowp's SaturatingRoundingDoublingHighMul: C's division by 2**31 truncates towards zero."""
    if a == b == INT32_MIN:
        return INT32_MAX
    nudge = 1 << 30 if a * b >= 0 else 1 - (1 << 30)
    return math.trunc(Fraction(a * b + nudge, 1 << 31))


def divide_by_power_of_two(x: int, exponent: int) -> int:
    """gemmlowp's RoundingDivideByPOT as its code has it."""
    mask = (1 << exponent) - 1
    remainder, threshold = x & mask, (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def oracle(x: int, multiplier: int, shift: int) -> int:
    high = doubling_high_mul(x << max(shift, 0), multiplier)
    return divide_by_power_of_two(high, max(-shift, 0))


def edges(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(x, multiplier, shift): ends of the ranges, small values, ties, random ones.

    |x| << shift stays in int32: the engine refuses graphs whose sums could leave it.
    """
    multipliers = [1 << 30, (1 << 30) + 1, (1 << 31) - 1, -(1 << 30), -(1 << 31), -(1 << 31) + 1, 0, 3 << 29]
    multipliers += rng.integers(1 << 30, 1 << 31, 10).tolist()
    shifts = [*range(-31, 9), 20, 30]
    values = [0, 1, -1, 2, -2, 3, -3, 5, -5, 127, -128, 255, -255, 1 << 20, -(1 << 20), INT32_MAX, INT32_MIN + 1]
    values += [s * ((1 << e) + d) for e in (7, 15, 22, 30) for d in (-1, 0, 1) for s in (1, -1)]
    values += rng.integers(INT32_MIN + 1, INT32_MAX + 1, 30).tolist() + rng.integers(-70000, 70000, 30).tolist()
    return [
        (x, m, s) for m in multipliers for s in shifts for x in values if abs(x) << max(s, 0) <= INT32_MAX
    ]


def test_rescaling_is_gemmlowp_s(rng: np.random.Generator) -> None:
    cases = edges(rng)
    assert len(cases) > 40_000
    x, m, s = (np.array(column, np.int64) for column in zip(*cases))
    wanted = np.array([oracle(*case) for case in cases])
    np.testing.assert_array_equal(multiply_by_quantized_multiplier(x, m, s), wanted)


def test_the_kernel_rescales_alike(rng: np.random.Generator) -> None:
    """The kernel's loop over rows and channels: (R, C) sums, one multiplier and shift a channel."""
    cases = edges(rng)[::3]
    x, m, s = (np.array(column, np.int64) for column in zip(*cases))
    out = np.empty((1, len(cases)), np.int8)
    kernels.requantize(np.zeros((1, len(cases)), np.float32), x, m, s, 3, -128, 127, out)
    np.testing.assert_array_equal(out[0], np.clip([oracle(*case) + 3 for case in cases], -128, 127))
    for case in cases[:: len(cases) // 500]:
        assert kernels.multiply_by_quantized_multiplier(*case) == oracle(*case)


def test_the_second_rounding_takes_halves_away_from_zero() -> None:
    for exponent in range(12):
        for x in range(-5000, 5001, 7):
            assert divide_by_power_of_two(x, exponent) == half_away(Fraction(x, 1 << exponent))
    # 1 * 2**30 / 2**31 = 1/2 -> 1; -1/2 -> 0 in the first rounding (up), 1.5 -> 2 and -1.5 -> -1
    assert [int(multiply_by_quantized_multiplier(x, 1 << 30, 0)) for x in (1, -1, 3, -3)] == [1, 0, 2, -1]
    # x * 2**30 * 2 / 2**31 = x in the first, then halves away from zero in the second
    assert [int(multiply_by_quantized_multiplier(2 * x, 1 << 30, -1)) for x in (1, -1, 3, -3)] == [1, -1, 2, -2]


def test_two_roundings_are_not_one() -> None:
    """0.3: 1 * 0.6 -> 1, then 1 / 2 -> 1, where rounding once gives 0."""
    assert multiply_by_quantized_multiplier(1, *quantize_multiplier(0.3)) == 1


@pytest.mark.parametrize(
    ("factor", "wanted"),
    [
        (0.0, (0, 0)),
        (0.5, (1 << 30, 0)),
        (1.0, (1 << 30, 1)),
        (0.75, (3 << 29, 0)),
        (6.0, (3 << 29, 3)),
        (2.0**-32, (1 << 30, -31)),
        (2.0**-33, (0, 0)),
        (1 - 2.0**-40, (1 << 30, 1)),  # its 31 bits round up to 2**31, which does not fit
        (-0.75, (-3 << 29, 0)),
        (-(1 - 2.0**-40), (-(1 << 31), 0)),  # -2**31 does
    ],
)
def test_multipliers_in_closed_form(factor: float, wanted: tuple[int, int]) -> None:
    assert quantize_multiplier(factor) == wanted


def test_multipliers_are_the_nearest_of_31_bits(rng: np.random.Generator) -> None:
    factors = np.concatenate([np.exp(rng.uniform(-22, 20, 2000)), 1 - np.exp(rng.uniform(-24, -1, 200))])
    multipliers, shifts = quantize_multipliers(factors.reshape(2, -1))
    assert multipliers.shape == shifts.shape == (2, 1100) and multipliers.dtype == shifts.dtype == np.int64
    for factor, multiplier, shift in zip(factors, multipliers.ravel().tolist(), shifts.ravel().tolist()):
        assert 1 << 30 <= multiplier < 1 << 31
        error = Fraction(multiplier) * Fraction(2) ** (shift - 31) - Fraction(float(factor))
        assert abs(error) <= Fraction(2) ** (shift - 32)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_factor_that_is_no_number_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match="scales must be finite and not 0"):
        quantize_multiplier(factor)


def test_round_half_away() -> None:
    below = np.nextafter(0.5, 0)  # + 0.5 is 1.0 in float64
    values = [0.5, -0.5, 1.5, -1.5, 2.5, 0.49, -0.49, below, -below, 2.0**52 + 1, -(2.0**53), 0.0, 7.0]
    wanted = [1, -1, 2, -2, 3, 0, 0, 0, 0, 2.0**52 + 1, -(2.0**53), 0, 7]
    np.testing.assert_array_equal(round_half_away(np.array(values)), wanted)
    assert round_half_away(-2.5) == -3
    rng = np.random.default_rng(0)
    for value in np.concatenate([rng.normal(0, 100, 1000), rng.integers(-1000, 1000, 1000) / 2]):
        assert round_half_away(value) == half_away(Fraction(float(value)))
