"""What a build of a trained detector keeps to learn more products: the stream so far, and a few images of every product.

Flows in: the network, settings and a product's good images. Flows out: a ``TrainedMethod`` that has learnt it, and the
arrays of ``learn/training.npz``. All of it stays on the PC (or the Jetson) that trains; the device never sees it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinyvad.continual.base import Context, Frozen
from tinyvad.continual.methods import settings_of
from tinyvad.continual.trained import WAYS, TrainedMethod
from tinyvad.detectors.bank_tasks import BankTask
from tinyvad.detectors.routing import prototype
from tinyvad.detectors.trained import TrainedDetector
from tinyvad.errors import InputError
from tinyvad.fitting_trained import SAMPLES, epochs_of
from tinyvad.graph import archive
from tinyvad.graph.ir import Graph
from tinyvad.images import Preprocessing
from tinyvad.project import Project
from tinyvad.slots import STATES
from tinyvad.training.items import FrozenItems, numpy_engine
from tinyvad.training.network import Arrays
from tinyvad.training.student import layer_before

STATE = f"{STATES}/training.npz"
DEFAULT_WAY = {"paste": "compressed-replay"}  # of the others: replay of images


@dataclass(frozen=True, eq=False)
class Known:
    """A product that a trained network learnt before.

    Attributes:
        images: how many it learnt.
        samples: (k, S, S, 3) uint8, good images of it, to calibrate with and to set its threshold; never trained on, if
            there were enough images to hold some out.
        keys: (images,) uint64, of those that were learnt (``tinyvad.continual.learn.image_key``).
    """

    name: str
    images: int
    samples: np.ndarray
    keys: np.ndarray

    def with_more(self, samples: np.ndarray, keys: np.ndarray) -> Known:
        """The product after more images: as many samples as before, evenly from all."""
        both = np.concatenate([self.samples, samples])
        chosen = np.unique(np.linspace(0, len(both) - 1, min(SAMPLES, len(both))).round().astype(int))
        return Known(self.name, self.images + len(keys), both[chosen], np.concatenate([self.keys, keys]))


def merged(old: BankTask, new: BankTask) -> BankTask:
    """A product's task of old images and of more of them: the larger threshold, the prototype of all."""
    images = old.images + new.images
    total = old.prototype.astype(np.int64) * old.images + new.prototype.astype(np.int64) * new.images
    higher = max(old, new, key=lambda task: task.threshold)
    return BankTask(new.name, images, higher.threshold, higher.rule, prototype(total, images), new.ladder, new.state)


def way_of(project: Project) -> str:
    """How the method of a build is kept from forgetting. Raises InputError if there is no such way."""
    way = project.strategy or DEFAULT_WAY.get(str(project.method), "replay")
    if way not in WAYS:
        raise InputError(f"--strategy {way}: choose one of {', '.join(WAYS)}")
    return way


def open_stream(graph: Graph, preprocessing: Preprocessing, project: Project, images: int) -> TrainedMethod:
    """A method that has learnt nothing yet.

    Args:
        graph: float network, cut after its taps. images: of the first product, on which the number of epochs depends.

    Raises:
        InputError: settings that do not go together.
    """
    way = way_of(project)
    name = f"{project.method}-{way}"
    given: dict[str, Any] = {"epochs": epochs_of(project, images)}
    if project.method == "paste" and (project.shared or project.layers) is not None:
        given["shared"] = project.shared or layer_before(graph, graph.outputs)
    if way.endswith("replay"):
        given["size"] = project.replay
    if way == "compressed-replay":
        given["form"] = project.replay_form
    settings = settings_of(name, {k: v for k, v in given.items() if v is not None}, "build")
    frozen = Frozen(graph, preprocessing, numpy_engine, project.grid)
    return TrainedMethod(Context(np.ones(1), 1, project.tasks, project.seed, frozen), str(project.method), way, settings)


class PicturedItems(FrozenItems):
    """A product's good images as ``TaskItems``: what the frozen parts make of them, and themselves in a second file.

    Args:
        images: (S, S, 3) uint8, read one at a time.
    """

    def __init__(self, detector: TrainedDetector, images: Iterator[np.ndarray], preprocessing: Preprocessing) -> None:
        self._pictures: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the items
        self._shape = (preprocessing.height, preprocessing.width, 3)
        super().__init__(detector.trunk, detector.targets, map(preprocessing.float_input, self._kept(images)))
        self._pictures.flush()

    def _kept(self, images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for image in images:
            self._pictures.write(np.ascontiguousarray(image, np.uint8).tobytes())
            yield image

    def images(self, indices: np.ndarray) -> np.ndarray:
        """(k, S, S, 3) uint8 of the chosen ones."""
        pictures = np.memmap(self._pictures, np.uint8, "r", shape=(len(self), *self._shape))
        return np.asarray(pictures[np.asarray(indices)])


def state_arrays(graph: Graph, stream: TrainedMethod, known: Sequence[Known]) -> Arrays:
    """What ``learn/training.npz`` holds."""
    facts = [{"name": product.name, "images": product.images} for product in known]
    arrays = {"products": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    arrays |= {f"network/{name}": array for name, array in archive.to_arrays(graph).items()}
    arrays |= {f"stream/{name}": array for name, array in stream.state().items()}
    for i, product in enumerate(known):
        arrays |= {f"samples/{i}": product.samples, f"keys/{i}": product.keys}
    return arrays


def read_products(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[Graph, Arrays, list[Known]]:
    """Network, state of the stream and products of ``state_arrays``.

    Raises:
        InputError: something is missing.
    """
    try:
        facts = json.loads(arrays["products"].tobytes().decode())
        known = [
            Known(one["name"], one["images"], arrays[f"samples/{i}"], arrays[f"keys/{i}"]) for i, one in enumerate(facts)
        ]
        right = known and all(one.samples.ndim == 4 and len(one.samples) and one.samples.dtype == np.uint8 for one in known)
        if not right or any(one.keys.dtype != np.uint64 for one in known):
            raise ValueError("no products, or samples or keys of another kind")
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not what a build keeps of its training ({error!r}); make the build again") from error
    return archive.from_arrays(_below("network/", arrays)), _below("stream/", arrays), known


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
