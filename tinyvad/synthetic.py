"""Made-up defects on good images, to choose settings without any real defect.

Flows in: a good image (H, W, 3) uint8 and a generator. Flows out: the image with one defect, and its mask. Four kinds:

* cut and paste: a piece of the image at another place, turned, its colours shifted a little (CutPaste, Li et al. 2021)
* scar: the same with a long thin piece
* stain: a blob with a soft edge, lighter, darker or of another tint
* rub: a blob in which the texture is blurred away or roughened

Sizes are shares of the image's side, so a defect is as large in a photograph of a megapixel as on a thumbnail; what an
input size can still show of it is what is to be found out. The amounts are spread from hardly visible to plain.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

KINDS = ("paste", "scar", "stain", "rub")


def add_defect(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One defect of ``kind`` (of ``KINDS``) on a copy of (H, W, 3) uint8: (image, (H, W) bool mask of what changed)."""
    makers = {"paste": _paste, "scar": _scar, "stain": _stain, "rub": _rub}
    changed = makers[kind](image, rng)
    return changed, (changed != image).any(2)


def _paste(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    area, ratio = np.exp(rng.uniform(np.log(0.002), np.log(0.02))), np.exp(rng.uniform(-1, 1))
    return _moved_piece(image, np.sqrt(area * ratio), np.sqrt(area / ratio), rng)


def _scar(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _moved_piece(image, rng.uniform(0.01, 0.03), rng.uniform(0.06, 0.25), rng)


def _moved_piece(image: np.ndarray, height: float, width: float, rng: np.random.Generator) -> np.ndarray:
    """A piece of height x width (shares of the side), turned by any angle, laid down somewhere else."""
    side = min(image.shape[:2])
    h, w = (max(2, round(size * side)) for size in (height, width))
    h, w = min(h, image.shape[0] - 1), min(w, image.shape[1] - 1)
    top, left = (int(rng.integers(0, size - part)) for size, part in zip(image.shape[:2], (h, w)))
    piece = image[top : top + h, left : left + w].astype(np.float32)
    piece = np.clip(piece * rng.uniform(0.85, 1.15) + rng.uniform(-15, 15, 3), 0, 255).astype(np.uint8)
    turned = Image.fromarray(piece).convert("RGBA").rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR, expand=True)
    result = Image.fromarray(image)
    x, y = (int(rng.integers(0, size)) for size in (image.shape[1], image.shape[0]))
    result.paste(turned, (x - turned.width // 2, y - turned.height // 2), turned)
    return np.asarray(result)


def _stain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    amount = rng.uniform(20, 90) * rng.choice([-1, 1]) + rng.uniform(-20, 20, 3)
    return _blend(image, image + amount, _blob(image.shape[:2], rng))


def _rub(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        radius = max(1.0, 0.02 * min(image.shape[:2]))
        other = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)), np.float32)
    else:
        grain = max(1, min(image.shape[:2]) // 128)
        coarse = rng.normal(0, rng.uniform(15, 45), (-(-image.shape[0] // grain), -(-image.shape[1] // grain)))
        noise = np.kron(coarse, np.ones((grain, grain)))[: image.shape[0], : image.shape[1], None]
        other = image + noise
    return _blend(image, other, _blob(image.shape[:2], rng))


def _blob(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32 weights: an ellipse with a wavy, soft edge."""
    side = min(size)
    radius = np.exp(rng.uniform(np.log(0.02), np.log(0.07))) * side
    y = np.arange(size[0])[:, None] - rng.uniform(0, size[0])
    x = np.arange(size[1])[None] - rng.uniform(0, size[1])
    angle, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.5, 0.5))
    u, v = (np.cos(angle) * x + np.sin(angle) * y) * stretch, (np.cos(angle) * y - np.sin(angle) * x) / stretch
    around = np.arctan2(v, u)
    waves = sum(rng.uniform(0, 0.15) * np.sin(k * around + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    distance = np.hypot(u, v) / (radius * (1 + waves))
    softness = rng.uniform(0.1, 0.5)
    return np.clip((1 - distance) / softness + 0.5, 0, 1).astype(np.float32)


def _blend(image: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    mixed = image + (other - image) * weights[..., None]
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
