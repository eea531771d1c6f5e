"""Weights in the order in which the kernels of plain C and DSP read them.

Flows in: int8 weights of one layer. Flows out: a flat int8 array for flash, as the kernel's C file says.
"""

from __future__ import annotations

import numpy as np


def pack_conv_1x1(weights: np.ndarray) -> np.ndarray:
    """(O, K) int8."""
    return np.ascontiguousarray(weights, np.int8).ravel()


def pack_conv(weights: np.ndarray) -> np.ndarray:
    """(O, kh, kw, I) int8."""
    return np.ascontiguousarray(weights, np.int8).ravel()


def pack_fully_connected(weights: np.ndarray) -> np.ndarray:
    """(O, K) int8."""
    return np.ascontiguousarray(weights, np.int8).ravel()


def pack_depthwise(weights: np.ndarray) -> np.ndarray:
    """(kh, kw, C) int8."""
    return np.ascontiguousarray(weights, np.int8).ravel()
