/* Any bytes in, no crash out: tvad_open on them, and what it accepts is self-tested and scored.
 *
 * The input is a bank, as long as its own file_size says, and behind it the values of the tapped maps (repeated to fill
 * them). It is opened three times: as it is, as a slot of flash with more bytes behind the bank, and with its CRC-32s made
 * right, so that the checks behind them are reached. Bank, maps and scratch lie in blocks of exactly their size, so that
 * AddressSanitizer sees a byte too many.
 *
 * `make fuzz` runs it under libFuzzer (Debian: clang, libclang-rt-14-dev); fuzz_main.c runs the same on files and on seeded
 * mutations of them, with any compiler.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tvad_internal.h"
#include "tvad_kernels.h"

#define MOST_BYTES (1u << 20)       /* of maps and scratch together; larger banks are opened, not scored */
#define MOST_WORK 4000000u          /* table look-ups and products of one image */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put32(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)x;
    p[1] = (uint8_t)(x >> 8);
    p[2] = (uint8_t)(x >> 16);
    p[3] = (uint8_t)(x >> 24);
}

static void *block(size_t nbytes)
{
    void *p = NULL;

    return posix_memalign(&p, 4096, nbytes == 0 ? 1 : nbytes) == 0 ? p : NULL;
}

/* Make every CRC-32 right that lies within the file, and the sizes that a reader looks at first. */
static void seal(uint8_t *file, uint32_t size)
{
    uint32_t i, count = (uint32_t)file[16] | (uint32_t)file[17] << 8, align = get32(file + 20), table_end, first;

    if (count < 1 || count > 64 || 64 + 32 * count > size) {
        return;
    }
    put32(file + 12, size);
    table_end = 64 + 32 * count;
    for (i = 0; i < count; i++) {
        uint8_t *entry = file + 64 + 32 * i;
        uint32_t offset = get32(entry + 8), nbytes = get32(entry + 12);

        if (offset <= size && nbytes <= size - offset) {
            put32(entry + 28, tvad_crc32(0, file + offset, nbytes));
        }
    }
    if (align >= 16 && align <= 4096) {
        first = (table_end + align - 1) / align * align;
        if (first <= size) {
            put32(file + 52, tvad_crc32(0, file + first, size - first));
        }
    }
    put32(file + 60, tvad_crc32(tvad_crc32(0, file, 60), file + 64, table_end - 64));
}

static uint64_t work(const tvad_bank *bank)
{
    uint64_t cells = (uint64_t)bank->grid_h * bank->grid_w, each = bank->depth;

    if (bank->rows != 0) {
        each *= bank->rows;
    } else {
        each = (each + bank->values) * bank->values;
    }
    return cells * (each + bank->codebook.nbytes);
}

/* Score maps filled with the values at `rest`. */
static void score(const tvad_bank *bank, const uint8_t *rest, size_t rest_size)
{
    int8_t *maps[TVAD_MAX_TAPS];
    const int8_t *taps[TVAD_MAX_TAPS];
    uint8_t *scratch;
    tvad_result result;
    uint64_t all = tvad_score_bytes(bank);
    uint32_t t;
    size_t i, bytes[TVAD_MAX_TAPS], at = 0;

    for (t = 0; t < bank->taps; t++) {
        const int32_t *row = bank->tap_rows + TVAD_TAP_FIELDS * t;

        bytes[t] = (size_t)row[TVAD_TAP_H] * (size_t)row[TVAD_TAP_W] * (size_t)row[TVAD_TAP_C];
        all += bytes[t];
    }
    if (all > MOST_BYTES || work(bank) > MOST_WORK) {
        return;
    }
    for (t = 0; t < bank->taps; t++) {
        maps[t] = block(bytes[t]);
        taps[t] = maps[t];
        for (i = 0; i < bytes[t]; i++) {
            maps[t][i] = (int8_t)(rest_size == 0 ? 0x55 : rest[at++ % rest_size]);
        }
    }
    scratch = block(tvad_score_bytes(bank));
    if (tvad_score(bank, taps, scratch, tvad_score_bytes(bank), &result) != TVAD_OK || result.row >= bank->grid_h ||
        result.column >= bank->grid_w || result.map[result.row * bank->grid_w + result.column] != result.score) {
        abort();
    }
    (void)tvad_self_test(bank, scratch, tvad_score_bytes(bank));
    if (tvad_score(bank, taps, scratch, tvad_score_bytes(bank) - 1, &result) != TVAD_ERROR_ARENA) {
        abort();
    }
    free(scratch);
    for (t = 0; t < bank->taps; t++) {
        free(maps[t]);
    }
}

/* Open `size` bytes of which the bank is the first `file_size` or less. */
static void open_and_score(const uint8_t *file, size_t size, const uint8_t *rest, size_t rest_size)
{
    tvad_bank bank;

    if (tvad_open(file, size, &bank) == TVAD_OK) {
        if (bank.nbytes > size) {
            abort();
        }
        score(&bank, rest, rest_size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *whole = block(size), *file;
    uint32_t file_size;
    tvad_bank bank;

    if (size != 0) {
        memcpy(whole, data, size);
    }
    open_and_score(whole, size, data, 0);                       /* a slot of flash */
    if (size > 64) {
        file_size = get32(data + 12) <= size ? get32(data + 12) : (uint32_t)size;
        file = block((size_t)file_size + 1);                    /* at an odd address it is refused */
        memcpy(file + 1, data, file_size);
        if (tvad_open(file + 1, file_size, &bank) == TVAD_OK) {
            abort();
        }
        free(file);
        file = block(file_size);
        memcpy(file, data, file_size);
        open_and_score(file, file_size, data + file_size, size - file_size);
        if (file_size > 64) {
            seal(file, file_size);
            open_and_score(file, file_size, data + file_size, size - file_size);
        }
        free(file);
    }
    free(whole);
    return 0;
}
