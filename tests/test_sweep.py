"""Sweeps: axes as text, planned variants against fitted ones, the Pareto front by brute force, AUROC against a build's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvad import sweep, variants
from tinyvad.build import build
from tinyvad.cli import main
from tinyvad.demo import render_demo
from tinyvad.detectors import load_scorer
from tinyvad.errors import InputError
from tinyvad.firmware_sim.latency import scorer_work
from tinyvad.fitting import plan_method
from tinyvad.graph.ir import Tensor
from tinyvad.profiling import profile
from tinyvad.project import Project
from tinyvad.report.sweep import picture, to_markdown, to_table
from tinyvad.variants import Point, mark_front

SVG = "{http://www.w3.org/2000/svg}"


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)], catch_exceptions=False)


# --- axes


def test_axes() -> None:
    axes = sweep.parse_axes(["image-size=96..144,200 bank-bytes=32K,1M", "grid=10..12", "method=padim"])
    assert axes == {
        "image-size": [96, 112, 128, 144, 200], "bank-bytes": [32768, 1 << 20], "grid": [10, 11, 12], "method": ["padim"],
    }  # fmt: skip
    assert sweep.parse_axes(["image_size=96..160:32,96"]) == {"image-size": [96, 128, 160]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size=96", "write AXIS=VALUES with one of image-size, bank-bytes"),
        ("image-size", "write AXIS=VALUES"),
        ("image-size=", "write AXIS=VALUES"),
        ("image-size=a", "'a' is no whole number and no range"),
        ("image-size=96..", "is no whole number"),
        ("image-size=224..96", "choose 32 to 1024, the smaller first"),
        ("image-size=16", "choose 32 to 1024"),
        ("image-size=96..224:0", "choose 32 to 1024"),
        ("grid=0", "choose 1 to 128"),
        ("grid=3 grid=4", "grid is given twice"),
        ("bank-bytes=lots", "write bytes as"),
        ("method=magic", "no method called magic"),
        ("backbone=auto", "name the backbones"),
        ("", "has no axis"),
    ],
)
def test_wrong_axes_are_named(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        sweep.parse_axes([text])


# --- planned against fitted


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo(tmp_path_factory.mktemp("sweep") / "part", n_train=12, n_good=6, n_defect=8, size=128)


@pytest.fixture(scope="module")
def folder(part: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "build"
    build(Project(data=part, target="cortex-m7", image_size=96, bank_bytes=64 << 10, out=out))
    return out


@pytest.mark.parametrize("method", sweep.PLANNED)
def test_blank_scorers_are_like_fitted_ones(method: str, rng: np.random.Generator) -> None:
    """Round trip through a bank's sections: shapes, kind and needs stay what they are."""
    tensors = [Tensor(f"t{i}", (1, size, size, 12), "int8") for i, size in enumerate((12, 6))]
    plan = plan_method(method, tensors, 96, 40, 40 << 10)
    scorer = variants.blank_scorer(plan, 24)
    kinds = ("PADC", "PADF", "PADM", "CORE", "PQPC")
    assert scorer.kind == dict(zip(sweep.PLANNED, kinds, strict=True))[method]
    x = rng.integers(-127, 128, (1, *plan.grid, 24)).astype(np.int8)
    assert scorer.score(x).shape == (1, *plan.grid)
    sections = sum(array.nbytes for array in scorer.sections().values())
    assert sections <= plan.bank_bytes <= sections + 8192


def test_a_variant_is_what_a_build_of_it_needs(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    result = cli(folder, "--sweep", "image-size=96", "--json")
    assert result.exit_code == 0, result.stderr
    (point,) = json.loads(result.stdout)["points"]
    assert point["ram_bytes"] == report["budget"]["ram_used"]
    assert point["grid"] == report["grid"]
    assert point["settings"] == {k: v for k, v in report["method"]["settings"].items() if k in point["settings"]}
    flash = {item["owner"]: item["nbytes"] for item in report["budget"]["flash"]}
    others = report["budget"]["flash_used"] - flash["bank.tvb"]
    assert point["flash_bytes"] - point["bank_bytes"] == others
    assert flash["bank.tvb"] <= point["bank_bytes"] <= flash["bank.tvb"] + 4096  # planned as an upper bound
    assert point["ms"] == pytest.approx(report["latency"]["ms"], rel=0.02)


def test_a_variant_under_tflm_is_what_profile_says(folder: Path) -> None:
    _, profiled = profile(folder, ["nrf52840"], "tflm")
    arguments = (folder, "--sweep", "image-size=96", "--runtime", "tflm", "--target", "nrf52840", "--json")
    (point,) = json.loads(cli(*arguments).stdout)["points"]
    assert point["ram_bytes"] == profiled["budget"]["ram_used"]
    assert point["ms"] == pytest.approx(profiled["latency"]["ms"], rel=0.02)


def test_auroc_is_that_of_a_build(folder: Path, part: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    (point,) = json.loads(cli(folder, "--sweep", "image-size=96", "--data", part, "--json").stdout)["points"]
    assert point["auroc"] == pytest.approx(report["metrics"]["image_AUROC"], abs=1e-12)


def test_a_fitted_scorer_has_the_blank_ones_needs(folder: Path) -> None:
    from tinyvad.bank import open_bank

    bank = open_bank(folder / "bank.tvb")
    rows = bank.sections["TAPS"]
    depth = int(rows[:, 2].sum())
    grid = (int(bank.header.grid_size[0]), int(bank.header.grid_size[1]))
    fitted = load_scorer(bank.header.kind, bank.sections, grid, depth)
    tensors = [Tensor(f"t{i}", (1, *(int(v) for v in row[:3])), "int8") for i, row in enumerate(rows)]
    blank = variants.blank_scorer(plan_method(None, tensors, 96, 12, 64 << 10), depth)
    assert blank.scratch_bytes() == fitted.scratch_bytes()
    assert blank.macs(grid) == fitted.macs(grid)
    assert scorer_work(blank, depth, grid) == scorer_work(fitted, depth, grid)


# --- the front


def point(ram: int, flash: int, ms: float, **more: Any) -> Point:
    fields: dict[str, Any] = {
        "backbone": "net", "image_size": 96, "method": "padim-lite", "grid": (6, 6), "settings": {}, "bank_bytes": 100,
        "ram_bytes": ram, "flash_bytes": flash, "ms": ms, "strategy": "layerwise", "quality": None,
    }  # fmt: skip
    return Point(**{**fields, **more})


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4, st.booleans()), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_front_is_the_brute_force_front(rows: list[tuple[int, int, int, int, bool]]) -> None:
    points = [point(a, b, float(c), auroc=d / 3, problem="" if fits else "too large") for a, b, c, d, fits in rows]
    for one, row in zip(mark_front(points), rows):
        rivals = [(a, b, c, -d) for a, b, c, d, fits in rows if fits]
        mine = (*row[:3], -row[3])
        beaten = any(all(x <= y for x, y in zip(rival, mine)) and rival != mine for rival in rivals)
        assert one.front == (row[4] and not beaten)


def test_without_auroc_larger_inputs_and_banks_are_worth_something() -> None:
    small, large = point(10, 10, 1.0), point(20, 20, 2.0, image_size=128)
    rich = point(10, 20, 1.0, bank_bytes=200)
    worse = point(20, 20, 2.0)
    assert [one.front for one in mark_front([small, large, rich, worse])] == [True, True, True, False]
    made_up = [point(10, 10, 1.0, made_up=0.9), point(20, 20, 2.0, image_size=128, made_up=0.8)]
    assert [one.front for one in mark_front(made_up)] == [True, False]


# --- the command


def test_sweep_before_any_build(tmp_path: Path) -> None:
    drawn = tmp_path / "sweep.svg"
    axes = ("--sweep", "image-size=64..96", "bank-bytes=16K,64K", "method=padim-compact,patchcore-lite")
    result = cli("--target", "nrf52840", "--backbone", "phinet-mcu", *axes, "--picture", drawn, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert {(p["image_size"], p["method"]) for p in value["points"]} == set(
        itertools.product((64, 80, 96), ("padim-compact", "patchcore-lite"))
    )
    assert any(p["front"] for p in value["points"])
    root = ElementTree.fromstring(drawn.read_text())
    marks = [mark for mark in root.iter(f"{SVG}circle") if mark.get("class")]
    assert len(marks) == len(value["points"])
    assert sum(mark.get("class") == "front" for mark in marks) == sum(p["front"] for p in value["points"])
    sizes = {p["image_size"]: p["ram_bytes"] for p in value["points"]}
    assert sizes[64] < sizes[80] < sizes[96]


def test_time_bounds_what_is_measured(folder: Path, part: Path) -> None:
    value = json.loads(cli(folder, "--sweep", "image-size=64,80,96", "--data", part, "--seconds", "1", "--json").stdout)
    known = [p["auroc"] is not None for p in value["points"]]
    assert known[0]  # one is always tried
    if not all(known):
        assert "were not measured: 1 s were up" in value["notes"][-1]


def test_good_images_alone_get_made_up_defects(folder: Path, tmp_path: Path) -> None:
    good = render_demo(tmp_path / "part", n_train=18, n_good=1, n_defect=0, size=96) / "train" / "good"
    value = json.loads(cli(folder, "--sweep", "image-size=64", "--data", good, "--json").stdout)
    (one,) = value["points"]
    assert one["auroc"] is None
    assert 0.5 <= one["made_up"] <= 1
    assert "no labelled defects" in value["notes"][0]


def test_wrong_use_is_one_line(folder: Path, tmp_path: Path) -> None:
    axis = ("--sweep", "image-size=64")
    for arguments in (
        (folder, folder, *axis), (folder, *axis, "--format", "junit"), (folder, *axis, "--picture", "a.gif"),
        (folder, *axis, "--target", "rp2040", "--target", "stm32f746"), axis, (folder, "--sweep", "grid=1", "bank-bytes=5"),
        (folder, *axis, "--data", tmp_path / "none"), (folder, "--sweep", "image-size=32..1024:1", "grid=1..40"),
    ):  # fmt: skip
        result = cli(*arguments)
        assert result.exit_code == 2, (arguments, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr


# --- text and picture


def value_of(points: list[Point]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "target": "stm32f746", "alias": "cortex-m7", "runtime": "tinyvad", "ram_available": 327_680,
        "flash_available": 1 << 20, "notes": ["a note"], "points": [asdict(p) for p in mark_front(points)],
    }  # fmt: skip


def test_table_and_markdown() -> None:
    points = [point(2048, 4096, 7.4, auroc=0.9996), point(1024, 4096, 3.0, auroc=0.5, problem="arena|x\n> 1 KiB")]
    lines = to_table(value_of(points)).splitlines()
    assert lines[0] == (
            "2 variants on cortex-m7 (stm32f746), runtime tinyvad: 1 fit, 1 on the Pareto front (*) of RAM, flash, time "
            "and image AUROC"
        )
    assert lines[2].split() == ["net", "96", "padim-lite", "6x6", "0.1", "1.0", "4.0", "3", "0.500", "layerwise",
                                "arena|x", ">", "1", "KiB"]  # fmt: skip
    assert lines[3].split()[:2] == ["*", "net"]
    assert ">0.999" in lines[3]
    assert lines[-1].strip() == "a note"
    rows = [line for line in to_markdown(value_of(points)).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_picture_is_xml_with_every_mark_inside(n: int) -> None:
    points = [point(1000 * (i + 1), 5000 - i, 1.0, backbone='<"net&', auroc=None if n == 3 else 0.5) for i in range(n)]
    root = ElementTree.fromstring(picture(value_of(points)))
    width, height = (float(root.get(key, "0")) for key in ("width", "height"))
    marks = [mark for mark in root.iter(f"{SVG}circle") if mark.get("class")]
    assert len(marks) == n
    for mark in marks:
        assert 0 < float(mark.get("cx", "0")) < width
        assert 0 < float(mark.get("cy", "0")) < height
