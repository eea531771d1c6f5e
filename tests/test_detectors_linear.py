"""SimpleNet's last layer in integers: the words of the SPEC in plain Python, the float layer within rounding, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.detectors.linear import LARGEST_SCORE, LinearScorer
from tinyvad.errors import InputError


def by_hand(scorer: LinearScorer, cells: np.ndarray) -> np.ndarray:
    """(n, H, W) by the SPEC, one integer after the other."""
    flat = [
        min(max(scorer.offset - sum(int(w) * int(e) for w, e in zip(scorer.weights, cell, strict=True)), 0), LARGEST_SCORE)
        for cell in cells.reshape(-1, cells.shape[-1])
    ]
    return np.array(flat, np.uint32).reshape(cells.shape[:3])


def test_it_is_the_words_of_the_spec() -> None:
    rng = np.random.default_rng(0)
    for depth in (1, 3, 40):
        scorer = LinearScorer(rng.integers(-128, 128, depth).astype(np.int8), int(rng.integers(0, 5000)))
        cells = rng.integers(-128, 128, (2, 3, 4, depth)).astype(np.int8)
        np.testing.assert_array_equal(scorer.score(cells), by_hand(scorer, cells))


def test_the_ends_of_its_range() -> None:
    """65535 products of 128 * 128 and the largest offset: just below 2^32, as the SPEC says."""
    weights = np.full(65535, -128, np.int8)
    worst = np.full((1, 1, 1, 65535), -128, np.int8)
    assert LinearScorer(weights, 0).score(worst).item() == 0
    assert LinearScorer(weights, 0).score(-1 - worst).item() == 65535 * 128 * 127
    assert LinearScorer(-1 - weights, (1 << 31) - 1).score(worst).item() == 2**31 - 1 + 65535 * 127 * 128 < 2**32


def test_scores_are_the_float_layers_within_the_rounding_of_its_weights() -> None:
    rng = np.random.default_rng(1)
    weights, step = rng.normal(0, 0.1, 60), 0.03
    cells = rng.integers(0, 128, (3, 5, 5, 60)).astype(np.int8)
    scorer = LinearScorer.of_layer(weights, 0.25, step)
    exact = 0.25 - (cells * step) @ weights
    found = scorer.score(cells) * scorer.unit
    moved = found - exact
    bound = np.abs(weights).max() / 127 / 2 * step * cells.sum(-1, dtype=np.int64).max()  # half a step of every weight
    assert np.ptp(moved) <= 2 * bound  # but for a constant
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.999
    assert scorer.score(cells).min() > 0  # nothing is cut off
    assert (LinearScorer.of_layer(weights, -3.0, step).score(cells) == scorer.score(cells)).all()


def test_the_zero_is_the_best_good_cell() -> None:
    rng = np.random.default_rng(2)
    weights = rng.normal(0, 1, 8)
    good = [rng.integers(0, 60, (2, 3, 3, 8)).astype(np.int8) for _ in range(3)]
    scorer = LinearScorer.of_layer(weights, 0.0, 0.5, good)
    scores = np.concatenate([scorer.score(part) for part in good])
    assert scores.min() == 0 and (scores == 0).sum() == 1
    widest = LinearScorer.of_layer(weights, 0.0, 0.5)
    same = np.concatenate([widest.score(part) for part in good]).astype(np.int64)
    assert len(np.unique(same - scores)) == 1  # only the zero is another


def test_a_layer_of_zeros_gives_zeros() -> None:
    scorer = LinearScorer.of_layer(np.zeros(4), 0.0, 0.5)
    assert scorer.score(np.full((1, 2, 2, 4), 100, np.int8)).max() == 0 and scorer.unit == 0.5


def test_sections_come_back() -> None:
    scorer = LinearScorer.of_layer(np.array([0.5, -1.0, 0.25]), 0.0, 0.1)
    again = LinearScorer.from_sections(scorer.sections(), (2, 2), 3)
    assert (again.offset, again.unit, again.kind) == (scorer.offset, scorer.unit, "LINR")
    np.testing.assert_array_equal(again.weights, scorer.weights)
    assert scorer.weights.tolist() == [64, -127, 32] and scorer.offset == 127 * 96
    assert scorer.macs((4, 5)) == 60 and scorer.scratch_bytes() == 0


@pytest.mark.parametrize(
    ("weights", "step"), [([np.nan, 1.0], 0.1), ([np.inf, 1.0], 0.1), ([1.0, 1.0], 0.0), ([1.0, 1.0], np.nan)]
)
def test_what_is_not_finite_is_refused(weights: list[float], step: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        LinearScorer.of_layer(np.array(weights), 0.0, step)


@pytest.mark.parametrize(
    ("tag", "value", "words"),
    [
        ("CFG ", np.array([4, 0, 0, 0], np.int32), "CFG"), ("CFG ", np.array([3, 0, 0, 1], np.int32), "CFG"),
        ("BIAS", np.array([-1], np.int32), "BIAS: offset -1"), ("BIAS", np.array([1, 1], np.int32), "BIAS"),
        ("PROJ", np.zeros(4, np.int8), "PROJ"), ("PROJ", np.zeros(3, np.uint8), "PROJ"),
        ("SCAL", np.array([0.0]), "SCAL"), ("SCAL", np.array([np.inf]), "SCAL"),
    ],
)  # fmt: skip
def test_malformed_sections_are_named(tag: str, value: np.ndarray, words: str) -> None:
    sections = LinearScorer(np.ones(3, np.int8), 5).sections()
    with pytest.raises(InputError, match=words):
        LinearScorer.from_sections({**sections, tag: value}, (2, 2), 3)


def test_other_embeddings_are_refused() -> None:
    scorer = LinearScorer(np.ones(3, np.int8), 5)
    for wrong in (np.zeros((1, 2, 2, 4), np.int8), np.zeros((1, 2, 2, 3), np.int16)):
        with pytest.raises(InputError, match="the bank needs int8"):
            scorer.score(wrong)
