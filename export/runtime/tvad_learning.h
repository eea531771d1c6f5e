/* What tvad_learn.c, tvad_next.c and tvad_write.c share; no part of the interface. */
#ifndef TVAD_LEARNING_H
#define TVAD_LEARNING_H

#include "tvad_internal.h"
#include "tvad_learn.h"

#define TVAD_HEADER_BYTES 64u
#define TVAD_ENTRY_BYTES 32u
#define TVAD_MAX_TASKS 255u

/* Section LRN: its numbers. */
enum { TVAD_LRN_SLOT, TVAD_LRN_TASKS, TVAD_LRN_ROWS, TVAD_LRN_PER_IMAGE, TVAD_LRN_NOVELTY };

/* Fields of a bank's header that tvad_bank does not hold. */
static inline uint32_t tvad_section_count(const tvad_bank *bank)
{
    return (uint32_t)bank->base[16] | (uint32_t)bank->base[17] << 8;
}

static inline int tvad_is_updatable(const tvad_bank *bank)
{
    return (bank->base[30] & 1u) != 0;
}

/* Squared distance of a cell to the nearest of some rows in flash and of the first `added` new ones. */
uint32_t tvad_learn_nearest(const tvad_learner *learner, const int8_t *const parts[], uint32_t cell, const int8_t *old,
                            uint32_t old_rows, uint32_t added);

/* The threshold that the images so far give; at least one. */
uint32_t tvad_learn_threshold(const tvad_learner *learner);

/* The powers of two below `rows` are passed: keep the threshold of the images so far. */
void tvad_learn_mark(tvad_learner *learner, uint32_t rows);

/* Where bytes go: CRCs only, or the slot too, a whole unit at a time. */
typedef struct {
    tvad_learner *learner;
    const tvad_store *store;        /* NULL: CRCs only */
    uint32_t slot, offset;          /* of the byte that comes next */
    uint32_t section_crc, payload_crc;
    int is_cut;                     /* the other tasks give way to this one */
    int failed;
    uint8_t unit[TVAD_PROGRAM_UNIT];
} tvad_writer;

/* tvad_write.c. The next bytes of the new bank. */
void tvad_emit(tvad_writer *w, const void *data, uint32_t nbytes);

/* tvad_next.c. Is a section of the old bank in the new one too; its first dimension there, `old` where that stays. */
int tvad_next_has(uint32_t tag);
uint32_t tvad_next_dim(const tvad_writer *w, uint32_t tag, uint32_t old);

/* The section's bytes, through tvad_emit. */
void tvad_next_section(tvad_writer *w, uint32_t tag);

/* Rows of all tasks of the new bank; images that a task has seen then. */
uint32_t tvad_next_rows(const tvad_writer *w);
uint32_t tvad_next_images(const tvad_learner *learner, uint32_t task);

#endif
