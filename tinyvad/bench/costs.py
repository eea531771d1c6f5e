"""``tinyvad bench costs``: the edge benchmark's memory and GFLOPs, printed, by formula, and counted honestly."""

from __future__ import annotations

import json
from typing import Any

from tinyvad.bench.tables import to_csv
from tinyvad.continual.costs import cost_table

FORMATS = ("table", "csv", "json", "markdown")
DATASETS = ("MVTec AD", "VisA")
HEAD = (
    "system", "backbone", "GFLOPs printed", "by formula", "off", "MB printed", "by formula", "off", "GMACs", "float32 MiB",
    "int8 MiB",
)  # fmt: skip
NOTES = (
    "printed: the edge benchmark's table; by formula: its own conventions (tinyvad/continual/costs.py says which); off: by "
    "formula over printed, minus 1",
    "GMACs, float32 MiB, int8 MiB: one pass of the backbone, inverses worked out beforehand, separable blur, all that must "
    "be stored to score and to go on learning, backbone included",
)


def bench_costs(dataset: str, form: str) -> str:
    """The cost table as text.

    Args:
        dataset: of ``DATASETS``. form: of ``FORMATS``.

    Raises:
        InputError: no such data set.
    """
    rows = cost_table(dataset)
    command = f'tinyvad bench costs --dataset "{dataset}" --format {form}'
    if form == "json":
        return json.dumps({"dataset": dataset, "notes": NOTES, "rows": rows}, indent=1) + "\n"
    if form == "csv":
        return f"# {command}\n{to_csv(rows)}"
    cells = [HEAD, *(_row(row) for row in rows)]
    if form == "markdown":
        rule = "|".join("---" if i < 2 else "---:" for i in range(len(HEAD)))
        lines = [f"| {' | '.join(HEAD)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in cells[1:])]
        return "\n".join([f"    {command}", "", *lines, "", *(f"* {note}" for note in NOTES)]) + "\n"
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
    padded = ([c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in cells)
    return "\n".join(["  ".join(row).rstrip() for row in padded] + list(NOTES)) + "\n"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["system"], row["backbone"],
        f"{row['published_gflops']:g}", f"{row['computed_gflops']:.3f}", f"{100 * row['gflops_deviation']:+.1f} %",
        f"{row['published_mb']:g}", f"{row['computed_mb']:.2f}", f"{100 * row['mb_deviation']:+.1f} %",
        f"{row['gmacs']:.3f}", f"{row['float32_mib']:.2f}", f"{row['int8_mib']:.2f}",
    )  # fmt: skip
