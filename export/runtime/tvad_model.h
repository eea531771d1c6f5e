/* A network and its memory plan as constants in flash: what model.c of a build defines and tvad_run executes.
 *
 * A model is a list of layers (what to compute) and a list of steps (when, on which rows, where in the arena). The plan was
 * made and checked on the PC; the device only follows it. A map may be made a few rows at a time: `row` and `rows` of a step
 * say which, and `*_first` which row of a tensor lies first in its buffer.
 */
#ifndef TVAD_MODEL_H
#define TVAD_MODEL_H

#include "tvad.h"

/* What a layer computes. */
typedef enum {
    TVAD_OP_FRAME = 0,          /* frame -> resized RGB888 -> int8 through the bank's LUT; or the table alone, in place */
    TVAD_OP_CONV_1X1 = 1,       /* 1x1, stride 1, no padding */
    TVAD_OP_CONV = 2,
    TVAD_OP_DEPTHWISE = 3,      /* may work in place, whole maps only */
    TVAD_OP_FULLY_CONNECTED = 4,
    TVAD_OP_ADD = 5,            /* may work in place of either operand */
    TVAD_OP_MUL = 6,            /* second operand (h, w, C) or (1, 1, C); may work in place of the first */
    TVAD_OP_AVERAGE_POOL = 7,
    TVAD_OP_MAX_POOL = 8,
    TVAD_OP_MEAN = 9,           /* over the whole map */
    TVAD_OP_LOOKUP = 10,        /* out = table[(uint8_t)in]: logistic, hard-swish, ReLU; may work in place */
    TVAD_OP_COPY = 11,          /* rows into channels `channel`.. of the output (concat), or as they are (reshape) */
    TVAD_OP_PAD = 12,           /* border of out_zero */
    TVAD_OP_RESIZE_NEAREST = 13,
    TVAD_OP_EMBED = 14,         /* tap number `channel` -> its part of what is scored: of the embedding (grid_h, grid_w, C),
                                 * by the bank's TAPS, or (STFP) a copy of the tap */
    TVAD_OP_SCORE = 15          /* all parts -> map and result */
} tvad_op;

/* One layer. Which constants an op has:
 *   CONV_1X1, CONV, DEPTHWISE, FULLY_CONNECTED: weights (packed, tvad_kernels.h), bias int32[out_c] with the input's zero
 *       point folded in, multiplier int32[out_c], shift int8[out_c] (TFLite: positive shifts left)
 *   ADD: bias = {a multiplier, a shift, b multiplier, b shift, out multiplier, out shift}
 *   MUL, MEAN: bias = {multiplier, shift}
 *   LOOKUP: weights = int8[256], in order of the value as uint8
 *   EMBED: kernel_h, kernel_w = width of the bank's pooling (TAPS)
 *   RESIZE_NEAREST: weights = uint16[out_h] input rows, then uint16[out_w] input columns */
typedef struct {
    uint8_t op;
    uint8_t kernel_h, kernel_w;
    uint8_t stride_h, stride_w;
    uint8_t pad_top, pad_left;
    uint8_t dilation;
    uint16_t in_h, in_w, in_c;
    uint16_t out_h, out_w, out_c;
    uint16_t channel;
    int8_t in_zero, in2_zero, out_zero;
    int8_t low, high;           /* what the fused activation lets through */
    uint8_t broadcast;          /* MUL: 1 if the second operand is (1, 1, C) */
    const void *weights;
    const int32_t *bias;
    const int32_t *multiplier;
    const int8_t *shift;
} tvad_layer;

#define TVAD_MOVE 0xFFFFu       /* step.layer: move `scratch` bytes from in[0] to out (halo rows to the front of a buffer) */
#define TVAD_NONE 0xFFFFFFFFu   /* no such offset */

/* One step: make output rows `row` to `row + rows - 1` of a layer. All offsets are bytes from the arena's base. */
typedef struct {
    uint16_t layer;
    uint16_t row, rows;
    uint16_t in_first[2], out_first;
    uint32_t in[2], out, scratch;
} tvad_step;

struct tvad_model {
    const char *name;
    uint32_t backbone_crc32;    /* of backbone.tflite; the bank names the same */
    const tvad_layer *layers;
    const tvad_step *steps;
    uint16_t n_layers, n_steps;
    uint16_t input_h, input_w;  /* of the network, pixels */
    uint16_t frame_h, frame_w;  /* of the camera; 0: the camera writes the network's input, at offset `input` */
    uint8_t frame_format;       /* tvad_format */
    uint8_t taps;
    uint16_t grid_h, grid_w;
    uint32_t input;             /* offset of the RGB888 pixels in the arena, TVAD_NONE where there is a frame */
    const uint32_t *parts;      /* offset of every tap's part of the embedding, [taps] */
    uint32_t arena_bytes;       /* a multiple of TVAD_ARENA_ALIGN */
};

#endif
