"""Detectors by name, and what they have in common.

Every detector has ``fit(embeddings) -> self`` over a stream of (n, H, W, D) arrays, ``score(embeddings)`` in floating
point for study, and ``to_scorer()``: the integer form that goes into the bank and that the device runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from tinyvad.bank import Bank
from tinyvad.errors import InputError

METHODS = {
    "padim-compact": "one Gaussian a cell of a coarse grid on PCA-reduced features, 4-bit Cholesky factors (default)",
    "padim": "one Gaussian a grid cell, full covariance, 8-bit Cholesky factors (Defard et al. 2021)",
    "padim-lite": "one Gaussian a grid cell, diagonal covariance (the edge papers' form)",
    "patchcore": "greedy coreset of int8 patch vectors, nearest neighbour (Roth et al. 2022)",
    "patchcore-lite": "the same coreset product-quantised, searched with distance tables",
}


class Scorer(Protocol):
    """The integer form of a fitted detector.

    Attributes:
        unit: real distance = sqrt(integer) * unit.
    """

    unit: float

    @property
    def kind(self) -> str:
        """Bank kind, a key of ``tinyvad.bank.KINDS``."""

    @property
    def required(self) -> tuple[str, ...]:
        """Tags of the sections without which a bank of this kind can't be scored."""

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32 squared distances."""

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections by tag, in file order."""

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates (or table additions) of one image on a grid of cells."""

    def ram_bytes(self, grid: tuple[int, int]) -> int:
        """Bytes of tables and buffers besides the tapped maps, the score map included."""


def load_scorer(bank: Bank, depth: int) -> Scorer:
    """The scorer of a bank for embeddings of ``depth`` values.

    Raises:
        InputError: a section that the kind needs is missing or malformed.
    """
    kind, grid, sections = bank.header.kind, bank.header.grid_size, bank.sections
    if kind in ("PADM", "PADF", "PADC"):
        from tinyvad.detectors.triangular import TriangularScorer

        return TriangularScorer.from_sections(sections, grid, depth)
    if kind in ("CORE", "PQPC"):
        return _load_patchcore(kind, sections, depth)
    raise InputError(f"{bank.name}: no scorer for bank kind {kind!r}; use a newer tinyvad")


def _load_patchcore(kind: str, sections: Mapping[str, np.ndarray], depth: int) -> Scorer:
    from tinyvad.detectors import patchcore

    scorer = patchcore.PatchCoreScorer if kind == "CORE" else patchcore.PatchCoreLiteScorer
    return scorer.from_sections(sections, depth)
