/* The test program around a build's firmware: pictures in, results and tensors out, for firmware_sim/harness.py.
 *
 * The arena holds nothing between calls: it is filled with rubbish before every picture, so a plan or a kernel that reads
 * what nobody wrote gives other integers than Python's.
 */
#include "board.h"

#include <string.h>

#include "model.h"
#include "tvad.h"

/* bits of a request's flags */
#define TRACE 1u   /* rows of the layers that are asked for */
#define COUNT 2u   /* ticks of every step of the first picture */
#define BREAK 0xF0u /* which fence to break, in bits 4 to 7 */

typedef struct {
    uint32_t magic, images, image_bytes, flags, layers;
} request;

#define TAG(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)
#define REQUEST TAG('T', 'V', 'R', '1')

static uint8_t arena[TVAD_ARENA_BYTES] BOARD_IN(".arena") __attribute__((aligned(TVAD_ARENA_ALIGN)));
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
static tvad_result result BOARD_RAM;
static request asked BOARD_RAM;
static uint8_t wanted[BOARD_LAYERS] BOARD_RAM; /* 1: write this layer's rows */
static uint32_t image_number BOARD_RAM, last_tick BOARD_RAM;

static void record(uint32_t tag, const void *data, size_t nbytes)
{
    const uint32_t head[2] = { tag, (uint32_t)nbytes };

    board_write(head, sizeof head);
    board_write(data, nbytes);
}

/* Rubbish everywhere, then the picture where the camera would write it. */
static void load(void)
{
#if TVAD_FRAME_BYTES > 0
    uint8_t *const pixels = frame_pixels;
#else
    uint8_t *const pixels = tvad_input_pixels(&tvad_model_data, arena);
#endif

    memset(arena, (int)(0xA5u ^ (image_number & 0xFFu)), sizeof arena);
    board_read((uint32_t)sizeof asked + asked.layers + image_number * asked.image_bytes, pixels, asked.image_bytes);
}

static tvad_status run(const tvad_observer *observer)
{
    if (observer == NULL) {
        return tvad_run(&tvad_model_data, &bank, FRAME, arena, sizeof arena, &result);
    }
    return tvad_run_observed(&tvad_model_data, &bank, FRAME, arena, sizeof arena, &result, observer);
}

/* Ticks since the last call go out; what this function does itself is not counted. */
static void count_step(void *user, const tvad_model *model, uint32_t step, const uint8_t *base)
{
    const uint32_t now = board_ticks();
    const uint32_t values[3] = { step, model->steps[step].layer, (last_tick - now) & 0xFFFFFFu };

    (void)user;
    (void)base;
    record(TAG('T', 'I', 'C', 'K'), values, sizeof values);
    last_tick = board_ticks();
}

/* The rows that a step has made, whole rows of the output tensor. */
static void write_rows(void *user, const tvad_model *model, uint32_t step, const uint8_t *base)
{
    const tvad_step *done = &model->steps[step];

    (void)user;
    if (done->layer < model->n_layers && done->layer < asked.layers && wanted[done->layer] != 0) {
        const tvad_layer *layer = &model->layers[done->layer];
        const size_t row_bytes = (size_t)layer->out_w * layer->out_c;
        const uint32_t values[4] = { image_number, done->layer, done->row, done->rows };

        record(TAG('R', 'O', 'W', 'S'), values, sizeof values);
        board_write(base + done->out + (size_t)(done->row - done->out_first) * row_bytes, done->rows * row_bytes);
    }
}

static void write_result(tvad_status status)
{
    const uint32_t cells = (uint32_t)result.grid_h * result.grid_w;
    const uint32_t values[9] = { image_number, (uint32_t)status, result.score, result.label, result.row, result.column,
                                 result.grid_h, result.grid_w, result.task };

    record(TAG('D', 'O', 'N', 'E'), values, sizeof values);
    if (status == TVAD_OK) {
        board_write(result.map, cells * sizeof result.map[0]);
    }
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

int main(void)
{
    const tvad_observer counter = { count_step, NULL };
    const tvad_observer tracer = { write_rows, NULL };
    const uint8_t *bank_data;
    size_t bank_bytes;
    tvad_status status;
    uint32_t opened[3];

    board_open();
    board_read(0, &asked, sizeof asked);
    if (asked.magic != REQUEST || asked.layers > BOARD_LAYERS || asked.image_bytes != IMAGE_BYTES) {
        board_stop(3);
    }
    board_read(sizeof asked, wanted, asked.layers);
    bank_data = board_bank(&bank_bytes);

    memset(arena, 0xEE, sizeof arena);
    board_paint_stack();
    status = tvad_open(bank_data, bank_bytes, &bank);
    opened[0] = (uint32_t)status;
    opened[1] = (uint32_t)(status == TVAD_OK ? tvad_self_test(&bank, arena, sizeof arena) : status);
    opened[2] = board_stack_used();
    record(TAG('O', 'P', 'E', 'N'), opened, sizeof opened);
    if (status != TVAD_OK) {
        board_stop(0);
    }
    if ((asked.flags & BREAK) != 0) {
        board_break_fence((asked.flags & BREAK) >> 4);
    }
    for (image_number = 0; image_number < asked.images; image_number++) {
        if (image_number == 0) {
            load();
            board_paint_stack();
            (void)run(NULL);
            opened[2] = larger(opened[2], board_stack_used());
            record(TAG('S', 'T', 'C', 'K'), &opened[2], sizeof opened[2]);
            if ((asked.flags & COUNT) != 0) {
                load();
                last_tick = board_ticks();
                (void)run(&counter);
            }
        }
        load();
        status = run((asked.flags & TRACE) != 0 ? &tracer : NULL);
        write_result(status);
    }
    record(TAG('E', 'N', 'D', '.'), NULL, 0);
    board_stop(0);
    return 0;
}
