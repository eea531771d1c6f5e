"""What the networks see while training: random views of pictures from folders and of generated ones.

Flows in: image folders, a number of generated images, a seed. Flows out: view ``i`` of step ``s`` as (size, size, 3)
uint8, a function of (seed, s, i) and the images alone, so that a training that was stopped goes on with the very views
it would have had. Strong crops, scales, turns, colour, contrast, greyscale, blur and noise stand in for the cameras,
lights and materials of inspection lines; pasted patches for what does not belong.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from tinyvad.distill.generated import generate
from tinyvad.errors import InputError
from tinyvad.images import list_images, read_image

GENERATED_SIZE = 256  # pixels a side
LONGEST = 640  # larger pictures are kept reduced to this side
CACHE_BYTES = 1 << 30
HELD_OUT_SHARE = 40
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)


class Pictures:
    """Image files and generated images behind one index; decoded ones are kept, up to ``CACHE_BYTES``.

    Attributes:
        skipped: path -> reason, of files that could not be read; another picture takes their place.

    Raises:
        InputError: no folder and nothing generated, or a folder without images.
    """

    def __init__(self, folders: Iterable[Path], generated: int, seed: int) -> None:
        self.paths = _unique(path for folder in folders for path in _files(folder))
        self.seeds = list(range(generated))  # of the generated images, beside ``seed``
        self.seed = seed
        self._forget()
        if not len(self):
            raise InputError("no images to train on: give --images DIR, or --generated N")

    def _forget(self) -> None:
        self.skipped: dict[Path, str] = {}
        self._kept: OrderedDict[int, Image.Image] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths) + len(self.seeds)

    def digest(self) -> str:
        """What the views depend on beside their keys, in short: number, names and sizes of the files."""
        told = hashlib.sha256()
        for path in self.paths:
            told.update(os.fsencode(path) + b"\0%d\0" % (path.stat().st_size if path.exists() else 0))
        return f"{len(self.paths)} files ({told.hexdigest()[:8]})"

    def split(self) -> tuple[Pictures, Pictures]:
        """To train on, and one in ``HELD_OUT_SHARE`` of files and generated images that training never sees.

        The first file and the first generated image are always held out; a single image is trained on and measured on.
        """
        parts = copy.copy(self), copy.copy(self)
        for held_out, part in enumerate(parts):
            part.paths = [path for i, path in enumerate(self.paths) if (i % HELD_OUT_SHARE == 0) == bool(held_out)]
            part.seeds = [seed for seed in self.seeds if (seed % HELD_OUT_SHARE == 0) == bool(held_out)]
            part._forget()
        return parts if all(map(len, parts)) else (self, self)

    def picture(self, rng: np.random.Generator) -> Image.Image:
        """A random one, RGB.

        Raises:
            InputError: nothing but unreadable files.
        """
        while len(self.skipped) < len(self):
            index = int(rng.integers(len(self)))
            try:
                return self._at(index)
            except InputError as error:
                self.skipped[self.paths[index]] = str(error)
        raise InputError(f"none of the images can be read: {next(iter(self.skipped.values()))}")

    def _at(self, index: int) -> Image.Image:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        if index < len(self.paths):
            image = Image.fromarray(read_image(self.paths[index]))
            image.thumbnail((LONGEST, LONGEST))
        else:
            rng = np.random.default_rng([self.seed, self.seeds[index - len(self.paths)]])
            image = Image.fromarray(generate(rng, GENERATED_SIZE))
        with self._lock:
            if index not in self._kept:
                self._kept[index] = image
                self._bytes += _nbytes(image)
            while self._bytes > CACHE_BYTES:
                self._bytes -= _nbytes(self._kept.popitem(last=False)[1])
        return image


def views(pictures: Pictures, key: tuple[int, ...], count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8: random views, a function of ``key`` (seed, step, ...) and the pictures."""
    return np.stack([view(pictures, np.random.default_rng([*key, i]), size) for i in range(count)])


def view(pictures: Pictures, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: one random view."""
    image = _crop(pictures.picture(rng), rng, size)
    if rng.random() < 0.15:  # a patch that does not belong
        other = _crop(pictures.picture(rng), rng, size)
        side = int(size * rng.uniform(0.06, 0.4))
        left, top = (int(value) for value in rng.integers(0, size - side + 1, 2))
        box = (left, top, left + side, top + side)
        image.paste(other.crop(box), box)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 2.0))))
    return _colours(np.asarray(image, np.float32), rng)


def _crop(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """A random rectangle of 5 to 100 % of the area, resized, mirrored and turned by a multiple of 90 degrees."""
    width, height = image.size
    area = float(np.exp(rng.uniform(np.log(0.05), 0.0))) * width * height
    aspect = float(np.exp(rng.uniform(-0.3, 0.3)))
    w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    view = image.resize((size, size), FILTERS[rng.integers(len(FILTERS))], (left, top, left + w, top + h))
    turn = int(rng.integers(8))
    if turn & 1:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if turn & 2:
        view = view.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return view.transpose(Image.Transpose.TRANSPOSE) if turn & 4 else view


def _colours(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Greyscale, channel mixing, contrast, brightness, gamma and noise: (size, size, 3) float32 -> uint8."""
    grey = 1.0 if rng.random() < 0.35 else float(np.clip(rng.normal(0, 0.3), -0.5, 1))
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    mix = (1 - grey) * np.eye(3, dtype=np.float32) + grey * luma  # rows: output channels
    if rng.random() < 0.5:
        mix = mix + rng.normal(0, 0.08, (3, 3)).astype(np.float32)
    gain = np.float32(np.exp(rng.normal(0, 0.3)) * (-1 if rng.random() < 0.05 else 1))
    pixels = (pixels - 127.5) @ (gain * mix).T + np.float32(127.5 + rng.normal(0, 25))
    pixels = np.clip(pixels, 0, 255)
    if rng.random() < 0.3:
        pixels = 255 * (pixels / 255) ** np.float32(np.exp(rng.normal(0, 0.4)))
    if rng.random() < 0.2:
        pixels = pixels + rng.normal(0, rng.uniform(1, 12), (*pixels.shape[:2], 1)).astype(np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _files(folder: Path) -> list[Path]:
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder of images; give --images an existing one")
    return list_images(Path(folder))


def _unique(paths: Iterable[Path]) -> list[Path]:
    """Each file once, or one that two folders hold would be trained on and held out."""
    found: dict[Path, Path] = {}
    for path in paths:
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _nbytes(image: Image.Image) -> int:
    return image.width * image.height * 4  # Pillow keeps RGB in four bytes
