/* Helium: a kxk convolution. The windows of a few neighbouring outputs are gathered as rows of scratch, outside the map the
 * zero point, and multiplied by the weights as a matrix.
 *
 * Weights: rows (out_c, kernel_h * kernel_w * in_c), as tvad_matrix_mve.c wants them.
 */
#include "tvad_simd.h"

#if TVAD_MVE

#include "tvad_mve.h"

#define LONGEST_MANY 680 /* values under a kernel up to which MANY windows are gathered; longer ones one by one */
#define MANY 12          /* as many bytes as plain C and DSP take: four windows, and them as int16 */

static int32_t length_of(const tvad_layer *layer)
{
    return layer->kernel_h * layer->kernel_w * layer->in_c;
}

/* Windows gathered at once: weights are read once for all of them. */
static int32_t windows_at_once(const tvad_layer *layer)
{
    return tvad_min(length_of(layer) > LONGEST_MANY ? 1 : MANY, layer->out_w);
}

uint32_t tvad_conv_scratch(const tvad_layer *layer)
{
    return (uint32_t)((windows_at_once(layer) * length_of(layer) + 15) / 16 * 16);
}

/* `count` bytes from `from`, or of zero where that is NULL. */
TVAD_INLINE void put(int8_t *to, const int8_t *from, int32_t count, int8x16_t zero)
{
    for (; count > 0; count -= 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)count);
        const int8x16_t value = from != NULL ? vldrbq_z_s8(from, lanes) : zero;

        vstrbq_p_s8(to, value, lanes);
        from = from != NULL ? from + 16 : NULL;
        to += 16;
    }
}

/* One kernel row of windows that lie inside the map, at most 16 bytes each: `step` bytes apart, to rows of `length`. */
static void put_short(int8_t *to, const int8_t *from, int32_t bytes, int32_t windows, int32_t step, int32_t length)
{
    const mve_pred16_t lanes = vctp8q((uint32_t)bytes);

    for (; windows > 0; windows--) {
        vstrbq_p_s8(to, vldrbq_z_s8(from, lanes), lanes);
        from += step;
        to += length;
    }
}

/* One kernel row of one window: columns x, x + dilation, ... of a map row (NULL: outside). */
static void put_row(const tvad_layer *layer, int8_t *to, const int8_t *row, int32_t x, int8x16_t zero)
{
    const int32_t taps = layer->kernel_w, channels = layer->in_c;
    int32_t k = 0;

    while (k < taps) {
        const int32_t at = x + k * layer->dilation;
        const int32_t is_inside = row != NULL && at >= 0 && at < layer->in_w;
        int32_t run = 1; /* taps that lie together, or outside together */

        if (row == NULL) {
            run = taps;
        } else if (layer->dilation == 1) {
            run = is_inside != 0 ? layer->in_w - at : at < 0 ? -at : taps;
        }
        run = tvad_min(run, taps - k);
        put(to + k * channels, is_inside != 0 ? row + at * channels : NULL, run * channels, zero);
        k += run;
    }
}

/* Windows of the outputs (y, x) to (y, x + count - 1) to scratch, (count, kernel_h, kernel_w, in_c). */
static void gather(const tvad_layer *layer, const tvad_window *window, int32_t y, int32_t x, int32_t count, int8_t *to)
{
    const int32_t channels = layer->in_c, bytes = layer->kernel_w * channels, length = layer->kernel_h * bytes;
    const int32_t stride = layer->stride_w, left = layer->pad_left, end = x + count;
    const int32_t widest = layer->in_w - layer->kernel_w + left; /* where the last window inside the map begins */
    const int8x16_t zero = vdupq_n_s8(layer->in_zero);
    int32_t first = end, last = end, ky, i; /* outputs first to last - 1: short windows inside the map */

    if (layer->dilation == 1 && bytes <= 16 && widest >= 0) {
        first = tvad_clamp((left + stride - 1) / stride, x, end);
        last = tvad_clamp(widest / stride + 1, first, end);
    }
    for (ky = 0; ky < layer->kernel_h; ky++) {
        const int32_t at = y * layer->stride_h - layer->pad_top + ky * layer->dilation;
        const int32_t is_inside = at >= 0 && at < layer->in_h;
        const int8_t *row = is_inside != 0 ? window->in[0] + (at - window->in_first[0]) * layer->in_w * channels : NULL;
        const int32_t from = is_inside != 0 ? first : end, up_to = is_inside != 0 ? last : end;
        int8_t *part = to + ky * bytes;

        for (i = x; i < from; i++) {
            put_row(layer, part + (i - x) * length, row, i * stride - left, zero);
        }
        if (up_to > from) {
            put_short(part + (from - x) * length, row + (from * stride - left) * channels, bytes, up_to - from,
                      stride * channels, length);
        }
        for (i = up_to; i < end; i++) {
            put_row(layer, part + (i - x) * length, row, i * stride - left, zero);
        }
    }
}

void tvad_conv(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t length = length_of(layer), width = layer->out_w, most = windows_at_once(layer);
    int32_t row, x;

    for (row = window->row; row < window->row + window->rows; row++) {
        int8_t *out = window->out + (row - window->out_first) * width * layer->out_c;

        for (x = 0; x < width; x += most) {
            const int32_t count = tvad_min(most, width - x);

            gather(layer, window, row, x, count, (int8_t *)window->scratch);
            tvad_matrix_mve(layer, (const int8_t *)window->scratch, count, length, out + x * layer->out_c);
        }
    }
}

#endif
