"""Batch norm with the ReLU or ReLU6 behind it in one pass, while training and afterwards.

Flows in: (..., C) float32 or float64, scale and offset (C,). Flows out: the same shape and type. The moments of a batch
are made in blocks of rows and put together by Chan, Golub and LeVeque's rule in float64: no sum loses the small distance
of values that lie far from zero, and none depends on the number of threads.

Source: Ioffe and Szegedy 2015, algorithm 1; variances of the running statistics are unbiased, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.kernels import gradients as kernels
from tinyvad.training.blocks import block_rows, run_blocks
from tinyvad.training.network import EPSILON
from tinyvad.training.tape import differentiable, plain

LIMITS = {"none": (-np.inf, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0)}


def limits(activation: str, dtype: Any) -> tuple[Any, Any]:
    """Lowest and highest value that ``activation`` lets through, of type ``dtype``.

    Raises:
        InputError: there is no such activation.
    """
    if activation not in LIMITS:
        raise InputError(f"activation '{activation}' is unknown to training; use {', '.join(LIMITS)}")
    low, high = LIMITS[activation]
    return dtype.type(low), dtype.type(high)


def moments(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (biased) variance of every channel, (C,) float64 each; off the tape.

    ``batch_norm_train`` knows how they depend on x.
    """
    rows = _rows(plain(x))
    count, channels = rows.shape
    step = block_rows(count, channels)
    blocks = -(-count // step)
    means, squares = np.empty((blocks, channels), rows.dtype), np.empty((blocks, channels), rows.dtype)
    run_blocks(lambda first, last: kernels.moments(rows, step, first, last, means, squares), blocks, rows.size)
    sizes = np.minimum(step, count - step * np.arange(blocks)).astype(np.float64)[:, None]  # (blocks, 1)
    mean = (means * sizes).sum(0) / count
    variance = (squares.sum(0, dtype=np.float64) + (sizes * (means - mean) ** 2).sum(0)) / count
    return mean, variance


def batch_norm_train(
    x: Any, scale: Any, offset: Any, activation: str = "none", of_batch: tuple[np.ndarray, np.ndarray] | None = None
) -> Any:
    """activation(scale * (x - mean) / sqrt(variance + EPSILON) + offset) with the moments of x itself.

    Args:
        x: (..., C). scale, offset: (C,).
        activation: 'none', 'relu' or 'relu6'.
        of_batch: ``moments(x)`` where they are needed elsewhere too; worked out if not given.
    """
    mean, variance = moments(x) if of_batch is None else of_batch
    return _batch_norm(x, scale, offset, mean, variance, activation=activation, moving=True)


def batch_norm_eval(
    x: Any, scale: Any, offset: Any, mean: np.ndarray, variance: np.ndarray, activation: str = "none"
) -> Any:
    """``batch_norm_train`` with moments that do not depend on x, (C,) each."""
    return _batch_norm(x, scale, offset, mean, variance, activation=activation, moving=False)


def _rows(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def _affine(
    scale: np.ndarray, offset: np.ndarray, mean: np.ndarray, variance: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 / deviation (C,) float64; factor and summand (C,) of ``dtype`` that do the whole norm."""
    inverse = 1.0 / np.sqrt(variance.astype(np.float64) + EPSILON)
    factor = scale * inverse
    return inverse, factor.astype(dtype), (offset - mean * factor).astype(dtype)


def _batch_norm_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x, scale, offset, mean, variance = args
    low, high = limits(kwargs["activation"], x.dtype)
    inverse, factor, summand = _affine(scale, offset, mean, variance, x.dtype)
    centre = mean.astype(x.dtype)

    def back(g: np.ndarray) -> tuple[Any, ...]:
        rows, gradient = _rows(x), _rows(g)
        count, channels = rows.shape
        step = block_rows(count, channels)
        blocks = -(-count // step)
        sums, products = np.empty((blocks, channels), x.dtype), np.empty((blocks, channels), x.dtype)

        def add_up(first: int, last: int) -> None:
            kernels.norm_sums(gradient, rows, factor, summand, centre, low, high, step, first, last, sums, products)

        run_blocks(add_up, blocks, rows.size)
        total = sums.sum(0, dtype=np.float64)  # of d, the gradient behind the activation
        product = products.sum(0, dtype=np.float64) * inverse  # of d times the normalised value
        makers: dict[int, Callable[[], Any]] = {
            0: lambda: of_input(rows, gradient, total, product),
            1: lambda: product.astype(scale.dtype),
            2: lambda: total.astype(offset.dtype),
        }
        return tuple(makers[i]() for i in argnums)

    def of_input(rows: np.ndarray, gradient: np.ndarray, total: np.ndarray, product: np.ndarray) -> np.ndarray:
        """factor * (d - mean of d - normalised * mean of (d * normalised)); only factor * d with fixed moments."""
        slope = factor * (product / len(rows)) * inverse if kwargs["moving"] else np.zeros(len(factor))
        shift = factor * (total / len(rows)) - mean * slope if kwargs["moving"] else slope
        slope, shift = slope.astype(rows.dtype), shift.astype(rows.dtype)
        dx = np.empty(rows.shape, rows.dtype)

        def fill(first: int, last: int) -> None:
            kernels.norm_gradient(gradient, rows, factor, summand, slope, shift, low, high, first, last, dx)

        run_blocks(fill, len(rows), rows.size)
        return dx.reshape(x.shape)

    return back


@differentiable(_batch_norm_backward)
def _batch_norm(
    x: np.ndarray, scale: np.ndarray, offset: np.ndarray, mean: np.ndarray, variance: np.ndarray, *,
    activation: str, moving: bool,
) -> np.ndarray:  # fmt: skip
    low, high = limits(activation, x.dtype)
    _, factor, summand = _affine(scale, offset, mean, variance, x.dtype)
    rows = _rows(x)
    y = np.empty(rows.shape, rows.dtype)
    run_blocks(lambda i, j: kernels.scale_clip(rows, factor, summand, low, high, i, j, y), len(rows), rows.size)
    return y.reshape(x.shape)
