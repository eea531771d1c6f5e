"""All backbones at one input size: image AUROC of the teacher, of each student, and of the student with random weights.

    python benchmarks/backbone_table.py --data DIR --teacher FILE.onnx --students NAME,NAME --out benchmarks/results

A row is the teacher's file, a student (`NAME`, its trained weights) or a student's definition with random weights
(`NAME:random`); a network that holds its own values, like filter-bank, is one row. Every row is measured on the stride-8
grid with PaDiM (full covariance) and PatchCore (10,000 greedy vectors of up to 50,000 candidates), fitted on train/good
alone. 'float' is the backbone in onnxruntime and the detector in floating point; 'int8' is the exact engine and the
integer scorer that the device runs. Image score: the maximum of the grid.

A finished row goes into backbones.csv in the place of an older one of its name, and backbones.md is written from that
file: `--rows` measures some rows and leaves the others as they stand.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from features import Features
from machine import machine

from tinyvad import fitting
from tinyvad.backbones import get_backbone
from tinyvad.backbones.source import Backbone, open_backbone
from tinyvad.detectors.distances import nearest
from tinyvad.errors import InputError
from tinyvad.files import write_text
from tinyvad.images import Dataset, find_datasets
from tinyvad.metrics import auroc

STRIDE = 8
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "PaDiM": ("padim", {"channels": None, "bits": 8}),
    "PatchCore": ("patchcore", {"bank_size": 10_000, "max_candidates": 50_000}),
}
KINDS = ("teacher", "student", "random", "built in")
COLUMNS = ("row", "kind", "method", "image_size", "category", "float_AUROC", "int8_AUROC")
IMAGES_AT_ONCE = 128
HEAD = 1000  # bank rows that bound every cell's distance
CELLS = 8  # of an image, which then bound its score
Record = dict[str, Any]  # one line of the CSV


def largest_of_nearest(images: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """(n, cells, D) and (K, D) -> (n,): the largest of an image's squared distances to the bank, without most of them.

    The distance to the bank's first rows is an upper bound of a cell's distance. A few cells with the largest bounds are
    searched in full, then only those whose bound is above the largest distance found in their image.
    """
    n, cells, depth = images.shape
    bound = nearest(images.reshape(-1, depth), bank[:HEAD])[0].reshape(n, cells)
    first = np.argsort(-bound, axis=1, kind="stable")[:, :CELLS]  # (n, CELLS)
    picked = np.take_along_axis(images, first[:, :, None], 1)
    best = nearest(picked.reshape(-1, depth), bank)[0].reshape(first.shape).max(1)  # (n,)
    np.put_along_axis(bound, first, 0, 1)
    image, cell = np.nonzero(bound > best[:, None])
    np.maximum.at(best, image, nearest(images[image, cell], bank)[0])
    return best


def image_scores(detector: Any, embeddings: np.ndarray) -> np.ndarray:
    """(n, H, W, D) -> (n,): the largest (squared) distance of each image, by a float detector or an integer scorer."""
    bank = getattr(detector, "bank", getattr(detector, "memory_bank_", None))
    if bank is None:
        return detector.score(embeddings).max((1, 2))
    return largest_of_nearest(embeddings.reshape(len(embeddings), -1, embeddings.shape[3]), bank)


def measure(backbone: Backbone, dataset: Dataset, size: int, threads: int | None) -> list[Record]:
    """Both methods on one category, float and int8."""
    start = time.perf_counter()
    features = Features(dataset, backbone, size, threads)
    seconds = [time.perf_counter() - start]
    cells = size // STRIDE
    per_call = IMAGES_AT_ONCE // len(features.real_test[0])
    records = []
    for title, (method, settings) in METHODS.items():
        start = time.perf_counter()
        plan = fitting.MethodPlan(method, (cells, cells), settings, 0)
        embedding, scorer = features.exact_fit(plan)
        exact = [image_scores(scorer, batch) for batch in features.test.embeddings(embedding)]
        study = features.float_fit(plan, embedding)
        real = [
            image_scores(study, np.concatenate(list(features.real(embedding, features.real_test[i : i + per_call]))))
            for i in range(0, len(features.real_test), per_call)
        ]
        both = [auroc(features.labels, np.concatenate(scores)) for scores in (real, exact)]
        records.append({"method": title, "category": dataset.name, "float_AUROC": both[0], "int8_AUROC": both[1]})
        seconds.append(time.perf_counter() - start)
        print(backbone.source, dataset.name, title, f"float {both[0]:.4f} int8 {both[1]:.4f}", flush=True)
    print("  seconds: features, " + ", ".join(METHODS), " ".join(f"{s:.1f}" for s in seconds), flush=True)
    return records


def rows_of(arguments: argparse.Namespace) -> dict[str, tuple[str, str, Callable[[], Backbone]]]:
    """What can be asked for: option -> (row's name, kind, how to open it)."""
    rows: dict[str, tuple[str, str, Callable[[], Backbone]]] = {}
    if arguments.teacher is not None:
        rows["teacher"] = (arguments.teacher.name, "teacher", partial(open_backbone, arguments.teacher))
    for name in arguments.students.split(",") if arguments.students else []:
        if get_backbone(name).weights == "built in":
            rows[name] = (name, "built in", partial(open_backbone, name))
            continue
        weights = None if arguments.weights_dir is None else arguments.weights_dir / f"{name}.npz"
        rows[name] = (name, "student", partial(open_backbone, name, weights=weights))
        rows[f"{name}:random"] = (name, "random", partial(open_backbone, name, weights="random"))
    return rows


def read(path: Path, size: int) -> list[Record]:
    """The rows measured before; all must be of the same input size."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        records = [{**line, "image_size": int(line["image_size"])} for line in csv.DictReader(file)]
    for record in records:
        if record["image_size"] != size:
            there = record["image_size"]
            raise InputError(f"{path}: rows at {there} px, not {size}; give --image-size {there} or another --out")
        record |= {key: float(record[key]) for key in ("float_AUROC", "int8_AUROC")}
    return records


def merge(old: list[Record], new: list[Record]) -> list[Record]:
    """``new`` in the place of the older row of its name; there is one teacher. Teacher first, then by name."""
    name, kind = new[0]["row"], new[0]["kind"]
    kept = [one for one in old if one["kind"] != kind or (kind != "teacher" and one["row"] != name)]
    return sorted(kept + new, key=lambda one: (one["kind"] != "teacher", one["row"], KINDS.index(one["kind"])))


def render(records: list[Record], size: int) -> str:
    """The Markdown table of all rows, one method after the other."""
    categories = list(dict.fromkeys(one["category"] for one in records))
    students = dict.fromkeys(one["row"] for one in records if one["kind"] != "teacher")
    teacher = next((one["row"] for one in records if one["kind"] == "teacher"), None)
    command = ["    python benchmarks/backbone_table.py --data DIR", f"--image-size {size}", "--out benchmarks/results"]
    command[1:1] = [f"--teacher {teacher}"] if teacher else []
    command[-2:-2] = [f"--students {','.join(students)}"] if students else []
    cells = size // STRIDE
    lines = [
        "# Backbones: teacher, students, random weights",
        "",
        f"Image AUROC at {size} px on a {cells}x{cells} grid, default taps; an image's score is the maximum of its grid.",
        "PaDiM: full covariance, all channels. PatchCore: 10,000 greedy vectors of up to 50,000 candidates. Fitted on",
        "train/good. A category's figure is the float one: onnxruntime's features, the detector in floating point.",
        "int8: the exact engine and the integer scorer of the device. random: the student's definition with",
        "He-initialised weights (seed 0), its batch norms the identity and not calibrated.",
        "",
        machine(("numpy", "numba", "onnxruntime")),
        "",
        " ".join(command),
        "",
        "| backbone | kind | method | " + " | ".join(categories)
        + " | mean float | mean int8 | float - teacher's | int8 - float |",
        "|---|---|---|" + "---|" * (len(categories) + 4),
    ]  # fmt: skip
    for method in METHODS:
        rows = dict.fromkeys((one["row"], one["kind"]) for one in records)
        means = {row: mean(records, method, row) for row in rows}
        reference = next((means[row] for row in rows if row[1] == "teacher"), None)
        for row in rows:
            real, exact = means[row]
            values = {one["category"]: one["float_AUROC"] for one in of(records, method, row)}
            against = "-" if reference is None or row[1] == "teacher" else f"{real - reference[0]:+.4f}"
            lines.append(
                f"| {row[0]} | {row[1]} | {method} | " + " | ".join(f"{values[c]:.3f}" for c in categories)
                + f" | {real:.4f} | {exact:.4f} | {against} | {exact - real:+.4f} |"
            )  # fmt: skip
    return "\n".join(lines) + "\n"


def of(records: list[Record], method: str, row: tuple[str, str]) -> list[Record]:
    return [one for one in records if (one["method"], one["row"], one["kind"]) == (method, *row)]


def mean(records: list[Record], method: str, row: tuple[str, str]) -> tuple[float, float]:
    """(float, int8) over the categories."""
    found = of(records, method, row)
    real, exact = (float(np.mean([one[key] for one in found])) for key in ("float_AUROC", "int8_AUROC"))
    return real, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help=".onnx or .tflite file")
    parser.add_argument("--students", help="names of backbones, by commas")
    parser.add_argument("--weights-dir", type=Path, help="folder with the students' NAME.npz; default: the installed ones")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--rows", help="only these, by commas: teacher, NAME, NAME:random")
    parser.add_argument("--threads", type=int, help="images that run at once; default: the cores")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        run(arguments)
    except InputError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    rows, size, table = rows_of(arguments), arguments.image_size, arguments.out / "backbones.csv"
    wanted = arguments.rows.split(",") if arguments.rows else list(rows)
    if not rows:
        raise InputError("no rows: give --teacher FILE, --students NAME,NAME or both")
    unknown = [row for row in wanted if row not in rows]
    if unknown:
        raise InputError(f"--rows {', '.join(unknown)}: give --teacher or --students for them; there are {list(rows)}")
    if size % STRIDE:
        raise InputError(f"--image-size {size}: give a multiple of {STRIDE}, the grid's stride")
    datasets = find_datasets(arguments.data)
    known = {record["category"] for record in read(table, size)}  # before the work: old rows must go with the new ones
    if known and known != {one.name for one in datasets}:
        raise InputError(f"{table}: rows of {', '.join(sorted(known))}; give --data with these, or another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, kind, opened in (rows[row] for row in wanted):
        backbone = opened()
        found = [record for one in datasets for record in measure(backbone, one, size, arguments.threads)]
        records = merge(read(table, size), [{"row": name, "kind": kind, "image_size": size, **one} for one in found])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_text(table, text.getvalue())
        write_text(arguments.out / "backbones.md", render(records, size))


if __name__ == "__main__":
    main()
