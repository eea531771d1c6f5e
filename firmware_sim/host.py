"""A build's C sources compiled for this PC: the same model.c and runtime, the same pictures and results as on the board.

Flows in: a build and images. Flows out: a ``harness.Run``. With the sanitizers every read and write outside the arena, the
bank or the picture, and every overflow of a signed integer, ends the program.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.c_project import WARNINGS
from tinyvad.firmware_sim.board_build import first_error
from tinyvad.firmware_sim.firmware import Firmware, pictures, read_firmware
from tinyvad.firmware_sim.harness import SOURCES, Run, read_result, write_request

TIMEOUT = 600.0  # seconds for one run
_PLAIN = "-O2"
_SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled build; ``build_host`` makes one. Its folder is temporary."""

    folder: Path
    firmware: Firmware


def compiler() -> list[str]:
    """The C compiler's command, of CC or else ``cc``.

    Raises:
        InputError: there is none.
    """
    words = shlex.split(os.environ.get("CC", "cc"))
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"no C compiler {' '.join(words) or 'cc'}: install Debian's gcc, or set CC")
    return words


@contextmanager
def build_host(build: Path, sanitize: bool = False) -> Iterator[Program]:
    """Compile a build's model.c and runtime for this PC; the folder vanishes with the block.

    Raises:
        InputError: no compiler, or no firmware that runs here. CheckFailed: the sources do not compile.
    """
    words = compiler()
    firmware = read_firmware(build)
    if firmware.packed_for != "scalar":
        raise InputError(f"{build}: its weights are packed for Helium, which no PC has; use the engine 'firmware'")
    with tempfile.TemporaryDirectory(prefix="tinyvad-host-") as temporary:
        folder = Path(temporary)
        sources = [firmware.folder / "model.c", *sorted((firmware.folder / "runtime").glob("*.c"))]
        flags = shlex.split(f"-std=c99 {WARNINGS} {_SANITIZED if sanitize else _PLAIN}")
        flags += [f"-I{path}" for path in (SOURCES, firmware.folder, firmware.folder / "runtime")]
        program = [SOURCES / "board.c", SOURCES / "host.c"]
        # board.c has the board's main, which the program's own calls
        _compile([*words, *flags, "-Dmain=board_main", "-c", str(program[0]), "-o", str(folder / "board.o")])
        rest = [str(path) for path in (folder / "board.o", program[1], *sources)]
        _compile([*words, *flags, *rest, "-o", str(folder / "program")])
        shutil.copy(firmware.folder / "bank.tvb", folder)
        yield Program(folder, firmware)


def execute(program: Program, images: np.ndarray, trace: set[str] | None = None) -> Run:
    """Score (n, S, S, 3) uint8 images; ``trace`` names tensors to bring back whole, None: the tapped ones.

    Raises:
        CheckFailed: a sanitizer's finding, or a program that does not end.
    """
    slots = program.firmware.slots
    traced = set(program.firmware.taps) if trace is None else trace
    write_request(program.folder, pictures(program.firmware, images), slots, traced)
    try:
        done = subprocess.run(["./program"], cwd=program.folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"the runtime did not end within {TIMEOUT:g} s on this PC; give fewer images") from error
    findings = [line for line in done.stderr.splitlines() if "ERROR: " in line or "runtime error" in line]
    if done.returncode < 0:
        findings.append(f"it was ended by signal {-done.returncode} ({signal.Signals(-done.returncode).name})")
    if findings:
        raise CheckFailed(f"the C runtime is wrong: {findings[0].strip()}; please report this")
    return read_result(program.folder, slots, len(images))


def run(build: Path, images: np.ndarray, trace: set[str] | None = None, sanitize: bool = False) -> Run:
    """Compile a build for this PC and score images (see ``build_host`` and ``execute``)."""
    with build_host(build, sanitize) as program:
        return execute(program, images, trace)


def _compile(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        told = first_error(done.stderr.splitlines())
        raise CheckFailed(f"the C sources do not compile on this PC: {told}; please report this")
