"""Metrics of the matrix: hand-made 3x3 matrices, invariances, NaN and zero, the step average of the IUF paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinyvad.continual import matrix as m
from tinyvad.errors import InputError

NAN = math.nan
HAND = [[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.72, 0.4, 0.5]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("average_final", (0.72 + 0.4 + 0.5) / 3),
        ("relative_forgetting", ((0.9 - 0.72) / 0.9 + (0.8 - 0.4) / 0.8) / 2),  # (.2 + .5) / 2
        ("ACC", (0.72 + 0.4 + 0.5) / 3),
        ("FM", (0.18 + 0.4) / 2),
        ("FM_units", (0.18 + 0.4) / 2),
        ("forgetting_chaudhry", (0.18 + 0.4) / 2),
        ("BWT", (-0.18 - 0.4) / 2),
    ],
)
def test_hand_made(name, expected):
    assert m.SUMMARIES[name].function(m.square(HAND)) == pytest.approx(expected, abs=1e-15)


def test_scores_before_learning_count_in_chaudhry_and_forward_transfer_only():
    full = m.square([[0.9, 0.95, 0.55], [0.6, 0.8, 0.7], [0.72, 0.4, 0.5]], chance=0.5)
    lower = m.square(HAND, chance=0.5)
    for name in ("average_final", "relative_forgetting", "ACC", "FM", "FM_units", "BWT"):
        assert m.SUMMARIES[name].function(full) == m.SUMMARIES[name].function(lower)
    assert m.chaudhry_forgetting(full) == pytest.approx((0.18 + 0.55) / 2)
    assert m.forward_transfer(full) == pytest.approx(((0.95 - 0.5) + (0.7 - 0.5)) / 2)
    assert math.isnan(m.forward_transfer(lower)) and math.isnan(m.forward_transfer(m.square(full.values)))


def test_the_best_after_its_own_step_counts_and_gains_are_negative():
    late = m.square([[0.5, NAN, NAN], [0.7, 0.3, NAN], [0.6, 0.6, 0.9]])
    assert m.fm_steps(late) == pytest.approx(((0.7 - 0.6) + (0.3 - 0.6)) / 2)
    assert m.backward_transfer(late) == pytest.approx((0.1 + 0.3) / 2)
    assert m.relative_forgetting(late) == pytest.approx(((0.1 / 0.7) + (-0.3 / 0.3)) / 2)


def test_the_thesis_form_of_relative_forgetting_is_the_same(rng):
    values = rng.uniform(0.1, 1, (5, 5))
    terms = [max((values[i, j] - values[4, j]) / values[i, j] for i in range(j, 4)) for j in range(4)]
    assert m.relative_forgetting(m.square(values)) == pytest.approx(sum(terms) / 4, abs=1e-14)


def test_constant_matrices_forget_nothing():
    constant = m.square(np.full((4, 4), 0.7), chance=0.7)
    for name, summary in m.SUMMARIES.items():
        value = summary.function(constant)
        assert value == pytest.approx(0.7 if name in ("average_final", "ACC") else 0, abs=1e-15), name


def test_invariances(rng):
    values = np.tril(rng.uniform(0.2, 1, (4, 4)))
    values[np.triu_indices(4, 1)] = NAN
    base = m.square(values)
    for name in ("FM", "FM_units", "forgetting_chaudhry", "BWT"):
        function = m.SUMMARIES[name].function
        assert function(m.square(values + 0.125)) == pytest.approx(function(base), abs=1e-14)  # adding a constant
        assert function(m.square(values * 100)) == pytest.approx(100 * function(base))  # fractions or percent
    assert m.relative_forgetting(m.square(values * 100)) == pytest.approx(m.relative_forgetting(base))
    grouped = m.ScoreMatrix("x", ("0", "1"), tuple("abcd"), (0, 0, 1, 1), rng.uniform(0, 1, (2, 4)))
    swapped = m.ScoreMatrix("x", ("0", "1"), tuple("badc"), (0, 0, 1, 1), grouped.values[:, [1, 0, 3, 2]])
    for name, value in m.summarise(grouped).items():
        assert m.summarise(swapped)[name] == pytest.approx(value), name
    peak = m.square([[0.9, NAN], [0.5, 0.8]])  # best just after learning: what is forgotten is -BWT
    assert m.fm_steps(peak) == pytest.approx(-m.backward_transfer(peak))


def test_nan_and_zero_are_left_out():
    undefined = m.square([[0.9, NAN, NAN], [0.6, NAN, NAN], [0.72, NAN, 0.5]])  # unit 1 has no anomalous image
    assert m.average_final(undefined) == pytest.approx(0.61) and m.acc_steps(undefined) == pytest.approx(0.61)
    assert m.fm_steps(undefined) == pytest.approx(0.18) and m.backward_transfer(undefined) == pytest.approx(-0.18)
    assert m.relative_forgetting(undefined) == pytest.approx(0.2)
    never = m.square([[0.0, NAN, NAN], [0.0, 0.8, NAN], [0.3, 0.4, 0.5]])  # best 0: no share of it can be lost
    assert m.relative_forgetting(never) == pytest.approx(0.5)
    single = m.summarise(m.square([[0.8]]))
    assert single["average_final"] == 0.8 and single["FM"] is None and single["relative_forgetting"] is None
    assert set(m.summarise(m.square([[NAN]])).values()) == {None}


def test_the_iuf_papers_numbers_only_fit_when_steps_count_once():
    # MVTec 14-1x1, UniAD: ACC 85.7, FM 18.3, and 96.6 after the base step is what a joint model reaches
    base, final, new = 0.966, 0.783, 0.931
    values = np.full((2, 15), NAN)
    values[0, :14], values[1, :14], values[1, 14] = base, final, new
    matrix = m.ScoreMatrix("image_AUROC", ("base", "new"), tuple(str(u) for u in range(15)), (0,) * 14 + (1,), values)
    assert m.acc_steps(matrix) == pytest.approx(0.857) and m.fm_steps(matrix) == pytest.approx(0.183)
    assert m.average_final(matrix) == pytest.approx((14 * 0.783 + 0.931) / 15)  # .793, not .857
    assert 15 * 0.857 - 14 * final > 1.8  # over units the new class would need an AUROC of 189 %
    assert m.fm_units(matrix) == pytest.approx(0.183)


def test_step_means_differ_from_unit_means():
    values = np.array([[1.0, 0.5, NAN], [0.4, 0.5, 0.8]])
    matrix = m.ScoreMatrix("x", ("0", "1"), tuple("abc"), (0, 0, 1), values)
    assert np.array_equal(matrix.by_step, [[0.75, NAN], [0.45, 0.8]], equal_nan=True)
    assert m.acc_steps(matrix) == pytest.approx(0.625) and m.average_final(matrix) == pytest.approx(1.7 / 3)
    assert m.fm_steps(matrix) == pytest.approx(0.3) and m.relative_forgetting(matrix) == pytest.approx(0.3)


def test_after_gives_the_curve():
    matrix = m.square(HAND, chance=[0.5, 0.6, 0.7])
    curve = [m.average_final(matrix.after(step)) for step in range(3)]
    assert curve == pytest.approx([0.9, 0.7, 0.54])
    assert matrix.after(1).units == ("0", "1") and np.array_equal(matrix.after(1).chance, [0.5, 0.6])
    with pytest.raises(InputError, match="step 3"):
        matrix.after(3)


def test_every_summary_has_one_printable_definition():
    for name, summary in m.SUMMARIES.items():
        assert summary.sentence.startswith("Mean over") and "\n" not in summary.sentence, name
        assert summary.sentence.endswith(".") and summary.sentence.count(". ") == 0 and len(summary.sentence) < 130


def test_json_keeps_every_bit(rng):
    values = rng.uniform(0, 1, (3, 4))
    values[0, 2:] = NAN
    chance = np.array([0.1, NAN, 1 / 3, 0])
    matrix = m.ScoreMatrix("pixel_F1Max", ("a", "b", "ü"), tuple("abcd"), (0, 0, 1, 2), values, chance)
    again = m.ScoreMatrix.from_json(matrix.to_json())
    assert np.array_equal(again.values, values, equal_nan=True) and again.values.dtype == np.float64
    assert np.array_equal(again.chance, matrix.chance, equal_nan=True)
    assert (again.metric, again.steps) == ("pixel_F1Max", ("a", "b", "ü"))
    assert (again.units, again.step_of) == (tuple("abcd"), (0, 0, 1, 2))
    assert "NaN" not in matrix.to_json()
    assert m.ScoreMatrix.from_json(m.square(HAND).to_json()).chance is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metric": 1}', "null"])
def test_damaged_json_is_told(text):
    with pytest.raises(InputError, match="stored matrix"):
        m.ScoreMatrix.from_json(text)


def test_wrong_matrices_are_refused():
    for values in (np.zeros((2, 3)), np.array([[np.inf]]), np.zeros((0, 0))):
        with pytest.raises(InputError, match="matrix of"):
            m.square(values, names=["a"] if values.size == 1 else ())
    with pytest.raises(InputError, match="outside"):
        m.ScoreMatrix("x", ("a",), ("a",), (1,), np.zeros((1, 1)))
    damaged = m.square(HAND).to_dict()
    damaged["values"][1] = [0.5]
    with pytest.raises(InputError, match="damaged"):
        m.ScoreMatrix.from_dict(damaged)


def test_routing():
    counts = m.confusion([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], 4)
    assert np.array_equal(counts, [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert np.array_equal(m.routing_per_task(counts), [2 / 3, 1, 0, NAN], equal_nan=True)
    assert m.routing_accuracy(counts) == pytest.approx((2 / 3 + 1 + 0) / 3)
    patches = m.confusion([0, 1], [[[0, 1], [0, 0]], [[1, 1], [1, 1]]], 2)
    assert np.array_equal(patches, [[3, 1], [0, 4]])
    assert math.isnan(m.routing_accuracy(m.confusion([], [], 2)))
    for true, chosen in (([0], [0, 1]), ([0], [2]), ([-1], [0])):
        with pytest.raises(InputError, match="routing"):
            m.confusion(true, chosen, 2)
