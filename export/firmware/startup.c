/* From reset to main: vector table, .data, .bss, coprocessors. For any Cortex-M; the linker script names the addresses.
 *
 * Clocks, caches and the chip's own interrupts are not here: define SystemInit (it runs before main), or take your
 * vendor's start-up file and linker script instead and add model.c, bank.S and runtime/ to your project.
 */
#include <stdint.h>

typedef void handler(void);

extern const uint32_t data_load[];
extern uint32_t data_start[], data_end[], bss_start[], bss_end[], stack_top[];

int main(void);
handler Reset_Handler, Default_Handler;

/* Define any of these to replace it. A fault that nobody handles stops here, where a debugger finds it. */
#define WEAK __attribute__((weak, alias("Default_Handler")))
WEAK handler NMI_Handler, HardFault_Handler, MemManage_Handler, BusFault_Handler, UsageFault_Handler, SecureFault_Handler,
    SVC_Handler, DebugMon_Handler, PendSV_Handler, SysTick_Handler;

__attribute__((weak)) void SystemInit(void)
{
}

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    handler *entry[15];
} vectors = { stack_top,
              { Reset_Handler, NMI_Handler, HardFault_Handler, MemManage_Handler, BusFault_Handler, UsageFault_Handler,
                SecureFault_Handler, 0, 0, 0, SVC_Handler, DebugMon_Handler, 0, PendSV_Handler, SysTick_Handler } };

#define SCB_VTOR (*(volatile uint32_t *)0xE000ED08u)
#define SCB_CCR (*(volatile uint32_t *)0xE000ED14u)
#define SCB_CPACR (*(volatile uint32_t *)0xE000ED88u)

void Reset_Handler(void)
{
    const uint32_t *from = data_load;
    uint32_t *to;

    SCB_VTOR = (uint32_t)&vectors;
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    SCB_CPACR |= 0xFu << 20; /* CP10 and CP11: registers of the FPU and of Helium */
    __asm volatile("dsb\n\tisb" ::: "memory");
#endif
#if defined(__ARM_FEATURE_MVE)
    SCB_CCR |= 1u << 19; /* low-overhead loops */
#endif
    for (to = data_start; to < data_end; to++) {
        *to = *from++;
    }
    for (to = bss_start; to < bss_end; to++) {
        *to = 0;
    }
    SystemInit();
    (void)main();
    for (;;) {
    }
}

void Default_Handler(void)
{
    for (;;) {
    }
}
