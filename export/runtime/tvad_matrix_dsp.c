/* The matrix product with SMLAD: four pixels times two output channels at a time.
 *
 * The four pixels are widened to int16 once and serve all channels. A word of weights holds two taps of two channels, so that
 * two SXTB16 make both operands; eight sums, two words of each side and two pointers are all of the core's registers:
 * 13 instructions for 16 multiply-accumulates. Idea of widening once and interleaving channels: CMSIS-NN and TinyEngine.
 */
#include "tvad_matrix.h"

#if TVAD_DSP && !TVAD_MVE

#define TVAD_INLINE static inline __attribute__((always_inline))

/* Four pixels in scratch: words of two taps, of pixel 0, 1, 2, 3, then the next two taps. */
typedef struct {
    const uint32_t *first, *end;
    int32_t rest;               /* fours of taps after the first one */
} four_pixels;

/* Bytes 0 to count - 1 as a word, the others 0. 1 <= count. */
TVAD_INLINE uint32_t up_to_four(const int8_t *x, int32_t count)
{
    uint32_t word = 0;

    if (count >= 4) {
        return tvad_load32(x);
    }
    memcpy(&word, x, (size_t)count);
    return word;
}

/* Two pixels to words (taps 0, 2) and (taps 1, 3) of every four taps. */
static void widen_two(const int8_t *x, const int8_t *y, int32_t length, uint32_t *to)
{
    int32_t left;

    for (left = length; left > 0; left -= 4) {
        const uint32_t a = up_to_four(x, left), b = up_to_four(y, left);

        to[0] = tvad_sxtb16(a);
        to[1] = tvad_sxtb16(b);
        to[4] = tvad_sxtb16_ror8(a);
        to[5] = tvad_sxtb16_ror8(b);
        x += 4;
        y += 4;
        to += 8;
    }
}

#if TVAD_DSP_EMULATE || !defined(__OPTIMIZE__)

/* Two taps: a word of weights times a word of each pixel. */
TVAD_INLINE void two_taps(const uint32_t *x, uint32_t w, int32_t a[4], int32_t b[4])
{
    const uint32_t u = tvad_sxtb16(w), v = tvad_sxtb16_ror8(w);
    int32_t i;

    for (i = 0; i < 4; i++) {
        a[i] = tvad_smlad(x[i], u, a[i]);
        b[i] = tvad_smlad(x[i], v, b[i]);
    }
}

TVAD_INLINE const int8_t *sums_of_four(const four_pixels *x, const int8_t *w, const int32_t bias[2], int32_t a[4],
                                       int32_t b[4])
{
    const uint32_t *at;

    a[0] = a[1] = a[2] = a[3] = bias[0];
    b[0] = b[1] = b[2] = b[3] = bias[1];
    for (at = x->first; at != x->end; at += 4) {
        two_taps(at, tvad_load32(w), a, b);
        w += 4;
    }
    return w;
}

#else

#define TWO_TAPS \
    "ldr %[v], [%[w]], #4\n\t" \
    "ldrd %[p], %[q], [%[x]], #8\n\t" \
    "sxtb16 %[u], %[v]\n\t" \
    "sxtb16 %[v], %[v], ror #8\n\t" \
    "smlad %[a0], %[p], %[u], %[a0]\n\t" \
    "smlad %[b0], %[p], %[v], %[b0]\n\t" \
    "smlad %[a1], %[q], %[u], %[a1]\n\t" \
    "smlad %[b1], %[q], %[v], %[b1]\n\t" \
    "ldrd %[p], %[q], [%[x]], #8\n\t" \
    "smlad %[a2], %[p], %[u], %[a2]\n\t" \
    "smlad %[b2], %[p], %[v], %[b2]\n\t" \
    "smlad %[a3], %[q], %[u], %[a3]\n\t" \
    "smlad %[b3], %[q], %[v], %[b3]\n\t"

/* The same, started from the biases, which lie in a0 and b0. */
#define FIRST_TWO_TAPS \
    "ldr %[v], [%[w]], #4\n\t" \
    "ldrd %[p], %[q], [%[x], #8]\n\t" \
    "sxtb16 %[u], %[v]\n\t" \
    "sxtb16 %[v], %[v], ror #8\n\t" \
    "smlad %[a2], %[p], %[u], %[a0]\n\t" \
    "smlad %[b2], %[p], %[v], %[b0]\n\t" \
    "smlad %[a3], %[q], %[u], %[a0]\n\t" \
    "smlad %[b3], %[q], %[v], %[b0]\n\t" \
    "ldrd %[p], %[q], [%[x]], #16\n\t" \
    "smlad %[a1], %[q], %[u], %[a0]\n\t" \
    "smlad %[b1], %[q], %[v], %[b0]\n\t" \
    "smlad %[a0], %[p], %[u], %[a0]\n\t" \
    "smlad %[b0], %[p], %[v], %[b0]\n\t"

/* Sums of four pixels and two channels; returns where the weights of the next two begin. One block, because all 14 registers
 * are in use: GCC would spill. After the first four taps come 4, then 8 if the rest asks for it (bits 0 and 1 of their number
 * in fours, as flags N and C, which the sums leave alone), then 16 a round. */
TVAD_INLINE const int8_t *sums_of_four(const four_pixels *x, const int8_t *w, const int32_t bias[2], int32_t a[4],
                                       int32_t b[4])
{
    const uint32_t *at = x->first;
    uint32_t p, q, u, v;

    a[0] = bias[0];
    b[0] = bias[1];
    __asm__ volatile(
        "ldr %[p], %[rest]\n\t"
        "lsls %[p], %[p], #31\n\t"
        FIRST_TWO_TAPS TWO_TAPS
        "bpl 1f\n\t"
        TWO_TAPS TWO_TAPS
        "1: bcc 2f\n\t"
        TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS
        "2: ldr %[p], %[end]\n\t"
        "cmp %[x], %[p]\n\t"
        "beq 4f\n\t"
        "3:\n\t"
        TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS
        "ldr %[p], %[end]\n\t"
        "cmp %[x], %[p]\n\t"
        "bne 3b\n\t"
        "4:\n\t"
        : [a0] "+r"(a[0]), [b0] "+r"(b[0]), [a1] "=&r"(a[1]), [b1] "=&r"(b[1]), [a2] "=&r"(a[2]), [b2] "=&r"(b[2]),
          [a3] "=&r"(a[3]), [b3] "=&r"(b[3]), [x] "+r"(at), [w] "+r"(w), [p] "=&r"(p), [q] "=&r"(q), [u] "=&r"(u),
          [v] "=&r"(v)
        : [rest] "m"(x->rest), [end] "m"(x->end)
        : "cc", "memory");
    return w;
}

#endif

/* One channel of four pixels. */
TVAD_INLINE void store_four(const int32_t sum[4], int32_t multiplier, int32_t shift, int32_t zero, int8_t *out,
                            int32_t channels)
{
    const int32_t doubled = tvad_doubled(multiplier), right = -shift;

    out[0] = (int8_t)tvad_rescale(sum[0], doubled, right, zero);
    out[channels] = (int8_t)tvad_rescale(sum[1], doubled, right, zero);
    out[2 * channels] = (int8_t)tvad_rescale(sum[2], doubled, right, zero);
    out[3 * channels] = (int8_t)tvad_rescale(sum[3], doubled, right, zero);
}

/* One channel of up to four pixels, any rescaling. */
static void store_any(const tvad_layer *layer, int32_t c, const int32_t *sum, int32_t count, int8_t *out)
{
    int32_t i;

    for (i = 0; i < count; i++) {
        const int32_t value = tvad_requantise(sum[i], layer->multiplier[c], layer->shift[c]) + layer->out_zero;

        out[i * layer->out_c] = (int8_t)tvad_ssat8(value);
    }
}

/* All channels of `count` pixels, 4 at most; x are four, widened. quick: all channels have the short rescaling. */
static void up_to_four_pixels(const tvad_layer *layer, const uint32_t *x, int32_t groups, int32_t count, int32_t quick,
                              int8_t *out)
{
    const four_pixels pixels = { x, x + (8 * groups), groups - 1 };
    const int8_t *w = layer->weights;
    const int32_t channels = layer->out_c;
    int32_t c;

    for (c = 0; c < channels; c += 2) {
        int32_t a[4], b[4];
        const int32_t both = c + 1 < channels, bias[2] = { layer->bias[c], layer->bias[c + both] };

        w = sums_of_four(&pixels, w, bias, a, b);
        if (quick && both) {
            store_four(a, layer->multiplier[c], layer->shift[c], layer->out_zero, out + c, channels);
            store_four(b, layer->multiplier[c + 1], layer->shift[c + 1], layer->out_zero, out + c + 1, channels);
        } else {
            const int32_t sum_a[4] = { a[0], a[1], a[2], a[3] }, sum_b[4] = { b[0], b[1], b[2], b[3] };

            store_any(layer, c, sum_a, count, out + c);
            if (both) {
                store_any(layer, c + 1, sum_b, count, out + c + 1);
            }
        }
    }
}

/* All channels of one pixel, as it lies. */
static void one_pixel(const tvad_layer *layer, const int8_t *x, int32_t length, int8_t *out)
{
    const int8_t *w = layer->weights;
    const int32_t channels = layer->out_c;
    int32_t c, k;

    for (c = 0; c < channels; c += 2) {
        const int32_t both = c + 1 < channels;
        int32_t a = layer->bias[c], b = layer->bias[c + both];

        for (k = 0; k < length; k += 4) {
            const uint32_t word = up_to_four(x + k, length - k), even = tvad_sxtb16(word), odd = tvad_sxtb16_ror8(word);
            const uint32_t first = tvad_load32(w), second = tvad_load32(w + 4);

            a = tvad_smlad(even, tvad_sxtb16(first), a);
            b = tvad_smlad(even, tvad_sxtb16_ror8(first), b);
            a = tvad_smlad(odd, tvad_sxtb16(second), a);
            b = tvad_smlad(odd, tvad_sxtb16_ror8(second), b);
            w += 8;
        }
        store_any(layer, c, &a, 1, out + c);
        if (both) {
            store_any(layer, c + 1, &b, 1, out + c + 1);
        }
    }
}

void tvad_matrix(const tvad_layer *layer, int32_t quick, const int8_t *x, int32_t count, int32_t length, int8_t *out,
                 void *scratch)
{
    const int32_t channels = layer->out_c, groups = tvad_matrix_groups(length);
    int32_t left = count;

    while (left > 1 && scratch != NULL && length <= TVAD_MATRIX_LONGEST) {
        const int32_t pixels = tvad_min(left, 4);
        const int8_t *last = x + (pixels - 1) * length;
        uint32_t *words = scratch;

        widen_two(x, x + length, length, words);
        widen_two(pixels > 2 ? x + (2 * length) : last, last, length, words + 2);
        up_to_four_pixels(layer, words, groups, pixels, quick && pixels == 4, out);
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
