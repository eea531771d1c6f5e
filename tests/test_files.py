"""Files and folders are whole or not there: interrupted writes, foreign folders, places that can't be written."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tinyvad import files
from tinyvad.errors import InputError
from tinyvad.files import new_folder, write_bytes, write_text

MARKER = "manifest.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(error: BaseException) -> Any:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return fail


# -- files --------------------------------------------------------------------------------------------------------------


def test_bytes_and_text_are_written_as_given(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "deep" / "a.bin", b"\x00\r\n\xff")
    assert (tmp_path / "new" / "deep" / "a.bin").read_bytes() == b"\x00\r\n\xff"
    write_text(str(tmp_path / "b.txt"), "µ\n")
    assert (tmp_path / "b.txt").read_bytes() == b"\xc2\xb5\n"
    assert (tmp_path / "b.txt").stat().st_mode & 0o777 == 0o644
    write_text(tmp_path / "b.txt", "again")
    assert (tmp_path / "b.txt").read_text() == "again"
    assert names(tmp_path) == ["b.txt", "new"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_content(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank.tvb"
    write_bytes(path, b"old")
    monkeypatch.setattr(files.os, step, failing(error))
    if isinstance(error, OSError):
        with pytest.raises(InputError, match=r"^cannot write .*bank\.tvb: No space left on device; choose another place$"):
            write_bytes(path, b"new")
    else:
        with pytest.raises(KeyboardInterrupt):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["bank.tvb"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a.txt", tmp_path / "file" / "deep" / "a.txt", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"^cannot write [^\n]*; choose another place$"):
            write_text(path, "y")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder"):
        write_text(tmp_path / "folder", "y")
    assert names(tmp_path) == ["file", "folder"]


@pytest.fixture
def read_only(tmp_path: Path) -> Any:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        folder.chmod(0o755)
        pytest.skip("this user may write anywhere")
    yield folder
    folder.chmod(0o755)


def test_a_read_only_folder(read_only: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: Permission denied"):
        write_text(read_only / "a.txt", "x")
    with pytest.raises(InputError, match=r"cannot write .*out: Permission denied"), new_folder(read_only / "out", MARKER):
        pass


def test_a_folder_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for a user who may write anywhere."""
    denied = failing(PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(files.tempfile, "mkdtemp", denied)
    monkeypatch.setattr(files.tempfile, "mkstemp", denied)
    with pytest.raises(InputError, match=r"cannot write .*out: Permission denied"), new_folder(tmp_path / "out", MARKER):
        pass
    with pytest.raises(InputError, match=r"cannot write .*out: Permission denied"):
        write_text(tmp_path / "out", "x")


# -- folders ------------------------------------------------------------------------------------------------------------


def make(path: Path, text: str) -> None:
    with new_folder(path, MARKER) as folder:
        write_text(folder / MARKER, '{"format": "tinyvad-build/1"}')
        write_text(folder / "content", text)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out", MARKER) as folder:
        write_text(folder / "content", "x")
        assert not (tmp_path / "a" / "out").exists() and folder.parent == tmp_path / "a"
    assert names(tmp_path / "a") == ["out"] and names(tmp_path / "a" / "out") == ["content"]
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


def test_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "leftover").write_text("x")
    with new_folder(tmp_path / "out", MARKER) as folder:
        assert (tmp_path / "out" / "content").read_text() == "old"  # until the end
        write_text(folder / "content", "new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["content"]
    assert (tmp_path / "out" / "content").read_text() == "new"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", "x")
    assert names(tmp_path / "out") == ["content", MARKER]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    make(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real" / "content").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), InputError("x")])
def test_a_block_that_fails_leaves_what_was(error: BaseException, tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    for name in ("out", "other"):
        with pytest.raises(type(error)), new_folder(tmp_path / name, MARKER) as folder:
            write_text(folder / "content", "new")
            raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "content").read_text() == "old"


@pytest.mark.parametrize("failing_call", [0, 1])
def test_a_swap_that_fails_leaves_what_was(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving the old folder away fails, or moving the new one in its place."""
    make(tmp_path / "out", "old")
    calls: list[Any] = []
    replace = os.replace

    def sometimes(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) - 1 == failing_call:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    busy = r"cannot write .*out: Device or resource busy"
    with pytest.raises(InputError, match=busy), new_folder(tmp_path / "out", MARKER):
        monkeypatch.setattr(files.os, "replace", sometimes)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "content").read_text() == "old"


def test_foreign_folders_are_refused_and_stay(tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("x")
    message = rf"^{re.escape(str(other))} holds other files and no {MARKER} of ours; choose an empty or new --out$"
    with pytest.raises(InputError, match=message), new_folder(other, MARKER):
        raise AssertionError("entered")
    (other / MARKER).write_text('{"name": "a browser extension"}')  # the name alone doesn't make it ours
    with pytest.raises(InputError, match=message), new_folder(other, MARKER):
        raise AssertionError("entered")
    (other / MARKER).unlink()
    (other / MARKER).mkdir()
    with pytest.raises(InputError, match=message), new_folder(other, MARKER):
        raise AssertionError("entered")
    assert names(other) == ["chapter1.tex", MARKER] and names(tmp_path) == ["thesis"]


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match=r"is a file, not a folder; choose"), new_folder(tmp_path / "out", MARKER):
        raise AssertionError("entered")
    with pytest.raises(InputError, match=r"cannot write .*out/deep"), new_folder(tmp_path / "out" / "deep", MARKER):
        raise AssertionError("entered")


@pytest.mark.parametrize("path", [".", ".."])
def test_the_folder_you_are_in_is_not_replaced(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"is the folder you are in, or one above it"), new_folder(path, MARKER):
        raise AssertionError("entered")
