/* Average pooling (over the positions inside the map, rounded half away from zero) and max pooling. */
#include "tvad_arithmetic.h"
#include "tvad_kernels.h"

/* count positions of values >= -128 and <= 127, so |total| <= 128 * 255 * 255 < 2^23. */
static int32_t average(int32_t total, int32_t count)
{
    const int32_t half = count / 2;

    return ((total > 0) ? (total + half) : (total - half)) / count;
}

/* One output pixel: all channels of the height x width window whose first value is in[0]. */
static void pool_pixel(const tvad_layer *layer, const int8_t *in, int32_t height, int32_t width, int8_t *out)
{
    const int32_t channels = layer->in_c;
    const int32_t stride = (int32_t)layer->in_w * channels;

    for (int32_t c = 0; c < channels; c++) {
        int32_t total = 0;
        int32_t value = -128;

        for (int32_t y = 0; y < height; y++) {
            const int8_t *const line = in + y * stride + c;

            for (int32_t x = 0; x < width; x++) {
                const int32_t here = line[x * channels];

                total += here;
                value = tvad_max(here, value);
            }
        }
        if (layer->op == (uint8_t)TVAD_OP_AVERAGE_POOL) {
            value = average(total, height * width);
        }
        out[c] = (int8_t)tvad_clamp(value, layer->low, layer->high);
    }
}

void tvad_pool(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t channels = layer->in_c;
    const int32_t in_h = layer->in_h;
    const int32_t in_w = layer->in_w;
    int8_t *out = window->out + (window->row - window->out_first) * layer->out_w * channels;

    for (int32_t row = window->row; row < window->row + window->rows; row++) {
        const int32_t from_y = row * layer->stride_h - layer->pad_top;
        const int32_t y = tvad_max(from_y, 0);
        const int32_t end_y = tvad_min(from_y + layer->kernel_h, in_h);
        const int8_t *const in = window->in[0] + (y - window->in_first[0]) * in_w * channels;

        for (int32_t column = 0; column < (int32_t)layer->out_w; column++) {
            const int32_t from_x = column * layer->stride_w - layer->pad_left;
            const int32_t x = tvad_max(from_x, 0);
            const int32_t end_x = tvad_min(from_x + layer->kernel_w, in_w);

            pool_pixel(layer, in + x * channels, end_y - y, end_x - x, out);
            out += channels;
        }
    }
}
