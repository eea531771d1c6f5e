"""Optimisers: gradients in, new parameters out; what they remember is a dict of arrays that a checkpoint can hold.

Flows in: parameters and gradients by name, of the same shapes and types. Flows out: new parameters; those given are never
changed. A parameter that has no gradient stays as it is. Learning rates are factors at the call, so that a schedule is a
list of numbers.

Sources: PyTorch's SGD, Adam and AdamW (their documented update rules); AdamW: Loshchilov and Hutter 2019; AMSGrad: Reddi
et al. 2018; StableAdamW: Wortsman et al. 2023, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tinyvad.errors import InputError
from tinyvad.training.network import Arrays
from tinyvad.training.recipe import Recipe


class Optimiser(Protocol):
    """What the three have in common."""

    def step(self, parameters: Arrays, gradients: Arrays, factor: float | Mapping[str, float] = 1.0) -> Arrays:
        """New parameters. ``factor`` multiplies the learning rate: one number, or one a name (1 where there is none)."""

    def arrays(self) -> Arrays:
        """What is remembered from step to step, by name."""

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over ``arrays()``; the next step is the one that would have followed there."""


def _rate(base: float, factor: float | Mapping[str, float], name: str) -> float:
    return base * (factor.get(name, 1.0) if isinstance(factor, Mapping) else factor)


@dataclass
class SGD:
    """b = momentum * b + (g + weight_decay * p); p = p - rate * b, as PyTorch's without dampening."""

    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    _buffers: Arrays = field(default_factory=dict)

    def step(self, parameters: Arrays, gradients: Arrays, factor: float | Mapping[str, float] = 1.0) -> Arrays:
        updated = dict(parameters)
        for name, gradient in gradients.items():
            value = parameters[name]
            kind = value.dtype.type
            change = gradient + kind(self.weight_decay) * value
            if self.momentum:
                if name in self._buffers:
                    change += kind(self.momentum) * self._buffers[name]
                self._buffers[name] = change
            updated[name] = value - kind(_rate(self.learning_rate, factor, name)) * change
        return updated

    def arrays(self) -> Arrays:
        return {f"momentum/{name}": array for name, array in self._buffers.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._buffers = {name.removeprefix("momentum/"): np.array(array) for name, array in arrays.items()}


@dataclass
class AdamW:
    """Adam with the decay apart from the gradient (``decoupled``) or, as in Adam, added to it.

    m and v are the running means of g and g^2, both divided by 1 - beta^t; p = p (1 - rate * weight_decay) - rate * m /
    (sqrt(v) + epsilon). With ``amsgrad`` v is the largest so far. With ``stable`` the rate of each array is divided by
    max(1, sqrt(mean(g^2 / max(v, epsilon^2)))): StableAdamW, which then also takes v without ``amsgrad``'s memory.
    """

    learning_rate: float
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    amsgrad: bool = False
    stable: bool = False
    decoupled: bool = True
    _memory: Arrays = field(default_factory=dict)

    def step(self, parameters: Arrays, gradients: Arrays, factor: float | Mapping[str, float] = 1.0) -> Arrays:
        updated = dict(parameters)
        for name, gradient in gradients.items():
            rate = _rate(self.learning_rate, factor, name)
            updated[name] = self._moved(name, parameters[name], gradient, rate)
        return updated

    def _moved(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        kind: Any = value.dtype.type
        first, second = self.betas
        if not self.decoupled:
            gradient = gradient + kind(self.weight_decay) * value
        steps = int(self._memory.get(f"steps/{name}", 0)) + 1
        mean = self._remembered("mean", name, value) * kind(first) + gradient * kind(1 - first)
        square = self._remembered("square", name, value) * kind(second) + gradient * gradient * kind(1 - second)
        self._memory.update({f"steps/{name}": np.int64(steps), f"mean/{name}": mean, f"square/{name}": square})
        if self.amsgrad:
            square = np.maximum(self._remembered("largest", name, value), square)
            self._memory[f"largest/{name}"] = square
        unbiased = square / kind(1 - second**steps)
        if self.stable:
            ratio = (gradient.astype(np.float64) ** 2 / np.maximum(unbiased, self.epsilon**2)).mean()
            rate /= max(1.0, float(np.sqrt(ratio)))
        kept = value * kind(1 - rate * self.weight_decay) if self.decoupled else value
        return kept - mean * kind(rate / (1 - first**steps)) / (np.sqrt(unbiased) + kind(self.epsilon))

    def _remembered(self, what: str, name: str, value: np.ndarray) -> np.ndarray:
        return self._memory.get(f"{what}/{name}", np.zeros_like(value))

    def arrays(self) -> Arrays:
        return {name: np.asarray(array) for name, array in self._memory.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._memory = {name: np.array(array) for name, array in arrays.items()}


def StableAdamW(
    learning_rate: float, weight_decay: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8,
    amsgrad: bool = False,
) -> AdamW:  # fmt: skip
    """AdamW whose steps are clipped per array (see ``AdamW``)."""
    return AdamW(learning_rate, weight_decay, betas, epsilon, amsgrad=amsgrad, stable=True)


def optimiser_of(recipe: Recipe) -> Optimiser:
    """The optimiser that a recipe names, with its numbers.

    Raises:
        InputError: there is no such optimiser.
    """
    if recipe.optimiser == "sgd":
        return SGD(recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    if recipe.optimiser == "adamw":
        return AdamW(recipe.learning_rate, recipe.weight_decay, amsgrad=True)
    if recipe.optimiser == "stable-adamw":
        return StableAdamW(recipe.learning_rate, recipe.weight_decay)
    raise InputError(f"optimiser '{recipe.optimiser}' is unknown; use sgd, adamw or stable-adamw")
