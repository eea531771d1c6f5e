/* CFAS, CFA: how far a cell's described patch is from the nearest of K centres, less where two others are as near.
 *
 * 1. v = the cell's vector plus its grid row's and column's offsets, rounded and shifted: int16
 * 2. the three smallest squared distances of v to int8 centres: below 2^31, as tvad_open has checked
 * 3. their roots with 12 bits behind the point: below 2^28
 * 4. score = root 1 / (1 + exp(root 1 - root 2) + exp(root 1 - root 3)), exp from the bank's table, 16 bits behind the point
 *
 * A centre is left as soon as its partial sum reaches the third best, which changes nothing. The three that were nearest to the
 * cell before give a bound to start with: neighbours look alike. Python: tinyvad/detectors/centres.py; docs/SPEC.md, CFAS.
 */
#include "tvad_arithmetic.h"
#include "tvad_distance.h"
#include "tvad_internal.h"

#define NEAREST 3u
#define ROOT_BITS 28u               /* of a distance, */
#define FRACTION 12u                /* and those behind the point */
#define TABLE 512u                  /* values of exp; the last one serves all that is further */
#define ONE 65536u                  /* exp(0) */
#define MAX_SHIFT 7
#define MAX_STEP 19
#define LARGEST_SUM 0x7FFFFFFEu     /* of a squared distance: one more is still an int32 */
#define LARGEST_VALUE 32767u        /* of |v - centre| */
#define LEAD 8u                     /* values before the first look at the sum */

/* The largest |value| of `rows` rows of offsets. */
static uint32_t largest_offset(const tvad_bank *bank, uint32_t first, uint32_t rows)
{
    const int16_t *values = (const int16_t *)bank->bias.data + (size_t)first * bank->depth;
    size_t i, count = (size_t)rows * bank->depth;
    uint32_t most = 0;

    for (i = 0; i < count; i++) {
        const uint32_t size = (uint32_t)(values[i] < 0 ? -values[i] : values[i]);

        most = size > most ? size : most;
    }
    return most;
}

/* No squared distance passes its width. */
static int fits(const tvad_bank *bank)
{
    const uint32_t most = 128u + largest_offset(bank, 0, bank->grid_h) + largest_offset(bank, bank->grid_h, bank->grid_w);
    const uint32_t apart = ((most + ((uint32_t)1 << bank->shift >> 1)) >> bank->shift) + 128u;

    return apart <= LARGEST_VALUE && (uint64_t)bank->depth * (apart * apart) <= LARGEST_SUM;
}

tvad_status tvad_check_centres(tvad_bank *bank, const int32_t *config)
{
    const uint32_t depth = bank->depth;
    const uint32_t *table;
    tvad_section unit;
    uint32_t i;

    if (config[0] < (int32_t)NEAREST || config[1] != (int32_t)depth || config[2] < 0 || config[2] > MAX_SHIFT ||
        config[3] < 0 || config[3] > MAX_STEP) {
        return TVAD_ERROR_FIELD;
    }
    bank->rows = (uint32_t)config[0];
    bank->values = bank->depth;
    bank->shift = (uint8_t)config[2];
    bank->bits = (uint8_t)config[3];
    if (!tvad_take(bank, TVAD_TAG('S', 'C', 'A', 'L'), TVAD_F8, 1, 0, 0, &unit) ||
        !tvad_take(bank, TVAD_TAG('B', 'I', 'A', 'S'), TVAD_I2, (uint32_t)bank->grid_h + bank->grid_w, depth, 0, &bank->bias) ||
        !tvad_take(bank, TVAD_TAG('T', 'A', 'B', 'L'), TVAD_U4, TABLE, 0, 0, &bank->tables) ||
        !tvad_take(bank, TVAD_TAG('B', 'A', 'N', 'K'), TVAD_I1, bank->rows, depth, 0, &bank->vectors)) {
        return TVAD_ERROR_SECTION;
    }
    table = bank->tables.data;
    for (i = 0; i < TABLE; i++) {
        if (table[i] > ONE) {
            return TVAD_ERROR_FIELD;
        }
    }
    return tvad_is_positive(&unit) && fits(bank) ? TVAD_OK : TVAD_ERROR_FIELD;
}

uint32_t tvad_score_centres_scratch(const tvad_bank *bank)
{
    return TVAD_ALIGN16(2u * bank->depth);
}

/* v of cell number `place` of the grid, whose vector is the `cell`-th of parts; in the order of tvad_slot. */
static void make_query(const tvad_bank *bank, const int8_t *const parts[], uint32_t cell, uint32_t place, int16_t *query)
{
    const uint32_t depth = bank->depth, shift = bank->shift;
    const int32_t half = (int32_t)((uint32_t)1 << shift >> 1);
    const int16_t *down = (const int16_t *)bank->bias.data + (size_t)(place / bank->grid_w) * depth;
    const int16_t *across = (const int16_t *)bank->bias.data + (size_t)(bank->grid_h + place % bank->grid_w) * depth;
    uint32_t t, i, first = 0;

    for (t = 0; t < bank->taps; t++) {
        const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        const int8_t *values = parts[t] + (size_t)cell * channels;

        for (i = 0; i < channels; i++) {
            query[tvad_slot(first + i, depth)] = (int16_t)((values[i] + down[first + i] + across[first + i] + half) >> shift);
        }
        first += channels;
    }
}

/* The three smallest squared distances, ascending, and whose they are; nearest[] holds three centres to begin with. */
static void find_nearest(const tvad_bank *bank, const int16_t *query, int32_t *squared, uint32_t *nearest)
{
    const uint32_t depth = bank->depth, lead = depth >= LEAD ? LEAD : 0;
    const int8_t *row = bank->vectors.data;
    int32_t limit = 0;
    uint32_t i, k;

    for (i = 0; i < NEAREST; i++) {
        limit = tvad_max(limit, tvad_distance(query, row + (size_t)nearest[i] * depth, depth, 0));
    }
    for (i = 0; i < NEAREST; i++) {
        squared[i] = limit + 1;     /* those three are found again */
    }
    for (k = 0; k < bank->rows; k++) {
        int32_t sum = lead != 0 ? tvad_distance8(query, row, 0) : 0;

        if (sum < squared[NEAREST - 1u]) {
            sum = tvad_add_below(query + lead, row + lead, depth - lead, sum, squared[NEAREST - 1u]);
        }
        if (sum < squared[NEAREST - 1u]) {
            for (i = NEAREST - 1u; i > 0 && sum < squared[i - 1u]; i--) {
                squared[i] = squared[i - 1u];
                nearest[i] = nearest[i - 1u];
            }
            squared[i] = sum;
            nearest[i] = k;
        }
        row += depth;
    }
}

/* 2^12 times the root, cut. */
static uint32_t root_of(uint32_t squared)
{
    uint64_t rest = (uint64_t)squared << 2u * FRACTION;
    uint32_t root = 0, bit;

    for (bit = (uint32_t)1 << (ROOT_BITS - 1u); bit != 0; bit >>= 1) {
        const uint64_t tried = (uint64_t)(2u * root + bit) * bit;       /* (root + bit)^2 - root^2 */

        if (rest >= tried) {
            rest -= tried;
            root += bit;
        }
    }
    return root;
}

/* 2^16 exp(-difference), interpolated. */
static uint32_t exp_of(const tvad_bank *bank, uint32_t difference)
{
    const uint32_t *table = bank->tables.data, at = difference >> bank->bits, span = (uint32_t)1 << bank->bits;
    const uint32_t part = difference & (span - 1u);

    if (at >= TABLE - 1u) {
        return table[TABLE - 1u];
    }
    return (uint32_t)(((uint64_t)table[at] * (span - part) + (uint64_t)table[at + 1u] * part) >> bank->bits);
}

void tvad_score_centres(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position,
                        uint32_t cells, uint32_t *distances, void *scratch)
{
    int16_t *query = scratch;
    int32_t squared[NEAREST];
    uint32_t nearest[NEAREST] = {0, 1, 2}, cell;

    (void)task;                     /* one descriptor and its centres for all tasks */
    for (cell = 0; cell < cells; cell++) {
        uint32_t roots[NEAREST], weight, i;

        make_query(bank, parts, cell, position + cell, query);
        find_nearest(bank, query, squared, nearest);
        for (i = 0; i < NEAREST; i++) {
            roots[i] = root_of((uint32_t)squared[i]);
        }
        weight = ONE + exp_of(bank, roots[1] - roots[0]) + exp_of(bank, roots[2] - roots[0]);
        distances[cell] = (uint32_t)(((uint64_t)roots[0] * (UINT32_MAX / weight)) >> 16);
    }
}
