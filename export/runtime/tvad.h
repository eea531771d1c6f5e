/* tinyvad runtime: a frame in, an anomaly score out, in integers that equal Python's bit for bit.
 *
 *     tvad_bank bank;
 *     tvad_result result;
 *     tvad_open(tvad_bank_bin, tvad_bank_bin_size, &bank);                       once: checks the bank where it lies in flash
 *     tvad_run(&tvad_model_data, &bank, &frame, arena, sizeof arena, &result);   every image
 *     if (result.label) { reject(); }
 *
 * No heap, no floating point, no libm, no global state: everything that is written lies in the caller's arena.
 * Who keeps another engine for the network uses tvad_open, tvad_score_bytes and tvad_score alone.
 */
#ifndef TVAD_H
#define TVAD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TVAD_MAX_TAPS 16u       /* tapped tensors of one bank */
#define TVAD_ARENA_ALIGN 32u    /* bytes; arena addresses and sizes are multiples of it */

/* Kinds of bank: the four characters in file order, read as a little-endian number. */
#define TVAD_KIND_PADM 0x4D444150u
#define TVAD_KIND_PADF 0x46444150u
#define TVAD_KIND_PADC 0x43444150u
#define TVAD_KIND_CORE 0x45524F43u
#define TVAD_KIND_PQPC 0x43505150u
#define TVAD_KIND_STFP 0x50465453u
#define TVAD_KIND_LINR 0x524E494Cu
#define TVAD_KIND_CFAS 0x53414643u

/* What went wrong; the numbers are stable. tvad_status_text gives a line for each. */
typedef enum {
    TVAD_OK = 0,
    TVAD_ERROR_MAGIC = 1,       /* no bank: magic, version or a fixed size is wrong */
    TVAD_ERROR_SIZE = 2,        /* file size, section count or an offset does not go with the bytes there are */
    TVAD_ERROR_CRC = 3,         /* damaged bytes */
    TVAD_ERROR_FIELD = 4,       /* a field outside the values of docs/SPEC.md */
    TVAD_ERROR_SECTION = 5,     /* a section that the kind needs is missing, unknown but required, or malformed */
    TVAD_ERROR_BACKBONE = 6,    /* the bank was fitted on another network */
    TVAD_ERROR_ARENA = 7,       /* the arena is too small or not aligned */
    TVAD_ERROR_FRAME = 8,       /* the frame's size or format is not the model's */
    TVAD_ERROR_ALIGNMENT = 9,   /* the bank does not lie at a multiple of its align */
    TVAD_ERROR_LEARN = 10,      /* the bank is not made for learning on a device, has no such task, or nothing was learnt */
    TVAD_ERROR_FULL = 11,       /* no room for another task, row, generation, or for the new bank in its slot */
    TVAD_ERROR_STORE = 12       /* a slot can't be erased or programmed, or holds other bytes than it should */
} tvad_status;

const char *tvad_status_text(tvad_status status);

/* One section of a bank, where it lies. */
typedef struct {
    const void *data;
    uint32_t nbytes;
    uint32_t dim[3];
    uint8_t dtype;              /* docs/SPEC.md, table of dtypes */
    uint8_t ndim;
} tvad_section;

/* An opened bank: pointers into flash, nothing copied. Fields are for reading. */
typedef struct {
    const uint8_t *base;
    uint32_t nbytes;
    uint32_t kind;              /* TVAD_KIND_... */
    uint32_t backbone_crc32;
    uint32_t header_crc32;      /* identifies the bank */
    uint32_t generation;
    uint16_t input_h, input_w;  /* pixels */
    uint16_t grid_h, grid_w;    /* cells of the score map */
    uint16_t depth;             /* D: int8 values of one cell's vector */
    uint16_t values;            /* d (PADM, PADF, PADC), pairs (STFP), else D */
    uint32_t rows;              /* K: of all tasks (CORE, PQPC), of all centres (CFAS), else 0 */
    uint16_t subspaces;         /* M (PQPC), else 0 */
    uint8_t bits;               /* of a factor entry or a code; of a distance behind the point (STFP), of a table's step (CFAS) */
    uint8_t mode;               /* 0 identity, 1 chosen channels, 2 projection */
    uint8_t taps;
    uint8_t shift;              /* bits that the product of all pairs (STFP) or a vector (CFAS) loses, else 0 */
    uint8_t tasks;              /* T, products that the bank knows; at least 1 */
    const int32_t *tap_rows;    /* TAPS, (taps, 8) */
    const int8_t *input_table;  /* LUT, (3, 256) */
    const uint32_t *thresholds; /* THRS, (tasks): at or above its task's an image is anomalous */
    const int32_t *task_rows;   /* TASK, (tasks, 4); NULL where there is none: one task that has all rows */
    const int32_t *prototypes;  /* PROT, (tasks, channels of the last tap); NULL where there is none */
    tvad_section mean, codes, tables, factor, indices, projection, bias, vectors, codebook;
    tvad_section test, gold;    /* nbytes 0 where there are none */
} tvad_bank;

/* What one image gave. The map lies in the arena (or the caller's buffer): (grid_h, grid_w), squared distances mostly. */
typedef struct {
    uint32_t score;             /* the largest of the map; a higher one is more anomalous */
    uint16_t row, column;       /* where it is */
    uint16_t grid_h, grid_w;
    uint8_t label;              /* 1: score >= threshold of the task */
    uint8_t task;               /* product that the image was taken for, and scored by: its row of THRS */
    const uint32_t *map;
} tvad_result;

typedef enum { TVAD_RGB888 = 0, TVAD_RGB565 = 1, TVAD_GREY8 = 2 } tvad_format;

/* A camera's picture. RGB565: little-endian 16-bit words, red in the high bits. Rows follow each other `stride` bytes apart. */
typedef struct {
    const void *pixels;
    uint16_t width, height;
    uint32_t stride;
    tvad_format format;
} tvad_frame;

/* --- bank --- */

/* Check a bank of at most `size` bytes at `data` (a slot of flash: size >= its file_size) and point into it.
 * Refuses exactly what tinyvad.bank refuses. `data` must be aligned to the bank's align. */
tvad_status tvad_open(const void *data, size_t size, tvad_bank *bank);

/* Score the bank's own golden vectors: TVAD_OK, or TVAD_ERROR_CRC if one differs. scratch as for tvad_score. */
tvad_status tvad_self_test(const tvad_bank *bank, void *scratch, size_t scratch_bytes);

/* Bytes of scratch that tvad_score needs, the map included. */
size_t tvad_score_bytes(const tvad_bank *bank);

/* Score tapped tensors of any engine: taps[i] is (h, w, C) int8, NHWC, as row i of TAPS says. scratch is aligned to 16. */
tvad_status tvad_score(const tvad_bank *bank, const int8_t *const taps[], void *scratch, size_t scratch_bytes,
                       tvad_result *result);

/* The int8 network input of `count` RGB888 pixels: out[3 i + c] = LUT[c][rgb[3 i + c]]; may work in place. */
void tvad_input(const tvad_bank *bank, const uint8_t *rgb, int8_t *out, size_t count);

/* --- whole model --- */

struct tvad_model;              /* tvad_model.h; model.c of a build defines one */
typedef struct tvad_model tvad_model;

/* Called after every step of tvad_run; for tests and measurements. */
typedef struct {
    void (*call)(void *user, const tvad_model *model, uint32_t step, const uint8_t *arena);
    void *user;
} tvad_observer;

/* Score one frame. arena: at least the model's arena_bytes, aligned to TVAD_ARENA_ALIGN. frame may be NULL where the model's
 * camera writes RGB888 of the network's size to tvad_input_pixels(model, arena). */
tvad_status tvad_run(const tvad_model *model, const tvad_bank *bank, const tvad_frame *frame, void *arena,
                     size_t arena_bytes, tvad_result *result);
tvad_status tvad_run_observed(const tvad_model *model, const tvad_bank *bank, const tvad_frame *frame, void *arena,
                              size_t arena_bytes, tvad_result *result, const tvad_observer *observer);
uint8_t *tvad_input_pixels(const tvad_model *model, void *arena);

#ifdef __cplusplus
}
#endif
#endif
