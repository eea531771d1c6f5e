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

WIDTH, LEFT, RIGHT, TOP = 940, 74, 376, 46
PLOT, AXIS = 320, 48  # height of the plot itself, and of what its x axis needs below it
LEGEND_ROW, NOTE_ROW, NOTE_LENGTH = 17, 14, 165  # characters of a line of notes
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
    canvas, bottom = _canvas(series, title, note)
    known = [(x, y) for one in series for x, y in one.points if y is not None]
    last = max((int(x) for x, _ in known), default=1)
    x = _linear((0.5, last + 0.5), (LEFT, WIDTH - RIGHT))
    y = _upwards(canvas, bottom, [y for _, y in known], label)
    _along(canvas, bottom, x, [(float(i), str(i)) for i in range(1, last + 1, max(1, last // 15))], "tasks learnt")
    for i, one in enumerate(series):
        points = [(x(a), y(b)) for a, b in one.points if b is not None]
        if len(points) > 1:
            canvas.add(Line(points, _colour(i), 1.8))
        canvas.add(*(_mark(i, point, one.hollow) for point in points))
    _legend(canvas, series)
    return canvas


def memory_against(series: Sequence[Series], title: str, label: str, note: str) -> Canvas:
    """A mark a method: x bytes after the last task, by powers of two, y a metric; up and to the left is better."""
    canvas, bottom = _canvas(series, title, note)
    known = [(math.log2(nbytes), y) for one in series for nbytes, y in one.points if y is not None and nbytes > 0]
    low, high = (math.floor(min(known)[0] - 0.3), math.ceil(max(known)[0] + 0.3)) if known else (10, 20)
    x = _linear((low, high), (LEFT, WIDTH - RIGHT))
    y = _upwards(canvas, bottom, [y for _, y in known], label)
    every = -(-(high - low) // 8)
    _along(canvas, bottom, x, [(k, _bytes(k)) for k in range(low, high + 1, every)], "memory after the last task")
    for i, one in enumerate(series):
        points = [(x(math.log2(a)), y(b)) for a, b in one.points if b is not None and a > 0]
        canvas.add(*(_mark(i, point, one.hollow) for point in points))
    _legend(canvas, series)
    return canvas


def heat_map(
    matrix: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], title: str, note: str
) -> Canvas:
    """R: row i after step i, column j a product; colours run from the smallest to the largest figure that is there."""
    cell = max(30, min(56, 620 // max(len(columns), 1)))
    head, side = 112, 118
    width = max(side + cell * len(columns) + 30, 480)
    notes = _wrapped(note, width // 5)
    canvas = Canvas(width, TOP + head + cell * len(rows) + 20 + NOTE_ROW * len(notes), title, note)
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


def _canvas(series: Sequence[Series], title: str, note: str) -> tuple[Canvas, float]:
    """An empty chart with its title and notes, and where its x axis lies."""
    notes = _wrapped(note)
    plot = max(PLOT, LEGEND_ROW * len(series) + 10)
    canvas = Canvas(WIDTH, TOP + plot + AXIS + NOTE_ROW * len(notes) + 10, title, note)
    canvas.add(Words(LEFT, 24, title, size=14))
    _notes(canvas, notes)
    return canvas, TOP + plot


def _notes(canvas: Canvas, notes: Sequence[str]) -> None:
    for i, line in enumerate(reversed(notes)):
        canvas.add(Words(12, canvas.height - 10 - NOTE_ROW * i, line, size=10, colour=MUTED))


def _wrapped(note: str, length: int = NOTE_LENGTH) -> list[str]:
    lines = [""]
    for word in note.split():
        if len(lines[-1]) + len(word) >= length:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _linear(values: tuple[float, float], places: tuple[float, float]) -> Map:
    factor = (places[1] - places[0]) / (values[1] - values[0])
    return lambda value: places[0] + (value - values[0]) * factor


def _upwards(canvas: Canvas, bottom: float, values: Sequence[float], label: str) -> Map:
    """The y axis, from below the smallest to above the largest figure."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max((high - low) * 0.08, 0.005)
    y = _linear((low - room, high + room), (bottom, TOP))
    for value in ticks(low - room, high + room, 7):
        canvas.add(Line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], GRID))
        canvas.add(Words(LEFT - 8, y(value) + 4, f"{value:.6g}", "end"))
    canvas.add(Words(22, (TOP + bottom) / 2, label, "middle", turned=True))
    return y


def _along(canvas: Canvas, bottom: float, x: Map, labels: Sequence[tuple[float, str]], title: str) -> None:
    canvas.add(Line([(LEFT, bottom), (WIDTH - RIGHT, bottom)], MUTED))
    for value, text in labels:
        canvas.add(Line([(x(value), bottom), (x(value), bottom + 5)], MUTED))
        canvas.add(Words(x(value), bottom + 18, text, "middle"))
    canvas.add(Words((LEFT + WIDTH - RIGHT) / 2, bottom + 36, title, "middle"))


def _legend(canvas: Canvas, series: Sequence[Series]) -> None:
    for i, one in enumerate(series):
        top = TOP + 8 + LEGEND_ROW * i
        canvas.add(_mark(i, (WIDTH - RIGHT + 22, top), one.hollow))
        canvas.add(Words(WIDTH - RIGHT + 34, top + 4, _short(one.name, 58), size=11))


def _mark(number: int, place: Point, hollow: bool) -> Area:
    """A square, diamond, triangle or octagon; shape and colour together tell more methods apart than colour alone."""
    x, y = place
    corners = (4, 4, 3, 8)[number % 4]
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


def _bytes(power: int) -> str:
    """2 to a power, as '64 KiB'."""
    unit, name = ((20, "MiB") if power < 30 else (30, "GiB")) if power >= 20 else (10, "KiB") if power >= 10 else (0, "B")
    return f"{2 ** (power - unit)} {name}"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
