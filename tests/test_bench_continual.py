"""The whole bench on three small rendered parts: figures against other code's, and one set of bytes however it runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tinyvad.backbones.source import open_backbone
from tinyvad.bench.cell import run_cell
from tinyvad.bench.command import bench_continual
from tinyvad.bench.features import Pictures, cached, open_network, open_taps
from tinyvad.bench.grid import load_grid
from tinyvad.build import build
from tinyvad.cli import main
from tinyvad.continual.matrix import ScoreMatrix
from tinyvad.continual.streams import class_incremental
from tinyvad.demo import render_demo
from tinyvad.errors import CheckFailed, InputError
from tinyvad.evaluate import evaluate
from tinyvad.images import find_datasets
from tinyvad.model import load
from tinyvad.project import Project
from tinyvad.rehearsal import Rehearsal

SIZE = 64
PARTS = ("anvil", "bracket", "cover")
GRID = """
data = "data"
out = "out"
metrics = ["image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max", "pixel_AUPRO"]
[[streams]]
protocol = "class"
orders = ["alphabetical", "given"]
[[backbones]]
name = "filter-bank"
image_size = 64
[[methods]]
name = "padim-compact-separate"
dimensions = 8
[[methods]]
name = "padim-lite-uni"
[[methods]]
name = "patchcore-cl++"
rows = 90
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "data"
    for seed, name in enumerate(PARTS):
        render_demo(folder / name, seed=seed, n_train=8, n_good=5, n_defect=4, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """The grid, run in one process: the folder that holds grid.toml and out."""
    (data.parent / "grid.toml").write_text(GRID)
    bench_continual(data.parent / "grid.toml", 1, None, quiet)
    return data.parent


def quiet(stage: str, done: int, total: int) -> None:
    pass


def another(finished: Path, folder: Path, text: str = GRID) -> Path:
    """A grid file in another folder that shares data and cached features."""
    folder.mkdir(exist_ok=True)
    path = folder / "grid.toml"
    data, cache = finished / "data", finished / "out" / "features"
    path.write_text(text.replace('data = "data"', f'data = "{data}"\ncache = "{cache}"'))
    return path


def written(out: Path) -> dict[str, bytes]:
    """Everything that may not depend on how a grid was run: all but seconds and features."""
    paths = [path for name in ("cells", "tables", "plots") for path in (out / name).iterdir()]
    return {path.name: path.read_bytes() for path in paths if "seconds" not in path.name}


def cells(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json")) if "seconds" not in path.name]


def rows(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()
    assert lines[0] == "# tinyvad bench continual grid.toml"
    return list(csv.DictReader(lines[1:]))


def matrix(cell: dict[str, Any], metric: str) -> ScoreMatrix:
    return next(ScoreMatrix.from_dict(one) for one in cell["matrices"] if one["metric"] == metric)


# --- the figures


def test_the_first_task_is_what_a_build_of_it_finds(finished: Path, tmp_path: Path) -> None:
    """Calibration, features, ranges, grid, detector, anomaly maps, metrics: all are those of `tinyvad build` and `eval`."""
    cell = next(c for c in cells(finished / "out") if c["method"] == "padim-compact-separate")
    project = Project(
        data=finished / "data", category=PARTS[0], backbone="filter-bank", method="padim-compact", image_size=SIZE,
        dimensions=8, grid=cell["grid"][0], out=tmp_path / "build",
    )  # fmt: skip
    built = build(project, quiet)[0].folder
    dataset = next(d for d in find_datasets(finished / "data") if d.name == PARTS[0])
    expected = evaluate(load(built), dataset).metrics
    for metric in ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max", "pixel_AUPRO"):
        assert matrix(cell, metric).values[0, 0] == expected[metric], metric
    assert matrix(cell, "image_F1Max").chance[0] == expected["image_F1_floor"]


def test_matrices_hold_what_was_seen_and_nothing_else(finished: Path) -> None:
    for cell in cells(finished / "out"):
        for stored in cell["matrices"]:
            values = ScoreMatrix.from_dict(stored).values
            assert np.array_equal(np.isnan(values), np.triu(np.ones((3, 3), bool), 1))
            assert ((values >= 0) | np.isnan(values)).all() and ((values <= 1) | np.isnan(values)).all()
        assert len(cell["bytes"]) == len(cell["routing"]) == 3


def test_methods_do_what_they_are_known_for(finished: Path) -> None:
    by_method = {cell["method"]: cell for cell in cells(finished / "out") if cell["order"] == "alphabetical"}
    merged, banks = by_method["padim-lite-uni"], by_method["patchcore-cl++"]
    assert merged["routing"] == [None, None, None]  # one model: nothing is chosen
    assert merged["bytes"][0] == merged["bytes"][2]  # and its size does not grow
    assert banks["routing"][0] == 1.0  # one task: no other to choose
    assert [sum(row) for row in banks["routed"]["counts"]] == [9, 9, 9]  # five good, four bad test images each
    assert np.diff(by_method["padim-compact-separate"]["bytes"]).min() > 0


def test_known_tasks_are_never_confused(finished: Path, tmp_path: Path) -> None:
    text = GRID.replace('protocol = "class"', 'protocol = "class"\ntask_identity = true').replace(', "given"', "")
    path = another(finished, tmp_path / "known", text)
    bench_continual(path, 1, None, quiet)
    for cell in cells(path.parent / "out"):
        assert cell["routing"] == [None] * 3  # it is told, nothing is chosen
        if cell["method"] == "padim-compact-separate":  # then nothing is ever forgotten
            values = matrix(cell, "pixel_F1Max").values
            assert all(len(set(values[j:, j])) == 1 for j in range(3))


def test_drift_and_steps_of_several_products(finished: Path, tmp_path: Path) -> None:
    streams = (
        '[[streams]]\nprotocol = "2-1x1"\n[[streams]]\nprotocol = "drift"\ncategories = ["cover"]\n'
        'schedule = [[], [["brightness", 0.2], ["shift", 0.2]]]\n'
    )
    text = GRID.replace('[[streams]]\nprotocol = "class"\norders = ["alphabetical", "given"]\n', streams)
    path = another(finished, tmp_path / "streams", text)
    bench_continual(path, 1, None, quiet)
    found = {(cell["stream"], cell["method"]): cell for cell in cells(path.parent / "out")}
    together, drift = found["2-1x1", "patchcore-cl++"], found["drift cover", "patchcore-cl++"]
    assert matrix(together, "image_AUROC").step_of == (0, 0, 1)
    assert together["routed"]["tasks"] == ["anvil, bracket", "cover"]
    assert drift["routed"]["tasks"] == ["cover"]  # the same product again: its one bank is extended
    assert drift["routing"] == [1.0, 1.0]
    names = matrix(drift, "image_AUROC").units
    assert names == ("cover: as it was", "cover: brightness +0.2, shift +0.2")
    places = {row["stream"] for row in rows(path.parent / "out" / "tables" / "summary.csv")}
    assert places == {"2-1x1", "drift cover"}


# --- the tables


def test_tables_are_functions_of_the_cells(finished: Path) -> None:
    tables = finished / "out" / "tables"
    all_cells = cells(finished / "out")
    for row in rows(tables / "summary.csv"):
        mine = [cell for cell in all_cells if cell["label"] == row["method"]]
        finals = [np.nanmean(matrix(cell, "image_AUROC").values[-1]) for cell in mine]
        assert float(row["image_AUROC.average_final"]) == pytest.approx(np.mean(finals), abs=1e-12)
        assert float(row["image_AUROC.range"]) == pytest.approx(np.ptp(finals), abs=1e-12)
        assert int(row["runs"]) == 2
        assert float(row["bytes"]) == np.mean([cell["bytes"][-1] for cell in mine])
    assert len(rows(tables / "runs.csv")) == 6 * 5
    assert len(rows(tables / "steps.csv")) == 6 * 3
    assert len(rows(tables / "matrices.csv")) == 6 * 5 * 6
    assert {row["on"] for row in rows(tables / "seconds.csv")} > {"features", "learn 0", "score 2"}
    page = (tables / "results.md").read_text()
    assert "    tinyvad bench continual grid.toml\n" in page
    for word in ("**relative_forgetting**: ", "**routing**: ", "**Floors**: ", "## class: 3 tasks, filter-bank at 64 px"):
        assert word in page


def test_published_figures_stand_beside_with_what_differs(finished: Path) -> None:
    found = rows(finished / "out" / "tables" / "published.csv")
    banks = [row for row in found if row["method"].startswith("patchcore-cl++")]
    assert {row["published"] for row in banks} == {
        f"PatchCore clpp {rows}, {net}" for rows in ("10k", "30k") for net in ("MCUNet", "MobileNet", "PhiNet")
    }
    mine = next(row for row in banks if row["published"] == "PatchCore clpp 30k, MCUNet")
    assert mine["image F1"].endswith(" / 0.96") and mine["pixel F1"].endswith(" / 0.36") and mine["MB"].endswith(" / 16.45")
    assert mine["differs"] == "3 products, not MVTec AD's; filter-bank at 64 px for MCUNet at 224 px; int8 for float"


def test_every_plot_is_there_twice_and_says_what_made_it(finished: Path) -> None:
    plots = finished / "out" / "plots"
    drawn = {path.stem for path in plots.glob("*.svg")}
    assert drawn == {path.stem for path in plots.glob("*.png")}
    assert len(drawn) == 5 + 1 + 3 * 2  # metrics over tasks, memory, R of two metrics a method
    assert all("tinyvad bench continual grid.toml" in path.read_text() for path in plots.glob("*.svg"))


# --- one set of bytes


def test_a_second_run_does_nothing_and_changes_nothing(finished: Path) -> None:
    before = written(finished / "out")
    told: list[int] = []
    bench_continual(finished / "grid.toml", 1, None, lambda stage, done, total: told.append(done))
    assert told == [6]
    assert written(finished / "out") == before


def test_processes_in_another_order_give_the_same_bytes_though_one_is_killed(finished: Path, tmp_path: Path) -> None:
    """Features too are made anew here, by two processes at once."""
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID.replace('data = "data"', f'data = "{finished / "data"}"'))
    killed: list[int | None] = []

    def tell(stage: str, done: int, total: int) -> None:
        if done == 2 and not killed:
            victim = multiprocessing.active_children()[0]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    bench_continual(grid, 2, None, tell)
    assert killed
    assert written(tmp_path / "out") == written(finished / "out")


def test_a_dask_cluster_gives_the_same_bytes_though_a_worker_is_killed(finished: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    killed: list[int] = []
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:

        def tell(stage: str, done: int, total: int) -> None:
            if done == 2 and not killed:
                killed.append(next(iter(cluster.workers.values())).pid)
                os.kill(killed[0], signal.SIGKILL)

        bench_continual(another(finished, tmp_path / "dask"), 1, cluster.scheduler_address, tell)
    assert killed
    assert written(tmp_path / "dask" / "out") == written(finished / "out")


def test_a_cell_that_fails_is_told_and_the_others_are_kept(finished: Path, tmp_path: Path) -> None:
    text = GRID.replace("dimensions = 8", "dimensions = 5000")
    path = another(finished, tmp_path / "fails", text)
    with pytest.raises(CheckFailed, match=r"2 of 6 cells failed, the others are kept in .*: .*dimensions = 5000"):
        bench_continual(path, 1, None, quiet)
    assert len(cells(path.parent / "out")) == 4
    assert len(rows(path.parent / "out" / "tables" / "summary.csv")) == 2


def test_a_worker_with_other_data_or_weights_says_so(finished: Path, tmp_path: Path) -> None:
    """A cell's name promises what it was made of; a worker on another machine may have something else."""
    cell = load_grid(finished / "grid.toml").cells[0]
    shutil.copytree(finished / "data", tmp_path / "data", copy_function=shutil.copyfile)  # without times of change
    with pytest.raises(InputError, match="holds other images here, or with other times of change"):
        run_cell(dataclasses.replace(cell, data=str(tmp_path / "data")))
    other = dataclasses.replace(cell.backbone, source="00")
    with pytest.raises(InputError, match="backbone filter-bank has other weights here"):
        run_cell(dataclasses.replace(cell, backbone=other))


# --- features


def test_features_are_those_of_a_rehearsal_and_made_once(data: Path, tmp_path: Path) -> None:
    stream = class_incremental(find_datasets(data))
    unit = stream.units[0]
    good = Pictures(unit, unit.dataset.train_good, data, 0)
    network = open_network("filter-bank", "", SIZE, [good], tmp_path)
    taps = open_taps(network, good, tmp_path)
    rehearsal = Rehearsal(open_backbone("filter-bank"), SIZE, unit.dataset)
    for ours, theirs in zip(next(taps.batches()), next(rehearsal.good.batches()), strict=True):
        assert np.array_equal(ours, theirs)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = open_taps(open_network("filter-bank", "", SIZE, [good], tmp_path), good, tmp_path)
    assert again.count == taps.count == 8
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.suffix != ".lock"} == {
        path: time for path, time in files.items() if path.suffix != ".lock"
    }
    fewer = Pictures(unit, unit.dataset.train_good[:3], data, 0)
    assert open_taps(network, fewer, tmp_path).count == 3  # other images: another entry


def test_an_entry_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "entry.taps"

    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(path, fail)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".lock"]
    cached(path, lambda file: file.write(b"whole"))
    cached(path, fail)  # it is there: not made again
    assert path.read_bytes() == b"whole"


def _append(path: Path) -> None:
    def write(file: Any) -> None:
        with path.with_suffix(".count").open("a") as count:
            count.write("x")
        time.sleep(0.02)  # room for the others to come
        file.write(b"whole")

    cached(path, write)


def test_several_at_once_make_an_entry_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")  # its locks keep threads apart as they do processes: each opens the file for itself
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_append, [tmp_path / "entry"] * 8))
    assert (tmp_path / "entry.count").read_text() == "x"
    assert (tmp_path / "entry").read_bytes() == b"whole"


# --- the command line


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], catch_exceptions=False)


def test_cli(finished: Path, tmp_path: Path) -> None:
    made = cli("continual", "--init", tmp_path / "new.toml")
    assert made.exit_code == 0 and "[[methods]]" in (tmp_path / "new.toml").read_text()
    assert cli("continual", "--init", tmp_path / "new.toml").exit_code == 2  # never over somebody's file
    result = cli("continual", finished / "grid.toml", "--json")
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert (value["cells"], len(value["summary"])) == (6, 3)
    assert "results.md" in value["tables"]
    missing = cli("continual", tmp_path / "none.toml")
    assert missing.exit_code == 2 and missing.stderr.count("\n") == 1
    assert cli("continual", finished / "grid.toml", "--workers", "0").exit_code == 2


def test_costs(tmp_path: Path) -> None:
    table = cli("costs").stdout.splitlines()
    assert table[0].split()[:2] == ["system", "backbone"]
    value = json.loads(cli("costs", "--json").stdout)
    row = next(r for r in value["rows"] if (r["system"], r["backbone"]) == ("PaDiM Lite cl multi", "MobileNet"))
    assert (row["published_mb"], round(row["computed_mb"], 2)) == (46.67, 46.66)
    lines = cli("costs", "--format", "csv", "--dataset", "VisA").stdout.splitlines()
    assert lines[0] == '# tinyvad bench costs --dataset "VisA" --format csv'
    assert len(list(csv.DictReader(lines[1:]))) > 30
    page = cli("costs", "--format", "markdown").stdout
    assert "| PaDiM Lite cl multi | MobileNet |" in page and "tinyvad bench costs" in page
