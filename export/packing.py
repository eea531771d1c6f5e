"""Weights in the order in which the kernels of plain C and DSP read them.

Flows in: int8 weights of one layer. Flows out: a flat int8 array for flash, as the kernel's C file says.
"""

from __future__ import annotations

import numpy as np


def pack_conv_1x1(weights: np.ndarray) -> np.ndarray:
    """(O, K) int8 -> (ceil(O / 2), ceil(K / 4), 8), flat: channels a, b in pairs, taps a0 b0 a2 b2 a1 b1 a3 b3.

    A word then holds two taps of two channels, as the kernel's SXTB16 takes them apart. Filled up with zeros.
    """
    rows, length = weights.shape
    padded = np.zeros((rows + rows % 2, length + -length % 4), np.int8)
    padded[:rows, :length] = weights
    blocks = padded.reshape(len(padded) // 2, 2, -1, 2, 2)  # (pairs, channel, fours of taps, tap // 2, tap % 2)
    return np.ascontiguousarray(blocks.transpose(0, 2, 4, 3, 1)).ravel()


def pack_conv(weights: np.ndarray) -> np.ndarray:
    """(O, kh, kw, I) int8 -> as ``pack_conv_1x1`` with K = kh * kw * I."""
    return pack_conv_1x1(weights.reshape(weights.shape[0], -1))


def pack_fully_connected(weights: np.ndarray) -> np.ndarray:
    """(O, K) int8 -> as ``pack_conv_1x1``."""
    return pack_conv_1x1(weights)


def pack_depthwise(weights: np.ndarray) -> np.ndarray:
    """(kh, kw, C) int8 -> (C, kh, kw), flat: the kernel works a channel at a time."""
    return np.ascontiguousarray(weights.transpose(2, 0, 1), np.int8).ravel()
