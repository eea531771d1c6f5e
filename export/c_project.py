"""What stands around model.c in a build's firmware/: linker script, Makefile, bank.S and README, from a chip's memory.

Flows in: a ``Chip`` (core and regions; ``tinyvad.firmware_sim`` makes one from a target) and sizes. Flows out: texts. The
linker script is written for binutils 2.40: one MEMORY entry a line, with blanks around the signs.

Order in a block of RAM: stack, .data, .bss, camera frame, arena. The stack grows down towards the block's first address
and the arena ends last, so that both run out of the program's memory rather than into its data.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyvad.errors import InputError

ARENA_ALIGN = 32

_FPU = {
    ("cortex-m4", "sp"): "-mfpu=fpv4-sp-d16",
    ("cortex-m7", "sp"): "-mfpu=fpv5-sp-d16",
    ("cortex-m7", "dp"): "-mfpu=fpv5-d16",
    ("cortex-m33", "sp"): "-mfpu=fpv5-sp-d16",
}
CORES = ("cortex-m0", "cortex-m0plus", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55")
WARNINGS = "-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wundef -Werror"
_SLOTS_NOTE = (
    "- Two slots at the end of flash hold the bank; `main.c` opens the newer one. To learn on the device (PatchCore) give\n"
    "  it flash_erase and flash_program for your chip, and say in images_to_learn when (`runtime/tvad_learn.h`)."
)


@dataclass(frozen=True)
class Memory:
    """``size`` bytes of addresses from ``base``; the name is the linker script's."""

    name: str
    base: int
    size: int


@dataclass(frozen=True)
class Chip:
    """What the compiler and the linker need to know of a target.

    Attributes:
        core: one of ``CORES``. fpu: 'none', 'sp' or 'dp'.
        flash: where code, model and bank go. ram: the blocks of RAM that are used, each once.
        stack_in, arena_in, frame_in: names of blocks in ``ram``; .data and .bss lie behind the stack.
        stack_bytes: reserved for the stack.
        slot_bytes: of each of two slots for the bank at the end of flash, whole erase sectors; 0: one bank that stays.
        learning_bytes: RAM that learning takes, in block ``learning_in``.
    """

    name: str
    title: str
    core: str
    fpu: str
    flash: Memory
    ram: tuple[Memory, ...]
    stack_in: str
    arena_in: str
    frame_in: str = ""
    stack_bytes: int = 4096
    slot_bytes: int = 0
    learning_in: str = ""
    learning_bytes: int = 0

    @property
    def slots(self) -> tuple[Memory, ...]:
        """The two slots, () without."""
        first = self.flash.base + self.flash.size - 2 * self.slot_bytes
        return tuple(Memory(f"SLOT_{i}", first + i * self.slot_bytes, self.slot_bytes) for i in (0, 1) if self.slot_bytes)

    @property
    def program(self) -> Memory:
        """The flash before the slots."""
        return Memory(self.flash.name, self.flash.base, self.flash.size - 2 * self.slot_bytes)


def core_flags(chip: Chip) -> str:
    """The compiler's options for the core.

    Raises:
        InputError: no Cortex-M that arm-none-eabi-gcc is used for here.
    """
    if chip.core not in CORES:
        raise InputError(f"target {chip.name}: firmware is made for {', '.join(CORES)}, not for {chip.core}; copy runtime/")
    if chip.core == "cortex-m55":
        return "-mcpu=cortex-m55 -mthumb -mfloat-abi=hard"  # Helium's registers are the FPU's
    fpu = _FPU.get((chip.core, chip.fpu))
    return f"-mcpu={chip.core} -mthumb " + (f"{fpu} -mfloat-abi=hard" if fpu else "-mfloat-abi=soft")


def link_script(chip: Chip, memories: tuple[Memory, ...] = (), sections: str = "") -> str:
    """link.ld; ``memories`` and ``sections`` are put beside the chip's own."""
    lines = [
        f"/* Memory of {chip.title} and where each section lies. Symbols are used by startup.c. */",
        "MEMORY",
        "{",
        _memory_line(chip.program, "rx"),
        *(_memory_line(memory, "r") for memory in chip.slots),
        *(_memory_line(memory, "rw") for memory in (*chip.ram, *memories)),
        "}",
        "",
        "ENTRY(Reset_Handler)",
        "",
        "SECTIONS",
        "{",
        f"    .vectors : {{ KEEP(*(.vectors)) }} > {chip.flash.name}",
        f"    .model : {{ *model.o(.rodata .rodata.*) }} > {chip.flash.name}",
        *_bank_sections(chip),
        f"    .text : {{ *(.text .text.*) *(.rodata .rodata.*) . = ALIGN(4); }} > {chip.flash.name}",
        "",
        "    .stack (NOLOAD) :",
        "    {",
        "        stack_base = .;",
        f"        . += {chip.stack_bytes};",
        "        . = ALIGN(8);",
        "        stack_top = .;",
        f"    }} > {chip.stack_in}",
        "    .data :",
        "    {",
        "        . = ALIGN(4);",
        "        data_start = .;",
        "        *(.data .data.*)",
        "        . = ALIGN(4);",
        "        data_end = .;",
        f"    }} > {chip.stack_in} AT> {chip.flash.name}",
        "    data_load = LOADADDR(.data);",
        "    .bss (NOLOAD) :",
        "    {",
        "        . = ALIGN(4);",
        "        bss_start = .;",
        "        *(.bss .bss.* COMMON)",
        "        . = ALIGN(4);",
        "        bss_end = .;",
        f"    }} > {chip.stack_in}",
    ]
    if chip.frame_in:
        lines.append(f"    .frame (NOLOAD) : {{ *(.frame) }} > {chip.frame_in}")
    if chip.learning_in:
        lines.append(f"    .learning (NOLOAD) : ALIGN(16) {{ *(.learning) }} > {chip.learning_in}")
    lines += [
        f"    .arena (NOLOAD) : ALIGN({ARENA_ALIGN})",
        "    {",
        "        arena_start = .;",
        "        *(.arena)",
        "        arena_end = .;",
        f"    }} > {chip.arena_in}",
        *([sections] if sections else []),
        "    /DISCARD/ : { *(.ARM.exidx* .ARM.extab*) }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _bank_sections(chip: Chip) -> list[str]:
    """The bank in flash; of two slots the second one is in the image too, erased, so that no old bank survives in it."""
    if not chip.slots:
        return [f"    .bank : {{ *(.bank) }} > {chip.flash.name}"]
    first, second = chip.slots
    return [
        f"    .bank : {{ KEEP(*(.bank)) }} > {first.name}",
        f"    .slot : {{ FILL(0xFFFFFFFF) BYTE(0xFF) . = {second.size}; }} > {second.name}",
        f"    tvad_slot_0 = {first.base:#010x};",
        f"    tvad_slot_1 = {second.base:#010x};",
    ]


def _memory_line(memory: Memory, access: str) -> str:
    return f"    {memory.name} ({access}) : ORIGIN = {memory.base:#010x}, LENGTH = {memory.size}"


def makefile(chip: Chip, sources: list[str]) -> str:
    """Makefile: ``make`` links firmware.elf, ``make size`` prints its sections."""
    objects = [f"obj/{name.rsplit('.', 1)[0].replace('runtime/', '')}.o" for name in sources]
    listed = " \\\n           ".join(" ".join(objects[i : i + 4]) for i in range(0, len(objects), 4))
    return f"""\
# Firmware for {chip.title}. Needs arm-none-eabi-gcc and its C library, nothing else.
CROSS   ?= arm-none-eabi-
CC      := $(CROSS)gcc
CORE    := {core_flags(chip)}
CFLAGS  := $(CORE) -std=c99 -O3 {WARNINGS} \\
           -ffunction-sections -fdata-sections -fstack-usage -Iruntime -I.
LDFLAGS := $(CORE) --specs=nano.specs -nostartfiles -T link.ld \\
           -Wl,--gc-sections -Wl,--fatal-warnings -Wl,-Map=obj/firmware.map
OBJECTS := {listed}

.PHONY: all size clean
all: firmware.elf

firmware.elf: $(OBJECTS) link.ld
	$(CC) $(LDFLAGS) $(OBJECTS) -o $@

obj/%.o: %.c model.h $(wildcard runtime/*.h) | obj
	$(CC) $(CFLAGS) -c $< -o $@

obj/%.o: runtime/%.c $(wildcard runtime/*.h) | obj
	$(CC) $(CFLAGS) -c $< -o $@

obj/bank.o: bank.S bank.tvb | obj
	$(CC) $(CORE) -c $< -o $@

obj:
	mkdir -p obj

# obj/*.su say how much stack each function takes
size: firmware.elf
	$(CROSS)size -A $<

clean:
	rm -rf obj firmware.elf
"""


def bank_source(align: int) -> str:
    """bank.S: the bank's bytes in flash, where tvad_open reads them."""
    return f"""\
/* The memory bank, read where it lies. Another bank of the same network may take its place: copy it over bank.tvb. */
    .syntax unified
    .section .bank, "a", %progbits
    .balign {align}
    .global tvad_bank_bin
tvad_bank_bin:
    .incbin "bank.tvb"
tvad_bank_bin_end:

    .balign 4
    .global tvad_bank_bin_size
tvad_bank_bin_size:
    .word tvad_bank_bin_end - tvad_bank_bin
"""


def readme(chip: Chip | None, name: str, arena_bytes: int) -> str:
    """README.md of the folder."""
    made_for = "any core with a C99 compiler" if chip is None else chip.title
    lines = [
        f"# {name}: firmware for {made_for}",
        "",
        f"- `model.c`, `model.h`: the network and its memory plan; RAM: one arena of {arena_bytes:,} bytes, and the stack.",
        "- `bank.tvb`, `bank.S`: the memory bank, read in place from flash.",
        "- `runtime/`: plain C99, no heap, no floating point, no globals; `tvad.h` is all that an application includes.",
    ]
    if chip is not None:
        lines += [
            f"- `link.ld`, `startup.c`, `Makefile`: for {chip.name}; `make` links firmware.elf, `make size` prints it.",
            "- `main.c`: start here: put your camera into camera_read and your output into report.",
            "- In a vendor's project: add model.c, bank.S and runtime/, give the arena its section, keep their start-up.",
            "  A chip whose ROM wants a header of its own before the vectors (RP2040, RP2350, STM32N6) needs that.",
            *([_SLOTS_NOTE] if chip.slots else []),
        ]
    lines.append("- `tinyvad verify BUILD --engine firmware` runs these very objects under QEMU and compares every score.")
    return "\n".join(lines) + "\n"
