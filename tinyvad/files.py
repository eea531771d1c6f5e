"""Files are written to a temporary name and renamed, so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyvad.errors import InputError

SIGNATURE = b"tinyvad"  # in the marker file of every folder that we made


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all; missing folders are made.

    Raises:
        InputError: the file can't be written (named, with the system's reason).
    """
    path = Path(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text to ``path`` whole or not at all (see ``write_bytes``)."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def new_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    An existing folder at ``path`` is replaced only if it is empty, or if we made it: it holds a file ``marker`` in which
    the word tinyvad stands. Until the new folder is complete the old one stays as it is.

    Raises:
        InputError: ``path`` is something else or can't be written.
    """
    with _told(path):
        target = Path(path).resolve()  # a link to a folder stays one
        if target.exists() and not target.is_dir():
            raise InputError(f"{path} is a file, not a folder; choose another --out")
        if Path.cwd().is_relative_to(target):
            raise InputError(f"{path} is the folder you are in, or one above it; choose a folder inside it as --out")
        if target.is_dir() and any(target.iterdir()) and not _is_ours(target / marker):
            raise InputError(f"{path} holds other files and no {marker} of ours; choose an empty or new --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        with _told(path):
            os.chmod(temporary, 0o755)
            _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in ``target``'s place; if that fails, ``target`` is what it was."""
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        if not target.exists():
            os.replace(old, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _is_ours(marker: Path) -> bool:
    return marker.is_file() and SIGNATURE in marker.read_bytes()


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """The system's errors as one line about ``path``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
