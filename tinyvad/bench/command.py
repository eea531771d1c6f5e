"""``tinyvad bench continual``: a grid file in, finished cells, tables and plots out, each with the command that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyvad.bench.canvas import Canvas, to_png, to_svg
from tinyvad.bench.cell import run_cell
from tinyvad.bench.compare import nearest, published_points, published_rows
from tinyvad.bench.grid import TEMPLATE, Grid, load_grid
from tinyvad.bench.plots import Series, heat_map, memory_against, over_tasks
from tinyvad.bench.run import Tell, run
from tinyvad.bench.tables import (
    Group,
    Run,
    groups,
    matrix_rows,
    mean,
    run_rows,
    seconds_rows,
    step_rows,
    summary_rows,
    to_csv,
    to_markdown,
)
from tinyvad.continual.matrix import average_final
from tinyvad.continual.methods import is_trained
from tinyvad.errors import CheckFailed, InputError
from tinyvad.files import write_bytes, write_text

REASONS = 3  # of failed cells that are told
PICTURED = "pixel_F1Max"  # what memory is drawn against, the edge benchmark's own picture


def write_template(path: Path) -> None:
    """Write a commented grid file.

    Raises:
        InputError: there is one already.
    """
    if path.exists():
        raise InputError(f"{path} exists; edit it, or remove it first")
    write_text(path, TEMPLATE)


def bench_continual(path: Path, workers: int, cluster: str | None, tell: Tell) -> dict[str, Any]:
    """Run what is missing of a grid, and write all tables and plots anew.

    Args:
        path: the grid file. workers: processes. cluster: a Dask scheduler's address, or None.

    Returns:
        out, cells, tables, plots: what was written, and ``summary``, the rows of summary.csv.

    Raises:
        InputError: a wrong grid, or no such cluster.
        CheckFailed: cells failed (why, the first reasons); the tables of all others are written.
    """
    grid = load_grid(path)
    cells, command = grid.out / "cells", f"tinyvad bench continual {path.name}"
    problems = run({cell.name: (run_cell, cell) for cell in grid.cells}, cells, workers, cluster, tell)
    names = [cell.name for cell in grid.cells if cell.name not in problems]
    runs = [Run(name, _read(cells / f"{name}.json")) for name in names]
    written: dict[str, Any] = {"out": str(grid.out), "cells": len(runs), "tables": [], "plots": [], "summary": []}
    if runs:
        seconds = [_read(cells / f"{name}.seconds.json") for name in names]
        written["summary"] = summary_rows(runs, grid.metrics)
        written["tables"] = _write_tables(grid, runs, written["summary"], seconds, command)
        written["plots"] = _write_plots(grid, runs, command)
    if problems:
        reasons = list(dict.fromkeys(problems.values()))
        more = f" (and {len(reasons) - REASONS} more reasons)" if len(reasons) > REASONS else ""
        raise CheckFailed(
            f"{len(problems)} of {len(grid.cells)} cells failed, the others are kept in {grid.out}: "
            f"{next(iter(problems))}: {'; '.join(reasons[:REASONS])}{more}"
        )
    return written


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no finished cell ({error}); remove it to run it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no finished cell; remove it to run it again")
    return value


def _write_tables(
    grid: Grid, runs: Sequence[Run], summary: list[dict[str, Any]], seconds: list[dict[str, Any]], command: str
) -> list[str]:
    published = published_rows(groups(runs))
    files = {
        "summary.csv": to_csv(summary),
        "runs.csv": to_csv(run_rows(runs)),
        "steps.csv": to_csv(step_rows(runs)),
        "matrices.csv": to_csv(matrix_rows(runs)),
        "published.csv": to_csv(published),
        "results.md": to_markdown(runs, grid.metrics, published, command),
        "seconds.csv": to_csv(seconds_rows([run.name for run in runs], seconds)),
    }
    for name, text in files.items():
        comment = f"# {command}\n" if name.endswith(".csv") else ""
        write_text(grid.out / "tables" / name, comment + text)
    return sorted(files)


def _write_plots(grid: Grid, runs: Sequence[Run], command: str) -> list[str]:
    written = []
    for (stream, backbone, size), of_place in groups(runs).items():
        features = {"float32 maps" if is_trained(group.method) else "int8 features" for group in of_place}
        what = " and ".join(sorted(features))
        note = f"{command}; {stream}, {what} of {backbone} at {size} px, means over orders and seeds."
        canvases = {
            f"{metric} over tasks": over_tasks(
                _curves(of_place, metric), f"{metric} over tasks", f"mean {metric} of the products seen", note
            )
            for metric in grid.metrics
        }
        if PICTURED in grid.metrics:
            theirs = f"Hollow: edge benchmark, MVTec AD, {nearest(backbone)} at 224 px in float; PatchCore with backbone."
            canvases["memory"] = memory_against(
                _memory(of_place, backbone), f"{PICTURED} against memory", f"final {PICTURED}", f"{note} {theirs}"
            )
        for group in of_place:
            for metric in dict.fromkeys((grid.metrics[0], *(m for m in grid.metrics if m == PICTURED))):
                canvases[f"R {metric} {group.label}"] = _heat_map(group, metric, f"{command}; {backbone} at {size} px")
        for title, canvas in canvases.items():
            written += _save(grid.out / "plots", f"{stream} {backbone} {size} {title}", canvas)
    return written


def _curves(of_place: Sequence[Group], metric: str) -> list[Series]:
    """A line a method: the mean over runs of the mean over the products seen after each step."""
    series = []
    for group in of_place:
        steps = range(len(group.runs[0].matrices[metric].steps))
        seen = [[run.matrices[metric].after(step) for run in group.runs] for step in steps]
        means = [mean([average_final(matrix) for matrix in matrices]) for matrices in seen]
        series.append(Series(group.label, [(step + 1, value) for step, value in zip(steps, means)]))
    return series


def _memory(of_place: Sequence[Group], backbone: str) -> list[Series]:
    ours = [
        Series(group.label, [(group.last("bytes") or 0, group.mean(PICTURED, "average_final"))]) for group in of_place
    ]
    theirs = published_points(backbone, "pixel_f1", [group.method for group in of_place])
    published = [Series(name, [(nbytes, value)], hollow=True) for name, nbytes, value in theirs]
    return ours + published if any(y is not None for one in ours for _, y in one.points) else ours


def _heat_map(group: Group, metric: str, note: str) -> Canvas:
    """R of the group's first run."""
    run = group.runs[0]
    matrix = run.matrices[metric]
    values = matrix.to_dict()["values"]
    order = f"order {run.values['order']}, seed {run.values['seed']}"
    return heat_map(values, matrix.steps, matrix.units, f"{metric}: {group.label}", f"{note}; {order}.")


def _save(folder: Path, title: str, canvas: Canvas) -> list[str]:
    name = re.sub("[^a-z0-9.+]+", "-", title.lower()).strip("-")[:140]
    write_text(folder / f"{name}.svg", to_svg(canvas))
    write_bytes(folder / f"{name}.png", to_png(canvas))
    return [f"{name}.svg", f"{name}.png"]
