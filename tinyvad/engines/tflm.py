"""The TFLM engine: a .tflite file run by TensorFlow Lite Micro's own interpreter; int8 images in, the outputs out.

It is the code that runs on the microcontroller, built for this PC, and so the oracle of every exact engine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.engines.litert import check_images
from tinyvad.errors import InputError
from tinyvad.graph.tflite_file import TfliteFile, read_tflite

LARGEST_ARENA = 1 << 30


class TflmEngine:
    """Runs a .tflite file with the ``tflite-micro`` package.

    Args:
        model: the file's path or bytes.
        arena_bytes: arena of the interpreter; more than enough by default (it is not the device's).

    Raises:
        InputError: tflite-micro is not installed, or cannot run the file.
    """

    name = "tflm"
    exact = True

    def __init__(self, model: bytes | str | Path, arena_bytes: int | None = None) -> None:
        self.file = read_tflite(model)
        self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
        runtime = _runtime()
        arena = ample_arena(self.file) if arena_bytes is None else arena_bytes
        try:
            self._interpreter = runtime.Interpreter.from_bytes(self._model, arena_size=arena)
        except RuntimeError as error:
            raise InputError(
                f"TFLM cannot run {self.file.path_name} in an arena of {arena} bytes: {' '.join(str(error).split())}"
            ) from error

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """The file's outputs, (n, h, w, c) each, for (n, H, W, C) images of the input's dtype.

        Raises:
            InputError: the images' shape or dtype is not the network's.
        """
        check_images(images, self.file)
        results = []
        for image in images:
            self._interpreter.set_input(np.ascontiguousarray(image[np.newaxis]), 0)
            self._interpreter.invoke()
            results.append([self._interpreter.get_output(i)[0] for i in range(len(self.file.outputs))])
        return [np.stack(maps) for maps in zip(*results, strict=True)]


def ample_arena(file: TfliteFile) -> int:
    """Bytes that surely hold every activation at once, the interpreter's structures and its tables a channel."""
    activations = sum(4 * math.prod(t.shape) + 64 for t in file.tensors if t.data is None)
    structures = 1024 * (len(file.tensors) + len(file.operators))
    arena = activations + structures + 2 * file.size + (1 << 20)
    if arena > LARGEST_ARENA:
        raise InputError(f"{file.path_name} needs an arena of about {arena >> 20} MiB; TFLM is for smaller networks")
    return arena


def _runtime() -> Any:
    try:
        from tflite_micro import runtime
    except ImportError as error:
        raise InputError("the tflm engine needs TFLM, which is not installed: pip install 'tinyvad[sim]'") from error
    return runtime
