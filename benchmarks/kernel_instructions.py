"""Instructions that the runtime's kernels take, counted in QEMU a layer at a time.

    python benchmarks/kernel_instructions.py                               MCUNet in3 at 176 pixels on a Cortex-M7
    python benchmarks/kernel_instructions.py --core cortex-m4 --core cortex-m3 --layers --sums
    python benchmarks/kernel_instructions.py --op CONV_1X1 --op CONV       only these kernels; needs only their files
    python benchmarks/kernel_instructions.py --rows 4                      four output rows a call, as a patch plan does

Needs arm-none-eabi-gcc and qemu-system-arm (``make firmware-tools``). Weights and inputs are random: the kernels hardly
branch on values. Counts are SysTick's under ``-icount shift=0``, a tick every 31 to 50 instructions, repeatable to the last
one. MACs are nominal: padding counts. Nothing is written without --out.

cortex-m0plus is code for Armv6-M on the board of the M3, with unaligned accesses made to fault.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyvad.backbones import mcunet
from tinyvad.errors import InputError
from tinyvad.export import packing, packing_mve
from tinyvad.export.layers import OPS, Layer
from tinyvad.files import write_text
from tinyvad.firmware_sim.machines import MACHINES, NO_UNALIGNED, Machine
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.passes import fold_batchnorm

RUNTIME = Path(__file__).resolve().parents[1] / "export" / "runtime"
PROGRAM = Path(__file__).with_name("kernel_instructions.c")
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Wundef", "-Werror"]
KERNELS = {
    "CONV_1X1": "tvad_conv_1x1", "CONV": "tvad_conv", "DEPTHWISE": "tvad_depthwise",
    "FULLY_CONNECTED": "tvad_fully_connected", "ADD": "tvad_add",
}  # fmt: skip
# a Cortex-M55 without -mfloat-abi=hard has no Helium
FLAGS = {"cortex-m55": ["-mfloat-abi=hard"]}


@dataclass(frozen=True, eq=False)
class Measured:
    """One layer: MACs (ADD: elements), instructions, the sum of its output's bytes times their place, scratch in bytes."""

    layer: Layer
    macs: int
    instructions: float
    checksum: int
    scratch: int

    @property
    def kind(self) -> str:
        height, width = self.layer.kernel
        if self.layer.op in ("CONV", "DEPTHWISE"):
            return f"{self.layer.op.lower()} {height}x{width} s{self.layer.stride[0]}"
        if self.layer.op == "CONV_1X1":
            return "conv_1x1, K < 40" if self.layer.in_shape[2] < 40 else "conv_1x1, K >= 40"
        return self.layer.op.lower()


def trunk(net: str, size: int) -> list[Layer]:
    """The layers of an MCUNet without its classifier, with random constants."""
    graph = fold_batchnorm(mcunet.build(net, size))
    rng = np.random.default_rng(0)
    return [random_layer(graph, node, rng) for node in graph.nodes]


def random_layer(graph: Graph, node: Node, rng: np.random.Generator) -> Layer:
    """The layer of a conv, depthwise, fully connected or add node; weights are not packed yet."""
    shapes = [tuple(int(s) for s in graph.tensors[name].shape[1:]) for name in (node.inputs[0], node.output)]
    (in_shape, out_shape), name = shapes, node.output
    zeros = (3, 5, -7)
    if node.op == "add":
        bias = np.array([1518500250, -1, 1734500250, -1, 1250123456, -18], np.int32)
        return Layer("ADD", name, in_shape, out_shape, zeros=zeros, bias=bias)
    weights = rng.integers(-127, 128, graph.tensors[node.inputs[1]].shape).astype(np.int8)
    channels = out_shape[-1]
    length = weights[..., 0].size if node.op == "depthwise_conv2d" else weights[0].size
    right = round(math.log2(74 * 74 * math.sqrt(length) / 50)) - 1
    constants = {
        "bias": rng.integers(-9999, 9999, channels).astype(np.int32),
        "multiplier": rng.integers(1 << 30, (1 << 31) - 1, channels).astype(np.int32),
        "shift": (-right - rng.integers(0, 2, channels)).astype(np.int8),
    }
    if node.op == "fully_connected":
        return Layer("FULLY_CONNECTED", name, in_shape, out_shape, zeros=zeros, weights=weights, **constants)
    top, _, left, _ = node.attributes["pads"]
    stride = tuple(node.attributes["stride"])
    kernel = (int(weights.shape[1]), int(weights.shape[2]))
    op = "DEPTHWISE" if node.op == "depthwise_conv2d" else "CONV"
    if op == "CONV" and kernel == stride == (1, 1) and not any(node.attributes["pads"]):
        op = "CONV_1X1"
    return Layer(
        op, name, in_shape, out_shape, kernel, stride, (top, left), zeros=zeros, weights=weights, **constants
    )  # fmt: skip


def packed(layer: Layer, core: str) -> np.ndarray | None:
    """The weights in the order of the core's kernels."""
    pack = packing_mve if core == "cortex-m55" else packing
    if layer.weights is None:
        return None
    if layer.op == "DEPTHWISE":
        return pack.pack_depthwise(layer.weights[0])
    if layer.op == "CONV":
        return pack.pack_conv(layer.weights)
    if layer.op == "CONV_1X1":
        return pack.pack_conv_1x1(layer.weights[:, 0, 0])
    return pack.pack_fully_connected(layer.weights)


def measure(
    core: str, layers: list[Layer], rows: int = 0, optimise: str = "-O3", flags: tuple[str, ...] = ()
) -> list[Measured]:
    """Run every layer once on the board of ``core``, ``rows`` output rows a call (0: all).

    Raises:
        InputError: a tool is missing, or the code does not compile or run.
    """
    machine = MACHINES[core]
    with tempfile.TemporaryDirectory(prefix="tvad-") as temporary:
        folder = Path(temporary)
        _write_program(folder, layers, core, machine, rows)
        files = [path for path in sorted(RUNTIME.glob("tvad_*.c")) if _needed(path, layers)]
        mode = [f"-mcpu={core}", "-mthumb", *FLAGS.get(core, [])]
        _run(["arm-none-eabi-gcc", *mode, optimise, *WARNINGS, *flags, "-ffunction-sections", "-fdata-sections",
              "-I", str(RUNTIME), "-I", str(folder), "-DTICK_ALIGN_TRAP=" + ("1" if core in NO_UNALIGNED else "0"),
              "-nostartfiles", "--specs=nosys.specs", "-Wl,--gc-sections", "-T", str(folder / "link.ld"),
              "-o", str(folder / "kernels.elf"), str(PROGRAM), str(folder / "layers.s"), *map(str, files)])  # fmt: skip
        out = _run(["qemu-system-arm", "-M", machine.name, "-display", "none", "-serial", "none", "-monitor", "none",
                    "-icount", "shift=0", "-semihosting-config", "enable=on,target=native",
                    "-kernel", str(folder / "kernels.elf")])  # fmt: skip
    lines = [line.split() for line in out.splitlines() if line.startswith("layer ")]
    if len(lines) != len(layers):
        raise InputError(f"{core}: the program stopped after {len(lines)} of {len(layers)} layers: {out[-300:]}")
    found = []
    for layer, (_, ticks, checksum, scratch) in zip(layers, lines, strict=True):
        found.append(Measured(layer, macs_of(layer), int(ticks) * machine.tick, int(checksum), int(scratch)))
    return found


def made_up_input(shape: tuple[int, ...]) -> np.ndarray:
    """What the program fills the first operand with, int8."""
    i = np.arange(math.prod(shape), dtype=np.uint32)
    return (i * np.uint32(2654435761) >> np.uint32(24)).astype(np.uint8).view(np.int8).reshape(shape)


def checksum(output: np.ndarray) -> int:
    """What the program prints of an int8 output."""
    places = 2 * np.arange(output.size, dtype=np.int64) + 1
    return int((output.ravel().astype(np.int64) * places).sum() & 0xFFFFFFFF)


def macs_of(layer: Layer) -> int:
    """Multiply-accumulates of a layer, padding counted; elements of an ADD."""
    if layer.op == "ADD" or layer.weights is None:
        return math.prod(layer.out_shape)
    taps = layer.weights[0, ..., 0].size if layer.op == "DEPTHWISE" else layer.weights[0].size
    return math.prod(layer.out_shape) * taps


def _needed(path: Path, layers: list[Layer]) -> bool:
    """A kernel's own file or what it shares: matrix, depthwise and the like."""
    names = {KERNELS[layer.op] for layer in layers} | {"tvad_matrix", "tvad_clamp_outputs"}
    return any(path.stem == name or path.stem.startswith(f"{name}_") for name in names)


def _run(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise InputError(f"needs {command[0]}: run `make firmware-tools`")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} hung for 300 s") from None
    if done.returncode != 0:
        raise InputError(f"{command[0]}: {(done.stderr + done.stdout)[-3000:]}")
    return done.stdout + done.stderr


def _write_program(folder: Path, layers: list[Layer], core: str, machine: Machine, rows: int) -> None:
    blob, entries = bytearray(), []
    for layer in layers:
        offsets = {}
        arrays = {**layer.arrays, **({} if layer.weights is None else {"weights": packed(layer, core)})}
        for name, array in arrays.items():
            blob += bytes(-len(blob) % 16)
            offsets[name] = len(blob)
            blob += array.tobytes()
        entries.append(_entry(layer, offsets))
    (folder / "constants.bin").write_bytes(bytes(blob) or b"\0")
    (folder / "layers.s").write_text(
        f'.section .rodata.constants, "a"\n.balign 16\n.global constants\nconstants: .incbin "{folder}/constants.bin"\n'
    )
    ops = sorted({layer.op for layer in layers})
    scratches = [op for op in ops if op != "FULLY_CONNECTED"]
    largest = max(max(math.prod(layer.in_shape), math.prod(layer.out_shape)) for layer in layers)
    (folder / "layers.h").write_text("\n".join([
        f"#define ROWS {rows}",
        f"#define LARGEST {largest + 64}u",
        "extern const uint8_t constants[];",
        f"static const tvad_layer layers[{len(layers)}] = {{", *entries, "};",
        "#define CALLS \\",
        *(f"    case {OPS[op]}: {KERNELS[op]}(layer, &window); break; \\" for op in ops),
        "",
        "#define SCRATCHES \\",
        *(f"    case {OPS[op]}: return {KERNELS[op]}_scratch(layer); \\" for op in scratches),
        "", "",
    ]))  # fmt: skip
    boot = machine.boot or machine.flash
    ram = machine.ram[0]
    (folder / "link.ld").write_text("\n".join([
        "MEMORY", "{",
        f"    FLASH (rx) : ORIGIN = {machine.flash.base:#x}, LENGTH = {machine.flash.size:#x}",
        *([f"    BOOT (rx) : ORIGIN = {boot.base:#x}, LENGTH = {boot.size:#x}"] if machine.boot else []),
        f"    RAM (rwx) : ORIGIN = {ram.base:#x}, LENGTH = {ram.size:#x}",
        "}", "ENTRY(Reset_Handler)", f"stack_top = {ram.base + ram.size:#x};",
        "SECTIONS", "{",
        f"    .vectors : {{ KEEP(*(.vectors)) }} > {'BOOT' if machine.boot else 'FLASH'}",
        "    .text : { *(.text*) *(.rodata*) } > FLASH",
        "    .exidx : { *(.ARM.exidx*) } > FLASH",
        "    .bss (NOLOAD) : { *(.data*) *(.bss*) *(COMMON) } > RAM",
        "}", "",
    ]))  # fmt: skip


def _entry(layer: Layer, offsets: dict[str, int]) -> str:
    in_h, in_w, in_c = layer.in_shape
    out_h, out_w, out_c = layer.out_shape
    fields = {
        "op": OPS[layer.op], "kernel_h": layer.kernel[0], "kernel_w": layer.kernel[1], "stride_h": layer.stride[0],
        "stride_w": layer.stride[1], "pad_top": layer.pad[0], "pad_left": layer.pad[1], "dilation": layer.dilation,
        "in_h": in_h, "in_w": in_w, "in_c": in_c, "out_h": out_h, "out_w": out_w, "out_c": out_c,
        "in_zero": layer.zeros[0], "in2_zero": layer.zeros[1], "out_zero": layer.zeros[2], "low": layer.limits[0],
        "high": layer.limits[1],
    }  # fmt: skip
    pointers = {name: f"(const void *)(constants + {offset})" for name, offset in offsets.items()}
    return "    { " + ", ".join(f".{name} = {value}" for name, value in {**fields, **pointers}.items()) + " },"


def a_mac(found: list[Measured]) -> float:
    """Instructions a multiply-accumulate; those of ADD count, its elements do not."""
    return sum(m.instructions for m in found) / max(sum(m.macs for m in found if m.layer.op != "ADD"), 1)


def block_of(measured: Measured) -> int:
    """The block that a layer of an MCUNet belongs to; the stem's is -1."""
    name = measured.layer.name.split(".")[0].removeprefix("block")
    return int(name) if name.isdigit() else -1


def table(core: str, found: list[Measured]) -> list[str]:
    """Markdown: a line a kind (ADD: a MAC is an element), and totals."""
    kinds: dict[str, list[Measured]] = defaultdict(list)
    for measured in found:
        kinds[measured.kind].append(measured)
    lines = [f"| {core} | MMAC | M instructions | a MAC | scratch, bytes |", "|---|---:|---:|---:|---:|"]
    for kind, members in sorted(kinds.items()):
        macs, instructions = sum(m.macs for m in members), sum(m.instructions for m in members)
        most = max(m.scratch for m in members)
        lines.append(f"| {kind} | {macs / 1e6:.3f} | {instructions / 1e6:.2f} | {instructions / macs:.3f} | {most} |")
    to_block_9 = [m for m in found if block_of(m) <= 9]
    for name, members in (("to block 9", to_block_9), ("all", found)):
        macs = sum(m.macs for m in members if m.layer.op != "ADD")
        instructions = sum(m.instructions for m in members)
        lines.append(f"| {name} | {macs / 1e6:.3f} | {instructions / 1e6:.2f} | {a_mac(members):.3f} | |")
    return lines


def overview(net: str, size: int, found: dict[str, list[Measured]]) -> list[str]:
    """Markdown for people: instructions a MAC of every kind, a column a core."""
    cores = " ".join(f"--core {core}" for core in found)
    lines = [
        f"# Instructions a multiply-accumulate, MCUNet {net} trunk at {size} px", "",
        f"    python benchmarks/kernel_instructions.py {cores} --sums --out benchmarks/results/kernels.md", "",
        "Counted in QEMU, -O3, whole maps; an add counts by output value. All cores made the same outputs. Instructions",
        "are no cycles: Helium's take two or more each on silicon.", "",
        "| kernel | MMAC | " + " | ".join(found) + " | scratch, bytes at most |", "|---|---:|" + "---:|" * (len(found) + 1),
    ]  # fmt: skip
    first = next(iter(found.values()))
    for kind in sorted({m.kind for m in first}):
        rows = [[m for m in members if m.kind == kind] for members in found.values()]
        figures = [f"{sum(m.instructions for m in row) / sum(m.macs for m in row):.2f}" for row in rows]
        most = max(m.scratch for row in rows for m in row)
        lines.append(f"| {kind} | {sum(m.macs for m in rows[0]) / 1e6:.3f} | {' | '.join(figures)} | {most} |")
    for name, last in (("to block 9", 9), ("whole trunk", 99)):
        rows = [[m for m in members if block_of(m) <= last] for members in found.values()]
        macs = sum(m.macs for m in rows[0] if m.layer.op != "ADD")
        lines.append(f"| **{name}** | {macs / 1e6:.3f} | {' | '.join(f'**{a_mac(row):.3f}**' for row in rows)} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="in3")
    parser.add_argument("--size", type=int, default=176)
    parser.add_argument("--core", action="append", choices=sorted(MACHINES), help="default: cortex-m7")
    parser.add_argument("--op", action="append", choices=sorted(KERNELS), help="only these kernels")
    parser.add_argument("--rows", type=int, default=0, help="output rows a call; 0: all")
    parser.add_argument("--optimise", default="-O3")
    parser.add_argument("--layers", action="store_true", help="a line a layer too")
    parser.add_argument("--sums", action="store_true", help="fail unless all cores make the same outputs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    layers = [layer for layer in trunk(options.net, options.size) if layer.op in (options.op or KERNELS)]
    text, sums, results = [], {}, {}
    for core in options.core or ["cortex-m7"]:
        found = measure(core, layers, options.rows, options.optimise)
        results[core] = found
        sums[core] = [m.checksum for m in found]
        if options.layers:
            text += [f"{core} {m.layer.name} {m.kind}: {m.instructions / m.macs:.3f}" for m in found]
        text += [*table(core, found), ""]
    print("\n".join(text))
    first = next(iter(sums))
    for core, other in sums.items():
        different = [layer.name for layer, a, b in zip(layers, sums[first], other, strict=True) if a != b]
        if options.sums and different:
            raise SystemExit(f"{core} and {first} differ in {', '.join(different)}")
    if options.out:
        write_text(options.out, "\n".join(overview(options.net, options.size, results)) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
