/* The kernels: a file each, all with one form. A kernel makes the rows that its window asks for.
 *
 * Beside those that need any stands tvad_<kernel>_scratch: the bytes of scratch that it needs for a layer, one figure for plain
 * C and DSP and one for Helium; tinyvad/graph/scratch.py is its twin in the planner. Scratch is aligned to 16 bytes and holds nothing
 * between calls.
 *
 * Row r of a tensor with first row f lies at data + (r - f) * width * channels. Rows outside the map are padding: the input's
 * zero point, which `bias` takes into account. Sums fit 32 bits: the exporter refuses a layer whose sums could not.
 *
 * TVAD_DSP (SMLAD, SMMULR: Cortex-M4, M7, M33) and TVAD_MVE (Helium: M55) are chosen in tvad_simd.h from what the compiler
 * says of the core; every path gives the same bits as plain C.
 */
#ifndef TVAD_KERNELS_H
#define TVAD_KERNELS_H

#include "tvad_model.h"

typedef struct {
    const int8_t *in[2];
    int8_t *out;
    int32_t in_first[2], out_first;
    int32_t row, rows;
    void *scratch;
} tvad_window;

typedef void tvad_kernel(const tvad_layer *layer, const tvad_window *window);

tvad_kernel tvad_conv_1x1, tvad_conv, tvad_depthwise, tvad_fully_connected, tvad_add, tvad_mul, tvad_pool, tvad_mean,
    tvad_lookup, tvad_copy, tvad_pad, tvad_resize_nearest;

uint32_t tvad_conv_1x1_scratch(const tvad_layer *layer);
uint32_t tvad_conv_scratch(const tvad_layer *layer);
uint32_t tvad_depthwise_scratch(const tvad_layer *layer);
uint32_t tvad_add_scratch(const tvad_layer *layer);

/* tvad_frame.c. Rows of the network's input from a frame: integer resize (tinyvad/resize.py), then the bank's table.
 * With frame NULL the pixels lie at window->in[0], RGB888 of the network's size, and may be the output's own place. */
void tvad_frame_rows(const tvad_layer *layer, const tvad_window *window, const tvad_bank *bank, const tvad_frame *frame);
uint32_t tvad_frame_scratch(uint32_t frame_h, uint32_t frame_w, uint32_t out_h, uint32_t out_w);

/* tvad_embed.c. All rows of one tap (h, w, C) -> part (grid_h, grid_w, C), both int8; STFP: a copy. */
void tvad_embed(const tvad_bank *bank, uint32_t tap, const int8_t *map, int8_t *part, void *scratch);
uint32_t tvad_embed_scratch(const tvad_bank *bank, uint32_t tap);

/* tvad_score.c. Parts of the embedding -> map (grid_h, grid_w) and result. */
void tvad_score_parts(const tvad_bank *bank, const int8_t *const parts[], uint32_t *map, void *scratch, tvad_result *result);
uint32_t tvad_score_parts_scratch(const tvad_bank *bank);

#endif
