"""PatchCore and PatchCore-Lite: closed forms, brute force, their integer scorers and the sizes that they take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvad.bank import Header, read_bank, write_bank
from tinyvad.detectors import load_scorer
from tinyvad.detectors.nearest import (
    SHARED_BYTES,
    PatchCoreLiteScorer,
    PatchCoreScorer,
    bank_bytes,
    core_size_for_budget,
    lite_size_for_budget,
)
from tinyvad.detectors.patchcore import PatchCore, PatchCoreLite
from tinyvad.errors import CheckFailed, InputError


def maps(rng: np.random.Generator, n: int, dtype: type = np.int8, depth: int = 12, spread: float = 12.0) -> np.ndarray:
    """(n, 3, 4, depth) correlated embeddings."""
    x = rng.normal(size=(n, 3, 4, depth)) @ (np.eye(depth) + 0.4) * spread + rng.normal(size=(3, 4, depth)) * 20
    return np.clip(np.rint(x), -127, 127).astype(np.int8) if dtype == np.int8 else x.astype(dtype)


def brute(embeddings: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """(n, H, W) float64 smallest distances by direct differences."""
    difference = embeddings.astype(np.float64)[..., None, :] - bank.astype(np.float64)
    return np.sqrt((difference**2).sum(-1)).min(-1)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_scores_are_distances_to_the_nearest_bank_vector(rng, dtype):
    x, probe = maps(rng, 9, dtype), maps(rng, 4, dtype)
    model = PatchCore(30, step=0.25).fit([x])
    assert model.memory_bank_.shape == (30, 12) and model.memory_bank_.dtype == dtype
    scores = model.score(probe)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 0.25 * brute(probe, model.memory_bank_), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_a_bank_of_all_patches_scores_them_zero(rng, dtype):
    x = maps(rng, 6, dtype)
    model = PatchCore(6 * 12).fit([x])
    assert model.score(x).max() < 1e-4 if dtype == np.float32 else model.score(x).max() == 0


def test_one_vector(rng):
    x, probe = maps(rng, 5, np.float32), maps(rng, 2, np.float32)
    model = PatchCore(1).fit([x])
    expected = np.linalg.norm(probe - model.memory_bank_[0], axis=-1)
    np.testing.assert_allclose(model.score(probe), expected, rtol=1e-6)


def test_more_vectors_never_raise_a_score_and_their_order_does_not_matter(rng):
    x, probe = maps(rng, 9), maps(rng, 4)
    small, large = PatchCore(10).fit([x]), PatchCore(40).fit([x])
    np.testing.assert_array_equal(large.memory_bank_[:10], small.memory_bank_)
    assert (large.score(probe) <= small.score(probe)).all()
    shuffled = PatchCoreScorer(large.memory_bank_[rng.permutation(40)])
    np.testing.assert_array_equal(shuffled.score(probe), large.to_scorer().score(probe))


def test_the_stream_may_come_in_any_batches(rng):
    x = maps(rng, 20)
    whole = PatchCore(20, max_candidates=50, seed=4).fit([x])
    parts = PatchCore(20, max_candidates=50, seed=4).fit(iter(np.split(x, [1, 2, 9])))
    np.testing.assert_array_equal(whole.memory_bank_, parts.memory_bank_)
    other = PatchCore(20, max_candidates=50, seed=5).fit([x])
    assert (other.memory_bank_ != whole.memory_bank_).any()


def test_a_bank_of_repeated_patches_stays_small():
    x = np.repeat(np.arange(5, dtype=np.int8), 24).reshape(10, 3, 4, 1)
    assert sorted(PatchCore(100).fit([x]).memory_bank_[:, 0]) == [0, 1, 2, 3, 4]


def test_image_score_is_the_largest_distance(rng):
    x, probe = maps(rng, 8), maps(rng, 5)
    for model in (PatchCore(20).fit([x]), PatchCoreLite(40, 4, 4).fit([x])):
        np.testing.assert_array_equal(model.image_scores(probe), model.score(probe).max((1, 2)))


@pytest.mark.parametrize("neighbors", [2, 9, 500])
def test_weighted_image_score_is_the_papers(rng, neighbors):
    x, probe = maps(rng, 8, np.float32, spread=0.5), maps(rng, 5, np.float32, spread=0.5)
    model = PatchCore(30, neighbors=neighbors, step=0.1).fit([x])
    bank = model.memory_bank_.astype(np.float64) * 0.1
    for image, score in zip(probe, model.image_scores(probe), strict=True):
        patches = image.reshape(-1, 12).astype(np.float64) * 0.1
        distances = np.linalg.norm(patches[:, None] - bank, axis=-1)  # (P, K)
        p = distances.min(1).argmax()
        closest = distances[p].argmin()
        around = np.argsort(np.linalg.norm(bank - bank[closest], axis=-1), kind="stable")[:neighbors]
        weight = 1 - np.exp(distances[p, closest]) / np.exp(distances[p, around]).sum()
        assert score == pytest.approx(weight * distances[p, closest], rel=1e-4)


def test_weights_of_far_patches_do_not_overflow(rng):
    model = PatchCore(30, neighbors=9).fit([maps(rng, 8, np.float32)])
    assert np.isfinite(model.image_scores(maps(rng, 3, np.float32) + 1e4)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_lite_is_patchcore_on_decoded_vectors(rng, dtype, bits):
    x, probe = maps(rng, 40, dtype), maps(rng, 4, dtype)
    model = PatchCoreLite(300, subspaces=3, bits=bits, step=0.5).fit([x])
    assert model.codes_.dtype == np.uint8 and model.codes_.shape == (300, 3)
    decoded = model.quantizer_.decode(model.codes_)
    np.testing.assert_allclose(model.score(probe), 0.5 * brute(probe, decoded), rtol=1e-5)
    # quantising moves every bank vector by some distance, and no score by more than the largest of them
    plain = PatchCore(300, step=0.5).fit([x])
    np.testing.assert_array_equal(plain.memory_bank_, model.memory_bank_)
    largest = 0.5 * np.linalg.norm(model.memory_bank_.astype(float) - decoded, axis=1).max()
    assert 0 < np.abs(model.score(probe) - plain.score(probe)).max() <= largest * (1 + 1e-6)


def test_lite_with_enough_centroids_equals_patchcore(rng):
    x, probe = maps(rng, 15), maps(rng, 4)  # 180 patches: at most 180 distinct sub-vectors
    lite, plain = PatchCoreLite(180, 4).fit([x]), PatchCore(180).fit([x])
    np.testing.assert_array_equal(lite.score(probe), plain.score(probe))


@pytest.mark.parametrize("group", [True, False])
def test_the_same_seed_gives_the_same_codes(rng, group):
    x = maps(rng, 30)
    one, two = (PatchCoreLite(200, 4, 4, group=group).fit([x]).to_scorer().sections() for _ in range(2))
    for tag, array in one.items():
        np.testing.assert_array_equal(array, two[tag])


def scorers(rng: np.random.Generator) -> list[PatchCoreScorer | PatchCoreLiteScorer]:
    x = maps(rng, 40)
    core, byte = PatchCore(50, step=0.5).fit([x]), PatchCoreLite(300, 4, 8, step=0.5).fit([x])
    return [core.to_scorer(), byte.to_scorer(), *(PatchCoreLite(60, m, 4).fit([x]).to_scorer() for m in (3, 4))]


def test_integer_scores_are_the_squares_of_the_study_form(rng):
    x, probe = maps(rng, 30), maps(rng, 4)
    for model in (PatchCore(40, step=0.5).fit([x]), PatchCoreLite(40, 4, 4, step=0.5).fit([x])):
        scorer = model.to_scorer()
        scores = scorer.score(probe)
        assert scores.dtype == np.uint32 and scores.shape == (4, 3, 4)
        real = (np.sqrt(scores.astype(np.float64)) * scorer.unit).astype(np.float32)
        np.testing.assert_array_equal(real, model.score(probe))
        bank = model.quantizer_.decode(model.codes_) if isinstance(model, PatchCoreLite) else model.memory_bank_
        np.testing.assert_array_equal(scores, np.rint(brute(probe, bank) ** 2))


def test_scorers_survive_a_bank_file(rng):
    probe = maps(rng, 3)
    for scorer in scorers(rng):
        data = write_bank(Header(scorer.kind, 1, (32, 32), (3, 4), 1), scorer.sections(), scorer.required)
        loaded = load_scorer(scorer.kind, read_bank(data).sections, (3, 4), 12)
        assert type(loaded) is type(scorer) and loaded.unit == scorer.unit
        np.testing.assert_array_equal(loaded.score(probe), scorer.score(probe))
        assert loaded.macs((3, 4)) == scorer.macs((3, 4)) and loaded.scratch_bytes() == scorer.scratch_bytes()


def test_costs_by_hand(rng):
    core, byte, odd, nibble = scorers(rng)
    assert core.macs((3, 4)) == 12 * 50 * 12 and core.scratch_bytes() == 32  # 12 int16, in units of 16
    assert byte.macs((3, 4)) == 12 * (256 * 12 + 300 * 4) and byte.scratch_bytes() == 16 + 4 * 4 * 256 + 32
    assert nibble.macs((3, 4)) == 12 * (16 * 12 + 60 * 4)
    assert [odd.sections()["CODE"].shape, nibble.sections()["CODE"].shape] == [(60, 2), (60, 2)]
    for scorer, subspaces, bits in ((byte, 4, 8), (odd, 3, 4), (nibble, 4, 4)):
        stored = scorer.sections()
        rows = len(scorer.codes)
        assert stored["CODE"].nbytes + stored["CBK "].nbytes == bank_bytes(rows, 12, subspaces, bits)
        assert stored["CFG "].nbytes + stored["SCAL"].nbytes == SHARED_BYTES and stored["INDX"].nbytes == 24


def test_bytes_of_the_papers_examples():
    # K m + V D with one byte a codebook value; the papers' 4 V D is for float32 codebooks
    assert bank_bytes(10_000, 256, 8, 8) == 80_000 + 65_536
    assert bank_bytes(10_000, 160, 8, 8) == 80_000 + 40_960
    assert bank_bytes(10_000, 160, 16, 4) == 80_000 + 2_560


@pytest.mark.parametrize(
    ("which", "tag", "change", "words"),
    [
        (0, "BANK", None, "BANK is missing"),
        (0, "BANK", lambda a: a[:-1], "expected int8"),
        (0, "CFG ", lambda a: a + np.array([0, 0, 0, 1], np.int32), "9 bits"),
        (0, "CFG ", lambda a: a * np.array([0, 1, 1, 1], np.int32), "0 rows"),
        (0, "SCAL", lambda a: a * 0, "unit 0.0"),
        (0, "SCAL", lambda a: a * np.nan, "unit nan"),
        (1, "CFG ", lambda a: a + np.array([0, 0, 1, 0], np.int32), "5 subspaces"),
        (1, "CFG ", lambda a: a + np.array([0, 1, 0, 0], np.int32), "rows of 13"),
        (1, "INDX", lambda a: a * 0, "not a permutation"),
        (1, "CBK ", lambda a: a[:, :, 1:], "CBK "),
        (3, "CODE", lambda a: a[:, :1], "CODE"),
    ],
)
def test_malformed_sections_are_named(rng, which, tag, change, words):
    scorer = scorers(rng)[which]
    stored = scorer.sections()
    if change is None:
        del stored[tag]
    else:
        stored[tag] = change(stored[tag])
    with pytest.raises(InputError, match=words):
        type(scorer).from_sections(stored, 12)


def test_codes_beyond_the_codebook_are_refused(rng):
    x = maps(rng, 3)
    stored = PatchCoreLite(20, 4).fit([x]).to_scorer().sections()  # 20 rows: 20 centroids
    stored["CODE"] = stored["CODE"] + np.uint8(20)
    with pytest.raises(InputError, match="of 20 centroids"):
        PatchCoreLiteScorer.from_sections(stored, 12)


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 2_000_000), depth=st.integers(1, 400))
def test_sizes_keep_to_the_budget_and_use_it(limit, depth):
    try:
        rows = core_size_for_budget(limit, depth)
        assert SHARED_BYTES + rows * depth <= limit < SHARED_BYTES + (rows + 1) * depth
    except CheckFailed:
        assert limit < SHARED_BYTES + depth
    fixed = SHARED_BYTES + 2 * depth
    try:
        rows, subspaces, bits = lite_size_for_budget(limit, depth)
    except CheckFailed as error:
        need = int(str(error).split("needs ")[1].split()[0])
        assert limit < need and lite_size_for_budget(need, depth)[0] >= 16
        return
    assert depth % subspaces == 0 and bits in (4, 8)
    used = fixed + bank_bytes(rows, depth, subspaces, bits)
    assert used <= limit
    assert rows == 50_000 or used + (subspaces * bits + 7) // 8 > limit


def test_sizes_follow_the_stated_rule():
    assert lite_size_for_budget(16 << 10, 80)[1:] == (40, 4)
    assert lite_size_for_budget(32 << 10, 80)[1:] == (4, 8)  # the coarsest: 3,026 rows
    assert lite_size_for_budget(64 << 10, 80) == (4487, 10, 8)
    assert lite_size_for_budget(128 << 10, 80) == (5520, 20, 8)
    assert lite_size_for_budget(10 << 20, 80, most_rows=7000) == (7000, 40, 8)


def test_each_of_several_products_has_codebooks_in_its_part_of_the_bytes():
    """Six products of 80 values: 8-bit codebooks of 20,480 B and an order of 160 B each; 24 B are shared."""
    assert lite_size_for_budget((128 << 10), 80, 10_000, 6) == (6 * ((21_841 - 160 - 1280) // 20), 40, 4)
    assert lite_size_for_budget(24 + 6 * (160 + 2 * 20_480) - 1, 80, 10_000, 6)[1:] == (40, 4)
    rows, subspaces, bits = lite_size_for_budget(24 + 6 * (160 + 2 * 20_480), 80, 10_000, 6)
    assert (rows, subspaces, bits) == (10_000, 10, 8)  # 2,048 rows each of 10 B; of 16 B no 1,666
    with pytest.raises(CheckFailed, match="a Lite bank of 6 products of 80 values needs 10584 B; raise --bank-bytes"):
        lite_size_for_budget(10_583, 80, 10_000, 6)
    assert lite_size_for_budget(10_584, 80, 10_000, 6) == (96, 40, 4)


def test_bad_input_is_named(rng):
    x = maps(rng, 2)
    for stream, words in (
        ([], "at least one"),
        ([x[:0]], "at least one"),
        ([x[0]], "int8"),
        ([x.astype(np.float64)], "float64"),
        ([x, x.astype(np.float32)], "changed"),
        ([x, x[..., :5]], "changed"),
        ([np.full((1, 2, 2, 3), np.inf, np.float32)], "not finite"),
    ):
        with pytest.raises(InputError, match=words):
            PatchCore(5).fit(stream)
    for sizes in ((0, 50), (60, 50)):
        with pytest.raises(InputError, match="give 1 to 50"):
            PatchCore(*sizes)
    for step, neighbors in ((0.0, 1), (float("nan"), 1), (1.0, 0)):
        with pytest.raises(InputError, match="positive"):
            PatchCore(step=step, neighbors=neighbors)
    model = PatchCore(5).fit([x])
    with pytest.raises(InputError, match="the bank needs int8"):
        model.score(x.astype(np.float32))
    with pytest.raises(InputError, match="int8 embeddings"):
        model.to_scorer().score(x.astype(np.float32))
    with pytest.raises(InputError, match="needs"):
        model.to_scorer().score(x[..., :5])
    with pytest.raises(InputError, match="device form needs int8"):
        PatchCore(5).fit([x.astype(np.float32)]).to_scorer()
    with pytest.raises(InputError, match="5 subspaces"):
        PatchCoreLite(20, subspaces=5).fit([x])
