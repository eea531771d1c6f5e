/* The matrix product in plain C: four pixels times two output channels at a time, so that a value that is read serves two or
 * four products. The pixels are laid side by side in scratch: both sides are then read in the order in which they lie.
 */
#include "tvad_matrix.h"

#if !TVAD_DSP && !TVAD_MVE

/* The taps of a pixel in the order of the weights, to every fourth byte; filled up with 0. */
static void spread(const int8_t *x, int32_t length, int8_t *to)
{
    const int8_t *end = x + (length & ~3);
    const int32_t rest = length & 3;

    for (; x != end; x += 4) {
        to[0] = x[0];
        to[4] = x[2];
        to[8] = x[1];
        to[12] = x[3];
        to += 16;
    }
    if (rest > 0) {
        to[0] = x[0];
        to[4] = (int8_t)(rest > 2 ? x[2] : 0);
        to[8] = (int8_t)(rest > 1 ? x[1] : 0);
        to[12] = 0;
    }
}

/* One channel of `count` pixels. */
static void store(const tvad_layer *layer, int32_t c, const int32_t *sum, int32_t count, int8_t *out)
{
    const int32_t m = layer->multiplier[c], shift = layer->shift[c], zero = layer->out_zero, channels = layer->out_c;
    int32_t i;

    if (tvad_is_short(m, shift)) {
        for (i = 0; i < count; i++) {
            *out = (int8_t)tvad_rescale(sum[i], tvad_doubled(m), -shift, zero);
            out += channels;
        }
    } else {
        for (i = 0; i < count; i++) {
            *out = (int8_t)tvad_clamp(tvad_requantise(sum[i], m, shift) + zero, -128, 127);
            out += channels;
        }
    }
}

#if TVAD_LONG_MULTIPLY

/* One tap of four pixels and two channels. */
TVAD_INLINE void one_tap(const int8_t *x, const int8_t *w, int32_t a[4], int32_t b[4])
{
    const int32_t u = w[0], v = w[1];

    a[0] += x[0] * u;
    b[0] += x[0] * v;
    a[1] += x[1] * u;
    b[1] += x[1] * v;
    a[2] += x[2] * u;
    b[2] += x[2] * v;
    a[3] += x[3] * u;
    b[3] += x[3] * v;
}

/* Sums of four pixels and two channels onto the biases; x is read up to `end`. */
TVAD_INLINE void sums_of_four(const int8_t *x, const int8_t *end, const int8_t *w, int32_t a[4], int32_t b[4])
{
    for (; x != end; x += 16) {
        one_tap(x, w, a, b);
        one_tap(x + 4, w + 2, a, b);
        one_tap(x + 8, w + 4, a, b);
        one_tap(x + 12, w + 6, a, b);
        w += 8;
    }
}

#else

/* Sums of two pixels and two channels onto the biases. */
TVAD_INLINE void sums_of_two(const int8_t *x, const int8_t *end, const int8_t *w, int32_t a[2], int32_t b[2])
{
    int32_t a0 = a[0], a1 = a[1], b0 = b[0], b1 = b[1];

    for (; x != end; x += 4) {
        a0 += x[0] * w[0];
        b0 += x[0] * w[1];
        a1 += x[1] * w[0];
        b1 += x[1] * w[1];
        w += 2;
    }
    a[0] = a0;
    a[1] = a1;
    b[0] = b0;
    b[1] = b1;
}

/* Armv6-M has eight registers for this: two pixels, then the other two. */
TVAD_INLINE void sums_of_four(const int8_t *x, const int8_t *end, const int8_t *w, int32_t a[4], int32_t b[4])
{
    sums_of_two(x, end, w, a, b);
    sums_of_two(x + 2, end + 2, w, a + 2, b + 2);
}

#endif

/* All channels of `count` pixels, 4 at most, of the four in x. */
static void up_to_four_pixels(const tvad_layer *layer, const int8_t *x, int32_t groups, int32_t count, int8_t *out)
{
    const int8_t *w = layer->weights;
    const int32_t channels = layer->out_c;
    int32_t c;

    for (c = 0; c < channels; c += 2) {
        const int32_t other = tvad_min(c + 1, channels - 1), p = layer->bias[c], q = layer->bias[other];
        int32_t a[4] = { p, p, p, p }, b[4] = { q, q, q, q };

        sums_of_four(x, x + (16 * groups), w, a, b);
        w += 8 * groups;
        store(layer, c, a, count, out + c);
        if (other > c) {
            store(layer, other, b, count, out + other);
        }
    }
}

/* All channels of one pixel, as it lies. */
static void one_pixel(const tvad_layer *layer, const int8_t *x, int32_t length, int8_t *out)
{
    static const uint8_t place[4] = { 0, 4, 2, 6 }; /* of taps 0 to 3 among eight weights */
    const int8_t *w = layer->weights;
    const int32_t channels = layer->out_c;
    int32_t c, k;

    for (c = 0; c < channels; c += 2) {
        const int32_t both = c + 1 < channels;
        int32_t a = layer->bias[c], b = layer->bias[c + both];

        for (k = 0; k < length; k++) {
            const int8_t *pair = w + (2 * (k & ~3)) + place[k & 3];

            a += x[k] * pair[0];
            b += x[k] * pair[1];
        }
        w += 8 * tvad_matrix_groups(length);
        store(layer, c, &a, 1, out + c);
        if (both) {
            store(layer, c + 1, &b, 1, out + c + 1);
        }
    }
}

void tvad_matrix(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out, void *scratch)
{
    const int32_t channels = layer->out_c, groups = tvad_matrix_groups(length);
    int32_t left = count, i;

    while (left > 1 && scratch != NULL && length <= TVAD_MATRIX_LONGEST) {
        const int32_t pixels = tvad_min(left, TVAD_MATRIX_PIXELS);
        int8_t *values = scratch;

        for (i = 0; i < TVAD_MATRIX_PIXELS; i++) {
            spread(x + (tvad_min(i, pixels - 1) * length), length, values + i);
        }
        up_to_four_pixels(layer, values, groups, pixels, out);
        x += pixels * length;
        out += pixels * channels;
        left -= pixels;
    }
    for (; left > 0; left--) {
        one_pixel(layer, x, length, out);
        x += length;
        out += channels;
    }
}

#endif
