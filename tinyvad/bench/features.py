"""Cached features: the int8 maps of a network that was calibrated on a stream's first products, made once for all cells.

Flows in: a backbone, an input size, the good images of the first task, and the images to run. Flows out: a ``Network`` and
tapped maps on disk, memory-mapped. As in a build the network is quantised on the first task's good images alone.

An entry's name is the hash of all that it depends on: the network's bytes, input table and size, and each image's path
below the data folder, length, time of change and drift. Entries are written under another name and renamed, so that
they are whole or absent; a lock spares two processes the same work, but nothing depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyvad.backbones.source import Backbone, open_backbone
from tinyvad.calibration import CALIBRATION_IMAGES, quantize_on
from tinyvad.continual.streams import Unit, unit_images
from tinyvad.engines import threads
from tinyvad.engines.int8 import Int8Engine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.export.tflite import to_tflite
from tinyvad.fitting import TapStore
from tinyvad.graph.ir import Graph, Tensor
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Preprocessing, apply_table, input_table
from tinyvad.model import batches
from tinyvad.version import __version__


@dataclass(frozen=True, eq=False)
class Pictures:
    """Some images of one unit of a stream, in order, changed by its drift.

    Attributes:
        root: the data folder. seed: of the drift's noise.
    """

    unit: Unit
    paths: list[Path]
    root: Path
    seed: int

    def identities(self) -> list[str]:
        """What tells each image from any other."""
        drift = f"{self.unit.drift}:{self.seed}" if self.unit.drift else ""
        return [f"{identity(path, self.root)}:{drift}" for path in self.paths]

    def images(self, preprocessing: Preprocessing) -> Iterator[np.ndarray]:
        """(S, S, 3) uint8 each, one in memory at a time."""
        return unit_images(self.unit, self.paths, preprocessing, self.seed)


@dataclass(frozen=True, eq=False)
class Network:
    """An int8 network.

    Attributes:
        preprocessing: of its images. table: (3, 256) int8, its input of every pixel value.
        graph: int8 Graph; its outputs are the tapped tensors. key: hash of its bytes and its input table.
    """

    preprocessing: Preprocessing
    table: np.ndarray
    graph: Graph
    key: str

    @property
    def tensors(self) -> list[Tensor]:
        """The tapped tensors."""
        return [self.graph.tensors[output] for output in self.graph.outputs]

    @cached_property
    def engine(self) -> Int8Engine:
        """What runs it; made when features are missing."""
        return Int8Engine(self.graph, threads())


class CachedTaps(TapStore):
    """Tapped maps in a file of the cache, mapped when they are read."""

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self.shapes = [tensor.shape[1:] for tensor in tensors]
        self._sizes = [int(np.prod(shape)) for shape in self.shapes]
        self._file = path.open("rb")
        self.count = path.stat().st_size // sum(self._sizes)


class SeveralTaps(TapStore):
    """Several stores, one after the other."""

    def __init__(self, stores: Sequence[TapStore]) -> None:
        self._stores = stores
        self.count = sum(store.count for store in stores)

    def batches(self, indices: np.ndarray | None = None) -> Iterator[list[np.ndarray]]:
        """All images; single ones can't be chosen."""
        assert indices is None
        for store in self._stores:
            yield from store.batches()


def open_network(
    name: str, sha256: str, size: int, first: Sequence[Pictures], cache: Path, layers: tuple[str, ...] | None = None
) -> Network:
    """The network quantised on up to ``CALIBRATION_IMAGES`` of the first task's good images, evenly chosen.

    Args:
        name: of the backbone, or its file. sha256: of its weights, '' where there is no file of them. layers: taps; None:
            its own.

    Raises:
        InputError: no such backbone, one with other weights, or an image can't be read.
    """
    backbone = opened(name, sha256, layers)
    preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
    graph = backbone.graph_at(size)
    chosen = _evenly(first, CALIBRATION_IMAGES)
    floats = hashlib.sha256(to_onnx(graph).SerializeToString()).hexdigest()
    identities = [identity for pictures in chosen for identity in pictures.identities()]
    key = hashed("network", __version__, floats, repr(preprocessing), *identities)

    def write(file: BinaryIO) -> None:
        images = (image for pictures in chosen for image in pictures.images(preprocessing))
        file.write(to_tflite(quantize_on(graph, preprocessing, images).graph))

    data = cached(cache / f"{key}.tflite", write).read_bytes()
    quantized = import_tflite(data)
    first_grid = quantized.tensors[quantized.inputs[0]].quantization
    assert first_grid is not None  # to_tflite has written it
    scale, zero_point = float(first_grid.scale[0]), int(first_grid.zero_point[0])
    table = input_table(preprocessing.mean, preprocessing.std, scale, zero_point)
    digest = hashed("int8", str(size), hashlib.sha256(data).hexdigest(), hashlib.sha256(table.tobytes()).hexdigest())
    return Network(preprocessing, table, quantized, digest)


def open_taps(network: Network, pictures: Pictures, cache: Path) -> CachedTaps:
    """The tapped maps of some images in their order, from the cache or made now.

    Raises:
        InputError: an image can't be read.
    """

    def write(file: BinaryIO) -> None:
        for images in batches(pictures.images(network.preprocessing)):
            maps = network.engine.features(apply_table(np.stack(images), network.table))
            file.write(np.concatenate([m.reshape(len(images), -1) for m in maps], axis=1).tobytes())

    key = hashed("taps", network.key, *pictures.identities())
    return CachedTaps(cached(cache / f"{key}.taps", write), network.tensors)


def _evenly(sets: Sequence[Pictures], most: int) -> list[Pictures]:
    """Up to ``most`` images of all sets together, as a build chooses those that it calibrates on."""
    total = sum(len(pictures.paths) for pictures in sets)
    wanted = np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist()
    chosen, start = [], 0
    for pictures in sets:
        own = [pictures.paths[i - start] for i in wanted if start <= i < start + len(pictures.paths)]
        chosen.append(replace(pictures, paths=own))
        start += len(pictures.paths)
    return [pictures for pictures in chosen if pictures.paths]


def identity(path: Path, root: Path) -> str:
    """What tells a file from any other: its name below ``root``, its length and time of change."""
    facts = path.stat()
    return f"{Path(os.path.relpath(path, root)).as_posix()}:{facts.st_size}:{facts.st_mtime_ns}"


def cached(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """``path``, written by ``write`` first where it is not there yet: whole or not at all, by one process at a time."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if path.exists():  # another process has made it while this one waited
            return path
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds ``path``; the system lets go of it when a process dies. Not on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=4)
def opened(name: str, sha256: str, layers: tuple[str, ...] | None) -> Backbone:
    """A backbone, opened once a process.

    Raises:
        InputError: none of that name, or one with other weights.
    """
    backbone = open_backbone(name, None if layers is None else list(layers))
    if (backbone.sha256 or "") != sha256:
        raise InputError(f"backbone {name} has other weights here than where the grid was read: use one file everywhere")
    return backbone


def hashed(*words: str) -> str:
    """A name for an entry that depends on ``words``."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
