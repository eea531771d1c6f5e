"""How one product's pictures change over time: light, colour, focus, camera, compression, each with a strength.

Flows in: an image (H, W, 3) uint8, or its mask (H, W) bool. Flows out: the same shape and dtype. Strength 0 changes
nothing, not one bit; the same image, step and seed always give the same result. Geometry moves masks alike; what comes in
from outside the picture is its mirror image, defects and their mask included.

============ ======= ==========================================================================================
name         range   what strength s does
============ ======= ==========================================================================================
brightness   -1..1   adds 128 s levels
contrast     -1..1   the distance from level 128 times 1 + s
colour       -1..1   red times 1 + s/2, blue times 1 - s/2: warmer light, below 0 colder
blur          0..1   Gaussian whose radius is s/32 of the shorter side (Pillow's)
noise         0..1   adds Gaussian noise of 64 s levels, another one for every image
rotation     -1..1   turns by 45 s degrees counter-clockwise about the centre, bilinear
shift        -1..1   moves right by s/4 of the width and down by s/4 of the height, whole pixels
scale        -1..1   enlarges by 2^s about the centre, bilinear
jpeg          0..1   compresses at quality 95 - 90 s and decodes (Pillow's libjpeg: versions may differ by a level)
============ ======= ==========================================================================================
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from tinyvad.errors import InputError

Steps = tuple[tuple[str, float], ...]  # (name, strength), applied in order


class _Transform(NamedTuple):
    """The lowest strength, and the change of (image, strength, seed); ``moves``: a mask goes through it as well."""

    low: float
    change: Callable[[np.ndarray, float, int], np.ndarray]
    moves: bool = False


def drift_image(image: np.ndarray, steps: Sequence[tuple[str, float]], seed: int = 0) -> np.ndarray:
    """Change an image by all steps, one after another.

    Args:
        image: (H, W, 3) uint8.
        steps: (name, strength) each, see above.
        seed: of the noise.

    Returns:
        (H, W, 3) uint8; the very image where there is nothing to do.

    Raises:
        InputError: an unknown name, a strength out of range, or not such an image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"drift needs an (H, W, 3) uint8 image, not {image.shape} {image.dtype}")
    for name, strength in check_steps(steps):
        if strength:
            image = _TRANSFORMS[name].change(image, strength, seed)
    return image


def drift_mask(mask: np.ndarray, steps: Sequence[tuple[str, float]]) -> np.ndarray:
    """Move a mask (H, W) bool as ``drift_image`` moves its image: nearest pixel, so it stays bool."""
    for name, strength in check_steps(steps):
        if strength and _TRANSFORMS[name].moves:
            mask = _TRANSFORMS[name].change(mask, strength, 0)
    return mask


def check_steps(steps: Sequence[tuple[str, float]]) -> Steps:
    """The steps as a tuple, from a list of lists as TOML and JSON have it.

    Raises:
        InputError: an unknown name, a strength out of range.
    """
    checked = []
    for step in steps:
        if isinstance(step, str) or len(step) != 2 or step[0] not in _TRANSFORMS:
            raise InputError(f"drift {step!r}: must be [name, strength] with a name of {', '.join(_TRANSFORMS)}")
        name, strength = step
        low = _TRANSFORMS[name].low
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not low <= strength <= 1:
            raise InputError(f"drift {name}: strength is {strength!r}, must be a number from {low:g} to 1")
        checked.append((name, float(strength)))
    return tuple(checked)


def describe(steps: Sequence[tuple[str, float]]) -> str:
    """A short name, such as 'brightness +0.2, blur +0.5'; 'as it was' for no change."""
    return ", ".join(f"{name} {strength:+g}" for name, strength in steps) or "as it was"


def ramp(name: str, strengths: Sequence[float]) -> list[Steps]:
    """A schedule of one transform: a step list a task. Raises InputError as ``check_steps``."""
    return [check_steps([(name, strength)] if strength else []) for strength in strengths]


def names() -> list[str]:
    """The transforms, in the order of the table above."""
    return list(_TRANSFORMS)


def _brightness(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    return _clip(np.arange(256) + round(128 * strength))[image]


def _contrast(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    return _clip(128 + ((np.arange(-128, 128) * round(256 * (1 + strength)) + 128) >> 8))[image]


def _colour(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    changed = image.copy()
    for channel, share in ((0, strength / 2), (2, -strength / 2)):
        table = _clip((np.arange(256) * round(256 * (1 + share)) + 128) >> 8)
        changed[:, :, channel] = table[image[:, :, channel]]
    return changed


def _blur(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    radius = strength * min(image.shape[:2]) / 32
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _noise(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    # one pattern for all images would be part of what is normal, and be learnt
    rng = np.random.default_rng([seed, zlib.crc32(image.tobytes())])
    return _clip(image + np.rint(64 * strength * rng.standard_normal(image.shape)).astype(np.int64))


def _rotation(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    angle = math.radians(45 * strength)
    return _warped(image, math.cos(angle), math.sin(angle))


def _scale(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    return _warped(image, 2.0**-strength, 0.0)


def _shift(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    height, width = image.shape[:2]
    down, right = round(strength * height / 4), round(strength * width / 4)
    top, left = abs(down) - down, abs(right) - right  # of the part that is shown
    return _mirrored(image, abs(down), abs(right))[top : top + height, left : left + width]


def _jpeg(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=round(95 - 90 * strength))
    return np.asarray(Image.open(file))


def _warped(image: np.ndarray, along: float, across: float) -> np.ndarray:
    """What is at (x, y) from the centre was at (along x - across y, across x + along y); an image or a mask."""
    height, width = image.shape[:2]
    reach = abs(along) + abs(across)  # how far outside the corners look, in units of the larger side
    border = math.ceil(max(height, width) * max(0.0, reach - 1) / 2) + abs(height - width) // 2 + 2
    padded = _mirrored(image, border, border)
    x, y = width / 2, height / 2  # Pillow's coordinates: the first pixel's centre is 1/2
    matrix = (along, -across, border + x - along * x + across * y, across, along, border + y - across * x - along * y)
    if image.dtype == bool:
        moved = Image.fromarray(padded.astype(np.uint8) * 255)
        moved = moved.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
        return np.asarray(moved) > 127
    moved = Image.fromarray(padded).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(moved)


def _mirrored(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """With a border that mirrors the picture, its edge pixels twice."""
    borders = [(rows, rows), (columns, columns), (0, 0)][: image.ndim]
    return np.pad(image, borders, mode="symmetric")


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


_TRANSFORMS = {
    "brightness": _Transform(-1, _brightness),
    "contrast": _Transform(-1, _contrast),
    "colour": _Transform(-1, _colour),
    "blur": _Transform(0, _blur),
    "noise": _Transform(0, _noise),
    "rotation": _Transform(-1, _rotation, moves=True),
    "shift": _Transform(-1, _shift, moves=True),
    "scale": _Transform(-1, _scale, moves=True),
    "jpeg": _Transform(0, _jpeg),
}
