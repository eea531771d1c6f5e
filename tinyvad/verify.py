"""Does every engine say the same? The same images through all that are installed, compared integer by integer.

Flows in: a build and (n, S, S, 3) uint8 images. Flows out: a dict a person and a CI can read; ``ok`` is False on a single
differing integer of an exact engine, a changed file or a failed self-test of the bank. The float ONNX engine is allowed
to differ; how often its verdict does is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bank import open_bank
from tinyvad.engines import open_engine
from tinyvad.errors import CheckFailed, InputError, TinyvadError
from tinyvad.firmware_sim.targets import Target
from tinyvad.images import Preprocessing, apply_table, find_datasets, load_images, read_image
from tinyvad.model import BACKBONES, BANKS, BATCH, Model, load, read_manifest
from tinyvad.slots import SLOTS

ORACLES = ("litert", "tflm")
RUNTIMES = ("host", "firmware")  # our C code, compiled for this PC and for the target under QEMU: only where asked for
ENGINES = (*ORACLES, "onnx", *RUNTIMES)
REPLACED = (*BANKS.values(), "firmware/bank.tvb")  # files of a build that learning writes anew
ALL = "all"
SAMPLES = "samples"


def sample_images(build: Path, manifest: dict[str, Any]) -> np.ndarray:
    """(n, S, S, 3) uint8: the few images that the build keeps, and four rendered ones at the ends of the range."""
    size = manifest["preprocessing"]["height"], manifest["preprocessing"]["width"]
    changed = changed_files(build, manifest)
    names = [name for name in sorted(manifest["files"]) if name.startswith(f"{SAMPLES}/") and name not in changed]
    real = [read_image(build / name) for name in names]
    ramp = np.add.outer(np.arange(size[0]), np.arange(size[1]))[..., None] * np.array([1, 2, 3])
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3))
    rendered = [np.zeros((*size, 3)), np.full((*size, 3), 255), ramp % 256, noise]
    return np.stack([*real, *(image.astype(np.uint8) for image in rendered)])


def verify(
    build: Path,
    images: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    engines: Sequence[str] | None = None,
    target: Target | None = None,
) -> dict[str, Any]:
    """Compare engines with the exact one.

    Args:
        build: a build folder.
        images: (n, S, S, 3) uint8 at the network's size; None takes ``sample_images``.
        engines: of ``ENGINES``, or 'all'; None: those that need no compiler. One that is named and cannot run is an error.
        target: for the firmware; None: the build's own.

    Returns:
        ``ok``, ``n_images``, ``engines`` (a dict each), ``bank_self_test``, ``files_changed``, ``problems`` (a line each).

    Raises:
        InputError: an engine that was named cannot run.
    """
    manifest = read_manifest(build)
    try:
        model = load(build)
    except CheckFailed as error:
        return {"ok": False, "n_images": 0, "taps": [], "engines": {}, "bank_self_test": "not run", "files_changed": [],
                "problems": [str(error)]}  # fmt: skip
    if images is None:
        images = sample_images(build, manifest)
    changed = changed_files(build, manifest)
    problems = [f"{name} was changed after the build" for name in changed]
    self_test = bank_self_test(model)
    if self_test != "passed":
        problems.append(f"bank self-test {self_test}")
    written = manifest["thresholds"]["int8"]["raw"]  # at the build; learning sets others
    if model.bank.header.generation == 0 and written != model.threshold:
        problems.append(f"manifest.json says threshold {written}, the bank {model.threshold}")
    taps = [np.concatenate(parts) for parts in zip(*(model.taps(chunk) for chunk in _chunks(images)), strict=True)]
    scores = model.score_taps(taps)
    results: dict[str, Any] = {"int8": {"status": "reference"}}
    wanted = ENGINES if engines is not None and ALL in engines else engines or (*ORACLES, "onnx")
    names = [name for name in ENGINES if name in wanted]
    for done, name in enumerate(names):
        if name in RUNTIMES:
            results[name] = _compare_runtime(build, model, images, name, target)
        elif name == "onnx":
            results[name] = _compare_float(build, images, model, scores)
        else:
            results[name] = _compare_exact(build, name, model, images, taps, scores)
        if engines is not None and ALL not in engines and results[name]["status"] == "not run":
            raise InputError(f"engine {name} cannot run: {results[name]['reason']}")
        if "problem" in results[name]:
            problems.append(results[name]["problem"])
        if progress is not None:
            progress(done + 1, len(names))
    return {
        "ok": not problems,
        "n_images": len(images),
        "taps": [tap.name for tap in model.embedding.taps],
        "engines": results,
        "bank_self_test": self_test,
        "files_changed": changed,
        "problems": problems,
    }


def changed_files(build: Path, manifest: dict[str, Any]) -> list[str]:
    """Files of the manifest that are missing or have another SHA-256, and slots with a damaged bank.

    Learning replaces banks; those of a later generation are vouched for by their own CRCs.
    """
    changed = [name for name in (*BACKBONES.values(), *BANKS.values()) if name not in manifest["files"]]
    for name, facts in manifest["files"].items():
        if name in REPLACED and _was_learnt(build / name):
            continue
        try:
            digest = hashlib.sha256((build / name).read_bytes()).hexdigest()
        except OSError:
            digest = "missing"
        if digest != facts["sha256"]:
            changed.append(name)
    later = [name for _, name in SLOTS.values() if (build / name).exists() and name not in manifest["files"]]
    return changed + [name for name in later if not _was_learnt(build / name)]


def _was_learnt(path: Path) -> bool:
    """Is it a whole bank that was written after the build?"""
    try:
        return open_bank(path).header.generation > 0
    except InputError:
        return False


def bank_self_test(model: Model) -> str:
    """'passed' if the bank's golden patch vectors (TEST) have the stored scores (GOLD), 'failed', or 'not stored'."""
    vectors, expected = model.bank.sections.get("TEST"), model.bank.sections.get("GOLD")
    if vectors is None or expected is None:
        return "not stored"
    wrong = 0
    for vector, (task, position, score) in zip(vectors, expected, strict=True):
        found = model.scorers.scorers[task].score(model.embedding.with_vector(vector, position))
        wrong += int(found.flat[position] != score)
    return "failed" if wrong else "passed"


def _chunks(images: np.ndarray) -> list[np.ndarray]:
    return [images[i : i + BATCH] for i in range(0, len(images), BATCH)]


def _compare_runtime(build: Path, model: Model, images: np.ndarray, name: str, target: Target | None) -> dict[str, Any]:
    from tinyvad.firmware_sim.compare import compare_firmware

    try:
        return compare_firmware(build, model, images, name, target)
    except InputError as error:
        return {"status": "not run", "reason": str(error)}
    except CheckFailed as error:
        return {"status": "failed", "problem": f"{name}: {error}"}


def _compare_exact(
    build: Path, name: str, model: Model, images: np.ndarray, taps: list[np.ndarray],
    scores: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    try:
        engine = open_engine(name, build)
    except InputError as error:
        return {"status": "not run", "reason": str(error)}
    inputs = apply_table(images, model.table)
    theirs = engine.features(inputs)
    differing = {
        tap.name: int(np.count_nonzero(mine != other))
        for tap, mine, other in zip(model.embedding.taps, taps, theirs, strict=True)
    }
    their_maps, their_tasks = model.score_taps(theirs)
    differing_scores = int(np.count_nonzero(their_maps != scores[0]) + np.count_nonzero(their_tasks != scores[1]))
    result: dict[str, Any] = {
        "status": "equal",
        "values_compared": int(sum(tap.size for tap in taps)),
        "differing_values": differing,
        "differing_grid_scores": differing_scores,
    }
    if any(differing.values()) or differing_scores:
        image = next(i for i in range(len(images)) if any((m[i] != o[i]).any() for m, o in zip(taps, theirs, strict=True)))
        first = _first_difference(model, engine, inputs[image])
        share = f"{sum(differing.values())} of {result['values_compared']}"
        result["status"] = "differs"
        result["problem"] = (
            f"{name} differs from the exact engine in {share} tapped values, first in {first}"
        )
    return result


def _first_difference(model: Model, engine: Any, image: np.ndarray) -> str:
    """Name of the first tensor in which an engine that shows its tensors differs on one int8 image."""
    if not hasattr(engine, "all_tensors"):
        return "one of the taps (this engine does not show the tensors before them)"
    theirs = engine.all_tensors(image)
    for name, mine in model.engine.all_tensors(image).items():  # type: ignore[attr-defined]
        if name in theirs and (mine.ravel() != theirs[name].ravel()).any():
            return f"tensor {name}"
    return "no tensor of both"


def _compare_float(
    build: Path, images: np.ndarray, exact: Model, scores: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    try:
        model = load(build, "onnx")
    except TinyvadError as error:
        return {"status": "not run", "reason": str(error)}
    maps, tasks = (
        np.concatenate(parts) for parts in zip(*(model.grid_maps(chunk) for chunk in _chunks(images)), strict=True)
    )
    mine, theirs = scores[0].max((1, 2)), maps.max((1, 2))
    a, b = exact.real(mine), exact.real(theirs)
    verdicts = (mine >= exact.scorers.thresholds[scores[1]]) != (theirs >= model.scorers.thresholds[tasks])
    return {
        "status": "float, own threshold",
        "largest_relative_score_difference": float(np.max(np.abs(a - b) / np.maximum(a, 1e-9))),
        "differing_verdicts": int(verdicts.sum()),
    }


def images_of(build: Path, data: Path, limit: int) -> np.ndarray:
    """Up to ``limit`` images of a dataset at the network's size, good and defective in turn: (n, S, S, 3) uint8."""
    preprocessing = Preprocessing.from_dict(read_manifest(build)["preprocessing"])
    chosen: list[Path] = []
    for dataset in find_datasets(data, need_good=False):
        good = [sample.path for sample in dataset.test if sample.label == 0] or dataset.train_good
        bad = [sample.path for sample in dataset.test if sample.label == 1]
        half = limit - limit // 2 if bad else limit
        chosen += evenly(good, half) + evenly(bad, limit - half)
    return np.stack([image for _, image in load_images(chosen[:limit], preprocessing)])


def evenly(items: list[Path], count: int) -> list[Path]:
    """Up to ``count`` items, evenly spaced."""
    if not items or count < 1:
        return []
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def summary(result: dict[str, Any]) -> str:
    """The result for people, a line an engine."""
    lines = [f"{result['n_images']} images, {len(result['taps'])} tapped tensors"]
    for name, facts in result["engines"].items():
        detail = facts.get("problem") or facts.get("reason") or ""
        if facts["status"] == "equal":
            detail = f"0 of {facts['values_compared']:,} tapped values and 0 scores differ"
            if "machine" in facts:
                detail += (
                    f"; {facts['machine']}: {facts['instructions'] / 1e6:.1f} M instructions an image, "
                    f"{facts['stack_bytes']:,} B of stack, {facts['code_bytes']:,} B of code"
                )
        if "differing_verdicts" in facts:
            worst = facts["largest_relative_score_difference"]
            detail = f"scores within {worst:.1%} of int8, {facts['differing_verdicts']} verdicts differ"
        lines.append(f"  {name:<8} {facts['status']:<10} {detail}")
    lines.append(f"  bank self-test {result['bank_self_test']}; {len(result['files_changed'])} files changed")
    compared = [name for name, facts in result["engines"].items() if facts["status"] == "equal"]
    if not result["ok"]:
        lines.append(f"FAILED: {'; '.join(result['problems'])}")
    elif compared:
        missing = [name for name, facts in result["engines"].items() if facts["status"] == "not run"]
        lines.append(
            f"verified: the network's integers are equal in int8, {', '.join(compared)}"
            + (f"; NOT run: {', '.join(missing)}" if missing else "")
        )
    else:
        lines.append("nothing was compared: pip install 'tinyvad[litert,sim]'; files and bank are whole")
    return "\n".join(lines)
