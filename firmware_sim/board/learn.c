/* The test program of learning: good pictures in, the new bank's slot out, then pictures scored with it; for
 * firmware_sim/board_learn.py, which says what the files hold.
 *
 * As in board.c the arena is filled with rubbish before every picture. Flash is read only but for the driver here, which has
 * the rules of NOR flash: erased before it is programmed, whole units, the header last.
 */
#include "board.h"

#include <string.h>

#include "model.h"
#include "tvad_learn.h"

typedef struct {
    uint32_t magic, learn, score, image_bytes, task, gate;
} request;

#define TAG(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)
#define REQUEST TAG('T', 'V', 'L', '1')

static uint8_t arena[TVAD_ARENA_BYTES] BOARD_IN(".arena") __attribute__((aligned(TVAD_ARENA_ALIGN)));
static uint8_t workspace[TVAD_LEARN_BYTES] BOARD_IN(".learning") __attribute__((aligned(16)));
#if TVAD_FRAME_BYTES > 0
static uint8_t frame_pixels[TVAD_FRAME_BYTES] BOARD_IN(".frame") __attribute__((aligned(32)));
static const tvad_frame camera = { frame_pixels, TVAD_FRAME_WIDTH, TVAD_FRAME_HEIGHT, TVAD_FRAME_STRIDE,
                                   TVAD_FRAME_FORMAT };
#define FRAME (&camera)
#define IMAGE_BYTES TVAD_FRAME_BYTES
#else
#define FRAME NULL
#define IMAGE_BYTES TVAD_INPUT_BYTES
#endif

static tvad_bank bank BOARD_RAM;
static tvad_learner learner BOARD_RAM;
static tvad_result result BOARD_RAM;
static request asked BOARD_RAM;
static uint32_t stack_bytes BOARD_RAM;

static void record(uint32_t tag, const void *data, size_t nbytes)
{
    const uint32_t head[2] = { tag, (uint32_t)nbytes };

    board_write(head, sizeof head);
    board_write(data, nbytes);
}

static int erase(void *user, uint32_t slot)
{
    (void)user;
    return board_flash_erase(slot == 0 ? tvad_slot_0 : tvad_slot_1, TVAD_SLOT_BYTES);
}

static int program(void *user, uint32_t slot, uint32_t offset, const void *data, uint32_t nbytes)
{
    (void)user;
    if (nbytes != TVAD_PROGRAM_UNIT || offset % TVAD_PROGRAM_UNIT != 0 || offset + nbytes > TVAD_SLOT_BYTES) {
        return 1;
    }
    return board_flash_program((slot == 0 ? tvad_slot_0 : tvad_slot_1) + offset, data, nbytes);
}

static const tvad_store store = { { tvad_slot_0, tvad_slot_1 }, TVAD_SLOT_BYTES, erase, program, NULL };

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* Open the newest slot, and test it. */
static tvad_status open_newest(void)
{
    uint32_t which, values[4];
    tvad_status status;

    memset(arena, 0xEE, sizeof arena);
    status = tvad_open_newest(tvad_slot_0, tvad_slot_1, TVAD_SLOT_BYTES, &bank, &which);
    values[0] = (uint32_t)status;
    values[1] = (uint32_t)(status == TVAD_OK ? tvad_self_test(&bank, arena, sizeof arena) : status);
    values[2] = which;
    values[3] = bank.generation;
    record(TAG('O', 'P', 'E', 'N'), values, sizeof values);
    return status;
}

/* Rubbish everywhere, then picture `number` where the camera would write it, scored. */
static tvad_status score(uint32_t number)
{
#if TVAD_FRAME_BYTES > 0
    uint8_t *const pixels = frame_pixels;
#else
    uint8_t *const pixels = tvad_input_pixels(&tvad_model_data, arena);
#endif

    memset(arena, (int)(0xA5u ^ (number & 0xFFu)), sizeof arena);
    board_read((uint32_t)sizeof asked + number * asked.image_bytes, pixels, asked.image_bytes);
    return tvad_run(&tvad_model_data, &bank, FRAME, arena, sizeof arena, &result);
}

static void write_result(uint32_t number, tvad_status status)
{
    const uint32_t cells = (uint32_t)result.grid_h * result.grid_w;
    const uint32_t values[9] = { number, (uint32_t)status, result.score, result.label, result.row, result.column,
                                 result.grid_h, result.grid_w, result.task };

    record(TAG('D', 'O', 'N', 'E'), values, sizeof values);
    if (status == TVAD_OK) {
        board_write(result.map, cells * sizeof result.map[0]);
    }
}

static void learn(uint32_t number)
{
    uint32_t values[9] = { number }, before;
    tvad_status status = score(number);

    if (status == TVAD_OK) {
        board_paint_stack();
        before = board_ticks();
        status = tvad_learn_image(&learner, &tvad_model_data, arena);
        values[8] = (before - board_ticks()) & 0xFFFFFFu;
        stack_bytes = larger(stack_bytes, board_stack_used());
    }
    values[1] = (uint32_t)status;
    values[2] = learner.novelty;
    values[3] = learner.radius;
    values[4] = learner.last_added;
    values[5] = learner.images;
    values[6] = learner.skipped;
    values[7] = learner.added;
    record(TAG('L', 'R', 'N', 'T'), values, sizeof values);
}

static void commit(void)
{
    uint32_t before, values[3];

    board_paint_stack();
    before = board_ticks();
    values[0] = (uint32_t)tvad_learn_commit(&learner, &store);
    values[1] = (before - board_ticks()) & 0xFFFFFFu;
    values[2] = larger(stack_bytes, board_stack_used());
    record(TAG('C', 'O', 'M', 'M'), values, sizeof values);
}

int main(void)
{
    uint32_t i, status;

    board_open();
    board_read(0, &asked, sizeof asked);
    if (asked.magic != REQUEST || asked.image_bytes != IMAGE_BYTES) {
        board_stop(3);
    }
    stack_bytes = 0;
    if (open_newest() != TVAD_OK) {
        board_stop(0);
    }
    status = (uint32_t)tvad_learn_begin(&learner, &bank, asked.task, asked.gate, workspace, sizeof workspace);
    record(TAG('B', 'E', 'G', 'N'), &status, sizeof status);
    for (i = 0; i < asked.learn && status == (uint32_t)TVAD_OK; i++) {
        learn(i);
    }
    if (status == (uint32_t)TVAD_OK) {
        commit();
    }
    if (open_newest() == TVAD_OK) {
        record(TAG('S', 'L', 'O', 'T'), bank.base, bank.nbytes);
        for (i = asked.learn; i < asked.learn + asked.score; i++) {
            const tvad_status scored = score(i);

            write_result(i, scored);
        }
    }
    record(TAG('E', 'N', 'D', '.'), NULL, 0);
    board_stop(0);
    return 0;
}
