/* The sum of two maps: both operands rescaled to 2^20 times a common scale, added, rescaled (TFLite's add).
 *
 * An operand has 256 values, so where there are more elements than that its rescaled values are put in a table first. May
 * work in place of either operand: every element is read before it is written.
 *
 * Ranges: |a - zero point| <= 255 and the operands' factors are at most 1/2, so a rescaled one is at most 255 * 2^19 and a
 * sum below 2^28. The sum's factor is below 1: its shift is 0 or to the right.
 */
#include "tvad_arithmetic.h"
#include "tvad_kernels.h"
#include "tvad_matrix.h"

#if !TVAD_MVE

#define VALUES 256
#define TABLES_FROM 256     /* elements of a window from which on two tables are worth making */

static int32_t rescaled(int32_t value, int32_t zero, const int32_t *constants)
{
    return tvad_requantise((value - zero) * (1 << 20), constants[0], constants[1]);
}

/* A sum to an output, within int8 and the activation's limits. */
static int8_t output(const tvad_layer *layer, int32_t sum)
{
    const int32_t y = tvad_requantise(sum, layer->bias[4], layer->bias[5]) + layer->out_zero;

    return (int8_t)tvad_clamp(y, layer->low, layer->high);
}

/* By the value as uint8, as LOOKUP's table; for the DSP's high product doubled. */
static void make_table(int32_t *table, int32_t zero, const int32_t *constants)
{
    for (int32_t i = 0; i < VALUES; i++) {
        table[i] = (TVAD_DSP ? 2 : 1) * rescaled((i < 128) ? i : (i - VALUES), zero, constants);
    }
}

/* An output from the table's values, as output() but without branches; see tvad_depthwise_pass.h for its two roundings. */
typedef struct {
    int32_t multiplier, round, right, low, high;
} short_form;

static inline int8_t short_output(int32_t sum, const short_form *form)
{
#if TVAD_DSP
    const int32_t y = (tvad_smmlar(sum, form->multiplier, form->round) + (sum >> 31)) >> form->right;

    return (int8_t)tvad_ssat8(y);
#else
    const int32_t y = tvad_multiply_high_29(sum, form->multiplier);

    return (int8_t)tvad_clamp((y + form->round + (y >> 31)) >> form->right, form->low, form->high);
#endif
}

static void add_by_tables(const tvad_layer *layer, const uint8_t *a, const uint8_t *b, int8_t *out, int32_t count,
                          const int32_t *tables)
{
    const int32_t *const of_b = tables + VALUES;
    const int32_t right = -layer->bias[5];
    const short_form form = { layer->bias[4], (1 << (right - 1)) + (layer->out_zero * (1 << right)), right, layer->low,
                              layer->high };
    int32_t left = count;

    for (; left >= 4; left -= 4) {
        out[0] = short_output(tables[a[0]] + of_b[b[0]], &form);
        out[1] = short_output(tables[a[1]] + of_b[b[1]], &form);
        out[2] = short_output(tables[a[2]] + of_b[b[2]], &form);
        out[3] = short_output(tables[a[3]] + of_b[b[3]], &form);
        a += 4;
        b += 4;
        out += 4;
    }
    for (; left > 0; left--) {
        *out = short_output(tables[*a] + of_b[*b], &form);
        a++;
        b++;
        out++;
    }
}

uint32_t tvad_add_scratch(const tvad_layer *layer)
{
    const int32_t elements = layer->out_h * layer->out_w * layer->out_c;

    return (elements >= TABLES_FROM) ? (2u * VALUES * (uint32_t)sizeof(int32_t)) : 0u;
}

void tvad_add(const tvad_layer *layer, const tvad_window *window)
{
    const int32_t width = layer->out_w * layer->out_c;
    const int32_t count = window->rows * width;
    const int32_t shift = layer->bias[5];
    const int8_t *const a = window->in[0] + ((window->row - window->in_first[0]) * width);
    const int8_t *const b = window->in[1] + ((window->row - window->in_first[1]) * width);
    int8_t *const out = window->out + ((window->row - window->out_first) * width);

    if ((count >= TABLES_FROM) && (shift < 0) && (shift >= -22)) {
        int32_t *const tables = (int32_t *)window->scratch;

        make_table(tables, layer->in_zero, &layer->bias[0]);
        make_table(tables + VALUES, layer->in2_zero, &layer->bias[2]);
        add_by_tables(layer, (const uint8_t *)a, (const uint8_t *)b, out, count, tables);
        tvad_clamp_outputs(layer, out, count);
    } else {
        for (int32_t i = 0; i < count; i++) {
            out[i] = output(layer, rescaled(a[i], layer->in_zero, &layer->bias[0]) +
                                   rescaled(b[i], layer->in2_zero, &layer->bias[2]));
        }
    }
}

#endif
