/* Rows of the network's input from a camera's frame: integer antialiased bilinear resize, then the bank's table.
 *
 * The arithmetic is tinyvad/resize.py's, to the bit. Along a row of the frame every output pixel is a sum over `taps` pixels;
 * the weights of that axis are made once a call. The rows so made (uint8) lie in a ring of as many rows as an output row sums
 * over, so that within a call each row of the frame is read once. The sides are at most 16384 pixels.
 */
#include <string.h>

#include "tvad_kernels.h"

#define WEIGHT_BITS 14u
#define HALF (1u << (WEIGHT_BITS - 1u))
#define EXACT_32 (1u << 16u)  /* totals below: (running << 15) + total fits 32 bits */

/* Where a call keeps what; taps as `axis_taps` counts them, n = out_w * channels. */
typedef struct {
    uint16_t *starts;   /* [out_w] first input column */
    uint16_t *across;   /* [out_w][taps_w] weights */
    uint16_t *down;     /* [taps_h] weights of one output row, by ring slot */
    uint8_t *line;      /* [frame_w * 3] a row of the frame as RGB888 */
    uint8_t *ring;      /* [taps_h][n] row j of the frame, resized along the row, in slot j % taps_h */
} frame_scratch;

static uint32_t smaller(uint32_t a, uint32_t b)
{
    return (a < b) ? a : b;
}

/* Input pixels under the triangle of one output pixel, at most: it is 2 * max(in / out, 1) pixels wide, ends not included. */
static uint32_t axis_taps(uint32_t in, uint32_t out)
{
    const uint32_t longer = (in > out) ? in : out;

    return smaller(in, ((2u * longer) + out - 1u) / out);
}

static uint32_t raw_weight(int32_t support, int32_t distance)
{
    const int32_t weight = support - ((distance < 0) ? -distance : distance);

    return (weight > 0) ? (uint32_t)weight : 0u;
}

/* Weight k of input pixel start + k for output pixel i, in weights[k] or, in a ring, weights[(start + k) % taps]: start.
 * All terms stay below 2^30 for sides up to 2^14; their sum, at most 2^14 terms of 2^15, too. */
static uint32_t axis_weights(uint32_t in, uint32_t out, uint32_t i, uint32_t is_ring, uint16_t *weights)
{
    const uint32_t taps = axis_taps(in, out);
    const int32_t support = 2 * (int32_t)((in > out) ? in : out);
    const int32_t centre = (int32_t)(((2u * i) + 1u) * in);
    const int32_t before = centre - support - (int32_t)out;
    const uint32_t first = (before < 0) ? 0u : (((uint32_t)before / (2u * out)) + 1u);
    const uint32_t start = smaller(first, in - taps);
    const int32_t leftmost = (int32_t)(((2u * start) + 1u) * out) - centre;
    uint32_t slot = (is_ring != 0u) ? (start % taps) : 0u;
    uint32_t total = 0u;
    uint32_t running = 0u;
    uint32_t edge = 0u;

    for (uint32_t k = 0u; k < taps; k++) {
        total += raw_weight(support, leftmost + (int32_t)(2u * k * out));
    }
    for (uint32_t k = 0u; k < taps; k++) {
        uint32_t next;

        running += raw_weight(support, leftmost + (int32_t)(2u * k * out));
        if (total < EXACT_32) {
            next = ((running << (WEIGHT_BITS + 1u)) + total) / (2u * total);
        } else {
            next = (uint32_t)((((uint64_t)running << (WEIGHT_BITS + 1u)) + total) / (2u * (uint64_t)total));
        }
        weights[slot] = (uint16_t)(next - edge);
        edge = next;
        slot = ((slot + 1u) < taps) ? (slot + 1u) : 0u;
    }
    return start;
}

/* A row of a frame as RGB888 or, where it is grey, as grey: where it lies, or unpacked into line[width * 3]. */
static const uint8_t *frame_line(const tvad_frame *frame, uint32_t row, uint8_t *line)
{
    const uint8_t *in = (const uint8_t *)frame->pixels + ((size_t)row * frame->stride);
    const uint8_t *const end = in + (2u * (size_t)frame->width);
    uint8_t *out = line;

    if (frame->format != TVAD_RGB565) {
        return in;
    }
    while (in < end) {
        const uint32_t pixel = (uint32_t)in[0] | ((uint32_t)in[1] << 8u);
        const uint32_t red = pixel >> 11u;
        const uint32_t green = (pixel >> 5u) & 63u;
        const uint32_t blue = pixel & 31u;

        out[0] = (uint8_t)((red << 3u) | (red >> 2u));
        out[1] = (uint8_t)((green << 2u) | (green >> 4u));
        out[2] = (uint8_t)((blue << 3u) | (blue >> 2u));
        in += 2;
        out += 3;
    }
    return line;
}

/* One row of the frame -> out_w pixels. A sum is at most 255 * 2^14 + 2^13 < 2^22. */
static void resize_across(const frame_scratch *scratch, const uint8_t *line, uint32_t channels, uint32_t out_w,
                          uint32_t taps, uint8_t *out)
{
    const uint16_t *weight = scratch->across;

    for (uint32_t x = 0u; x < out_w; x++) {
        const uint8_t *in = line + ((uint32_t)scratch->starts[x] * channels);
        const uint16_t *const end = weight + taps;
        uint32_t red = HALF;
        uint32_t green = HALF;
        uint32_t blue = HALF;

        if (channels == 1u) {
            while (weight < end) {
                red += (uint32_t)*weight++ * *in++;
            }
            *out++ = (uint8_t)(red >> WEIGHT_BITS);
        } else {
            while (weight < end) {
                const uint32_t w = *weight++;

                red += w * in[0];
                green += w * in[1];
                blue += w * in[2];
                in += 3;
            }
            out[0] = (uint8_t)(red >> WEIGHT_BITS);
            out[1] = (uint8_t)(green >> WEIGHT_BITS);
            out[2] = (uint8_t)(blue >> WEIGHT_BITS);
            out += 3;
        }
    }
}

/* The ring's rows -> one row of n values, four at a time; sums as above. */
static void resize_down(const frame_scratch *scratch, uint32_t n, uint32_t taps, uint8_t *out)
{
    uint32_t i = 0u;

    for (; (i + 4u) <= n; i += 4u) {
        const uint8_t *in = scratch->ring + i;
        uint32_t sums[4] = {HALF, HALF, HALF, HALF};

        for (uint32_t slot = 0u; slot < taps; slot++) {
            const uint32_t weight = scratch->down[slot];

            sums[0] += weight * in[0];
            sums[1] += weight * in[1];
            sums[2] += weight * in[2];
            sums[3] += weight * in[3];
            in += n;
        }
        out[i] = (uint8_t)(sums[0] >> WEIGHT_BITS);
        out[i + 1u] = (uint8_t)(sums[1] >> WEIGHT_BITS);
        out[i + 2u] = (uint8_t)(sums[2] >> WEIGHT_BITS);
        out[i + 3u] = (uint8_t)(sums[3] >> WEIGHT_BITS);
    }
    for (; i < n; i++) {
        uint32_t sum = HALF;

        for (uint32_t slot = 0u; slot < taps; slot++) {
            sum += (uint32_t)scratch->down[slot] * scratch->ring[(slot * n) + i];
        }
        out[i] = (uint8_t)(sum >> WEIGHT_BITS);
    }
}

/* RGB888 or grey values in a row's own place -> the network's input. */
static void apply_table(const tvad_bank *bank, uint32_t channels, uint32_t width, int8_t *row)
{
    uint8_t *const pixels = (uint8_t *)row;

    if (channels == 1u) {  /* red = green = blue; from the end, so that no grey value is overwritten before it is read */
        for (uint32_t x = width; x > 0u; x--) {
            (void)memset(&pixels[3u * (x - 1u)], pixels[x - 1u], 3u);
        }
    }
    tvad_input(bank, pixels, row, width);
}

/* The same size: no resize. */
static void same_size(const tvad_bank *bank, const tvad_frame *frame, uint32_t channels, uint32_t row, int8_t *out)
{
    const uint8_t *const line = frame_line(frame, row, (uint8_t *)out);

    if (line != (uint8_t *)out) {
        (void)memcpy(out, line, (size_t)frame->width * channels);
    }
    apply_table(bank, channels, frame->width, out);
}

static void resized(const tvad_layer *layer, const tvad_window *window, const tvad_bank *bank, const tvad_frame *frame,
                    uint32_t channels, int8_t *out)
{
    const uint32_t out_h = layer->out_h;
    const uint32_t out_w = layer->out_w;
    const uint32_t taps_w = axis_taps(frame->width, out_w);
    const uint32_t taps_h = axis_taps(frame->height, out_h);
    const uint32_t n = out_w * channels;
    const uint32_t end = (uint32_t)(window->row + window->rows);
    frame_scratch scratch;
    uint32_t ready = 0u;  /* rows of the frame below it are in the ring, or are no longer needed */

    scratch.starts = (uint16_t *)window->scratch;
    scratch.across = scratch.starts + out_w;
    scratch.down = scratch.across + (out_w * taps_w);
    scratch.line = (uint8_t *)(scratch.down + taps_h);
    scratch.ring = scratch.line + (3u * (uint32_t)frame->width);
    for (uint32_t x = 0u; x < out_w; x++) {
        scratch.starts[x] = (uint16_t)axis_weights(frame->width, out_w, x, 0u, scratch.across + (x * taps_w));
    }
    for (uint32_t row = (uint32_t)window->row; row < end; row++) {
        const uint32_t start = axis_weights(frame->height, out_h, row, 1u, scratch.down);

        ready = (ready < start) ? start : ready;
        for (; ready < (start + taps_h); ready++) {
            resize_across(&scratch, frame_line(frame, ready, scratch.line), channels, out_w, taps_w,
                          scratch.ring + ((ready % taps_h) * n));
        }
        resize_down(&scratch, n, taps_h, (uint8_t *)out);
        apply_table(bank, channels, out_w, out);
        out += 3u * out_w;
    }
}

void tvad_frame_rows(const tvad_layer *layer, const tvad_window *window, const tvad_bank *bank, const tvad_frame *frame)
{
    const uint32_t width = layer->out_w;
    const int32_t row_bytes = 3 * (int32_t)layer->out_w;
    int8_t *out = window->out + ((window->row - window->out_first) * row_bytes);

    if (frame == NULL) {
        const int8_t *const in = window->in[0] + ((window->row - window->in_first[0]) * row_bytes);

        tvad_input(bank, (const uint8_t *)in, out, (size_t)window->rows * width);
        return;
    }

    const uint32_t channels = (frame->format == TVAD_GREY8) ? 1u : 3u;

    if ((frame->width != width) || (frame->height != layer->out_h)) {
        resized(layer, window, bank, frame, channels, out);
        return;
    }
    for (int32_t row = window->row; row < (window->row + window->rows); row++) {
        same_size(bank, frame, channels, (uint32_t)row, out);
        out += row_bytes;
    }
}

uint32_t tvad_frame_scratch(uint32_t frame_h, uint32_t frame_w, uint32_t out_h, uint32_t out_w)
{
    const uint32_t taps_w = axis_taps(frame_w, out_w);
    const uint32_t taps_h = axis_taps(frame_h, out_h);

    if ((frame_h == out_h) && (frame_w == out_w)) {
        return 0u;
    }
    return (2u * ((out_w * (1u + taps_w)) + taps_h)) + (3u * (frame_w + (taps_h * out_w)));
}
