/* A border of out_zero around a map. */
#include <string.h>

#include "tvad_kernels.h"

void tvad_pad(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t in_bytes = (int32_t)layer->in_w * layer->in_c;
    const int32_t out_bytes = (int32_t)layer->out_w * layer->out_c;
    const int32_t left = (int32_t)layer->pad_left * layer->in_c;
    int8_t *out = window->out + (window->row - window->out_first) * out_bytes;

    for (int32_t row = window->row; row < window->row + window->rows; row++) {
        const int32_t in_row = row - layer->pad_top;

        (void)memset(out, layer->out_zero, (size_t)out_bytes);
        if ((in_row >= 0) && (in_row < (int32_t)layer->in_h)) {
            (void)memcpy(out + left, window->in[0] + (in_row - window->in_first[0]) * in_bytes, (size_t)in_bytes);
        }
        out += out_bytes;
    }
}
