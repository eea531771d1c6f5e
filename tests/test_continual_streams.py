"""Streams of tasks: orders, X-YxN and what would fit, published protocols, drift with its masks, real folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyvad.continual import streams
from tinyvad.continual.published import protocols, source_title
from tinyvad.errors import InputError
from tinyvad.images import Dataset, Preprocessing, Sample, find_datasets


def category(name: str) -> Dataset:
    """A category that is never read."""
    root = Path(name)
    test = [Sample(root / "g.png", 0, "good"), Sample(root / "d.png", 1, "hole", root / "m.png")]
    return Dataset(name, root, [root / "a.png", root / "b.png"], test)


def categories(count: int) -> list[Dataset]:
    return [category(f"c{index:02d}") for index in reversed(range(count))]  # not in alphabetical order


def step_names(stream: streams.Stream) -> list[list[str]]:
    return [[unit.name for unit in task.units] for task in stream.tasks]


def test_orders():
    given = categories(5)
    names = sorted(dataset.name for dataset in given)
    assert step_names(streams.class_incremental(given)) == [[name] for name in names]
    assert step_names(streams.class_incremental(given, "given")) == [[name] for name in reversed(names)]
    shuffled = [streams.class_incremental(given, "shuffled", seed) for seed in range(4)]
    assert all(sorted(task.name for task in stream.tasks) == names for stream in shuffled)
    assert len({tuple(task.name for task in stream.tasks) for stream in shuffled}) > 1
    again = streams.class_incremental(list(reversed(given)), "shuffled", 2)  # the seed alone decides
    assert step_names(again) == step_names(shuffled[2]) and again.name == "class shuffled 2"
    assert again.step_of == (0, 1, 2, 3, 4) and len(again.tasks[0].train_paths) == 2


def test_increments_are_contiguous_and_cover_everything():
    stream = streams.make_stream("10-1x5", categories(15))
    assert [len(task.units) for task in stream.tasks] == [10, 1, 1, 1, 1, 1]
    assert [unit.name for unit in stream.units] == [f"c{index:02d}" for index in range(15)]
    assert stream.step_of == (0,) * 10 + (1, 2, 3, 4, 5) and len(stream.tasks[0].train_paths) == 20
    assert stream.tasks[0].product == stream.tasks[0].name and stream.tasks[1].product == "c10"
    assert [len(task.units) for task in streams.make_stream("3-3 x4", categories(15)).tasks] == [3] * 5
    assert [len(task.units) for task in streams.make_stream("4-2x1", categories(6)).tasks] == [4, 2]


@pytest.mark.parametrize(
    ("protocol", "count", "words"),
    [
        ("14-1x2", 15, "14-1x2 needs 16 categories, there are 15; 1-1x14, 2-1x13, 13-1x2, 14-1x1 would fit"),
        ("3-3x4", 14, "needs 15 categories, there are 14; 2-3x4, 5-3x3, 8-3x2, 11-3x1 would fit"),
        ("1-9x1", 6, "6-1x0 would fit"),
        ("0-1x6", 6, "X and Y must be at least 1"),
        ("class", 0, "at least one category"),
        ("10-1", 11, "use class, X-YxN or one of"),
        ("visa-8-1x4", 12, "12 of 12 categories are missing (candle,"),
        ("drift", 2, "one category, there are 2"),
        ("drift", 1, "the schedule is empty"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(protocol, count, words):
    with pytest.raises(InputError) as told:
        streams.make_stream(protocol, categories(count))
    assert words in str(told.value) and "\n" not in str(told.value)


def test_categories_must_be_whole_and_different():
    with pytest.raises(InputError, match="c0 is there 2 times"):
        streams.class_incremental([category("c0"), category("c0")])
    bare = category("c1")
    for change, words in ((Dataset("c1", bare.root, [], bare.test), "no good images"),
                          (Dataset("c1", bare.root, bare.train_good, bare.test[:1]), "good and defective")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            streams.class_incremental([change])
    with pytest.raises(InputError, match="order is 'random'"):
        streams.class_incremental(categories(2), "random")


def test_published_protocols_fit_their_classes():
    known = protocols()
    assert {"thesis-10", "mvtec-14-1x1", "visa-8-1x4"} <= set(known)
    for name, protocol in known.items():
        assert len(set(protocol.classes)) == len(protocol.classes) and source_title(protocol.source)
        assert (len(protocol.classes) - protocol.base) % protocol.increment == 0
        stream = streams.published_stream(name, [category(one) for one in sorted(protocol.classes)])
        assert [unit.name for unit in stream.units] == list(protocol.classes) and stream.name == name
        if "x" in name:  # its own name says the sizes
            sizes = name.split("-", 1)[1]
            assert sizes == f"{protocol.base}-{protocol.increment}x{len(stream.tasks) - 1}"
    new = {name: [u.name for task in streams.published_stream(name, [category(c) for c in known[name].classes]).tasks[1:]
                  for u in task.units] for name in ("mvtec-14-1x1", "mvtec-10-5x1", "visa-8-4x1")}  # fmt: skip
    assert new["mvtec-14-1x1"] == ["zipper"]
    assert new["mvtec-10-5x1"] == ["tile", "toothbrush", "transistor", "wood", "zipper"]
    assert new["visa-8-4x1"] == ["pcb2", "pcb3", "pcb4", "pipe_fryum"]
    spelled = [category(name) for name in ("Metal Nut", "hazelnut", "bottle", "CABLE", "capsule", "pill")]
    with pytest.raises(InputError, match=r"4 of 10 .*\(toothbrush, transistor, zipper, screw\)"):
        streams.published_stream("thesis-10", spelled)
    four = streams.make_stream("thesis-4", spelled)
    assert [task.name for task in four.tasks] == ["hazelnut", "bottle", "CABLE", "capsule"] and four.task_identity


def test_task_identity_is_told_only_when_asked():
    stream = streams.make_stream("2-1x2", categories(4), task_identity=True)
    assert [stream.given_task(unit) for unit in range(4)] == [0, 0, 1, 2]
    assert {streams.make_stream("2-1x2", categories(4)).given_task(unit) for unit in range(4)} == {None}
    assert stream.right_tasks(1) == (0,) and stream.right_tasks(3) == (2,)


def test_variants_and_drift_are_one_product():
    stream = streams.make_stream("variants", categories(3), "given")
    assert [task.product for task in stream.tasks] == ["c02"] * 3 and stream.right_tasks(1) == (0, 1, 2)
    drift = streams.drifting(category("bottle"), [[], [["brightness", 0.3]], [("blur", 0.5), ("shift", 1)]])
    assert [task.name for task in drift.tasks] == [
        "bottle: as it was", "bottle: brightness +0.3", "bottle: blur +0.5, shift +1",
    ]  # fmt: skip
    assert {task.product for task in drift.tasks} == {"bottle"} and drift.step_of == (0, 1, 2)
    with pytest.raises(InputError, match="fog"):
        streams.drifting(category("bottle"), [[("fog", 1)]])
    with pytest.raises(InputError, match="2 times"):
        streams.drifting(category("bottle"), [[], []])


@pytest.fixture
def folder(tmp_path, rng):
    """Two MVTec-like categories of 40 x 48 pixels, a defect with a mask each."""
    for name in ("nut", "bolt"):
        for place in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
            (tmp_path / name / place).mkdir(parents=True)
        for place in ("train/good/0", "train/good/1", "test/good/0", "test/hole/0"):
            image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{place}.png")
        mask = np.zeros((40, 48), np.uint8)
        mask[10:20, 12:24] = 255
        Image.fromarray(mask).save(tmp_path / name / "ground_truth/hole/0_mask.png")
    return tmp_path


def test_images_and_masks_of_a_folder(folder):
    stream = streams.class_incremental(find_datasets(folder))
    assert [task.name for task in stream.tasks] == ["bolt", "nut"]
    same = Preprocessing(40, 48)
    images = list(streams.train_images(stream.tasks[0], same))
    expected = [np.asarray(Image.open(folder / "bolt/train/good" / f"{index}.png")) for index in range(2)]
    assert all(np.array_equal(image, truth) for image, truth in zip(images, expected)) and len(images) == 2
    drift = streams.drifting(stream.units[0].dataset, [[("shift", 0.5), ("brightness", 0.25)]])
    moved = list(streams.train_images(drift.tasks[0], same))
    assert np.array_equal(moved[1][5:, 6:], np.minimum(expected[1][:-5, :-6].astype(int) + 32, 255))
    unit = drift.units[0]
    good, bad = unit.dataset.test
    assert not streams.mask_of(unit, good, 40, 48).any()
    mask = streams.mask_of(unit, bad, 40, 48)
    assert mask[15:25, 18:30].all() and mask.sum() == 120  # moved 5 down, 6 right
    assert streams.mask_of(unit, bad, 20, 24).sum() in range(25, 36)
    assert streams.mask_of(unit, Sample(bad.path, 1, "hole"), 40, 48) is None
    assert len(list(streams.unit_images(unit, [good.path, bad.path], Preprocessing(20, 24)))) == 2


def test_the_shared_categories_make_streams(shared):
    datasets = find_datasets(shared / "data")
    assert len(streams.class_incremental(datasets).tasks) == 6
    assert [len(task.units) for task in streams.make_stream("3-1x3", datasets, "shuffled", 1).tasks] == [3, 1, 1, 1]
