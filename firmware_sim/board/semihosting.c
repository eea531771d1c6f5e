/* The board of board.h on an emulated Cortex-M: files by semihosting, fences by the MPU, ticks of SysTick.
 *
 * QEMU lets a program touch any address; a chip's RAM ends. So the MPU allows the target's flash (to read) and RAM, this
 * program's own RAM, and nothing else: no default map, and 32 forbidden bytes behind the arena. The stack begins at the
 * first address of its memory, below which nothing is allowed. Registers: Armv7-M and Armv8-M Architecture Reference Manuals;
 * calls: Arm's "Semihosting for AArch32 and AArch64".
 */
#include "board.h"

#include <string.h>

#include "board_config.h" /* BOARD_MPU, made for the target by board.py */
#include "model.h"

#define SYS_OPEN 0x01u
#define SYS_WRITE 0x05u
#define SYS_READ 0x06u
#define SYS_SEEK 0x0Au
#define SYS_EXIT_EXTENDED 0x20u
#define APPLICATION_EXIT 0x20026u

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYST_CSR REGISTER(0xE000E010u)
#define SYST_RVR REGISTER(0xE000E014u)
#define SYST_CVR REGISTER(0xE000E018u)
#define SCB_CCR REGISTER(0xE000ED14u)
#define SCB_SHCSR REGISTER(0xE000ED24u)
#define SCB_CFSR REGISTER(0xE000ED28u)
#define SCB_HFSR REGISTER(0xE000ED2Cu)
#define SCB_MMFAR REGISTER(0xE000ED34u)
#define SCB_BFAR REGISTER(0xE000ED38u)
#define MPU_CTRL REGISTER(0xE000ED94u)
#define MPU_RNR REGISTER(0xE000ED98u)
#define MPU_RBAR REGISTER(0xE000ED9Cu)
#define MPU_RASR REGISTER(0xE000EDA0u) /* RLAR of Armv8-M */
#define MPU_MAIR0 REGISTER(0xE000EDC0u)

extern uint32_t stack_base[], stack_top[];
extern uint8_t arena_start[], arena_end[];

static int32_t request_file BOARD_RAM, result_file BOARD_RAM;
static uint32_t *painted_to BOARD_RAM;
static uint32_t fault_stack[256] BOARD_RAM __attribute__((aligned(8), used));

static int32_t call(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = argument;

    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return (int32_t)r0;
}

static int32_t open_file(const char *name, uint32_t mode)
{
    const uint32_t argument[3] = { (uint32_t)name, mode, (uint32_t)strlen(name) };

    return call(SYS_OPEN, argument);
}

void board_stop(int code)
{
    const uint32_t argument[2] = { APPLICATION_EXIT, (uint32_t)code };

    for (;;) {
        (void)call(SYS_EXIT_EXTENDED, argument);
    }
}

void board_read(uint32_t offset, void *data, size_t nbytes)
{
    const uint32_t place[2] = { (uint32_t)request_file, offset };
    const uint32_t argument[3] = { (uint32_t)request_file, (uint32_t)data, nbytes };

    if (nbytes > 0 && (call(SYS_SEEK, place) != 0 || call(SYS_READ, argument) != 0)) {
        board_stop(5);
    }
}

void board_write(const void *data, size_t nbytes)
{
    const uint32_t argument[3] = { (uint32_t)result_file, (uint32_t)data, nbytes };

    if (nbytes > 0 && call(SYS_WRITE, argument) != 0) {
        board_stop(6);
    }
}

const uint8_t *board_bank(size_t *size)
{
    *size = tvad_bank_bin_size;
    return tvad_bank_bin;
}

uint32_t board_ticks(void)
{
    return SYST_CVR;
}

/* --- stack --- */

#define PAINT 0x5AFE57ACu
#define OWN_WORDS 16 /* below board_paint_stack's entry: not painted, for what it pushes itself; counted as used */

static uint32_t *stack_pointer(void)
{
    uint32_t *sp;

    __asm volatile("mov %0, sp" : "=r"(sp));
    return sp;
}

__attribute__((noinline)) void board_paint_stack(void)
{
    uint32_t *word;

    painted_to = stack_pointer() - OWN_WORDS;
    for (word = stack_base; word < painted_to; word++) {
        *(volatile uint32_t *)word = PAINT;
    }
}

__attribute__((noinline)) uint32_t board_stack_used(void)
{
    const uint32_t *word = stack_base;

    while (word < painted_to && *word == PAINT) {
        word++;
    }
    return (uint32_t)(painted_to + OWN_WORDS - word) * 4u;
}

/* --- fences --- */

static void fence(void)
{
    static const uint32_t regions[][2] = BOARD_MPU; /* RBAR and RASR (RLAR) */
    const uint32_t count = sizeof regions / sizeof regions[0];
    uint32_t i;

    for (i = 0; i < count; i++) {
        MPU_RNR = i;
        MPU_RBAR = regions[i][0];
        MPU_RASR = regions[i][1];
    }
#if __ARM_ARCH >= 8
    MPU_MAIR0 = 0xFFu; /* attribute 0: normal memory; the arena's region ends with the arena */
    MPU_RNR = BOARD_ARENA_REGION;
    MPU_RASR = ((uint32_t)arena_end - 32u) | 1u;
#else
    MPU_RNR = count; /* of two regions the one with the higher number counts: 32 bytes that nobody may touch */
    MPU_RBAR = (uint32_t)arena_end;
    MPU_RASR = 4u << 1 | 1u;
#endif
    MPU_CTRL = 1u;
    SCB_SHCSR |= 7u << 16; /* memory management, bus and usage faults by name */
    __asm volatile("dsb\n\tisb" ::: "memory");
}

void board_open(void)
{
    request_file = open_file("request.bin", 1);
    result_file = open_file("result.bin", 5);
    if (request_file < 0 || result_file < 0) {
        board_stop(2);
    }
#if BOARD_TRAP_UNALIGNED
    SCB_CCR |= 1u << 3; /* as on the target's core, which has no unaligned accesses */
#endif
    fence();
    SYST_RVR = 0xFFFFFFu;
    SYST_CVR = 0;
    SYST_CSR = 5u;
}

/* The chip's flash controller: QEMU keeps flash in RAM, so the driver takes the fences down while it writes. */
static void open_flash(int is_open)
{
    __asm volatile("dsb" ::: "memory");
    MPU_CTRL = is_open ? 0u : 1u;
    __asm volatile("dsb\n\tisb" ::: "memory");
}

int board_flash_erase(const uint8_t *from, size_t nbytes)
{
    volatile uint8_t *at = (volatile uint8_t *)(uint32_t)from;

    open_flash(1);
    while (nbytes-- > 0) {
        *at++ = 0xFFu;
    }
    open_flash(0);
    return 0;
}

int board_flash_program(const uint8_t *to, const void *data, size_t nbytes)
{
    volatile uint8_t *at = (volatile uint8_t *)(uint32_t)to;
    const uint8_t *value = data;
    int failed = 0;

    open_flash(1);
    for (; nbytes > 0; nbytes--, at++) {
        failed |= *at != 0xFFu;
        *at = *value++;
        failed |= *at != value[-1];
    }
    open_flash(0);
    return failed;
}

static uint32_t deeper(volatile uint32_t *from)
{
    volatile uint32_t here[16];

    here[0] = from[0];
    return here[0] == 0xFFFFFFFFu ? 0u : deeper(here) + here[0];
}

void board_break_fence(uint32_t which)
{
    volatile uint32_t seed = 1;

    if (which == 1) {
        *(volatile uint8_t *)((uint32_t)arena_end - 1u) = 1; /* still the arena */
        *(volatile uint8_t *)arena_end = 1;
    } else if (which == 2) {
        seed = deeper(&seed);
    } else if (which == 3) {
        *(volatile uint8_t *)(uint32_t)tvad_bank_bin = 1;
    } else {
        seed = *(volatile uint32_t *)((uint32_t)arena_start + 1u);
    }
}

/* --- faults --- */

/* The stack may be what broke: first onto another one. */
#define ON_OWN_STACK(number)                                                                                              \
    __asm volatile("mov r0, sp\n\tldr r1, =fault_stack + 1024\n\tmov sp, r1\n\tmovs r1, #" #number "\n\tldr r2, =fault\n\tbx r2")

void fault(const uint32_t *frame, uint32_t exception);
__attribute__((naked)) void HardFault_Handler(void);
__attribute__((naked)) void MemManage_Handler(void);
__attribute__((naked)) void BusFault_Handler(void);
__attribute__((naked)) void UsageFault_Handler(void);

void HardFault_Handler(void)
{
    ON_OWN_STACK(3);
}

void MemManage_Handler(void)
{
    ON_OWN_STACK(4);
}

void BusFault_Handler(void)
{
    ON_OWN_STACK(5);
}

void UsageFault_Handler(void)
{
    ON_OWN_STACK(6);
}

__attribute__((used)) void fault(const uint32_t *frame, uint32_t exception)
{
    const int readable = frame >= stack_base && frame + 8 <= stack_top;
    const uint32_t values[9] = { 0x544C4146u, 28u, /* FALT */
                                 exception, SCB_CFSR, SCB_HFSR, (SCB_CFSR & 0x80u) != 0 ? SCB_MMFAR : SCB_BFAR,
                                 readable ? frame[6] : 0u, readable ? frame[5] : 0u, (uint32_t)frame };

    MPU_CTRL = 0;
    board_write(values, sizeof values);
    board_stop(99);
}
