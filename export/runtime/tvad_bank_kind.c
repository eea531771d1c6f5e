/* What scoring demands of a bank whose bytes are sound: every section that its kind needs, of the right shape, with values
 * for which no sum passes its width. The rules are those of docs/SPEC.md, "What scoring demands"; their home in Python is
 * tinyvad.detectors.check_bank. STEP and META are for tools and are not looked at.
 */
#include "tvad_internal.h"

#define ALIGNMENT_DENOMINATOR 2u    /* of bilinear interpolation, a cell */
#define MAX_DISTANCE_DEPTH 33025u   /* D * 255^2 stays below 2^31 */
#define MAX_DEPTH 65535u
#define MAX_VALUES 512              /* d of the PaDiM kinds: inner sums stay below 2^24 */
#define TABLE_SHIFT 16
#define MAX_TASKS 255u
#define MAX_CELLS 65536u            /* of a grid with prototypes: the sums of tvad_route stay within their widths */
#define LADDER_PAIR 2u              /* rows, threshold */
#define LEARNING_NUMBERS 8u
#define LEARNING_ZEROS 3u           /* the last of them */

int tvad_take(const tvad_bank *bank, uint32_t tag, uint32_t dtype, uint32_t dim0, uint32_t dim1, uint32_t dim2,
              tvad_section *section)
{
    uint32_t ndim = dim1 == 0 ? 1u : dim2 == 0 ? 2u : 3u;

    return dim0 != 0 && tvad_find_section(bank->base, tag, section) && section->dtype == dtype && section->ndim == ndim &&
           section->dim[0] == dim0 && (ndim < 2 || section->dim[1] == dim1) && (ndim < 3 || section->dim[2] == dim2);
}

/* What the rows of an axis' matrix add up to at most; below 2^20. */
static uint32_t denominator(uint32_t size, uint32_t grid, uint32_t pool)
{
    return (size >= grid ? size : ALIGNMENT_DENOMINATOR * grid) * pool;
}

/* TAPS: field ranges, and |q - zero point| times a row of each axis' matrix, shifted, within int32. */
static tvad_status check_taps(tvad_bank *bank)
{
    static const int32_t low[TVAD_TAP_FIELDS] = {1, 1, 1, -128, 0, -31, 1, 0};
    static const int32_t high[TVAD_TAP_FIELDS] = {4096, 4096, 4096, 127, INT32_MAX, 30, 7, 0};
    tvad_section section;
    uint32_t t, f, depth = 0;

    if (bank->taps > TVAD_MAX_TAPS ||
        !tvad_take(bank, TVAD_TAG('T', 'A', 'P', 'S'), TVAD_I4, bank->taps, TVAD_TAP_FIELDS, 0, &section)) {
        return TVAD_ERROR_SECTION;
    }
    bank->tap_rows = section.data;
    for (t = 0; t < bank->taps; t++) {
        const int32_t *row = bank->tap_rows + TVAD_TAP_FIELDS * t;
        uint32_t pool, shift;
        uint64_t reach, values;

        for (f = 0; f < TVAD_TAP_FIELDS; f++) {
            if (row[f] < low[f] || row[f] > high[f]) {
                return TVAD_ERROR_FIELD;
            }
        }
        pool = (uint32_t)row[TVAD_TAP_POOL];
        if ((pool & 1u) == 0 || row[TVAD_TAP_POOL] != bank->tap_rows[TVAD_TAP_POOL]) {
            return TVAD_ERROR_FIELD;
        }
        shift = row[TVAD_TAP_SHIFT] > 0 ? (uint32_t)row[TVAD_TAP_SHIFT] : 0;
        reach = (uint64_t)255 * denominator((uint32_t)row[TVAD_TAP_H], bank->grid_h, pool) *
                denominator((uint32_t)row[TVAD_TAP_W], bank->grid_w, pool);             /* below 2^48 */
        values = (uint64_t)((uint32_t)row[TVAD_TAP_H] * (uint32_t)row[TVAD_TAP_W]) * (uint32_t)row[TVAD_TAP_C];
        if (reach > (uint32_t)INT32_MAX >> shift || values > INT32_MAX) {
            return TVAD_ERROR_FIELD;
        }
        depth += (uint32_t)row[TVAD_TAP_C];
    }
    bank->depth = (uint16_t)depth;
    return depth <= MAX_DEPTH ? TVAD_OK : TVAD_ERROR_FIELD;
}

/* BIAS: bias + U . e within int32 for every |e| <= 127, also when shifted left. */
static tvad_status check_projection(const tvad_bank *bank)
{
    const int8_t *weights = bank->projection.data;
    const int32_t *bias = bank->bias.data, *multiplier = bias + bank->values, *shift = multiplier + bank->values;
    uint32_t i, j;

    for (j = 0; j < bank->values; j++) {
        uint32_t reach = 0;                             /* at most 65535 * 128 * 127 < 2^30 */

        if (multiplier[j] < 0 || shift[j] < -31 || shift[j] > 30) {
            return TVAD_ERROR_FIELD;
        }
        for (i = 0; i < bank->depth; i++) {
            int32_t weight = weights[i * bank->values + j];

            reach += 127u * (uint32_t)(weight < 0 ? -weight : weight);
        }
        reach += bias[j] < 0 ? 0u - (uint32_t)bias[j] : (uint32_t)bias[j];      /* below 2^32 */
        if (reach > (uint32_t)INT32_MAX >> (shift[j] > 0 ? shift[j] : 0)) {
            return TVAD_ERROR_FIELD;
        }
    }
    return TVAD_OK;
}

static int all_below(const uint16_t *values, uint32_t count, uint32_t limit)
{
    uint32_t i;

    for (i = 0; i < count; i++) {
        if (values[i] >= limit) {
            return 0;
        }
    }
    return 1;
}

static int is_memory_bank(const tvad_bank *bank)
{
    return bank->kind == TVAD_KIND_CORE || bank->kind == TVAD_KIND_PQPC;
}

static int is_padim(const tvad_bank *bank)
{
    return bank->kind == TVAD_KIND_PADM || bank->kind == TVAD_KIND_PADF || bank->kind == TVAD_KIND_PADC;
}

/* Rows that every task has; 0: any number. */
static uint32_t rows_of_task(const tvad_bank *bank)
{
    return is_memory_bank(bank) ? 0u : is_padim(bank) ? bank->grid_h : 1u;
}

/* PROT: no signature, and so no mean of them, passes the largest value a cell. */
static int check_prototypes(const tvad_bank *bank)
{
    const uint32_t cells = tvad_part_cells(bank, bank->taps - 1u), count = bank->tasks * tvad_last_channels(bank);
    const int32_t largest = tvad_is_native(bank) ? 128 : 127;
    uint32_t i;

    for (i = 0; i < count && cells <= MAX_CELLS; i++) {
        const int32_t value = bank->prototypes[i], most = largest * (int32_t)cells;

        if (value < -most || value > most) {
            return 0;
        }
    }
    return cells <= MAX_CELLS;
}

/* TASK and PROT: both or none, both if there are several tasks; each task's rows follow those of the one before. */
static tvad_status check_tasks(tvad_bank *bank, const int32_t *config)
{
    const uint32_t each = rows_of_task(bank);
    tvad_section rows, prototypes;
    int64_t end = 0;
    uint32_t t;

    if (bank->tasks == 1 && !tvad_find_section(bank->base, TVAD_TAG('T', 'A', 'S', 'K'), &rows) &&
        !tvad_find_section(bank->base, TVAD_TAG('P', 'R', 'O', 'T'), &prototypes)) {
        return TVAD_OK;
    }
    if (!tvad_take(bank, TVAD_TAG('T', 'A', 'S', 'K'), TVAD_I4, bank->tasks, TVAD_TASK_FIELDS, 0, &rows) ||
        !tvad_take(bank, TVAD_TAG('P', 'R', 'O', 'T'), TVAD_I4, bank->tasks, tvad_last_channels(bank), 0, &prototypes)) {
        return TVAD_ERROR_SECTION;
    }
    bank->task_rows = rows.data;
    bank->prototypes = prototypes.data;
    for (t = 0; t < bank->tasks; t++) {
        const int32_t *row = bank->task_rows + TVAD_TASK_FIELDS * t;

        if (row[TVAD_TASK_FIRST] != end || row[TVAD_TASK_ROWS] < 1 || row[TVAD_TASK_IMAGES] < 0 ||
            row[TVAD_TASK_RESERVED] != 0 || (each != 0 && row[TVAD_TASK_ROWS] != (int32_t)each)) {
            return TVAD_ERROR_FIELD;
        }
        end += row[TVAD_TASK_ROWS];
    }
    if (each == 0 && end != config[0]) {
        return TVAD_ERROR_FIELD;
    }
    return check_prototypes(bank) ? TVAD_OK : TVAD_ERROR_FIELD;
}

/* LADR and LRN, which scoring does not read: of the right form, so that who learns can rely on it. */
static tvad_status check_learning(const tvad_bank *bank)
{
    tvad_section ladder, numbers;
    const uint32_t *values;
    uint32_t t, i;

    if (tvad_find_section(bank->base, TVAD_TAG('L', 'A', 'D', 'R'), &ladder)) {
        const uint32_t pairs = ladder.dim[1];

        if (!is_memory_bank(bank) ||
            !tvad_take(bank, TVAD_TAG('L', 'A', 'D', 'R'), TVAD_U4, bank->tasks, pairs, LADDER_PAIR, &ladder)) {
            return TVAD_ERROR_SECTION;
        }
        values = ladder.data;
        for (t = 0; t < bank->tasks; t++) {
            uint32_t before = UINT32_MAX;

            for (i = 0; i < pairs; i++) {
                if (values[0] < 1 || values[0] > before) {
                    return TVAD_ERROR_FIELD;
                }
                before = values[0];
                values += LADDER_PAIR;
            }
        }
    }
    if (tvad_find_section(bank->base, TVAD_TAG('L', 'R', 'N', ' '), &numbers)) {
        if (!tvad_take(bank, TVAD_TAG('L', 'R', 'N', ' '), TVAD_U4, LEARNING_NUMBERS, 0, 0, &numbers)) {
            return TVAD_ERROR_SECTION;
        }
        values = numbers.data;
        for (i = LEARNING_NUMBERS - LEARNING_ZEROS; i < LEARNING_NUMBERS; i++) {
            if (values[i] != 0) {
                return TVAD_ERROR_FIELD;
            }
        }
    }
    return TVAD_OK;
}

static tvad_status check_padim(tvad_bank *bank, const int32_t *config)
{
    int32_t d = config[0], bits = config[1], mode = config[2];
    uint32_t values, pairs, kind, h = bank->tasks * (uint32_t)bank->grid_h, w = bank->grid_w;     /* h: rows of all tasks */

    if (d < 1 || d > MAX_VALUES || (bits != 0 && bits != 4 && bits != 8) || mode < 0 || mode > 2 ||
        config[3] != TABLE_SHIFT) {
        return TVAD_ERROR_FIELD;
    }
    kind = bits == 0 ? TVAD_KIND_PADM : mode == 2 ? TVAD_KIND_PADC : TVAD_KIND_PADF;
    if (kind != bank->kind) {
        return TVAD_ERROR_FIELD;
    }
    values = (uint32_t)d;
    bank->values = (uint16_t)d;
    bank->bits = (uint8_t)bits;
    bank->mode = (uint8_t)mode;
    pairs = values * (values - 1) / 2;
    if (!tvad_take(bank, TVAD_TAG('M', 'E', 'A', 'N'), TVAD_I1, h, w, values, &bank->mean) ||
        !tvad_take(bank, TVAD_TAG('S', 'C', 'A', 'L'), TVAD_U1, h, w, bits == 0 ? values : 2 * values, &bank->codes) ||
        !tvad_take(bank, TVAD_TAG('T', 'A', 'B', 'L'), TVAD_U4, (bits == 0 ? 1u : 2u) * bank->tasks, 256, 0,
              &bank->tables)) {
        return TVAD_ERROR_SECTION;
    }
    if (bits != 0 && (pairs == 0 || !tvad_take(bank, TVAD_TAG('C', 'H', 'O', 'L'), bits == 4 ? TVAD_U1 : TVAD_I1, h, w,
                                          bits == 4 ? (pairs + 1) / 2 : pairs, &bank->factor))) {
        return TVAD_ERROR_SECTION;
    }
    if (mode == 0) {
        return values == bank->depth ? TVAD_OK : TVAD_ERROR_FIELD;
    }
    if (mode == 1) {
        if (!tvad_take(bank, TVAD_TAG('I', 'N', 'D', 'X'), TVAD_U2, values, 0, 0, &bank->indices)) {
            return TVAD_ERROR_SECTION;
        }
        return all_below(bank->indices.data, values, bank->depth) ? TVAD_OK : TVAD_ERROR_FIELD;
    }
    if (!tvad_take(bank, TVAD_TAG('B', 'I', 'A', 'S'), TVAD_I4, 3, values, 0, &bank->bias) ||
        !tvad_take(bank, TVAD_TAG('P', 'R', 'O', 'J'), TVAD_I1, bank->depth, values, 0, &bank->projection)) {
        return TVAD_ERROR_SECTION;
    }
    return check_projection(bank);
}

int tvad_is_positive(const tvad_section *section)
{
    const uint32_t *words = section->data;

    return words[1] >> 31 == 0 && words[1] >> 20 != 0x7FFu && (words[0] | words[1]) != 0;
}

/* Are the `count` values a permutation of 0 to count - 1? A window of 512 of them at a time. */
static int is_permutation(const uint16_t *values, uint32_t count)
{
    uint32_t first, i;

    if (!all_below(values, count, count)) {
        return 0;
    }
    for (first = 0; first < count; first += 512) {
        uint32_t seen[16] = {0};

        for (i = 0; i < count; i++) {
            uint32_t offset = (uint32_t)values[i] - first, bit = 1u << (offset & 31u);

            if (offset < 512u) {
                if ((seen[offset >> 5] & bit) != 0) {
                    return 0;
                }
                seen[offset >> 5] |= bit;
            }
        }
    }
    return 1;
}

/* Every code below the number of centroids; nothing to look at where there are 2^bits of them. */
static int check_codes(const tvad_bank *bank, uint32_t centroids)
{
    uint32_t k, j, row = bank->codes.dim[1];

    for (k = 0; k < bank->rows && centroids >> bank->bits == 0; k++) {
        const uint8_t *codes = (const uint8_t *)bank->codes.data + (size_t)row * k;

        for (j = 0; j < bank->subspaces; j++) {
            uint32_t code = bank->bits == 8 ? codes[j] : (uint32_t)codes[j / 2] >> 4 * (j & 1u) & 15u;

            if (code >= centroids) {
                return 0;
            }
        }
    }
    return 1;
}

static tvad_status check_memory_bank(tvad_bank *bank, const int32_t *config)
{
    int32_t subspaces = config[2], bits = config[3];
    uint32_t depth = bank->depth, rows, m, centroids, t;
    tvad_section unit;

    if (config[0] < 1 || config[1] != (int32_t)depth || depth > MAX_DISTANCE_DEPTH) {
        return TVAD_ERROR_FIELD;
    }
    if (!tvad_take(bank, TVAD_TAG('S', 'C', 'A', 'L'), TVAD_F8, 1, 0, 0, &unit)) {
        return TVAD_ERROR_SECTION;
    }
    rows = (uint32_t)config[0];
    bank->rows = rows;
    bank->values = bank->depth;
    bank->bits = (uint8_t)bits;
    if (!tvad_is_positive(&unit)) {
        return TVAD_ERROR_FIELD;
    }
    if (bank->kind == TVAD_KIND_CORE) {
        if (subspaces != 0 || bits != 8) {
            return TVAD_ERROR_FIELD;
        }
        return tvad_take(bank, TVAD_TAG('B', 'A', 'N', 'K'), TVAD_I1, rows, depth, 0, &bank->vectors) ? TVAD_OK : TVAD_ERROR_SECTION;
    }
    if (subspaces < 1 || subspaces > (int32_t)depth || depth % (uint32_t)subspaces != 0 || (bits != 4 && bits != 8)) {
        return TVAD_ERROR_FIELD;
    }
    m = (uint32_t)subspaces;
    bank->subspaces = (uint16_t)m;
    bank->mode = 1;
    if (!tvad_find_section(bank->base, TVAD_TAG('C', 'B', 'K', ' '), &bank->codebook)) {
        return TVAD_ERROR_SECTION;
    }
    centroids = bank->codebook.dim[1];
    if (centroids > 1u << bits ||
        !tvad_take(bank, TVAD_TAG('I', 'N', 'D', 'X'), TVAD_U2, bank->tasks * depth, 0, 0, &bank->indices) ||
        !tvad_take(bank, TVAD_TAG('C', 'B', 'K', ' '), TVAD_I1, bank->tasks * m, centroids, depth / m, &bank->codebook) ||
        !tvad_take(bank, TVAD_TAG('C', 'O', 'D', 'E'), TVAD_U1, rows, (m * (uint32_t)bits + 7) / 8, 0, &bank->codes)) {
        return TVAD_ERROR_SECTION;
    }
    for (t = 0; t < bank->tasks; t++) {
        if (!is_permutation((const uint16_t *)bank->indices.data + (size_t)t * depth, depth)) {
            return TVAD_ERROR_FIELD;
        }
    }
    return check_codes(bank, centroids) ? TVAD_OK : TVAD_ERROR_FIELD;
}

/* TEST and GOLD: both or none, with tasks and positions that there are. */
static tvad_status check_self_test(tvad_bank *bank)
{
    const uint32_t *gold;
    uint32_t i, cells = (uint32_t)bank->grid_h * bank->grid_w;
    int has_gold = tvad_find_section(bank->base, TVAD_TAG('G', 'O', 'L', 'D'), &bank->gold);
    int has_test = tvad_find_section(bank->base, TVAD_TAG('T', 'E', 'S', 'T'), &bank->test);

    if (!has_gold && !has_test) {
        return TVAD_OK;
    }
    if (!has_gold || !has_test || !tvad_take(bank, TVAD_TAG('G', 'O', 'L', 'D'), TVAD_U4, bank->gold.dim[0], 3, 0, &bank->gold) ||
        !tvad_take(bank, TVAD_TAG('T', 'E', 'S', 'T'), TVAD_I1, bank->gold.dim[0], bank->depth, 0, &bank->test)) {
        return TVAD_ERROR_SECTION;
    }
    gold = bank->gold.data;
    for (i = 0; i < bank->gold.dim[0]; i++) {
        if (gold[3 * (size_t)i] >= bank->tasks || gold[3 * (size_t)i + 1] >= cells) {
            return TVAD_ERROR_FIELD;
        }
    }
    return TVAD_OK;
}

/* What the kind's own scorer needs. */
static tvad_status check_scorer(tvad_bank *bank, const int32_t *config)
{
    switch (bank->kind) {
    case TVAD_KIND_STFP:
        return tvad_check_pairs(bank, config);
    case TVAD_KIND_LINR:
        return tvad_check_linear(bank, config);
    case TVAD_KIND_CFAS:
        return tvad_check_centres(bank, config);
    default:
        return is_memory_bank(bank) ? check_memory_bank(bank, config) : check_padim(bank, config);
    }
}

tvad_status tvad_check_kind(tvad_bank *bank)
{
    tvad_section section, thresholds;
    tvad_status status;

    if (!tvad_take(bank, TVAD_TAG('L', 'U', 'T', ' '), TVAD_I1, 3, 256, 0, &section) ||
        !tvad_find_section(bank->base, TVAD_TAG('T', 'H', 'R', 'S'), &thresholds) || thresholds.dim[0] > MAX_TASKS ||
        !tvad_take(bank, TVAD_TAG('T', 'H', 'R', 'S'), TVAD_U4, thresholds.dim[0], 0, 0, &thresholds)) {
        return TVAD_ERROR_SECTION;
    }
    bank->input_table = section.data;
    bank->thresholds = thresholds.data;
    bank->tasks = (uint8_t)thresholds.dim[0];
    status = check_taps(bank);
    if (status != TVAD_OK) {
        return status;
    }
    if (!tvad_take(bank, TVAD_TAG('C', 'F', 'G', ' '), TVAD_I4, 4, 0, 0, &section)) {
        return TVAD_ERROR_SECTION;
    }
    status = check_tasks(bank, section.data);
    if (status == TVAD_OK) {
        status = check_learning(bank);
    }
    if (status == TVAD_OK) {
        status = check_scorer(bank, section.data);
    }
    if (status != TVAD_OK) {
        return status;
    }
    if (tvad_score_need(bank) > INT32_MAX) {
        return TVAD_ERROR_FIELD;
    }
    return check_self_test(bank);
}
