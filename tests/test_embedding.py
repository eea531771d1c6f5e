"""The embedding against plain loops in exact fractions, and in big integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tinyvad.embedding import Embedding, Tap, align_matrix, make_taps, pool_matrix, tap_denominator, tap_matrix
from tinyvad.errors import InputError
from tinyvad.graph.ir import Quantization, Tensor

# -- the operators, one value at a time ---------------------------------------------------------------------------------


def pooled(x: list[Fraction], window: int) -> list[Fraction]:
    """Mean over a centred window, zeros outside, divisor always the window."""
    around = [Fraction(0)] * (window // 2)
    padded = [*around, *x, *around]
    return [sum(padded[i : i + window], Fraction(0)) / window for i in range(len(x))]


def area_mean(x: list[Fraction], cells: int) -> list[Fraction]:
    """Integral of the step function x over each of ``cells`` equal parts, divided by the part's length."""
    length = Fraction(len(x), cells)
    means = []
    for i in range(cells):
        low, high = i * length, (i + 1) * length
        total = Fraction(0)
        for j, value in enumerate(x):
            total += value * max(Fraction(0), min(high, Fraction(j + 1)) - max(low, Fraction(j)))
        means.append(total / length)
    return means


def bilinear(x: list[Fraction], cells: int) -> list[Fraction]:
    """Values at the cells' centres, element j standing at j + 1/2; beyond the outer ones, the outer ones."""
    result = []
    for i in range(cells):
        position = (i + Fraction(1, 2)) * Fraction(len(x), cells) - Fraction(1, 2)
        position = min(max(position, Fraction(0)), Fraction(len(x) - 1))
        low = math.floor(position)
        part = position - low
        result.append(x[low] * (1 - part) + (x[low + 1] * part if part else 0))
    return result


def aligned(x: list[Fraction], cells: int) -> list[Fraction]:
    return area_mean(x, cells) if len(x) >= cells else bilinear(x, cells)


def on_both_axes(values: list[list[Fraction]], on_rows: Any, on_columns: Any) -> list[list[Fraction]]:
    """``on_columns`` of each column, then ``on_rows`` of each row."""
    columns = [on_columns(list(column)) for column in zip(*values)]
    return [on_rows(list(row)) for row in zip(*columns)]


FINER = [(1, 1), (2, 1), (3, 2), (5, 5), (7, 3), (8, 5), (13, 11), (22, 11), (23, 10)]
SIZES = [*FINER, (1, 4), (2, 5), (3, 7), (5, 16), (10, 11)]


@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_alignment_is_the_area_mean_or_bilinear(size: int, grid: int) -> None:
    matrix, denominator = align_matrix(size, grid)
    assert matrix.shape == (grid, size) and matrix.dtype == np.int64 and matrix.min() >= 0
    for j in range(size):
        unit = [Fraction(int(i == j)) for i in range(size)]
        assert [Fraction(int(m), denominator) for m in matrix[:, j]] == aligned(unit, grid)


@pytest.mark.parametrize("window", [1, 3, 5, 7])
def test_pooling_is_a_mean_with_zeros_around(window: int) -> None:
    for size in (1, 2, 3, 4, 9):
        matrix = pool_matrix(size, window)
        for j in range(size):
            unit = [Fraction(int(i == j)) for i in range(size)]
            assert [Fraction(int(m), window) for m in matrix[:, j]] == pooled(unit, window)


@pytest.mark.parametrize("pool", [1, 3, 5])
def test_a_tap_is_pooled_then_aligned(pool: int) -> None:
    for size, grid in SIZES:
        matrix, denominator = tap_matrix(size, grid, pool)
        assert denominator == tap_denominator(size, grid, pool) and matrix.sum(1).max() <= denominator
        for j in range(size):
            unit = [Fraction(int(i == j)) for i in range(size)]
            assert [Fraction(int(m), denominator) for m in matrix[:, j]] == aligned(pooled(unit, pool), grid)


def test_a_constant_map_stays_constant_inside() -> None:
    for size, grid in SIZES:
        matrix, denominator = align_matrix(size, grid)
        np.testing.assert_array_equal(matrix.sum(1), denominator)


def test_same_size_without_pooling_is_the_identity() -> None:
    matrix, denominator = tap_matrix(9, 9, 1)
    np.testing.assert_array_equal(matrix, denominator * np.eye(9, dtype=int))


# -- the whole embedding ------------------------------------------------------------------------------------------------


def half_away(x: Fraction) -> int:
    whole = math.floor(abs(x) + Fraction(1, 2))
    return whole if x >= 0 else -whole


def embedded(q: np.ndarray, tap: Tap, grid: tuple[int, int], pool: int) -> np.ndarray:
    """(grid_h, grid_w, c) of one (h, w, c) int8 map: exact sums, TFLite's two roundings, in Python's integers."""
    (h, w), denominators = tap.size, [1, 1]
    axes: list[list[list[Fraction]]] = []
    for axis, (size, cells) in enumerate(zip((h, w), grid)):
        units = [[Fraction(int(i == j)) for i in range(size)] for j in range(size)]
        columns = [aligned(pooled(unit, pool), cells) for unit in units]
        axes.append([list(row) for row in zip(*columns)])  # (cells, size)
        denominators[axis] = (size if size >= cells else 2 * cells) * pool
    factor = tap.scale / (denominators[0] * denominators[1] * tap.step)
    fraction, shift = math.frexp(factor)
    multiplier = math.floor(fraction * (1 << 31) + 0.5)
    if multiplier == 1 << 31:
        multiplier, shift = multiplier // 2, shift + 1
    rows, columns = ([[v * d for v in row] for row in axis] for axis, d in zip(axes, denominators))
    assert all(v.denominator == 1 for axis in (rows, columns) for row in axis for v in row)  # all integers
    out = np.zeros((*grid, tap.channels), np.int64)
    for c in range(tap.channels):
        for i in range(grid[0]):
            for j in range(grid[1]):
                total = 0
                for y in range(h):
                    for x in range(w):
                        total += int(rows[i][y]) * int(columns[j][x]) * (int(q[y, x, c]) - tap.zero_point)
                high = ((total << max(shift, 0)) * multiplier + (1 << 30)) >> 31
                out[i, j, c] = min(max(half_away(Fraction(high, 1 << max(-shift, 0))), -127), 127)
    return out


def three_taps(rng: np.random.Generator) -> tuple[Tap, ...]:
    """Finer than, equal to and coarser than a (4, 3) grid."""
    sizes = [(9, 7), (4, 3), (2, 2)]
    return tuple(
        Tap(f"t{i}", size, int(rng.integers(1, 4)), float(rng.uniform(0.01, 0.1)), int(rng.integers(-128, 128)), 0.03)
        for i, size in enumerate(sizes)
    )


def random_maps(taps: tuple[Tap, ...], n: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(-128, 128, (n, *tap.size, tap.channels)).astype(np.int8) for tap in taps]


@pytest.mark.parametrize("pool", [1, 3])
def test_integers_are_those_of_big_integer_arithmetic(pool: int, rng: np.random.Generator) -> None:
    for _ in range(3):
        embedding = Embedding(three_taps(rng), (4, 3), pool)
        maps = random_maps(embedding.taps, 2, rng)
        found = embedding.integer(maps)
        assert found.dtype == np.int8 and found.shape == (2, 4, 3, embedding.depth)
        for n in range(2):
            parts = [embedded(q[n], tap, (4, 3), pool) for q, tap in zip(maps, embedding.taps)]
            np.testing.assert_array_equal(found[n], np.concatenate(parts, -1))


def test_large_maps_stay_exact(rng: np.random.Generator) -> None:
    """All values at an end, sums near the 32-bit bound."""
    tap = Tap("t", (64, 64), 1, 0.05, -128, 0.2)
    embedding = Embedding((tap,), (3, 5))
    q = np.full((1, 64, 64, 1), 127, np.int8)
    np.testing.assert_array_equal(embedding.integer([q])[0], embedded(q[0], tap, (3, 5), 3))


def test_real_values_are_the_integers_before_rounding(rng: np.random.Generator) -> None:
    for _ in range(5):
        embedding = Embedding(three_taps(rng), (4, 3))
        maps = random_maps(embedding.taps, 3, rng)
        floats = [(q.astype(np.float64) - tap.zero_point) * tap.scale for q, tap in zip(maps, embedding.taps)]
        real, integer = embedding.real(floats), embedding.integer(maps)
        assert real.dtype == np.float32
        inside = np.abs(real / embedding.steps) < 126.5
        assert inside.mean() > 0.3
        error = np.abs(integer - real / embedding.steps)[inside]
        assert error.max() <= 0.5 + 0.51 / 2 + 1e-4  # the second rounding, and the first one's half unit at shift -1
        outside = np.abs(real / embedding.steps) > 127.6
        np.testing.assert_array_equal(np.abs(integer[outside].astype(int)), 127)
        # one map at a time by the definition
        wanted = [[Fraction(float(v)) for v in row] for row in floats[0][0, :, :, 0]]
        wanted = on_both_axes(wanted, lambda x: pooled(x, 3), lambda x: pooled(x, 3))
        wanted = on_both_axes(wanted, lambda x: aligned(x, 3), lambda x: aligned(x, 4))
        np.testing.assert_allclose(real[0, :, :, 0], [[float(v) for v in row] for row in wanted], rtol=1e-5, atol=1e-6)


def test_depth_and_steps(rng: np.random.Generator) -> None:
    taps = (Tap("a", (2, 2), 3, 0.1, 0, 0.5), Tap("b", (1, 1), 2, 0.1, 0, 0.25))
    embedding = Embedding(taps, (2, 2))
    assert embedding.depth == 5
    np.testing.assert_array_equal(embedding.steps, [0.5, 0.5, 0.5, 0.25, 0.25])


def test_float_maps_meet_the_taps_grids() -> None:
    embedding = Embedding((Tap("a", (1, 1), 5, 0.5, 10, 1.0),), (1, 1))
    values = np.array([0.0, 0.6, -0.6, 1000.0, -1000.0], np.float32).reshape(1, 1, 1, 5)
    (q,) = embedding.quantize_maps([values])
    assert q.dtype == np.int8 and q.ravel().tolist() == [10, 11, 9, 127, -128]


# -- bounds -------------------------------------------------------------------------------------------------------------


def test_sums_beyond_32_bits_are_refused() -> None:
    """255 * (size * 3)**2 first passes 2**31 - 1 at a size of 968."""
    assert 255 * (967 * 3) ** 2 < 1 << 31 <= 255 * (968 * 3) ** 2
    Embedding((Tap("deep/conv", (967, 967), 1, 0.1, 0, 0.1),), (10, 10))
    with pytest.raises(InputError, match=r"layer deep/conv: a 968x968 map is too fine for a 10x10 grid in 32-bit sums"):
        Embedding((Tap("deep/conv", (968, 968), 1, 0.1, 0, 0.1),), (10, 10))
    with pytest.raises(InputError, match="too fine for a 40000x40000 grid"):
        Embedding((Tap("t", (2, 2), 1, 0.1, 0, 0.1),), (40000, 40000))  # no matrix of that size is made


def test_a_step_that_shifts_sums_beyond_32_bits_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer t: a step of 1e-12 is too fine for its scale 0\.1"):
        Embedding((Tap("t", (20, 20), 1, 0.1, 0, 1e-12),), (10, 10))


# -- taps from tensors --------------------------------------------------------------------------------------------------


def tensor(name: str, scale: float, shape: tuple[int, ...] = (1, 4, 5, 6)) -> Tensor:
    return Tensor(name, shape, "int8", Quantization.per_tensor(scale, -7))


def test_steps_hold_the_limits_with_a_fifth_to_spare() -> None:
    taps = make_taps([tensor("a", 0.1), tensor("b", 0.2)], [12.7, 254.0], common_step=False)
    assert [tap.step for tap in taps] == pytest.approx([0.12, 2.4])
    assert taps[0] == Tap("a", (4, 5), 6, float(np.float32(0.1)), -7, taps[0].step)
    both = make_taps([tensor("a", 0.1), tensor("b", 0.2)], [12.7, 254.0], common_step=True)
    assert [tap.step for tap in both] == pytest.approx([2.4, 2.4])


def test_a_tap_that_showed_nothing_still_makes_an_embedding(rng: np.random.Generator) -> None:
    taps = make_taps([tensor("dead", 0.05, (1, 88, 88, 2))], [0.0], common_step=False)
    embedding = Embedding(taps, (11, 11))
    zeros = np.full((1, 88, 88, 2), -7, np.int8)
    assert not embedding.integer([zeros]).any()


def test_tensors_that_cannot_be_tapped() -> None:
    with pytest.raises(InputError, match="layer x is not an int8 tensor; tap a quantised layer"):
        make_taps([Tensor("x", (1, 4, 5, 6))], [1.0], False)
    with pytest.raises(InputError, match=r"layer v is no map but \(1, 6\)"):
        make_taps([tensor("v", 0.1, (1, 6))], [1.0], False)


# -- in a bank ----------------------------------------------------------------------------------------------------------


def test_sections_round_trip(rng: np.random.Generator) -> None:
    embedding = Embedding(three_taps(rng), (4, 3), 5)
    sections = embedding.sections()
    assert sections["TAPS"].dtype == np.int32 and sections["STEP"].dtype == np.float64
    assert Embedding.from_sections(sections, (4, 3), ["t0", "t1", "t2"]) == embedding
    first = embedding.taps[0]
    h, w, channels, zero_point, multiplier, shift, pool, reserved = sections["TAPS"][0].tolist()
    assert (h, w, channels, zero_point, pool, reserved) == (9, 7, first.channels, first.zero_point, 5, 0)
    factor = first.scale / (9 * 5 * 7 * 5 * 0.03)
    assert math.ldexp(multiplier, shift - 31) == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, 0, 0, "TAPS, row 0: height is 0; it must be 1 to 4096"),
        (1, 0, 4097, "TAPS, row 1: height is 4097; it must be 1 to 4096"),
        (0, 1, -3, "TAPS, row 0: width is -3"),
        (2, 2, 0, "TAPS, row 2: channels is 0"),
        (2, 3, 128, "TAPS, row 2: zero point is 128; it must be -128 to 127"),
        (0, 4, 5, r"TAPS, row 0: multiplier is 5, but section STEP and the grid give \d+"),
        (1, 5, 7, "TAPS, row 1: shift is 7, but section STEP and the grid give"),
        (0, 6, 2, "TAPS, row 0: pool is 2; it must be odd and the same in all rows"),
        (1, 6, 5, "TAPS, row 1: pool is 5; it must be odd and the same"),
        (0, 6, 9, "TAPS, row 0: pool is 9; it must be 1 to 7"),
        (2, 7, 1, "TAPS, row 2: reserved is 1; it must be 0 to 0"),
        (0, 0, 10, "TAPS, row 0: multiplier is"),  # another height has another factor
    ],
)
def test_every_malformed_field_is_named(row: int, column: int, value: int, message: str, rng: np.random.Generator) -> None:
    sections = Embedding(three_taps(rng), (4, 3)).sections()
    sections["TAPS"][row, column] = value
    with pytest.raises(InputError, match=f"^bank section {message}"):
        Embedding.from_sections(sections, (4, 3), ["a", "b", "c"])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("column", "field"), [(0, "scale"), (1, "step")])
def test_every_malformed_step_is_named(value: float, column: int, field: str, rng: np.random.Generator) -> None:
    sections = Embedding(three_taps(rng), (4, 3)).sections()
    sections["STEP"][1, column] = value
    with pytest.raises(InputError, match=f"^bank section STEP, row 1: {field} is .*positive and finite"):
        Embedding.from_sections(sections, (4, 3), ["a", "b", "c"])


def test_sections_that_are_missing_or_of_another_shape(rng: np.random.Generator) -> None:
    sections = Embedding(three_taps(rng), (4, 3)).sections()
    names = ["a", "b", "c"]
    for changed, message in (
        ({"STEP": sections["STEP"]}, r"TAPS: expected int32 \(3, 8\) for the 3 tapped tensors"),
        ({"TAPS": sections["TAPS"]}, r"STEP: expected float64 \(3, 2\)"),
        ({**sections, "TAPS": sections["TAPS"][:, :7]}, "TAPS: expected"),
        ({**sections, "TAPS": sections["TAPS"].astype(np.int64)}, "TAPS: expected"),
        ({**sections, "STEP": sections["STEP"][:2]}, "STEP: expected"),
        ({**sections, "STEP": sections["STEP"].astype(np.float32)}, "STEP: expected"),
    ):
        with pytest.raises(InputError, match=f"^bank section {message}"):
            Embedding.from_sections(changed, (4, 3), names)
    with pytest.raises(InputError, match=r"TAPS: expected int32 \(2, 8\)"):
        Embedding.from_sections(sections, (4, 3), names[:2])
    with pytest.raises(InputError, match=r"TAPS: expected int32 \(0, 8\)"):
        Embedding.from_sections({"TAPS": np.zeros((0, 8), np.int32), "STEP": np.zeros((0, 2))}, (4, 3), [])
