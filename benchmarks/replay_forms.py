"""What a replay memory's forms cost and lose: bytes a map, error of the map, and error of what the student learns from.

    python benchmarks/replay_forms.py --weights FILE.onnx --data DIR --out benchmarks/results

A trunk's maps of good images of each product are stored and decoded. The teacher's tail then runs on both: the loss
compares its outputs position by position, so their mean cosine distance is the error that training sees. Nothing is
trained, no image with a defect is looked at. Writes replay_forms.md.

One row is no form of the library: int8 whose rounding is balanced, so that the errors of a channel of a map add up to
less than a step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from machine import machine

from tinyvad.backbones.source import open_backbone
from tinyvad.continual.replay_forms import FORMS, Encoded, decode, encode
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.files import write_text
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import prune
from tinyvad.images import Preprocessing
from tinyvad.layouts import find_datasets

BALANCED = "int8, errors balanced"
NOT_OF_MAPS = "image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224])
    parser.add_argument("--shared", default="block:5", help="last layer of the trunk")
    parser.add_argument("--layers", nargs="+", default=["block:6", "block:10", "block:14"], help="that the loss compares")
    parser.add_argument("--images", type=int, default=16, help="of each product; 16 = floor(100 / 6)")
    parser.add_argument("--out", type=Path, required=True)
    try:
        run(parser.parse_args())
    except InputError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    backbone = open_backbone(arguments.weights, [arguments.shared, *arguments.layers])
    text = [_head(arguments)]
    for size in arguments.sizes:
        graph = backbone.graph_at(size)
        trunk, tail = split(graph)
        preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
        found: dict[str, list[list[float]]] = {}
        for dataset in find_datasets(arguments.data):
            chosen = np.linspace(0, len(dataset.train_good) - 1, arguments.images).astype(int)
            images = [preprocessing.float_input(preprocessing.uint8_input(dataset.train_good[i])) for i in chosen]
            maps = trunk.features(np.stack(images))[0]  # (n, H, W, C)
            wanted = tail.features(maps)
            for form in [*(name for name in FORMS if name != NOT_OF_MAPS), BALANCED]:
                encoded = balanced(maps) if form == BALANCED else encode(form, maps, np.random.default_rng(0))
                decoded = decode("int8" if form == BALANCED else form, encoded)
                errors = [cosine_distance(a, b) for a, b in zip(wanted, tail.features(decoded), strict=True)]
                row = [_size(encoded.rows) / len(maps), _size(encoded.shared), relative_error(maps, decoded), *errors]
                found.setdefault(form, []).append(row)
            print(f"{size} px: {dataset.name}", flush=True)
        text.append(_table(size, maps.shape, found))
    write_text(arguments.out / "replay_forms.md", "\n".join(text))


def split(graph: Graph) -> tuple[OnnxEngine, OnnxEngine]:
    """The trunk up to the graph's first output, and the tail from there to the others."""
    name = graph.outputs[0]
    at = [node.output for node in graph.nodes].index(name)
    trunk = prune(graph.copy(outputs=[name]))
    tail = prune(graph.copy(inputs=[name], nodes=graph.nodes[at + 1 :], outputs=graph.outputs[1:]))
    return OnnxEngine(to_onnx(trunk).SerializeToString()), OnnxEngine(to_onnx(tail).SerializeToString())


def balanced(maps: np.ndarray) -> Encoded:
    """'int8' with the values nearest to a tie rounded the other way, until each channel's errors in a map cancel."""
    encoded = encode("int8", maps, np.random.default_rng(0))
    flat = maps.reshape(len(maps), -1, maps.shape[3]).astype(np.float64)
    exact = (flat - encoded.shared["low"]) / encoded.shared["step"]  # (n, H W, C)
    codes = np.rint(exact)
    for one, rounded in zip(exact, codes, strict=True):
        left = one - rounded  # (H W, C), from -1/2 to 1/2
        for channel, sum_left in enumerate(left.sum(0)):
            sign = np.sign(sum_left)
            nearest = np.argsort(-sign * left[:, channel])[: round(abs(sum_left))]
            rounded[nearest, channel] += sign
    return Encoded({"codes": np.clip(codes, 0, 255).astype(np.uint8).reshape(maps.shape)}, encoded.shared)


def relative_error(maps: np.ndarray, decoded: np.ndarray) -> float:
    """Root mean square of the error over that of the maps about their channels' means."""
    about_mean = maps - maps.mean((0, 1, 2), dtype=np.float64)
    return float(np.sqrt(np.square(decoded - maps, dtype=np.float64).mean() / np.square(about_mean).mean()))


def cosine_distance(wanted: np.ndarray, found: np.ndarray) -> float:
    """Mean over all positions of 1 - cos between the vectors of (n, h, w, c) maps."""
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return max(0.0, float((1 - (a * b).sum(-1) / np.maximum(norms, 1e-12)).mean()))  # rounding can fall below 0


def _size(arrays: dict[str, np.ndarray]) -> float:
    return float(sum(array.nbytes for array in arrays.values()))


def _head(arguments: argparse.Namespace) -> str:
    return f"""# Stored maps: bytes and errors of each form

Maps of {arguments.weights.stem} after {arguments.shared}, {arguments.images} good images of each product, means over
the products. *shared*: bytes of what all maps of a product need beside their own. *error*: relative root mean square error
of the decoded maps. *targets*: mean cosine distance between the teacher's outputs at {", ".join(arguments.layers)} from the
maps and from the decoded maps; in brackets the largest of all products and layers.
{machine(["numpy", "onnxruntime"])}.

    python benchmarks/replay_forms.py --weights FILE.onnx --data DIR --out DIR
"""


def _table(size: int, shape: tuple[int, ...], found: dict[str, list[list[float]]]) -> str:
    full = 4 * int(np.prod(shape[1:]))
    lines = [
        f"## {size} px: maps of {shape[1]} x {shape[2]} x {shape[3]}, {full} bytes as float32\n",
        "| form | bytes a map | of float32 | shared | error | targets |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for form, rows in found.items():
        nbytes, shared, error = np.mean(rows, axis=0)[:3]
        targets = np.array(rows)[:, 3:]  # (products, layers)
        shown = " / ".join(f"{a:.1e}" for a in targets.mean(0)) + f" (largest {targets.max():.1e})"
        lines.append(f"| {form} | {nbytes:.0f} | {nbytes / full:.3f} | {shared:.0f} | {error:.4f} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
