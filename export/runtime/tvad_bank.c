/* Opening a bank where it lies: bytes in, pointers into them out, or the reason why not.
 *
 * The checks are those of docs/SPEC.md, "Reading: the checks, in order", and refuse what tinyvad/bank.py refuses; what the
 * scorer demands of the sections follows in tvad_bank_kind.c. Every byte of the file is covered by a CRC or a rule.
 * Sizes are uint32_t and never overflow: from check 4 on, `end <= file_size` and file_size is a multiple of align.
 */
#include <string.h>

#include "tvad_internal.h"

#define HEADER_BYTES 64u
#define ENTRY_BYTES 32u
#define MAX_SECTIONS 64u

/* Offsets in the header and in an entry of the table. */
enum { VERSION_MAJOR = 4, HEADER_SIZE = 8, FILE_SIZE = 12, SECTION_COUNT = 16, ENTRY_SIZE = 18, ALIGN = 20, KIND = 24,
       ROUNDING = 28, FLAGS = 30, BACKBONE_CRC32 = 32, INPUT_H = 36, INPUT_W = 38, GRID_H = 40, GRID_W = 42, TAPS = 44,
       CHANNELS = 45, COLOUR = 46, RESERVED_47 = 47, GENERATION = 48, PAYLOAD_CRC32 = 52, RESERVED_56 = 56,
       HEADER_CRC32 = 60 };
enum { E_TAG = 0, E_DTYPE = 4, E_NDIM = 5, E_FLAGS = 6, E_OFFSET = 8, E_NBYTES = 12, E_DIM = 16, E_CRC32 = 28 };

static uint32_t u16(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

static uint32_t u32(const uint8_t *p)
{
    return u16(p) | u16(p + 2) << 16;
}

static int is_known(uint32_t tag)
{
    static const uint32_t known[] = {
        TVAD_TAG('C', 'F', 'G', ' '), TVAD_TAG('T', 'A', 'P', 'S'), TVAD_TAG('P', 'R', 'O', 'J'),
        TVAD_TAG('C', 'B', 'K', ' '), TVAD_TAG('C', 'O', 'D', 'E'), TVAD_TAG('M', 'E', 'A', 'N'),
        TVAD_TAG('I', 'V', 'A', 'R'), TVAD_TAG('I', 'C', 'O', 'V'), TVAD_TAG('C', 'H', 'O', 'L'),
        TVAD_TAG('S', 'C', 'A', 'L'), TVAD_TAG('T', 'A', 'B', 'L'), TVAD_TAG('B', 'A', 'N', 'K'),
        TVAD_TAG('T', 'H', 'R', 'S'), TVAD_TAG('T', 'A', 'S', 'K'), TVAD_TAG('B', 'I', 'A', 'S'),
        TVAD_TAG('I', 'N', 'D', 'X'), TVAD_TAG('S', 'T', 'E', 'P'), TVAD_TAG('L', 'U', 'T', ' '),
        TVAD_TAG('M', 'E', 'T', 'A'), TVAD_TAG('T', 'E', 'S', 'T'), TVAD_TAG('G', 'O', 'L', 'D'),
        TVAD_TAG('P', 'R', 'O', 'T'), TVAD_TAG('L', 'A', 'D', 'R'), TVAD_TAG('L', 'R', 'N', ' '),
    };
    uint32_t i;

    for (i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (known[i] == tag) {
            return 1;
        }
    }
    return 0;
}

static int is_dtype(uint32_t dtype)
{
    static const uint8_t known[] = {0x11, 0x12, 0x14, 0x18, 0x21, 0x22, 0x24, 0x28, 0x34, 0x38};
    uint32_t i;

    for (i = 0; i < sizeof known; i++) {
        if (known[i] == dtype) {
            return 1;
        }
    }
    return 0;
}

static int is_kind(uint32_t kind)
{
    return kind == TVAD_KIND_PADM || kind == TVAD_KIND_PADF || kind == TVAD_KIND_PADC || kind == TVAD_KIND_CORE ||
           kind == TVAD_KIND_PQPC || kind == TVAD_KIND_STFP || kind == TVAD_KIND_LINR || kind == TVAD_KIND_CFAS;
}

static int all_zero(const uint8_t *data, uint32_t nbytes)
{
    uint32_t i, seen = 0;

    for (i = 0; i < nbytes; i++) {
        seen |= data[i];
    }
    return seen == 0;
}

/* Checks 1 to 3: is it a bank, is all of it there, are header and table whole? */
static tvad_status check_frame(const uint8_t *file, size_t size)
{
    uint32_t count, table_bytes;

    if (file == NULL || size < HEADER_BYTES) {
        return TVAD_ERROR_SIZE;
    }
    if (u32(file) != TVAD_TAG('T', 'V', 'B', '1') || u16(file + VERSION_MAJOR) != 1 ||
        u32(file + HEADER_SIZE) != HEADER_BYTES || u16(file + ENTRY_SIZE) != ENTRY_BYTES) {
        return TVAD_ERROR_MAGIC;
    }
    count = u16(file + SECTION_COUNT);
    table_bytes = ENTRY_BYTES * count;
    if (u32(file + FILE_SIZE) > size || count < 1 || count > MAX_SECTIONS ||
        HEADER_BYTES + table_bytes > u32(file + FILE_SIZE)) {
        return TVAD_ERROR_SIZE;
    }
    if (tvad_crc32(tvad_crc32(0, file, HEADER_CRC32), file + HEADER_BYTES, table_bytes) != u32(file + HEADER_CRC32)) {
        return TVAD_ERROR_CRC;
    }
    return TVAD_OK;
}

/* Check 4: the header's fields. */
static tvad_status check_fields(const uint8_t *file)
{
    uint32_t align = u32(file + ALIGN);

    if (align < 16 || align > 4096 || (align & (align - 1)) != 0 || (u32(file + FILE_SIZE) & (align - 1)) != 0 ||
        (u16(file + FLAGS) & ~1u) != 0 || file[RESERVED_47] != 0 || u32(file + RESERVED_56) != 0 ||
        !is_kind(u32(file + KIND)) || u16(file + ROUNDING) < 1 || u16(file + ROUNDING) > 2 || u16(file + INPUT_H) == 0 ||
        u16(file + INPUT_W) == 0 || u16(file + GRID_H) == 0 || u16(file + GRID_W) == 0 || file[TAPS] == 0 ||
        file[CHANNELS] != 3 || file[COLOUR] != 1) {
        return TVAD_ERROR_FIELD;
    }
    return ((uintptr_t)file & (align - 1)) == 0 ? TVAD_OK : TVAD_ERROR_ALIGNMENT;
}

/* The part of check 5 that needs the entry alone. The product of dims can't overflow: no dim is 0. */
static tvad_status check_entry(const uint8_t *entry)
{
    uint32_t i, ndim = entry[E_NDIM], nbytes = u32(entry + E_NBYTES), product;

    for (i = 0; i < 4; i++) {
        if (entry[E_TAG + i] < 0x20 || entry[E_TAG + i] > 0x7E) {
            return TVAD_ERROR_FIELD;
        }
    }
    if ((u16(entry + E_FLAGS) & ~1u) != 0 || !is_dtype(entry[E_DTYPE]) || ndim > 3) {
        return TVAD_ERROR_FIELD;
    }
    if (u16(entry + E_FLAGS) == 1 && !is_known(u32(entry + E_TAG))) {
        return TVAD_ERROR_SECTION;
    }
    product = entry[E_DTYPE] & 15u;
    for (i = 0; i < 3; i++) {
        uint32_t dim = u32(entry + E_DIM + 4 * i);

        if (dim == 0 || (i >= ndim && dim != 1) || product > nbytes / dim) {
            return TVAD_ERROR_FIELD;
        }
        product *= dim;
    }
    return product == nbytes ? TVAD_OK : TVAD_ERROR_FIELD;
}

/* Checks 5 and 6: every section in its place and whole, nothing between them. */
static tvad_status check_sections(const uint8_t *file)
{
    const uint8_t *table = file + HEADER_BYTES;
    uint32_t i, j, count = u16(file + SECTION_COUNT), align = u32(file + ALIGN), file_size = u32(file + FILE_SIZE);
    uint32_t end = HEADER_BYTES + ENTRY_BYTES * count, first = (end + align - 1) & ~(align - 1), start = first;

    for (i = 0; i < count; i++) {
        const uint8_t *entry = table + ENTRY_BYTES * i;
        uint32_t nbytes = u32(entry + E_NBYTES);
        tvad_status status = check_entry(entry);

        if (status != TVAD_OK) {
            return status;
        }
        for (j = 0; j < i; j++) {
            if (u32(table + ENTRY_BYTES * j) == u32(entry)) {
                return TVAD_ERROR_FIELD;
            }
        }
        start = (end + align - 1) & ~(align - 1);
        if (u32(entry + E_OFFSET) != start || nbytes > file_size - start) {
            return TVAD_ERROR_SIZE;
        }
        if (!all_zero(file + end, start - end) || tvad_crc32(0, file + start, nbytes) != u32(entry + E_CRC32)) {
            return TVAD_ERROR_CRC;
        }
        end = start + nbytes;
    }
    if (file_size != ((end + align - 1) & ~(align - 1))) {
        return TVAD_ERROR_SIZE;
    }
    if (!all_zero(file + end, file_size - end) ||
        tvad_crc32(0, file + first, file_size - first) != u32(file + PAYLOAD_CRC32)) {
        return TVAD_ERROR_CRC;
    }
    return TVAD_OK;
}

int tvad_find_section(const uint8_t *file, uint32_t tag, tvad_section *section)
{
    uint32_t i, j, count = u16(file + SECTION_COUNT);

    for (i = 0; i < count; i++) {
        const uint8_t *entry = file + HEADER_BYTES + ENTRY_BYTES * i;

        if (u32(entry) == tag) {
            section->data = file + u32(entry + E_OFFSET);
            section->nbytes = u32(entry + E_NBYTES);
            section->dtype = entry[E_DTYPE];
            section->ndim = entry[E_NDIM];
            for (j = 0; j < 3; j++) {
                section->dim[j] = u32(entry + E_DIM + 4 * j);
            }
            return 1;
        }
    }
    return 0;
}

tvad_status tvad_open(const void *data, size_t size, tvad_bank *bank)
{
    const uint8_t *file = data;
    tvad_status status;

    memset(bank, 0, sizeof *bank);
    status = check_frame(file, size);
    if (status == TVAD_OK) {
        status = check_fields(file);
    }
    if (status == TVAD_OK) {
        status = check_sections(file);
    }
    if (status != TVAD_OK) {
        return status;
    }
    bank->base = file;
    bank->nbytes = u32(file + FILE_SIZE);
    bank->kind = u32(file + KIND);
    bank->backbone_crc32 = u32(file + BACKBONE_CRC32);
    bank->header_crc32 = u32(file + HEADER_CRC32);
    bank->generation = u32(file + GENERATION);
    bank->input_h = (uint16_t)u16(file + INPUT_H);
    bank->input_w = (uint16_t)u16(file + INPUT_W);
    bank->grid_h = (uint16_t)u16(file + GRID_H);
    bank->grid_w = (uint16_t)u16(file + GRID_W);
    bank->taps = file[TAPS];
    status = tvad_check_kind(bank);
    if (status != TVAD_OK) {
        memset(bank, 0, sizeof *bank);
    }
    return status;
}
