"""Presets, aliases, spans, files of one's own, and the latency estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyvad.errors import InputError
from tinyvad.firmware_sim.latency import estimate
from tinyvad.firmware_sim.targets import (
    FLASH_KINDS,
    RAM_KINDS,
    list_aliases,
    list_targets,
    load_target,
    spans,
)

KIB = 1024
# Data RAM (without ITCM), flash and largest block in KiB, from the chips' data sheets.
KNOWN = {
    "stm32f746": (320, 1024, 320),
    "stm32f769": (512, 2048, 512),
    "stm32h743": (992, 2048, 512),
    "stm32h747": (992, 2048, 512),
    "openmv-h7": (992, 2048, 512),
    "stm32f446": (128, 512, 128),
    "stm32f412": (256, 1024, 256),
    "stm32l4r5": (640, 2048, 640),
    "stm32u575": (784, 2048, 768),
    "stm32h573": (640, 2048, 640),
    "nrf52840": (256, 1024, 256),
    "nrf5340": (512, 1024, 512),
    "rp2040": (264, 2048, 264),
    "rp2350": (520, 4096, 520),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_sizes(name: str) -> None:
    target = load_target(name)
    ram, flash, largest = (KIB * n for n in KNOWN[name])
    assert (target.ram_bytes, target.flash_bytes) == (ram, flash)
    assert max(span.size for span in spans(target)) == largest
    assert target.pointer_bytes == 4


def test_every_preset_is_complete_and_says_where_its_numbers_come_from() -> None:
    names = {target.name for target in list_targets()}
    others = {"stm32n657", "esp32-s3", "corstone-300", "rpi4", "jetson-orin-nano"}
    assert names == set(KNOWN) | others
    for target in list_targets():
        assert load_target(target.name) == target
        needed = {"clock_mhz", "isa", "regions", "reserve"} | ({"mac_per_cycle"} if target.mac_per_cycle else set())
        assert needed == set(target.source), target.name
        assert target.reserve.stack >= 4096
        assert all(region.base % 16 == 0 and region.size % 1024 == 0 for region in target.regions)
        assert sum(span.size for span in spans(target)) == target.ram_bytes
        assert set(target.mac_per_cycle) <= {"tflm_reference", "cmsis_nn", "tinyengine_like"}


def test_aliases_name_presets_and_are_kept() -> None:
    names = {target.name for target in list_targets()}
    assert set(list_aliases().values()) <= names
    assert not set(list_aliases()) & names
    expected = {
        "cortex-m4": "stm32f412", "cortex-m7": "stm32f746", "cortex-m7-large": "stm32h743",
        "cortex-m33": "stm32u575", "cortex-m55": "corstone-300", "cortex-m0plus": "rp2040",
        "arduino-nano33": "nrf52840",
    }  # fmt: skip
    for alias, name in expected.items():
        target = load_target(alias)
        assert (target.name, target.alias, target.label) == (name, alias, f"{alias} ({name})")
    plain = load_target("STM32F746")
    assert (plain.alias, plain.label) == (None, "stm32f746")


def test_f746_is_one_block_of_two_regions() -> None:
    (span,) = spans(load_target("stm32f746"))
    assert (span.name, span.kinds) == ("DTCM+SRAM", ("tcm", "sram"))
    assert (span.base, span.size) == (0x2000_0000, 320 * KIB)
    assert "DMA" in load_target("stm32f746").dma


def test_h743_has_one_block_of_512_kib() -> None:
    found = {span.name: span.size // KIB for span in spans(load_target("stm32h743"))}
    assert found == {"DTCM": 128, "AXI_SRAM": 512, "SRAM1+SRAM2+SRAM3": 288, "SRAM4": 64}
    (flash,) = spans(load_target("stm32h743"), FLASH_KINDS)
    assert flash.size == 2048 * KIB
    (code,) = spans(load_target("stm32h743"), ["itcm"])
    assert code.size == 64 * KIB


def test_linux_targets_have_no_flash_limit() -> None:
    target = load_target("jetson-orin-nano")
    assert target.flash_bytes is None
    assert target.pointer_bytes == 8


OWN = """
name = "mine"
title = "My board"
core = "cortex-m7"
clock_mhz = 100
[isa]
dsp = true
mve = false
fpu = "sp"
[[regions]]
name = "A"
base = 0x20000000
size = 1000
kind = "sram"
[[regions]]
name = "C"
base = 0x20001000
size = 4096
kind = "sram"
[[regions]]
name = "B"
base = 0x200003e8
size = 24
kind = "tcm"
[mac_per_cycle]
cmsis_nn = 0.5
"""


def own(tmp_path: Path, old: str = "", new: str = "") -> Path:
    assert old in OWN
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new, 1) if old else OWN)
    return path


def test_own_file(tmp_path: Path) -> None:
    target = load_target(own(tmp_path))
    assert (target.name, target.alias, target.clock_mhz) == ("mine", None, 100.0)
    assert [(span.names, span.size) for span in spans(target)] == [(("A", "B"), 1024), (("C",), 4096)]
    assert (target.reserve.ram, target.reserve.flash, target.reserve.stack) == (0, 32768, 4096)
    assert load_target(str(own(tmp_path, "[mac", "[reserve]\nram = 10\n[mac"))).reserve.ram == 10


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "mine"\n', "", "field name is missing"),
        ("clock_mhz = 100", "clock_mhz = 0", "field clock_mhz needs a number above 0, has 0"),
        ("clock_mhz = 100", "clock_mhz = true", "clock_mhz needs a number"),
        ("clock_mhz = 100", "clock_mhz = nan", "clock_mhz needs a number"),
        ('title = "My board"', "title = 3", "field title needs a text"),
        ("dsp = true", "dsp = 1", "field isa.dsp needs true or false, has 1"),
        ('fpu = "sp"', 'fpu = "single"', "field isa.fpu needs one of none, sp, dp, has 'single'"),
        ("size = 24", "size = -1", r"field regions\[2\].size needs a whole number of at least 1, has -1"),
        ("base = 0x20000000", "base = 1.5", r"field regions\[0\].base needs a whole number"),
        ('kind = "tcm"', 'kind = "ram"', r"regions\[2\].kind needs one of"),
        ('name = "B"', 'name = "A"', "regions has 'A' more than once"),
        ("size = 24", "size = 4096", "region B ends at 0x200013e8, beyond the start of C at 0x20001000"),
        ("clock_mhz", "clock_mhz = 1\nclok", "unknown field clok"),
        ("mve = false", "mve = false\nmvee = 1", "unknown field isa.mvee; did you mean mve?"),
        ("cmsis_nn = 0.5", "cmsis_nn = 0", "field mac_per_cycle.cmsis_nn needs a number above 0"),
        ("size = 24", "size = 24\nbytes = 24", r"unknown field regions\[2\].bytes"),
        ("cmsis_nn = 0.5", "mine = 0.5", "unknown field mac_per_cycle.mine"),
        ("[isa]", "[isax]", "field isa is missing"),
        ("[isa]", "isa = 3\n[isax]", "field isa needs a table, has 3"),
        ("[isa]", "[isa", "is no valid TOML"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(InputError, match=rf"mine\.toml.*{words}") as caught:
        load_target(own(tmp_path, old, new))
    assert "\n" not in str(caught.value)


def test_file_without_ram(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(OWN.replace('"sram"', '"flash"').replace('"tcm"', '"itcm"'))
    with pytest.raises(InputError, match=f"no RAM; add one of kind {RAM_KINDS[0]}"):
        load_target(path)


def test_unknown_names_get_near_matches(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown target 'stm32f764'.*stm32f746.*tinyvad targets"):
        load_target("stm32f764")
    with pytest.raises(InputError, match=r"unknown target 'zzzz': `tinyvad targets`"):
        load_target("zzzz")
    with pytest.raises(InputError, match=r"cannot read target .*none\.toml"):
        load_target(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no valid TOML"):
        load_target(tmp_path / "bytes.toml")


def test_latency_by_hand(tmp_path: Path) -> None:
    target = load_target(own(tmp_path))
    answer = estimate(5_000_000, target)  # 0.5 MAC a cycle at 100 MHz: 50 million MACs a second
    assert answer["ms"] == pytest.approx(100.0)
    assert answer["kind"] == "estimated"
    with pytest.raises(InputError, match=r"mine has no mac_per_cycle for engine 'x' \(known: cmsis_nn\)"):
        estimate(1, target, "x")
    assert load_target("cortex-m7").source["mac_per_cycle"] == estimate(1, load_target("cortex-m7"))["source"]


@pytest.mark.parametrize(
    ("engine", "published_ms"), [("tflm_reference", 7821), ("cmsis_nn", 770), ("tinyengine_like", 336)]
)
def test_latency_of_in3_is_near_the_published_measurement(engine: str, published_ms: float) -> None:
    """MCUNet-in3, 81.8 M MACs, on the STM32H743: TinyEngine's README."""
    assert estimate(81_800_000, load_target("stm32h743"), engine)["ms"] == pytest.approx(published_ms, rel=0.2)
