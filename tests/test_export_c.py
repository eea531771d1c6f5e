"""The files of firmware/: what they say is what graph, plan and chip say, always in the same bytes, and they compile."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_build import GRID, tiny_build

from tinyvad.errors import InputError
from tinyvad.export.c import firmware_files, project_files
from tinyvad.export.c_model import Camera, layer_slots, model_source
from tinyvad.export.c_project import CORES, WARNINGS, Chip, Memory, core_flags, link_script
from tinyvad.firmware_sim.plans import plan
from tinyvad.graph.ir import Graph
from tinyvad.graph.schedule import Schedule
from tinyvad.graph.tflite_import import import_tflite

CHIP = Chip(
    "board", "A board", "cortex-m7", "sp", Memory("FLASH", 0x08000000, 1 << 20),
    (Memory("DTCM", 0x20000000, 65536), Memory("SRAM", 0x20010000, 262144)), "DTCM", "SRAM", stack_bytes=2048,
)  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build(tmp_path_factory.mktemp("build"), "stm32f746")


@pytest.fixture(scope="module")
def graph(build: Path) -> Graph:
    return import_tflite((build / "backbone.tflite").read_bytes())


@pytest.fixture(scope="module")
def schedule(graph: Graph) -> Schedule:
    return plan(graph, GRID, "patch", None, 256, [64, 64])


def test_the_same_input_gives_the_same_bytes(build, graph, schedule):
    bank = (build / "bank.tvb").read_bytes()
    first, second = (firmware_files(graph, schedule, bank, CHIP, name="part") for _ in range(2))
    assert first == second
    assert list(first) == sorted(first)
    assert {"model.c", "model.h", "bank.S", "bank.tvb", "link.ld", "startup.c", "main.c", "Makefile"} < set(first)
    assert {"runtime/tvad.h", "runtime/tvad_run.c"} < set(first)
    assert len(first["README.md"].decode().splitlines()) <= 12
    assert all(len(line) <= 160 for line in first["model.c"].decode().splitlines())


def test_without_a_chip_there_is_what_every_project_needs(build, graph, schedule):
    names = set(firmware_files(graph, schedule, (build / "bank.tvb").read_bytes()))
    assert {"model.c", "model.h", "bank.S", "runtime/tvad_run.c"} < names
    assert not {"link.ld", "Makefile", "startup.c"} & names


@pytest.mark.parametrize("packed_for", ["scalar", "mve"])
def test_model_c_holds_every_constant(graph, schedule, packed_for):
    text = model_source(graph, schedule, 0x1234, GRID, packed_for)
    found = {
        name: np.array([int(value) for value in values.replace("\n", " ").strip(" ,").split(",")])
        for name, values in re.findall(r"static const \w+ (layer_\w+)\[\d+\] ALIGNED = \{(.*?)\};", text, re.DOTALL)
    }
    wanted = {
        f"layer_{i}_{field}": array
        for i, slot in enumerate(layer_slots(graph, GRID, packed_for))
        for field, array in slot.layer.arrays.items()
    }
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array.ravel(), err_msg=name)


def test_steps_and_parts_are_the_plans(graph, schedule):
    text = model_source(graph, schedule, 0, GRID)
    table = text.split("static const tvad_step steps[] = {")[1].split("};\n")[0]
    rows = re.findall(r"^    \{ (.*) \}, /\* (.*) \*/$", table, re.MULTILINE)
    assert len(rows) == len(schedule.steps)
    names = [slot.layer.name for slot in layer_slots(graph, GRID)]
    for (values, name), step in zip(rows, schedule.steps, strict=True):
        numbers = [part.strip(" {}u") for part in values.split(",")]
        assert int(numbers[8]) == schedule.places[step.output.tensor].offset
        if numbers[0] != "TVAD_MOVE":
            assert names[int(numbers[0])] == name
            assert [int(numbers[1]), int(numbers[2])] == [step.row, step.rows]
    assert f".n_steps = {len(rows)}" in text
    offsets = ", ".join(f"{schedule.places[f'embedding of {tap}'].offset}u" for tap in graph.outputs)
    assert f"parts[] = {{ {offsets} }}" in text


def test_names_cannot_leave_their_comments(graph, schedule):
    odd = graph.copy(name='net */ int x; "\\ /* é')
    text = model_source(odd, schedule, 0, GRID)
    assert "*/ int" not in text
    assert text.isascii()


def test_link_script_places_each_section_in_its_memory():
    text = link_script(dataclasses.replace(CHIP, frame_in="SRAM"))
    assert "    FLASH (rx) : ORIGIN = 0x08000000, LENGTH = 1048576\n" in text
    assert "    DTCM (rw) : ORIGIN = 0x20000000, LENGTH = 65536\n" in text
    squeezed = " ".join(text.split())
    assert re.search(r"\.stack \(NOLOAD\) : \{[^}]*\+= 2048;[^}]*\} > DTCM", squeezed)
    assert re.search(r"\.data : \{[^}]*\} > DTCM AT> FLASH", squeezed)
    assert re.search(r"\.arena \(NOLOAD\) : ALIGN\(32\) \{[^}]*\} > SRAM", squeezed)
    assert squeezed.index(".frame") < squeezed.index(".arena")  # the arena is last: nothing lies behind it


def test_what_does_not_go_together_is_told(build, graph, schedule):
    bank = (build / "bank.tvb").read_bytes()
    with pytest.raises(InputError, match="camera frame do not go together"):
        firmware_files(graph, schedule, bank, CHIP, Camera(40, 30, "rgb565"))
    with pytest.raises(InputError, match="number of taps"):
        firmware_files(graph.copy(outputs=graph.outputs[:1]), schedule, bank)
    with pytest.raises(InputError, match="not for xtensa"):
        project_files(dataclasses.replace(CHIP, core="xtensa-lx7"), [])
    with pytest.raises(InputError, match="16: give fewer --layers"):
        layer_slots(graph.copy(outputs=graph.outputs * 9), GRID)


@pytest.mark.parametrize("core", CORES)
def test_own_sources_compile_for_every_core(build, core, tmp_path):
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("needs arm-none-eabi-gcc: run `make firmware-tools`")
    shutil.copytree(build / "firmware", tmp_path, dirs_exist_ok=True)
    fpu = {"cortex-m0": "none", "cortex-m0plus": "none", "cortex-m3": "none"}.get(core, "sp")
    flags = f"{core_flags(dataclasses.replace(CHIP, core=core, fpu=fpu))} -std=c99 -O1 {WARNINGS} -Iruntime -I. -c".split()
    model = [] if core == "cortex-m55" else ["model.c"]  # these weights are packed for cores without Helium
    for name in ("startup.c", "main.c", *model, "bank.S"):
        done = subprocess.run(
            ["arm-none-eabi-gcc", *flags, name, "-o", "x.o"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
