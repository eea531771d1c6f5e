/* Which task does an image belong to? Its embedding in, the task with the nearest prototype out.
 *
 * The signature of an image is the sum over all cells of its last tap's part of the embedding; PROT holds a mean signature a
 * task (docs/SPEC.md, "Several tasks"; Python: tinyvad/detectors/routing.py). tvad_open bounds the cells by 65536, so a
 * signature stays within 128 * 65536 = 2^23, a difference within 2^24, and 4096 of its squares within 2^60.
 */
#include "tvad_internal.h"

void tvad_add_signature(const tvad_bank *bank, const int8_t *part, uint32_t cells, int32_t *signature)
{
    const uint32_t channels = tvad_last_channels(bank);
    uint32_t cell, c;

    for (cell = 0; cell < cells; cell++) {
        for (c = 0; c < channels; c++) {
            signature[c] += part[c];
        }
        part += channels;
    }
}

void tvad_signature(const tvad_bank *bank, const int8_t *const parts[], int32_t *signature)
{
    const uint32_t channels = tvad_last_channels(bank);
    uint32_t c;

    for (c = 0; c < channels; c++) {
        signature[c] = 0;
    }
    tvad_add_signature(bank, parts[bank->taps - 1u], tvad_part_cells(bank, bank->taps - 1u), signature);
}

uint32_t tvad_route(const tvad_bank *bank, const int32_t *signature)
{
    const uint32_t channels = tvad_last_channels(bank);
    const int32_t *prototype = bank->prototypes;
    uint64_t least = UINT64_MAX;
    uint32_t t, c, task = 0;

    for (t = 0; t < bank->tasks && prototype != NULL; t++) {
        uint64_t distance = 0;

        for (c = 0; c < channels; c++) {
            const int32_t difference = signature[c] - prototype[c];

            distance += (uint64_t)((int64_t)difference * difference);
        }
        if (distance < least) {
            least = distance;
            task = t;
        }
        prototype += channels;
    }
    return task;
}
