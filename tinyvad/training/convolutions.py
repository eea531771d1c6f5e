"""Convolutions that can be differentiated: dense ones as matrix products, depthwise ones in sixteen channels at a time.

Flows in: maps (n, H, W, I) float32 or float64 and weights in the Graph's layout. Flows out: maps in the same type. The
way back makes only the gradients that somebody asked for: a frozen input or frozen weights cost nothing. Results do not
depend on the number of threads (``tinyvad.training.blocks``).

Source: the definition; the derivative by the input is the correlation of the gradient with the turned weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvad.graph.shapes import window_size
from tinyvad.kernels.gradients_depthwise import depthwise, depthwise_weights
from tinyvad.kernels.gradients_windows import add_patches, patches
from tinyvad.kernels.lanes import LANES
from tinyvad.training.blocks import TAP, multiply_back, multiply_rows, one_blas_thread, run_blocks
from tinyvad.training.tape import differentiable

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]
NO_PADS = (0, 0, 0, 0)


def _linear_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x, weights = (args[i] if 1 - i in argnums else None for i in (0, 1))  # each is what the other's gradient needs

    def back(g: np.ndarray) -> tuple[Any, ...]:
        dx, dw = multiply_back(g, x, weights)
        return tuple((dx, dw, g.sum(0) if i == 2 else None)[i] for i in argnums)

    return back


@differentiable(_linear_backward)
def fully_connected(x: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """(n, I) times weights (O, I), plus bias (O,) if there is one -> (n, O)."""
    out = multiply_rows(x, weights.T)
    if bias is not None:
        out += bias
    return out


def conv2d(
    x: Any, weights: Any, bias: Any = None, *, stride: Pair = (1, 1), pads: Pads = NO_PADS, dilation: Pair = (1, 1)
) -> Any:
    """2-D convolution (cross-correlation).

    Args:
        x: (n, H, W, I). weights: (O, kh, kw, I). bias: (O,) or None.
        stride, dilation: (vertical, horizontal). pads: rows and columns of zeros (top, bottom, left, right).

    Returns:
        (n, Ho, Wo, O).
    """
    arguments = (x, weights) if bias is None else (x, weights, bias)
    if weights.shape[1:3] == (1, 1) and tuple(pads) == NO_PADS:
        return _pointwise(*arguments, stride=tuple(stride))
    return _windowed(*arguments, stride=tuple(stride), pads=tuple(pads), dilation=tuple(dilation))


def _pointwise_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x, weights = args[:2]
    stride_h, stride_w = kwargs["stride"]
    shape, dtype = x.shape, x.dtype
    rows = _thinned(x, stride_h, stride_w) if 1 in argnums else None  # (R, I): what the weights' gradient needs
    matrix = weights.reshape(len(weights), -1) if 0 in argnums else None
    of_weights = weights.shape
    del x, args, weights

    def placed(dx: np.ndarray) -> np.ndarray:
        if (stride_h, stride_w) == (1, 1):
            return dx.reshape(shape)
        out = np.zeros(shape, dtype)
        part = out[:, ::stride_h, ::stride_w]
        part[:] = dx.reshape(part.shape)
        return out

    def back(g: np.ndarray) -> tuple[Any, ...]:
        g = np.ascontiguousarray(g).reshape(-1, g.shape[-1])
        dx, dw = multiply_back(g, rows, matrix)
        makers: dict[int, Callable[[], Any]] = {
            0: lambda: placed(dx),  # type: ignore[arg-type]
            1: lambda: dw.reshape(of_weights),  # type: ignore[union-attr]
            2: lambda: g.sum(0),
        }
        return tuple(makers[i]() for i in argnums)

    return back


def _thinned(x: np.ndarray, stride_h: int, stride_w: int) -> np.ndarray:
    """(R, C): the positions that a 1x1 convolution reads; no copy at stride 1."""
    return np.ascontiguousarray(x[:, ::stride_h, ::stride_w]).reshape(-1, x.shape[-1])


@differentiable(_pointwise_backward)
def _pointwise(x: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None, *, stride: Pair) -> np.ndarray:
    outputs = len(weights)
    out = multiply_rows(_thinned(x, *stride), weights.reshape(outputs, -1).T)  # (R, O)
    if bias is not None:
        out += bias
    return out.reshape(len(x), -(-x.shape[1] // stride[0]), -(-x.shape[2] // stride[1]), outputs)


def _geometry(kernel: Pair, stride: Pair, pads: Pads, dilation: Pair) -> np.ndarray:
    """(8,) int64 as ``tinyvad.kernels.gradients_windows`` wants it."""
    return np.array([*kernel, *stride, pads[0], pads[2], *dilation], np.int64)


def _out_size(shape: tuple[int, ...], kernel: Pair, stride: Pair, pads: Pads, dilation: Pair) -> Pair:
    return (
        window_size(shape[1], kernel[0], stride[0], pads[0], pads[1], dilation[0]),
        window_size(shape[2], kernel[1], stride[1], pads[2], pads[3], dilation[1]),
    )


def _windowed_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x, weights = args[:2]
    shape, dtype = x.shape, x.dtype
    source = np.ascontiguousarray(x) if 1 in argnums else None
    geometry = _geometry(weights.shape[1:3], kwargs["stride"], kwargs["pads"], kwargs["dilation"])
    matrix = weights.reshape(len(weights), -1)  # (O, window)
    del x, args

    def back(g: np.ndarray) -> tuple[Any, ...]:
        g = np.ascontiguousarray(g)
        images, height, width, outputs = g.shape
        dx = np.zeros(shape, dtype) if 0 in argnums else None
        parts = np.empty((images, *matrix.shape), dtype) if source is not None else None

        def work(first: int, last: int) -> None:
            rows = np.empty((height * width, matrix.shape[1]), dtype)
            for image in range(first, last):
                gradient = g[image].reshape(-1, outputs)  # (P, O)
                if parts is not None and source is not None:
                    patches(source[image], geometry, height, width, rows)
                    np.matmul(gradient.T, rows, out=parts[image])
                if dx is not None:
                    np.matmul(gradient, matrix, out=rows)
                    add_patches(rows, geometry, height, width, dx[image])

        if 0 in argnums or 1 in argnums:
            with one_blas_thread():
                run_blocks(work, images, g.size * matrix.shape[1])
        makers: dict[int, Callable[[], Any]] = {
            0: lambda: dx,
            1: lambda: parts.sum(0).reshape(weights.shape),  # type: ignore[union-attr]
            2: lambda: g.reshape(-1, outputs).sum(0),
        }
        return tuple(makers[i]() for i in argnums)

    return back


@differentiable(_windowed_backward)
def _windowed(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None, *, stride: Pair, pads: Pads, dilation: Pair
) -> np.ndarray:
    x = np.ascontiguousarray(x)
    kernel = weights.shape[1:3]
    height, width = _out_size(x.shape, kernel, stride, pads, dilation)
    geometry = _geometry(kernel, stride, pads, dilation)
    matrix = weights.reshape(len(weights), -1).T  # (window, O)
    out = np.empty((len(x), height, width, len(weights)), x.dtype)

    def work(first: int, last: int) -> None:
        rows = np.empty((height * width, len(matrix)), x.dtype)
        for image in range(first, last):
            patches(x[image], geometry, height, width, rows)
            np.matmul(rows, matrix, out=out[image].reshape(-1, out.shape[-1]))

    with one_blas_thread():
        run_blocks(work, len(x), out.size * len(matrix))
    if bias is not None:
        out += bias
    return out


def depthwise_conv2d(
    x: Any, weights: Any, bias: Any = None, *, stride: Pair = (1, 1), pads: Pads = NO_PADS, dilation: Pair = (1, 1)
) -> Any:
    """Each channel convolved with a kernel of its own.

    Args:
        x: (n, H, W, C). weights: (1, kh, kw, C). bias: (C,) or None. stride, pads, dilation: as ``conv2d``.

    Returns:
        (n, Ho, Wo, C).
    """
    arguments = (x, weights) if bias is None else (x, weights, bias)
    return _depthwise(*arguments, stride=tuple(stride), pads=tuple(pads), dilation=tuple(dilation))


def _depthwise_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    x, weights = args[:2]
    stride, pads, dilation = kwargs["stride"], kwargs["pads"], kwargs["dilation"]
    shape = x.shape
    source = np.ascontiguousarray(x) if 1 in argnums else None
    _, kernel_h, kernel_w, channels = weights.shape
    turned = _in_groups(weights[0, ::-1, ::-1].astype(x.dtype, copy=False))
    del x, args

    def back(g: np.ndarray) -> tuple[Any, ...]:
        g = np.ascontiguousarray(g)
        groups = -(-channels // LANES)
        parts = np.empty((shape[0], groups, kernel_h, kernel_w, LANES), g.dtype)
        dx = np.empty(shape, g.dtype) if 0 in argnums else None
        # by the input: the gradient, spread out by the stride, convolved with the weights turned round
        corner = (dilation[0] * (kernel_h - 1) - pads[0], dilation[1] * (kernel_w - 1) - pads[2])
        kernel, flat = (kernel_h, kernel_w), parts.reshape(-1)

        def work(first: int, last: int) -> None:
            if source is not None:
                depthwise_weights(g, source, kernel, stride, dilation, (pads[0], pads[2]), first, last, flat)
            if dx is not None:
                depthwise(g, turned, kernel, (1, 1), dilation, stride, corner, first, last, dx)

        if dx is not None or source is not None:
            run_blocks(work, shape[0] * groups, g.size * kernel_h * kernel_w * TAP * 2)
        makers = {0: lambda: dx, 1: lambda: _from_groups(parts.sum(0), channels), 2: lambda: g.reshape(-1, channels).sum(0)}
        return tuple(makers[i]() for i in argnums)

    return back


def _in_groups(weights: np.ndarray) -> np.ndarray:
    """(kh, kw, C) -> flat (groups, kh, kw, 16), zeros where there is no channel."""
    kernel_h, kernel_w, channels = weights.shape
    groups = -(-channels // LANES)
    wide = np.zeros((kernel_h, kernel_w, groups * LANES), weights.dtype)
    wide[..., :channels] = weights
    return np.ascontiguousarray(wide.reshape(kernel_h, kernel_w, groups, LANES).transpose(2, 0, 1, 3)).reshape(-1)


def _from_groups(grouped: np.ndarray, channels: int) -> np.ndarray:
    """(groups, kh, kw, 16) -> (1, kh, kw, channels)."""
    _, kernel_h, kernel_w, _ = grouped.shape
    wide = grouped.transpose(1, 2, 0, 3).reshape(1, kernel_h, kernel_w, -1)
    return np.ascontiguousarray(wide[..., :channels])


@differentiable(_depthwise_backward)
def _depthwise(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None, *, stride: Pair, pads: Pads, dilation: Pair
) -> np.ndarray:
    x = np.ascontiguousarray(x)
    _, kernel_h, kernel_w, channels = weights.shape
    size = _out_size(x.shape, (kernel_h, kernel_w), stride, pads, dilation)
    grouped = _in_groups(weights[0].astype(x.dtype, copy=False))
    out = np.empty((len(x), *size, channels), x.dtype)

    def work(first: int, last: int) -> None:
        corner = (pads[0], pads[2])
        depthwise(x, grouped, (kernel_h, kernel_w), stride, dilation, (1, 1), corner, first, last, out)

    run_blocks(work, len(x) * -(-channels // LANES), out.size * kernel_h * kernel_w * TAP)
    if bias is not None:
        out += bias
    return out
