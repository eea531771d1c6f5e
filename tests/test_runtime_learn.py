"""Learning in C against Python: every number of a session, and every byte of the bank that it writes."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from c_learner import HEADER, PROGRAM, Flash, Learner, learning_library
from c_runtime import RUNTIME
from c_scorer import DSP, OpenBank
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_banks import CHANNELS, Learnable, learnable, product

from tinyvad.bank import Bank, read_bank, restamp, write_bank
from tinyvad.detectors import check_bank
from tinyvad.detectors.device_learning import LEARNER_BYTES, STORE_BYTES, DeviceLearner, learning_bytes

GRID = (3, 4)


def session(
    data: bytes, images: np.ndarray, task: int | None = None, gate: int = 0, rows: int = 100, flags: tuple[str, ...] = (),
    slot: int = 0, slot_bytes: int = 16384,
) -> bytes:  # fmt: skip
    """Learn in both languages, compare every number on the way, and the slots; the new bank."""
    flash = Flash(slot_bytes)
    flash.put(slot, data)
    theirs = Learner(flash, task, gate, rows, flags)
    ours = DeviceLearner(read_bank(data), task, gate, rows)
    assert theirs.status == "OK"
    numbers = theirs.struct
    assert (numbers.capacity, numbers.share, numbers.task) == (ours.capacity, ours.share, ours.task)
    for image in images:
        update = ours.learn(image)
        assert theirs.learn(image, CHANNELS) == "OK"
        assert (numbers.novelty, numbers.last_added) == (update.novelty, len(update.added))
        assert numbers.skipped == ours.skipped and numbers.images == ours.images
        assert update.added.size == 0 or numbers.radius == update.radius
    if ours.images == 0:
        assert theirs.commit() == "LEARN"
        return data
    wanted = ours.commit(slot_bytes)
    assert theirs.commit() == "OK"
    assert flash.content(slot) == data and flash.content(1 - slot) == wanted
    behind = flash.slots[1 - slot][len(wanted) :]
    assert (behind == 0xFF).all()
    assert [call[2] for call in flash.calls if call[0] == "program"] == [
        *range(HEADER, len(wanted), 32), *range(0, HEADER, 32)
    ]  # fmt: skip
    opened, bank, which = flash.newest(theirs.lib)
    assert (opened, which, bank.generation) == ("OK", 1 - slot, read_bank(data).header.generation + 1)
    return wanted


@pytest.mark.parametrize("flags", [(), DSP], ids=["C", "SMLAD"])
@pytest.mark.parametrize("slot", [0, 1])
def test_ten_images_of_a_new_product(flags: tuple[str, ...], slot: int) -> None:
    rng = np.random.default_rng(1)
    made, images = learnable(rng), product(rng, GRID, 10)
    data = session(made.data, images, flags=flags, slot=slot)
    scores_are_equal(data, made, flags)


def scores_are_equal(data: bytes, made: Learnable, flags: tuple[str, ...] = ()) -> None:
    """The new bank scores in C as in Python, and its golden vectors hold."""
    opened = OpenBank(data, flags)
    assert opened.status == "OK" and opened.self_test() == "OK"
    rng = np.random.default_rng(0)
    maps = [rng.integers(-128, 128, (2, *tap.size, tap.channels)).astype(np.int8) for tap in made.embedding.taps]
    _, scorers = check_bank(read_bank(data))
    vectors = made.embedding.integer(maps)
    for i in range(2):
        grid, result = opened.score([stack[i] for stack in maps])
        tasks = scorers.route(vectors[i : i + 1])
        np.testing.assert_array_equal(grid, scorers.score(vectors[i : i + 1], tasks)[0])
        assert result.task == tasks[0] and result.label == (grid.max() >= scorers.thresholds[tasks[0]])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_session(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    grid = data.draw(st.sampled_from([(3, 4), (1, 1), (5, 2)]))
    tasks = data.draw(st.integers(1, 4))
    made = learnable(
        rng, grid, tasks, data.draw(st.integers(1, 15)), data.draw(st.integers(5, 60)), 5, data.draw(st.integers(1, 20)),
        data.draw(st.sampled_from([0, 300, 2000])), pairs=data.draw(st.integers(1, 7)),
        align=data.draw(st.sampled_from([16, 32, 64, 512])), golden=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    task = data.draw(st.sampled_from([None, *range(tasks)]))
    count, spread = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([0, 3, 30]))
    images = product(rng, grid, count, spread)
    session(made.data, images, task, data.draw(st.sampled_from([0, 0, 500, 50_000])), data.draw(st.integers(1, 30)))


def test_bank_after_bank() -> None:
    rng = np.random.default_rng(3)
    made = learnable(rng, rows=12, most_rows=30, most_tasks=4)
    data = made.data
    for slot, task in enumerate((None, None, 1, 0, None, 3, 3)):
        data = session(data, product(rng, GRID, 4), task, slot=slot % 2)
        scores_are_equal(data, made)
    bank = read_bank(data)
    assert bank.header.generation == 14 and len(bank.sections["TASK"]) == 4
    assert bank.sections["CFG "][0] <= 30


def test_a_session_longer_than_its_memory() -> None:
    rng = np.random.default_rng(4)
    session(learnable(rng, per_image=1).data, product(rng, GRID, 200, spread=60), rows=7)


def test_sections_that_may_be_false_are_left_out() -> None:
    rng = np.random.default_rng(5)
    made = learnable(rng)
    bank = made.bank
    sections = {**bank.sections, "IVAR": np.ones(3, np.uint8)}
    required = [entry.tag for entry in bank.entries if entry.required]
    data = session(write_bank(bank.header, sections, required), product(rng, GRID, 3))
    assert "IVAR" not in read_bank(data).sections and "STEP" in read_bank(data).sections


# -- what is refused -----------------------------------------------------------------------------------------------------


def begin(data: bytes, task: int | None = None, rows: int = 5, spare: int = 0) -> Learner:
    flash = Flash(8192)
    flash.put(0, data)
    return Learner(flash, task, 0, rows, spare=spare)


def test_begin_refuses_what_python_refuses() -> None:
    rng = np.random.default_rng(6)
    made = learnable(rng)
    bank = made.bank
    assert begin(made.data, 1).status == "LEARN"
    assert begin(made.data, 0, rows=0).status == "OK"  # it can be counted, and its threshold raised
    assert begin(made.data, rows=0).status == "ARENA"
    assert begin(made.data, spare=-1).struct.capacity == 4
    assert begin(made.data, rows=0, spare=-1).status == "ARENA"
    assert begin(learnable(rng, per_image=0).data).status == "LEARN"
    assert begin(learnable(rng, most_rows=0).data).status == "LEARN"
    assert begin(learnable(rng, tasks=2, most_tasks=2, rows=4).data).status == "FULL"
    assert begin(learnable(rng, tasks=2, rows=1, most_rows=2).data).status == "FULL"
    assert begin(rewritten(bank, updatable=False)).status == "LEARN"
    for tags in (("LADR",), ("LRN ",), ("TASK", "PROT")):
        assert begin(rewritten(bank, tags)).status == "LEARN", tags


def rewritten(bank: Bank, leave_out: tuple[str, ...] = (), updatable: bool = True) -> bytes:
    sections = {tag: array for tag, array in bank.sections.items() if tag not in leave_out}
    required = [entry.tag for entry in bank.entries if entry.required and entry.tag in sections]
    return write_bank(replace(bank.header, updatable=updatable), sections, required)


def test_the_slot_is_too_small_and_nothing_is_written() -> None:
    rng = np.random.default_rng(7)
    made, image = learnable(rng), product(rng, GRID, 1)[0]
    ours = DeviceLearner(made.bank)
    ours.learn(image)
    size = len(ours.commit())
    enough = -(-size // 32) * 32
    tight = learnable(np.random.default_rng(7), slot_bytes=size - 1)  # what LRN allows
    for one, slot_bytes, status in ((made, enough - 1, "FULL"), (made, enough, "OK"), (tight, 8192, "FULL")):
        flash = Flash(slot_bytes)
        flash.put(0, one.data)
        learner = Learner(flash)
        learner.learn(image, CHANNELS)
        before = flash.slots[1].copy()
        assert learner.commit() == status
        assert (flash.calls == []) == (status == "FULL")
        assert status == "OK" or np.array_equal(flash.slots[1], before)


def test_commit_refuses() -> None:
    rng = np.random.default_rng(8)
    made, images = learnable(rng), product(rng, GRID, 2)
    flash = Flash(8192)
    flash.put(0, made.data)
    learner = Learner(flash)
    assert learner.commit() == "LEARN"  # nothing was learnt
    learner.learn(images[0], CHANNELS)
    for what in ("erase", "program"):
        flash.fails = what
        assert learner.commit() == "STORE"
        assert flash.newest(learner.lib)[2] == 0
    flash.fails = ""
    learner.learn(images[1], CHANNELS)  # it goes on, and is tried again
    assert learner.commit() == "OK" and not flash.fails
    assert learner.commit() == "LEARN" and flash.calls == []  # the bank that it knows is not the current one any more
    assert learner.learn(images[0], CHANNELS) == "LEARN"
    ours = DeviceLearner(made.bank)
    for image in images:
        ours.learn(image)
    assert flash.content(1) == ours.commit()

    last = Flash(8192)
    last.put(0, restamp(made.data, 2**32 - 1))
    learner = Learner(last)
    learner.learn(images[0], CHANNELS)
    assert learner.commit() == "FULL" and last.calls == []


def test_a_cell_that_does_not_take_its_bits_is_found() -> None:
    rng = np.random.default_rng(9)
    made, image = learnable(rng), product(rng, GRID, 1)[0]
    flash = Flash(8192)
    flash.put(0, made.data)
    learner = Learner(flash)
    learner.learn(image, CHANNELS)
    for at in (70, 400, 1500):

        def weak(user: int | None, slot: int, offset: int, data: int, nbytes: int, at: int = at) -> int:
            code = flash.program(user, slot, offset, data, nbytes)
            if offset <= at < offset + nbytes:
                flash.slots[slot][at] ^= 4
            return code

        flash.store.program = PROGRAM(weak)
        assert learner.commit() == "STORE" and flash.newest(learner.lib)[2] == 0
        assert (flash.slots[1][:HEADER] == 0xFF).all()


# -- memory --------------------------------------------------------------------------------------------------------------


def test_the_workspace_is_what_python_says() -> None:
    rng = np.random.default_rng(10)
    for grid in ((3, 4), (20, 17)):
        bank = learnable(rng, grid, rows=5).bank
        flash = Flash(16384)
        flash.put(0, learnable(rng, grid, rows=5).data)
        opened, c_bank, _ = flash.newest(learning_library())
        assert opened == "OK"
        for rows in (0, 1, 7, 500):
            found = learning_library().tvad_learn_bytes(c_bank, rows)
            assert found == learning_bytes(grid[0] * grid[1], 12, 3, len(bank.entries), rows)


def test_the_structs_are_as_large_as_the_plan_says(tmp_path: Path) -> None:
    tool = shutil.which("arm-none-eabi-gcc")
    if tool is None:
        pytest.skip("no arm-none-eabi-gcc on this machine")
    source = tmp_path / "sizes.c"
    source.write_text(
        '#include "tvad_learn.h"\n'
        f"typedef char learner[sizeof(tvad_learner) == {LEARNER_BYTES} ? 1 : -1];\n"
        f"typedef char store[sizeof(tvad_store) == {STORE_BYTES} ? 1 : -1];\n"
    )
    command = [tool, "-mcpu=cortex-m7", "-mthumb", "-fsyntax-only", "-I", str(RUNTIME), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
