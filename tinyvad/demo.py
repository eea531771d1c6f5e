"""A small synthetic inspection task: pictures of a machined flange, good and defective, with exact masks.

Flows in: a seed and counts. Flows out: a folder in MVTec's layout. Everything is drawn from signed distances (negative
inside a shape), with one random generator a picture, so that a picture depends on the seed and its own number only.

The scene: a brushed aluminium plate with a turned face, a bore, four bolt holes and a dowel hole lies on a dark
bench, lit from the upper left. Parts differ in place (2 pixels of 256), angle (1.5 degrees), brushing, turning marks,
light and sensor noise. Defects: a scratch, a missing bolt hole, a stain, a chipped edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, PngImagePlugin

from tinyvad.errors import InputError
from tinyvad.files import new_folder, write_text

TITLE = "Synthetic pictures rendered by `tinyvad demo`"
README = "README.txt"
DEFECTS = ("edge_chip", "missing_hole", "scratch", "stain")

# Shapes of the part, in units of half the picture's side.
PLATE, CORNER, BEVEL = 0.8, 0.14, 0.022
BORE, FACE, GROOVE = 0.24, 0.5, 0.57
BOLT_CENTRES = ((-0.6, -0.6), (0.6, -0.6), (-0.6, 0.6), (0.6, 0.6))
BOLT, DOWEL, DOWEL_CENTRE = 0.085, 0.035, (0.0, -0.68)
METAL_TINT = np.array([0.985, 1.0, 1.02], np.float32)
BENCH_TINT = np.array([0.95, 1.0, 0.98], np.float32)
STAIN_TINT = np.array([0.75, 0.95, 1.3], np.float32)  # how much a stain swallows of red, green and blue


@dataclass(frozen=True)
class _Scene:
    """One part on the bench, and the light: what a picture has before any defect. All maps are (size, size) float32."""

    u: np.ndarray  # part coordinates of each pixel
    v: np.ndarray
    pixel: float  # a pixel's side in the same units
    light: tuple[float, float]  # unit vector towards the light, part coordinates
    brushing: np.ndarray  # mean 0, std 1
    turning: np.ndarray
    bench: np.ndarray
    exposure: np.ndarray
    noise: np.ndarray  # (size, size, 3), grey levels


@dataclass(frozen=True)
class _Defect:
    """What a defect changes: a bolt hole that is left out, a distance that is cut off the plate, the metal's light."""

    missing_bolt: int | None = None
    cut: np.ndarray | None = None  # (size, size) signed distance
    light: np.ndarray | None = None  # (size, size, 3), added to the metal


def render_demo(
    folder: str | Path, seed: int = 0, n_train: int = 60, n_good: int = 20, n_defect: int = 24, size: int = 256
) -> Path:
    """Write ``train/good``, ``test/good``, ``test/<defect>`` and ``ground_truth/<defect>`` into ``folder``.

    Args:
        folder: new, empty, or written by an earlier call (then it is replaced).
        n_train, n_good, n_defect: pictures; the four kinds of defect take turns.
        size: pixels, 64 to 1024.

    Raises:
        InputError: ``folder`` holds something else; a number is out of range.
    """
    folder = Path(folder)
    if not 64 <= size <= 1024:
        raise InputError(f"demo: pictures of {size} pixels; give a size from 64 to 1024")
    if n_train < 1 or n_good < 1 or n_defect < 0 or seed < 0:
        raise InputError("demo: seed and counts can't be negative, and good pictures are needed: give 1 or more")
    readme = folder / README
    if readme.is_file() and not readme.read_bytes().startswith(TITLE.encode()):
        raise InputError(f"{readme} is not ours; choose an empty or new folder for the demo")
    with new_folder(folder, README) as root:
        for i in range(n_train):
            image, _ = render_part(np.random.default_rng((seed, 0, i)), size)
            _write_png(root / "train" / "good" / f"{i:03d}.png", image, seed)
        for i in range(n_good):
            image, _ = render_part(np.random.default_rng((seed, 1, i)), size)
            _write_png(root / "test" / "good" / f"{i:03d}.png", image, seed)
        for i in range(n_defect):
            kind, name = DEFECTS[i % len(DEFECTS)], f"{i // len(DEFECTS):03d}"
            image, mask = render_part(np.random.default_rng((seed, 2, i)), size, kind)
            _write_png(root / "test" / kind / f"{name}.png", image, seed)
            _write_png(root / "ground_truth" / kind / f"{name}_mask.png", mask.astype(np.uint8) * 255, seed)
        write_text(
            root / README,
            f"{TITLE} --seed {seed}: a machined flange that does not exist.\n\n"
            f"{n_train} good pictures to learn from, {n_good} good and {n_defect} defective ones to test on\n"
            f"({', '.join(DEFECTS)}), {size} pixels, in MVTec AD's layout. For trying the tool only:\n"
            "results on drawn pictures say nothing about a real product.\n",
        )
    return folder


def render_part(rng: np.random.Generator, size: int = 256, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One picture and its mask; without ``defect`` the same generator state gives the same part, unharmed.

    Args:
        rng: drawn from in a fixed order, the part first, then the defect.
        size: pixels.
        defect: None or one of ``DEFECTS``.

    Returns:
        (size, size, 3) uint8 RGB, and (size, size) bool: where the defect changes the noise-free picture by a grey
        level or more, gaps of a pixel closed.
    """
    scene = _scene(rng, size)
    clean = _draw(scene, _Defect())
    if defect is None:
        return _develop(clean, scene), np.zeros((size, size), bool)
    makers = {"edge_chip": _edge_chip, "missing_hole": _missing_hole, "scratch": _scratch, "stain": _stain}
    if defect not in makers:
        raise InputError(f"demo: no defect called {defect}; choose one of {', '.join(DEFECTS)}")
    drawn = _draw(scene, makers[defect](scene, rng))
    changed = np.abs(drawn - clean).max(axis=2) >= 1
    return _develop(drawn, scene), _closed(changed)


def _scene(rng: np.random.Generator, size: int) -> _Scene:
    pixel = 2 / size
    angle = math.radians(rng.uniform(-1.5, 1.5))
    shift_x, shift_y = rng.uniform(-2, 2) / 128, rng.uniform(-2, 2) / 128
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * pixel + (pixel / 2 - 1)
    u = math.cos(angle) * (x - shift_x) + math.sin(angle) * (y - shift_y)
    v = math.cos(angle) * (y - shift_y) - math.sin(angle) * (x - shift_x)
    light = math.radians(225 + rng.uniform(-8, 8)) - angle  # upper left; y points down
    radius = np.hypot(u, v)
    turning = np.sin(2 * math.pi * radius / 0.031 + rng.uniform(0, 2 * math.pi))
    turning += 0.5 * sum(np.sin(2 * math.pi * (k * radius + rng.uniform())) for k in (3, 5, 8))
    fall = light + rng.uniform(-0.5, 0.5)
    slope = math.cos(fall) * x + math.sin(fall) * y
    exposure = rng.uniform(0.97, 1.03) * (1 + rng.uniform(0.03, 0.09) * slope) * (1 - 0.06 * (x**2 + y**2))
    noise = 1.6 * rng.standard_normal((size, size, 1), np.float32)
    noise = noise + 0.7 * rng.standard_normal((size, size, 3), np.float32)
    return _Scene(
        u=u,
        v=v,
        pixel=pixel,
        light=(math.cos(light), math.sin(light)),
        brushing=_streaks(rng, size, angle, along=0.06 * size, across=0.002 * size),
        turning=turning,
        bench=_streaks(rng, size, 0.0, along=0.004 * size, across=0.004 * size),
        exposure=exposure,
        noise=noise,
    )


def _draw(scene: _Scene, defect: _Defect) -> np.ndarray:
    """The noise-free picture in grey levels, (size, size, 3) float32."""
    u, v, radius = scene.u, scene.v, np.hypot(scene.u, scene.v)
    outline = _rounded_square(u, v)
    bolts = [_disc(u, v, centre, BOLT) for i, centre in enumerate(BOLT_CENTRES) if i != defect.missing_bolt]
    holes = np.minimum.reduce([*bolts, _disc(u, v, DOWEL_CENTRE, DOWEL)])
    plate = outline if defect.cut is None else np.maximum(outline, -defect.cut)

    # The metal: brushed, and turned between bore and groove, where the marks reflect towards and away from the light
    lit = (u * scene.light[0] + v * scene.light[1]) / np.maximum(radius, 1e-3)  # cosine of the angle to the light
    turned = _inside(scene, np.maximum(radius - FACE, BORE - radius))
    metal = 0.56 + (1 - turned) * 0.022 * scene.brushing + turned * (0.05 + 0.016 * scene.turning + 0.07 * lit**2)
    groove = np.abs(radius - GROOVE) - 0.014
    metal += _inside(scene, groove) * (-0.2 - 0.1 * lit * np.sign(radius - GROOVE))
    for shape, width in ((plate, BEVEL), (BORE - radius, -0.03), (holes, -0.025)):
        metal += _bevel(scene, shape, width)
    colour = metal[..., None] * METAL_TINT
    if defect.light is not None:
        colour = colour + defect.light

    # What lies around and below it
    shadow = _rounded_square(u + 0.05 * scene.light[0], v + 0.05 * scene.light[1])
    bench = (0.15 + 0.012 * scene.bench) * (1 - 0.6 * np.clip(0.5 - shadow / 0.08, 0, 1))
    wall = _disc(u, v, (0, 0), BORE)
    depth = 0.07 + 0.16 * np.clip(1 + wall / 0.09, 0, 1) * np.clip(-lit, 0, 1)  # the far wall of the bore catches light
    ground = np.where(radius < BORE + 0.02, depth, bench)[..., None] * BENCH_TINT

    covered = _inside(scene, plate) * (1 - _inside(scene, wall)) * (1 - 0.93 * _inside(scene, holes))
    picture = ground + covered[..., None] * (colour - ground)
    return 255 * picture * scene.exposure[..., None]


def _edge_chip(scene: _Scene, rng: np.random.Generator) -> _Defect:
    """A bite out of the plate's outer edge."""
    along, side = rng.uniform(-0.55, 0.55), rng.integers(4)
    cos, sin = (1, 0, -1, 0)[side], (0, 1, 0, -1)[side]
    depth = PLATE + rng.uniform(-0.01, 0.02)
    bite = _blob(scene, rng, (cos * depth - sin * along, sin * depth + cos * along), rng.uniform(0.045, 0.075))
    return _Defect(cut=bite)


def _missing_hole(scene: _Scene, rng: np.random.Generator) -> _Defect:
    """A bolt hole that nobody drilled."""
    return _Defect(missing_bolt=int(rng.integers(len(BOLT_CENTRES))))


def _scratch(scene: _Scene, rng: np.random.Generator) -> _Defect:
    """A thin bent line, bright with a dark flank, that fades at its ends."""
    start, length = _spot(rng), rng.uniform(0.3, 0.6)
    inwards = math.atan2(-start[1], -start[0])
    direction = inwards + rng.choice([-1, 1]) * rng.uniform(0.9, 1.6)  # passes beside the bore
    forward = np.array([math.cos(direction), math.sin(direction)])
    sideways = np.array([-forward[1], forward[0]])
    t = np.linspace(0, 1, 33)[:, None]
    line = start + length * t * forward + rng.uniform(-0.3, 0.3) * t * (1 - t) * sideways  # (33, 2)
    across, position = _along_line(scene, line)
    width = rng.uniform(0.8, 1.2) * 2 / 256
    strength = rng.uniform(0.16, 0.28) * np.clip(8 * position * (1 - position), 0, 1)
    groove = np.exp(-((across / width) ** 2)) - 0.6 * np.exp(-((across / width - 1.8) ** 2))
    return _Defect(light=(strength * groove)[..., None] * METAL_TINT)


def _stain(scene: _Scene, rng: np.random.Generator) -> _Defect:
    """A brownish spot with a darker rim, as a dried drop of coolant leaves it."""
    spot = _blob(scene, rng, tuple(_spot(rng)), rng.uniform(0.06, 0.12))
    inside = np.clip(0.5 - spot / 0.02, 0, 1)
    darkness = rng.uniform(0.05, 0.08) * inside * (1 + 0.8 * np.exp(-((spot / 0.018) ** 2)))
    return _Defect(light=-darkness[..., None] * STAIN_TINT)


def _spot(rng: np.random.Generator) -> np.ndarray:
    """A random place on the metal, (2,): between bore and edge, clear of the bolt holes."""
    angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.36, 0.62)
    return radius * np.array([math.cos(angle), math.sin(angle)])


def _blob(scene: _Scene, rng: np.random.Generator, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Distance to a round shape with a wavy outline, (size, size)."""
    du, dv = scene.u - float(centre[0]), scene.v - float(centre[1])
    angle = np.arctan2(dv, du)
    waves = sum(rng.uniform(0, 0.5 / k) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
    return np.hypot(du, dv) - radius * (1 + 0.6 * waves)


def _along_line(scene: _Scene, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance to a polyline (points, 2), and the place of the nearest point along it from 0 to 1."""
    best = np.full(scene.u.shape, np.inf, np.float32)
    across, position = np.zeros_like(best), np.zeros_like(best)
    for i, ((au, av), (bu, bv)) in enumerate(zip(line[:-1].astype(np.float32), line[1:].astype(np.float32))):
        du, dv = bu - au, bv - av
        pu, pv = scene.u - au, scene.v - av
        t = np.clip((pu * du + pv * dv) / (du * du + dv * dv), 0, 1)
        distance = np.hypot(pu - t * du, pv - t * dv)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        across = np.where(nearer, distance * np.sign(pu * dv - pv * du), across)
        position = np.where(nearer, (i + t) / (len(line) - 1), position)
    return across, position


def _rounded_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the plate's outline."""
    du, dv = np.abs(u) - (PLATE - CORNER), np.abs(v) - (PLATE - CORNER)
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - CORNER


def _disc(u: np.ndarray, v: np.ndarray, centre: tuple[float, float], radius: float) -> np.ndarray:
    return np.hypot(u - float(centre[0]), v - float(centre[1])) - radius


def _inside(scene: _Scene, distance: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1."""
    return np.clip(0.5 - distance / scene.pixel, 0, 1)


def _bevel(scene: _Scene, distance: np.ndarray, width: float) -> np.ndarray:
    """Light on a slanted rim: ``width`` > 0 falls outwards inside the shape, < 0 falls into a hole, outside of it."""
    dv, du = np.gradient(distance, scene.pixel)
    rim = _inside(scene, np.abs(distance + width / 2) - abs(width) / 2)
    return 0.2 * np.sign(width) * rim * (du * scene.light[0] + dv * scene.light[1])


def _streaks(rng: np.random.Generator, size: int, angle: float, along: float, across: float) -> np.ndarray:
    """White noise blurred by a Gaussian of ``along`` x ``across`` pixels turned by ``angle``; mean 0, std 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), np.float32))
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    fu, fv = np.cos(angle) * fx + np.sin(angle) * fy, np.cos(angle) * fy - np.sin(angle) * fx
    blur = np.exp(-2 * np.pi**2 * ((along * fu) ** 2 + (across * fv) ** 2))
    field = np.fft.irfft2(spectrum * blur, s=(size, size))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _develop(picture: np.ndarray, scene: _Scene) -> np.ndarray:
    """Add the sensor's noise and round to bytes."""
    return np.clip(np.rint(picture + scene.noise), 0, 255).astype(np.uint8)


def _closed(mask: np.ndarray) -> np.ndarray:
    """Morphological closing with a 3x3 window: gaps of a pixel vanish, the outline stays."""
    grown = sliding_window_view(np.pad(mask, 2), (3, 3)).any(axis=(2, 3))
    return np.asarray(sliding_window_view(grown, (3, 3)).all(axis=(2, 3)))


def _write_png(path: Path, image: np.ndarray, seed: int) -> None:
    """Write a PNG that says in its text what it is, into a folder that is not there yet for anyone else."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", f"{TITLE} --seed {seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "PNG", pnginfo=text, compress_level=1)
