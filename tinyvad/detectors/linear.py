"""The integer scorer of SimpleNet: the last linear layer of its discriminator (bank kind LINR).

Flows in: int8 embeddings (n, H, W, D) of the network's only tap, D = 2 h values relu([y, -y]). Flows out: (n, H, W) uint32
scores, -D(q) of the paper plus a constant, in steps of ``unit``:

    score = clamp(offset - sum over c of weights[c] * e[c], 0, 2^32 - 1)

All products and sums fit 32 bits. The zero of the scores is free, because only their order and the distance to a threshold
count; ``of_layer`` says how it is chosen. C: export/runtime/tvad_score_linear.c; docs/SPEC.md, LINR.

Source: Liu et al., SimpleNet, CVPR 2023 (score -D(q)); the integer form is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tinyvad.detectors.sections import positive_unit, take_section
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import round_half_away

LARGEST_WEIGHT = 127
LARGEST_OFFSET = (1 << 31) - 1
LARGEST_SCORE = (1 << 32) - 1
_REMEDY = "build the bank again"


@dataclass(frozen=True, eq=False)
class LinearScorer:
    """A linear layer with one output.

    Attributes:
        weights: (D,) int8.
        offset: 0 to 2^31 - 1.
        unit: real value of one step of the score.
    """

    weights: np.ndarray
    offset: int
    unit: float = 1.0
    kind = "LINR"
    required = ("CFG ", "BIAS", "PROJ")
    root, sigma = False, 4.0

    @classmethod
    def of_layer(
        cls, weights: np.ndarray, offset: float, step: float, good: Iterable[np.ndarray] | None = None
    ) -> LinearScorer:
        """Quantise a layer whose score is offset - sum of weights * map.

        Args:
            weights: (D,) float. step: real value of one unit of the embedding.
            offset: moves all scores alike, and so has no influence: the integer form has a zero of its own.
            good: embeddings (n, H, W, D) int8 of good images; the zero is the score of their best cell, and better ones are
                cut off there. None: the zero is the least score of any embedding of values >= 0, so that none is cut off.

        Raises:
            InputError: weights or offset are not finite, or the step is not positive.
        """
        values = np.asarray(weights, np.float64)
        if not (np.isfinite(values).all() and np.isfinite(offset) and np.isfinite(step) and step > 0):
            raise InputError("the discriminator's last layer is not finite; train again with a smaller learning rate")
        scale = float(np.abs(values).max(initial=0)) / LARGEST_WEIGHT or 1.0
        quantised = round_half_away(values / scale).astype(np.int8)
        if good is None:
            highest = 127 * int(np.maximum(quantised, 0).sum(dtype=np.int64))
        else:
            highest = max((int(_sums(part, quantised).max(initial=0)) for part in good), default=0)
        return cls(quantised, max(highest, 0), scale * step)

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32."""
        return np.clip(self.offset - _sums(embeddings, self.weights), 0, LARGEST_SCORE).astype(np.uint32)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of one image."""
        return grid[0] * grid[1] * len(self.weights)

    def scratch_bytes(self) -> int:
        """Scratch of the runtime: none."""
        return 0

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections, in file order."""
        return {
            "CFG ": np.array([len(self.weights), 0, 0, 0], np.int32),
            "SCAL": np.array([self.unit]),
            "BIAS": np.array([self.offset], np.int32),
            "PROJ": self.weights,
        }

    @classmethod
    def from_sections(
        cls, sections: Mapping[str, np.ndarray], grid: tuple[int, int], depth: int
    ) -> LinearScorer:
        """Rebuild from a bank's sections, for embeddings of ``depth`` values.

        Raises:
            InputError: a section is missing or has another shape, dtype or range than the kind needs.
        """
        config, wanted = take_section(sections, "CFG ", (4,), "int32").tolist(), [depth, 0, 0, 0]
        if config != wanted:
            raise InputError(f"bank section CFG : {config}, expected {wanted} for embeddings of {depth} values; {_REMEDY}")
        unit = positive_unit(sections)
        offset = int(take_section(sections, "BIAS", (1,), "int32")[0])
        if offset < 0:
            raise InputError(f"bank section BIAS: offset {offset}, expected 0 to {LARGEST_OFFSET}; {_REMEDY}")
        return cls(take_section(sections, "PROJ", (depth,), "int8"), offset, unit)


def _sums(embeddings: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, H, W, D) int8 times (D,) int8 -> (n, H, W) int64, exact: float64 holds sums below 2^31."""
    if embeddings.dtype != np.int8 or embeddings.shape[-1] != len(weights):
        found = f"{embeddings.dtype}{embeddings.shape}"
        raise InputError(f"embeddings are {found}; the bank needs int8 (n, H, W, {len(weights)})")
    return (embeddings.astype(np.float64) @ weights.astype(np.float64)).astype(np.int64)
