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

/* Cores without long multiplication (Cortex-M0, M0+, M23) call a function for 64-bit products. */
#ifndef TVAD_LONG_MULTIPLY
#if defined(__thumb__) && !defined(__thumb2__)
#define TVAD_LONG_MULTIPLY 0
#else
#define TVAD_LONG_MULTIPLY 1
#endif
#endif

/* tvad_multiply_high for |x| < 2^29. From 16-bit halves where there is no long multiplication, x = a 2^16 + b with
 * |b| <= 2^15 and m = c 2^16 + d: |b c| <= 2^30, |a d| < 2^29, so that all sums fit. */
static inline int32_t tvad_multiply_high_29(int32_t x, int32_t m)
{
#if TVAD_LONG_MULTIPLY
    return tvad_multiply_high(x, m);
#else
    const int32_t b = (int16_t)(uint16_t)((uint32_t)x & 0xFFFFu);
    const int32_t a = (x - b) >> 16;
    const int32_t c = m >> 16;
    const int32_t d = (int32_t)((uint32_t)m & 0xFFFFu);

    return (2 * a * c) + (((b * c) + (a * d) + ((b * d) >> 16) + 0x4000) >> 15);
#endif
}

/* A channel whose rescaling has the short form: right shift, multiplier as quantised (its upper bit set). */
static inline int32_t tvad_is_short(int32_t m, int32_t shift)
{
    return (m >> 30 == 1) & (shift < 0);
}

/* 2 m - 2^32, what tvad_rescale takes. */
static inline int32_t tvad_doubled(int32_t m)
{
    return (int32_t)((uint32_t)m << 1);
}

/* tvad_requantise(x, m, -right) + zero, saturated to int8, of a channel with the short form: exact for every x.
 *
 * With doubled = 2 m - 2^32, (x * doubled) / 2^32 + x is 2 x m / 2^32. Halves away from zero: 1 comes off where x < 0 (a
 * sum that rounds to 0 gives 0 either way), then halves go up: the last bit shifted out is added. In instructions: SMMLAR, or
 * SMLAL onto x 2^32 + 2^31; ASRS leaves that bit in the carry. */
static inline int32_t tvad_rescale(int32_t x, int32_t doubled, int32_t right, int32_t zero)
{
#if TVAD_DSP && !TVAD_DSP_EMULATE
    int32_t y;
    __asm__ volatile("smmlar %0, %1, %2, %1\n\t"
                     "add %1, %0, %1, asr #31\n\t"
                     "asrs %1, %1, %3\n\t"
                     "adc %1, %1, %4\n\t"
                     "ssat %1, #8, %1"
                     : "=&r"(y), "+r"(x)
                     : "r"(doubled), "r"(right), "r"(zero)
                     : "cc");
    return x;
#elif defined(__thumb2__) && !TVAD_DSP_EMULATE
    uint32_t low = 0x80000000u;
    int32_t high = x;
    __asm__ volatile("smlal %0, %1, %2, %3\n\t"
                     "add %2, %1, %2, asr #31\n\t"
                     "asrs %2, %2, %4\n\t"
                     "adc %2, %2, %5\n\t"
                     "ssat %2, #8, %2"
                     : "+r"(low), "+r"(high), "+r"(x)
                     : "r"(doubled), "r"(right), "r"(zero)
                     : "cc");
    return x;
#else
    const int32_t m = (int32_t)((uint32_t)doubled >> 1), is_small = (uint32_t)x + 0x20000000u < 0x40000000u;
    const int32_t y = (is_small ? tvad_multiply_high_29(x, m) : tvad_multiply_high(x, m)) + (x >> 31);
    return tvad_clamp((((y >> (right - 1)) + 1) >> 1) + zero, -128, 127);
#endif
}

#endif
