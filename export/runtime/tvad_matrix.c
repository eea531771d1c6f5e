/* The matrix product in plain C: four pixels times two output channels at a time, values read as bytes, each once for a tile.
 *
 * The four pixels are laid side by side in scratch, so that both sides are read in the order in which they lie.
 */
#include "tvad_matrix.h"

#if !TVAD_DSP && !TVAD_MVE

/* The taps of a pixel in the order of the weights, to every fourth byte; filled up with 0. */
static void spread(const int8_t *x, int32_t length, int8_t *to)
{
    int32_t k;

    for (k = 0; k < length; k += 4) {
        to[0] = x[k];
        to[4] = (int8_t)(k + 2 < length ? x[k + 2] : 0);
        to[8] = (int8_t)(k + 1 < length ? x[k + 1] : 0);
        to[12] = (int8_t)(k + 3 < length ? x[k + 3] : 0);
        to += 16;
    }
}

static void store(const tvad_layer *layer, int32_t c, const int32_t *sum, int32_t count, int8_t *out)
{
    int32_t i;

    for (i = 0; i < count; i++) {
        const int32_t value = tvad_requantise(sum[i], layer->multiplier[c], layer->shift[c]) + layer->out_zero;

        out[i * layer->out_c] = (int8_t)tvad_clamp(value, -128, 127);
    }
}

/* All channels of `count` pixels, 4 at most, of the four in x. */
static void up_to_four_pixels(const tvad_layer *layer, const int8_t *x, int32_t groups, int32_t count, int8_t *out)
{
    const int8_t *w = layer->weights, *at, *end = x + (16 * groups);
    const int32_t channels = layer->out_c;
    int32_t c;

    for (c = 0; c < channels; c += 2) {
        const int32_t both = c + 1 < channels;
        int32_t a0 = layer->bias[c], b0 = layer->bias[c + both], a1 = a0, a2 = a0, a3 = a0, b1 = b0, b2 = b0, b3 = b0;

        for (at = x; at != end; at += 4) {
            const int32_t u = w[0], v = w[1];

            a0 += at[0] * u;
            b0 += at[0] * v;
            a1 += at[1] * u;
            b1 += at[1] * v;
            a2 += at[2] * u;
            b2 += at[2] * v;
            a3 += at[3] * u;
            b3 += at[3] * v;
            w += 2;
        }
        {
            const int32_t a[4] = { a0, a1, a2, a3 }, b[4] = { b0, b1, b2, b3 };

            store(layer, c, a, count, out + c);
            if (both) {
                store(layer, c + 1, b, count, out + c + 1);
            }
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
