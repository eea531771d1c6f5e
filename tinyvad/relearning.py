"""``tinyvad learn`` for a trained network: good images of one more product in, the whole build anew out.

A memory bank takes a product in and leaves the network as it is; here the network itself is trained further, so that the
weights, their quantisation, the firmware and every product's threshold change. The order:

1. what the build keeps of its training (``tinyvad.continual.trained_build``), and the images that are new
2. the student, adaptor or discriminator learns them, with whatever keeps it from forgetting
3. all that follows in a build (``tinyvad.build``); old products' thresholds are set anew on the images kept of them
4. the new build takes the old one's place; until then nothing of that changes, and a training that is stopped goes on

Training is for a PC, a Jetson or a Raspberry Pi; what runs on the microcontroller is flashed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyvad import slots
from tinyvad.backbones.source import Backbone
from tinyvad.build import Build, check_only_ours
from tinyvad.choosing import Choice
from tinyvad.continual.learn import Learnt, check_name, image_key, read_state
from tinyvad.continual.trained_build import STATE, Known, open_stream, read_products
from tinyvad.errors import CheckFailed, InputError
from tinyvad.files import write_bytes
from tinyvad.firmware_sim.targets import load_target
from tinyvad.images import Dataset, Preprocessing, load_images
from tinyvad.model import BANKS, load, read_manifest
from tinyvad.project import TRAINED, Project, make_project

Tell = Callable[[str, int, int], None]


def is_trained(folder: Path) -> bool:
    """True if a build's network was trained. Raises InputError if it is no build."""
    return read_manifest(folder)["method"]["name"] in TRAINED


def learn(folder: Path, task: str, paths: Sequence[Path], on_error: str = "stop", tell: Tell | None = None) -> Learnt:
    """Train a build's network on good images of a product, a new one or one that it knows.

    Raises:
        InputError: no or unreadable images, a build for one product, another learner at work.
        CheckFailed: the build was made for fewer products, or what becomes of it does not fit its target.
    """
    tell = tell or (lambda stage, done, total: None)
    manifest = read_manifest(folder)
    most = manifest["learning"]["tasks"]
    if most == 1:
        raise InputError(f"{folder} was made for one product; build it with --tasks 2 or more to learn others")
    with slots.locked(folder):
        check_only_ours(folder)
        arrays = read_state(folder / STATE)
        graph, state, known = read_products(arrays, folder / STATE)
        names = [product.name for product in known]
        if task not in names:
            check_name(task)
            if len(known) >= most:
                raise CheckFailed(f"{folder} was built for {most} products, and knows as many: build with more --tasks")
        old = known[names.index(task)] if task in names else None
        preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
        skipped: list[tuple[Path, str]] = []
        new = _new_images(paths, preprocessing, old, on_error, skipped, tell)
        told = [(str(path), reason) for path, reason in skipped]
        if not new:
            return _told(folder, known, task, known_images=len(paths) - len(skipped), skipped=told)
        project = _project(folder, manifest, on_error)
        if "target" in arrays:  # a file of the user's own, which may be gone
            own = folder / slots.STATES / "target.toml"
            write_bytes(own, arrays["target"].tobytes())
            project = replace(project, target=str(own))
        stream = open_stream(graph, preprocessing, project, len(new))
        try:
            stream.restore(state)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, StopIteration) as error:
            raise InputError(f"{folder / STATE}: not this build's training ({error!r}); make the build again") from error
        backbone = manifest["backbone"]
        mean, std = preprocessing.mean, preprocessing.std
        same = Backbone(
            backbone["name"], backbone["source"], backbone["sha256"], (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]),
            tuple(graph.outputs), lambda size: graph, bool(backbone["random"]), backbone.get("quality"),
        )  # fmt: skip
        target = None if project.target is None else load_target(project.target)
        dataset = Dataset(task, Path(paths[0]).parent, new, [])
        Build(project, dataset, target, Choice(same, preprocessing.height), tell, known, stream).run(folder)
    after = read_products(read_state(folder / STATE), folder / STATE)[2]
    return _told(folder, after, task, old is None, len(new), len(paths) - len(skipped) - len(new), told)


def _new_images(
    paths: Sequence[Path], preprocessing: Preprocessing, old: Known | None, on_error: str,
    skipped: list[tuple[Path, str]], tell: Tell,
) -> list[Path]:  # fmt: skip
    """Files of images that the product was not taught yet, each once."""
    seen = set() if old is None else set(old.keys.tolist())
    new: list[Path] = []
    readable = 0
    for path, image in load_images(paths, preprocessing, on_error=on_error, skipped=skipped):
        readable += 1
        key = image_key(image)
        if key not in seen:
            seen.add(key)
            new.append(path)
        tell("images", readable + len(skipped), len(paths))
    if not readable:
        reason = f"the first of {len(skipped)} unreadable ones: {skipped[0][1]}" if skipped else "give at least one"
        raise InputError(f"no images to learn; {reason}")
    return new


def _project(folder: Path, manifest: dict[str, Any], on_error: str) -> Project:
    """The settings that the build was made with."""
    settings, target = manifest["settings"], manifest["target"]
    kept = ("seed", "frame", "bank_bytes", "grid", "quantile", "runtime", "plan", "max_ms", "epochs", "shared",
            "strategy", "replay", "replay_form", "layers")  # fmt: skip
    return replace(
        make_project({name: settings[name] for name in kept}),
        out=folder, target=None if target is None else target["name"], method=manifest["method"]["name"], on_error=on_error,
        image_size=manifest["preprocessing"]["height"], bit_depth=manifest["preprocessing"].get("bit_depth", 16),
        tasks=manifest["learning"]["tasks"],
    )  # fmt: skip


def _told(
    folder: Path, known: Sequence[Known], task: str, new_task: bool = False, images: int = 0, known_images: int = 0,
    skipped: Sequence[tuple[str, str]] = (),
) -> Learnt:  # fmt: skip
    model = load(folder)
    number = model.task_number(task) if task in model.task_names else 0
    tasks = [{"name": product.name, "images": product.images} for product in known]
    size = (folder / BANKS["int8"]).stat().st_size
    return Learnt(
        str(folder), task, len(known) - 1, tasks, size, model.manifest["learning"]["slot_bytes"], new_task, images,
        known_images, int(model.scorers.thresholds[number]), model.task_threshold(number), "", list(skipped),
    )  # fmt: skip
