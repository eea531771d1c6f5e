"""What `tinyvad build` makes by itself of each category for each target: quality with the exact engine, bytes, seconds.

    python benchmarks/build_table.py --data DIR --backbone auto --backbone FILE.onnx --out benchmarks/results

Writes builds.md. Quality is that of `tinyvad eval BUILD --engine int8`; nothing is chosen on test images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.build import build
from tinyvad.files import write_text
from tinyvad.images import find_datasets
from tinyvad.project import Project


class Clock:
    """Seconds by stage, from the build's own progress calls: each stage ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", action="append", help="repeatable; default: auto, tinyvad's own weights")
    parser.add_argument("--targets", default="stm32h743,stm32f746")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [
        "# Builds as `tinyvad build` makes them",
        "",
        "Size by good images, grid and d by rule; with `auto` the backbone too. Exact int8 engine; 'engines': whether",
        "LiteRT's reference kernels and TFLM gave the same integers.",
        "",
        "    python benchmarks/build_table.py --data DIR --backbone auto --backbone FILE.onnx --out benchmarks/results",
        "",
    ]
    for target, backbone in product(arguments.targets.split(","), arguments.backbone or ["auto"]):
        rows = [measure(arguments.data, backbone, target, dataset.name) for dataset in find_datasets(arguments.data)]
        lines += table(f"{target}, {Path(backbone).stem}", rows)
    write_text(arguments.out / "builds.md", "\n".join(lines) + "\n")


def measure(data: Path, backbone: str, target: str, category: str) -> dict[str, Any]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "build"
        project = Project(data=data, category=category, backbone=backbone, target=target, out=out)
        report = build(project, clock)[0].report
    print(target, category, report["metrics"]["image_AUROC"], clock.seconds, flush=True)
    return {"category": category, "report": report, "seconds": clock.seconds}


def table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]["report"]
    lines = [
        f"## {title}",
        "",
        f"{first['backbone']['source']}; {first['method']['name']}.",
        "",
        "| category | good | px, grid, d | plan, arena | RAM | flash | ms, estimated | image AUROC | pixel F1Max | AUPRO "
        "| false alarm | missed | engines | s |",
        "|" + "---|" * 14,
    ]
    for row in rows:
        r, m = row["report"], row["report"]["metrics"]
        budget, memory = r["budget"], r["memory"]
        pixel = ["-" if m[key] is None else f"{m[key]:.3f}" for key in ("pixel_F1Max", "pixel_AUPRO")]
        states = {facts["status"] for name, facts in r["verification"]["engines"].items() if name in ("litert", "tflm")}
        size, grid, d = r["preprocessing"]["height"], r["grid"][0], r["method"]["settings"].get("dimensions")
        lines.append(
            f"| {row['category']} | {r['dataset']['n_train']} | {size}, {grid}x{grid}, {d} "
            f"| {memory['strategy']}, {memory['head_bytes']:,} | {budget['ram_used']:,} | {budget['flash_used']:,} "
            f"| {r['latency']['ms']:.0f} | {m['image_AUROC']:.4f} | {pixel[0]} | {pixel[1]} "
            f"| {m['false_alarms']} of {m['n_normal']} | {m['missed']} of {m['n_anomalous']} | {', '.join(sorted(states))} "
            f"| {sum(row['seconds'].values()):.1f} |"
        )
    mean = np.mean([row["report"]["metrics"]["image_AUROC"] for row in rows])
    return [*lines, "", f"Mean image AUROC {mean:.4f}.", ""]


if __name__ == "__main__":
    main()
