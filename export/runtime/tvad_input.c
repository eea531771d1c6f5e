/* RGB888 pixels -> the network's int8 input, through the bank's table. */
#include "tvad.h"

void tvad_input(const tvad_bank *bank, const uint8_t *rgb, int8_t *out, size_t count)
{
    const int8_t *const red = bank->input_table;
    const int8_t *const green = red + 256;
    const int8_t *const blue = green + 256;

    for (; count > 0u; count--) {
        out[0] = red[rgb[0]];
        out[1] = green[rgb[1]];
        out[2] = blue[rgb[2]];
        rgb += 3;
        out += 3;
    }
}
