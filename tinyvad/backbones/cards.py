"""The weights that tinyvad brings along, and a card each: where they come from, under which licence, how good they are.

Flows in: ``weights/NAME.npz`` (float16) and ``weights/NAME.toml``, as ``tinyvad distill`` writes them (see
``tinyvad.distill.finish``). Flows out: a checked ``Card``, and float32 arrays by name. A card without .npz stands beside a
network that holds its values itself, the filter bank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "weights"
REINSTALL = "install tinyvad again"


@dataclass(frozen=True)
class CardLayer:
    """A tap: its stride and channels, the teacher's layers it learnt from ("teacher:layer"), the share of their variance
    that can be read off it linearly, and the signal-to-noise ratio of its int8 features (None: not measured)."""

    name: str
    stride: int
    channels: int
    teacher: tuple[str, ...]
    explained: float
    int8_snr_db: float | None = None


@dataclass(frozen=True)
class Card:
    """What there is to know about a network's weights.

    Attributes:
        architecture: the backbone's name.
        quality: 0 to 1, the mean of the layers' ``explained``.
        input_size: pixels of the views that it was trained and measured on.
        parameters: stored values.
        sha256: of the .npz, None where there is none.
        command: that makes the weights again.
        licence: lines on licences and sources.
        layers: the taps that were trained; weights reach no further.
        training: teachers, images, steps and so on, to show.
    """

    architecture: str
    quality: float
    input_size: int
    parameters: int
    sha256: str | None
    command: str
    licence: tuple[str, ...]
    layers: tuple[CardLayer, ...]
    training: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def has_weights(name: str) -> bool:
    """Whether tinyvad brings along trained weights for the backbone of that name."""
    return (FOLDER / f"{name}.npz").is_file()


def read_card(name: str) -> Card | None:
    """The card of the backbone of that name, None if it has none.

    Raises:
        InputError: a damaged card (file and field are named).
    """
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; {REINSTALL}") from error
    given = _checked(path, "", {"sha256": None, "training": {}, **values}, Card)
    layers = tuple(
        CardLayer(**_checked(path, f"layers[{i}].", {"int8_snr_db": None, **layer}, CardLayer))
        for i, layer in enumerate(given.pop("layers"))
    )
    card = Card(**given, layers=layers)
    if card.architecture != name or not 0 <= card.quality <= 1:
        raise InputError(f"{path}: is of {card.architecture} with quality {card.quality:g}; {REINSTALL}")
    return card


def trained_weights(name: str) -> dict[str, np.ndarray]:
    """float32 arrays by name of the backbone's own weights, if they are what its card says.

    Raises:
        InputError: no weights, no card, or a file that was changed.
    """
    path, card = FOLDER / f"{name}.npz", read_card(name)
    if card is None or card.sha256 is None:
        raise InputError(f"{path} has no card with a SHA-256 beside it; {REINSTALL}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {REINSTALL}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.sha256:
        raise InputError(f"{path} is damaged: its SHA-256 begins {digest[:8]}, not {card.sha256[:8]}; {REINSTALL}")
    return parse_weights(data, str(path))


def parse_weights(data: bytes, where: str) -> dict[str, np.ndarray]:
    """float32 arrays by name of an .npz file's bytes; ``where`` names it in errors.

    Raises:
        InputError: not an .npz, or arrays that are not floating point and finite.
    """
    try:
        file = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where} is no .npz of weights ({reason}); give one that `tinyvad distill` wrote") from error
    for key, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{where}: array {key} ({array.dtype}) does not hold finite floating point numbers")
    return {key: array.astype(np.float32) for key, array in arrays.items()}


# What a field's annotation takes from TOML.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
    "dict[str, Any]": (dict,),
}


def _checked(path: Path, where: str, values: Any, kind: type) -> dict[str, Any]:
    """The fields of dataclass ``kind`` in ``values``, each of its type; lists become tuples, other keys are left out."""
    result = {}
    for field in dataclasses.fields(kind):
        value, wanted = values.get(field.name), str(field.type)
        if wanted.startswith("tuple"):
            inner = str if "str" in wanted else dict
            right = isinstance(value, list) and all(isinstance(item, inner) for item in value)
            value = tuple(value) if right else value
        else:
            right = isinstance(value, _KINDS[wanted]) and not isinstance(value, bool)
        if not right:
            raise InputError(f"{path}: field {where}{field.name} is {value!r}, expected {wanted}; {REINSTALL}")
        result[field.name] = value
    return result
