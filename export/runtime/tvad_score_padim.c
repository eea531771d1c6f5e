/* PADM, PADF, PADC: squared Mahalanobis distance of every cell's vector, from a triangular factor in 8 or 4 bits.
 *
 * The steps and their widths are those of docs/SPEC.md, "PADM, PADF, PADC" (Python: tinyvad/detectors/triangular.py):
 *     y   chosen channels, or the projection of two cells at a time        8 bits
 *     t   y - m                                                            9 bits, |t| <= 255
 *     inner, v, r of one row of the factor after the other (tvad_triangle)
 *     score = min((sum of r^2) >> 8, 2^32 - 1); the sum is below 512 * 2^40
 */
#include <string.h>

#include "tvad_arithmetic.h"
#include "tvad_internal.h"
#include "tvad_triangle.h"

#define CELLS 2u                    /* at a time: each word of the projection's matrix serves both */
#define COLUMNS 2u                  /* of that matrix at a time */

/* A pair of cells' embedding values i and i + 1 lie together: what SMLAD multiplies. */
#define SLOT(i, cell) (((i) >> 1) * 2u * CELLS + 2u * (cell) + ((i) & 1u))

static uint32_t vector_bytes(const tvad_bank *bank)
{
    return bank->mode == 2 ? TVAD_ALIGN16(2u * CELLS * ((bank->depth + 1u) & ~1u)) : 0u;
}

uint32_t tvad_score_padim_scratch(const tvad_bank *bank)
{
    return vector_bytes(bank) + TVAD_ALIGN16(2u * CELLS * bank->values) +
           (bank->bits != 0 ? tvad_triangle_scratch(bank->values) : 0u);
}

/* Every value of `cells` cells from `cell` on as int16; a missing second cell repeats the first. */
static void widen(const tvad_bank *bank, const int8_t *const parts[], uint32_t cell, uint32_t cells, int16_t *vectors)
{
    uint32_t t, i, first = 0;

    for (t = 0; t < bank->taps; t++) {
        const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        const int8_t *a = parts[t] + (size_t)cell * channels, *b = cells == CELLS ? a + channels : a;

        for (i = 0; i < channels; i++) {
            vectors[SLOT(first + i, 0u)] = a[i];
            vectors[SLOT(first + i, 1u)] = b[i];
        }
        first += channels;
    }
    if ((first & 1u) != 0) {
        vectors[SLOT(first, 0u)] = 0;
        vectors[SLOT(first, 1u)] = 0;
    }
}

#if TVAD_DSP

static inline uint32_t load16(const int8_t *p)
{
    uint16_t x;

    memcpy(&x, p, sizeof x);
    return x;
}

/* Two rows of two columns times values i and i + 1 of both cells. */
static inline void multiply_pair(const int8_t *weights, uint32_t width, const uint32_t *pairs, int32_t *a0, int32_t *a1,
                                 int32_t *b0, int32_t *b1)
{
    const uint32_t rows = tvad_pack_low(load16(weights), load16(weights + width));
    const uint32_t u0 = tvad_sxtb16(rows), u1 = tvad_sxtb16_ror8(rows), a = pairs[0], b = pairs[1];

    *a0 = tvad_smlad(u0, a, *a0);
    *a1 = tvad_smlad(u1, a, *a1);
    *b0 = tvad_smlad(u0, b, *b0);
    *b1 = tvad_smlad(u1, b, *b1);
}

#endif

/* Two columns of U . e for both cells. |sum| <= 65535 * 127 * 128 < 2^31. A call keeps its registers to itself. */
static TVAD_NOINLINE void multiply(const int8_t *weights, uint32_t depth, uint32_t width, const int16_t *vectors,
                                   int32_t sums[CELLS][COLUMNS])
{
    int32_t a0 = 0, a1 = 0, b0 = 0, b1 = 0;
    uint32_t i;

#if TVAD_DSP
    const uint32_t *pairs = (const uint32_t *)(const void *)vectors;

    for (; depth >= 4u; depth -= 4u) {
        multiply_pair(weights, width, pairs, &a0, &a1, &b0, &b1);
        multiply_pair(weights + 2u * width, width, pairs + CELLS, &a0, &a1, &b0, &b1);
        weights += 4u * width;
        pairs += 2u * CELLS;
    }
    if (depth >= 2u) {
        multiply_pair(weights, width, pairs, &a0, &a1, &b0, &b1);
        weights += 2u * width;
        pairs += CELLS;
        depth -= 2u;
    }
    vectors = (const int16_t *)(const void *)pairs;
#endif
    for (i = 0; i < depth; i++) {
        const int32_t a = vectors[SLOT(i, 0u)], b = vectors[SLOT(i, 1u)];

        a0 += weights[0] * a;
        a1 += weights[1] * a;
        b0 += weights[0] * b;
        b1 += weights[1] * b;
        weights += width;
    }
    sums[0][0] = a0;
    sums[0][1] = a1;
    sums[1][0] = b0;
    sums[1][1] = b1;
}

/* The only column of a bank that has one. */
static void multiply_one(const int8_t *weights, uint32_t depth, uint32_t width, const int16_t *vectors,
                         int32_t sums[CELLS][COLUMNS])
{
    uint32_t i;

    sums[0][0] = 0;
    sums[1][0] = 0;
    for (i = 0; i < depth; i++) {
        sums[0][0] += weights[(size_t)i * width] * vectors[SLOT(i, 0u)];
        sums[1][0] += weights[(size_t)i * width] * vectors[SLOT(i, 1u)];
    }
}

static int16_t rescale(int32_t sum, int32_t multiplier, int32_t shift)
{
    if (tvad_is_short(multiplier, shift)) {
        return (int16_t)tvad_max(tvad_rescale(sum, tvad_doubled(multiplier), -shift, 0), -127);
    }
    return (int16_t)tvad_clamp(tvad_requantise(sum, multiplier, shift), -127, 127);
}

/* y = clamp(requantise(e . U + bias)) of both cells: y[cell * values + j]. The last block of columns may overlap. */
static void project(const tvad_bank *bank, const int16_t *vectors, int16_t *y)
{
    const int8_t *weights = bank->projection.data;
    const uint32_t values = bank->values, step = values < COLUMNS ? 1u : COLUMNS;
    const int32_t *bias = bank->bias.data, *multiplier = bias + values, *shift = multiplier + values;
    int32_t sums[CELLS][COLUMNS];
    uint32_t j, cell, k;

    for (j = 0; j < values; j += step) {
        const uint32_t first = j + step <= values ? j : values - step;

        if (step == COLUMNS) {
            multiply(weights + first, bank->depth, values, vectors, sums);
        } else {
            multiply_one(weights + first, bank->depth, values, vectors, sums);
        }
        for (cell = 0; cell < CELLS; cell++) {
            for (k = 0; k < step; k++) {
                const uint32_t column = first + k;
                y[cell * values + column] = rescale(sums[cell][k] + bias[column], multiplier[column], shift[column]);
            }
        }
    }
}

/* y of one cell without a projection: the chosen channels, or all of them. */
static void choose(const tvad_bank *bank, tvad_vector *vector, int16_t *y)
{
    const uint16_t *indices = bank->indices.data;
    uint32_t t, j;

    if (bank->mode == 1) {
        for (j = 0; j < bank->values; j++) {
            y[j] = tvad_vector_value(vector, indices[j]);
        }
        return;
    }
    for (t = 0; t < bank->taps; t++) {
        const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        const int8_t *values = vector->parts[t] + (size_t)vector->cell * channels;

        for (j = 0; j < channels; j++) {
            *y++ = values[j];
        }
    }
}

void tvad_score_padim(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position, uint32_t cells,
                      uint32_t *distances, void *scratch)
{
    const uint32_t values = bank->values;
    const uint32_t *tables = (const uint32_t *)bank->tables.data + (size_t)task * (bank->bits == 0 ? 256u : 512u);
    const size_t before = (size_t)task * bank->grid_h * bank->grid_w + position;
    int16_t *vectors = scratch;
    int16_t *y = (int16_t *)(void *)((uint8_t *)scratch + vector_bytes(bank));
    void *work = (uint8_t *)(void *)y + TVAD_ALIGN16(2u * CELLS * values);
    tvad_vector vector;
    uint32_t cell, k, j;

    vector.bank = bank;
    vector.parts = parts;
    vector.tap = 0;
    vector.first = 0;
    for (cell = 0; cell < cells; cell += CELLS) {
        const uint32_t some = cells - cell < CELLS ? cells - cell : CELLS;

        if (bank->mode == 2) {
            widen(bank, parts, cell, some, vectors);
            project(bank, vectors, y);
        }
        for (k = 0; k < some; k++) {
            const size_t place = before + cell + k;
            const int8_t *mean = (const int8_t *)bank->mean.data + place * values;
            int16_t *t = y + k * values;
            uint64_t total;

            if (bank->mode != 2) {
                vector.cell = cell + k;
                choose(bank, &vector, t);
            }
            for (j = 0; j < values; j++) {
                t[j] = (int16_t)(t[j] - mean[j]);
            }
            total = tvad_triangle(bank, tables, place, t, work) >> 8;
            distances[cell + k] = total > UINT32_MAX ? UINT32_MAX : (uint32_t)total;
        }
    }
}
