"""Generated pictures for distilling backbones: a random generator in, a (size, size, 3) uint8 image out.

Photographs of everyday things lack what cameras over a production line see: bare metal, cloth, lattices, lone parts,
scratches. `generate` picks a texture or a part (patterns.py, parts.py), lays flaws on it, lights it, and adds what a
camera adds: blur, noise, low contrast. That even unphotographic pictures teach usable features is shown by Kataoka et
al., "Pre-training without Natural Images" (2020), and Baradad et al., "Learning to See by Looking at Noise" (2021).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tinyvad.distill.colours import coloured, over, random_colour
from tinyvad.distill.fields import octaves, resized
from tinyvad.distill.parts import PARTS
from tinyvad.distill.patterns import TEXTURES, Pattern
from tinyvad.errors import InputError

KINDS: dict[str, Pattern] = {**TEXTURES, **PARTS}
SMALLEST = 16  # pixels; below, the reduced fields of some kinds vanish


def generate(rng: np.random.Generator, size: int = 192, kind: str | None = None) -> np.ndarray:
    """One picture, fully determined by the state of `rng`.

    Args:
        rng: the only source of randomness; it is advanced.
        size: side in pixels, at least 16.
        kind: a key of KINDS; None picks one at random, each as likely as the others.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        InputError: an unknown kind or too small a size.
    """
    if size < SMALLEST:
        raise InputError(f"size {size}: generated images need at least {SMALLEST} pixels a side; give a larger size")
    if kind is None:
        kind = list(KINDS)[int(rng.integers(len(KINDS)))]
    elif kind not in KINDS:
        raise InputError(f"kind {kind!r}: no such generated image; use one of {', '.join(KINDS)}")
    picture = KINDS[kind](rng, size)
    if picture.ndim == 2:
        picture = coloured(rng, picture)
    if rng.random() < 0.45:
        picture = flawed(rng, picture)
    return photographed(rng, picture)


def flawed(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Lay one to three flaws over a picture, (size, size, 3) float in 0..1."""
    size = picture.shape[0]
    for _ in range(int(rng.integers(1, 4))):
        name = list(FLAWS)[int(rng.integers(len(FLAWS)))]
        colour = random_colour(rng) if rng.random() < 0.5 else np.full(3, rng.choice([0.05, 0.95]), np.float32)
        picture = over(picture, colour, FLAWS[name](rng, size) * np.float32(rng.uniform(0.3, 1)))
    return picture


def photographed(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Add uneven light, contrast, blur and sensor noise, and quantise: (size, size, 3) float in 0..1 to uint8."""
    size = picture.shape[0]
    if rng.random() < 0.5:  # full range, as a camera that exposes well gives
        dark, bright = np.percentile(picture[::4, ::4], (1, 99)).tolist()
        picture = (picture - dark) / max(bright - dark, 0.1)
    if rng.random() < 0.6:
        light = resized(rng.uniform(1 - rng.uniform(0, 0.7), 1.1, (2, 2)), size)  # (size, size), a gradient
        if rng.random() < 0.3:
            axis = np.linspace(-1, 1, size, dtype=np.float32)
            light = light * (1 - rng.uniform(0, 0.35) * (axis[None, :] ** 2 + axis[:, None] ** 2))
        picture = picture * light[..., None]
    if rng.random() < 0.35:  # dull or dark pictures
        contrast = rng.uniform(0.25, 0.9)
        picture = picture * contrast + rng.uniform(0, 1 - contrast)
    levels = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.3:
        image = Image.fromarray(levels).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6) * size / 192))
        levels = np.asarray(image)
    if rng.random() < 0.5:
        channels = 1 if rng.random() < 0.5 else 3
        noise = rng.standard_normal((size, size, channels), np.float32) * rng.uniform(1, 12)
        levels = np.clip(levels + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(levels)


def _strokes(size: int, paths: list[np.ndarray], width: int) -> np.ndarray:
    """Cover, (size, size) float32 in 0..1, of lines through points in units of the side; drawn double for smooth edges."""
    image = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(image)
    for path in paths:  # (points, 2)
        draw.line((path * 2 * size).ravel().tolist(), 255, width)
    return np.asarray(image.reduce(2), np.float32) / 255


def _spots(size: int, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Cover of discs; centres (n, 2) and radii (n,) in units of the side."""
    image = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(image)
    for (x, y), r in zip((centres * 2 * size).tolist(), (radii * 2 * size).tolist()):
        draw.ellipse((x - r, y - r, x + r, y + r), 255)
    return np.asarray(image.reduce(2), np.float32) / 255


def scratches(rng: np.random.Generator, size: int) -> np.ndarray:
    lean = rng.uniform(0, 2 * np.pi)
    paths = []
    for _ in range(int(rng.integers(1, 12))):
        turn, t = lean + rng.normal(0, 0.3), np.linspace(0, rng.uniform(0.05, 0.8), 8)[:, None]
        bow = rng.uniform(-0.2, 0.2) * t**2 * np.array([[-np.sin(turn), np.cos(turn)]])
        paths.append(rng.uniform(0, 1, 2) + t * np.array([[np.cos(turn), np.sin(turn)]]) + bow)
    return _strokes(size, paths, int(rng.integers(1, 4)))


def cracks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Random walks that hold their direction, with branches from points already reached."""
    start = rng.uniform(0.1, 0.9, (1, 2))
    paths = [start]
    for _ in range(int(rng.integers(1, 6))):
        parent = paths[int(rng.integers(len(paths)))]
        turn = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.4, 40))
        step = rng.uniform(0.003, 0.02) * np.stack([np.cos(turn), np.sin(turn)], 1)
        paths.append(parent[int(rng.integers(len(parent)))] + np.cumsum(step, 0))
    return _strokes(size, paths[1:], int(rng.integers(2, 6)))


def fibres(rng: np.random.Generator, size: int) -> np.ndarray:
    paths = []
    for _ in range(int(rng.integers(1, 6))):
        turn = rng.uniform(0, 2 * np.pi) + np.cumsum(np.cumsum(rng.normal(0, 0.05, 30)))
        paths.append(rng.uniform(0, 1, 2) + np.cumsum(0.015 * np.stack([np.cos(turn), np.sin(turn)], 1), 0))
    return _strokes(size, paths, int(rng.integers(2, 5)))


def dust(rng: np.random.Generator, size: int) -> np.ndarray:
    n = int(rng.integers(5, 80))
    return _spots(size, rng.random((n, 2)), rng.uniform(0.001, 0.008, n))


def holes(rng: np.random.Generator, size: int) -> np.ndarray:
    n = int(rng.integers(1, 5))
    return _spots(size, rng.random((n, 2)), rng.uniform(0.01, 0.09, n))


def stain(rng: np.random.Generator, size: int) -> np.ndarray:
    """A ragged patch: smooth noise, cut by the distance from a random point."""
    axis = np.linspace(0, 1, size, dtype=np.float32)
    away = np.hypot(axis[None, :] - rng.random(), axis[:, None] - rng.random()) / rng.uniform(0.05, 0.4)
    return np.clip((1.2 * octaves(rng, size, 4, 4) + 0.4 - away) * rng.uniform(1, 12), 0, 1).astype(np.float32)


FLAWS: dict[str, Pattern] = {
    "scratches": scratches,
    "cracks": cracks,
    "fibres": fibres,
    "dust": dust,
    "holes": holes,
    "stain": stain,
}
