"""Product quantisation: patch vectors in, codes of a byte or a nibble a subspace out, and search on the codes.

The vector's channels, put in the order ``indices``, fall into M subspaces; each has V centroids. ``search`` sums, for each
code, M entries of a table of distances from the query's sub-vectors to the centroids. As subspaces are orthogonal, that sum
*is* the squared distance to the decoded vector: the search is exhaustive and, on int8 vectors, exact.

The codebooks are trained on the bank together with as many vectors drawn from all normal features, because a greedy coreset
alone is made of outliers; and once on channels as given, once on channels grouped by their covariance, of which the one
with the smaller error on all normal features stays. On held-out normal images of six products (MCUNet, 64 KB) this
lowered the root mean square distance to the bank by 1 to 16 % with 8-bit codes, by 2 to 24 % with 4-bit ones.

Source: Jegou et al. 2011 (Product quantization for nearest neighbor search); the two-stage search is PatchCore-Lite's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from tinyvad.detectors.channel_groups import covariance, group_channels
from tinyvad.detectors.distances import pairwise_squared
from tinyvad.detectors.kmeans import ITERATIONS, assign, kmeans
from tinyvad.engines import threads
from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import round_half_away

BITS = (4, 8)
COARSE = ("adc", "sdc", "index")
BLOCK = 64  # queries that a thread should have at least; a multiple of the kernel's 16


@dataclass(frozen=True, eq=False)
class ProductQuantizer:
    """Codebooks and the order of the channels.

    Attributes:
        codebooks: (M, V, D / M) int8 or float32.
        indices: (D,) uint16 permutation; x[indices] is cut into the M sub-vectors.
        bits: 4 or 8, of one code; V <= 2**bits.
    """

    codebooks: np.ndarray
    indices: np.ndarray
    bits: int

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) of the codebooks' dtype -> (n, M) uint8, nearest centroids, the lowest number of equals."""
        columns = [assign(part, book)[0] for part, book in zip(self._parts(vectors), self.codebooks, strict=True)]
        return np.stack(columns, axis=1).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """(n, M) uint8 -> (n, D) vectors of centroids, channels in the embedding's order."""
        vectors = np.empty((len(codes), len(self.indices)), self.codebooks.dtype)
        subspaces = np.arange(len(self.codebooks))
        vectors[:, self.indices] = self.codebooks[subspaces, codes].reshape(vectors.shape)
        return vectors

    def _parts(self, vectors: np.ndarray) -> list[np.ndarray]:
        """M arrays (n, D / M)."""
        return np.split(vectors[:, self.indices], len(self.codebooks), axis=1)

    def search(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Squared distance of every query to the nearest decoded vector.

        Args:
            queries: (n, D) of the codebooks' dtype. codes: (K, M) uint8.

        Returns:
            (n,) uint32, exact, for int8; float32 for float32.
        """
        from tinyvad.kernels import pq  # here, so that reading a bank does not load Numba

        codebooks = pq.widen(self.codebooks)
        ordered = queries[:, self.indices]

        def part(rows: np.ndarray) -> np.ndarray:
            packed = pq.pack(rows)
            distances = np.empty(packed.size // rows.shape[1], codebooks.dtype)
            pq.adc(packed, codebooks, codes, distances)
            return distances[: len(rows)]

        each = -(-len(ordered) // (threads() * BLOCK)) * BLOCK
        if each >= len(ordered):
            found = part(ordered)
        else:
            with ThreadPoolExecutor(threads()) as pool:
                found = np.concatenate(list(pool.map(part, [ordered[i : i + each] for i in range(0, len(ordered), each)])))
        return found.astype(np.float32 if found.dtype == np.float32 else np.uint32)

    def search_reference(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """``search`` in plain NumPy, table by table: what it must equal to the last bit."""
        dtype: np.dtype = np.dtype(np.float32 if self.codebooks.dtype == np.float32 else np.int32)
        sums = np.zeros((len(queries), len(codes)), dtype)
        for j, (part, book) in enumerate(zip(self._parts(queries), self.codebooks, strict=True)):
            table = np.zeros((len(queries), len(book)), dtype)  # (n, V)
            for column in range(part.shape[1]):
                difference = part[:, column, None].astype(dtype) - book[:, column].astype(dtype)
                table += difference * difference
            sums += table[:, codes[:, j]]
        return sums.min(1).astype(np.float32 if dtype == np.float32 else np.uint32)

    def search_two_stage(self, queries: np.ndarray, codes: np.ndarray, shortlist: int, coarse: str = "adc") -> np.ndarray:
        """The papers' form, for study: ``shortlist`` rows by a coarse distance, then the exact one to their decoding.

        Args:
            coarse: 'adc' (exact query to centroids), 'sdc' (quantised query to centroids) or 'index' (Euclid on the
                codes' numbers, as public code does: numbers have no order, so the shortlist is near to random).

        Returns:
            (n,) float64 squared distances.

        Raises:
            InputError: another ``coarse``, or ``shortlist`` below 1.
        """
        if coarse not in COARSE or shortlist < 1:
            raise InputError(f"two-stage search: coarse {coarse!r}, k = {shortlist}; use one of {COARSE} and k >= 1")
        decoded = self.decode(codes)
        rows = min(shortlist, len(codes))
        if coarse == "adc":
            near, far = queries, decoded
        elif coarse == "sdc":
            near, far = self.decode(self.encode(queries)), decoded
        else:
            near, far = self.encode(queries).astype(np.float32), codes.astype(np.float32)
        result = np.empty(len(queries))
        for part, matrix in pairwise_squared(near, far):
            kept = np.argsort(matrix, axis=1, kind="stable")[:, :rows]
            for i, query in enumerate(queries[part]):
                difference = decoded[kept[i]].astype(np.float64) - query
                result[part.start + i] = (difference * difference).sum(1).min()
        return result


def fit_quantizer(
    bank: np.ndarray,
    subspaces: int,
    bits: int,
    rng: np.random.Generator,
    normal: np.ndarray | None = None,
    group: bool = True,
    iterations: int = ITERATIONS,
    centroids: int | None = None,
) -> ProductQuantizer:
    """Train a quantiser for ``bank``.

    Args:
        bank: (K, D) int8 or float32. The codebooks keep its dtype; int8 centroids are rounded halves away from zero.
        subspaces: M, a divisor of D. bits: 4 or 8.
        rng: draws the training vectors and the seeds.
        normal: (n, D) vectors of all normal features; None trains and judges on the bank alone.
        group: also try channels grouped by covariance.
        centroids: V, at most 2**bits; of a bank with fewer rows the last centroid is repeated, and no code is of a
            repetition. None: 2**bits, or as many as the bank has rows.

    Raises:
        InputError: M does not divide D (the divisors are listed), other bits.
    """
    depth = bank.shape[1]
    check_subspaces(depth, subspaces, bits)
    normal = bank if normal is None else normal
    extra = np.sort(rng.choice(len(normal), min(len(bank), len(normal)), replace=False))
    training = np.concatenate([bank, normal[extra]])
    orders = [np.arange(depth, dtype=np.uint16)]
    if group and 1 < subspaces < depth:
        orders.append(group_channels(covariance(normal), subspaces))
    seed = int(rng.integers(1 << 32))
    different = min(1 << bits if centroids is None else centroids, len(bank))
    fitted = [_train(training, order, subspaces, different, bits, seed, iterations) for order in orders]
    best = min(fitted, key=lambda quantizer: distortion(quantizer, normal))  # of equals the first: as given
    if centroids is None or centroids == different:
        return best
    missing = ((0, 0), (0, centroids - different), (0, 0))
    return replace(best, codebooks=np.pad(best.codebooks, missing, mode="edge"))


def _train(
    vectors: np.ndarray, order: np.ndarray, subspaces: int, centroids: int, bits: int, seed: int, iterations: int
) -> ProductQuantizer:
    def codebook(subspace: int, part: np.ndarray) -> np.ndarray:
        return kmeans(part, centroids, np.random.default_rng([seed, subspace]), iterations)

    parts = np.split(vectors[:, order], subspaces, axis=1)
    with ThreadPoolExecutor(threads()) as pool:  # a generator each, so that no result depends on which comes first
        codebooks = np.stack(list(pool.map(codebook, range(subspaces), parts)))
    if vectors.dtype == np.int8:
        codebooks = round_half_away(codebooks)
    return ProductQuantizer(codebooks.astype(vectors.dtype), order, bits)


def distortion(quantizer: ProductQuantizer, vectors: np.ndarray) -> float:
    """Mean squared distance of (n, D) vectors to their decoding."""
    parts = zip(quantizer._parts(vectors), quantizer.codebooks, strict=True)
    return sum(float(assign(part, book)[1].sum(dtype=np.float64)) for part, book in parts) / len(vectors)


def check_subspaces(depth: int, subspaces: int, bits: int) -> None:
    """Raise InputError unless M divides D and the codes have 4 or 8 bits."""
    if subspaces < 1 or depth % subspaces:
        divisors = [m for m in range(1, depth + 1) if depth % m == 0]
        raise InputError(f"{subspaces} subspaces do not divide an embedding of {depth} values; use one of {divisors}")
    if bits not in BITS:
        raise InputError(f"codes of {bits} bits; use 4 or 8")


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(K, M) uint8 as stored: 8-bit codes as they are, 4-bit ones two a byte, low nibble first, rows on whole bytes."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, 0::2] | even[:, 1::2] << 4


def unpack_codes(packed: np.ndarray, subspaces: int, bits: int) -> np.ndarray:
    """Undo ``pack_codes``: (K, M) uint8."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)[:, :subspaces]
