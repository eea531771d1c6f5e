"""Heat maps: a photo, its anomaly map and its masks in, pictures with outlines out.

One scale for all pictures of a report, 0 to ``scale_limit``: a colour means the same distance everywhere, so a faint
picture is a normal part and not a rescaled one. The map is drawn over the photo in grey, to keep the hues readable.

Colours: 'magma' of matplotlib (van der Walt and Smith, dedicated to the public domain as CC0), sampled at 16 points;
its lightness rises evenly, so that it reads the same with any colour vision and in grey.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyvad.errors import InputError
from tinyvad.files import write_bytes

MAGMA = (
    "000004", "0b0924", "20114b", "3b0f70", "57157e", "721f81", "8c2981", "a8327d",
    "c43c75", "de4968", "f1605d", "fa7f5e", "fe9f6d", "febf84", "fddea0", "fcfdbf",
)  # fmt: skip
FOUND = (63, 224, 255)  # outline of what the detector found
MARKED = (255, 226, 64)  # outline of what a person marked
HALO = (10, 12, 16)  # one pixel around an outline, to set it off from any photo
STRENGTH = 0.72  # share of the heat map's colour in a blended pixel
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

_POINTS = np.array([list(bytes.fromhex(point)) for point in MAGMA], np.float64)  # (16, 3)
_COLOURS = np.stack(
    [np.interp(np.linspace(0, 15, 256), np.arange(16), _POINTS[:, channel]) for channel in range(3)], axis=1
)  # (256, 3)


@dataclass(frozen=True, eq=False)
class Case:
    """One image of a report with what the detector said of it.

    Attributes:
        image: (S, S, 3) uint8, what the network saw.
        anomaly_map: (S, S) float32, higher is more anomalous.
        mask: (S, S) bool, marked by hand; None if nobody marked it.
        pred_score, pred_label: the verdict, 1 anomalous.
        label: 0 good, 1 defect, None unknown.
        defect: the defect's name, or 'good'.
        image_path: shown as text.
        pred_mask: (S, S) bool, what was found; None takes the map at or above the threshold.
    """

    image: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray | None
    pred_score: float
    pred_label: int
    label: int | None
    defect: str
    image_path: str
    pred_mask: np.ndarray | None = None


def colour(values: np.ndarray, limit: float) -> np.ndarray:
    """(...) distances -> (..., 3) uint8 colours; 0 and below is black, ``limit`` and above the palest."""
    index = np.rint(np.clip(np.asarray(values, np.float64) / limit, 0, 1) * 255).astype(np.intp)
    return np.rint(_COLOURS[index]).astype(np.uint8)


def scale_limit(threshold: float | None, maps: Iterable[np.ndarray]) -> float:
    """The upper end of a report's one scale: max(2 * threshold, 99th percentile of all pixels), above 0."""
    pixels = [np.asarray(values, np.float64).ravel() for values in maps]
    high = float(np.percentile(np.concatenate(pixels), 99)) if pixels else 0.0
    limit = max(2 * (threshold or 0.0), high)
    return limit if limit > 0 else 1.0


def outline(mask: np.ndarray, width: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The rim of a mask: ``width`` pixels inside it, and one pixel outside for a halo; both (H, W) bool.

    The picture's border counts as outside, so that the outline of a region that touches it is closed.
    """
    inner = mask
    for _ in range(width):
        inner = _erode(inner)
    return mask & ~inner, ~_erode(~mask, beyond=True) & ~mask


def overlay(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    limit: float,
    pred_mask: np.ndarray | None = None,
) -> Image.Image:
    """The heat map over the photo in grey, with an outline around what was found.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W), higher is more anomalous.
        threshold: where the outline runs, on the scale of the map; None draws none unless ``pred_mask`` is given.
        limit: the map's value that gets the palest colour, > 0 (see ``scale_limit``).
        pred_mask: (H, W) bool to outline instead of ``anomaly_map >= threshold``.

    Returns:
        (H, W) RGB picture.

    Raises:
        InputError: sizes differ, the map holds NaN, the limit is not above 0.
    """
    _check(image, anomaly_map, limit, pred_mask)
    grey = image.astype(np.float64) @ (0.299, 0.587, 0.114)  # (H, W) luma of BT.601
    blended = (1 - STRENGTH) * grey[:, :, None] + STRENGTH * colour(anomaly_map, limit)
    pixels = np.rint(blended).astype(np.uint8)
    return Image.fromarray(_draw(pixels, _found(anomaly_map, threshold, pred_mask), FOUND))


def save_overlay(
    path: str | Path,
    image: np.ndarray,
    anomaly_map: np.ndarray,
    threshold: float | None,
    limit: float,
    pred_mask: np.ndarray | None = None,
) -> None:
    """Write the photo and its ``overlay`` side by side; arguments as there.

    Raises:
        InputError: as ``overlay``; the name ends in none of .png .jpg .jpeg .webp; the file can't be written.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(f"{path}: a picture's name must end in one of {' '.join(FORMATS)}")
    heat = overlay(image, anomaly_map, threshold, limit, pred_mask)
    gap = max(2, heat.width // 56)
    both = Image.new("RGB", (2 * heat.width + gap, heat.height), "white")
    both.paste(Image.fromarray(image), (0, 0))
    both.paste(heat, (heat.width + gap, 0))
    write_bytes(path, _encode(both, kind, 90))


def panels(case: Case, threshold: float | None, limit: float, side: int) -> list[Image.Image]:
    """Photo, overlay and, if the case is marked, both outlines; at most ``side`` pixels long, small ones enlarged."""
    _check(case.image, case.anomaly_map, limit, case.mask, case.pred_mask)
    height, width = case.anomaly_map.shape
    factor = side / max(height, width)
    factor = min(factor, 1.0) if factor < 2 else float(int(factor))  # enlarged by whole pixels only
    scaled = (max(1, round(width * factor)), max(1, round(height * factor)))
    smooth = Image.Resampling.BICUBIC if factor < 1 else Image.Resampling.NEAREST

    def mask(values: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(values.astype(np.uint8)).resize(scaled, Image.Resampling.NEAREST)) > 0

    photo = np.asarray(Image.fromarray(case.image).resize(scaled, smooth))
    heat = np.asarray(
        Image.fromarray(case.anomaly_map.astype(np.float32)).resize(scaled, Image.Resampling.BILINEAR)
    )
    found = mask(_found(case.anomaly_map, threshold, case.pred_mask))
    pictures = [Image.fromarray(photo), overlay(photo, heat, threshold, limit, found)]
    if case.mask is not None and case.mask.any():
        pictures.append(Image.fromarray(_draw(_draw(photo, found, FOUND), mask(case.mask), MARKED)))
    return pictures


def encode_cases(cases: Sequence[Case], threshold: float | None, limit: float, nbytes: int) -> list[list[str]]:
    """``panels`` of each case as JPEG data URIs, as large and as fine as fits ``nbytes`` in all.

    The smallest size is taken even if it does not fit.
    """
    uris: list[list[str]] = []
    for side, quality in ((448, 88), (320, 85), (224, 82), (160, 75), (112, 65)):
        uris = [[data_uri(picture, quality) for picture in panels(case, threshold, limit, side)] for case in cases]
        if sum(len(uri) for row in uris for uri in row) <= nbytes:
            break
    return uris


def data_uri(picture: Image.Image, quality: int = 85) -> str:
    """A picture as a JPEG data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(_encode(picture, "JPEG", quality)).decode("ascii")


def _encode(picture: Image.Image, kind: str, quality: int) -> bytes:
    # full-resolution colour in JPEG, since outlines are thin and bright
    options: dict[str, dict[str, Any]] = {
        "PNG": {"optimize": True},
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality},
    }
    file = io.BytesIO()
    picture.save(file, kind, **options[kind])
    return file.getvalue()


def _found(anomaly_map: np.ndarray, threshold: float | None, pred_mask: np.ndarray | None) -> np.ndarray:
    if pred_mask is not None:
        return np.asarray(pred_mask, bool)
    if threshold is None:
        return np.zeros(anomaly_map.shape, bool)
    return np.asarray(anomaly_map >= threshold)


def _erode(mask: np.ndarray, beyond: bool = False) -> np.ndarray:
    """Pixels whose four neighbours are all in the mask; ``beyond`` says whether those outside the picture are."""
    padded = np.pad(mask, 1, constant_values=beyond)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _draw(pixels: np.ndarray, mask: np.ndarray, line_colour: tuple[int, int, int]) -> np.ndarray:
    """A copy of (H, W, 3) pixels with the mask's outline, thicker on larger pictures."""
    line, halo = outline(mask, max(1, round(min(mask.shape) / 112)))
    drawn = pixels.copy()
    drawn[halo] = HALO
    drawn[line] = line_colour
    return drawn


def _check(image: np.ndarray, anomaly_map: np.ndarray, limit: float, *masks: np.ndarray | None) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"a picture needs (H, W, 3) uint8, has {image.shape} {image.dtype}")
    for name, array in [("anomaly map", anomaly_map), *(("mask", mask) for mask in masks if mask is not None)]:
        if array.shape != image.shape[:2]:
            raise InputError(f"{name} {array.shape} and picture {image.shape[:2]} must be of one size")
    if np.isnan(anomaly_map).any():
        raise InputError("the anomaly map holds NaN: a picture needs a number for every pixel")
    if not limit > 0:
        raise InputError(f"the scale's limit {limit} must be above 0")
