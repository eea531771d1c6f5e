/* Integer arithmetic that all kernels share: TFLite's requantisation with its two roundings.
 *
 * The right shift of a negative number is arithmetic, as with every compiler for Arm and x86.
 */
#ifndef TVAD_ARITHMETIC_H
#define TVAD_ARITHMETIC_H

#include <stdint.h>

#include "tvad_simd.h"

static inline int32_t tvad_min(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static inline int32_t tvad_max(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static inline int32_t tvad_clamp(int32_t x, int32_t low, int32_t high)
{
    return tvad_min(tvad_max(x, low), high);
}

/* round(x * m / 2^31), halves up: gemmlowp's SaturatingRoundingDoublingHighMul for every (x, m) but both -2^31. */
static inline int32_t tvad_multiply_high(int32_t x, int32_t m)
{
    return (int32_t)(((int64_t)x * m + ((int64_t)1 << 30)) >> 31);
}

/* x / 2^power, rounded to nearest, halves away from zero. 0 <= power <= 31. */
static inline int32_t tvad_rounding_divide(int32_t x, int32_t power)
{
    const int32_t mask = (int32_t)(((uint32_t)1 << power) - 1u);
    const int32_t threshold = (mask >> 1) + (x < 0);
    return (x >> power) + ((x & mask) > threshold);
}

/* x * m * 2^(shift - 31) as TFLite rounds it. x * 2^shift fits int32 where shift > 0; -31 <= shift <= 30. */
static inline int32_t tvad_requantise(int32_t x, int32_t m, int32_t shift)
{
    const int32_t left = tvad_max(shift, 0);
    return tvad_rounding_divide(tvad_multiply_high((int32_t)((uint32_t)x << left), m), tvad_max(-shift, 0));
}

#endif
