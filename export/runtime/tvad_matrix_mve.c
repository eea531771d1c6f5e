/* Helium: rows of int8 values times rows of int8 weights, what 1x1 convolutions, kxk convolutions (after gathering their
 * windows) and fully connected layers are. VMLADAV sums 16 products into a core register; which operand stays in
 * registers depends on the length of the sums:
 *
 *   length <= 16   weights of four channels stay, pixels stream
 *   length <= 32   two pixels stay, weights stream
 *   longer         two pixels and two channels stream, a tail-predicated loop; of a last pixel four channels
 *
 * Weights are rows (out_c, length) as TFLite has them, and up to 15 bytes after the last row that are read and not used.
 * The last channels of a number that is no multiple of four are made with some that already are: the same bytes again.
 */
#include "tvad_simd.h"

#if TVAD_MVE

#include "tvad_mve.h"

int32_t tvad_mve_any_left(const int8_t *shift, int32_t count)
{
    int8_t largest = -128;
    int32_t i;

    for (i = 0; i < count; i += 16) {
        largest = (int8_t)vmaxvq_p_s8(largest, vldrbq_z_s8(shift + i, vctp8q((uint32_t)(count - i))),
                                      vctp8q((uint32_t)(count - i)));
    }
    return largest >= 0;
}

/* Channels c to c + 3 of all pixels; full: a constant, 1 where length is 16. */
TVAD_INLINE void four_channels(const tvad_layer *layer, int32_t c, const int8_t *x, int32_t count, int32_t length,
                               int8_t *out, int32_t full, int32_t left)
{
    const int32_t channels = layer->out_c, zero = layer->out_zero;
    const int8_t *weights = (const int8_t *)layer->weights + c * length;
    const mve_pred16_t lanes = vctp8q((uint32_t)length);
    const int8x16_t w0 = vldrbq_z_s8(weights, lanes), w1 = vldrbq_z_s8(weights + length, lanes);
    const int8x16_t w2 = vldrbq_z_s8(weights + 2 * length, lanes), w3 = vldrbq_z_s8(weights + 3 * length, lanes);
    const int32x4_t bias = vldrwq_s32(layer->bias + c), multiplier = vldrwq_s32(layer->multiplier + c);
    const int32x4_t shift = vldrbq_s32(layer->shift + c);

    out += c;
    do {
        const int8x16_t v = full != 0 ? vldrbq_s8(x) : vldrbq_z_s8(x, lanes);
        int32x4_t sum = tvad_mve_lanes(vmladavq_s8(v, w0), vmladavq_s8(v, w1), vmladavq_s8(v, w2), vmladavq_s8(v, w3));

        sum = tvad_mve_rescale(vaddq_s32(sum, bias), multiplier, shift, left);
        vstrbq_s32(out, tvad_mve_saturate(vaddq_n_s32(sum, zero)));
        x += full != 0 ? 16 : length;
        out += channels;
    } while (--count > 0);
}

static void short_rows(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out)
{
    const int32_t last = layer->out_c - 4, left = tvad_mve_any_left(layer->shift, layer->out_c);
    int32_t c;

    for (c = 0; c < last + 4; c += 4) {
        const int32_t from = tvad_min(c, last);

        if (left != 0) {
            four_channels(layer, from, x, count, length, out, 0, 1);
        } else if (length == 16) {
            four_channels(layer, from, x, count, length, out, 1, 0);
        } else {
            four_channels(layer, from, x, count, length, out, 0, 0);
        }
    }
}

/* Sums of four channels for the pixels a and b, 17 to 32 products each; returns the next channels' weights. */
TVAD_INLINE const int8_t *four_by_two(const int8_t *weights, int32_t length, int8x16_t a0, int8x16_t a1, int8x16_t b0,
                             int8x16_t b1, int32x4_t *a, int32x4_t *b)
{
    int32x4_t sum_a, sum_b;
    int8x16_t w;
    int32_t s, t, u, v;

    __asm__("vldrb.8 %q[w], [%[weights]]\n\t"
            "vmladav.s8 %[s], %q[w], %q[a0]\n\t"
            "vmladav.s8 %[t], %q[w], %q[b0]\n\t"
            "vldrb.8 %q[w], [%[weights], #16]\n\t"
            "add %[weights], %[weights], %[length]\n\t"
            "vmladava.s8 %[s], %q[w], %q[a1]\n\t"
            "vmladava.s8 %[t], %q[w], %q[b1]\n\t"
            "vldrb.8 %q[w], [%[weights]]\n\t"
            "vmladav.s8 %[u], %q[w], %q[a0]\n\t"
            "vmladav.s8 %[v], %q[w], %q[b0]\n\t"
            "vldrb.8 %q[w], [%[weights], #16]\n\t"
            "add %[weights], %[weights], %[length]\n\t"
            "vmladava.s8 %[u], %q[w], %q[a1]\n\t"
            "vmladava.s8 %[v], %q[w], %q[b1]\n\t"
            "vmov %e[a], %[s], %[u]\n\t"
            "vmov %e[b], %[t], %[v]\n\t"
            "vldrb.8 %q[w], [%[weights]]\n\t"
            "vmladav.s8 %[s], %q[w], %q[a0]\n\t"
            "vmladav.s8 %[t], %q[w], %q[b0]\n\t"
            "vldrb.8 %q[w], [%[weights], #16]\n\t"
            "add %[weights], %[weights], %[length]\n\t"
            "vmladava.s8 %[s], %q[w], %q[a1]\n\t"
            "vmladava.s8 %[t], %q[w], %q[b1]\n\t"
            "vldrb.8 %q[w], [%[weights]]\n\t"
            "vmladav.s8 %[u], %q[w], %q[a0]\n\t"
            "vmladav.s8 %[v], %q[w], %q[b0]\n\t"
            "vldrb.8 %q[w], [%[weights], #16]\n\t"
            "add %[weights], %[weights], %[length]\n\t"
            "vmladava.s8 %[u], %q[w], %q[a1]\n\t"
            "vmladava.s8 %[v], %q[w], %q[b1]\n\t"
            "vmov %f[a], %[s], %[u]\n\t"
            "vmov %f[b], %[t], %[v]"
            : [weights] "+&r"(weights), [a] "=&w"(sum_a), [b] "=&w"(sum_b), [w] "=&w"(w), [s] "=&Te"(s), [t] "=&Te"(t),
              [u] "=&Te"(u), [v] "=&Te"(v)
            : [a0] "w"(a0), [a1] "w"(a1), [b0] "w"(b0), [b1] "w"(b1), [length] "r"(length));
    *a = sum_a;
    *b = sum_b;
    return weights;
}

/* All channels of the pixels x and y. */
TVAD_INLINE void two_pixels(const tvad_layer *layer, const int8_t *x, const int8_t *y, int32_t length, int8_t *out_x,
                            int8_t *out_y, int32_t left)
{
    const int32_t zero = layer->out_zero, rest = layer->out_c % 4;
    const mve_pred16_t lanes = vctp8q((uint32_t)(length - 16));
    const int8x16_t a0 = vldrbq_s8(x), a1 = vldrbq_z_s8(x + 16, lanes);
    const int8x16_t b0 = vldrbq_s8(y), b1 = vldrbq_z_s8(y + 16, lanes);
    const int8_t *weights = layer->weights, *shifts = layer->shift;
    const int32_t *biases = layer->bias, *multipliers = layer->multiplier;
    int32_t again = rest != 0 ? 4 - rest : 0, blocks = layer->out_c / 4;

    for (;;) {
        do {
            int32x4_t a, b, factors;

            weights = four_by_two(weights, length, a0, a1, b0, b1, &a, &b);
            factors = vldrwq_s32(biases);
            a = vaddq_s32(a, factors);
            b = vaddq_s32(b, factors);
            factors = vldrwq_s32(multipliers);
            a = tvad_mve_rescale(a, factors, vldrbq_s32(shifts), left);
            b = tvad_mve_rescale(b, factors, vldrbq_s32(shifts), left);
            vstrbq_s32(out_x, tvad_mve_saturate(vaddq_n_s32(a, zero)));
            vstrbq_s32(out_y, tvad_mve_saturate(vaddq_n_s32(b, zero)));
            biases += 4;
            multipliers += 4;
            shifts += 4;
            out_x += 4;
            out_y += 4;
        } while (--blocks > 0);
        if (again == 0) {
            return;
        }
        weights -= again * length; /* the last four channels, some of them once more */
        biases -= again;
        multipliers -= again;
        shifts -= again;
        out_x -= again;
        out_y -= again;
        again = 0;
        blocks = 1;
    }
}

static void medium_rows(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out)
{
    const int32_t left = tvad_mve_any_left(layer->shift, layer->out_c), channels = layer->out_c;

    for (; count > 0; count -= 2) {
        const int32_t more = count > 1 ? 1 : 0; /* 0: the last pixel of an odd number, twice */

        if (left != 0) {
            two_pixels(layer, x, x + more * length, length, out, out + more * channels, 1);
        } else {
            two_pixels(layer, x, x + more * length, length, out, out + more * channels, 0);
        }
        x += 2 * length;
        out += 2 * channels;
    }
}

/* Sums of the channels v and w for the pixels x and y: {x v, x w, y v, y w}. */
TVAD_INLINE int32x4_t two_by_two(const int8_t *x, const int8_t *y, const int8_t *v, const int8_t *w, int32_t length)
{
    int32_t xv = 0, xw = 0, yv = 0, yw = 0;

    __asm__ volatile("dlstp.8 lr, %[length]\n"
                     "1:\n\t"
                     "vldrb.8 q0, [%[x]], #16\n\t"
                     "vldrb.8 q1, [%[v]], #16\n\t"
                     "vmladava.s8 %[xv], q0, q1\n\t"
                     "vldrb.8 q2, [%[w]], #16\n\t"
                     "vmladava.s8 %[xw], q0, q2\n\t"
                     "vldrb.8 q3, [%[y]], #16\n\t"
                     "vmladava.s8 %[yv], q3, q1\n\t"
                     "vmladava.s8 %[yw], q3, q2\n\t"
                     "letp lr, 1b"
                     : [x] "+r"(x), [y] "+r"(y), [v] "+r"(v), [w] "+r"(w), [xv] "+Te"(xv), [xw] "+Te"(xw), [yv] "+Te"(yv),
                       [yw] "+Te"(yw)
                     : [length] "r"(length)
                     : "lr", "q0", "q1", "q2", "q3", "memory");
    return tvad_mve_lanes(xv, xw, yv, yw);
}

/* Channels c and c + one (0: the last of an odd number, twice) of pairs of pixels. */
TVAD_INLINE void two_channels(const tvad_layer *layer, int32_t c, int32_t one, const int8_t *x, int32_t count,
                              int32_t length, int8_t *out, int32_t left)
{
    const int32_t channels = layer->out_c, zero = layer->out_zero, d = c + one;
    const int8_t *v = (const int8_t *)layer->weights + c * length, *w = v + one * length;
    const int32x4_t bias = tvad_mve_lanes(layer->bias[c], layer->bias[d], layer->bias[c], layer->bias[d]);
    const int32x4_t multiplier =
        tvad_mve_lanes(layer->multiplier[c], layer->multiplier[d], layer->multiplier[c], layer->multiplier[d]);
    const int32x4_t shift = tvad_mve_lanes(layer->shift[c], layer->shift[d], layer->shift[c], layer->shift[d]);
    const uint32x4_t both = vreinterpretq_u32_s32(tvad_mve_lanes(0, one, channels, channels + one));

    out += c;
    for (; count > 1; count -= 2) {
        const int32x4_t sum = vaddq_s32(two_by_two(x, x + length, v, w, length), bias);

        vstrbq_scatter_offset_s32(out, both,
                                  tvad_mve_saturate(vaddq_n_s32(tvad_mve_rescale(sum, multiplier, shift, left), zero)));
        x += 2 * length;
        out += 2 * channels;
    }
}

/* Sums of four channels for the pixel x. */
TVAD_INLINE int32x4_t four_by_one(const int8_t *x, const int8_t *w0, const int8_t *w1, const int8_t *w2,
                                  const int8_t *w3, int32_t length)
{
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;

    __asm__ volatile("dlstp.8 lr, %[length]\n"
                     "1:\n\t"
                     "vldrb.8 q0, [%[x]], #16\n\t"
                     "vldrb.8 q1, [%[w0]], #16\n\t"
                     "vmladava.s8 %[s0], q0, q1\n\t"
                     "vldrb.8 q2, [%[w1]], #16\n\t"
                     "vmladava.s8 %[s1], q0, q2\n\t"
                     "vldrb.8 q1, [%[w2]], #16\n\t"
                     "vmladava.s8 %[s2], q0, q1\n\t"
                     "vldrb.8 q2, [%[w3]], #16\n\t"
                     "vmladava.s8 %[s3], q0, q2\n\t"
                     "letp lr, 1b"
                     : [x] "+r"(x), [w0] "+r"(w0), [w1] "+r"(w1), [w2] "+r"(w2), [w3] "+r"(w3), [s0] "+Te"(s0),
                       [s1] "+Te"(s1), [s2] "+Te"(s2), [s3] "+Te"(s3)
                     : [length] "r"(length)
                     : "lr", "q0", "q1", "q2", "memory");
    return tvad_mve_lanes(s0, s1, s2, s3);
}

/* All channels of one pixel; of the last four, those that do not exist are made from the last row and not stored. */
static void one_pixel(const tvad_layer *layer, const int8_t *x, int32_t length, int8_t *out)
{
    const int32_t channels = layer->out_c, left = tvad_mve_any_left(layer->shift, channels);
    const int8_t *weights = layer->weights;
    int32_t c;

    for (c = 0; c < channels; c += 4) {
        const mve_pred16_t lanes = vctp32q((uint32_t)(channels - c));
        const int32_t rest = channels - c - 1;
        const int8_t *w1 = weights + tvad_min(rest, 1) * length, *w2 = weights + tvad_min(rest, 2) * length;
        int32x4_t sum = four_by_one(x, weights, w1, w2, weights + tvad_min(rest, 3) * length, length);

        sum = vaddq_s32(sum, vldrwq_z_s32(layer->bias + c, lanes));
        sum = left != 0 ? tvad_mve_rescale(sum, vldrwq_z_s32(layer->multiplier + c, lanes),
                                           vldrbq_z_s32(layer->shift + c, lanes), 1)
                        : tvad_mve_rescale(sum, vldrwq_z_s32(layer->multiplier + c, lanes),
                                           vldrbq_z_s32(layer->shift + c, lanes), 0);
        vstrbq_p_s32(out + c, tvad_mve_saturate(vaddq_n_s32(sum, layer->out_zero)), lanes);
        weights += 4 * length;
    }
}

static void long_rows(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out)
{
    const int32_t left = tvad_mve_any_left(layer->shift, layer->out_c), channels = layer->out_c;
    int32_t c;

    for (c = 0; count > 1 && c < channels; c += 2) {
        const int32_t one = c + 1 < channels ? 1 : 0;

        if (left != 0) {
            two_channels(layer, c, one, x, count, length, out, 1);
        } else {
            two_channels(layer, c, one, x, count, length, out, 0);
        }
    }
    if (count % 2 != 0) {
        one_pixel(layer, x + (count - 1) * length, length, out + (count - 1) * channels);
    }
}

void tvad_matrix_mve(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out)
{
    if (count <= 0) {
        return;
    }
    if (length > 32 || layer->out_c < 4) {
        long_rows(layer, x, count, length, out);
    } else if (length > 16) {
        medium_rows(layer, x, count, length, out);
    } else {
        short_rows(layer, x, count, length, out);
    }
    tvad_clamp_outputs(layer, out, count * layer->out_c);
}

#endif
