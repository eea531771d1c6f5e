/* A 1x1 convolution of stride 1 without padding: all pixels of the window are one run of a matrix product. */
#include "tvad_matrix.h"

#if !TVAD_MVE

uint32_t tvad_conv_1x1_scratch(const tvad_layer *layer)
{
    return tvad_matrix_scratch(layer->in_c);
}

void tvad_conv_1x1(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t width = layer->out_w, length = layer->in_c, count = window->rows * width;
    const int8_t *x = window->in[0] + (window->row - window->in_first[0]) * width * length;
    int8_t *out = window->out + (window->row - window->out_first) * width * layer->out_c;

    tvad_matrix(layer, x, count, length, out, window->scratch);
    tvad_clamp_outputs(layer, out, count * layer->out_c);
}

#endif
