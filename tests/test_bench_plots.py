"""Plots: where points and cells must lie, what both files hold, and tables worked out by hand."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tinyvad.bench.canvas import Area, Canvas, Line, Words, box, to_png, to_svg
from tinyvad.bench.compare import COUNTERPARTS, nearest, published_points, published_rows
from tinyvad.bench.plots import Series, heat_map, memory_against, over_tasks
from tinyvad.bench.tables import Run, groups, matrix_rows, step_rows, summary_rows, to_csv, to_markdown
from tinyvad.continual.matrix import square
from tinyvad.continual.methods import METHODS
from tinyvad.continual.published import figures

SVG = "{http://www.w3.org/2000/svg}"


def points(shape: Line | Area) -> np.ndarray:
    return np.array(shape.points)


def marks(canvas: Canvas) -> list[np.ndarray]:
    """Centres of the marks of points: areas with a rim, the legend's left out."""
    legend = max((shape.x for shape in canvas.shapes if isinstance(shape, Words)), default=0)
    found = [points(shape).mean(0) for shape in canvas.shapes if isinstance(shape, Area) and shape.outline is not None]
    return [centre for centre in found if centre[0] < legend - 30]


# --- the canvas


def test_both_files_show_the_same_rectangle() -> None:
    canvas = Canvas(40, 34, "a <title>", "made by & co")
    canvas.add(Area(box(10, 5, 20, 10), "#ff0000"), Line([(0, 19), (40, 19)], "#0000ff"))
    canvas.add(Words(1, 30, "x < y", colour="#00ff00"))
    root = ElementTree.fromstring(to_svg(canvas))
    assert root.get("viewBox") == "0 0 40 34"
    assert root.find(f"{SVG}title").text == "a <title>"
    assert root.find(f"{SVG}desc").text == "made by & co"
    assert root.find(f"{SVG}polygon").get("points") == "10.0,5.0 30.0,5.0 30.0,15.0 10.0,15.0"
    assert root.find(f"{SVG}text").text == "x < y"
    image = Image.open(io.BytesIO(to_png(canvas)))
    assert image.size == (80, 68)
    assert image.info["Title"] == "a <title>" and image.info["Description"] == "made by & co"
    assert image.getpixel((40, 20)) == (255, 0, 0)
    assert image.getpixel((70, 20)) == (255, 255, 255)


@pytest.mark.parametrize(("anchor", "rows"), [("start", (20, 50)), ("middle", (35, 65)), ("end", (50, 80))])
def test_turned_words_read_upwards_from_their_anchor(anchor: Any, rows: tuple[int, int]) -> None:
    """A long word at (10, 50) of 100: above, around or below its anchor; left of its baseline."""
    canvas = Canvas(40, 100, "", "")
    canvas.add(Words(20, 50, "nnnn", anchor, turned=True))
    dark = np.argwhere(np.asarray(Image.open(io.BytesIO(to_png(canvas))).convert("L")) < 128)
    assert dark[:, 1].max() <= 2 * 20 and dark[:, 1].min() >= 2 * 10
    assert dark[:, 0].min() >= 2 * rows[0] - 1 and dark[:, 0].max() <= 2 * rows[1] + 1
    assert (dark[:, 0].min() + dark[:, 0].max()) / 4 == pytest.approx(sum(rows) / 2, abs=5)


# --- the three pictures


def test_over_tasks_puts_higher_figures_higher_and_later_tasks_further_right() -> None:
    canvas = over_tasks([Series("a", [(1, 0.5), (2, 0.9), (3, 0.7)]), Series("b", [(1, None)])], "t", "y", "n")
    (x1, y1), (x2, y2), (x3, y3) = marks(canvas)
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert (y1 - y3) == pytest.approx(y3 - y2)  # 0.5, 0.7, 0.9 are evenly spaced, y runs downwards
    assert y2 < y3 < y1
    words = [shape.text for shape in canvas.shapes if isinstance(shape, Words)]
    assert {"a", "b", "1", "2", "3", "tasks learnt", "t", "y", "n"} <= set(words)


def test_memory_is_drawn_by_powers_of_two() -> None:
    series = [Series("a", [(1 << 14, 0.2)]), Series("b", [(1 << 16, 0.4)]), Series("c", [(1 << 18, 0.6)], hollow=True)]
    canvas = memory_against(series, "t", "y", "n")
    (x1, y1), (x2, y2), (x3, y3) = marks(canvas)
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert y1 - y2 == pytest.approx(y2 - y3)
    words = [shape.text for shape in canvas.shapes if isinstance(shape, Words)]
    assert {"16 KiB", "64 KiB", "256 KiB"} <= set(words)
    hollow = [shape for shape in canvas.shapes if isinstance(shape, Area) and shape.colour is None]
    assert len(hollow) == 2  # the published mark, and its place in the legend


def test_heat_map_shows_each_figure_in_its_place() -> None:
    canvas = heat_map([[0.5, None], [0.25, 1.0]], ["first", "second"], ["a", "b"], "t", "n")
    cells = [shape for shape in canvas.shapes if isinstance(shape, Area)]
    assert len(cells) == 3
    corners = [points(cell).min(0) for cell in cells]
    assert corners[0][0] == corners[1][0] < corners[2][0]  # a, a, b
    assert corners[0][1] < corners[1][1] == corners[2][1]  # first, second, second
    brightness = [sum(bytes.fromhex(str(cell.colour)[1:])) for cell in cells]
    assert brightness[1] < brightness[0] < brightness[2]
    words = [shape.text for shape in canvas.shapes if isinstance(shape, Words)]
    assert [word for word in words if word in (".50", ".25", "1")] == [".50", ".25", "1"]


@pytest.mark.parametrize("canvas", [
    over_tasks([], "t", "y", ""), over_tasks([Series("a", [(1, None)])], "t", "y", ""),
    memory_against([], "t", "y", ""), memory_against([Series("a", [(0, 0.5)])], "t", "y", ""),
    heat_map([[None]], ["r"], ["c"], "t", ""), heat_map([[0.5]], ["r"], ["c"], "t", "word " * 300),
    over_tasks([Series(f"method {i}", [(k, i / 30) for k in range(1, 40)]) for i in range(30)], "t", "y", ""),
])  # fmt: skip
def test_nothing_and_a_lot_are_drawn_too(canvas: Canvas) -> None:
    ElementTree.fromstring(to_svg(canvas))
    for shape in canvas.shapes:  # nothing lies outside
        places = [(shape.x, shape.y)] if isinstance(shape, Words) else shape.points
        assert all(0 <= x <= canvas.width and 0 <= y <= canvas.height for x, y in places)


# --- tables, by hand


def run_of(method: str, order: str, values: list[list[float]], **more: Any) -> Run:
    matrix = square(values, "image_F1Max", ["a", "b"], 0.75)
    facts = {
        "stream": "class", "protocol": "class", "order": order, "seed": 0, "method": method, "label": method,
        "backbone": "mcunet-in3", "image_size": 160, "matrices": [matrix.to_dict()], "routing": [1.0, 0.5],
        "bytes": [1024, 3072], "device_bytes": None, "task_identity": False,
    }  # fmt: skip
    return Run(f"{method}-{order}", {**facts, **more})


NAN = float("nan")
RUNS = [
    run_of("padim-multi", "one", [[0.8, NAN], [0.6, 1.0]]),
    run_of("padim-multi", "two", [[1.0, NAN], [1.0, 0.8]], routing=[1.0, 1.0]),
    run_of("padim-uni", "one", [[0.8, NAN], [0.8, 0.8]], routing=[None, None]),
]


def test_summary_by_hand() -> None:
    multi, uni = summary_rows(RUNS, ["image_F1Max"])
    assert multi["runs"] == 2 and uni["runs"] == 1
    assert multi["image_F1Max.average_final"] == pytest.approx((0.8 + 0.9) / 2)
    assert multi["image_F1Max.range"] == pytest.approx(0.1)
    assert multi["image_F1Max.relative_forgetting"] == pytest.approx((0.25 + 0) / 2)
    assert multi["image_F1Max.BWT"] == pytest.approx((-0.2 + 0) / 2)
    assert multi["routing"] == 0.75 and uni["routing"] is None
    assert multi["bytes"] == 3072 and multi["device_bytes"] is None


def test_steps_and_matrices_by_hand() -> None:
    steps = step_rows(RUNS[:1])
    assert [row["image_F1Max"] for row in steps] == [0.8, 0.8]
    assert [row["task"] for row in steps] == ["a", "b"]
    cells = matrix_rows(RUNS[:1])
    assert [(row["step"], row["product"], row["value"]) for row in cells] == [(0, "a", 0.8), (1, "a", 0.6), (1, "b", 1.0)]
    assert to_csv(cells).splitlines()[0].endswith("metric,step,product,value")


def test_page_by_hand() -> None:
    page = to_markdown(RUNS, ["image_F1Max"], published_rows(groups(RUNS)), "tinyvad bench continual g.toml")
    line = next(line for line in page.splitlines() if line.startswith("| padim-multi | 2 |"))
    assert line.split(" | ")[2:4] == ["0.8500", "0.1000"]
    assert "Floors, image_F1Max 0.7500." in page
    beside = next(line for line in page.splitlines() if "PaDiM cl multi, MCUNet" in line)
    assert "0.85 / 0.93" in beside and "0.00307 / 447.82" in beside
    assert "2 products, not MVTec AD's; mcunet-in3 at 160 px for MCUNet at 224 px; int8 for float" in beside
    assert "PaDiM cl multi, PhiNet" not in page  # published.csv has it


def test_replay_has_a_column_of_its_own_where_there_is_any() -> None:
    own = {"settings": {"images": 120}, "bytes": [9 << 20, 10 << 20]}
    run = run_of("paste-replay", "one", [[0.8, NAN], [0.6, 1.0]], replay_bytes=[4 << 20, 8 << 20], **own)
    assert [row["replay_bytes"] for row in step_rows([run])] == [4 << 20, 8 << 20]
    assert summary_rows([run, *RUNS], ["image_F1Max"])[0]["replay_bytes"] == 8 << 20
    assert "replay_bytes" not in summary_rows(RUNS, ["image_F1Max"])[0]
    page = to_markdown([run], ["image_F1Max"], published_rows(groups([run])), "tinyvad bench continual g.toml")
    line = next(line for line in page.splitlines() if line.startswith("| paste-replay | 1 |"))
    assert line.endswith("| 10,240.0 | – | 8,192.0 |")
    beside = next(line for line in page.splitlines() if "PaSTe Replay, MCUNet-in3" in line)
    assert "10.5 / 21.34" in beside  # networks and replay, which the thesis prints apart
    assert "at 256 px; at most 120 images a product" in beside and "int8 for float" not in beside
    assert "KiB replayed" not in to_markdown(RUNS, ["image_F1Max"], [], "")


def test_published_systems_are_there() -> None:
    printed = {figure.system for figure in figures()}
    for method, systems in COUNTERPARTS.items():
        assert method in METHODS and set(systems) <= printed
    assert [nearest(name) for name in ("mcunet-in3", "mobilenet_v2_100", "phinet-a", "filter-bank")] == [
        "MCUNet", "MobileNet", "PhiNet", "MobileNet",
    ]  # fmt: skip
    memory = {name: (nbytes, value) for name, nbytes, value in published_points("mcunet-in3", "pixel_f1", COUNTERPARTS)}
    assert memory["PaDiM Lite cl multi, MCUNet"] == (pytest.approx(25.59e6), 0.37)
    assert memory["PatchCore clpp 10k, MCUNet"] == (pytest.approx(6.06 * 2**20), 0.33)


def test_tables_of_steps_stand_beside_the_same_protocol_only() -> None:
    """IUF's are ACC and FM over steps, in percent."""
    run = run_of("patchcore-cl++", "one", [[0.8, NAN], [0.6, 1.0]], protocol="mvtec-10-1x5")
    found = {row["published"]: row for row in published_rows(groups([run]))}
    assert set(found) == {"PatchCore, unstated", "IUF, EfficientNet-B4"}
    assert found["PatchCore, unstated"]["image AUROC"] == "– / 55.3"
