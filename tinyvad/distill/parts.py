"""Coloured pictures of simple made things: a generator and a size in, a (size, size, 3) float32 image in 0..1 out.

Overlapping shapes follow the dead-leaves model (Matheron 1968; Lee, Mumford and Huang, "Occlusion Models for Natural
Images", 2001: sizes by a power law). Solids are signed distances with a shaded profile; strokes are drawn by Pillow.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from tinyvad.distill.colours import coloured, over, random_colour, soft_mask
from tinyvad.distill.fields import lit, octaves, plane, spectral, spread, stretched, worley
from tinyvad.distill.patterns import TEXTURES, Pattern

Colour = tuple[int, int, int]


def ink(colour: np.ndarray, gain: float = 1.0) -> Colour:
    """A Pillow colour from (3,) floats."""
    r, g, b = np.clip(colour * (255 * gain), 0, 255).astype(int).tolist()
    return r, g, b


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A coloured texture of a random kind, (size, size, 3)."""
    return coloured(rng, list(TEXTURES.values())[int(rng.integers(len(TEXTURES)))](rng, size))


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """What a part lies on, (size, size, 3): plain, softly uneven or a texture."""
    look = rng.random()
    if look < 0.35:
        return np.broadcast_to(random_colour(rng), (size, size, 3)).copy()
    if look < 0.65:
        return np.clip(random_colour(rng) * (0.8 + 0.4 * octaves(rng, size, 2, 3)[..., None]), 0, 1)
    return texture(rng, size)


def placed(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of about a pixel a unit, the origin near the middle, randomly turned and zoomed: x, y, (size, size)."""
    u, v = plane(rng, size, size * spread(rng, 0.55, 1.5))  # below 1 a close-up, above 1 a small part
    shift = 0.15 * size
    return u - float(u.mean()) + rng.uniform(-shift, shift), v - float(v.mean()) + rng.uniform(-shift, shift)


def canvas(base: np.ndarray) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A Pillow picture of twice the size to draw on; `finished` halves it, which smooths the edges."""
    n = 2 * base.shape[0]
    image = Image.fromarray((np.clip(base, 0, 1) * 255).astype(np.uint8)).resize((n, n), Image.Resampling.NEAREST)
    return image, ImageDraw.Draw(image)


def finished(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(2), np.float32) / 255


def dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    image, draw = canvas(ground(rng, size))
    n, count = 2 * size, int(rng.integers(20, 160))
    radii = n * 0.02 * (1 - rng.random(count)) ** -rng.uniform(0.5, 0.9)  # a power law from 2 % of the side
    shape_of = int(rng.integers(4))
    family = [random_colour(rng) for _ in range(int(rng.integers(2, 12)))]
    for radius in np.minimum(radii, n * 0.35).tolist():
        x, y = rng.uniform(0, n, 2).tolist()
        shape = int(rng.integers(3)) if shape_of == 3 else shape_of
        colour = family[int(rng.integers(len(family)))] * rng.uniform(0.6, 1.3)
        edge = ink(colour, rng.uniform(0.3, 1.2)) if rng.random() < 0.3 else None
        if shape == 0:
            ry = radius * rng.uniform(0.5, 1)
            draw.ellipse((x - radius, y - ry, x + radius, y + ry), ink(colour), edge, 2)
            if rng.random() < 0.5:  # a highlight makes a ball of it
                for k in range(1, 5):
                    r, s = radius * (1 - k / 5), ry * (1 - k / 5)
                    cx, cy = x - 0.3 * (radius - r), y - 0.3 * (ry - s)
                    draw.ellipse((cx - r, cy - s, cx + r, cy + s), ink(colour, 1 + 0.12 * k))
        else:
            corners = 4 if shape == 1 else int(rng.integers(3, 8))
            uneven = rng.uniform(0, 0.9, corners) * (shape == 2)
            turns = rng.uniform(0, 2 * np.pi) + (np.arange(corners) + uneven) * (2 * np.pi / corners)
            reach = radius * (1.0 if shape == 1 else rng.uniform(0.5, 1.2, corners))
            xy = np.stack([x + reach * np.cos(turns), y + reach * rng.uniform(0.4, 1) * np.sin(turns)], 1)
            draw.polygon(xy.ravel().tolist(), ink(colour), edge)
    picture = finished(image)
    return np.clip(picture * (0.75 + 0.5 * spectral(rng, size, rng.uniform(0.3, 1.5))[..., None]), 0, 1)


def concentric(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rings, washers, bottle mouths and lids: one random profile of brightness over the radius."""
    x, y = placed(rng, size)
    r, turn = np.hypot(x, y * rng.uniform(0.9, 1)), np.arctan2(y, x)
    outer = rng.uniform(0.2, 0.48) * size
    steps = np.repeat(rng.random(16), rng.integers(1, 9, 16))  # flat rings of uneven width
    position = r / outer * (len(steps) - 1)
    tone = np.interp(position, np.arange(len(steps)), steps).astype(np.float32)
    gloss = 0.5 + 0.5 * np.cos(int(rng.integers(1, 4)) * 2 * turn + rng.uniform(0, 6))  # the fan of light on turned metal
    share = rng.uniform(0, 0.6)
    disc = coloured(rng, (1 - share) * tone + share * gloss * (0.5 + 0.5 * tone))
    inner = outer * rng.uniform(0.2, 0.8) if rng.random() < 0.5 else -9.0
    return over(ground(rng, size), disc, soft_mask(np.maximum(r - outer, inner - r)))


def gear(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = placed(rng, size)
    r, turn = np.hypot(x, y), np.arctan2(y, x)
    outer = rng.uniform(0.25, 0.45) * size
    teeth = np.tanh(rng.uniform(1, 6) * np.sin(int(rng.integers(5, 40)) * turn)) * outer * rng.uniform(0.03, 0.15)
    edge = np.maximum(r - outer - teeth, outer * rng.uniform(0.1, 0.5) - r)
    holes, reach = int(rng.integers(0, 8)), outer * rng.uniform(0.55, 0.75)
    if holes:
        nearest = np.round(turn / (2 * np.pi / holes)) * (2 * np.pi / holes)
        away = np.hypot(x - reach * np.cos(nearest), y - reach * np.sin(nearest))
        edge = np.maximum(edge, outer * rng.uniform(0.05, 0.15) - away)
    height = np.clip(-edge / (size * rng.uniform(0.01, 0.08)), 0, 1) + rng.uniform(0, 0.15) * spectral(rng, size, 0.8)
    return over(ground(rng, size), coloured(rng, lit(rng, height, rng.uniform(0.1, 0.5))), soft_mask(edge))


def boxes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rounded plates, pills or chips with legs, one or a lattice of them, each with a bevel."""
    x, y = placed(rng, size)
    repeat = int(rng.integers(1, 5))
    pitch = size * (0.9 if repeat == 1 else 1.1 / repeat)
    if repeat > 1:
        x, y = np.mod(x, pitch) - pitch / 2, np.mod(y, pitch) - pitch / 2
    a, b = (rng.uniform(0.2, 0.42, 2) * pitch).tolist()
    corner = min(a, b) * rng.uniform(0.05, 1)
    qx, qy = np.abs(x) - a + corner, np.abs(y) - b + corner
    edge = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner
    scene = ground(rng, size)
    if rng.random() < 0.3:  # legs along two sides
        gap = b / int(rng.integers(3, 8))
        legs = np.maximum(np.maximum(np.abs(x) - a * 1.25, np.abs(y) - b), gap * 0.3 - np.abs(np.mod(y, gap) - gap / 2))
        scene = over(scene, random_colour(rng), soft_mask(legs))
    height = np.sqrt(np.clip(-edge / (min(a, b) * rng.uniform(0.1, 1)), 0, 1))
    height = height + rng.uniform(0, 0.1) * spectral(rng, size, 0.7)
    shadow = np.clip(1 - np.maximum(edge, 0) / (0.06 * size), 0, 1) * rng.uniform(0, 0.6)
    return over(scene * (1 - shadow[..., None]), coloured(rng, lit(rng, height, rng.uniform(0.1, 0.6))), soft_mask(edge))


def screw(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cylinders with a shaded round, mostly with a thread, a head and a tip."""
    x, y = placed(rng, size)
    half, radius = rng.uniform(0.25, 0.5) * size, rng.uniform(0.04, 0.16) * size
    pitch = radius * rng.uniform(0.25, 0.9)
    depth = radius * rng.uniform(0, 0.25)
    thread = np.sin(2 * np.pi * (x / pitch + y / radius * 0.25))
    tip = np.clip((half - x) / (radius * rng.uniform(0.5, 3)), 0.05, 1)
    width = (radius + depth * thread) * tip
    head = x < -half + radius * rng.uniform(0.5, 1.5)
    if rng.random() < 0.75:
        width = np.where(head, radius * rng.uniform(1.3, 2.2), width)
    across = np.clip(y / width, -1, 1)
    light = rng.uniform(-0.5, 0.5)
    shade = np.sqrt(1 - across**2) * 0.6 + 0.4 * np.exp(-(((across - light) / 0.2) ** 2)) + 0.2 * thread * ~head
    body = coloured(rng, np.clip(shade * 0.85 + 0.15 * spectral(rng, size, 0.8), 0, 1))
    return over(ground(rng, size), body, soft_mask(np.maximum(np.abs(y) - width, np.abs(x) - half)))


def bristles(rng: np.random.Generator, size: int) -> np.ndarray:
    """Tufts of thin hairs, brushes, cables: many short lines that lean alike."""
    image, draw = canvas(ground(rng, size))
    n, tufts = 2 * size, int(rng.integers(1, 25))
    lean, length, spread = rng.uniform(0, 2 * np.pi), n * rng.uniform(0.1, 0.5), rng.uniform(0.02, 0.5)
    width = int(rng.integers(1, 7))
    hairs = 360 // tufts
    centres = rng.uniform(0, n, (tufts, 2))
    colours = [random_colour(rng) for _ in range(int(rng.integers(1, 4)))]
    for k, centre in enumerate(centres):
        start = centre + rng.normal(0, n * 0.04 if tufts > 3 else n * 0.25, (hairs, 2))
        angle = lean + rng.normal(0, spread, hairs)
        end = start + length * rng.uniform(0.6, 1, (hairs, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
        gain = rng.uniform(0.5, 1.3, hairs)
        for line, g in zip(np.concatenate([start, end], 1).tolist(), gain.tolist()):
            draw.line(line, ink(colours[k % len(colours)], g), width)
    return finished(image)


def glyphs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rows of letter-like signs, printed or engraved: a few strokes and arcs in each cell of a line."""
    image, draw = canvas(ground(rng, size))
    n, colour = 2 * size, ink(random_colour(rng))
    height = n * rng.uniform(0.05, 0.3)
    width, pen = height * rng.uniform(0.4, 0.8), max(2, int(height * rng.uniform(0.06, 0.2)))
    slant = rng.uniform(-0.3, 0.3)
    alphabet = [rng.integers(0, 3, (int(rng.integers(2, 5)), 2)) / 2 for _ in range(12)]
    for row in range(min(int(rng.integers(1, 9)), int(n / (height * 1.4)))):
        top = row * height * 1.4 + rng.uniform(0, 0.1) * height + 0.05 * n
        for column in range(min(int(n / (width * 1.3)), 24)):
            if rng.random() < 0.15:
                continue
            sign = alphabet[int(rng.integers(12))]
            left = column * width * 1.3 + 0.03 * n
            xy = np.stack([left + sign[:, 0] * width + slant * height * (1 - sign[:, 1]), top + sign[:, 1] * height], 1)
            draw.line(xy.ravel().tolist(), colour, pen, joint="curve")
            if rng.random() < 0.4:
                start = rng.uniform(0, 360)
                draw.arc((left, top, left + width, top + height), start, start + rng.uniform(60, 300), colour, pen)
    turned = image.rotate(rng.uniform(-180, 180), fillcolor=ink(random_colour(rng))) if rng.random() < 0.4 else image
    return finished(turned)


def circuit(rng: np.random.Generator, size: int) -> np.ndarray:
    """Traces that turn by 45 degrees on a coarse lattice, with pads and small components."""
    image, draw = canvas(ground(rng, size))
    n, step = 2 * size, 2 * size / int(rng.integers(8, 40))
    trace, pad, body = (ink(random_colour(rng)) for _ in range(3))
    width = max(1, int(step * rng.uniform(0.15, 0.5)))
    for _ in range(int(rng.integers(10, 50))):
        turns = np.cumsum(rng.choice([-1, 0, 0, 0, 1], int(rng.integers(3, 14)))) + int(rng.integers(8))
        moves = np.stack([np.round(np.cos(turns * np.pi / 4)), np.round(np.sin(turns * np.pi / 4))], 1)
        path = (np.cumsum(moves, 0) + rng.integers(0, int(n / step) + 1, 2)) * step
        draw.line(path.ravel().tolist(), trace, width)
        for x, y in (path[0].tolist(), path[-1].tolist()):
            r = step * 0.45
            draw.ellipse((x - r, y - r, x + r, y + r), pad)
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), body)
    for _ in range(int(rng.integers(0, 8))):
        x, y = rng.uniform(0, n, 2).tolist()
        w, h = (step * rng.uniform(0.8, 4, 2)).tolist()
        draw.rectangle((x - w * 1.3, y - h * 0.8, x + w * 1.3, y + h * 0.8), pad)
        draw.rectangle((x - w, y - h, x + w, y + h), body)
    return finished(image)


def solar_cell(rng: np.random.Generator, size: int) -> np.ndarray:
    """A crystalline plate crossed by many thin fingers and a few wide bars."""
    u, v = plane(rng, size, 1.0)
    scale = rng.uniform(4, 14)
    tone = worley(rng, u * scale, v * scale, 1.0)[2] if rng.random() < 0.6 else octaves(rng, size, 2, 3)
    plate = coloured(rng, stretched(tone + 0.2 * octaves(rng, size), 2))
    fingers = np.abs(np.mod(u * int(rng.integers(12, 45)), 1) - 0.5) < rng.uniform(0.05, 0.2)
    bars = np.abs(np.mod(v * int(rng.integers(2, 6)), 1) - 0.5) < rng.uniform(0.02, 0.08)
    metal = random_colour(rng)
    return over(over(plate, metal, fingers * np.float32(rng.uniform(0.2, 0.8))), metal, bars * np.float32(0.9))


def collage(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two textures that meet along a line, the rim of an ellipse or a ragged border."""
    x, y = placed(rng, size)
    look = int(rng.integers(3))
    if look == 0:
        edge = x
    elif look == 1:
        edge = np.hypot(x, y * rng.uniform(0.5, 1)) - rng.uniform(0.2, 0.45) * size
    else:
        edge = (octaves(rng, size, 2, 4) - rng.uniform(0.4, 0.6)) * size * 0.3
    return over(texture(rng, size), texture(rng, size), soft_mask(edge / rng.uniform(1, 4)))


PARTS: dict[str, Pattern] = {
    "dead_leaves": dead_leaves,
    "concentric": concentric,
    "gear": gear,
    "boxes": boxes,
    "screw": screw,
    "bristles": bristles,
    "glyphs": glyphs,
    "circuit": circuit,
    "solar_cell": solar_cell,
    "collage": collage,
}
