/* Copies of the nearest pixel: out[y][x] = in[rows[y]][columns[x]], both lists made by the exporter. */
#include <string.h>

#include "tvad_kernels.h"

void tvad_resize_nearest(const tvad_layer *layer, const tvad_window *window)
{
    const uint16_t *const rows = (const uint16_t *)layer->weights;  /* [out_h], each < in_h */
    const uint16_t *const columns = rows + layer->out_h;            /* [out_w], each < in_w */
    const int32_t channels = layer->in_c;
    int8_t *out = window->out + (window->row - window->out_first) * layer->out_w * channels;

    for (int32_t row = window->row; row < window->row + window->rows; row++) {
        const int8_t *const in = window->in[0] + ((int32_t)rows[row] - window->in_first[0]) * layer->in_w * channels;

        for (int32_t x = 0; x < (int32_t)layer->out_w; x++) {
            (void)memcpy(out, in + (int32_t)columns[x] * channels, (size_t)channels);
            out += channels;
        }
    }
}
