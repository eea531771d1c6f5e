/* STFP: a student's maps and a teacher's in, scores of grid cells out: where the student does not imitate, directions differ.
 *
 * For every position of every pair of maps 1 - cos of the two vectors, int8 values minus zero points, in fixed point; all
 * resized to the grid and multiplied (docs/SPEC.md, STFP; Python: tinyvad/detectors/student_teacher.py). Widths: a value is
 * at most 255 and there are at most 4096 of them, so that the three sums stay below 2^28 and the product of two below 2^56.
 */
#include "tvad_internal.h"

#define MOST_BITS 20u               /* of a distance behind the point */
#define MAX_SHIFT 31
#define FRACTION 62u                /* bits of the number under the root: 61 or 62 */

static uint32_t field(const tvad_bank *bank, uint32_t tap, uint32_t which)
{
    return (uint32_t)bank->tap_rows[TVAD_TAP_FIELDS * tap + which];
}

/* Every distance is at most 2^(bits + 1): the product of all stays within 2^63. */
static uint32_t fraction_bits(uint32_t pairs)
{
    const uint32_t bits = 63u / pairs - 1u;

    return bits < MOST_BITS ? bits : MOST_BITS;
}

tvad_status tvad_check_pairs(tvad_bank *bank, const int32_t *config)
{
    const uint32_t pairs = bank->taps / 2u;
    uint32_t t, f;

    if (bank->taps % 2u != 0 || config[0] != (int32_t)pairs || config[1] != (int32_t)fraction_bits(pairs) || config[2] < 0 ||
        config[2] > MAX_SHIFT || config[3] != 0) {
        return TVAD_ERROR_FIELD;
    }
    for (t = 0; t < bank->taps; t++) {
        for (f = TVAD_TAP_H; f <= TVAD_TAP_C; f++) {
            if (field(bank, t, f) != field(bank, t % pairs, f)) {
                return TVAD_ERROR_FIELD;
            }
        }
        if (field(bank, t, TVAD_TAP_MULTIPLIER) != 0 || field(bank, t, TVAD_TAP_SHIFT) != 0 ||
            field(bank, t, TVAD_TAP_POOL) != 1u) {
            return TVAD_ERROR_FIELD;
        }
    }
    bank->values = (uint16_t)pairs;
    bank->bits = (uint8_t)config[1];
    bank->shift = (uint8_t)config[2];
    return TVAD_OK;
}

/* A pair's rows of both axes' matrices, int32: the one of a grid row, then those of all columns. */
static uint32_t down_values(const tvad_bank *bank, uint32_t pair)
{
    return 2u + tvad_axis_support(field(bank, pair, TVAD_TAP_H), bank->grid_h, 1);
}

static uint32_t across_values(const tvad_bank *bank, uint32_t pair)
{
    return 2u + tvad_axis_support(field(bank, pair, TVAD_TAP_W), bank->grid_w, 1);
}

static uint32_t distance_bytes(const tvad_bank *bank)
{
    uint32_t l, positions = 0;                      /* at most 8 * 2^24: tvad_open bounds a map's sides by 4096 */

    for (l = 0; l < bank->taps / 2u; l++) {
        positions += tvad_part_cells(bank, l);
    }
    return TVAD_ALIGN16(4u * positions);
}

/* At most 8 * 4 * 2^24 bytes of distances, and 8 * 2.5 MiB of weights. */
uint32_t tvad_score_pairs_scratch(const tvad_bank *bank)
{
    uint32_t l, values = 0;

    for (l = 0; l < bank->taps / 2u; l++) {
        values += down_values(bank, l) + bank->grid_w * across_values(bank, l);
    }
    return distance_bytes(bank) + TVAD_ALIGN16(4u * values);
}

/* The largest number whose square is at most x, x < 2^62. */
static uint32_t floor_sqrt(uint64_t x)
{
    uint32_t high = (uint32_t)(x >> 32), root = 0, bit;
    uint64_t rest;

    for (bit = (uint32_t)1 << 14; bit != 0; bit >>= 1) {    /* upper half in 32 bits */
        const uint32_t tried = (root << 1 | bit) * bit;     /* (root + bit)^2 - root^2 */

        if (high >= tried) {
            high -= tried;
            root |= bit;
        }
    }
    root <<= 16;
    rest = (uint64_t)high << 32 | (uint32_t)x;
    for (bit = (uint32_t)1 << 15; bit != 0; bit >>= 1) {
        const uint64_t tried = (uint64_t)(root << 1 | bit) * bit;

        if (rest >= tried) {
            rest -= tried;
            root |= bit;
        }
    }
    return root;
}

/* 2^bits (1 - cos) of two vectors minus their zero points, 0 to 2^(bits + 1). */
static uint32_t cosine_distance(const int8_t *s, const int8_t *t, uint32_t channels, int32_t s_zero, int32_t t_zero,
                                uint32_t bits)
{
    int32_t dot = 0, s_length = 0, t_length = 0;
    uint64_t product;
    uint32_t c, k = 0, root;

    for (c = 0; c < channels; c++) {
        const int32_t a = s[c] - s_zero, b = t[c] - t_zero;

        dot += a * b;
        s_length += a * a;
        t_length += b * b;
    }
    if (s_length == 0 || t_length == 0) {
        return s_length == t_length ? 0u : (uint32_t)1 << bits;
    }
    product = (uint64_t)(uint32_t)s_length * (uint32_t)t_length;
    while (product >> (FRACTION - 2u) == 0) {
        product <<= 2;
        k++;
    }
    root = floor_sqrt(product);                     /* at least 2^30 */
    /* |dot| 2^k <= root, as |dot| is at most the root of the product: the difference is 0 to 2 root, below 2^32 */
    return (uint32_t)(((uint64_t)((int64_t)root - (int64_t)dot * ((int64_t)1 << k)) << bits) / root);
}

/* A pair's distances (h, w). */
static void compare_maps(const tvad_bank *bank, uint32_t pair, const int8_t *const parts[], uint32_t *distances)
{
    const uint32_t other = pair + bank->values, channels = field(bank, pair, TVAD_TAP_C);
    const int32_t s_zero = (int32_t)field(bank, pair, TVAD_TAP_ZERO), t_zero = (int32_t)field(bank, other, TVAD_TAP_ZERO);
    const int8_t *s = parts[pair], *t = parts[other];
    uint32_t i, positions = tvad_part_cells(bank, pair);

    for (i = 0; i < positions; i++) {
        distances[i] = cosine_distance(s, t, channels, s_zero, t_zero, bank->bits);
        s += channels;
        t += channels;
    }
}

/* The distance that a cell gets from a pair's map of another size: weighted by a row of each axis' matrix, halves up.
 * Weights are below 2^20 an axis and add up to less than 2^24 for both: tvad_open. Sums stay below 2^45. */
static uint32_t resized(const uint32_t *distances, uint32_t width, const int32_t *down, const int32_t *across)
{
    uint64_t sum = 0, all = 0;
    int32_t y, x;

    for (y = 0; y < down[1]; y++) {
        const uint32_t *at = distances + (size_t)(uint32_t)(down[0] + y) * width + (uint32_t)across[0];

        for (x = 0; x < across[1]; x++) {
            const uint32_t weight = (uint32_t)down[2 + y] * (uint32_t)across[2 + x];

            sum += (uint64_t)weight * at[x];
            all += weight;
        }
    }
    return (uint32_t)((sum + all / 2u) / all);
}

static uint32_t shortened(const tvad_bank *bank, uint64_t product)
{
    product >>= bank->shift;
    return product > UINT32_MAX ? UINT32_MAX : (uint32_t)product;
}

/* A pair on its way to the grid. */
typedef struct {
    const uint32_t *distances;      /* (h, w) */
    uint32_t height, width;
    int32_t *down, *across;         /* the grid row's row of A_h; the rows of A_w of all columns */
    uint32_t stride;                /* of across, values; 0: the map has the grid's size */
} aligned;

static void score_row(const tvad_bank *bank, const aligned *pairs, uint32_t row, uint32_t *map)
{
    uint32_t j, l;

    for (l = 0; l < bank->values; l++) {
        tvad_axis_row(pairs[l].height, bank->grid_h, 1, row, pairs[l].down);
    }
    for (j = 0; j < bank->grid_w; j++) {
        uint64_t product = 1;

        for (l = 0; l < bank->values; l++) {
            const aligned *pair = &pairs[l];

            product *= pair->stride == 0 ? pair->distances[row * pair->width + j]
                                         : resized(pair->distances, pair->width, pair->down, pair->across + j * pair->stride);
        }
        map[j] = shortened(bank, product);
    }
}

void tvad_score_pairs(const tvad_bank *bank, const int8_t *const parts[], uint32_t *map, void *scratch)
{
    uint32_t *distances = scratch;
    int32_t *weights = (int32_t *)(void *)((uint8_t *)scratch + distance_bytes(bank));
    aligned pairs[TVAD_MAX_TAPS / 2u];
    uint32_t i, j, l;

    for (l = 0; l < bank->values; l++) {
        aligned *pair = &pairs[l];

        compare_maps(bank, l, parts, distances);
        pair->distances = distances;
        pair->height = field(bank, l, TVAD_TAP_H);
        pair->width = field(bank, l, TVAD_TAP_W);
        pair->stride = across_values(bank, l);
        pair->down = weights;
        pair->across = weights + down_values(bank, l);
        for (j = 0; j < bank->grid_w; j++) {
            tvad_axis_row(pair->width, bank->grid_w, 1, j, pair->across + j * pair->stride);
        }
        weights = pair->across + bank->grid_w * pair->stride;
        if (pair->height == bank->grid_h && pair->width == bank->grid_w) {
            pair->stride = 0;
        }
        distances += pair->height * pair->width;
    }
    for (i = 0; i < bank->grid_h; i++) {
        score_row(bank, pairs, i, map);
        map += bank->grid_w;
    }
}

uint32_t tvad_score_pairs_vector(const tvad_bank *bank, const int8_t *vector)
{
    const int8_t *other = vector + bank->depth / 2u;    /* the two halves have the same channels */
    uint64_t product = 1;
    uint32_t l;

    for (l = 0; l < bank->values; l++) {
        const uint32_t channels = field(bank, l, TVAD_TAP_C);

        product *= cosine_distance(vector, other, channels, (int32_t)field(bank, l, TVAD_TAP_ZERO),
                                   (int32_t)field(bank, l + bank->values, TVAD_TAP_ZERO), bank->bits);
        vector += channels;
        other += channels;
    }
    return shortened(bank, product);
}
