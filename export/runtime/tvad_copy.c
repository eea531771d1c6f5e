/* Rows into channels `channel`.. of a wider map (one operand of concat), or as they are (reshape; may be in place). */
#include <string.h>

#include "tvad_kernels.h"

void tvad_copy(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t in_c = layer->in_c;
    const int32_t out_c = layer->out_c;
    const int32_t pixels = window->rows * layer->out_w;
    const int8_t *in = window->in[0] + (window->row - window->in_first[0]) * layer->in_w * in_c;
    int8_t *out = window->out + (window->row - window->out_first) * layer->out_w * out_c;

    if (in_c == out_c) {
        (void)memmove(out, in, (size_t)(pixels * in_c));
        return;
    }
    out += layer->channel;
    for (int32_t i = 0; i < pixels; i++) {
        (void)memcpy(out, in, (size_t)in_c);
        in += in_c;
        out += out_c;
    }
}
