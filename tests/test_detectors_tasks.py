"""Banks of several tasks in Python: split into what each task's own bank would be, routed and scored by hand."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from small_banks import Small, bank_of_tasks, every_kind, every_kind_of_tasks, memory, quantised, small_embedding

from tinyvad.bank import read_bank, restamp, write_bank
from tinyvad.detectors import check_bank, parts_scratch, score_bytes
from tinyvad.detectors.routing import signatures
from tinyvad.detectors.tasks import TaskScorers, join_tasks
from tinyvad.errors import InputError


def loaded(small: Small, **sections: np.ndarray) -> tuple[np.ndarray, TaskScorers]:
    return check_bank(read_bank(write_bank(small.header, {**small.sections, **sections}, ())))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_task_scores_as_its_own_bank(count: int) -> None:
    rng = np.random.default_rng(count)
    for name, small in every_kind_of_tasks(rng, count).items():
        rows, scorers = loaded(small)
        embeddings = small.embeddings(rng, 7)
        assert len(scorers.scorers) == count and scorers.last_channels == 3
        np.testing.assert_array_equal(scorers.thresholds, small.sections["THRS"])
        for task, (mine, alone) in enumerate(zip(scorers.scorers, small.tasks, strict=True)):
            assert mine.kind == small.header.kind, name
            np.testing.assert_array_equal(mine.score(embeddings), alone.score(embeddings), err_msg=name)
            np.testing.assert_array_equal(
                scorers.score(embeddings, np.full(7, task)), alone.score(embeddings), err_msg=name
            )
            assert score_bytes(rows, (3, 4), mine) == score_bytes(rows, (3, 4), alone)  # none of it grows with tasks
        tasks = rng.integers(0, count, 7)
        mixed = np.stack([small.tasks[t].score(e[None])[0] for t, e in zip(tasks, embeddings, strict=True)])
        np.testing.assert_array_equal(scorers.score(embeddings, tasks), mixed, err_msg=name)


def test_the_nearest_prototype_and_of_equals_the_first() -> None:
    """By hand: the last tap has 3 channels, the grid 12 cells; a constant v there makes signatures of 12 v."""
    rng = np.random.default_rng(0)
    small = bank_of_tasks(rng, small_embedding(rng, (3, 4), (5, 4, 3)), [memory(rng, 2, 12) for _ in range(4)])
    prototypes = np.array([[12, 12, 12], [120, 120, 120], [-12, -12, -12], [120, 120, 120]], np.int32)
    _, scorers = loaded(small, PROT=prototypes)
    embeddings = rng.integers(-127, 128, (6, 3, 4, 12)).astype(np.int8)
    for i, value in enumerate((1, 10, -1, 0, 127, -127)):
        embeddings[i, ..., -3:] = value
    assert scorers.route(embeddings).tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(signatures(embeddings, 3)[1], [120, 120, 120])


def test_one_task_is_not_routed() -> None:
    small = every_kind(np.random.default_rng(0))["padim-compact"]
    _, scorers = loaded(small)
    assert scorers.prototypes is None and len(scorers.scorers) == 1
    assert scorers.route(np.zeros((5, 3, 4, 12), np.int8)).tolist() == [0] * 5
    assert scorers.largest is scorers.scorers[0]


def test_the_arrays_are_views_of_the_file() -> None:
    several = every_kind_of_tasks(np.random.default_rng(0), 5)
    views = {"padim chosen": ("mean", "factor"), "patchcore": ("bank",), "patchcore-lite": ("codes",)}
    for name, attributes in views.items():
        file = several[name].data
        for scorer in check_bank(read_bank(file))[1].scorers:
            for attribute in attributes:
                assert np.shares_memory(getattr(scorer, attribute), np.frombuffer(file, np.uint8))


def test_the_largest_task_bounds_the_time() -> None:
    rng = np.random.default_rng(0)
    tasks = [memory(rng, rows, 12) for rows in (3, 9, 5)]
    _, scorers = loaded(bank_of_tasks(rng, small_embedding(rng, (3, 4), (5, 4, 3)), list(tasks)))
    assert scorers.largest is scorers.scorers[1]


def test_join_is_the_opposite_of_split() -> None:
    for small in every_kind_of_tasks(np.random.default_rng(3), 5).values():
        _, scorers = loaded(small)
        joined = join_tasks(scorers.scorers, small.sections["TASK"][:, 2].tolist(), small.sections["PROT"])
        for tag, array in joined.items():
            np.testing.assert_array_equal(array, small.sections[tag], err_msg=tag)
            assert array.dtype == small.sections[tag].dtype, tag
        assert set(small.sections) - set(joined) == {"LUT ", "TAPS", "STEP", "THRS", "LRN ", "TEST", "GOLD", "META"} | (
            {"LADR"} if "LADR" in small.sections else set()
        )


def test_tasks_that_share_too_little_are_not_joined() -> None:
    rng = np.random.default_rng(0)
    a, b = (every_kind_of_tasks(np.random.default_rng(seed), 1)["padim-compact"].tasks[0] for seed in (1, 2))
    with pytest.raises(InputError, match="differ in section PROJ; learn them with one build"):
        join_tasks([a, b], [1, 1], rng.integers(0, 9, (2, 3)))


def test_codebooks_of_other_shapes_are_not_joined() -> None:
    rng = np.random.default_rng(0)
    a, b = (quantised(rng, 9, 12, 4, 8, centroids) for centroids in (9, 8))
    with pytest.raises(InputError, match="differ in the shape of section CBK ; learn them with one build"):
        join_tasks([a, b], [1, 1], rng.integers(0, 9, (2, 3)))


def test_the_scratch_holds_a_signature() -> None:
    """Of a wide last tap it is larger than the vector of a memory bank's scorer: 4 * 40 against 2 * 41 bytes."""
    rng = np.random.default_rng(0)
    rows = small_embedding(rng, (1, 1), (1, 40), sizes=((2, 2), (2, 2))).sections()["TAPS"]
    assert memory(rng, 5, 41).scratch_bytes() == 96
    assert parts_scratch(rows, memory(rng, 5, 41)) == 160


WRONG: list[tuple[str, str, Any, str]] = [
    ("patchcore", "THRS", lambda a: np.resize(a, 256), "section THRS has 256 tasks, at most 255"),
    ("patchcore", "TASK", lambda a: None, "section TASK is missing"),
    ("patchcore", "PROT", lambda a: None, "section PROT is missing"),
    ("patchcore", "TASK", lambda a: a + np.array([1, 0, 0, 0], a.dtype), "TASK, row 0: [1, "),
    ("patchcore", "TASK", lambda a: a + np.array([0, 0, 0, 1], a.dtype), "TASK, row 0"),
    ("patchcore", "TASK", lambda a: a[::-1], "TASK, row 0"),
    ("patchcore", "TASK", lambda a: a * np.array([1, 1, -1, 1], a.dtype) - np.array([0, 0, 1, 0], a.dtype), "TASK, row 0"),
    ("patchcore", "BANK", lambda a: a[:-1], "section BANK: shape"),
    ("patchcore-lite", "CODE", lambda a: np.concatenate([a, a[:1]]), "section CODE: shape"),
    ("padim-compact", "MEAN", lambda a: a[:3], "section MEAN: shape (3, 4, 10) does not go with 3 tasks of 9 rows"),
    ("padim-compact", "TABL", lambda a: a[:4], "section TABL: shape (4, 256)"),
    ("padim-compact", "TABL", lambda a: a[:3], "section TABL: uint32(1, 256), expected uint32(2, 256)"),
    ("padim-compact", "PROT", lambda a: a * 0 + 127 * 12 + 1, "section PROT: beyond 127 times 12 cells"),
    ("padim-compact", "PROT", lambda a: np.full_like(a, -(2**31)), "section PROT: beyond 127 times 12 cells"),
    ("patchcore", "LADR", lambda a: a[:2], "section LADR: shape (2, 3, 2), expected (3, L, 2)"),
    ("patchcore", "LADR", lambda a: a[:, ::-1] + np.array([[[1], [2], [3]]], a.dtype), "LADR: rows must be at least 1 and"),
    ("patchcore", "LADR", lambda a: a * 0, "LADR: rows must be at least 1 and"),
    ("padim-compact", "LADR", lambda a: np.ones((3, 1, 2), np.uint32), "LADR: uint32(3, 1, 2) in a PADC bank"),
    ("padim-compact", "LRN ", lambda a: a + np.arange(8, dtype=a.dtype), "section LRN : the last three numbers are not 0"),
    ("padim-compact", "LRN ", lambda a: a[:7], "section LRN : uint32(7,), expected uint32(8,)"),
    ("patchcore-lite", "CBK ", lambda a: np.resize(a, (12, 257, 3)), "section CBK : 257 centroids, codes of 8 bits"),
    ("patchcore-lite", "CBK ", lambda a: a[:-1], "section CBK : shape (11, 256, 3) does not go with 3 tasks;"),
    ("patchcore-lite", "CBK ", lambda a: a[:-3], "section CBK : int8(3, 256, 3), expected int8(4, 256, 3)"),
    ("patchcore-lite", "INDX", lambda a: np.resize(a, 12), "section INDX: uint16(4,), expected uint16(12,)"),
    ("patchcore-lite", "INDX", lambda a: np.where(np.arange(36) == 35, a[34], a), "INDX: not a permutation of 0..11"),
    ("patchcore", "GOLD", lambda a: a + np.array([3, 0, 0], a.dtype), "GOLD names a task"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tag", "change", "words"), WRONG)
def test_what_is_wrong_is_named(name: str, tag: str, change: Any, words: str) -> None:
    small = every_kind_of_tasks(np.random.default_rng(0), 3)[name]
    changed = change(small.sections.get(tag, np.zeros(0)))
    sections = {**small.sections, tag: changed}
    if changed is None:
        del sections[tag]
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        check_bank(read_bank(write_bank(small.header, sections, ()), "some.tvb"))
    assert str(caught.value).startswith("some.tvb: ") and "\n" not in str(caught.value)


def test_a_codebook_may_have_fewer_centroids_than_rows() -> None:
    small = every_kind_of_tasks(np.random.default_rng(0), 5)["patchcore-lite 4 bits"]
    assert small.sections["CBK "].shape[1] == 7 < small.sections["CFG "][0]
    loaded(small)
    loaded(small, **{"CBK ": np.resize(small.sections["CBK "], (5 * 6, 16, 2))})


def test_restamp_changes_generation_and_header_crc_alone() -> None:
    data = every_kind(np.random.default_rng(0))["patchcore"].data
    for generation in (0, 4, 2**32 - 1):
        again = restamp(data, generation)
        before, after = read_bank(data), read_bank(again)
        assert after.header.generation == generation and before.header.generation == 3
        assert [i for i in range(len(data)) if data[i] != again[i] and not 48 <= i < 52 and not 60 <= i < 64] == []
        assert restamp(again, 3) == data
    for generation in (-1, 2**32):
        with pytest.raises(InputError, match="generation is"):
            restamp(data, generation)
    with pytest.raises(InputError, match="crc32"):
        restamp(data[:130] + bytes([data[130] ^ 1]) + data[131:], 4)
