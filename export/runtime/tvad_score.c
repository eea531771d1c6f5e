/* Vectors of grid cells in, a map of squared distances and the image's score out; and the same from tapped maps.
 *
 * tvad_score keeps one grid row of vectors: it embeds a row of every tap, scores it and goes on to the next. Its scratch:
 *     map uint32 (grid_h, grid_w) | per tap int8 (grid_w, C) | scratch of the embedding or the scorer, whichever is larger
 * Of a bank of several tasks it embeds the last tap twice: first to find the image's task, in the same scratch:
 *     signature int32 (C) | last tap int8 (grid_w, C) | scratch of its embedding
 * each part rounded up to 16 bytes. A bank of student and teacher reads the tapped maps in place:
 *     map uint32 (grid_h, grid_w) | scratch of the scorer
 * tinyvad.detectors.score_bytes is its twin in Python. What is needed does not depend on the
 * number of tasks, nor on there being prototypes: a bank that learns a second product needs no more.
 */
#include "tvad_internal.h"
#include "tvad_kernels.h"

static uint32_t map_bytes(const tvad_bank *bank)
{
    return TVAD_ALIGN16(4u * bank->grid_h * bank->grid_w);      /* below 2^26: tvad_open bounds the grid, by TAPS */
}

static uint32_t row_bytes(const tvad_bank *bank, uint32_t tap)
{
    return TVAD_ALIGN16(bank->grid_w * (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * tap + TVAD_TAP_C]);   /* below 2^29 */
}

static uint32_t signature_bytes(const tvad_bank *bank)
{
    return TVAD_ALIGN16(4u * tvad_last_channels(bank));
}

static uint32_t work_bytes(const tvad_bank *bank)
{
    uint32_t t, most = tvad_score_parts_scratch(bank);

    for (t = 0; t < bank->taps; t++) {
        uint32_t bytes = tvad_embed_scratch(bank, t);

        most = bytes > most ? bytes : most;
    }
    return most;
}

uint64_t tvad_score_need(const tvad_bank *bank)
{
    const uint32_t last = bank->taps - 1u;
    const uint64_t routing = (uint64_t)signature_bytes(bank) + row_bytes(bank, last) + tvad_embed_scratch(bank, last);
    uint64_t scoring = (uint64_t)map_bytes(bank);
    uint32_t t;

    if (tvad_is_native(bank)) {
        return scoring + tvad_score_parts_scratch(bank);        /* the tapped maps are the parts */
    }
    scoring += work_bytes(bank);
    for (t = 0; t < bank->taps; t++) {
        scoring += row_bytes(bank, t);
    }
    return routing > scoring ? routing : scoring;
}

size_t tvad_score_bytes(const tvad_bank *bank)
{
    return (size_t)tvad_score_need(bank);                       /* at most INT32_MAX, or tvad_open had refused the bank */
}

static uint32_t scorer_scratch(const tvad_bank *bank)
{
    switch (bank->kind) {
    case TVAD_KIND_CORE:
        return tvad_score_core_scratch(bank);
    case TVAD_KIND_PQPC:
        return tvad_score_pq_scratch(bank);
    case TVAD_KIND_STFP:
        return tvad_score_pairs_scratch(bank);
    case TVAD_KIND_LINR:
        return tvad_score_linear_scratch(bank);
    case TVAD_KIND_CFAS:
        return tvad_score_centres_scratch(bank);
    default:
        return tvad_score_padim_scratch(bank);
    }
}

uint32_t tvad_score_parts_scratch(const tvad_bank *bank)
{
    const uint32_t signature = signature_bytes(bank), scorer = scorer_scratch(bank);

    return signature > scorer ? signature : scorer;
}

int8_t tvad_vector_value(tvad_vector *vector, uint32_t channel)
{
    const int32_t *rows = vector->bank->tap_rows;
    uint32_t width = (uint32_t)rows[TVAD_TAP_FIELDS * vector->tap + TVAD_TAP_C];

    while (channel < vector->first) {
        vector->tap--;
        width = (uint32_t)rows[TVAD_TAP_FIELDS * vector->tap + TVAD_TAP_C];
        vector->first -= width;
    }
    while (channel >= vector->first + width) {
        vector->first += width;
        vector->tap++;
        width = (uint32_t)rows[TVAD_TAP_FIELDS * vector->tap + TVAD_TAP_C];
    }
    return vector->parts[vector->tap][(size_t)vector->cell * width + (channel - vector->first)];
}

static void score_cells(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position,
                        uint32_t cells, uint32_t *distances, void *scratch)
{
    switch (bank->kind) {
    case TVAD_KIND_CORE:
        tvad_score_core(bank, task, parts, position, cells, distances, scratch);
        break;
    case TVAD_KIND_PQPC:
        tvad_score_pq(bank, task, parts, position, cells, distances, scratch);
        break;
    case TVAD_KIND_LINR:
        tvad_score_linear(bank, task, parts, position, cells, distances, scratch);
        break;
    case TVAD_KIND_CFAS:
        tvad_score_centres(bank, task, parts, position, cells, distances, scratch);
        break;
    default:
        tvad_score_padim(bank, task, parts, position, cells, distances, scratch);
        break;
    }
}

/* The largest distance, and the first place where it stands. */
static void find_result(const tvad_bank *bank, uint32_t task, const uint32_t *map, tvad_result *result)
{
    uint32_t cells = (uint32_t)bank->grid_h * bank->grid_w, best = 0, i;

    for (i = 1; i < cells; i++) {
        if (map[i] > map[best]) {
            best = i;
        }
    }
    result->score = map[best];
    result->row = (uint16_t)(best / bank->grid_w);
    result->column = (uint16_t)(best % bank->grid_w);
    result->grid_h = bank->grid_h;
    result->grid_w = bank->grid_w;
    result->label = map[best] >= bank->thresholds[task];
    result->task = (uint8_t)task;
    result->map = map;
}

void tvad_score_parts(const tvad_bank *bank, const int8_t *const parts[], uint32_t *map, void *scratch, tvad_result *result)
{
    uint32_t task = 0;

    if (bank->tasks > 1u) {
        tvad_signature(bank, parts, scratch);
        task = tvad_route(bank, scratch);
    }
    if (tvad_is_native(bank)) {
        tvad_score_pairs(bank, parts, map, scratch);
    } else {
        score_cells(bank, task, parts, 0, (uint32_t)bank->grid_h * bank->grid_w, map, scratch);
    }
    find_result(bank, task, map, result);
}

/* The task of an image whose last tap is `map`, a grid row at a time. */
static uint32_t find_task(const tvad_bank *bank, const int8_t *map, void *scratch)
{
    const uint32_t last = bank->taps - 1u;
    int32_t *signature = scratch;
    int8_t *row = (int8_t *)scratch + signature_bytes(bank), *work = row + row_bytes(bank, last);
    uint32_t y, c;

    for (c = 0; c < tvad_last_channels(bank); c++) {
        signature[c] = 0;
    }
    for (y = 0; y < bank->grid_h; y++) {
        tvad_embed_rows(bank, last, map, y, 1, row, work);
        tvad_add_signature(bank, row, bank->grid_w, signature);
    }
    return tvad_route(bank, signature);
}

/* Is `scratch` what tvad_score_bytes asks for? */
static int is_enough(const tvad_bank *bank, const void *scratch, size_t scratch_bytes)
{
    return scratch != NULL && ((uintptr_t)scratch & 15u) == 0 && scratch_bytes >= tvad_score_bytes(bank);
}

tvad_status tvad_score(const tvad_bank *bank, const int8_t *const taps[], void *scratch, size_t scratch_bytes,
                       tvad_result *result)
{
    uint32_t *map = scratch;
    int8_t *at = scratch, *rows[TVAD_MAX_TAPS];
    const int8_t *parts[TVAD_MAX_TAPS];
    uint32_t y, t, task;

    if (!is_enough(bank, scratch, scratch_bytes)) {
        return TVAD_ERROR_ARENA;
    }
    if (tvad_is_native(bank)) {
        tvad_score_parts(bank, taps, map, at + map_bytes(bank), result);
        return TVAD_OK;
    }
    task = bank->tasks > 1u ? find_task(bank, taps[bank->taps - 1u], scratch) : 0;
    at += map_bytes(bank);
    for (t = 0; t < bank->taps; t++) {
        rows[t] = at;
        parts[t] = at;
        at += row_bytes(bank, t);
    }
    for (y = 0; y < bank->grid_h; y++) {
        for (t = 0; t < bank->taps; t++) {
            tvad_embed_rows(bank, t, taps[t], y, 1, rows[t], at);
        }
        score_cells(bank, task, parts, y * bank->grid_w, bank->grid_w, map + y * bank->grid_w, at);
    }
    find_result(bank, task, map, result);
    return TVAD_OK;
}

tvad_status tvad_self_test(const tvad_bank *bank, void *scratch, size_t scratch_bytes)
{
    const int8_t *parts[TVAD_MAX_TAPS], *vectors = bank->test.data;
    const uint32_t *gold = bank->gold.data;
    uint32_t i, t, count = bank->gold.nbytes / 12u;             /* (n, 3) uint32; 0 where there is none */

    if (!is_enough(bank, scratch, scratch_bytes)) {
        return TVAD_ERROR_ARENA;
    }
    for (i = 0; i < count; i++) {
        uint32_t distance, first = 0;

        if (tvad_is_native(bank)) {
            if (tvad_score_pairs_vector(bank, vectors + (size_t)i * bank->depth) != gold[3 * i + 2]) {
                return TVAD_ERROR_CRC;
            }
            continue;
        }
        for (t = 0; t < bank->taps; t++) {
            parts[t] = vectors + (size_t)i * bank->depth + first;
            first += (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        }
        score_cells(bank, gold[3 * i], parts, gold[3 * i + 1], 1, &distance, scratch);
        if (distance != gold[3 * i + 2]) {
            return TVAD_ERROR_CRC;
        }
    }
    return TVAD_OK;
}
