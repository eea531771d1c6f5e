"""The exact engine: a quantised Graph in NumPy and Numba, bit for bit what TFLite's reference kernels and TFLM compute.

Flows in: (n, H, W, C) int8 network inputs. Flows out: one (n, h, w, c) int8 array a tapped tensor. The graph is the one
read back from the ``.tflite`` that ships. What each op computes stands in ``tinyvad.engines.int8_steps``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import ThreadpoolController

from tinyvad.engines.int8_steps import Step, make_step
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph


class Int8Engine:
    """Runs a quantised graph exactly; see the module's text.

    Args:
        graph: int8 Graph (``quantize`` or ``import_tflite`` made it); its outputs are the tapped tensors.
        threads: images that run at once; no result depends on it.

    Raises:
        InputError: an op or a tensor that the integer engine does not know, or sums that can leave 32 bits, by name.
    """

    name = "int8"
    exact = True

    def __init__(self, graph: Graph, threads: int = 2) -> None:
        self.graph = graph
        self.threads = threads
        self._blas = ThreadpoolController()  # finding the libraries takes a millisecond: once, not at every call
        self._steps: list[tuple[str, Step, list[str]]] = []
        last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        for i, node in enumerate(graph.nodes):
            dead = [
                name for name in dict.fromkeys(node.inputs)
                if last_use[name] == i and name not in graph.constants and name not in graph.outputs
            ]  # fmt: skip
            self._steps.append((node.output, make_step(graph, node), dead))

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """Tapped int8 maps of (n, H, W, C) int8 images, in the order of the graph's outputs.

        Raises:
            InputError: the images' shape or dtype is not the network's, or there are none.
        """
        self._check(images)
        with self._blas.limit(limits=1, user_api="blas"):
            if self.threads > 1 and len(images) > 1:
                with ThreadPoolExecutor(self.threads) as pool:
                    results = list(pool.map(self._run, images))
            else:
                results = [self._run(image) for image in images]
        return [np.stack(maps) for maps in zip(*results, strict=True)]

    def all_tensors(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Every activation of one (H, W, C) int8 image by tensor name, to find the first that differs elsewhere."""
        self._check(image[np.newaxis])
        values = {self.graph.inputs[0]: np.ascontiguousarray(image)}
        for output, step, _ in self._steps:
            values[output] = step(values)
        return values

    def _check(self, images: np.ndarray) -> None:
        expected = self.graph.tensors[self.graph.inputs[0]].shape
        if images.shape[1:] != expected[1:] or images.dtype != np.int8 or len(images) == 0:
            raise InputError(f"the network takes int8 images of {expected[1:]}, not {images.dtype} {images.shape}")

    def _run(self, image: np.ndarray) -> list[np.ndarray]:
        values = {self.graph.inputs[0]: np.ascontiguousarray(image)}
        for output, step, dead in self._steps:
            values[output] = step(values)
            for name in dead:
                del values[name]
        return [values[name] for name in self.graph.outputs]
