"""``tinyvad analyse``: facts known beforehand, files, pictures; and one line for every wrong use."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_build import images_of_task, tiny_build
from tiny_student_build import student_build

from tinyvad.analysis.command import FACTS, HTML, analyse
from tinyvad.analysis.facts import layer_facts, masks_of, product_facts
from tinyvad.analysis.pictures import COLOURS, Tile, scatter, sheet
from tinyvad.analysis.plane import MISSING, features
from tinyvad.analysis.products import Product, chosen_layers, evenly, read_product, spaced
from tinyvad.bench.canvas import Area
from tinyvad.cli import main
from tinyvad.detectors.feature_importance import Importance, Moments, importance
from tinyvad.errors import InputError
from tinyvad.fitting import TapStore
from tinyvad.graph.ir import Tensor
from tinyvad.images import find_datasets
from tinyvad.model import load

LAYERS = ["tap_a", "tap_b"]


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build, and two products of eight images each."""
    folder = tmp_path_factory.mktemp("analysis")
    tiny_build(folder / "build", None)
    rng = np.random.default_rng(1)
    for task, name in enumerate(("anchors", "bolts")):
        (folder / "data" / name / "good").mkdir(parents=True)
        for i, image in enumerate(images_of_task(rng, 8, task)):
            Image.fromarray(image).save(folder / "data" / name / "good" / f"{i:02d}.png")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def product(values: list[np.ndarray], maps: np.ndarray | None = None) -> Product:
    """A product of given importances (H, W, C), one a layer, and (n, H, W, C) int8 maps of the first layer."""
    layers = [Importance(2, np.full(v.shape[:2], 2), v, v.sum(-1)) for v in values]
    zeros = [np.zeros(v.shape) for v in values]
    store = TapStore([Tensor(str(i), (1, *v.shape), "int8") for i, v in enumerate(values)])
    if maps is not None:
        store.append([maps])
    return Product("p", store.count, np.zeros((4, 4, 3), np.uint8), layers, zeros, zeros, store, [])


# --- facts


def test_facts_of_products_by_hand() -> None:
    first, second = np.zeros((1, 2, 4)), np.zeros((1, 2, 4))
    first[0, 0], first[0, 1] = (0.7, 0.3, 0, 0), (0.6, 0, 0.4, 0)
    second[0, 0], second[0, 1] = (0, 1.0, 0, 0), (0.9, 0.1, 0, 0)
    products = [product([first]), product([second])]
    masks = masks_of(products, 25)[0]  # one of four channels a cell: 0, 0 and 1, 0
    assert [mask.argmax(-1).tolist() for mask in masks] == [[[0, 0]], [[1, 0]]]
    facts = layer_facts(products, 0, masks)
    assert facts["shared"] == [[1.0, 0.5], [0.5, 1.0]]
    assert facts["chosen_by"] == [5 / 8, 2 / 8, 1 / 8]
    assert facts["dropped_by_rule_1"] == 0.5
    # the ranges are one point each, the same one: nothing in common to speak of
    assert facts["dropped_by_rule_2_overlap"] == 0 and facts["dropped_by_rule_2_apart"] == 0.5
    found = product_facts(products[0], ["a"], [masks[0]])
    assert found["mask_bytes"] == 1
    assert found["layers"]["a"]["kept"] == 0.25
    assert found["layers"]["a"]["top_channels"][0] == {"channel": 0, "share": 0.65}
    assert [one["channel"] for one in found["layers"]["a"]["top_channels"]] == [0, 2, 1, 3]
    assert "shared" not in layer_facts(products[:1], 0, masks[:1])


def test_a_product_is_what_its_features_say(place: Path) -> None:
    model = load(place / "build")
    dataset = find_datasets(place / "data")[0]
    found = read_product(model, dataset, [1], None, "stop", 4, quiet)
    images = np.stack([np.asarray(Image.open(path)) for path in dataset.train_good])
    maps = model.taps(images)[1]
    moments = Moments()
    moments.update(maps)
    assert found.layers[0].values.tobytes() == importance(moments, np.random.default_rng(4)).values.tobytes()
    assert found.count == 8
    np.testing.assert_array_equal(found.photo, np.rint(images.mean(0)))
    np.testing.assert_array_equal(found.lows[0], maps.min(0))
    np.testing.assert_array_equal(found.highs[0], maps.max(0))
    chosen = np.zeros(maps.shape[1:], bool)
    chosen[2, 3, 1] = chosen[0, 0, 5] = True
    expected = np.stack([maps[[6, 1], 0, 0, 5], maps[[6, 1], 2, 3, 1]], axis=1)
    np.testing.assert_array_equal(found.features([chosen], np.array([6, 1])), expected)


def test_vectors_of_the_plane_are_what_any_product_finds_important() -> None:
    first, second = np.zeros((1, 1, 3)), np.zeros((1, 1, 3))
    first[..., 0], second[..., 2] = 1, 1
    maps = np.arange(12, dtype=np.int8).reshape(4, 1, 1, 3)
    vectors, owners = features([product([first], maps), product([second], maps + 1)])
    assert vectors.tolist() == [[0, 2], [3, 5], [6, 8], [9, 11], [1, 3], [4, 6], [7, 9], [10, 12]]
    assert owners.tolist() == [0] * 4 + [1] * 4


def test_images_are_spaced_evenly() -> None:
    paths = [Path(str(i)) for i in range(10)]
    assert [path.name for path in evenly(paths, 4)] == ["0", "3", "6", "9"]
    assert evenly(paths, None) == evenly(paths, 10) == evenly(paths, 99) == paths
    assert spaced(3, 5).tolist() == [0, 1, 2]


def test_of_a_student_teacher_build_the_teacher_is_looked_at(place: Path, tmp_path: Path) -> None:
    model = load(student_build(tmp_path / "build", None))
    assert chosen_layers(model, None) == {"t1": 3, "t2": 4, "t3": 5}
    assert chosen_layers(model, ["t2"]) == {"t2": 4}
    with pytest.raises(InputError, match=r"taps no layer 's1'; choose with --layers among t1, t2, t3"):
        chosen_layers(model, ["s1"])
    value, _ = analyse(tmp_path / "build", place / "data", layers=["t3"])
    assert value["layers"]["t3"]["channels"] == 21


# --- the folder


@pytest.fixture(scope="module")
def analysed(place: Path) -> dict[str, Any]:
    pytest.importorskip("sklearn")
    value, _ = analyse(place / "build", place / "data")
    return value


def test_everything_is_written_beside_the_build_which_stays_as_it_is(
    place: Path, analysed: dict[str, Any], tmp_path: Path
) -> None:
    out = place / "build-analysis"
    assert analysed["out"] == str(out)
    written = files(out)
    assert set(written) == {FACTS, HTML, *analysed["pictures"]}
    assert set(analysed["pictures"]) == {
        "components.png", "importance.png", "channels.png", "shared_1.png", "shared_2.png", "tsne.png"
    }  # fmt: skip
    assert {"out": str(out), **json.loads(written[FACTS])} == analysed
    build = {path: path.read_bytes() for path in (place / "build").rglob("*") if path.is_file()}
    again, _ = analyse(place / "build", place / "data", tmp_path / "again")
    assert files(tmp_path / "again") == written
    assert build == {path: path.read_bytes() for path in (place / "build").rglob("*") if path.is_file()}
    assert again["settings"] == {"variance": 0.8, "keep": 10.0, "layers": LAYERS, "limit": None, "seed": 0}


def test_facts_hold_every_product_and_layer(analysed: dict[str, Any]) -> None:
    assert list(analysed["products"]) == ["anchors", "bolts"]
    for found in analysed["products"].values():
        assert found["images"] == 8
        assert [*found["layers"]] == LAYERS
        assert all(1 <= layer["components"] <= 7 for layer in found["layers"].values())  # the rank of 8 images
        shapes = [(layer["height"], layer["width"], layer["channels"]) for layer in analysed["layers"].values()]
        assert found["mask_bytes"] == sum(-(-h * w * c // 8) for h, w, c in shapes)
    for layer in analysed["layers"].values():
        assert layer["shared"][0][0] == layer["shared"][1][1] == 1
        assert sum(layer["chosen_by"]) == pytest.approx(1, abs=1e-5)
    assert {name: len(points) for name, points in analysed["tsne"]["points"].items()} == {"anchors": 8, "bolts": 8}


def test_pictures_open_and_the_page_holds_them(place: Path, analysed: dict[str, Any]) -> None:
    out = place / "build-analysis"
    page = (out / HTML).read_text(encoding="utf-8")
    for name in analysed["pictures"]:
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 60
        assert f'alt="{name}"' in page
    assert "anchors" in page and "http://" not in page and "https://" not in page and "<script" not in page


def test_one_product_one_layer_and_a_limit(place: Path, tmp_path: Path) -> None:
    value, _ = analyse(
        place / "build", place / "data" / "bolts", tmp_path / "out", ["tap_b"], keep=30, limit=3, seed=9
    )
    assert list(value["layers"]) == ["tap_b"] and value["products"]["bolts"]["images"] == 3
    assert value["pictures"] == ["components.png", "importance.png", "channels.png"]
    assert "one" in value["tsne"]["left_out"] and "shared" not in value["layers"]["tap_b"]
    channels = value["layers"]["tap_b"]["channels"]
    assert 0 < value["products"]["bolts"]["layers"]["tap_b"]["kept"] <= 0.3 + 1 / channels


def test_without_scikit_learn_the_rest_is_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = CliRunner().invoke(
        main, ["analyse", str(place / "build"), "--data", str(place / "data"), "--out", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == f"tinyvad: left out: {MISSING}\n"
    value = json.loads(result.stdout)
    assert value["tsne"] == {"left_out": MISSING} and "tsne.png" not in value["pictures"]
    assert MISSING.replace("'", "&#x27;") in (tmp_path / "out" / HTML).read_text()


def _unreadable(place: Path, folder: Path) -> list[str]:
    shutil.copytree(place / "data", folder / "data")
    (folder / "data" / "bolts" / "good" / "00.png").write_bytes(b"no image")
    return [str(place / "build"), "--data", str(folder / "data")]


def _one_image(place: Path, folder: Path) -> list[str]:
    (folder / "data" / "good").mkdir(parents=True)
    shutil.copy(place / "data" / "bolts" / "good" / "00.png", folder / "data" / "good")
    return [str(place / "build"), "--data", str(folder / "data")]


WRONG: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "no build": (lambda place, _: [str(place / "data"), "--data", str(place / "data")], "is not a build"),
    "no data": (lambda place, _: [str(place / "build"), "--data", str(place / "nothing")], "cannot open"),
    "layer": (
        lambda place, _: [str(place / "build"), "--data", str(place / "data"), "--layers", "tap_a,tap_z"],
        "taps no layer 'tap_z'; choose with --layers among tap_a, tap_b",
    ),
    "keep": (
        lambda place, _: [str(place / "build"), "--data", str(place / "data"), "--keep", "101"],
        "--keep 101: percent of the channels",
    ),
    "limit": (lambda place, _: [str(place / "build"), "--data", str(place / "data"), "--limit", "1"], "--limit"),
    "in the build": (
        lambda place, _: [str(place / "build"), "--data", str(place / "data"), "--out", str(place / "build" / "x")],
        "lies in the build",
    ),
    "the build": (
        lambda place, _: [str(place / "build"), "--data", str(place / "data"), "--out", str(place / "build")],
        "lies in the build",
    ),
    "another folder": (
        lambda place, _: [str(place / "build"), "--data", str(place / "data"), "--out", str(place / "data")],
        "holds other files",
    ),
    "unreadable": (_unreadable, "00.png"),
    "one image": (_one_image, "importance needs at least 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(name: str, place: Path, tmp_path: Path) -> None:
    arguments, words = WRONG[name]
    result = CliRunner().invoke(main, ["analyse", *arguments(place, tmp_path)])
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("tinyvad: ")
    assert result.stdout == ""


def test_unreadable_images_can_be_skipped(place: Path, tmp_path: Path) -> None:
    arguments = [*_unreadable(place, tmp_path), "--on-error", "skip", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, ["analyse", *arguments])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["skipped"] == ["00.png"] and value["products"]["bolts"]["images"] == 7
    assert "skipped" in result.stderr


# --- pictures


def test_a_sheet_shows_its_tiles_where_they_belong() -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    tiles = [[Tile(np.full((20, 30, 3), c, np.uint8), "words") for c in row] for row in colours]
    pixels = np.asarray(sheet(tiles, ["a\nb", "c"], ["x", "y"], "title", "note"))
    centres = np.array(
        [[np.argwhere((pixels == c).all(-1)).mean(0) for c in row] for row in colours]
    )  # (row, column, (y, x))
    counts = [[int((pixels == c).all(-1).sum()) for c in row] for row in colours]
    assert counts == [[600, 600], [600, 600]]
    assert centres[0, 0, 0] == centres[0, 1, 0] < centres[1, 0, 0] == centres[1, 1, 0]
    assert centres[0, 0, 1] == centres[1, 0, 1] < centres[0, 1, 1] == centres[1, 1, 1]


def test_points_keep_their_order_in_the_plane() -> None:
    canvas = scatter({"a": [[0, 0], [10, 0]], "b": [[0, 10]]}, "title", "note")
    areas = [shape for shape in canvas.shapes if isinstance(shape, Area)]
    marks = {
        colour: [np.mean(a.points, axis=0) for a in areas if a.colour == colour][1:]  # the first is the legend's
        for colour in COLOURS[:2]
    }
    (left, right), (upper,) = marks[COLOURS[0]], marks[COLOURS[1]]
    assert left[0] < right[0] and left[1] == pytest.approx(right[1])
    assert upper[0] == pytest.approx(left[0], abs=3) and upper[1] < left[1]
    one = scatter({"a": [[3, 3]]}, "title", "note")  # a single point has no extent
    assert np.isfinite([p for a in one.shapes if isinstance(a, Area) for p in a.points]).all()
