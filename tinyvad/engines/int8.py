"""The exact engine: a quantised Graph in NumPy and Numba, bit for bit what TFLite's reference kernels and TFLM compute.

Flows in: (n, H, W, 3) int8 network inputs. Flows out: one (n, h, w, c) int8 array a tapped tensor. The graph is the one
read back from the ``.tflite`` that ships. Source: TFLite's int8 quantisation specification and reference kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from tinyvad.errors import InputError
from tinyvad.graph.fixed_point import quantize_multiplier, quantize_multipliers
from tinyvad.graph.ir import Graph, Node, Quantization
from tinyvad.kernels import int8 as kernels

# float32 holds every integer below 2**24: longest sum of (int8 * int8) products that stays exact
EXACT_SUM_LENGTH = (1 << 24) // (128 * 128)

Step = Callable[[dict[str, np.ndarray]], np.ndarray]


class Int8Engine:
    """Runs a quantised graph exactly; see the module's text.

    Args:
        graph: int8 Graph (``quantize`` or ``import_tflite`` made it); its outputs are the tapped tensors.
        threads: images that run at once.

    Raises:
        InputError: an op or a tensor that the integer engine does not know, by name.
    """

    name = "int8"
    exact = True

    def __init__(self, graph: Graph, threads: int = 2) -> None:
        self.graph = graph
        self.threads = threads
        self._steps: list[tuple[str, Step, list[str]]] = []
        last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        for i, node in enumerate(graph.nodes):
            builder = _BUILDERS.get(node.op)
            if builder is None:
                raise InputError(f"the int8 engine has no {node.op} (tensor {node.output}); tap an earlier layer")
            dead = [
                n for n in set(node.inputs)
                if last_use[n] == i and n not in graph.constants and n not in graph.outputs
            ]  # fmt: skip
            self._steps.append((node.output, builder(graph, node), dead))

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """Tapped int8 maps of (n, H, W, 3) int8 images, in the order of the graph's outputs.

        Raises:
            InputError: the images' size is not the network's.
        """
        expected = self.graph.tensors[self.graph.inputs[0]].shape
        if images.shape[1:] != expected[1:] or images.dtype != np.int8:
            raise InputError(
                f"the network takes int8 images of {expected[1:]}, not {images.dtype} {images.shape[1:]}"
            )
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as pool:
            results = list(pool.map(self._run, images))
        return [np.stack(maps) for maps in zip(*results, strict=True)]

    def all_tensors(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Every activation of one (H, W, 3) int8 image by tensor name, to find the first that differs elsewhere."""
        values = {self.graph.inputs[0]: image}
        for output, step, _ in self._steps:
            values[output] = step(values)
        return values

    def _run(self, image: np.ndarray) -> list[np.ndarray]:
        values = {self.graph.inputs[0]: np.ascontiguousarray(image)}
        for output, step, dead in self._steps:
            values[output] = step(values)
            for name in dead:
                del values[name]
        return [values[name] for name in self.graph.outputs]


def activation_limits(node: Node, quantization: Quantization) -> tuple[int, int]:
    """Smallest and largest int8 value that the node's fused activation lets through."""
    scale, zero_point = np.float32(quantization.scale[0]), int(quantization.zero_point[0])
    activation = node.attributes.get("activation", "none")
    low, high = -128, 127
    if activation in ("relu", "relu6"):
        low = max(low, zero_point)
    if activation == "relu6":
        high = min(high, zero_point + int(np.floor(np.float32(6.0) / scale + np.float32(0.5))))
    return low, high


def _quantization(graph: Graph, name: str) -> Quantization:
    quantization = graph.tensors[name].quantization
    if quantization is None:
        raise InputError(f"graph {graph.name}: tensor {name} is not quantised; run quantize first")
    return quantization


def _geometry(node: Node) -> np.ndarray:
    top, _, left, _ = node.attributes["pads"]
    return np.array([*node.attributes["stride"], top, left, *node.attributes.get("dilation", (1, 1))], np.int64)


def _requantisation(graph: Graph, node: Node) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    """(multipliers (C,), shifts (C,), output zero point, low, high) of a conv, depthwise or fully connected node."""
    x, w, y = (_quantization(graph, name) for name in (node.inputs[0], node.inputs[1], node.output))
    channels = graph.tensors[node.output].shape[-1]
    factors = np.float64(x.scale[0]) * w.scale.astype(np.float64) / np.float64(y.scale[0])
    multipliers, shifts = quantize_multipliers(np.broadcast_to(factors, channels))
    return multipliers, shifts, int(y.zero_point[0]), *activation_limits(node, y)


def _matrix_step(graph: Graph, node: Node) -> Step:
    """conv2d and fully_connected: patches times weights in exact float32, then requantised."""
    name, w_name, b_name = node.inputs
    weights = graph.constants[w_name].astype(np.int64)  # (O, kh, kw, I) or (O, I)
    flat = weights.reshape(weights.shape[0], -1)  # (O, K)
    zero_point = int(_quantization(graph, name).zero_point[0])
    bias = graph.constants[b_name].astype(np.int64) - zero_point * flat.sum(1)  # (O,)
    matrix = np.ascontiguousarray(flat.T.astype(np.float32))  # (K, O)
    multipliers, shifts, out_zero, low, high = _requantisation(graph, node)
    out_shape = graph.tensors[node.output].shape[1:]
    is_pointwise = node.op == "fully_connected" or (
        weights.shape[1:3] == (1, 1) and node.attributes["stride"] == (1, 1) and node.attributes["pads"] == (0, 0, 0, 0)
    )
    geometry = None if is_pointwise else _geometry(node)

    def step(values: dict[str, np.ndarray]) -> np.ndarray:
        x = values[name]
        if geometry is None:
            rows = x.reshape(-1, matrix.shape[0]).astype(np.float32)  # (R, K)
        else:
            rows = np.empty((out_shape[0] * out_shape[1], matrix.shape[0]), np.float32)
            kernels.patches(x, *weights.shape[1:3], geometry, *out_shape[:2], zero_point, rows)
        out = np.empty((rows.shape[0], matrix.shape[1]), np.int8)
        if matrix.shape[0] <= EXACT_SUM_LENGTH:
            acc = rows @ matrix  # (R, O) float32, exact integers
        else:
            blocks = range(0, matrix.shape[0], EXACT_SUM_LENGTH)
            acc = sum(
                (rows[:, k : k + EXACT_SUM_LENGTH] @ matrix[k : k + EXACT_SUM_LENGTH]).astype(np.float64) for k in blocks
            )
        kernels.requantize(acc, bias, multipliers, shifts, out_zero, low, high, out)
        return out.reshape(out_shape)

    return step


def _depthwise_step(graph: Graph, node: Node) -> Step:
    name, w_name, b_name = node.inputs
    weights = graph.constants[w_name][0].astype(np.float32)  # (kh, kw, C)
    zero_point = np.float32(_quantization(graph, name).zero_point[0])
    if weights.shape[0] * weights.shape[1] > EXACT_SUM_LENGTH // 2:
        raise InputError(f"depthwise_conv2d -> {node.output}: kernels over 512 values are not exact here")
    bias = graph.constants[b_name].astype(np.int64)
    multipliers, shifts, out_zero, low, high = _requantisation(graph, node)
    geometry, out_shape = _geometry(node), graph.tensors[node.output].shape[1:]

    def step(values: dict[str, np.ndarray]) -> np.ndarray:
        x = np.subtract(values[name], zero_point, dtype=np.float32)
        out = np.empty(out_shape, np.int8)
        kernels.depthwise_conv(x, weights, bias, multipliers, shifts, geometry, out_zero, low, high, out)
        return out

    return step


def _add_step(graph: Graph, node: Node) -> Step:
    a, b, y = (_quantization(graph, name) for name in (*node.inputs, node.output))
    twice_max = 2.0 * max(float(a.scale[0]), float(b.scale[0]))
    a_mult, a_shift = quantize_multiplier(float(a.scale[0]) / twice_max)
    b_mult, b_shift = quantize_multiplier(float(b.scale[0]) / twice_max)
    out_mult, out_shift = quantize_multiplier(twice_max / ((1 << 20) * float(y.scale[0])))
    constants = (
        int(a.zero_point[0]), int(b.zero_point[0]), a_mult, a_shift, b_mult, b_shift,
        out_mult, out_shift, int(y.zero_point[0]), *activation_limits(node, y),
    )  # fmt: skip

    def step(values: dict[str, np.ndarray]) -> np.ndarray:
        left, right = values[node.inputs[0]], values[node.inputs[1]]
        out = np.empty(left.shape, np.int8)
        kernels.add(left.ravel(), right.ravel(), *constants, out.ravel())
        return out

    return step


def _pool_step(is_max: bool, graph: Graph, node: Node) -> Step:
    out_shape = graph.tensors[node.output].shape[1:]
    geometry = _geometry(node)
    low, high = activation_limits(node, _quantization(graph, node.output))
    _same_scale(graph, node)
    if not is_max and node.attributes.get("count_include_pad") and any(node.attributes["pads"]):
        raise InputError(f"average_pool -> {node.output}: padding that counts is a separate pad op in int8")

    def step(values: dict[str, np.ndarray]) -> np.ndarray:
        out = np.empty(out_shape, np.int8)
        kernels.pool(values[node.inputs[0]], *node.attributes["kernel"], geometry, is_max, low, high, out)
        return out

    return step


def _same_scale(graph: Graph, node: Node) -> None:
    out = _quantization(graph, node.output)
    for name in node.inputs:
        q = graph.tensors[name].quantization
        if q is None or q.scale[0] != out.scale[0] or q.zero_point[0] != out.zero_point[0]:
            raise InputError(f"{node.op} -> {node.output}: {name} must have the output's scale and zero point")


def _pad_step(graph: Graph, node: Node) -> Step:
    top, bottom, left, right = node.attributes["pads"]
    value = int(_quantization(graph, node.output).zero_point[0])
    _same_scale(graph, node)
    widths = ((top, bottom), (left, right), (0, 0))
    return lambda values: np.pad(values[node.inputs[0]], widths, constant_values=value)


def _concat_step(graph: Graph, node: Node) -> Step:
    _same_scale(graph, node)
    return lambda values: np.concatenate([values[name] for name in node.inputs], axis=-1)


def _reshape_step(graph: Graph, node: Node) -> Step:
    shape = graph.tensors[node.output].shape[1:]
    return lambda values: values[node.inputs[0]].reshape(shape)


def _resize_step(graph: Graph, node: Node) -> Step:
    _, height, width, _ = graph.tensors[node.inputs[0]].shape
    out_h, out_w = node.attributes["size"]
    rows, columns = np.arange(out_h) * height // out_h, np.arange(out_w) * width // out_w
    _same_scale(graph, node)
    return lambda values: np.ascontiguousarray(values[node.inputs[0]][rows][:, columns])


_BUILDERS: dict[str, Callable[[Graph, Node], Step]] = {
    "conv2d": _matrix_step,
    "fully_connected": _matrix_step,
    "depthwise_conv2d": _depthwise_step,
    "add": _add_step,
    "average_pool": partial(_pool_step, False),
    "max_pool": partial(_pool_step, True),
    "pad": _pad_step,
    "concat": _concat_step,
    "reshape": _reshape_step,
    "resize_nearest": _resize_step,
}
