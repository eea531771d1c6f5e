"""Product quantisation's two loops: nearest centroid, and nearest code by distance tables. Sixteen vectors at a time.

Flows in: vectors packed by ``pack`` as (blocks, D, 16), int8 or float32, and centroids widened to int32 or float32.
Flows out: codes, or the smallest sum of table entries. The readable twins are ``assign_reference`` and
``adc_reference`` in ``tinyvad.detectors.product_quantizer``; they agree to the last bit.

The tables of sixteen queries lie side by side, so that one code looks up sixteen distances with one load: no gather, no
shuffle, no approximate tables. With 8 subspaces of 256 centroids they take 128 KiB, which the second cache level holds.

Source: asymmetric distance computation, Jegou et al. 2011 (Product quantization for nearest neighbor search, eq. 13).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from tinyvad.kernels.lanes import LANES, add, add_square, load, splat, store, sub, where_less

UNROLL = 4  # centroids compared at a time; their number is padded to a multiple of it


def pack(vectors: np.ndarray) -> np.ndarray:
    """(n, D) -> flat (ceil(n / 16), D, 16), the last block filled up with zeros."""
    n, depth = vectors.shape
    padded = np.pad(vectors, ((0, -n % LANES), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, LANES, depth).transpose(0, 2, 1)).ravel()


def widen(codebooks: np.ndarray) -> np.ndarray:
    """(M, V, dsub) int8 or float32 -> (M, V', dsub) int32 or float32, V' a multiple of 4, filled up with centroid 0.

    A copy of centroid 0 is never the nearest one, as of equals the lowest index wins.
    """
    wide = codebooks.astype(np.float32 if codebooks.dtype == np.float32 else np.int32)
    copies = np.repeat(wide[:, :1], -wide.shape[1] % UNROLL, axis=1)
    return np.ascontiguousarray(np.concatenate([wide, copies], axis=1))


@njit(cache=True, nogil=True)
def distance_table(packed: np.ndarray, first: int, codebook: np.ndarray, table: np.ndarray, start: int) -> None:
    """table[start + 16 * v] = squared distances of sixteen sub-vectors, packed from ``first`` on, to codebook[v]."""
    number, depth = codebook.shape
    values = load(packed, first)
    zero = sub(values, values)
    for v in range(0, number, UNROLL):
        a = b = c = d = zero
        for i in range(depth):
            values = load(packed, first + i * LANES)
            a = add_square(a, values, splat(codebook[v, i]))
            b = add_square(b, values, splat(codebook[v + 1, i]))
            c = add_square(c, values, splat(codebook[v + 2, i]))
            d = add_square(d, values, splat(codebook[v + 3, i]))
        at = start + v * LANES
        store(table, at, a)
        store(table, at + LANES, b)
        store(table, at + 2 * LANES, c)
        store(table, at + 3 * LANES, d)


@njit(cache=True, nogil=True)
def assign(packed: np.ndarray, codebook: np.ndarray, codes: np.ndarray, distances: np.ndarray) -> None:
    """Nearest centroid of every packed vector, the lowest index of equals.

    Args:
        packed: flat (blocks, dsub, 16). codebook: (V', dsub), see ``widen``.
        codes: (blocks * 16,) int32, out. distances: (blocks * 16,) of the codebook's dtype, out.
    """
    number, depth = codebook.shape
    table = np.empty(number * LANES, codebook.dtype)
    for block in range(codes.size // LANES):
        distance_table(packed, block * depth * LANES, codebook, table, 0)
        best = load(table, 0)
        index = splat(np.int32(0))
        for v in range(1, number):
            values = load(table, v * LANES)
            index = where_less(values, best, splat(np.int32(v)), index)
            best = where_less(values, best, values, best)
        store(codes, block * LANES, index)
        store(distances, block * LANES, best)


@njit(cache=True, nogil=True)
def adc(packed: np.ndarray, codebooks: np.ndarray, codes: np.ndarray, distances: np.ndarray) -> None:
    """Smallest table sum over all codes, for every packed query.

    Args:
        packed: flat (blocks, M * dsub, 16). codebooks: (M, V', dsub), see ``widen``.
        codes: (K, M) uint8, K > 0, all below V'.
        distances: (blocks * 16,) of the codebooks' dtype, out.
    """
    subspaces, number, depth = codebooks.shape
    tables = np.empty(subspaces * number * LANES, codebooks.dtype)
    for block in range(distances.size // LANES):
        for j in range(subspaces):
            first = (block * subspaces + j) * depth * LANES
            distance_table(packed, first, codebooks[j], tables, j * number * LANES)
        for k in range(codes.shape[0]):
            sums = load(tables, codes[k, 0] * LANES)
            for j in range(1, subspaces):
                sums = add(sums, load(tables, (j * number + codes[k, j]) * LANES))
            if k == 0:
                best = sums
            best = where_less(sums, best, sums, best)
        store(distances, block * LANES, best)
