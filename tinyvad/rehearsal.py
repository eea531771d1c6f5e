"""What would a detector find, without making a build of it? Good and labelled test images in, image AUROC out.

The pipeline of a build without its files: calibrate, quantise, features of the exact engine, fit, score. What two methods
share, the features of one network at one size, is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tinyvad import fitting
from tinyvad.backbones.source import Backbone
from tinyvad.calibration import CALIBRATION_IMAGES, quantize_on
from tinyvad.detectors import Scorer
from tinyvad.engines import threads
from tinyvad.engines.int8 import Int8Engine
from tinyvad.firmware_sim.offline_plan import planned_tflite
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Dataset, Preprocessing, apply_table, load_images
from tinyvad.metrics import auroc
from tinyvad.model import batches

Tell = Callable[[int, int], None]


class Rehearsal:
    """One network at one input size on one product.

    Args:
        dataset: with good and with defective test images.
        tell: called with images done and in all.
    """

    def __init__(self, backbone: Backbone, size: int, dataset: Dataset, on_error: str = "stop", tell: Tell | None = None):
        self.preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
        self.dataset, self.on_error = dataset, on_error
        good = dataset.train_good
        chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(CALIBRATION_IMAGES, len(good))).round().astype(int)]
        calibrated = quantize_on(backbone.graph_at(size), self.preprocessing, (image for _, image in self._load(chosen)))
        self.engine = Int8Engine(import_tflite(planned_tflite(calibrated.graph)), threads())
        self.table = calibrated.table
        self.tensors = [self.engine.graph.tensors[name] for name in self.engine.graph.outputs]
        self._done, self._total = 0, len(good) + len(dataset.test)
        self._tell = tell or (lambda done, total: None)
        self.good, _ = self._features(good)
        self.test, kept = self._features([sample.path for sample in dataset.test])
        labels = {sample.path: sample.label for sample in dataset.test}
        self.labels = np.array([labels[path] for path in kept])

    def auroc(self, plan: fitting.MethodPlan) -> float:
        """Image AUROC of a method, 0 to 1: every test image scored by its most anomalous cell."""
        embedding = fitting.make_embedding(self.good, self.tensors, plan)
        detector = fitting.make_detector(plan, embedding)
        scorer: Scorer = detector.fit(self.good.embeddings(embedding)).to_scorer()
        return auroc(self.labels, fitting.image_scores(scorer, self.test.embeddings(embedding)))

    def _features(self, paths: list[Path]) -> tuple[fitting.TapStore, list[Path]]:
        """Tapped maps of the images that can be read, and which those are."""
        store, kept = fitting.TapStore(self.tensors), []
        for batch in batches(self._load(paths)):
            store.append(self.engine.features(apply_table(np.stack([image for _, image in batch]), self.table)))
            kept += [path for path, _ in batch]
            self._done += len(batch)
            self._tell(self._done, self._total)
        return store, kept

    def _load(self, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray]]:
        return load_images(paths, self.preprocessing, on_error=self.on_error, skipped=[])
