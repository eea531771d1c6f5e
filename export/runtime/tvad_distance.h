/* Squared distance of an int16 query to int8 values: the inner loop of both memory banks, in every instruction set.
 *
 * Differences of int8 values take 9 bits, their squares 16; the callers bound the number of values so that sums fit int32.
 * With DSP the query lies in the order of SXTB16, (0, 2, 1, 3) in every full group of four: tvad_slot says where.
 */
#ifndef TVAD_DISTANCE_H
#define TVAD_DISTANCE_H

#include "tvad_simd.h"

#if TVAD_MVE
#include <arm_mve.h>
#endif

/* Where value `i` of `count` stands in the query. */
static inline uint32_t tvad_slot(uint32_t i, uint32_t count)
{
#if TVAD_DSP && !TVAD_MVE
    return i < (count & ~3u) ? (i & ~3u) | (i & 1u) << 1 | (i >> 1 & 1u) : i;
#else
    (void)count;
    return i;
#endif
}

#if TVAD_MVE

static inline int32_t tvad_distance8(const int16_t *query, const int8_t *row, int32_t sum)
{
    const int16x8_t difference = vsubq_s16(vldrhq_s16(query), vldrbq_s16(row));

    return vmladavaq_s16(sum, difference, difference);
}

#elif TVAD_DSP

/* Both halves of a - b. */
static inline uint32_t tvad_subtract16(uint32_t a, uint32_t b)
{
#if TVAD_DSP_EMULATE
    return tvad_pair(tvad_low16(a) - tvad_low16(b), tvad_high16(a) - tvad_high16(b));
#else
    uint32_t y;
    __asm__ volatile("ssub16 %0, %1, %2" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
}

/* The squares of both halves of a - b. */
static inline int32_t tvad_add_square(uint32_t a, uint32_t b, int32_t sum)
{
    const uint32_t difference = tvad_subtract16(a, b);

    return tvad_smlad(difference, difference, sum);
}

static inline int32_t tvad_distance4(const int16_t *query, const int8_t *row, int32_t sum)
{
    const uint32_t b = tvad_load32(row);

    sum = tvad_add_square(tvad_load32(query), tvad_sxtb16(b), sum);
    return tvad_add_square(tvad_load32(query + 2), tvad_sxtb16_ror8(b), sum);
}

static inline int32_t tvad_distance8(const int16_t *query, const int8_t *row, int32_t sum)
{
    return tvad_distance4(query + 4, row + 4, tvad_distance4(query, row, sum));
}

#else

static inline int32_t tvad_distance4(const int16_t *query, const int8_t *row, int32_t sum)
{
    const int32_t a = query[0] - row[0], b = query[1] - row[1], c = query[2] - row[2], d = query[3] - row[3];

    return sum + a * a + b * b + c * c + d * d;
}

static inline int32_t tvad_distance8(const int16_t *query, const int8_t *row, int32_t sum)
{
    return tvad_distance4(query + 4, row + 4, tvad_distance4(query, row, sum));
}

#endif

/* `count` values, of a query that tvad_slot was told to be as long, or of whole groups of a longer one. */
static inline int32_t tvad_distance(const int16_t *query, const int8_t *row, uint32_t count, int32_t sum)
{
    for (; count >= 8u; count -= 8u) {
        sum = tvad_distance8(query, row, sum);
        query += 8;
        row += 8;
    }
#if TVAD_MVE
    if (count != 0) {
        const mve_pred16_t some = vctp16q(count);
        const int16x8_t difference = vsubq_x_s16(vldrhq_z_s16(query, some), vldrbq_z_s16(row, some), some);

        return vmladavaq_p_s16(sum, difference, difference, some);
    }
#else
    if (count >= 4u) {
        sum = tvad_distance4(query, row, sum);
        count -= 4u;
        query += 4;
        row += 4;
    }
#endif
    for (; count > 0; count--) {
        const int32_t difference = *query++ - *row++;

        sum += difference * difference;
    }
    return sum;
}

#endif
