"""Which loss, rate and view size distil best in the same number of steps: one short training a row.

    python benchmarks/distill_ablation.py --teacher FILE.onnx --images DIR --out benchmarks/results

The figure is not the loss, whose unit differs from row to row, but ``explained``: the share of the teacher's maps that can
be read linearly off the student's taps on held-out views (``tinyvad.distill.readout``), the mean of its three layers. No
image with a defect is looked at. Writes distill_ablation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from machine import machine

from tinyvad.distill.finish import finish
from tinyvad.distill.teacher import LOSSES
from tinyvad.distill.train import Recipe, distil
from tinyvad.errors import InputError
from tinyvad.files import write_text

RATES = (0.003, 0.01, 0.1)  # beside the recipe's own
OTHER_SHAPES = ((32, 96, 0.5), (16, 128, 1.0))  # batch size, view size, share of the steps: the first sees as many views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--student", default="mcunet-in1")
    parser.add_argument("--generated", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True)
    try:
        run(parser.parse_args())
    except InputError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    base = Recipe(
        ((arguments.teacher, None),), arguments.student, None, (arguments.images,), arguments.generated, 96, arguments.steps
    )
    recipes = [dataclasses.replace(base, loss=loss) for loss in LOSSES]
    recipes += [dataclasses.replace(base, learning_rate=rate) for rate in RATES]
    recipes += [
        dataclasses.replace(base, batch_size=batch, image_size=size, steps=int(arguments.steps * share))
        for batch, size, share in OTHER_SHAPES
    ]
    rows = []
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            trained = distil(recipe, Path(folder) / "checkpoint")
            card = finish(recipe, trained, Path(folder) / "w.npz", "", [], False)
        layers = " / ".join(f"{layer['explained']:.3f}" for layer in card["layers"])
        shape = f"{recipe.batch_size} | {recipe.image_size} | {recipe.generated} | {recipe.steps}"
        rows.append(f"| {recipe.loss} | {recipe.learning_rate:g} | {shape} | {layers} | {card['quality']:.3f} |")
        print(rows[-1], flush=True)
    settings = f"--student {arguments.student} --generated {arguments.generated} --steps {arguments.steps}"
    text = f"""# What distils best in {arguments.steps} steps

{arguments.student} learns {Path(arguments.teacher).stem}. A short training a row; the share of the teacher's maps that is
explained linearly on held-out views, at 3 strides and their mean. {machine(["keras", "tensorflow_cpu"])}.

    python benchmarks/distill_ablation.py --teacher FILE.onnx --images DIR {settings} --out DIR

| loss | rate | batch | view px | generated | steps | explained, strides 4 / 8 / 16 | mean |
|---|---|---|---|---|---|---|---|
"""
    write_text(arguments.out / "distill_ablation.md", text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
