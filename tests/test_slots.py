"""Two slots of a build: which bank is the current one, whatever is damaged, cut off or being replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tinyvad import slots
from tinyvad.bank import Header, read_bank, restamp, write_bank
from tinyvad.errors import CheckFailed, InputError

HEADER = Header("CORE", 1, (8, 8), (2, 1), 1)


def bank(generation: int, value: int = 0, rows: int = 2) -> bytes:
    """A small valid bank; ``value`` tells banks of one generation apart."""
    sections = {"BANK": np.full((rows, 3), value, np.int8), "THRS": np.array([1000 + value], np.uint32)}
    return restamp(write_bank(HEADER, sections, ("BANK",)), generation)


def put(folder: Path, **files: bytes) -> None:
    names = {"a": "bank.tvb", "b": "bank.1.tvb", "fa": "bank_onnx.tvb", "fb": "bank_onnx.1.tvb"}
    for name, data in files.items():
        (folder / names[name]).write_bytes(data)


def whole(folder: Path, features: str = "int8") -> bytes:
    return Path(slots.current(folder, features).name).read_bytes()


@pytest.mark.parametrize(("a", "b", "expected"), [
    (bank(0), None, "a"), (None, bank(3), "b"), (bank(0), bank(1), "b"), (bank(2), bank(1), "a"),
    (bank(4, 1), bank(4, 2), "a"), (bank(5)[:-1], bank(1), "b"), (bank(0), b"", "a"), (bank(0), bank(9)[:64], "a"),
    (bank(2**32 - 1), bank(0), "a"),
])  # fmt: skip
def test_current_is_the_valid_one_with_the_higher_generation(tmp_path, a, b, expected):
    put(tmp_path, **{name: data for name, data in (("a", a), ("b", b)) if data is not None})
    assert whole(tmp_path) == {"a": a, "b": b}[expected]


def test_no_valid_slot_names_both_files(tmp_path):
    put(tmp_path, a=bank(0)[:-1], b=b"x")
    with pytest.raises(InputError, match=r"bank\.tvb.*bank\.1\.tvb") as error:
        slots.current(tmp_path)
    assert "\n" not in str(error.value)


def test_the_float_path_follows_the_int8_generation(tmp_path):
    put(tmp_path, a=bank(4), b=bank(3), fa=bank(5, 1), fb=bank(4, 2))  # 5: its int8 bank was never written
    assert whole(tmp_path, "onnx") == bank(4, 2)
    put(tmp_path, fb=bank(4, 2)[:-1])
    with pytest.raises(InputError, match=r"no bank of generation 4 for the float path.*--engine int8"):
        slots.current(tmp_path, "onnx")


def test_a_store_that_stops_at_any_byte_leaves_a_whole_bank(tmp_path):
    """The slot's file is cut, or erased flash, or what stood there before, from byte n on; for every n."""
    old, new, before = bank(6, 1), bank(7, 2, rows=3), bank(5, 3)
    put(tmp_path, a=old)
    for n in range(len(new) + 1):
        for rest in (b"", b"\xff" * (len(new) - n), before[n:]):
            put(tmp_path, b=new[:n] + rest)
            found = whole(tmp_path)
            assert found == (new if new[:n] + rest == new else old), n
    assert whole(tmp_path) == new


def test_a_device_that_writes_the_header_last_loses_nothing(tmp_path):
    """docs/SPEC.md, Updating: the body from byte 64 on, then the header, each stopping at any byte."""
    old, new = bank(6, 1), bank(7, 2)
    put(tmp_path, a=old)
    slot = bytearray(b"\xff" * len(new))
    for n in [*range(64, len(new)), *range(64)]:
        slot[n] = new[n]
        put(tmp_path, b=bytes(slot))
        assert whole(tmp_path) == (new if bytes(slot) == new else old), n


def test_a_new_generation_takes_the_other_slot(tmp_path):
    put(tmp_path, a=bank(0), fa=bank(0, 9))
    for generation in range(1, 5):
        kept = {features: whole(tmp_path, features) for features in slots.SLOTS}
        with slots.locked(tmp_path):
            slots.write_next(tmp_path, {"int8": bank(generation, generation), "onnx": bank(generation, -generation)})
        assert whole(tmp_path) == bank(generation, generation)
        assert whole(tmp_path, "onnx") == bank(generation, -generation)
        for features, names in slots.SLOTS.items():
            assert kept[features] in [(tmp_path / name).read_bytes() for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["learn", *(name for names in slots.SLOTS.values() for name in names)]
    )


@pytest.mark.parametrize("data", [bank(2), bank(0), bank(1)[:-1]])
def test_only_the_next_generation_whole_is_written(tmp_path, data):
    put(tmp_path, a=bank(0))
    with slots.locked(tmp_path), pytest.raises(InputError):
        slots.write_next(tmp_path, {"int8": data})
    assert whole(tmp_path) == bank(0)


def test_the_last_generation_has_no_successor(tmp_path):
    put(tmp_path, a=bank(2**32 - 1), b=bank(3))
    with slots.locked(tmp_path), pytest.raises(CheckFailed, match="no successor"):
        slots.undo(tmp_path)


def test_undo_and_undo_again(tmp_path):
    put(tmp_path, a=bank(4, 1), b=bank(3, 2), fa=bank(4, 3), fb=bank(3, 4))
    with slots.locked(tmp_path):
        assert slots.undo(tmp_path).generation == 5
        assert (whole(tmp_path), whole(tmp_path, "onnx")) == (bank(5, 2), bank(5, 4))
        assert slots.undo(tmp_path).generation == 6
    assert (whole(tmp_path), whole(tmp_path, "onnx")) == (bank(6, 1), bank(6, 3))


def test_undo_needs_a_bank_before(tmp_path):
    put(tmp_path, a=bank(0))
    with slots.locked(tmp_path), pytest.raises(InputError, match=r"bank\.1\.tvb: there is no bank to go back to"):
        slots.undo(tmp_path)
    put(tmp_path, b=bank(1, 1), fa=bank(1, 1), fb=bank(7, 1))
    with slots.locked(tmp_path), pytest.raises(InputError, match=r"generation 7, expected 0"):
        slots.undo(tmp_path)
    assert whole(tmp_path) == bank(1, 1)


def test_a_writer_cut_off_between_the_renames_is_finished(tmp_path):
    put(tmp_path, a=bank(0), fa=bank(0, 9), fb=bank(1, 2))
    (tmp_path / ".bank.1.tvb.next").write_bytes(bank(1, 1))
    assert (whole(tmp_path), whole(tmp_path, "onnx")) == (bank(0), bank(0, 9))
    with slots.locked(tmp_path):
        slots.recover(tmp_path)
    assert (whole(tmp_path), whole(tmp_path, "onnx")) == (bank(1, 1), bank(1, 2))


def test_leftovers_of_a_writer_cut_off_earlier_are_removed(tmp_path):
    put(tmp_path, a=bank(0), fa=bank(0, 9))
    (tmp_path / "learn").mkdir()
    for name in (".bank.1.tvb.next", ".bank_onnx.1.tvb.next", ".bank_onnx.1.tvb.next.x1", "learn/.int8-1.npz.y2"):
        (tmp_path / name).write_bytes(bank(1, 1)[:100])
    with slots.locked(tmp_path):
        slots.recover(tmp_path)
    assert whole(tmp_path) == bank(0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bank.tvb", "bank_onnx.tvb", "learn", "lock"]


def test_one_writer_at_a_time(tmp_path):
    busy = pytest.raises(slots.Busy, match=f"taught by process {os.getpid()} since .*wait")
    with slots.locked(tmp_path), busy, slots.locked(tmp_path):
        pass
    with slots.locked(tmp_path):
        pass


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tinyvad import slots\n"
        "with slots.locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(slots.Busy, match=f"process {holder.pid} "), slots.locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with slots.locked(tmp_path):
            pass


def test_readers_beside_a_writer_see_whole_banks_that_never_grow_older(tmp_path):
    put(tmp_path, a=bank(0), fa=bank(0))
    problems: list[str] = []
    done = threading.Event()

    def read(features: str) -> None:
        last = 0
        while not done.is_set():
            try:
                found = slots.current(tmp_path, features)
            except InputError as error:
                problems.append(str(error))
                return
            generation = found.header.generation
            if generation < last or found.sections["BANK"][0, 0] != generation % 100:
                problems.append(f"{features}: {generation} after {last}")
            last = generation

    readers = [threading.Thread(target=read, args=(features,)) for features in ("int8", "onnx")]
    for reader in readers:
        reader.start()
    try:
        for generation in range(1, 60):
            with slots.locked(tmp_path):
                data = bank(generation, generation % 100)
                slots.write_next(tmp_path, {"int8": data, "onnx": data})
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not problems


def test_an_open_bank_outlives_its_slot(tmp_path):
    put(tmp_path, a=bank(0, 5))
    held = slots.current(tmp_path)
    for generation in (1, 2, 3):
        with slots.locked(tmp_path):
            slots.write_next(tmp_path, {"int8": bank(generation, generation)})
    assert (held.sections["BANK"] == 5).all()
    assert read_bank(whole(tmp_path)).header.generation == 3
