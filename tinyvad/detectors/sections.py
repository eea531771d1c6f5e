"""Taking a section out of a bank: the shape and dtype that a scorer needs, or one line that names the section."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tinyvad.errors import InputError


def take_section(
    sections: Mapping[str, np.ndarray], tag: str, shape: tuple[int, ...], dtype: str | None = None
) -> np.ndarray:
    """The array under ``tag``. Raises InputError if it is missing or has another shape or dtype."""
    if tag not in sections:
        raise InputError(f"bank section {tag} is missing; build the bank again")
    array = sections[tag]
    if array.shape != shape or (dtype is not None and array.dtype.name != dtype):
        expected = f"{dtype or array.dtype.name}{shape}"
        raise InputError(f"bank section {tag}: {array.dtype.name}{array.shape}, expected {expected}; build the bank again")
    return array


def positive_unit(sections: Mapping[str, np.ndarray]) -> float:
    """SCAL of a bank with one unit, float64 (1,). Raises InputError if it is missing, not finite or not positive."""
    unit = float(take_section(sections, "SCAL", (1,), "float64")[0])
    if not (np.isfinite(unit) and unit > 0):
        raise InputError(f"bank section SCAL: unit {unit} is not a positive number; build the bank again")
    return unit
