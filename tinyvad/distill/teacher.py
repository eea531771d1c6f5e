"""The teachers: whole networks in onnxruntime whose tapped maps a student learns to predict, normalised.

Flows in: what ``--teacher`` and ``--layers`` name, once or several times, and the student's map sizes. Flows out: a
target map for each student layer: the maps of all teacher layers of its stride, concatenated and normalised with
statistics over views of the training images.

Normalisation. Let t (C,) be a teacher's vector at one position, m and S its mean and covariance, S = U diag(l) U^T:

* ``channel``: (t - m) / std, each channel by itself
* ``whitened``: U^T (t - m) / sqrt(l + r), r = 0.1 % of the mean of l: every direction counts the same. PaDiM's
  score is the Mahalanobis distance, which divides every direction by its own spread, so an error in a
  direction of small variance costs it as much as one in a direction of large variance
* ``half``: U^T (t - m) / (l + r)^(1/4): between the two

Each is scaled so that the mean square of the target is 1. What is compared is the square (``mse``), Huber's loss
(``huber``), or one minus the cosine between the vectors at each position (``cosine``). Which does best, measured:
benchmarks/results/distill_ablation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tinyvad.backbones.source import Backbone, Triple, open_backbone
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.ir import Graph
from tinyvad.images import Preprocessing

LOSSES = tuple(f"{c}-{n}" for c in ("mse", "huber", "cosine") for n in ("channel", "half", "whitened"))
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """target = (map - mean) @ matrix; ``mean`` (C,), ``matrix`` (C, C) float32."""

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, maps: np.ndarray) -> np.ndarray:
        return (maps - self.mean) @ self.matrix


class Teachers:
    """One or several teachers at one input size.

    Args:
        specs: what ``open_backbone`` takes, with the layers of each, or None for its default ones.
        sizes: (H, W) of the student's layers, each a different stride.
        threads: images that run at once.

    Attributes:
        channels: of the target of each student layer.
        names: "teacher:layer" of what each target is made of.

    Raises:
        InputError: no such teacher or layer, a teacher layer at a stride where the student has none, or the reverse.
    """

    def __init__(
        self,
        specs: Sequence[tuple[str, list[str] | None]],
        image_size: int,
        sizes: Sequence[tuple[int, int]],
        threads: int,
    ) -> None:
        self.backbones: list[Backbone] = [open_backbone(spec, layers) for spec, layers in specs]
        self._engines: list[OnnxEngine] = []
        self._members: list[list[tuple[int, int]]] = [[] for _ in sizes]  # (teacher, output) of each target
        self.names: list[list[str]] = [[] for _ in sizes]
        self.channels = [0] * len(sizes)
        for number, backbone in enumerate(self.backbones):
            graph = backbone.graph_at(image_size)
            self._engines.append(OnnxEngine(to_onnx(graph).SerializeToString(), threads))
            for output, name in enumerate(graph.outputs):
                self._place(graph, backbone.name, name, (number, output), list(sizes))
        for size, names in zip(sizes, self.names):
            if not names:
                raise InputError(
                    f"no teacher layer has maps of {size[0]}x{size[1]} like one of the student's at {image_size} px; give "
                    "--layers one of that stride"
                )

    def _place(
        self, graph: Graph, teacher: str, name: str, member: tuple[int, int], sizes: list[tuple[int, int]]
    ) -> None:
        _, height, width, channels = graph.tensors[name].shape
        if (height, width) not in sizes:
            known = ", ".join(f"{h}x{w}" for h, w in sizes)
            raise InputError(
                f"teacher layer {name} of {teacher} is {height}x{width}, but the student's layers are {known}; choose "
                "layers of the same strides with --layers or --student-layers"
            )
        target = sizes.index((height, width))
        self._members[target].append(member)
        self.names[target].append(f"{teacher}:{name}")
        self.channels[target] += channels

    def maps(self, images: np.ndarray) -> list[np.ndarray]:
        """One (n, h, w, C) float32 array a student layer, not normalised, of (n, H, W, 3) uint8 images."""
        outputs = []
        for backbone, engine in zip(self.backbones, self._engines):
            outputs.append(engine.features(real_input(images, backbone.mean, backbone.std)))
        return [
            np.concatenate([outputs[teacher][output] for teacher, output in members], axis=3)
            for members in self._members
        ]


def map_sizes(graph: Graph) -> list[tuple[int, int]]:
    """(H, W) of the graph's outputs."""
    shapes = [graph.tensors[name].shape for name in graph.outputs]
    return [(height, width) for _, height, width, _ in shapes]


def real_input(images: np.ndarray, mean: Triple, std: Triple) -> np.ndarray:
    """(n, H, W, 3) float32 network input of uint8 pixels, as a build computes it."""
    return Preprocessing(images.shape[1], images.shape[2], mean, std).float_input(images)


def normalisation(vectors: np.ndarray, loss: str) -> Normalisation:
    """Fit one (see the module's text) to ``vectors`` (n, C) of a target."""
    mean = vectors.mean(0, dtype=np.float64)  # (C,)
    centred = vectors - mean
    covariance = centred.T @ centred / len(vectors)  # (C, C)
    if loss == "channel":
        variance = covariance.diagonal()
        matrix = np.diag(1 / np.sqrt(variance + RIDGE * variance.mean()))
    else:
        spread, directions = np.linalg.eigh(covariance)
        matrix = directions * (np.maximum(spread, 0) + RIDGE * spread.mean()) ** (-0.5 if loss == "whitened" else -0.25)
    square = np.einsum("ij,ik,kj->", matrix, covariance, matrix) / len(covariance)  # mean square of the target
    return Normalisation(mean.astype(np.float32), (matrix / np.sqrt(square)).astype(np.float32))
