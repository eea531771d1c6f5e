/* Convolution with any kernel, stride, dilation and padding: the values under the kernel are gathered for four output pixels
 * at a time, then it is a matrix product. A row of the kernel is one run of bytes unless it is dilated.
 */
#include "tvad_matrix.h"

#if !TVAD_MVE

#define LONGEST_FOUR 680 /* values under a kernel up to which four pixels are gathered: 12 bytes a value are within 8 KiB */

static int32_t length_of(const tvad_layer *layer)
{
    return (int32_t)layer->kernel_h * layer->kernel_w * layer->in_c;
}

/* Bytes of gathered pixels, a multiple of 16. */
static uint32_t gathered_bytes(int32_t length)
{
    const int32_t pixels = length > LONGEST_FOUR ? 1 : TVAD_MATRIX_PIXELS;

    return ((uint32_t)(pixels * length) + 15u) & ~15u;
}

uint32_t tvad_conv_scratch(const tvad_layer *layer)
{
    const int32_t length = length_of(layer);

    return gathered_bytes(length) + (length > LONGEST_FOUR ? 0u : tvad_matrix_scratch(length));
}

/* memcpy for the few bytes of a kernel's row. */
static int8_t *copy(int8_t *to, const int8_t *from, int32_t count)
{
#if TVAD_DSP
    for (; count >= 4; count -= 4) {
        tvad_store32(to, tvad_load32(from));
        to += 4;
        from += 4;
    }
#endif
    for (; count > 0; count--) {
        *to++ = *from++;
    }
    return to;
}

static int8_t *fill(int8_t *to, int8_t value, int32_t count)
{
    memset(to, value, (size_t)count);
    return to + count;
}

/* One row of the kernel, its first value at column `x` of the input row `from`; columns outside are the zero point. */
static int8_t *gather_row(const tvad_layer *layer, const int8_t *from, int32_t x, int8_t *to)
{
    const int32_t channels = layer->in_c, width = layer->in_w, dilation = layer->dilation;
    int32_t column = 0, i;

    if (dilation == 1) {
        const int32_t before = tvad_clamp(-x, 0, layer->kernel_w), inside = tvad_clamp(width - x, before, layer->kernel_w);

        to = fill(to, layer->in_zero, before * channels);
        to = copy(to, from + ((x + before) * channels), (inside - before) * channels);
        return fill(to, layer->in_zero, (layer->kernel_w - inside) * channels);
    }
    for (i = 0; i < layer->kernel_w; i++) {
        column = x + (i * dilation);
        to = (column >= 0 && column < width) ? copy(to, from + (column * channels), channels)
                                             : fill(to, layer->in_zero, channels);
    }
    return to;
}

/* The values under the kernel of output pixel (row, column). */
static int8_t *gather(const tvad_layer *layer, const tvad_window *window, int32_t row, int32_t column, int8_t *to)
{
    const int32_t in_row = (int32_t)layer->in_w * layer->in_c, run = (int32_t)layer->kernel_w * layer->in_c;
    const int32_t top = (row * layer->stride_h) - layer->pad_top, x = (column * layer->stride_w) - layer->pad_left;
    const int32_t whole = layer->dilation == 1 && x >= 0 && x + layer->kernel_w <= layer->in_w;
    int32_t i;

    for (i = 0; i < layer->kernel_h; i++) {
        const int32_t y = top + (i * layer->dilation);

        if (y < 0 || y >= layer->in_h) {
            to = fill(to, layer->in_zero, run);
        } else if (whole) {
            to = copy(to, window->in[0] + ((y - window->in_first[0]) * in_row) + (x * layer->in_c), run);
        } else {
            to = gather_row(layer, window->in[0] + ((y - window->in_first[0]) * in_row), x, to);
        }
    }
    return to;
}

void tvad_conv(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t length = length_of(layer), width = layer->out_w, count = window->rows * width;
    const int32_t at_once = length > LONGEST_FOUR ? 1 : TVAD_MATRIX_PIXELS;
    const int32_t quick = tvad_matrix_quick(layer);
    int8_t *gathered = window->scratch, *out = window->out + ((window->row - window->out_first) * width * layer->out_c);
    int8_t *to = gathered;
    int32_t row = window->row, column = 0, held = 0, i;

    for (i = 1; i <= count; i++) {
        to = gather(layer, window, row, column, to);
        held++;
        column++;
        if (column == width) {
            column = 0;
            row++;
        }
        if (held == at_once || i == count) {
            tvad_matrix(layer, quick, gathered, held, length, out, gathered + gathered_bytes(length));
            out += held * layer->out_c;
            to = gathered;
            held = 0;
        }
    }
    out = window->out + ((window->row - window->out_first) * width * layer->out_c);
    tvad_clamp_outputs(layer, out, count * layer->out_c);
}

#endif
