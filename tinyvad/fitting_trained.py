"""From good images to a trained network, an integer scorer and a threshold: ``tinyvad.fitting`` for STFPM, PaSTe, CFA, SimpleNet.

Flows in: the float network of a backbone and good images. Flows out: a float network that holds what was trained (to quantise
and export like any other), and, once it is quantised, the embedding, the scorer and held-out scores.

A part of the good images is not trained on: it chooses the epoch, and the threshold. Fewer than ``FEWEST_TO_HOLD_OUT`` are
all trained on, and the threshold comes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.backbones.source import Backbone
from tinyvad.detectors import Scorer
from tinyvad.detectors.centres import CentresScorer
from tinyvad.detectors.linear import LinearScorer
from tinyvad.detectors.student_teacher import Pairs, StudentTeacherScorer, choose_shift, pairs_of
from tinyvad.detectors.trained import TrainedDetector
from tinyvad.embedding import Embedding
from tinyvad.errors import InputError
from tinyvad.fitting import Fit, MethodPlan, TapStore, image_scores, make_embedding
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.images import Preprocessing
from tinyvad.project import TRAINED, Project

FEWEST_TO_HOLD_OUT = 5
PAIRED = ("stfpm", "paste")  # a student and a teacher, compared tap by tap
Tell = Callable[[str, int, int], None]


def check_settings(project: Project) -> None:
    """Raise InputError for settings that do not go with the method."""
    method = project.method
    if project.shared is not None and method != "paste":
        raise InputError("--shared belongs to --method paste, whose student shares the network's first layers")
    if project.epochs is not None and method not in TRAINED:
        raise InputError(f"--epochs belongs to the methods that are trained: --method {', '.join(TRAINED)}")
    if method in TRAINED and project.dimensions is not None:
        raise InputError(f"--dimensions belongs to padim-compact, not to {method}")
    if method in PAIRED and project.grid is not None:
        raise InputError(f"--grid does not go with {method}: its map has the cells of the student's finest layer (--layers)")
    if method in TRAINED and project.threshold == "f1":
        return


def open_detector(method: str, graph: Graph, project: Project) -> TrainedDetector:
    """The untrained detector on a float network that is cut after its taps."""
    from tinyvad.detectors import cfa, simplenet, student

    detector: TrainedDetector
    if method == "paste":
        detector = student.Paste(graph, shared=project.shared, seed=project.seed)
    elif method == "stfpm":
        detector = student.Stfpm(graph, seed=project.seed)
    elif method == "cfa":
        detector = cfa.Cfa(graph, grid=project.grid, seed=project.seed)
    else:
        detector = simplenet.SimpleNet(graph, grid=project.grid, seed=project.seed)
    if project.epochs is not None:
        detector.recipe = replace(detector.recipe, epochs=project.epochs)
    return detector


def outlined(backbone: Backbone, project: Project) -> Backbone:
    """The backbone with the network that training will give, to plan memory with; as it is for a method without training."""
    method = project.method
    if method not in TRAINED:
        return backbone

    @lru_cache(maxsize=4)
    def graph_at(size: int) -> Graph:
        return open_detector(str(method), backbone.graph_at(size), project).graph()

    return replace(backbone, graph_at=graph_at)


@dataclass(frozen=True, eq=False)
class Training:
    """A detector that has been trained, and how.

    Attributes:
        detector: its network is the best of the epochs.
        held_out: (m,) int64, which of the good images, in their order, were not trained on; empty if all were.
        facts: plain values for the manifest.
    """

    detector: TrainedDetector
    held_out: np.ndarray
    facts: dict[str, Any]


def held_out(count: int, share: float, seed: int) -> np.ndarray:
    """(m,) int64, sorted: the images that are not trained on."""
    if count < FEWEST_TO_HOLD_OUT:
        return np.zeros(0, np.int64)
    return np.sort(np.random.default_rng(seed).permutation(count)[: max(round(share * count), 1)])


def fit_scorer(
    training: Training, store: TapStore, tensors: Sequence[Tensor], plan: MethodPlan
) -> tuple[Embedding | Pairs, Fit]:
    """The integer form of a trained detector on an engine's tapped maps, and the scores of the images it was not trained on.

    Args:
        store: tapped maps of all good images, in the order in which they were trained on.
        tensors: outputs of the int8 graph.
    """
    embedding: Embedding | Pairs
    scorer: Scorer
    detector: Any = training.detector
    if plan.method in PAIRED:
        embedding = pairs_of(tensors, plan.grid)
        scorer = StudentTeacherScorer(embedding.layers, embedding.grid, choose_shift(embedding, store.batches()))
    else:
        embedding = make_embedding(store, tensors, plan)
        step = float(embedding.steps[0])
        if plan.method == "simplenet":
            scorer = LinearScorer.of_layer(*detector.output_layer(), step)
        else:
            scorer = CentresScorer.of_centres(detector.centres(plan.settings["centres"]), *detector.coordinate_offsets(), step)
    chosen = training.held_out if len(training.held_out) else None
    return embedding, Fit(scorer, image_scores(scorer, store.embeddings(embedding, chosen)))
