"""Whole builds of a rendered part, linked for a chip and run in the emulator: equal integers, the memory that was planned.

Needs arm-none-eabi-gcc and qemu-system-arm (`make firmware-tools`); skipped without.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tinyvad.build import build
from tinyvad.demo import render_demo
from tinyvad.firmware_sim.compare import compare_firmware
from tinyvad.firmware_sim.targets import load_target
from tinyvad.model import load
from tinyvad.project import Project
from tinyvad.verify import images_of

RAM_SECTIONS = (".arena", ".frame", ".data", ".bss")
FLASH_SECTIONS = (".vectors", ".model", ".bank", ".text", ".data")

pytestmark = pytest.mark.skipif(
    shutil.which("arm-none-eabi-gcc") is None or shutil.which("qemu-system-arm") is None,
    reason="needs arm-none-eabi-gcc and qemu-system-arm (make firmware-tools)",
)


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    return render_demo(tmp_path_factory.mktemp("data") / "part", n_train=16, n_good=2, n_defect=2, size=200)


# target, settings, activations at most (None: no bound), or what is known of the plan
CASES = {
    "in place, 260 KB": ("stm32h743", {"backbone": "mcunet-in3", "image_size": 176, "plan": "inplace-dw"}, 260_000),
    "row bands, 190 KB": ("stm32h743", {"backbone": "mcunet-in3", "image_size": 176, "plan": "patch"}, 190_000),
    "QVGA frame beside it": (
        "stm32f746", {"backbone": "mcunet-in3", "image_size": 176, "frame": "320x240-rgb565"}, 190_000),
    "default on a Nordic": ("nrf52840", {"method": "patchcore-lite", "bank_bytes": 40_000}, None),
    "default on a Pico": ("rp2040", {"method": "padim"}, None),
    "default with Helium": ("cortex-m55", {"method": "padim-lite"}, None),
    "a student": ("stm32h743", {"backbone": "mcunet-in1", "method": "paste", "image_size": 96, "epochs": 1}, None),
    "a descriptor": ("stm32f746", {"backbone": "mcunet-in1", "method": "cfa", "image_size": 96, "epochs": 1}, None),
    "a discriminator": ("nrf52840", {"backbone": "mcunet-in1", "method": "simplenet", "image_size": 96, "epochs": 1}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_chip_computes_pythons_integers_in_the_memory_that_was_planned(case: str, part: Path, tmp_path: Path) -> None:
    target, settings, most = CASES[case]
    report = build(Project(data=part, target=target, out=tmp_path / "b", **settings))[0].report
    found = compare_firmware(
        tmp_path / "b", load(tmp_path / "b"), images_of(tmp_path / "b", part, 4), "firmware", load_target(target)
    )
    assert found["status"] == "equal", found.get("problem")
    assert set(found["differing_values"].values()) == {0} and found["differing_grid_scores"] == 0
    if most is not None:
        assert report["memory"]["activation_bytes"] <= most
    budget, sections = report["budget"], found["sections"]
    planned = {
        kind: sum(item["nbytes"] for item in budget[kind] if not item["owner"].startswith("application"))
        for kind in ("ram", "flash")
    }
    assert sections[".arena"] == report["memory"]["head_bytes"]
    ram = sum(sections.get(name, 0) for name in RAM_SECTIONS) + found["stack_bytes"]
    flash = sum(sections.get(name, 0) for name in FLASH_SECTIONS)
    assert planned["ram"] == pytest.approx(ram, rel=0.01)
    assert planned["flash"] == pytest.approx(flash, rel=0.02)
