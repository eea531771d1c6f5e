"""Feature quality: how much of the teachers' maps can be read off a network's taps by the best linear map.

Flows in: tapped maps and the teachers' maps of the same views. Flows out: the share of variance explained, a layer: at
most 1, and below 0 where a map fitted on too few images misleads. Linear, because PaDiM's Mahalanobis distance does not
change under any invertible linear map of the features: what a tap can tell such a detector is what can be read off it
linearly, in whatever basis it stands. It needs no labels and no defects, and says the same of a student, of a network
with random weights and of the built-in filter bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tinyvad.distill.teacher import Teachers, normalisation
from tinyvad.distill.views import Pictures, views

FIT_VIEWS, HELD_OUT_VIEWS, POSITIONS = 384, 192, 64
BATCH = 32
TAIL = 0.5  # percent at either end of a target's values that are clipped: one bright view must not outweigh all others
RIDGE = 1e-3
FIT, HELD_OUT = 11, 12  # second part of the views' key
Features = Callable[[np.ndarray], Sequence[np.ndarray]]


def explained(
    features: Features, teachers: Teachers, training: Pictures, held_out: Pictures, image_size: int, seed: int = 0
) -> list[float]:
    """Share of the teachers' variance that a ridge regression on each tap explains on held-out views.

    Args:
        features: (n, S, S, 3) uint8 -> one (n, h, w, c) map a student layer.
        teachers: whose targets stand in the same order; every channel counts the same.
        training, held_out: the regression is fitted on views of the first, measured on views of the second.
    """
    fit = _positions(features, teachers, training, (seed, FIT), FIT_VIEWS, image_size)
    test = _positions(features, teachers, held_out, (seed, HELD_OUT), HELD_OUT_VIEWS, image_size)
    return [_share(*a, *b) for a, b in zip(fit, test)]


def _positions(
    features: Features, teachers: Teachers, pictures: Pictures, key: tuple[int, ...], count: int, size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(taps (n, c), teachers' maps (n, C)) at ``POSITIONS`` places of each view, a layer."""
    rng = np.random.default_rng(key)
    kept: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in teachers.channels]
    for i in range(0, count, BATCH):
        images = views(pictures, (*key, i), BATCH, size)
        for both, tap, target in zip(kept, features(images), teachers.maps(images)):
            places = rng.permutation(tap.shape[1] * tap.shape[2])[:POSITIONS]
            for part, maps in zip(both, (tap, target)):
                part.append(maps.reshape(len(maps), -1, maps.shape[-1])[:, places].reshape(-1, maps.shape[-1]))
    return [(np.concatenate(taps).astype(np.float64), np.concatenate(maps)) for taps, maps in kept]


def _share(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    norm = normalisation(y, "channel")
    y, y_test = norm(y), norm(y_test)
    low, high = np.percentile(y, [TAIL, 100 - TAIL], axis=0)  # (C,), (C,)
    y, y_test = np.clip(y, low, high), np.clip(y_test, low, high)
    mean, spread, centre = x.mean(0), x.std(0) + 1e-12, y.mean(0)
    x, x_test = (x - mean) / spread, (x_test - mean) / spread
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    prediction = centre + x_test @ np.linalg.solve(gram, x.T @ (y - centre))
    return float(1 - np.square(y_test - prediction).sum() / np.square(y_test - centre).sum())
