"""``tinyvad distill``: flags in, a trained student's files out; the checkpoint goes once they are written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyvad.distill.finish import finish
from tinyvad.distill.train import Progress, Recipe, distil
from tinyvad.engines import threads
from tinyvad.errors import InputError


def distill(
    teachers: Sequence[str],
    layers: Sequence[str],
    student_layers: str | None,
    folders: Sequence[str],
    out: Path,
    notes: Sequence[str],
    check: bool,
    progress: Progress,
    **settings: Any,
) -> tuple[dict[str, Any], dict[Path, str]]:
    """Train and finish; returns the card, and the image files that could not be read with their reasons.

    Raises:
        InputError: wrong use (see ``distil`` and ``finish``), an ``out`` that is no .npz, or files in its place.
    """
    if out.suffix != ".npz":
        raise InputError(f"--out {out}: weights are .npz files; give a name that ends in .npz")
    checkpoint, beside = out.with_suffix(".checkpoint"), [out.with_suffix(".toml"), out.with_suffix(".svg")]
    for path in [out] if checkpoint.exists() else [out, *beside]:  # a training that was stopped at its end left those
        if path.exists():
            raise InputError(f"--out {out}: {path} exists; give another name, or remove it to train anew")
    if layers and len(layers) != len(teachers):
        raise InputError(f"--layers is given {len(layers)} times for {len(teachers)} --teacher: one each, or none")
    chosen: list[tuple[str, ...] | None] = [tuple(names.split(",")) for names in layers]
    recipe = Recipe(
        teachers=tuple(zip(teachers, chosen or [None] * len(teachers))),
        student_layers=tuple(student_layers.split(",")) if student_layers else None,
        folders=tuple(folders),
        **settings,
    )
    trained = distil(recipe, checkpoint, threads=threads(), progress=progress)
    card = finish(recipe, trained, out, _command(recipe, out), notes, check, threads(), progress)
    checkpoint.unlink()
    return card, {**trained.training.skipped, **trained.held_out.skipped}


def _command(recipe: Recipe, out: Path) -> str:
    """The command line that trains this again, files and folders by their last names."""
    words = ["tinyvad", "distill"]
    for teacher, layers in recipe.teachers:
        words += ["--teacher", Path(teacher).name, *(["--layers", ",".join(layers)] if layers else [])]
    words += ["--student", recipe.student]
    words += ["--student-layers", ",".join(recipe.student_layers)] if recipe.student_layers else []
    for folder in recipe.folders:
        words += ["--images", Path(folder).name]
    for name in ("generated", "image_size", "steps", "batch_size", "learning_rate", "loss", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    return shlex.join([*words, "--out", out.name])
