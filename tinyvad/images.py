"""Images in: decode files, resize and normalise them, the same on the PC and on the device.

Flows in: paths or uint8 arrays. Flows out: uint8 RGB at the network's size, and from it the network's int8 input (by a
768-byte table that the device has too) or float32 input. The resize is integer (``tinyvad.resize``), the tables come
from float64 once, so one image gives one input everywhere. ``find_datasets`` (``tinyvad.layouts``) finds the files.

Files come from anywhere: whatever Pillow trips over becomes one InputError that names the file.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tinyvad.errors import InputError
from tinyvad.layouts import Dataset, Sample, find_datasets, list_images
from tinyvad.resize import MAX_SIDE, resize, resize_mask

__all__ = [
    "Dataset",
    "Preprocessing",
    "Sample",
    "apply_table",
    "find_datasets",
    "frame_to_rgb",
    "input_table",
    "list_images",
    "load_images",
    "read_image",
    "read_mask",
    "resize_mask",
    "rgb_to_frame",
]

MAX_PIXELS = 100_000_000
FRAME_FORMATS = {"rgb888": 3, "rgb565": 2, "grey": 1}  # of a camera: bytes a pixel
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_OPEN_LOCK = threading.Lock()  # warnings.catch_warnings changes a global and is no thread's own before Python 3.14


def read_image(path: str | Path, bit_depth: int = 16) -> np.ndarray:
    """Decode one image file (PNG, JPEG, BMP, TIFF, WebP; of several frames the first) as RGB.

    The EXIF orientation is applied, grey is replicated, transparency is composited over black as
    (value * alpha + 127) // 255, CMYK is converted by Pillow, 16-bit grey is shifted right to 8 bits.

    Args:
        bit_depth: 8 to 16, how many bits of a 16-bit file hold the image: it is shifted by bit_depth - 8 and clipped.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: unreadable, not an image, truncated, float, 16-bit colour with bit_depth below 16, or larger
            than 16384 pixels a side or 100 million in all (seen before it is decoded).
    """
    if not 8 <= bit_depth <= 16:
        raise InputError(f"bit_depth is {bit_depth}, must be 8 to 16")
    image, raw_mode = _decode(path)
    try:
        if image.mode.startswith("I"):
            grey = _sixteen_bits(path, image) >> (bit_depth - 8)
            return np.repeat(np.minimum(grey, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        if bit_depth != 16 and ";16" in raw_mode:
            raise InputError(f"{path}: 16-bit colour is read by its upper 8 bits; set bit_depth 16, not {bit_depth}")
        return _rgb(path, image)
    except (ValueError, OSError) as error:
        raise InputError(f"cannot convert {path} ({image.mode}) to RGB: {_line(error)}; save it as RGB") from error


def read_mask(path: str | Path) -> np.ndarray:
    """Decode one ground-truth mask: any value but 0 is anomalous (MVTec 0/255, VisA class ids); in a JPEG, above 127.

    Returns:
        (H, W) bool.

    Raises:
        InputError: as ``read_image``.
    """
    image, _ = _decode(path)
    try:
        if image.format in ("JPEG", "MPO"):  # lossy: zeros come back as small numbers
            return np.asarray(image.convert("L")) > 127
        values = _sixteen_bits(path, image)[:, :, None] if image.mode.startswith("I") else _rgb(path, image)
        return np.any(values, axis=2)
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read mask {path} ({image.mode}): {_line(error)}; save it as 8-bit grey") from error


def _decode(path: str | Path) -> tuple[Image.Image, str]:
    """The first frame, decoded and upright, and the file's own pixel layout, such as 'RGB;16B'."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for ever
            raise InputError(f"cannot read {path}: it is not a regular file; replace or remove it")
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InputError(f"{path} is empty (0 bytes): replace or remove it")
            with _OPEN_LOCK, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limits follow
                image: Image.Image = Image.open(file, formats=_FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise _too_large(path, f"{width} x {height}")
            raw_mode = str([tile[3] for tile in getattr(image, "tile", [])])
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image, raw_mode
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, "this image") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a {', '.join(_FORMATS)} image: replace or remove it") from error
    except OSError as error:
        if error.errno is not None:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        raise InputError(f"cannot decode {path}: {_line(error)}; replace or remove it") from error
    except Exception as error:  # decoders of broken files raise nearly anything: struct.error, SyntaxError, KeyError
        raise InputError(f"cannot decode {path}: {_line(error)}; replace or remove it") from error


def _too_large(path: str | Path, what: str) -> InputError:
    limit = f"{MAX_SIDE} pixels a side or {MAX_PIXELS:,} in all".replace(",", " ")
    return InputError(f"{path}: {what} is larger than {limit}; scale it down or cut it into tiles")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _sixteen_bits(path: str | Path, image: Image.Image) -> np.ndarray:
    """Integer grey of more than 8 bits as (H, W) uint16 or int32 in 0..65535."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path}: values {values.min()}..{values.max()} are not 16 bits; save it as 8 or 16-bit grey")
    return values


def _rgb(path: str | Path, image: Image.Image) -> np.ndarray:
    """Any mode of at most 8 bits a channel as (H, W, 3) uint8."""
    if image.mode == "F":
        raise InputError(f"{path} holds floats, whose range is unknown: save it as 8 or 16-bit integers")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))  # (H, W, 4) uint8
        products = rgba[:, :, :3] * rgba[:, :, 3:].astype(np.uint16)  # (H, W, 3) uint16, at most 255 * 255
        return ((products + 127) // 255).astype(np.uint8)
    return np.array(image.convert("RGB"))


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network, stored in the build.

    Attributes:
        height, width: the network's input, in pixels; the whole image is resized to it, nothing is cropped.
        mean, std: of the channels, in units of 0..1.
        colour: 'rgb', the order of the channels.
        bit_depth: see ``read_image``.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    colour: str = "rgb"
    bit_depth: int = 16

    def __post_init__(self) -> None:
        for name, low, high in (("height", 1, MAX_SIDE), ("width", 1, MAX_SIDE), ("bit_depth", 8, 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"preprocessing: {name} is {value!r}, must be a whole number from {low} to {high}")
        for name in ("mean", "std"):
            try:
                value = tuple(float(number) for number in getattr(self, name))
            except (TypeError, ValueError):
                value = ()
            if len(value) != 3 or not np.isfinite(value).all() or (name == "std" and min(value) <= 0):
                what = "three numbers above 0" if name == "std" else "three numbers"
                raise InputError(f"preprocessing: {name} is {getattr(self, name)!r}, must be {what}")
            object.__setattr__(self, name, value)
        if self.colour != "rgb":
            raise InputError(f"preprocessing: colour is {self.colour!r}, must be 'rgb'")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        known = [field.name for field in dataclasses.fields(Preprocessing)]
        for name in values:
            if name not in known:
                raise InputError(f"preprocessing: unknown field {name!r}, known are {', '.join(known)}")
        for name in ("height", "width"):
            if name not in values:
                raise InputError(f"preprocessing: field {name!r} is missing")
        return Preprocessing(**values)

    def uint8_input(self, source: str | Path | np.ndarray) -> np.ndarray:
        """An image file, or an array (H, W, 3), (H, W, 1) or (H, W) uint8, at the network's size.

        Returns:
            (height, width, 3) uint8.

        Raises:
            InputError: the file is unreadable, or the array is no such image.
        """
        if not isinstance(source, np.ndarray):
            return resize(read_image(source, self.bit_depth), self.height, self.width)
        image = source[:, :, None] if source.ndim == 2 else source
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
            raise InputError(f"an image array must be (H, W, 3) or (H, W) uint8, not {source.shape} {source.dtype}")
        if image.shape[2] == 1:
            image = np.repeat(image, 3, axis=2)
        return resize(image, self.height, self.width)

    def float_input(self, image: np.ndarray) -> np.ndarray:
        """((p / 255) - mean) / std of a uint8 image (..., 3), worked out in float64, as float32."""
        return apply_table(image, _normalised(self.mean, self.std).astype(np.float32))


def _normalised(mean: npt.ArrayLike, std: npt.ArrayLike) -> np.ndarray:
    """What each pixel value becomes before quantisation, (3, 256) float64."""
    return (np.arange(256) / 255 - np.reshape(mean, (3, 1))) / np.reshape(std, (3, 1))


def input_table(mean: npt.ArrayLike, std: npt.ArrayLike, scale: float, zero_point: int) -> np.ndarray:
    """The network's int8 input for every pixel value: one 768-byte table for PC and device.

    q = clip(round(((p / 255 - mean) / std) / scale) + zero_point, -128, 127) in float64, halves away from zero.

    Args:
        mean, std: (3,) in units of 0..1.
        scale, zero_point: the quantisation of the network's input.

    Returns:
        (3, 256) int8.

    Raises:
        InputError: scale is not a number above 0.
    """
    if not (np.isfinite(scale) and scale > 0):
        raise InputError(f"the input's scale is {scale}, must be above 0")
    real = _normalised(mean, std) / scale  # (3, 256)
    rounded = np.copysign(np.floor(np.abs(real) + 0.5), real)
    return np.clip(rounded + zero_point, -128, 127).astype(np.int8)


def apply_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look every pixel up in its channel's table.

    Args:
        image: (..., 3) uint8.
        table: (3, 256).

    Returns:
        (..., 3) of the table's dtype.
    """
    result = np.empty(image.shape, table.dtype)
    for channel in range(3):
        result[..., channel] = table[channel][image[..., channel]]
    return result


def frame_to_rgb(pixels: bytes | np.ndarray, width: int, height: int, format: str) -> np.ndarray:
    """A camera's frame as RGB, the way the device reads it: 5 and 6 bits widen by repeating their high bits.

    Args:
        pixels: the frame's bytes, rows without a gap. rgb565: little-endian words, red in the high bits.
        format: 'rgb888', 'rgb565' or 'grey'.

    Returns:
        (height, width, 3) uint8.

    Raises:
        InputError: an unknown format, or not width * height pixels of it.
    """
    values = np.frombuffer(np.ascontiguousarray(pixels, np.uint8) if isinstance(pixels, np.ndarray) else pixels, np.uint8)
    wanted = width * height * _pixel_bytes(format)
    if values.size != wanted:
        raise InputError(f"a {width}x{height} frame in {format} is {wanted} bytes, not {values.size}")
    if format == "rgb888":
        return values.reshape(height, width, 3).copy()
    if format == "grey":
        return np.repeat(values.reshape(height, width, 1), 3, axis=2)
    words = values.view("<u2").reshape(height, width)
    red, green, blue = words >> 11, (words >> 5) & 63, words & 31
    wide = [(red << 3) | (red >> 2), (green << 2) | (green >> 4), (blue << 3) | (blue >> 2)]
    return np.stack(wide, axis=2).astype(np.uint8)


def rgb_to_frame(image: np.ndarray, format: str) -> bytes:
    """What a camera with ``format`` would have put in memory: rgb565 keeps the top bits, grey is Pillow's luma (BT.601).

    Args:
        image: (H, W, 3) uint8.
        format: 'rgb888', 'rgb565' or 'grey'.

    Returns:
        H * W pixels as bytes, rows without a gap.

    Raises:
        InputError: an unknown format, or no such image.
    """
    _pixel_bytes(format)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"a frame is made of (H, W, 3) uint8, not {image.shape} {image.dtype}")
    if format == "rgb888":
        return image.tobytes()
    if format == "grey":
        luma = image.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)  # (H, W), the weights' sum is 2^16
        return ((luma + 0x8000) >> 16).astype(np.uint8).tobytes()
    red, green, blue = (image[:, :, channel].astype(np.uint16) for channel in range(3))
    return ((red >> 3 << 11) | (green >> 2 << 5) | (blue >> 3)).astype("<u2").tobytes()


def _pixel_bytes(format: str) -> int:
    if format not in FRAME_FORMATS:
        raise InputError(f"frame format {format!r} is unknown; there are {', '.join(FRAME_FORMATS)}")
    return FRAME_FORMATS[format]


def load_images(
    paths: Iterable[str | Path],
    preprocessing: Preprocessing,
    on_error: str = "stop",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    skipped: list[tuple[Path, str]] | None = None,
) -> Iterator[tuple[Path, np.ndarray]]:
    """Stream image files in their order, decoded and resized by a few threads a little ahead of the reader.

    At most ``workers`` images are decoded at full size at one time, and at most 16 wait at the network's size.

    Args:
        on_error: 'stop' at the first unreadable file, or 'skip' it: file and reason are appended to ``skipped``.
        workers: threads, 1 to 16.
        progress: called with (files done, files in all) after each file.
        skipped: a list, needed with 'skip', so that nothing is left out unseen.

    Yields:
        (path, (height, width, 3) uint8).

    Raises:
        InputError: a file is unreadable ('stop'), all are ('skip'), or an argument is wrong (at once).
    """
    if on_error not in ("stop", "skip"):
        raise InputError(f"on_error is {on_error!r}, must be 'stop' or 'skip'")
    if on_error == "skip" and skipped is None:
        raise InputError("on_error='skip' needs a list `skipped` for the files that are left out")
    if not 1 <= workers <= 16:
        raise InputError(f"workers is {workers}, must be 1 to 16")
    left_out = skipped if on_error == "skip" else None
    return _load([Path(path) for path in paths], preprocessing, workers, progress, left_out)


def _load(
    paths: list[Path],
    preprocessing: Preprocessing,
    workers: int,
    progress: Callable[[int, int], None] | None,
    skipped: list[tuple[Path, str]] | None,
) -> Iterator[tuple[Path, np.ndarray]]:
    pending: deque[Future[np.ndarray]] = deque()
    loaded = 0
    reason = ""
    pool = ThreadPoolExecutor(workers)
    try:
        for index, path in enumerate(paths):
            for ahead in paths[index + len(pending) : index + min(16, 2 * workers)]:
                pending.append(pool.submit(preprocessing.uint8_input, ahead))
            try:
                image = pending.popleft().result()
            except InputError as error:
                if skipped is None:
                    raise InputError(f"{error} (or leave unreadable images out with --on-error skip)") from error
                reason = reason or str(error)
                skipped.append((path, str(error)))
            else:
                loaded += 1
                yield path, image
            if progress:
                progress(index + 1, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)
    if paths and not loaded:
        raise InputError(f"none of the {len(paths)} images can be read, the first because: {reason}")
