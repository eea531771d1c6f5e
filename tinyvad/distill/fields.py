"""Building blocks of generated pictures: noise, coordinates, cellular distances and shading, as float32 fields.

The ideas are the common ones of procedural texturing: 1/f^a noise made in the Fourier domain, value noise in octaves
(Perlin, "An Image Synthesizer", 1985), cellular noise (Worley, "A Cellular Texture Basis Function", 1996), and height
fields shaded by Lambert's law with a specular lobe. Every random choice comes from the generator passed in.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def spread(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between low and high, equally likely in every octave; low where high is less (small images)."""
    return float(low * max(high / low, 1.0) ** rng.random())


def resized(field: np.ndarray, size: int) -> np.ndarray:
    """Scale a 2-D field to (size, size) float32 by cubic interpolation."""
    image = Image.fromarray(np.ascontiguousarray(field, np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def stretched(field: np.ndarray, sigmas: float = 2.5) -> np.ndarray:
    """Map mean -/+ sigmas standard deviations to 0..1 and clip, so that one outlier doesn't flatten the rest."""
    spread = 2 * sigmas * float(field.std()) + 1e-6
    return np.clip((field - float(field.mean())) / spread + 0.5, 0, 1).astype(np.float32)


def plane(rng: np.random.Generator, size: int, cells: float, bend: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates u, v, each (size, size) float32: `cells` periods across the image, randomly turned and shifted.

    `bend` is the largest displacement by smooth noise, in periods.
    """
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < 0.6 else float(rng.integers(4)) * np.pi / 2
    c, s = float(np.cos(angle)) * cells, float(np.sin(angle)) * cells
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    u = c * axis[None, :] - s * axis[:, None] + rng.uniform(0, 50)  # (size, size)
    v = s * axis[None, :] + c * axis[:, None] + rng.uniform(0, 50)  # (size, size)
    if bend:
        u = u + bend * resized(rng.uniform(-1, 1, (5, 5)), size)
        v = v + bend * resized(rng.uniform(-1, 1, (5, 5)), size)
    return u, v


def octaves(rng: np.random.Generator, size: int, first: int = 3, count: int = 5, gain: float = 0.5) -> np.ndarray:
    """Value noise: `count` grids of random numbers, each twice as fine and `gain` times as strong as the last."""
    total = np.zeros((size, size), np.float32)
    for k in range(count):
        n = min(first * 2**k + 1, size)
        total += gain**k * resized(rng.random((n, n), np.float32), size)
    return stretched(total)


def spectral(rng: np.random.Generator, size: int, slope: float, stretch: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """White noise filtered by 1/f^slope; `stretch` > 1 draws the features out along `angle`."""
    fy = np.fft.fftfreq(size)[:, None].astype(np.float32)
    fx = np.fft.rfftfreq(size)[None, :].astype(np.float32)
    along = (fx * float(np.cos(angle)) + fy * float(np.sin(angle))) * stretch
    across = fy * float(np.cos(angle)) - fx * float(np.sin(angle))
    f = np.sqrt(along**2 + across**2) + 0.5 / size  # (size, size // 2 + 1)
    noise = rng.standard_normal((size, size), np.float32)
    return stretched(np.fft.irfft2(np.fft.rfft2(noise) * f**-slope, s=(size, size)))


def sampled(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear look-up of a square field at pixel positions x, y, wrapping round the edges."""
    n = field.shape[0]
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    ix, iy = x0.astype(np.int32) % n, y0.astype(np.int32) % n
    jx, jy = (ix + 1) % n, (iy + 1) % n
    return (field[iy, ix] * (1 - fx) + field[iy, jx] * fx) * (1 - fy) + (field[jy, ix] * (1 - fx) + field[jy, jx] * fx) * fy


def worley(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, jitter: float) -> tuple[np.ndarray, ...]:
    """Distances to the nearest and second nearest of one random point a unit cell, and a random number a point."""
    points = rng.uniform(0.5 - jitter / 2, 0.5 + jitter / 2, (2, 64, 64)).astype(np.float32)
    number = rng.random((64, 64), np.float32)
    cu, cv = np.floor(u), np.floor(v)
    iu, iv = cu.astype(np.int32), cv.astype(np.int32)
    near = np.full(u.shape, 9, np.float32)
    second, value = near.copy(), np.zeros(u.shape, np.float32)
    for dv in (-1, 0, 1):
        for du in (-1, 0, 1):
            a, b = (iv + dv) & 63, (iu + du) & 63
            d = (cu + du + points[0][a, b] - u) ** 2 + (cv + dv + points[1][a, b] - v) ** 2
            value = np.where(d < near, number[a, b], value)
            second = np.minimum(second, np.maximum(d, near))
            near = np.minimum(near, d)
    return np.sqrt(near), np.sqrt(second), value


def lit(rng: np.random.Generator, height: np.ndarray, relief: float) -> np.ndarray:
    """Shade a height map: Lambert plus a specular lobe, the light from a random side."""
    dy, dx = np.gradient(height)
    strength = relief * height.shape[0] / 8
    nx, ny = -dx * strength, -dy * strength
    length = np.sqrt(nx**2 + ny**2 + 1)
    turn, rise = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.3)
    lx, ly, lz = float(np.cos(turn) * np.cos(rise)), float(np.sin(turn) * np.cos(rise)), float(np.sin(rise))
    lambert = np.clip((nx * lx + ny * ly + lz) / length, 0, 1)
    hx, hy, hz = lx, ly, lz + 1  # halfway between the light and a viewer straight above
    halfway = np.clip((nx * hx + ny * hy + hz) / (length * float(np.sqrt(hx**2 + hy**2 + hz**2))), 0, 1)
    return np.clip(0.1 + 0.75 * lambert + rng.uniform(0, 0.7) * halfway ** rng.uniform(8, 60), 0, 1).astype(np.float32)
