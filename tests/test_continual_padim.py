"""The PaDiM family over tasks: merged is joint, a model a task never forgets, the published mean is biased."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis

from tinyvad.continual.base import Context
from tinyvad.continual.padim import NO_TASK, Form, PadimMulti, PadimSeparate, PadimUni, log_determinant
from tinyvad.continual.padim_bounds import PadimFineTuning, PadimJoint
from tinyvad.continual.padim_original import PadimOriginal
from tinyvad.detectors.padim import Padim, PadimCompact
from tinyvad.detectors.task_gaussians import task_bytes
from tinyvad.errors import InputError

DEPTH, CHANNELS, GRID = 8, 5, (2, 3)
STEPS = np.random.default_rng(1).uniform(0.03, 0.07, DEPTH)
CONTEXT = Context(STEPS, CHANNELS, 6)
FULL, LITE, COMPACT = Form("padim"), Form("padim-lite"), Form("padim-compact", 5)
FORMS = pytest.mark.parametrize("form", [FULL, LITE, Form("padim", 6, bits=4), COMPACT], ids=lambda form: form.name)


def images(task: int, n: int, part: int = 0, spread: float = 7.0) -> np.ndarray:
    """(n, H, W, D) int8: good images of made-up product ``task``; ``part`` draws others of the same product."""
    rng = np.random.default_rng(task)
    mix = rng.normal(size=(DEPTH, DEPTH)) / np.sqrt(DEPTH)
    mean = rng.normal(0, 14, (*GRID, DEPTH)) + rng.normal(0, 9, DEPTH)
    noise = np.random.default_rng((task, part)).normal(size=(n, *GRID, DEPTH))
    return np.clip(np.rint(noise @ mix * spread + mean), -127, 127).astype(np.int8)


def learnt(method, tasks: int = 3, n: int = 40):
    for task in range(tasks):
        data = images(task, n + 10 * task)
        method.learn(f"product {task}", [data[:13], data[13:]])
    return method


PROBE = np.concatenate([images(task, 6, part=1) for task in range(3)])  # 6 images of each of three products


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert (array.dtype, array.shape, array.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


METHODS: dict[str, Callable[[], object]] = {
    f"{make.__name__} {form.name} {form.dimensions}": partial(make, CONTEXT, form)
    for make in (PadimUni, PadimMulti, PadimSeparate, PadimJoint, PadimFineTuning, PadimOriginal)
    for form in (FULL, LITE, Form("padim", 6, bits=4), COMPACT)
    if not (make is PadimOriginal and form is COMPACT)
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_five_tasks_saved_and_a_sixth_equal_never_having_stopped(make):
    whole, stopped, resumed = learnt(make(), 5), learnt(make(), 5), make()
    file = io.BytesIO()
    np.savez(file, **stopped.state())
    file.seek(0)
    with np.load(file) as arrays:
        resumed.restore(dict(arrays))
    same_state(resumed.state(), whole.state())
    for method in (whole, resumed):
        method.learn("sixth", [images(5, 21)])
    assert resumed.task_names == whole.task_names == [*(f"product {i}" for i in range(5)), "sixth"]
    same_state(resumed.state(), whole.state())
    np.testing.assert_array_equal(resumed.score(PROBE).maps, whole.score(PROBE).maps)
    empty = make()
    empty.restore(make().state())
    assert empty.task_names == []


@pytest.mark.parametrize("form", [FULL, LITE, Form("padim", 6, bits=4)], ids=lambda form: form.name)
def test_uni_is_the_fit_on_all_images_in_any_order(form):
    uni, joint, backwards = learnt(PadimUni(CONTEXT, form)), learnt(PadimJoint(CONTEXT, form)), PadimUni(CONTEXT, form)
    for task in (2, 0, 1):
        backwards.learn("", [images(task, 40 + 10 * task)])
    everything = np.concatenate([images(task, 40 + 10 * task) for task in range(3)])
    batch = Padim(STEPS, form is LITE, form.dimensions, bits=form.bits or 8).fit([everything]).to_scorer()
    for method in (uni, joint, backwards):
        for tag, array in batch.sections().items():
            np.testing.assert_array_equal(method.scorer.sections()[tag], array)


def test_compact_joint_is_the_fit_on_all_images():
    joint = learnt(PadimJoint(CONTEXT, COMPACT))
    everything = np.concatenate([images(task, 40 + 10 * task) for task in range(3)])
    batch = PadimCompact(5, STEPS).fit([everything]).to_scorer()
    for tag, array in batch.sections().items():
        np.testing.assert_array_equal(joint.scorer.sections()[tag], array)


def test_compact_uni_is_the_fit_on_all_images_in_the_first_ones_space():
    uni, at_once = learnt(PadimUni(CONTEXT, COMPACT)), PadimUni(CONTEXT, COMPACT)
    at_once.learn("first", [images(0, 40)])
    at_once.learn("rest", [images(1, 50), images(2, 60)])
    same_state({**uni.state(), "tasks": np.array(0)}, {**at_once.state(), "tasks": np.array(0)})


def test_uni_measures_scipys_distance_over_all_images():
    uni = learnt(PadimUni(CONTEXT, FULL))
    everything = np.concatenate([images(task, 40 + 10 * task) for task in range(3)]) * STEPS
    maps = uni.score(PROBE).maps
    for h, w in np.ndindex(GRID):
        inverse = np.linalg.inv(np.cov(everything[:, h, w], rowvar=False) + 0.01 * np.eye(DEPTH))
        expected = [scipy_mahalanobis(x * STEPS, everything[:, h, w].mean(0), inverse) for x in PROBE[:, h, w]]
        np.testing.assert_allclose(maps[:, h, w], expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("form", [FULL, LITE], ids=["padim", "padim-lite"])
def test_multi_of_one_task_is_padim(form):
    batch = Padim(STEPS, form is LITE).fit([images(0, 40)]).to_scorer()
    expected = np.sqrt(batch.score(PROBE).astype(float)) / 16
    for select in ("patch", "image", "prototype"):
        multi = learnt(PadimMulti(CONTEXT, form, select), 1)
        np.testing.assert_array_equal(multi.score(PROBE).maps, expected)


@FORMS
def test_patch_maps_are_the_least_of_all_tasks_and_never_rise(form):
    multi = learnt(PadimMulti(CONTEXT, form, "patch"))
    each = np.stack([multi.score(PROBE, task).maps for task in range(3)])
    before = multi.score(PROBE)
    np.testing.assert_array_equal(before.maps, each.min(0))
    np.testing.assert_array_equal(before.tasks, each.argmin(0))
    multi.learn("another", [images(7, 40)])
    assert (multi.score(PROBE).maps <= before.maps).all()


@FORMS
@pytest.mark.parametrize("select", ["image", "prototype"])
def test_a_known_task_is_never_forgotten(form, select):
    multi = learnt(PadimMulti(CONTEXT, form, select), 1)
    before = multi.score(PROBE, 0)
    for task in range(1, 4):
        multi.learn("more", [images(task, 40)])
    after = multi.score(PROBE, 0)
    np.testing.assert_array_equal(after.maps, before.maps)
    np.testing.assert_array_equal(after.tasks, np.zeros(len(PROBE)))


@FORMS
def test_images_find_their_task(form):
    truth = np.repeat([0, 1, 2], 6)
    for select in ("image", "prototype"):
        multi = learnt(PadimMulti(CONTEXT, form, select))
        found = multi.score(PROBE)
        np.testing.assert_array_equal(found.tasks, truth)
        for task in range(3):
            np.testing.assert_array_equal(found.maps[truth == task], multi.score(PROBE[truth == task], task).maps)
    separate = learnt(PadimSeparate(CONTEXT, form))
    np.testing.assert_array_equal(separate.score(PROBE).tasks, truth)


def test_image_mode_takes_the_smallest_mean_square():
    multi = learnt(PadimMulti(CONTEXT, LITE, "image"))
    probe = np.concatenate([PROBE, np.roll(PROBE, 1, axis=3), PROBE // 2])  # some near no task
    squares = np.array([(multi.score(probe, task).maps ** 2).mean((1, 2)) for task in range(3)])
    np.testing.assert_array_equal(multi.score(probe).tasks, squares.argmin(0))


def test_the_log_determinant_decides_between_narrow_and_wide():
    """Two tasks of one mean: on a narrow image the wide one has the smaller distance, the narrow one the likelihood."""
    narrow, wide = images(0, 300, spread=3.0), images(0, 300, part=1, spread=30.0)
    plain, full = PadimMulti(CONTEXT, FULL, "image"), PadimMulti(CONTEXT, FULL, "image", log_determinant=True)
    for method in (plain, full):
        method.learn("narrow", [narrow])
        method.learn("wide", [wide])
    probe = images(0, 20, part=2, spread=3.0)
    assert (plain.score(probe).tasks == 1).all()
    assert (full.score(probe).tasks == 0).all()


@pytest.mark.parametrize("form", [FULL, LITE], ids=["padim", "padim-lite"])
def test_log_determinant_is_numpys(form):
    data = images(0, 60)
    scorer = learnt(PadimMulti(CONTEXT, form), 1, 60).scorers[0]
    for h, w in np.ndindex(GRID):
        covariance = np.cov(data[:, h, w].astype(float), rowvar=False) + np.diag(0.01 / STEPS**2)
        if form is LITE:
            covariance = np.diag(covariance.diagonal())
        assert log_determinant(scorer)[h, w] == pytest.approx(np.linalg.slogdet(covariance)[1], abs=0.2)


@FORMS
def test_memory_of_t_tasks_is_t_times_that_of_one(form):
    one, six = learnt(PadimMulti(CONTEXT, form), 1), learnt(PadimMulti(CONTEXT, form), 6)
    own, shared = task_bytes(one.space, GRID)
    row = 16 + 4 * CHANNELS  # TASK and PROT
    assert one.nbytes() == own + row + shared
    assert six.nbytes() == 6 * (own + row) + shared
    assert six.device_nbytes() == six.nbytes() + 6 * 4  # thresholds
    uni = [learnt(PadimUni(CONTEXT, form), tasks) for tasks in (1, 6)]
    assert uni[0].nbytes() == uni[1].nbytes()
    assert uni[0].device_nbytes() == own + shared + 4


def test_separate_projections_are_counted_each():
    own, shared = task_bytes(learnt(PadimMulti(CONTEXT, COMPACT), 1).space, GRID)
    assert learnt(PadimSeparate(CONTEXT, COMPACT)).device_nbytes() == 3 * (own + shared + 4 + 4 * CHANNELS)


def test_lite_multi_is_smaller_than_full_uni():
    """2d bytes a cell and task against 3d + d(d - 1) / 2 of the full covariance's 8-bit factor."""
    lite, full = (task_bytes(learnt(PadimMulti(CONTEXT, form), 1).space, (100, 100))[0] for form in (LITE, FULL))
    assert lite == 10_000 * 2 * DEPTH + 1024
    assert full == 10_000 * (3 * DEPTH + DEPTH * (DEPTH - 1) // 2) + 2048


def test_separate_is_a_batch_detector_a_task():
    separate = learnt(PadimSeparate(CONTEXT, COMPACT))
    for task in range(3):
        batch = PadimCompact(5, STEPS).fit([images(task, 40 + 10 * task)]).to_scorer()
        np.testing.assert_array_equal(separate.score(PROBE, task).maps, np.sqrt(batch.score(PROBE).astype(float)) / 16)


def test_fine_tuning_knows_the_last_task_only():
    method = learnt(PadimFineTuning(CONTEXT, FULL))
    batch = Padim(STEPS).fit([images(2, 60)]).to_scorer()
    found = method.score(PROBE)
    np.testing.assert_array_equal(found.maps, np.sqrt(batch.score(PROBE).astype(float)) / 16)
    assert (found.tasks == 2).all()


def test_one_model_for_all_chooses_no_task():
    for method in (PadimUni(CONTEXT, FULL), PadimJoint(CONTEXT, FULL), PadimOriginal(CONTEXT, FULL)):
        learnt(method)
        assert (method.score(PROBE).tasks == NO_TASK).all()
        assert (method.score(PROBE, 1).tasks == 1).all()


@pytest.mark.parametrize("of", ["inverse", "cov"])
def test_original_is_the_running_mean(of):
    original = learnt(PadimOriginal(CONTEXT, FULL, of))
    lite = learnt(PadimOriginal(CONTEXT, LITE, of))
    h, w = 1, 2
    real = [images(task, 40 + 10 * task)[:, h, w] * STEPS for task in range(3)]
    covariances = np.array([np.cov(x, rowvar=False) + 0.01 * np.eye(DEPTH) for x in real])
    variances = covariances.diagonal(axis1=1, axis2=2)
    if of == "inverse":
        a, b = np.linalg.inv(covariances).mean(0), (1 / variances).mean(0)
    else:
        a, b = np.linalg.inv(covariances.mean(0)), 1 / variances.mean(0)
    t = PROBE[:, h, w] * STEPS - np.mean([x.mean(0) for x in real], 0)
    np.testing.assert_allclose(original.score(PROBE).maps[:, h, w], np.sqrt(np.einsum("ni,ij,nj->n", t, a, t)), rtol=1e-8)
    np.testing.assert_allclose(lite.score(PROBE).maps[:, h, w], np.sqrt((t * t * b).sum(1)), rtol=1e-10)


@pytest.mark.parametrize("of", ["inverse", "cov"])
def test_original_is_right_for_equal_tasks_and_biased_otherwise(of):
    """Same n, means and covariances: equal to the exact merge but for its divisor, 2n - 1 against twice n - 1."""
    n = 400
    equal = PadimOriginal(CONTEXT, FULL, of)
    for _ in range(2):
        equal.learn("same", [images(0, n)])
    exact = Padim(STEPS).fit([np.concatenate([images(0, n)] * 2)]).score(PROBE)
    np.testing.assert_allclose(equal.score(PROBE).maps, exact, rtol=1 / n)
    biased = PadimOriginal(CONTEXT, FULL, of)
    for part, count in ((0, 5), (1, 40)):
        biased.learn("uneven", [images(0, count, part)])
    exact = Padim(STEPS).fit([images(0, 5), images(0, 40, 1)]).score(PROBE)
    assert np.abs(biased.score(PROBE).maps - exact).max() > 1e-2
    assert np.abs(biased.score(PROBE).maps / exact - 1).mean() > 1e-2


def test_wrong_use_is_one_line():
    with pytest.raises(InputError, match="no PaDiM form called padm"):
        Form("padm")
    with pytest.raises(InputError, match="needs its number of dimensions"):
        Form("padim-compact")
    with pytest.raises(InputError, match="no task selection called pixel"):
        PadimMulti(CONTEXT, FULL, "pixel")
    with pytest.raises(InputError, match="no compact form"):
        PadimOriginal(CONTEXT, COMPACT)
    with pytest.raises(InputError, match="no average called mean"):
        PadimOriginal(CONTEXT, FULL, "mean")
    for make in METHODS.values():
        with pytest.raises(InputError, match="nothing is learnt"):
            make().score(PROBE)
        with pytest.raises(InputError, match="task 3: there are 3"):
            learnt(make()).score(PROBE, 3)
    with pytest.raises(InputError, match="at least one good image"):
        PadimUni(CONTEXT, FULL).learn("empty", [])
