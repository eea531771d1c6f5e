"""The integer scorers of the PatchCore family: squared distance to the nearest vector of a memory bank.

Flows in: int8 embeddings (n, H, W, D), one step for all channels. Flows out: (n, H, W) uint32 squared distances in units
of the grid, exact; real distance = sqrt(value) * unit. C computes the same integers (docs/SPEC.md, kinds CORE and PQPC).

Both kinds share ``CFG ``, int32 (4,): rows K, embedding length D, subspaces M, bits of a code; and ``SCAL``, float64 (1,):
``unit``, for people, the device has no use for it.

* ``CORE``: M = 0, bits = 8. ``BANK`` int8 (K, D), greedy order. value = min_k sum_d (x_d - BANK[k, d])**2.
* ``PQPC``: ``INDX`` uint16 (D,) permutation, ``CBK `` int8 (M, V, D / M), V <= 2**bits, ``CODE`` uint8 (K, M), or
  (K, ceil(M / 2)) with 4-bit codes, the low nibble first; each task of a bank has its own of all three.
  With y = x[INDX] cut into M sub-vectors y_j: T[j, v] = ||y_j - CBK[j, v]||**2 and
  value = min_k sum_j T[j, CODE[k, j]], in 32 bits: at most D * 255**2.

A bank cut off after its first rows is itself the greedy bank of that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinyvad.detectors.coreset import MAX_DEPTH
from tinyvad.detectors.distances import nearest
from tinyvad.detectors.product_quantizer import BITS, ProductQuantizer, pack_codes, unpack_codes
from tinyvad.detectors.sections import positive_unit, take_section
from tinyvad.embedding import align
from tinyvad.errors import CheckFailed, InputError

SHARED_BYTES = 4 * 4 + 8  # CFG and SCAL
FINE_ROWS = 4096  # rows that a bank should have before its codes get finer
COARSE_ROWS = 1024  # rows below which an 8-bit codebook is too dear
WIDEST = 20  # channels a subspace of 8 bits, at most


@dataclass(eq=False)
class PatchCoreScorer:
    """``bank`` (K, D) int8; ``unit``: real distance of one step of the embedding's grid."""

    bank: np.ndarray
    unit: float = 1.0
    kind = "CORE"
    root, sigma = True, 4.0
    required = ("CFG ", "BANK")

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32."""
        squared, _ = nearest(_queries(embeddings, self.bank.shape[1]), self.bank)
        return squared.astype(np.uint32).reshape(embeddings.shape[:3])

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of one image."""
        return grid[0] * grid[1] * self.bank.size

    def scratch_bytes(self) -> int:
        """Scratch of the runtime: one cell's vector, int16."""
        return align(2 * self.bank.shape[1])

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections, in file order."""
        config = np.array([*self.bank.shape, 0, 8], np.int32)
        return {"CFG ": config, "SCAL": np.array([self.unit]), "BANK": self.bank}

    @classmethod
    def from_sections(cls, sections: Mapping[str, np.ndarray], depth: int) -> PatchCoreScorer:
        """Rebuild from a bank's sections, for embeddings of ``depth`` values.

        Raises:
            InputError: a section is missing or has another shape, dtype or range than the kind needs.
        """
        rows, _, subspaces, bits = _config(sections, depth)
        if (subspaces, bits) != (0, 8):
            raise InputError(f"bank section CFG : {subspaces} subspaces, {bits} bits; a CORE bank has 0 and 8")
        return cls(take_section(sections, "BANK", (rows, depth), "int8"), positive_unit(sections))


@dataclass(eq=False)
class PatchCoreLiteScorer:
    """``quantizer`` with int8 codebooks, ``codes`` (K, M) uint8; ``unit``: real distance of one step of the grid."""

    quantizer: ProductQuantizer
    codes: np.ndarray
    unit: float = 1.0
    kind = "PQPC"
    root, sigma = True, 4.0
    required = ("CFG ", "INDX", "CBK ", "CODE")

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, H, W, D) int8 -> (n, H, W) uint32: exact distances to the decoded vectors."""
        queries = _queries(embeddings, len(self.quantizer.indices))
        return self.quantizer.search(queries, self.codes).reshape(embeddings.shape[:3])

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the tables and additions of the search, one image."""
        return grid[0] * grid[1] * (self.quantizer.codebooks.size + self.codes.size)

    def scratch_bytes(self) -> int:
        """Scratch of the runtime: int16 values of one subspace, tables of M * V uint32, what M subspaces add at least."""
        subspaces, centroids, width = self.quantizer.codebooks.shape
        return align(2 * align(width, 4)) + align(4 * subspaces * centroids) + align(4 * (subspaces + 1))

    def sections(self) -> dict[str, np.ndarray]:
        """Bank sections, in file order."""
        q = self.quantizer
        return {
            "CFG ": np.array([len(self.codes), len(q.indices), len(q.codebooks), q.bits], np.int32),
            "SCAL": np.array([self.unit]),
            "INDX": q.indices,
            "CBK ": q.codebooks,
            "CODE": pack_codes(self.codes, q.bits),
        }

    @classmethod
    def from_sections(cls, sections: Mapping[str, np.ndarray], depth: int) -> PatchCoreLiteScorer:
        """Rebuild from a bank's sections, for embeddings of ``depth`` values.

        Raises:
            InputError: a section is missing or has another shape, dtype or range than the kind needs.
        """
        rows, _, subspaces, bits = _config(sections, depth)
        if subspaces < 1 or depth % subspaces or bits not in BITS:
            raise InputError(f"bank section CFG : {subspaces} subspaces of {depth} values, {bits} bits: not a PQPC bank")
        indices = take_section(sections, "INDX", (depth,), "uint16")
        if not np.array_equal(np.sort(indices), np.arange(depth)):
            raise InputError(f"bank section INDX: not a permutation of 0..{depth - 1}; build the bank again")
        found = sections.get("CBK ")
        centroids = found.shape[1] if found is not None and found.ndim == 3 else 0
        codebooks = take_section(sections, "CBK ", (subspaces, centroids, depth // subspaces), "int8")
        if not 1 <= centroids <= 1 << bits:
            raise InputError(f"bank section CBK : {centroids} centroids, codes of {bits} bits; build the bank again")
        packed = take_section(sections, "CODE", (rows, (subspaces * bits + 7) // 8), "uint8")
        codes = unpack_codes(packed, subspaces, bits)
        if codes.max() >= centroids:
            raise InputError(f"bank section CODE: code {codes.max()} of {centroids} centroids; build the bank again")
        return cls(ProductQuantizer(codebooks, indices, bits), codes, positive_unit(sections))


def bank_bytes(rows: int, depth: int, subspaces: int, bits: int) -> int:
    """Bytes of a Lite bank's CODE and CBK: K * ceil(M b / 8) + V D, V = min(2**b, K)."""
    return rows * ((subspaces * bits + 7) // 8) + min(1 << bits, rows) * depth


def core_size_for_budget(limit: int, depth: int) -> int:
    """Rows K of the largest plain bank whose sections take at most ``limit`` bytes.

    Raises:
        CheckFailed: not one row fits.
    """
    rows = (limit - SHARED_BYTES) // depth
    if rows < 1:
        need = SHARED_BYTES + depth
        raise CheckFailed(f"bank limit {limit} B: the smallest bank of {depth} values needs {need} B; raise --bank-bytes")
    return rows


def lite_size_for_budget(
    limit: int, depth: int, most_rows: int = 50_000, tasks: int = 1
) -> tuple[int, int, int]:
    """(K, M, bits) of a Lite bank whose sections take at most ``limit`` bytes, K as large as then fits.

    The rule: 8-bit codes, as fine (many subspaces) as leaves 4,096 rows; if nothing does, the coarsest, of up to 20
    channels a subspace, if it leaves 1,024; else 4-bit codes of two channels. Chosen by the distances of held-out normal
    images to banks of 16 to 128 KB (four products, MCUNet, 80 channels).

    Args:
        tasks: products with codebooks of their own: the rule holds for each one's part of the bytes, but no product needs
            more rows than its part of ``most_rows``, and where 8-bit codebooks would take more than half of the bytes
            the codes have 4 bits (six products in 256 KB: mean image AUROC 0.950 against 0.946). K is of all.

    Raises:
        CheckFailed: fewer than 16 rows a product fit.
    """
    room = (limit - SHARED_BYTES) // tasks - 2 * depth  # of one product
    widths = [width for width in range(2, min(WIDEST, depth) + 1) if depth % width == 0] or [1]
    for width in widths if tasks == 1 or room >= 2 * 256 * depth else ():
        rows = (room - 256 * depth) // (depth // width)
        if rows >= min(FINE_ROWS, most_rows // tasks) or (width == widths[-1] and rows >= COARSE_ROWS):
            return min(rows * tasks, most_rows), depth // width, 8
    subspaces = depth // 2 if depth % 2 == 0 else depth
    row_bytes = (subspaces + 1) // 2
    rows = (room - 16 * depth) // row_bytes
    if rows < 16:
        need = SHARED_BYTES + tasks * (2 * depth + 16 * depth + 16 * row_bytes)
        what = "a Lite bank" if tasks == 1 else f"a Lite bank of {tasks} products"
        raise CheckFailed(f"bank limit {limit} B: {what} of {depth} values needs {need} B; raise --bank-bytes")
    return min(rows * tasks, most_rows), subspaces, 4


def _queries(embeddings: np.ndarray, depth: int) -> np.ndarray:
    """(n, H, W, D) int8 -> (n * H * W, D)."""
    if embeddings.dtype != np.int8:
        raise InputError(f"the integer scorer takes int8 embeddings, not {embeddings.dtype}")
    if embeddings.ndim != 4 or embeddings.shape[3] != depth:
        raise InputError(f"embeddings of shape {embeddings.shape}; the bank needs (n, H, W, {depth})")
    return embeddings.reshape(-1, depth)


def _config(sections: Mapping[str, np.ndarray], depth: int) -> tuple[int, int, int, int]:
    rows, stored_depth, subspaces, bits = (int(v) for v in take_section(sections, "CFG ", (4,), "int32"))
    if rows < 1 or stored_depth != depth or depth > MAX_DEPTH:
        raise InputError(f"bank section CFG : {rows} rows of {stored_depth} values do not go with embeddings of {depth}")
    return rows, stored_depth, subspaces, bits
