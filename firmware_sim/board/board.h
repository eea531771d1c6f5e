/* What board.c, the test program around a build's firmware, asks of the place where it runs: files, a clock, a stack.
 *
 * semihosting.c answers on an emulated Cortex-M, host.c on a PC. Files are `request.bin` and `result.bin`; their form stands
 * in firmware_sim/harness.py.
 */
#ifndef BOARD_H
#define BOARD_H

#include <stddef.h>
#include <stdint.h>

#if defined(__arm__)
#define BOARD_IN(name) __attribute__((section(name)))
#else
#define BOARD_IN(name) /* sanitizers guard only variables that are in no section of their own */
#endif
#define BOARD_RAM BOARD_IN(".harness") /* not the target's RAM; nothing clears it */

#define BOARD_LAYERS 4096u /* the most layers whose rows can be asked for */

void board_open(void);                                /* files, and on the emulator the fences around memory */
void board_read(uint32_t offset, void *data, size_t nbytes); /* bytes of the request */
void board_write(const void *data, size_t nbytes);    /* append to the result */
void board_stop(int code);                            /* end the program */
const uint8_t *board_bank(size_t *size);

uint32_t board_ticks(void);                           /* counts down, 24 bits; 0 where there is no clock */
void board_paint_stack(void);                         /* mark what is free below the caller */
uint32_t board_stack_used(void);                      /* bytes below the caller of board_paint_stack that were written */
void board_break_fence(uint32_t which);               /* 1: behind the arena, 2: below the stack, 3: flash, 4: unaligned */

/* The driver of flash, which nobody else may write: 0 for success; programming what is not erased is an error. */
int board_flash_erase(const uint8_t *from, size_t nbytes);
int board_flash_program(const uint8_t *to, const void *data, size_t nbytes);

#endif
