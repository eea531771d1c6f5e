"""Pictures of feature importance: products and their masks in, Pillow pictures and a ``Canvas`` out.

A sheet is a table of small pictures with names at its sides, every row of one colour scale, so that products compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinyvad.analysis.products import Product
from tinyvad.bench.canvas import INK, MUTED, PAGE, Area, Canvas, Words
from tinyvad.bench.plots import COLOURS
from tinyvad.model import upsample
from tinyvad.report.pictures import colour, overlay

SIDE = 180  # pixels of a tile
STRIP = 26  # pixels of a row of channels
EDGE, GAP, NAMES, TEXT, TITLE = 16, 8, 120, 13, 17


@dataclass(frozen=True, eq=False)
class Tile:
    """(h, w, 3) uint8 pixels and a line below them, '' for none."""

    pixels: np.ndarray
    caption: str = ""


def sheet(
    tiles: Sequence[Sequence[Tile]], rows: Sequence[str], columns: Sequence[str], title: str, note: str
) -> Image.Image:
    """A table of tiles with names of rows and columns, a title above and a note below."""
    widths = [max(row[j].pixels.shape[1] for row in tiles) for j in range(len(columns))]
    heights = [max(tile.pixels.shape[0] for tile in row) for row in tiles]
    below = [TEXT + 6 if any(tile.caption for tile in row) else 0 for row in tiles]
    lines = _wrapped(note, max(60, (NAMES + sum(widths)) // 6))
    top = EDGE + TITLE + 14 + TEXT + 8
    width = 2 * EDGE + NAMES + sum(widths) + GAP * len(columns)
    height = top + sum(heights) + sum(below) + GAP * len(rows) + (TEXT + 3) * len(lines) + 2 * EDGE
    words = ImageFont.load_default(TITLE).getlength(title) if _has_sizes() else 0
    page = Image.new("RGB", (max(width, math.ceil(words) + 2 * EDGE), height), PAGE)
    draw = ImageDraw.Draw(page)
    _text(draw, (EDGE, EDGE), title, TITLE)
    left = EDGE + NAMES
    for name, wide in zip(columns, widths, strict=True):
        _text(draw, (left, top - TEXT - 8), _fitting(name, wide))
        left += wide + GAP
    for row, name, tall, under in zip(tiles, rows, heights, below, strict=True):
        for i, part in enumerate(name.split("\n")):
            _text(draw, (EDGE, top + i * (TEXT + 3)), _fitting(part, NAMES - GAP), colour=INK if i == 0 else MUTED)
        left = EDGE + NAMES
        for tile, wide in zip(row, widths, strict=True):
            page.paste(Image.fromarray(tile.pixels), (left, top))
            _text(draw, (left, top + tall + 2), _fitting(tile.caption, wide), colour=MUTED)
            left += wide + GAP
        top += tall + under + GAP
    for i, line in enumerate(lines):
        _text(draw, (EDGE, top + EDGE + i * (TEXT + 3)), line, colour=MUTED)
    return page


def component_sheet(products: Sequence[Product], names: Sequence[str]) -> Image.Image:
    """How many components each cell needs; a row a layer, a column a product."""
    tiles, rows = [], []
    for layer, name in enumerate(names):
        found = [product.layers[layer] for product in products]
        most = max(int(one.counts.max()) for one in found)
        captions = [f"r {one.components}, mean {one.counts.mean():.1f}" for one in found]
        pixels = [_enlarged(colour(one.counts, max(most, 1))) for one in found]
        tiles.append([Tile(*pair) for pair in zip(pixels, captions, strict=True)])
        rows.append(f"{name}\n0 to {most}\nof {found[0].values.shape[2]}")
    note = (
        "Principal components that a cell of the map needs for 80 % of its variance over good images. Black: none, pale: "
        "the row's most. r: what the layer is decomposed into, the 99th percentile over a tenth of the cells."
    )
    return sheet(tiles, rows, [product.name for product in products], "Components", note)


def importance_sheet(products: Sequence[Product], names: Sequence[str]) -> Image.Image:
    """Where the good images of a product vary, over their mean image; a row a layer, a column a product."""
    tiles = [[Tile(_resized(product.photo), f"mean of {product.count}") for product in products]]
    for layer in range(len(names)):
        spread = [np.sqrt(product.layers[layer].totals) for product in products]
        limit = max(float(np.percentile(np.concatenate([values.ravel() for values in spread]), 99)), 1e-12)
        heat = [_over(product.photo, values, limit) for product, values in zip(products, spread, strict=True)]
        tiles.append([Tile(_resized(pixels)) for pixels in heat])
    note = (
        "Square root of the summed importance of a cell's channels before it is normalised: where good images differ from "
        "each other. One scale a row, up to its 99th percentile; smooth between the cells."
    )
    return sheet(tiles, ["photo", *names], [product.name for product in products], "Importance over the object", note)


def channel_sheet(
    products: Sequence[Product], names: Sequence[str], masks: Sequence[Sequence[np.ndarray]], keep: float
) -> Image.Image:
    """In how many cells each channel is kept; a row a product, a column a layer, from channel 0 at the left."""
    shares = [[mask.mean((0, 1)) for mask in layer] for layer in masks]  # [layer][product] (C,)
    limits = [max(float(np.max(layer)), 1e-12) for layer in shares]
    tiles = [
        [Tile(_strip(colour(layer[i], limit))) for layer, limit in zip(shares, limits, strict=True)]
        for i in range(len(products))
    ]
    columns = [f"{name}, 0 to {limit:.0%} of the cells" for name, limit in zip(names, limits, strict=True)]
    note = (
        f"Channels from left to right; pale: among the {keep:g} % most important in many cells. A channel that is pale "
        "in several rows is shared between these products."
    )
    return sheet(tiles, [product.name for product in products], columns, "Channels that are kept", note)


def scatter(points: Mapping[str, Sequence[Sequence[float]]], title: str, note: str) -> Canvas:
    """Points of several products in a plane whose axes mean nothing, with a legend."""
    side, top, legend = 560, 46, 240
    every = np.concatenate([np.asarray(rows, np.float64).reshape(-1, 2) for rows in points.values()])
    low, span = every.min(0), max(float(np.ptp(every, axis=0).max()), 1e-12)
    lines = _wrapped(note, (side + legend) // 6)
    canvas = Canvas(side + legend, top + side + 24 + 14 * len(lines), title, note)
    canvas.add(Words(16, 26, title, size=15))
    for i, (name, rows) in enumerate(points.items()):
        canvas.add(_mark(side + 20, top + 20 + 20 * i, i), Words(side + 34, top + 24 + 20 * i, _short(name, 30)))
        for x, y in (np.asarray(rows, np.float64).reshape(-1, 2) - low) / span:
            canvas.add(_mark(20 + (side - 40) * x, top + (side - 40) * (1 - y), i))
    for i, line in enumerate(lines):
        canvas.add(Words(16, top + side + 8 + 14 * i, line, size=10, colour=MUTED))
    return canvas


def _mark(x: float, y: float, number: int) -> Area:
    """A small polygon whose corners and colour tell a product."""
    corners, turn = ((4, 0.785), (4, 0.0), (3, -1.571), (8, 0.393))[number % 4]
    around = [turn + 2 * math.pi * k / corners for k in range(corners)]
    return Area([(x + 4 * math.cos(a), y + 4 * math.sin(a)) for a in around], COLOURS[number % len(COLOURS)])


def _over(photo: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray:
    heat = upsample(values[None], (photo.shape[0], photo.shape[1]), 0.0)[0]
    return np.asarray(overlay(photo, heat, None, limit))


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Cells as squares of whole pixels, up to about ``SIDE``; larger maps are made smaller."""
    height, width = pixels.shape[:2]
    factor = SIDE // max(height, width)
    return np.repeat(np.repeat(pixels, factor, 0), factor, 1) if factor else _resized(pixels)


def _strip(pixels: np.ndarray) -> np.ndarray:
    """(C, 3) -> (``STRIP``, w, 3): a bar a channel, as wide as fits three tiles and at least one pixel."""
    each = max(1, min(12, 3 * SIDE // len(pixels)))
    return np.repeat(np.repeat(pixels[None], each, 1), STRIP, 0)


def _resized(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = (max(1, round(width * SIDE / max(height, width))), max(1, round(height * SIDE / max(height, width))))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _has_sizes() -> bool:
    """Whether this Pillow has a font that scales."""
    return isinstance(ImageFont.load_default(TITLE), ImageFont.FreeTypeFont)


def _text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int = TEXT, colour: str = INK) -> None:
    draw.text(place, text, colour, ImageFont.load_default(size))


def _fitting(text: str, width: float) -> str:
    """``text`` cut so that it is no wider than ``width`` pixels."""
    font = ImageFont.load_default(TEXT)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrapped(text: str, length: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= length:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
