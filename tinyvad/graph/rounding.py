"""Rounding weights so that their errors cancel: float weights and how their inputs vary together in, integers out.

Rounding each weight of a sum to the nearest step leaves errors that add up where the inputs rise and fall together.
Neighbouring pixels do: in the first convolution of a network, nearest rounding shifts every output by a share of the
local brightness, an error that all later layers carry. Here one weight after the other is rounded, and the ones that are
left take over as much of its error as they can, so that the expected squared error of the sum is small.

Source: Optimal Brain Surgeon (Hassibi and Stork 1993); for rounding, Frantar et al. 2022 (GPTQ), equations 2 and 3.
"""

from __future__ import annotations

import numpy as np

from tinyvad.graph.fixed_point import round_half_away

# Correlation of photographs' values a pixel apart, and between colour channels, in round figures. Nothing depends on them
# finely: 0.9 to 0.98 and 0.5 to 0.95 give the same features within 0.1 dB, and so does what calibration images show.
PIXEL_CORRELATION = 0.95
COLOUR_CORRELATION = 0.9


def image_covariance(height: int, width: int, channels: int) -> np.ndarray:
    """(K, K) float64 of the K = height * width * channels values of an image patch, variance 1, in C order."""
    y, x, c = (axis.ravel() for axis in np.meshgrid(*map(np.arange, (height, width, channels)), indexing="ij"))
    distance = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    return PIXEL_CORRELATION**distance * np.where(c[:, None] == c, 1.0, COLOUR_CORRELATION)


def round_together(weights: np.ndarray, covariance: np.ndarray, limit: int = 127) -> np.ndarray:
    """Integers near ``weights`` whose sums with inputs of that covariance are near those of the weights.

    Args:
        weights: (O, K) float64 in units of their scale.
        covariance: (K, K) of the inputs, positive definite.
        limit: largest magnitude of an integer.

    Returns:
        (O, K) float64 holding integers.
    """
    pending = weights.astype(np.float64).copy()  # (O, K): what each weight should be, given those already rounded
    inverse = np.linalg.inv(covariance)  # (K, K), of the covariance of the weights that are left
    rounded = np.empty_like(pending)
    for k in range(pending.shape[1]):
        rounded[:, k] = np.clip(round_half_away(pending[:, k]), -limit, limit)
        error = (pending[:, k] - rounded[:, k]) / inverse[k, k]  # (O,)
        pending -= error[:, None] * inverse[k]
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return rounded
