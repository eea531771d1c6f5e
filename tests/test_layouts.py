"""Finding images: every layout as a small tree of empty files, since only names matter here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinyvad.errors import InputError
from tinyvad.images import Dataset, Sample, find_datasets


def tree(root: Path, *names: str) -> Path:
    """Empty files; 'a/{1,2}.png' stands for two."""
    for name in names:
        head, brace, rest = name.partition("{")
        if brace:
            choices, _, tail = rest.partition("}")
            tree(root, *(f"{head}{choice}{tail}" for choice in choices.split(",")))
        else:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def names(dataset: Dataset) -> list[str]:
    return [path.relative_to(dataset.root).as_posix() for path in dataset.train_good]


def table(dataset: Dataset) -> list[tuple[str, int, str, str | None]]:
    def short(path: Path | None) -> str | None:
        return path and path.relative_to(dataset.root).as_posix()

    return [(short(s.path) or "", s.label, s.defect, short(s.mask)) for s in dataset.test]


def only(root: Path, **options: bool) -> Dataset:
    (dataset,) = find_datasets(root, **options)
    return dataset


def mvtec(root: Path) -> Path:
    return tree(
        root,
        "license.txt",
        "train/good/{002,000,001}.png",
        "test/good/{000,001}.png",
        "test/scratch/{000,001}.png",
        "test/dent/000.png",
        "ground_truth/scratch/{001,000}_mask.png",
        "ground_truth/dent/000_mask.png",
    )


def test_mvtec(tmp_path: Path) -> None:
    dataset = only(mvtec(tmp_path / "bottle"))
    assert dataset.name == "bottle" and dataset.missing_masks == 0
    assert names(dataset) == ["train/good/000.png", "train/good/001.png", "train/good/002.png"]
    assert table(dataset) == [
        ("test/dent/000.png", 1, "dent", "ground_truth/dent/000_mask.png"),
        ("test/good/000.png", 0, "good", None),
        ("test/good/001.png", 0, "good", None),
        ("test/scratch/000.png", 1, "scratch", "ground_truth/scratch/000_mask.png"),
        ("test/scratch/001.png", 1, "scratch", "ground_truth/scratch/001_mask.png"),
    ]


def test_real_categories(shared: Path) -> None:
    found = {dataset.name: dataset for dataset in find_datasets(shared / "data")}
    expected = {  # good to learn from, good to test on, anomalous, masks: the table of shared/README.md
        "bottle": (209, 20, 63, 63),
        "toothbrush": (48, 12, 30, 30),
        "magnetic_tile": (500, 150, 388, 388),
        "ksdd": (573, 192, 54, 54),
        "solar_mono": (300, 100, 200, 0),
        "casting": (400, 150, 200, 0),
    }
    for name, counts in expected.items():
        test = found[name].test
        anomalous = sum(sample.label for sample in test)
        masks = sum(sample.mask is not None for sample in test)
        assert (len(found[name].train_good), len(test) - anomalous, anomalous, masks) == counts
        assert found[name].missing_masks == 0


def test_a_folder_of_categories(tmp_path: Path) -> None:
    mvtec(tmp_path / "screw")
    mvtec(tmp_path / "bottle")
    tree(tmp_path, "plain/ok/1.png", "plain/bad/1.png", "readme.txt", "empty/notes.txt")
    assert [dataset.name for dataset in find_datasets(tmp_path)] == ["bottle", "plain", "screw"]
    tree(tmp_path, "views/1.png")
    with pytest.raises(InputError, match="views holds images"):
        find_datasets(tmp_path)


def test_reorganised_visa_has_masks_without_suffix(tmp_path: Path) -> None:
    tree(tmp_path, "pcb1/train/good/1.JPG", "pcb1/test/{good/2,bad/3}.JPG", "pcb1/ground_truth/bad/3.png")
    assert table(only(tmp_path))[0] == ("test/bad/3.JPG", 1, "bad", "ground_truth/bad/3.png")


def test_plain_folders(tmp_path: Path) -> None:
    tree(tmp_path, "Good/{b,a}.jpg", "Good/camera2/c.JPEG", "crack/1.png", "dirt/oil/2.tif", "dirt/3.bmp")
    dataset = only(tmp_path)
    assert names(dataset) == ["Good/a.jpg", "Good/b.jpg", "Good/camera2/c.JPEG"]
    assert table(dataset) == [
        ("crack/1.png", 1, "crack", None),
        ("dirt/3.bmp", 1, "dirt", None),
        ("dirt/oil/2.tif", 1, "dirt/oil", None),
    ]
    assert dataset.missing_masks == 0  # there are none, so none is missing


@pytest.mark.parametrize("good", ["good", "NORMAL", "Ok"])
@pytest.mark.parametrize("ext", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp", "PNG", "Tiff"])
def test_names_of_good_and_of_files(tmp_path: Path, good: str, ext: str) -> None:
    tree(tmp_path, f"{good}/1.{ext}", f"{good}/.hidden.{ext}", f".trash/1.{ext}", f"{good}/1.txt", "bad/1.gif")
    dataset = only(tmp_path)
    assert names(dataset) == [f"{good}/1.{ext}"] and dataset.test == []


def test_plain_folders_with_a_test_split(tmp_path: Path) -> None:
    tree(tmp_path, "ok/{1,2}.png", "test/ok/3.png", "test/ko/4.png", "masks/ko/4.png")
    dataset = only(tmp_path)
    assert names(dataset) == ["ok/1.png", "ok/2.png"]
    assert table(dataset) == [("test/ko/4.png", 1, "ko", "masks/ko/4.png"), ("test/ok/3.png", 0, "good", None)]


@pytest.mark.parametrize("folder", ["ground_truth", "Masks", "mask"])
def test_masks_in_every_place(tmp_path: Path, folder: str) -> None:
    tree(tmp_path, "good/1.png", "crack/{1,2,3}.png", "dent/{4,5}.png")
    tree(tmp_path, f"{folder}/Crack/1.png", f"{folder}/Crack/2_mask.bmp", f"{folder}/4_mask.png", f"{folder}/9.png")
    dataset = only(tmp_path)
    masks = {name: mask for name, _, _, mask in table(dataset)}
    assert masks == {
        "crack/1.png": f"{folder}/Crack/1.png",
        "crack/2.png": f"{folder}/Crack/2_mask.bmp",
        "crack/3.png": None,
        "dent/4.png": f"{folder}/4_mask.png",
        "dent/5.png": None,
    }
    assert dataset.missing_masks == 2


def test_masks_beside_their_images(tmp_path: Path) -> None:
    tree(tmp_path, "good/1.png", "crack/{1.jpg,1_mask.png,2.jpg,face_mask.jpg,_mask.jpg}")
    dataset = only(tmp_path)
    assert [(name, mask) for name, _, _, mask in table(dataset)] == [
        ("crack/1.jpg", "crack/1_mask.png"),
        ("crack/2.jpg", None),
        ("crack/_mask.jpg", None),
        ("crack/face_mask.jpg", None),
    ]
    assert dataset.missing_masks == 3


def test_an_empty_mask_folder_misses_every_mask(tmp_path: Path) -> None:
    tree(tmp_path, "good/1.png", "crack/{1,2}.png", "masks/notes.txt")
    assert only(tmp_path).missing_masks == 2


def test_a_lossless_mask_is_preferred(tmp_path: Path) -> None:
    tree(tmp_path, "good/1.png", "crack/1.png", "masks/crack/1.{jpg,png}")
    assert table(only(tmp_path))[0][3] == "masks/crack/1.png"


def test_one_mask_for_two_images_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, "good/1.png", "crack/1.png", "dent/1.png", "masks/1.png")
    with pytest.raises(InputError, match=r"masks/1\.png fits .*crack/1\.png and .*dent/1\.png"):
        find_datasets(tmp_path)


def test_images_only(tmp_path: Path) -> None:
    dataset = only(tree(tmp_path / "parts", "{b,a}.png", "notes/readme.txt"))
    assert dataset.name == "parts" and names(dataset) == ["a.png", "b.png"] and dataset.test == []


def test_the_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree(tmp_path / "parts", "good/1.png"))
    assert only(Path()).name == "parts"


def visa(root: Path, *rows: str) -> Path:
    tree(root, "candle/Data/Images/Normal/{0000,0001,0002}.JPG", "candle/Data/Images/Anomaly/{000,001}.JPG")
    tree(root, "candle/Data/Masks/Anomaly/{000,001}.png", "candle/image_anno.csv", "split_csv/2cls_highshot.csv")
    tree(root, "pcb1/Data/Images/Normal/{0000,0001}.JPG", "pcb1/Data/Images/Anomaly/000.JPG")
    if rows:
        (root / "split_csv" / "1cls.csv").write_text("\n".join(["object,split,label,image,mask", *rows]) + "\n")
    return root


ROWS = [
    "pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,",
    "pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG",
    "candle,train,normal,candle/Data/Images/Normal/0002.JPG,,",
    "candle,train,normal,candle/Data/Images/Normal/0000.JPG,",
    "candle,test,normal,candle/Data/Images/Normal/0001.JPG,",
    "candle,test,anomaly,candle/Data/Images/Anomaly/001.JPG,candle/Data/Masks/Anomaly/001.png",
]


def test_visa_with_its_split(tmp_path: Path) -> None:
    candle, pcb = find_datasets(visa(tmp_path, *ROWS))
    assert (candle.name, pcb.name) == ("candle", "pcb1")
    assert names(candle) == ["Data/Images/Normal/0000.JPG", "Data/Images/Normal/0002.JPG"]
    assert table(candle) == [
        ("Data/Images/Anomaly/001.JPG", 1, "anomaly", "Data/Masks/Anomaly/001.png"),
        ("Data/Images/Normal/0001.JPG", 0, "good", None),
    ]
    assert pcb.test == [Sample(tmp_path / "pcb1/Data/Images/Normal/0001.JPG", 0, "good", None)]
    alone = only(tmp_path / "candle")  # the split beside it counts
    assert [path.name for path in alone.train_good] == ["0000.JPG", "0002.JPG"] and len(alone.test) == 2


def test_visa_without_a_split(tmp_path: Path) -> None:
    candle, pcb = find_datasets(visa(tmp_path))
    assert len(candle.train_good) == 3 and len(pcb.train_good) == 2
    assert table(candle) == [
        ("Data/Images/Anomaly/000.JPG", 1, "anomaly", "Data/Masks/Anomaly/000.png"),
        ("Data/Images/Anomaly/001.JPG", 1, "anomaly", "Data/Masks/Anomaly/001.png"),
    ]
    assert pcb.test[0].mask is None and pcb.missing_masks == 0
    assert only(tmp_path / "candle") == candle


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("pcb1,train,anomaly,pcb1/Data/Images/Anomaly/000.JPG,", "line 2.*train,anomaly"),
        ("pcb1,val,normal,pcb1/Data/Images/Normal/0000.JPG,", "line 2.*val,normal"),
        ("pcb1,train,normal,pcb1/Data/Images/Normal/9999.JPG,", r"line 2.*9999\.JPG is not there"),
        ("pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/none.png", r"line 2.*none\.png is not there"),
        ("pcb1,train,normal,,", "line 2.*is not there"),
        ("pcb1", "line 2"),
    ],
)
def test_a_bad_visa_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_datasets(visa(tmp_path, row))


def test_a_bad_visa_table(tmp_path: Path) -> None:
    visa(tmp_path, *ROWS[:2], ROWS[0].replace("train", "test"))
    with pytest.raises(InputError, match=r"0000\.JPG is a test image and a good image"):
        find_datasets(tmp_path)
    path = tmp_path / "split_csv" / "1cls.csv"
    for text, message in [
        (b"object,label,image\n", "no column split"),
        (b"object,split,label,image,mask\n", "no rows"),
        (b"", "no column object"),
        (b"\xff\xfe\0", "cannot read"),
    ]:
        path.write_bytes(text)
        with pytest.raises(InputError, match=message):
            find_datasets(tmp_path)


def test_evaluation_needs_no_good_images_to_learn_from(tmp_path: Path) -> None:
    tree(tmp_path, "test/good/1.png", "test/bad/2.png")
    with pytest.raises(InputError, match="no good images"):
        find_datasets(tmp_path)
    assert only(tmp_path, need_good=False).train_good == []


def test_train_may_hold_images_directly(tmp_path: Path) -> None:
    tree(tmp_path, "train/{1,2}.png", "test/bad/3.png", "results/heat.png")
    dataset = only(tmp_path)
    assert names(dataset) == ["train/1.png", "train/2.png"] and len(dataset.test) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], "no images found; looked for train/good"),
        (["train/good/notes.txt"], "no good images; looked for"),
        (["good/notes.txt", "bad/1.png"], "no good images"),
        (["train/good/1.png", "train/bad/2.png"], "train/bad: train/ may hold only good"),
        (["train/ok_front/1.png", "train/def_front/2.png"], "train/ may hold only good"),
        (["train/good/1.png", "train/2.png"], "lies beside train's good folder"),
        (["train/good/1.png", "test/2.png"], "in neither test/good nor test/<defect>"),
        (["good/1.png", "bad/2.png", "3.png"], r"3\.png is in neither"),
        (["good/1.png", "bad/ok/2.png"], "bad/ok may be good or the defect bad"),
        (["scratch/1.png", "dent/2.png"], "holds images, but neither it nor"),
        (["a/good/1.png", "b/good/1.png", "2.png"], r"2\.png lies beside folders of categories"),
    ],
)
def test_what_leaves_a_doubt_is_one_line(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_datasets(tree(tmp_path, *files))
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot open .*none: No such file"):
        find_datasets(tmp_path / "none")
    with pytest.raises(InputError, match=r"x\.png is a file"):
        find_datasets(tree(tmp_path, "x.png") / "x.png")
    with pytest.raises(InputError, match="no images found"):
        find_datasets(tree(tmp_path / "empty", "sub/notes.txt"))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, "good/1.png")
    (root / "good").chmod(0)
    if os.access(root / "good", os.R_OK):  # root lists everything
        listed = os.scandir

        def refuse(folder: Path):  # type: ignore[no-untyped-def]
            if Path(folder).name == "good":
                raise PermissionError(13, "Permission denied")
            return listed(folder)

        monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot list .*good: Permission denied"):
        find_datasets(root)
    (root / "good").chmod(0o755)


def test_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "good/1.png", "bad/2.png")
    elsewhere = tree(tmp_path / "elsewhere", "3.png")
    (root / "good" / "loop").symlink_to(root / "good")
    (root / "good" / "more").symlink_to(elsewhere)
    (root / "good" / "dead.png").symlink_to(tmp_path / "gone.png")
    # a dead link is no reason to leave an image out unseen: reading it fails
    assert names(only(root)) == ["good/1.png", "good/dead.png", "good/more/3.png"]
    (root / "bad" / "same.png").symlink_to(root / "good" / "1.png")
    with pytest.raises(InputError, match=r"same\.png is a test image and a good image"):
        find_datasets(root)
