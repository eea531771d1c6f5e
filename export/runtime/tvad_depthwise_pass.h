/* The innermost loop of depthwise convolution with SMLAD: one channel, one output row, 3 or 4 outputs a pass.
 *
 * Flows in: a stream (one channel's constants and taps) that points into a plane of widened input. Flows out: int8 outputs.
 *
 * A word of a plane holds two values of one column, of an even row and of the odd row below it; a word of taps the two taps
 * that go with them. So one tap word serves every column, whatever the stride, and a row of taps is read once for all
 * outputs of a pass. A block is the taps of two kernel rows: kernel_w words and a last one, the way in bytes from the words
 * that the pass has read to those of the next two rows. The last block has there, negative, the way from its own end back
 * to the stream: adding that to any address in the planes carries, which ends the loop over blocks.
 *
 * Taps and bias are doubled, so that SMMLAR's rounded high word of sum * multiplier is gemmlowp's rounded doubling product,
 * plus `round`. Subtracting 1 from it where the sum is negative rounds halves away from zero: the sign of the product would
 * be the right one to ask, but it differs from the sum's only where the product rounds to 0, which comes out as 0 either
 * way because shift >= 1. In all five instructions an output, its store included.
 *
 * In C (for other compilers, for unoptimised builds and for the tests on a PC) and in assembly, where all 14 registers are
 * used: GCC, left to itself, spills.
 */
#ifndef TVAD_DEPTHWISE_PASS_H
#define TVAD_DEPTHWISE_PASS_H

#include "tvad_depthwise.h"
#include "tvad_simd.h"

/* One channel; the assembly loads the fields in this order.
 * |2 * sum| < 2^31, 0 <= multiplier, 1 <= shift <= 22, round = 2^(shift-1) + (output zero point << shift). */
typedef struct {
    const uint32_t *data;       /* first column of the next pass, first row pair */
    int8_t *out;                /* first output of the next pass */
    int32_t channels;           /* bytes from an output to its right neighbour */
    int32_t multiplier, round, shift;
    const uint32_t *end;        /* `data` after the last pass; data < end */
    int32_t channels_3;         /* 3 * channels */
    const uint32_t *taps;       /* first block */
    int32_t bias[4];            /* doubled, four times the same */
} tvad_stream;

/* Words by which a block moves on in a row pair. */
#define TVAD_PASS_READ(kernel_w, stride) (((kernel_w) == 3) ? 0 : (kernel_w) + (((stride) == 2) ? 4 : 3))

typedef char tvad_stream_fits[(sizeof(tvad_stream) <= TVAD_STREAM_BYTES) ? 1 : -1];

#if defined(__thumb2__) && defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !TVAD_DSP_EMULATE

/* Sum registers are r2 to r5; a tap word meets the data words of 3 or 4 outputs. */
#define TVAD_MAC3(w, a, b, c) \
    "smlad r2, " a ", " w ", r2\n\t" \
    "smlad r3, " b ", " w ", r3\n\t" \
    "smlad r4, " c ", " w ", r4\n\t"
#define TVAD_MAC4(w, a, b, c, d) TVAD_MAC3(w, a, b, c) "smlad r5, " d ", " w ", r5\n\t"

#define TVAD_REQUANTISE(sum, t) \
    "smmlar " t ", " sum ", r8, r9\n\t" \
    "add " t ", " t ", " sum ", asr #31\n\t" \
    "asr " t ", " t ", r10\n\t" \
    "ssat " t ", #8, " t "\n\t"

/* Every pass: taps and bias; blocks until the last; back to the stream; out. */
#define TVAD_PASS(bias, blocks, step, stores, columns) \
    "1:\n\t" \
    "ldm r1, {r1-" bias "}\n" \
    "2:\n\t" \
    blocks \
    "adds r0, r0, " step "\n\t" \
    "bcc 2b\n\t" \
    "add r1, r1, " step "\n\t" \
    "ldm r1!, {r0, r6-r12}\n\t" \
    stores \
    "add r0, r0, #" columns "\n\t" \
    "cmp r0, r11\n\t" \
    "strd r0, r6, [r1, #-32]\n\t" \
    "bne 1b\n"

#define TVAD_STORES_3 \
    TVAD_REQUANTISE("r2", "lr") \
    "strb lr, [r6]\n\t" \
    TVAD_REQUANTISE("r3", "r2") \
    "strb r2, [r6, r7]\n\t" \
    TVAD_REQUANTISE("r4", "lr") \
    "strb lr, [r6, r7, lsl #1]\n\t" \
    "add r6, r6, r12\n\t"

#define TVAD_STORES_4 \
    TVAD_REQUANTISE("r2", "lr") \
    "strb lr, [r6]\n\t" \
    TVAD_REQUANTISE("r3", "r2") \
    "strb r2, [r6, r7]\n\t" \
    TVAD_REQUANTISE("r4", "lr") \
    "strb lr, [r6, r7, lsl #1]\n\t" \
    TVAD_REQUANTISE("r5", "r2") \
    "strb r2, [r6, r12]\n\t" \
    "add r6, r6, r7, lsl #2\n\t"

/* Stride 1, four outputs: data words in r6 to r10, tap words in r11, r12, lr. Reads kernel_w + 3 columns. Blocks of three
 * taps load all their data at once (r6 to r11), which leaves the pointer where it is. */
#define TVAD_BLOCK_3_4 \
    "ldm r0, {r6-r11}\n\t" \
    "ldrd r12, lr, [r1], #8\n\t" \
    TVAD_MAC4("r12", "r6", "r7", "r8", "r9") \
    TVAD_MAC4("lr", "r7", "r8", "r9", "r10") \
    "ldrd r12, lr, [r1], #8\n\t" \
    TVAD_MAC4("r12", "r8", "r9", "r10", "r11")

#define TVAD_BLOCK_5_4 \
    "ldm r1!, {r11, r12, lr}\n\t" \
    "ldm r0!, {r6-r10}\n\t" \
    TVAD_MAC4("r11", "r6", "r7", "r8", "r9") \
    TVAD_MAC4("r12", "r7", "r8", "r9", "r10") \
    "ldrd r6, r7, [r0], #8\n\t" \
    TVAD_MAC4("lr", "r8", "r9", "r10", "r6") \
    "ldm r1!, {r11, r12, lr}\n\t" \
    "ldr r8, [r0], #4\n\t" \
    TVAD_MAC4("r11", "r9", "r10", "r6", "r7") \
    TVAD_MAC4("r12", "r10", "r6", "r7", "r8")

#define TVAD_BLOCK_7_4 \
    "ldm r1!, {r11, r12, lr}\n\t" \
    "ldm r0!, {r6-r10}\n\t" \
    TVAD_MAC4("r11", "r6", "r7", "r8", "r9") \
    TVAD_MAC4("r12", "r7", "r8", "r9", "r10") \
    "ldrd r6, r7, [r0], #8\n\t" \
    TVAD_MAC4("lr", "r8", "r9", "r10", "r6") \
    "ldm r1!, {r11, r12, lr}\n\t" \
    TVAD_MAC4("r11", "r9", "r10", "r6", "r7") \
    "ldrd r8, r9, [r0], #8\n\t" \
    TVAD_MAC4("r12", "r10", "r6", "r7", "r8") \
    TVAD_MAC4("lr", "r6", "r7", "r8", "r9") \
    "ldr r10, [r0], #4\n\t" \
    "ldm r1!, {r11, r12}\n\t" \
    TVAD_MAC4("r11", "r7", "r8", "r9", "r10")

/* Stride 1, three outputs: data in r5 to r9, taps in r10, r11, r12, lr. The last load steps over one column more, because
 * the way to the next rows is that of four outputs. */
#define TVAD_BLOCK_3_3 \
    "ldm r1!, {r10-r12, lr}\n\t" \
    "ldm r0, {r5-r9}\n\t" \
    TVAD_MAC3("r10", "r5", "r6", "r7") \
    TVAD_MAC3("r11", "r6", "r7", "r8") \
    TVAD_MAC3("r12", "r7", "r8", "r9")

#define TVAD_BLOCK_5_3 \
    "ldm r1!, {r10-r12, lr}\n\t" \
    "ldm r0!, {r5-r9}\n\t" \
    TVAD_MAC3("r10", "r5", "r6", "r7") \
    TVAD_MAC3("r11", "r6", "r7", "r8") \
    "ldrd r5, r6, [r0], #12\n\t" \
    TVAD_MAC3("r12", "r7", "r8", "r9") \
    TVAD_MAC3("lr", "r8", "r9", "r5") \
    "ldm r1!, {r11, r12}\n\t" \
    TVAD_MAC3("r11", "r9", "r5", "r6")

#define TVAD_BLOCK_7_3 \
    "ldm r1!, {r10-r12, lr}\n\t" \
    "ldm r0!, {r5-r9}\n\t" \
    TVAD_MAC3("r10", "r5", "r6", "r7") \
    TVAD_MAC3("r11", "r6", "r7", "r8") \
    TVAD_MAC3("r12", "r7", "r8", "r9") \
    "ldm r0!, {r5-r7}\n\t" \
    TVAD_MAC3("lr", "r8", "r9", "r5") \
    "ldm r1!, {r10-r12, lr}\n\t" \
    TVAD_MAC3("r10", "r9", "r5", "r6") \
    "ldr r8, [r0], #8\n\t" \
    TVAD_MAC3("r11", "r5", "r6", "r7") \
    TVAD_MAC3("r12", "r6", "r7", "r8")

/* Stride 2, three outputs: data in r5 to r10, taps in r11, r12, lr. Reads kernel_w + 4 columns. */
#define TVAD_BLOCK_3_2 \
    "ldm r0, {r5-r11}\n\t" \
    "ldrd r12, lr, [r1], #8\n\t" \
    TVAD_MAC3("r12", "r5", "r7", "r9") \
    TVAD_MAC3("lr", "r6", "r8", "r10") \
    "ldrd r12, lr, [r1], #8\n\t" \
    TVAD_MAC3("r12", "r7", "r9", "r11")

#define TVAD_BLOCK_5_2 \
    "ldm r1!, {r11, r12, lr}\n\t" \
    "ldm r0!, {r5-r10}\n\t" \
    TVAD_MAC3("r11", "r5", "r7", "r9") \
    TVAD_MAC3("r12", "r6", "r8", "r10") \
    "ldrd r5, r6, [r0], #8\n\t" \
    TVAD_MAC3("lr", "r7", "r9", "r5") \
    "ldm r1!, {r11, r12, lr}\n\t" \
    "ldr r7, [r0], #4\n\t" \
    TVAD_MAC3("r11", "r8", "r10", "r6") \
    TVAD_MAC3("r12", "r9", "r5", "r7")

#define TVAD_BLOCK_7_2 \
    "ldm r1!, {r11, r12, lr}\n\t" \
    "ldm r0!, {r5-r10}\n\t" \
    TVAD_MAC3("r11", "r5", "r7", "r9") \
    TVAD_MAC3("r12", "r6", "r8", "r10") \
    "ldrd r5, r6, [r0], #8\n\t" \
    TVAD_MAC3("lr", "r7", "r9", "r5") \
    "ldm r1!, {r11, r12, lr}\n\t" \
    TVAD_MAC3("r11", "r8", "r10", "r6") \
    "ldrd r7, r8, [r0], #8\n\t" \
    TVAD_MAC3("r12", "r9", "r5", "r7") \
    TVAD_MAC3("lr", "r10", "r6", "r8") \
    "ldr r9, [r0], #4\n\t" \
    "ldm r1!, {r11, r12}\n\t" \
    TVAD_MAC3("r11", "r5", "r7", "r9")

#define TVAD_PASS_FUNCTION(name, bias, block, step, stores, columns) \
    static __attribute__((noinline)) void name(tvad_stream *stream) \
    { \
        register const uint32_t *data __asm__("r0") = stream->data; \
        register const uint32_t **taps __asm__("r1") = &stream->taps; \
        __asm__ volatile(TVAD_PASS(bias, block, step, stores, columns) \
                         : "+r"(data), "+r"(taps) \
                         : \
                         : "r2", "r3", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory"); \
    }

TVAD_PASS_FUNCTION(tvad_pass_3_4, "r5", TVAD_BLOCK_3_4, "lr", TVAD_STORES_4, "16")
TVAD_PASS_FUNCTION(tvad_pass_5_4, "r5", TVAD_BLOCK_5_4, "lr", TVAD_STORES_4, "16")
TVAD_PASS_FUNCTION(tvad_pass_7_4, "r5", TVAD_BLOCK_7_4, "r12", TVAD_STORES_4, "16")
TVAD_PASS_FUNCTION(tvad_pass_3_3, "r4", TVAD_BLOCK_3_3, "lr", TVAD_STORES_3, "12")
TVAD_PASS_FUNCTION(tvad_pass_5_3, "r4", TVAD_BLOCK_5_3, "r12", TVAD_STORES_3, "12")
TVAD_PASS_FUNCTION(tvad_pass_7_3, "r4", TVAD_BLOCK_7_3, "lr", TVAD_STORES_3, "12")
TVAD_PASS_FUNCTION(tvad_pass_3_2, "r4", TVAD_BLOCK_3_2, "lr", TVAD_STORES_3, "24")
TVAD_PASS_FUNCTION(tvad_pass_5_2, "r4", TVAD_BLOCK_5_2, "lr", TVAD_STORES_3, "24")
TVAD_PASS_FUNCTION(tvad_pass_7_2, "r4", TVAD_BLOCK_7_2, "r12", TVAD_STORES_3, "24")

#else

static void tvad_pass(tvad_stream *stream, int32_t kernel_w, int32_t outputs, int32_t stride)
{
    const int32_t read = TVAD_PASS_READ(kernel_w, stride);

    while (stream->data != stream->end) {
        const uint32_t *data = stream->data;
        const uint32_t *taps = stream->taps;
        int32_t way;
        int32_t sum[4];

        (void)memcpy(sum, stream->bias, sizeof sum);
        do {
            for (int32_t t = 0; t < kernel_w; t++) {
                for (int32_t i = 0; i < outputs; i++) {
                    sum[i] = tvad_smlad(data[(i * stride) + t], taps[t], sum[i]);
                }
            }
            way = (int32_t)taps[kernel_w];
            taps += kernel_w + 1;
            if (way >= 0) {
                data += read + (way / 4);
            }
        } while (way >= 0);
        for (int32_t i = 0; i < outputs; i++) {
            const int32_t high = tvad_smmulr(sum[i], stream->multiplier) + stream->round + (sum[i] >> 31);

            *stream->out = (int8_t)tvad_ssat8(high >> stream->shift);
            stream->out += stream->channels;
        }
        stream->data += outputs * stride;
    }
}

#define TVAD_PASS_FUNCTION(name, kernel_w, outputs, stride) \
    static void name(tvad_stream *stream) \
    { \
        tvad_pass(stream, kernel_w, outputs, stride); \
    }

TVAD_PASS_FUNCTION(tvad_pass_3_4, 3, 4, 1)
TVAD_PASS_FUNCTION(tvad_pass_5_4, 5, 4, 1)
TVAD_PASS_FUNCTION(tvad_pass_7_4, 7, 4, 1)
TVAD_PASS_FUNCTION(tvad_pass_3_3, 3, 3, 1)
TVAD_PASS_FUNCTION(tvad_pass_5_3, 5, 3, 1)
TVAD_PASS_FUNCTION(tvad_pass_7_3, 7, 3, 1)
TVAD_PASS_FUNCTION(tvad_pass_3_2, 3, 3, 2)
TVAD_PASS_FUNCTION(tvad_pass_5_2, 5, 3, 2)
TVAD_PASS_FUNCTION(tvad_pass_7_2, 7, 3, 2)

#endif
#endif
