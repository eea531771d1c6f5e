"""Generated pictures: their form, that the seed alone decides them, and that every kind is drawn and shows something."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvad.distill import generated
from tinyvad.distill.colours import over, soft_mask
from tinyvad.distill.fields import lit, sampled, spectral, spread, worley
from tinyvad.distill.generated import FLAWS, KINDS, generate
from tinyvad.errors import InputError


@pytest.mark.parametrize("size", [16, 64, 97, 192])
def test_form_at_any_size(size: int) -> None:
    image = generate(np.random.default_rng(size), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_finite_varied_and_decided_by_the_seed(kind: str) -> None:
    for seed, size in ((0, 64), (1, 97), (2, 33), (3, 16)):
        field = KINDS[kind](np.random.default_rng(seed), size)
        assert field.shape in {(size, size), (size, size, 3)}
        assert np.isfinite(field).all()
        assert field.min() > -0.3 and field.max() < 1.3, (kind, field.min(), field.max())
        image = generate(np.random.default_rng(seed), size, kind)
        assert image.std() > 0.3, (kind, seed)
        assert np.array_equal(image, generate(np.random.default_rng(seed), size, kind))
        assert not np.array_equal(image, generate(np.random.default_rng(seed + 100), size, kind))


def test_generate_draws_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    for name in KINDS:

        def flat(rng: np.random.Generator, size: int, name: str = name) -> np.ndarray:
            drawn.append(name)
            return np.zeros((size, size), np.float32)

        monkeypatch.setitem(generated.KINDS, name, flat)
    rng = np.random.default_rng(0)
    for _ in range(400):
        generate(rng, 16)
    assert set(drawn) == set(KINDS)
    assert len(drawn) == 400


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_are_covers(flaw: str) -> None:
    rng = np.random.default_rng(5)
    covers = np.stack([FLAWS[flaw](rng, 65) for _ in range(12)])
    assert covers.shape == (12, 65, 65)
    assert covers.min() >= 0 and 0.2 < covers.max() <= 1


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InputError, match=r"kind 'sky'.*use one of") as wrong:
        generate(np.random.default_rng(0), 64, "sky")
    assert "\n" not in str(wrong.value)
    with pytest.raises(InputError, match="size 8: generated images need at least 16"):
        generate(np.random.default_rng(0), 8)


def test_worley_against_brute_force() -> None:
    """With jitter 0 the points are the middles of the unit cells."""
    u = np.array([[3.5, 3.5, 3.9]], np.float32)
    v = np.array([[7.5, 7.25, 7.5]], np.float32)
    near, second, _ = worley(np.random.default_rng(0), u, v, 0.0)
    assert np.allclose(near, [[0, 0.25, 0.4]], atol=1e-5)
    assert np.allclose(second, [[1, 0.75, 0.6]], atol=1e-5)


def test_sampling_between_pixels_and_round_the_edge() -> None:
    field = np.arange(16, dtype=np.float32).reshape(4, 4)
    x, y = np.array([1.0, 1.5, 3.5, 5.0]), np.array([2.0, 2.5, 0.0, 4.0])
    assert np.allclose(sampled(field, x, y), [9, 11.5, 1.5, 1])


def test_spectral_noise_falls_with_its_slope() -> None:
    """Neighbouring pixels of white noise don't agree; those of 1/f^2 noise nearly do; streaks agree along their angle."""

    def agreement(field: np.ndarray, axis: int) -> float:
        field = field - field.mean()
        return float((field * np.roll(field, 1, axis)).mean() / field.var())

    rng = np.random.default_rng(1)
    assert abs(agreement(spectral(rng, 128, 0.0), 1)) < 0.05
    assert agreement(spectral(rng, 128, 2.0), 1) > 0.9
    streaks = spectral(rng, 128, 0.5, 40.0, 0.0)
    assert agreement(streaks, 1) > agreement(streaks, 0) + 0.2


def test_flat_height_is_lit_evenly_and_masks_mix() -> None:
    shade = lit(np.random.default_rng(0), np.full((32, 32), 0.7, np.float32), 1.0)
    assert np.ptp(shade) < 1e-6
    assert soft_mask(np.array([-2.0, 0.0, 2.0])).tolist() == [1.0, 0.5, 0.0]
    mixed = over(np.zeros((1, 2, 3)), np.ones(3), np.array([[0.25, 1.0]]))
    assert mixed[0, :, 0].tolist() == [0.25, 1.0]


def test_spread_stays_in_its_range() -> None:
    rng = np.random.default_rng(0)
    draws = [spread(rng, 2.0, 32.0) for _ in range(500)]
    assert min(draws) >= 2 and max(draws) <= 32
    assert abs(np.median(draws) - 8) < 1.5  # the middle of the octaves
    assert spread(rng, 5.0, 2.0) == 5
