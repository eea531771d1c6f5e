/* PQPC, PatchCore-Lite's product-quantised memory bank: squared distance to the nearest of K decoded vectors.
 *
 * 1. Tables: T[j][v] = squared distance of the cell's part j to centroid v of subspace j (asymmetric distances, Jegou et
 *    al. 2011). Subspaces are orthogonal, so the sum over j of T[j][code j] is the exact distance to the decoded vector.
 * 2. Search in stages of four subspaces: after each, the row is left if its sum plus the least that the other subspaces can
 *    add reaches the best one. That changes no minimum: the two-stage search without its approximation. The row that was
 *    nearest to the cell before comes first.
 * All sums stay below D * 255^2 < 2^31.
 */
#include <string.h>

#include "tvad_distance.h"
#include "tvad_internal.h"

#define STAGE 4u                    /* subspaces between two looks at the sum; a power of two, at least 2 */

#define GROUPED(width) (((width) + 3u) & ~3u)

typedef struct {
    const uint8_t *codes;           /* of the task's first row */
    const uint32_t *tables;         /* (subspaces, centroids) */
    const uint32_t *rest;           /* (subspaces + 1): what subspaces j and after add at least */
    uint32_t rows, row_bytes, subspaces, centroids;
} search;

/* The query of one subspace, int16 in whole groups of four; the tables; rest. */
uint32_t tvad_score_pq_scratch(const tvad_bank *bank)
{
    const uint32_t subspaces = bank->subspaces, centroids = bank->codebook.dim[1], width = bank->codebook.dim[2];

    return TVAD_ALIGN16(2u * GROUPED(width)) + TVAD_ALIGN16(4u * subspaces * centroids) +
           TVAD_ALIGN16(4u * (subspaces + 1u));
}

/* Distance to one centroid, no byte beyond it read. */
static uint32_t one_distance(const int16_t *part, const int8_t *centroid, uint32_t width)
{
    uint32_t i;
    int32_t sum = 0;

    for (i = 0; i < width; i++) {
        const int32_t difference = part[tvad_slot(i, GROUPED(width))] - centroid[i];

        sum += difference * difference;
    }
    return (uint32_t)sum;
}

#if TVAD_DSP && !TVAD_MVE

/* Two centroids of two values each: a word is (first of both), (second of both). Returns how many are done. */
static uint32_t fill_pairs(const int16_t *part, const int8_t *centroids, uint32_t count, uint32_t *table)
{
    const uint32_t first = tvad_pack_low(tvad_load32(part), tvad_load32(part));
    const uint32_t second = tvad_pack_low(tvad_load32(part + 2), tvad_load32(part + 2));
    uint32_t v;

    for (v = 0; v + 2u <= count; v += 2u) {
        const uint32_t word = tvad_load32(centroids + 2u * v);
        const uint32_t a = tvad_subtract16(first, tvad_sxtb16(word)), b = tvad_subtract16(second, tvad_sxtb16_ror8(word));

        table[v] = (uint32_t)tvad_smlabb(b, b, tvad_smlabb(a, a, 0));
        table[v + 1u] = (uint32_t)tvad_smlatt(b, b, tvad_smlatt(a, a, 0));
    }
    return v;
}

/* One word of values of `count` centroids, two at a time; `adds` to what the table holds. */
static inline void fill_word(const int16_t *query, const int8_t *at, uint32_t count, uint32_t width, uint32_t mask,
                             int adds, uint32_t *table)
{
    const uint32_t even = tvad_load32(query), odd = tvad_load32(query + 2);
    uint32_t v;

    for (v = 0; v < count; v += 2u) {
        const uint32_t x = tvad_load32(at) & mask, y = tvad_load32(at + width) & mask;
        int32_t a = adds ? (int32_t)table[0] : 0, b = adds ? (int32_t)table[1] : 0;

        a = tvad_add_square(even, tvad_sxtb16(x), a);
        b = tvad_add_square(even, tvad_sxtb16(y), b);
        table[0] = (uint32_t)tvad_add_square(odd, tvad_sxtb16_ror8(x), a);
        table[1] = (uint32_t)tvad_add_square(odd, tvad_sxtb16_ror8(y), b);
        table += 2;
        at += 2u * width;
    }
}

/* Centroids of any width, a word of four values after the other. What the last word holds beyond the width is masked out
 * and stands against 0 in the query. It may reach into the next centroid, so the last one or two are left out. Returns how
 * many are done. */
static uint32_t fill_words(const int16_t *part, const int8_t *centroids, uint32_t count, uint32_t width, uint32_t *table)
{
    const uint32_t last = (width & 3u) == 0 ? UINT32_MAX : (1u << 8u * (width & 3u)) - 1u;
    const uint32_t most = count < 3u ? 0 : (count - 1u) & ~1u;
    uint32_t i;

    fill_word(part, centroids, most, width, width < 4u ? last : UINT32_MAX, 0, table);
    for (i = 4; i < width; i += 4u) {
        fill_word(part + i, centroids + i, most, width, i + 4u > width ? last : UINT32_MAX, 1, table);
    }
    return most;
}

static uint32_t fill_most(const int16_t *part, const int8_t *centroids, uint32_t count, uint32_t width, uint32_t *table)
{
    return width == 2u ? fill_pairs(part, centroids, count, table) : fill_words(part, centroids, count, width, table);
}

#else

static uint32_t fill_most(const int16_t *part, const int8_t *centroids, uint32_t count, uint32_t width, uint32_t *table)
{
    uint32_t v;

    for (v = 0; v < count; v++) {
        table[v] = (uint32_t)tvad_distance(part, centroids, width, 0);
        centroids += width;
    }
    return v;
}

#endif

/* The table of one subspace; returns its smallest entry. */
static uint32_t fill_table(const int16_t *part, const int8_t *centroids, uint32_t count, uint32_t width, uint32_t *table)
{
    uint32_t v, least = UINT32_MAX;

    for (v = fill_most(part, centroids, count, width, table); v < count; v++) {
        table[v] = one_distance(part, centroids + (size_t)v * width, width);
    }
    for (v = 0; v < count; v++) {
        least = least < table[v] ? least : table[v];
    }
    return least;
}

/* The code of subspace j in a row, 8 or 4 bits. */
static inline uint32_t code(const uint8_t *row, uint32_t j, uint32_t bits)
{
    return bits == 8u ? row[j] : (uint32_t)row[j >> 1] >> 4u * (j & 1u) & 15u;
}

/* `sum` and what subspaces `j` and after add, or any number from `best` on if it is not below it. */
static inline uint32_t add_stages(const search *s, const uint8_t *row, uint32_t bits, uint32_t j, uint32_t sum,
                                  uint32_t best)
{
    const uint32_t *table = s->tables + (size_t)j * s->centroids;

    for (; j + STAGE <= s->subspaces && sum + s->rest[j] < best; j += STAGE) {
        sum += table[code(row, j, bits)];
        table += s->centroids;
        sum += table[code(row, j + 1u, bits)];
        table += s->centroids;
        sum += table[code(row, j + 2u, bits)];
        table += s->centroids;
        sum += table[code(row, j + 3u, bits)];
        table += s->centroids;
    }
    if (sum + s->rest[j] >= best) {
        return best;
    }
    for (; j < s->subspaces; j++) {
        sum += table[code(row, j, bits)];
        table += s->centroids;
    }
    return sum;
}

static TVAD_NOINLINE uint32_t add_bytes(const search *s, const uint8_t *row, uint32_t j, uint32_t sum, uint32_t best)
{
    return add_stages(s, row, 8, j, sum, best);
}

static TVAD_NOINLINE uint32_t add_nibbles(const search *s, const uint8_t *row, uint32_t j, uint32_t sum, uint32_t best)
{
    return add_stages(s, row, 4, j, sum, best);
}

/* The smallest sum below `best` over all rows, else `best`, and whose it was. Most rows end after their first stage. */
static inline uint32_t scan(const search *s, uint32_t bits, uint32_t best, uint32_t *nearest)
{
    const uint32_t lead = s->subspaces >= STAGE ? STAGE : 0, rest = s->rest[lead], step = lead != 0 ? s->centroids : 0;
    const uint32_t *a = s->tables, *b = a + step, *c = b + step, *d = c + step;
    const uint8_t *row = s->codes;
    uint32_t k;

    for (k = 0; k < s->rows; k++) {
        uint32_t sum = 0;

        if (lead != 0) {
            sum = a[code(row, 0, bits)] + b[code(row, 1, bits)] + c[code(row, 2, bits)] + d[code(row, 3, bits)];
        }
        if (sum + rest < best) {
            sum = bits == 8u ? add_bytes(s, row, lead, sum, best) : add_nibbles(s, row, lead, sum, best);
            if (sum < best) {
                best = sum;
                *nearest = k;
            }
        }
        row += s->row_bytes;
    }
    return best;
}

static TVAD_NOINLINE uint32_t scan_bytes(const search *s, uint32_t best, uint32_t *nearest)
{
    return scan(s, 8, best, nearest);
}

static TVAD_NOINLINE uint32_t scan_nibbles(const search *s, uint32_t best, uint32_t *nearest)
{
    return scan(s, 4, best, nearest);
}

void tvad_score_pq(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position, uint32_t cells,
                   uint32_t *distances, void *scratch)
{
    const uint32_t subspaces = bank->subspaces, centroids = bank->codebook.dim[1], width = bank->codebook.dim[2];
    const uint32_t depth = subspaces * width;
    const uint16_t *indices = (const uint16_t *)bank->indices.data + (size_t)task * depth;
    const int8_t *codebook = (const int8_t *)bank->codebook.data + (size_t)task * depth * centroids;
    int16_t *part = scratch;
    uint32_t *tables = (uint32_t *)(void *)((uint8_t *)scratch + TVAD_ALIGN16(2u * GROUPED(width)));
    uint32_t *rest = (uint32_t *)(void *)((uint8_t *)tables + TVAD_ALIGN16(4u * subspaces * centroids));
    search s;
    tvad_vector vector;
    uint32_t cell, i, j, nearest = 0;

    (void)position;                 /* one bank for all cells */
    s.row_bytes = bank->codes.dim[1];
    s.codes = (const uint8_t *)bank->codes.data + (size_t)tvad_task_first(bank, task) * s.row_bytes;
    s.tables = tables;
    s.rest = rest;
    s.rows = tvad_task_rows(bank, task);
    s.subspaces = subspaces;
    s.centroids = centroids;
    rest[subspaces] = 0;
    vector.bank = bank;
    vector.parts = parts;
    vector.tap = 0;
    vector.first = 0;
    memset(part, 0, 2u * GROUPED(width));
    for (cell = 0; cell < cells; cell++) {
        const uint8_t *row;
        uint32_t best, above = 0;

        vector.cell = cell;
        for (j = subspaces; j-- > 0;) {
            for (i = 0; i < width; i++) {
                part[tvad_slot(i, GROUPED(width))] = tvad_vector_value(&vector, indices[j * width + i]);
            }
            above += fill_table(part, codebook + (size_t)j * centroids * width, centroids, width, tables + j * centroids);
            rest[j] = above;
        }
        row = s.codes + (size_t)nearest * s.row_bytes;
        if (bank->bits == 8) {
            best = scan_bytes(&s, add_bytes(&s, row, 0, 0, UINT32_MAX), &nearest);
        } else {
            best = scan_nibbles(&s, add_nibbles(&s, row, 0, 0, UINT32_MAX), &nearest);
        }
        distances[cell] = best;
    }
}
