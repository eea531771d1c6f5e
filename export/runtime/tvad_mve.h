/* What the Helium kernels share: sums of products (int32) to int8 outputs, four or eight at a time.
 *
 * TFLite's rescaling is two roundings. The first, SaturatingRoundingDoublingHighMul, is VQRDMULH. The second divides by a
 * power of two and rounds halves away from zero; VRSHL rounds them up, so 1 is taken off negative values before it:
 * VQDMLAH x, x, 1 is floor((x * 2^32 + 2 * x) / 2^32) = x + floor(x / 2^31), which is x - 1 where x < 0.
 * Ranges: |multiplier| <= 2^31 - 1, -31 <= shift <= 30, |sum * 2^max(shift, 0)| < 2^31 (the exporter checks), so that nothing
 * saturates before the end.
 */
#ifndef TVAD_MVE_H
#define TVAD_MVE_H

#include <arm_mve.h>

#include "tvad_arithmetic.h"
#include "tvad_matrix.h"

#define TVAD_INLINE static inline __attribute__((always_inline))

/* {a, b, c, d}; GCC 12 would take the way through memory. */
TVAD_INLINE int32x4_t tvad_mve_lanes(int32_t a, int32_t b, int32_t c, int32_t d)
{
    int32x4_t lanes;

    __asm__("vmov %e0, %1, %2\n\t"
            "vmov %f0, %3, %4"
            : "=&w"(lanes)
            : "r"(a), "r"(b), "r"(c), "r"(d));
    return lanes;
}

/* Sums rescaled, a multiplier and a shift a lane. left: a constant, 1 where some shift is 0 or positive. */
TVAD_INLINE int32x4_t tvad_mve_rescale(int32x4_t sum, int32x4_t multiplier, int32x4_t shift, int32_t left)
{
    if (left != 0) {
        const int32x4_t zero = vdupq_n_s32(0);
        const int32x4_t right = vminq_s32(shift, zero);

        sum = vqrdmulhq_s32(vshlq_s32(sum, vmaxq_s32(shift, zero)), multiplier);
        sum = vaddq_s32(sum, vshrq_n_s32(vandq_s32(sum, right), 31)); /* no 1 off where there is no second rounding */
        return vrshlq_s32(sum, right);
    }
    sum = vqrdmulhq_s32(sum, multiplier);
    sum = vqdmlahq_n_s32(sum, sum, 1);
    return vrshlq_s32(sum, shift);
}

/* The low byte of every lane: the value, saturated to int8. */
TVAD_INLINE int32x4_t tvad_mve_saturate(int32x4_t value)
{
    __asm__("vqmovnb.s32 %q0, %q0\n\t"
            "vqmovnb.s16 %q0, %q0"
            : "+w"(value));
    return value;
}

/* Whether any of `count` shifts is 0 or positive. */
int32_t tvad_mve_any_left(const int8_t *shift, int32_t count);

/* out[count][out_c] = rescaled (x[count][length] times weights[out_c][length], plus bias). */
void tvad_matrix_mve(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out);

#endif
