/* What the files of depthwise convolution share: how a layer is cut so that its scratch stays small. */
#ifndef TVAD_DEPTHWISE_H
#define TVAD_DEPTHWISE_H

#include "tvad_kernels.h"

#define TVAD_STREAM_BYTES 72    /* of scratch for a tvad_stream (tvad_depthwise_pass.h) on any machine; a multiple of 8 */

/* For the path with SMLAD (tvad_depthwise_dsp.c). Words are uint32: two values of a column, of an even and an odd row. */
typedef struct {
    int32_t channels;       /* at once; 0: the layer takes the plain path */
    int32_t columns;        /* words of a plane's row: padding, map, padding */
    int32_t slots;          /* row pairs that a plane holds: all of the map, or a ring of `pairs` */
    int32_t pairs;          /* row pairs that a kernel touches */
    int32_t phases;         /* kernel starts on even rows only (1), or on odd ones too (2) */
    int32_t blocks;         /* blocks of taps a phase: `pairs`, or nearly twice that, so that a ring can start anywhere */
    int32_t stream_bytes;   /* of a channel's constants and taps */
    uint32_t bytes;         /* of scratch in all */
} tvad_depthwise_plan;

tvad_depthwise_plan tvad_depthwise_plan_of(const tvad_layer *layer);

/* Channels `channel` to `channel + channels - 1` in plain C; any kernel, stride and dilation. */
void tvad_depthwise_plain(const tvad_layer *layer, const tvad_window *window, int32_t channel, int32_t channels);

void tvad_depthwise_dsp(const tvad_layer *layer, const tvad_window *window, const tvad_depthwise_plan *plan);

#endif
