"""Firmware under QEMU and on this PC: the same integers as Python's, fences that hold, figures that repeat."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_build
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tinyvad import cli
from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.c_project import Chip, Memory
from tinyvad.firmware_sim import board, host
from tinyvad.firmware_sim.board_build import Board, build_board, missing_tools
from tinyvad.firmware_sim.chips import chip_of
from tinyvad.firmware_sim.compare import compare_board, compare_firmware
from tinyvad.firmware_sim.firmware import read_firmware, seen
from tinyvad.firmware_sim.machines import MACHINES, machine_for, mpu_values, on_machine
from tinyvad.firmware_sim.targets import load_target
from tinyvad.images import apply_table
from tinyvad.model import load
from tinyvad.verify import verify

M3 = """\
name = "m3"
title = "A Cortex-M3"
core = "cortex-m3"
clock_mhz = 72

[isa]
dsp = false
mve = false
fpu = "none"

[[regions]]
name = "SRAM"
base = 0x20000000
size = 65536
kind = "sram"

[[regions]]
name = "FLASH"
base = 0x08000000
size = 262144
kind = "flash"
"""


@pytest.fixture(scope="module")
def tools() -> None:
    if line := missing_tools():
        pytest.skip(line)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return tiny_build.images(np.random.default_rng(3), 3)


@pytest.fixture(scope="module")
def m7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.tiny_build(tmp_path_factory.mktemp("m7"), "stm32f746")


@pytest.fixture(scope="module")
def linked(m7: Path, tools: None) -> Iterator[Board]:
    with build_board(m7, load_target("stm32f746")) as made:
        yield made


def check_equal(result: dict, images: np.ndarray) -> None:
    assert result["status"] == "equal", result
    assert result["values_compared"] == len(images) * (17 * 17 * 8 + 9 * 9 * 12)
    assert not any(result["differing_values"].values())
    assert result["differing_grid_scores"] == 0


@pytest.mark.parametrize(("target", "strategy", "frame", "machine"), [
    ("stm32h743", "layerwise", None, "mps2-an500"),
    ("nrf52840", "patch", "40x30-rgb565", "mps2-an386"),
    ("m3.toml", "inplace-dw", "20x21-grey", "mps2-an385"),
    ("rp2040", "patch", None, "mps2-an385"),
    ("nrf5340", "patch", None, "mps2-an505"),
    ("corstone-300", "patch", "33x33-rgb888", "mps3-an547"),
])  # fmt: skip
def test_every_core_computes_pythons_integers(target, strategy, frame, machine, tmp_path, images, tools):
    (tmp_path / "m3.toml").write_text(M3)
    name = str(tmp_path / target) if target.endswith(".toml") else target
    build = tiny_build.tiny_build(tmp_path / "build", name, strategy, frame)
    with build_board(build, load_target(name)) as linked:
        result = compare_board(linked, load(build), images)
        with pytest.raises(CheckFailed, match="1 byte past the arena"):
            board.execute(linked, images[:1], fence="arena")
        if target == "rp2040":
            with pytest.raises(CheckFailed, match=r"unaligned access in .*, which cortex-m0plus cannot do"):
                board.execute(linked, images[:1], fence="unaligned")
    check_equal(result, images)
    arena = int(re.findall(r"TVAD_ARENA_BYTES (\d+)u", (build / "firmware/model.h").read_text())[0])
    sections = result["sections"]
    assert result["machine"] == machine
    assert sections[".arena"] == arena
    assert sections[".stack"] == 4096
    assert sections[".data"] == 0
    assert sections[".bss"] <= 512
    assert sections.get(".frame", 0) == {None: 0, "40x30-rgb565": 2400, "20x21-grey": 420, "33x33-rgb888": 3267}[frame]
    assert 0 < result["stack_bytes"] < 4096


def test_several_products_are_told_apart_on_the_chip(tmp_path, tools):
    build = tiny_build.tiny_build(tmp_path, "stm32f746", tasks=3)
    rng = np.random.default_rng(2)
    pictures = np.concatenate([tiny_build.images_of_task(rng, 1, task) for task in (2, 0, 1)])
    with build_board(build, load_target("stm32f746")) as linked:
        check_equal(compare_board(linked, load(build), pictures), pictures)
        assert board.execute(linked, pictures, count=False).run.tasks.tolist() == [2, 0, 1]


def test_counts_and_stack_repeat_and_add_up(linked, images):
    first, second = (board.execute(linked, images[:1]) for _ in range(2))
    assert first.layers == second.layers
    assert first.stack_bytes == second.stack_bytes
    names = [layer.name for layer in first.layers]
    assert names == [slot.layer.name for slot in linked.firmware.slots] or first.layers[-1].op == "MOVE"
    macs = sum(layer.macs for layer in first.layers)
    assert macs == 318_464  # by hand: the sum over the layers of tiny_build.network
    assert macs < first.instructions < 40 * macs
    uncounted = board.execute(linked, images[:1], count=False)
    assert uncounted.layers == []
    np.testing.assert_array_equal(uncounted.run.maps, first.run.maps)


def test_any_tensor_can_be_traced(linked, m7, images):
    model = load(m7)
    names = {"stem", "dw5", "gate", "excited", "sum"}
    run = board.execute(linked, images[:1], names, count=False).run
    assert set(run.tensors) == names
    mine = model.engine.all_tensors(apply_table(images[:1], model.table)[0])
    for name in names:
        np.testing.assert_array_equal(run.tensors[name][0].ravel(), mine[name].ravel(), err_msg=name)


@pytest.mark.parametrize(("fence", "told"), [
    ("arena", r"^MPU fault: touched 0x\w+, 1 byte past the arena in board_break_fence"),
    ("stack", r"^MPU fault: the stack of 4096 bytes overflowed"),
    ("flash", r"^MPU fault: touched 0x\w+, in the bank, which is flash"),
])  # fmt: skip
def test_fences_hold(linked, images, fence, told):
    with pytest.raises(CheckFailed, match=told) as caught:
        board.execute(linked, images[:1], fence=fence)
    assert "\n" not in str(caught.value)


def test_firmware_that_is_too_large_is_told_in_one_line(m7, tools):
    target = load_target("stm32f746")
    regions = tuple(dataclasses.replace(r, size=16384) if r.name == "FLASH" else r for r in target.regions)
    with (
        pytest.raises(CheckFailed, match=r"does not link: .*FLASH.*overflowed by \d+ bytes; use a smaller") as caught,
        build_board(m7, dataclasses.replace(target, name="small", regions=regions)),
    ):
        pass
    assert "\n" not in str(caught.value)
    regions = tuple(dataclasses.replace(r, size=2048) if r.kind in ("tcm", "sram") else r for r in target.regions)
    with pytest.raises(CheckFailed, match="of RAM left"), build_board(m7, dataclasses.replace(target, regions=regions)):
        pass


def test_missing_tools_are_told_in_one_line(m7, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="run `make firmware-tools`, or install Debian's gcc-arm-none-eabi"):
        compare_firmware(m7, load(m7), np.zeros((1, 33, 33, 3), np.uint8), "firmware")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(InputError, match="no C compiler cc"):
        host.run(m7, np.zeros((1, 33, 33, 3), np.uint8))


# --- the same sources on this PC ---


@pytest.fixture(scope="module")
def compiler() -> None:
    try:
        host.compiler()
    except InputError as error:
        pytest.skip(str(error))


def test_this_pc_computes_pythons_integers(tmp_path, images, compiler):
    build = tiny_build.tiny_build(tmp_path, None, "layerwise")
    check_equal(compare_firmware(build, load(build), images, "host"), images)


def test_sanitizers_find_nothing(tmp_path, images, compiler):
    build = tiny_build.tiny_build(tmp_path, None, frame="50x40-rgb565")
    run = host.run(build, images, sanitize=True)
    np.testing.assert_array_equal(run.maps, load(build).grid_maps(seen(read_firmware(build), images))[0])


def test_a_wrong_constant_is_found_and_its_tensor_named(m7, tmp_path, images, compiler):
    build = shutil.copytree(m7, tmp_path / "build")
    source = build / "firmware/model.c"
    text = source.read_text()
    number = re.findall(r"/\* (\d+): dw5 \*/", text)[0]
    head, tail = text.split(f"layer_{number}_bias[20] ALIGNED = {{\n    ")
    first, rest = tail.split(",", 1)
    source.write_text(f"{head}layer_{number}_bias[20] ALIGNED = {{\n    {int(first) + 5000},{rest}")
    result = verify(build, images, engines=["host"])
    assert not result["ok"]
    assert result["engines"]["host"]["status"] == "differs"
    assert result["engines"]["host"]["differing_values"]["tap_a"] == 0
    assert any(line.endswith("first in tensor dw5") for line in result["problems"])


def test_verify_runs_what_is_asked_for(m7, tmp_path, tools, compiler):
    runner = CliRunner()
    done = runner.invoke(cli.main, ["verify", str(m7), "--engine", "firmware", "--engine", "host"])
    assert done.exit_code == 0, done.output
    assert re.search(r"firmware +equal .*0 scores differ; mps2-an500: 0?[\d.]+ M instructions", done.output)
    assert re.search(r"host +equal ", done.output)
    assert "litert" not in done.output
    plain = tiny_build.tiny_build(tmp_path, None)
    done = runner.invoke(cli.main, ["verify", str(plain), "--engine", "firmware"])
    assert done.exit_code == 2
    assert "build with --target" in done.output


# --- machines ---


@given(st.integers(0, 200), st.integers(1, 2000), st.sampled_from(["cortex-m3", "cortex-m7", "cortex-m33", "cortex-m55"]))
def test_mpu_regions_cover_the_memory_and_no_byte_more(small, large, core):
    ram = (Memory("A", 0x20000000, 1024 * large), *((Memory("B", 0x30000000, 4096 * small),) if small else ()))
    chip = Chip("x", "x", core, "sp", Memory("FLASH", 0x08000000, 1 << 20), ram, "A", "A")
    machine = machine_for(chip)
    moved = on_machine(chip, machine)
    try:
        values, arena = mpu_values(moved, machine)
    except CheckFailed:
        return  # an odd size that takes too many regions
    open_ = [(base & ~31, (rest & ~31) + 32) for base, rest in values]
    if not machine.armv8:
        open_ = [part for base, rest in values for part in eighths(base, rest)]
    memories = [*moved.ram, moved.flash, machine.own]
    assert joined(open_) == joined([(memory.base, memory.base + memory.size) for memory in memories])
    assert values[arena][0] & ~31 == moved.ram[0].base
    assert [memory.size for memory in moved.ram] == [memory.size for memory in chip.ram]


def joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals in order, neighbours made one; they may not overlap."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        assert not result or result[-1][1] <= start
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, end))
    return result


def eighths(base: int, rasr: int) -> list[tuple[int, int]]:
    """Armv7-M: the parts of a region that are not switched off."""
    size = 2 << (rasr >> 1 & 31)
    assert base % size == 0
    return [
        (base + i * size // 8, base + (i + 1) * size // 8) for i in range(8) if not rasr >> 8 & 1 << i
    ]


def test_the_largest_ram_finds_room_on_its_board():
    target = load_target("stm32n657")
    chip = chip_of(target, 3 << 20)
    assert chip is not None
    moved = on_machine(chip, machine_for(chip))
    assert [memory.size for memory in moved.ram] == [memory.size for memory in chip.ram]
    assert len(chip.ram) == 2


def test_a_core_without_a_board_is_told():
    chip = Chip("x", "x", "cortex-m23", "none", Memory("F", 0, 1), (), "A", "A")
    with pytest.raises(InputError, match="no emulated board for cortex-m23"):
        machine_for(chip)
    assert {machine.core for machine in MACHINES.values()} == {
        "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55"
    }  # fmt: skip
