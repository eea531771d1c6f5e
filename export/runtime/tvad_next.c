/* What the sections of the next bank hold: the bank of now and a session of learning in, their bytes out, in order.
 *
 * Python's twin is tinyvad/detectors/device_learning.py, which has the rules. Sections that are made anew stand in the switch
 * of tvad_next_section; of the others those that are still true are taken over.
 */
#include "tvad_learning.h"

#define CFG TVAD_TAG('C', 'F', 'G', ' ')
#define THRS TVAD_TAG('T', 'H', 'R', 'S')
#define TASK TVAD_TAG('T', 'A', 'S', 'K')
#define PROT TVAD_TAG('P', 'R', 'O', 'T')
#define LADR TVAD_TAG('L', 'A', 'D', 'R')
#define BANK TVAD_TAG('B', 'A', 'N', 'K')
#define GOLD TVAD_TAG('G', 'O', 'L', 'D')
#define PAIR 2u                     /* of a ladder: rows, threshold */

static void emit_word(tvad_writer *w, uint32_t word)
{
    tvad_emit(w, &word, sizeof word);   /* a bank is little-endian, as this core is (tvad_internal.h) */
}

static uint32_t grown(const tvad_learner *learner)
{
    return learner->old_rows + learner->added;
}

/* Rows of a task in the new bank. */
static uint32_t rows_of(const tvad_writer *w, uint32_t task)
{
    uint32_t rows;

    if (task == w->learner->task) {
        return grown(w->learner);
    }
    rows = tvad_task_rows(w->learner->bank, task);
    return w->is_cut && rows > w->learner->share ? w->learner->share : rows;
}

uint32_t tvad_next_rows(const tvad_writer *w)
{
    uint32_t task, rows = 0;

    for (task = 0; task < w->learner->tasks; task++) {
        rows += rows_of(w, task);
    }
    return rows;
}

static tvad_section section_of(const tvad_writer *w, uint32_t tag)
{
    tvad_section section = {NULL, 0, {0, 0, 0}, 0, 0};

    (void)tvad_find_section(w->learner->bank->base, tag, &section);
    return section;
}

static uint32_t threshold_of(const tvad_writer *w, uint32_t task)
{
    const tvad_learner *learner = w->learner;
    const uint32_t old = task < learner->bank->tasks ? learner->bank->thresholds[task] : 0, rows = rows_of(w, task);

    if (task == learner->task) {
        const uint32_t own = tvad_learn_threshold(learner);

        return own > old ? own : old;
    }
    if (rows < tvad_task_rows(learner->bank, task)) {
        const tvad_section ladder = section_of(w, LADR);
        const uint32_t pairs = ladder.dim[1], *pair = (const uint32_t *)ladder.data + (size_t)PAIR * pairs * task;
        uint32_t i;

        for (i = 0; i + 1u < pairs && pair[0] > rows; i++) {
            pair += PAIR;
        }
        return pair[1];
    }
    return old;
}

static void emit_thresholds(tvad_writer *w)
{
    uint32_t task;

    for (task = 0; task < w->learner->tasks; task++) {
        emit_word(w, threshold_of(w, task));
    }
}

uint32_t tvad_next_images(const tvad_learner *learner, uint32_t task)
{
    const tvad_bank *bank = learner->bank;
    const uint32_t old = task < bank->tasks ? (uint32_t)bank->task_rows[TVAD_TASK_FIELDS * task + TVAD_TASK_IMAGES] : 0;

    return old + (task == learner->task ? learner->images : 0u);
}

static void emit_tasks(tvad_writer *w)
{
    uint32_t task, first = 0;

    for (task = 0; task < w->learner->tasks; task++) {
        emit_word(w, first);
        emit_word(w, rows_of(w, task));
        emit_word(w, tvad_next_images(w->learner, task));
        emit_word(w, 0);
        first += rows_of(w, task);
    }
}

/* The mean signature, halves away from zero. |total| < 2^23 * 2^31. */
static void emit_prototype(tvad_writer *w)
{
    const tvad_learner *learner = w->learner;
    const tvad_bank *bank = learner->bank;
    const uint32_t channels = tvad_last_channels(bank);
    const int64_t images = tvad_next_images(learner, learner->task), before = images - learner->images;
    uint32_t c;

    for (c = 0; c < channels; c++) {
        int64_t total = learner->total[c], mean;

        if (learner->task < bank->tasks) {
            total += before * bank->prototypes[channels * learner->task + c];
        }
        mean = (2 * (total < 0 ? -total : total) + images) / (2 * images);
        emit_word(w, (uint32_t)(total < 0 ? -mean : mean));
    }
}

static void emit_prototypes(tvad_writer *w)
{
    const tvad_bank *bank = w->learner->bank;
    const uint32_t channels = tvad_last_channels(bank);
    uint32_t task;

    for (task = 0; task < w->learner->tasks; task++) {
        if (task == w->learner->task) {
            emit_prototype(w);
        } else {
            tvad_emit(w, bank->prototypes + (size_t)channels * task, 4u * channels);
        }
    }
}

/* What this task is to be judged by once it is cut: of a new one the powers of two that were passed, of an old one what it
 * had, never lower than now. */
static void emit_own_ladder(tvad_writer *w, const uint32_t *old, uint32_t pairs)
{
    const tvad_learner *learner = w->learner;
    const uint32_t rows = grown(learner);
    uint32_t written = 0, power = learner->marked, threshold = threshold_of(w, learner->task), size = rows;

    if (learner->task == learner->bank->tasks || old[0] < rows) {
        emit_word(w, rows);
        emit_word(w, threshold);
        written = 1;
    }
    for (; written < pairs; written++) {
        if (learner->task < learner->bank->tasks) {
            emit_word(w, old[0]);
            emit_word(w, old[1] > threshold ? old[1] : threshold);
            old += PAIR;
            continue;
        }
        if (power > 0 && learner->marks[power - 1u] != 0) {
            power--;
            size = 1u << power;
            threshold = learner->marks[power] > threshold ? learner->marks[power] : threshold;
        } else {
            power = 0;
        }
        emit_word(w, size);
        emit_word(w, threshold);
    }
}

static void emit_ladders(tvad_writer *w)
{
    const tvad_section ladder = section_of(w, LADR);
    const uint32_t pairs = ladder.dim[1];
    uint32_t task;

    for (task = 0; task < w->learner->tasks; task++) {
        const uint32_t *old = (const uint32_t *)ladder.data + (size_t)PAIR * pairs * task;

        if (task == w->learner->task) {
            emit_own_ladder(w, task < w->learner->bank->tasks ? old : NULL, pairs);
        } else {
            tvad_emit(w, old, 4u * PAIR * pairs);
        }
    }
}

static void emit_rows(tvad_writer *w)
{
    const tvad_learner *learner = w->learner;
    const tvad_bank *bank = learner->bank;
    uint32_t task;

    for (task = 0; task < learner->tasks; task++) {
        if (task == learner->task) {
            tvad_emit(w, learner->old, learner->old_rows * bank->depth);
            tvad_emit(w, learner->rows, learner->added * bank->depth);
        } else {
            tvad_emit(w, (const int8_t *)bank->vectors.data + (size_t)tvad_task_first(bank, task) * bank->depth,
                      rows_of(w, task) * bank->depth);
        }
    }
}

/* The golden vectors' scores by the new rows. */
static void emit_gold(tvad_writer *w)
{
    const tvad_learner *learner = w->learner;
    const tvad_bank *bank = learner->bank;
    const int8_t *parts[TVAD_MAX_TAPS], *vectors = bank->test.data;
    const uint32_t *gold = bank->gold.data;
    uint32_t i, t;

    for (i = 0; i < bank->gold.dim[0]; i++) {
        const uint32_t task = gold[3u * i];
        const int8_t *rows = (const int8_t *)bank->vectors.data + (size_t)tvad_task_first(bank, task) * bank->depth;
        const int is_own = task == learner->task;
        uint32_t first = 0;

        for (t = 0; t < bank->taps; t++) {
            parts[t] = vectors + (size_t)i * bank->depth + first;
            first += (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
        }
        emit_word(w, task);
        emit_word(w, gold[3u * i + 1u]);
        emit_word(w, tvad_learn_nearest(learner, parts, 0, rows, is_own ? learner->old_rows : rows_of(w, task),
                                        is_own ? learner->added : 0u));
    }
}

int tvad_next_has(uint32_t tag)
{
    static const uint32_t kept[] = {
        CFG, THRS, TASK, PROT, LADR, BANK, GOLD, TVAD_TAG('L', 'U', 'T', ' '), TVAD_TAG('T', 'A', 'P', 'S'),
        TVAD_TAG('S', 'T', 'E', 'P'), TVAD_TAG('S', 'C', 'A', 'L'), TVAD_TAG('L', 'R', 'N', ' '),
        TVAD_TAG('T', 'E', 'S', 'T'), TVAD_TAG('M', 'E', 'T', 'A'),
    };
    uint32_t i;

    for (i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        if (kept[i] == tag) {
            return 1;
        }
    }
    return 0;
}

void tvad_next_section(tvad_writer *w, uint32_t tag)
{
    const tvad_section section = section_of(w, tag);
    const uint32_t *config = section.data;

    switch (tag) {
    case CFG:
        emit_word(w, tvad_next_rows(w));
        tvad_emit(w, config + 1, section.nbytes - (uint32_t)sizeof config[0]);
        break;
    case THRS:
        emit_thresholds(w);
        break;
    case TASK:
        emit_tasks(w);
        break;
    case PROT:
        emit_prototypes(w);
        break;
    case LADR:
        emit_ladders(w);
        break;
    case BANK:
        emit_rows(w);
        break;
    case GOLD:
        emit_gold(w);
        break;
    default:
        tvad_emit(w, section.data, section.nbytes);
        break;
    }
}

uint32_t tvad_next_dim(const tvad_writer *w, uint32_t tag, uint32_t old)
{
    switch (tag) {
    case THRS:
    case TASK:
    case PROT:
    case LADR:
        return w->learner->tasks;
    case BANK:
        return tvad_next_rows(w);
    default:
        return old;
    }
}
