"""Profiles of a finished build: several targets and runtimes, one reading, baselines, the command's exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from tinyvad import profiling
from tinyvad.build import build
from tinyvad.cli import main
from tinyvad.demo import render_demo
from tinyvad.errors import InputError
from tinyvad.firmware_sim.targets import list_targets, load_target
from tinyvad.project import Project


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("profiling")
    part = render_demo(root / "part", n_train=8, n_good=1, n_defect=1, size=96)
    build(Project(data=part, target="cortex-m7", image_size=96, out=root / "build"))
    return root / "build"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> profiling.Loaded:
    return profiling.load_build(folder)


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)], catch_exceptions=False)


def test_a_single_profile_keeps_its_keys(folder: Path) -> None:
    problems, value = profiling.profile(folder)
    assert problems == []
    assert {"title", "warnings", "budget", "memory", "latency"} <= set(value)
    assert value["runtime"] == "tinyvad"
    assert value["budget"]["alias"] == "cortex-m7"
    assert {"head_bytes", "head_kind", "lower_bound_bytes", "tail_bytes", "tail", "n_ops"} <= set(value["memory"])
    assert "profiles" not in value


def test_the_profile_is_the_builds_own_budget(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    _, value = profiling.profile(folder)
    assert json.loads(json.dumps(value["budget"])) == report["budget"]


def test_several_targets_are_the_single_profiles(folder: Path, loaded: profiling.Loaded) -> None:
    names = ["stm32f746", "nrf52840", "corstone-300", "rp2040"]
    many = profiling.figures(loaded, [load_target(name) for name in names], "both")
    assert [(one["budget"]["target"], one["runtime"]) for one in many["profiles"]] == [
        (name, runtime) for name in names for runtime in ("tinyvad", "tflm")
    ]
    for one in many["profiles"]:
        _, alone = profiling.profile(folder, [one["budget"]["target"]], one["runtime"])
        assert {key: alone[key] for key in one} == one


def test_all_targets_are_all_presets_each_once(loaded: profiling.Loaded) -> None:
    assert profiling.find_targets(loaded, ["all", "rp2040"]) == list_targets()
    assert [t.label for t in profiling.find_targets(loaded, [])] == ["cortex-m7 (stm32f746)"]
    assert [t.name for t in profiling.find_targets(loaded, ["pico", "rp2040"])] == ["rp2040"]


def test_plans_are_made_once(loaded: profiling.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [load_target(name) for name in ("stm32f746", "stm32h743", "stm32f412")]
    first = profiling.figures(loaded, targets, "both")

    def fail(*_: object) -> None:
        raise AssertionError("planned or read again")

    for name in ("plan_memory", "import_tflite", "read_tflite", "arena"):
        monkeypatch.setattr(profiling, name, fail)
    assert profiling.figures(loaded, targets, "both") == first


def test_a_frame_is_kept_in_ram_and_costs_time(loaded: profiling.Loaded) -> None:
    target = [load_target("stm32h743")]
    frames = (None, "320x240-rgb565")
    plain, framed = (profiling.figures(loaded, target, "tinyvad", frame)["profiles"][0] for frame in frames)
    sizes = {item["owner"]: item["nbytes"] for item in framed["budget"]["ram"]}
    assert sizes["camera frame"] == 320 * 240 * 2
    assert framed["latency"]["ms"] > plain["latency"]["ms"]


def test_over_budget_names_runtime_and_target(folder: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.toml"
    text = (Path(profiling.__file__).parents[1] / "firmware_sim" / "targets" / "stm32f412.toml").read_text()
    tiny.write_text(text.replace("size = 262144", "size = 16384").replace('"stm32f412"', '"tiny"'))
    result = cli(folder, "--target", tiny, "--runtime", "both")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("tinyvad: ")]
    assert lines[0].startswith("tinyvad: runtime tinyvad: ")
    assert any(line.startswith("tinyvad: runtime tflm: arena ") and "16 KiB" in line for line in lines)
    assert all("use a smaller --frame, or rebuild" in line for line in lines)


def test_formats_of_several(folder: Path) -> None:
    several = ("--target", "stm32f746", "--target", "rp2040", "--runtime", "both")
    assert json.loads(cli(folder, *several, "--json").stdout)["profiles"][3]["columns"]["Total RAM"]["bytes"] > 0
    assert "| stm32f746 | tinyvad | yes |" in cli(folder, *several, "--format", "markdown").stdout
    assert len(ElementTree.fromstring(cli(folder, *several, "--format", "junit").stdout)) == 4
    assert "4 of 4 fit" in cli(folder, *several).stdout


def test_baselines_of_one_and_of_several_targets(folder: Path, tmp_path: Path) -> None:
    several = ("--target", "stm32f746", "--target", "rp2040")
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(cli(folder, "--json").stdout)
    many.write_text(cli(folder, *several, "--json").stdout)
    assert cli(folder, *several, "--baseline", many).exit_code == 0
    assert cli(folder, *several, "--baseline", one).exit_code == 0  # rp2040 is new, so nothing of it grew
    assert cli(folder, "--baseline", many).exit_code == 0
    value = json.loads(many.read_text())
    value["profiles"][1]["budget"]["flash_used"] //= 2
    many.write_text(json.dumps(value))
    result = cli(folder, *several, "--baseline", many, "--max-growth", "3%")
    assert result.exit_code == 1
    assert result.stderr.startswith("tinyvad: rp2040 tinyvad: flash total ")
    assert cli(folder, "--target", "stm32h743", "--baseline", one).exit_code == 2
    result = cli(folder, "--runtime", "tflm", "--baseline", one)
    assert result.exit_code == 2
    assert "the baseline is of target stm32f746 tinyvad, this profile of stm32f746 tflm" in result.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"profiles": [{}]}', '{"profiles": 3}', '{"budget": {"ram": 1}}'])
def test_a_baseline_that_is_none(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(text)
    result = cli(folder, "--baseline", path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_wrong_use_is_one_line(folder: Path, tmp_path: Path) -> None:
    for arguments in (
        (), (folder, folder), (folder, "--picture", "a.svg"), (folder, "--target", "nochip"), (folder, "--max-growth", "x"),
        (folder, "--frame", "1x1"), (tmp_path,), (folder, "image-size=96"),
    ):  # fmt: skip
        extra = ("--baseline", folder / "report.json") if "--max-growth" in arguments else ()
        result = cli(*arguments, *extra)
        assert result.exit_code == 2, arguments
        assert result.stderr.count("\n") == 1, result.stderr


def test_a_build_for_no_target_needs_one(folder: Path, loaded: profiling.Loaded) -> None:
    other = profiling.Loaded(**{**vars(loaded), "manifest": {**loaded.manifest, "target": None}})
    with pytest.raises(InputError, match="was built for no target; give --target"):
        profiling.find_targets(other, [])
