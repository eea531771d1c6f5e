"""Cached features: the int8 maps of a network that was calibrated on a stream's first products, made once for all cells.

Flows in: a backbone, an input size, the good images of the first step, and the images to run. Flows out: a ``Network`` and
tapped maps on disk, memory-mapped. As in a build the network is quantised on the first products' good images alone.

An entry's name is the hash of all that it depends on: the network's bytes, input table and size, and each image's path
below the data folder, length, time of change and alteration. Entries are written under another name and renamed, so that
they are whole or absent; a lock spares two processes the same work, but nothing depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyvad.backbones.source import Backbone, open_backbone
from tinyvad.calibration import CALIBRATION_IMAGES, quantize_on
from tinyvad.engines import threads
from tinyvad.engines.int8 import Int8Engine
from tinyvad.export.onnx import to_onnx
from tinyvad.export.tflite import to_tflite
from tinyvad.fitting import TapStore
from tinyvad.graph.ir import Tensor
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Preprocessing, apply_table, input_table, load_images
from tinyvad.model import batches
from tinyvad.version import __version__


@dataclass(frozen=True)
class Picture:
    """One image of a stream: a file, and what is done to it first.

    Attributes:
        path: the file. name: its path below the data folder, for keys.
        alteration: what ``alter`` does, in words that tell all of it; '' for nothing.
        alter: (H, W, 3) uint8 -> the same, at the network's size; None for nothing.
    """

    path: Path
    name: str
    alteration: str = ""
    alter: Callable[[np.ndarray], np.ndarray] | None = None

    def identity(self) -> str:
        """What tells it from any other image: name, bytes, time of change, alteration."""
        facts = self.path.stat()
        return f"{self.name}:{facts.st_size}:{facts.st_mtime_ns}:{self.alteration}"


@dataclass(frozen=True, eq=False)
class Network:
    """An int8 network, ready to run.

    Attributes:
        preprocessing: of its images. table: (3, 256) int8, its input of every pixel value.
        tensors: the tapped tensors. key: hash of its bytes and its input table.
    """

    preprocessing: Preprocessing
    table: np.ndarray
    engine: Int8Engine
    tensors: list[Tensor]
    key: str


class CachedTaps(TapStore):
    """Tapped maps in a file of the cache, mapped when they are read."""

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self.shapes = [tensor.shape[1:] for tensor in tensors]
        self._sizes = [int(np.prod(shape)) for shape in self.shapes]
        self._file = path.open("rb")
        self.count = path.stat().st_size // sum(self._sizes)


@lru_cache(maxsize=4)
def open_network(name: str, size: int, good: tuple[Picture, ...], cache: Path) -> Network:
    """The network quantised on up to ``CALIBRATION_IMAGES`` of the first step's good images, evenly chosen.

    Raises:
        InputError: no such backbone, or an image can't be read.
    """
    backbone = _backbone(name)
    preprocessing = Preprocessing(size, size, backbone.mean, backbone.std)
    graph = backbone.graph_at(size)
    chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(CALIBRATION_IMAGES, len(good))).round().astype(int)]
    floats = hashlib.sha256(to_onnx(graph).SerializeToString()).hexdigest()
    key = _hash("network", __version__, floats, repr(preprocessing), *(picture.identity() for picture in chosen))

    def write(file: BinaryIO) -> None:
        images = (image for image in _images(chosen, preprocessing))
        file.write(to_tflite(quantize_on(graph, preprocessing, images).graph))

    data = cached(cache / f"{key}.tflite", write).read_bytes()
    quantized = import_tflite(data)
    first = quantized.tensors[quantized.inputs[0]].quantization
    assert first is not None  # to_tflite has written it
    table = input_table(preprocessing.mean, preprocessing.std, float(first.scale[0]), int(first.zero_point[0]))
    engine = Int8Engine(quantized, threads())
    tensors = [quantized.tensors[output] for output in quantized.outputs]
    digest = _hash("int8", str(size), hashlib.sha256(data).hexdigest(), hashlib.sha256(table.tobytes()).hexdigest())
    return Network(preprocessing, table, engine, tensors, digest)


def open_taps(network: Network, pictures: Sequence[Picture], cache: Path) -> CachedTaps:
    """The tapped maps of some images in their order, from the cache or made now.

    Raises:
        InputError: an image can't be read.
    """

    def write(file: BinaryIO) -> None:
        for images in batches(_images(pictures, network.preprocessing)):
            maps = network.engine.features(apply_table(np.stack(images), network.table))
            file.write(np.concatenate([m.reshape(len(images), -1) for m in maps], axis=1).tobytes())

    key = _hash("taps", network.key, *(picture.identity() for picture in pictures))
    return CachedTaps(cached(cache / f"{key}.taps", write), network.tensors)


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


def _images(pictures: Sequence[Picture], preprocessing: Preprocessing) -> Iterator[np.ndarray]:
    """(S, S, 3) uint8 images in their order, altered."""
    loaded = load_images([picture.path for picture in pictures], preprocessing)
    for picture, (_, image) in zip(pictures, loaded, strict=True):
        yield image if picture.alter is None else picture.alter(image)


@lru_cache(maxsize=4)
def _backbone(name: str) -> Backbone:
    return open_backbone(name)


def _hash(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
