"""A build's firmware/: everything that a C project needs, as texts and bytes by file name.

Flows in: the int8 Graph that ships, its memory plan, the bank, what is known of chip and camera. Flows out: files; the same
input gives the same bytes. ``c_model`` writes model.c, ``c_project`` what the compiler and linker want.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyvad.bank import read_bank
from tinyvad.detectors import NATIVE
from tinyvad.errors import InputError
from tinyvad.export.c_model import Camera, model_header, model_source, plain
from tinyvad.export.c_project import Chip, bank_source, link_script, makefile, readme
from tinyvad.export.layers import map_shape
from tinyvad.graph.ir import Graph
from tinyvad.graph.schedule import Schedule

RUNTIME = Path(__file__).parent / "runtime"
APPLICATION = Path(__file__).parent / "firmware"  # startup.c, main.c


def firmware_files(
    graph: Graph,
    schedule: Schedule,
    bank: bytes,
    chip: Chip | None = None,
    camera: Camera | None = None,
    name: str | None = None,
) -> dict[str, bytes]:
    """Content of every file of firmware/, by its path there.

    Args:
        graph: int8, as read back from backbone.tflite; its outputs are the taps.
        schedule: the plan for this graph, grid and camera.
        bank: the content of bank.tvb; its header names backbone, grid and input size.
        chip: for which start-up code, linker script and Makefile are written; None writes only what every C project needs.
        camera: the frame in RAM; None: the camera writes the network's input into the arena.
        name: of the model, in comments and ``tvad_model_data.name``; None: the task that the bank names, or the graph's.

    Raises:
        InputError: bank and graph do not go together, or an op or a core that the runtime does not have.
    """
    read = read_bank(bank, "bank.tvb")
    header = read.header
    if map_shape(graph, graph.inputs[0])[:2] != tuple(header.input_size) or len(graph.outputs) != header.taps:
        raise InputError("bank.tvb and the network differ in input size or number of taps; use the files of one build")
    packed_for = "mve" if chip is not None and chip.core == "cortex-m55" else "scalar"
    pool, native = int(read.sections["TAPS"][0][6]), header.kind in NATIVE
    graph = graph.copy(name=plain(name or str(read.meta.get("task") or graph.name)))
    crc, grid = header.backbone_crc32, (int(header.grid_size[0]), int(header.grid_size[1]))
    learning = (0, 0) if chip is None else (chip.slot_bytes, chip.learning_bytes)
    files = {
        "README.md": readme(chip, graph.name, schedule.arena_bytes).encode(),
        "bank.S": bank_source(header.align).encode(),
        "bank.tvb": bank,
        "model.c": model_source(graph, schedule, crc, grid, packed_for, camera, pool, native).encode(),
        "model.h": model_header(graph, schedule, crc, camera, *learning).encode(),
        **{f"runtime/{path.name}": path.read_bytes() for path in _runtime()},
        **({} if chip is None else project_files(chip, [path.name for path in _runtime()])),
    }
    return dict(sorted(files.items()))


def project_files(chip: Chip, runtime: Sequence[str]) -> dict[str, bytes]:
    """The part of firmware/ that goes with the chip: start-up code, application, linker script, Makefile.

    Args:
        runtime: names of the files in runtime/.

    Raises:
        InputError: a core that there is no firmware for.
    """
    application = {path.name: path.read_bytes() for path in sorted(APPLICATION.glob("*.c"))}
    sources = [*application, "model.c", "bank.S", *(f"runtime/{name}" for name in runtime if name.endswith(".c"))]
    return {**application, "Makefile": makefile(chip, sources).encode(), "link.ld": link_script(chip).encode()}


def _runtime() -> list[Path]:
    return sorted(path for path in RUNTIME.iterdir() if path.suffix in (".c", ".h"))
