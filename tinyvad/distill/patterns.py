"""Grey procedural textures: a generator and a size in, a (size, size) float32 field in about 0..1 out.

Noise, wood and domain warping follow Perlin ("An Image Synthesizer", 1985), the attractors Barnsley ("Fractals
Everywhere", 1988); lattices, cloth and bricks are periodic functions of bent coordinates. Costly fields are made small
and scaled up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvad.distill.fields import lit, octaves, plane, resized, sampled, spectral, spread, stretched, worley

Pattern = Callable[[np.random.Generator, int], np.ndarray]


def spectral_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    return spectral(rng, size, rng.uniform(0.3, 2.2), spread(rng, 1, 4.5), rng.uniform(0, np.pi))


def brushed(rng: np.random.Generator, size: int) -> np.ndarray:
    turn = rng.uniform(0, np.pi) if rng.random() < 0.5 else float(rng.integers(2)) * np.pi / 2
    streaks = spectral(rng, size, rng.uniform(0.3, 1.3), rng.uniform(8, 80), turn)
    share = rng.uniform(0, 0.5)
    return (1 - share) * streaks + share * octaves(rng, size, 2, 2)


def wood(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = plane(rng, size, 1.0)
    u, v = u - float(u.mean()) + rng.uniform(-0.6, 0.6), v - float(v.mean())
    warp = octaves(rng, size, 2, 3)
    r = np.hypot(u, v * rng.uniform(0.05, 0.6)) + rng.uniform(0.05, 0.3) * warp
    phase = r * rng.uniform(6, 30)
    rings = (phase - np.floor(phase)) ** rng.uniform(0.5, 3)
    lengthwise = float(np.arctan2(u[1, 0] - u[0, 0], u[0, 1] - u[0, 0]) + np.pi / 2)
    fibre = spectral(rng, size, 0.6, rng.uniform(5, 30), lengthwise)
    return 0.65 * rings + 0.35 * fibre


def value_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    field = octaves(rng, size, int(rng.integers(2, 16)), int(rng.integers(1, 6)), rng.uniform(0.4, 0.9))
    fold = rng.random()
    if fold < 0.3:
        return np.abs(2 * field - 1)  # ridges, as in marble
    return (field > rng.uniform(0.35, 0.65)).astype(np.float32) if fold < 0.4 else field


def warped_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    base = octaves(rng, size, int(rng.integers(2, 8)), 4, 0.6)
    bx, by = octaves(rng, size, 2, 3), octaves(rng, size, 2, 3)
    axis = np.arange(size, dtype=np.float32)
    reach = rng.uniform(0.1, 0.8) * size
    x, y = axis[None, :] + reach * bx, axis[:, None] + reach * by
    last = size - 1  # mirror at the edges, where wrapping would leave a seam
    return sampled(base, last - np.abs(np.mod(x, 2 * last) - last), last - np.abs(np.mod(y, 2 * last) - last))


def plasma(rng: np.random.Generator, size: int) -> np.ndarray:
    phase = octaves(rng, size, int(rng.integers(1, 4)), int(rng.integers(2, 6))) * rng.uniform(6, 40)
    return 0.5 + 0.5 * np.sin(phase)


def cells(rng: np.random.Generator, size: int) -> np.ndarray:
    """Grains, cobbles, cracks or packed spheres, from one cellular noise."""
    n = size * 2 // 3
    u, v = plane(rng, n, spread(rng, 3, 30), rng.uniform(0, 0.5))
    near, second, value = worley(rng, u, v * rng.uniform(0.5, 1), rng.uniform(0.3, 1))
    gap = second - near
    look = int(rng.integers(5))
    if look == 0:
        field = value * 0.8 + 0.2 * near  # flat grains
    elif look == 1:
        field = np.clip(gap / rng.uniform(0.05, 0.6), 0, 1) * (0.6 + 0.4 * value)  # cobbles, mortar
    elif look == 2:
        field = 1 - np.clip(near, 0, 1)
    elif look == 3:
        field = np.clip(gap / rng.uniform(0.02, 0.08), 0, 1) * 0.7 + 0.3 * octaves(rng, n)  # cracked ground
    else:
        field = np.sqrt(np.clip(1 - (near / rng.uniform(0.4, 0.7)) ** 2, 0, 1)) * (0.5 + 0.5 * value)  # granules
    return np.clip(resized(field, size), 0, 1)


def grating(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = plane(rng, size, spread(rng, 3, size / 5), rng.uniform(0, 0.6))
    wave = np.sin(2 * np.pi * u)
    mode = int(rng.integers(4))
    if mode == 1:
        wave = np.tanh(rng.uniform(2, 10) * (wave - rng.uniform(-0.8, 0.8)))  # bars
    elif mode == 2:
        wave = wave + np.sin(2 * np.pi * (u * rng.uniform(0.8, 1.2) + v * rng.uniform(-0.5, 0.5)))  # beats
    elif mode == 3:
        wave = wave * np.sin(2 * np.pi * v * rng.uniform(0.1, 1))
    return stretched(wave, rng.uniform(1.2, 2))


def checkerboard(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = plane(rng, size, spread(rng, 2, size / 8), rng.uniform(0, 0.3))
    sharp = rng.uniform(1, 12)
    return 0.5 + 0.5 * np.tanh(sharp * np.sin(np.pi * u) * np.sin(np.pi * v * rng.uniform(0.5, 1)))


def weave(rng: np.random.Generator, size: int) -> np.ndarray:
    """Plain or twill cloth: rounded threads, the one on top chosen by the thread numbers."""
    u, v = plane(rng, size, spread(rng, 5, size / 7), rng.uniform(0, 0.5))
    period = int(rng.integers(2, 5))
    iu, iv = np.floor(u), np.floor(v)
    warp_on_top = np.mod(iu + iv, period) < period / 2
    fu, fv = u - iu - 0.5, v - iv - 0.5
    fill = rng.uniform(0.75, 1.3)
    warp = np.cos(np.pi * np.clip(fu / fill, -0.5, 0.5)) * (0.55 + 0.45 * np.cos(np.pi * fv))
    weft = np.cos(np.pi * np.clip(fv / fill, -0.5, 0.5)) * (0.55 + 0.45 * np.cos(np.pi * fu))
    cloth = np.where(warp_on_top, warp, weft * rng.uniform(0.4, 1))
    return cloth * (0.75 + 0.25 * spectral(rng, size, 0.5))


def mesh(rng: np.random.Generator, size: int) -> np.ndarray:
    """Wire grids and perforated sheets: lines or holes on a square or staggered lattice."""
    u, v = plane(rng, size, spread(rng, 3, size / 8), rng.uniform(0, 0.4))
    if rng.random() < 0.5:
        u = u + 0.5 * np.mod(np.floor(v), 2)
    fu, fv = np.abs(u - np.floor(u) - 0.5), np.abs(v - np.floor(v) - 0.5)
    shape = int(rng.integers(3))
    distance = np.hypot(fu, fv) if shape == 0 else np.maximum(fu, fv) if shape == 1 else fu + fv
    edge = rng.uniform(0.2, 0.42)
    sheet = np.clip((distance - edge) * rng.uniform(8, 40) + 0.5, 0, 1)
    return sheet * (0.6 + 0.4 * spectral(rng, size, 1.0)) + (1 - sheet) * rng.uniform(0, 0.25)


def bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = plane(rng, size, spread(rng, 3, 18), rng.uniform(0, 0.25))
    row = np.floor(v)
    u = u * rng.uniform(0.35, 1) + rng.choice([0.0, 0.5, 0.33]) * row
    tone = rng.random((64, 64), np.float32)[row.astype(np.int32) & 63, np.floor(u).astype(np.int32) & 63]
    fu, fv = np.abs(u - np.floor(u) - 0.5), np.abs(v - row - 0.5)
    face = np.clip((0.5 - rng.uniform(0.02, 0.1) - np.maximum(fu, fv)) * 30, 0, 1)
    uneven = rng.uniform(0, 0.6)
    stone = (1 - uneven + uneven * tone) * (0.6 + 0.4 * octaves(rng, size, 16, 3, 0.8))
    return face * stone + (1 - face) * rng.uniform(0, 1)


def knurling(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = plane(rng, size, spread(rng, 6, size / 9), rng.uniform(0, 0.2))
    lean = rng.uniform(0.5, 1.2)
    height = np.minimum(np.abs(np.mod(u + lean * v, 1) - 0.5), np.abs(np.mod(u - lean * v, 1) - 0.5))
    return lit(rng, height, rng.uniform(0.1, 0.6))


def escape_time(rng: np.random.Generator, size: int) -> np.ndarray:
    """A Julia set, or a window at the rim of the Mandelbrot set, coloured by smoothed escape time."""
    n = size // 2
    t = rng.uniform(0, 2 * np.pi)
    rim = complex(np.exp(1j * t) / 2 - np.exp(2j * t) / 4)  # the main cardioid's rim, where the detail is
    axis = np.linspace(-1, 1, n, dtype=np.float32)
    window = (axis[None, :] + 1j * axis[:, None]).astype(np.complex64) * complex(np.exp(1j * rng.uniform(0, 2 * np.pi)))
    if rng.random() < 0.6:
        z, c = window * rng.uniform(0.5, 1.4), np.complex64(rim * rng.uniform(1.0, 1.08))
    else:
        z, c = np.zeros_like(window), window * spread(rng, 0.03, 1) + rim * 1.02
    count = np.zeros((n, n), np.float32)
    for _ in range(40):
        z = z * z + c
        size2 = z.real**2 + z.imag**2
        count += np.exp(-size2)  # falls to 0 after escape: a smooth count
        far = size2 > 1e4
        z[far] = 100  # stays far and never overflows
    return np.clip(resized(stretched(np.log1p(count), 2.0), size), 0, 1)


def iterated_maps(rng: np.random.Generator, size: int) -> np.ndarray:
    """The attractor of two to four random contractions, drawn by many points playing the chaos game at once."""
    maps, n = int(rng.integers(2, 5)), 5000
    angle, scale = rng.uniform(0, 2 * np.pi, maps), rng.uniform(0.55, 0.85, maps)
    squeeze = rng.uniform(0.7, 1, maps)
    centre = rng.uniform(-0.6, 0.6, (2, maps))
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    x, y = rng.uniform(-1, 1, (2, n))
    seen = []
    for step in range(18):
        k = rng.integers(maps, size=n)
        x, y = a[k] * x - squeeze[k] * b[k] * y + centre[0, k], b[k] * x + squeeze[k] * a[k] * y + centre[1, k]
        if step >= 6:
            seen.append((x, y))
    px, py = np.concatenate([p[0] for p in seen]), np.concatenate([p[1] for p in seen])
    m = size * 2 // 3
    ix = np.clip((px - px.min()) / (np.ptp(px) + 1e-6) * m, 0, m - 1).astype(np.int32)
    iy = np.clip((py - py.min()) / (np.ptp(py) + 1e-6) * m, 0, m - 1).astype(np.int32)
    density = np.log1p(np.bincount(iy * m + ix, minlength=m * m).reshape(m, m))
    return np.clip(resized(density / density.max(), size), 0, 1)


def shaded_relief(rng: np.random.Generator, size: int) -> np.ndarray:
    sources: list[Pattern] = [spectral_noise, value_noise, warped_noise, cells, weave, grating, mesh, plasma, brushed]
    height = sources[int(rng.integers(len(sources)))](rng, size)
    small = resized(resized(height, max(size // int(rng.integers(1, 4)), 8)), size)
    return lit(rng, small, spread(rng, 0.1, 1.2))


TEXTURES: dict[str, Pattern] = {
    "spectral_noise": spectral_noise,
    "brushed": brushed,
    "wood": wood,
    "value_noise": value_noise,
    "warped_noise": warped_noise,
    "plasma": plasma,
    "cells": cells,
    "grating": grating,
    "checkerboard": checkerboard,
    "weave": weave,
    "mesh": mesh,
    "bricks": bricks,
    "knurling": knurling,
    "escape_time": escape_time,
    "iterated_maps": iterated_maps,
    "shaded_relief": shaded_relief,
}
