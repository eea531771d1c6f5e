"""Engines run a backbone: quantised images in, the tapped maps out. One protocol, so that they can be compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np

from tinyvad.errors import InputError


class Engine(Protocol):
    """What every engine offers.

    Attributes:
        name: 'int8', 'onnx', 'litert' or 'tflm'.
        exact: True if its tapped int8 tensors are those of the device, bit for bit.
    """

    name: str
    exact: bool

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """The tapped maps of some images.

        Args:
            images: (n, H, W, 3), int8 network input for the exact engines.

        Returns:
            One (n, h, w, c) array a tapped tensor, in the order of the network's outputs.

        Raises:
            InputError: the images' shape or dtype is not the network's.
        """
        ...


ENGINES = ("int8", "onnx", "litert", "tflm")


def open_engine(name: str, build: Path) -> Engine:
    """The engine of that name over a build's backbone.

    Raises:
        InputError: no engine of that name, it is not installed, or it can't run the file.
    """
    if name == "int8":
        from tinyvad.engines.int8 import Int8Engine
        from tinyvad.graph.tflite_import import import_tflite

        return Int8Engine(import_tflite(build / "backbone.tflite"), threads())
    if name == "onnx":
        from tinyvad.engines.onnx import OnnxEngine

        return OnnxEngine(build / "backbone.onnx", threads())
    if name == "litert":
        from tinyvad.engines.litert import LitertEngine

        return LitertEngine(build / "backbone.tflite")
    if name == "tflm":
        from tinyvad.engines.tflm import TflmEngine

        return TflmEngine(build / "backbone.tflite")
    raise InputError(f"no engine called {name}; choose one of {', '.join(ENGINES)}")


def threads() -> int:
    """Images that run at once: the cores that this process may use, at most eight; no result depends on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 8))
