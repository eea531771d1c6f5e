"""Which task does an image belong to? Prototype routing: embeddings in, the number of the nearest task out.

An image's signature is the sum over all grid cells of the last tapped tensor's part of its embedding; a task's prototype is
the mean signature of its images. The nearest prototype wins, the lowest number of equals. On int8 embeddings everything is
an exact integer, the same in C (docs/SPEC.md, section "PROT"), and costs neither memory nor time that grows with the bank.

Source: PatchCoreCL++'s routing by the mean of the last tapped layer, here on the embedding's own grid.
"""

from __future__ import annotations

import numpy as np

from tinyvad.graph.fixed_point import round_half_away


def signatures(embeddings: np.ndarray, channels: int) -> np.ndarray:
    """(n, H, W, D) -> (n, channels): sums over cells of the last ``channels`` values; int64 for int8, float64 for float."""
    exact = np.int64 if embeddings.dtype == np.int8 else np.float64
    return embeddings[..., -channels:].sum((1, 2), dtype=exact)


def prototype(total: np.ndarray, images: int) -> np.ndarray:
    """(C,) sum of the signatures of ``images`` images -> their mean; int32 rounded half away from zero for integers."""
    mean = total / images
    return round_half_away(mean).astype(np.int32) if total.dtype == np.int64 else mean


def nearest_prototype(signature: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """(n, C) signatures, (T, C) prototypes -> (n,) int64 task numbers."""
    exact = np.int64 if signature.dtype == np.int64 else np.float64
    difference = signature[:, None].astype(exact) - prototypes[None].astype(exact)  # (n, T, C)
    return (difference * difference).sum(2).argmin(1)
