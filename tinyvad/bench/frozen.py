"""Cached items of trained detectors: what their frozen parts make of each product's images, float32, once for all cells.

Flows in: a detector's trunk and targets (``tinyvad.training.trainable``) and images. Flows out: ``CachedItems``: rows of a
file in the cache, memory-mapped when they are read, and the images themselves where replay wants them. A row is made from
its image alone, one image at a time, as replaying makes it: both give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyvad.bench.features import Pictures, cached, hashed, opened
from tinyvad.bench.grid import BackboneSpec
from tinyvad.continual.base import Frozen
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.ir import Graph
from tinyvad.images import Preprocessing
from tinyvad.training.trainable import TrainedDetector
from tinyvad.version import __version__

BATCH = 32  # images that are scored at once


class CachedItems:
    """Items in a file: a row of float32 an image.

    Args:
        path: of the file. shapes: (h, w, c) of each array. pictures: whose items they are.
    """

    def __init__(
        self, path: Path, shapes: list[tuple[int, ...]], pictures: Pictures, preprocessing: Preprocessing
    ) -> None:
        self._path, self._shapes, self._pictures, self._preprocessing = path, shapes, pictures, preprocessing
        self._sizes = [int(np.prod(shape)) for shape in shapes]

    def __len__(self) -> int:
        return len(self._pictures.paths)

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """[(k, h, w, c)] float32: stored maps, then targets."""
        mapped: np.ndarray = np.memmap(self._path, np.float32, "r", shape=(len(self), sum(self._sizes)))
        parts = np.split(np.asarray(mapped[np.asarray(indices)]), np.cumsum(self._sizes)[:-1], axis=1)
        return [np.ascontiguousarray(part).reshape(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """(k, S, S, 3) uint8, read from their files again."""
        chosen = replace(self._pictures, paths=[self._pictures.paths[i] for i in indices])
        return np.stack(list(chosen.images(self._preprocessing)))

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """All items, a batch at a time."""
        for start in range(0, len(self), BATCH):
            yield self.take(np.arange(start, min(start + BATCH, len(self))))


def open_frozen(backbone: BackboneSpec, grid: int | None) -> Frozen:
    """The float network of a backbone, run by onnxruntime.

    Raises:
        InputError: no such backbone, or one with other weights.
    """
    found = opened(backbone.name, backbone.source, backbone.layers)
    size = backbone.image_size
    graph = found.graph_at(size)
    layers = None if backbone.layers is None else tuple(graph.outputs)
    return Frozen(graph, Preprocessing(size, size, found.mean, found.std), onnx_engine, grid, layers)


def onnx_engine(graph: Graph) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """Runs a frozen Graph of one input in onnxruntime, on one thread."""
    engine = OnnxEngine(to_onnx(graph).SerializeToString(), threads=1)
    return lambda inputs: engine.features(inputs[0])


def open_items(detector: TrainedDetector, frozen: Frozen, pictures: Pictures, cache: Path) -> CachedItems:
    """The items of some images in their order, from the cache or made now.

    Raises:
        InputError: an image can't be read.
    """
    parts = [part for part in (detector.trunk, detector.targets) if part is not None]
    image = (frozen.preprocessing.height, frozen.preprocessing.width, 3)
    shapes: list[tuple[int, ...]] = [image] if detector.trunk is None else []
    shapes += [part.tensors[name].shape[1:] for part in parts for name in part.outputs]

    def write(file: BinaryIO) -> None:
        trunk, targets = (frozen.engine(part) if part is not None else None for part in (detector.trunk, detector.targets))
        for image in pictures.images(frozen.preprocessing):
            maps = [frozen.preprocessing.float_input(image)[None]]
            maps = maps if trunk is None else trunk(maps)
            maps = maps if targets is None else [*maps, *targets(maps)]
            file.write(np.concatenate([array.reshape(-1) for array in maps]).tobytes())

    digests = [hashlib.sha256(to_onnx(part).SerializeToString()).hexdigest() for part in parts]
    kind = "image" if detector.trunk is None else "trunk"
    key = hashed("items", __version__, kind, *digests, repr(frozen.preprocessing), *pictures.identities())
    return CachedItems(cached(cache / f"{key}.items", write), shapes, pictures, frozen.preprocessing)
