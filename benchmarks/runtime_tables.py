"""What the runtime takes on each core, measured on linked firmware in the emulator: the data behind `tinyvad profile`.

    python benchmarks/runtime_tables.py --data DIR [--write]

Builds of a few networks and methods are linked and run for every core. Printed, and with --write put into firmware_sim/:

* runtime.toml: bytes of stack (high-water mark), .data and .bss, code, start-up
* instructions.toml: per kernel instructions = per_mac * multiply-accumulates + per_output * output values, fitted to the
  counts of every layer. A scorer's kernels are counted together; its lines keep their proportions.

Needs the firmware tools (`make firmware-tools`). DIR is a folder of images in one of the layouts of `tinyvad build`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.optimize import nnls

from tinyvad.build import build
from tinyvad.detectors import NATIVE
from tinyvad.files import write_text
from tinyvad.firmware_sim import latency
from tinyvad.firmware_sim.board import BoardResult, execute
from tinyvad.firmware_sim.board_build import Board, build_board
from tinyvad.firmware_sim.budget import parse_frame
from tinyvad.firmware_sim.latency import Work
from tinyvad.firmware_sim.targets import Isa, Target, load_target
from tinyvad.profiling import Loaded, load_build
from tinyvad.project import Project

FOLDER = Path(latency.__file__).parent
# core -> what it is tried as; all with the memory of an STM32H743, so that one build runs on every core
CORES = {
    "cortex-m7": Isa(True, False, "dp"), "cortex-m4": Isa(True, False, "sp"), "cortex-m33": Isa(True, False, "sp"),
    "cortex-m55": Isa(True, True, "sp"), "cortex-m3": Isa(False, False, "none"), "cortex-m0plus": Isa(False, False, "none"),
}  # fmt: skip
FITTED = {"dsp": "cortex-m7", "mve": "cortex-m55", "plain": "cortex-m3", "thumb": "cortex-m0plus"}
# backbone, method, camera frame: every kernel that a default network has, and every scorer
CASES = [
    ("mcunet-in3", "padim-compact", None), ("mobilenet-v3-small", "patchcore", "320x240-rgb565"),
    ("phinet-mcu", "patchcore-lite", None), ("mcunet-in3", "padim-lite", "160x120-grey"),
]  # fmt: skip
SIZE, BANK_BYTES = 128, 96 << 10
SCORERS = ("project", "factor", "search", "table", "scan", "pairs", "centres", "linear")


@dataclass(frozen=True)
class Figures:
    """Bytes of one linked firmware."""

    stack: int
    static: int
    code: int
    startup: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cores", default=",".join(CORES))
    parser.add_argument("--write", action="store_true", help="put the figures into firmware_sim/*.toml")
    arguments = parser.parse_args()
    bytes_of: dict[str, list[Figures]] = defaultdict(list)
    counted: dict[str, dict[str, list[tuple[Work, int]]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="runtime-tables-") as temporary:
        for number, (backbone, method, frame) in enumerate(CASES):
            for packing in ("stm32h743", "corstone-300"):
                out = Path(temporary) / f"{number}-{packing}"
                build(Project(
                    data=arguments.data, target=packing, backbone=backbone, method=method, frame=frame, image_size=SIZE,
                    bank_bytes=BANK_BYTES, out=out,
                ))  # fmt: skip
                for core in arguments.cores.split(","):
                    if (core == "cortex-m55") == (packing == "corstone-300"):
                        figures, rows = measure(out, core, frame)
                        bytes_of[core].append(figures)
                        for kernel, done, instructions in rows:
                            counted[core][kernel].append((done, instructions))
                        print(f"{backbone} {method} {core}: {figures}", file=sys.stderr)
    runtime = {core: largest(found) for core, found in bytes_of.items()}
    rates = {isa: fitted(counted[core], isa) for isa, core in FITTED.items() if core in counted}
    for core, one in runtime.items():
        print(f"{core}: {one}")
    for isa, kernels in rates.items():
        for kernel, (per_mac, per_output, error) in kernels.items():
            print(f"{isa} {kernel}: {per_mac:.3g} a MAC + {per_output:.3g} an output, total off by {100 * error:+.1f} %")
    if arguments.write:
        write_runtime(runtime)
        write_instructions(rates)


def target_of(core: str) -> Target:
    """The memory of an STM32H743 around a core."""
    return replace(load_target("stm32h743"), name=f"{core} as measured", core=core, isa=CORES[core])


def measure(folder: Path, core: str, frame: str | None) -> tuple[Figures, list[tuple[str, Work, int]]]:
    """Bytes of the firmware, and (kernel, work, instructions) of every layer."""
    loaded = load_build(folder)
    image = np.asarray(Image.open(sorted((folder / "samples").glob("*.png"))[0]))[None]
    with build_board(folder, target_of(core)) as board:
        result = execute(board, image, trace=set())
        return sizes(board, result), list(rows_of(loaded, result, frame))


def sizes(board: Board, result: BoardResult) -> Figures:
    """Code is what obj/tvad_*.o brings to .text; the rest of .text and the vectors are start-up."""
    text = (board.folder / "obj" / "firmware.map").read_text()
    placed = text[text.index("Linker script and memory map") :]
    # a section's line may break behind its name; sections that were thrown away are listed before
    found = re.findall(r"^ \.(?:text|rodata)\S*\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+(\S+)$", placed, re.MULTILINE)
    code = sum(int(size, 16) for size, where in found if Path(where).name.startswith("tvad_"))
    static = result.sections.get(".data", 0) + result.sections.get(".bss", 0)
    return Figures(result.stack_bytes, static, code, result.code_bytes - code)


def rows_of(loaded: Loaded, result: BoardResult, frame: str | None) -> Iterator[tuple[str, Work, int]]:
    graph = loaded.graph
    nodes = {node.output: node for node in graph.nodes}
    taps = iter([(int(row[0]), int(row[1]), int(row[2])) for row in loaded.tap_rows])
    _, height, width, _ = graph.tensors[graph.inputs[0]].shape
    for layer in result.layers:
        if layer.op == "FRAME":
            work = latency.frame_work((height, width), None if frame is None else parse_frame(frame)[:2])
        elif layer.op == "EMBED":
            native = loaded.scorer.kind in NATIVE
            work = latency.embedding_work([next(taps)], loaded.grid, int(loaded.tap_rows[0][6]), native)
        elif layer.op == "SCORE":
            work = latency.scorer_work(loaded.scorer, loaded.depth, loaded.grid)
        elif layer.op == "MOVE":
            continue
        else:
            work = dict([latency.node_work(graph, nodes[layer.name])])
        if len(work) == 1:
            ((kernel, done),) = work.items()
            yield kernel, done, layer.instructions
        else:  # counted together: share by what the table says now
            table = latency.estimate_runtime(work, target_of("cortex-m7"))
            assert table is not None
            whole = sum(table["by_kernel"].values())
            for kernel, done in work.items():
                yield kernel, done, round(layer.instructions * table["by_kernel"][kernel] / whole)


def largest(found: list[Figures]) -> Figures:
    return Figures(*(max(getattr(one, name) for one in found) for name in ("stack", "static", "code", "startup")))


def fitted(kernels: dict[str, list[tuple[Work, int]]], isa: str) -> dict[str, tuple[float, float, float]]:
    """kernel -> (per_mac, per_output, error of the total): least squares, small layers weighed up, nothing negative."""
    result = {}
    for kernel, rows in sorted(kernels.items()):
        work = np.array([done for done, _ in rows], float)  # (n, 2)
        counts = np.array([instructions for _, instructions in rows], float)
        if kernel in SCORERS or len(rows) < 3:  # too few to tell the two apart: one factor on the present line
            scale = counts.sum() / max(sum(_by_table(isa, kernel, done) for done, _ in rows), 1.0)
            rate = latency.rates(isa)[kernel]
            x = np.array([rate.get("per_mac", 0.0), rate["per_output"]]) * scale
        else:
            weight = 1 / np.sqrt(np.maximum(counts, 1))
            x, _ = nnls(work * weight[:, None], counts * weight)
        result[kernel] = (float(x[0]), float(x[1]), float((work @ x).sum() / counts.sum() - 1))
    return result


def _by_table(isa: str, kernel: str, done: Work) -> float:
    rate = latency.rates(isa)[kernel]
    return rate.get("per_mac", 0.0) * done.macs + rate["per_output"] * done.outputs


def write_runtime(runtime: dict[str, Figures]) -> None:
    path, core, lines = FOLDER / "runtime.toml", "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\[(\S+)\]", line):
            core = match[1]
        key = line.split(" = ")[0]
        if core in runtime and " = " in line and not line.startswith("#"):
            values = {name: str(value) for name, value in vars(runtime[core]).items()}
            values |= {"kind": '"modelled"', "source": f'"largest of {len(CASES)} builds in QEMU, {gcc()} -O3"'}
            line = f"{key} = {values[key]}"
        lines.append(line)
    write_text(path, "\n".join(lines) + "\n")


def write_instructions(rates: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    path, isa, lines = FOLDER / "instructions.toml", "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\[(\S+)\]", line):
            isa = match[1]
        key = line.split(" = ")[0]
        if key in rates.get(isa, {}):
            per_mac, per_output, _ = rates[isa][key]
            mac = f"per_mac = {per_mac:.3g}, " if per_mac else ""
            line = f"{key} = {{ {mac}per_output = {per_output:.3g}, counted = true }}"
        elif key == "source" and isa in rates:
            line = f'source = "counted in QEMU on a {FITTED[isa]}; counted = false: assumed"'
        lines.append(line)
    write_text(path, "\n".join(lines) + "\n")


def gcc() -> str:
    text = subprocess.run(["arm-none-eabi-gcc", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return f"gcc {text.strip()}"


if __name__ == "__main__":
    main()
