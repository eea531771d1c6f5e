/* A line of text for every status. */
#include "tvad.h"

const char *tvad_status_text(tvad_status status)
{
    static const char *const lines[] = {
        "ok",
        "no bank: magic, version or a fixed size is wrong",
        "the bank's size, section count or an offset does not go with the bytes there are",
        "damaged bytes: a CRC-32, padding or the self-test differs",
        "a field of the bank is outside the values of its specification",
        "a section that the bank's kind needs is missing or malformed, or one is required and unknown",
        "the bank was fitted on another network",
        "the arena is too small or not aligned",
        "the frame's size or format is not the model's",
        "the bank does not lie at a multiple of its align",
        "the bank is not made for learning on a device, has no such task, or nothing was learnt",
        "no room for another task, row or generation, or for the new bank in its slot",
        "a slot can't be erased or programmed, or holds other bytes than it should",
    };

    return (uint32_t)status < sizeof lines / sizeof lines[0] ? lines[status] : "unknown status";
}
