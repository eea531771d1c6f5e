/* tvad runtime: learning on the device. Good images in, a bank with one product more (or more of an old one) in the other slot.
 *
 *     tvad_open_newest(store.slots[0], store.slots[1], store.slot_bytes, &bank, &which);             once, and after a commit
 *     tvad_learn_begin(&learner, &bank, TVAD_NEW_TASK, 0, workspace, sizeof workspace);
 *     for every good image:
 *         tvad_run(&tvad_model_data, &bank, &frame, arena, sizeof arena, &result);
 *         tvad_learn_image(&learner, &tvad_model_data, arena);
 *     tvad_learn_commit(&learner, &store);
 *
 * For CORE banks (PatchCore, int8 rows) that were made for it: UPDATABLE, with TASK, PROT, LADR and LRN. Flash is only read
 * until the commit, which erases and programs the slot that the bank does not lie in, header last: a power cut at any moment
 * leaves the old bank or the new one (docs/SPEC.md, "Updating: two slots"). The same integers and the same bytes as Python's
 * tinyvad/detectors/device_learning.py.
 */
#ifndef TVAD_LEARN_H
#define TVAD_LEARN_H

#include "tvad.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TVAD_NEW_TASK 0xFFFFFFFFu   /* learn a product that the bank does not know */
#define TVAD_NO_ROWS 0x7FFFFFFFu    /* novelty of a new task's first image: there is nothing to compare it with */
#define TVAD_RECENT 64u             /* novelties that the threshold looks back at, at most */
#define TVAD_MARKS 31u              /* powers of two that a number of rows can pass */
#define TVAD_PROGRAM_UNIT 32u       /* bytes that are programmed at a time */

/* Two slots of flash and how to write them, filled in by the application. The functions return 0 for success.
 * erase: all bytes of the slot become 0xFF. program: TVAD_PROGRAM_UNIT bytes at a multiple of it, never twice at one place
 * without an erase, in rising order but for the header at offset 0, which comes last. A driver for larger pages collects them.
 * Afterwards the core must read what was written: a driver invalidates the cache, where there is one. */
typedef struct {
    const uint8_t *slots[2];        /* where they are read; at a multiple of the bank's align */
    uint32_t slot_bytes;            /* of each; whole erase sectors */
    int (*erase)(void *user, uint32_t slot);
    int (*program)(void *user, uint32_t slot, uint32_t offset, const void *data, uint32_t nbytes);
    void *user;
} tvad_store;

/* One session of learning. Fields are for reading. */
typedef struct {
    const tvad_bank *bank;
    uint32_t task, tasks;           /* number of the task in the new bank, tasks that it will have */
    uint32_t images, skipped;       /* learnt; left out by the gate */
    uint32_t novelty;               /* of the last image, before it was learnt: what it scored */
    uint32_t radius;                /* of the last image, after it was learnt */
    uint32_t spread;                /* of a new task's first image: largest distance from its first cell */
    uint32_t last_added;            /* rows that the last image has added */
    uint32_t old_rows, added;       /* rows that the task had and has gained */
    uint32_t most_rows, share;      /* rows of all tasks, and of one of `tasks` */
    uint32_t capacity;              /* rows that this task may have, by share and workspace */
    uint32_t per_image, tau2;       /* rows that an image may add; squared distance up to which a vector is not new */
    uint32_t slot_bytes;            /* that the new bank may take, by LRN */
    uint32_t gate;                  /* images of a higher novelty are not learnt; 0: all are */
    const int8_t *old;              /* (old_rows, D), in flash */
    int32_t *distance;              /* workspace: (cells), later the new header and table */
    int64_t *total;                 /* workspace: (channels of the last tap), sum of the signatures */
    void *scratch;                  /* workspace: one vector, int16, or one signature, int32 */
    int8_t *rows;                   /* workspace: (added, D) */
    uint32_t marked, marks[TVAD_MARKS]; /* thresholds when the task had at most 1, 2, 4 ... rows; 0: not known */
    uint32_t recent[TVAD_RECENT];   /* novelties, image i at i % TVAD_RECENT */
} tvad_learner;

/* Of two slots the valid bank with the higher generation, the first of equals; which: 0 or 1, may be NULL.
 * If neither is valid: the first slot's error. */
tvad_status tvad_open_newest(const void *slot0, const void *slot1, size_t slot_bytes, tvad_bank *bank, uint32_t *which);

/* Bytes of workspace for learning up to `rows` new rows; 0 for a bank that can't be learnt on. */
size_t tvad_learn_bytes(const tvad_bank *bank, uint32_t rows);

/* Begin a session with task number `task` of the bank or TVAD_NEW_TASK. The workspace is aligned to 16; as many rows as fit
 * can be learnt. bank and workspace must stay until the commit. */
tvad_status tvad_learn_begin(tvad_learner *learner, const tvad_bank *bank, uint32_t task, uint32_t gate, void *workspace,
                             size_t nbytes);

/* Learn the image that tvad_run has just scored with this arena; nothing in it may have changed since. */
tvad_status tvad_learn_image(tvad_learner *learner, const tvad_model *model, const void *arena);

/* The same for who keeps another engine: parts[t] is tap t's part of the embedding, (grid_h, grid_w, C) int8. */
tvad_status tvad_learn_parts(tvad_learner *learner, const int8_t *const parts[]);

/* Write the new bank into the slot that the learner's bank does not lie in. On TVAD_OK that slot is the newest: open it, and
 * begin anew to learn more. On an error the old bank is the current one; it may be tried again. */
tvad_status tvad_learn_commit(tvad_learner *learner, const tvad_store *store);

#ifdef __cplusplus
}
#endif
#endif
