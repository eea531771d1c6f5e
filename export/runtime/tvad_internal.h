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

/* Section TASK: the fields of a row. */
enum { TVAD_TASK_FIRST, TVAD_TASK_ROWS, TVAD_TASK_IMAGES, TVAD_TASK_RESERVED, TVAD_TASK_FIELDS };

/* tvad_crc.c. CRC-32 of zlib; crc is that of the bytes before, 0 at the start. */
uint32_t tvad_crc32(uint32_t crc, const uint8_t *data, size_t nbytes);

/* tvad_bank.c. Section `tag` (four characters, little-endian) of a file whose table was checked; 1 if it is there. */
int tvad_find_section(const uint8_t *file, uint32_t tag, tvad_section *section);

/* tvad_bank_kind.c. What scoring demands of the sections (docs/SPEC.md); fills the bank. */
tvad_status tvad_check_kind(tvad_bank *bank);

/* A section's dtype: docs/SPEC.md, table of dtypes. */
#define TVAD_I1 0x11u
#define TVAD_I2 0x12u
#define TVAD_I4 0x14u
#define TVAD_U1 0x21u
#define TVAD_U2 0x22u
#define TVAD_U4 0x24u
#define TVAD_F8 0x38u

/* Take a section of exactly this dtype and shape (0: unused dimension); 1 if it is there. */
int tvad_take(const tvad_bank *bank, uint32_t tag, uint32_t dtype, uint32_t dim0, uint32_t dim1, uint32_t dim2,
              tvad_section *section);

/* Is its float64, SCAL's unit for people, a positive and finite number? Told from its bits. */
int tvad_is_positive(const tvad_section *section);

/* tvad_score_*.c. The part of tvad_check_kind that is a scorer's own; config: CFG. */
tvad_status tvad_check_pairs(tvad_bank *bank, const int32_t *config);
tvad_status tvad_check_linear(tvad_bank *bank, const int32_t *config);
tvad_status tvad_check_centres(tvad_bank *bank, const int32_t *config);

/* tvad_embed.c. Rows `row` to `row + rows - 1` of a tap's part of the embedding; part is the first of them. */
void tvad_embed_rows(const tvad_bank *bank, uint32_t tap, const int8_t *map, uint32_t row, uint32_t rows, int8_t *part,
                     void *scratch);

/* The same file. Most values that one cell reaches along an axis; and the row of A that belongs to a cell: the first value that
 * it reaches, how many, the weight of each: int32 (2 + tvad_axis_support). */
uint32_t tvad_axis_support(uint32_t size, uint32_t grid, uint32_t pool);
void tvad_axis_row(uint32_t size, uint32_t grid, uint32_t pool, uint32_t cell, int32_t *row);

/* Does the scorer read the tapped maps themselves? Then a tap's part is the tap. */
static inline int tvad_is_native(const tvad_bank *bank)
{
    return bank->kind == TVAD_KIND_STFP;
}

/* Positions of a tap's part: those of its map, or the grid's cells. */
static inline uint32_t tvad_part_cells(const tvad_bank *bank, uint32_t tap)
{
    const int32_t *row = bank->tap_rows + TVAD_TAP_FIELDS * tap;

    return tvad_is_native(bank) ? (uint32_t)row[TVAD_TAP_H] * (uint32_t)row[TVAD_TAP_W]
                                : (uint32_t)bank->grid_h * bank->grid_w;
}

/* tvad_score.c. Bytes that tvad_score needs; the bank's fields are set, its sections need not be. Never overflows. */
uint64_t tvad_score_need(const tvad_bank *bank);

/* Values of a signature and of a row of PROT. */
static inline uint32_t tvad_last_channels(const tvad_bank *bank)
{
    return (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * (bank->taps - 1u) + TVAD_TAP_C];
}

/* A task's first row of BANK or CODE, and how many it has. */
static inline uint32_t tvad_task_first(const tvad_bank *bank, uint32_t task)
{
    return bank->task_rows == NULL ? 0 : (uint32_t)bank->task_rows[TVAD_TASK_FIELDS * task + TVAD_TASK_FIRST];
}

static inline uint32_t tvad_task_rows(const tvad_bank *bank, uint32_t task)
{
    return bank->task_rows == NULL ? bank->rows : (uint32_t)bank->task_rows[TVAD_TASK_FIELDS * task + TVAD_TASK_ROWS];
}

/* tvad_route.c. The signature, (tvad_last_channels) int32, of an image whose parts[t] is tap t's whole part of the embedding. */
void tvad_signature(const tvad_bank *bank, const int8_t *const parts[], int32_t *signature);

/* The same in pieces: adds `cells` cells of the last tap's part to a signature that began as zeros. */
void tvad_add_signature(const tvad_bank *bank, const int8_t *part, uint32_t cells, int32_t *signature);

/* The task whose prototype is nearest to a signature, the first of equals; 0 where there are no prototypes. */
uint32_t tvad_route(const tvad_bank *bank, const int32_t *signature);

/* One value of a cell's vector at a time: parts[t] is tap t's first value of cell 0, `cell` cells further is ours. */
typedef struct {
    const tvad_bank *bank;
    const int8_t *const *parts;
    uint32_t cell;
    uint32_t tap, first;        /* the tap that holds the last value asked for, and its first channel of the vector */
} tvad_vector;

int8_t tvad_vector_value(tvad_vector *vector, uint32_t channel);

/* The scorers, tvad_score_*.c: squared distances by one task of `cells` cells, of which the first is number `position` of
 * the grid. */
typedef void tvad_scorer(const tvad_bank *bank, uint32_t task, const int8_t *const parts[], uint32_t position,
                         uint32_t cells, uint32_t *distances, void *scratch);
tvad_scorer tvad_score_padim, tvad_score_core, tvad_score_pq, tvad_score_linear, tvad_score_centres;
uint32_t tvad_score_padim_scratch(const tvad_bank *bank);
uint32_t tvad_score_core_scratch(const tvad_bank *bank);
/* tvad_score_pairs.c. Scores of all cells of an image by student and teacher; of a position's golden vector (depth). */
void tvad_score_pairs(const tvad_bank *bank, const int8_t *const parts[], uint32_t *map, void *scratch);
uint32_t tvad_score_pairs_scratch(const tvad_bank *bank);
uint32_t tvad_score_pairs_vector(const tvad_bank *bank, const int8_t *vector);

uint32_t tvad_score_linear_scratch(const tvad_bank *bank);
uint32_t tvad_score_centres_scratch(const tvad_bank *bank);

/* tvad_score_core.c. A cell's vector, (depth) int16 in the order of tvad_slot. */
void tvad_make_query(const tvad_bank *bank, const int8_t *const parts[], uint32_t cell, int16_t *query);

/* What `count` further values add to `sum`, or any number from `limit` on if it is not below it. */
int32_t tvad_add_below(const int16_t *query, const int8_t *row, uint32_t count, int32_t sum, int32_t limit);

/* Look at `rows` int8 rows from `row` on; returns the smallest squared distance below `best`, else `best`, and where it was. */
int32_t tvad_scan_rows(const int16_t *query, const int8_t *row, uint32_t rows, uint32_t depth, int32_t best,
                       uint32_t *nearest);

uint32_t tvad_score_pq_scratch(const tvad_bank *bank);

#endif
