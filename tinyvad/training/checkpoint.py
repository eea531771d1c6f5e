"""A training's state in one file: small facts as JSON, arrays by name; whole or not there.

Flows in and out: a dict that JSON can hold, and arrays. The file is a plain ``.npz`` (no pickles). The same state gives
the same bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.files import write_bytes
from tinyvad.training.network import Arrays

FACTS = "facts.json"


def save(path: str | Path, facts: dict[str, Any], arrays: Arrays) -> None:
    """Write the state.

    Raises:
        InputError: the file can't be written, or an array has the name that the facts take.
    """
    if FACTS in arrays:
        raise InputError(f"checkpoint {path}: no array may be called {FACTS}; rename it")
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    np.savez(file, **{FACTS: text, **arrays})  # type: ignore[arg-type]
    write_bytes(path, file.getvalue())


def read(path: str | Path) -> tuple[dict[str, Any], Arrays] | None:
    """The state, or None where there is no such file.

    Raises:
        InputError: the file is damaged or something else.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(arrays.pop(FACTS).tobytes().decode()), arrays
    except OSError as error:
        raise InputError(f"cannot read checkpoint {path}: {error.strerror or error}; delete it to start again") from error
    except (
        KeyError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise InputError(f"checkpoint {path} is damaged or no checkpoint of ours; delete it to start again") from error
