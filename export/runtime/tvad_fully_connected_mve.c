/* Helium: a fully connected layer is a matrix product; every output row takes in_h * in_w * in_c / out_h values. */
#include "tvad_simd.h"

#if TVAD_MVE

#include "tvad_mve.h"

void tvad_fully_connected(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t count = layer->out_w, length = layer->in_h * layer->in_w * layer->in_c / (layer->out_h * count);
    const int8_t *x = window->in[0] + (window->row - window->in_first[0]) * count * length;

    tvad_matrix_mve(layer, x, window->rows * count, length,
                    window->out + (window->row - window->out_first) * count * layer->out_c);
}

#endif
