"""The float engine: an exported ``.onnx`` in onnxruntime, for speed on PCs and Jetsons, and for calibration.

Flows in: (n, H, W, 3) float32 normalised images. Flows out: one (n, h, w, c) float32 array a tapped tensor. The model's
own layout is NCHW (see ``tinyvad.export.onnx``). Each image runs on one thread, several at once: a result does not
depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.quantize import ChannelStatistics


class OnnxEngine:
    """Runs a float (or QDQ) model; see the module's text.

    Args:
        model: the ``.onnx`` file or its bytes.
        threads: images that run at once.

    Raises:
        InputError: onnxruntime is not installed, or does not accept the model.
    """

    name = "onnx"
    exact = False

    def __init__(self, model: bytes | str | Path, threads: int = 2) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError("the onnx engine needs onnxruntime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        source = model if isinstance(model, bytes) else str(model)
        what = "the model" if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise InputError(f"onnxruntime does not accept {what}: {' '.join(str(error).split())}") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            raise InputError(f"{what} must have one float32 image input (N, C, H, W)")
        self._input = inputs[0].name
        _, channels, height, width = inputs[0].shape
        self._expected = (height, width, channels)  # a name where the model leaves a size free
        self.outputs = [output.name for output in self._session.get_outputs()]
        self.threads = threads

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """Tapped float32 maps (n, h, w, c) of (n, H, W, 3) float32 normalised images, in the model's output order.

        Raises:
            InputError: the images' shape or dtype is not the network's, or there are none.
        """
        fits = images.ndim == 4 and all(
            wanted == size for wanted, size in zip(self._expected, images.shape[1:]) if isinstance(wanted, int)
        )
        if not fits or images.dtype != np.float32 or len(images) == 0:
            raise InputError(f"the network takes float32 images of {self._expected}, not {images.dtype} {images.shape}")
        with ThreadPoolExecutor(self.threads) as pool:
            results = list(pool.map(self._run, images))
        return [np.stack(maps) for maps in zip(*results, strict=True)]

    def _run(self, image: np.ndarray) -> list[np.ndarray]:
        outputs = self._session.run(None, {self._input: image.transpose(2, 0, 1)[None]})
        return [out[0].transpose(1, 2, 0) if out.ndim == 4 else out[0] for out in outputs]


def calibrate(engine: OnnxEngine, batches: Iterable[np.ndarray]) -> dict[str, ChannelStatistics]:
    """Per-channel minimum, maximum and mean of every output of ``engine`` over float32 batches (n, H, W, 3).

    The engine's model must name every activation as an output. Memory: one batch's activations.

    Raises:
        InputError: there was no image at all.
    """
    lows: dict[str, np.ndarray] = {}
    highs: dict[str, np.ndarray] = {}
    sums: dict[str, np.ndarray] = {}
    count = 0
    for batch in batches:
        count += len(batch)
        for name, values in zip(engine.outputs, engine.features(batch), strict=True):
            flat = values.reshape(len(batch), -1, values.shape[-1])  # (n, h*w, C)
            low, high, total = flat.min((0, 1)), flat.max((0, 1)), flat.mean(1, dtype=np.float64).sum(0)  # (C,) each
            lows[name] = np.minimum(lows.get(name, low), low)
            highs[name] = np.maximum(highs.get(name, high), high)
            sums[name] = sums.get(name, 0) + total
    if count == 0:
        raise InputError("calibration needs at least one good image")
    return {
        name: ChannelStatistics(lows[name].astype(np.float64), highs[name].astype(np.float64), sums[name] / count)
        for name in engine.outputs
    }
