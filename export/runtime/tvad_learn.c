/* Learning an image: its vectors in, those that are new appended to the task's rows.
 *
 * The largest distance to the task's rows picks the next row, lowest cell of equals, until it is no longer new or a limit is
 * reached; then the distances to the new row are taken into account (tinyvad/detectors/online.py, exact int32). The parts of
 * the embedding are used where tvad_run left them; one int32 a cell is all that an image needs.
 *
 * Workspace, each part but the last rounded up to 16 bytes:
 *     distances int32 (cells), later the new bank's header and table | sum of signatures int64 (C) |
 *     a vector int16 (D) or a signature int32 (C) | new rows int8 (rows, D)
 */
#include "tvad_distance.h"
#include "tvad_internal.h"
#include "tvad_learning.h"
#include "tvad_model.h"

static uint32_t cells_of(const tvad_bank *bank)
{
    return (uint32_t)bank->grid_h * bank->grid_w;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* PROT bounds the cells by 65536, MAX_SECTIONS the table: none of these passes 2^19. */
static uint32_t head_bytes(const tvad_bank *bank)
{
    return TVAD_ALIGN16(larger(4u * cells_of(bank), TVAD_HEADER_BYTES + TVAD_ENTRY_BYTES * tvad_section_count(bank)));
}

static uint32_t total_bytes(const tvad_bank *bank)
{
    return TVAD_ALIGN16(8u * tvad_last_channels(bank));
}

static uint32_t scratch_bytes(const tvad_bank *bank)
{
    return TVAD_ALIGN16(larger(2u * bank->depth, 4u * tvad_last_channels(bank)));
}

/* Section LRN of a bank that a device can learn on, else NULL. */
static const uint32_t *learning_of(const tvad_bank *bank)
{
    tvad_section ladder, numbers;
    const uint32_t *values;

    if (bank->base == NULL || bank->kind != TVAD_KIND_CORE || !tvad_is_updatable(bank) || bank->prototypes == NULL ||
        !tvad_find_section(bank->base, TVAD_TAG('L', 'A', 'D', 'R'), &ladder) ||
        !tvad_find_section(bank->base, TVAD_TAG('L', 'R', 'N', ' '), &numbers)) {
        return NULL;
    }
    values = numbers.data;
    return values[TVAD_LRN_PER_IMAGE] != 0 && values[TVAD_LRN_ROWS] != 0 ? values : NULL;
}

size_t tvad_learn_bytes(const tvad_bank *bank, uint32_t rows)
{
    if (learning_of(bank) == NULL) {
        return 0;
    }
    return (size_t)head_bytes(bank) + total_bytes(bank) + scratch_bytes(bank) + (size_t)rows * bank->depth;
}

static void zero(void *data, size_t nbytes)
{
    uint8_t *at = data;

    while (nbytes-- > 0) {
        *at++ = 0;
    }
}

tvad_status tvad_learn_begin(tvad_learner *learner, const tvad_bank *bank, uint32_t task, uint32_t gate, void *workspace,
                             size_t nbytes)
{
    const uint32_t *numbers = learning_of(bank);
    const uint32_t is_new = task == TVAD_NEW_TASK;
    const size_t fixed = tvad_learn_bytes(bank, 0);
    uint8_t *at = workspace;
    size_t room;

    zero(learner, sizeof *learner);
    if (numbers == NULL || (!is_new && task >= bank->tasks)) {
        return TVAD_ERROR_LEARN;
    }
    learner->bank = bank;
    learner->tasks = bank->tasks + is_new;
    learner->task = is_new ? bank->tasks : task;
    learner->most_rows = numbers[TVAD_LRN_ROWS];
    learner->share = learner->most_rows / learner->tasks;
    if (is_new && (learner->tasks > numbers[TVAD_LRN_TASKS] || learner->tasks > TVAD_MAX_TASKS || learner->share < 1)) {
        return TVAD_ERROR_FULL;
    }
    if (workspace == NULL || ((uintptr_t)workspace & 15u) != 0 || nbytes < fixed) {
        return TVAD_ERROR_ARENA;
    }
    if (!is_new) {
        learner->old_rows = tvad_task_rows(bank, task);
        learner->old = (const int8_t *)bank->vectors.data + (size_t)tvad_task_first(bank, task) * bank->depth;
    }
    room = (nbytes - fixed) / bank->depth;
    if (is_new && room < 1) {
        return TVAD_ERROR_ARENA;
    }
    learner->capacity = learner->old_rows;
    if (learner->share > learner->old_rows) {
        const uint32_t missing = learner->share - learner->old_rows;

        learner->capacity += room < missing ? (uint32_t)room : missing;
    }
    learner->per_image = numbers[TVAD_LRN_PER_IMAGE];
    learner->tau2 = numbers[TVAD_LRN_NOVELTY];
    learner->slot_bytes = numbers[TVAD_LRN_SLOT];
    learner->gate = gate;
    learner->distance = (int32_t *)(void *)at;
    at += head_bytes(bank);
    learner->total = (int64_t *)(void *)at;
    at += total_bytes(bank);
    learner->scratch = at;
    learner->rows = (int8_t *)at + scratch_bytes(bank);
    zero(learner->total, total_bytes(bank));
    return TVAD_OK;
}

uint32_t tvad_learn_nearest(const tvad_learner *learner, const int8_t *const parts[], uint32_t cell, const int8_t *old,
                            uint32_t old_rows, uint32_t added)
{
    const uint32_t depth = learner->bank->depth;
    int32_t best = (int32_t)TVAD_NO_ROWS;
    uint32_t nearest;

    tvad_make_query(learner->bank, parts, cell, learner->scratch);
    best = tvad_scan_rows(learner->scratch, old, old_rows, depth, best, &nearest);
    return (uint32_t)tvad_scan_rows(learner->scratch, learner->rows, added, depth, best, &nearest);
}

/* The lowest of the cells that are farthest from the rows. */
static uint32_t farthest(const tvad_learner *learner)
{
    const uint32_t cells = cells_of(learner->bank);
    uint32_t cell, best = 0;

    for (cell = 1; cell < cells; cell++) {
        if (learner->distance[cell] > learner->distance[best]) {
            best = cell;
        }
    }
    return best;
}

/* Append a cell's vector and take it into account in every distance. */
static void append(tvad_learner *learner, const int8_t *const parts[], uint32_t chosen)
{
    const tvad_bank *bank = learner->bank;
    const uint32_t cells = cells_of(bank);
    int8_t *row = learner->rows + (size_t)learner->added * bank->depth;
    int16_t *query = learner->scratch;
    uint32_t cell, t, i, first = 0;

    for (t = 0; t < bank->taps; t++) {
        const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        const int8_t *values = parts[t] + (size_t)chosen * channels;

        for (i = 0; i < channels; i++) {
            row[first + i] = values[i];
            query[first + tvad_slot(i, channels)] = values[i];
        }
        first += channels;
    }
    learner->added++;
    for (cell = 0; cell < cells; cell++) {
        int32_t sum = 0;

        first = 0;
        for (t = 0; t < bank->taps; t++) {
            const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];

            sum = tvad_distance(query + first, parts[t] + (size_t)cell * channels, channels, sum);
            first += channels;
        }
        if (sum < learner->distance[cell]) {
            learner->distance[cell] = sum;
        }
    }
}

uint32_t tvad_learn_threshold(const tvad_learner *learner)
{
    uint32_t count = learner->images / 2u + (learner->images & 1u), most = 0, i;

    if (learner->images == 1u && learner->old_rows == 0u) {
        const uint32_t guess = larger(learner->spread / 2u, larger(learner->radius, learner->tau2));

        return guess == UINT32_MAX ? UINT32_MAX : 1u + guess;
    }
    count = count < TVAD_RECENT ? count : TVAD_RECENT;
    for (i = 1; i <= count; i++) {
        most = larger(most, learner->recent[(learner->images - i) % TVAD_RECENT]);
    }
    return 1u + most;
}

void tvad_learn_mark(tvad_learner *learner, uint32_t rows)
{
    while (learner->marked < TVAD_MARKS && 1u << learner->marked < rows) {
        learner->marks[learner->marked++] = learner->images > 1u ? tvad_learn_threshold(learner) : 0u;
    }
}

static void add_signature(const tvad_learner *learner, const int8_t *const parts[])
{
    const uint32_t channels = tvad_last_channels(learner->bank);
    const int32_t *signature = learner->scratch;
    uint32_t c;

    tvad_signature(learner->bank, parts, learner->scratch);
    for (c = 0; c < channels; c++) {
        learner->total[c] += signature[c];
    }
}

tvad_status tvad_learn_parts(tvad_learner *learner, const int8_t *const parts[])
{
    const uint32_t cells = learner->bank == NULL ? 0 : cells_of(learner->bank);
    const uint32_t before = learner->old_rows + learner->added;
    uint32_t cell;

    if (cells == 0) {
        return TVAD_ERROR_LEARN;
    }
    for (cell = 0; cell < cells; cell++) {
        learner->distance[cell] = (int32_t)tvad_learn_nearest(learner, parts, cell, learner->old, learner->old_rows,
                                                              learner->added);
    }
    cell = farthest(learner);
    learner->novelty = (uint32_t)learner->distance[cell];
    learner->last_added = 0;
    if (learner->gate != 0 && before > 0 && learner->novelty > learner->gate) {
        learner->skipped++;
        return TVAD_OK;
    }
    if (learner->old_rows == 0) {
        tvad_learn_mark(learner, before);
    }
    learner->recent[learner->images % TVAD_RECENT] = learner->novelty;
    learner->images++;
    add_signature(learner, parts);
    while (learner->last_added < learner->per_image && before + learner->last_added < learner->capacity &&
           (before + learner->last_added == 0 || (uint32_t)learner->distance[cell] > learner->tau2)) {
        append(learner, parts, cell);
        learner->last_added++;
        cell = farthest(learner);
        if (before + learner->last_added == 1) {
            learner->spread = (uint32_t)learner->distance[cell];
        }
    }
    learner->radius = (uint32_t)learner->distance[cell];
    return TVAD_OK;
}

tvad_status tvad_learn_image(tvad_learner *learner, const tvad_model *model, const void *arena)
{
    const int8_t *parts[TVAD_MAX_TAPS];
    uint32_t t;

    if (learner->bank == NULL) {
        return TVAD_ERROR_LEARN;
    }
    if (learner->bank->backbone_crc32 != model->backbone_crc32 || learner->bank->taps != model->taps) {
        return TVAD_ERROR_BACKBONE;
    }
    for (t = 0; t < model->taps; t++) {
        parts[t] = (const int8_t *)arena + model->parts[t];
    }
    return tvad_learn_parts(learner, parts);
}
