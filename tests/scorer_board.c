/* The bank and scorer half of the runtime on an emulated Cortex-M: cases linked in, a line each out by semihosting.
 *
 * cases.bin, at a multiple of 4096: a record of eight uint32 a case (number; offset and bytes of its bank; offset of its
 * tapped maps, all of them one after the other; zeros), ended by one of number 0xFFFFFFFF. A line: number, status of
 * tvad_open, status of the self-test, score, CRC-32 of the map, ticks of SysTick in tvad_score, task. The last: "end".
 */
#include <stdint.h>

#include "tvad_internal.h"

#define SYSTICK ((volatile uint32_t *)0xE000E010u)
#define CCR (*(volatile uint32_t *)0xE000ED14u)
#define CPACR (*(volatile uint32_t *)0xE000ED88u)
#define UNALIGN_TRP (1u << 3)
#define SCRATCH_BYTES 65536u

extern const uint8_t cases[];
extern uint32_t bss_start[], bss_end[], stack_top[];
void Reset_Handler(void);
void Fault_Handler(void);
int main(void);

static uint8_t scratch[SCRATCH_BYTES] __attribute__((aligned(16)));

static void semihost(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;

    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(const char *text)
{
    semihost(4u, text);
}

static void print_number(uint32_t x)
{
    char text[12];
    uint32_t at = sizeof text - 1u;

    text[at] = 0;
    text[--at] = ' ';
    do {
        text[--at] = (char)('0' + x % 10u);
        x /= 10u;
    } while (x != 0);
    print(text + at);
}

static void run(const uint32_t *record)
{
    const int8_t *taps[TVAD_MAX_TAPS], *maps = (const int8_t *)cases + record[3];
    tvad_bank bank;
    tvad_result result = {0};
    tvad_status status = tvad_open(cases + record[1], record[2], &bank);
    uint32_t t, ticks;

    print_number(record[0]);
    print_number((uint32_t)status);
    if (status == TVAD_OK) {
        for (t = 0; t < bank.taps; t++) {
            const int32_t *row = bank.tap_rows + TVAD_TAP_FIELDS * t;

            taps[t] = maps;
            maps += row[TVAD_TAP_H] * row[TVAD_TAP_W] * row[TVAD_TAP_C];
        }
        print_number((uint32_t)tvad_self_test(&bank, scratch, SCRATCH_BYTES));
        SYSTICK[2] = 0;
        ticks = SYSTICK[2];
        (void)tvad_score(&bank, taps, scratch, SCRATCH_BYTES, &result);
        ticks = (ticks - SYSTICK[2]) & 0xFFFFFFu;
        print_number(result.score);
        print_number(tvad_crc32(0, (const uint8_t *)result.map, 4u * result.grid_h * result.grid_w));
        print_number(ticks);
        print_number(result.task);
    }
    print("\n");
}

int main(void)
{
    const uint32_t *record;

#ifdef NO_UNALIGNED
    CCR |= UNALIGN_TRP;             /* as on a Cortex-M0+ */
#endif
    SYSTICK[1] = 0xFFFFFFu;
    SYSTICK[0] = 5u;
    for (record = (const uint32_t *)(const void *)cases; record[0] != UINT32_MAX; record += 8) {
        run(record);
    }
    print("end\n");
    semihost(0x18u, (const void *)0x20026u);
    return 0;
}

void Fault_Handler(void)
{
    print("fault\n");
    semihost(0x18u, (const void *)0x20026u);
    for (;;) {
    }
}

void Reset_Handler(void)
{
    uint32_t *word;

#ifdef __ARM_FEATURE_MVE
    CPACR |= 0xFu << 20;
    __asm__ volatile("dsb\n\tisb");
#endif
    for (word = bss_start; word < bss_end; word++) {
        *word = 0;
    }
    (void)main();
}

__attribute__((section(".vectors"), used)) static void *const vectors[] = {
    stack_top, (void *)Reset_Handler, (void *)Fault_Handler, (void *)Fault_Handler,
    (void *)Fault_Handler, (void *)Fault_Handler, (void *)Fault_Handler,
};
