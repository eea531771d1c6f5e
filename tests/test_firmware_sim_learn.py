"""The emulated firmware learns ten images of a new product, and scores with them: Python's integers and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_build
from tiny_build import images_of_task
from tiny_learning_build import NEW_ROWS, SLOT_BYTES, learning_build

from tinyvad.bank import read_bank
from tinyvad.detectors.device_learning import DeviceLearner, learning_bytes, rows_in_workspace
from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.c_project import link_script
from tinyvad.firmware_sim import board
from tinyvad.firmware_sim.board_build import Board, build_board, missing_tools
from tinyvad.firmware_sim.board_learn import compare_learning, learn_on_board
from tinyvad.firmware_sim.chips import chip_of
from tinyvad.firmware_sim.compare import compare_board
from tinyvad.firmware_sim.machines import MACHINES
from tinyvad.firmware_sim.targets import load_target
from tinyvad.model import load


@pytest.fixture(scope="module")
def tools() -> None:
    if line := missing_tools():
        pytest.skip(f"the emulated firmware {line}")


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Ten good ones of a product that the build does not know, and six to score: of it, with a hole, of the known one."""
    rng = np.random.default_rng(3)
    good, more = images_of_task(rng, 10, 1), images_of_task(rng, 4, 1)
    more[2:, 8:24, 8:24] = 255 - more[2:, 8:24, 8:24]
    return good, np.concatenate([more, images_of_task(rng, 2, 0)])


@pytest.fixture(scope="module")
def m7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learning_build(tmp_path_factory.mktemp("learning"), "stm32f746")


@pytest.fixture(scope="module")
def linked(m7: Path, tools: None) -> Iterator[Board]:
    with build_board(m7, load_target("stm32f746")) as made:
        yield made


def test_ten_images_of_a_new_product(m7: Path, linked: Board, pictures: tuple[np.ndarray, np.ndarray]) -> None:
    good, more = pictures
    model = load(m7)
    result = compare_learning(linked, model, good, more)
    assert result["status"] == "equal", result
    assert result["images"] == 10 and 8 <= result["rows"] <= NEW_ROWS
    assert result["scores_compared"] == 6 * 36
    run = learn_on_board(linked, good, more)
    again = learn_on_board(linked, good, more)
    assert (run.begun, run.committed, run.slot) == ("ok", "ok", 1)
    assert run.added.sum() == result["rows"] and run.novelty[0] == 2**31 - 1
    bank = read_bank(run.bank)
    assert bank.header.generation == model.bank.header.generation + 1 and len(bank.sections["THRS"]) == 2
    assert run.tasks[[0, 1]].tolist() == [1, 1] and run.tasks[[4, 5]].tolist() == [0, 0]
    assert run.scores[[2, 3]].min() > run.scores[[0, 1]].max()
    assert run.bank == again.bank and np.array_equal(run.instructions, again.instructions)
    assert 0 < run.stack_bytes < 1000 and run.commit_instructions > len(run.bank)


def test_other_sessions(m7: Path, linked: Board, pictures: tuple[np.ndarray, np.ndarray]) -> None:
    good, more = pictures
    model = load(m7)
    known = compare_learning(linked, model, images_of_task(np.random.default_rng(4), 4, 0), more, task=0)
    assert known["status"] == "equal" and known["images"] == 4, known
    odd = np.concatenate([good[:4], 255 - good[:1], good[4:]])
    gated = compare_learning(linked, model, odd, more, gate=16_000)
    assert gated["status"] == "equal" and gated["images"] == 10, gated
    plain = compare_board(linked, model, more)  # the firmware as it was flashed
    assert plain["status"] == "equal", plain
    with pytest.raises(CheckFailed, match="in the bank, which is flash"):
        board.execute(linked, more[:1], fence="flash")


@pytest.mark.parametrize(("target", "frame"), [
    ("stm32f446", "40x30-rgb565"), ("stm32u575", None), ("rp2040", "33x33-rgb888"),
])  # fmt: skip
def test_every_core_learns_the_same(
    target: str, frame: str | None, tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray], tools: None
) -> None:
    build = learning_build(tmp_path, target, frame=frame)
    with build_board(build, load_target(target)) as linked:
        result = compare_learning(linked, load(build), *pictures)
        sections = linked.sections
    assert result["status"] == "equal", result
    area = -(-SLOT_BYTES // load_target(target).flash_erase) * load_target(target).flash_erase
    assert sections[".slot"] == area
    assert sections[".learning"] == linked.firmware.learning_bytes and sections[".bss"] < 1024


def test_what_can_not_be_learnt_is_told(m7: Path, linked: Board, pictures: tuple[np.ndarray, np.ndarray]) -> None:
    good, more = pictures
    run = learn_on_board(linked, good[:1], more[:1], task=3, count=False)
    assert (run.begun, run.committed, run.slot) == ("learn", "", 0)
    assert run.bank == (m7 / "bank.tvb").read_bytes() and run.scores.size == 1
    plain = dataclasses.replace(linked, firmware=dataclasses.replace(linked.firmware, slot_bytes=0))
    with pytest.raises(InputError, match="the firmware does not learn: build with"):
        learn_on_board(plain, good, more)
    helium = dataclasses.replace(linked, machine=MACHINES["cortex-m55"])
    with pytest.raises(InputError, match="mps3-an547 can't be written"):
        learn_on_board(helium, good, more)


# -- where the slots lie -------------------------------------------------------------------------------------------------


def test_slots_are_whole_sectors_at_the_end_of_flash() -> None:
    target = load_target("stm32f746")  # 1 MiB at 0x08000000, sectors of up to 256 KiB
    plain, chip = chip_of(target, 8192), chip_of(target, 8192, slot_bytes=1000, learning_bytes=500)
    assert plain is not None and chip is not None
    assert [(slot.base, slot.size) for slot in chip.slots] == [(0x08080000, 262144), (0x080C0000, 262144)]
    assert (chip.program.base, chip.program.size) == (0x08000000, 524288)
    assert plain.slots == () and plain.program == plain.flash
    assert chip.learning_in == chip.arena_in and "SLOT_1 (r) : ORIGIN = 0x080c0000, LENGTH = 262144" in link_script(chip)
    assert "SLOT" not in link_script(plain) and "learning" not in link_script(plain)
    odd = dataclasses.replace(target, flash_erase=300_000)
    moved = chip_of(odd, 8192, slot_bytes=1000)
    assert moved is not None and [slot.base for slot in moved.slots] == [0x08000000 + 300_000, 0x08000000 + 600_000]
    with pytest.raises(CheckFailed, match="two slots of 524288 B > 1048576 B of flash on stm32f746: use a"):
        chip_of(target, 8192, slot_bytes=262145)


def test_the_workspace_holds_the_rows_that_it_was_made_for(m7: Path) -> None:
    bank = load(m7).bank
    taps = bank.sections["TAPS"]
    nbytes = learning_bytes(36, int(taps[:, 2].sum()), int(taps[-1, 2]), len(bank.entries), NEW_ROWS)
    assert f"#define TVAD_LEARN_BYTES {nbytes}u" in (m7 / "firmware/model.h").read_text()
    assert rows_in_workspace(bank, nbytes) == NEW_ROWS == DeviceLearner(bank, room=NEW_ROWS).capacity
    assert rows_in_workspace(bank, nbytes - 1) == NEW_ROWS - 1 and rows_in_workspace(bank, 0) < 0


def test_a_build_whose_slots_others_write_links_and_scores(tmp_path: Path, tools: None) -> None:
    """Two slots without learning, as of a PaDiM build for several products."""
    build = tiny_build.tiny_build(tmp_path, "stm32f446", tasks=2)
    target, header = load_target("stm32f446"), build / "firmware/model.h"
    chip = chip_of(target, 8224, slot_bytes=8192)
    assert chip is not None
    text = header.read_text()
    defines = "#define TVAD_SLOT_BYTES 131072u\n#define TVAD_LEARN_BYTES 0u\n"
    slots = defines + "extern const uint8_t tvad_slot_0[], tvad_slot_1[];"
    header.write_text(text.replace("\n#endif", f"\n{slots}\n\n#endif"))
    (build / "firmware/link.ld").write_text(link_script(chip))
    with build_board(build, target) as made:
        result = compare_board(made, load(build), images_of_task(np.random.default_rng(1), 2, 1))
        assert result["status"] == "equal" and made.sections[".slot"] == 131072
        with pytest.raises(InputError, match="does not learn"):
            learn_on_board(made, np.zeros((1, 33, 33, 3), np.uint8), np.zeros((0, 33, 33, 3), np.uint8))
