/* Only the bank and the scorer: the network runs in an engine of your choice (TFLM, CMSIS-NN, a vendor's), its tapped int8
 * tensors come in, a score comes out.
 *
 * What the engine must do: take int8 pixels from tvad_input (the bank's own table), run the build's backbone.tflite with
 * TFLite's double rounding, and keep the output tensors, NHWC int8, in the order of the model's outputs. With TFLM:
 *     tvad_input(&bank, rgb, interpreter.input(0)->data.int8, bank.input_h * bank.input_w);
 *     interpreter.Invoke();
 *     taps[i] = interpreter.output(i)->data.int8;
 */
#include <stdio.h>

#include "tvad.h"

/* Bank and tensors: here linked in from the files that the Makefile names; see blobs.S. */
extern const uint8_t bank_bin[], taps_bin[];
extern const uint32_t bank_size, taps_size;

/* tvad_score_bytes says how much a bank needs; print it once and set this. No heap, no globals of the library's own. */
#ifndef SCRATCH_BYTES
#define SCRATCH_BYTES 65536
#endif
static uint8_t scratch[SCRATCH_BYTES] __attribute__((aligned(16)));

static int fail(tvad_status status)
{
    printf("error %d: %s\n", (int)status, tvad_status_text(status));
    return 1;
}

int main(void)
{
    tvad_bank bank;
    tvad_result result;
    tvad_status status;
    const int8_t *taps[TVAD_MAX_TAPS], *at = (const int8_t *)taps_bin;
    uint32_t i, row, column;

    /* Once, at start-up: every byte is checked, then the bank scores its own golden vectors. */
    status = tvad_open(bank_bin, bank_size, &bank);
    if (status != TVAD_OK) {
        return fail(status);
    }
    printf("bank %08lx for network %08lx, %ux%u pixels; scratch %lu bytes\n", (unsigned long)bank.header_crc32,
           (unsigned long)bank.backbone_crc32, bank.input_h, bank.input_w, (unsigned long)tvad_score_bytes(&bank));
    status = tvad_self_test(&bank, scratch, sizeof scratch);
    if (status != TVAD_OK) {
        return fail(status);
    }

    /* Every image: the tensors of your engine. Here they lie one after the other in taps_bin. */
    for (i = 0; i < bank.taps; i++) {
        taps[i] = at;
        at += bank.tap_rows[8 * i] * bank.tap_rows[8 * i + 1] * bank.tap_rows[8 * i + 2];     /* height, width, channels */
    }
    if ((uint32_t)(at - (const int8_t *)taps_bin) != taps_size) {
        printf("the tensors have another size than the bank says\n");
        return 1;
    }
    status = tvad_score(&bank, taps, scratch, sizeof scratch, &result);
    if (status != TVAD_OK) {
        return fail(status);
    }
    for (row = 0; row < result.grid_h; row++) {
        for (column = 0; column < result.grid_w; column++) {
            printf("%lu ", (unsigned long)result.map[row * result.grid_w + column]);
        }
        printf("\n");
    }
    printf("score %lu at row %u, column %u: %s\n", (unsigned long)result.score, result.row, result.column,
           result.label ? "anomalous" : "normal");
    return 0;
}
