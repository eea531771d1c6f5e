/* The innermost loops of Helium's depthwise convolution: a channel's plane -> sums of an output row -> int8 outputs.
 *
 * The values under the kernel of an output (its window) are one run of bytes of the plane, that of the next output lies `step`
 * bytes on. The loops differ in the vectors that a window fills; what lies behind it meets weights of 0. In assembly, because
 * GCC 12 neither stores two sums at once nor makes tail-predicated loops.
 */
#ifndef TVAD_DEPTHWISE_ROW_MVE_H
#define TVAD_DEPTHWISE_ROW_MVE_H

#include "tvad_mve.h"

/* Windows of two outputs in one vector, or in two. Makes `pairs` pairs of sums. */
TVAD_INLINE void sums_of_pairs(const int8_t *window, int32_t step, int32_t pairs, int32_t *sums, int8x16_t w0,
                               int8x16_t w1, int8x16_t v0, int8x16_t v1, int32_t vectors)
{
    int32_t first, second;

    if (vectors == 1) {
        __asm__ volatile("dls lr, %[pairs]\n"
                         "1:\n\t"
                         "vldrb.8 q0, [%[window]]\n\t"
                         "vmladav.s8 %[first], q0, %q[w0]\n\t"
                         "add %[window], %[window], %[step]\n\t"
                         "vmladav.s8 %[second], q0, %q[v0]\n\t"
                         "strd %[first], %[second], [%[sums]], #8\n\t"
                         "le lr, 1b"
                         : [window] "+&r"(window), [sums] "+&r"(sums), [first] "=&Te"(first), [second] "=&Te"(second)
                         : [pairs] "r"(pairs), [step] "r"(2 * step), [w0] "w"(w0), [v0] "w"(v0)
                         : "lr", "q0", "memory");
    } else {
        __asm__ volatile("dls lr, %[pairs]\n"
                         "1:\n\t"
                         "vldrb.8 q0, [%[window]]\n\t"
                         "vmladav.s8 %[first], q0, %q[w0]\n\t"
                         "vldrb.8 q1, [%[window], #16]\n\t"
                         "vmladav.s8 %[second], q0, %q[v0]\n\t"
                         "add %[window], %[window], %[step]\n\t"
                         "vmladava.s8 %[first], q1, %q[w1]\n\t"
                         "vmladava.s8 %[second], q1, %q[v1]\n\t"
                         "strd %[first], %[second], [%[sums]], #8\n\t"
                         "le lr, 1b"
                         : [window] "+&r"(window), [sums] "+&r"(sums), [first] "=&Te"(first), [second] "=&Te"(second)
                         : [pairs] "r"(pairs), [step] "r"(2 * step), [w0] "w"(w0), [w1] "w"(w1), [v0] "w"(v0), [v1] "w"(v1)
                         : "lr", "q0", "q1", "memory");
    }
}

/* A window in two vectors, or in four. Makes `count` sums. */
TVAD_INLINE void sums_of_windows(const int8_t *window, int32_t step, int32_t count, int32_t *sums, int8x16_t w0,
                                 int8x16_t w1, int8x16_t w2, int8x16_t w3, int32_t vectors)
{
    int32_t sum;

    if (vectors == 2) {
        __asm__ volatile("dls lr, %[count]\n"
                         "1:\n\t"
                         "vldrb.8 q0, [%[window]]\n\t"
                         "vmladav.s8 %[sum], q0, %q[w0]\n\t"
                         "vldrb.8 q1, [%[window], #16]\n\t"
                         "add %[window], %[window], %[step]\n\t"
                         "vmladava.s8 %[sum], q1, %q[w1]\n\t"
                         "str %[sum], [%[sums]], #4\n\t"
                         "le lr, 1b"
                         : [window] "+&r"(window), [sums] "+&r"(sums), [sum] "=&Te"(sum)
                         : [count] "r"(count), [step] "r"(step), [w0] "w"(w0), [w1] "w"(w1)
                         : "lr", "q0", "q1", "memory");
    } else {
        __asm__ volatile("dls lr, %[count]\n"
                         "1:\n\t"
                         "vldrb.8 q0, [%[window]]\n\t"
                         "vmladav.s8 %[sum], q0, %q[w0]\n\t"
                         "vldrb.8 q1, [%[window], #16]\n\t"
                         "vmladava.s8 %[sum], q1, %q[w1]\n\t"
                         "vldrb.8 q0, [%[window], #32]\n\t"
                         "vmladava.s8 %[sum], q0, %q[w2]\n\t"
                         "vldrb.8 q1, [%[window], #48]\n\t"
                         "add %[window], %[window], %[step]\n\t"
                         "vmladava.s8 %[sum], q1, %q[w3]\n\t"
                         "str %[sum], [%[sums]], #4\n\t"
                         "le lr, 1b"
                         : [window] "+&r"(window), [sums] "+&r"(sums), [sum] "=&Te"(sum)
                         : [count] "r"(count), [step] "r"(step), [w0] "w"(w0), [w1] "w"(w1), [w2] "w"(w2), [w3] "w"(w3)
                         : "lr", "q0", "q1", "memory");
    }
}

/* The same for a window of any number of vectors. */
TVAD_INLINE void sums_of_large(const int8_t *window, int32_t step, int32_t count, int32_t *sums, const int8_t *weights,
                               int32_t vectors)
{
    for (; count > 0; count--) {
        int32_t sum = 0, i;

        for (i = 0; i < 16 * vectors; i += 16) {
            sum = vmladavaq_s8(sum, vldrbq_s8(window + i), vldrbq_s8(weights + i));
        }
        *sums++ = sum;
        window += step;
    }
}

/* Sums -> outputs, `channels` bytes apart. -31 <= shift <= 0. pixels: 0, 1, 2 and 3 times channels. */
TVAD_INLINE void rescale_row(const int32_t *sums, int32_t count, int32_t bias, int32_t multiplier, int32_t shift,
                             int32_t zero, int8_t *out, uint32x4_t pixels, int32_t channels)
{
    const int32_t round = shift < 0 ? 1 : 0;
    register int32_t left __asm__("lr") = count; /* one register less; GCC runs out of them */

    __asm__ volatile("dlstp.32 lr, lr\n"
                     "1:\n\t"
                     "vldrw.32 q0, [%[sums]], #16\n\t"
                     "vadd.i32 q0, q0, %[bias]\n\t"
                     "vqrdmulh.s32 q0, q0, %[multiplier]\n\t"
                     "vqdmlah.s32 q0, q0, %[round]\n\t"
                     "vrshl.s32 q0, %[shift]\n\t"
                     "vadd.i32 q0, q0, %[zero]\n\t"
                     "vqmovnb.s32 q0, q0\n\t"
                     "vqmovnb.s16 q0, q0\n\t"
                     "vstrb.32 q0, [%[out], %q[pixels]]\n\t"
                     "add %[out], %[out], %[four]\n\t"
                     "letp lr, 1b"
                     : [sums] "+&r"(sums), [out] "+&r"(out), "+&r"(left)
                     : [bias] "r"(bias), [multiplier] "r"(multiplier), [round] "r"(round), [shift] "r"(shift),
                       [zero] "r"(zero), [pixels] "w"(pixels), [four] "r"(4 * channels)
                     : "q0", "memory");
}

/* For a positive shift: sums + bias, shifted left (they fit, the exporter checks). */
static void shift_left(int32_t *sums, int32_t count, int32_t bias, int32_t shift)
{
    int32_t i;

    for (i = 0; i < count; i += 4) {
        vstrwq_s32(sums + i, vshlq_r_s32(vaddq_n_s32(vldrwq_s32(sums + i), bias), shift));
    }
}

#endif
