"""What the second and the fifteenth product cost: seconds, peak memory and bytes of `tinyvad learn`, a process each.

    python benchmarks/learning.py --out benchmarks/results/learning.md

Every product is rendered, with as many images as the others. Each `learn` is a process of its own, as on a line. The two
sides learn the same images in turn: a build that knows one product, and one that knows all others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine

from tinyvad.demo import render_demo
from tinyvad.files import write_text
from tinyvad.project import parse_bytes
from tinyvad.slots import current

METHODS = ("padim-compact", "patchcore")
BUDGET = "512K"


def run(*words: str) -> tuple[float, float]:
    """(seconds, peak MiB) of one tinyvad command."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "tinyvad", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"tinyvad {' '.join(words)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def learn(build: Path, product: Path, scratch: Path) -> tuple[float, float]:
    """What it costs a copy of ``build`` to learn ``product``."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(build, scratch)
    return run("learn", str(scratch), "--data", str(product), "--task", "one more")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=15)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = [
        f"# What product {given.tasks} costs against product 2", "", machine(("numpy", "numba")), "",
        f"`python benchmarks/learning.py`: {given.images} rendered images a product, 96 px, median of {given.repeat} runs, "
        "the two sides in turn, a process each; peak memory is the operating system's.", "",
        "| method | seconds, 2nd | seconds, last | ratio | peak MiB, 2nd | peak MiB, last | bank bytes | slot bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        products = [render_demo(folder / f"part{seed}", seed=seed) for seed in range(given.tasks)]
        for product in products:
            for path in sorted((product / "train" / "good").iterdir())[given.images :]:
                path.unlink()
        for method in METHODS:
            few, many = folder / "few", folder / "many"
            shutil.rmtree(many, ignore_errors=True)
            settings = ("--method", method, "--image-size", "96", "--tasks", str(given.tasks), "--bank-bytes", BUDGET)
            run("build", "--data", str(products[0]), "--out", str(many), *settings)
            shutil.rmtree(few, ignore_errors=True)
            shutil.copytree(many, few)
            for number, product in enumerate(products[1:-1], 2):
                run("learn", str(many), "--data", str(product), "--task", f"part{number}")
            costs = [
                (learn(few, products[-1], folder / "scratch"), learn(many, products[-1], folder / "scratch"))
                for _ in range(given.repeat)
            ]
            second, last = np.median(np.array(costs), 0)  # (seconds, MiB) each
            bank = current(folder / "scratch")
            lines.append(
                f"| {method} | {second[0]:.2f} | {last[0]:.2f} | {last[0] / second[0]:.2f} | {second[1]:.0f} "
                f"| {last[1]:.0f} | {bank.nbytes:,} | {parse_bytes(BUDGET, 'budget'):,} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        write_text(given.out, text)


if __name__ == "__main__":
    main()
