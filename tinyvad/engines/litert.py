"""The LiteRT engine: a .tflite file run by TFLite's own kernels; images in, the file's outputs out.

With the *reference* kernels (BUILTIN_REF) int8 results are, bit for bit, those of the exact engine and of TFLM on the
device, but for fully connected layers and for a few grids of mul, relu and logistic, which ``quantize`` does not choose
(``tinyvad.graph.agreement``). The *default* kernels (XNNPACK) are many times faster and round differently: most int8 values
of a tapped map differ from the device's, by up to about ten steps. Fit and score with the exact ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.agreement import logistic_agrees, mul_agrees, relu_agrees
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator, read_tflite

Kernels = Literal["reference", "default"]

# ai_edge_litert is the successor of tflite_runtime, whose last wheels need NumPy 1
_PACKAGES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")


class LitertEngine:
    """Runs a .tflite file with LiteRT (or tflite_runtime, where only that is installed).

    Args:
        model: the file's path or bytes.
        kernels: 'reference' (the device's rounding) or 'default' (fast, not exact).

    Raises:
        InputError: LiteRT is not installed, or cannot run the file.
    """

    name = "litert"

    def __init__(self, model: bytes | str | Path, kernels: Kernels = "reference") -> None:
        self.file = read_tflite(model)
        self.exact = kernels == "reference" and all(_is_exact(self.file, o) for o in self.file.operators)
        self._resolver = "BUILTIN_REF" if kernels == "reference" else "AUTO"
        self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._interpreter = self._start(keep_all=False)

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """The file's outputs, (n, h, w, c) each, for (n, H, W, C) images of the input's dtype.

        Raises:
            InputError: the images' shape or dtype is not the network's.
        """
        check_images(images, self.file)
        indices = [detail["index"] for detail in self._interpreter.get_output_details()]
        results = []
        for image in images:
            self._run(self._interpreter, image)
            results.append([self._interpreter.get_tensor(index)[0] for index in indices])
        return [np.stack(maps) for maps in zip(*results, strict=True)]

    def all_tensors(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Every activation, without its batch axis, by tensor name, of one (H, W, C) image, in the order of execution.

        For finding the first tensor that differs from another engine's. A name that the file repeats gets ``#index``.
        """
        check_images(image[np.newaxis], self.file)
        interpreter = self._start(keep_all=True)
        self._run(interpreter, image)
        values: dict[str, np.ndarray] = {}
        for index in [*self.file.inputs, *(o for operator in self.file.operators for o in operator.outputs)]:
            name = self.file.tensors[index].name
            values[f"{name}#{index}" if name in values else name] = interpreter.get_tensor(index)[0]
        return values

    def _start(self, keep_all: bool) -> Any:
        module = _litert()
        # the default kernels' delegate replaces whole chains of operators, whose tensors are then never made
        keeps = keep_all and self._resolver == "AUTO"
        resolver = "BUILTIN_WITHOUT_DEFAULT_DELEGATES" if keeps else self._resolver
        try:
            interpreter = module.Interpreter(
                model_content=self._model,
                num_threads=1,
                experimental_op_resolver_type=getattr(module.OpResolverType, resolver),
                experimental_preserve_all_tensors=keep_all,
            )
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"LiteRT cannot run {self.file.path_name}: {' '.join(str(error).split())}") from error
        return interpreter

    def _run(self, interpreter: Any, image: np.ndarray) -> None:
        interpreter.set_tensor(self.file.inputs[0], np.ascontiguousarray(image[np.newaxis]))
        interpreter.invoke()


def _is_exact(file: TfliteFile, operator: TfliteOperator) -> bool:
    """Do the reference kernels compute of one operator what TFLM computes, whatever the values?

    FULLY_CONNECTED rounds acc * (s_in * s_w / s_out) once, in double; TFLM twice, in fixed point. The others that may
    differ: ``tinyvad.graph.agreement``.
    """
    agrees: dict[str, Callable[..., bool]] = {"MUL": mul_agrees, "RELU": relu_agrees, "LOGISTIC": logistic_agrees}
    if operator.op not in agrees:
        return operator.op != "FULLY_CONNECTED"
    indices = operator.inputs if operator.op == "LOGISTIC" else (*operator.inputs, *operator.outputs)
    tensors = [file.tensors[index] for index in indices]
    grids = [tensor.quantization for tensor in tensors if tensor.dtype == "int8" and tensor.quantization is not None]
    return len(grids) == len(tensors) and agrees[operator.op](*grids)


def check_images(images: np.ndarray, file: TfliteFile) -> None:
    """Raise InputError unless ``images`` are (n, ...) of the file's one input."""
    if len(file.inputs) != 1:
        raise InputError(f"{file.path_name}: {len(file.inputs)} inputs; only networks with one image input can be used")
    tensor = file.tensors[file.inputs[0]]
    if images.shape[1:] != tensor.shape[1:] or images.dtype.name != tensor.dtype or len(images) == 0:
        raise InputError(
            f"{file.path_name} takes {tensor.dtype} images of {tensor.shape[1:]}, not {images.dtype} {images.shape}"
        )


def _litert() -> Any:
    for name in _PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InputError("the litert engine needs LiteRT, which is not installed: pip install 'tinyvad[litert]'")
