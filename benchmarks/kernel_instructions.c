/* Bare metal: runs layers one after the other and prints SysTick's ticks of each by semihosting (kernel_instructions.py).
 *
 * Clock of SysTick: the core's. QEMU's semihosting text comes out on stderr.
 */
#include "tvad_kernels.h"

#include "layers.h" /* layers[], ROWS, LARGEST, CALLS, SCRATCHES; made by kernel_instructions.py */

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYST_CSR REGISTER(0xE000E010u)
#define SYST_RVR REGISTER(0xE000E014u)
#define SYST_CVR REGISTER(0xE000E018u)
#define SCB_VTOR REGISTER(0xE000ED08u)
#define SCB_CCR REGISTER(0xE000ED14u)
#define SCB_CPACR REGISTER(0xE000ED88u)

#define SYS_WRITE0 0x04u
#define SYS_EXIT_EXTENDED 0x20u
#define SCRATCH 131072u

extern uint32_t stack_top[];

static int8_t input[2][LARGEST] __attribute__((aligned(16)));
static int8_t output[LARGEST] __attribute__((aligned(16)));
static uint8_t scratch[SCRATCH] __attribute__((aligned(16)));

void Reset_Handler(void);
void Fault_Handler(void);

static void call(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = argument;

    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

static void stop(uint32_t code)
{
    const uint32_t argument[2] = { 0x20026u, code };

    for (;;) {
        call(SYS_EXIT_EXTENDED, argument);
    }
}

static void print_number(uint32_t value)
{
    char text[12];
    uint32_t at = sizeof text - 1;

    text[at] = 0;
    do {
        at--;
        text[at] = (char)('0' + (value % 10u));
        value /= 10u;
    } while (value != 0);
    call(SYS_WRITE0, &text[at]);
    call(SYS_WRITE0, " ");
}

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    void (*entry[15])(void);
} vectors = { stack_top, { Reset_Handler, Fault_Handler, Fault_Handler, Fault_Handler, Fault_Handler, Fault_Handler,
                           Fault_Handler, 0, 0, 0, Fault_Handler, Fault_Handler, 0, Fault_Handler, Fault_Handler } };

void Fault_Handler(void)
{
    call(SYS_WRITE0, "fault\n");
    stop(9);
}

static uint32_t scratch_of(const tvad_layer *layer)
{
    switch (layer->op) {
        SCRATCHES
    default:
        return 0;
    }
}

static void run(const tvad_layer *layer)
{
    const int32_t at_once = ROWS == 0 ? (int32_t)layer->out_h : ROWS;
    tvad_window window = { { input[0], input[1] }, output, { 0, 0 }, 0, 0, 0, scratch };

    for (window.row = 0; window.row < layer->out_h; window.row += at_once) {
        window.rows = window.row + at_once < layer->out_h ? at_once : (int32_t)layer->out_h - window.row;
        switch (layer->op) {
            CALLS
        default:
            stop(8);
        }
    }
}

static uint32_t checksum(const tvad_layer *layer)
{
    const uint32_t count = (uint32_t)layer->out_h * layer->out_w * layer->out_c;
    uint32_t sum = 0, i;

    for (i = 0; i < count; i++) {
        sum += (uint32_t)output[i] * (2u * i + 1u);
    }
    return sum;
}

void Reset_Handler(void)
{
    uint32_t i;

    SCB_VTOR = (uint32_t)&vectors;
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    SCB_CPACR |= 0xFu << 20;
    __asm volatile("dsb\n\tisb" ::: "memory");
#endif
#if defined(__ARM_FEATURE_MVE)
    SCB_CCR |= 1u << 19; /* low-overhead loops */
#endif
#if TICK_ALIGN_TRAP
    SCB_CCR |= 1u << 3;
#endif
    SYST_RVR = 0xFFFFFFu;
    SYST_CVR = 0;
    SYST_CSR = 5u;
    for (i = 0; i < LARGEST; i++) {
        input[0][i] = (int8_t)((i * 2654435761u) >> 24);
        input[1][i] = (int8_t)((i * 2246822519u) >> 23);
    }
    for (i = 0; i < sizeof layers / sizeof layers[0]; i++) {
        const uint32_t bytes = scratch_of(&layers[i]);
        uint32_t start, end;

        if (bytes > SCRATCH) {
            stop(7);
        }
        start = SYST_CVR;
        run(&layers[i]);
        end = SYST_CVR;
        call(SYS_WRITE0, "layer ");
        print_number((start - end) & 0xFFFFFFu);
        print_number(checksum(&layers[i]));
        print_number(bytes);
        call(SYS_WRITE0, "\n");
    }
    stop(0);
}
