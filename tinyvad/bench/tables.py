"""Finished cells in, tables out: CSV for machines, one Markdown page for people, the definitions under the tables.

Nothing here is measured: every number is a function of what the cells stored, in the order of the grid, so the same cells
give the same bytes. Seconds, which differ from run to run, have a table of their own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tinyvad.continual.matrix import SUMMARIES, ScoreMatrix, summarise
from tinyvad.report.text import NONE, flat

ROUTING = "Mean over products of the share of test images (or patches, where each chooses) scored by their own task."
BYTES = "All that the method keeps to score and to go on learning, without the backbone."
DEVICE_BYTES = "The bank's sections that scoring on a device needs."
REPLAY_BYTES = "Of the bytes kept, those of replayed images or maps (joint: of all images of all tasks)."
RANGE = "Largest minus smallest average_final over the orders and seeds."
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One finished cell."""

    name: str
    values: Mapping[str, Any]

    @cached_property
    def matrices(self) -> dict[str, ScoreMatrix]:
        return {stored["metric"]: ScoreMatrix.from_dict(stored) for stored in self.values["matrices"]}

    @cached_property
    def summaries(self) -> dict[str, dict[str, float | None]]:
        """Metric -> summary -> value."""
        return {metric: summarise(matrix) for metric, matrix in self.matrices.items()}

    @property
    def place(self) -> tuple[str, str, int]:
        """Stream, backbone, image size: what a table is for."""
        return self.values["stream"], self.values["backbone"], self.values["image_size"]


@dataclass(frozen=True)
class Group:
    """The runs of one method at one place: its orders and seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return str(self.runs[0].values["method"])

    def mean(self, metric: str, summary: str) -> float | None:
        """Mean over the runs that have it."""
        return mean([run.summaries[metric][summary] for run in self.runs])

    def range(self, metric: str) -> float | None:
        """See ``RANGE``."""
        finals = [run.summaries[metric]["average_final"] for run in self.runs]
        known = [value for value in finals if value is not None]
        return max(known) - min(known) if known else None

    def last(self, key: str) -> float | None:
        """Mean over the runs of what a list of their values ends with: routing, bytes, device_bytes or replay_bytes."""
        return mean([None if run.values.get(key) is None else run.values[key][-1] for run in self.runs])


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is there, neither None nor NaN; None of nothing."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else None


def groups(runs: Sequence[Run]) -> dict[tuple[str, str, int], list[Group]]:
    """Place -> a group a method, all in the order of the grid."""
    found: dict[tuple[str, str, int], dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.place, {}).setdefault(run.values["label"], []).append(run)
    return {place: [Group(label, tuple(own)) for label, own in labels.items()] for place, labels in found.items()}


def summary_rows(runs: Sequence[Run], metrics: Sequence[str]) -> list[Row]:
    """A row a method and place: means over orders and seeds."""
    rows = []
    for (stream, backbone, size), of_place in groups(runs).items():
        for group in of_place:
            row: Row = {"stream": stream, "backbone": backbone, "image_size": size, "method": group.label}
            row |= {"runs": len(group.runs)}
            for metric in metrics:
                row |= {f"{metric}.{summary}": group.mean(metric, summary) for summary in SUMMARIES}
                row[f"{metric}.range"] = group.range(metric)
            row |= {key: group.last(key) for key in _step_keys(runs)}
            rows.append(row)
    return rows


def run_rows(runs: Sequence[Run]) -> list[Row]:
    """A row a run and metric, with every summary."""
    return [{**_facts(run), "metric": metric, **run.summaries[metric]} for run in runs for metric in run.matrices]


def step_rows(runs: Sequence[Run]) -> list[Row]:
    """A row a run and step: each metric's mean over the products seen so far, routing, bytes."""
    rows = []
    for run in runs:
        for step, name in enumerate(next(iter(run.matrices.values())).steps):
            row = {**_facts(run), "step": step, "task": name}
            row |= {metric: _seen(matrix, step) for metric, matrix in run.matrices.items()}
            for key in _step_keys(runs):
                row[key] = None if run.values.get(key) is None else run.values[key][step]
            rows.append(row)
    return rows


def matrix_rows(runs: Sequence[Run]) -> list[Row]:
    """A row a run, metric, step and product: R itself."""
    return [
        {**_facts(run), "metric": metric, "step": step, "product": matrix.units[unit], "value": float(value)}
        for run in runs
        for metric, matrix in run.matrices.items()
        for (step, unit), value in np.ndenumerate(matrix.values)
        if not np.isnan(value)
    ]


def seconds_rows(names: Sequence[str], seconds: Sequence[Mapping[str, float]]) -> list[Row]:
    """A row a run and what it spent its time on; these differ from run to run."""
    return [
        {"cell": name, "on": on, "seconds": round(value, 3)}
        for name, spent in zip(names, seconds, strict=True)
        for on, value in spent.items()
    ]


def to_csv(rows: Sequence[Row]) -> str:
    """Numbers as they are, None as nothing."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_markdown(runs: Sequence[Run], metrics: Sequence[str], published: Sequence[Row], command: str) -> str:
    """One page: a table a place, the published figures beside ours, definitions."""
    first = metrics[0]
    head = [
        "method", "runs", *metrics, f"{first} range", *(f"forgetting {m}" for m in metrics if m in _FORGOTTEN),
        f"{first} ACC", f"{first} FM", f"{first} BWT", "routing", "KiB kept", "KiB on device",
        *(["KiB replayed"] if _replays(runs) else []),
    ]  # fmt: skip
    lines = ["# Continual learning", "", f"    {command}", ""]
    for (stream, backbone, size), of_place in groups(runs).items():
        steps = next(iter(of_place[0].runs[0].matrices.values())).steps
        lines += [f"## {flat(stream)}: {len(steps)} tasks, {flat(backbone)} at {size} px", ""]
        lines += [f"Floors, {_floors(of_place[0].runs[0], metrics)}.", ""]
        rows = []
        for group in of_place:
            forgetting = [group.mean(m, "relative_forgetting") for m in metrics if m in _FORGOTTEN]
            figures = [*(group.mean(m, "average_final") for m in metrics), group.range(first), *forgetting]
            figures += [group.mean(first, summary) for summary in ("ACC", "FM", "BWT")] + [group.last("routing")]
            sizes = [_kib(group.last(key)) for key in _step_keys(runs)[1:]]
            rows.append([group.label, str(len(group.runs)), *map(_figure, figures), *sizes])
        lines += [*_table(head, rows), ""]
    lines += _beside([row for row in published if row["nearest"]])
    lines += ["## Definitions", ""]
    lines += [f"* **{name}**: {summary.sentence}" for name, summary in SUMMARIES.items()]
    lines += [
        "* A metric's own column is its average_final; **forgetting** is relative_forgetting; both are means over runs.",
        f"* **range**: {RANGE}", f"* **routing**: {ROUTING}", f"* **KiB kept**: {BYTES}",
        f"* **KiB on device**: {DEVICE_BYTES}", *([f"* **KiB replayed**: {REPLAY_BYTES}"] if _replays(runs) else []),
        "* **F1Max**: The best F1 over all thresholds, chosen on the very labels that it is judged by.",
        "* **Floors**: What an F1 is when everything is called anomalous.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _beside(published: Sequence[Row]) -> list[str]:
    """Our figures and the published ones, with what to know about the papers' tables."""
    if not published:
        return []
    columns = [key for key in published[0] if key not in ("table", "note", "nearest")]
    rows = [[_word(row[key]) for key in columns] for row in published]
    tables = dict.fromkeys((row["table"], row["note"]) for row in published)
    return [
        "## Beside the published figures", "",
        "Ours / published; the last column says what differs: none of these rows is a reproduction. published.csv has the "
        "papers' other backbones too.", "",
        *_table(columns, rows), "",
        *(f"* {table}{f': {note}' if note else ''}" for table, note in tables), "",
    ]  # fmt: skip


_FORGOTTEN = ("image_AUROC", "pixel_F1Max")


def _step_keys(runs: Sequence[Run]) -> list[str]:
    """What is noted after each step; replay only where there is any."""
    return ["routing", "bytes", "device_bytes", *(["replay_bytes"] if _replays(runs) else [])]


def _replays(runs: Sequence[Run]) -> bool:
    return any("replay_bytes" in run.values for run in runs)


def _facts(run: Run) -> Row:
    keys = ("stream", "order", "seed", "backbone", "image_size")
    return {**{key: run.values[key] for key in keys}, "method": run.values["label"]}


def _seen(matrix: ScoreMatrix, step: int) -> float | None:
    return mean(matrix.values[step].tolist())


def _floors(run: Run, metrics: Sequence[str]) -> str:
    found = {
        metric: mean(chance.tolist())
        for metric in metrics
        if metric.endswith("F1Max") and (chance := run.matrices[metric].chance) is not None
    }
    return ", ".join(f"{metric} {_figure(value)}" for metric, value in found.items()) or "none"


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _kib(nbytes: float | None) -> str:
    return NONE if nbytes is None else f"{nbytes / 1024:,.1f}"


def _word(value: Any) -> str:
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else flat(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    numeric = [all(row[i][:1] in "-0123456789" + NONE for row in rows) and i > 0 for i in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---:' if right else '---' for right in numeric)}|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
