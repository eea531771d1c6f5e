"""Drift: identity at 0, closed forms, masks that move with their images, one line for wrong use."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.continual.drift import check_steps, describe, drift_image, drift_mask, names, ramp
from tinyvad.errors import InputError

GEOMETRY = ("rotation", "shift", "scale")


@pytest.fixture
def image(rng):
    """(40, 52, 3) uint8, smooth enough that a resampled edge stays an edge."""
    coarse = rng.integers(0, 256, (10, 13, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 4, 0), 4, 1)


def test_the_table_of_the_docstring_is_complete():
    from tinyvad.continual import drift

    assert all(f"\n{name} " in drift.__doc__ for name in names()) and len(names()) == 9


@pytest.mark.parametrize("name", names())
def test_strength_0_changes_nothing_and_others_do_the_same_every_time(name, image):
    before = image.copy()
    mask = image[:, :, 0] > 128
    assert np.array_equal(drift_image(image, [(name, 0)]), image)
    assert np.array_equal(drift_mask(mask, [(name, 0.0)]), mask)
    first, second = (drift_image(image, [(name, 0.7)], seed=3) for _ in range(2))
    assert first.shape == image.shape and first.dtype == np.uint8 and np.array_equal(first, second)
    assert not np.array_equal(first, image) and np.array_equal(image, before)  # changed, and not in place
    if name not in GEOMETRY:
        assert drift_mask(mask, [(name, 0.7)]) is mask


def test_light_and_colour_are_closed_forms():
    levels = np.arange(256, dtype=np.uint8)
    image = np.repeat(levels[None, :, None], 3, axis=2)  # (1, 256, 3)
    exact = levels.astype(int)
    assert np.array_equal(drift_image(image, [("brightness", 0.25)])[0, :, 1], np.minimum(exact + 32, 255))
    assert np.array_equal(drift_image(image, [("brightness", -0.25)])[0, :, 1], np.maximum(exact - 32, 0))
    assert np.array_equal(drift_image(image, [("contrast", 1)])[0, :, 0], np.clip(2 * exact - 128, 0, 255))
    assert (drift_image(image, [("contrast", -1)]) == 128).all()
    warm = drift_image(image, [("colour", 0.5)])[0]
    assert np.array_equal(warm[:, 0], np.minimum((exact * 5 + 2) // 4, 255))  # times 1.25, half up
    assert np.array_equal(warm[:, 1], levels) and np.array_equal(warm[:, 2], (exact * 3 + 2) // 4)


def test_noise_has_its_deviation_and_differs_between_images(rng):
    grey = np.full((200, 200, 3), 128, np.uint8)
    changed = drift_image(grey, [("noise", 0.25)]).astype(int) - 128
    assert abs(changed.mean()) < 0.3 and abs(changed.std() - 16) < 0.3
    other = grey.copy()
    other[0, 0, 0] = 129
    assert not np.array_equal(drift_image(other, [("noise", 0.25)])[1:], drift_image(grey, [("noise", 0.25)])[1:])
    assert not np.array_equal(drift_image(grey, [("noise", 0.25)], seed=1), drift_image(grey, [("noise", 0.25)]))


def test_shift_moves_whole_pixels(image):
    moved = drift_image(image, [("shift", 0.5)])  # 5 down, 6 (6.5 to even) right
    assert np.array_equal(moved[5:, 6:], image[:-5, :-6])
    assert np.array_equal(moved[:5, 6:], image[4::-1, :-6])  # the mirror image comes in
    back = drift_image(image, [("shift", -0.5)])
    assert np.array_equal(back[:-5, :-6], image[5:, 6:])


def test_rotation_and_scale_keep_the_centre_and_turn_the_right_way():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 10:31] = 255  # a horizontal line through the centre
    image[20, 26:31] = (255, 0, 0)  # red at its right end
    turned = drift_image(image, [("rotation", 1)])  # 45 degrees counter-clockwise: red points up right
    assert turned[20, 20].min() > 200 and turned[13, 27, 0] > 120 and turned[13, 27, 1] < 60
    assert turned[27, 13].min() > 120 and turned[13, 13].max() < 30
    larger = drift_image(image, [("scale", 1)])
    assert larger[20, 20].min() > 180 and larger[20, 3].min() > 180 and (larger[20, 35] > (180, -1, -1)).all()
    assert larger[10].max() < 20
    uniform = np.full((30, 50, 3), 77, np.uint8)  # nothing black comes in from outside
    for strength in (-1, -0.3, 0.6, 1):
        for name in GEOMETRY:
            assert (drift_image(uniform, [(name, strength)]) == 77).all()


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("strength", [-1, -0.4, 0.3, 1])
def test_masks_move_as_their_images_do(name, strength):
    mask = np.zeros((60, 90), bool)
    mask[12:40, 30:70] = True
    image = np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * 255
    seen = drift_image(image, [(name, strength)])[:, :, 0] > 127
    moved = drift_mask(mask, [(name, strength)])
    assert moved.dtype == bool and moved.shape == mask.shape
    assert (seen != moved).mean() < 0.015  # a pixel along the edges, where an image is interpolated


@pytest.mark.parametrize(("strength", "side"), [(1, 16), (-1, 4)])
def test_scale_doubles_and_halves_a_mask(strength, side):
    mask = np.zeros((60, 90), bool)
    mask[26:34, 41:49] = True  # 8 x 8 about the centre
    expected = np.zeros_like(mask)
    expected[30 - side // 2 : 30 + side // 2, 45 - side // 2 : 45 + side // 2] = True
    centre = (slice(10, 50), slice(20, 70))  # farther out the mirror image begins
    assert np.array_equal(drift_mask(mask, [("scale", strength)])[centre], expected[centre])


def test_blur_and_jpeg_grow_with_strength(image):
    for name in ("blur", "jpeg", "noise"):
        errors = [np.abs(drift_image(image, [(name, s)]).astype(int) - image).mean() for s in (0.1, 0.4, 1)]
        assert errors[0] < errors[1] < errors[2]


def test_steps_follow_one_another(image):
    both = [("brightness", 0.5), ("shift", 0.2)]
    assert np.array_equal(drift_image(image, both), drift_image(drift_image(image, both[:1]), both[1:]))
    assert describe(both) == "brightness +0.5, shift +0.2" and describe([]) == "as it was"
    assert ramp("blur", [0, 0.5]) == [(), (("blur", 0.5),)]
    assert check_steps([["blur", 1]]) == (("blur", 1.0),)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([("fog", 0.1)], "name of brightness"),
        ([("blur", -0.1)], "blur: strength is -0.1, must be a number from 0 to 1"),
        ([("shift", 1.5)], "from -1 to 1"),
        ([("shift", float("nan"))], "from -1 to 1"),
        ([("shift", True)], "must be a number"),
        (["blur"], "must be [name, strength]"),
        ([["blur", 1, 2]], "must be [name, strength]"),
    ],
)
def test_wrong_steps_are_told_in_one_line(steps, words):
    with pytest.raises(InputError) as told:
        check_steps(steps)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_small_and_wrong_images(rng):
    tiny = rng.integers(0, 256, (1, 2, 3), dtype=np.uint8)
    for name in names():
        assert drift_image(tiny, [(name, 1)]).shape == (1, 2, 3)
    with pytest.raises(InputError, match="uint8"):
        drift_image(np.zeros((4, 4, 3)), [])
