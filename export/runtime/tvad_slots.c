/* Which of two slots holds the current bank? docs/SPEC.md, "Updating: two slots"; Python: tinyvad.bank.newest. */
#include "tvad_learn.h"

tvad_status tvad_open_newest(const void *slot0, const void *slot1, size_t slot_bytes, tvad_bank *bank, uint32_t *which)
{
    const tvad_status first = tvad_open(slot0, slot_bytes, bank);
    tvad_bank other;
    const tvad_status second = tvad_open(slot1, slot_bytes, &other);
    const int takes_second = second == TVAD_OK && (first != TVAD_OK || other.generation > bank->generation);

    if (takes_second) {
        *bank = other;
    }
    if (which != NULL) {
        *which = takes_second ? 1u : 0u;
    }
    return takes_second ? TVAD_OK : first;
}
