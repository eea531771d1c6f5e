"""The losses: closed forms, plain loops forwards, central differences backwards."""

from __future__ import annotations

import numpy as np
import pytest
from finite_differences import check_gradients
from sklearn.neighbors import NearestNeighbors

pytest.importorskip("autograd", reason="training needs autograd: pip install 'tinyvad[train]'")

from tinyvad.errors import InputError
from tinyvad.training import losses
from tinyvad.training.tape import value_and_gradients


def directions(rng, channels=(6, 17), dtype=np.float64):
    sizes = ((2, 3, 4), (2, 2, 2))
    return [rng.normal(size=(*size, c)).astype(dtype) for size, c in zip(sizes, channels)]


def test_feature_loss_is_the_papers(rng):
    student, teacher = directions(rng), directions(rng)
    expected = 0.0
    for s, t in zip(student, teacher):
        cosine = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
        expected += (2 - 2 * cosine).mean()
        np.testing.assert_allclose(losses.direction_map(s, t), 2 - 2 * cosine, atol=1e-12)
    assert losses.normalised_feature_loss(student, teacher) == pytest.approx(expected, rel=1e-12)


def test_feature_loss_gradient(rng):
    student, teacher = directions(rng), directions(rng)
    arrays = {"first": student[0], "second": student[1]}
    found = check_gradients(lambda p: losses.normalised_feature_loss([p["first"], p["second"]], teacher), arrays, 1e-6)
    # only the direction counts: the gradient stands at right angles to the student
    np.testing.assert_allclose((found["first"] * student[0]).sum(-1), 0, atol=1e-10)


def test_feature_gradient_of_one_vector_in_closed_form(rng):
    s, t = rng.normal(size=5), rng.normal(size=5)
    _, _, found = value_and_gradients(
        lambda p: (losses.normalised_feature_loss([p["s"]], [t.reshape(1, 1, 1, 5)]), None), {"s": s.reshape(1, 1, 1, 5)}
    )
    unit_t, unit_s = t / np.linalg.norm(t), s / np.linalg.norm(s)
    expected = -2 * (unit_t - (unit_t @ unit_s) * unit_s) / np.linalg.norm(s)
    np.testing.assert_allclose(found["s"].ravel(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_equal_student_has_loss_and_map_zero(rng, dtype):
    maps = directions(rng, dtype=dtype)
    assert losses.normalised_feature_loss(maps, [m.copy() for m in maps]) == 0.0
    assert not losses.direction_map(maps[0], maps[0].copy()).any()


def test_scale_of_the_teacher_changes_nothing_and_opposite_is_the_most(rng):
    student, teacher = directions(rng), directions(rng)
    loss = losses.normalised_feature_loss(student, teacher)
    assert losses.normalised_feature_loss(student, [t * 37 for t in teacher]) == pytest.approx(loss, rel=1e-12)
    assert 0 < loss < 4 * len(student)
    assert losses.normalised_feature_loss(student, [-s for s in student]) == pytest.approx(4 * len(student))


def test_positions_without_direction(rng):
    """All zeros: the distance is that of the other's unit vector, and nothing is pulled anywhere."""
    teacher = rng.normal(size=(1, 1, 2, 3))
    student = np.array([[[[0, 0, 0], [1, 2, 3]]]], np.float64)
    np.testing.assert_allclose(losses.direction_map(student, np.zeros_like(student)), [[[0, 1]]])
    np.testing.assert_allclose(losses.direction_map(student, teacher)[0, 0, 0], 1)
    _, _, found = value_and_gradients(
        lambda p: (losses.normalised_feature_loss([p["s"]], [teacher]), None), {"s": student}
    )
    assert not found["s"][0, 0, 0].any() and found["s"][0, 0, 1].any()


def test_maps_that_do_not_go_together_are_an_input_error(rng):
    student = directions(rng)
    for teacher in ([student[0]], [student[1], student[0]], []):
        with pytest.raises(InputError, match="tap the same layers"):
            losses.normalised_feature_loss(student, teacher)


def test_hinge(rng):
    clean, noisy = rng.normal(size=(2, 5)), rng.normal(size=(3, 4))
    expected = np.maximum(0, 0.5 - clean).mean() + np.maximum(0, 0.5 + noisy).mean()
    assert losses.hinge(clean, noisy) == pytest.approx(expected, rel=1e-12)
    check_gradients(lambda p: losses.hinge(p["clean"], p["noisy"], 0.8), {"clean": clean, "noisy": noisy})


def test_hinge_at_its_ends():
    """Separated by the margin: nothing left to learn. Equal values within it: exactly twice the margin."""
    good, bad = np.full((2, 3), 0.5), np.full((2, 3), -0.5)
    value, _, found = value_and_gradients(lambda p: (losses.hinge(p["g"], p["b"]), None), {"g": good, "b": bad})
    assert value == 0 and not found["g"].any() and not found["b"].any()
    same = np.linspace(-0.5, 0.5, 7)
    assert losses.hinge(same, same) == pytest.approx(1.0)
    assert losses.hinge(same * 3, same * 3) > 1.0


def plain_cfa(features, centres, radius, attract, repel, nu, alpha):
    squared = np.sort(((features.reshape(-1, 1, features.shape[-1]) - centres) ** 2).sum(-1), 1)
    pulled = np.maximum(0, squared[:, :attract] - radius**2).mean()
    pushed = np.maximum(0, radius**2 - squared[:, attract : attract + repel] - alpha).mean()
    return (pulled + pushed) / nu


@pytest.mark.parametrize("radius", [1e-5, 1.6, 2.5])  # the paper's start; some terms active; nearly all pushed
def test_cfa_loss(rng, radius):
    features, centres = rng.normal(size=(2, 3, 2, 4)), rng.normal(size=(11, 4))
    settings = {"attract": 3, "repel": 2, "nu": 0.5, "alpha": 0.1}
    expected = plain_cfa(features, centres, radius, **settings)
    assert losses.cfa_loss(features, centres, radius, **settings) == pytest.approx(expected, rel=1e-10)
    arrays = {"features": features, "radius": np.array(radius)}
    check_gradients(lambda p: losses.cfa_loss(p["features"], centres, p["radius"], **settings), arrays, 1e-6)


def test_cfa_loss_is_zero_where_the_paper_says(rng):
    """The nearest three within r, the next beyond sqrt(r^2 - alpha): nothing to pay; one step further: something."""
    centres = np.array([[0.0], [0.1], [-0.1], [2.0], [-2.0], [3.0]])
    features = np.zeros((4, 1))
    assert losses.cfa_loss(features, centres, 0.5) == 0
    assert losses.cfa_loss(features, centres, 0.05) == pytest.approx((2 * (0.01 - 0.0025) / 3) / 1e-3)
    assert losses.cfa_loss(features, centres, np.sqrt(4.05)) == 0  # alpha of 0.1 is still kept
    assert losses.cfa_loss(features, centres, np.sqrt(4.4)) == pytest.approx(2 * 0.3 / 3 / 1e-3)
    with pytest.raises(InputError, match="needs 6"):
        losses.cfa_loss(features, centres[:5], 0.5)


def test_nearest_centres_are_scikit_learns(rng):
    rows, centres = rng.normal(size=(2500, 8)).astype(np.float32), rng.normal(size=(70, 8)).astype(np.float32)
    indices, squared = losses.nearest_centres(rows, centres, 5)
    distance, expected = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(centres).kneighbors(rows)
    np.testing.assert_allclose(np.sqrt(squared), distance, atol=1e-5)
    assert (indices == expected).mean() > 0.999  # float32 may swap near ties
    every, _ = losses.nearest_centres(rows[:3], centres[:5], 5)
    assert (np.sort(every, 1) == np.arange(5)).all()
