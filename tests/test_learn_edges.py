"""``tinyvad learn`` and ``build --tasks`` at their edges: single images, full disks, odd names, damaged files, budgets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from learnable import SIZE, copy, files, make_build, pictures, save

import tinyvad
from tinyvad import slots
from tinyvad.build import build as make
from tinyvad.cli import main
from tinyvad.continual import learn
from tinyvad.continual.learn import Learner, read_state
from tinyvad.continual.next_bank import HELD
from tinyvad.detectors.task_gaussians import Space, TaskStatistics, collect_task, scorer_of
from tinyvad.errors import CheckFailed, InputError
from tinyvad.fitting import BANK_OVERHEAD, TASK_OVERHEAD, plan_method
from tinyvad.graph.ir import Tensor
from tinyvad.project import Project

PADIM, CORE = "padim-compact", "patchcore"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("edges")


@pytest.fixture(scope="module")
def images(root) -> dict[str, np.ndarray]:
    return pictures(root)


@pytest.fixture(scope="module")
def builds(root, images) -> dict[str, Path]:
    return {method: make_build(root / method, root / "part", method) for method in (PADIM, CORE)}


@pytest.fixture
def build(builds, request, tmp_path) -> Path:
    return copy(builds[getattr(request, "param", PADIM)], tmp_path / "build")


def command(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code == 0 or result.stderr.count("\n") == 1
    return result.exit_code, result.stderr if result.exit_code else result.stdout


# --- thresholds


def embedded(model, images: np.ndarray) -> np.ndarray:
    return model.embedding.integer(model.taps(images))


def test_one_image_at_a_time_forgets_the_scores_of_the_first_narrow_gaussians(build, images):
    """Image i is scored by what its i predecessors gave; of 8 images those with 4 or more predecessors count."""
    learner = Learner(build)
    thresholds = [learner.learn("red", images["red"][i : i + 1]).threshold_raw for i in range(8)]
    model = tinyvad.load(build)
    space = Space.of(model.scorers.scorers[0], model.embedding.steps)
    e = embedded(model, images["red"])
    scorers = [scorer_of(space, collect_task(space, [e[:i]])) for i in range(1, 9)]
    held = [int(scorers[i - 1].score(e[i : i + 1]).max()) for i in range(1, 8)]  # of image i, by i images
    assert thresholds[-1] == max(*held[3:], int(scorers[-1].score(e[7:]).max())) + 1
    assert thresholds[-1] < thresholds[0] / 20
    state = read_state(build / model.bank.meta["tasks"][1]["state"])
    assert state[HELD].tolist() == [[i, held[i - 1]] for i in range(4, 8)]
    assert model.bank.meta["tasks"][1]["threshold_rule"] == "0.99 quantile of held-out good images"


def test_more_of_the_first_product_keeps_the_held_out_scores_of_the_build(build, images):
    before = tinyvad.load(build)
    held = read_state(build / "learn" / "int8-0.npz")[HELD]
    assert held[:, 0].tolist() == [7] * 8
    assert held[:, 1].max() < before.threshold
    new = images["part"][:1, :, ::-1]
    statistics = TaskStatistics.from_arrays(
        Space.of(before.scorers.scorers[0], before.embedding.steps), read_state(build / "learn" / "int8-0.npz")
    )
    blind = scorer_of(Space.of(before.scorers.scorers[0], before.embedding.steps), statistics)
    score = int(blind.score(embedded(before, new)).max())
    result = Learner(build).learn("part", new)
    after = int(tinyvad.load(build).scorers.scorers[0].score(embedded(before, new)).max())
    assert result.threshold_raw == max(int(held[:, 1].max()), score, after) + 1


def test_a_threshold_of_labelled_images_does_not_fall(root, images, tmp_path):
    folder = make_build(tmp_path / "f1", root / "part", PADIM, threshold="f1")
    assert HELD not in read_state(folder / "learn" / "int8-0.npz")
    before = tinyvad.load(folder).threshold
    assert Learner(folder).learn("part", images["part"][:3, :, ::-1]).threshold_raw >= before


# --- what fails on the way


@pytest.mark.parametrize("build", [PADIM, CORE], indirect=True)
@pytest.mark.parametrize("failing", [".bank.1.tvb.next", ".bank_onnx.1.tvb.next", "int8-1.npz"])
def test_a_full_disk_leaves_nothing_behind(build, images, monkeypatch, failing):
    def full(path: Path, data: bytes) -> None:
        if path.name == failing:
            raise InputError(f"cannot write {path}: No space left on device")
        path.write_bytes(data)

    before = files(build)
    monkeypatch.setattr(slots, "write_bytes", full)
    monkeypatch.setattr(learn, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        Learner(build).learn("red", images["red"][:2])
    assert files(build) == before


def test_a_generation_stays_if_only_the_firmwares_bank_fails(build, images, monkeypatch):
    write = learn.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.parent.name == "firmware":
            raise InputError(f"cannot write {path}: No space left on device")
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(learn, "write_bytes", full)
        with pytest.raises(InputError, match=r"^generation 1 is learnt, but cannot write .*firmware/bank\.tvb"):
            Learner(build).learn("red", images["red"][:2])
    assert tinyvad.load(build).task_names == ["part", "red"]
    Learner(build).learn("red", images["red"][:2])  # nothing new
    assert (build / "firmware" / "bank.tvb").read_bytes() == (build / "bank.1.tvb").read_bytes()


def test_a_damaged_state_is_one_line(build, images):
    learner = Learner(build)
    learner.learn("red", images["red"][:2])
    path = build / "learn" / "int8-1.npz"
    whole = dict(np.load(path))

    def replaced(**arrays: np.ndarray) -> None:
        with path.open("wb") as file:
            np.savez(file, **{**whole, **arrays})  # type: ignore[arg-type]

    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="can't be read"):
        learner.learn("red", images["red"][2:3])
    for arrays in ({"keys": np.array(["a"])}, {"keys": np.zeros((2, 2), np.uint64)}, {HELD: np.zeros(3)},
                   {HELD: np.full((1, 2), -1)}):  # fmt: skip
        replaced(**arrays)
        with pytest.raises(InputError, match=r"learning state of 'red': .* learn the product anew"):
            learner.learn("red", images["red"][2:3])
    replaced()
    assert learner.learn("red", images["red"][2:3]).images == 1


@pytest.mark.parametrize(("field", "value"), [
    ("quantile", "a"), ("quantile", 2.0), ("quantile", True), ("max_candidates", 0), ("max_candidates", "x"), ("seed", -1),
])  # fmt: skip
def test_an_edited_manifest_is_one_line(build, field, value):
    path = build / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings" if field == "quantile" else "method"] |= (
        {field: value} if field == "quantile" else {"settings": {field: value}}
    )
    path.write_text(json.dumps(manifest))
    code, line = command("learn", build, "--undo")
    assert (code, f"{field} is {value!r}, no number from" in line) == (2, True)


def test_without_the_float_bank_the_message_says_how_to_go_on(build, images, tmp_path):
    learner = Learner(build)
    learner.learn("red", images["red"][:2])
    (build / "bank_onnx.1.tvb").unlink()
    data = save(images["dark"][:2], tmp_path / "images")
    code, line = command("learn", build, "--data", data, "--task", "dark")
    assert (code, "remove backbone.onnx and bank_onnx*.tvb to learn" in line) == (2, True)
    for path in (build / "backbone.onnx", *build.glob("bank_onnx*.tvb")):
        path.unlink()
    assert command("learn", build, "--data", data, "--task", "dark")[0] == 0
    assert command("learn", build, "--undo")[0] == 0
    assert tinyvad.load(build).task_names == ["part", "red"]


# --- names


def test_a_product_that_has_its_name_from_a_folder_takes_more_images(root, images, tmp_path):
    name = " odd\n" + "x" * 80
    shutil.copytree(root / "part", tmp_path / name)
    folder = make_build(tmp_path / "build", tmp_path / name, CORE)
    learner = Learner(folder)
    assert learner.learn(name, images["red"][:1]).tasks == [{"name": name, "images": 9}]
    learner.learn("red", images["red"][:2])
    learner.forget(name)
    with pytest.raises(InputError, match="give 1 to 64 printable"):
        learner.learn(name, images["red"][:1])  # a new product now


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name of a file is text")
def test_a_folder_whose_name_is_no_text_is_refused(root, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    shutil.copytree(root / "part", folder)
    with pytest.raises(InputError, match=r"folder '\\udcff\\udcfe': its name is no text"):
        make(Project(data=folder, out=tmp_path / "build"))


# --- watch


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_a_watch_that_is_ended_says_what_it_has_done_and_skipped(build, images, tmp_path):
    data = tmp_path / "growing pains"
    data.mkdir()
    (data / "no image.png").write_bytes(b"?")
    arguments = ["learn", str(build), "--data", str(data), "--task", "red", "--watch", "--batch", "1", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "tinyvad", *arguments], **pipes) as process:  # type: ignore[call-overload]
        lines = [process.stderr.readline() for _ in range(2)]
        save(images["red"][:1], data)
        lines.append(process.stderr.readline())
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert lines[0].startswith(f"skipped {data / 'no image.png'}: ")
    assert lines[1] == "red: nothing new, 0 images were learnt before, 1 can't be read; generation 0\n"
    assert lines[2].startswith("red (new): 1 images learnt")
    assert json.loads(out)["images"] == 1


# --- budgets


def tensors() -> list[Tensor]:
    return [Tensor(f"t{c}", (1, cells, cells, c), "int8") for cells, c in ((24, 24), (12, 40), (6, 96))]


@pytest.mark.parametrize("method", ["padim-compact", "padim", "padim-lite", "patchcore", "patchcore-lite"])
@pytest.mark.parametrize("tasks", [1, 2, 15, 255])
def test_the_bytes_that_a_message_asks_for_are_enough(method, tasks):
    with pytest.raises(CheckFailed, match=r"> 3 KiB: use ") as error:
        plan_method(method, tensors(), 96, 20, 3 << 10, tasks=tasks)
    asked = int(re.search(r"--bank-bytes (\d+)K or more$", str(error.value))[1]) << 10  # type: ignore[index]
    plan = plan_method(method, tensors(), 96, 20, asked, tasks=tasks)
    assert plan.bank_bytes <= asked
    assert plan.rows == 0 or plan.rows >= tasks
    with pytest.raises(CheckFailed):
        plan_method(method, tensors(), 96, 20, asked - 1024, tasks=tasks)
    with pytest.raises(CheckFailed, match=r"a larger --target$") as error:
        plan_method(method, tensors(), 96, 20, 3 << 10, tasks=tasks, of_flash=True)
    assert ("fewer --tasks" in str(error.value), "--bank-bytes" in str(error.value)) == (tasks > 1, False)


def test_a_memory_bank_without_a_bound_has_room_for_more_than_the_first_product():
    one, two = (plan_method(CORE, tensors(), 96, 1, 1 << 20, tasks=tasks) for tasks in (1, 2))
    assert one.bank_bytes == BANK_OVERHEAD + 36 * 160
    assert two.rows > 2 * 36
    assert two.bank_bytes >= two.rows * 160


def test_the_slot_is_never_more_than_the_flash_leaves(root, tmp_path):
    """--bank-bytes is an upper bound: one beyond the flash is no error, with one product or with several."""
    project = Project(
        data=root / "part", image_size=SIZE, grid=4, method=PADIM, out=tmp_path / "build", tasks=2, bank_bytes=4 << 20,
        target="stm32f446", backbone="filter-bank",
    )  # fmt: skip
    report = make(project)[0].report
    slot = json.loads((tmp_path / "build" / "manifest.json").read_text())["learning"]["slot_bytes"]
    assert slot < 256 << 10
    assert report["budget"]["flash_used"] <= report["budget"]["flash_available"]


def test_as_many_products_as_planned_fit_whatever_their_names(root, images, tmp_path):
    longest = {"images": 10**6, "name": "\U0001f600" * 64, "state": f"learn/onnx-{2**32 - 1}.npz",
               "threshold_rule": "0.9999 quantile of held-out good images, the highest so far"}  # fmt: skip
    entry = len(json.dumps(longest, ensure_ascii=False).encode()) + 2
    assert entry + 16 + 4 <= TASK_OVERHEAD  # rows of TASK and THRS
    project = Project(data=root / "part", image_size=SIZE, method="padim-lite", out=tmp_path / "build", tasks=6,
                      bank_bytes=1024)  # fmt: skip
    with pytest.raises(CheckFailed) as error:
        make(project)
    asked = int(re.search(r"--bank-bytes (\d+)K", str(error.value))[1]) << 10  # type: ignore[index]
    make(replace(project, bank_bytes=asked))
    learner = Learner(tmp_path / "build")
    for number in range(1, 6):
        result = learner.learn(f"{number}" + "\U0001f600" * 63, images["red"][number : number + 1] // number)
        assert result.bank_bytes <= asked
