"""STFPM and PaSTe: a student imitates a frozen teacher on good images; where it fails to, something is new.

    image --teacher--> t_1 .. t_L                     STFPM: the student reads the image, too
    image --trunk--> h --teacher's tail--> t_1 .. t_L
                     h --student's tail--> s_1 .. s_L    PaSTe: both start from the trunk's map h, which is made once

Flows in: a backbone's float Graph, and items: the image or h, then t_1 .. t_L. Flows out: the trained student, anomaly maps
(the product over layers of 1 - cos(s_l, t_l), each map resized bilinearly to the finest one's cells), and one Graph of both
for export.

Source: STFPM (Wang et al. 2021); PaSTe (Barusco et al. 2024). Distances there are 2 - 2 cos; the factor of 2 a layer is
left out, as it changes no order. Maps are multiplied at the finest one's size and then resized, as the original does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvad.detectors.feature_importance import masked, masks_of_items
from tinyvad.embedding import align_matrix
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import resolve_layer, truncate
from tinyvad.training.network import Arrays
from tinyvad.training.recipe import Recipe
from tinyvad.training.student import fold, join, layer_before, student_of, tail
from tinyvad.training.trainable import Items

MASK = "mask/{}"  # name of a layer's mask among what is learnt


class Stfpm:
    """STFPM as a ``TrainedDetector``.

    Args:
        backbone: float Graph, normalised: the teacher.
        layers: compared taps; None takes the graph's outputs.
        seed: of the student's first weights and of the training.
        keep: compare this percentage of each cell's channels alone, those that carry the variance of the task's images
            (``feature_importance``); None compares all.

    Attributes:
        layers: tensor names of the taps. teacher: the backbone cut after them.
        masks: (H, W, C) bool a layer, what is compared; None for all. ``prepare`` makes a task's from its items; to score a
            task learnt earlier, put its masks back.

    Raises:
        InputError: an unknown layer, or an op that can't be trained.
    """

    method = "stfpm"
    shared: str | None = None
    keep: float | None = None
    masks: list[np.ndarray] | None = None

    def __init__(
        self, backbone: Graph, layers: Sequence[str] | None = None, seed: int = 0, keep: float | None = None
    ) -> None:
        self.teacher = truncate(backbone, list(layers or backbone.outputs))
        self.layers = tuple(self.teacher.outputs)
        self.keep = keep
        self._set_up(seed)

    def _set_up(self, seed: int) -> None:
        self.recipe = Recipe(seed=seed)
        self.trunk: Graph | None = None if self.shared is None else truncate(self.teacher, [self.shared])
        self.targets: Graph | None = tail(self.teacher, self.layers, self.shared)
        self.network = student_of(self.teacher, self.layers, self.shared, np.random.default_rng(seed))

    def prepare(self, items: Items) -> None:
        """The masks of the task, where only a part of the channels is compared."""
        if self.keep is not None:
            self.masks = masks_of_items(items, 1, self.keep, np.random.default_rng(self.recipe.seed))

    def _compared(self, student: list[Any], teacher: list[np.ndarray]) -> tuple[list[Any], list[np.ndarray]]:
        if self.masks is None:
            return student, teacher
        return masked(student, self.masks), masked(teacher, self.masks)

    def loss(self, parameters: Arrays, statistics: Arrays, batch: list[np.ndarray], rng: np.random.Generator | None) -> Any:
        """Sum over layers of the mean ||s / |s| - t / |t|||^2 over positions and images."""
        from tinyvad.training import forward, losses

        student, moved = forward.run(self.network.graph, parameters, statistics, batch[:1], train=rng is not None)
        return losses.normalised_feature_loss(*self._compared(student, batch[1:])), moved

    def maps(self, batch: list[np.ndarray]) -> np.ndarray:
        """(n, H, W) float64, the cells of the finest layer."""
        from tinyvad.training import forward

        student, _ = forward.run(
            self.network.graph, self.network.parameters, self.network.statistics, batch[:1], train=False
        )
        return distance_product(*self._compared(student, batch[1:]))

    def graph(self) -> Graph:
        """Image -> s_1 .. s_L, t_1 .. t_L; what both share is in it once.

        Raises:
            InputError: masks are set: a build compares all channels.
        """
        if self.masks is not None:
            raise InputError(f"{self.method} with masks: a build compares all channels; train without keep to export")
        return join(self.teacher, fold(self.network))

    def arrays(self) -> Arrays:
        """Parameters and running statistics; ``keep`` and masks, where there are some."""
        selective = {} if self.keep is None else {"keep": np.array(self.keep)}
        selective.update(zip(map(MASK.format, self.layers), self.masks or ()))
        return {**self.network.parameters, **self.network.statistics, **selective}

    def restore(self, arrays: Arrays) -> None:
        """Take over ``arrays()``."""
        old = self.network
        self.network = old.with_values(
            {name: arrays[name] for name in old.parameters}, {name: arrays[name] for name in old.statistics}
        )
        self.masks = [arrays[name] for name in map(MASK.format, self.layers) if name in arrays] or None


class Paste(Stfpm):
    """PaSTe: an STFPM whose student begins behind the teacher's first layers.

    Args:
        backbone, layers, seed, keep: as for ``Stfpm``. ``tinyvad.training.student.student_layers`` chooses good layers.
        shared: the last layer that both share; None takes the last block end in front of all ``layers``.

    Raises:
        InputError: as ``Stfpm``; or a shared layer behind the taps, or around which the network leads other values.
    """

    method = "paste"

    def __init__(
        self, backbone: Graph, layers: Sequence[str] | None = None, shared: str | None = None, seed: int = 0,
        keep: float | None = None,
    ) -> None:  # fmt: skip
        self.teacher = truncate(backbone, list(layers or backbone.outputs))
        self.layers = tuple(self.teacher.outputs)
        self.keep = keep
        self.shared = layer_before(self.teacher, self.layers) if shared is None else resolve_layer(self.teacher, shared)
        self._set_up(seed)


def distance_product(student: Sequence[np.ndarray], teacher: Sequence[np.ndarray]) -> np.ndarray:
    """(n, H, W) float64: the product over layers of 1 - cos, resized bilinearly to the finest layer's cells.

    Args:
        student, teacher: (n, h, w, C) a layer each.
    """
    from tinyvad.training.losses import direction_map

    grid = max(s.shape[1:3] for s in student)
    product: Any = 1.0
    for s, t in zip(student, teacher, strict=True):
        distance = direction_map(s, t) / 2
        (rows, down), (columns, across) = (align_matrix(size, g) for size, g in zip(distance.shape[1:], grid, strict=True))
        product = product * ((rows / down) @ distance @ (columns / across).T)
    return product
