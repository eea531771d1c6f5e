/* r = diag(a) (I + N) t of one cell, N strictly lower triangular in 8 or 4 bits a value: the sum of r_i^2.
 *
 *     inner_i = sum over j < i of q_ij t_j                                 |inner| <= 511 * 128 * 255 < 2^24
 *     v_i = 2^8 t_i + ((inner_i S[s_i] + 2^7) >> 8), saturated to int32    products below 2^56
 *     r_i = (v_i A[a_i] + 2^15) >> 16, saturated to +-(2^20 - 1)           products below 2^63
 *
 * The rows of q follow each other without gaps. With DSP, t is put into scratch in the order in which words of q unpack,
 * and what a word holds of the next row is masked out. The last row of a cell, behind which the bank may end, is read to
 * its exact end.
 */
#include "tvad_arithmetic.h"
#include "tvad_internal.h"
#include "tvad_triangle.h"

#define RESIDUAL_LIMIT ((1 << 20) - 1)
#define ORDERED(values) (((values) + 7u) & ~7u) /* values of t in order: whole groups of eight */

/* Twice t in order, then inner. */
uint32_t tvad_triangle_scratch(uint32_t values)
{
    return TVAD_ALIGN16(4u * ORDERED(values) + 4u * values);
}

/* A value of 4 bits, two's complement, by its number in a row of nibbles. */
static int32_t nibble(const uint8_t *packed, uint32_t i)
{
    return (int32_t)(((uint32_t)packed[i >> 1] >> 4u * (i & 1u) & 15u) ^ 8u) - 8;
}

/* Row i of q starts at number i (i - 1) / 2 of the cell's values. */
static int32_t row_of_bytes(const int8_t *q, const int16_t *t, uint32_t count)
{
    uint32_t j;
    int32_t sum = 0;

    for (j = 0; j < count; j++) {
        sum += q[j] * t[j];
    }
    return sum;
}

static int32_t row_of_nibbles(const uint8_t *q, uint32_t first, const int16_t *t, uint32_t count)
{
    uint32_t j;
    int32_t sum = 0;

    for (j = 0; j < count; j++) {
        sum += nibble(q, first + j) * t[j];
    }
    return sum;
}

#if TVAD_DSP

/* t in groups of four, values 0, 2, 1, 3: as SXTB16 unpacks bytes. Reads and writes whole groups. */
static void order_for_bytes(const int16_t *t, uint32_t values, uint32_t *ordered)
{
    uint32_t i;

    for (i = 0; i < values; i += 4u) {
        const uint32_t a = tvad_load32(t + i), b = tvad_load32(t + i + 2u);

        *ordered++ = tvad_pack_low(a, b);
        *ordered++ = tvad_pack_high(a, b);
    }
}

/* t in groups of eight, values 0, 4, 1, 5, 2, 6, 3, 7: as nibbles four bits apart unpack. */
static void order_for_nibbles(const int16_t *t, uint32_t values, uint32_t *ordered)
{
    uint32_t i;

    for (i = 0; i < values; i += 8u) {
        const uint32_t a = tvad_load32(t + i), b = tvad_load32(t + i + 2u);
        const uint32_t c = tvad_load32(t + i + 4u), d = tvad_load32(t + i + 6u);

        *ordered++ = tvad_pack_low(a, c);
        *ordered++ = tvad_pack_high(a, c);
        *ordered++ = tvad_pack_low(b, d);
        *ordered++ = tvad_pack_high(b, d);
    }
}

/* Does another row of a word's values or more follow row i? */
static int is_followed(uint32_t i, uint32_t values)
{
    return values >= 9u && i + 1u < values;
}

/* Every row's inner sum, 8 bits. */
static void multiply_bytes(const int8_t *q, const int16_t *t, uint32_t values, uint32_t *ordered, int32_t *inner)
{
    uint32_t i, count;

    order_for_bytes(t, values, ordered);
    for (i = 0; i < values; i++) {
        const int8_t *word = q;
        const uint32_t *pair = ordered;
        int32_t sum = 0;

        for (count = i; count >= 8u; count -= 8u) {
            const uint32_t x = tvad_load32(word), y = tvad_load32(word + 4);

            sum = tvad_smlad(tvad_sxtb16(x), pair[0], sum);
            sum = tvad_smlad(tvad_sxtb16_ror8(x), pair[1], sum);
            sum = tvad_smlad(tvad_sxtb16(y), pair[2], sum);
            sum = tvad_smlad(tvad_sxtb16_ror8(y), pair[3], sum);
            word += 8;
            pair += 4;
        }
        if (count >= 4u) {
            const uint32_t x = tvad_load32(word);

            sum = tvad_smlad(tvad_sxtb16(x), pair[0], sum);
            sum = tvad_smlad(tvad_sxtb16_ror8(x), pair[1], sum);
            word += 4;
            pair += 2;
            count -= 4u;
        }
        if (count != 0 && is_followed(i, values)) {
            const uint32_t x = tvad_load32(word) & ((1u << 8u * count) - 1u);

            sum = tvad_smlad(tvad_sxtb16(x), pair[0], sum);
            sum = tvad_smlad(tvad_sxtb16_ror8(x), pair[1], sum);
        } else {
            sum += row_of_bytes(word, t + (i - count), count);
        }
        inner[i] = sum;
        q += i;
    }
}

/* Every row's inner sum, 4 bits. A nibble with its sign bit flipped is q + 8, from 0 to 15; 8 times the sum of t comes off
 * again. A row that starts at a high nibble takes that one alone and goes on with t from value 1 on. */
static void multiply_nibbles(const uint8_t *q, const int16_t *t, uint32_t values, uint32_t *ordered, int32_t *inner)
{
    const uint32_t mask = 0x000F000Fu, flip = 0x88888888u;
    uint32_t *from_one = ordered + ORDERED(values) / 2u;
    uint32_t i, first = 0;
    int32_t before = 0;             /* sum of t over the row's values */

    order_for_nibbles(t, values, ordered);
    order_for_nibbles(t + 1, values - 1u, from_one);
    for (i = 0; i < values; i++) {
        const uint8_t *word = q + (first >> 1);
        const uint32_t *pair = ordered;
        uint32_t count = i;
        int32_t sum = -8 * before;

        if ((first & 1u) != 0 && i != 0) {
            sum += (int32_t)((uint32_t)(*word >> 4) ^ 8u) * t[0];
            word++;
            pair = from_one;
            count--;
        }
        for (; count >= 8u; count -= 8u) {
            const uint32_t x = tvad_load32(word) ^ flip;

            sum = tvad_smlad(x & mask, pair[0], sum);
            sum = tvad_smlad(x >> 4 & mask, pair[1], sum);
            sum = tvad_smlad(x >> 8 & mask, pair[2], sum);
            sum = tvad_smlad(x >> 12 & mask, pair[3], sum);
            word += 4;
            pair += 4;
        }
        if (count != 0 && is_followed(i, values)) {
            const uint32_t x = (tvad_load32(word) ^ flip) & ((1u << 4u * count) - 1u);

            sum = tvad_smlad(x & mask, pair[0], sum);
            sum = tvad_smlad(x >> 4 & mask, pair[1], sum);
            sum = tvad_smlad(x >> 8 & mask, pair[2], sum);
            sum = tvad_smlad(x >> 12 & mask, pair[3], sum);
        } else {
            int32_t left = 0;
            uint32_t j;

            for (j = i - count; j < i; j++) {
                left += t[j];
            }
            sum += row_of_nibbles(word, 0, t + (i - count), count) + 8 * left;
        }
        inner[i] = sum;
        before += t[i];
        first += i;
    }
}

#else

static void multiply_bytes(const int8_t *q, const int16_t *t, uint32_t values, uint32_t *ordered, int32_t *inner)
{
    uint32_t i;

    (void)ordered;
    for (i = 0; i < values; i++) {
        inner[i] = row_of_bytes(q, t, i);
        q += i;
    }
}

static void multiply_nibbles(const uint8_t *q, const int16_t *t, uint32_t values, uint32_t *ordered, int32_t *inner)
{
    uint32_t i, first = 0;

    (void)ordered;
    for (i = 0; i < values; i++) {
        inner[i] = row_of_nibbles(q, first, t, i);
        first += i;
    }
}

#endif

/* r^2 of one row. */
static int64_t square(int64_t v, uint32_t a)
{
    const int32_t saturated = v < INT32_MIN ? INT32_MIN : v > INT32_MAX ? INT32_MAX : (int32_t)v;
    const int64_t product = (int64_t)saturated * a + (1 << 15);
    const int32_t high = (int32_t)(product >> 32);  /* r is below 2^20 where this is below 2^4 */
    const int32_t r = high > 15 ? RESIDUAL_LIMIT : high < -16 ? -RESIDUAL_LIMIT : (int32_t)(product >> 16);

    return (int64_t)r * r - (r < -RESIDUAL_LIMIT ? 2 * RESIDUAL_LIMIT + 1 : 0);     /* -2^20 counts as -(2^20 - 1) */
}

uint64_t tvad_triangle(const tvad_bank *bank, const uint32_t *tables, size_t place, const int16_t *t, void *scratch)
{
    const uint32_t values = bank->values;
    const uint8_t *a_code = (const uint8_t *)bank->codes.data + place * bank->codes.dim[2], *s_code = a_code + values;
    const uint32_t *a_table = tables, *s_table = tables + 256;
    const uint8_t *q;
    uint32_t *ordered = scratch;
    int32_t *inner = (int32_t *)scratch + ORDERED(values);
    int64_t total = 0;
    uint32_t i;

    if (bank->bits == 0) {
        for (i = 0; i < values; i++) {
            total += square(t[i] * 256, a_table[a_code[i]]);
        }
        return (uint64_t)total;
    }
    q = (const uint8_t *)bank->factor.data + place * bank->factor.dim[2];
    if (bank->bits == 8) {
        multiply_bytes((const int8_t *)q, t, values, ordered, inner);
    } else {
        multiply_nibbles(q, t, values, ordered, inner);
    }
    for (i = 0; i < values; i++) {
        const int64_t scaled = ((int64_t)inner[i] * s_table[s_code[i]] + (1 << 7)) >> 8;

        total += square(scaled + t[i] * 256, a_table[a_code[i]]);
    }
    return (uint64_t)total;
}
