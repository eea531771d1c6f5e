/* CORE, PatchCore's memory bank: squared distance of every cell's vector to the nearest of K int8 vectors.
 *
 * A row is left as soon as its partial sum reaches the best one, which changes no minimum. The row that was nearest to the
 * cell before comes first: neighbours look alike, and with a small best from the start most rows end early. Sums stay below
 * D * 255^2 < 2^31.
 */
#include "tvad_distance.h"
#include "tvad_internal.h"

#define STAGE 8u                    /* values between two looks at the sum */

uint32_t tvad_score_core_scratch(const tvad_bank *bank)
{
    return TVAD_ALIGN16(2u * bank->depth);
}

TVAD_NOINLINE int32_t tvad_add_below(const int16_t *query, const int8_t *row, uint32_t count, int32_t sum, int32_t limit)
{
    for (; count >= STAGE && sum < limit; count -= STAGE) {
        sum = tvad_distance8(query, row, sum);
        query += STAGE;
        row += STAGE;
    }
    return sum < limit ? tvad_distance(query, row, count, sum) : sum;
}

/* Most rows end after their first stage. */
TVAD_NOINLINE int32_t tvad_scan_rows(const int16_t *query, const int8_t *row, uint32_t rows, uint32_t depth, int32_t best,
                                     uint32_t *nearest)
{
    const uint32_t lead = depth >= STAGE ? STAGE : 0;
    uint32_t k;

    for (k = 0; k < rows; k++) {
        int32_t sum = lead != 0 ? tvad_distance8(query, row, 0) : 0;

        if (sum < best) {
            sum = tvad_add_below(query + lead, row + lead, depth - lead, sum, best);
            if (sum < best) {
                best = sum;
                *nearest = k;
            }
        }
        row += depth;
    }
    return best;
}

void tvad_make_query(const tvad_bank *bank, const int8_t *const parts[], uint32_t cell, int16_t *query)
{
    uint32_t t, i, first = 0;

    for (t = 0; t < bank->taps; t++) {
        const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        const int8_t *values = parts[t] + (size_t)cell * channels;

        for (i = 0; i < channels; i++) {
            query[tvad_slot(first + i, bank->depth)] = values[i];
        }
        first += channels;
    }
}

void tvad_score_core(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position, uint32_t cells,
                     uint32_t *distances, void *scratch)
{
    const uint32_t depth = bank->depth, rows = tvad_task_rows(bank, task);
    const int8_t *vectors = (const int8_t *)bank->vectors.data + (size_t)tvad_task_first(bank, task) * depth;
    int16_t *query = scratch;
    uint32_t cell, nearest = 0;

    (void)position;                 /* one bank for all cells */
    for (cell = 0; cell < cells; cell++) {
        int32_t best;

        tvad_make_query(bank, parts, cell, query);
        best = tvad_distance(query, vectors + (size_t)nearest * depth, depth, 0);
        distances[cell] = (uint32_t)tvad_scan_rows(query, vectors, rows, depth, best, &nearest);
    }
}
