/* Helium: a depthwise convolution. May work in place on whole maps.
 *
 * Eight channels at a time, the rows under the kernel lie in scratch as one plane a channel, column after column:
 *
 *     plane[column * kh + ky], ky = 0 .. kh - 1, columns from -pad_left on, padding = the input's zero point
 *
 * so that the kh * kw values under the kernel are one run of bytes, and VMLADAV sums 16 products of them an instruction.
 * One output row further down the whole plane is read `stride` bytes further up: a column's last rows then lie where the
 * next column's first ones, no longer needed, were. Every input value is so written once (a scatter of eight channels), and
 * no value moves. The plane has room for as many bytes more as there are rows to go.
 *
 * In place where out_w <= in_w and pad_top is less than the kernel's rows: an output row is then written when the input rows
 * at and above it have been taken over, and only to its own channels.
 *
 * Weights: (C, kw, kh); in scratch they become whole vectors, those of a dilated kernel with zeros between the taps.
 * Sums: |x| <= 128, |w| <= 128, so |sum| <= 2^14 * taps, and in int32 with the bias (the exporter checks).
 */
#include "tvad_simd.h"

#if TVAD_MVE

#include "tvad_depthwise_row_mve.h"

#define GROUP 8
#define SCRATCH_LIMIT 8192 /* fewer channels at once stay within it, or one takes what it must */
#define SPARE 32 /* bytes that are read after the last plane, and not used */

typedef struct {
    int32_t kh, kw, taps;   /* of the kernel with its dilation */
    int32_t step;           /* bytes of a plane from one output column to the next */
    int32_t advance;        /* and from one output row to the next */
    int32_t columns;        /* of the map that the planes hold */
    int32_t vectors, pairs; /* vectors under a window; 1: under the windows of two neighbouring outputs */
    int32_t plane, group;   /* bytes; channels at once */
    int32_t weights;        /* bytes of a channel's weights as whole vectors */
    int32_t at_weights, at_planes, total; /* offsets in scratch, the sums lie first; its bytes */
} layout;

/* rows: output rows of one call. */
static layout layout_of(const tvad_layer *layer, int32_t rows)
{
    layout a;
    int32_t padded;

    a.kh = (layer->kernel_h - 1) * layer->dilation + 1;
    a.kw = (layer->kernel_w - 1) * layer->dilation + 1;
    a.taps = a.kh * a.kw;
    a.step = a.kh * layer->stride_w;
    a.advance = layer->stride_h < a.kh ? layer->stride_h : 0; /* 0: all rows are new */
    padded = (layer->out_w - 1) * layer->stride_w + a.kw;
    a.columns = padded < layer->pad_left ? 0 : tvad_min(layer->in_w, padded - layer->pad_left);
    a.pairs = a.taps + a.step <= 32 ? 1 : 0;
    a.vectors = (a.taps + a.pairs * a.step + 15) / 16;
    if (a.pairs == 0 && a.vectors < 5) {
        a.vectors = a.vectors < 3 ? 2 : 4;
    }
    a.weights = 16 * a.vectors * (1 + a.pairs);
    a.at_weights = (layer->out_w + 3) / 4 * 16;
    a.plane = padded * a.kh + (layer->out_h - 1) * a.advance;
    a.group = tvad_clamp((SCRATCH_LIMIT - a.at_weights - SPARE) / (a.plane + a.weights), 1, tvad_min(layer->out_c, GROUP));
    a.at_planes = a.at_weights + a.group * a.weights;
    a.total = (a.at_planes + a.group * a.plane + SPARE + 15) / 16 * 16;
    a.plane -= (layer->out_h - rows) * a.advance; /* fewer rows need less, but the same group */
    return a;
}

uint32_t tvad_depthwise_scratch(const tvad_layer *layer)
{
    return (uint32_t)layout_of(layer, layer->out_h).total;
}

/* A column of a map row into all planes of the group, `to` in the first one's. */
TVAD_INLINE void put_column(int8_t *to, uint16x8_t planes, int16x8_t value, mve_pred16_t lanes, int32_t all)
{
    if (all != 0) {
        vstrbq_scatter_offset_s16(to, planes, value);
    } else {
        vstrbq_scatter_offset_p_s16(to, planes, value, lanes);
    }
}

/* A map row (NULL: padding) to the planes; `to` is in the first column inside the map. all: a constant, 1 for GROUP channels. */
TVAD_INLINE void put_columns(const tvad_layer *layer, const layout *a, int8_t *to, const int8_t *row, uint16x8_t planes,
                             mve_pred16_t lanes, int32_t all)
{
    const int16x8_t zero = vdupq_n_s16(layer->in_zero);
    const int32_t channels = layer->in_c, kh = a->kh;
    int32_t i = a->columns;

    if (layer->pad_left > 0) {
        put_column(to - kh, planes, zero, lanes, all); /* a value of the map lay there, a row ago */
    }
    if (row == NULL) {
        for (; i > 0; i--) {
            put_column(to, planes, zero, lanes, all);
            to += kh;
        }
        return;
    }
    if ((i & 1) != 0) {
        put_column(to, planes, all != 0 ? vldrbq_s16(row) : vldrbq_z_s16(row, lanes), lanes, all);
        row += channels;
        to += kh;
    }
    for (i /= 2; i > 0; i--) {
        put_column(to, planes, all != 0 ? vldrbq_s16(row) : vldrbq_z_s16(row, lanes), lanes, all);
        row += channels;
        to += kh;
        put_column(to, planes, all != 0 ? vldrbq_s16(row) : vldrbq_z_s16(row, lanes), lanes, all);
        row += channels;
        to += kh;
    }
}

/* One output row of the channels c to c + n - 1. vectors, pairs: constants. */
TVAD_INLINE void make_row(const tvad_layer *layer, const layout *a, int32_t c, int32_t n, const int8_t *window,
                          int8_t *scratch, int8_t *out, int32_t vectors, int32_t pairs)
{
    const int32_t width = layer->out_w, channels = layer->out_c, zero = layer->out_zero, step = a->step;
    const uint32x4_t pixels = vmulq_n_u32(vidupq_n_u32(0, 1), (uint32_t)channels);
    const int8_t *weights = scratch + a->at_weights, *shifts = layer->shift + c;
    const int32_t *biases = layer->bias + c, *multipliers = layer->multiplier + c;
    int32_t *sums = (int32_t *)(void *)scratch;

    do {
        int32_t bias = *biases++, shift = *shifts++;

        if (vectors == 0) {
            sums_of_large(window, step, width, sums, weights, a->vectors);
        } else {
            const int8x16_t w0 = vldrbq_s8(weights), w1 = vectors > 1 || pairs != 0 ? vldrbq_s8(weights + 16) : w0;
            const int8x16_t w2 = vectors * (1 + pairs) > 2 ? vldrbq_s8(weights + 32) : w0;
            const int8x16_t w3 = vectors * (1 + pairs) > 2 ? vldrbq_s8(weights + 48) : w0;

            if (pairs == 0) {
                sums_of_windows(window, step, width, sums, w0, w1, w2, w3, vectors);
            } else if (vectors == 1) {
                sums_of_pairs(window, step, (width + 1) / 2, sums, w0, w0, w1, w1, 1);
            } else {
                sums_of_pairs(window, step, (width + 1) / 2, sums, w0, w1, w2, w3, 2);
            }
        }
        if (shift > 0) {
            shift_left(sums, width, bias, shift);
            bias = 0;
            shift = 0;
        }
        rescale_row(sums, width, bias, *multipliers++, shift, zero, out, pixels, channels);
        window += a->plane;
        weights += a->weights;
        out++;
    } while (--n > 0);
}

typedef void row_maker(const tvad_layer *layer, const layout *a, int32_t c, int32_t n, const int8_t *window,
                       int8_t *scratch, int8_t *out);

#define ROW_MAKER(name, vectors, pairs) \
    static void name(const tvad_layer *layer, const layout *a, int32_t c, int32_t n, const int8_t *window, \
                     int8_t *scratch, int8_t *out) \
    { \
        make_row(layer, a, c, n, window, scratch, out, vectors, pairs); \
    }

ROW_MAKER(row_of_pairs, 1, 1)
ROW_MAKER(row_of_pairs_in_two, 2, 1)
ROW_MAKER(row_of_two, 2, 0)
ROW_MAKER(row_of_four, 4, 0)
ROW_MAKER(row_of_many, 0, 0)

static row_maker *row_maker_for(const layout *a)
{
    if (a->pairs != 0) {
        return a->vectors == 1 ? row_of_pairs : row_of_pairs_in_two;
    }
    return a->vectors == 2 ? row_of_two : a->vectors == 4 ? row_of_four : row_of_many;
}

/* Bytes low to high - 1 of 16. */
TVAD_INLINE mve_pred16_t bytes_between(int32_t low, int32_t high)
{
    const uint32_t below_high = (1u << tvad_clamp(high, 0, 16)) - 1u, below_low = (1u << tvad_clamp(low, 0, 16)) - 1u;

    return (mve_pred16_t)(below_high & ~below_low);
}

/* Weights of channels c to c + n - 1 as whole vectors with zeros around them: those of a window, and for pairs the same a
 * step further on. */
static void put_weights(const tvad_layer *layer, const layout *a, int32_t c, int32_t n, int8_t *to)
{
    const int32_t kernel = layer->kernel_h * layer->kernel_w, dilation = layer->dilation;
    const int8_t *weights = (const int8_t *)layer->weights + c * kernel;
    int32_t i, at, kx, ky;

    for (; n > 0; n--) {
        for (i = 0; i < a->weights; i += 16) {
            const int32_t from = i < 16 * a->vectors ? 0 : 16 * a->vectors + a->step; /* bytes of `to` before the first */

            at = dilation == 1 ? i - from : 0;
            vstrbq_s8(to + i, vldrbq_z_s8((const int8_t *)((uintptr_t)weights + (uintptr_t)at),
                                          dilation == 1 ? bytes_between(-at, kernel - at) : 0));
        }
        for (i = 0; dilation > 1 && i <= a->pairs; i++) {
            for (kx = 0; kx < layer->kernel_w; kx++) {
                for (ky = 0; ky < layer->kernel_h; ky++) {
                    at = (kx * a->kh + ky) * dilation + i * (16 * a->vectors + a->step);
                    to[at] = weights[kx * layer->kernel_h + ky];
                }
            }
        }
        weights += kernel;
        to += a->weights;
    }
}

/* `count` bytes of scratch, up to 15 more. */
static void fill(int8_t *to, int32_t value, int32_t count)
{
    const int8x16_t values = vdupq_n_s8((int8_t)value);

    for (; count > 0; count -= 16) {
        vstrbq_s8(to, values);
        to += 16;
    }
}

/* One map row under the planes' row `slot`: y, which may be outside the map. */
static void put_row(const tvad_layer *layer, const layout *a, const tvad_window *window, int32_t c, int32_t n, int32_t y,
                    int8_t *slot)
{
    const uint16x8_t planes = vmulq_n_u16(vidupq_n_u16(0, 1), (uint16_t)a->plane);
    const int8_t *row = NULL;

    if (y >= 0 && y < layer->in_h) {
        row = window->in[0] + (y - window->in_first[0]) * layer->in_w * layer->in_c + c;
    }
    if (n == GROUP) {
        put_columns(layer, a, slot + layer->pad_left * a->kh, row, planes, 0, 1);
    } else {
        put_columns(layer, a, slot + layer->pad_left * a->kh, row, planes, vctp16q((uint32_t)n), 0);
    }
}

void tvad_depthwise(const tvad_layer *layer, const tvad_window *window)
{
    const layout a = layout_of(layer, window->rows);
    const int32_t channels = layer->in_c, pitch = layer->out_w * channels;
    row_maker *const make = row_maker_for(&a);
    int8_t *const out = window->out + (window->row - window->out_first) * pitch, *const scratch = window->scratch;
    int32_t c, n;

    for (c = 0; c < channels; c += n) {
        int32_t y = window->row * layer->stride_h - layer->pad_top, slot = 0, row;
        int8_t *base = scratch + a.at_planes;

        n = tvad_min(a.group, channels - c);
        fill(base, layer->in_zero, n * a.plane);
        put_weights(layer, &a, c, n, scratch + a.at_weights);
        for (row = 0; row < window->rows; row++) {
            for (; slot < a.kh; slot++) {
                put_row(layer, &a, window, c, n, y, base + slot);
                y++;
            }
            make(layer, &a, c, n, base, scratch, out + row * pitch + c);
            base += a.advance;
            slot = a.kh - layer->stride_h; /* rows that stay */
            if (slot <= 0) {
                y -= slot;
                slot = 0;
            }
        }
    }
    tvad_clamp_outputs(layer, out, window->rows * pitch);
}

#endif
