"""Scalar quantisers of stored maps: even levels, levels that follow the data, and codes of any width packed into bytes.

Flows in: values by column. Flows out: levels, how many bits each column gets, codes.

Source: the levels are Lloyd's and Max's (Lloyd 1982, Least squares quantization in PCM); the bits go where they lower the
squared error most, one at a time (greedy allocation; reverse water-filling is its limit for Gaussians).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ITERATIONS = 30
MOST_BITS = 8  # of a code


def even_range(values: np.ndarray, axis: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest value and step of 256 even levels over ``axis``: two float32 arrays; a step of 0 becomes 1."""
    low = values.min(axis).astype(np.float32)
    span = values.max(axis).astype(np.float64) - low
    step = (span / 255).astype(np.float32)
    # a step that float32 rounded down would leave the highest value outside
    step = np.where(step * np.float64(255) < span, np.nextafter(step, np.float32(np.inf)), step)
    return low, np.where(step > 0, step, np.float32(1)).astype(np.float32)


def even_codes(values: np.ndarray, low: np.ndarray, step: np.ndarray) -> np.ndarray:
    """uint8 numbers of the nearest levels; ``low`` and ``step`` broadcast."""
    return np.clip(np.rint((values.astype(np.float64) - low) / step), 0, 255).astype(np.uint8)


def even_values(codes: np.ndarray, low: np.ndarray, step: np.ndarray) -> np.ndarray:
    """float32 values of ``even_codes``: at most half a step away, and half a unit in the last place."""
    return (codes * step.astype(np.float64) + low).astype(np.float32)


def lloyd_levels(ordered: np.ndarray, count: int) -> np.ndarray:
    """Levels with a small mean squared error.

    Args:
        ordered: (N,) float64, ascending, N > 0. count: how many levels.

    Returns:
        (count,) float16, ascending.
    """
    quantiles = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    levels = (quantiles + np.linspace(ordered[0], ordered[-1], count)) / 2  # between even and equally filled
    if count == 1:
        return np.array([ordered.mean()], np.float16)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2), [len(ordered)]])
        sizes = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(sizes, 1)
        moved = np.where(sizes > 0, means, levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return np.sort(levels.astype(np.float16))


def nearest_levels(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """uint8 numbers of the nearest of ascending levels."""
    wide = levels.astype(np.float64)
    return np.searchsorted((wide[1:] + wide[:-1]) / 2, values).astype(np.uint8)


def allocate(columns: np.ndarray, sizes: np.ndarray, total: int) -> list[np.ndarray]:
    """Levels for each column, so that ``total`` bits a row give the smallest squared error of all columns together.

    Args:
        columns: (N, C) float64. sizes: (C,) what a column's errors are multiplied with before they are compared.
        total: bits a row, at most 8 C.

    Returns:
        C arrays of 2**bits ascending float16 levels, bits from 0 to 8.
    """
    deepest = range(MOST_BITS + 1)
    tables, errors = [], np.empty((columns.shape[1], len(deepest)))
    for k, column in enumerate(columns.T):
        ordered = np.sort(column)
        tables.append([lloyd_levels(ordered, 1 << bits) for bits in deepest])
        for bits in deepest:
            levels = tables[k][bits]
            errors[k, bits] = np.square(ordered - levels[nearest_levels(ordered, levels)].astype(np.float64)).sum()
    chosen = spend(errors * np.square(sizes, dtype=np.float64)[:, None], total)
    return [table[bits] for table, bits in zip(tables, chosen, strict=True)]


def spend(errors: np.ndarray, total: int) -> list[int]:
    """Bits of each column: one at a time to the column whose error it lowers most (of equals the first).

    Args:
        errors: (C, 9) error of a column with 0 to 8 bits. total: bits to spend, at most 8 C.
    """
    gains = np.concatenate([errors[:, :-1] - errors[:, 1:], np.full((len(errors), 1), -np.inf)], axis=1)
    bits = np.zeros(len(errors), int)
    for _ in range(total):
        bits[gains[np.arange(len(bits)), bits].argmax()] += 1
    return bits.tolist()


def pack_bits(codes: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """(N, C) uint8 codes of ``bits[k]`` bits each -> (N, ceil(sum / 8)) uint8, lowest bit first, rows on whole bytes."""
    parts = [(codes[:, k : k + 1] >> np.arange(width, dtype=np.uint8)) & 1 for k, width in enumerate(bits)]
    return np.packbits(np.concatenate(parts, axis=1), axis=1, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """Undo ``pack_bits``: (N, C) uint8."""
    flat = np.unpackbits(packed, axis=1, count=sum(bits), bitorder="little")
    codes = np.zeros((len(packed), len(bits)), np.uint8)
    start = 0
    for k, width in enumerate(bits):
        codes[:, k] = flat[:, start : start + width] @ (1 << np.arange(width, dtype=np.uint8))
        start += width
    return codes
