/* What 1x1 convolutions, convolutions and fully connected layers share: a matrix product, requantised to int8. */
#ifndef TVAD_MATRIX_H
#define TVAD_MATRIX_H

#include "tvad_arithmetic.h"
#include "tvad_kernels.h"

#define TVAD_INLINE static inline __attribute__((always_inline)) /* the inner loops, at -Os too */

#define TVAD_MATRIX_PIXELS 4        /* whose sums are made together */
#define TVAD_MATRIX_BYTES 3072      /* of pixels that are widened at a time, where that is four or more */
#define TVAD_MATRIX_LONGEST 1024    /* values of a pixel; longer ones are taken one pixel at a time, without scratch */

/* out[count][out_c] = rescaled (x[count][length] times weights[out_c][length], plus bias); x and out lie anywhere.
 *
 * Weights (tinyvad/export/packing.py): output channels a, b in pairs, taps in fours, the last ones filled up with 0; eight
 * bytes a0 b0 a2 b2 a1 b1 a3 b3 each, at a multiple of 4. scratch: tvad_matrix_scratch(length) bytes; NULL: every pixel is
 * taken by itself. */
void tvad_matrix(const tvad_layer *layer, const int8_t *x, int32_t count, int32_t length, int8_t *out, void *scratch);

/* What a fused activation lets through, on outputs that already are int8; nothing to do where that is all of int8. */
void tvad_clamp_outputs(const tvad_layer *layer, int8_t *out, int32_t count);

/* Taps in fours: how many. */
static inline int32_t tvad_matrix_groups(int32_t length)
{
    return (length + 3) >> 2;
}

/* Pixels in fours that are widened at a time: how many. */
static inline int32_t tvad_matrix_tiles(int32_t length)
{
    return tvad_max(TVAD_MATRIX_BYTES / (32 * tvad_matrix_groups(length)), 1);
}

/* Bytes: pixels as int16. */
static inline uint32_t tvad_matrix_scratch(int32_t length)
{
    return (length > TVAD_MATRIX_LONGEST) ? 0u : (uint32_t)(32 * tvad_matrix_groups(length) * tvad_matrix_tiles(length));
}

#endif
