"""From good images to a trained network, an integer scorer and a threshold: ``tinyvad.fitting`` of the trained methods.

Flows in: the float network of a backbone and good images. Flows out: a float network that holds what was trained (to be
quantised and exported like any other), and, once it is quantised, the embedding, the scorer and held-out scores.

A part of the good images is not trained on: it chooses the epoch, and the threshold. Fewer than ``FEWEST_TO_HOLD_OUT`` are
all trained on, and the threshold comes from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvad.backbones.source import Backbone
from tinyvad.detectors import Scorer
from tinyvad.detectors.centres import CentresScorer
from tinyvad.detectors.kmeans import kmeans
from tinyvad.detectors.linear import LinearScorer
from tinyvad.detectors.student_teacher import Pairs, StudentTeacherScorer, choose_shift, pairs_of
from tinyvad.embedding import Embedding
from tinyvad.errors import InputError
from tinyvad.fitting import FINE_STRIDE, Fit, MethodPlan, TapStore, image_scores, make_embedding
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.images import Preprocessing, load_images
from tinyvad.project import PAIRED, TRAINED, Project
from tinyvad.training.recipe import Recipe
from tinyvad.training.student import student_layers
from tinyvad.training.trainable import TrainedDetector

if TYPE_CHECKING:
    from tinyvad.training.loop import Trained

FEWEST_TO_HOLD_OUT = 5
MOST_EPOCHS, FEWEST_EPOCHS = 100, 10  # of a student: STFPM's paper, and the thesis on PaSTe
ENOUGH_STEPS = 4000
SAMPLES = 16  # images of a product that are kept where others will be learnt
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
        raise InputError(f"--grid does not go with {method}, whose map has the cells of its finest layer; see --layers")


def open_detector(method: str, graph: Graph, project: Project) -> TrainedDetector:
    """The untrained detector on a float network that is cut after its taps."""
    from tinyvad.detectors import cfa, simplenet, student

    detector: TrainedDetector
    if method == "paste":
        shared, layers = project.shared, project.layers
        if layers is None and shared is None:
            shared, chosen = student_layers(graph)
            layers = tuple(chosen)
        detector = student.Paste(graph, layers, shared, project.seed)
    elif method == "stfpm":
        detector = student.Stfpm(graph, seed=project.seed)
    elif method == "cfa":
        detector = cfa.Cfa(graph, project.grid or _cells(graph), project.seed)
    else:
        detector = simplenet.SimpleNet(graph, project.grid or _cells(graph), project.seed)
    return detector


def _cells(graph: Graph) -> int:
    """Cells a side of an adaptor's map when nobody says: the finest tap's of at least stride 8, or the coarsest tap's."""
    sides = sorted(graph.tensors[name].shape[1] for name in graph.outputs)
    coarse = [side for side in sides if side * FINE_STRIDE <= graph.tensors[graph.inputs[0]].shape[1]]
    return coarse[-1] if coarse else sides[0]


def outlined(backbone: Backbone, project: Project) -> Backbone:
    """The backbone with the network that training will give, to plan memory with; as it is without training."""
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
        count: of the good images.
        facts: plain values for the manifest.
    """

    detector: TrainedDetector
    held_out: np.ndarray
    count: int
    facts: dict[str, Any]


def samples_of(training: Training) -> np.ndarray:
    """(k,) which good images are kept to calibrate with and to set the threshold when other products are learnt later."""
    of = training.held_out if len(training.held_out) else np.arange(training.count)
    return of[np.unique(np.linspace(0, len(of) - 1, min(SAMPLES, len(of))).round().astype(int))]


def held_out(count: int, share: float, seed: int) -> np.ndarray:
    """(m,) int64, sorted: the images that are not trained on."""
    if count < FEWEST_TO_HOLD_OUT:
        return np.zeros(0, np.int64)
    return np.sort(np.random.default_rng(seed).permutation(count)[: max(round(share * count), 1)])


def epochs_of(project: Project, count: int) -> int | None:
    """The user's; of a student ``MOST_EPOCHS``, or fewer with which it still takes ``ENOUGH_STEPS``; None: the recipe's."""
    if project.epochs is not None or project.method not in PAIRED:
        return project.epochs
    return min(max(-(-ENOUGH_STEPS * Recipe().batch // count), FEWEST_EPOCHS), MOST_EPOCHS)


def train_on(
    graph: Graph, paths: Sequence[Path], preprocessing: Preprocessing, project: Project, checkpoint: Path, tell: Tell
) -> Training:
    """Train the project's method on good images; a training that was stopped goes on from its ``checkpoint``.

    Args:
        graph: float network, cut after its taps. checkpoint: it stays, for the caller to remove.

    Raises:
        InputError: unreadable images, autograd is not installed. CheckFailed: the training diverged.
    """
    from tinyvad.training.items import ChosenItems, FrozenItems
    from tinyvad.training.loop import train

    detector = open_detector(str(project.method), graph, project)

    def images() -> Iterator[np.ndarray]:
        loaded = load_images(paths, preprocessing, on_error=project.on_error, skipped=[])
        for done, (_, image) in enumerate(loaded, 1):
            yield preprocessing.float_input(image)
            tell("frozen layers", done, len(paths))

    items = FrozenItems(detector.trunk, detector.targets, images())
    epochs = epochs_of(project, len(items))
    if epochs is not None:
        detector.recipe = replace(detector.recipe, epochs=epochs)
    held = held_out(len(items), detector.recipe.held_out, project.seed)
    kept = np.setdiff1d(np.arange(len(items)), held)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trained = train(
        detector, ChosenItems(items, kept), ChosenItems(items, held), detector.recipe, checkpoint=checkpoint, tell=tell
    )
    return training_of(detector, detector.recipe, trained, held, len(items))


def training_of(
    detector: TrainedDetector, recipe: Recipe, trained: Trained, held: np.ndarray, count: int
) -> Training:
    """A finished training with its facts."""
    facts = {
        "recipe": asdict(recipe),
        "epochs": [asdict(epoch) for epoch in trained.history],
        "best_epoch": trained.best,
        "steps": trained.steps,
        "held_out": len(held),
        "parameters": sum(array.size for array in detector.network.parameters.values()),
    }
    return Training(detector, held, count, facts)


def rule_of(training: Training, quantile: float) -> str:
    """How the threshold was found, for reports."""
    what = "held-out good images" if len(training.held_out) else "the good images that it was trained on"
    return f"{quantile:g} quantile of {what}"


def checkpoint_name(out: Path, project: Project, backbone: Backbone, size: int, product: str) -> Path:
    """Where the training of a build keeps its place: beside the build, another name for every choice of settings."""
    facts = {name: str(value) for name, value in asdict(project).items() if name != "out"}
    words = [product, backbone.source, str(backbone.sha256), str(backbone.mean), str(backbone.std), str(size)]
    key = hashlib.sha256(json.dumps([facts, words]).encode()).hexdigest()[:12]
    return out.parent / f".{out.name}.training-{key}.npz"


def fit_scorer(
    training: Training, store: TapStore, tensors: Sequence[Tensor], plan: MethodPlan
) -> tuple[Embedding | Pairs, Fit]:
    """A trained detector in integers on an engine's tapped maps, and scores of the images that it was not trained on.

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
            weights, offset = detector.output_layer()
            scorer = LinearScorer.of_layer(weights, offset, step, store.embeddings(embedding))
        else:
            centres = detector.centres()
            if plan.settings["centres"] < len(centres):
                centres = kmeans(centres, plan.settings["centres"], np.random.default_rng(detector.recipe.seed))
            rows, columns = detector.coordinate_offsets()
            scorer = CentresScorer.of_centres(centres, rows, columns, step)
    chosen = training.held_out if len(training.held_out) else None
    return embedding, Fit(scorer, image_scores(scorer, store.embeddings(embedding, chosen)))
