/* The mean of every channel over the whole map, which must be there: squeeze-excite, global average pooling.
 *
 * The division by the number of pixels is in the multiplier.
 */
#include "tvad_arithmetic.h"
#include "tvad_kernels.h"

#define GROUP 4  /* channels whose sums stay in registers */

static int8_t finish(const tvad_layer *layer, int32_t sum)
{
    return (int8_t)tvad_clamp(tvad_requantise(sum, layer->bias[0], layer->bias[1]) + layer->out_zero, -128, 127);
}

void tvad_mean(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t channels = layer->in_c;
    const int32_t pixels = (int32_t)layer->in_h * layer->in_w;
    const int32_t zero = pixels * layer->in_zero;  /* |sum - zero| <= 255 * pixels < 2^31: the exporter sees to it */
    const int8_t *const map = window->in[0];
    int32_t c = 0;

    for (; (c + GROUP) <= channels; c += GROUP) {
        const int8_t *in = map + c;
        int32_t sums[GROUP] = {-zero, -zero, -zero, -zero};

        for (int32_t i = 0; i < pixels; i++) {
            sums[0] += in[0];
            sums[1] += in[1];
            sums[2] += in[2];
            sums[3] += in[3];
            in += channels;
        }
        for (int32_t k = 0; k < GROUP; k++) {
            window->out[c + k] = finish(layer, sums[k]);
        }
    }
    for (; c < channels; c++) {
        int32_t sum = -zero;

        for (int32_t i = 0; i < pixels; i++) {
            sum += map[(i * channels) + c];
        }
        window->out[c] = finish(layer, sum);
    }
}
