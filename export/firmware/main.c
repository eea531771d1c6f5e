/* The smallest application: open the bank, test it, score pictures for ever. Fill in camera_read and report.
 *
 * A build with two slots for its bank (TVAD_SLOT_BYTES) opens the newer one. One that learns on the device (TVAD_LEARN_BYTES)
 * learns pictures when images_to_learn says so; then fill in flash_erase and flash_program for your chip too.
 */
#include "model.h"
#include "tvad.h"
#ifdef TVAD_SLOT_BYTES
#include "tvad_learn.h"
#endif

static uint8_t arena[TVAD_ARENA_BYTES] __attribute__((section(".arena"), aligned(TVAD_ARENA_ALIGN)));
#if TVAD_FRAME_BYTES > 0
static uint8_t frame_pixels[TVAD_FRAME_BYTES] __attribute__((section(".frame"), aligned(32)));
#endif
static tvad_bank bank;
static tvad_result result;

void camera_read(uint8_t *pixels, uint32_t nbytes);
void report(tvad_status status, const tvad_result *result);

/* Write one picture: TVAD_FRAME_FORMAT where the model takes a camera's frame, else RGB888 of the network's size. */
__attribute__((weak)) void camera_read(uint8_t *pixels, uint32_t nbytes)
{
    (void)pixels;
    (void)nbytes;
}

/* Called after every picture and once on an error; result->label is 1 where the picture is anomalous. */
__attribute__((weak, noinline)) void report(tvad_status status, const tvad_result *done)
{
    (void)status;
    (void)done;
}

/* Take a picture and score it. */
static tvad_status score_picture(void)
{
#if TVAD_FRAME_BYTES > 0
    const tvad_frame frame = { frame_pixels, TVAD_FRAME_WIDTH, TVAD_FRAME_HEIGHT, TVAD_FRAME_STRIDE, TVAD_FRAME_FORMAT };

    camera_read(frame_pixels, sizeof frame_pixels);
    return tvad_run(&tvad_model_data, &bank, &frame, arena, sizeof arena, &result);
#else
    camera_read(tvad_input_pixels(&tvad_model_data, arena), TVAD_INPUT_BYTES);
    return tvad_run(&tvad_model_data, &bank, NULL, arena, sizeof arena, &result);
#endif
}

#ifdef TVAD_SLOT_BYTES

static tvad_status open_bank(void)
{
    return tvad_open_newest(tvad_slot_0, tvad_slot_1, TVAD_SLOT_BYTES, &bank, NULL);
}

#else

static tvad_status open_bank(void)
{
    return tvad_open(tvad_bank_bin, tvad_bank_bin_size, &bank);
}

#endif

#if defined(TVAD_SLOT_BYTES) && TVAD_LEARN_BYTES > 0

static uint8_t workspace[TVAD_LEARN_BYTES] __attribute__((section(".learning"), aligned(16)));

uint32_t images_to_learn(uint32_t *task);
int flash_erase(void *user, uint32_t slot);
int flash_program(void *user, uint32_t slot, uint32_t offset, const void *data, uint32_t nbytes);

/* How many pictures, all of them good, are to be learnt now? *task: of which product, TVAD_NEW_TASK or its number. */
__attribute__((weak, noinline)) uint32_t images_to_learn(uint32_t *task)
{
    *task = TVAD_NEW_TASK;
    return 0;
}

/* Make all bytes of slot 0 or 1 (tvad_slot_0, tvad_slot_1) 0xFF; 0 for success. */
__attribute__((weak, noinline)) int flash_erase(void *user, uint32_t slot)
{
    (void)user;
    (void)slot;
    return 1;
}

/* Program TVAD_PROGRAM_UNIT bytes of a slot; 0 for success. */
__attribute__((weak, noinline)) int flash_program(void *user, uint32_t slot, uint32_t offset, const void *data,
                                                  uint32_t nbytes)
{
    (void)user;
    (void)slot;
    (void)offset;
    (void)data;
    (void)nbytes;
    return 1;
}

/* Learn `images` pictures and go on with the new bank; on an error the old one is as it was. */
static tvad_status learn_pictures(uint32_t images, uint32_t task)
{
    static const tvad_store store = { { tvad_slot_0, tvad_slot_1 }, TVAD_SLOT_BYTES, flash_erase, flash_program, NULL };
    static tvad_learner learner;
    tvad_status status = tvad_learn_begin(&learner, &bank, task, 0, workspace, sizeof workspace);

    while (status == TVAD_OK && images-- > 0) {
        status = score_picture();
        if (status == TVAD_OK) {
            status = tvad_learn_image(&learner, &tvad_model_data, arena);
        }
    }
    return status == TVAD_OK ? tvad_learn_commit(&learner, &store) : status;
}

static tvad_status learn_if_asked(void)
{
    uint32_t task;
    const uint32_t images = images_to_learn(&task);

    if (images > 0) {
        const tvad_status status = learn_pictures(images, task);

        if (status != TVAD_OK) {
            report(status, &result);
        }
        return open_bank();
    }
    return TVAD_OK;
}

#else

static tvad_status learn_if_asked(void)
{
    return TVAD_OK;
}

#endif

int main(void)
{
    tvad_status status = open_bank();

    if (status == TVAD_OK) {
        status = tvad_self_test(&bank, arena, sizeof arena);
    }
    while (status == TVAD_OK) {
        status = score_picture();
        report(status, &result);
        if (status == TVAD_OK) {
            status = learn_if_asked();
        }
    }
    report(status, &result); /* tvad_status_text(status) says what went wrong */
    for (;;) {
    }
}
