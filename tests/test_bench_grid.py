"""Grid files: what becomes a cell, what a cell's name depends on, and what is refused, by field."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyvad.bench.grid import TEMPLATE, load_grid, open_stream
from tinyvad.continual.base import Context
from tinyvad.continual.methods import METHODS, is_trained, make_method, needs_one_step, settings_of
from tinyvad.errors import InputError
from tinyvad.images import find_datasets

GRID = """
data = "data"
out = "results"
seeds = [0, 3]
metrics = ["image_AUROC", "pixel_F1Max"]
[[streams]]
protocol = "class"
orders = ["alphabetical", "shuffled 2", ["c", "a", "b"]]
[[backbones]]
name = "filter-bank"
image_size = 64
[[methods]]
name = "padim-compact-multi"
dimensions = [8, 16]
select = "image"
[[methods]]
name = "patchcore-cl++"
rows = 30
grid = 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three categories of grey images, a good and a bad one to test on each."""
    for name in "abc":
        for place in ("train/good/0", "train/good/1", "test/good/0", "test/bad/0"):
            path = tmp_path / "data" / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 99, np.uint8)).save(path)
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path


def changed(folder: Path, old: str, new: str) -> Path:
    text = (folder / "grid.toml").read_text()
    assert old in text
    path = folder / "changed.toml"
    path.write_text(text.replace(old, new))
    return path


def test_every_combination_is_a_cell(folder: Path) -> None:
    grid = load_grid(folder / "grid.toml")
    assert len(grid.cells) == 3 * 1 * 3 * 2  # orders, backbones, methods (two of them by the list), seeds
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    assert grid.out == folder / "results"
    assert grid.metrics == ("image_AUROC", "pixel_F1Max")
    labels = list(dict.fromkeys(cell.method.label for cell in grid.cells))
    assert labels == [
        "padim-compact-multi (dimensions 8, select image)", "padim-compact-multi (dimensions 16, select image)",
        "patchcore-cl++ (rows 30, grid 2)",
    ]  # fmt: skip
    last = grid.cells[-1]
    assert (last.order, last.seed, last.method.grid) == (("c", "a", "b"), 3, 2)
    settings = json.loads(last.method.settings)
    assert settings == {"budget": None, "max_candidates": 50000, "route": "prototype", "rows": 30}


def test_orders(folder: Path) -> None:
    grid = load_grid(folder / "grid.toml")
    datasets = find_datasets(folder / "data")
    names = {}
    for cell in grid.cells[:6]:
        stream = open_stream(cell.stream, cell.order, cell.seed, datasets)
        names.setdefault(cell.order_name, []).append([task.name for task in stream.tasks])
    assert names["alphabetical"] == [["a", "b", "c"]] * 2
    assert names["c a b"] == [["c", "a", "b"]] * 2
    # an order's number shuffles, whatever the methods' seed
    shuffled = [["abc"[i] for i in np.random.default_rng(2).permutation(3)]] * 2
    assert names["shuffled 2"] == shuffled


def test_a_cell_is_named_by_what_its_result_depends_on(folder: Path) -> None:
    first = load_grid(folder / "grid.toml").cells[0]
    assert load_grid(folder / "grid.toml").cells[0].name == first.name
    elsewhere = dataclasses.replace(first, data="/other", cache="/other/cache")
    assert elsewhere.name == first.name
    assert dataclasses.replace(first, seed=1).name != first.name
    assert dataclasses.replace(first, metrics=("image_AUROC",)).name != first.name
    image = folder / "data" / "b" / "train" / "good" / "1.png"
    os.utime(image, ns=(1, 1))  # an image that was changed
    assert load_grid(folder / "grid.toml").cells[0].name != first.name


def test_a_cell_is_plain_data_for_other_processes(folder: Path) -> None:
    import pickle

    cell = load_grid(folder / "grid.toml").cells[0]
    assert pickle.loads(pickle.dumps(cell)) == cell
    assert Path(cell.data).is_absolute()
    assert Path(cell.cache) == (folder / "results" / "features").resolve()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('data = "data"', "", "changed.toml: data is missing"),
        ('data = "data"', "data = 3", "data is 3; expected text"),
        ('data = "data"', 'data = "none"', "cannot open .*none"),
        ("seeds = [0, 3]", "seeds = []", "seeds must be whole numbers"),
        ("seeds = [0, 3]", "seeds = [-1]", "seeds must be whole numbers"),
        ("seeds = [0, 3]", "speed = 1", "speed is unknown; known are data, out"),
        ('"pixel_F1Max"]', '"f1"]', "metrics has 'f1'; choose among image_AUROC"),
        ('[[streams]]\nprotocol = "class"', "[[streams]]", r"streams\[0\].protocol is missing"),
        ('protocol = "class"', 'protocol = "1-1x5"', "needs 6 categories, there are 3"),
        ('protocol = "class"', 'protocol = "nope"', "no protocol 'nope'"),
        ('"shuffled 2"', '"shuffled"', "write alphabetical, given, a list of names, or shuffled and a number"),
        ('["c", "a", "b"]', '["c", "a"]', "must name each of a, b, c once"),
        ('protocol = "class"', 'protocol = "class"\ncategories = ["a", "x"]', "no category 'x' in the data; there are"),
        ('protocol = "class"', 'protocol = "class"\ncategories = ["a", "b"]', "order c, a, b must name each of a, b once"),
        ('protocol = "class"', 'protocol = "class"\ncategories = "a"', r"categories is 'a'; expected a list"),
        ('protocol = "class"', 'protocol = "class"\ncategories = [1]', r"categories is \[1\]; expected a list of names"),
        ('["alphabetical", "shuffled 2", ["c", "a", "b"]]', "[]", r"streams\[0\].orders is empty"),
        ('["c", "a", "b"]', "[1]", r"orders has \[1\]; write alphabetical"),
        ('["c", "a", "b"]', "4", r"orders has 4; write alphabetical"),
        ('protocol = "class"', 'protocol = "class"\nschedule = [["blur", 1]]', r"schedule has \['blur', 1\]; write a list"),
        ('select = "image"', 'select = "best"', r"methods\[0\]: no task selection called best"),
        ('select = "image"', "select = 1", r"methods\[0\]: select is 1; expected text"),
        ("rows = 30", 'rows = "many"', r"methods\[1\]: rows is 'many'; expected a whole number"),
        ("rows = 30", 'rows = 30\nbudget = "1K"', r"methods\[1\]: budget of 30 rows, 1024 B: give one of them"),
        ('name = "filter-bank"', 'name = "nope"', "nope"),
        ("image_size = 64", "image_size = 8", r"backbones\[0\].image_size is 8; choose 32 to 1024"),
        ("image_size = 64", "image_size = true", r"image_size is True; expected a whole number"),
        ("[[backbones]]", "[[backbone]]", "backbone is unknown"),
        ('name = "patchcore-cl++"', 'name = "patchcore"', r"methods\[1\]: no continual method called 'patchcore'"),
        ("rows = 30", "row = 30", r"methods\[1\]: patchcore-cl\+\+ takes no setting 'row'; it takes rows, budget"),
        ("grid = 2", "grid = 200", r"methods\[1\].grid is 200; choose 1 to 128"),
        ("dimensions = [8, 16]", "dimensions = [8, 8]", "methods has 'padim-compact-multi .*' twice"),
        ("seeds = [0, 3]", "seeds = [0", "cannot read"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_grid(changed(folder, old, new))
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"grid.toml does not exist; `tinyvad bench continual --init .*` writes one"):
        load_grid(tmp_path / "grid.toml")


def test_the_template_is_a_grid(folder: Path) -> None:
    (folder / "template.toml").write_text(TEMPLATE)
    grid = load_grid(folder / "template.toml")
    assert len(grid.cells) == 3 * 4


def test_every_method_by_name_learns_and_scores() -> None:
    """Defaults but for what a small embedding demands; tasks far apart are told apart by all that route.

    Methods that are trained learn from images: tests/test_continual_trained.py.
    """
    rng = np.random.default_rng(0)
    context = Context(np.full(16, 0.1), 4, tasks=2)
    centres = [rng.integers(-60, 60, 16), rng.integers(-60, 60, 16)]
    batches = [np.clip(c + rng.integers(-9, 10, (8, 3, 3, 16)), -127, 127).astype(np.int8) for c in centres]
    for name in (name for name in METHODS if not is_trained(name)):
        given = {key: value for key, value in {"dimensions": 6, "subspaces": 4, "rows": 20}.items()
                 if key in METHODS[name].settings}  # fmt: skip
        method = make_method(name, context, settings_of(name, given, "test"))
        for task, batch in enumerate(batches):
            method.learn(f"task {task}", [batch])
        maps, tasks = method.score(batches[1])
        assert maps.shape == (8, 3, 3), name
        assert np.isfinite(maps).all() and (maps >= 0).all(), name
        assert method.nbytes() > 0, name
        assert method.task_names == ["task 0", "task 1"], name
        assert set(np.unique(tasks)) <= {-1, 1}, name
        assert needs_one_step(name) == ("patchcore" in name)
