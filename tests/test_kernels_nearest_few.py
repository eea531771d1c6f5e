"""The loops of CFA's loss against plain NumPy: to the last bit on whole numbers, where no order of additions matters."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.kernels.nearest_few import distance_gradient, nearest_few


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3, 6, 20])
def test_nearest_few_are_a_full_sort(dtype: str, count: int, rng: np.random.Generator) -> None:
    rows = rng.integers(-3, 4, (50, 4)).astype(dtype)  # many equals
    centres = rng.integers(-3, 4, (20, 4)).astype(dtype)
    indices, distances = np.empty((50, count), np.int64), np.empty((50, count), dtype)
    arguments = (rows, centres, rows @ centres.T, (centres**2).sum(1))
    nearest_few(*arguments, 0, 30, indices, distances)
    nearest_few(*arguments, 30, 50, indices, distances)
    every = ((rows[:, None] - centres) ** 2).sum(2)  # (50, 20)
    order = np.argsort(every, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(distances, np.take_along_axis(every, order, 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distance_gradient_is_the_weighted_sum(dtype: str, rng: np.random.Generator) -> None:
    rows, centres = rng.integers(-9, 9, (40, 5)).astype(dtype), rng.integers(-9, 9, (7, 5)).astype(dtype)
    indices, weights = rng.integers(0, 7, (40, 6)), rng.integers(-2, 3, (40, 6)).astype(dtype)
    out = np.full_like(rows, np.nan)
    distance_gradient(rows, centres, indices, weights, 0, 11, out)
    distance_gradient(rows, centres, indices, weights, 11, 40, out)
    np.testing.assert_array_equal(out, (weights[:, :, None] * (rows[:, None] - centres[indices])).sum(1))
