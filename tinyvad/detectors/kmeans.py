"""k-means for codebooks: sub-vectors in, centroids out, the same on every machine and for any number of threads.

k-means++ seeding, Lloyd's iterations, empty clusters re-seeded with the worst-served vectors. Distances have one stated
order of additions (the kernel's), means are float64 sums in row order; on int8 vectors these sums are exact integers.

Source: Lloyd 1982; k-means++: Arthur and Vassilvitskii 2007.
"""

from __future__ import annotations

import numpy as np

ITERATIONS = 25


def assign(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each vector.

    Args:
        vectors: (n, d), centroids: (V, d), both int8 (exact) or both float32.

    Returns:
        index (n,) int32, the lowest of equals; squared distance (n,) int32 or float32.
    """
    from tinyvad.kernels import pq  # here, so that reading a bank does not load Numba

    return _assign_packed(pq.pack(vectors), len(vectors), centroids)


def _assign_packed(packed: np.ndarray, number: int, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from tinyvad.kernels import pq

    codebook = pq.widen(centroids[None])[0]
    places = packed.size // centroids.shape[1]  # ``number`` rounded up to whole blocks
    codes, distances = np.empty(places, np.int32), np.empty(places, codebook.dtype)
    pq.assign(packed, codebook, codes, distances)
    return codes[:number], distances[:number]


def assign_reference(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in plain NumPy: what ``assign`` must equal to the last bit."""
    dtype: np.dtype = np.dtype(np.float32 if vectors.dtype == np.float32 else np.int32)
    table = np.zeros((len(vectors), len(centroids)), dtype)
    for column in range(vectors.shape[1]):
        difference = vectors[:, column, None].astype(dtype) - centroids[:, column].astype(dtype)
        table += difference * difference
    codes = table.argmin(1).astype(np.int32)
    return codes, table[np.arange(len(vectors)), codes]


def seed_centroids(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: (count, d) of the vectors, each drawn with probability proportional to its squared distance.

    Where there are fewer distinct vectors, all of them, then copies of the first.
    """
    from tinyvad.kernels import pq

    packed = pq.pack(vectors)
    chosen = [int(rng.random() * len(vectors))]
    nearest = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, _assign_packed(packed, len(vectors), vectors[chosen[-1:]])[1])
        cumulative = np.cumsum(nearest)
        if cumulative[-1] == 0:
            chosen += [chosen[0]] * (count - len(chosen))
        else:
            draw = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
            chosen.append(min(int(draw), len(vectors) - 1))
    return vectors[chosen]


def kmeans(vectors: np.ndarray, count: int, rng: np.random.Generator, iterations: int = ITERATIONS) -> np.ndarray:
    """Centroids (count, d) float64 of (n, d) int8 or float32 vectors, count <= n."""
    from tinyvad.kernels import pq

    points = vectors.astype(np.float32)
    packed = pq.pack(points)
    centroids = seed_centroids(points, count, rng).astype(np.float64)
    previous, refilled = None, False
    for _ in range(iterations):
        codes, distances = _assign_packed(packed, len(points), centroids.astype(np.float32))
        if previous is not None and not refilled and np.array_equal(codes, previous):
            break
        previous, refilled = codes, False
        sizes = np.bincount(codes, minlength=count)
        sums = np.stack([np.bincount(codes, column, count) for column in points.T], axis=1)
        used = sizes > 0
        centroids[used] = sums[used] / sizes[used, None]
        if not used.all():
            worst = np.argsort(-distances, kind="stable")[: count - int(used.sum())]
            worst = worst[distances[worst] > 0]  # nothing is left to serve better
            centroids[np.flatnonzero(~used)[: len(worst)]] = points[worst]
            refilled = len(worst) > 0
    return centroids
