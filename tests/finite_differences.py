"""Central differences in float64: the oracle of every derivative in the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

STEP = 1e-6


def numerical(function: Callable[[dict[str, np.ndarray]], float], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """d function / d every element, element by element."""
    found = {}
    for name, array in arrays.items():
        slope = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * STEP
                ends.append(function({**arrays, name: moved}))
            slope[index] = (ends[0] - ends[1]) / (2 * STEP)
        found[name] = slope
    return found


def check_gradients(
    function: Callable[[Any], Any], arrays: dict[str, np.ndarray], tolerance: float = 1e-7, shape_seed: int = 7
) -> dict[str, np.ndarray]:
    """Compare the tape's gradients of a random weighted sum of ``function``'s result with central differences."""
    import autograd.numpy as anp

    from tinyvad.training.tape import plain, value_and_gradients

    assert all(array.dtype == np.float64 for array in arrays.values())
    result = plain(function(arrays))
    weights = np.random.default_rng(shape_seed).normal(size=np.shape(result))  # so that no error cancels
    _, _, gradients = value_and_gradients(lambda boxes: (anp.sum(function(boxes) * weights), None), arrays)
    expected = numerical(lambda values: float(np.sum(function(values) * weights)), arrays)
    for name in arrays:
        scale = max(1.0, float(np.abs(expected[name]).max()))
        error = float(np.abs(gradients[name] - expected[name]).max())
        assert error <= tolerance * scale, f"{name}: off by {error:g} of {scale:g}"
        assert gradients[name].shape == arrays[name].shape
    return gradients
