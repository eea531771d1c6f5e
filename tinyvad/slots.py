"""The two slots of a bank in a build's folder: which bank is the current one, and how the next takes its place.

Flows in: a build's folder; the bytes of a bank. Flows out: the current ``Bank``, and files that a power cut at any moment
leaves with the old or the new bank whole. A build has one pair of slots a kind of features:

    int8   bank.tvb        bank.1.tvb           the truth: the valid one with the higher generation is the current bank
    onnx   bank_onnx.tvb   bank_onnx.1.tvb      the float path: the one whose generation is that of the current int8 bank

A new generation takes the slot that is not current (docs/SPEC.md, "Updating: two slots"). It is staged in a file of its
own first, so that the float bank is renamed into its slot only when the int8 bank needs nothing but a rename too: the next
writer finishes what was cut off between the two (``recover``). Readers take no lock; writers take the one of ``locked``,
which the operating system gives back when they die.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from tinyvad.bank import Bank, Header, open_bank, read_bank, restamp
from tinyvad.errors import CheckFailed, InputError
from tinyvad.files import write_bytes

SLOTS = {"int8": ("bank.tvb", "bank.1.tvb"), "onnx": ("bank_onnx.tvb", "bank_onnx.1.tvb")}
WRITE_ORDER = ("onnx", "int8")  # the truth last
STAGED = ".next"
STATES = "learn"  # folder beside the slots: what learning keeps, and the lock
LOCK = "lock"
LAST_GENERATION = 2**32 - 1
TRIES = 100  # of a reader whom writers overtake
_GENERATION_AT = 48  # byte of the header


class Busy(InputError):
    """Another process or thread is writing."""


class Slot(NamedTuple):
    """One slot of a build: its file, the valid bank in it, or why there is none ('empty' if there is no file)."""

    path: Path
    bank: Bank | None
    problem: str


def look(folder: Path, features: str) -> list[Slot]:
    """Both slots of a kind of features, read whole."""
    found = []
    for name in SLOTS[features]:
        path = folder / name
        try:
            found.append(Slot(path, open_bank(path), ""))
        except InputError as error:
            found.append(Slot(path, None, str(error) if path.exists() else "empty"))
    return found


def current(folder: Path, features: str = "int8") -> Bank:
    """The current bank of a build, mapped and verified.

    Raises:
        InputError: no slot holds it; both files are named with what is wrong with them.
    """
    if features == "int8":
        return _newest(folder)
    for _ in range(TRIES):
        generation = _newest(folder).header.generation
        paths = [folder / name for name in SLOTS[features]]
        reasons = []
        for path in sorted(paths, key=lambda path: _peek(path) != generation):
            try:
                bank = open_bank(path)
            except InputError as error:
                reasons.append(str(error))
                continue
            if bank.header.generation == generation:
                return bank
            reasons.append(f"{path.name} is of generation {bank.header.generation}")
        if _newest(folder).header.generation == generation:
            break  # nobody wrote in between
    raise InputError(
        f"{folder}: no bank of generation {generation} for the float path ({' | '.join(reasons)}); restore the file, or do "
        "without: score with --engine int8, and remove backbone.onnx and bank_onnx*.tvb to learn"
    )


def _newest(folder: Path) -> Bank:
    """The valid int8 bank with the higher generation, of equals the first slot's; the other one is read only if need be."""
    paths = [folder / name for name in SLOTS["int8"]]
    for _ in range(TRIES):
        before = [_peek(path) for path in paths]
        reasons = []
        for i in sorted(range(len(paths)), key=lambda i: (-before[i], i)):
            try:
                bank = open_bank(paths[i])
            except InputError as error:
                reasons.append(str(error))
                continue
            if bank.header.generation == before[i]:
                return bank
            break  # replaced between the look and the reading: look again
        else:
            raise InputError("no slot holds a valid bank: " + " | ".join(reasons))
    raise InputError(f"{folder}: its bank is replaced faster than it can be read; end the writers")


def _peek(path: Path) -> int:
    """The generation in a file's header, unverified; -1 where there is none."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return -1
    return int(struct.unpack_from("<I", head, _GENERATION_AT)[0]) if len(head) == 64 else -1


def write_next(folder: Path, banks: Mapping[str, bytes]) -> None:
    """Make the next generation current; to be called under ``locked``.

    Args:
        banks: by kind of features, 'int8' always; each whole, its generation that of the current int8 bank + 1.

    Raises:
        InputError: a bank that is not valid, or of another generation; the disk is full or not writable. The old one stays.
    """
    recover(folder)
    now = _newest(folder)
    expected = next_generation(now)
    places = {}
    for features in WRITE_ORDER:
        if features in banks:
            found = read_bank(banks[features], f"new {SLOTS[features][0]}").header.generation
            if found != expected:
                raise InputError(f"new {SLOTS[features][0]}: generation {found}, expected {expected}; learn again")
            places[features] = _other(folder, features, now.header.generation)
    for features, path in places.items():
        write_bytes(_staged(path), banks[features])
    for path in places.values():
        _take_place(path)


def _other(folder: Path, features: str, generation: int) -> Path:
    """The slot that a new bank takes: never the current one."""
    first, second = (folder / name for name in SLOTS[features])
    in_first = _peek(first) == generation
    if in_first:
        with contextlib.suppress(InputError):
            return second if open_bank(first).header.generation == generation else first
    return first if _peek(second) == generation else second


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}{STAGED}")


def _take_place(path: Path) -> None:
    """Rename a staged bank into its slot, and have the folder on disk before anything else follows."""
    try:
        os.replace(_staged(path), path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; check space and permissions") from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder can't be opened there; the rename is journalled
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(folder: Path) -> None:
    """Finish or drop what a writer that died has left; to be called under ``locked``.

    A float bank in its slot with its int8 bank still staged: the int8 bank is renamed too. Everything else that is staged
    or half written goes.
    """
    generation = _newest(folder).header.generation
    for name in SLOTS["int8"]:
        staged = _staged(folder / name)
        with contextlib.suppress(InputError):
            found = open_bank(staged).header.generation
            waiting = [_peek(folder / other) for other in SLOTS["onnx"]]
            if found == generation + 1 and found in waiting:
                _take_place(folder / name)
    for pattern in (".*bank*.tvb*", f"{STATES}/.*"):  # staged, and the temporary names of ``tinyvad.files``
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def next_generation(bank: Bank) -> int:
    """The generation of a bank's successor. Raises CheckFailed behind the last of 2**32."""
    if bank.header.generation == LAST_GENERATION:
        raise CheckFailed(f"{bank.name}: generation {LAST_GENERATION} has no successor; make the build again")
    return bank.header.generation + 1


def undo(folder: Path) -> Header:
    """Make the bank before the current one current again, as a new generation; a second undo brings the first one back.

    To be called under ``locked``. Returns the new header.

    Raises:
        InputError: the other slot holds no valid bank, or the float path's none of its generation.
    """
    recover(folder)
    now = _newest(folder)
    generation = next_generation(now)
    banks: dict[str, bytes] = {}
    before: int | None = None
    for features in ("int8", *(name for name in SLOTS if name != "int8")):
        if not any((folder / name).exists() for name in SLOTS[features]):
            continue
        slots = {slot.path: slot for slot in look(folder, features)}
        other = slots[_other(folder, features, now.header.generation)]
        if other.bank is None:
            raise InputError(f"{other.path}: there is no bank to go back to ({other.problem}); undo follows a `learn`")
        if before is not None and other.bank.header.generation != before:
            found = other.bank.header.generation
            raise InputError(f"{other.path}: generation {found}, expected {before} as in int8; there is no way back")
        before = other.bank.header.generation
        banks[features] = restamp(other.path.read_bytes(), generation)
    write_next(folder, banks)
    return _newest(folder).header


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers of a build out. The system gives the lock back when its holder ends, however it ends.

    Raises:
        Busy: another process or thread holds it (which, since when). InputError: the folder can't be written.
    """
    path = folder / STATES / LOCK
    try:
        path.parent.mkdir(exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; the build must be writable to learn") from error
    with file:
        if not _lock(file):
            file.seek(0)
            holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
            raise Busy(f"{folder} is being taught by {holder}; wait until it is done, or end it")
        file.truncate(0)
        file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file: IO[bytes]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 20)  # locked bytes can't be read there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
