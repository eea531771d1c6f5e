"""The training loop of every trained detector: steps, epochs, held-out loss, checkpoints.

Flows in: a ``TrainedDetector``, its items, a recipe; for streams of tasks a strategy (``tinyvad.continual.strategies``)
and a replay memory (``tinyvad.continual.replay``). Flows out: the network of the epoch with the lowest held-out loss, put
into the detector, and a record.

All randomness is one generator's: the order of an epoch, replay, noise. A checkpoint holds its state with all else, so that
a training that was killed at any moment goes on to the same bytes. No defect is ever looked at: the held-out items
are good images.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinyvad.errors import CheckFailed, InputError
from tinyvad.training import checkpoint as files
from tinyvad.training.network import Arrays, Network
from tinyvad.training.optimisers import Optimiser, optimiser_of
from tinyvad.training.recipe import Recipe
from tinyvad.training.trainable import Items, TrainedDetector

CHECKPOINT_STEPS = 50  # between two checkpoints within an epoch
Tell = Callable[[str, int, int], None]


class Replay(Protocol):
    """Old items among the new ones.

    Attributes:
        old: the items that are replayed. composition, ratio: how they are mixed in.
    """

    old: list[Items]
    composition: str
    ratio: float

    def compose(self, indices: np.ndarray, rng: np.random.Generator) -> list[tuple[Items, np.ndarray]]:
        """The batch of a step: items and which of them, from ``indices`` of the present task's."""


class Strategy(Protocol):
    """What keeps a training from forgetting earlier tasks; all of it is called by ``train``."""

    def begin_task(self, detector: TrainedDetector, items: Items) -> None:
        """Before the first step; ``detector.network`` is the one of the tasks so far."""

    def loss(
        self, detector: TrainedDetector, parameters: Arrays, statistics: Arrays, batch: list[np.ndarray],
        rng: np.random.Generator | None,
    ) -> Any:  # fmt: skip
        """(scalar, new statistics): ``detector.loss``, or that and something more."""

    def penalty(self, parameters: Arrays) -> tuple[float, Arrays]:
        """A term of the parameters alone, and its gradient (may lack names)."""

    def after_step(self, task_gradients: Arrays, before: Arrays, after: Arrays) -> None:
        """Once a step: gradients of ``loss`` without the penalty, parameters before and after."""

    def end_task(self, detector: TrainedDetector, items: Items) -> None:
        """After the last step; ``detector.network`` is the task's result."""

    def arrays(self) -> Arrays:
        """All that it remembers."""

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()``."""

    def nbytes(self) -> int:
        """Of all that it remembers."""


@dataclass(frozen=True)
class Epoch:
    """Mean losses of an epoch; ``held_out`` None without held-out items."""

    loss: float
    held_out: float | None


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training.

    Attributes:
        network: of the epoch with the lowest held-out loss (the last one without held-out items).
        history: an entry an epoch. best: the epoch of ``network``, from 0. stopped: before the recipe's last epoch.
        steps: of the whole training. seconds: of this process alone.
        peak_bytes: measured: the most memory that a step allocated, plus what is kept from step to step.
    """

    network: Network
    history: list[Epoch]
    best: int
    stopped: bool
    steps: int
    seconds: float
    peak_bytes: int

    @property
    def seconds_per_epoch(self) -> float:
        return self.seconds / max(len(self.history), 1)


@dataclass
class _State:
    """Where a training stands: what a checkpoint holds."""

    parameters: Arrays
    statistics: Arrays
    optimiser: Optimiser
    rng: np.random.Generator
    best_network: tuple[Arrays, Arrays]
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the present epoch
    position: int = 0  # steps done in it
    losses: list[float] = field(default_factory=list)  # of these steps
    history: list[Epoch] = field(default_factory=list)
    best: int = 0
    steps: int = 0


def train(
    detector: TrainedDetector,
    items: Items,
    held_out: Items | None,
    recipe: Recipe,
    *,
    strategy: Strategy | None = None,
    replay: Replay | None = None,
    checkpoint: str | Path | None = None,
    tell: Tell | None = None,
) -> Trained:
    """Train ``detector.network`` on the items of a task; the best network is put into the detector.

    Args:
        items: of the task. held_out: good items that choose the epoch; None or none at all: the last epoch is taken.
        strategy, replay: for streams of tasks.
        checkpoint: file to go on from, and to write after every epoch and every ``CHECKPOINT_STEPS`` steps; it stays.
        tell: called as tell(stage, done, total) once a step.

    Raises:
        InputError: nothing to train on, a recipe that makes no sense, a checkpoint that is another training's or damaged.
        CheckFailed: the training diverged (epoch, step and remedy).
    """
    _check(recipe, items)
    started = time.perf_counter()
    held_out = held_out if held_out is not None and len(held_out) else None
    identity = _identity(detector, items, held_out, recipe, strategy, replay)
    detector.prepare(items)
    if strategy is not None:
        strategy.begin_task(detector, items)
    state = _begin(detector, recipe)
    if checkpoint is not None:
        _resume(checkpoint, identity, state, detector, strategy)
    per_epoch = -(-len(items) // recipe.batch)
    peak: int | None = None
    while not _over(state, recipe, held_out):
        if state.position == 0:
            state.order = state.rng.permutation(len(items))
        batches = np.array_split(state.order, per_epoch)  # sizes differ by one at most: no tiny last batch
        while state.position < per_epoch:
            draws = copy.deepcopy(state.rng)
            batch = _batch(items, batches[state.position], replay, state.rng)
            loss = _step(detector, strategy, state, batch, recipe)
            if peak is None:
                peak = _peak(detector, strategy, state, batch, draws)
            if tell is not None:
                tell(f"training, loss {loss:.4f}", state.steps, per_epoch * recipe.epochs)
            if checkpoint is not None and state.steps % CHECKPOINT_STEPS == 0 and state.position < per_epoch:
                _save(checkpoint, identity, state, detector, strategy)
        _end_epoch(detector, state, held_out, recipe)
        if checkpoint is not None:
            _save(checkpoint, identity, state, detector, strategy)
    network = detector.network.with_values(*state.best_network)
    detector.network = network
    if strategy is not None:
        strategy.end_task(detector, items)
    stopped = len(state.history) < recipe.epochs
    if tell is not None and stopped:
        tell("training, early stop", per_epoch * recipe.epochs, per_epoch * recipe.epochs)
    seconds = time.perf_counter() - started
    return Trained(network, state.history, state.best, stopped, state.steps, seconds, peak or 0)


def evaluate_loss(
    detector: TrainedDetector, parameters: Arrays, statistics: Arrays, items: Items, batch: int
) -> float:
    """Mean loss over items in evaluation mode."""
    total = 0.0
    for start in range(0, len(items), batch):
        rows = items.take(np.arange(start, min(start + batch, len(items))))
        total += float(detector.loss(parameters, statistics, rows, None)[0]) * len(rows[0])
    return total / len(items)


def _check(recipe: Recipe, items: Items) -> None:
    if len(items) == 0:
        raise InputError("there are no good images to train on; give at least one")
    for name, least in (("batch", 1), ("epochs", 1), ("patience", 1)):
        if getattr(recipe, name) < least:
            raise InputError(f"recipe: {name} is {getattr(recipe, name)}; give at least {least}")
    named = {f" of {name}": rate for name, rate in recipe.learning_rates.items()}
    for name, rate in {"": recipe.learning_rate, **named}.items():
        if not 0 < rate < math.inf:
            raise InputError(f"recipe: learning_rate{name} is {rate}; give a positive number")


def _begin(detector: TrainedDetector, recipe: Recipe) -> _State:
    values = dict(detector.network.parameters), dict(detector.network.statistics)
    return _State(*values, optimiser_of(recipe), np.random.default_rng(recipe.seed), values)


def _over(state: _State, recipe: Recipe, held_out: Items | None) -> bool:
    epochs = len(state.history)
    return epochs >= recipe.epochs or (held_out is not None and epochs - state.best > recipe.patience)


def _batch(
    items: Items, indices: np.ndarray, replay: Replay | None, rng: np.random.Generator
) -> list[np.ndarray]:
    """The arrays of a step, parts of a replayed batch one after the other."""
    if replay is None:
        return items.take(indices)
    parts = [source.take(chosen) for source, chosen in replay.compose(indices, rng) if len(chosen)]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _gradients(
    detector: TrainedDetector, strategy: Strategy | None, state: _State, batch: list[np.ndarray],
    rng: np.random.Generator,
) -> tuple[float, Arrays, Arrays]:  # fmt: skip
    """Loss, statistics after the batch, and gradients."""
    from tinyvad.training.tape import value_and_gradients

    def loss(parameters: Any) -> tuple[Any, Any]:
        if strategy is None:
            return detector.loss(parameters, state.statistics, batch, rng)
        return strategy.loss(detector, parameters, state.statistics, batch, rng)

    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told, with a remedy
        return value_and_gradients(loss, state.parameters)


def _step(
    detector: TrainedDetector, strategy: Strategy | None, state: _State, batch: list[np.ndarray], recipe: Recipe
) -> float:
    loss, statistics, gradients = _gradients(detector, strategy, state, batch, state.rng)
    whole = gradients
    if strategy is not None:
        value, extra = strategy.penalty(state.parameters)
        loss += value
        whole = {name: gradient + extra[name] if name in extra else gradient for name, gradient in gradients.items()}
    if not math.isfinite(loss):
        raise _diverged(detector, state, recipe, f"loss {loss}")
    before = state.parameters
    with np.errstate(over="ignore", invalid="ignore"):
        state.parameters = state.optimiser.step(before, whole, recipe.factors(whole))
    state.statistics = statistics
    if strategy is not None:
        strategy.after_step(gradients, before, state.parameters)
    state.losses.append(loss)
    state.position += 1
    state.steps += 1
    return loss


def _end_epoch(detector: TrainedDetector, state: _State, held_out: Items | None, recipe: Recipe) -> None:
    """Close the epoch: held-out loss, best network so far."""
    loss: float | None = None
    if held_out is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            loss = evaluate_loss(detector, state.parameters, state.statistics, held_out, recipe.batch)
    finite = all(np.isfinite(array).all() for values in (state.parameters, state.statistics) for array in values.values())
    if not finite or (loss is not None and not math.isfinite(loss)):
        raise _diverged(detector, state, recipe, "parameters or held-out loss not finite")
    state.history.append(Epoch(float(np.mean(state.losses)), loss))
    best = state.history[state.best].held_out
    if loss is None or best is None or len(state.history) == 1 or loss < best:
        state.best = len(state.history) - 1
        state.best_network = state.parameters, state.statistics
    state.position, state.losses = 0, []


def _diverged(detector: TrainedDetector, state: _State, recipe: Recipe, what: str) -> CheckFailed:
    return CheckFailed(
        f"training of {detector.method} diverged in epoch {len(state.history) + 1}, step {state.position + 1}: {what}; use "
        f"a learning rate below {recipe.learning_rate:g}"
    )


def _peak(
    detector: TrainedDetector, strategy: Strategy | None, state: _State, batch: list[np.ndarray],
    rng: np.random.Generator,
) -> int:  # fmt: skip
    """Bytes that a step allocates at most, and what lives between steps; measured on one more pass, which is dropped."""
    kept: list[Arrays] = [state.parameters, state.statistics, state.optimiser.arrays(), *state.best_network]
    lasting = sum(array.nbytes for arrays in kept for array in arrays.values()) + sum(array.nbytes for array in batch)
    lasting += strategy.nbytes() if strategy is not None else 0
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        _gradients(detector, strategy, state, batch, rng)
        return lasting + tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()


def _identity(
    detector: TrainedDetector, items: Items, held_out: Items | None, recipe: Recipe, strategy: Strategy | None,
    replay: Replay | None,
) -> str:  # fmt: skip
    """A hash of all that a training starts from."""
    digest = hashlib.sha256()
    mixed = [type(part).__name__ for part in (strategy, replay)]
    facts = [detector.method, asdict(recipe), mixed, len(items), len(held_out or ())]
    facts += [replay.composition, replay.ratio] if replay is not None else []
    digest.update(json.dumps(facts).encode())
    sources = [items, *([held_out] if held_out is not None else []), *(replay.old if replay is not None else [])]
    for source in sources:
        for start in range(0, len(source), recipe.batch):
            for array in source.take(np.arange(start, min(start + recipe.batch, len(source)))):
                digest.update(np.ascontiguousarray(array).tobytes())
    started = strategy.arrays() if strategy is not None else {}
    for name, array in (*sorted(detector.arrays().items()), *sorted(started.items())):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _save(
    path: str | Path, identity: str, state: _State, detector: TrainedDetector, strategy: Strategy | None
) -> None:
    facts = {
        "identity": identity,
        "rng": state.rng.bit_generator.state,
        "position": state.position,
        "losses": state.losses,
        "history": [asdict(epoch) for epoch in state.history],
        "best": state.best,
        "steps": state.steps,
    }
    groups = {
        "parameters": state.parameters,
        "statistics": state.statistics,
        "optimiser": state.optimiser.arrays(),
        "best parameters": state.best_network[0],
        "best statistics": state.best_network[1],
        "detector": detector.arrays(),
        "strategy": strategy.arrays() if strategy is not None else {},
        "state": {"order": state.order},
    }
    named = {f"{group}:{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    files.save(path, facts, named)


def _resume(
    path: str | Path, identity: str, state: _State, detector: TrainedDetector, strategy: Strategy | None
) -> None:
    """Go on where the file stopped, if there is one."""
    found = files.read(path)
    if found is None:
        return
    facts, arrays = found
    if facts.get("identity") != identity:
        raise InputError(
            f"checkpoint {path} belongs to another training (other images, settings or weights); delete it to start again"
        )
    groups: dict[str, Arrays] = {}
    for key, array in arrays.items():
        group, _, name = key.partition(":")
        groups.setdefault(group, {})[name] = array
    detector.restore(groups.get("detector", {}))
    if strategy is not None:
        strategy.restore(groups.get("strategy", {}))
    state.parameters, state.statistics = groups.get("parameters", {}), groups.get("statistics", {})
    state.optimiser.restore(groups.get("optimiser", {}))
    state.best_network = groups.get("best parameters", {}), groups.get("best statistics", {})
    state.order = groups["state"]["order"]
    state.rng.bit_generator.state = facts["rng"]
    state.history = [Epoch(**epoch) for epoch in facts["history"]]
    state.position, state.losses = facts["position"], facts["losses"]
    state.best, state.steps = facts["best"], facts["steps"]
