/* Which of two slots holds the current bank? docs/SPEC.md, "Updating: two slots"; Python: tinyvad.bank.newest. */
#include "tvad_learn.h"

/* One tvad_bank is enough, and a device has little stack: if it was the first slot's, that one is opened again. */
tvad_status tvad_open_newest(const void *slot0, const void *slot1, size_t slot_bytes, tvad_bank *bank, uint32_t *which)
{
    const tvad_status first = tvad_open(slot0, slot_bytes, bank);
    const uint32_t generation = bank->generation;
    const tvad_status second = tvad_open(slot1, slot_bytes, bank);
    const int takes_second = second == TVAD_OK && (first != TVAD_OK || bank->generation > generation);

    if (which != NULL) {
        *which = takes_second ? 1u : 0u;
    }
    return takes_second ? TVAD_OK : tvad_open(slot0, slot_bytes, bank);
}
