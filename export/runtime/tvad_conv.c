/* Convolution with any kernel, stride, dilation and padding: the values under the kernel are gathered for some output
 * pixels at a time, then it is a matrix product. A row of the kernel is one run of bytes unless it is dilated.
 */
#include "tvad_matrix.h"

#if !TVAD_MVE

#define GATHERED_BYTES 1536 /* of pixels that are gathered at a time, where that is four or more */
#define LONGEST_FOUR 680    /* values under a kernel up to which four pixels are gathered: 12 bytes a value fit 8 KiB */

static int32_t length_of(const tvad_layer *layer)
{
    return (int32_t)layer->kernel_h * layer->kernel_w * layer->in_c;
}

/* Pixels that are gathered at a time: fours, or one. */
static int32_t pixels_of(int32_t length)
{
    return length > LONGEST_FOUR ? 1 : 4 * tvad_max(GATHERED_BYTES / (4 * length), 1);
}

/* Bytes of gathered pixels, a multiple of 16. */
static uint32_t gathered_bytes(int32_t length)
{
    return ((uint32_t)(pixels_of(length) * length) + 15u) & ~15u;
}

uint32_t tvad_conv_scratch(const tvad_layer *layer)
{
    const int32_t length = length_of(layer);

    return gathered_bytes(length) + (length > LONGEST_FOUR ? 0u : tvad_matrix_scratch(length));
}

/* memcpy, which is slow for the few bytes of a kernel's row. */
static inline int8_t *copy(int8_t *to, const int8_t *from, int32_t count)
{
    int32_t i = 0;

#if TVAD_DSP
    for (; i < count - 4; i += 4) {
        tvad_store32(to + i, tvad_load32(from + i));
    }
    if (count >= 4) { /* the last four, some of them again */
        tvad_store32(to + count - 4, tvad_load32(from + count - 4));
        return to + count;
    }
#endif
    for (; i < count; i++) {
        to[i] = from[i];
    }
    return to + count;
}

static int8_t *fill(int8_t *to, int8_t value, int32_t count)
{
    memset(to, value, (size_t)count);
    return to + count;
}

/* One row of the kernel, its first value at column `x` of the input row `from`; columns outside are the zero point. */
static int8_t *gather_row(const tvad_layer *layer, const int8_t *from, int32_t x, int8_t *to)
{
    const int32_t channels = layer->in_c, width = layer->in_w, taps = layer->kernel_w, dilation = layer->dilation;
    int32_t i;

    if (dilation == 1) {
        const int32_t before = tvad_clamp(-x, 0, taps), past = tvad_clamp(width - x, before, taps);

        to = fill(to, layer->in_zero, before * channels);
        to = copy(to, from + ((x + before) * channels), (past - before) * channels);
        return fill(to, layer->in_zero, (taps - past) * channels);
    }
    for (i = 0; i < taps; i++) {
        const int32_t column = x + (i * dilation);

        to = (column >= 0 && column < width) ? copy(to, from + (column * channels), channels)
                                             : fill(to, layer->in_zero, channels);
    }
    return to;
}

/* The values under a kernel that reaches over the map's border or is dilated; it begins at row `y`, column `x`. */
static int8_t *gather_border(const tvad_layer *layer, const tvad_window *window, int32_t y, int32_t x, int8_t *to)
{
    const int32_t in_row = (int32_t)layer->in_w * layer->in_c, run = (int32_t)layer->kernel_w * layer->in_c;
    int32_t i;

    for (i = 0; i < layer->kernel_h; i++) {
        if (y < 0 || y >= layer->in_h) {
            to = fill(to, layer->in_zero, run);
        } else {
            to = gather_row(layer, window->in[0] + ((y - window->in_first[0]) * in_row), x, to);
        }
        y += layer->dilation;
    }
    return to;
}

void tvad_conv(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t length = length_of(layer), width = layer->out_w;
    const int32_t at_once = pixels_of(length), rows = layer->kernel_h;
    const int32_t run = (int32_t)layer->kernel_w * layer->in_c, in_row = (int32_t)layer->in_w * layer->in_c;
    const int32_t last_x = layer->dilation == 1 ? layer->in_w - layer->kernel_w : -1; /* of a kernel that is all inside */
    int8_t *const gathered = window->scratch;
    int8_t *const first = window->out + ((window->row - window->out_first) * width * layer->out_c);
    int8_t *out = first, *to = gathered;
    int32_t row, column, held = 0;

    for (row = window->row; row < window->row + window->rows; row++) {
        const int32_t y = (row * layer->stride_h) - layer->pad_top;
        const int32_t is_inside = last_x >= 0 && y >= 0 && y <= layer->in_h - rows;
        const int8_t *from = is_inside ? window->in[0] + ((y - window->in_first[0]) * in_row) : NULL;

        for (column = 0; column < width; column++) {
            const int32_t x = (column * layer->stride_w) - layer->pad_left;

            if (from != NULL && x >= 0 && x <= last_x) {
                const int8_t *at = from + (x * layer->in_c);
                int32_t i;

                for (i = 0; i < rows; i++) {
                    to = copy(to, at, run);
                    at += in_row;
                }
            } else {
                to = gather_border(layer, window, y, x, to);
            }
            held++;
            if (held == at_once) {
                tvad_matrix(layer, gathered, held, length, out, gathered + gathered_bytes(length));
                out += held * layer->out_c;
                to = gathered;
                held = 0;
            }
        }
    }
    if (held > 0) {
        tvad_matrix(layer, gathered, held, length, out, gathered + gathered_bytes(length));
    }
    tvad_clamp_outputs(layer, first, window->rows * width * layer->out_c);
}

#endif
