"""Detectors by name, and what they have in common.

Every detector has ``fit(embeddings) -> self`` over a stream of (n, H, W, D) arrays, ``score(embeddings)`` in floating
point for study, and ``to_scorer()``: the integer form that goes into the bank and that the device runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tinyvad.bank import Bank
from tinyvad.detectors.sections import take_section
from tinyvad.detectors.tasks import TaskScorers, read_thresholds, split_tasks
from tinyvad.embedding import Embedding, align, tap_rows, tap_scratch_bytes
from tinyvad.errors import InputError

if TYPE_CHECKING:
    from tinyvad.detectors.student_teacher import Pairs

METHODS = {
    "padim-compact": "one Gaussian a cell of a coarse grid on PCA-reduced features, 4-bit Cholesky factors (default)",
    "padim": "one Gaussian a grid cell, full covariance, 8-bit Cholesky factors (Defard et al. 2021)",
    "padim-lite": "one Gaussian a grid cell, diagonal covariance (the edge papers' form)",
    "patchcore": "greedy coreset of int8 patch vectors, nearest neighbour (Roth et al. 2022)",
    "patchcore-lite": "the same coreset product-quantised, searched with distance tables",
    "paste": "a small student imitates the network's tail behind a shared trunk (PaSTe, Barusco et al. 2024); trained",
    "stfpm": "a whole student imitates the network (STFPM, Wang et al. 2021); trained",
    "cfa": "features drawn to their nearest centres by a trained descriptor (CFA, Lee et al. 2022)",
    "simplenet": "a trained discriminator of adapted features and noise (SimpleNet, Liu et al. 2023)",
}


NATIVE = ("STFP",)  # kinds that score the tapped maps themselves: a tap's part is the tap


class Scorer(Protocol):
    """The integer form of a fitted detector.

    Attributes:
        unit: a real score = sqrt(integer) * unit where ``root``, else integer * unit.
        root: the integers are squared distances.
        sigma: of the Gaussian that smooths a map for people, pixels of the network's input.
    """

    @property
    def unit(self) -> float: ...

    @property
    def root(self) -> bool: ...

    @property
    def sigma(self) -> float: ...

    @property
    def kind(self) -> str:
        """Bank kind, a key of ``tinyvad.bank.KINDS``."""

    @property
    def required(self) -> tuple[str, ...]:
        """Tags of the sections without which a bank of this kind can't be scored."""

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32 scores; the embedding of a STFP bank is (n, H, W, L) uint32."""

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections by tag, in file order."""

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates (or table additions) of one image on a grid of cells."""

    def scratch_bytes(self) -> int:
        """Bytes that the runtime's ``tvad_score_parts`` needs besides the vectors and the score map, exactly."""


def real_scores(scorer: Scorer, raw: np.ndarray | int) -> np.ndarray:
    """Integer scores in the detector's real units, float64."""
    values = np.asarray(raw, np.float64)
    return (np.sqrt(values) if scorer.root else values) * scorer.unit


def parts_scratch(rows: np.ndarray, scorer: Scorer) -> int:
    """Scratch of the runtime's ``tvad_score_parts``, exactly: the scorer's, with room for an image's signature.

    The room is there in a bank of one task too, so that learning a second one needs no more RAM.

    Args:
        rows: (n, 8) int32, section TAPS.
    """
    return max(align(4 * int(rows[-1][2])), scorer.scratch_bytes())


def score_bytes(rows: np.ndarray, grid: tuple[int, int], scorer: Scorer) -> int:
    """What the runtime's ``tvad_score`` needs, exactly, for any number of tasks.

    To score: the map, one grid row of every tap's vectors, scratch of the embedding or the scorer. To find the task before
    that, in the same place: the signature, one grid row of the last tap's vectors, scratch of its embedding. Kinds that
    score the tapped maps themselves need neither vectors nor an embedding.

    Args:
        rows: (n, 8) int32, section TAPS.
    """
    vectors = [align(grid[1] * int(row[2])) for row in rows]
    embed = [tap_scratch_bytes((int(row[0]), int(row[1])), grid, int(row[6])) for row in rows]
    if scorer.kind in NATIVE:
        return align(4 * grid[0] * grid[1]) + parts_scratch(rows, scorer)
    scored = align(4 * grid[0] * grid[1]) + sum(vectors) + max(*embed, parts_scratch(rows, scorer))
    return max(scored, align(4 * int(rows[-1][2])) + vectors[-1] + embed[-1])


def check_bank(bank: Bank) -> tuple[np.ndarray, TaskScorers]:
    """What a device checks of a bank beyond its bytes: all that scoring needs is there, and no sum passes its width.

    The runtime's ``tvad_open`` accepts the same banks (docs/SPEC.md, "What scoring demands"). STEP and META are for tools.

    Returns:
        TAPS, (n, 8) int32, and the scorers of all tasks.

    Raises:
        InputError: a section that the kind needs is missing or malformed; names the bank and the section.
    """
    try:
        return _check_sections(bank)
    except InputError as error:
        raise InputError(f"{bank.name}: {error}") from error


def _check_sections(bank: Bank) -> tuple[np.ndarray, TaskScorers]:
    header, sections = bank.header, bank.sections
    take_section(sections, "LUT ", (3, 256), "int8")
    thresholds = read_thresholds(sections)
    rows = tap_rows(sections, header.grid_size, header.taps)
    depth, channels = int(rows[:, 2].sum()), int(rows[-1, 2])
    summed = (int(rows[-1, 0] * rows[-1, 1]), 128) if header.kind in NATIVE else None
    parts = split_tasks(header.kind, sections, header.grid_size, len(thresholds), channels, summed)
    scorers = tuple(load_scorer(header.kind, part, header.grid_size, depth) for part in parts)
    if score_bytes(rows, header.grid_size, scorers[0]) > 2**31 - 1:
        raise InputError("scoring needs more than 2 GiB; use a coarser grid")
    if "TEST" in sections or "GOLD" in sections:
        gold = sections.get("GOLD")
        count = 0 if gold is None else len(gold) if gold.ndim else 0
        gold = take_section(sections, "GOLD", (count, 3), "uint32")
        take_section(sections, "TEST", (count, depth), "int8")
        if gold[:, 0].max() >= len(thresholds) or gold[:, 1].max() >= header.grid_size[0] * header.grid_size[1]:
            raise InputError("section GOLD names a task or a cell that there is not; make the build again")
    return rows, TaskScorers(scorers, thresholds, sections.get("PROT"), channels)


def open_embedding(bank: Bank, names: Sequence[str]) -> Embedding | Pairs:
    """What goes before the scorer of a bank, from its TAPS and STEP; ``names`` of the tapped tensors.

    Raises:
        InputError: a section is missing or malformed.
    """
    if bank.header.kind not in NATIVE:
        return Embedding.from_sections(bank.sections, bank.header.grid_size, names)
    from tinyvad.detectors.student_teacher import Pairs

    return Pairs.from_sections(bank.sections, bank.header.grid_size, names)


def load_scorer(kind: str, sections: Mapping[str, np.ndarray], grid: tuple[int, int], depth: int) -> Scorer:
    """The scorer of one task's sections for embeddings of ``depth`` values.

    Raises:
        InputError: a section that the kind needs is missing or malformed.
    """
    scorer: Scorer
    if kind in ("PADM", "PADF", "PADC"):
        from tinyvad.detectors.triangular import TriangularScorer

        scorer = TriangularScorer.from_sections(sections, grid, depth)
    elif kind in ("CORE", "PQPC"):
        scorer = _load_patchcore(kind, sections, depth)
    elif kind == "STFP":
        from tinyvad.detectors.student_teacher import StudentTeacherScorer

        scorer = StudentTeacherScorer.from_sections(sections, grid, depth)
    elif kind == "LINR":
        from tinyvad.detectors.linear import LinearScorer

        scorer = LinearScorer.from_sections(sections, grid, depth)
    elif kind == "CFAS":
        from tinyvad.detectors.centres import CentresScorer

        scorer = CentresScorer.from_sections(sections, grid, depth)
    else:
        raise InputError(f"no scorer for bank kind {kind!r}; use a newer tinyvad")
    if scorer.kind != kind:
        raise InputError(f"the bank's kind is {kind}, but section CFG  describes a {scorer.kind}; make the build again")
    return scorer


def _load_patchcore(kind: str, sections: Mapping[str, np.ndarray], depth: int) -> Scorer:
    from tinyvad.detectors import patchcore

    scorer = patchcore.PatchCoreScorer if kind == "CORE" else patchcore.PatchCoreLiteScorer
    return scorer.from_sections(sections, depth)
