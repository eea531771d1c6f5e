"""A build's tapped maps of the good images of several products; memory stays that of one batch and one product's sums.

Flows in: a ``Model`` and datasets. Flows out: a ``Product`` each: importance a layer, the mean image, and the maps on disk
for a second look. Of a student-teacher build the teacher's maps are looked at: the student's are what it learnt to imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from tinyvad.detectors.feature_importance import Importance, Moments, importance
from tinyvad.detectors.student_teacher import Pairs
from tinyvad.errors import InputError
from tinyvad.fitting import TapStore
from tinyvad.graph.ir import Tensor
from tinyvad.images import Dataset, load_images
from tinyvad.model import Model, batches

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Product:
    """One product as the build's network sees it.

    Attributes:
        name: of the dataset.
        count: good images that were looked at.
        photo: (S, S, 3) uint8, their mean.
        layers: importance, one a tapped layer.
        lows, highs: (H, W, C) a layer, the range of every value.
        maps: the tapped maps of all images, on disk.
        skipped: unreadable files and why.
    """

    name: str
    count: int
    photo: np.ndarray
    layers: list[Importance]
    lows: list[np.ndarray]
    highs: list[np.ndarray]
    maps: TapStore
    skipped: list[tuple[Path, str]]

    def features(self, chosen: Sequence[np.ndarray], images: np.ndarray) -> np.ndarray:
        """(k, F) float32: the values of k images where a layer's (H, W, C) bool says so, layer after layer."""
        rows: Iterator[list[np.ndarray]] = self.maps.batches(images)
        parts = [np.concatenate([m[:, mask] for m, mask in zip(maps, chosen, strict=True)], axis=1) for maps in rows]
        return np.concatenate(parts).astype(np.float32)


def chosen_layers(model: Model, wanted: Sequence[str] | None) -> dict[str, int]:
    """Layers to look at: name -> its place among the engine's outputs.

    Raises:
        InputError: the build taps no layer of a wanted name.
    """
    taps = model.embedding.taps
    first = len(taps) // 2 if isinstance(model.embedding, Pairs) else 0  # the student's come first
    places = {taps[i].name: i for i in range(first, len(taps))}
    for name in wanted or ():
        if name not in places:
            raise InputError(f"{model.folder} taps no layer {name!r}; choose with --layers among {', '.join(places)}")
    return {name: place for name, place in places.items() if wanted is None or name in wanted}


def read_product(
    model: Model, dataset: Dataset, places: Sequence[int], limit: int | None, on_error: str, seed: int, tell: Tell
) -> Product:
    """Run the build's network over a product's good images and decompose every cell of every layer.

    Args:
        places: of the layers among the engine's outputs. limit: most images, evenly spaced; None takes all.
        seed: of the choice of cells that the number of components is read from.

    Raises:
        InputError: fewer than two good images, or an unreadable one.
    """
    paths = evenly(dataset.train_good, limit)
    if len(paths) < 2:
        raise InputError(f"{dataset.root}: {len(paths)} good image to analyse; importance needs at least 2")
    moments = [Moments() for _ in places]
    store: TapStore | None = None
    skipped: list[tuple[Path, str]] = []
    total = np.zeros((model.preprocessing.height, model.preprocessing.width, 3), np.int64)
    with threadpool_limits(1, user_api="blas"):  # the same sums whatever the number of cores
        loaded = load_images(paths, model.preprocessing, on_error=on_error, skipped=skipped)
        for batch in batches(loaded):
            images = np.stack([image for _, image in batch])
            tapped = model.taps(images)
            maps = [tapped[place] for place in places]
            store = store or TapStore([Tensor(str(place), (1, *m.shape[1:]), "int8") for place, m in zip(places, maps)])
            store.append(maps)
            for sums, layer in zip(moments, maps, strict=True):
                sums.update(layer)
            total += images.sum(0, dtype=np.int64)
            tell(dataset.name, store.count + len(skipped), len(paths))
        assert store is not None  # load_images raises if it can read none
        if store.count < 2:
            raise InputError(f"{dataset.root}: only {store.count} good image can be read; importance needs at least 2")
        layers = [importance(sums, np.random.default_rng(seed)) for sums in moments]
    photo = np.rint(total / store.count).astype(np.uint8)
    lows, highs = [sums.low for sums in moments], [sums.high for sums in moments]
    return Product(dataset.name, store.count, photo, layers, lows, highs, store, skipped)


def evenly(paths: Sequence[Path], limit: int | None) -> list[Path]:
    """At most ``limit`` paths, evenly spaced."""
    if limit is None or len(paths) <= limit:
        return list(paths)
    return [paths[i] for i in spaced(len(paths), limit)]


def spaced(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the numbers 0 .. count - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
