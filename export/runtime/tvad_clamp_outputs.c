/* The limits of a fused activation, after the outputs of a window are made. Most layers use all of int8: there saturation is
 * enough.
 */
#include "tvad_matrix.h"

void tvad_clamp_outputs(const tvad_layer *layer, int8_t *out, int32_t count)
{
    const int32_t low = layer->low, high = layer->high;
    int32_t i;

    if (low == -128 && high == 127) {
        return;
    }
    for (i = 0; i < count; i++) {
        out[i] = (int8_t)tvad_clamp(out[i], low, high);
    }
}
