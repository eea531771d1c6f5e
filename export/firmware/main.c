/* The smallest application: open the bank, test it, score pictures for ever. Fill in camera_read and report. */
#include "model.h"
#include "tvad.h"

static uint8_t arena[TVAD_ARENA_BYTES] __attribute__((section(".arena"), aligned(TVAD_ARENA_ALIGN)));
#if TVAD_FRAME_BYTES > 0
static uint8_t frame_pixels[TVAD_FRAME_BYTES] __attribute__((section(".frame"), aligned(32)));
#endif

void camera_read(uint8_t *pixels, uint32_t nbytes);
void report(tvad_status status, const tvad_result *result);

/* Write one picture: TVAD_FRAME_FORMAT where the model takes a camera's frame, else RGB888 of the network's size. */
__attribute__((weak)) void camera_read(uint8_t *pixels, uint32_t nbytes)
{
    (void)pixels;
    (void)nbytes;
}

/* Called after every picture and once on an error; result->label is 1 where the picture is anomalous. */
__attribute__((weak, noinline)) void report(tvad_status status, const tvad_result *result)
{
    (void)status;
    (void)result;
}

int main(void)
{
    static tvad_bank bank;
    static tvad_result result;
    tvad_status status = tvad_open(tvad_bank_bin, tvad_bank_bin_size, &bank);

    if (status == TVAD_OK) {
        status = tvad_self_test(&bank, arena, sizeof arena);
    }
    while (status == TVAD_OK) {
#if TVAD_FRAME_BYTES > 0
        const tvad_frame frame = { frame_pixels, TVAD_FRAME_WIDTH, TVAD_FRAME_HEIGHT, TVAD_FRAME_STRIDE, TVAD_FRAME_FORMAT };

        camera_read(frame_pixels, sizeof frame_pixels);
        status = tvad_run(&tvad_model_data, &bank, &frame, arena, sizeof arena, &result);
#else
        camera_read(tvad_input_pixels(&tvad_model_data, arena), TVAD_INPUT_BYTES);
        status = tvad_run(&tvad_model_data, &bank, NULL, arena, sizeof arena, &result);
#endif
        report(status, &result);
    }
    report(status, &result); /* tvad_status_text(status) says what went wrong */
    for (;;) {
    }
}
