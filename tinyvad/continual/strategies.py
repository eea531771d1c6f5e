"""What keeps a network from forgetting while it is trained on the next task: EWC, SI, MAS, LwF.

Flows in: a ``TrainedDetector`` and a task's items before and after it is trained, and every step in between
(``tinyvad.training.loop`` calls; ``FineTuning`` says what and when). Flows out: a term that is added to the loss, with its
gradient.

=========== =========================================================== ===================================================
strategy    added to the loss                                           importance of a parameter
=========== =========================================================== ===================================================
EWC         strength / 2 * sum F (p - p*)^2                             mean over images of the loss' gradient, squared
SI          strength * sum O (p - p*)^2                                 what its steps lowered the loss by, over its way^2
MAS         strength * sum O (p - p*)^2                                 mean over images of |gradient of |outputs|^2|
LwF         strength * distance of the outputs from the old network's   (on the new task's images)
=========== =========================================================== ===================================================

p* are the parameters after the last task. Gradients of importances are of one image each, never of a batch, whose mean is
up to its size smaller; networks are in evaluation mode then. Outputs are those of the detector's graph: the student's maps
as they are (normalised ones all have one length, and MAS would find nothing), CFA's descriptor, SimpleNet's hidden layer.

Sources: EWC (Kirkpatrick et al. 2017), its online form (Schwarz et al. 2018); SI (Zenke et al. 2017); MAS (Aljundi et al.
2018); LwF (Li and Hoiem 2016), on features instead of class probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.project import PAIRED
from tinyvad.training.network import Arrays
from tinyvad.training.trainable import Items, TrainedDetector

DAMPING = 1e-3  # SI's xi: a parameter that hardly moved gets no endless importance


class FineTuning:
    """Nothing is kept, nothing is added: what the others begin with.

    Args:
        strength: factor of the added term; 0 trains as fine-tuning does, to the last bit.

    Raises:
        InputError: strength is negative or no number.
    """

    def __init__(self, strength: float = 0.0) -> None:
        if not 0 <= strength < math.inf:
            raise InputError(f"strength is {strength}; give a number from 0 on")
        self.strength = strength

    def begin_task(self, detector: TrainedDetector, items: Items) -> None:
        """Before a task's first step."""

    def loss(
        self, detector: TrainedDetector, parameters: Any, statistics: Arrays, batch: list[np.ndarray],
        rng: np.random.Generator | None,
    ) -> Any:  # fmt: skip
        """(scalar, new running statistics) of a batch, to be differentiated in ``parameters``."""
        return detector.loss(parameters, statistics, batch, rng)

    def penalty(self, parameters: Arrays) -> tuple[float, Arrays]:
        """A term of the parameters alone, and its gradients; empty where they are 0."""
        return 0.0, {}

    def after_step(self, task_gradients: Arrays, before: Arrays, after: Arrays) -> None:
        """A step was made: gradients of ``loss`` without the penalty, parameters before and after."""

    def end_task(self, detector: TrainedDetector, items: Items) -> None:
        """After a task's last step, when ``detector.network`` is its result."""

    def arrays(self) -> Arrays:
        """All that is kept from task to task, and in the middle of one."""
        return {}

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()``."""

    def nbytes(self) -> int:
        """Bytes of ``arrays()``."""
        return sum(array.nbytes for array in self.arrays().values())


class _Anchored(FineTuning):
    """A spring at every parameter: factor * strength * sum importance * (p - anchor)^2."""

    factor = 1.0

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.anchor: Arrays = {}  # p*, float32
        self.importance: Arrays = {}  # float32, of those parameters that have one

    def penalty(self, parameters: Arrays) -> tuple[float, Arrays]:
        if self.strength == 0 or not self.anchor:
            return 0.0, {}
        value, gradients = 0.0, {}
        for name, importance in self.importance.items():
            away = parameters[name] - self.anchor[name]
            pull = importance * away
            value += float((pull.astype(np.float64) * away).sum())  # not BLAS, whose sums depend on the threads
            gradients[name] = pull * pull.dtype.type(2 * self.factor * self.strength)
        return self.factor * self.strength * value, gradients

    def _anchor_at(self, detector: TrainedDetector) -> None:
        self.anchor = {name: array.copy() for name, array in detector.network.parameters.items()}

    def arrays(self) -> Arrays:
        return {**_prefixed("anchor", self.anchor), **_prefixed("importance", self.importance)}

    def restore(self, arrays: Arrays) -> None:
        self.anchor, self.importance = _part("anchor", arrays), _part("importance", arrays)


class EWC(_Anchored):
    """Elastic weight consolidation, online: F = decay * F + F of the new task.

    Args:
        strength: lambda. decay: 1 adds up the tasks' Fisher information, less forgets old tasks' slowly.
    """

    factor = 0.5

    def __init__(self, strength: float, decay: float = 1.0) -> None:
        super().__init__(strength)
        if not 0 <= decay <= 1:
            raise InputError(f"decay is {decay}; give a number from 0 to 1")
        self.decay = decay

    def end_task(self, detector: TrainedDetector, items: Items) -> None:
        for name, new in _mean_over_images(detector, items, _own_loss(detector), np.square).items():
            old = self.importance.get(name, np.float32(0))
            self.importance[name] = _float32(self.decay * old.astype(np.float64) + new)
        self._anchor_at(detector)


class MAS(_Anchored):
    """Memory aware synapses: importances are the mean over the tasks."""

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.tasks = 0

    def end_task(self, detector: TrainedDetector, items: Items) -> None:
        self.tasks += 1
        share = 1 / self.tasks
        for name, new in _mean_over_images(detector, items, _squared_outputs(detector), np.abs).items():
            old = self.importance.get(name, np.float32(0))
            self.importance[name] = _float32((1 - share) * old.astype(np.float64) + share * new)
        self._anchor_at(detector)

    def arrays(self) -> Arrays:
        return {**super().arrays(), "tasks": np.array([self.tasks], np.int64)}

    def restore(self, arrays: Arrays) -> None:
        super().restore(arrays)
        self.tasks = int(arrays["tasks"][0])


class SI(_Anchored):
    """Synaptic intelligence: a parameter counts as much as it lowered the task's own loss on its way.

    omega adds up -gradient * step, the gradient of the loss without the penalty and before the step. After a task the
    importance grows by max(0, omega / (way^2 + ``DAMPING``)). The way is the one that the steps went, to its end, even
    where an earlier epoch's network is kept. Batch norms' scales and offsets have no importance.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.path: Arrays = {}  # omega so far
        self.start: Arrays = {}
        self.end: Arrays = {}

    def begin_task(self, detector: TrainedDetector, items: Items) -> None:
        norms = norm_parameters(detector.network.graph)
        self.start = {name: array.copy() for name, array in detector.network.parameters.items() if name not in norms}
        self.end = self.start
        self.path = {name: np.zeros(array.shape) for name, array in self.start.items()}

    def after_step(self, task_gradients: Arrays, before: Arrays, after: Arrays) -> None:
        for name in self.path:
            step = after[name].astype(np.float64) - before[name]
            self.path[name] = self.path[name] - task_gradients[name] * step
        self.end = {name: after[name] for name in self.path}

    def end_task(self, detector: TrainedDetector, items: Items) -> None:
        for name, omega in self.path.items():
            way = self.end[name].astype(np.float64) - self.start[name]
            gained = np.maximum(omega / (way**2 + DAMPING), 0)
            self.importance[name] = _float32(gained + self.importance.get(name, 0))
        self._anchor_at(detector)
        self.path, self.start, self.end = {}, {}, {}

    def arrays(self) -> Arrays:
        parts = {"path": self.path, "start": self.start, "end": self.end}
        return {**super().arrays(), **{k: v for part, arrays in parts.items() for k, v in _prefixed(part, arrays).items()}}

    def restore(self, arrays: Arrays) -> None:
        super().restore(arrays)
        self.path, self.start, self.end = (_part(part, arrays) for part in ("path", "start", "end"))


class LwF(FineTuning):
    """Learning without forgetting: on the new images, outputs stay near those of the network before the task.

    For a student the distance is that of its training, of directions; else the mean squared difference.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.parameters: Arrays = {}  # of the network after the last task
        self.statistics: Arrays = {}

    def loss(
        self, detector: TrainedDetector, parameters: Any, statistics: Arrays, batch: list[np.ndarray],
        rng: np.random.Generator | None,
    ) -> Any:  # fmt: skip
        value, moved = detector.loss(parameters, statistics, batch, rng)
        if self.strength == 0 or not self.parameters:
            return value, moved
        old = _outputs(detector, self.parameters, self.statistics, batch, train=False)
        new = _outputs(detector, parameters, statistics, batch, train=rng is not None)
        return value + self.strength * _distance(detector.method, new, old), moved

    def end_task(self, detector: TrainedDetector, items: Items) -> None:
        self.parameters = {name: array.copy() for name, array in detector.network.parameters.items()}
        self.statistics = {name: array.copy() for name, array in detector.network.statistics.items()}

    def arrays(self) -> Arrays:
        return {**_prefixed("parameters", self.parameters), **_prefixed("statistics", self.statistics)}

    def restore(self, arrays: Arrays) -> None:
        self.parameters, self.statistics = _part("parameters", arrays), _part("statistics", arrays)


def norm_parameters(graph: Graph) -> set[str]:
    """Names of the batch norms' scales and offsets."""
    return {name for node in graph.nodes if node.op == "batch_norm" for name in node.inputs[1:]}


def gradients_of_images(
    detector: TrainedDetector, items: Items, function: Callable[[Any, list[np.ndarray]], Any]
) -> Iterator[Arrays]:
    """Gradients of ``function(parameters, batch of one image)`` at the present network, image after image."""
    from tinyvad.training.tape import value_and_gradients

    for i in range(len(items)):
        batch = items.take(np.array([i]))
        yield value_and_gradients(lambda p, b=batch: (function(p, b), None), detector.network.parameters)[2]  # type: ignore[misc]


def _mean_over_images(
    detector: TrainedDetector,
    items: Items,
    function: Callable[[Any, list[np.ndarray]], Any],
    of: Callable[[np.ndarray], np.ndarray],
) -> Arrays:
    """Mean over the images of ``of`` (gradient), float32; summed in float64."""
    total: Arrays = {}
    for gradients in gradients_of_images(detector, items, function):
        for name, gradient in gradients.items():
            value = of(gradient.astype(np.float64))
            total[name] = total[name] + value if name in total else value
    return {name: _float32(array / len(items)) for name, array in total.items()}


def _own_loss(detector: TrainedDetector) -> Callable[[Any, list[np.ndarray]], Any]:
    return lambda parameters, batch: detector.loss(parameters, detector.network.statistics, batch, None)[0]


def _squared_outputs(detector: TrainedDetector) -> Callable[[Any, list[np.ndarray]], Any]:
    def function(parameters: Any, batch: list[np.ndarray]) -> Any:
        outputs = _outputs(detector, parameters, detector.network.statistics, batch, train=False)
        return _sum_of_squares(outputs, [np.float32(0)] * len(outputs))

    return function


def _outputs(
    detector: TrainedDetector, parameters: Any, statistics: Arrays, batch: list[np.ndarray], train: bool
) -> list[Any]:
    """What the detector's graph makes of stored maps."""
    from tinyvad.training import forward

    graph = detector.network.graph
    return forward.run(graph, parameters, statistics, batch[: len(graph.inputs)], train=train)[0]


def _distance(method: str, new: Sequence[Any], old: Sequence[np.ndarray]) -> Any:
    if method in PAIRED:
        from tinyvad.training.losses import normalised_feature_loss

        return normalised_feature_loss(new, old)
    return _sum_of_squares(new, old) / sum(array.size for array in old)


def _sum_of_squares(maps: Sequence[Any], others: Sequence[Any]) -> Any:
    """Sum over maps of the squared differences, float64, on the tape."""
    total: Any = 0.0
    for x, other in zip(maps, others, strict=True):
        total = total + _squares()(x, other)
    return total


@cache
def _squares() -> Callable[[Any, Any], Any]:
    """The primitive, made when something is trained: the tape needs autograd."""
    from tinyvad.training.tape import differentiable

    def backward(_: Any, __: Any, args: tuple[Any, ...], ___: Any) -> Callable[[Any], tuple[Any, ...]]:
        difference = args[0] - args[1]
        return lambda g: (difference * difference.dtype.type(2 * float(g)),)

    @differentiable(backward)
    def squares(x: np.ndarray, other: np.ndarray) -> np.float64:
        return np.float64(np.square((x - other).astype(np.float64)).sum())

    return squares


def _prefixed(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}:{name}": array for name, array in arrays.items()}


def _part(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(f"{prefix}:"): array for name, array in arrays.items() if name.startswith(f"{prefix}:")}


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)
