/* LINR, the last layer of SimpleNet's discriminator: score = offset - sum of weights * e of every cell, cut off at 0.
 *
 * |sum| <= 65535 * 128 * 128 < 2^31, and the offset is 0 to 2^31 - 1: the score fits 32 bits. Python:
 * tinyvad/detectors/linear.py; docs/SPEC.md, LINR.
 */
#include "tvad_internal.h"

tvad_status tvad_check_linear(tvad_bank *bank, const int32_t *config)
{
    tvad_section unit;

    if (config[0] != bank->depth || config[1] != 0 || config[2] != 0 || config[3] != 0) {
        return TVAD_ERROR_FIELD;
    }
    bank->values = bank->depth;
    if (!tvad_take(bank, TVAD_TAG('S', 'C', 'A', 'L'), TVAD_F8, 1, 0, 0, &unit) ||
        !tvad_take(bank, TVAD_TAG('B', 'I', 'A', 'S'), TVAD_I4, 1, 0, 0, &bank->bias) ||
        !tvad_take(bank, TVAD_TAG('P', 'R', 'O', 'J'), TVAD_I1, bank->depth, 0, 0, &bank->projection)) {
        return TVAD_ERROR_SECTION;
    }
    return tvad_is_positive(&unit) && *(const int32_t *)bank->bias.data >= 0 ? TVAD_OK : TVAD_ERROR_FIELD;
}

uint32_t tvad_score_linear_scratch(const tvad_bank *bank)
{
    (void)bank;
    return 0;
}

void tvad_score_linear(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position,
                       uint32_t cells, uint32_t *distances, void *scratch)
{
    const int64_t offset = *(const int32_t *)bank->bias.data;
    uint32_t cell, t, c;

    (void)task;                     /* one layer for all tasks, */
    (void)position;                 /* and for all cells */
    (void)scratch;
    for (cell = 0; cell < cells; cell++) {
        const int8_t *weights = bank->projection.data;
        int32_t sum = 0;

        for (t = 0; t < bank->taps; t++) {
            const uint32_t channels = (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * t + TVAD_TAP_C];
            const int8_t *values = parts[t] + (size_t)cell * channels;

            for (c = 0; c < channels; c++) {
                sum += values[c] * weights[c];
            }
            weights += channels;
        }
        distances[cell] = offset > sum ? (uint32_t)(offset - sum) : 0u;
    }
}
