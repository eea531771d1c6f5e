"""Cells of detectors that are trained: what the method finds by hand, from items that are cached once for all cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

pytest.importorskip("autograd")

from tinyvad.bench.command import bench_continual
from tinyvad.bench.features import Pictures
from tinyvad.bench.frozen import onnx_engine, open_frozen, open_items
from tinyvad.bench.grid import load_grid
from tinyvad.continual.base import Context
from tinyvad.continual.methods import make_method, settings_of
from tinyvad.continual.streams import class_incremental
from tinyvad.continual.trained import ImageItems
from tinyvad.demo import render_demo
from tinyvad.errors import InputError
from tinyvad.images import find_datasets, load_images

SIZE = 48
PARTS = ("anvil", "bracket")
GRID = """
data = "data"
out = "out"
metrics = ["image_AUROC", "pixel_F1Max"]
[[streams]]
protocol = "class"
[[backbones]]
name = "filter-bank"
image_size = 48
layers = ["block2", "block3.merge"]
[[methods]]
name = "paste-replay"
size = 4
epochs = 2
batch = 4
[[methods]]
name = "paste-compressed-replay"
size = 4
epochs = 2
batch = 4
form = ["float32", "int8"]
[[methods]]
name = "cfa-joint"
grid = 6
epochs = 1
[[methods]]
name = "padim-compact-uni"
dimensions = 8
"""


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for seed, name in enumerate(PARTS):
        render_demo(folder / "data" / name, seed=seed, n_train=7, n_good=4, n_defect=3, size=64)
    (folder / "grid.toml").write_text(GRID)
    bench_continual(folder / "grid.toml", 1, None, quiet)
    return folder


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in (folder / "out" / "cells").glob("*.json") if "seconds" not in p.name]
    return {cell["label"]: cell for cell in found}


def test_a_cell_is_what_the_method_finds_by_hand(finished: Path) -> None:
    cell = next(cell for label, cell in cells(finished).items() if "float32" in label)
    backbone = load_grid(finished / "grid.toml").cells[0].backbone
    frozen = open_frozen(backbone, None)
    name = "paste-compressed-replay"
    settings = settings_of(name, {"size": 4, "epochs": 2, "batch": 4}, "test")
    method: Any = make_method(name, Context(np.ones(1), 1, frozen=frozen), settings)
    datasets = sorted(find_datasets(finished / "data"), key=lambda dataset: dataset.name)
    values = next(m["values"] for m in cell["matrices"] if m["metric"] == "image_AUROC")
    for step, dataset in enumerate(datasets):
        good = np.stack([image for _, image in load_images(dataset.train_good, frozen.preprocessing)])
        method.learn(dataset.name, ImageItems(good, frozen, method.detector))
        assert cell["bytes"][step] == method.nbytes() and cell["replay_bytes"][step] == method.replay_nbytes() > 0
        for unit, shown in enumerate(datasets[: step + 1]):
            images = np.stack([image for _, image in load_images([s.path for s in shown.test], frozen.preprocessing)])
            maps = method.score(ImageItems(images, frozen, method.detector).take(np.arange(len(images)))).maps
            expected = roc_auc_score([sample.label for sample in shown.test], maps.max((1, 2)))
            assert values[step][unit] == pytest.approx(expected, abs=1e-12)
    assert cell["grid"] == list(maps.shape[1:]) and cell["depth"] is None
    assert cell["routing"] == [None, None]  # one network: nothing is chosen


def test_replay_of_float_maps_is_replay_of_images(finished: Path) -> None:
    by_label = cells(finished)
    by_image, by_map, coarse = (
        next(cell for label, cell in by_label.items() if words in label)
        for words in ("paste-replay", "form float32", "form int8")
    )
    assert by_image["matrices"] == by_map["matrices"]
    assert coarse["replay_bytes"][-1] < 0.5 * by_map["replay_bytes"][-1]
    assert by_image["replay_bytes"][-1] == 4 * 3 * SIZE * SIZE


def test_other_cells_stay_as_they_were_and_tables_have_both(finished: Path) -> None:
    merged = next(cell for label, cell in cells(finished).items() if label.startswith("padim"))
    assert "replay_bytes" not in merged and merged["depth"] is not None
    joint = next(cell for label, cell in cells(finished).items() if label.startswith("cfa"))
    assert joint["grid"] == [6, 6] and joint["replay_bytes"] == [7 * 3 * SIZE**2, 14 * 3 * SIZE**2]
    page = (finished / "out" / "tables" / "results.md").read_text()
    assert "KiB replayed" in page
    plots = [path.read_text() for path in (finished / "out" / "plots").glob("*.svg") if "over-tasks" in path.name]
    assert plots and all("float32 maps and int8 features of filter-bank" in " ".join(text.split()) for text in plots)


def test_items_are_made_once_from_each_image_alone(finished: Path, tmp_path: Path) -> None:
    unit = class_incremental(find_datasets(finished / "data")).units[0]
    good = Pictures(unit, unit.dataset.train_good, finished / "data", 0)
    grid = load_grid(finished / "grid.toml")
    frozen = open_frozen(grid.cells[0].backbone, None)
    for name in ("paste-fine-tuning", "stfpm-fine-tuning", "cfa-fine-tuning"):
        method: Any = make_method(name, Context(np.ones(1), 1, frozen=frozen), settings_of(name, {}, "test"))
        items = open_items(method.detector, frozen, good, tmp_path)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.items")}
        again = open_items(method.detector, frozen, good, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.items")} == files
        images = items.images(np.array([4, 1]))
        by_hand = ImageItems(images, frozen, method.detector)
        for ours, theirs in zip(again.take(np.array([4, 1])), by_hand.take(np.arange(2)), strict=True):
            assert ours.dtype == np.float32 and np.array_equal(ours, theirs)
        assert sum(len(batch[0]) for batch in items) == len(items) == 7
    assert len(list(tmp_path.glob("*.items"))) == 3


def test_the_engine_of_a_part_reads_maps_of_any_depth(finished: Path) -> None:
    frozen = open_frozen(load_grid(finished / "grid.toml").cells[0].backbone, None)
    method: Any = make_method("paste-joint", Context(np.ones(1), 1, frozen=frozen), settings_of("paste-joint", {}, "t"))
    trunk, targets = method.detector.trunk, method.detector.targets
    image = np.random.default_rng(0).normal(size=(1, SIZE, SIZE, 3)).astype(np.float32)
    whole = onnx_engine(frozen.graph)([image])
    for ours, theirs in zip(onnx_engine(targets)(onnx_engine(trunk)([image])), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layers_are_part_of_a_cells_name_only_where_they_are_given(finished: Path) -> None:
    def names(text: str) -> list[str]:
        (finished / "other.toml").write_text(text)
        return [cell.name for cell in load_grid(finished / "other.toml").cells]

    given, none = names(GRID), names(GRID.replace('layers = ["block2", "block3.merge"]', ""))
    assert not set(given) & set(none)
    with pytest.raises(InputError, match=r"backbones\[0\]\.layers is \[2\]; expected a list of names"):
        names(GRID.replace('layers = ["block2", "block3.merge"]', "layers = [2]"))
    with pytest.raises(InputError, match="no layer nowhere"):
        names(GRID.replace("block3.merge", "nowhere"))
    with pytest.raises(InputError, match=r"methods\[0\]\.grid does not go with paste-replay"):
        names(GRID.replace('name = "paste-replay"', 'name = "paste-replay"\ngrid = 6'))
