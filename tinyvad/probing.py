"""How well would a network at an input size find defects? Good images in, one figure out; no real defect is looked at.

A third of up to ``IMAGES`` good images is held out. A float compact PaDiM is fitted on the rest; the held-out images should
score below copies of themselves with a made-up defect each (``tinyvad.synthetic``). The figure is the mean over the kinds
of defect of image AUROC.

Images are decoded once at ``WORKING_SIZE``: what an input size loses of a small defect then shows in its figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tinyvad.backbones.source import Backbone
from tinyvad.detectors.padim import PadimCompact
from tinyvad.embedding import Embedding, Tap
from tinyvad.engines import threads
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.fitting import FINE_STRIDE
from tinyvad.images import Preprocessing, load_images
from tinyvad.metrics import auroc
from tinyvad.resize import resize
from tinyvad.synthetic import KINDS, add_defect

IMAGES = 72
FEWEST_IMAGES = 15
WORKING_SIZE = 448  # pixels: twice the largest input that is tried
DIMENSIONS = 48
BATCH = 16


class Probe:
    """Good images with and without made-up defects, to try networks and sizes on.

    Args:
        paths: good images, at least ``FEWEST_IMAGES``. on_error: 'skip' leaves out unreadable files, as a build does.
        seed: draws the defects.

    Attributes:
        fitted (n, S, S, 3), held (m, S, S, 3), defective (kinds, m, S, S, 3): uint8.
    """

    def __init__(self, paths: Sequence[Path], seed: int = 0, on_error: str = "stop", bit_depth: int = 16) -> None:
        chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(IMAGES, len(paths))).round().astype(int)]
        working = Preprocessing(WORKING_SIZE, WORKING_SIZE, bit_depth=bit_depth)
        loaded = [image for _, image in load_images(chosen, working, on_error=on_error, skipped=[])]
        if len(loaded) < FEWEST_IMAGES:
            raise InputError(f"trying sizes needs {FEWEST_IMAGES} good images, there are {len(loaded)}; give --image-size")
        rng = np.random.default_rng(seed)
        self.held = np.stack(loaded[::3])
        self.fitted = np.stack([image for i, image in enumerate(loaded) if i % 3])
        self.defective = np.stack([[add_defect(image, kind, rng)[0] for image in self.held] for kind in KINDS])

    def score(self, backbone: Backbone, size: int, tell: Callable[[int, int], None] | None = None) -> float:
        """Mean image AUROC over the kinds of defect, 0 to 1, of a network at ``size`` pixels."""
        engine = OnnxEngine(to_onnx(backbone.graph_at(size)).SerializeToString(), threads())
        preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
        total = len(self.fitted) + len(self.held) * (1 + len(KINDS))
        done = 0

        def maps(images: np.ndarray) -> Iterator[list[np.ndarray]]:
            nonlocal done
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH]
                yield engine.features(np.stack([preprocessing.float_input(resize(image, size, size)) for image in batch]))
                done += len(batch)
                if tell is not None:
                    tell(done, total)

        fitted = list(maps(self.fitted))
        embedding = _embedding([m.shape[1:] for m in fitted[0]], size)
        dimensions = min(DIMENSIONS, embedding.depth)
        detector = PadimCompact(steps=1.0, dimensions=dimensions).fit(embedding.real(batch) for batch in fitted)

        def scores(images: np.ndarray) -> np.ndarray:
            return np.concatenate([detector.score(embedding.real(batch)).max((1, 2)) for batch in maps(images)])

        good = scores(self.held)
        labels = np.repeat([0, 1], len(good))
        return float(np.mean([auroc(labels, np.concatenate([good, scores(bad)])) for bad in self.defective]))


def _embedding(shapes: Sequence[tuple[int, ...]], size: int) -> Embedding:
    """Unitless taps on the grid that the default method would take: the coarsest map of at least stride 8."""
    taps = tuple(Tap(f"tap {i}", (h, w), c, 1.0, 0, 1.0) for i, (h, w, c) in enumerate(shapes))
    coarse = [(h, w) for h, w, _ in shapes if h * FINE_STRIDE <= size]
    return Embedding(taps, max(coarse) if coarse else min((h, w) for h, w, _ in shapes))
