/* Runs kernels of the runtime on QEMU's mps3-an547 (Cortex-M55): layers come from cases.bin, outputs go to outputs.bin.
 *
 * Every buffer of a case lies in an MPU region of its own that ends, or begins, with it: one byte read or written outside
 * is a fault. tests/mve_board.py writes and reads the files.
 */
#include <stdint.h>
#include <string.h>

#include "tvad_kernels.h"

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYST_CSR REGISTER(0xE000E010u)
#define SYST_RVR REGISTER(0xE000E014u)
#define SYST_CVR REGISTER(0xE000E018u)
#define SCB_CCR REGISTER(0xE000ED14u)
#define SCB_CFSR REGISTER(0xE000ED28u)
#define SCB_MMFAR REGISTER(0xE000ED34u)
#define SCB_CPACR REGISTER(0xE000ED88u)
#define MPU_CTRL REGISTER(0xE000ED94u)
#define MPU_RNR REGISTER(0xE000ED98u)
#define MPU_RBAR REGISTER(0xE000ED9Cu)
#define MPU_RLAR REGISTER(0xE000EDA0u)
#define MPU_MAIR0 REGISTER(0xE000EDC0u)

#define HEAP 0x21000000u
#define HEAP_END 0x21400000u
#define FILL 0xA5
#define SLAB 128u /* bytes around a buffer that nobody may touch */

enum { OP, KH, KW, SH, SW, TOP, LEFT, DILATION, IN_H, IN_W, IN_C, OUT_H, OUT_W, OUT_C, ZERO, ZERO2, OUT_ZERO, LOW, HIGH,
       WEIGHTS, BIAS, MULTIPLIER, SHIFT, FIRST, SECOND, OUT, IN_PLACE, ROW, ROWS, IN_ROW, IN_ROW2, OUT_ROW, AT_END, FENCED,
       FIELDS };

extern uint32_t stack_top[];
int main(void);
void Reset_Handler(void);
__attribute__((naked)) void HardFault_Handler(void);
void fault(const uint32_t *frame);

__attribute__((section(".vectors"), used)) static void *const vectors[16] = { stack_top, Reset_Handler, HardFault_Handler,
                                                                              HardFault_Handler };

static int32_t cases, outputs;
static uint32_t now, heap;

static int32_t call(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;

    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return (int32_t)r0;
}

static int32_t open_file(const char *name, uint32_t mode)
{
    const uint32_t argument[3] = { (uint32_t)name, mode, (uint32_t)strlen(name) };

    return call(0x01u, argument);
}

static void stop(uint32_t code)
{
    const uint32_t argument[2] = { 0x20026u, code };

    for (;;) {
        (void)call(0x20u, argument);
    }
}

static void get(void *data, uint32_t nbytes)
{
    const uint32_t argument[3] = { (uint32_t)cases, (uint32_t)data, nbytes };

    if (nbytes > 0 && call(0x06u, argument) != 0) {
        stop(5);
    }
}

static void put(const void *data, uint32_t nbytes)
{
    const uint32_t argument[3] = { (uint32_t)outputs, (uint32_t)data, nbytes };

    if (nbytes > 0 && call(0x05u, argument) != 0) {
        stop(6);
    }
}

void fault(const uint32_t *frame)
{
    const uint32_t words[4] = { 0xFFFFFFFFu, SCB_CFSR, SCB_MMFAR, frame[6] };

    MPU_CTRL = 0;
    put(words, sizeof words);
    stop(99);
}

void HardFault_Handler(void)
{
    __asm__ volatile("mov r0, sp\n\tldr r1, =fault\n\tbx r1");
}

/* `nbytes` of the heap, and region `number` around them; scratch is a multiple of 16. */
static uint8_t *place(uint32_t number, uint32_t nbytes, uint32_t at_end)
{
    const uint32_t base = heap, size = (nbytes + 31u) & ~31u;

    heap = base + size + SLAB;
    if (heap > HEAP_END) {
        stop(7);
    }
    memset((void *)base, FILL, size + SLAB);
    MPU_RNR = number;
    MPU_RBAR = base | 3u; /* read and write, never execute */
    MPU_RLAR = nbytes == 0 ? 0u : ((base + size - 32u) | 1u);
    return (uint8_t *)(at_end != 0 ? base + size - nbytes : base);
}

static uint32_t scratch_of(const tvad_layer *layer)
{
    switch (layer->op) {
    case TVAD_OP_CONV_1X1:
        return tvad_conv_1x1_scratch(layer);
    case TVAD_OP_CONV:
        return tvad_conv_scratch(layer);
    case TVAD_OP_DEPTHWISE:
        return tvad_depthwise_scratch(layer);
    case TVAD_OP_ADD:
        return tvad_add_scratch(layer);
    default:
        return 0;
    }
}

static tvad_kernel *kernel_of(uint32_t op)
{
    static tvad_kernel *const kernels[] = { [TVAD_OP_CONV_1X1] = tvad_conv_1x1, [TVAD_OP_CONV] = tvad_conv,
                                            [TVAD_OP_DEPTHWISE] = tvad_depthwise,
                                            [TVAD_OP_FULLY_CONNECTED] = tvad_fully_connected, [TVAD_OP_ADD] = tvad_add };

    return kernels[op];
}

static void run(const int32_t *f)
{
    const uint32_t at_end = (uint32_t)f[AT_END], *n = (const uint32_t *)f;
    uint8_t *weights, *constants, *in[2], *out;
    tvad_layer layer;
    tvad_window window;
    uint32_t words[4], start, end;

    heap = HEAP;
    weights = place(1, n[WEIGHTS], at_end);
    constants = place(2, n[BIAS] + n[MULTIPLIER] + n[SHIFT], at_end != 0 && n[SHIFT] % 4u == 0);
    in[0] = place(3, n[FIRST], at_end);
    in[1] = place(4, n[SECOND], at_end);
    out = place(5, f[IN_PLACE] != 0 ? 0u : n[OUT], at_end); /* regions must not overlap, so every one is set anew */
    if (f[IN_PLACE] != 0) {
        out = in[f[IN_PLACE] - 1];
    }
    get(weights, n[WEIGHTS]);
    get(constants, n[BIAS] + n[MULTIPLIER] + n[SHIFT]);
    get(in[0], n[FIRST]);
    get(in[1], n[SECOND]);

    memset(&layer, 0, sizeof layer);
    layer.op = (uint8_t)f[OP];
    layer.kernel_h = (uint8_t)f[KH], layer.kernel_w = (uint8_t)f[KW];
    layer.stride_h = (uint8_t)f[SH], layer.stride_w = (uint8_t)f[SW];
    layer.pad_top = (uint8_t)f[TOP], layer.pad_left = (uint8_t)f[LEFT], layer.dilation = (uint8_t)f[DILATION];
    layer.in_h = (uint16_t)f[IN_H], layer.in_w = (uint16_t)f[IN_W], layer.in_c = (uint16_t)f[IN_C];
    layer.out_h = (uint16_t)f[OUT_H], layer.out_w = (uint16_t)f[OUT_W], layer.out_c = (uint16_t)f[OUT_C];
    layer.in_zero = (int8_t)f[ZERO], layer.in2_zero = (int8_t)f[ZERO2], layer.out_zero = (int8_t)f[OUT_ZERO];
    layer.low = (int8_t)f[LOW], layer.high = (int8_t)f[HIGH];
    layer.weights = weights;
    layer.bias = (const int32_t *)(void *)constants;
    layer.multiplier = (const int32_t *)(void *)(constants + n[BIAS]);
    layer.shift = (const int8_t *)constants + n[BIAS] + n[MULTIPLIER];

    memset(&window, 0, sizeof window);
    window.in[0] = (const int8_t *)in[0], window.in[1] = (const int8_t *)in[1];
    window.out = (int8_t *)out;
    window.in_first[0] = f[IN_ROW], window.in_first[1] = f[IN_ROW2], window.out_first = f[OUT_ROW];
    window.row = f[ROW], window.rows = f[ROWS];
    words[0] = scratch_of(&layer);
    window.scratch = place(6, words[0], at_end);
    MPU_CTRL = f[FENCED] != 0 ? 3u : 0u; /* in a hard fault too; nothing outside the regions */
    __asm__ volatile("dsb\n\tisb" ::: "memory");
    start = SYST_CVR;
    kernel_of(layer.op)(&layer, &window);
    end = SYST_CVR;
    MPU_CTRL = 0;
    words[1] = (start - end) & 0xFFFFFFu;
    words[2] = n[OUT];
    words[3] = 0;
    put(words, sizeof words);
    put(out, n[OUT]);
}

int main(void)
{
    int32_t fields[FIELDS];
    uint32_t count;

    cases = open_file("cases.bin", 1);
    outputs = open_file("outputs.bin", 5);
    if (cases < 0 || outputs < 0) {
        stop(2);
    }
    MPU_MAIR0 = 0xFFu;
    MPU_RNR = 0; /* code, stack and this program's data: 0 to the end of DTCM */
    MPU_RBAR = 2u;
    MPU_RLAR = 0x2007FFE0u | 1u;
    SYST_RVR = 0xFFFFFFu;
    SYST_CVR = 0;
    SYST_CSR = 5u;
    get(&count, sizeof count);
    for (now = 0; now < count; now++) {
        get(fields, sizeof fields);
        run(fields);
    }
    stop(0);
    return 0;
}

void Reset_Handler(void)
{
    SCB_CPACR |= 0xFu << 20;
    SCB_CCR |= 1u << 19;
    __asm__ volatile("dsb\n\tisb" ::: "memory");
    cases = outputs = 0;
    now = heap = 0;
    (void)main();
}
