"""Reports: pictures whose pixels are known, charts whose geometry is, text that survives hostile names, exact growth."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyvad.errors import InputError
from tinyvad.firmware_sim.budget import Item, make_budget
from tinyvad.firmware_sim.targets import load_target
from tinyvad.report import html, html_parts, pictures, profile, svg, svg_memory, text
from tinyvad.report.growth import compare, compare_all
from tinyvad.report.junit import to_junit
from tinyvad.report.pictures import FOUND, HALO, MAGMA, MARKED, STRENGTH, Case

HOSTILE = '<script>alert(1)</script>"\'&|`*\x00\x1b\udcff]]>'
VOID = {"meta", "img", "br", "line", "rect", "stop", "circle"}


def example_budget(arena: int = 200_000) -> dict[str, Any]:
    parts = (Item("activations", 1536, "exact", column="Activation RAM"), Item("tail", arena - 1536, "modelled"))
    ram = [
        Item("arena", arena, "modelled", "head and tail", parts=parts),
        Item("scorer", 10_000, "exact"),
        Item("stack", 4096, "estimated", "reserve"),
    ]
    flash = [
        Item("backbone.tflite", 300_000, "exact", column="Weights Flash"),
        Item("bank.tvb", 200_000, "exact", column="Weights Flash"),
        Item("code", 65_536, "estimated"),
    ]
    return make_budget(load_target("cortex-m7"), ram, flash).to_dict()


def example_report(arena: int = 200_000) -> dict[str, Any]:
    """Every key of the contract, as it comes back from JSON."""
    scores = [(0, "good", 1.0), (0, "good", 5.0), (1, "scratch", 9.0), (1, "scratch", 2.0), (None, "", 3.0)]
    report = {
        "title": "part on cortex-m7",
        "tinyvad": "0.1.0",
        "method": {"name": "padim", "description": "Gaussians", "settings": {"dims": 40, "deep": {"a": None}}},
        "backbone": {"name": "net", "source": "file", "layers": ["b"], "macs": 1_500_000, "parameters": 9000, "note": ""},
        "preprocessing": {"height": 16, "width": 16, "mean": [0.5], "std": [0.25]},
        "grid": [4, 4],
        "thresholds": {"raw": 77, "score": 4.0, "rule": "quantile", "quantile": 0.99, "n_held_out": 3},
        "dataset": {"name": "part", "n_train": 9, "n_test_good": 2, "n_test_anomalous": 2, "skipped": [["x", "broken"]]},
        "scores": {
            "held_out": [1.0, 2.0, 3.5],
            "test": [
                {"image_path": f"test/{i}", "label": label, "defect": defect, "pred_score": s, "pred_label": int(s >= 4)}
                for i, (label, defect, s) in enumerate(scores)
            ],
        },
        "metrics": {
            "image_AUROC": 0.75, "image_F1Max": 0.8, "image_AP": 0.9, "image_F1_floor": 0.667, "pixel_AUROC": None,
            "pixel_F1Max": None, "pixel_AP": None, "pixel_AUPRO": None, "n_normal": 2, "n_anomalous": 2, "threshold": 4.0,
        },
        "budget": example_budget(arena),
        "memory": {
            "head_bytes": 1536, "head_kind": "exact", "lower_bound_bytes": 1536, "tail_bytes": 300,
            "tail": {"op_data": 300}, "n_ops": 2,
            "buffers": [
                {"name": "in", "nbytes": 768, "first_use": 0, "last_use": 1, "offset": 0, "owner": "activations"},
                {"name": "a", "nbytes": 768, "first_use": 1, "last_use": 2, "offset": 768, "owner": "activations"},
                {"name": "b", "nbytes": 256, "first_use": 2, "last_use": 2, "offset": 0, "owner": "activations"},
            ],
        },
        "layers": [
            {"name": n, "op": "conv2d", "shape": [1, 4, 4, 8], "macs": 1000, "weights_bytes": 10, "output_bytes": 128,
             "first_use": 1, "last_use": 2, "offset": 0}
            for n in ("a", "b")
        ],
        "latency": {"ms": 12.5, "kind": "estimated", "engine": "cmsis_nn", "source": "a README"},
        "files": {"bank.tvb": {"bytes": 200_000, "sha256": "ab" * 32}},
    }  # fmt: skip
    loaded: dict[str, Any] = json.loads(json.dumps(report))
    return loaded


def example_case(label: int | None = 1, score: float = 9.0, side: int = 16, **changes: Any) -> Case:
    anomaly_map = np.zeros((side, side), np.float32)
    anomaly_map[4:9, 4:9] = score
    mask = anomaly_map > 0 if label else None
    fields: dict[str, Any] = {
        "image": np.full((side, side, 3), 100, np.uint8), "anomaly_map": anomaly_map, "mask": mask, "pred_score": score,
        "pred_label": int(score >= 4), "label": label, "defect": "scratch" if label else "good", "image_path": "a/b.png",
    }  # fmt: skip
    return Case(**{**fields, **changes})


# --- words


def test_clean_leaves_text_that_xml_and_utf8_hold() -> None:
    cleaned = text.clean(HOSTILE)
    assert cleaned.encode("utf-8")
    element = ElementTree.Element("a", b=cleaned)
    element.text = cleaned
    again = ElementTree.fromstring(ElementTree.tostring(element))
    assert again.text == again.get("b") == cleaned
    assert text.clean("Gerät 部品 😀\t\n") == "Gerät 部品 😀\t\n"
    assert text.escape("<a b=\"c\" d='e'>&") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;"


def test_numbers_never_round_to_the_better_side() -> None:
    assert text.ratio(0.9996) == ">0.999"
    assert text.ratio(1.0) == "1.000"
    assert text.ratio(0.12345) == "0.123"
    assert text.percent(999_999, 1_000_000) == "100 %"
    assert text.percent(1, 1000) == "1 %"
    assert text.size(1024**2) == "1024 KiB"
    assert text.size(1024**2 + 1) == "1025 KiB"
    assert text.size(40 * 1024**2 + 1) == "40.1 MiB"
    assert text.size(8 * 1024**3) == "8.0 GiB"
    assert [text.size(None), text.count(None), text.number(None), text.number(float("nan"))] == ["–"] * 4
    assert [text.number(value) for value in (6.95, 12345.6, 0.0, 1e300)] == ["6.950", "12,346", "0.000", "1.000e+300"]
    assert [text.millions(value) for value in (400, 812_000, 23_500_000)] == ["400", "812 k", "23.5 M"]
    assert text.weakest(["exact", "estimated", "modelled"]) == "estimated"
    assert text.weakest([]) == "exact"


# --- pictures


def lightness(colour: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB bytes, by the standard's formulas."""
    c = colour / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ (0.2126, 0.7152, 0.0722)
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_colours_rise_evenly_in_lightness() -> None:
    steps = lightness(pictures.colour(np.linspace(0, 1, 256), 1.0).astype(float))
    assert steps[0] < 1
    assert steps[-1] > 97
    assert (np.diff(steps[::15]) > 0).all()
    coarse = np.diff(steps[::17])  # 15 equal steps from black to white; even in CAM02-UCS, so nearly so in L*
    assert coarse.min() > 0.5 * coarse.mean()
    assert coarse.max() < 1.5 * coarse.mean()


def test_colour_scale_ends() -> None:
    ends = pictures.colour(np.array([-5.0, 0.0, 2.0, 99.0]), 2.0)
    assert [bytes(colour).hex() for colour in ends] == [MAGMA[0], MAGMA[0], MAGMA[-1], MAGMA[-1]]


def test_scale_limit() -> None:
    ramp = np.arange(101, dtype=np.float32)  # its 99th percentile is 99
    assert pictures.scale_limit(10.0, [ramp]) == 99
    assert pictures.scale_limit(60.0, [ramp]) == 120
    assert pictures.scale_limit(None, [ramp]) == 99
    assert pictures.scale_limit(7.0, []) == 14
    assert pictures.scale_limit(None, [np.zeros((3, 3))]) == 1


def test_overlay_blends_grey_and_outlines_what_was_found() -> None:
    image = np.full((12, 12, 3), 100, np.uint8)
    anomaly_map = np.zeros((12, 12), np.float32)
    anomaly_map[3:8, 3:8] = 5.0
    pixels = np.asarray(pictures.overlay(image, anomaly_map, threshold=5.0, limit=10.0))
    rim = np.zeros((12, 12), bool)
    rim[3:8, 3:8] = True
    rim[4:7, 4:7] = False
    halo = np.zeros((12, 12), bool)
    halo[2, 3:8] = halo[8, 3:8] = halo[3:8, 2] = halo[3:8, 8] = True
    assert (pixels[rim] == FOUND).all()
    assert (pixels[halo] == HALO).all()
    inside = np.rint((1 - STRENGTH) * 100 + STRENGTH * pictures.colour(np.array(5.0), 10.0).astype(float))
    assert (pixels[4:7, 4:7] == inside).all()
    black = np.array(list(bytes.fromhex(MAGMA[0])))
    outside = np.rint((1 - STRENGTH) * 100 + STRENGTH * black)
    assert (pixels[~rim & ~halo][:10] == outside).all()


def test_overlay_without_anything_found_has_no_outline() -> None:
    image = np.full((6, 6, 3), 255, np.uint8)
    for threshold in (3.0, None):
        pixels = np.asarray(pictures.overlay(image, np.full((6, 6), 2.0), threshold, 4.0))
        assert (pixels == pixels[0, 0]).all()


def test_overlay_takes_the_given_mask() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2, 2] = True
    pixels = np.asarray(pictures.overlay(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 9.0), 1.0, 10.0, mask))
    assert np.argwhere((pixels == FOUND).all(axis=2)).tolist() == [[2, 2]]


def test_outline_is_closed_at_the_border() -> None:
    line, halo = pictures.outline(np.ones((5, 5), bool))
    assert line.sum() == 16
    assert not halo.any()
    line, _ = pictures.outline(np.ones((7, 7), bool), width=2)
    assert line.sum() == 49 - 9


def test_overlay_refuses_what_it_cannot_draw() -> None:
    image, flat = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4))
    with pytest.raises(InputError, match=r"anomaly map \(5, 4\).*\(4, 4\)"):
        pictures.overlay(image, np.zeros((5, 4)), 1.0, 2.0)
    with pytest.raises(InputError, match="NaN"):
        pictures.overlay(image, flat * np.nan, 1.0, 2.0)
    with pytest.raises(InputError, match="limit 0"):
        pictures.overlay(image, flat, 1.0, 0.0)
    with pytest.raises(InputError, match="float64"):
        pictures.overlay(image.astype(float), flat, 1.0, 2.0)
    with pytest.raises(InputError, match=r"mask \(2, 2\)"):
        pictures.overlay(image, flat, 1.0, 2.0, np.zeros((2, 2), bool))


@pytest.mark.parametrize("name", ["o.png", "o.JPG", "o.webp"])
def test_save_overlay_writes_photo_and_heat_map(tmp_path: Path, name: str) -> None:
    case = example_case()
    pictures.save_overlay(tmp_path / name, case.image, case.anomaly_map, 4.0, 8.0)
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (16 + 2 + 16, 16)
        assert abs(np.asarray(picture.convert("RGB"))[15, 0].astype(int) - 100).max() <= 3


def test_save_overlay_names_a_wrong_ending(tmp_path: Path) -> None:
    case = example_case()
    with pytest.raises(InputError, match=r"o\.gif.*\.png"):
        pictures.save_overlay(tmp_path / "o.gif", case.image, case.anomaly_map, 4.0, 8.0)


def test_panels_scale_by_whole_pixels_and_show_marks() -> None:
    shots = pictures.panels(example_case(), 4.0, 8.0, side=50)
    assert [shot.size for shot in shots] == [(48, 48)] * 3
    both = np.asarray(shots[2]).reshape(-1, 3)
    assert (both == MARKED).all(axis=1).any()  # drawn over the equal outline of what was found
    assert len(pictures.panels(example_case(label=0), 4.0, 8.0, side=50)) == 2
    small = pictures.panels(example_case(side=40), 4.0, 8.0, side=20)
    assert small[0].size == (20, 20)


def test_encoded_cases_keep_to_the_bytes(rng: np.random.Generator) -> None:
    noise = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)  # the worst there is for JPEG
    cases = [example_case(side=224, image=noise) for _ in range(4)]
    uris = pictures.encode_cases(cases, 4.0, 8.0, 120_000)
    assert sum(len(uri) for row in uris for uri in row) <= 120_000
    assert [len(row) for row in uris] == [3, 3, 3, 3]
    header, data = uris[0][0].split(",")
    assert header == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(data))) as picture:
        assert picture.format == "JPEG"


# --- charts


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def boxes(root: ElementTree.Element, css: str) -> Iterator[tuple[ElementTree.Element, float, float, float, float]]:
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        if css in element.get("class", "").split():
            x, y, width, height = (float(element.get(key, "0").rstrip("%")) for key in ("x", "y", "width", "height"))
            yield element, x, y, width, height


def bars(root: ElementTree.Element, css: str) -> list[tuple[float, float, int, bool]]:
    """(left, right, images, wrong) of the bars of a series, in percent; the swatch of its name is left out."""
    result = []
    for element, x, _, width, _ in boxes(root, css):
        title = element.findtext("{http://www.w3.org/2000/svg}title")
        if title:
            images = int(title.split()[0].replace(",", ""))
            result.append((x, x + width, images, "wrong" in element.get("class", "")))
    return result


SERIES = [
    svg.Series("Good", "normal", [1.0, 1.1, 3.9999, 4.0, 6.0], "above", "false alarms"),
    svg.Series("Defects", "defect", [3.0, 4.0, 9.0], "below", "missed"),
]


def test_histogram_never_lays_a_bar_across_the_threshold() -> None:
    root = parsed(svg.histogram(SERIES, 4.0))
    line = next(e for e in root if e.get("class") == "threshold")
    place = float(line.get("x1", "").rstrip("%"))
    good, defects = bars(root, "normal"), bars(root, "defect")
    for left, right, _, wrong in good:
        assert right <= place + 0.01 or left >= place - 0.01
        assert wrong == (left >= place - 0.01)
    assert sum(n for *_, n, _ in good) == 5
    assert sum(n for *_, n, wrong in good if wrong) == 2  # 4.0 itself is anomalous
    assert sum(n for *_, n, wrong in defects if wrong) == 1
    words = " ".join(root.itertext())
    assert "5 images, 2 false alarms" in words
    assert "3 images, 1 missed" in words
    assert "threshold 4.000" in words


@pytest.mark.parametrize(
    "scores",
    [[3.0], [3.0] * 5, [0.0], [0.0, -1.0, 5.0], [1e-30, 1e30], [float("nan"), 2.0, float("inf")], [1e300, -1e300]],
)
@pytest.mark.parametrize("threshold", [None, 3.0, 1e6])
def test_histogram_counts_every_finite_score(scores: list[float], threshold: float | None) -> None:
    root = parsed(svg.histogram([svg.Series("s", "held", scores)], threshold))
    assert sum(n for *_, n, _ in bars(root, "held")) == np.isfinite(scores).sum()
    for _, x, _, width, _ in boxes(root, "held"):
        assert np.isfinite([x, width]).all()
        assert x >= -0.01
        assert x + width <= 104  # the last bin may end beyond the last score


def test_histogram_of_many_scores_is_small(rng: np.random.Generator) -> None:
    scores = rng.gamma(9, 1, 10_000).tolist()
    markup = svg.histogram([svg.Series("s", "held", scores)], 20.0)
    assert sum(n for *_, n, _ in bars(parsed(markup), "held")) == 10_000
    assert len(markup) < 20_000


def test_histogram_is_logarithmic_where_scores_spread() -> None:
    assert "logarithmic" in svg.histogram([svg.Series("s", "held", [1.0, 10.0, 1000.0])], 20.0)
    assert "logarithmic" not in svg.histogram([svg.Series("s", "held", [0.0, 10.0, 1000.0])], 20.0)
    assert svg.histogram([svg.Series("s", "held", [])], 20.0) == ""


def test_stacked_bar_adds_up_and_marks_what_is_over() -> None:
    items = [{"owner": "a", "nbytes": 30, "kind": "exact"}, {"owner": "b", "nbytes": 20, "kind": "modelled"}]
    pieces = list(boxes(parsed(svg_memory.stacked_bar(items, 100, "RAM")), "piece"))
    assert [(x, width) for _, x, _, width, _ in pieces] == [(0, 30), (30, 20)]
    over = parsed(svg_memory.stacked_bar(items, 40, "RAM"))
    assert [(x, width) for _, x, _, width, _ in boxes(over, "over")] == [(80, 20)]
    assert "url(#modelled)" in svg_memory.stacked_bar(items, None, "RAM")


def test_region_bar_places_by_address() -> None:
    region = {"name": "SRAM", "base": 1000, "bytes": 200, "used": 50}
    item = {"owner": "a", "nbytes": 50, "kind": "exact", "address": 1100}
    _, x, _, width, _ = next(boxes(parsed(svg_memory.region_bar(region, [(0, item)])), "piece"))
    assert (x, width) == (50, 25)


def test_memory_map_draws_time_across_and_addresses_up() -> None:
    memory = example_report()["memory"]
    root = parsed(svg_memory.memory_map(memory, ["b"]))
    found = {
        title.text.split(":")[0]: box
        for group in root.iter("{http://www.w3.org/2000/svg}g")
        if (title := group[0]).text
        for box in boxes(group, "block")
    }
    scale = svg_memory.MAP_HEIGHT / 1536
    bottom = svg_memory.MAP_TOP + svg_memory.MAP_HEIGHT
    _, x, y, width, height = found["in"]
    assert (x, width) == pytest.approx((0, 200 / 3), abs=0.01)  # steps 0 and 1 of 0, 1, 2
    assert (y, height) == pytest.approx((bottom - 768 * scale, 768 * scale), abs=0.1)
    element, x, y, width, height = found["b"]
    assert (x, width) == pytest.approx((200 / 3, 100 / 3), abs=0.01)
    assert (y + height, height) == pytest.approx((bottom, 256 * scale), abs=0.1)
    assert "tap" in element.get("class", "")
    assert "head 1.5 KiB (exact) = lower bound" in " ".join(root.itertext())
    assert svg_memory.memory_map({}) == ""


def test_memory_map_names_a_lower_bound_apart() -> None:
    memory = {**example_report()["memory"], "lower_bound_bytes": 1000}
    assert "lower bound 1.0 KiB" in [e.text for e in parsed(svg_memory.memory_map(memory)).iter() if e.text]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 50)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_peak_step_is_the_brute_force_peak(rows: list[tuple[int, int, int]]) -> None:
    buffers = [{"first_use": first, "last_use": first + more, "nbytes": n} for first, more, n in rows]
    live = [sum(b["nbytes"] for b in buffers if b["first_use"] <= t <= b["last_use"]) for t in range(16)]
    assert svg_memory.peak_step(buffers) == (live.index(max(live)), max(live))


def test_patterns_and_colour_bar_are_xml() -> None:
    parsed(svg.patterns())
    stops = parsed(svg.colour_bar(MAGMA, 8.0, 4.0)).iter("{http://www.w3.org/2000/svg}stop")
    assert [stop.get("stop-color") for stop in stops] == [f"#{value}" for value in MAGMA]


# --- the page


class _Page(HTMLParser):
    """Checks that tags nest, and gathers ids, links and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.links.append(str(value))
            if name == "src":
                self.sources.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(report: dict[str, Any], cases: list[Case]) -> _Page:
    checker = _Page()
    checker.feed(html.render(report, cases))
    checker.close()
    assert checker.open == []
    return checker


def test_page_is_whole_and_stands_alone() -> None:
    shown = page(example_report(), [example_case(), example_case(0, 5.0), example_case(1, 2.0), example_case(None)])
    assert set(shown.links) == {f"#{anchor}" for anchor in shown.ids if f"#{anchor}" in shown.links}
    assert len(shown.links) == 9
    assert all(source.startswith("data:image/jpeg;base64,") for source in shown.sources)
    assert not shown.tags & {"script", "link", "iframe", "object"}
    assert "missed" in shown.text
    assert "false alarm" in shown.text
    assert "Fits" in shown.text
    markup = html.render(example_report(), [])
    assert set(re.findall(r"https?://[^\"' )]+", markup)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "@import" not in markup
    assert set(re.findall(r"url\(([^)]*)\)", markup)) <= {"#modelled", "#estimated", "#heat"}


def test_page_says_what_does_not_fit() -> None:
    shown = page(example_report(arena=500_000), [])
    assert "Does not fit" in shown.text
    assert "arena 489 KiB > 320 KiB of RAM left" in shown.text
    assert "No region has room for: arena" in shown.text


def test_page_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        html.write_report(tmp_path / name / "report.html", example_report(), [example_case(), example_case(0, 1.0)])
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()
    reordered = dict(reversed(list(example_report().items())))
    assert html.render(reordered, []) == html.render(example_report(), [])


def hostile(value: Any) -> Any:
    """The same structure with every text replaced, and every key of a free dict left alone."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return {key: hostile(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    report = hostile(example_report())
    report["files"][HOSTILE] = {"bytes": 1, "sha256": HOSTILE}
    report["method"]["settings"][HOSTILE] = {HOSTILE: HOSTILE}
    report["memory"]["tail"][HOSTILE] = 5
    report["memory"]["buffers"][0]["nbytes"] = 10**6  # high enough to carry its name
    case = example_case(image_path=HOSTILE, defect=HOSTILE)
    html.write_report(tmp_path / "report.html", report, [case])
    shown = page(report, [case])
    assert "script" not in shown.tags
    assert "<script>alert(1)</script>" in shown.text
    assert set(svg_parts(html.render(report, [case])))
    for write in (profile.to_table, profile.to_markdown, profile.to_json, to_junit):
        assert write(report).encode("utf-8")
    ElementTree.fromstring(to_junit(report))
    assert "<script" not in profile.to_markdown(report)


def svg_parts(markup: str) -> list[str]:
    """All outermost svg elements, each checked to be XML."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"<svg\b|</svg>", markup):
        depth += 1 if match.group() == "<svg" else -1
        if depth == 1 and match.group() == "<svg":
            start = match.start()
        if depth == 0:
            parts.append(markup[start : match.end()])
            ElementTree.fromstring(parts[-1])
    return parts


def test_every_chart_of_a_page_is_xml() -> None:
    assert len(svg_parts(html.render(example_report(), [example_case()]))) > 10


@pytest.mark.parametrize("key", [None, *sorted(example_report())])
def test_missing_and_empty_keys(key: str | None) -> None:
    for empty in (None, "missing"):
        report = example_report()
        for name in [key] if key else list(report):
            if empty == "missing":
                del report[name]
            else:
                report[name] = None
        page(report, [example_case()])
        for write in (profile.to_table, profile.to_markdown, profile.to_json, to_junit):
            write(report)


INNER = ["method", "backbone", "preprocessing", "thresholds", "dataset", "scores", "metrics", "memory", "latency"]


@pytest.mark.parametrize("key", INNER)
def test_missing_inner_keys(key: str) -> None:
    for inner in example_report()[key]:
        report = example_report()
        del report[key][inner]
        page(report, [example_case()])
    report = example_report()
    report[key] = {}
    page(report, [])


def test_unlimited_flash_is_no_error() -> None:
    report = example_report()
    report["budget"]["flash_available"] = None
    assert "no limit" in page(report, []).text
    assert "flash" not in [case.get("name") for case in ElementTree.fromstring(to_junit(report)).iter("testcase")]


def test_page_stays_small(rng: np.random.Generator) -> None:
    report = example_report()
    report["scores"]["held_out"] = rng.gamma(5, 1, 10_000).tolist()
    report["scores"]["test"] *= 2000
    report["dataset"]["skipped"] *= 5000
    cases = [example_case(side=224, image=rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(12)]
    assert len(html.render(report, cases).encode()) < 1_500_000


def test_settings_as_text() -> None:
    assert html_parts.plain([1, 2.5, "a"]) == "1, 2.5, a"
    assert html_parts.plain(True) == "yes"
    assert html_parts.plain(None) == "–"
    assert html_parts.plain({"b": 1, "a": [2]}) == '{"a": [2], "b": 1}'
    assert html_parts.plain(12345) == "12,345"


# --- profiles


def test_vendor_columns_add_up() -> None:
    report = example_report()
    figures = profile.columns(report)
    assert {name: figure["bytes"] for name, figure in figures.items()} == {
        "Activation RAM": 1536,
        "Runtime RAM": 200_000 + 10_000 + 4096 - 1536,
        "Weights Flash": 500_000,
        "Code Flash": 65_536,
        "Total RAM": 214_096,
        "Total Flash": 565_536,
    }
    assert [figure["kind"] for figure in figures.values()] == [
        "exact", "estimated", "exact", "estimated", "estimated", "estimated",
    ]  # fmt: skip
    assert figures["Total RAM"]["bytes"] == report["budget"]["ram_used"]
    assert figures["Total Flash"]["bytes"] == report["budget"]["flash_used"]


def test_table_lines_up_and_markdown_has_equal_rows() -> None:
    report = example_report()
    lines = profile.to_table(report).splitlines()
    start = lines.index("RAM")
    words = ["bytes", "200,000", "1,536", "198,464", "10,000"]  # the arena, its two parts, the scorer
    ends = {line.index(word) + len(word) for line, word in zip(lines[start + 1 : start + 6], words)}
    assert len(ends) == 1
    assert lines[0] == "part on cortex-m7: fits cortex-m7 (stm32f746)"
    rows = re.findall(r"^\|.*\|$", profile.to_markdown(report), re.M)
    assert "| arena | 200,000 | 61.0 % | modelled |" in "\n".join(rows)


def several(**more: Any) -> dict[str, Any]:
    """Profiles of two targets: the first of TFLM, the second of both runtimes, of which ours is over budget."""
    small, large = (example_report(arena) for arena in (200_000, 500_000))
    keys = ("budget", "memory", "latency")
    profiles = [{"runtime": "tflm", **{key: small[key] for key in keys}} for _ in range(2)]
    profiles.append({"runtime": "tinyvad", **{key: large[key] for key in keys}})
    for profile_, name in zip(profiles, ("stm32f746", "stm32f412", "stm32f412")):
        profile_["budget"] = {**profile_["budget"], "target": name, "alias": None}
    return json.loads(json.dumps({"title": "part", "warnings": ["random weights"], "profiles": profiles, **more}))


def test_overview_has_a_row_a_target_and_runtime() -> None:
    section = profile.overview(profile.profiles_of(several()))
    assert section.head[3:9] == tuple(profile.columns({}))
    assert [row[:3] for row in section.rows] == [
        ("stm32f746", "tflm", "yes"), ("stm32f412", "tflm", "yes"), ("stm32f412", "tinyvad", "NO"),
    ]  # fmt: skip
    assert section.rows[0][3:9] == ("1.5", "207.6", "488.3", "64.0", "209.1", "552.3")
    table = profile.to_table(several()).splitlines()
    assert table[:2] == ["part: 2 of 3 fit", "  warning: random weights"]
    assert len(table) == 6  # no details of three profiles: heading, warning, heads, rows


def test_two_profiles_get_their_details() -> None:
    value = several()
    value["profiles"] = value["profiles"][1:]
    text_ = profile.to_table(value)
    assert "part: fits stm32f412, runtime tflm" in text_
    assert "part: does not fit stm32f412, runtime tinyvad" in text_
    assert text_.count("random weights") == 1


def test_markdown_of_several_folds_details_away_and_stays_a_comment() -> None:
    value = several()
    value["profiles"][2]["growth"] = ["RAM a|b 2 B > 1 B"]
    shown = profile.to_markdown(value)
    assert shown.startswith("### part: 2 of 3 fit\n\n**Warning:** random weights\n")
    assert "- stm32f412 tinyvad: RAM a\\|b 2 B > 1 B" in shown
    assert shown.count("<details>") == shown.count("</details>") == 3
    value["profiles"] *= 30
    long = profile.to_markdown(value)
    assert len(long) < 65_536
    assert "more: `tinyvad profile --format json`" in long


def test_json_and_junit_of_several() -> None:
    value = several()
    loaded = json.loads(profile.to_json(value))
    assert "columns" not in loaded
    assert [one.pop("columns") for one in loaded["profiles"]] == [profile.columns(one) for one in value["profiles"]]
    assert loaded == value
    suites = ElementTree.fromstring(to_junit(value).encode()).findall("testsuite")
    groups = [suite.find("testcase").get("classname") for suite in suites]  # type: ignore[union-attr]
    assert groups == [f"tinyvad.profile.{name}" for name in ("stm32f746.tflm", "stm32f412.tflm", "stm32f412.tinyvad")]
    assert [suite.get("failures") for suite in suites] == ["0", "0", "1"]


def test_compare_all_pairs_targets_and_runtimes() -> None:
    before, after = several(), several()
    after["profiles"][1]["budget"]["ram"][0]["nbytes"] *= 2
    after["profiles"][1]["budget"]["ram_used"] *= 2
    del before["profiles"][2]
    problems = compare_all(after, before, 0.03)
    assert [problem.split(" B >")[0] for problem in problems] == [
        "stm32f412 tflm: RAM arena 400,000", "stm32f412 tflm: RAM total 428,192",
    ]  # fmt: skip
    assert [len(one["growth"]) for one in after["profiles"]] == [0, 2, 0]
    assert after["profiles"][2]["baseline"] is None  # new, so nothing to grow from
    rows = profile.overview(after["profiles"]).rows
    assert [row[-2:] for row in rows] == [("none", "none"), ("+214,096 B (+100.0 %)", "none"), ("new", "new")]


def test_compare_all_takes_a_baseline_of_one_target() -> None:
    """As versions wrote it that knew one target and TFLM alone."""
    baseline = {"title": "part", "budget": several()["profiles"][0]["budget"]}
    assert compare_all(several(), baseline, 0.0) == []
    baseline["budget"] = {**baseline["budget"], "ram_used": 1}
    assert compare_all(several(), baseline, 0.0)[0].startswith("stm32f746 tflm: RAM total 214,096 B > 1 B allowed")
    single = {"profiles": several()["profiles"][:1]}
    assert compare_all(single, baseline, 0.0)[0].startswith("RAM total")
    ours = {"profiles": several()["profiles"][2:]}
    with pytest.raises(InputError, match=r"baseline is of target stm32f746 tflm, this profile of stm32f412 tinyvad: "):
        compare_all(ours, baseline, 0.0)


def test_markdown_cells_stay_cells() -> None:
    report = example_report()
    report["budget"]["ram"][0]["note"] = "a|b\n<i>`c`"
    row = next(line for line in profile.to_markdown(report).splitlines() if "a\\|b" in line)
    assert row.endswith("a\\|b &lt;i>\\`c\\` |")
    assert len(re.findall(r"(?<!\\)\|", row)) == 7


def test_json_is_the_profile_and_its_columns() -> None:
    report = example_report()
    loaded = json.loads(profile.to_json(report))
    assert loaded.pop("columns")["Activation RAM"] == {"bytes": 1536, "kind": "exact"}
    assert loaded == report


def junit(report: dict[str, Any]) -> tuple[ElementTree.Element, dict[str, str | None]]:
    suite = ElementTree.fromstring(to_junit(report).encode()).find("testsuite")
    assert suite is not None
    cases = {str(case.get("name")): case.findtext("failure") for case in suite.iter("testcase")}
    assert int(suite.get("tests", "")) == len(list(suite.iter("testcase")))
    assert int(suite.get("failures", "")) == sum(failure is not None for failure in cases.values())
    return suite, cases


def test_junit_has_a_case_a_limit() -> None:
    _, cases = junit(example_report())
    assert cases == {"RAM DTCM+SRAM": None, "RAM: every item lies in one region": None, "flash": None}


def test_junit_fails_the_limit_that_is_broken() -> None:
    _, cases = junit(example_report(arena=500_000))
    assert cases["flash"] is None
    assert "arena 489 KiB > 320 KiB" in str(cases["RAM: every item lies in one region"])

    report = example_report()
    flash = [Item("bank.tvb", 2_000_000, "exact")]
    report["budget"] = make_budget(load_target("cortex-m7"), [], flash).to_dict()
    _, cases = junit(report)
    assert "of flash left" in str(cases["flash"])

    report = example_report()
    report["budget"]["regions"][0]["used"] = 400_000
    assert "400,000 B > 327,680 B" in str(junit(report)[1]["RAM DTCM+SRAM"])

    report = example_report()
    report["budget"].update(fits=False, problems=["too slow"])
    assert junit(report)[1]["other limits"] == "too slow"
    report["budget"]["problems"] = []
    assert junit(report)[1]["other limits"] == "does not fit"


def grown(**bytes_by_owner: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A profile that grew by some bytes, and the one before."""
    before = example_report()
    after = copy.deepcopy(before)
    for key in ("ram", "flash"):
        for item in after["budget"][key]:
            item["nbytes"] += bytes_by_owner.get(item["owner"].split(".")[0], 0)
        after["budget"][f"{key}_used"] = sum(item["nbytes"] for item in after["budget"][key])
    return after, before


def test_compare_allows_growth_up_to_the_limit_exactly() -> None:
    assert compare(*grown(), 0.0) == []
    assert compare(*grown(bank=6000), 0.03) == []  # 3 % of 200,000
    problems = compare(*grown(bank=6001), 0.03)
    assert len(problems) == 1
    assert problems[0].startswith("flash bank.tvb 206,001 B > 206,000 B allowed (baseline 200,000 B + 3 %): ")
    assert "\n" not in problems[0]
    assert "--format json" in problems[0]
    assert compare(*grown(bank=-50_000, arena=-1), 0.0) == []


def test_compare_looks_at_totals_too() -> None:
    problems = compare(*grown(arena=20_000), 0.05)
    assert [problem.split(" B ")[0] for problem in problems] == ["RAM arena 220,000", "RAM total 234,096"]


def test_compare_reports_a_new_owner() -> None:
    after, before = grown()
    after["budget"]["ram"].append({"owner": "camera frame", "nbytes": 100, "kind": "exact"})
    assert compare(after, before, 0.5) == [
        "RAM camera frame 100 B > 0 B allowed (baseline 0 B: it is new): make it smaller, or accept it with a new "
        "baseline from `tinyvad profile BUILD --format json`"
    ]


@given(st.integers(1, 10**9), st.integers(0, 100), st.integers(-2, 2))
@settings(max_examples=100, deadline=None)
def test_compare_is_exact(before: int, percent: int, off: int) -> None:
    allowed = before * (100 + percent) // 100
    after = max(0, allowed + off)

    def only(nbytes: int) -> dict[str, Any]:
        ram = [{"owner": "a", "nbytes": nbytes, "kind": "exact"}]
        return {"budget": {"target": "t", "ram": ram, "flash": [], "ram_used": 0, "flash_used": 0}}

    problems = compare(only(after), only(before), percent / 100)
    assert bool(problems) == (Fraction(after, before) > Fraction(100 + percent, 100))


def test_compare_refuses_other_profiles() -> None:
    report = example_report()
    other = copy.deepcopy(report)
    other["budget"]["target"] = "rp2040"
    with pytest.raises(InputError, match=r"rp2040.*stm32f746"):
        compare(report, other, 0.1)
    broken: Any
    for broken in ({}, {"budget": None}, {"budget": {}}, [], {"budget": {"ram": 5}}):
        with pytest.raises(InputError, match="the baseline: field"):
            compare(report, broken, 0.1)
    for growth in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="max-growth"):
            compare(report, report, growth)
