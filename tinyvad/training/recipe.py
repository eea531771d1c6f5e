"""How a network is trained: the numbers of a paper's recipe, in one place that a manifest can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """Settings of one training.

    Attributes:
        optimiser: 'sgd', 'adamw' or 'stable-adamw'.
        learning_rates: of the parameters whose name begins so, in place of ``learning_rate``.
        batch: images a step. epochs: over the images of a task. patience: epochs without a better held-out loss, then stop.
        held_out: share of the good images that is not trained on: chooses the epoch, and gives the threshold.
    """

    optimiser: str = "sgd"
    learning_rate: float = 0.4
    learning_rates: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 8
    epochs: int = 10
    patience: int = 7
    held_out: float = 0.2
    seed: int = 0

    def factors(self, names: Iterable[str]) -> dict[str, float]:
        """What each parameter multiplies ``learning_rate`` by, for ``Optimiser.step``; those with 1 are left out."""
        rates = {name: rate for name in names for start, rate in self.learning_rates.items() if name.startswith(start)}
        return {name: rate / self.learning_rate for name, rate in rates.items()}
