/* A tapped map in, its part of every grid cell's vector out: e = clamp(requantise(A_h . (q - zero point) . A_w^T)).
 *
 * The integer matrices A are those of docs/SPEC.md, TAPS (Python: tinyvad/embedding.py); their few weights in reach of a
 * cell are computed here. Both axes apart, four channels at a time: a row of sums over A_h, then over A_w. tvad_open has
 * checked that |q - zero point| <= 255 times a row of A_h and one of A_w stays within int32, hence every partial sum.
 */
#include <string.h>

#include "tvad_arithmetic.h"
#include "tvad_internal.h"
#include "tvad_kernels.h"

#define GROUP 4u                    /* channels at a time */

#define WEIGHTS 2u                  /* where the weights start in a row of A as it is kept: first value, count, weights */

/* Most values that one cell reaches; tinyvad.embedding.tap_support. */
uint32_t tvad_axis_support(uint32_t size, uint32_t grid, uint32_t pool)
{
    uint32_t aligned = size >= grid ? (size + grid - 1) / grid + (size % grid != 0) : 2u, all = aligned + pool - 1;

    return all < size ? all : size;
}

/* The row of A that belongs to a cell: the first value that it reaches, how many, the weight of each.
 * Products stay below 2^30: size <= 4096, grid <= 65535. */
void tvad_axis_row(uint32_t size, uint32_t grid, uint32_t pool, uint32_t cell, int32_t *row)
{
    uint32_t half = pool / 2, low, high, first, count, j, k, position = 0;
    int32_t *weights = row + WEIGHTS;

    if (size >= grid) {
        low = cell * size / grid;
        high = ((cell + 1) * size - 1) / grid;
    } else {
        uint32_t centre = (2 * cell + 1) * size, most = 2 * grid * (size - 1);

        position = centre > grid ? centre - grid : 0;
        position = position < most ? position : most;
        low = position / (2 * grid);
        high = low + 1 < size ? low + 1 : size - 1;
    }
    first = low > half ? low - half : 0;
    count = (high + half < size ? high + half : size - 1) - first + 1;
    row[0] = (int32_t)first;
    row[1] = (int32_t)count;
    for (k = 0; k < count; k++) {
        weights[k] = 0;
    }
    for (j = low; j <= high; j++) {
        uint32_t from = j > half ? j - half : 0, to = j + half < size ? j + half : size - 1, part;

        if (size >= grid) {
            uint32_t left = cell * size > j * grid ? cell * size : j * grid;
            uint32_t right = (cell + 1) * size < (j + 1) * grid ? (cell + 1) * size : (j + 1) * grid;

            part = right - left;
        } else if (low == high) {
            part = 2 * grid;
        } else {
            part = j == low ? 2 * grid - position % (2 * grid) : position % (2 * grid);
        }
        for (k = from; k <= to; k++) {
            weights[k - first] += (int32_t)part;
        }
    }
}

/* Four channels of one row of the map, summed over A_h: sums[4 x + i]. */
static void sum_rows(const int8_t *map, uint32_t width, uint32_t channels, uint32_t rows, const int32_t *weights,
                     int32_t start, int32_t *sums)
{
    const uint32_t stride = width * channels;
    uint32_t x, k;

    for (x = 0; x < width; x++) {
        const int8_t *q = map + (size_t)x * channels;
        int32_t a = start, b = start, c = start, d = start;

        for (k = 0; k < rows; k++) {
            int32_t weight = weights[k];

            a += weight * q[0];
            b += weight * q[1];
            c += weight * q[2];
            d += weight * q[3];
            q += stride;
        }
        sums[GROUP * x] = a;
        sums[GROUP * x + 1] = b;
        sums[GROUP * x + 2] = c;
        sums[GROUP * x + 3] = d;
    }
}

/* The same of the last 1 to 3 channels; the sums of the others are 0. */
static void sum_rows_tail(const int8_t *map, uint32_t width, uint32_t channels, uint32_t rows, const int32_t *weights,
                          int32_t start, int32_t *sums, uint32_t left)
{
    uint32_t x, k, i;

    for (x = 0; x < width; x++) {
        for (i = 0; i < GROUP; i++) {
            const int8_t *q = map + (size_t)x * channels + i;
            int32_t sum = i < left ? start : 0;

            for (k = 0; i < left && k < rows; k++) {
                sum += weights[k] * q[(size_t)k * width * channels];
            }
            sums[GROUP * x + i] = sum;
        }
    }
}

/* A tap's sums in units of the embedding. */
static int8_t rescale(int32_t sum, const int32_t *field, int is_short)
{
    const int32_t multiplier = field[TVAD_TAP_MULTIPLIER], shift = field[TVAD_TAP_SHIFT];

    if (is_short) {
        return (int8_t)tvad_max(tvad_rescale(sum, tvad_doubled(multiplier), -shift, 0), -127);
    }
    return (int8_t)tvad_clamp(tvad_requantise(sum, multiplier, shift), -127, 127);
}

/* `count` channels of one cell: the sums over A_w, rescaled. */
static void embed_cell(const int32_t *row, const int32_t *sums, const int32_t *field, uint32_t count, int8_t *e)
{
    const int32_t *weights = row + WEIGHTS, *at = sums + GROUP * (uint32_t)row[0];
    const int is_short = tvad_is_short(field[TVAD_TAP_MULTIPLIER], field[TVAD_TAP_SHIFT]);
    int32_t a = 0, b = 0, c = 0, d = 0;
    uint32_t k, reached = (uint32_t)row[1];

    for (k = 0; k < reached; k++) {
        const int32_t weight = weights[k];

        a += weight * at[0];
        b += weight * at[1];
        c += weight * at[2];
        d += weight * at[3];
        at += GROUP;
    }
    e[0] = rescale(a, field, is_short);
    if (count > 1u) {
        e[1] = rescale(b, field, is_short);
    }
    if (count > 2u) {
        e[2] = rescale(c, field, is_short);
    }
    if (count > 3u) {
        e[3] = rescale(d, field, is_short);
    }
}

void tvad_embed_rows(const tvad_bank *bank, uint32_t tap, const int8_t *map, uint32_t row, uint32_t rows, int8_t *part,
                     void *scratch)
{
    const int32_t *field = bank->tap_rows + TVAD_TAP_FIELDS * tap;
    const uint32_t h = (uint32_t)field[TVAD_TAP_H], w = (uint32_t)field[TVAD_TAP_W], channels = (uint32_t)field[TVAD_TAP_C];
    const uint32_t pool = (uint32_t)field[TVAD_TAP_POOL], grid_w = bank->grid_w;
    const uint32_t across = WEIGHTS + tvad_axis_support(w, grid_w, pool);
    int32_t *down = scratch, *columns = down + WEIGHTS + tvad_axis_support(h, bank->grid_h, pool), *sums = columns + grid_w * across;
    uint32_t i, j, k, c;

    for (j = 0; j < grid_w; j++) {
        tvad_axis_row(w, grid_w, pool, j, columns + j * across);
    }
    for (i = row; i < row + rows; i++) {
        const int8_t *from;
        uint32_t reached;
        int32_t start = 0;                              /* minus the zero point, summed over A_h */

        tvad_axis_row(h, bank->grid_h, pool, i, down);
        from = map + (size_t)(uint32_t)down[0] * w * channels;
        reached = (uint32_t)down[1];
        for (k = 0; k < reached; k++) {
            start -= down[WEIGHTS + k] * field[TVAD_TAP_ZERO];
        }
        for (c = 0; c < channels; c += GROUP) {
            const uint32_t left = channels - c < GROUP ? channels - c : GROUP;

            if (left == GROUP) {
                sum_rows(from + c, w, channels, reached, down + WEIGHTS, start, sums);
            } else {
                sum_rows_tail(from + c, w, channels, reached, down + WEIGHTS, start, sums, left);
            }
            for (j = 0; j < grid_w; j++) {
                const int32_t *cell = columns + j * across;

                embed_cell(cell, sums, field, left, part + ((size_t)(i - row) * grid_w + j) * channels + c);
            }
        }
    }
}

void tvad_embed(const tvad_bank *bank, uint32_t tap, const int8_t *map, int8_t *part, void *scratch)
{
    if (tvad_is_native(bank)) {
        const int32_t *field = bank->tap_rows + TVAD_TAP_FIELDS * tap;

        memcpy(part, map, (size_t)tvad_part_cells(bank, tap) * (uint32_t)field[TVAD_TAP_C]);
        return;
    }
    tvad_embed_rows(bank, tap, map, 0, bank->grid_h, part, scratch);
}

/* At most 2.5 MiB: size <= 4096, grid <= 65535, pool <= 7. */
uint32_t tvad_embed_scratch(const tvad_bank *bank, uint32_t tap)
{
    const int32_t *field = bank->tap_rows + TVAD_TAP_FIELDS * tap;
    const uint32_t h = (uint32_t)field[TVAD_TAP_H], w = (uint32_t)field[TVAD_TAP_W], pool = (uint32_t)field[TVAD_TAP_POOL];
    const uint32_t down = WEIGHTS + tvad_axis_support(h, bank->grid_h, pool);
    const uint32_t across = WEIGHTS + tvad_axis_support(w, bank->grid_w, pool);

    if (tvad_is_native(bank)) {
        return 0;
    }
    return TVAD_ALIGN16(4u * (down + bank->grid_w * across + GROUP * w));
}
