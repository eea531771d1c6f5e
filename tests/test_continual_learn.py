"""``tinyvad learn``: what a build has learnt is what its images say, within its bytes, and nothing else changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from learnable import METHODS, copy, files, make_build, pictures, save

import tinyvad
from tinyvad import slots
from tinyvad.bank import open_bank
from tinyvad.continual.learn import Learner, image_key
from tinyvad.continual.next_memory import even
from tinyvad.continual.watch import images_to_learn, watch
from tinyvad.detectors.patchcore import PatchCoreLite
from tinyvad.errors import CheckFailed, InputError
from tinyvad.inspection import inspect
from tinyvad.verify import bank_self_test, changed_files

PADIM, CORE, LITE = METHODS


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("learn")


@pytest.fixture(scope="module")
def images(root) -> dict[str, np.ndarray]:
    return pictures(root)


@pytest.fixture(scope="module")
def builds(root, images) -> dict[str, Path]:
    return {method: make_build(root / method, root / "part", method) for method in METHODS}


@pytest.fixture
def build(builds, request, tmp_path) -> Path:
    return copy(builds[getattr(request, "param", PADIM)], tmp_path / "build")


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyvad", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


def current(folder: Path, features: str = "int8"):
    return slots.current(folder, features)


def embeddings(model, images: np.ndarray) -> np.ndarray:
    return model.embedding.integer(model.taps(images))


def rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves away from zero."""
    return (np.sign(values) * np.floor(np.abs(values) + 0.5)).astype(np.int64)


@pytest.mark.parametrize("build", METHODS, indirect=True)
def test_a_new_product_is_added_and_told_from_the_old_one(build, images):
    before = tinyvad.load(build)
    old_maps = before.grid_maps(images["part"], "part")[0]
    result = Learner(build).learn("red", images["red"])
    assert (result.new_task, result.images, result.known, result.generation) == (True, 8, 0, 1)
    assert result.tasks == [{"name": "part", "images": 8}, {"name": "red", "images": 8}]
    model = tinyvad.load(build)
    assert model.task_names == ["part", "red"]
    for name in ("part", "red"):
        assert {p.task for p in model.predict(list(images[name]))} == {name}
        assert sum(p.pred_label for p in model.predict(list(images[name]))) == 0
    if before.bank.header.kind == "PADC":
        assert np.array_equal(model.grid_maps(images["part"], "part")[0], old_maps)
        assert model.scorers.thresholds[0] == before.scorers.thresholds[0]
    assert bank_self_test(model) == "passed"
    assert changed_files(build, model.manifest) == []
    assert tinyvad.load(build, "onnx").task_names == ["part", "red"]
    assert (build / "firmware" / "bank.tvb").read_bytes() == (build / "bank.1.tvb").read_bytes()


def test_a_products_numbers_are_those_of_its_images(build, images):
    """Mean, prototype and leave-one-out threshold worked out anew from all embeddings at once."""
    Learner(build).learn("red", images["red"])
    model = tinyvad.load(build)
    e = embeddings(model, images["red"])  # (8, 4, 4, D)
    channels = model.embedding.taps[-1].channels
    signature = e[..., -channels:].astype(np.int64).sum((1, 2))
    assert np.array_equal(model.scorers.prototypes[1], rounded(signature.mean(0)))
    y = model.scorers.scorers[1].projection.apply(e)
    assert np.array_equal(model.scorers.scorers[1].mean, np.clip(rounded(y.astype(np.float64).mean(0)), -127, 127))

    from tinyvad.detectors.task_gaussians import Space, collect_task, scorer_of

    space = Space.of(model.scorers.scorers[0], model.embedding.steps)
    held = [
        int(scorer_of(space, collect_task(space, [np.delete(e, i, 0)])).score(e[i : i + 1]).max()) for i in range(len(e))
    ]
    seen = int(model.scorers.scorers[1].score(e).max())
    assert model.scorers.thresholds[1] == max(*held, seen) + 1


@pytest.mark.parametrize("build", [CORE, LITE], indirect=True)
def test_memory_banks_share_their_rows(build, images):
    learner = Learner(build)
    first = tinyvad.load(build)
    total = int(first.bank.sections["LRN "][2])
    before = first.scorers.scorers
    names = ["part"]
    for name in ("red", "dark", "negative"):
        result = learner.learn(name, images[name][:4])
        names.append(name)
        model = tinyvad.load(build)
        share = total // len(names)
        sizes = model.bank.sections["TASK"][:, 1]
        assert (sizes <= share).all()
        assert ("->" in result.gives_way) == (max(len(_rows(scorer)) for scorer in before) > share)
        for t, old in enumerate(before):
            assert np.array_equal(_rows(model.scorers.scorers[t]), _rows(old)[:share])
        new = {row.tobytes() for row in embeddings(model, images[name]).reshape(-1, model.embedding.depth)}
        if model.bank.header.kind == "CORE":
            assert all(row.tobytes() in new for row in _rows(model.scorers.scorers[-1]))
        for t, steps in enumerate(model.bank.sections["LADR"]):
            fit = [int(limit) for rows, limit in steps if rows <= sizes[t]] or [int(steps[-1, 1])]
            assert model.scorers.thresholds[t] >= fit[0]
        before = model.scorers.scorers
    assert model.bank.nbytes <= model.manifest["learning"]["slot_bytes"]


def _rows(scorer) -> np.ndarray:
    return scorer.bank if hasattr(scorer, "bank") else scorer.codes


@pytest.mark.parametrize("build", METHODS, indirect=True)
def test_more_images_of_an_old_product(build, images):
    learner = Learner(build)
    learner.learn("red", images["red"][:5])
    middle = tinyvad.load(build)
    result = learner.learn("red", images["red"])
    assert (result.new_task, result.images, result.known) == (False, 3, 5)
    model = tinyvad.load(build)
    assert model.bank.sections["TASK"][1, 2] == 8
    assert model.scorers.thresholds[1] >= middle.scorers.thresholds[1]
    again = learner.learn("red", images["red"])
    assert (again.images, again.known, again.generation) == (0, 8, 2)
    if model.bank.header.kind == "PADC":  # merged in two parts or learnt at once: the same Gaussians
        other = copy(build, build.parent / "at-once")
        Learner(other).forget("red")
        Learner(other).learn("red", images["red"])
        at_once = tinyvad.load(other)
        for tag in ("MEAN", "SCAL", "TABL", "CHOL", "PROT", "TASK"):
            assert np.array_equal(at_once.bank.sections[tag], model.bank.sections[tag]), tag


def test_the_first_product_takes_more_images_too(build, images):
    more = images["part"][:, :, ::-1]
    result = Learner(build).learn("part", [*images["part"], *more])
    assert (result.known, result.images) == (8, 8)
    model = tinyvad.load(build)
    y = model.scorers.scorers[0].projection.apply(embeddings(model, np.concatenate([images["part"], more])))
    assert np.array_equal(model.scorers.scorers[0].mean, np.clip(rounded(y.astype(np.float64).mean(0)), -127, 127))


def test_an_old_product_without_its_state_says_so(build, images):
    learner = Learner(build)
    learner.learn("red", images["red"][:4])
    shutil.rmtree(build / "learn")
    before = files(build)
    with pytest.raises(InputError, match=r"learn/int8-1\.npz: .*under another name and forget this one"):
        learner.learn("red", images["red"][4:])
    assert files(build) == before
    learner.learn("dark", images["dark"])  # adding products needs no state


@pytest.mark.parametrize("build", METHODS, indirect=True)
def test_one_image_gets_its_threshold_from_shifted_copies(build, images):
    result = Learner(build).learn("red", images["red"][:1])
    model = tinyvad.load(build)
    assert result.tasks[1] == {"name": "red", "images": 1}
    assert "shifted copies" in model.bank.meta["tasks"][1]["threshold_rule"]
    wide = np.pad(images["red"][0], ((2, 2), (2, 2), (0, 0)), mode="edge")
    moved = [(wide[y : y + 64, x : x + 64].astype(int) * 103 + 50) // 100 for y in (0, 4) for x in (0, 2)]
    found = model.predict([np.clip(image, 0, 255).astype(np.uint8) for image in moved], "red")
    assert sum(p.pred_label for p in found) == 0
    Learner(build).learn("red", images["red"][1:2])
    assert tinyvad.load(build).bank.sections["TASK"][1, 2] == 2


@pytest.mark.parametrize("method", [PADIM, LITE])
def test_a_pause_between_processes_changes_no_byte(method, builds, images, tmp_path):
    """The last of several products in a process of its own equals all in one; without the old images and states."""
    names = ["red", "dark", "negative", "turned", "green"][: 5 if method == PADIM else 3]
    count = len(images["red"]) if method == PADIM else 3  # codebooks take their time
    folders = [copy(builds[method], tmp_path / name) for name in ("paused", "at-once")]
    learners = [Learner(folder) for folder in folders]
    for name in names[:-1]:
        for learner in learners:
            learner.learn(name, images[name][:count])
    for path in (folders[0] / "learn").glob("*.npz"):
        path.unlink()
    data = save(images[names[-1]][:count], tmp_path / "images")
    result = cli("learn", folders[0], "--data", data, "--task", names[-1], "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["generation"] == len(names)
    learners[1].learn(names[-1], images[names[-1]][:count])
    paused, at_once = (files(folder) for folder in folders)
    for name in ("bank.tvb", "bank.1.tvb", "bank_onnx.tvb", "bank_onnx.1.tvb", "firmware/bank.tvb",
                 f"learn/int8-{len(names)}.npz"):  # fmt: skip
        assert paused[name] == at_once[name], name


def test_a_full_bank_says_what_to_do_and_changes_nothing(build, images):
    Learner(build).learn("red", images["red"])
    _set_slot(build, current(build).nbytes)
    learner = Learner(build)
    before = files(build)
    with pytest.raises(CheckFailed, match=r"bank of 3 products [\d,]+ B > [\d,]+ B.*--forget.*--tasks 3") as error:
        learner.learn("dark", iter(()))  # told before an image is looked at
    assert "\n" not in str(error.value)
    assert files(build) == before
    learner.forget("red")
    assert learner.learn("sky", images["dark"]).bank_bytes <= learner.slot_bytes
    assert tinyvad.load(build).task_names == ["part", "sky"]


def _set_slot(build: Path, limit: int) -> None:
    manifest = json.loads((build / "manifest.json").read_text())
    manifest["learning"]["slot_bytes"] = limit
    (build / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("build", [LITE], indirect=True)
def test_a_new_product_has_the_codebooks_of_a_bank_of_its_own(build, images):
    """Codebooks, channel order, codes and scores are those of the product alone, the first product's stay as they were."""
    before = tinyvad.load(build)
    settings = before.manifest["method"]["settings"]
    share = int(before.bank.sections["LRN "][2]) // 2
    assert (settings["bits"], before.bank.sections["CBK "].shape[1]) == (4, 16)  # eight products' 8-bit ones: no room
    Learner(build).learn("red", images["red"])
    model = tinyvad.load(build)
    e = embeddings(model, images["red"])
    alone = PatchCoreLite(**{**settings, "bank_size": share}, step=model.scorers.scorers[0].unit).fit([e]).to_scorer()
    first, second = model.scorers.scorers
    for mine, other in ((second, alone), (first, before.scorers.scorers[0])):
        assert np.array_equal(mine.quantizer.codebooks, other.quantizer.codebooks)
        assert np.array_equal(mine.quantizer.indices, other.quantizer.indices)
        assert np.array_equal(mine.codes, other.codes[:share])
    assert not np.array_equal(first.quantizer.codebooks, second.quantizer.codebooks)
    probe = embeddings(model, images["red"][:, ::-1] // 2)
    assert np.array_equal(second.score(probe), alone.score(probe))
    assert second.scratch_bytes() == before.scorers.scorers[0].scratch_bytes()  # RAM is as it was planned


@pytest.mark.parametrize("build", [LITE], indirect=True)
def test_a_slot_without_room_for_more_codebooks_says_so(build, images):
    _set_slot(build, current(build).nbytes)
    learner = Learner(build)
    for name in ("red", "dark", "negative", "turned", "green"):
        before = files(build)
        try:
            result = learner.learn(name, images[name][:2])
        except CheckFailed as error:
            assert re.match(r"bank of \d products [\d,]+ B > [\d,]+ B of its slot: make room with .*--forget", str(error))
            assert files(build) == before
            break
        assert result.bank_bytes <= learner.slot_bytes
    else:
        raise AssertionError("five products' codebooks fitted")
    assert name not in ("red", "green")  # one fits, not all do
    model = tinyvad.load(build)
    assert bank_self_test(model) == "passed"
    assert model.task_names[:2] == ["part", "red"]
    assert {p.task for p in model.predict(list(images["red"][:2]))} == {"red"}


def test_an_even_share_is_the_largest():
    for rows, most in (([10, 2, 7], 15), ([5, 5, 5], 14), ([3, 9], 100), ([4], 3), ([4, 4], 1), ([9, 1, 1], -5)):
        fitting = [share for share in range(max(rows) + 1) if sum(min(one, share) for one in rows) <= most]
        assert even(rows, most) == max(fitting, default=0)


@pytest.mark.parametrize("build", [CORE, LITE], indirect=True)
def test_a_memory_bank_keeps_within_its_slot_to_the_byte(build, images):
    """A slot with hardly more room than the bank and the new products' codebooks have: rows give way, by what is needed."""
    sections = current(build).sections
    books = sections["CBK "].nbytes + sections["INDX"].nbytes if "CBK " in sections else 0
    limit = current(build).nbytes + 2 * books + 700
    _set_slot(build, limit)
    learner = Learner(build)
    for name in ("red", "dark"):
        result = learner.learn(name, images[name])
        assert result.bank_bytes <= limit
        assert "rows a product" in result.gives_way
        row = current(build).sections["BANK" if current(build).header.kind == "CORE" else "CODE"][0].nbytes
        assert result.bank_bytes > limit - 2 * len(result.tasks) * row - 64
        assert bank_self_test(tinyvad.load(build)) == "passed"


def test_forget_and_undo(build, images):
    learner = Learner(build)
    learner.learn("red", images["red"])
    learner.learn("dark", images["dark"])
    two = open_bank(build / "bank.tvb").sections
    result = learner.forget("red")
    assert result.tasks == [{"name": "part", "images": 8}, {"name": "dark", "images": 8}]
    model = tinyvad.load(build)
    assert bank_self_test(model) == "passed"
    assert np.array_equal(model.bank.sections["MEAN"], np.delete(two["MEAN"], slice(4, 8), 0))
    assert {p.task for p in model.predict(list(images["dark"]))} == {"dark"}
    assert learner.undo().tasks == [{"name": name, "images": 8} for name in ("part", "red", "dark")]
    assert current(build).header.generation == 4
    assert tinyvad.load(build, "onnx").task_names == ["part", "red", "dark"]
    more = learner.learn("red", images["red"][:, ::-1])  # its state is still there
    assert more.tasks[1] == {"name": "red", "images": 16}
    for wrong, words in (("green", "no product 'green'"), ("", "no product ''")):
        with pytest.raises(InputError, match=words):
            learner.forget(wrong)
    learner.forget("red")
    learner.forget("part")
    with pytest.raises(InputError, match="only product"):
        learner.forget("dark")


def test_states_that_no_bank_names_are_removed(build, images):
    learner = Learner(build)
    for end in (2, 4, 6, 8):
        learner.learn("red", images["red"][:end])
    names = sorted(path.name for path in (build / "learn").glob("*.npz"))
    assert names == ["int8-0.npz", "int8-3.npz", "int8-4.npz", "onnx-0.npz", "onnx-3.npz", "onnx-4.npz"]


def test_the_firmwares_bank_is_brought_up_to_date(build, images):
    learner = Learner(build)
    learner.learn("red", images["red"])
    (build / "firmware" / "bank.tvb").write_bytes(b"cut off here")
    learner.learn("red", images["red"])  # nothing new
    assert (build / "firmware" / "bank.tvb").read_bytes() == (build / "bank.1.tvb").read_bytes()


@pytest.mark.parametrize("name", ["", "x" * 65, "a/b", "a\\b", " a", "a\n", "\x00", "tab\tbed"])
def test_names_are_plain(builds, name):
    with pytest.raises(InputError, match="give 1 to 64 printable characters") as error:
        Learner(builds[PADIM]).learn(name, [])
    assert "\n" not in str(error.value)


def test_unreadable_images(build, images, tmp_path):
    data = save(images["red"], tmp_path / "images")
    (data / "broken.png").write_bytes(b"no picture")
    before = files(build)
    learner = Learner(build)
    paths = images_to_learn(data, "red")
    with pytest.raises(InputError, match=r"broken\.png is not .* \(or leave .* --on-error skip\)"):
        learner.learn("red", paths)
    for nothing, reason in (([], "give at least one"), ([data / "broken.png"], "the first of 1 unreadable ones")):
        with pytest.raises(InputError, match=f"no images to learn; {reason}"):
            learner.learn("red", nothing, on_error="skip")
    with pytest.raises(InputError, match="on_error is 'maybe'"):
        learner.learn("red", paths, on_error="maybe")
    assert files(build) == before
    result = learner.learn("red", paths, on_error="skip")
    assert (result.images, [Path(path).name for path, _ in result.skipped]) == (8, ["broken.png"])


def test_the_same_image_twice_counts_once(build, images):
    result = Learner(build).learn("red", [*images["red"], *images["red"]])
    assert (result.images, result.known) == (8, 8)
    assert len({image_key(image) for image in images["red"]}) == 8


@pytest.mark.parametrize("arguments", [
    ("--task", "x"), ("--data", "part"), ("--undo", "--forget", "x"), ("--data", "part", "--task", "x", "--undo"), (),
    ("--data", "part", "--task", "x", "--batch", "3"), ("--undo", "--watch"), ("--data", "nowhere", "--task", "x"),
    ("--data", "part", "--task", "a/b"), ("--undo",), ("--forget", "x"), ("--data", "empty", "--task", "x"),
])  # fmt: skip
def test_wrong_use_is_one_line_and_exit_code_2(builds, root, arguments, monkeypatch):
    from click.testing import CliRunner

    from tinyvad.cli import main

    monkeypatch.chdir(root)
    (root / "empty").mkdir(exist_ok=True)
    before = files(builds[PADIM])
    result = CliRunner().invoke(main, ["learn", str(builds[PADIM]), *arguments])
    assert result.exit_code == 2
    assert result.output.startswith("tinyvad: ")
    assert result.output.count("\n") == 1
    assert files(builds[PADIM]) == before


def test_the_verb(build, root, images, tmp_path):
    both = tmp_path / "both"
    for name in ("red", "dark"):
        save(images[name], both / name / "good")
    with pytest.raises(InputError, match="dark, red, none called 'blue'"):
        images_to_learn(both, "blue")
    done = cli("learn", build, "--data", both, "--task", "red")
    assert done.returncode == 0, done.stderr
    assert "red (new): 8 images learnt" in done.stdout
    value, text = inspect(build)
    assert [task["name"] for task in value["products"]] == ["part", "red"]
    assert [slot["generation"] for slot in value["slots"]["int8"]] == [0, 1]
    assert [slot["current"] for slot in value["slots"]["onnx"]] == [False, True]
    assert sum(task["bytes"] for task in value["products"]) < value["bank_bytes"] <= value["learning"]["slot_bytes"]
    assert "bank.1.tvb: generation 1" in text
    (build / "bank.tvb").write_bytes(b"torn")
    value, text = inspect(build)
    assert [slot["valid"] for slot in value["slots"]["int8"]] == [False, True]
    assert "bank.tvb" in changed_files(build, json.loads((build / "manifest.json").read_text()))
    with pytest.raises(InputError, match=r"bank\.tvb: there is no bank to go back to"):
        Learner(build).undo()


def test_inspect_a_bank(build, images):
    Learner(build).learn("red", images["red"])
    value, text = inspect(build / "bank.1.tvb")
    first, second = value["tasks"]
    assert (second["name"], second["images"], second["rows"], second["first_row"]) == ("red", 8, 4, 4)
    sections = open_bank(build / "bank.1.tvb").sections
    own = sum(sections[tag].nbytes for tag in ("MEAN", "SCAL", "TABL", "CHOL", "TASK", "PROT", "THRS"))
    assert first["bytes"] + second["bytes"] == own
    assert "red" in text.splitlines()[-1]


@pytest.mark.parametrize("build", [CORE, LITE], indirect=True)
def test_inspect_a_memory_bank(build, images):
    Learner(build).learn("red", images["red"][:2])
    value, _ = inspect(build / "bank.1.tvb")
    sections = open_bank(build / "bank.1.tvb").sections
    own = sum(sections[tag].nbytes for tag in ("BANK", "CODE", "INDX", "CBK ", "TASK", "PROT", "THRS", "LADR")
              if tag in sections)  # fmt: skip
    first, second = value["tasks"]
    assert first["bytes"] + second["bytes"] == own
    assert first["rows"] + second["rows"] == sections["CFG "][0]


def test_model_learn_updates_disk_and_memory(build, images, tmp_path):
    model, float_model, bystander = tinyvad.load(build), tinyvad.load(build, "onnx"), tinyvad.load(build)
    data = save(images["red"][:4], tmp_path / "images")
    result = model.learn("red", [*sorted(data.iterdir()), *images["red"][4:]])
    assert (result.images, model.task_names) == (8, ["part", "red"])
    assert bystander.task_names == ["part"]
    assert bystander.refresh()
    assert not bystander.refresh()
    assert np.array_equal(bystander.grid_maps(images["red"])[0], model.grid_maps(images["red"])[0])
    float_model.learn("dark", images["dark"])
    assert float_model.task_names == tinyvad.load(build).task_names == ["part", "red", "dark"]


def test_watch_learns_what_appears(build, images, tmp_path):
    """Images come one after another, one of them in two writes; a part of a batch is learnt when it grows quiet."""
    data = tmp_path / "growing"
    data.mkdir()
    learner, told = Learner(build), []
    stop = threading.Event()
    found: list = []

    def run() -> None:
        found.append(watch(learner, data, "red", 3, log=told.append, poll=0.02, quiet=0.3, stop=stop.is_set))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        time.sleep(0.1)
        save(images["red"][:3], data)
        _wait(lambda: len(told) == 1)
        save(images["red"][3:5], data, 3)
        (data / "broken.png").write_bytes(b"")
        _wait(lambda: told[-1].images == 5)
    finally:
        stop.set()
        thread.join()
    last = found[0]
    assert (last.images, last.new_task) == (5, True)
    assert last.tasks[1] == {"name": "red", "images": 5}
    assert [Path(path).name for path, _ in last.skipped] == ["broken.png"]
    assert [result.generation for result in told if result.images] == sorted({one.generation for one in told})


def _wait(until) -> None:
    end = time.monotonic() + 30
    while not until():
        assert time.monotonic() < end, "nothing happened for 30 s"
        time.sleep(0.02)


def test_watch_ends_cleanly_on_ctrl_c(build, images, tmp_path):
    import signal

    data = save(images["red"][:4], tmp_path / "growing")
    command = [sys.executable, "-m", "tinyvad", "learn", str(build), "--data", str(data), "--task", "red", "--watch",
               "--batch", "4", "--json"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert line.startswith("red (new): 4 images learnt")
    assert json.loads(out)["images"] == 4
    assert tinyvad.load(build).task_names == ["part", "red"]


def test_predicting_beside_a_learner_sees_old_or_new_whole(build, images):
    """Two processes: one learns generation after generation, one loads and predicts as fast as it can."""
    code = (
        "import sys, tinyvad\nfrom pathlib import Path\nfrom tinyvad.verify import bank_self_test\n"
        "folder, engine = sys.argv[1:]; last = looks = 0\n"
        "model = tinyvad.load(folder, engine); print('ready', flush=True)\n"
        "import numpy as np; image = np.full((64, 64, 3), 90, np.uint8)\n"
        "while not Path(folder, 'stop').exists():\n"
        "    model.refresh() if looks % 2 else (model := tinyvad.load(folder, engine))\n"
        "    generation = model.bank.header.generation; looks += 1\n"
        "    assert generation >= last and bank_self_test(model) == 'passed'\n"
        "    model.predict(image); last = generation\n"
        "print(looks, last)"
    )
    readers = [
        subprocess.Popen([sys.executable, "-c", code, str(build), engine], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for engine in ("int8", "onnx")
    ]  # fmt: skip
    try:
        assert [reader.stdout.readline() for reader in readers] == ["ready\n"] * 2
        learner = Learner(build)
        for i in range(2):
            for name in ("red", "dark"):
                learner.learn(name, images[name][4 * i : 4 * i + 4])
            learner.undo()
            learner.undo()
    finally:
        (build / "stop").touch()
        ends = [reader.communicate(timeout=60) for reader in readers]
    for out, errors in ends:
        assert not errors, errors
        looks, last = map(int, out.split())
        assert looks > 2
        assert last > 0
