"""Two slots: which bank is the current one, in C and Python alike, and what a power cut at any byte leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from c_learner import HEADER, UNIT, Flash, Learner, learning_library
from learning_banks import CHANNELS, learnable, product

from tinyvad.bank import newest, read_bank, restamp
from tinyvad.detectors.device_learning import DeviceLearner
from tinyvad.errors import InputError

GRID = (2, 3)
SLOT = 4096


def small(seed: int, generation: int = 7, **settings: int) -> bytes:
    settings = {"rows": 4, "most_rows": 12, "per_image": 2, "pairs": 2, "golden": 1, **settings}
    return learnable(np.random.default_rng(seed), GRID, generation=generation, **settings).data


def by_python(flash: Flash, folder: Path) -> int | None:
    """The slot that ``tinyvad.bank.newest`` takes of the two slots read out as files; None for neither."""
    paths = [folder / "bank.tvb", folder / "bank.1.tvb"]
    for i, path in enumerate(paths):
        path.write_bytes(flash.content(i))
    try:
        return paths.index(newest(paths))
    except InputError:
        return None


# -- which one -----------------------------------------------------------------------------------------------------------


def damages(data: bytes) -> dict[str, bytes]:
    return {
        "whole": data,
        "a header byte": data[:50] + bytes([data[50] ^ 1]) + data[51:],
        "a table byte": data[:99] + bytes([data[99] ^ 128]) + data[100:],
        "a row": data[:-300] + bytes([data[-300] ^ 4]) + data[-299:],
        "the last byte": data[:-1] + bytes([data[-1] ^ 1]),
        "no header": b"\xff" * HEADER + data[HEADER:],
        "half a header": data[:UNIT] + b"\xff" * UNIT + data[HEADER:],
        "half": data[: len(data) // 2],
        "erased": b"",
        "zeros": bytes(len(data)),
    }


@pytest.mark.parametrize(("first", "second"), [(3, 4), (4, 3), (4, 4), (0, 2**32 - 1), (2**31, 2**31 - 1)])
def test_the_higher_generation_that_verifies_is_taken(first: int, second: int, tmp_path: Path) -> None:
    one, two = restamp(small(1), first), restamp(small(2, rows=6), second)
    for name, left in damages(one).items():
        for other, right in damages(two).items():
            flash = Flash(SLOT)
            flash.put(0, left)
            flash.put(1, right)
            status, bank, which = flash.newest(learning_library())
            wanted = by_python(flash, tmp_path)
            assert (which if status == "OK" else None) == wanted, (name, other)
            if wanted is None:
                assert status != "OK" and which == 0 and bank.base is None
                continue
            assert bank.generation == (first, second)[wanted] and bank.base == flash.slots[wanted].ctypes.data
            valid = [name == "whole", other == "whole"]
            assert valid[wanted] and (not all(valid) or wanted == int(second > first))


def test_a_null_slot_is_no_slot() -> None:
    lib, flash = learning_library(), Flash(SLOT)
    flash.put(1, small(1))
    _, bank, _ = flash.newest(lib)
    assert lib.tvad_open_newest(None, flash.slots[1].ctypes.data, SLOT, bank, None) == 0 and bank.generation == 7
    assert lib.tvad_open_newest(flash.slots[1].ctypes.data, None, SLOT, bank, None) == 0
    assert lib.tvad_open_newest(None, None, SLOT, bank, None) != 0


# -- power cuts ----------------------------------------------------------------------------------------------------------


class Cut:
    """A device that learns one image; its other slot holds an older bank. Ready to be cut off again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.old = folder, small(3)
        self.before = restamp(small(4, rows=6), 6)
        self.flash = Flash(SLOT)
        self.reset()
        self.learner = Learner(self.flash)
        image = product(np.random.default_rng(5), GRID, 1)[0]
        self.learner.learn(image, CHANNELS)
        ours = DeviceLearner(read_bank(self.old))
        ours.learn(image)
        self.new = ours.commit()

    def reset(self) -> None:
        self.flash.put(0, self.old)
        self.flash.put(1, self.before)
        self.flash.power = self.flash.torn_erase = None

    def found(self) -> bytes:
        """The bank that both languages find when the device comes back."""
        status, _, which = self.flash.newest(self.learner.lib)
        assert status == "OK" and by_python(self.flash, self.folder) == which
        return self.flash.content(which)


def test_the_power_is_cut_after_every_byte(tmp_path: Path) -> None:
    cut = Cut(tmp_path)
    programmed = -(-len(cut.new) // UNIT) * UNIT
    for n in range(programmed):
        cut.reset()
        cut.flash.power = n
        status = cut.learner.commit()
        found = cut.found()
        assert status == "STORE" and found == cut.old, n  # the header's last bytes are its CRC: only all of it is new
        if n % 97 == 0:  # and what is left can be learnt into
            cut.flash.power = None
            again = Learner(cut.flash)
            again.learn(product(np.random.default_rng(5), GRID, 1)[0], CHANNELS)
            assert again.commit() == "OK" and cut.found() == cut.new
    cut.reset()
    cut.flash.power = programmed
    assert cut.learner.commit() == "OK" and cut.found() == cut.new


def test_an_erase_that_is_cut_leaves_any_mixture(tmp_path: Path) -> None:
    cut, rng = Cut(tmp_path), np.random.default_rng(6)
    at = np.arange(SLOT)
    masks = [at < n for n in range(0, SLOT, 41)] + [at >= n for n in range(0, SLOT, 41)]
    masks += [rng.random(SLOT) < share for share in (0.001, 0.01, 0.5, 0.99) for _ in range(10)]
    for mask in masks:
        cut.reset()
        cut.flash.torn_erase = mask
        cut.learner.commit()
        assert cut.found() == cut.old


def test_a_byte_that_is_half_programmed(tmp_path: Path) -> None:
    """The last byte under power may have any of its bits still set."""
    cut, rng = Cut(tmp_path), np.random.default_rng(7)
    order = [*range(HEADER, -(-len(cut.new) // UNIT) * UNIT), *range(HEADER)]
    new = np.frombuffer(cut.new.ljust(SLOT, b"\xff"), np.uint8)
    for n in [*range(0, len(order), 7), *range(len(order) - HEADER, len(order))]:
        cut.reset()
        cut.flash.power = n
        cut.learner.commit()
        cut.flash.slots[1][order[n]] = new[order[n]] | rng.integers(0, 256)
        assert cut.found() in ((cut.old, cut.new) if n == len(order) - 1 else (cut.old,)), n


def test_the_newest_bank_is_never_erased(tmp_path: Path) -> None:
    """A session that outlives its bank: somebody else has committed in between."""
    cut = Cut(tmp_path)
    other = Learner(cut.flash)
    other.learn(product(np.random.default_rng(8), GRID, 1)[0], CHANNELS)
    assert other.commit() == "OK"
    held = [slot.copy() for slot in cut.flash.slots]
    assert cut.learner.commit() == "LEARN" and cut.flash.calls == []
    np.testing.assert_array_equal(held, cut.flash.slots)
    assert read_bank(cut.found()).header.generation == 8
