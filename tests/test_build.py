"""The main job end to end on a small rendered part: what a build holds, that it repeats, and that damage is noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import tinyvad
from tinyvad.bank import open_bank
from tinyvad.build import build
from tinyvad.demo import render_demo
from tinyvad.errors import CheckFailed, InputError
from tinyvad.project import Project
from tinyvad.verify import verify


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    return render_demo(tmp_path_factory.mktemp("data") / "part", n_train=12, n_good=6, n_defect=8, size=128)


@pytest.fixture(scope="module")
def folder(part, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "build"
    build(Project(data=part, target="cortex-m7", image_size=96, out=out))
    return out


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyvad", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_a_build_holds_what_it_says(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"backbone.tflite", "backbone.onnx", "bank.tvb", "bank_onnx.tvb", "report.html", "report.json"} <= names
    assert names == {*manifest["files"], "manifest.json"}
    bank = open_bank(folder / "bank.tvb")
    assert bank.header.backbone_crc32 == zlib.crc32((folder / "backbone.tflite").read_bytes())
    report = json.loads((folder / "report.json").read_text())
    assert report["verification"]["ok"]
    header = (folder / "firmware" / "model.h").read_text()
    assert int(re.search(r"TVAD_ARENA_BYTES (\d+)", header)[1]) == report["memory"]["head_bytes"]
    assert report["budget"]["fits"]
    assert report["budget"]["alias"] == "cortex-m7"


def test_reported_auroc_is_that_of_the_scores(folder):
    report = json.loads((folder / "report.json").read_text())
    rows = report["scores"]["test"]
    assert len(rows) == 14
    expected = roc_auc_score([row["label"] for row in rows], [row["pred_score"] for row in rows])
    assert report["metrics"]["image_AUROC"] == pytest.approx(expected, abs=1e-12)


def test_threshold_comes_from_good_images_alone(part, folder, tmp_path):
    """Without the test folder the build's files are the same, byte for byte."""
    shutil.copytree(part / "train", tmp_path / "part" / "train")
    build(Project(data=tmp_path / "part", target="cortex-m7", image_size=96, out=tmp_path / "build"))
    for name in ("bank.tvb", "bank_onnx.tvb", "backbone.tflite"):
        assert (tmp_path / "build" / name).read_bytes() == (folder / name).read_bytes(), name


def test_two_builds_are_equal_with_other_thread_counts(part, folder, tmp_path):
    result = cli("build", "--data", part, "--target", "cortex-m7", "--image-size", "96", "--out", tmp_path / "b",
                 OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1")  # fmt: skip
    assert result.returncode == 0, result.stderr
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / "b" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("method", ["padim", "padim-lite", "patchcore", "patchcore-lite"])
def test_every_method_builds_verifies_and_finds_defects(part, tmp_path, method):
    built = build(Project(data=part, target="stm32h743", image_size=96, method=method, out=tmp_path / "b"))[0]
    assert built.report["verification"]["ok"]
    assert built.report["metrics"]["image_AUROC"] > 0.6
    assert verify(tmp_path / "b")["bank_self_test"] == "passed"


def test_python_api(part, folder):
    model = tinyvad.load(folder)
    defect = next((part / "test").glob("[!g]*/*.png"))
    one = model.predict(defect)
    assert one.image_path == defect
    assert one.anomaly_map.shape == one.pred_mask.shape == (96, 96)
    assert one.pred_label == int(one.raw_score >= model.threshold) == int(one.pred_score >= model.threshold_score)
    image = np.asarray(Image.open(defect).convert("RGB"))
    both = model.predict([image, image])
    assert [p.raw_score for p in both] == [one.raw_score] * 2
    assert model.predict(image).raw_score == one.raw_score


def test_scores_do_not_depend_on_the_batch(part, folder):
    model = tinyvad.load(folder)
    paths = sorted((part / "test").glob("*/*.png"))
    together = [p.raw_score for p in model.predict(paths)]
    assert together == [model.predict(path).raw_score for path in paths]


def test_onnx_engine_agrees_within_its_tolerance(part, folder):
    exact, real = tinyvad.load(folder), tinyvad.load(folder, "onnx")
    paths = sorted((part / "test").glob("*/*.png"))
    a = np.array([p.pred_score for p in exact.predict(paths)])
    b = np.array([p.pred_score for p in real.predict(paths)])
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_every_flipped_byte_of_a_bank_is_noticed(folder, tmp_path):
    broken = tmp_path / "b"
    shutil.copytree(folder, broken)
    data = bytearray((folder / "bank.tvb").read_bytes())
    for position in np.linspace(0, len(data) - 1, 60).astype(int):
        changed = bytearray(data)
        changed[position] ^= 0x10
        (broken / "bank.tvb").write_bytes(changed)
        with pytest.raises((InputError, CheckFailed)):
            tinyvad.load(broken)


def test_a_bank_of_another_backbone_is_refused(part, folder, tmp_path):
    other = tmp_path / "b"
    shutil.copytree(folder, other)
    data = bytearray((other / "backbone.tflite").read_bytes())
    data[-1] ^= 1
    (other / "backbone.tflite").write_bytes(data)
    result = cli("eval", other, "--data", part)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "fitted on backbone" in result.stderr


def test_verify_names_a_changed_file(folder, tmp_path):
    other = tmp_path / "b"
    shutil.copytree(folder, other)
    (other / "samples" / "00.png").write_bytes((other / "samples" / "01.png").read_bytes())
    result = cli("verify", other)
    assert result.returncode == 1
    assert "samples/00.png was changed" in result.stdout


def test_f1_threshold_is_the_best_on_the_labelled_images(part, tmp_path):
    built = build(Project(data=part, target="cortex-m7", image_size=96, threshold="f1", out=tmp_path / "b"))[0]
    rows = built.report["scores"]["test"]
    assert built.report["thresholds"]["rule"] == "best F1 on the labelled test images"

    def f1(threshold: float) -> float:
        hits = sum(r["label"] for r in rows if r["pred_score"] >= threshold)
        return 2 * hits / (sum(r["pred_score"] >= threshold for r in rows) + sum(r["label"] for r in rows))

    best = max(f1(row["pred_score"]) for row in rows)
    assert f1(built.report["thresholds"]["score"]) == pytest.approx(best)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_images_give_a_build_with_a_usable_threshold(part, tmp_path, count):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((part / "train" / "good").iterdir())[:count]:
        shutil.copy(path, few)
    build(Project(data=few, target="cortex-m7", image_size=96, out=tmp_path / "b"))
    model = tinyvad.load(tmp_path / "b")
    assert model.predict(next(few.iterdir())).pred_label == 0
    black = np.zeros((50, 70, 3), np.uint8)
    assert model.predict(black).pred_label == 1


def test_odd_images_go_through(part, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    image = Image.open(next((part / "train" / "good").iterdir())).convert("RGB")
    image.convert("L").resize((101, 77)).save(odd / "grey.png")
    image.convert("RGBA").resize((640, 33)).save(odd / "rgba.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(odd / "sixteen.png")
    image.resize((1, 1)).save(odd / "one.png")
    exif = image.getexif()
    exif[274] = 6
    image.save(odd / "rotated.jpg", exif=exif)
    image.convert("P").save(odd / "palette.bmp")
    image.save(odd / "webp.webp")
    build(Project(data=odd, target="cortex-m7", image_size=64, out=tmp_path / "b"))
    assert len(tinyvad.load(tmp_path / "b").predict(sorted(odd.iterdir()))) == 7


def test_a_tree_of_categories_gives_a_build_each(part, tmp_path):
    tree = tmp_path / "tree"
    for name in ("bolt", "nut"):
        shutil.copytree(part / "train", tree / name / "train")
    built = build(Project(data=tree, target="cortex-m7", image_size=64, out=tmp_path / "out"))
    assert [b.folder.name for b in built] == ["bolt", "nut"]
    assert (tmp_path / "out" / "nut" / "bank.tvb").exists()


def test_over_budget_names_region_number_limit_and_a_remedy_that_works(part, tmp_path):
    out = tmp_path / "b"
    result = cli("build", "--data", part, "--target", "rp2040", "--image-size", "480", "--out", out)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert not out.exists()
    assert "SRAM" in result.stderr
    assert "264 KiB" in result.stderr
    size = result.stderr.split("--image-size ")[1].split()[0]
    assert cli("build", "--data", part, "--target", "rp2040", "--image-size", size, "--out", out).returncode == 0


def test_bank_bytes_is_an_upper_bound(part, tmp_path):
    for limit in ("20K", "60K", "150K"):
        most = int(limit[:-1]) * 1024
        built = build(Project(data=part, target="cortex-m7", image_size=96, bank_bytes=most, out=tmp_path / limit))
        assert (tmp_path / limit / "bank.tvb").stat().st_size <= most
        assert built[0].report["verification"]["ok"]


def bad_inputs(tmp_path: Path, part: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("empty", "text", "truncated", "huge", "missing")}
    for name in ("empty", "text", "truncated", "huge"):
        made[name].mkdir()
    (made["text"] / "a.png").write_text("this is not an image")
    source = Image.open(next((part / "train" / "good").iterdir())).convert("RGB")
    source.save(tmp_path / "whole.jpg")
    (made["truncated"] / "a.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:800])
    Image.new("L", (20_000, 20_000)).save(made["huge"] / "a.png")
    return made


def test_bad_images_are_one_line_and_leave_nothing(tmp_path, part):
    for name, data in bad_inputs(tmp_path, part).items():
        out = tmp_path / f"out-{name}"
        result = cli("build", "--data", data, "--target", "cortex-m7", "--out", out)
        assert result.returncode == 2, (name, result.stderr)
        assert result.stderr.count("\n") == 1, (name, result.stderr)
        assert "Traceback" not in result.stderr
        assert not list(tmp_path.glob(f".out-{name}*"))
        assert not out.exists()


@pytest.mark.parametrize("arguments", [
    ("build",),
    ("build", "--data", "DATA", "--target", "nosuch"),
    ("build", "--data", "DATA", "--method", "nosuch"),
    ("build", "--data", "DATA", "--backbone", "nosuch"),
    ("build", "--data", "DATA", "--backbone", "nosuch.onnx"),
    ("build", "--data", "DATA", "--layers", "nosuch"),
    ("build", "--data", "DATA", "--image-size", "7"),
    ("build", "--data", "DATA", "--bank-bytes", "many"),
    ("build", "--data", "DATA", "--frame", "big"),
    ("build", "--data", "DATA", "--out", "DATA"),
    ("build", "--nosuch"),
    ("eval", "nosuch", "--data", "DATA"),
    ("inspect", "nosuch.tvb"),
    ("predict", "nosuch", "x.png"),
    ("nosuch",),
])  # fmt: skip
def test_wrong_use_is_one_line_and_exit_code_2(part, arguments, tmp_path):
    if arguments[0] == "build" and "--out" not in arguments:
        arguments = (*arguments, "--out", str(tmp_path / "b"))
    if "--frame" in arguments:
        arguments = (*arguments, "--target", "cortex-m7")
    result = cli(*(str(part) if a == "DATA" else a for a in arguments))
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "b").exists()


def test_json_is_alone_on_stdout(part, folder):
    for arguments in (
        ("eval", folder, "--data", part), ("verify", folder), ("inspect", folder), ("inspect", folder / "bank.tvb"),
        ("inspect", folder / "backbone.tflite"), ("targets",), ("backbones",), ("methods",), ("profile", folder),
        ("predict", folder, part / "test"),
    ):  # fmt: skip
        result = cli(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        assert isinstance(json.loads(result.stdout), dict), arguments


def test_eval_names_its_metrics(part, folder):
    value = json.loads(cli("eval", folder, "--data", part, "--json").stdout)
    assert {"image_AUROC", "image_F1Max", "image_AP", "pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO", "threshold",
            "n_normal", "n_anomalous", "image_F1_floor", "seconds_per_image"} <= set(value)  # fmt: skip


def test_predict_prints_a_line_an_image_and_writes_overlays(part, folder, tmp_path):
    result = cli("predict", folder, part / "test" / "good", "--overlay", tmp_path / "maps")
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert all(len(line.split()) == 4 for line in lines)
    assert len(list((tmp_path / "maps").glob("*.png"))) == 6


def test_profile_formats_and_baseline(folder, tmp_path):
    base = tmp_path / "base.json"
    base.write_text(cli("profile", folder, "--format", "json").stdout)
    assert cli("profile", folder, "--baseline", base).returncode == 0
    value = json.loads(base.read_text())
    for item in value["budget"]["ram"]:
        item["nbytes"] //= 2
    base.write_text(json.dumps(value))
    result = cli("profile", folder, "--baseline", base)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for form in ("table", "markdown", "junit"):
        assert cli("profile", folder, "--format", form, "--target", "stm32h743").returncode == 0


def test_init_writes_settings_that_build_reads(part, tmp_path):
    assert cli("init", tmp_path).returncode == 0
    assert cli("init", tmp_path).returncode == 2
    text = (tmp_path / "tinyvad.toml").read_text().replace('data = "data"', f"data = '{part}'")
    (tmp_path / "tinyvad.toml").write_text(text)
    result = cli("build", "--project", tmp_path / "tinyvad.toml", "--image-size", "64", "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr


def test_every_damaged_manifest_is_one_line(folder, tmp_path):
    from tinyvad.model import read_manifest

    whole = json.loads((folder / "manifest.json").read_text())
    for key in whole:
        for value in ("missing", None, 0, "x", [], {}, -1, True):
            changed = {k: v for k, v in whole.items() if k != key} if value == "missing" else {**whole, key: value}
            (tmp_path / "manifest.json").write_text(json.dumps(changed))
            try:
                manifest = read_manifest(tmp_path)
            except InputError as error:
                assert f"{key}" in str(error)
            else:  # what is not read may be anything; what is read has its type
                assert key in ("grid", "training") or isinstance(manifest[key], type(whole[key])) or value is None


@pytest.mark.parametrize("method", ["padim-compact", "padim", "padim-lite", "patchcore"])
@pytest.mark.parametrize("kind", ["part", "black"])
def test_identical_good_images_pass_and_another_does_not(part, tmp_path, method, kind):
    same = tmp_path / "same"
    same.mkdir()
    image = Image.open(next((part / "train" / "good").iterdir())) if kind == "part" else Image.new("RGB", (64, 64))
    for n in range(6):
        image.save(same / f"{n}.png")
    build(Project(data=same, method=method, image_size=64, out=tmp_path / "b"))
    model = tinyvad.load(tmp_path / "b")
    assert model.predict(same / "0.png").pred_label == 0
    assert model.predict(np.full((64, 64, 3), 200, np.uint8)).pred_label == 1


@pytest.mark.parametrize("count", [1, 2])
def test_compact_padim_of_one_or_two_images(part, tmp_path, count):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((part / "train" / "good").iterdir())[:count]:
        shutil.copy(path, few)
    build(Project(data=few, method="padim-compact", image_size=64, out=tmp_path / "b"))
    assert tinyvad.load(tmp_path / "b").predict(next(few.iterdir())).pred_label == 0


def test_a_rebuild_replaces_a_build_and_nothing_else(part, folder, tmp_path):
    project = Project(data=part, image_size=64, out=tmp_path / "b")
    build(project)
    build(project)
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        build(project)
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"


def test_a_category_name_stays_inside_out(tmp_path, part):
    root = tmp_path / "visa"
    (root / "split_csv").mkdir(parents=True)
    shutil.copytree(part / "train" / "good", root / "images")
    rows = ["object,split,label,image,mask"]
    for name in ("../../evil", "fine"):
        rows += [f"{name},train,normal,images/{path.name}," for path in sorted((root / "images").iterdir())[:6]]
    (root / "split_csv" / "1cls.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError):
        build(Project(data=root, image_size=64, out=tmp_path / "deep" / "out"))
    assert not (tmp_path / "evil").exists()


def test_verify_copes_with_damaged_samples_and_manifest(folder, tmp_path):
    other = tmp_path / "b"
    shutil.copytree(folder, other)
    (other / "samples" / "00.png").write_text("no image")
    assert "samples/00.png was changed after the build" in verify(other)["problems"]
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"] = {}
    manifest["thresholds"]["int8"]["raw"] = 1
    (other / "manifest.json").write_text(json.dumps(manifest))
    problems = verify(other)["problems"]
    assert "bank.tvb was changed after the build" in problems
    assert any("threshold 1" in problem for problem in problems)


def test_a_pipe_among_the_images_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "pipe.png")
    result = cli("build", "--data", tmp_path / "data", "--target", "cortex-m7", "--out", tmp_path / "b")
    assert result.returncode == 2
    assert "not a regular file" in result.stderr


def test_a_build_inside_the_images_is_refused(part):
    result = cli("build", "--data", part, "--target", "cortex-m7", "--out", part / "train" / "b")
    assert result.returncode == 2
    assert "beside it" in result.stderr


def test_no_verb_prints_the_help():
    result = cli()
    assert result.returncode == 2
    assert "Commands:" in result.stderr
