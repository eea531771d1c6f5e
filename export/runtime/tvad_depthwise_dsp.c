/* Depthwise convolution with SMLAD: up to four channels at a time, their rows widened once into planes in scratch.
 *
 * A plane holds row pairs: a word is two values of a column, int16, of row 2 p and 2 p + 1 counted from the first padding
 * row, the input's zero point taken off, so that padding is 0. Where the kernel starts on an even row its taps pair up as
 * (0, 1)(2, 3).., else as (-, 0)(1, 2)..: both phases are packed for each channel, doubled (tvad_depthwise_pass.h).
 *
 * If all of a map's row pairs fit in scratch they lie in order and padding rows are left out. Otherwise the planes are
 * rings: every pass then runs over the whole ring in its order in memory, and starts with the taps that go with its first
 * slot. For that the blocks of taps lie there twice, one after the other.
 *
 * Channel planes are TinyEngine's idea, packed pairs for SMLAD CMSIS-NN's; pairing rows, which needs one set of taps for
 * all columns and strides, and the short exact requantisation are our own.
 */
#include "tvad_depthwise.h"

#include "tvad_arithmetic.h"
#include "tvad_matrix.h"

#if TVAD_DSP && !TVAD_MVE

#include "tvad_depthwise_pass.h"

#define NOT_INLINE __attribute__((noinline))    /* else GCC spills in the loops */

typedef void pass_function(tvad_stream *stream);

/* How an output row is cut: passes of 4 outputs, then of 3, then one of 3 that makes some again. */
typedef struct {
    pass_function *pass_4, *pass_3;
    int32_t wide, narrow;       /* words of a plane that the passes of 4 and of 3 step over, 0 without */
    int32_t overlap;            /* and up to the pass that makes some again, 0 without */
    int32_t overlap_words, overlap_bytes;   /* it steps over; from the row's first output to its own */
    int32_t read;               /* words by which a pass has moved on in a row pair when it goes to the next */
} cut_row;

/* What one output row reads: byte offsets from a stream, words from the planes' begin. */
typedef struct {
    int32_t taps;               /* first block */
    int32_t last;               /* last word of the last block */
    int32_t slot;
} row_range;

static cut_row cut_of(const tvad_layer *layer)
{
    const int32_t out_w = layer->out_w;
    int32_t narrow = out_w / 3;
    int32_t wide = 0;
    cut_row cut;

    if (layer->stride_w == 2u) {
        cut.pass_3 = (layer->kernel_w == 3u) ? tvad_pass_3_2 : (layer->kernel_w == 5u) ? tvad_pass_5_2 : tvad_pass_7_2;
        cut.pass_4 = cut.pass_3;
    } else {
        cut.pass_3 = (layer->kernel_w == 3u) ? tvad_pass_3_3 : (layer->kernel_w == 5u) ? tvad_pass_5_3 : tvad_pass_7_3;
        cut.pass_4 = (layer->kernel_w == 3u) ? tvad_pass_3_4 : (layer->kernel_w == 5u) ? tvad_pass_5_4 : tvad_pass_7_4;
        narrow = (out_w == 5) ? 0 : ((4 - (out_w % 4)) % 4);
        wide = (out_w - (3 * narrow)) / 4;
    }
    cut.read = TVAD_PASS_READ(layer->kernel_w, layer->stride_w);
    cut.overlap = (((4 * wide) + (3 * narrow)) < out_w) ? (layer->stride_w * (out_w - 3)) : 0;
    cut.overlap_words = 3 * layer->stride_w;
    cut.overlap_bytes = layer->out_c * (out_w - 3);
    cut.wide = 4 * wide;
    cut.narrow = 3 * layer->stride_w * narrow;
    return cut;
}

/* The taps of a channel as blocks, `way` bytes from a pass's row pair to the next. Returns the sum of all taps as packed:
 * doubled, and negated where the multiplier is negative (then the sums' signs change too, and their products stay). */
static NOT_INLINE int32_t pack_taps(const tvad_layer *layer, const tvad_depthwise_plan *plan, int32_t channel, int32_t way,
                                    uint32_t *blocks)
{
    static const int8_t no_row[8] = {0};
    static const uint32_t no_block[8] = {0};
    const int32_t kernel_h = layer->kernel_h;
    const int32_t kernel_w = layer->kernel_w;
    const int32_t words = kernel_w + 1;
    const int32_t pairs = plan->pairs;
    const int32_t phase_words = plan->blocks * words;
    const int has_odd = plan->phases == 2;
    const int32_t factor = (layer->multiplier[channel] < 0) ? -2 : 2;
    const int8_t *row = (const int8_t *)layer->weights + (channel * kernel_h * kernel_w);
    const uint32_t *above = no_block;
    uint32_t *block = blocks;
    int32_t total = 0;

    for (int32_t y = 0; y < (2 * pairs); y += 2) {
        const int8_t *upper = (y < kernel_h) ? row : no_row;
        const int8_t *lower = ((y + 1) < kernel_h) ? (row + kernel_w) : no_row;

        for (int32_t t = 0; t < kernel_w; t++) {
            const uint32_t pair = tvad_pack_low((uint32_t)(factor * upper[t]), (uint32_t)(factor * lower[t]));

            block[t] = pair;
            total = tvad_smlad(pair, 0x00010001u, total);
            if (has_odd) {
                block[phase_words + t] = tvad_pack_low(above[t] >> 16, pair);
            }
        }
        block[kernel_w] = (uint32_t)way;
        if (has_odd) {
            block[phase_words + kernel_w] = (uint32_t)way;
        }
        above = block;
        block += words;
        row += 2 * kernel_w;
    }
    if (plan->blocks > plan->pairs) {
        for (int32_t phase = 0; phase < plan->phases; phase++) {
            (void)memcpy(blocks + (phase * phase_words) + (plan->pairs * words), blocks + (phase * phase_words),
                         (size_t)(4 * (plan->blocks - plan->pairs) * words));
        }
    }
    return total;
}

/* A channel's constants and taps; 0 if they are outside what a pass can do (see tvad_stream). */
static int start_stream(const tvad_layer *layer, const tvad_depthwise_plan *plan, int32_t channel, int32_t way, uint8_t *at)
{
    const int32_t limit = (1 << 30) - (layer->kernel_h * layer->kernel_w * 128 * 255);
    const int32_t multiplier = layer->multiplier[channel];
    const int32_t shift = -(int32_t)layer->shift[channel];
    const int32_t total = pack_taps(layer, plan, channel, way, (uint32_t *)(void *)(at + TVAD_STREAM_BYTES));
    const int32_t half = (multiplier < 0) ? -(total / 2) : (total / 2);
    const int32_t bias = (int32_t)((uint32_t)layer->bias[channel] + (uint32_t)(half * layer->in_zero));
    tvad_stream *const stream = (tvad_stream *)(void *)at;

    if ((shift < 1) || (shift > 22) || (bias >= limit) || (bias <= -limit)) {
        return 0;
    }
    stream->channels = layer->out_c;
    stream->channels_3 = 3 * layer->out_c;
    stream->multiplier = (multiplier < 0) ? -multiplier : multiplier;
    stream->round = (1 << (shift - 1)) + (layer->out_zero * (1 << shift));
    stream->shift = shift;
    for (int32_t i = 0; i < 4; i++) {
        stream->bias[i] = (multiplier < 0) ? (-2 * bias) : (2 * bias);
    }
    return 1;
}

/* Four channels of two rows (upper, lower) into their planes; zero: -zero point, twice. */
static NOT_INLINE void gather_4(const int8_t *upper, int32_t upper_step, const int8_t *lower, int32_t lower_step,
                                uint32_t zero, uint32_t *to, int32_t plane, int32_t columns)
{
    uint32_t *const end = to + columns;

    while (to != end) {
#if TVAD_DSP_EMULATE
        for (int32_t i = 0; i < 4; i++) {
            to[i * plane] = tvad_pair(upper[i] + tvad_low16(zero), lower[i] + tvad_low16(zero));
        }
        upper += upper_step;
        lower += lower_step;
        to++;
#else
        uint32_t a, b, c, d, e;

        __asm__ volatile("ldr %3, [%0]\n\t"
                         "ldr %4, [%1]\n\t"
                         "sxtab16 %5, %8, %3\n\t"              /* channels 0 and 2 of the upper row, of the lower */
                         "sxtab16 %6, %8, %4\n\t"
                         "sxtab16 %3, %8, %3, ror #8\n\t"      /* channels 1 and 3 */
                         "sxtab16 %4, %8, %4, ror #8\n\t"
                         "add %0, %0, %9\n\t"
                         "add %1, %1, %10\n\t"
                         "pkhbt %7, %5, %6, lsl #16\n\t"
                         "pkhtb %6, %6, %5, asr #16\n\t"
                         "pkhbt %5, %3, %4, lsl #16\n\t"
                         "pkhtb %4, %4, %3, asr #16\n\t"
                         "str %5, [%2, %11]\n\t"
                         "str %6, [%2, %11, lsl #1]\n\t"
                         "str %4, [%2, %12]\n\t"
                         "str %7, [%2], #4"
                         : "+r"(upper), "+r"(lower), "+r"(to), "=&r"(a), "=&r"(b), "=&r"(c), "=&r"(d), "=&r"(e)
                         : "r"(zero), "r"(upper_step), "r"(lower_step), "r"(4 * plane), "r"(12 * plane)
                         : "memory");
#endif
    }
}

static void gather_1(const int8_t *upper, int32_t upper_step, const int8_t *lower, int32_t lower_step, int32_t zero,
                     uint32_t *to, int32_t columns)
{
    uint32_t *const end = to + columns;

    while (to != end) {
        *to = tvad_pack_low((uint32_t)(*upper - zero), (uint32_t)(*lower - zero));
        to++;
        upper += upper_step;
        lower += lower_step;
    }
}

/* Row pair `pair` of some channels to `to`. Rows outside the map hold padding; so may rows that no kernel of this window
 * reaches, whose taps are 0: they need not be there. */
static void gather(const tvad_layer *layer, const tvad_window *window, const tvad_depthwise_plan *plan, int32_t channel,
                   int32_t channels, int32_t pair, uint32_t *to)
{
    const uint32_t padding = (uint32_t)(uint8_t)layer->in_zero * 0x01010101u;
    const uint32_t zero = ((uint32_t)(-layer->in_zero) & 0xFFFFu) * 0x00010001u;
    const int32_t columns = tvad_min(layer->in_w, plan->columns - layer->pad_left);
    const int32_t low = tvad_max((window->row * layer->stride_h) - layer->pad_top, 0);
    const int32_t last = ((window->row + window->rows - 1) * layer->stride_h) - layer->pad_top;
    const int32_t high = tvad_min(last + layer->kernel_h, layer->in_h);
    const int8_t *from[2];
    int32_t step[2];

    for (int32_t i = 0; i < 2; i++) {
        const int32_t y = (2 * pair) + i - layer->pad_top;
        const int inside = (y >= low) && (y < high);

        from[i] = inside ? (window->in[0] + ((y - window->in_first[0]) * layer->in_w * layer->in_c) + channel)
                         : (const int8_t *)&padding;
        step[i] = inside ? layer->in_c : 0;
    }
    to += layer->pad_left;
    if (channels == 4) {
        gather_4(from[0], step[0], from[1], step[1], zero, to, plan->columns, columns);
    } else {
        for (int32_t i = 0; i < channels; i++) {
            gather_1(from[0] + i, step[0], from[1] + i, step[1], layer->in_zero, to + (i * plan->columns), columns);
        }
    }
}

/* One output row of some channels. */
static NOT_INLINE void make_row(const cut_row *cut, const row_range *range, int32_t channels, int32_t stream_bytes,
                                int32_t columns, int32_t way, uint8_t *streams, int8_t *out)
{
    pass_function *const pass_4 = cut->pass_4;
    pass_function *const pass_3 = cut->pass_3;
    const int32_t wide = cut->wide;
    const int32_t narrow = cut->narrow;
    const int32_t taps = range->taps;
    const int32_t last = range->last;
    const int32_t overlap = cut->overlap;
    const uint32_t *data = (const uint32_t *)(void *)(streams + (channels * stream_bytes)) + range->slot;
    uint8_t *at = streams;

    for (int32_t i = 0; i < channels; i++) {
        tvad_stream *const stream = (tvad_stream *)(void *)at;

        stream->taps = (const uint32_t *)(void *)(at + taps);
        *(uint32_t *)(void *)(at + last) = (uint32_t)(-4 - last);
        stream->data = data;
        stream->out = out;
        if (wide != 0) {
            stream->end = data + wide;
            pass_4(stream);
        }
        if (narrow != 0) {
            stream->end = data + wide + narrow;
            pass_3(stream);
        }
        if (overlap != 0) {
            stream->data = data + overlap;
            stream->end = data + overlap + cut->overlap_words;
            stream->out = out + cut->overlap_bytes;
            pass_3(stream);
        }
        *(uint32_t *)(void *)(at + last) = (uint32_t)way;
        at += stream_bytes;
        data += columns;
        out++;
    }
}

/* Row pairs first..last of the planes (base: the pair in slot 0), for a kernel that starts in row `top`. */
static row_range range_of(const tvad_layer *layer, const tvad_depthwise_plan *plan, int32_t channels, int32_t base,
                          int32_t top, int32_t first, int32_t last)
{
    const int32_t words = layer->kernel_w + 1;
    const int32_t from = (first - base) % plan->slots;
    const int wraps = (from + (last - first)) >= plan->slots;   /* then begin with slot 0; all of `pairs` are there */
    const int32_t block = ((top % 2) * plan->blocks) + (wraps ? (plan->slots - from) : (first - (top / 2)));
    row_range range;

    range.taps = TVAD_STREAM_BYTES + (4 * words * block);
    range.last = range.taps + (4 * words * (last - first + 1)) - 4;
    range.slot = wraps ? 0 : (from * channels * plan->columns);
    return range;
}

/* 0 if a pass can't do these channels. */
static int some_channels(const tvad_layer *layer, const tvad_window *window, const tvad_depthwise_plan *plan,
                         const cut_row *cut, int32_t channel, int32_t channels)
{
    const int32_t columns = plan->columns;
    const int32_t first_in_map = layer->pad_top / 2;
    const int32_t last_in_map = (layer->pad_top + layer->in_h - 1) / 2;
    const int32_t way = 4 * ((channels * columns) - cut->read);
    const int32_t base = tvad_max((window->row * layer->stride_h) / 2, first_in_map);
    const int is_ring = plan->slots <= (last_in_map - base);
    uint8_t *const streams = (uint8_t *)window->scratch;
    uint32_t *const planes = (uint32_t *)(void *)(streams + (channels * plan->stream_bytes));
    int8_t *out = window->out + ((window->row - window->out_first) * layer->out_w * layer->out_c) + channel;
    int32_t next = base;

    for (int32_t i = 0; i < channels; i++) {
        if (start_stream(layer, plan, channel + i, way, streams + (i * plan->stream_bytes)) == 0) {
            return 0;
        }
    }
    for (int32_t r = window->row; r < (window->row + window->rows); r++) {
        const int32_t top = r * layer->stride_h;
        const int32_t end = (top / 2) + plan->pairs - 1;
        const int32_t first = tvad_max(top / 2, first_in_map);
        const int32_t last = is_ring ? end : tvad_min(end, last_in_map);
        const row_range range = range_of(layer, plan, channels, base, top, first, last);

        for (next = tvad_max(next, first); next <= last; next++) {
            gather(layer, window, plan, channel, channels, next,
                   planes + (((next - base) % plan->slots) * channels * columns));
        }
        make_row(cut, &range, channels, plan->stream_bytes, columns, way, streams, out);
        out += layer->out_w * layer->out_c;
    }
    return 1;
}

/* The columns of padding, which no gather writes. */
static void clear_padding(const tvad_layer *layer, const tvad_depthwise_plan *plan, int32_t rows, uint32_t *row)
{
    const int32_t left = layer->pad_left;
    const int32_t right = tvad_min(left + layer->in_w, plan->columns);

    for (int32_t i = 0; i < rows; i++) {
        for (int32_t x = 0; x < left; x++) {
            row[x] = 0u;
        }
        for (int32_t x = right; x < plan->columns; x++) {
            row[x] = 0u;
        }
        row += plan->columns;
    }
}

void tvad_depthwise_dsp(const tvad_layer *layer, const tvad_window *window, const tvad_depthwise_plan *plan)
{
    const cut_row cut = cut_of(layer);
    const int32_t channels = layer->out_c;
    int32_t cleared = 0;    /* channels for which the padding lies ready */

    for (int32_t c = 0; c < channels; c += plan->channels) {
        const int32_t group = tvad_min(plan->channels, channels - c);

        if (cleared != group) {
            clear_padding(layer, plan, group * plan->slots,
                          (uint32_t *)(void *)((uint8_t *)window->scratch + (group * plan->stream_bytes)));
            cleared = group;
        }
        if (some_channels(layer, window, plan, &cut, c, group) == 0) {
            tvad_depthwise_plain(layer, window, c, group);
            cleared = 0;
        }
    }
    tvad_clamp_outputs(layer, window->out + ((window->row - window->out_first) * layer->out_w * channels),
                       window->rows * layer->out_w * channels);
}

#endif
