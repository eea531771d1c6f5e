/* PQPC, PatchCore-Lite's product-quantised memory bank: squared distance to the nearest of K decoded vectors.
 *
 * 1. Tables: T[j][v] = squared distance of the cell's part j to centroid v of subspace j (asymmetric distances, Jegou et al.
 *    2011). Subspaces are orthogonal, so the sum over j of T[j][code j] is the exact distance to the decoded vector.
 * 2. Search in stages of four subspaces: after each, the row is left if its sum plus the least that the other subspaces can
 *    add reaches the best one. That changes no minimum: the two-stage search without its approximation. The row that was
 *    nearest to the cell before comes first.
 * All sums stay below D * 255^2 < 2^31.
 */
#include "tvad_distance.h"
#include "tvad_internal.h"

#define STAGE 4u                    /* subspaces between two looks at the sum; even, for codes of 4 bits */

typedef struct {
    const uint8_t *codes;
    const uint32_t *tables;         /* (subspaces, centroids) */
    const uint32_t *rest;           /* (subspaces): what subspaces j and after add at least */
    uint32_t subspaces, centroids;
} search;

uint32_t tvad_score_pq_scratch(const tvad_bank *bank)
{
    const uint32_t subspaces = bank->subspaces, centroids = bank->codebook.dim[1];

    return TVAD_ALIGN16(2u * bank->depth) + TVAD_ALIGN16(4u * subspaces * centroids) + TVAD_ALIGN16(4u * subspaces);
}

/* A table of one subspace; returns its smallest entry. */
static uint32_t fill_table(const int16_t *part, const int8_t *centroids, uint32_t count, uint32_t width, uint32_t *table)
{
    uint32_t v = 0, least = UINT32_MAX;

#if TVAD_DSP && !TVAD_MVE
    if (width == 2u) {              /* two centroids a word: (first of both), (second of both) */
        uint32_t first = tvad_pack_low((uint32_t)(int32_t)part[0], (uint32_t)(int32_t)part[0]);
        uint32_t second = tvad_pack_low((uint32_t)(int32_t)part[1], (uint32_t)(int32_t)part[1]);

        for (; v + 2u <= count; v += 2u) {
            uint32_t word = tvad_load32(centroids + 2u * v);
            uint32_t a = tvad_subtract16(first, tvad_sxtb16(word)), b = tvad_subtract16(second, tvad_sxtb16_ror8(word));
            uint32_t low = (uint32_t)tvad_smlabb(b, b, tvad_smlabb(a, a, 0));
            uint32_t high = (uint32_t)tvad_smlatt(b, b, tvad_smlatt(a, a, 0));

            table[v] = low;
            table[v + 1u] = high;
            low = low < high ? low : high;
            least = least < low ? least : low;
        }
    }
#endif
    for (; v < count; v++) {
        table[v] = (uint32_t)tvad_distance(part, centroids + (size_t)v * width, width, 0);
        least = least < table[v] ? least : table[v];
    }
    return least;
}

/* Sum of one row's table entries with codes of 8 bits, or any number from `limit` on if it is not below it. */
static uint32_t sum_bytes(const search *s, const uint8_t *codes, uint32_t limit)
{
    const uint32_t *table = s->tables;
    uint32_t j, sum = 0;

    for (j = 0; j + STAGE <= s->subspaces; j += STAGE) {
        if (sum + s->rest[j] >= limit) {
            return limit;
        }
        sum += table[codes[j]];
        table += s->centroids;
        sum += table[codes[j + 1u]];
        table += s->centroids;
        sum += table[codes[j + 2u]];
        table += s->centroids;
        sum += table[codes[j + 3u]];
        table += s->centroids;
    }
    for (; j < s->subspaces; j++) {
        sum += table[codes[j]];
        table += s->centroids;
    }
    return sum;
}

/* The same with codes of 4 bits, low nibble first. */
static uint32_t sum_nibbles(const search *s, const uint8_t *codes, uint32_t limit)
{
    const uint32_t *table = s->tables;
    uint32_t j, sum = 0;

    for (j = 0; j + STAGE <= s->subspaces; j += STAGE) {
        uint32_t low = codes[0], high = codes[1];

        if (sum + s->rest[j] >= limit) {
            return limit;
        }
        sum += table[low & 15u];
        table += s->centroids;
        sum += table[low >> 4];
        table += s->centroids;
        sum += table[high & 15u];
        table += s->centroids;
        sum += table[high >> 4];
        table += s->centroids;
        codes += STAGE / 2u;
    }
    for (; j < s->subspaces; j++) {
        sum += table[(uint32_t)codes[0] >> 4u * (j & 1u) & 15u];
        table += s->centroids;
        codes += j & 1u;
    }
    return sum;
}

void tvad_score_pq(const tvad_bank *bank, const int8_t *const parts[], uint32_t position, uint32_t cells,
                   uint32_t *distances, void *scratch)
{
    const uint32_t subspaces = bank->subspaces, centroids = bank->codebook.dim[1], width = bank->codebook.dim[2];
    const uint16_t *indices = bank->indices.data;
    const int8_t *codebook = bank->codebook.data;
    const size_t row_bytes = bank->codes.dim[1];
    int16_t *query = scratch;
    uint32_t *tables = (uint32_t *)(void *)((uint8_t *)scratch + TVAD_ALIGN16(2u * bank->depth));
    uint32_t *rest = (uint32_t *)(void *)((uint8_t *)tables + TVAD_ALIGN16(4u * subspaces * centroids));
    search s;
    tvad_vector vector;
    uint32_t cell, i, j, k, nearest = 0;

    (void)position;                 /* one bank for all cells */
    s.codes = bank->codes.data;
    s.tables = tables;
    s.rest = rest;
    s.subspaces = subspaces;
    s.centroids = centroids;
    vector.bank = bank;
    vector.parts = parts;
    vector.tap = 0;
    vector.first = 0;
    for (cell = 0; cell < cells; cell++) {
        uint32_t best = UINT32_MAX, above = 0;

        vector.cell = cell;
        for (j = 0; j < subspaces; j++) {
            for (i = 0; i < width; i++) {
                query[j * width + tvad_slot(i, width)] = tvad_vector_value(&vector, indices[j * width + i]);
            }
        }
        for (j = subspaces; j > 0; j--) {
            above += fill_table(query + (j - 1) * width, codebook + (size_t)(j - 1) * centroids * width, centroids, width,
                                tables + (j - 1) * centroids);
            rest[j - 1] = above;
        }
        best = bank->bits == 8 ? sum_bytes(&s, s.codes + nearest * row_bytes, best)
                               : sum_nibbles(&s, s.codes + nearest * row_bytes, best);
        for (k = 0; k < bank->rows; k++) {
            uint32_t sum = bank->bits == 8 ? sum_bytes(&s, s.codes + k * row_bytes, best)
                                           : sum_nibbles(&s, s.codes + k * row_bytes, best);

            if (sum < best) {
                best = sum;
                nearest = k;
            }
        }
        distances[cell] = best;
    }
}
