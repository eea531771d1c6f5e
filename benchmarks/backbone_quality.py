"""The card's quality of any network, with the views that `tinyvad distill` measures its students on.

    python benchmarks/backbone_quality.py --teacher FILE.onnx --images DIR --generated 1500 --backbone filter-bank

Prints the share of the teacher's maps that is explained at each layer, and the mean (`tinyvad.distill.readout`). This is
where the figures of the card of the filter bank, which nobody trains, come from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from tinyvad.backbones.source import open_backbone
from tinyvad.distill.readout import explained
from tinyvad.distill.teacher import Teachers, map_sizes, real_input
from tinyvad.distill.views import Pictures
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--images", type=Path, action="append", default=[])
    parser.add_argument("--generated", type=int, default=0)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--weights", help="FILE or random")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except InputError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    backbone = open_backbone(arguments.backbone, weights=arguments.weights)
    graph = backbone.graph_at(arguments.image_size)
    engine = OnnxEngine(to_onnx(graph).SerializeToString())
    teachers = Teachers([(arguments.teacher, None)], arguments.image_size, map_sizes(graph), threads=2)
    training, held_out = Pictures(arguments.images, arguments.generated, arguments.seed).split()
    shares = explained(
        lambda images: engine.features(real_input(images, backbone.mean, backbone.std)),
        teachers, training, held_out, arguments.image_size, arguments.seed,
    )  # fmt: skip
    for name, share in zip(graph.outputs, shares):
        print(f"{name} {share:.4f}")
    print(f"quality {np.mean(shares):.4f}")


if __name__ == "__main__":
    main()
