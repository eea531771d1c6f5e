"""Slow checks on public images with published weights: what the README's tables promise, by the commands a user runs.

Run with `make test-slow`; skipped without ../shared.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

pytestmark = pytest.mark.slow
STUDENTS = ("mcunet-in1", "mcunet-in3", "mobilenet-v2-0.35", "mobilenet-v3-small", "phinet-mcu")
CATEGORIES = ("bottle", "casting", "ksdd", "magnetic_tile", "solar_mono", "toothbrush")


def tinyvad(*arguments: str | Path) -> dict:
    command = [sys.executable, "-m", "tinyvad", *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def builds(shared, tmp_path_factory):
    """build(target, category, backbone) -> (build folder, metrics by `tinyvad eval`), each made once."""
    made: dict[tuple[str, str, str], tuple[Path, dict]] = {}
    published = shared / "weights" / "mcunet_in3_imagenet_f32.onnx"

    def make(target: str, category: str, backbone: str = "published") -> tuple[Path, dict]:
        key = target, category, backbone
        if key not in made:
            out, data = tmp_path_factory.mktemp(target) / category, shared / "data" / category
            flags = () if backbone == "default" else ("--backbone", published)
            tinyvad("build", "--data", data, *flags, "--target", target, "--out", out)
            made[key] = out, tinyvad("eval", out, "--data", data, "--engine", "int8")
        return made[key]

    return make


def test_bottle(builds):
    _, metrics = builds("stm32h743", "bottle")
    assert metrics["image_AUROC"] >= 0.99
    assert metrics["pixel_F1Max"] >= 0.72


def test_toothbrush(builds):
    assert builds("stm32h743", "toothbrush")[1]["image_AUROC"] >= 0.95


@pytest.mark.parametrize(
    ("target", "backbone", "least"),
    [
        ("stm32h743", "published", 0.95), ("stm32f746", "published", 0.94),
        ("stm32h743", "default", 0.95), ("stm32f746", "default", 0.93),
    ],
)  # fmt: skip
def test_mean_auroc_of_six_categories(builds, target, backbone, least):
    values = [builds(target, category, backbone)[1]["image_AUROC"] for category in CATEGORIES]
    assert sum(values) / len(values) >= least


@pytest.mark.parametrize("category", ["bottle", "toothbrush"])
def test_all_exact_engines_agree_on_real_images(builds, shared, category):
    folder, _ = builds("stm32h743", category)
    result = tinyvad("verify", folder, "--data", shared / "data" / category)
    for name in ("litert", "tflm"):
        assert result["engines"][name]["status"] == "equal"
        assert not any(result["engines"][name]["differing_values"].values())


def test_float_engine_loses_no_more_than_a_hundredth(builds, shared):
    drops = []
    for category in CATEGORIES:
        folder, exact = builds("stm32h743", category)
        real = tinyvad("eval", folder, "--data", shared / "data" / category, "--engine", "onnx")
        drops.append(real["image_AUROC"] - exact["image_AUROC"])
    assert sum(drops) / len(drops) <= 0.01


@pytest.fixture(scope="module")
def backbones(shared, tmp_path_factory) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(row, kind, method) -> mean (float, int8) image AUROC, by the benchmark that makes the README's table."""
    out = tmp_path_factory.mktemp("backbones")
    teacher = shared / "weights" / "mcunet_in3_imagenet_f32.onnx"
    script = Path(__file__).parents[1] / "benchmarks" / "backbone_table.py"
    rows = ["teacher", *STUDENTS, "mcunet-in1:random"]
    command = [sys.executable, script, "--data", shared / "data", "--teacher", teacher, "--students", ",".join(STUDENTS)]
    subprocess.run([*map(str, command), "--rows", ",".join(rows), "--out", str(out)], check=True)
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    with (out / "backbones.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            key = line["row"], line["kind"], line["method"]
            found.setdefault(key, []).append((float(line["float_AUROC"]), float(line["int8_AUROC"])))
    return {key: (fmean(a for a, _ in pairs), fmean(b for _, b in pairs)) for key, pairs in found.items()}


@pytest.mark.parametrize("method", ["PaDiM", "PatchCore"])
@pytest.mark.parametrize("student", STUDENTS)
def test_our_own_backbones_keep_up_with_their_teacher(backbones, student, method):
    real, exact = backbones[student, "student", method]
    assert real >= backbones["mcunet_in3_imagenet_f32.onnx", "teacher", method][0] - 0.02
    assert real >= backbones["mcunet-in1", "random", method][0] + 0.1
    assert exact >= real - 0.01


@pytest.mark.parametrize("category", ["bottle", "toothbrush", "casting"])
@pytest.mark.parametrize("target", ["stm32f746", "stm32h743", "stm32f412", "nrf52840"])
def test_firmware_computes_the_same_on_real_images(builds, shared, target, category):
    if shutil.which("arm-none-eabi-gcc") is None or shutil.which("qemu-system-arm") is None:
        pytest.skip("needs arm-none-eabi-gcc and qemu-system-arm (make firmware-tools)")
    folder, _ = builds(target, category, "default")
    found = tinyvad("verify", folder, "--data", shared / "data" / category, "--images", 20, "--engine", "firmware")
    facts = found["engines"]["firmware"]
    assert (found["ok"], found["n_images"], facts["status"]) == (True, 20, "equal")
    assert sum(facts["differing_values"].values()) == facts["differing_grid_scores"] == 0
