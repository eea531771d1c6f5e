/* The board of board.h on a PC: stdio, no fences but the sanitizers', no clock. Usage: PROGRAM bank.tvb, in the folder of
 * the two files. */
#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include <stdio.h>
#include <stdlib.h>

#include "board.h"

#define BANK_ALIGN 4096u /* the largest align of a bank */

static FILE *request_file, *result_file;
static const char *bank_name;

int board_main(void); /* main of board.c */

int main(int count, char **arguments)
{
    bank_name = count > 1 ? arguments[1] : "bank.tvb";
    return board_main();
}

void board_open(void)
{
    request_file = fopen("request.bin", "rb");
    result_file = fopen("result.bin", "wb");
    if (request_file == NULL || result_file == NULL) {
        board_stop(2);
    }
}

void board_read(uint32_t offset, void *data, size_t nbytes)
{
    if (nbytes > 0 && (fseek(request_file, (long)offset, SEEK_SET) != 0 || fread(data, 1, nbytes, request_file) != nbytes)) {
        board_stop(5);
    }
}

void board_write(const void *data, size_t nbytes)
{
    if (nbytes > 0 && fwrite(data, 1, nbytes, result_file) != nbytes) {
        board_stop(6);
    }
}

void board_stop(int code)
{
    if (result_file != NULL) {
        (void)fclose(result_file);
    }
    exit(code);
}

/* A copy of exactly the file's size, so that a sanitizer sees a read behind its end; never freed, as flash is not. */
const uint8_t *board_bank(size_t *size)
{
    FILE *file = fopen(bank_name, "rb");
    void *data = NULL;
    long length = -1;

    if (file != NULL && fseek(file, 0, SEEK_END) == 0) {
        length = ftell(file);
    }
    if (length < 0 || fseek(file, 0, SEEK_SET) != 0 || posix_memalign(&data, BANK_ALIGN, (size_t)length) != 0 ||
        fread(data, 1, (size_t)length, file) != (size_t)length) {
        board_stop(7);
    }
    (void)fclose(file);
    *size = (size_t)length;
    return data;
}

uint32_t board_ticks(void)
{
    return 0;
}

void board_paint_stack(void)
{
}

uint32_t board_stack_used(void)
{
    return 0;
}

void board_break_fence(uint32_t which)
{
    (void)which;
}
