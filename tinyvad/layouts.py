"""Which images there are: folders on disk become good images to learn from and labelled images to test on.

Flows in: a folder in one of the layouts below. Flows out: a ``Dataset`` a category, its paths sorted.

=============== ===========================================================================================
MVTec AD        ``train/good``, ``test/<defect>``, ``ground_truth/<defect>/<stem>_mask.png``; the reorganised
                VisA (masks ``<stem>.png``) and BTAD (``ok``, ``ko``) have this form too. Other folders beside
                ``train`` are not looked at
plain folders   ``good|normal|ok``; any other subfolder, nested ones too, is a defect type. All good images are to
                learn from, unless ``test/`` holds ``good`` as well
VisA            ``split_csv/1cls.csv`` beside the objects, or one object ``<object>/Data/Images/{Normal,Anomaly}``
                (the split of the csv beside it counts; without one, every Normal image is to learn from)
images only     all good
many categories a folder of any of the first three
=============== ===========================================================================================

Names are compared without case, hidden files are skipped. Masks lie in ``ground_truth|masks|mask`` (in a folder a
defect type, or all in one if their stems differ) or beside their image as ``<stem>_mask``; they are optional, and are
paired by stem, never by position. What fits no layout is an error, not a guess.
"""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinyvad.errors import InputError

EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".webp", ".jpg", ".jpeg")  # of two masks with one stem the first wins
GOOD_NAMES = ("good", "normal", "ok")
MASK_NAMES = ("ground_truth", "masks", "mask")
_LOOKED_FOR = (
    "train/good and test/<defect>, a folder good|normal|ok, VisA's split_csv/1cls.csv or Data/Images/Normal, "
    f"or images ({' '.join(name[1:] for name in EXTENSIONS)}) alone"
)


@dataclass(frozen=True)
class Sample:
    """One image to test on: label 0 normal or 1 anomalous, defect 'good' or the folder's name, mask if there is one."""

    path: Path
    label: int
    defect: str
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """One category.

    Attributes:
        name: the folder's name.
        root: the folder.
        train_good: good images to learn from, sorted by path.
        test: images to test on, sorted by path; none of them is in ``train_good``.
        missing_masks: anomalous test images without a mask, where the category has masks at all.
    """

    name: str
    root: Path
    train_good: list[Path]
    test: list[Sample]
    missing_masks: int = 0


def find_datasets(root: str | Path, need_good: bool = True) -> list[Dataset]:
    """Find the categories in ``root``, whatever its layout.

    Args:
        root: one category, or a folder of categories.
        need_good: every category must have good images to learn from; False for evaluation alone.

    Returns:
        One ``Dataset`` a category, sorted by name; at least one.

    Raises:
        InputError: no such folder, not readable, no images, or a layout that leaves a doubt; says what was looked for.
    """
    root = Path(root)
    try:
        if not stat.S_ISDIR(root.stat().st_mode):
            raise InputError(f"{root} is a file: give a folder with {_LOOKED_FOR}")
    except OSError as error:
        raise InputError(f"cannot open {root}: {error.strerror}; give a folder with {_LOOKED_FOR}") from error
    datasets = _read_layout(root)
    for dataset in datasets:
        if not dataset.train_good and (need_good or not dataset.test):
            raise InputError(f"{dataset.root}: no good images; looked for {_LOOKED_FOR}")
        train = {os.path.realpath(path) for path in dataset.train_good}
        for sample in dataset.test:
            if os.path.realpath(sample.path) in train:
                raise InputError(f"{sample.path} is a test image and a good image to learn from: remove one of them")
    return sorted(datasets, key=lambda dataset: dataset.name)


def _read_layout(root: Path) -> list[Dataset]:
    if table := _child(root, "split_csv", "1cls.csv"):
        return _visa_split(root, table)
    if _is_visa_object(root):
        table = _child(root.resolve().parent, "split_csv", "1cls.csv")
        objects = _visa_split(root.resolve().parent, table) if table else []
        return [dataset for dataset in objects if dataset.name == root.resolve().name] or [_visa_object(root)]
    if _is_category(root):
        return [_category(root)]
    folders, loose = _list(root)
    inside = [folder for folder in folders if _is_category(folder) or _images_under(folder)]
    if not inside and loose:
        return [Dataset(root.resolve().name, root, loose, [])]
    for folder in inside:
        if not _is_category(folder):
            raise InputError(f"{folder} holds images, but neither it nor {root} is a layout: looked for {_LOOKED_FOR}")
    if not inside:
        raise InputError(f"{root}: no images found; looked for {_LOOKED_FOR}")
    if loose:
        raise InputError(f"{loose[0]} lies beside folders of categories and belongs to none: move it away")
    return [_visa_object(folder) if _is_visa_object(folder) else _category(folder) for folder in inside]


def _is_visa_object(folder: Path) -> bool:
    return _child(folder, "Data", "Images", "Normal") is not None


def _is_category(folder: Path) -> bool:
    names = [child.name.lower() for child in _list(folder)[0]]
    return _is_visa_object(folder) or any(name in ("train", "test", *GOOD_NAMES) for name in names)


def _category(root: Path) -> Dataset:
    """MVTec and plain folders."""
    train, test = _child(root, "train"), _child(root, "test")
    folders, loose = _list(root)
    mask_folders = [folder for folder in folders if folder.name.lower() in MASK_NAMES]
    good: list[Path] = []
    samples: list[Sample] = []
    if train:
        good = _train_images(train)
    else:
        if loose:
            raise InputError(f"{loose[0]} is in neither a good|normal|ok folder nor a defect's: move it into one")
        for folder in folders:
            if folder.name.lower() in GOOD_NAMES:
                good += _images_under(folder)
            elif folder not in (test, *mask_folders):
                samples += _defects(folder, root)
    if test:
        folders, loose = _list(test)
        if loose:
            raise InputError(f"{loose[0]} is in neither test/good nor test/<defect>: move it into one")
        for folder in folders:
            if folder.name.lower() in GOOD_NAMES:
                samples += [Sample(path, 0, "good") for path in _images_under(folder)]
            elif folder.name.lower() in MASK_NAMES:
                mask_folders.append(folder)
            else:
                samples += _defects(folder, test)
    samples, missing = _pair_masks(samples, mask_folders)
    return Dataset(root.resolve().name, root, _by_path(good), samples, missing)


def _train_images(train: Path) -> list[Path]:
    """The images of train/: those of its good folders, or its own if it has no folders with images."""
    folders, loose = _list(train)
    good = [path for folder in folders if folder.name.lower() in GOOD_NAMES for path in _images_under(folder)]
    for folder in folders:
        if folder.name.lower() not in GOOD_NAMES and _images_under(folder):
            raise InputError(f"{folder}: train/ may hold only good|normal|ok, as only good images are learnt from")
    if good and loose:
        raise InputError(f"{loose[0]} lies beside {train.name}'s good folder: move it into it or away")
    return good or loose


def _defects(folder: Path, base: Path) -> list[Sample]:
    """All images below ``folder`` as anomalous; the defect is the path of their folder from ``base``."""
    paths = _images_under(folder)
    stems = {path.with_suffix("") for path in paths}
    masks: dict[Path, Path] = {}  # image without suffix -> the mask beside it
    for path in paths:
        owner = path.with_suffix("").as_posix()[: -len("_mask")]
        if path.stem.lower().endswith("_mask") and Path(owner) in stems:
            masks[Path(owner)] = path
    samples = []
    for path in paths:
        defect = path.parent.relative_to(base)
        if any(part.lower() in GOOD_NAMES for part in defect.parts):
            raise InputError(f"{path.parent} may be good or the defect {defect.parts[0]}: rename or move it")
        if path not in masks.values():
            samples.append(Sample(path, 1, defect.as_posix(), masks.get(path.with_suffix(""))))
    return samples


def _pair_masks(samples: list[Sample], mask_folders: list[Path]) -> tuple[list[Sample], int]:
    """The samples, sorted, with masks from the mask folders; and how many anomalous ones lack theirs."""
    index: dict[tuple[str, str], Path] = {}  # (folder below the mask folder in lower case, stem) -> mask
    for folder in mask_folders:
        masks = _images_under(folder)
        for path in sorted(masks, key=lambda path: EXTENSIONS.index(path.suffix.lower())):
            index.setdefault((path.parent.relative_to(folder).as_posix().lower(), path.stem), path)
    places = {place for place, _ in index}
    paired = []
    owners: dict[Path, Path] = {}
    for sample in samples:
        if sample.label == 1 and sample.mask is None:
            place = sample.defect.lower() if sample.defect.lower() in places else "."
            mask = index.get((place, f"{sample.path.stem}_mask")) or index.get((place, sample.path.stem))
            if mask and mask in owners:
                raise InputError(f"{mask} fits {owners[mask]} and {sample.path}: give each defect a folder of masks")
            if mask:
                owners[mask] = sample.path
                sample = Sample(sample.path, 1, sample.defect, mask)
        paired.append(sample)
    has_masks = bool(mask_folders) or any(sample.mask for sample in paired)
    missing = sum(sample.label == 1 and sample.mask is None for sample in paired) if has_masks else 0
    return sorted(paired, key=lambda sample: sample.path.as_posix()), missing


def _visa_object(root: Path) -> Dataset:
    """One VisA object without its split: all Normal images are to learn from."""
    images = _child(root, "Data", "Images")
    assert images is not None  # the caller found it
    normal, anomaly = _child(images, "Normal"), _child(images, "Anomaly")
    masks = _child(root, "Data", "Masks", "Anomaly")
    found = [Sample(path, 1, "anomaly") for path in _images_under(anomaly)] if anomaly else []
    samples, missing = _pair_masks(found, [masks] if masks else [])
    return Dataset(root.resolve().name, root, _images_under(normal) if normal else [], samples, missing)


def _visa_split(root: Path, table: Path) -> list[Dataset]:
    """VisA's 1cls.csv: columns object, split, label, image, mask; paths from ``root``."""
    datasets: dict[str, Dataset] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, {name: (value or "") for name, value in row.items()}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {table}: {error}") from error
    for column in ("object", "split", "label", "image"):
        if column not in columns:
            raise InputError(f"{table}: no column {column}; it needs object,split,label,image,mask")
    for line, row in rows:
        kind = (row["split"].strip().lower(), row["label"].strip().lower())
        if kind not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise InputError(f"{table} line {line}: {','.join(kind)} is no split,label; train holds normal images only")
        image, mask = root / row["image"].strip(), root / row.get("mask", "").strip()
        if not image.is_file() or not (mask == root or mask.is_file()):
            missing = mask if image.is_file() else image
            raise InputError(f"{table} line {line}: {missing} is not there; restore it or remove the row")
        name = row["object"].strip()
        dataset = datasets.setdefault(name, Dataset(name, root / name, [], []))
        if kind[0] == "train":
            dataset.train_good.append(image)
        else:
            anomalous = kind[1] == "anomaly"
            found = mask if anomalous and mask != root else None
            dataset.test.append(Sample(image, int(anomalous), "anomaly" if anomalous else "good", found))
    if not datasets:
        raise InputError(f"{table}: no rows, so no images")
    result = []
    for dataset in datasets.values():
        samples, unmasked = _pair_masks(dataset.test, [])
        result.append(Dataset(dataset.name, dataset.root, _by_path(dataset.train_good), samples, unmasked))
    return result


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """Subfolders and images of a folder, sorted, without hidden ones. A dead link counts as an image: reading fails."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(folder / entry.name)
                elif Path(entry.name).suffix.lower() in EXTENSIONS:
                    images.append(folder / entry.name)
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}; check its permissions") from error
    return _by_path(folders), _by_path(images)


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted. Raises InputError if there are none."""
    images = _images_under(folder)
    if not images:
        raise InputError(f"{folder}: no images ({' '.join(name[1:] for name in EXTENSIONS)})")
    return images


def _images_under(folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """All images below a folder, sorted; a link back to a folder above is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    folders, images = _list(folder)
    for child in folders:
        images += _images_under(child, (*above, real))
    return _by_path(images)


def _child(folder: Path, *names: str) -> Path | None:
    """The entry ``folder/name/name...`` by names without case, None if there is none."""
    for name in names:
        try:
            if not folder.is_dir():
                return None
            found = _by_path(entry for entry in folder.iterdir() if entry.name.lower() == name.lower())
        except OSError as error:
            raise InputError(f"cannot list {folder}: {error.strerror}; check its permissions") from error
        if not found:
            return None
        folder = found[0]
    return folder


def _by_path(paths: Iterable[Path]) -> list[Path]:
    """Sorted by the path's text with slashes: the same order on every system."""
    return sorted(paths, key=lambda path: path.as_posix())
