"""The integer resize, the same in Python and in C: bilinear with antialias, to the bit.

Flows in: a uint8 image (H, W, C). Flows out: a uint8 image (height, width, C).

The filter is the antialiased bilinear one of Pillow and torchvision: a triangle whose support is
max(1, in/out) input pixels on either side. Its weights are made from integers alone, so that a chip makes the
same image:

1. For output i and input j, in units of 1/(2 * out) input pixels: distance d = |(2j+1) * out - (2i+1) * in|,
   support s = 2 * max(in, out), raw weight r_j = max(0, s - d). Only pixels inside the image count, so edges
   renormalise.
2. With R_j = r_0 + ... + r_j and R the sum of all r, E_j = floor((R_j * 2^15 + R) / (2R)) is R_j / R in units
   of 2^-14, rounded to nearest. The weight is w_j = E_j - E_(j-1): the weights sum to exactly 2^14, each less
   than one unit off. R fits 32 bits for sizes up to 16384; R_j * 2^15 needs 64.
3. First along rows, then along columns; each pass gives uint8 by (sum of w_j * p_j + 2^13) >> 14. The sum is
   at most 255 * 2^14 < 2^22.

Same size in and out gives the identical image. Against Pillow (same passes, weights of 22 bits) 98 % of the
pixel values of photographs are equal and the others differ by 1 level; about one in a million by 2, where
both passes meet a near tie. (Pillow may take the other pass first when one side grows and the other shrinks.)
"""

from __future__ import annotations

import functools

import numpy as np

from tinyvad.errors import InputError

WEIGHT_BITS = 14
MAX_SIDE = 16384  # pixels; bounds the integers above

_BLOCK = 8  # outputs of one matrix product: more would multiply more zeros, fewer would make more calls
_CHUNK = 1 << 20  # values of a large image that are float32 at one time


def resize_weights(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The taps of one axis: output i is the sum over k of ``weights[i, k] * input[starts[i] + k]``.

    Args:
        in_size, out_size: pixels, 1 to 16384.

    Returns:
        ``starts`` (out,) int32 and ``weights`` (out, taps) int16. Each row of ``weights`` sums to 2^14; rows
        with fewer taps are padded with zeros, and ``0 <= starts[i] <= in_size - taps``: no tap is outside.

    Raises:
        InputError: a size is out of range.
    """
    for size in (in_size, out_size):
        if not 1 <= size <= MAX_SIDE:
            raise InputError(f"cannot resize {in_size} to {out_size} pixels: sides must be 1 to {MAX_SIDE}")
    centre = (2 * np.arange(out_size, dtype=np.int64) + 1) * in_size  # (out,)
    support = 2 * max(in_size, out_size)
    # the lowest and the highest j with d < s, both (out,)
    first = np.maximum(0, (centre - support - out_size) // (2 * out_size) + 1)
    last = np.minimum(in_size - 1, -((out_size - centre - support) // (2 * out_size)) - 1)
    taps = int((last - first).max()) + 1
    starts = np.minimum(first, in_size - taps)  # (out,)
    inputs = starts[:, None] + np.arange(taps)  # (out, taps)
    raw = np.maximum(0, support - np.abs((2 * inputs + 1) * out_size - centre[:, None]))  # (out, taps)
    running = np.cumsum(raw, axis=1)  # (out, taps) R_j
    total = running[:, -1:]  # (out, 1) R
    edges = ((running << (WEIGHT_BITS + 1)) + total) // (2 * total)  # (out, taps) E_j
    return starts.astype(np.int32), np.diff(edges, axis=1, prepend=0).astype(np.int16)


@functools.lru_cache(maxsize=16)
def _blocks(in_size: int, out_size: int, channels: int) -> list[tuple[slice, slice, np.ndarray]]:
    """The weights as small dense matrices (inputs, outputs, matrix), channels interleaved as in the image."""
    starts, weights = resize_weights(in_size, out_size)
    taps = weights.shape[1]
    blocks = []
    for low in range(0, out_size, _BLOCK):
        high = min(out_size, low + _BLOCK)
        offset = int(starts[low])
        span = int(starts[high - 1]) + taps - offset
        matrix = np.zeros((span, high - low), np.float32)  # (inputs, outputs)
        for column, start in enumerate(starts[low:high]):
            matrix[start - offset : start - offset + taps, column] = weights[low + column]
        inputs = slice(offset * channels, (offset + span) * channels)
        outputs = slice(low * channels, high * channels)
        blocks.append((inputs, outputs, np.kron(matrix, np.eye(channels, dtype=np.float32))))
    return blocks


def _round(sums: np.ndarray) -> np.ndarray:
    """(sum + 2^13) >> 14 in place, as float32 integers."""
    sums += 1 << (WEIGHT_BITS - 1)
    sums *= 2.0**-WEIGHT_BITS
    return np.floor(sums, out=sums)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image with the integer algorithm of this file.

    The sums run as float32 matrix products: all terms are integers >= 0 and no sum exceeds 2^22 < 2^24, so
    each partial sum is exact in any order of the BLAS. As fast as Pillow: 5 ms for 1024 x 1024 to 224 x 224.

    Args:
        image: (H, W, C) uint8.
        height, width: of the result, in pixels.

    Returns:
        (height, width, C) uint8, a new array.

    Raises:
        InputError: not (H, W, C) uint8, or a side out of range.
    """
    if image.ndim != 3 or image.dtype != np.uint8:
        raise InputError(f"resize needs (H, W, C) uint8, not {image.shape} {image.dtype}")
    in_height, in_width, channels = image.shape
    across = _blocks(in_width, width, channels)
    down = _blocks(in_height, height, 1)
    rows = image.reshape(in_height, in_width * channels)
    middle = np.empty((in_height, width * channels), np.float32)  # after the pass along rows
    step = max(1, _CHUNK // rows.shape[1])
    for row in range(0, in_height, step):
        part = rows[row : row + step].astype(np.float32)  # (step, W * C)
        for inputs, outputs, matrix in across:
            middle[row : row + step, outputs] = part[:, inputs] @ matrix
    _round(middle)
    result = np.empty((height, width * channels), np.float32)
    for inputs, outputs, matrix in down:
        result[outputs] = matrix.T @ middle[inputs]
    return _round(result).astype(np.uint8).reshape(height, width, channels)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a mask to (height, width) by nearest neighbour: output i reads input ((2i+1) * in) // (2 * out).

    Args:
        mask: (H, W) bool, or any dtype.

    Returns:
        (height, width), dtype of ``mask``.
    """
    rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)  # (height,)
    columns = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)  # (width,)
    return mask[rows[:, None], columns]
