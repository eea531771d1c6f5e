"""Weights in the order in which the Helium kernels (Cortex-M55) read them; twin of ``tinyvad.export.packing``.

Flows in: int8 weights of a Graph. Flows out: flat int8 arrays for ``tvad_layer.weights``. The kernels read 16 weights an
instruction along the sum, so that a channel's weights lie together; depthwise ones column after column, as the values
under the kernel do (``runtime/tvad_depthwise_mve.c``).
"""

from __future__ import annotations

import numpy as np

LANES = 16  # int8 values of a vector


def pack_conv_1x1(weights: np.ndarray) -> np.ndarray:
    """(O, I) int8 -> rows of I values; after the last one the bytes that a read of two whole vectors of it takes in."""
    rows, length = weights.shape
    spare = 2 * LANES - length if LANES < length < 2 * LANES else 0
    packed = np.zeros(rows * length + spare, np.int8)
    packed[: rows * length] = weights.ravel()
    return packed


def pack_conv(weights: np.ndarray) -> np.ndarray:
    """(O, kh, kw, I) int8 -> rows of kh * kw * I values, as ``pack_conv_1x1``."""
    return pack_conv_1x1(weights.reshape(weights.shape[0], -1))


def pack_fully_connected(weights: np.ndarray) -> np.ndarray:
    """(O, I) int8 -> as ``pack_conv_1x1``."""
    return pack_conv_1x1(weights)


def pack_depthwise(weights: np.ndarray) -> np.ndarray:
    """(kh, kw, C) int8 -> (C, kw, kh), flat."""
    return np.ascontiguousarray(weights.transpose(2, 1, 0)).ravel()
