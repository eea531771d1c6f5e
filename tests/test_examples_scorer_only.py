"""examples/scorer_only: it compiles as its README says, and prints Python's scores."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from c_runtime import compiler
from small_banks import every_kind

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "scorer_only"


def make(folder: Path, *words: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    (folder / "out").mkdir(exist_ok=True)
    paths = [f"BANK={folder / 'some.tvb'}", f"TAPS={folder / 'some.bin'}", f"OUT={folder / 'out'}"]
    command = ["make", "-C", str(FOLDER), *paths, "CFLAGS=-O1 -Wall -Wextra -Werror", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["padim-compact", "patchcore", "patchcore-lite", "student"])
def test_on_this_machine_it_prints_pythons_scores(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = every_kind(rng, (3, 4))[name]
    maps = small.maps(rng)
    (tmp_path / "some.tvb").write_bytes(small.data)
    (tmp_path / "some.bin").write_bytes(b"".join(q.tobytes() for q in maps))
    make(tmp_path, f"CC={compiler()}")
    done = subprocess.run([str(tmp_path / "out" / "scorer_only")], capture_output=True, text=True, check=True)
    lines, expected = done.stdout.splitlines(), small.expected(maps)
    assert [[int(word) for word in line.split()] for line in lines[1:4]] == expected.tolist()
    row, column = np.unravel_index(expected.argmax(), expected.shape)
    verdict = "anomalous" if expected.max() >= small.sections["THRS"][0] else "normal"
    assert lines[4] == f"score {expected.max()} at row {row}, column {column}: {verdict}"


def test_a_damaged_bank_is_told(tmp_path: Path) -> None:
    small = every_kind(np.random.default_rng(0), (3, 4))["patchcore"]
    (tmp_path / "some.tvb").write_bytes(small.data[:-20] + b"!" + small.data[-19:])
    (tmp_path / "some.bin").write_bytes(bytes(9 * 7 * 5 + 4 * 5 * 4 + 2 * 3 * 3))
    make(tmp_path, f"CC={compiler()}")
    done = subprocess.run([str(tmp_path / "out" / "scorer_only")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.match(r"error 3: damaged bytes", done.stdout)


@pytest.mark.parametrize("core", ["cortex-m0plus", "cortex-m4"])
def test_for_the_chip_it_compiles(core: str, tmp_path: Path) -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("needs arm-none-eabi-gcc (Debian: gcc-arm-none-eabi, libnewlib-arm-none-eabi)")
    small = every_kind(np.random.default_rng(0), (3, 4))["padim-compact"]
    (tmp_path / "some.tvb").write_bytes(small.data)
    (tmp_path / "some.bin").write_bytes(b"\0")
    assert "text" in make(tmp_path, "firmware", f"CORE={core}", "CFLAGS=-O2 -Wall -Wextra")
