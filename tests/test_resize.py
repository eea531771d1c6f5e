"""The integer resize: against big-int Python, Pillow, and what must hold for constants, ramps and mirrors."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyvad.errors import InputError
from tinyvad.resize import resize, resize_mask, resize_weights


def axis_weights(size_in: int, size_out: int) -> list[list[int]]:
    """The rule of the file's docstring in plain Python integers: all weights (out, in), most of them 0."""
    support = 2 * max(size_in, size_out)
    table = []
    for i in range(size_out):
        raw = [max(0, support - abs((2 * j + 1) * size_out - (2 * i + 1) * size_in)) for j in range(size_in)]
        total, running, before, row = sum(raw), 0, 0, []
        for value in raw:
            running += value
            edge = (running * 2**15 + total) // (2 * total)
            row.append(edge - before)
            before = edge
        table.append(row)
    return table


def brute_force(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Rows, then columns, one pixel at a time in Python integers."""
    pixels = image.tolist()
    channels = range(image.shape[2])

    def round_sum(weights: list[int], values: list[int]) -> int:
        return (sum(w * v for w, v in zip(weights, values)) + 2**13) >> 14

    across = axis_weights(image.shape[1], width)
    middle = [[[round_sum(w, [p[c] for p in row]) for c in channels] for w in across] for row in pixels]
    down = axis_weights(image.shape[0], height)
    columns = [[[row[x][c] for row in middle] for c in channels] for x in range(width)]
    return np.array([[[round_sum(w, values) for values in column] for column in columns] for w in down])


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3])),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**32 - 1),
)
def test_equals_plain_python_integers(shape: tuple[int, int, int], size: tuple[int, int], seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(resize(image, *size), brute_force(image, *size))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 300))
def test_weights_sum_and_stay_inside(size_in: int, size_out: int) -> None:
    starts, weights = resize_weights(size_in, size_out)
    assert starts.dtype == np.int32 and weights.dtype == np.int16
    assert (weights.sum(axis=1, dtype=np.int64) == 2**14).all() and (weights >= 0).all()
    assert starts.min() >= 0 and starts.max() + weights.shape[1] <= size_in
    assert (np.diff(starts) >= 0).all()


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1024, 224), (7, 3), (3, 7), (16384, 1), (1, 16384), (640, 639)]
)
def test_each_weight_is_the_triangle_within_one_unit(size_in: int, size_out: int) -> None:
    starts, weights = resize_weights(size_in, size_out)
    scale = max(Fraction(1), Fraction(size_in, size_out))
    for i in {0, size_out // 2, size_out - 1}:
        centre = Fraction(2 * i + 1, 2) * Fraction(size_in, size_out)
        taps = range(int(starts[i]), int(starts[i]) + weights.shape[1])
        triangle = [max(Fraction(0), 1 - abs(j + Fraction(1, 2) - centre) / scale) for j in taps]
        total = sum(triangle)
        assert all(abs(int(w) - t / total * 2**14) < 1 for w, t in zip(weights[i], triangle))


def test_largest_size_equals_plain_integers() -> None:
    # the widest sums that occur: R * 2^15 needs 64 bits
    starts, weights = resize_weights(16384, 3)
    table = axis_weights(16384, 3)
    for start, row, expected in zip(starts, weights, table):
        assert row.tolist() == expected[start : start + len(row)]
        assert sum(expected) == sum(expected[start : start + len(row)])


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (224, 224)])
def test_same_size_is_identity(rng: np.random.Generator, size: tuple[int, int]) -> None:
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    result = resize(image, *size)
    assert np.array_equal(result, image) and not np.shares_memory(result, image)


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("size", [(1, 1), (37, 500), (300, 20)])
def test_constant_stays_constant(value: int, size: tuple[int, int]) -> None:
    assert (resize(np.full((*size, 3), value, np.uint8), 64, 48) == value).all()


def test_halving_a_pair_of_columns_averages_them() -> None:
    # 2 to 1: both taps weigh 1/2, and 0.5 rounds up
    assert resize(np.array([[[10], [13]]], np.uint8), 1, 1).item() == 12
    # 1 to n repeats the pixel
    assert (resize(np.array([[[9, 8, 7]]], np.uint8), 3, 5) == [9, 8, 7]).all()


def test_channels_do_not_mix(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (31, 47, 3), dtype=np.uint8)
    apart = [resize(image[:, :, c : c + 1], 16, 20)[:, :, 0] for c in range(3)]
    assert np.array_equal(resize(image, 16, 20), np.stack(apart, axis=2))


def test_a_view_with_strides_is_read_correctly(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    view = image[::-1, ::2]
    assert np.array_equal(resize(view, 17, 13), resize(view.copy(), 17, 13))


@pytest.mark.parametrize(
    "size_in",
    [(1024, 1024), (256, 256), (480, 640), (1200, 1600), (100, 90), (7, 11), (224, 1000), (5, 3000)],
)
@pytest.mark.parametrize("size_out", [(224, 224), (96, 160)])
def test_pillow_differs_by_one_level(
    rng: np.random.Generator, size_in: tuple[int, int], size_out: tuple[int, int]
) -> None:
    noise = rng.integers(0, 256, (*size_in, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, size_in[1])[None, :, None], noise.shape).astype(np.uint8)
    for image in (noise, ramp):
        pillow = Image.fromarray(image).resize(size_out[::-1], Image.Resampling.BILINEAR)
        difference = np.abs(resize(image, *size_out).astype(int) - np.asarray(pillow))
        # 2 needs a near tie in both passes: about one value of white noise in a million (256 to 224)
        assert difference.max() <= 2 and (difference == 2).sum() <= 3
        # when one side grows and the other shrinks, Pillow 13 may go along columns first
        assert size_in == (100, 90) or (difference != 0).mean() < 0.05


def test_mask_takes_the_nearest_pixel(rng: np.random.Generator) -> None:
    cases = [((37, 53), (20, 20)), ((10, 11), (25, 31)), ((256, 512), (64, 128)), ((1, 1), (4, 4))]
    for shape, size in cases:
        mask = rng.random(shape) < 0.3
        result = resize_mask(mask, *size)
        rows, columns = (
            [int(Fraction(2 * i + 1, 2) * Fraction(n, m)) for i in range(m)] for n, m in zip(shape, size)
        )
        assert np.array_equal(result, mask[np.ix_(rows, columns)])
        if shape != (10, 11):  # Pillow's float steps miss exact ties, which 10 to 25 has
            pillow = Image.fromarray(mask.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
            assert np.array_equal(result, np.asarray(pillow).astype(bool))


@pytest.mark.parametrize(("image", "size"), [((4, 4), (2, 2)), ((4, 4, 3), (0, 2)), ((4, 4, 3), (2, 16385))])
def test_bad_shapes_are_input_errors(image: tuple[int, ...], size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="resize"):
        resize(np.zeros(image, np.uint8), *size)


def test_float_image_is_an_input_error() -> None:
    with pytest.raises(InputError, match="uint8, not"):
        resize(np.zeros((4, 4, 3), np.float32), 2, 2)
