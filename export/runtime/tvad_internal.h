/* What the bank and scorer files share; no part of the interface. */
#ifndef TVAD_INTERNAL_H
#define TVAD_INTERNAL_H

#include "tvad.h"

#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__)
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a bank is little-endian and is read in place: this needs a little-endian core"
#endif
#endif

/* Rounded up to the unit of scratch, 16 bytes. */
#define TVAD_ALIGN16(nbytes) (((nbytes) + 15u) & ~15u)

/* Keeps the registers of a hot loop from a call that is rare. */
#if defined(__GNUC__)
#define TVAD_NOINLINE __attribute__((noinline))
#else
#define TVAD_NOINLINE
#endif

/* Four characters as they stand in the file, read as a number. */
#define TVAD_TAG(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)

/* Section TAPS: the fields of a row. */
enum { TVAD_TAP_H, TVAD_TAP_W, TVAD_TAP_C, TVAD_TAP_ZERO, TVAD_TAP_MULTIPLIER, TVAD_TAP_SHIFT, TVAD_TAP_POOL,
       TVAD_TAP_RESERVED, TVAD_TAP_FIELDS };

/* tvad_crc.c. CRC-32 of zlib; crc is that of the bytes before, 0 at the start. */
uint32_t tvad_crc32(uint32_t crc, const uint8_t *data, size_t nbytes);

/* tvad_bank.c. Section `tag` (four characters, little-endian) of a file whose table was checked; 1 if it is there. */
int tvad_find_section(const uint8_t *file, uint32_t tag, tvad_section *section);

/* tvad_bank_kind.c. What scoring demands of the sections (docs/SPEC.md); fills the bank. */
tvad_status tvad_check_kind(tvad_bank *bank);

/* tvad_embed.c. Rows `row` to `row + rows - 1` of a tap's part of the embedding; part is the first of them. */
void tvad_embed_rows(const tvad_bank *bank, uint32_t tap, const int8_t *map, uint32_t row, uint32_t rows, int8_t *part,
                     void *scratch);

/* tvad_score.c. Bytes that tvad_score needs; the bank's fields are set, its sections need not be. Never overflows. */
uint64_t tvad_score_need(const tvad_bank *bank);

/* One value of a cell's vector at a time: parts[t] is tap t's first value of cell 0, `cell` cells further is ours. */
typedef struct {
    const tvad_bank *bank;
    const int8_t *const *parts;
    uint32_t cell;
    uint32_t tap, first;        /* the tap that holds the last value asked for, and its first channel of the vector */
} tvad_vector;

int8_t tvad_vector_value(tvad_vector *vector, uint32_t channel);

/* The scorers, tvad_score_*.c: squared distances of `cells` cells, of which the first is number `position` of the grid. */
typedef void tvad_scorer(const tvad_bank *bank, const int8_t *const parts[], uint32_t position, uint32_t cells,
                         uint32_t *distances, void *scratch);
tvad_scorer tvad_score_padim, tvad_score_core, tvad_score_pq;
uint32_t tvad_score_padim_scratch(const tvad_bank *bank);
uint32_t tvad_score_core_scratch(const tvad_bank *bank);
uint32_t tvad_score_pq_scratch(const tvad_bank *bank);

#endif
