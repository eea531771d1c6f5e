"""What every continual method has in common: tasks in one after another, scores of any image out.

A method sees a task's embeddings once, in batches, and keeps what it needs; it never sees an earlier task again. Scoring
works with or without the task's identity. The methods are study forms of the detectors on int8 (or float32) embeddings;
``tinyvad.continual.learn`` does the same to a build's bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tinyvad.graph.ir import Graph
from tinyvad.images import Preprocessing
from tinyvad.training.items import Engine


@dataclass(frozen=True, eq=False)
class Frozen:
    """The network that the trained detectors learn from.

    Attributes:
        graph: float Graph, normalised, cut after its taps. preprocessing: of its images.
        engine: what runs its parts. grid: cells a side of the map, None: the method's own.
        layers: the taps, where somebody chose them; None: PaSTe may take others of the graph.
    """

    graph: Graph
    preprocessing: Preprocessing
    engine: Engine
    grid: int | None = None
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """What is fixed before the first task.

    Attributes:
        steps: (D,) float64, real value of one unit of each embedding element; ones for float features.
        last_channels: C, channels of the last tapped tensor (the tail of the embedding), for prototype routing.
        tasks: how many tasks the stream will have, for methods that divide a budget.
        seed: of every random choice.
        frozen: what trained detectors stand on (they need nothing of ``steps`` and ``last_channels``); None: they only
            check their settings.
    """

    steps: np.ndarray
    last_channels: int
    tasks: int = 1
    seed: int = 0
    frozen: Frozen | None = None


class Scored(NamedTuple):
    """Scores of n images.

    Attributes:
        maps: (n, H, W) float64 distances in real units; a higher one is more anomalous; the image's score is the largest.
        tasks: the chosen task's number: (n,) int64, or (n, H, W) where every patch chooses.
    """

    maps: np.ndarray
    tasks: np.ndarray


class ContinualMethod(Protocol):
    """A method over a stream of tasks.

    Attributes:
        task_names: the tasks learnt so far, in order.
    """

    task_names: list[str]

    def learn(self, task: str, embeddings: Any, /) -> object:
        """Learn one task from batches (n, H, W, D), an iterable for several passes; trained methods take ``TaskItems``."""

    def score(self, embeddings: Any, task: int | None = None, /) -> Scored:
        """Score (n, H, W, D), or the arrays of items; ``task``: the known task's number, None: the method finds it."""

    def nbytes(self) -> int:
        """Bytes of all that the method keeps to score and to learn the next task."""

    def state(self) -> dict[str, np.ndarray]:
        """All that is learnt, as named arrays (what ``np.savez`` takes)."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over a ``state()``; learning on equals never having stopped, byte for byte."""
