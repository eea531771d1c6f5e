"""The losses of the trained detectors, each one operation with its derivative by hand.

Flows in: maps or feature rows, float32 (or float64 to check), on the tape where they are trained. Flows out: one number,
float64. Sums over positions are made in float64. Means are over everything: batch, height, width and neighbours.

Sources: STFPM (Wang et al. 2021, equations 1 to 3; the reference code's factor, 1), SimpleNet (Liu et al. 2023, equation
6), CFA (Lee et al. 2022, equations 2 to 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.kernels.gradients import direction_distance, direction_gradient
from tinyvad.kernels.nearest_few import distance_gradient, nearest_few
from tinyvad.training.blocks import multiply_rows, run_blocks
from tinyvad.training.tape import differentiable, plain

LEAST_NORM = 1e-12  # norms below it count as it, as in PyTorch's normalize
CFA_ROWS = 1024  # positions whose distances to all centres are held at once


def normalised_feature_loss(student: Sequence[Any], teacher: Sequence[np.ndarray]) -> Any:
    """Sum over the maps of the mean squared distance of directions, ||t / |t| - s / |s|||^2.

    A position where the student is 0 has no direction: it gets no gradient.

    Args:
        student, teacher: (n, H, W, C) a tap each, in the same order; the teacher gets no gradient.

    Raises:
        InputError: the two do not go together.
    """
    _check_pairs(student, teacher)
    total: Any = 0.0
    for s, t in zip(student, teacher, strict=True):
        total = total + _direction_loss(s, np.ascontiguousarray(plain(t), plain(s).dtype))
    return total


def direction_map(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """(n, H, W) float64: ||t / |t| - s / |s|||^2 of every position of two (n, H, W, C) maps; 0 where they are equal."""
    _check_pairs([student], [teacher])
    return _distances(student, np.ascontiguousarray(teacher, student.dtype))[0].reshape(student.shape[:-1])


def _check_pairs(student: Sequence[Any], teacher: Sequence[Any]) -> None:
    shapes = [[np.shape(plain(x)) for x in maps] for maps in (student, teacher)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise InputError(f"the student's maps {shapes[0]} and the teacher's {shapes[1]} differ; tap the same layers")


def _distances(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every position (R,) and what the way back needs (R, 3), float64."""
    s, t = (np.ascontiguousarray(x).reshape(-1, x.shape[-1]) for x in (student, teacher))
    distance, kept = np.empty(len(s)), np.empty((len(s), 3))
    run_blocks(lambda i, j: direction_distance(s, t, LEAST_NORM, i, j, distance, kept), len(s), s.size)
    return distance, kept


def _direction_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    student, teacher = args
    kept = _distances(student, teacher)[1]

    def back(g: Any) -> tuple[Any, ...]:
        s, t = (np.ascontiguousarray(x).reshape(-1, x.shape[-1]) for x in (student, teacher))
        out = np.empty(s.shape, s.dtype)
        each = float(g) / len(s)
        run_blocks(lambda i, j: direction_gradient(each, s, t, kept, i, j, out), len(s), s.size)
        return (out.reshape(student.shape),)

    return back


@differentiable(_direction_backward)
def _direction_loss(student: np.ndarray, teacher: np.ndarray) -> np.float64:
    return np.float64(_distances(student, teacher)[0].mean())


def hinge(clean: Any, noisy: Any, margin: float = 0.5) -> Any:
    """SimpleNet's loss: mean max(0, margin - clean) + mean max(0, margin + noisy), of the discriminator's values."""
    return _hinge(clean, noisy, margin=margin)


def _hinge_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    signs = (-1.0, 1.0)
    active = [kwargs["margin"] + sign * x > 0 for sign, x in zip(signs, args, strict=True)]
    dtypes = [x.dtype for x in args]
    return lambda g: tuple(active[i] * dtypes[i].type(signs[i] * float(g) / active[i].size) for i in argnums)


@differentiable(_hinge_backward)
def _hinge(clean: np.ndarray, noisy: np.ndarray, *, margin: float) -> np.float64:
    of_clean = np.maximum(margin - clean, 0).mean(dtype=np.float64)
    return np.float64(of_clean + np.maximum(margin + noisy, 0).mean(dtype=np.float64))


def cfa_loss(
    features: Any, centres: np.ndarray, radius: Any, *,
    attract: int = 3, repel: int = 3, nu: float = 1e-3, alpha: float = 0.1,
) -> Any:  # fmt: skip
    """CFA's loss: the nearest centres are pulled within ``radius``, the next ones pushed out of it.

    L = (mean over the nearest max(0, D - r^2) + mean over the next max(0, r^2 - D - alpha)) / nu, D squared distances.

    Args:
        features: (..., d), any number of positions.
        centres: (K, d), fixed, K >= attract + repel.
        radius: one number, trained along if it is on the tape.

    Raises:
        InputError: too few centres.
    """
    if len(centres) < attract + repel:
        raise InputError(f"CFA has {len(centres)} centres and needs {attract + repel}; use more images or a finer grid")
    values = plain(features)
    centres = np.ascontiguousarray(centres, values.dtype)
    indices, distances = nearest_centres(values.reshape(-1, values.shape[-1]), centres, attract + repel)
    return _cfa(features, radius, centres, indices, distances, attract=attract, nu=nu, alpha=alpha)


def nearest_centres(rows: np.ndarray, centres: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` nearest of centres (K, d) to each of rows (R, d), nearest first; the lower number of equals.

    Returns:
        indices (R, count) int64, and squared distances (R, count) of the rows' type, from differences, so never below 0.
    """
    rows, centres = np.ascontiguousarray(rows), np.ascontiguousarray(centres)
    indices = np.empty((len(rows), count), np.int64)
    distances = np.empty((len(rows), count), rows.dtype)
    squares = (centres * centres).sum(1)  # (K,)
    turned = np.ascontiguousarray(centres.T)
    for start in range(0, len(rows), CFA_ROWS):
        chosen = slice(start, start + CFA_ROWS)
        products = multiply_rows(rows[chosen], turned)  # (r, K)
        arguments = (rows[chosen], centres, products, squares)
        results = (indices[chosen], distances[chosen])
        run_blocks(partial(_nearest_block, arguments, results), len(products), products.size)
        del products, arguments  # before the next ones are made
    return indices, distances


def _nearest_block(arguments: Sequence[Any], results: Sequence[np.ndarray], first: int, last: int) -> None:
    rows, centres, products, squares = arguments
    nearest_few(rows, centres, products, squares, first, last, results[0], results[1])


def _terms(distances: np.ndarray, radius: float, attract: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Both hinges before they are clipped: (R, attract) and (R, repel) float64."""
    squared = distances.astype(np.float64)
    return squared[:, :attract] - radius**2, radius**2 - squared[:, attract:] - alpha


def _cfa_backward(
    argnums: tuple[int, ...], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Any, ...]]:
    features, radius, centres, indices, distances = args
    rows = np.ascontiguousarray(features).reshape(-1, features.shape[-1])
    pulled, pushed = (part > 0 for part in _terms(distances, float(radius), kwargs["attract"], kwargs["alpha"]))
    weights = np.concatenate([pulled / pulled.size, pushed / -pushed.size], 1) / kwargs["nu"]  # (R, count): dL / dD

    def of_features(g: float) -> np.ndarray:
        out, factors = np.empty(rows.shape, rows.dtype), (2 * g * weights).astype(rows.dtype)
        run_blocks(lambda i, j: distance_gradient(rows, centres, indices, factors, i, j, out), len(rows), rows.size)
        return out.reshape(features.shape)

    makers: dict[int, Callable[[float], Any]] = {
        0: of_features,
        1: lambda g: np.asarray(-2 * g * float(radius) * weights.sum(), np.asarray(radius).dtype),
    }
    return lambda g: tuple(makers[i](float(g)) for i in argnums)


@differentiable(_cfa_backward)
def _cfa(
    features: np.ndarray, radius: Any, centres: np.ndarray, indices: np.ndarray, distances: np.ndarray, *,
    attract: int, nu: float, alpha: float,
) -> np.float64:  # fmt: skip
    """Of the nearest centres ``indices`` and squared distances to them, both (R, attract + repel)."""
    pulled, pushed = _terms(distances, float(radius), attract, alpha)
    return np.float64((np.maximum(pulled, 0).mean() + np.maximum(pushed, 0).mean()) / nu)
