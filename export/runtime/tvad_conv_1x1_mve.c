/* Helium: a 1x1 convolution of stride 1 without padding is a matrix product over the window's pixels. */
#include "tvad_simd.h"

#if TVAD_MVE

#include "tvad_mve.h"

uint32_t tvad_conv_1x1_scratch(const tvad_layer *layer)
{
    (void)layer;
    return 0;
}

void tvad_conv_1x1(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t width = layer->out_w, length = layer->in_c;
    const int8_t *x = window->in[0] + (window->row - window->in_first[0]) * width * length;
    int8_t *out = window->out + (window->row - window->out_first) * width * layer->out_c;

    tvad_matrix_mve(layer, x, window->rows * width, length, out);
}

#endif
