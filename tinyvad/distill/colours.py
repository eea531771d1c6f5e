"""Colour for grey fields: (size, size) float in 0..1 in, (size, size, 3) float32 in 0..1 out, by a random 256-step map."""

from __future__ import annotations

import colorsys

import numpy as np


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """One colour, (3,) float32 in 0..1; half are nearly grey, as most industrial surfaces are."""
    saturation = rng.uniform(0, 0.15) if rng.random() < 0.5 else rng.uniform(0.1, 0.9)
    return np.array(colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.05, 1)), np.float32)


def colour_map(rng: np.random.Generator) -> np.ndarray:
    """A look-up table, (256, 3) float32 in 0..1: grey, tinted metal, two colours, or a palette of several."""
    t = np.linspace(0, 1, 256, dtype=np.float32)[:, None]  # (256, 1)
    look = rng.random()
    if look < 0.5:  # grey or metal: low to high brightness with a slight tint and a random curve
        dark, light = rng.uniform(0, 0.4), rng.uniform(0.5, 1)
        tint = 1 + (rng.uniform(-0.06, 0.06, 3) if look < 0.3 else np.zeros(3))
        table = (dark + (light - dark) * t ** float(np.exp(rng.uniform(-0.7, 0.7)))) * tint
    else:
        count = 2 if look < 0.75 else int(rng.integers(3, 7))
        stops = np.stack([random_colour(rng) for _ in range(count)])  # (count, 3)
        if count == 2 and np.abs(stops[0] - stops[1]).max() < 0.1:
            stops[1] = 1 - stops[0]
        table = np.stack([np.interp(t[:, 0], np.linspace(0, 1, count), stops[:, c]) for c in range(3)], 1)
    if rng.random() < 0.3:
        table = table[::-1]
    return np.clip(table, 0, 1).astype(np.float32)


def coloured(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """Colour a grey field by a random map."""
    return colour_map(rng)[(np.clip(field, 0, 1) * 255).astype(np.uint8)]


def soft_mask(distance: np.ndarray) -> np.ndarray:
    """Cover of a shape, 0..1, from the signed distance to its edge in pixels (negative inside): an anti-aliased edge."""
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def over(ground: np.ndarray, paint: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lay paint, (size, size, 3) or (3,), over the ground, (size, size, 3), where the mask, (size, size), is 1."""
    return ground + mask[..., None] * (paint - ground)
