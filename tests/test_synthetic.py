"""Made-up defects: they change a small part of the picture, in place, and repeat with the seed."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.synthetic import KINDS, add_defect


def picture(rng: np.random.Generator, height: int = 120, width: int = 160) -> np.ndarray:
    """(H, W, 3) uint8 with structure everywhere, so that a moved piece always shows."""
    return rng.integers(30, 220, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_changes_a_small_connected_area(kind: str) -> None:
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(25):
        image = picture(rng)
        before = image.copy()
        changed, mask = add_defect(image, kind, rng)
        assert changed.shape == image.shape and changed.dtype == np.uint8 and mask.dtype == bool
        np.testing.assert_array_equal(image, before)  # the good image stays
        np.testing.assert_array_equal(mask, (changed != image).any(2))
        assert mask.mean() < 0.2
        if mask.any():
            seen += 1
            rows, columns = np.nonzero(mask)
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert box < 0.5 * mask.size  # one place, not specks all over
    assert seen >= 20  # a defect may fall on the border and vanish, but rarely


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (17, 300), (8, 9)])
def test_any_size_of_picture(kind: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        changed, mask = add_defect(picture(rng, *size), kind, rng)
        assert changed.shape == (*size, 3) and mask.shape == size


def test_the_same_seed_gives_the_same_defect() -> None:
    image = picture(np.random.default_rng(1))
    for kind in KINDS:
        first, second = (add_defect(image, kind, np.random.default_rng(7))[0] for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert (add_defect(image, kind, np.random.default_rng(8))[0] != first).any()
