"""How a network is trained: the numbers of a paper's recipe, in one place that a manifest can hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings of one training.

    Attributes:
        optimiser: 'sgd', 'adamw' or 'stable-adamw'.
        batch: images a step. epochs: over the images of a task. patience: epochs without a better held-out loss, then stop.
        held_out: share of the good images that is not trained on: chooses the epoch, and gives the threshold.
    """

    optimiser: str = "sgd"
    learning_rate: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 8
    epochs: int = 10
    patience: int = 7
    held_out: float = 0.2
    seed: int = 0
