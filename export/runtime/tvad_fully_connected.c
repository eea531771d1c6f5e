/* A fully connected layer: every output position takes its share of the input as one long pixel. */
#include "tvad_matrix.h"

#if !TVAD_MVE

void tvad_fully_connected(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t width = layer->out_w, count = window->rows * width;
    const int32_t length = (int32_t)layer->in_h * layer->in_w * layer->in_c / (layer->out_h * width);
    const int8_t *x = window->in[0] + ((window->row - window->in_first[0]) * width * length);
    int8_t *out = window->out + ((window->row - window->out_first) * width * layer->out_c);

    tvad_matrix(layer, x, count, length, out, NULL);
    tvad_clamp_outputs(layer, out, count * layer->out_c);
}

#endif
