"""What a Graph is made of, as operations that can be differentiated (autograd primitives with derivatives by hand).

Flows in: NumPy arrays, float32 to train and float64 to check, or values on the tape. Flows out: the same. Maps are
(n, H, W, C). Each derivative makes only what was asked for, and every one is checked against finite differences in
``tests/test_training_ops.py``. Convolutions are in ``convolutions``, batch norm in ``norms``, pools and
resizing in ``windows``; all names can be had here.

Each docstring says the function; the derivatives are the textbook's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvad.kernels import gradients as kernels
from tinyvad.training.blocks import run_blocks
from tinyvad.training.convolutions import conv2d, depthwise_conv2d, fully_connected
from tinyvad.training.norms import batch_norm_eval, batch_norm_train, limits, moments
from tinyvad.training.tape import differentiable, plain, value_and_gradients
from tinyvad.training.windows import average_pool, max_pool, pad, resize_bilinear, resize_nearest

__all__ = [
    "activate", "add", "average_pool", "batch_norm_eval", "batch_norm_train", "concat", "conv2d", "depthwise_conv2d",
    "fully_connected", "hard_swish", "leaky_relu", "logistic", "max_pool", "mean", "moments", "mul", "pad", "plain", "relu",
    "relu6", "reshape", "resize_bilinear", "resize_nearest", "stop_gradient", "value_and_gradients",
]  # fmt: skip

stop_gradient = plain


def _flat(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1)


def _clip_backward(
    argnums: tuple[int, ...], y: Any, _: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    low, high = limits(kwargs["activation"], y.dtype)

    def back(g: np.ndarray) -> tuple[Any, ...]:
        dx = np.empty(y.size, y.dtype)
        gradient, result = _flat(g), _flat(y)
        run_blocks(lambda i, j: kernels.clip_gradient(gradient, result, low, high, i, j, dx), dx.size, dx.size)
        return (dx.reshape(y.shape),)

    return back


@differentiable(_clip_backward)
def _clip(x: np.ndarray, *, activation: str) -> np.ndarray:
    return np.clip(x, *limits(activation, x.dtype))


def relu(x: Any) -> Any:
    """max(x, 0); slope 0 at 0."""
    return _clip(x, activation="relu")


def relu6(x: Any) -> Any:
    """min(max(x, 0), 6); slope 0 at 0 and 6."""
    return _clip(x, activation="relu6")


def activate(x: Any, activation: str) -> Any:
    """'none', 'relu' or 'relu6' of x.

    Raises:
        InputError: there is no such activation.
    """
    return x if activation == "none" else _clip(x, activation=activation)


def _leaky_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    positive = args[0] > 0  # a byte a value in place of the value
    return lambda g: (np.where(positive, g, g * g.dtype.type(kwargs["slope"])),)


@differentiable(_leaky_backward)
def _leaky(x: np.ndarray, *, slope: float) -> np.ndarray:
    return np.where(x > 0, x, x * x.dtype.type(slope))


def leaky_relu(x: Any, slope: float = 0.2) -> Any:
    """x where it is positive, slope * x elsewhere."""
    return _leaky(x, slope=slope)


def _hard_swish_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x = args[0]

    def back(g: np.ndarray) -> tuple[Any, ...]:
        dx = np.empty(x.size, x.dtype)
        gradient, values = _flat(g), _flat(x)
        run_blocks(lambda i, j: kernels.hard_swish_gradient(gradient, values, i, j, dx), dx.size, dx.size)
        return (dx.reshape(x.shape),)

    return back


@differentiable(_hard_swish_backward)
def hard_swish(x: np.ndarray) -> np.ndarray:
    """x * relu6(x + 3) / 6."""
    y = np.empty(x.size, x.dtype)
    values = _flat(x)
    run_blocks(lambda i, j: kernels.hard_swish(values, i, j, y), y.size, y.size)
    return y.reshape(x.shape)


@differentiable(lambda argnums, y, args, kwargs: lambda g: (g * y * (1 - y),))
def logistic(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow for any x."""
    small = np.exp(-np.abs(x))  # in (0, 1]
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(x.dtype, copy=False)


def _summed_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of an operand of ``shape`` that was broadcast to that of g."""
    extra = g.ndim - len(shape)
    axes = (*range(extra), *(i + extra for i, size in enumerate(shape) if size == 1 and g.shape[i + extra] != 1))
    return g.sum(axes).reshape(shape) if axes else g


def _add_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    shapes = tuple(np.shape(args[i]) for i in argnums)
    return lambda g: tuple(_summed_to(g, shape) for shape in shapes)


@differentiable(_add_backward)
def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y, broadcast."""
    return x + y


def _mul_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    shapes = tuple(np.shape(args[i]) for i in argnums)
    others = tuple(args[1 - i] for i in argnums)
    return lambda g: tuple(_summed_to(g * other, shape) for other, shape in zip(others, shapes, strict=True))


@differentiable(_mul_backward)
def mul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x * y, broadcast."""
    return x * y


def _mean_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    shape = args[0].shape
    return lambda g: (np.broadcast_to(g / g.dtype.type(shape[1] * shape[2]), shape),)


@differentiable(_mean_backward)
def mean(x: np.ndarray) -> np.ndarray:
    """Mean over height and width: (n, 1, 1, C)."""
    return x.mean((1, 2), keepdims=True, dtype=np.float64).astype(x.dtype)


def _concat_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    edges = np.cumsum([0, *(np.shape(x)[-1] for x in args)])
    return lambda g: tuple(g[..., edges[i] : edges[i + 1]] for i in argnums)


@differentiable(_concat_backward)
def concat(*maps: np.ndarray) -> np.ndarray:
    """Maps of equal size side by side along the channels."""
    return np.concatenate(maps, axis=-1)


def _reshape_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    shape = args[0].shape
    return lambda g: (np.reshape(g, shape),)


@differentiable(_reshape_backward)
def _reshape(x: np.ndarray, *, shape: tuple[int, ...]) -> np.ndarray:
    return np.reshape(x, shape)


def reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """The same values in another shape."""
    return _reshape(x, shape=tuple(shape))
