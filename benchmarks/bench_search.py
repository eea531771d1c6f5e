"""Speed of the coreset and of the nearest-neighbour search against NumPy, faiss and anomalib, in interleaved rounds.

    python benchmarks/bench_search.py [--rounds 9] [--threads 2] [--only coreset|search] [--out FILE.md]

Every side runs in a process of its own with one thread pool, prepares its data and warms up. Then the sides take turns,
one run a round, so that a clock that drifts hits them all alike; the table gives each side's time over tinyvad's of the
same round. The inputs are synthetic: vectors in clusters of unequal weight, and independent Gaussians, where nothing can
be saved. ``result`` is a number that tells that the sides did the same: the covering radius, or the mean distance found.
Sides whose library is not installed are left out. Nothing is written without --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import machine

ROWS, DEPTH, TAKEN = 50_000, 256, 1000
QUERIES, BANK = 784, 10_000
Run = Callable[[], float]

# task -> (what, sides); the first side is tinyvad's, the others' times are given in terms of it
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "coreset clusters": (
        f"greedy coreset, {ROWS:,} x {DEPTH} float32 clusters -> {TAKEN:,}",
        ("tinyvad", "numpy-blas", "anomalib"),
    ),
    "coreset gaussian": (
        f"greedy coreset, {ROWS:,} x {DEPTH} float32 Gaussians -> {TAKEN:,}",
        ("tinyvad", "numpy-blas", "anomalib"),
    ),
    "search": (
        f"{QUERIES} queries of {DEPTH} values, {BANK:,} rows; codes of 8 bytes a row",
        ("tinyvad-8x8", "faiss-pq-8x8", "faiss-fastscan-16x4", "tinyvad-16x4", "tinyvad-exhaustive"),
    ),
}
NEEDS = {"faiss-pq-8x8": "faiss", "faiss-fastscan-16x4": "faiss", "anomalib": "anomalib"}


def vectors(kind: str, n: int, seed: int) -> np.ndarray:
    """(n, DEPTH) float32 integers from -127 to 127; the clusters are the same for every seed."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, DEPTH)) * 12
    if kind == "clusters":
        centres = np.random.default_rng(0).standard_normal((300, DEPTH)) * 25
        x += centres[(rng.random(n) ** 2 * 300).astype(int)]
    return np.clip(np.rint(x), -127, 127).astype(np.float32)


def numpy_blas(x: np.ndarray, count: int) -> float:
    """Farthest-first selection with one matrix-vector product a step."""
    norms = np.einsum("nd,nd->n", x, x)
    chosen = int(((x - x.mean(0)) ** 2).sum(1).argmax())
    nearest = np.full(len(x), np.inf, np.float32)
    for _ in range(count):
        np.minimum(nearest, norms - 2 * (x @ x[chosen]) + norms[chosen], out=nearest)
        chosen = int(nearest.argmax())
    return float(np.sqrt(nearest[chosen]))


def prepare(task: str, side: str, threads: int) -> Run:
    """Imports, data and training of one side; returns what is timed."""
    if task.startswith("coreset"):
        x = vectors(task.split()[1], ROWS, 1)
        if side == "tinyvad":
            from tinyvad.detectors.coreset import farthest_first

            return lambda: float(np.sqrt(farthest_first(x, TAKEN).radii[-1]))
        if side == "numpy-blas":
            return lambda: numpy_blas(x, TAKEN)
        return prepare_anomalib(x)
    bank, queries = vectors("clusters", BANK, 1), vectors("clusters", QUERIES, 2)
    if side.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexPQ(DEPTH, 8, 8) if side == "faiss-pq-8x8" else faiss.IndexPQFastScan(DEPTH, 16, 4)
        index.train(bank)
        index.add(bank)
        return lambda: float(np.sqrt(index.search(queries, 1)[0]).mean())
    from tinyvad.detectors import product_quantizer
    from tinyvad.detectors.distances import nearest

    product_quantizer.threads = lambda: threads
    rows, wanted = bank.astype(np.int8), queries.astype(np.int8)
    if side == "tinyvad-exhaustive":
        return lambda: float(np.sqrt(nearest(wanted, rows)[0]).mean())
    subspaces, bits = (8, 8) if side == "tinyvad-8x8" else (16, 4)
    quantizer = product_quantizer.fit_quantizer(rows, subspaces, bits, np.random.default_rng(0), group=False)
    codes = quantizer.encode(rows)
    return lambda: float(np.sqrt(quantizer.search(wanted, codes)).mean())


def prepare_anomalib(x: np.ndarray) -> Run:
    import torch
    from anomalib.models.components import KCenterGreedy

    embedding = torch.from_numpy(x)

    def run() -> float:
        chosen = KCenterGreedy(embedding, TAKEN / ROWS).select_coreset_idxs()
        return float(torch.cdist(embedding, embedding[chosen]).min(1).values.max())

    return run


def work(task: str, side: str, threads: int) -> None:
    """A side's process: one run for every line on standard input, its seconds and result on standard output."""
    run = prepare(task, side, threads)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = run()
        print(time.perf_counter() - start, result, flush=True)


class Side:
    """The process of one side."""

    def __init__(self, task: str, name: str, threads: int) -> None:
        self.name, self.result = name, float("nan")
        limits = {f"{pool}_NUM_THREADS": str(threads) for pool in ("OMP", "OPENBLAS", "MKL")}
        command = [sys.executable, __file__, "--work", task, name, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **limits}
        )
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended early; see its message above")
        return line

    def seconds(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        seconds, self.result = map(float, self._read().split())
        return seconds

    def close(self) -> None:
        self.process.communicate()


def compare(task: str, rounds: int, threads: int) -> list[str]:
    """Markdown lines of one task."""
    what, names = TASKS[task]
    present = [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None]
    sides = [Side(task, name, threads) for name in present]
    times: dict[str, list[float]] = {name: [] for name in present}
    for number in range(rounds):
        for side in sides[number % len(sides) :] + sides[: number % len(sides)]:  # nobody is always first
            times[side.name].append(side.seconds())
    for side in sides:
        side.close()
    head = "| side | ms: best, median | time / tinyvad's: min, median, max | result |"
    lines = [f"### {what}", "", head, "|---|---|---|---|"]
    for side in sides:
        ratios = np.array(times[side.name]) / np.array(times[present[0]])
        spread = f"{ratios.min():.2f}, {np.median(ratios):.2f}, {ratios.max():.2f}"
        best, median = np.min(times[side.name]) * 1e3, np.median(times[side.name]) * 1e3
        lines.append(f"| {side.name} | {best:.1f}, {median:.1f} | {spread} | {side.result:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of every side")
    parser.add_argument("--only", choices=("coreset", "search"))
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file too")
    parser.add_argument("--work", nargs=2, metavar=("TASK", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        task, side = arguments.work
        work(task, side, arguments.threads)
        return
    here = machine(("numpy", "numba", "faiss-cpu", "anomalib"))
    lines = [f"{here}; {arguments.threads} threads a side, {arguments.rounds} rounds", ""]
    for task in TASKS:
        if arguments.only is None or task.startswith(arguments.only):
            lines += compare(task, arguments.rounds, arguments.threads)
    print("\n".join(lines))
    if arguments.out is not None:
        from tinyvad.files import write_text

        write_text(arguments.out, "\n".join(lines))


if __name__ == "__main__":
    main()
