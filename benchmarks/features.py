"""A category's tapped maps by both engines, what the tables of methods and of backbones start from.

Flows in: a category, a backbone and an input size. Flows out: the tapped maps of its good and test images, by the exact
int8 engine and by onnxruntime, and the detectors fitted on the good ones: integers for the device, floats for study.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad import fitting
from tinyvad.backbones.source import Backbone
from tinyvad.calibration import CALIBRATION_IMAGES, quantize_on
from tinyvad.detectors import Scorer
from tinyvad.embedding import Embedding
from tinyvad.engines import threads as all_threads
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.export.onnx import to_onnx
from tinyvad.images import Dataset, Preprocessing, apply_table, load_images, read_mask, resize_mask

BATCH = 16  # images


class Features:
    """Tapped maps of a category's good and test images; the exact engine's lie on disk, the floats in memory.

    Args:
        dataset: the category. backbone: the network. size: pixels of its input.
        threads: images that run at once; None takes the cores.

    Attributes:
        tensors: the tapped int8 tensors. labels: (n,) of the test images.
        good, test: int8 maps. real_good, real_test: a list of maps a batch.
    """

    def __init__(self, dataset: Dataset, backbone: Backbone, size: int, threads: int | None = None) -> None:
        threads = threads or all_threads()
        preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
        good = decoded(tuple(dataset.train_good), size)
        chosen = np.linspace(0, len(good) - 1, min(CALIBRATION_IMAGES, len(good))).round().astype(int)  # as a build does
        graph = backbone.graph_at(size)
        calibrated = quantize_on(graph, preprocessing, good[chosen])
        quantized = calibrated.graph
        exact, floating = Int8Engine(quantized, threads), OnnxEngine(to_onnx(graph).SerializeToString(), threads)
        self.tensors = [quantized.tensors[name] for name in quantized.outputs]
        self.dataset, self.size = dataset, size
        self.labels = np.array([sample.label for sample in dataset.test])
        self.good, self.test = fitting.TapStore(self.tensors), fitting.TapStore(self.tensors)
        self.real_good: list[list[np.ndarray]] = []
        self.real_test: list[list[np.ndarray]] = []
        test = decoded(tuple(sample.path for sample in dataset.test), size)
        for pictures, store, real in ((good, self.good, self.real_good), (test, self.test, self.real_test)):
            for start in range(0, len(pictures), BATCH):
                images = pictures[start : start + BATCH]
                store.append(exact.features(apply_table(images, calibrated.table)))
                real.append(floating.features(np.stack([preprocessing.float_input(image) for image in images])))

    @cached_property
    def masks(self) -> list[np.ndarray] | None:
        """(S, S) bool masks of the test images, None where the category has none."""
        if all(sample.mask is None for sample in self.dataset.test):
            return None
        shape = (self.size, self.size)
        return [
            np.zeros(shape, bool) if s.mask is None else resize_mask(read_mask(s.mask), *shape) for s in self.dataset.test
        ]

    def exact_fit(self, plan: fitting.MethodPlan) -> tuple[Embedding, Scorer]:
        """The embedding and the integer scorer that a device would get."""
        embedding = fitting.make_embedding(self.good, self.tensors, plan)
        return embedding, fitting.make_detector(plan, embedding).fit(self.good.embeddings(embedding)).to_scorer()

    def float_fit(self, plan: fitting.MethodPlan, embedding: Embedding) -> Any:
        """The detector of the same plan fitted on the float maps, which have no units."""
        unitless = dataclasses.replace(embedding, taps=tuple(dataclasses.replace(tap, step=1.0) for tap in embedding.taps))
        return fitting.make_detector(plan, unitless).fit(self.real(embedding, self.real_good))

    def real(self, embedding: Embedding, maps: Sequence[list[np.ndarray]]) -> Iterator[np.ndarray]:
        """(n, H, W, D) float32 embeddings of the batches of float maps."""
        for batch in maps:
            yield embedding.real(batch)


@cache
def decoded(paths: tuple[Path, ...], size: int) -> np.ndarray:
    """(n, S, S, 3) uint8: the images as every backbone of that input size gets them; decoding is what takes longest."""
    return np.stack([image for _, image in load_images(paths, Preprocessing(size, size))])
