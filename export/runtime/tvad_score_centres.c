/* CFAS: nothing yet; every bank of the kind is refused. */
#include "tvad_internal.h"

tvad_status tvad_check_centres(tvad_bank *bank, const int32_t *config)
{
    (void)bank;
    (void)config;
    return TVAD_ERROR_FIELD;
}

uint32_t tvad_score_centres_scratch(const tvad_bank *bank)
{
    (void)bank;
    return 0;
}

void tvad_score_centres(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position,
                       uint32_t cells, uint32_t *distances, void *scratch)
{
    (void)bank;
    (void)task;
    (void)parts;
    (void)position;
    (void)scratch;
    while (cells-- > 0) {
        *distances++ = 0;
    }
}
