"""One picture, two files: lines, areas and words in, an SVG for pages and a PNG for everything else out.

Pillow, which tinyvad needs anyway, draws the PNG from the same list of shapes that the SVG is written from, so that both
show the same and no plotting library has to be installed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from tinyvad.report.text import escape

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]
SCALE = 2  # PNG pixels a unit
INK, MUTED, GRID, PAGE = "#333333", "#777777", "#e3e3e3", "#ffffff"
_ANCHORS = {"start": "l", "middle": "m", "end": "r"}


@dataclass(frozen=True)
class Line:
    """A polyline."""

    points: Sequence[Point]
    colour: str = INK
    width: float = 1.0


@dataclass(frozen=True)
class Area:
    """A polygon; ``colour`` None leaves it hollow, ``outline`` None without a rim."""

    points: Sequence[Point]
    colour: str | None
    outline: str | None = None


@dataclass(frozen=True)
class Words:
    """A line of text at its baseline's start, middle or end; ``turned`` reads upwards."""

    x: float
    y: float
    text: str
    anchor: Anchor = "start"
    size: int = 12
    colour: str = INK
    turned: bool = False


@dataclass
class Canvas:
    """A picture of ``width`` x ``height`` units, y downwards; ``note`` says what made it and travels in both files."""

    width: int
    height: int
    title: str
    note: str
    shapes: list[Line | Area | Words] = field(default_factory=list)

    def add(self, *shapes: Line | Area | Words) -> None:
        """Draw on top of what is there."""
        self.shapes.extend(shapes)


def box(x: float, y: float, width: float, height: float) -> list[Point]:
    """The corners of a rectangle."""
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def to_svg(canvas: Canvas) -> str:
    """The picture as an SVG that stands alone; ``title`` and ``desc`` for those who hear it."""
    parts = [_svg(shape) for shape in canvas.shapes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {canvas.width} {canvas.height}" width="{canvas.width}" '
        f'height="{canvas.height}" role="img" font-family="system-ui,sans-serif">'
        f"<title>{escape(canvas.title)}</title><desc>{escape(canvas.note)}</desc>\n"
        f'<rect width="{canvas.width}" height="{canvas.height}" fill="{PAGE}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _svg(shape: Line | Area | Words) -> str:
    if isinstance(shape, Words):
        place = f'transform="translate({shape.x:.1f} {shape.y:.1f}) rotate(-90)"' if shape.turned else (
            f'x="{shape.x:.1f}" y="{shape.y:.1f}"'
        )  # fmt: skip
        return (
            f'<text {place} text-anchor="{shape.anchor}" font-size="{shape.size}" fill="{shape.colour}">'
            f"{escape(shape.text)}</text>"
        )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
    if isinstance(shape, Line):
        return f'<polyline points="{points}" fill="none" stroke="{shape.colour}" stroke-width="{shape.width:g}"/>'
    return f'<polygon points="{points}" fill="{shape.colour or "none"}" stroke="{shape.outline or "none"}"/>'


def to_png(canvas: Canvas) -> bytes:
    """The picture as a PNG of ``SCALE`` pixels a unit; title and note are its text chunks."""
    image = Image.new("RGB", (canvas.width * SCALE, canvas.height * SCALE), PAGE)
    draw = ImageDraw.Draw(image)
    for shape in canvas.shapes:
        if isinstance(shape, Words):
            _write(image, draw, shape)
            continue
        points = [(x * SCALE, y * SCALE) for x, y in shape.points]
        if isinstance(shape, Line):
            draw.line(points, fill=shape.colour, width=max(1, round(shape.width * SCALE)), joint="curve")
        else:
            draw.polygon(points, fill=shape.colour, outline=shape.outline, width=SCALE if shape.outline else 0)
    facts = PngImagePlugin.PngInfo()
    facts.add_itxt("Title", canvas.title)
    facts.add_itxt("Description", canvas.note)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=facts)
    return file.getvalue()


def _write(image: Image.Image, draw: ImageDraw.ImageDraw, words: Words) -> None:
    font = ImageFont.load_default(words.size * SCALE)
    if not isinstance(font, ImageFont.FreeTypeFont):  # a Pillow without FreeType has one small font and no anchors
        draw.text((words.x * SCALE, words.y * SCALE - 11), words.text, words.colour, font)
        return
    anchor = _ANCHORS[words.anchor] + "s"  # s: the baseline, as in SVG
    if not words.turned:
        draw.text((words.x * SCALE, words.y * SCALE), words.text, words.colour, font, anchor)
        return
    left, top, right, bottom = (round(v) for v in font.getbbox(words.text, anchor="ls"))
    ink = Image.new("L", (max(1, right - left), max(1, bottom - top)), 0)
    ImageDraw.Draw(ink).text((-left, -top), words.text, 255, font, "ls")
    ink = ink.rotate(90, expand=True)
    along = {"start": 0.0, "middle": 0.5, "end": 1.0}[words.anchor]
    place = round(words.x * SCALE) + top, round(words.y * SCALE - (1 - along) * ink.height)
    image.paste(words.colour, place, ink)
