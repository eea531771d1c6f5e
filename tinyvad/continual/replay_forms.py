"""How a replay memory stores maps: float32 in, fewer bytes out, and back.

Flows in: (n, H, W, C) float32 maps of one task. Flows out: ``Encoded`` rows, one an item, and tables that all items of the task
share; ``decode`` gives float32 maps again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tinyvad.errors import InputError
from tinyvad.training.network import Arrays


class Encoded(NamedTuple):
    """Stored maps of n items.

    Attributes:
        rows: (n, ...) arrays, a row an item. shared: what all of the task's items are decoded with.
    """

    rows: Arrays
    shared: Arrays

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


class Form(NamedTuple):
    text: str
    encode: Callable[..., Encoded]
    decode: Callable[..., np.ndarray]


FORMS: dict[str, Form] = {}


def encode(form: str, maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    raise InputError("not there yet")


def decode(form: str, encoded: Encoded) -> np.ndarray:
    raise InputError("not there yet")
