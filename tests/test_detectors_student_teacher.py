"""The integers of student and teacher against Python's own whole numbers, one position at a time, and against floats."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvad.detectors.student_teacher import (
    Pairs,
    StudentTeacherScorer,
    _bit_length,
    _floor_sqrt,
    choose_shift,
    cosine_distances,
    fraction_bits,
    golden_of,
    pairs_of,
)
from tinyvad.embedding import Tap, align_matrix
from tinyvad.errors import InputError
from tinyvad.graph.ir import Quantization, Tensor


def slow_distance(s: list[int], t: list[int], bits: int) -> int:
    """The definition, word for word: whole numbers of any size, no shortcut."""
    dot, ss, tt = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((s, t), (s, s), (t, t)))
    if ss == 0 or tt == 0:
        return 0 if ss == tt else 1 << bits
    k = 0
    while (ss * tt << 2 * (k + 1)).bit_length() <= 62:
        k += 1
    p = ss * tt << 2 * k
    assert p.bit_length() in (61, 62)
    r = math.isqrt(p)
    distance = ((r - (dot << k)) << bits) // r
    assert 0 <= distance <= 2 << bits  # so nothing needs to be clamped
    return distance


def slow_scores(pairs: Pairs, shift: int, maps: list[np.ndarray]) -> list[list[int]]:
    """Scores of one image [(h, w, C)], by fractions."""
    half = len(maps) // 2
    scores = [[1] * pairs.grid[1] for _ in range(pairs.grid[0])]
    for s_tap, t_tap, s_map, t_map in zip(pairs.taps, pairs.taps[half:], maps, maps[half:]):
        s, t, zeros, (h, w) = s_map.tolist(), t_map.tolist(), (s_tap.zero_point, t_tap.zero_point), s_tap.size
        d = [[slow_distance([v - zeros[0] for v in s[y][x]], [v - zeros[1] for v in t[y][x]], pairs.bits)
              for x in range(w)] for y in range(h)]  # fmt: skip
        (rows, down), (columns, across) = (align_matrix(n, g) for n, g in zip((h, w), pairs.grid, strict=True))
        for i in range(pairs.grid[0]):
            for j in range(pairs.grid[1]):
                total = sum(int(rows[i, y]) * int(columns[j, x]) * d[y][x] for y in range(h) for x in range(w))
                scores[i][j] *= math.floor(Fraction(total, down * across) + Fraction(1, 2))
    return [[min(value >> shift, 2**32 - 1) for value in row] for row in scores]


def make(grid: tuple[int, int], shapes: list[tuple[int, int, int]], zeros: list[int]) -> Pairs:
    taps = [Tap(f"t{i}", shape[:2], shape[2], 0.1, zero, 0.1) for i, (shape, zero) in enumerate(zip(shapes * 2, zeros))]
    return Pairs(tuple(taps), grid)


def random_maps(rng: np.random.Generator, pairs: Pairs, n: int, kind: str) -> list[np.ndarray]:
    """Tapped maps of n images: any values, both ends of the range, all at the zero point, a student that imitates."""
    shapes = [(n, *tap.size, tap.channels) for tap in pairs.taps]
    half = len(shapes) // 2
    if kind == "ends":
        return [rng.choice(np.array([-128, 127], np.int8), shape) for shape in shapes]
    if kind == "zero":
        return [np.full(shape, tap.zero_point, np.int8) for shape, tap in zip(shapes, pairs.taps)]
    if kind == "half zero":
        maps = random_maps(rng, pairs, n, "any")
        return [*random_maps(rng, pairs, n, "zero")[:half], *maps[half:]]
    maps = [rng.integers(-128, 128, shape).astype(np.int8) for shape in shapes]
    if kind == "alike":
        noise = [rng.integers(-3, 4, shape) for shape in shapes[:half]]
        return [*(np.clip(t + e, -128, 127).astype(np.int8) for t, e in zip(maps[half:], noise)), *maps[half:]]
    return maps


KINDS = ("any", "ends", "zero", "half zero", "alike")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 8), kind=st.sampled_from(KINDS), shift=st.integers(0, 31),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)  # fmt: skip
def test_scores_are_those_of_whole_numbers(
    seed: int, layers: int, kind: str, shift: int, grid: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(int(h), int(w), int(c)) for h, w, c in rng.integers(1, 7, (layers, 3))]
    pairs = make(grid, shapes, rng.integers(-128, 128, 2 * layers).tolist())
    maps = random_maps(rng, pairs, 2, kind)
    scorer = StudentTeacherScorer(pairs.layers, grid, shift)
    distances = pairs.integer(maps)
    assert distances.dtype == np.uint32 and distances.shape == (2, *grid, layers)
    scores = scorer.score(distances)
    assert scores.dtype == np.uint32
    for i in range(2):
        assert scores[i].tolist() == slow_scores(pairs, shift, [q[i] for q in maps])


@pytest.mark.parametrize("channels", [1, 2, 17, 4096])
@pytest.mark.parametrize("bits", [6, 20])
def test_distances_at_the_ends_of_their_widths(channels: int, bits: int) -> None:
    """255 apart from the zero point in all of 4096 channels: sums of 2^28, a product of 2^56."""
    rng = np.random.default_rng(channels)
    far, none = np.full(channels, 255), np.zeros(channels)
    first, last = np.eye(1, channels, 0)[0], np.eye(1, channels, channels - 1)[0]
    turned = np.where(np.arange(channels) % 2, 255, -255)
    cases = [(far, far), (far, -far), (far, turned), (far, none), (none, none), (first, far), (first, last)]
    cases += [tuple(rng.integers(-255, 256, (2, channels))) for _ in range(20)]
    cases += [tuple(rng.integers(-1, 2, (2, channels))) for _ in range(20)]
    found = cosine_distances(np.stack([s for s, _ in cases]), np.stack([t for _, t in cases]), bits)
    for (s, t), distance in zip(cases, found.tolist(), strict=True):
        assert distance == slow_distance([int(v) for v in s], [int(v) for v in t], bits)
    assert found[:2].tolist() == [0, 2 << bits] and found[3:5].tolist() == [1 << bits, 0]


def test_roots_and_lengths_beside_every_power_of_two() -> None:
    beside = {max(0, (1 << n) + d) for n in range(63) for d in (-2, -1, 0, 1, 2)}
    values = sorted(value for value in beside | {(2**31 - 1) ** 2 - d for d in (0, 1)} if value < 2**62)
    squares = [n * n + d for n in (2**26 + 1, 2**30 + 12345, 2**31 - 2) for d in (-1, 0, 1)]
    x = np.array([*values, *squares], np.int64)
    assert _floor_sqrt(x).tolist() == [math.isqrt(int(v)) for v in x]
    assert _bit_length(x).tolist() == [int(v).bit_length() for v in x]


def test_a_student_that_imitates_scores_nothing_anywhere() -> None:
    """Equal values, and the same directions at other lengths: 1 - cos is 0."""
    rng = np.random.default_rng(0)
    pairs = make((5, 4), [(5, 4, 6), (3, 2, 9)], [3, -7, -20, 11])
    maps = [rng.integers(-30, 31, (2, *tap.size, tap.channels)) for tap in pairs.taps[2:]]
    zeros = [tap.zero_point for tap in pairs.taps]
    both = [np.clip(q + z, -128, 127).astype(np.int8) for q, z in zip([2 * maps[0], maps[1], *maps], zeros, strict=True)]
    assert (pairs.integer(both) == 0).all()


def test_close_to_the_papers_formula() -> None:
    """The float map is the product of 1 - cos, resized bilinearly; the integers are within the rounding of their bits."""
    rng = np.random.default_rng(1)
    pairs = make((9, 9), [(9, 9, 20), (5, 5, 30), (3, 3, 40)], [0, 5, -5, 9, -128, 127])
    maps = random_maps(rng, pairs, 3, "any")
    for q, tap in zip(maps, pairs.taps, strict=True):
        q[0, 1, 1:] = tap.zero_point  # both vectors 0, or one
    maps[0][1, 1, 1] = pairs.taps[0].zero_point
    floats = [(q.astype(float) - tap.zero_point) * 0.1 for q, tap in zip(maps, pairs.taps, strict=True)]
    real, distances = pairs.real(floats), pairs.integer(maps)
    np.testing.assert_allclose(distances / 2**20, real, atol=2**-19)
    scorer = StudentTeacherScorer(pairs.layers, pairs.grid, 31)
    np.testing.assert_allclose(scorer.score(distances) * scorer.unit, real.prod(-1), atol=1e-5)
    assert scorer.unit == 2.0**-29


def test_the_product_of_all_pairs_fits() -> None:
    for pairs in range(1, 9):
        assert pairs * (fraction_bits(pairs) + 1) <= 63
    assert [fraction_bits(pairs) for pairs in range(1, 9)] == [20, 20, 20, 14, 11, 9, 8, 6]
    scorer = StudentTeacherScorer(((1, 1, 1),) * 3, (1, 1), 31)
    most = np.full((1, 1, 1, 3), 1 << 21, np.uint32)
    assert scorer.score(most) == 2**32 - 1 and scorer.score(most - 1) == ((2**21 - 1) ** 3) >> 31


def test_the_shift_leaves_room_above_good_images() -> None:
    rng = np.random.default_rng(2)
    pairs = make((4, 4), [(4, 4, 8), (2, 2, 8), (2, 2, 8)], [0] * 6)
    for kind in ("alike", "any", "zero", "ends"):
        batches = [random_maps(rng, pairs, 3, kind) for _ in range(2)]
        shift = choose_shift(pairs, batches)
        scorer = StudentTeacherScorer(pairs.layers, pairs.grid, shift)
        largest = max(int(scorer.score(pairs.integer(maps)).max()) for maps in batches)
        if kind == "zero":
            assert shift == largest == 0
        elif kind == "alike":
            assert 0 < shift < 31 and 2**15 <= largest < 2**16
        else:
            assert shift == 31 and largest < 2**32 - 1


def test_a_golden_vector_is_what_the_maps_have_there() -> None:
    """A map that is the same everywhere: its golden vectors score what its cells score."""
    rng = np.random.default_rng(3)
    pairs = make((4, 3), [(4, 3, 5), (2, 2, 7)], [1, 2, 3, 4])
    maps = [np.broadcast_to(rng.integers(-128, 128, tap.channels), (*tap.size, tap.channels)).astype(np.int8)
            for tap in pairs.taps]  # fmt: skip
    scorer = StudentTeacherScorer(pairs.layers, pairs.grid, 20)
    vectors, gold = golden_of(pairs, scorer, maps, [0, 5, 11], task=2)
    scores = scorer.score(pairs.integer([q[None] for q in maps])).ravel()
    assert vectors.shape == (3, 24) and vectors.dtype == np.int8 and gold.dtype == np.uint32
    assert gold.tolist() == [[2, cell, int(scores[cell])] for cell in (0, 5, 11)]


def tensor(name: str, shape: tuple[int, ...], dtype: str = "int8") -> Tensor:
    return Tensor(name, shape, dtype, Quantization(np.array([0.5], np.float32), np.array([3])))


def test_pairs_of_a_graphs_outputs() -> None:
    tensors = [tensor(f"{who}{i}", (1, size, size, 4 + i)) for who in "st" for i, size in enumerate((8, 4))]
    pairs = pairs_of(tensors)
    assert pairs.grid == (8, 8) and pairs.layers == ((8, 8, 4), (4, 4, 5)) and pairs.depth == 18 and pairs.bits == 20
    assert pairs_of(tensors, (2, 3)).grid == (2, 3)
    again = Pairs.from_sections(pairs.sections(), pairs.grid, [tap.name for tap in pairs.taps])
    assert again == pairs
    for wrong, words in (
        (tensors[:3], "have 3 maps; give an even number"), ([], "have 0 maps"), (tensors * 5, "have 20 maps"),
        ([*tensors[:3], tensor("t1", (1, 4, 4, 6))], "pair 1: the student's map is"),
        ([*tensors[:3], tensor("t1", (1, 5))], "layer t1 is no int8 map"),
        ([*tensors[:3], tensor("t1", (1, 4, 4, 5), "float32")], "layer t1 is no int8 map"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            pairs_of(wrong)


def test_what_is_no_distance_is_refused() -> None:
    scorer = StudentTeacherScorer(((2, 2, 3),) * 2, (2, 2), 0)
    for wrong in (np.zeros((1, 2, 2, 3), np.uint32), np.zeros((1, 2, 2, 2), np.int8)):
        with pytest.raises(InputError, match="a student of 2 layers needs uint32"):
            scorer.score(wrong)
