"""PCA feature importance: closed forms, scikit-learn's PCA cell by cell, and a brute-force STFPM map."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyvad.detectors import feature_importance
from tinyvad.detectors.feature_importance import (
    Importance,
    Moments,
    chosen_by,
    component_counts,
    components_of_layer,
    importance,
    loadings,
    mask_bytes,
    masked,
    top_mask,
    without_clashing,
    without_shared,
)
from tinyvad.detectors.student import Paste, Stfpm
from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.training import forward
from tinyvad.training.items import ArrayItems
from tinyvad.training.loop import train
from tinyvad.training.tape import value_and_gradients


def moments_of(maps: np.ndarray, batch: int = 7) -> Moments:
    moments = Moments()
    for start in range(0, len(maps), batch):
        moments.update(maps[start : start + batch])
    return moments


def mixed(rng: np.random.Generator, n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(n, H, W, C) float64: every cell has its own mixing of independent sources of falling strength."""
    height, width, channels = shape
    mixing = rng.normal(size=(height, width, channels, channels)) * 0.7 ** np.arange(channels)
    return np.einsum("hwcs,nhws->nhwc", mixing, rng.normal(size=(n, *shape))) + rng.normal(size=shape) * 5


def by_sklearn(maps: np.ndarray, components: int) -> np.ndarray:
    """(H, W, C) importance, a PCA a cell."""
    from sklearn.decomposition import PCA

    found = np.zeros(maps.shape[1:])
    for i, j in np.ndindex(*maps.shape[1:3]):
        pca = PCA(components, svd_solver="full").fit(maps[:, i, j])
        found[i, j] = np.abs(pca.components_).T @ pca.explained_variance_
    return found


def test_sums_do_not_depend_on_the_batches_and_give_numpys_covariance(rng: np.random.Generator) -> None:
    maps = rng.integers(-128, 128, (23, 3, 4, 5)).astype(np.int8)
    cells = np.arange(12)
    one, many = moments_of(maps, 23).covariance(cells), moments_of(maps, 4).covariance(cells)
    assert one.tobytes() == many.tobytes()  # integers: exact sums
    flat = maps.reshape(23, 12, 5).astype(np.float64)
    for cell in cells:
        np.testing.assert_allclose(one[cell], np.cov(flat[:, cell].T), rtol=1e-12, atol=1e-9)


def test_a_large_mean_does_not_spoil_the_covariance(rng: np.random.Generator) -> None:
    small = rng.normal(size=(30, 1, 2, 3))
    np.testing.assert_allclose(
        moments_of(small + 1e7).covariance(np.arange(2)), moments_of(small).covariance(np.arange(2)), rtol=1e-6
    )


def test_components_and_importance_are_those_of_scikit_learn(rng: np.random.Generator) -> None:
    from sklearn.decomposition import PCA

    maps = mixed(rng, 40, (3, 5, 6))
    found = importance(moments_of(maps), np.random.default_rng(3))
    for i, j in np.ndindex(3, 5):
        ratio = PCA(svd_solver="full").fit(maps[:, i, j]).explained_variance_ratio_
        assert found.counts[i, j] == int(np.argmax(np.cumsum(ratio) >= 0.8)) + 1
    expected = by_sklearn(maps, found.components)
    np.testing.assert_allclose(found.totals, expected.sum(-1), rtol=1e-9)
    np.testing.assert_allclose(found.values, expected / expected.sum(-1, keepdims=True), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found.values.sum(-1), 1, rtol=1e-12)


def test_many_blocks_of_cells_give_what_one_gives(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = moments_of(mixed(rng, 20, (4, 4, 3)))
    whole = importance(moments, np.random.default_rng(0))
    monkeypatch.setattr(feature_importance, "CELLS_AT_ONCE", 40)
    assert importance(moments, np.random.default_rng(0)).values.tobytes() == whole.values.tobytes()


def test_component_counts_by_hand() -> None:
    variances = np.array([[8.0, 1, 1], [7.9, 1.1, 1], [1, 1, 1], [0, 0, 0], [5, 0, 0]])
    assert component_counts(variances).tolist() == [1, 2, 3, 0, 1]
    assert component_counts(np.full((1, 10), 0.1), 1.0).tolist() == [10]  # no component too few by the last bit


def test_components_of_a_layer_are_the_99th_percentile_of_a_tenth_rounded_up() -> None:
    counts = np.ones((20, 20), np.int64)
    assert components_of_layer(counts, np.random.default_rng(0)) == 1
    counts[:] = 4
    assert components_of_layer(counts, np.random.default_rng(0)) == 4
    assert components_of_layer(np.zeros((2, 2), np.int64), np.random.default_rng(0)) == 1  # nothing varies
    # 200 cells, each value once: 20 of them are drawn, and the percentile lies between the two largest of these
    drawn = np.sort(np.random.default_rng(5).choice(200, 20, replace=False))
    expected = np.ceil(drawn[-2] + 0.81 * (drawn[-1] - drawn[-2]))  # (20 - 1) * 0.99 = 18.81
    assert components_of_layer(np.arange(200).reshape(10, 20), np.random.default_rng(5)) == expected


def test_signs_of_components_do_not_matter(rng: np.random.Generator) -> None:
    components, variances = rng.normal(size=(4, 3, 5)), rng.random((4, 3))
    flipped = components * rng.choice([-1.0, 1.0], (4, 3, 1))
    assert loadings(flipped, variances).tobytes() == loadings(components, variances).tobytes()
    np.testing.assert_allclose(loadings(components, variances)[0], np.abs(components[0]).T @ variances[0])


def test_a_channel_without_variance_has_no_importance_and_is_dropped(rng: np.random.Generator) -> None:
    for maps in (mixed(rng, 30, (2, 3, 5)), rng.integers(-128, 128, (30, 2, 3, 5))):
        maps[..., 2] = maps[0, ..., 2]
        found = importance(moments_of(maps), np.random.default_rng(0))
        assert (found.values[..., 2] == 0).all()
        assert not top_mask(found.values, 100)[..., 2].any()
        assert top_mask(found.values, 100)[..., [0, 1, 3, 4]].all()


def test_a_cell_without_variance_keeps_nothing(rng: np.random.Generator) -> None:
    maps = mixed(rng, 30, (2, 2, 4))
    maps[:, 1, 0] = maps[0, 1, 0]
    found = importance(moments_of(maps), np.random.default_rng(0))
    assert found.counts[1, 0] == 0 and found.totals[1, 0] == 0
    assert not found.values[1, 0].any() and not top_mask(found.values)[1, 0].any()
    np.testing.assert_allclose(found.values.sum(-1)[[0, 0, 1], [0, 1, 1]], 1)


def test_only_the_varying_channel_counts(rng: np.random.Generator) -> None:
    maps = np.zeros((12, 1, 1, 3))
    maps[:, 0, 0, 1] = rng.normal(size=12)
    found = importance(moments_of(maps), np.random.default_rng(0))
    np.testing.assert_allclose(found.values[0, 0], [0, 1, 0], atol=1e-15)
    np.testing.assert_allclose(found.totals[0, 0], maps[:, 0, 0, 1].var(ddof=1))
    assert found.counts[0, 0] == 1


def test_isotropic_data_keep_about_the_asked_share(rng: np.random.Generator) -> None:
    found = importance(moments_of(rng.normal(size=(200, 6, 6, 50)), 50), np.random.default_rng(0))
    for keep in (2, 10, 20, 60):
        # np.percentile interpolates between ranks, so each cell keeps keep % of 50 channels, or one more
        per_cell = top_mask(found.values, keep).sum(-1)
        assert ((per_cell >= keep / 2) & (per_cell <= keep / 2 + 1)).all()
    kept = top_mask(found.values, 20).mean((0, 1))
    assert kept.max() < 0.6  # and no channel is preferred


def test_fewer_images_than_components(rng: np.random.Generator) -> None:
    maps = rng.normal(size=(4, 3, 3, 10))
    found = importance(moments_of(maps), np.random.default_rng(0))
    assert found.components <= 3 and found.counts.max() <= 3  # the rank of 4 centred images
    expected = by_sklearn(maps, found.components)
    np.testing.assert_allclose(found.values, expected / expected.sum(-1, keepdims=True), rtol=1e-7)
    two = importance(moments_of(maps[:2]), np.random.default_rng(0))
    difference = np.abs(maps[1] - maps[0])  # the one direction there is
    assert two.components == 1
    np.testing.assert_allclose(two.values, difference / difference.sum(-1, keepdims=True), rtol=1e-7)


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        (np.zeros((1, 2, 2, 3)), "at least 2 good images"),
        (np.full((2, 2, 2, 3), np.nan), "NaN"),
        (np.broadcast_to(np.int8(0), (2, 1024, 1024, 64)), "take 32.0 GiB, at most 4"),
    ],
    ids=["one image", "no numbers", "too large"],
)  # fmt: skip
def test_what_cannot_be_analysed_is_told(maps: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        importance(moments_of(maps), np.random.default_rng(0))


def test_maps_of_another_shape_are_refused() -> None:
    moments = moments_of(np.zeros((2, 2, 2, 3)))
    with pytest.raises(InputError, match=r"\(2, 2, 4\), the ones before were \(2, 2, 3\)"):
        moments.update(np.zeros((2, 2, 2, 4)))


def test_top_mask_by_hand() -> None:
    values = np.array([[[0.4, 0.1, 0.3, 0.2], [0.5, 0.5, 0, 0]]])
    assert top_mask(values, 25).tolist() == [[[True, False, False, False], [True, True, False, False]]]
    assert top_mask(values, 100).tolist() == [[[True] * 4, [True, True, False, False]]]
    for keep in (0, -1, 100.1, float("nan")):
        with pytest.raises(InputError, match="above 0 and at most 100"):
            top_mask(values, keep)


def masks_by_hand() -> list[np.ndarray]:
    """Three products, one cell of four channels: 0 chosen by all, 1 by the first two, 2 by the third, 3 by none."""
    return [np.array(row, bool).reshape(1, 1, 4) for row in ([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0])]


def test_first_rule_drops_what_two_products_chose() -> None:
    assert chosen_by(masks_by_hand()).ravel().tolist() == [3, 2, 1, 0]
    kept = without_shared(masks_by_hand())
    assert [mask.ravel().tolist() for mask in kept] == [[False] * 4, [False] * 4, [False, False, True, False]]


def test_second_rule_drops_only_where_ranges_overlap() -> None:
    # channel 0: of [-1, 3], [2, 5], [3, 6] the first two share 1 of 6, the last two 2 of 4, the others nothing
    # channel 1: the same range
    lows = [np.array(v, float).reshape(1, 1, 4) for v in ([-1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0])]
    highs = [np.array(v, float).reshape(1, 1, 4) for v in ([3, 1, 1, 1], [5, 1, 1, 1], [6, 1, 1, 1])]
    kept = without_clashing(masks_by_hand(), lows, highs, apart=False)
    assert [mask.ravel().tolist() for mask in kept] == [
        [True, False, False, False], [False, False, False, False], [False, False, True, False],
    ]  # fmt: skip
    # nothing is dropped where no overlap is too large
    all_kept = without_clashing(masks_by_hand(), lows, highs, apart=False, overlap=1.0)
    assert all((a == b).all() for a, b in zip(all_kept, masks_by_hand()))
    # the other reading: what the three products share in channel 0 with less than 30 % overlap goes, channel 1 stays
    apart = without_clashing(masks_by_hand(), lows, highs, apart=True)
    assert [mask.ravel().tolist() for mask in apart] == [
        [False, True, False, False], [False, True, False, False], [False, False, True, False],
    ]  # fmt: skip


def test_masks_take_a_bit_a_feature() -> None:
    shapes = ((64, 64, 64), (32, 32, 128), (16, 16, 256))  # ResNet18 at 256 pixels, as in the thesis
    assert mask_bytes(np.ones(shape, bool) for shape in shapes) == 57_344
    assert mask_bytes([np.ones((1, 3, 3), bool)]) == 2


def stfpm_map(student: list[np.ndarray], teacher: list[np.ndarray]) -> np.ndarray:
    """The product over layers of |t/|t| - s/|s||^2, plainly; layers of one size."""
    total = np.ones(student[0].shape[:3])
    for s, t in zip(student, teacher, strict=True):
        unit = [v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12) for v in (s, t)]
        total *= ((unit[0] - unit[1]) ** 2).sum(-1)
    return total


def test_masks_of_ones_leave_stfpm_as_it_is(rng: np.random.Generator) -> None:
    student, teacher = ([rng.normal(size=(2, 4, 4, c)).astype(np.float32) for c in (3, 5)] for _ in range(2))
    ones = [np.ones((4, 4, c), bool) for c in (3, 5)]
    expected = stfpm_map(student, teacher)
    assert stfpm_map(masked(student, ones), masked(teacher, ones)).tobytes() == expected.tobytes()
    assert masked(student, ones)[0].dtype == np.float32


def test_masks_apply_before_the_normalisation(rng: np.random.Generator) -> None:
    student, teacher = ([rng.normal(size=(2, 4, 4, 6))] for _ in range(2))
    mask = rng.random((4, 4, 6)) < 0.5
    mask[0, 0] = False  # nothing left: no difference
    found = stfpm_map(masked(student, [mask]), masked(teacher, [mask]))
    assert (found[:, 0, 0] == 0).all()
    kept = mask[2, 3]
    alone = stfpm_map([student[0][:, 2:3, 3:4][..., kept]], [teacher[0][:, 2:3, 3:4][..., kept]])
    np.testing.assert_allclose(found[:, 2, 3], alone[:, 0, 0], rtol=1e-12)
    with pytest.raises(InputError, match="mask 0 is"):
        masked(student, [mask[:2]])


def test_the_choice_of_cells_follows_the_seed(rng: np.random.Generator) -> None:
    moments = moments_of(mixed(rng, 30, (6, 6, 8)))

    def run(seed: int) -> Importance:
        return importance(moments, np.random.default_rng(seed))

    assert run(1).values.tobytes() == run(1).values.tobytes()


# --- in STFPM and PaSTe


def teacher_network(rng: np.random.Generator) -> Graph:
    """Three convolutions on 16 x 16 images; the last two are tapped."""
    builder = GraphBuilder("teacher", (1, 16, 16, 3))
    x = builder.input
    for name, inputs, outputs, stride in (("a", 3, 6, 2), ("b", 6, 8, 1), ("c", 8, 10, 2)):
        weights = builder.constant(f"{name}.w", rng.normal(size=(outputs, 3, 3, inputs)).astype(np.float32) / 4)
        bias = builder.constant(f"{name}.b", np.zeros(outputs, np.float32))
        attributes = {"stride": (stride, stride), "pads": (1, 1, 1, 1), "dilation": (1, 1), "activation": "relu6"}
        x = builder.add("conv2d", [x, weights, bias], name, **attributes)
    return builder.finish(["b", "c"])


def items_of(detector: Stfpm, images: np.ndarray) -> ArrayItems:
    """Stored maps and targets of (n, 16, 16, 3) images."""
    stored = [images] if detector.trunk is None else forward.run(detector.trunk, {}, {}, [images], train=False)[0]
    assert detector.targets is not None
    return ArrayItems([*stored, *forward.run(detector.targets, {}, {}, stored, train=False)[0]])


@pytest.fixture(params=["stfpm", "paste"])
def detector(request: pytest.FixtureRequest) -> Stfpm:
    graph = teacher_network(np.random.default_rng(1))
    return Stfpm(graph, keep=25) if request.param == "stfpm" else Paste(graph, shared="a", keep=25)


def test_masks_of_ones_are_stfpm_to_the_bit(detector: Stfpm, rng: np.random.Generator) -> None:
    batch = items_of(detector, rng.normal(size=(5, 16, 16, 3)).astype(np.float32)).take(np.arange(5))
    network = detector.network
    results = []
    for masks in (None, [np.ones(target.shape[1:], bool) for target in batch[1:]]):
        detector.masks = masks
        value = value_and_gradients(lambda p: detector.loss(p, network.statistics, batch, rng), network.parameters)
        results.append((value[0], detector.maps(batch).tobytes(), {k: v.tobytes() for k, v in value[2].items()}))
    assert results[0] == results[1]


def test_a_training_makes_the_masks_of_its_task(detector: Stfpm, rng: np.random.Generator) -> None:
    items = items_of(detector, rng.normal(size=(20, 16, 16, 3)).astype(np.float32))
    trained = train(detector, items, None, replace(detector.recipe, epochs=1, batch=5, learning_rate=0.01))
    assert len(trained.history) == 1 and detector.masks is not None
    for mask, target in zip(detector.masks, items.take(np.arange(20))[1:], strict=True):
        moments = moments_of(target)
        assert mask.tobytes() == top_mask(importance(moments, np.random.default_rng(0)).values, 25).tobytes()
    learnt = detector.arrays()
    batch = items.take(np.arange(4))
    scores = detector.maps(batch)
    detector.masks = None
    assert (detector.maps(batch) != scores).any()
    detector.restore(learnt)
    np.testing.assert_array_equal(detector.maps(batch), scores)
    with pytest.raises(InputError, match="a build compares all channels"):
        detector.graph()


def test_only_kept_channels_are_compared_and_pull_at_the_student(detector: Stfpm, rng: np.random.Generator) -> None:
    batch = items_of(detector, rng.normal(size=(3, 16, 16, 3)).astype(np.float32)).take(np.arange(3))
    mask = np.zeros(batch[1].shape[1:], bool)
    mask[..., 2:5] = True
    detector.masks = [mask, np.zeros(batch[2].shape[1:], bool)]  # nothing of the second layer
    network = detector.network
    other = [*batch[:1], *(target.copy() for target in batch[1:])]
    other[1][..., [0, 1, 5, 6, 7]] += 7
    other[2] -= 3
    loss, _, gradients = value_and_gradients(lambda p: detector.loss(p, network.statistics, batch, rng), network.parameters)
    assert loss == detector.loss(network.parameters, network.statistics, other, rng)[0]
    np.testing.assert_array_equal(gradients["c/scale"], 0)
    scale = gradients["b/scale"]  # of the layer's own batch norm: channels that are left out are not moved
    assert (scale[[0, 1, 5, 6, 7]] == 0).all() and (scale[2:5] != 0).all()


def test_a_checkpoint_of_another_keep_is_not_gone_on_from(rng: np.random.Generator, tmp_path: Path) -> None:
    images = rng.normal(size=(12, 16, 16, 3)).astype(np.float32)
    for keep, refused in ((25, False), (25, False), (50, True), (None, True)):
        detector = Paste(teacher_network(np.random.default_rng(1)), shared="a", keep=keep)
        recipe = replace(detector.recipe, epochs=1, batch=6, learning_rate=0.01)
        with pytest.raises(InputError, match="another training") if refused else nullcontext():
            train(detector, items_of(detector, images), None, recipe, checkpoint=tmp_path / "half.npz")
