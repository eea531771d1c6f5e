"""The three pictures of continual learning: results in, ``Canvas``es out.

Quality over the number of tasks learnt, as the papers draw it; memory against quality; and the matrix R as a heat map,
row i after step i, column j the j-th product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyvad.bench.canvas import GRID, INK, MUTED, Area, Canvas, Line, Point, Words, box
from tinyvad.report.pictures import MAGMA
from tinyvad.report.svg import ticks
from tinyvad.report.text import NONE

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 860, 74, 300, 46, 76
HEIGHT, LEGEND_ROW, NOTE_LENGTH = 430, 17, 136  # characters of a line of notes
COLOURS = (
    "#3b6fb6", "#c2571a", "#2f8a5b", "#8a4fa0", "#a08a1c", "#4a8a94", "#b3264e", "#6b6b6b", "#1d3d73", "#7a3d10",
)  # fmt: skip
Map = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """One method's points; None where there is no figure. ``hollow`` marks a published figure."""

    name: str
    points: Sequence[tuple[float, float | None]]
    hollow: bool = False


def over_tasks(series: Sequence[Series], title: str, label: str, note: str) -> Canvas:
    """A line a method: x tasks learnt, y the mean of a metric over the tasks seen so far."""
    canvas = _canvas(series, title, note)
    known = [(x, y) for one in series for x, y in one.points if y is not None]
    last = max((int(x) for x, _ in known), default=1)
    x = _linear((0.5, last + 0.5), (LEFT, WIDTH - RIGHT))
    y, marks = _upwards([y for _, y in known], canvas.height)
    _frame(canvas, x, [(float(i), str(i)) for i in range(1, last + 1, max(1, last // 15))], y, marks, label)
    canvas.add(Words((LEFT + WIDTH - RIGHT) / 2, canvas.height - BOTTOM + 34, "tasks learnt", "middle"))
    for i, one in enumerate(series):
        points = [(x(a), y(b)) for a, b in one.points if b is not None]
        if len(points) > 1:
            canvas.add(Line(points, _colour(i), 1.8))
        canvas.add(*(_mark(i, point, one.hollow) for point in points))
    _legend(canvas, series)
    return canvas


def memory_against(series: Sequence[Series], title: str, label: str, note: str) -> Canvas:
    """A mark a method: x bytes after the last task, by powers of ten, y a metric; up and to the left is better."""
    canvas = _canvas(series, title, note)
    known = [(nbytes, y) for one in series for nbytes, y in one.points if y is not None and nbytes > 0]
    decades = [math.log10(nbytes / 1024) for nbytes, _ in known] or [0.0, 1.0]
    low, high = math.floor(min(decades) * 2 - 0.2) / 2, math.ceil(max(decades) * 2 + 0.2) / 2
    place = _linear((low, high), (LEFT, WIDTH - RIGHT))
    y, marks = _upwards([y for _, y in known], canvas.height)
    labels = [(decade, _kib(10.0**decade)) for decade in range(math.ceil(low), math.floor(high) + 1)]
    _frame(canvas, place, [(float(decade), text) for decade, text in labels], y, marks, label)
    canvas.add(Words((LEFT + WIDTH - RIGHT) / 2, canvas.height - BOTTOM + 34, "memory after the last task", "middle"))
    for i, one in enumerate(series):
        points = [(place(math.log10(a / 1024)), y(b)) for a, b in one.points if b is not None and a > 0]
        canvas.add(*(_mark(i, point, one.hollow) for point in points))
    _legend(canvas, series)
    return canvas


def heat_map(
    matrix: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], title: str, note: str
) -> Canvas:
    """R: row i after step i, column j a product; colours run from the smallest to the largest figure that is there."""
    cell = max(30, min(56, 620 // max(len(columns), 1)))
    head, side, notes = 112, 118, _wrapped(note)
    width = max(side + cell * len(columns) + 30, 420)
    canvas = Canvas(width, TOP + head + cell * len(rows) + 30 + 15 * len(notes), title, note)
    canvas.add(Words(12, 24, title, size=14))
    known = [value for row in matrix for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    for j, name in enumerate(columns):
        canvas.add(Words(side + cell * (j + 0.5) + 4, TOP + head - 8, _short(name, 16), turned=True))
    for i, (name, row) in enumerate(zip(rows, matrix, strict=True)):
        top = TOP + head + cell * i
        canvas.add(Words(side - 8, top + cell / 2 + 4, _short(name, 16), "end"))
        for j, value in enumerate(row):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            ink = INK if share > 0.6 else "#ffffff"
            canvas.add(
                Area(box(side + cell * j, top, cell - 2, cell - 2), _heat(share)),
                Words(side + cell * (j + 0.5) - 1, top + cell / 2 + 4, _figure(value), "middle", 11, ink),
            )
    _notes(canvas, notes)
    return canvas


def _canvas(series: Sequence[Series], title: str, note: str) -> Canvas:
    notes = _wrapped(note)
    height = max(HEIGHT, TOP + BOTTOM + LEGEND_ROW * len(series) + 10) + 15 * len(notes)
    canvas = Canvas(WIDTH, height, title, note)
    canvas.add(Words(LEFT, 24, title, size=14))
    _notes(canvas, notes)
    canvas.height = height
    return canvas


def _notes(canvas: Canvas, notes: Sequence[str]) -> None:
    for i, line in enumerate(notes):
        canvas.add(Words(12, canvas.height - 10 - 14 * (len(notes) - 1 - i), line, size=10, colour=MUTED))


def _wrapped(note: str) -> list[str]:
    lines = [""]
    for word in note.split():
        if len(lines[-1]) + len(word) >= NOTE_LENGTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _linear(values: tuple[float, float], places: tuple[float, float]) -> Map:
    factor = (places[1] - places[0]) / (values[1] - values[0])
    return lambda value: places[0] + (value - values[0]) * factor


def _upwards(values: Sequence[float], height: int) -> tuple[Map, list[float]]:
    """The y axis with its ticks, from below the smallest to above the largest figure."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max((high - low) * 0.08, 0.005)
    low, high = low - room, high + room
    return _linear((low, high), (height - BOTTOM, TOP)), ticks(low, high, 7)


def _frame(canvas: Canvas, x: Map, labels: Sequence[tuple[float, str]], y: Map, marks: Sequence[float], label: str) -> None:
    bottom = canvas.height - BOTTOM
    for value in marks:
        canvas.add(Line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], GRID))
        canvas.add(Words(LEFT - 8, y(value) + 4, f"{value:.10g}", "end"))
    for value, text in labels:
        canvas.add(Line([(x(value), bottom), (x(value), bottom + 5)], MUTED))
        canvas.add(Words(x(value), bottom + 18, text, "middle"))
    canvas.add(Line([(LEFT, bottom), (WIDTH - RIGHT, bottom)], MUTED))
    canvas.add(Words(20, (TOP + bottom) / 2, label, "middle", turned=True))


def _legend(canvas: Canvas, series: Sequence[Series]) -> None:
    for i, one in enumerate(series):
        top = TOP + 8 + LEGEND_ROW * i
        canvas.add(_mark(i, (WIDTH - RIGHT + 22, top), one.hollow))
        canvas.add(Words(WIDTH - RIGHT + 34, top + 4, _short(one.name, 42), size=11))


def _mark(number: int, place: Point, hollow: bool) -> Area:
    """A square, diamond, triangle or octagon; shape and colour together tell more methods apart than colour alone."""
    x, y = place
    corners = (4, 4, 3, 8)[number // len(COLOURS) % 4 if number >= len(COLOURS) else number % 4]
    start = (math.pi / 4, 0.0, -math.pi / 2, math.pi / 8)[number % 4]
    around = [start + 2 * math.pi * k / corners for k in range(corners)]
    points = [(x + 5 * math.cos(angle), y + 5 * math.sin(angle)) for angle in around]
    return Area(points, None if hollow else _colour(number), _colour(number))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _heat(share: float) -> str:
    return "#" + MAGMA[2 + round(share * (len(MAGMA) - 3))]


def _figure(value: float) -> str:
    """'.93', and '1' for what rounds to it."""
    text = f"{value:.2f}"
    return text.removeprefix("0") if 0 <= value < 0.995 else "1" if value < 1.005 else text


def _kib(kib: float) -> str:
    return f"{kib:g} KiB" if kib < 1024 else f"{kib / 1024:.3g} MiB"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
