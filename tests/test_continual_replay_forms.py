"""Forms of stored maps: bytes by their formulas, errors within their bounds, against SVD, scikit-learn and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from tinyvad.continual import replay_levels as levels
from tinyvad.continual.replay_forms import FORMS, Encoded, decode, encode, row_bytes
from tinyvad.errors import InputError

OF_MAPS = [name for name in FORMS if name != "image"]
SHAPES = st.tuples(*[st.integers(1, 4)] * 4)


def maps_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Channels that depend on each other and differ in size, as behind a linear layer."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(shape[-1], shape[-1])) * np.geomspace(3, 0.1, shape[-1])[:, None]
    return (rng.normal(size=shape) @ mixing + rng.normal(size=shape[-1])).astype(np.float32)


def stored(form: str, maps: np.ndarray) -> tuple[Encoded, np.ndarray]:
    encoded = encode(form, maps, np.random.default_rng(0))
    return encoded, decode(form, encoded)


def some_maps(form: str, shape: tuple[int, ...]) -> np.ndarray:
    return (maps_of(shape) * 20).astype(np.uint8) if form == "image" else maps_of(shape)


@settings(max_examples=15, deadline=None)
@given(shape=SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_and_shapes(form, shape):
    maps = some_maps(form, shape)
    encoded, decoded = stored(form, maps)
    assert decoded.shape == maps.shape and decoded.dtype == maps.dtype
    assert len(encoded) == shape[0]
    assert encoded.nbytes == sum(len(array.tobytes()) for array in encoded.arrays().values())
    per_row = row_bytes(form, shape[1:])
    if per_row is not None:
        assert sum(array.nbytes for array in encoded.rows.values()) == shape[0] * per_row


@pytest.mark.parametrize(("form", "expected"), [
    ("float32", 98_304), ("float16", 49_152), ("int8", 24_576), ("int8-map", 24_584), ("int4", 12_288),
    ("rotated-4", 12_288), ("rotated-3", 9_216), ("rotated-2", 6_144), ("pq", 12_288), ("pca-99", None),
])  # fmt: skip
def test_bytes_of_the_thesis_map(form, expected):
    """MCUNet's trunk at 256 px: 24 x 32 x 32 values."""
    assert row_bytes(form, (32, 32, 24)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_some_items_decode_as_all_do(form):
    encoded, decoded = stored(form, some_maps(form, (5, 3, 4, 6)))
    some = encoded.take(np.array([1, 3]))
    np.testing.assert_allclose(decode(form, some), decoded[[1, 3]], rtol=1e-5, atol=1e-5)
    assert decode(form, encoded.take(np.array([], int))).shape == (0, 3, 4, 6)
    again = Encoded.of_arrays(encoded.arrays())
    assert decode(form, again).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_what_is_given_is_kept_or_changed(form):
    maps = some_maps(form, (3, 4, 4, 4))
    before = maps.copy()
    encoded, decoded = stored(form, maps)
    assert np.array_equal(maps, before)
    maps[:] = 0
    assert decode(form, encoded).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("form", OF_MAPS)
def test_bytes_do_not_depend_on_threads(form):
    maps = maps_of((6, 8, 8, 16))
    with threadpool_limits(2):
        two = stored(form, maps)
    with threadpool_limits(1):
        one = stored(form, maps)
    assert one[1].tobytes() == two[1].tobytes()
    assert all(array.tobytes() == two[0].arrays()[name].tobytes() for name, array in one[0].arrays().items())


def test_plain_forms_keep_every_bit():
    maps = np.array([0.0, -0.0, 1e-45, -3e38, np.pi, 1 / 3], np.float32).reshape(1, 1, 2, 3)
    assert stored("float32", maps)[1].tobytes() == maps.tobytes()
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert stored("image", image)[1].tobytes() == image.tobytes()


def test_float16_rounds_once():
    maps = maps_of((2, 3, 3, 5))
    assert np.array_equal(stored("float16", maps)[1], maps.astype(np.float16).astype(np.float32))
    assert np.all(np.abs(stored("float16", maps)[1] - maps) <= np.abs(maps) * 2.0**-11 + 2.0**-25)


@settings(max_examples=60, deadline=None)
@given(maps=arrays(np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32)))
@pytest.mark.parametrize("form", ["int8", "int8-map"])
def test_int8_is_at_most_half_a_step_away(form, maps):
    encoded, decoded = stored(form, maps)
    if form == "int8":
        step, axis = encoded.shared["step"], (0, 1, 2)
    else:
        step, axis = encoded.rows["range"][:, 1, None, None, None], (1, 2, 3)
    error = np.abs(decoded.astype(np.float64) - maps)
    assert np.all(error <= step.astype(np.float64) / 2 + np.spacing(np.abs(decoded)).astype(np.float64))
    span = maps.max(axis).astype(np.float64) - maps.min(axis)
    assert np.all((span == 0) | (np.abs(np.squeeze(step).reshape(span.shape) * 255.0 - span) <= span * 1e-6 + 1e-40))
    assert np.all(error[np.broadcast_to((maps.max(axis, keepdims=True) == maps.min(axis, keepdims=True)), maps.shape)] == 0)


def test_int8_ends_are_exact_levels():
    maps = np.linspace(-1, 254, 256, dtype=np.float32).reshape(1, 16, 16, 1) * np.float32(0.5)
    for form in ("int8", "int8-map"):
        assert np.array_equal(stored(form, maps)[1], maps)  # 256 even values are the 256 levels


def test_int8_tells_channels_apart_and_the_thesis_form_does_not():
    maps = np.stack([np.linspace(0, 1, 64), np.linspace(0, 1000, 64)], 1).astype(np.float32).reshape(1, 8, 8, 2)
    assert np.abs(stored("int8", maps)[1] - maps)[..., 0].max() <= 1 / 510 + 1e-6
    assert np.abs(stored("int8-map", maps)[1] - maps)[..., 0].max() >= 0.9


@pytest.mark.parametrize(("bits", "expected"), [(0, 1.0), (1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_levels_reach_the_known_error_of_a_gaussian(bits, expected):
    """Max 1960, table 1: the least mean squared error of 2**bits levels on a unit Gaussian."""
    values = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    table = levels.lloyd_levels(values, 1 << bits)
    assert np.all(np.diff(table) >= 0)
    found = np.square(values - table[levels.nearest_levels(values, table)].astype(np.float64)).mean()
    assert found == pytest.approx(expected, rel=0.04)


@settings(max_examples=60, deadline=None)
@given(
    table=arrays(np.float16, st.integers(1, 9), elements=st.floats(-9, 9, width=16)),
    values=arrays(float, 7, elements=st.floats(-20, 20)),
)
def test_nearest_levels_equal_brute_force(table, values):
    table = np.sort(table)
    found = table[levels.nearest_levels(values, table)].astype(float)
    distances = np.abs(values[:, None] - table.astype(float))
    np.testing.assert_allclose(np.abs(values - found), distances.min(1), rtol=0, atol=1e-12)


def test_bits_go_where_they_lower_the_error_most():
    rng = np.random.default_rng(3)
    for _ in range(10):
        # halving or better a bit, as all columns do: errors are convex, so the greedy order is the best one
        errors = rng.uniform(0.1, 9, (3, 1)) * np.cumprod(np.concatenate([np.ones((3, 1)), np.full((3, 8), 0.25)], 1), 1)
        for total in (0, 4, 7):
            chosen = levels.spend(errors, total)
            best = min(
                sum(errors[k, b] for k, b in enumerate(bits)) for bits in product(range(9), repeat=3) if sum(bits) == total
            )
            assert sum(chosen) == total
            assert sum(errors[k, b] for k, b in enumerate(chosen)) == pytest.approx(best)
    assert levels.spend(np.ones((2, 9)), 16) == [8, 8]


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, 8), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_packed_bits_come_back(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << np.array(bits), (5, len(bits))).astype(np.uint8)
    packed = levels.pack_bits(codes, bits)
    assert packed.shape == (5, -(-sum(bits) // 8))
    assert np.array_equal(levels.unpack_bits(packed, bits), codes)


def test_packed_bits_by_hand():
    assert levels.pack_bits(np.array([[5, 1, 2]], np.uint8), [3, 1, 2]).tolist() == [[0b10_1_101]]
    assert levels.pack_bits(np.array([[255, 3]], np.uint8), [8, 2]).tolist() == [[255, 3]]


def relative(maps: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.sqrt(np.square(decoded - maps).mean() / np.square(maps - maps.mean((0, 1, 2))).mean()))


def test_four_bits_on_a_gaussian():
    """Independent unit channels: int4 and rotated-4 both have Max's error of 16 levels, 0.009497."""
    maps = np.random.default_rng(5).normal(size=(8, 20, 20, 8)).astype(np.float32)
    for form in ("int4", "rotated-4"):
        assert relative(maps, stored(form, maps)[1]) == pytest.approx(np.sqrt(0.009497), rel=0.05)


def test_rotation_gains_what_transform_coding_says():
    """Two unit channels with correlation c: stored alone each has error D, on bit-optimal axes D sqrt(1 - c^2)."""
    rng = np.random.default_rng(6)
    c = 0.98
    noise = rng.normal(size=(8, 40, 40, 2))
    maps = np.stack([noise[..., 0], c * noise[..., 0] + np.sqrt(1 - c * c) * noise[..., 1]], axis=3).astype(np.float32)
    alone, rotated = (relative(maps, stored(form, maps)[1]) ** 2 for form in ("int4", "rotated-4"))
    assert rotated / alone == pytest.approx(np.sqrt(1 - c * c), rel=0.25)  # bits are whole numbers


def test_rotated_error_falls_with_bits():
    maps = maps_of((4, 12, 12, 12))
    errors = [relative(maps, stored(form, maps)[1]) for form in ("rotated-2", "rotated-3", "rotated-4", "int8", "float16")]
    assert errors == sorted(errors, reverse=True)


def test_rotated_needs_no_bits_for_what_does_not_vary():
    """One direction in 16 channels: it gets 8 bits, and is stored within the step that 256 levels leave."""
    along = np.linspace(-1, 1, 400)
    maps = (along[:, None] * np.linspace(-2, 3, 16) + 7).astype(np.float32).reshape(4, 10, 10, 16)
    encoded, decoded = stored("rotated-4", maps)
    assert encoded.shared["bits"][0] == 8
    assert relative(maps, decoded) < 0.005
    constant = np.full((2, 3, 3, 5), -4.25, np.float32)
    assert np.array_equal(stored("rotated-4", constant)[1], constant)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("form", ["int8", "int8-map", "int4", "rotated-4", "pca-int8", "pca-99"])
def test_error_does_not_depend_on_the_unit(form, scale):
    maps = maps_of((3, 8, 8, 6)) * np.float32(scale)
    assert relative(maps / np.float32(scale), stored(form, maps)[1] / np.float32(scale)) < 0.2


@pytest.mark.parametrize(("form", "keep"), [("pca-95", 0.95), ("pca-98", 0.98), ("pca-99", 0.99)])
def test_pca_keeps_its_share_with_the_fewest_axes(form, keep):
    maps = maps_of((4, 12, 12, 12))
    encoded, decoded = stored(form, maps)
    kept = encoded.rows["axes"].shape[1]
    retained, needed = [], []
    for one, back, scores in zip(maps, decoded, encoded.rows["scores"], strict=True):
        flat = one.reshape(-1, 12).astype(np.float64)
        squares = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
        assert np.square(back - one, dtype=np.float64).sum() == pytest.approx(squares[kept:].sum(), rel=1e-3)
        assert np.square(scores, dtype=np.float64).sum() == pytest.approx(squares[:kept].sum(), rel=1e-4)
        retained.append(squares[:kept].sum() / squares.sum())
        needed.append(PCA(keep, svd_solver="full").fit(flat).n_components_)
    assert min(retained) >= keep
    assert kept == max(needed)
    assert encoded.nbytes == 4 * 4 * (144 * kept + kept * 12 + 12)


@pytest.mark.parametrize(("kept", "expected"), [(20, 83_936), (17, 71_360), (16, 67_168)])
def test_pca_bytes_of_the_thesis(kept, expected):
    """A 32 x 32 x 24 map of exactly ``kept`` directions."""
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(24, 24)))[0][:kept]
    scores = np.linalg.qr(rng.normal(size=(1024, kept)))[0]  # equal sums of squares: 99 % need all of up to 99 directions
    encoded, _ = stored("pca-99", (scores @ axes).astype(np.float32).reshape(1, 32, 32, 24))
    assert encoded.nbytes == expected


def test_pca_with_all_axes_gives_the_map_back():
    rng = np.random.default_rng(2)
    flat = np.linalg.qr(rng.normal(size=(100, 6)))[0] * 10  # equal sums of squares: all six axes are needed
    maps = flat.astype(np.float32).reshape(1, 10, 10, 6)
    encoded, decoded = stored("pca-99", maps)
    assert encoded.rows["axes"].shape == (1, 6, 6)
    np.testing.assert_allclose(decoded, maps, atol=1e-5)


def test_shared_pca_is_scikit_learns_within_half_a_step():
    maps = maps_of((4, 12, 12, 12))
    encoded, decoded = stored("pca-int8", maps)
    flat = maps.reshape(-1, 12).astype(np.float64)
    pca = PCA(0.99, svd_solver="full").fit(flat)
    assert encoded.rows["codes"].shape == (4, 12, 12, pca.n_components_)
    expected = pca.inverse_transform(pca.transform(flat))
    bound = np.abs(encoded.shared["axes"]).T @ encoded.shared["step"] / 2  # (C,)
    assert np.all(np.abs(decoded.reshape(-1, 12) - expected) <= bound + 1e-4)


def test_pq_is_the_nearest_centroid_of_each_pair():
    maps = maps_of((3, 12, 12, 6))
    encoded, decoded = stored("pq", maps)
    codebooks, order = encoded.shared["codebooks"], encoded.shared["indices"]
    assert codebooks.nbytes == 4 * 256 * 6
    flat, back = (array.reshape(-1, 6)[:, order].astype(np.float64) for array in (maps, decoded))
    for j, book in enumerate(codebooks.astype(np.float64)):
        distances = np.square(flat[:, None, 2 * j : 2 * j + 2] - book).sum(2)
        mine = np.square(flat[:, 2 * j : 2 * j + 2] - back[:, 2 * j : 2 * j + 2]).sum(1)
        np.testing.assert_allclose(mine, distances.min(1), rtol=1e-4, atol=1e-9)


def test_pq_of_few_vectors_is_exact():
    few = maps_of((1, 1, 20, 4))
    assert np.array_equal(stored("pq", few)[1], few)


@pytest.mark.parametrize(("form", "maps", "words"), [
    ("int8", np.zeros((2, 3, 3), np.float32), "(n, H, W, C) float32"),
    ("float32", np.zeros((2, 3, 3, 1)), "float64"),
    ("image", np.zeros((2, 3, 3, 3), np.float32), "uint8"),
    ("rotated-4", np.zeros((0, 3, 3, 3), np.float32), "(0, 3, 3, 3)"),
    ("int4", np.full((1, 1, 1, 2), np.nan, np.float32), "not finite"),
    ("float16", np.full((1, 1, 1, 2), 7e4, np.float32), "float16 ends at"),
])  # fmt: skip
def test_what_cannot_be_stored_is_told(form, maps, words):
    with pytest.raises(InputError) as error:
        encode(form, maps, np.random.default_rng(0))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
