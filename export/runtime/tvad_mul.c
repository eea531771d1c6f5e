/* Products of two maps, or of a map and one value a channel (squeeze-excite). May work in place of the first. */
#include "tvad_arithmetic.h"
#include "tvad_kernels.h"

void tvad_mul(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t channels = layer->out_c;
    const int32_t width = (int32_t)layer->out_w * channels;
    const int32_t pixels = window->rows * layer->out_w;
    const int32_t multiplier = layer->bias[0];
    const int32_t shift = layer->bias[1];
    const int8_t *a = window->in[0] + (window->row - window->in_first[0]) * width;
    const int8_t *b = window->in[1];
    int8_t *out = window->out + (window->row - window->out_first) * width;

    if (layer->broadcast == 0u) {
        b += (window->row - window->in_first[1]) * width;
    }
    for (int32_t i = 0; i < pixels; i++) {
        for (int32_t c = 0; c < channels; c++) {
            /* at most 255 * 255; the exporter refuses a left shift that takes it out of 32 bits */
            const int32_t product = ((int32_t)a[c] - layer->in_zero) * ((int32_t)b[c] - layer->in2_zero);
            const int32_t value = tvad_requantise(product, multiplier, shift) + layer->out_zero;

            out[c] = (int8_t)tvad_clamp(value, layer->low, layer->high);
        }
        a += channels;
        out += channels;
        b += (layer->broadcast == 0u) ? channels : 0;
    }
}
