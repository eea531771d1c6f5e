"""The synthetic part: layout, determinism, and masks that say exactly what a defect changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyvad import demo
from tinyvad.errors import InputError
from tinyvad.layouts import find_datasets


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.render_demo(tmp_path_factory.mktemp("demo") / "part", seed=3, n_train=3, n_good=2, n_defect=6, size=96)


def test_layout_and_counts(rendered: Path) -> None:
    files = {str(path.relative_to(rendered)) for path in rendered.rglob("*") if path.is_file()}
    defective = {"edge_chip": 2, "missing_hole": 2, "scratch": 1, "stain": 1}  # six pictures, the kinds take turns
    expected = {"README.txt", "test/good/000.png", "test/good/001.png", *(f"train/good/{i:03d}.png" for i in range(3))}
    for kind, count in defective.items():
        expected |= {f"test/{kind}/{i:03d}.png" for i in range(count)}
        expected |= {f"ground_truth/{kind}/{i:03d}_mask.png" for i in range(count)}
    assert files == expected
    for path in rendered.rglob("*.png"):
        image, mask = Image.open(path), path.stem.endswith("_mask")
        assert image.size == (96, 96) and image.mode == ("L" if mask else "RGB")
        assert image.info["Comment"].startswith("Synthetic")
        assert not mask or set(np.unique(np.asarray(image))) == {0, 255}
    assert (rendered / "README.txt").read_text().startswith("Synthetic")


def test_our_own_reader_finds_everything(rendered: Path) -> None:
    (dataset,) = find_datasets(rendered)
    assert len(dataset.train_good) == 3 and dataset.missing_masks == 0
    assert sorted(sample.defect for sample in dataset.test) == sorted(
        ["good"] * 2 + ["edge_chip", "missing_hole"] * 2 + ["scratch", "stain"]
    )
    assert all((sample.mask is None) == (sample.label == 0) for sample in dataset.test)


def test_default_counts_are_a_small_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blank = (np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), bool))
    monkeypatch.setattr(demo, "render_part", lambda *_: blank)
    root = demo.render_demo(tmp_path / "part")
    counts = [len(list((root / part).rglob("*.png"))) for part in ("train/good", "test/good", "test", "ground_truth")]
    assert counts == [60, 20, 44, 24]
    assert all(len(list((root / "test" / kind).iterdir())) == 6 for kind in demo.DEFECTS)


def test_same_seed_same_bytes_another_seed_other_pictures(rendered: Path, tmp_path: Path) -> None:
    sizes = {"n_train": 3, "n_good": 2, "n_defect": 6, "size": 96}
    first = digests(rendered)
    assert digests(demo.render_demo(tmp_path / "again", seed=3, **sizes)) == first
    other = digests(demo.render_demo(tmp_path / "other", seed=4, **sizes))
    assert other.keys() == first.keys()
    assert not [name for name in first if other[name] == first[name] and "_mask" not in name]
    assert len(set(first.values())) == len(first)  # no picture twice


def test_more_pictures_leave_the_first_ones_as_they_are(rendered: Path, tmp_path: Path) -> None:
    more = digests(demo.render_demo(tmp_path / "more", seed=3, n_train=4, n_good=2, n_defect=7, size=96))
    assert all(more[name] == digest for name, digest in digests(rendered).items() if name != "README.txt")


@pytest.mark.parametrize("kind", demo.DEFECTS)
@pytest.mark.parametrize("number", range(3))
def test_a_defect_changes_what_its_mask_says_and_nothing_else(kind: str, number: int) -> None:
    clean, empty = demo.render_part(np.random.default_rng(number))
    image, mask = demo.render_part(np.random.default_rng(number), defect=kind)
    assert clean.dtype == image.dtype == np.uint8 and mask.dtype == bool and not empty.any()
    difference = np.abs(image.astype(int) - clean.astype(int)).max(axis=2)
    assert difference[~mask].max() <= 1  # less than a grey level may still round to another byte
    assert np.mean(difference[mask] >= 2) > 0.6
    assert difference[mask].mean() > 5  # sensor noise has a standard deviation of 1.7 grey levels
    assert 10 <= mask.sum() < 0.05 * mask.size  # visible at 256 pixels, and small


def test_good_parts_differ_a_little_all_over() -> None:
    a, b = (demo.render_part(np.random.default_rng(i), 128)[0].astype(float) for i in (0, 1))
    assert 1 < np.abs(a - b).mean() < 25
    assert np.abs(a - b)[:, :, 0].reshape(16, 8, 16, 8).mean(axis=(1, 3)).min() > 0.3  # no region is the same


def test_a_missing_hole_is_metal_where_the_hole_was() -> None:
    clean, _ = demo.render_part(np.random.default_rng(5))
    image, mask = demo.render_part(np.random.default_rng(5), defect="missing_hole")
    rows, columns = np.nonzero(mask)
    centre = int(rows.mean()), int(columns.mean())
    assert clean[centre].max() < 60 < 100 < image[centre].min()
    radius = np.sqrt(mask.sum() / np.pi)  # hole 0.085 and rim 0.025 of half the picture's side
    assert abs(radius - 0.11 * 128) < 1.5


def test_our_folder_is_replaced_others_are_refused(rendered: Path, tmp_path: Path) -> None:
    few = {"n_train": 1, "n_good": 1, "n_defect": 0, "size": 64}
    folder = demo.render_demo(tmp_path / "part", n_train=2, n_good=1, n_defect=1, size=64)
    demo.render_demo(folder, **few)
    assert [path.name for path in sorted(folder.rglob("*.png"))] == ["000.png", "000.png"]

    foreign = tmp_path / "project"
    foreign.mkdir()
    (foreign / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="project"):
        demo.render_demo(foreign, **few)
    (foreign / "README.txt").write_text("My project")  # somebody else's README doesn't make it ours
    with pytest.raises(InputError, match=r"README\.txt is not ours"):
        demo.render_demo(foreign, **few)
    assert sorted(path.name for path in foreign.iterdir()) == ["README.txt", "notes.md"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_bad_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size from 64 to 1024"):
        demo.render_demo(tmp_path / "a", size=32)
    for bad in ({"n_train": 0}, {"n_good": 0}, {"n_defect": -1}, {"seed": -1}):
        with pytest.raises(InputError, match="negative"):
            demo.render_demo(tmp_path / "a", **bad)
    with pytest.raises(InputError, match=r"crack.*scratch"):
        demo.render_part(np.random.default_rng(0), 64, "crack")
    assert not (tmp_path / "a").exists()
