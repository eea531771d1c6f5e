"""Small builds that can learn, and images of four made-up products: for tests of learning on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tinyvad.build import build
from tinyvad.demo import render_demo
from tinyvad.project import Project

METHODS = ("padim-compact", "patchcore", "patchcore-lite")
COLOURS = {  # what is done to (n, S, S, 3) pictures of the first product to get another one
    "red": lambda images: images[..., [2, 0, 1]], "dark": lambda images: images // 3,
    "negative": lambda images: 255 - images, "turned": lambda images: images[:, ::-1] // 2 + 90,
    "green": lambda images: images[..., [1, 2, 0]] // 2,
}  # fmt: skip
SIZE = 64


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Good images of each product, (n, S, S, 3) uint8, by name; the first is ``part``, in MVTec layout in ``folder``."""
    render_demo(folder / "part", n_train=8, n_good=2, n_defect=4, size=SIZE)
    paths = sorted((folder / "part" / "train" / "good").glob("*.png"))
    part = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return {"part": part, **{name: change(part) for name, change in COLOURS.items()}}


def save(images: np.ndarray, folder: Path, first: int = 0) -> Path:
    """Images as files 000.png ... in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, first):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def make_build(folder: Path, part: Path, method: str, **settings: object) -> Path:
    """A build of the first product with room for several."""
    chosen = {"tasks": 8, "bank_bytes": 80 << 10, "dimensions": 16 if method == "padim-compact" else None, **settings}
    build(Project(data=part, image_size=SIZE, grid=4, method=method, out=folder, **chosen))  # type: ignore[arg-type]
    return folder


def copy(build_folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(build_folder, to))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a build and its content, but for the lock."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if name != "learn/lock"}
