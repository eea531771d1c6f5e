/* Depthwise convolution, a channel at a time: each input row is copied once, padded, to a ring of rows in scratch.
 *
 * weights: int8 (C, kernel_h, kernel_w). Works in place (same buffer, whole map in one window) where out_w <= in_w and
 * pad_top < (kernel_h - 1) * dilation + 1: an output row then only covers input rows that are in the ring already.
 */
#include "tvad_depthwise.h"

#include <string.h>

#include "tvad_arithmetic.h"

#if !TVAD_MVE

#if TVAD_DSP && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Os")      /* there plain C is only for what the path with SMLAD does not take */
#endif

#define NOT_INLINE __attribute__((noinline))    /* four times the code, for nothing */

#define SCRATCH_LIMIT 8192u     /* what the path with SMLAD may take, or the layer takes the plain one */
#define POINTER_BYTES 8         /* of scratch for a pointer, on any machine */

/* Rows and columns (bytes) of the plain path's ring; a pass makes four outputs, needed or not. */
static int32_t ring_rows(const tvad_layer *layer)
{
    return ((layer->kernel_h - 1) * layer->dilation) + 1;
}

static int32_t ring_columns(const tvad_layer *layer)
{
    return ((tvad_max(layer->out_w, 4) - 1) * layer->stride_w) + ((layer->kernel_w - 1) * layer->dilation) + 1;
}

/* The kernel's shape is one that the path with SMLAD has, and every kernel position covers a row of the map. */
static int shape_is_paired(const tvad_layer *layer)
{
    const int width = (layer->kernel_w == 3u) || (layer->kernel_w == 5u) || (layer->kernel_w == 7u);
    const int stride = (layer->stride_w == 1u) || (layer->stride_w == 2u);
    const int covered = (layer->pad_top < layer->kernel_h) &&
                        (((layer->out_h - 1) * layer->stride_h) < (layer->in_h + layer->pad_top));

    return width && stride && covered && (layer->dilation == 1u) && (layer->out_w >= 3u) &&
           (layer->pad_left < layer->kernel_w);
}

/* Bytes of `channels` planes with `slots` row pairs. */
static uint32_t cut(tvad_depthwise_plan *plan, int32_t channels, int32_t slots, int32_t blocks, int32_t kernel_w)
{
    plan->channels = channels;
    plan->slots = slots;
    plan->blocks = blocks;
    plan->stream_bytes = TVAD_STREAM_BYTES + (4 * plan->phases * blocks * (kernel_w + 1));
    plan->bytes = (uint32_t)(channels * (plan->stream_bytes + (4 * slots * plan->columns)));
    return plan->bytes;
}

tvad_depthwise_plan tvad_depthwise_plan_of(const tvad_layer *layer)
{
    const int32_t ring = ((ring_rows(layer) * ring_columns(layer)) + 3) & ~3;
    const uint32_t plain = (uint32_t)((layer->kernel_h * (POINTER_BYTES + (4 * layer->kernel_w))) + ring);
    const int32_t all = ((layer->pad_top + layer->in_h - 1) / 2) - (layer->pad_top / 2) + 1;
    tvad_depthwise_plan plan = {0};

    if (shape_is_paired(layer)) {
        const int32_t even = ((layer->stride_h % 2u) == 0u) ? 1 : 0;
        int fits = 0;

        plan.pairs = (layer->kernel_h + 1 + (1 - even)) / 2;
        plan.phases = 2 - even;
        plan.columns = tvad_max(((layer->out_w - 1) * layer->stride_w), 3) + layer->kernel_w;
        for (int32_t channels = tvad_min(4, layer->out_c); (channels > 0) && !fits; channels = (channels > 1) ? 1 : 0) {
            fits = cut(&plan, channels, all, plan.pairs, layer->kernel_w) <= SCRATCH_LIMIT;
            if (!fits && (all > plan.pairs)) {
                fits = cut(&plan, channels, plan.pairs, (2 * plan.pairs) - 1, layer->kernel_w) <= SCRATCH_LIMIT;
            }
        }
        if (!fits) {
            plan.channels = 0;
            plan.bytes = 0u;
        }
    }
    plan.bytes = (plan.bytes > plain) ? plan.bytes : plain;
    return plan;
}

uint32_t tvad_depthwise_scratch(const tvad_layer *layer)
{
    return tvad_depthwise_plan_of(layer).bytes;
}

/* One row of one channel, as value + 128 (0..255: unsigned bytes load with less on small cores), padding at both ends. */
static NOT_INLINE void copy_row(const tvad_layer *layer, const int8_t *in, uint8_t *row, int32_t columns)
{
    const uint8_t padding = (uint8_t)(layer->in_zero + 128);
    const int32_t channels = layer->in_c;
    const int32_t left = tvad_min(layer->pad_left, columns);
    const int32_t end = tvad_min(layer->pad_left + layer->in_w, columns);

    (void)memset(row, padding, (size_t)left);
    for (int32_t x = left; x < end; x++) {
        row[x] = (uint8_t)((uint8_t)*in ^ 0x80u);
        in += channels;
    }
    (void)memset(&row[end], padding, (size_t)(columns - end));
}

/* A kernel's place in the ring and what its channel needs. */
typedef struct {
    const uint8_t *const *rows;     /* the map's rows under the kernel */
    int32_t n_rows;
    const int32_t *taps;            /* of the first of them */
    int32_t kernel_w, dilation, stride;
    uint32_t bias;                  /* less what the 128 on every value adds, with what the rows outside the map add */
} position;

/* Four outputs' share of a tap. */
#define TAP(x, stride) \
    do { \
        const int32_t w = *taps; \
        taps++; \
        s0 += w * (x)[0]; \
        s1 += w * (x)[stride]; \
        s2 += w * (x)[2 * (stride)]; \
        s3 += w * (x)[3 * (stride)]; \
    } while (0)

/* Sums of four outputs from column `column` on, without the bias: at most 255 * 128 * 121. The sizes that networks have are
 * written out, width 0 stands for any. */
#define SUMS_FUNCTION(name, width, step) \
    static void name(const position *at, int32_t column, int32_t sums[4]) \
    { \
        const int32_t *taps = at->taps; \
        int32_t s0 = 0; \
        int32_t s1 = 0; \
        int32_t s2 = 0; \
        int32_t s3 = 0; \
        \
        for (int32_t r = 0; r < at->n_rows; r++) { \
            const uint8_t *x = at->rows[r] + column; \
            \
            if ((width) == 0) { \
                for (int32_t t = at->kernel_w; t > 0; t--) { \
                    TAP(x, at->stride); \
                    x += at->dilation; \
                } \
            } else { \
                TAP(x, step); \
                TAP(x + 1, step); \
                TAP(x + 2, step); \
                if ((width) >= 5) { \
                    TAP(x + 3, step); \
                    TAP(x + 4, step); \
                } \
                if ((width) == 7) { \
                    TAP(x + 5, step); \
                    TAP(x + 6, step); \
                } \
            } \
        } \
        sums[0] = s0; \
        sums[1] = s1; \
        sums[2] = s2; \
        sums[3] = s3; \
    }

typedef void sums_function(const position *at, int32_t column, int32_t sums[4]);

SUMS_FUNCTION(sums_any, 0, 0)

#if TVAD_DSP

static sums_function *sums_of(const tvad_layer *layer)
{
    (void)layer;
    return sums_any;
}

#else

SUMS_FUNCTION(sums_3_1, 3, 1)
SUMS_FUNCTION(sums_3_2, 3, 2)
SUMS_FUNCTION(sums_5_1, 5, 1)
SUMS_FUNCTION(sums_5_2, 5, 2)
SUMS_FUNCTION(sums_7_1, 7, 1)
SUMS_FUNCTION(sums_7_2, 7, 2)

static sums_function *sums_of(const tvad_layer *layer)
{
    const int is_1 = layer->stride_w == 1u;
    sums_function *sums = sums_any;

    if ((layer->dilation == 1u) && (is_1 || (layer->stride_w == 2u))) {
        if (layer->kernel_w == 3u) {
            sums = is_1 ? sums_3_1 : sums_3_2;
        } else if (layer->kernel_w == 5u) {
            sums = is_1 ? sums_5_1 : sums_5_2;
        } else if (layer->kernel_w == 7u) {
            sums = is_1 ? sums_7_1 : sums_7_2;
        } else {
            sums = sums_any;
        }
    }
    return sums;
}

#endif

/* One output row of one channel, four outputs a pass; the last pass makes some again where out_w is no multiple of four. */
static NOT_INLINE void plain_row(const tvad_layer *layer, const position *at, sums_function *sums_of_4, int32_t channel,
                                 int8_t *out)
{
    const int32_t channels = layer->out_c;
    const int32_t out_w = layer->out_w;
    const int32_t low = layer->low;
    const int32_t high = layer->high;
    const int32_t made = tvad_min(4, out_w);
    const int32_t multiplier = layer->multiplier[channel];
    const int32_t shift = layer->shift[channel];
    /* Two roundings in short: 1 off negative values, then halves go up. */
    const int32_t right = ((shift < 0) && (shift >= -22)) ? -shift : 0;
    const int32_t round = (right > 0) ? ((1 << (right - 1)) + (layer->out_zero * (1 << right))) : 0;
    int32_t x = 0;
    int32_t sums[4];

    do {
        int8_t *to = out + (x * channels);

        sums_of_4(at, x * at->stride, sums);
#pragma GCC unroll 1
        for (int32_t i = 0; i < made; i++) {
            const int32_t sum = (int32_t)((uint32_t)sums[i] + at->bias);
            int32_t y;

            if ((right > 0) && (sum < (1 << 29)) && (sum > -(1 << 29))) {
                y = tvad_multiply_high_29(sum, multiplier);
                y = (y + round + (y >> 31)) >> right;
            } else {
                y = tvad_requantise(sum, multiplier, shift) + layer->out_zero;
            }
            *to = (int8_t)tvad_clamp(y, low, high);
            to += channels;
        }
        x = ((x + 4) < out_w) ? tvad_min(x + 4, out_w - made) : out_w;
    } while (x < out_w);
}

/* Sum of `n` taps. */
static NOT_INLINE int32_t total(const int32_t *taps, int32_t n)
{
    int32_t sum = 0;

    for (int32_t i = 0; i < n; i++) {
        sum += taps[i];
    }
    return sum;
}

static void plain_channel(const tvad_layer *layer, const tvad_window *window, sums_function *sums_of_4, int32_t channel)
{
    const int32_t kernel_h = layer->kernel_h;
    const int32_t kernel_w = layer->kernel_w;
    const int32_t pixels = layer->in_w * layer->in_c;   /* bytes of an input row */
    const int32_t rows = ring_rows(layer);
    const int32_t columns = ring_columns(layer);
    const int8_t *const in = window->in[0] + channel;
    const int8_t *const weights = (const int8_t *)layer->weights + (channel * kernel_h * kernel_w);
    const uint8_t **const at_rows = (const uint8_t **)window->scratch;
    int32_t *const taps = (int32_t *)(void *)((uint8_t *)window->scratch + (POINTER_BYTES * kernel_h));
    uint8_t *const ring = (uint8_t *)&taps[kernel_h * kernel_w];    /* row y of the map lies in row y % rows */
    int32_t next = 0;           /* row of the map that comes next */
    int32_t base = 0;           /* a multiple of `rows`: what lies first in the ring is this row or one after its round */
    int8_t *out = window->out + ((window->row - window->out_first) * layer->out_w * layer->out_c) + channel;
    position at;
    uint32_t bias;

    for (int32_t i = 0; i < (kernel_h * kernel_w); i++) {
        taps[i] = weights[i];
    }
    bias = (uint32_t)layer->bias[channel] - (uint32_t)(128 * total(taps, kernel_h * kernel_w));
    at.rows = at_rows;
    at.kernel_w = kernel_w;
    at.dilation = layer->dilation;
    at.stride = layer->stride_w;
    for (int32_t r = window->row; r < (window->row + window->rows); r++) {
        const int32_t top = (r * layer->stride_h) - layer->pad_top;
        const int32_t end = tvad_min(top + rows, layer->in_h);
        int32_t y = tvad_max(top, 0);

        while ((base + rows) <= y) {
            base += rows;
        }
        for (next = tvad_max(next, y); next < end; next++) {
            const int32_t slot = next - base - (((next - base) < rows) ? 0 : rows);

            copy_row(layer, in + ((next - window->in_first[0]) * pixels), &ring[slot * columns], columns);
        }
        at.n_rows = 0;
        at.taps = taps;
        at.bias = bias;
        y = top;
        for (int32_t k = 0; k < kernel_h; k++) {
            if ((y >= 0) && (y < (int32_t)layer->in_h)) {
                const int32_t slot = y - base - (((y - base) < rows) ? 0 : rows);

                at_rows[at.n_rows] = &ring[slot * columns];
                at.n_rows++;
            } else {    /* padding: the same value under all taps of this row */
                at.bias += (uint32_t)((layer->in_zero + 128) * total(&taps[k * kernel_w], kernel_w));
                at.taps += (y < 0) ? kernel_w : 0;
            }
            y += layer->dilation;
        }
        plain_row(layer, &at, sums_of_4, channel, out);
        out += layer->out_w * layer->out_c;
    }
}

void tvad_depthwise_plain(const tvad_layer *layer, const tvad_window *window, int32_t channel, int32_t channels)
{
    sums_function *const sums_of_4 = sums_of(layer);

    for (int32_t i = 0; i < channels; i++) {
        plain_channel(layer, window, sums_of_4, channel + i);
    }
}

void tvad_depthwise(const tvad_layer *layer, const tvad_window *window)
{
#if TVAD_DSP
    const tvad_depthwise_plan plan = tvad_depthwise_plan_of(layer);

    if (plan.channels > 0) {
        tvad_depthwise_dsp(layer, window, &plan);
        return;
    }
#endif
    tvad_depthwise_plain(layer, window, 0, layer->out_c);
}

#endif
