/* A frame in, a result out: checks that model, bank, frame and arena go together, then follows the plan step by step. */
#include <string.h>

#include "tvad_internal.h"
#include "tvad_kernels.h"

static int overlap(uint32_t a, uint32_t a_bytes, uint32_t b, uint32_t b_bytes)
{
    return (a < (b + b_bytes)) && (b < (a + a_bytes));
}

/* Scratch of `bytes` at the step's place ends within the arena. */
static int scratch_fits(const tvad_model *model, const tvad_step *step, uint32_t bytes)
{
    return (bytes == 0u) || ((step->scratch <= model->arena_bytes) && (bytes <= (model->arena_bytes - step->scratch)));
}

/* The plan was made with one bank; a newer one of the same network may need more scratch than there is. */
static tvad_status check_score(const tvad_model *model, const tvad_bank *bank, const tvad_step *step)
{
    const uint32_t cells = (uint32_t)bank->grid_h * bank->grid_w; /* of the map */
    const uint32_t bytes = tvad_score_parts_scratch(bank);

    if (!scratch_fits(model, step, bytes)) {
        return TVAD_ERROR_ARENA;
    }
    if ((bytes != 0u) && overlap(step->scratch, bytes, step->out, cells * (uint32_t)sizeof(uint32_t))) {
        return TVAD_ERROR_ARENA;
    }
    for (uint32_t tap = 0u; tap < bank->taps; tap++) {
        const uint32_t channels = (uint32_t)bank->tap_rows[(tap * TVAD_TAP_FIELDS) + TVAD_TAP_C];

        if ((bytes != 0u) && overlap(step->scratch, bytes, model->parts[tap], tvad_part_cells(bank, tap) * channels)) {
            return TVAD_ERROR_ARENA;
        }
    }
    return TVAD_OK;
}

static tvad_status check_bank(const tvad_model *model, const tvad_bank *bank)
{
    tvad_status status = TVAD_OK;

    if ((bank->backbone_crc32 != model->backbone_crc32) || (bank->taps != model->taps) ||
        (bank->grid_h != model->grid_h) || (bank->grid_w != model->grid_w) ||
        (bank->input_h != model->input_h) || (bank->input_w != model->input_w)) {
        return TVAD_ERROR_BACKBONE;
    }
    for (uint32_t i = 0u; (i < model->n_steps) && (status == TVAD_OK); i++) {
        const tvad_step *const step = &model->steps[i];
        const tvad_layer *const layer = (step->layer == TVAD_MOVE) ? NULL : &model->layers[step->layer];

        if ((layer != NULL) && (layer->op == (uint8_t)TVAD_OP_EMBED)) {
            const int32_t *const tap = &bank->tap_rows[(uint32_t)layer->channel * TVAD_TAP_FIELDS];

            if ((tap[TVAD_TAP_H] != (int32_t)layer->in_h) || (tap[TVAD_TAP_W] != (int32_t)layer->in_w) ||
                (tap[TVAD_TAP_C] != (int32_t)layer->in_c) || (tap[TVAD_TAP_POOL] != (int32_t)layer->kernel_h)) {
                status = TVAD_ERROR_BACKBONE;
            } else if (!scratch_fits(model, step, tvad_embed_scratch(bank, layer->channel))) {
                status = TVAD_ERROR_ARENA;
            } else {
                status = TVAD_OK;
            }
        } else if ((layer != NULL) && (layer->op == (uint8_t)TVAD_OP_SCORE)) {
            status = check_score(model, bank, step);
        } else {
            status = TVAD_OK;
        }
    }
    return status;
}

/* A model without a camera takes RGB888 frames of the network's size, or none: then the pixels are in the arena already. */
static tvad_status check_frame(const tvad_model *model, const tvad_frame *frame)
{
    const uint32_t height = (model->frame_h != 0u) ? model->frame_h : model->input_h;
    const uint32_t width = (model->frame_w != 0u) ? model->frame_w : model->input_w;
    const uint32_t pixel = (model->frame_format == (uint8_t)TVAD_RGB888) ? 3u
                           : (model->frame_format == (uint8_t)TVAD_RGB565) ? 2u : 1u;

    if (frame == NULL) {
        return (model->frame_h == 0u) ? TVAD_OK : TVAD_ERROR_FRAME;
    }
    if ((frame->pixels == NULL) || (frame->height != height) || (frame->width != width) ||
        (frame->stride < (width * pixel)) || ((uint8_t)frame->format != model->frame_format)) {
        return TVAD_ERROR_FRAME;
    }
    return TVAD_OK;
}

static int8_t *place(void *arena, uint32_t offset)
{
    return (offset == TVAD_NONE) ? NULL : ((int8_t *)arena + offset);
}

static void score(const tvad_model *model, const tvad_bank *bank, const tvad_step *step, void *arena, tvad_result *result)
{
    const int8_t *parts[TVAD_MAX_TAPS];

    for (uint32_t tap = 0u; tap < model->taps; tap++) {
        parts[tap] = place(arena, model->parts[tap]);
    }
    tvad_score_parts(bank, parts, (uint32_t *)(void *)place(arena, step->out), place(arena, step->scratch), result);
}

static void run_step(const tvad_model *model, const tvad_bank *bank, const tvad_frame *frame, const tvad_step *step,
                     void *arena, tvad_result *result)
{
    const tvad_layer *const layer = &model->layers[step->layer];
    tvad_window window;

    window.in[0] = place(arena, step->in[0]);
    window.in[1] = place(arena, step->in[1]);
    window.out = place(arena, step->out);
    window.in_first[0] = (int32_t)step->in_first[0];
    window.in_first[1] = (int32_t)step->in_first[1];
    window.out_first = (int32_t)step->out_first;
    window.row = (int32_t)step->row;
    window.rows = (int32_t)step->rows;
    window.scratch = place(arena, step->scratch);

    switch ((tvad_op)layer->op) {
    case TVAD_OP_FRAME:
        tvad_frame_rows(layer, &window, bank, frame);
        break;
    case TVAD_OP_CONV_1X1:
        tvad_conv_1x1(layer, &window);
        break;
    case TVAD_OP_CONV:
        tvad_conv(layer, &window);
        break;
    case TVAD_OP_DEPTHWISE:
        tvad_depthwise(layer, &window);
        break;
    case TVAD_OP_FULLY_CONNECTED:
        tvad_fully_connected(layer, &window);
        break;
    case TVAD_OP_ADD:
        tvad_add(layer, &window);
        break;
    case TVAD_OP_MUL:
        tvad_mul(layer, &window);
        break;
    case TVAD_OP_AVERAGE_POOL:
    case TVAD_OP_MAX_POOL:
        tvad_pool(layer, &window);
        break;
    case TVAD_OP_MEAN:
        tvad_mean(layer, &window);
        break;
    case TVAD_OP_LOOKUP:
        tvad_lookup(layer, &window);
        break;
    case TVAD_OP_COPY:
        tvad_copy(layer, &window);
        break;
    case TVAD_OP_PAD:
        tvad_pad(layer, &window);
        break;
    case TVAD_OP_RESIZE_NEAREST:
        tvad_resize_nearest(layer, &window);
        break;
    case TVAD_OP_EMBED:
        tvad_embed(bank, layer->channel, window.in[0], window.out, window.scratch);
        break;
    case TVAD_OP_SCORE:
        score(model, bank, step, arena, result);
        break;
    default:  /* the exporter writes no other */
        break;
    }
}

tvad_status tvad_run_observed(const tvad_model *model, const tvad_bank *bank, const tvad_frame *frame, void *arena,
                              size_t arena_bytes, tvad_result *result, const tvad_observer *observer)
{
    tvad_status status = check_bank(model, bank);

    if ((status == TVAD_OK) &&
        ((arena == NULL) || (arena_bytes < model->arena_bytes) || (((uintptr_t)arena % TVAD_ARENA_ALIGN) != 0u))) {
        status = TVAD_ERROR_ARENA;
    }
    if (status == TVAD_OK) {
        status = check_frame(model, frame);
    }
    if (status != TVAD_OK) {
        return status;
    }
    for (uint32_t i = 0u; i < model->n_steps; i++) {
        const tvad_step *const step = &model->steps[i];

        if (step->layer == TVAD_MOVE) {
            (void)memmove(place(arena, step->out), place(arena, step->in[0]), step->scratch);
        } else {
            run_step(model, bank, frame, step, arena, result);
        }
        if (observer != NULL) {
            observer->call(observer->user, model, i, (const uint8_t *)arena);
        }
    }
    return TVAD_OK;
}

tvad_status tvad_run(const tvad_model *model, const tvad_bank *bank, const tvad_frame *frame, void *arena,
                     size_t arena_bytes, tvad_result *result)
{
    return tvad_run_observed(model, bank, frame, arena, arena_bytes, result, NULL);
}

uint8_t *tvad_input_pixels(const tvad_model *model, void *arena)
{
    return (uint8_t *)place(arena, model->input);
}
