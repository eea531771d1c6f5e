"""Speed of the exact int8 engine against LiteRT's reference kernels and TFLM, in interleaved rounds, one thread each.

    python benchmarks/bench_engine.py [--model FILE.tflite] [--rounds 15] [--out FILE.md]

All sides sit in one process, have warmed up, and take turns image by image, so that a clock that drifts hits them alike;
the table gives each side's time over the exact engine's of the same round. Before timing, all tensors of an image are
compared: a side that should be exact and is not ends the run. LiteRT's default kernels are shown as well: they are made
for speed and round otherwise than the device. Goal: the exact engine at least 5 times as fast as the reference kernels.
Images are random. Nothing is written without --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.errors import InputError
from tinyvad.files import write_text
from tinyvad.graph.tflite_import import import_tflite

GOAL = 5.0
MODEL = Path(__file__).resolve().parents[2] / "shared" / "weights" / "mcunet_in3_imagenet_int8.tflite"
OURS, REFERENCE = "int8 (exact)", "litert, reference kernels"


def sides(model: Path) -> dict[str, Any]:
    """Engines by name; those whose package is missing are left out."""
    found: dict[str, Any] = {OURS: Int8Engine(import_tflite(model), threads=1)}
    makers = {
        REFERENCE: lambda: LitertEngine(model),
        "tflm on this machine": lambda: TflmEngine(model),
        "litert, default kernels (not exact)": lambda: LitertEngine(model, "default"),
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except InputError as error:
            print(f"left out: {name}: {error}")
    return found


def check(engines: dict[str, Any], image: np.ndarray) -> None:
    """End the run unless the exact engines agree: every tensor with LiteRT, the outputs with TFLM."""
    ours = engines[OURS]
    if REFERENCE in engines and engines[REFERENCE].exact:
        wanted = engines[REFERENCE].all_tensors(image)
        for name, values in ours.all_tensors(image).items():
            if name in wanted and not np.array_equal(values, wanted[name]):
                raise SystemExit(f"{name} differs from LiteRT's")
    for name, engine in engines.items():
        pairs = zip(ours.features(image[None]), engine.features(image[None]), strict=True)
        if engine.exact and not all(np.array_equal(a, b) for a, b in pairs):
            raise SystemExit(f"{name} gives other outputs")


def measure(engines: dict[str, Any], images: np.ndarray) -> dict[str, list[float]]:
    """Seconds of each side for each image, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for image in images:
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.features(image[None])
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(model: Path, engines: dict[str, Any], seconds: dict[str, list[float]]) -> str:
    graph = engines[OURS].graph
    rounds = len(seconds[OURS])
    lines = [
        "# The exact int8 engine against other ways to the same integers",
        "",
        f"{model.name}, {graph.tensors[graph.inputs[0]].shape[1:]}, {graph.macs() / 1e6:.1f} million MACs; "
        f"one thread a side, {rounds} interleaved rounds of one image.",
        machine(("numpy", "numba", "ai-edge-litert", "tflite-micro")) + ".",
        "",
        "| side | ms: best, median | time / int8's: min, median, max |",
        "|---|---|---|",
    ]
    for name, times in seconds.items():
        ratios = sorted(other / own for other, own in zip(times, seconds[OURS], strict=True))
        lines.append(
            f"| {name} | {min(times) * 1e3:.1f}, {statistics.median(times) * 1e3:.1f} | "
            f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f} |"
        )
    if REFERENCE in seconds:
        ratio = statistics.median(o / t for o, t in zip(seconds[REFERENCE], seconds[OURS], strict=True))
        verdict = "met" if ratio >= GOAL else "missed"
        lines += ["", f"Goal: {GOAL:g} times as fast as the reference kernels: {verdict} ({ratio:.1f} in the median)."]
    return "\n".join([*lines, "", "    python benchmarks/bench_engine.py --out benchmarks/results/engine.md", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="an int8 .tflite  [default: MCUNet-in3 in ../shared]")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    try:
        engines = sides(arguments.model)
    except InputError as error:
        parser.error(str(error))
    shape = engines[OURS].graph.tensors[engines[OURS].graph.inputs[0]].shape[1:]
    images = np.random.default_rng(0).integers(-128, 128, (arguments.rounds + 2, *shape)).astype(np.int8)
    check(engines, images[0])
    measure(engines, images[:2])
    text = table(arguments.model, engines, measure(engines, images[2:]))
    print(text, end="")
    if arguments.out is not None:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
