"""The learner is killed at every step of its writing, and at random: the build always loads, with the old or the new bank.

Run as a script, this file is the learner that is killed: ``points BUILD IMAGES FOLDER ACTION`` forks one for every step at
which it can be cut off and prints what was found; ``teach BUILD IMAGES`` learns until somebody kills it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learnable import copy, make_build, pictures

import tinyvad
from tinyvad import files, slots
from tinyvad.continual.learn import Learner
from tinyvad.verify import bank_self_test

SLOTS = [name for names in slots.SLOTS.values() for name in names]


def run(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            env=environment, **options)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path]:
    """A build of one product that has learnt a second one, and a file of images."""
    root = tmp_path_factory.mktemp("cut")
    images = pictures(root)
    build = make_build(root / "build", root / "part", "padim-compact")
    Learner(build).learn("red", images["red"])
    for path in [build / "report.html", *(build / "firmware").rglob("*.c"), *(build / "firmware").rglob("*.h")]:
        path.unlink()  # what many copies are quicker without
    np.savez(root / "images.npz", **images)
    return build, root / "images.npz"


@pytest.mark.parametrize("action", ["learn", "undo"])
def test_cut_off_at_every_step_of_writing(prepared, tmp_path, action):
    """Before and after every rename, sync and removal, and in the middle of every write."""
    with run("points", *prepared, tmp_path, action) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found = json.loads(out)
    assert found["lost"] == []
    assert found["old"] > 5
    assert found["new"] > 5
    assert found["finished"] > 0


def test_killed_at_random_while_learning(prepared, tmp_path):
    """What was told as done is never lost, and every kill leaves a build that loads and can go on."""
    build = copy(prepared[0], tmp_path / "build")
    rng = np.random.default_rng(0)
    last = 1
    for _ in range(4):
        with run("teach", build, prepared[1]) as process:
            told = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
            told = max([told, *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line[-1] == "\n")])
        assert told >= last
        for engine in ("int8", "onnx"):
            model = tinyvad.load(build, engine)
            assert model.bank.header.generation >= told
            assert bank_self_test(model) == "passed"
        last = told
    assert last > 2


def points(build: Path, images: Path, folder: Path, action: str) -> dict[str, Any]:
    """Kill a child at every step; what each left, by comparison with runs that nobody cut."""
    pictures_of = dict(np.load(images))
    features = _features_once(build, pictures_of)
    one, two = features["dark"], features["negative"]

    def act(target: Path) -> None:
        learner = _learner(build, target, {"dark": one, "negative": two})
        if action == "learn":
            learner.learn("dark", [])
        else:
            learner.undo()

    def go_on(target: Path) -> None:
        _learner(build, target, {"dark": one, "negative": two}).learn("negative", [])

    old, new, old_on, new_on = (copy(build, folder / name) for name in ("old", "new", "old_on", "new_on"))
    act(new)
    go_on(old_on)
    act(new_on)
    go_on(new_on)
    count, result = 0, {"old": 0, "new": 0, "finished": 0, "lost": []}
    while True:
        target = copy(build, folder / "target")
        if not _killed(lambda target=target: act(target), count):
            break
        state = _state(target)
        if state not in (_state(old), _state(new)):
            result["lost"].append([count, "neither the old nor the new bank"])
        was_new = state == _state(new)
        staged = (target / ".bank.tvb.next").exists()
        if staged or count % 4 == 0:
            go_on(target)
            after, finished = _state(target), (_state(new_on), _state(old_on))
        else:
            with slots.locked(target):
                slots.recover(target)
            after, finished = _state(target), (_state(new), _state(old))
        if after != finished[0] and (was_new or after != finished[1]):
            result["lost"].append([count, "the next learner went wrong"])
        if not was_new and after == finished[0]:  # cut off between the two renames
            result["finished"] += 1
            if not staged:
                result["lost"].append([count, "finished out of nothing"])
        hidden = sorted(path.name for path in (*target.glob(".*"), *(target / "learn").glob(".*")))
        if hidden:
            result["lost"].append([count, f"left {hidden}"])
        result["new" if was_new else "old"] += 1
        shutil.rmtree(target)
        count += 1
    return result


def _state(folder: Path) -> tuple[bytes, bytes]:
    """The current banks, read the way a model reads them."""
    return tuple(Path(slots.current(folder, features).name).read_bytes() for features in ("int8", "onnx"))  # type: ignore


def _features_once(build: Path, pictures_of: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the engines make of two products: a forked child must not use their threads."""
    learner = Learner(build)
    return {name: learner._features(pictures_of[name], "stop", set(), [], None, 0) for name in ("dark", "negative")}


_LEARNERS: dict[Path, Learner] = {}


def _learner(build: Path, target: Path, features: dict[str, Any]) -> Learner:
    """A learner of a copy of the build, with the features ready."""
    if build not in _LEARNERS:
        _LEARNERS[build] = Learner(build)
    learner = Learner(target, _LEARNERS[build].models)
    state: dict[str, str] = {}
    learn = learner.learn

    def taught(task: str, images: Any) -> Any:
        state["task"] = task
        return learn(task, images)

    learner.learn = taught  # type: ignore[method-assign]
    learner._features = lambda *_: features[state["task"]]  # type: ignore[method-assign]
    return learner


def _killed(action: Callable[[], None], step: int) -> bool:
    """Run in a child that kills itself at its n-th step of writing; False if it has fewer."""
    child = os.fork()
    if child == 0:
        _die_at(step)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _die_at(step: int) -> None:
    """Count every call that changes the disk: before it, after it, and in the middle of what is written."""
    left = [step]

    def tick() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tick()
            value = function(*arguments, **options)
            tick()
            return value

        return call

    fdopen = os.fdopen

    def opened(*arguments: Any) -> Any:
        file = fdopen(*arguments)
        write = file.write

        class Half:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: bytes) -> None:
                write(data[: len(data) // 2])
                file.flush()
                tick()
                write(data[len(data) // 2 :])

        return Half()

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    files.os.fdopen = opened  # type: ignore[attr-defined]


def teach(build: Path, images: Path) -> None:
    """Learn and undo for ever; tell every generation once it is done."""
    learner, pictures_of = Learner(build), dict(np.load(images))
    while True:
        for name in ("dark", "negative"):
            for i in range(0, 8, 4):
                print(learner.learn(name, pictures_of[name][i : i + 4]).generation, flush=True)
        for name in ("dark", "negative"):
            print(learner.forget(name).generation, flush=True)
            print(learner.undo().generation, flush=True)
            print(learner.forget(name).generation, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "points":
        print(json.dumps(points(*(Path(name) for name in sys.argv[2:5]), sys.argv[5])))
    else:
        teach(Path(sys.argv[2]), Path(sys.argv[3]))
