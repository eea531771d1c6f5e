/* Helium: the sum of two maps. Both operands are rescaled to 2^20 times a common scale, added and rescaled (TFLite's add).
 * May work in place of either operand: every value is read before it is written.
 *
 * Ranges: |a - zero| <= 255, so a << 20 and the sum of two rescaled ones (each at most half) stay within 2^29. No shift is
 * positive; where one is 0 there is no second rounding, and nothing is taken off negative values (see tvad_mve.h).
 */
#include "tvad_simd.h"

#if TVAD_MVE

#include "tvad_mve.h"

/* The multipliers as vectors: core registers are scarce. */
typedef struct {
    int32x4_t multiplier;
    int32_t offset, shift, round;
} scaling;

static scaling scaling_of(const int32_t *constants, int32_t zero)
{
    const scaling s = { vdupq_n_s32(constants[0]), -zero * (1 << 20), constants[1], constants[1] < 0 ? 1 : 0 };

    return s;
}

TVAD_INLINE int32x4_t rescaled(int32x4_t value, scaling s)
{
    value = vqrdmulhq_s32(value, s.multiplier);
    value = vqdmlahq_n_s32(value, value, s.round);
    return vrshlq_n_s32(value, s.shift);
}

/* Four values, the low byte of every lane. */
TVAD_INLINE int32x4_t sum_of(int32x4_t a, int32x4_t b, scaling of_a, scaling of_b, scaling of_sum, int32_t zero)
{
    const int32x4_t steps = vdupq_n_s32(1 << 20);

    a = rescaled(vmlasq_n_s32(a, steps, of_a.offset), of_a);
    b = rescaled(vmlasq_n_s32(b, steps, of_b.offset), of_b);
    return tvad_mve_saturate(vaddq_n_s32(rescaled(vaddq_s32(a, b), of_sum), zero));
}

uint32_t tvad_add_scratch(const tvad_layer *layer)
{
    (void)layer;
    return 0;
}

void tvad_add(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t width = layer->out_w * layer->out_c, count = window->rows * width;
    const int8_t *a = window->in[0] + (window->row - window->in_first[0]) * width;
    const int8_t *b = window->in[1] + (window->row - window->in_first[1]) * width;
    int8_t *out = window->out + (window->row - window->out_first) * width;
    const scaling of_a = scaling_of(layer->bias, layer->in_zero), of_b = scaling_of(layer->bias + 2, layer->in2_zero);
    const scaling of_sum = scaling_of(layer->bias + 4, 0);
    const int32_t zero = layer->out_zero;
    int32_t i;

    for (i = 0; i < count / 4; i++) {
        vstrbq_s32(out + 4 * i, sum_of(vldrbq_s32(a + 4 * i), vldrbq_s32(b + 4 * i), of_a, of_b, of_sum, zero));
    }
    if (count % 4 != 0) {
        const mve_pred16_t lanes = vctp32q((uint32_t)(count % 4));

        i *= 4;
        vstrbq_p_s32(out + i,
                     sum_of(vldrbq_z_s32(a + i, lanes), vldrbq_z_s32(b + i, lanes), of_a, of_b, of_sum, zero), lanes);
    }
    tvad_clamp_outputs(layer, out, count);
}

#endif
