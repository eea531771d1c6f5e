/* The bank and scorer half of the runtime as a program, so that sanitizers can watch it: cases in, a line each out.
 *
 * A case is two little-endian uint32, the bytes of a bank and of all its tapped maps, then both. A line is the status of
 * tvad_open and, where it is 0 and the maps have the size that the bank says, the result: status of the self-test, score,
 * row, column, label, the CRC-32 of the map and the task. Bank, maps and scratch lie in blocks of exactly their size.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvad_internal.h"

static void *block(size_t nbytes)
{
    void *p = NULL;

    if (posix_memalign(&p, 4096, nbytes == 0 ? 1 : nbytes) != 0) {
        exit(2);
    }
    return p;
}

static void score(const tvad_bank *bank, const int8_t *maps, uint64_t nbytes)
{
    const int8_t *taps[TVAD_MAX_TAPS];
    int8_t *kept[TVAD_MAX_TAPS];
    uint8_t *scratch;
    tvad_result result;
    tvad_status self_test;
    uint64_t all = 0;
    uint32_t t;

    for (t = 0; t < bank->taps; t++) {
        const int32_t *row = bank->tap_rows + TVAD_TAP_FIELDS * t;

        all += (uint64_t)row[0] * (uint64_t)row[1] * (uint64_t)row[2];
    }
    if (all != nbytes) {
        printf("\n");
        return;
    }
    for (t = 0; t < bank->taps; t++) {
        const int32_t *row = bank->tap_rows + TVAD_TAP_FIELDS * t;
        const size_t size = (size_t)row[0] * (size_t)row[1] * (size_t)row[2];

        kept[t] = block(size);
        memcpy(kept[t], maps, size);
        taps[t] = kept[t];
        maps += size;
    }
    scratch = block(tvad_score_bytes(bank));
    self_test = tvad_self_test(bank, scratch, tvad_score_bytes(bank));
    if (tvad_score(bank, taps, scratch, tvad_score_bytes(bank), &result) != TVAD_OK) {
        exit(3);
    }
    printf(" %d %lu %u %u %u %lu %u\n", (int)self_test, (unsigned long)result.score, result.row, result.column, result.label,
           (unsigned long)tvad_crc32(0, (const uint8_t *)result.map, 4u * (size_t)result.grid_h * result.grid_w), result.task);
    free(scratch);
    for (t = 0; t < bank->taps; t++) {
        free(kept[t]);
    }
}

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    uint32_t sizes[2];

    if (file == NULL) {
        return 2;
    }
    while (fread(sizes, sizeof sizes[0], 2, file) == 2) {
        uint8_t *data = block(sizes[0]), *maps = block(sizes[1]);
        tvad_bank bank;
        tvad_status status;

        if (fread(data, 1, sizes[0], file) != sizes[0] || fread(maps, 1, sizes[1], file) != sizes[1]) {
            return 2;
        }
        status = tvad_open(data, sizes[0], &bank);
        printf("%d", (int)status);
        if (status == TVAD_OK) {
            score(&bank, (const int8_t *)maps, sizes[1]);
        } else {
            printf("\n");
        }
        free(maps);
        free(data);
    }
    (void)fclose(file);
    return 0;
}
