"""What a training reads: the frozen parts' results, made once for all epochs, and the rows of other items.

Flows in: images, one at a time, and the frozen Graphs of a detector. Flows out: ``Items`` (``tinyvad.training.trainable``):
rows of float32 arrays by index. ``FrozenItems`` keeps them in an unnamed temporary file, so that memory stays that of one
image and one batch however many images there are.

Images run through the frozen parts one by one, so that a row depends on its image alone: replaying a stored map, or the
image that it was made from, gives the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import IO

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.training.trainable import Items

# a frozen float Graph -> a function of its inputs [(1, H, W, C)] to its outputs [(1, h, w, c)], float32
Engine = Callable[[Graph], Callable[[list[np.ndarray]], list[np.ndarray]]]


class ArrayItems:
    """Items that lie in memory: one row an image in each of ``arrays``."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        lengths = {len(array) for array in arrays}
        if len(lengths) != 1:
            raise InputError(f"items of {sorted(lengths)} rows don't go together; give every array one row an image")
        self.arrays = list(arrays)

    def __len__(self) -> int:
        return len(self.arrays[0])

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """The rows of every array."""
        return [array[indices] for array in self.arrays]


class ChosenItems:
    """Some of other items, in the order of ``indices``."""

    def __init__(self, items: Items, indices: np.ndarray) -> None:
        self._items, self._indices = items, np.asarray(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """Rows of the items behind."""
        return self._items.take(self._indices[indices])


class JoinedItems:
    """Several items, one after the other (joint training)."""

    def __init__(self, parts: Sequence[Items]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])  # (parts + 1,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """Rows in the order asked for, whichever part they are from."""
        indices = np.asarray(indices)
        part_of = np.searchsorted(self._starts, indices, "right") - 1
        found: list[np.ndarray] = []
        for part in np.unique(part_of):
            here = np.flatnonzero(part_of == part)
            rows = self._parts[part].take(indices[here] - self._starts[part])
            if not found:
                found = [np.empty((len(indices), *row.shape[1:]), row.dtype) for row in rows]
            for array, row in zip(found, rows, strict=True):
                array[here] = row
        return found


class FrozenItems:
    """The stored maps and targets of images.

    Args:
        trunk: frozen Graph from the image to the stored maps; None stores the image.
        targets: frozen Graph from the stored maps to what the loss compares with; None for none.
        images: (H, W, 3) float32, normalised as the network wants them; read one at a time.
        engine: what runs a frozen Graph; None takes ``numpy_engine``.

    Attributes:
        stored: how many of the arrays of ``take`` are stored maps; the rest are targets.

    Raises:
        InputError: no image, one of another shape, or values that are not finite.
    """

    def __init__(
        self, trunk: Graph | None, targets: Graph | None, images: Iterable[np.ndarray], engine: Engine | None = None
    ) -> None:
        engine = engine or numpy_engine
        run_trunk = engine(trunk) if trunk is not None else None
        run_targets = engine(targets) if targets is not None else None
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the items
        self.shapes: list[tuple[int, ...]] = []
        self.stored = 1 if trunk is None else len(trunk.outputs)
        self._count = 0
        for image in images:
            maps = [np.ascontiguousarray(image[None], np.float32)]
            if run_trunk is not None:
                maps = run_trunk(maps)
            if run_targets is not None:
                maps = [*maps, *run_targets(maps)]
            self._append(maps)
        if self._count == 0:
            raise InputError("there are no good images to train on; give at least one")
        self._file.flush()

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """On disk."""
        return 4 * self._count * self._width

    @property
    def _width(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """[(k, ...)] float32: stored maps, then targets, of the chosen images."""
        rows = np.memmap(self._file, np.float32, "r", shape=(self._count, self._width))[np.asarray(indices)]
        edges = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
        parts = np.split(np.asarray(rows), edges, axis=1)
        return [np.ascontiguousarray(part).reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _append(self, maps: Sequence[np.ndarray]) -> None:
        shapes = [array.shape[1:] for array in maps]
        if not self.shapes:
            self.shapes = shapes
        if shapes != self.shapes:
            raise InputError(f"image {self._count} gives maps {shapes}, the first one {self.shapes}; use one image size")
        row = np.concatenate([array.reshape(-1).astype(np.float32, copy=False) for array in maps])
        if not np.isfinite(row).all():
            raise InputError(f"image {self._count} gives values that are not finite; check the backbone's weights")
        self._file.write(row.tobytes())
        self._count += 1


def numpy_engine(graph: Graph) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """Runs a frozen Graph with the forward pass of training, which needs nothing but NumPy and Numba."""
    from tinyvad.training import forward

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        return forward.run(graph, {}, {}, inputs, train=False)[0]

    return run
