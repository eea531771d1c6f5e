"""Builds of the trained methods: every engine the same integers, the same bytes again, killed or not; more products."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import tinyvad
from tinyvad import fitting_trained
from tinyvad.backbones.source import open_backbone
from tinyvad.build import build
from tinyvad.cli import main
from tinyvad.continual.trained_build import STATE, read_products
from tinyvad.demo import render_demo
from tinyvad.errors import CheckFailed, InputError
from tinyvad.model import load
from tinyvad.project import TRAINED, Project
from tinyvad.relearning import learn
from tinyvad.verify import verify

KINDS = {"stfpm": "STFP", "paste": "STFP", "cfa": "CFAS", "simplenet": "LINR"}
SETTINGS = {"backbone": "mcunet-in1", "image_size": 64, "epochs": 1}


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo(tmp_path_factory.mktemp("trained") / "part", n_train=12, n_good=3, n_defect=4, size=96)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo(tmp_path_factory.mktemp("trained") / "other", n_train=7, n_good=2, n_defect=2, size=96, seed=5)


@pytest.fixture(scope="module")
def of_several(part: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "several"
    build(Project(data=part, out=out, method="paste", target="stm32h743", tasks=2, **SETTINGS))  # type: ignore[arg-type]
    return out


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)


@pytest.mark.parametrize("method", TRAINED)
def test_every_engine_of_a_build_computes_the_same(method: str, part: Path, tmp_path: Path) -> None:
    built = build(Project(data=part, out=tmp_path / "b", method=method, target="stm32h743", **SETTINGS))[0]  # type: ignore[arg-type]
    model = load(built.folder)
    assert model.bank.header.kind == KINDS[method]
    result = verify(built.folder)
    assert result["ok"], result["problems"]
    assert {result["engines"][name]["status"] for name in ("litert", "tflm")} == {"equal"}
    training = json.loads((built.folder / "manifest.json").read_text())["training"]
    assert training["held_out"] == 2 and training["n_good"] == 12  # a fifth of twelve
    assert len(training["epochs"]) == 1 and np.isfinite(training["epochs"][0]["loss"])
    image = next((part / "test").rglob("*.png"))
    prediction = tinyvad.load(built.folder).predict(image)
    assert prediction.pred_score == pytest.approx(model.real(np.array(prediction.grid_map.max())))
    assert not list(tmp_path.glob(".*"))  # no checkpoint stays


def test_the_threshold_comes_from_images_that_were_not_trained_on() -> None:
    assert len(fitting_trained.held_out(4, 0.2, 0)) == 0
    for count in (5, 12, 209):
        held = fitting_trained.held_out(count, 0.2, 7)
        assert len(held) == round(0.2 * count) and len(np.unique(held)) == len(held)
        assert held.min() >= 0 and held.max() < count


def test_a_student_takes_fewer_epochs_of_many_images() -> None:
    student = Project(method="paste")
    assert fitting_trained.epochs_of(student, 48) == 100
    assert fitting_trained.epochs_of(student, 1600) == 20  # 4,000 steps of 8 images
    assert fitting_trained.epochs_of(student, 10**6) == 10
    assert fitting_trained.epochs_of(Project(method="paste", epochs=3), 48) == 3
    assert fitting_trained.epochs_of(Project(method="cfa"), 48) is None


def test_memory_is_planned_with_both_tails() -> None:
    backbone = open_backbone("mcunet-in1")
    outlined = fitting_trained.outlined(backbone, Project(method="paste")).graph_at(64)
    teacher = backbone.graph_at(64)
    assert len(outlined.outputs) == 6
    assert teacher.macs() < outlined.macs() < 2 * teacher.macs()
    assert fitting_trained.outlined(backbone, Project(method="padim")) is backbone


def test_a_killed_build_ends_with_the_same_bytes(part: Path, tmp_path: Path) -> None:
    flags = ["--data", str(part), "--method", "paste", "--backbone", "mcunet-in1", "--image-size", "64", "--epochs", "40"]
    command = [sys.executable, "-m", "tinyvad", "build", *flags, "--out", "b"]
    folders = [tmp_path / "once", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    subprocess.run(command, cwd=folders[0], check=True, capture_output=True)
    process = subprocess.Popen(command, cwd=folders[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folders[1].glob(".b.training-*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folders[1] / "b").exists() and list(folders[1].glob(".b.training-*.npz"))
    subprocess.run(command, cwd=folders[1], check=True, capture_output=True)
    assert hashes(folders[0]) == hashes(folders[1])


def test_a_second_product_is_learnt(part: Path, other: Path, of_several: Path, tmp_path: Path) -> None:
    before = load(of_several)
    assert before.task_names == ["part"]
    images = sorted((other / "train" / "good").iterdir())
    done = learn(of_several, "lid", images)
    assert (done.new_task, done.images, [task["images"] for task in done.tasks]) == (True, 7, [12, 7])
    after = load(of_several)
    assert after.task_names == ["part", "lid"]
    assert after.bank.header.backbone_crc32 != before.bank.header.backbone_crc32  # the student has changed
    graph, _, known = read_products(np.load(of_several / STATE), of_several / STATE)
    assert [product.name for product in known] == ["part", "lid"] and known[0].images == 12
    assert graph.outputs == open_backbone("mcunet-in1").graph_at(64).outputs
    assert verify(of_several)["ok"]
    prediction = after.predict(images[0])
    assert not isinstance(prediction, list) and prediction.task == "lid"
    again = learn(of_several, "lid", images)
    assert (again.images, again.known) == (0, 7)
    answer = run("learn", of_several, "--data", other, "--task", "third")
    assert answer.exit_code == 1 and "built for 2 products" in answer.stderr and answer.stderr.count("\n") == 1


def test_more_images_of_a_known_product(part: Path, other: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    images = sorted((part / "train" / "good").iterdir())
    for path in images[:6]:
        (few / path.name).symlink_to(path)
    out = tmp_path / "b"
    build(Project(data=few, out=out, method="paste", tasks=2, **SETTINGS))  # type: ignore[arg-type]
    done = learn(out, "few", images)
    assert (done.images, done.known, done.new_task) == (6, 6, False)
    model = load(out)
    assert model.task_names == ["few"] and model.bank.sections["TASK"][0, 2] == 12


def test_what_does_not_go_together_is_one_line(part: Path, other: Path, of_several: Path, tmp_path: Path) -> None:
    for flags, words in (
        (["--method", "padim", "--epochs", "3"], "--epochs belongs to"),
        (["--method", "stfpm", "--shared", "block1"], "--shared belongs to"),
        (["--method", "paste", "--grid", "4"], "--grid does not go with paste"),
        (["--method", "cfa", "--dimensions", "8"], "--dimensions belongs to padim-compact"),
        (["--method", "paste", "--backbone", "mcunet-in1", "--shared", "nothing"], "nothing"),
        (["--method", "paste", "--backbone", "mcunet-in1", "--tasks", "2", "--strategy", "luck"], "--strategy luck"),
    ):  # fmt: skip
        answer = run("build", "--data", part, "--image-size", "64", "--out", tmp_path / "no", *flags)
        assert answer.exit_code == 2 and words in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr
        assert not (tmp_path / "no").exists()
    for flags in (["--undo"], ["--forget", "part"], ["--data", str(other), "--task", "x", "--watch"]):
        answer = run("learn", of_several, *flags)
        assert answer.exit_code == 2 and "trained network" in answer.stderr and answer.stderr.count("\n") == 1
    single = tmp_path / "single"
    build(Project(data=part, out=single, method="paste", **SETTINGS))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="made for one product"):
        learn(single, "x", [])
    for method in TRAINED:
        with pytest.raises(CheckFailed, match=rf"bank of {method} .* KiB > 1 KiB: use --bank-bytes \d+K or more"):
            build(Project(data=part, out=tmp_path / "no", method=method, bank_bytes=1024, **SETTINGS))  # type: ignore[arg-type]


def test_nothing_of_a_user_is_lost_and_no_other_training_goes_on(part: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    board = tmp_path / "board.toml"
    board.write_text((Path(tinyvad.__file__).parents[1] / "firmware_sim" / "targets" / "stm32h743.toml").read_text())
    project = Project(data=part, out=out, method="paste", tasks=2, target=str(board), **SETTINGS)  # type: ignore[arg-type]
    build(project)
    (out / "notes.txt").write_text("mine")
    images = sorted((other / "train" / "good").iterdir())
    with pytest.raises(InputError, match=r"notes\.txt"):
        learn(out, "two", images)
    (out / "notes.txt").unlink()
    board.unlink()  # the build remembers its target
    learn(out, "two", images)
    assert load(out).task_names == ["part", "two"]
    with pytest.raises(InputError, match="has learnt since it was built"):
        build(replace(project, target="stm32h743"))
    state = dict(np.load(out / STATE))
    del state["stream/tasks"]
    np.savez(out / STATE, **state)
    with pytest.raises(InputError, match=r"training\.npz"):
        learn(out, "two", [*images, *(part / "train" / "good").iterdir()])
    names = {
        fitting_trained.checkpoint_name(out, project, open_backbone("mcunet-in1"), size, product)
        for size, product in ((64, "part"), (96, "part"), (64, "lid"))
    }
    assert len(names) == 3
