/* The matrix product with SMLAD: four pixels times two output channels at a time.
 *
 * Some pixels are widened to int16 and serve all channels; a pair of channels then goes over all of them, so that its weights
 * are read from flash once. A word of weights holds two taps of two channels: two SXTB16 make both operands. Eight sums, two
 * words of each side and two pointers are all of the core's registers; 13 instructions make 16 multiply-accumulates.
 * Widening once and pairing channels are ideas of CMSIS-NN and TinyEngine.
 */
#include "tvad_matrix.h"

#if TVAD_DSP && !TVAD_MVE

/* A pair of channels and what lies widened: for every four pixels, words of two taps of pixel 0, 1, 2, 3, then the next two
 * taps. It is kept in memory: all registers hold sums. */
typedef struct {
    const uint32_t *words;      /* of the next four pixels */
    const int8_t *weights, *end;
    int32_t rest;               /* fours of taps after the first one */
    int32_t bias[2];
    int32_t doubled_a, right_a, doubled_b, right_b; /* tvad_rescale */
    int32_t channels, zero;
    int8_t *out, *out_end;      /* of the next pixel 0 */
} channel_pair;

/* GCC is to read `pair` anew here and to keep nothing of it in registers. */
#define FORGET(pair) __asm__ volatile("" : "+m"(pair))

/* Four values of two pixels to words (taps 0, 2) and (taps 1, 3). */
TVAD_INLINE void widen(uint32_t x, uint32_t y, uint32_t *to)
{
    tvad_store_pair(to, tvad_sxtb16(x), tvad_sxtb16(y));
    tvad_store_pair(to + 4, tvad_sxtb16_ror8(x), tvad_sxtb16_ror8(y));
}

/* Bytes 0 to count - 1 as a word, the others 0. count <= 3. */
static uint32_t few_bytes(const int8_t *x, int32_t count)
{
    uint32_t word = 0;

    memcpy(&word, x, (size_t)count);
    return word;
}

/* Four pixels to words; pixels past `count` are copies of the last one. */
static void widen_four(const int8_t *x, int32_t count, int32_t length, uint32_t *to)
{
    const int8_t *p = x, *end = x + (length & ~3), *last = x + ((count - 1) * length);
    const int8_t *q = x + length, *r = count > 2 ? q + length : last, *s = count > 3 ? r + length : last;
    const int32_t rest = length & 3;

    while (p != end) {
        widen(tvad_load32(p), tvad_load32(q), to);
        widen(tvad_load32(r), tvad_load32(s), to + 2);
        p += 4;
        q += 4;
        r += 4;
        s += 4;
        to += 8;
    }
    if (rest > 0) {
        widen(few_bytes(p, rest), few_bytes(q, rest), to);
        widen(few_bytes(r, rest), few_bytes(s, rest), to + 2);
    }
}

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

/* Sums of the next four pixels and two channels. */
TVAD_INLINE void short_sums(channel_pair *pair, int32_t a[4], int32_t b[4])
{
    const int8_t *w;

    a[0] = a[1] = a[2] = a[3] = pair->bias[0];
    b[0] = b[1] = b[2] = b[3] = pair->bias[1];
    for (w = pair->weights; w != pair->end; w += 4) {
        two_taps(pair->words, tvad_load32(w), a, b);
        pair->words += 4;
    }
}

/* The faster form needs all registers: not with a frame pointer, as without optimisation. Set this to 1 where it does not
 * compile (-fno-omit-frame-pointer, -pg): slower, the same bits. */
#ifndef TVAD_SUMS_IN_C
#define TVAD_SUMS_IN_C 0
#endif

#if TVAD_DSP_EMULATE || TVAD_SUMS_IN_C || !defined(__OPTIMIZE__)

#define fast_sums short_sums

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

/* The same in one block, because all 14 registers are in use: GCC would spill. After the first four taps come 4, then 8 if
 * the rest asks for it (bits 0 and 1 of their number in fours, as flags N and C, which the sums leave alone), then 16 a
 * round. */
TVAD_INLINE void fast_sums(channel_pair *pair, int32_t a[4], int32_t b[4])
{
    const uint32_t *x = pair->words;
    const int8_t *w = pair->weights;
    uint32_t p, q, u, v;

    a[0] = pair->bias[0];
    b[0] = pair->bias[1];
    __asm__ volatile(
        "ldr %[p], %[rest]\n\t"
        "lsls %[p], %[p], #31\n\t"
        FIRST_TWO_TAPS TWO_TAPS
        "bpl 1f\n\t"
        TWO_TAPS TWO_TAPS
        "1: bcc 2f\n\t"
        TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS
        "2: ldr %[p], %[end]\n\t"
        "cmp %[w], %[p]\n\t"
        "beq 4f\n\t"
        "3:\n\t"
        TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS
        "ldr %[p], %[end]\n\t"
        "cmp %[w], %[p]\n\t"
        "bne 3b\n\t"
        "4:\n\t"
        : [a0] "+r"(a[0]), [b0] "+r"(b[0]), [a1] "=&r"(a[1]), [b1] "=&r"(b[1]), [a2] "=&r"(a[2]), [b2] "=&r"(b[2]),
          [a3] "=&r"(a[3]), [b3] "=&r"(b[3]), [x] "+r"(x), [w] "+r"(w), [p] "=&r"(p), [q] "=&r"(q), [u] "=&r"(u),
          [v] "=&r"(v)
        : [rest] "m"(pair->rest), [end] "m"(pair->end)
        : "cc", "memory");
    pair->words = x;
}

#endif

/* One channel of four pixels with the short rescaling. */
TVAD_INLINE void store_four(const int32_t sum[4], int32_t doubled, int32_t right, int32_t zero, int32_t channels,
                            int8_t *out)
{
    out[0] = (int8_t)tvad_rescale(sum[0], doubled, right, zero);
    out[channels] = (int8_t)tvad_rescale(sum[1], doubled, right, zero);
    out += 2 * channels;
    out[0] = (int8_t)tvad_rescale(sum[2], doubled, right, zero);
    out[channels] = (int8_t)tvad_rescale(sum[3], doubled, right, zero);
}

/* Two channels with the short rescaling, of all pixels that lie widened. */
TVAD_INLINE void quick_pair(channel_pair *pair)
{
    do {
        int32_t a[4], b[4];

        FORGET(*pair);
        fast_sums(pair, a, b);
        FORGET(*pair);
        store_four(a, pair->doubled_a, pair->right_a, pair->zero, pair->channels, pair->out);
        FORGET(*pair);
        store_four(b, pair->doubled_b, pair->right_b, pair->zero, pair->channels, pair->out + 1);
        pair->out += 4 * pair->channels;
    } while (pair->out != pair->out_end);
}

/* One channel of up to four pixels, any rescaling. */
static __attribute__((noinline)) void store_any(const tvad_layer *layer, int32_t c, const int32_t *sum, int32_t count,
                                                int8_t *out)
{
    int32_t i;

    for (i = 0; i < count; i++) {
        const int32_t value = tvad_requantise(sum[i], layer->multiplier[c], layer->shift[c]) + layer->out_zero;

        out[i * layer->out_c] = (int8_t)tvad_ssat8(value);
    }
}

/* Two channels, or one, of the `count` pixels that lie widened. */
static __attribute__((noinline)) void any_pair(const tvad_layer *layer, channel_pair *pair, int32_t c, int32_t count)
{
    int32_t a[4], b[4], left;

    for (left = count; left > 0; left -= 4) {
        short_sums(pair, a, b);
        store_any(layer, c, a, tvad_min(left, 4), pair->out);
        if (c + 1 < pair->channels) {
            store_any(layer, c + 1, b, tvad_min(left, 4), pair->out + 1);
        }
        pair->out += 4 * pair->channels;
    }
}

/* All channels of `count` pixels that lie widened, a multiple of 4 or less than 4. */
static __attribute__((noinline)) void all_pairs(const tvad_layer *layer, const uint32_t *words, int32_t groups,
                                                int32_t count, int8_t *out)
{
    const int32_t *bias = layer->bias, *multiplier = layer->multiplier;
    const int32_t size = count * layer->out_c;
    const int8_t *shift = layer->shift;
    channel_pair pair;
    int32_t c;

    pair.end = layer->weights;
    pair.rest = groups - 1;
    pair.channels = layer->out_c;
    pair.zero = layer->out_zero;
    for (c = 0; c < pair.channels; c += 2) {
        const int32_t other = tvad_min(c + 1, pair.channels - 1), m = multiplier[c], n = multiplier[other];

        pair.words = words;
        pair.weights = pair.end;
        pair.end = pair.weights + (8 * groups);
        pair.bias[0] = bias[c];
        pair.bias[1] = bias[other];
        pair.doubled_a = tvad_doubled(m);
        pair.doubled_b = tvad_doubled(n);
        pair.right_a = -shift[c];
        pair.right_b = -shift[other];
        pair.out = out + c;
        pair.out_end = pair.out + size;
        if (count >= 4 && other > c && tvad_is_short(m, shift[c]) && tvad_is_short(n, shift[other])) {
            quick_pair(&pair);
        } else {
            any_pair(layer, &pair, c, count);
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
            const uint32_t word = (k + 4 <= length) ? tvad_load32(x + k) : few_bytes(x + k, length - k);
            const uint32_t even = tvad_sxtb16(word), odd = tvad_sxtb16_ror8(word);
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

void tvad_matrix(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out, void *scratch)
{
    const int32_t channels = layer->out_c, groups = tvad_matrix_groups(length), most = 4 * tvad_matrix_tiles(length);
    uint32_t *words = scratch;
    int32_t left = count;

    if (words != NULL && length <= TVAD_MATRIX_LONGEST) {
        while (left > 1) {
            const int32_t pixels = left < 4 ? left : (tvad_min(left, most) & ~3);
            int32_t i;

            for (i = 0; i < pixels; i += 4) {
                widen_four(x + (i * length), tvad_min(pixels - i, 4), length, words + (2 * i * groups));
            }
            all_pairs(layer, words, groups, pixels, out);
            x += pixels * length;
            out += pixels * channels;
            left -= pixels;
        }
    }
    for (; left > 0; left--) {
        one_pixel(layer, x, length, out);
        x += length;
        out += channels;
    }
}

#endif
