"""Distillation: a small network learns to predict a larger one's tapped maps. No labels, any images.

Flows in: a ``Recipe``. Flows out: ``weights.npz`` (float16, batch norms folded), its card ``weights.toml`` and a loss
picture ``weights.svg``; while it runs ``weights.checkpoint``, from which a stopped training goes on.

    views -> teachers -> normalised target maps (n, h, w, C)
    views -> student  -> tapped maps (n, h, w, c) -> 1x1 regressor, thrown away afterwards -> prediction (n, h, w, C)
    loss = mean over layers of what a target and its prediction differ by, see ``tinyvad.distill.teacher``

Source: knowledge distillation of intermediate features with a regressor, Romero et al., FitNets (ICLR 2015), section
2.2; normalised targets, see ``tinyvad.distill.teacher``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tinyvad.backbones import get_backbone
from tinyvad.backbones.assign import random_weights
from tinyvad.distill.keras_graph import from_keras, import_keras, to_keras
from tinyvad.distill.teacher import LOSSES, Normalisation, Teachers, map_sizes, normalisation, real_input
from tinyvad.distill.views import Pictures, views
from tinyvad.errors import InputError
from tinyvad.files import write_bytes
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import truncate

STATISTICS_VIEWS = 512
STATISTICS, TRAINING = 0, 1  # second part of a view's key
HISTORY_POINTS = 400
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a training depends on; a checkpoint of another recipe is refused.

    Attributes:
        teachers: (backbone name or file, layers or None for its default ones), one or several.
        student: built-in backbone name.
        student_layers: None for its default ones.
        folders: of training images, searched with all folders below.
        generated: number of generated images beside them.
        image_size: of the views in pixels, for teacher and student.
        steps, batch_size: optimiser steps, views a step.
        learning_rate: its peak; warm-up over 2 % of the steps, cosine to 1 % of it.
        loss: see ``tinyvad.distill.teacher``.
        seed: of initial weights and views, 0 to 2^32 - 1.
    """

    teachers: tuple[tuple[str, tuple[str, ...] | None], ...]
    student: str
    student_layers: tuple[str, ...] | None = None
    folders: tuple[str, ...] = ()
    generated: int = 0
    image_size: int = 112
    steps: int = 10000
    batch_size: int = 16
    learning_rate: float = 0.03
    loss: str = "cosine-half"
    seed: int = 0


@dataclasses.dataclass
class Trained:
    """What came out.

    Attributes:
        definition: the student cut after its taps, with trained weights, batch norms not folded.
        layers: tensor names of the taps.
        targets: "teacher:layer" names of each tap's target.
        history: (step, loss of each layer) points over the training.
        training, held_out: the pictures that it was trained on, and those that it has not seen.
        teachers: (name, SHA-256 of the file) of each.
        seconds: of training, over all sittings.
    """

    definition: Graph
    layers: tuple[str, ...]
    targets: list[list[str]]
    history: list[list[float]]
    training: Pictures
    held_out: Pictures
    teachers: list[tuple[str, str | None]]
    seconds: float


def distil(
    recipe: Recipe, checkpoint: Path, every: float = 60.0, threads: int = 2, progress: Progress | None = None
) -> Trained:
    """Train, or go on from ``checkpoint``.

    Args:
        checkpoint: written before the first step, every ``every`` seconds and at the end; a training that was killed at
            any moment goes on from the last one with the views that it would have had.
        threads: for the teachers; the Keras back end takes its number from its own settings.

    Raises:
        InputError: wrong recipe (no such teacher, layer, student or folder, sizes), no images, a checkpoint of another
            recipe or of other image or teacher files, no Keras, or the checkpoint can't be written; what was there
            before stays.
    """
    _check(recipe)
    tell = progress or (lambda stage, done, total: None)
    info = get_backbone(recipe.student)
    definition = random_weights(info.build(input_size=recipe.image_size), recipe.seed)
    definition = truncate(definition, list(recipe.student_layers or info.layers))
    sizes = map_sizes(definition)
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--student-layers {','.join(definition.outputs)}: give one a stride; their maps are {sizes}")
    teachers = Teachers(
        [(spec, list(layers) if layers else None) for spec, layers in recipe.teachers], recipe.image_size, sizes, threads
    )
    pictures = Pictures([Path(folder) for folder in recipe.folders], recipe.generated, recipe.seed)
    training, held_out = pictures.split()
    held_out.picture(np.random.default_rng(recipe.seed))  # none that can be read? Say so before the training

    keras = import_keras()  # only now: it takes seconds and may talk, and wrong use is told at once in one line
    keras.utils.set_random_seed(recipe.seed)
    student = to_keras(definition)
    outputs = [
        keras.layers.Conv2D(channels, 1, name=f"regressor-{i}")(tap)
        for i, (tap, channels) in enumerate(zip(student.outputs, teachers.channels))
    ]
    model = keras.Model(student.input, outputs)
    model.compile(
        optimizer=_optimizer(keras, recipe), loss=[_loss(keras, recipe.loss.split("-")[0])] * len(outputs),
        loss_weights=[1 / len(outputs)] * len(outputs),
    )  # fmt: skip
    model.optimizer.build(model.trainable_variables)
    files = {"image files": pictures.digest(), "teacher files": ", ".join(str(b.sha256)[:8] for b in teachers.backbones)}
    state = _State(recipe, files, checkpoint, [*model.weights, *model.optimizer.variables])
    if not state.load():
        state.normalisations = _statistics(recipe, teachers, training, tell)
        state.save()  # a folder that can't be written is told now

    def batch(step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        images = views(training, (recipe.seed, TRAINING, step), recipe.batch_size, recipe.image_size)
        targets = [norm(maps) for norm, maps in zip(state.normalisations, teachers.maps(images))]
        return real_input(images, info.mean, info.std), targets

    point = max(1, recipe.steps // HISTORY_POINTS)
    started = saved = time.monotonic()
    before = state.seconds
    tell("training", state.step, recipe.steps)
    for step, (inputs, targets) in _ahead(batch, state.step, recipe.steps):
        losses = np.atleast_1d(model.train_on_batch(inputs, targets))  # the mean and each layer's, or a single layer's
        model.reset_metrics()  # they are means since the last reset
        if not np.isfinite(losses).all():
            raise InputError(f"the loss is not finite at step {step}; use a lower --learning-rate")
        state.step = step + 1
        state.seconds = before + time.monotonic() - started
        state.recent.append(losses[-len(outputs) :].tolist())
        if state.step % point == 0 or state.step == recipe.steps:
            state.history.append([state.step, *np.mean(state.recent, 0).tolist()])
            state.recent = []
        if time.monotonic() - saved > every or state.step == recipe.steps:
            state.save()
            saved = time.monotonic()
        tell("training", state.step, recipe.steps)

    return Trained(
        definition=from_keras(model, definition),
        layers=tuple(definition.outputs),
        targets=teachers.names,
        history=state.history,
        training=training,
        held_out=held_out,
        teachers=[(backbone.name, backbone.sha256) for backbone in teachers.backbones],
        seconds=state.seconds,
    )


def _check(recipe: Recipe) -> None:
    if not recipe.teachers:
        raise InputError("no teacher; give --teacher FILE.onnx, once or several times")
    for name, low in (("steps", 1), ("batch_size", 2), ("generated", 0)):
        if getattr(recipe, name) < low:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(recipe, name)}, must be at least {low}")
    if not 0 <= recipe.seed < 2**32:
        raise InputError(f"--seed is {recipe.seed}, must be 0 to 4294967295")
    if not 32 <= recipe.image_size <= 512:
        raise InputError(f"--image-size is {recipe.image_size}, must be 32 to 512 pixels")
    if not 0 < recipe.learning_rate < 1:
        raise InputError(f"--learning-rate is {recipe.learning_rate}, must be above 0 and below 1")
    if recipe.loss not in LOSSES:
        raise InputError(f"--loss is {recipe.loss}, must be one of {', '.join(LOSSES)}")


def _optimizer(keras: Any, recipe: Recipe) -> Any:
    warm_up = max(1, recipe.steps // 50)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=recipe.learning_rate / 20, decay_steps=max(1, recipe.steps - warm_up), alpha=0.01,
        warmup_target=recipe.learning_rate, warmup_steps=warm_up,
    )  # fmt: skip
    return keras.optimizers.AdamW(schedule, weight_decay=1e-3, global_clipnorm=1.0)


def _loss(keras: Any, name: str) -> Any:
    if name == "mse":
        return "mse"
    if name == "huber":
        return keras.losses.Huber(0.5)

    def cosine(target: Any, prediction: Any) -> Any:
        """One minus the cosine at each position, their mean: (n, h, w, C) twice -> (n,)."""
        ops = keras.ops
        lengths = ops.sum(ops.square(target), axis=-1) * ops.sum(ops.square(prediction), axis=-1)
        # written out, as the gradient of a back end's own normalisation need not be finite at a zero vector
        cosines = ops.sum(target * prediction, axis=-1) * ops.rsqrt(lengths + 1e-6)
        return 1 - ops.mean(cosines, axis=(1, 2))

    return cosine


def _statistics(recipe: Recipe, teachers: Teachers, pictures: Pictures, tell: Progress) -> list[Normalisation]:
    """Normalise by up to 64 positions of each of ``STATISTICS_VIEWS`` views."""
    rng = np.random.default_rng([recipe.seed, STATISTICS])
    vectors: list[list[np.ndarray]] = [[] for _ in teachers.channels]
    for i in range(0, STATISTICS_VIEWS, 16):
        images = views(pictures, (recipe.seed, STATISTICS, i), 16, recipe.image_size)
        for maps, kept in zip(teachers.maps(images), vectors):
            flat = maps.reshape(len(maps), -1, maps.shape[-1])  # (16, h*w, C)
            kept.append(flat[:, rng.permutation(flat.shape[1])[:64]].reshape(-1, maps.shape[-1]))
        tell("statistics", i + 16, STATISTICS_VIEWS)
    return [normalisation(np.concatenate(kept), recipe.loss.split("-")[1]) for kept in vectors]


def _ahead(make: Callable[[int], Any], start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(step, make(step)) in order, the next two made by a thread while the reader works."""
    pending: deque[tuple[int, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for step in range(start, stop):
            while len(pending) < 3 and (last := pending[-1][0] + 1 if pending else step) < stop:
                pending.append((last, pool.submit(make, last)))
            yield step, pending.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _State:
    """What a training goes on from: variables, step, normalisations, losses; one .npz file, replaced whole.

    ``files`` says in words which image and teacher files it is of, ``recent`` are the losses since the last history point.
    """

    def __init__(self, recipe: Recipe, files: dict[str, str], path: Path, variables: list[Any]) -> None:
        self.recipe, self.files, self.path, self.variables = recipe, files, path, variables
        self.step = 0
        self.seconds = 0.0
        self.history: list[list[float]] = []
        self.recent: list[list[float]] = []
        self.normalisations: list[Normalisation] = []

    def save(self) -> None:
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "files": self.files,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "recent": self.recent,
        }
        arrays: dict[str, Any] = {f"variable{i}": np.asarray(v.numpy()) for i, v in enumerate(self.variables)}
        for i, norm in enumerate(self.normalisations):
            arrays |= {f"mean{i}": norm.mean, f"matrix{i}": norm.matrix}
        buffer = io.BytesIO()
        np.savez(buffer, facts=np.array(json.dumps(facts)), **arrays)
        write_bytes(self.path, buffer.getvalue())

    def load(self) -> bool:
        """Go on from the file; False if there is none."""
        if not self.path.exists():
            return False
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = dict(file)
            facts = json.loads(str(arrays["facts"]))
            theirs = {**facts["recipe"], **facts.get("files", {})}
            values = [arrays[name] for name in arrays if name.startswith("variable")]
            count = sum(name.startswith("mean") for name in arrays)
            self.normalisations = [Normalisation(arrays[f"mean{i}"], arrays[f"matrix{i}"]) for i in range(count)]
            self.step, self.seconds, self.history = facts["step"], facts["seconds"], facts["history"]
            self.recent = facts.get("recent", [])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            raise InputError(f"{self.path} is no checkpoint of a training ({error}); remove it to start anew") from error
        ours = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        ours |= self.files if "files" in facts else {}
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{self.path} is of a training with {name} {theirs.get(name)}, not {value}: give that, another --out, "
                    "or remove it to start anew"
                )
        if [value.shape for value in values] != [tuple(variable.shape) for variable in self.variables]:
            raise InputError(f"{self.path} is of another version of {self.recipe.student}; remove it to start anew")
        for variable, value in zip(self.variables, values):
            variable.assign(value)
        return True
