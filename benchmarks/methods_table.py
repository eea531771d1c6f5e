"""All methods x categories, float and int8: what the exact integers cost in quality, and what a byte buys.

    python benchmarks/methods_table.py --data DIR --backbone FILE.onnx --image-size 192 --out benchmarks/results

Every method is fitted on train/good alone, its size by the stated rule or as its row says. 'float' is the backbone in
onnxruntime and the detector in floating point; 'int8' is the exact engine and the integer scorer that the device runs.
Image score: the maximum of the grid. Pixel F1 where a category has masks. Writes methods.md and methods.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from features import Features

from tinyvad import fitting
from tinyvad.backbones.source import open_backbone
from tinyvad.files import write_text
from tinyvad.images import find_datasets
from tinyvad.metrics import auroc, pixel_metrics
from tinyvad.model import upsample


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a method, its grid as input pixels a cell, and its settings."""

    title: str
    method: str
    stride: int
    settings: dict[str, Any]
    limit: int | None = None


TEN_THOUSAND = {"bank_size": 10_000, "max_candidates": 50_000}
ROWS = (
    Row("PaDiM, full covariance", "padim", 8, {"channels": None, "bits": 8}),
    Row("PaDiM-Lite (the papers' diagonal)", "padim-lite", 8, {}),
    Row("padim-compact, the default rule", "padim-compact", 0, {}, 0),
    Row("padim-compact, 160 KB", "padim-compact", 0, {}, 160_000),
    Row("padim-compact, 40 KB", "padim-compact", 0, {}, 40_000),
    Row("PatchCore, 1,000 greedy", "patchcore", 16, {"bank_size": 1000, "max_candidates": 50_000}),
    Row("PatchCore, 10,000 greedy", "patchcore", 8, TEN_THOUSAND),
    Row("PatchCore-Lite of the 10,000, 8 bytes", "patchcore-lite", 8, {**TEN_THOUSAND, "subspaces": 8}),
    Row("PatchCore-Lite of the 10,000, 4 bytes", "patchcore-lite", 8, {**TEN_THOUSAND, "subspaces": 4}),
)


def plan_row(row: Row, features: Features, n_good: int) -> fitting.MethodPlan:
    if row.limit is not None:
        limit = row.limit or None
        return fitting.plan_method(row.method, features.tensors, features.size, n_good, limit)
    cells = features.size // row.stride
    return fitting.MethodPlan(row.method, (cells, cells), row.settings, 0)


def measure(row: Row, features: Features) -> dict[str, Any]:
    """AUROC, pixel F1 and bytes of one row on one category, float and int8."""
    plan = plan_row(row, features, features.good.count)
    start = time.perf_counter()
    embedding, scorer = features.exact_fit(plan)
    maps = np.concatenate([scorer.score(batch) for batch in features.test.embeddings(embedding)])
    seconds = time.perf_counter() - start
    result = {"grid": plan.grid[0], "bytes": sum(array.nbytes for array in scorer.sections().values()), "seconds": seconds}
    result |= {f"int8_{key}": value for key, value in quality(np.sqrt(maps.astype(np.float64)), features).items()}
    study = features.float_fit(plan, embedding)
    real = np.concatenate([study.score(batch) for batch in features.real(embedding, features.real_test)])
    return result | {f"float_{key}": value for key, value in quality(real, features).items()}


def quality(maps: np.ndarray, features: Features) -> dict[str, Any]:
    values: dict[str, Any] = {"AUROC": auroc(features.labels, maps.max((1, 2))), "pixel_F1Max": None}
    if features.masks is not None:
        shown = upsample(maps, (features.size, features.size))
        values["pixel_F1Max"] = pixel_metrics(features.masks, list(shown))["pixel_F1Max"]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    backbone = open_backbone(arguments.backbone)
    datasets = find_datasets(arguments.data)
    table: list[dict[str, Any]] = []
    for dataset in datasets:
        features = Features(dataset, backbone, arguments.image_size)
        for row in ROWS:
            table.append({"method": row.title, "category": dataset.name, **measure(row, features)})
            print(table[-1], flush=True)
    write(table, [dataset.name for dataset in datasets], arguments)


def write(table: list[dict[str, Any]], categories: list[str], arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "methods.csv").open("w", newline="") as file:
        columns = [key for key in table[0] if key != "seconds"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    lines = [
        "# All methods, float and int8",
        "",
        f"{Path(arguments.backbone).stem} at {arguments.image_size} px, default taps; fitted on train/good. Image AUROC",
        "int8 (float) a category, mean of both, mean int8 pixel F1Max where there are masks, KiB of the bank's arrays.",
        "",
        "    python benchmarks/methods_table.py --data DIR --backbone FILE.onnx --out benchmarks/results",
        "",
        "| method | grid | KiB | " + " | ".join(categories) + " | mean int8 | mean float | pixel F1 |",
        "|---|---|---|" + "---|" * (len(categories) + 3),
    ]
    for title in dict.fromkeys(row["method"] for row in table):
        rows = [row for row in table if row["method"] == title]
        cells = [f"{row['int8_AUROC']:.3f} ({row['float_AUROC']:.3f})" for row in rows]
        pixel = [row["int8_pixel_F1Max"] for row in rows if row["int8_pixel_F1Max"] is not None]
        means = [np.mean([row[key] for row in rows]) for key in ("int8_AUROC", "float_AUROC")]
        kib = np.mean([row["bytes"] for row in rows]) / 1024
        lines.append(
            f"| {title} | {rows[0]['grid']}x{rows[0]['grid']} | {kib:.0f} | " + " | ".join(cells)
            + f" | {means[0]:.4f} | {means[1]:.4f} | {np.mean(pixel):.3f} |"
        )  # fmt: skip
    write_text(arguments.out / "methods.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
