"""How a replay memory stores maps: float32 in, fewer bytes out, and float32 again.

Flows in: (n, H, W, C) float32 maps of one task. Flows out: ``Encoded``: a row an item, and tables that all items of the
task share, which ``decode`` turns into maps.

=================== ==================== ===============================================================================
form                bytes a map          what it does
=================== ==================== ===============================================================================
image               H W C                uint8 images as they are
float32             4 H W C              the maps as they are, bit for bit
float16             2 H W C
int8                H W C                256 even levels a channel, from its lowest to its highest value in the task
int8-map            H W C + 8            the thesis: 256 even levels a map, all channels alike
int4                H W ceil(C / 2)      16 levels a channel, placed by Lloyd's method
rotated-4, -3, -2   H W ceil(b C / 8)    channels rotated to their principal axes, b bits an axis on average, more for those
                                         that vary more, levels placed by Lloyd's method
pca-95, -98, -99    4 (H W r + r C + C)  the thesis: PCA of each map, r the fewest axes that keep the share of the variance
pca-int8            H W r                one PCA a task that keeps 99 %, 256 even levels an axis
pq                  H W C / 2            product quantisation, 8 bits a pair of channels (one channel where C is odd)
=================== ==================== ===============================================================================

The trunk's last layer is linear, so that channels differ in range and depend on each other: one range for all channels
wastes bits, and axes of different variance want different numbers of them. Measured on maps of six products: see
``benchmarks/results/replay_forms.md``.

Source: int8-map and pca are the thesis' compressed replay; rotation and bits by variance are transform coding (Goyal 2001,
Theoretical foundations of transform coding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from tinyvad.continual import replay_levels as levels
from tinyvad.detectors.product_quantizer import ProductQuantizer, fit_quantizer
from tinyvad.errors import InputError
from tinyvad.training.network import Arrays

PQ_ROWS = 8192  # vectors that train codebooks


@dataclass(frozen=True, eq=False)
class Encoded:
    """Stored maps of n items.

    Attributes:
        rows: (n, ...) arrays, a row an item. shared: what all of the task's items are decoded with.
    """

    rows: Arrays
    shared: Arrays

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.rows.values(), *self.shared.values()))

    def take(self, indices: np.ndarray) -> Encoded:
        """Some of the items."""
        return Encoded({name: array[indices] for name, array in self.rows.items()}, self.shared)

    def arrays(self) -> Arrays:
        """'rows/<name>' and 'shared/<name>'."""
        parts = {"rows": self.rows, "shared": self.shared}
        return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    @staticmethod
    def of_arrays(arrays: Arrays) -> Encoded:
        """The inverse of ``arrays``."""
        parts: dict[str, Arrays] = {"rows": {}, "shared": {}}
        for key, array in arrays.items():
            part, name = key.split("/")
            parts[part][name] = array
        return Encoded(**parts)


class Form(NamedTuple):
    """One way to store maps.

    Attributes:
        encode: (maps, rng) -> Encoded. decode: the inverse, as well as it can.
        position_bytes: C -> bytes a position of a map; None where they depend on the maps. map_bytes: beside that.
    """

    encode: Callable[[np.ndarray, np.random.Generator], Encoded]
    decode: Callable[[Encoded], np.ndarray]
    position_bytes: Callable[[int], int] | None
    map_bytes: int = 0


def encode(form: str, maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    """Store the maps of one task; they are copied.

    Args:
        form: one of ``FORMS``. maps: (n, H, W, C) float32, n > 0; uint8 for 'image'. rng: seeds codebooks.

    Raises:
        InputError: maps of another kind, values that are not finite, or too large for float16.
    """
    wanted = np.uint8 if form == "image" else np.float32
    if maps.ndim != 4 or maps.dtype != wanted or not maps.size:
        raise InputError(
            f"replay memory: {form} stores (n, H, W, C) {np.dtype(wanted)}, not {maps.shape} {maps.dtype}"
        )
    if not np.isfinite(maps).all():
        raise InputError("replay memory: maps hold values that are not finite; check the images and the weights")
    with _blas().limit(limits=1, user_api="blas"):  # the same bytes on any number of cores
        return FORMS[form].encode(maps, rng)


def decode(form: str, encoded: Encoded) -> np.ndarray:
    """(n, H, W, C) float32 maps; uint8 images of 'image'."""
    with _blas().limit(limits=1, user_api="blas"):
        return FORMS[form].decode(encoded)


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # finding the libraries takes milliseconds: once


def row_bytes(form: str, shape: Sequence[int]) -> int | None:
    """Bytes of one stored map (H, W, C), without what its task shares; None where they depend on the maps."""
    position = FORMS[form].position_bytes
    return None if position is None else shape[0] * shape[1] * position(shape[2]) + FORMS[form].map_bytes


def _encode_plain(maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    return Encoded({"values": maps.copy(order="C")}, {})


def _decode_plain(encoded: Encoded) -> np.ndarray:
    return encoded.rows["values"].copy()


def _encode_half(maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    largest, limit = np.abs(maps).max(), np.finfo(np.float16).max
    if largest > limit:
        raise InputError(f"replay memory: a map holds {largest:g}, float16 ends at {limit:g}; use form float32 or int8")
    return Encoded({"values": maps.astype(np.float16)}, {})


def _decode_half(encoded: Encoded) -> np.ndarray:
    return encoded.rows["values"].astype(np.float32)


def _encode_int8(maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    low, step = levels.even_range(maps, (0, 1, 2))  # (C,) each
    return Encoded({"codes": levels.even_codes(maps, low, step)}, {"low": low, "step": step})


def _decode_int8(encoded: Encoded) -> np.ndarray:
    return levels.even_values(encoded.rows["codes"], encoded.shared["low"], encoded.shared["step"])


def _encode_int8_map(maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    low, step = (part[:, None, None, None] for part in levels.even_range(maps, (1, 2, 3)))  # (n, 1, 1, 1) each
    ranges = np.stack([low.ravel(), step.ravel()], axis=1)  # (n, 2)
    return Encoded({"codes": levels.even_codes(maps, low, step), "range": ranges}, {})


def _decode_int8_map(encoded: Encoded) -> np.ndarray:
    low, step = (part[:, None, None, None] for part in encoded.rows["range"].T)
    return levels.even_values(encoded.rows["codes"], low, step)


def _encode_int4(maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    flat = maps.reshape(-1, maps.shape[3])  # (N, C)
    low, step = levels.even_range(flat, 0)
    scaled = (flat.astype(np.float64) - low) / step  # 0 to 255, which float16 holds
    tables = [levels.lloyd_levels(np.sort(column), 16) for column in scaled.T]
    codes = np.stack([levels.nearest_levels(*pair) for pair in zip(scaled.T, tables, strict=True)], axis=1)  # (N, C)
    packed = levels.pack_bits(codes, [4] * len(tables))
    return Encoded({"codes": _as_maps(packed, maps)}, {"low": low, "step": step, "levels": np.stack(tables)})


def _decode_int4(encoded: Encoded) -> np.ndarray:
    packed, tables = encoded.rows["codes"], encoded.shared["levels"].astype(np.float64)  # (C, 16)
    codes = levels.unpack_bits(packed.reshape(-1, packed.shape[3]), [4] * len(tables))  # (N, C)
    values = tables[np.arange(len(tables)), codes] * encoded.shared["step"] + encoded.shared["low"]
    return _as_maps(values.astype(np.float32), packed)


def _encode_rotated(maps: np.ndarray, rng: np.random.Generator, bits: int) -> Encoded:
    mean, axes, _ = _principal(maps.reshape(-1, maps.shape[3]))
    axes = axes.astype(np.float16)  # (C, C), an axis a row
    scores = (maps.reshape(-1, maps.shape[3]) - mean.astype(np.float64)) @ axes.T.astype(np.float64)  # (N, C)
    sizes = scores.std(0).astype(np.float32)  # (C,)
    sizes = np.where(sizes > 0, sizes, np.float32(1))
    scores /= sizes
    tables = levels.allocate(scores, sizes, 8 * _bytes_of(bits, maps.shape[3]))
    widths = [len(table).bit_length() - 1 for table in tables]
    codes = np.stack([levels.nearest_levels(*pair) for pair in zip(scores.T, tables, strict=True)], axis=1)  # (N, C)
    packed = _as_maps(levels.pack_bits(codes, widths), maps)
    shared = {"mean": mean, "axes": axes, "sizes": sizes, "bits": np.array(widths, np.uint8)}
    return Encoded({"codes": packed}, {**shared, "levels": np.concatenate(tables)})


def _decode_rotated(encoded: Encoded) -> np.ndarray:
    packed, shared = encoded.rows["codes"], encoded.shared
    widths = shared["bits"].tolist()
    codes = levels.unpack_bits(packed.reshape(-1, packed.shape[3]), widths)  # (N, C)
    starts = np.concatenate([[0], np.cumsum(1 << shared["bits"].astype(int))])[:-1]  # of each axis' levels
    scores = shared["levels"].astype(np.float64)[codes + starts] * shared["sizes"]
    maps = scores @ shared["axes"].astype(np.float64) + shared["mean"]
    return _as_maps(maps.astype(np.float32), packed)


def _encode_pca(maps: np.ndarray, rng: np.random.Generator, keep: float) -> Encoded:
    """r is the task's, the fewest that keep enough of every map, so that all its maps have one size."""
    n, height, width, channels = maps.shape
    parts = [_principal(one.reshape(-1, channels)) for one in maps]
    kept = max(_fewest(variances, keep) for _, _, variances in parts)
    means = np.stack([mean for mean, _, _ in parts])  # (n, C)
    axes = np.stack([found[:kept] for _, found, _ in parts]).astype(np.float32)  # (n, r, C)
    centred = maps.reshape(n, height * width, channels) - means[:, None].astype(np.float64)
    scores = (centred @ axes.transpose(0, 2, 1)).astype(np.float32).reshape(n, height, width, kept)
    return Encoded({"scores": scores, "axes": axes, "mean": means}, {})


def _decode_pca(encoded: Encoded) -> np.ndarray:
    scores, axes, means = (encoded.rows[name].astype(np.float64) for name in ("scores", "axes", "mean"))
    n, height, width, kept = scores.shape
    maps = scores.reshape(n, height * width, kept) @ axes + means[:, None]
    return maps.astype(np.float32).reshape(n, height, width, axes.shape[2])


def _encode_pca_int8(maps: np.ndarray, rng: np.random.Generator, keep: float) -> Encoded:
    mean, axes, variances = _principal(maps.reshape(-1, maps.shape[3]))
    axes = axes[: _fewest(variances, keep)].astype(np.float32)  # (r, C)
    scores = ((maps - mean.astype(np.float64)) @ axes.T).astype(np.float32)
    encoded = _encode_int8(scores, rng)
    return Encoded(encoded.rows, {**encoded.shared, "mean": mean, "axes": axes})


def _decode_pca_int8(encoded: Encoded) -> np.ndarray:
    scores = _decode_int8(encoded).astype(np.float64)
    return (scores @ encoded.shared["axes"] + encoded.shared["mean"]).astype(np.float32)


def _encode_pq(maps: np.ndarray, rng: np.random.Generator) -> Encoded:
    channels = maps.shape[3]
    flat = maps.reshape(-1, channels)
    training = flat[np.sort(rng.permutation(len(flat))[:PQ_ROWS])]
    quantizer = fit_quantizer(training, _pairs(channels), 8, rng)
    shared = {"codebooks": quantizer.codebooks, "indices": quantizer.indices}
    return Encoded({"codes": _as_maps(quantizer.encode(flat), maps)}, shared)


def _decode_pq(encoded: Encoded) -> np.ndarray:
    codes = encoded.rows["codes"]
    quantizer = ProductQuantizer(encoded.shared["codebooks"], encoded.shared["indices"], 8)
    return _as_maps(quantizer.decode(codes.reshape(-1, codes.shape[3])), codes)


def _as_maps(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(N, k) rows at the positions of (n, H, W, any) maps."""
    return rows.reshape(*like.shape[:3], rows.shape[1])


def _principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (C,) float32 of (N, C) rows, principal axes (C, C) and the sums of squares on them (C,), float64, descending.

    The sign of an axis makes its largest entry positive.
    """
    mean = rows.mean(0, dtype=np.float64).astype(np.float32)
    centred = rows - mean.astype(np.float64)
    squares, axes = np.linalg.eigh(centred.T @ centred)
    squares, axes = np.maximum(squares[::-1], 0), axes.T[::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], axis=1)  # (C, 1)
    return mean, axes * np.sign(largest), squares


def _fewest(squares: np.ndarray, keep: float) -> int:
    """The fewest axes, at least one, that keep the share ``keep`` of the sum."""
    dropped = np.concatenate([np.cumsum(squares[::-1])[::-1][1:], [0.0]])  # behind the first 1, 2, ... axes
    return int((dropped <= (1 - keep) * squares.sum()).argmax()) + 1


def _bytes_of(bits: int, channels: int) -> int:
    """Bytes of a position."""
    return -(-bits * channels // 8)


def _pairs(channels: int) -> int:
    """Subspaces of two channels; of one where they are odd."""
    return channels // 2 if channels % 2 == 0 else channels


def _rotated(bits: int) -> Form:
    return Form(partial(_encode_rotated, bits=bits), _decode_rotated, partial(_bytes_of, bits))


FORMS: dict[str, Form] = {
    "image": Form(_encode_plain, _decode_plain, lambda channels: channels),
    "float32": Form(_encode_plain, _decode_plain, lambda channels: 4 * channels),
    "float16": Form(_encode_half, _decode_half, lambda channels: 2 * channels),
    "int8": Form(_encode_int8, _decode_int8, lambda channels: channels),
    "int8-map": Form(_encode_int8_map, _decode_int8_map, lambda channels: channels, 8),
    "int4": Form(_encode_int4, _decode_int4, partial(_bytes_of, 4)),
    "rotated-4": _rotated(4),
    "rotated-3": _rotated(3),
    "rotated-2": _rotated(2),
    "pca-95": Form(partial(_encode_pca, keep=0.95), _decode_pca, None),
    "pca-98": Form(partial(_encode_pca, keep=0.98), _decode_pca, None),
    "pca-99": Form(partial(_encode_pca, keep=0.99), _decode_pca, None),
    "pca-int8": Form(partial(_encode_pca_int8, keep=0.99), _decode_pca_int8, None),
    "pq": Form(_encode_pq, _decode_pq, _pairs),
}
