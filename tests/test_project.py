"""Settings: the file, the flags over it, and every wrong value named with its key."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyvad.errors import InputError
from tinyvad.project import FILE, TEMPLATE, Project, load_project, parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


# -- precedence ---------------------------------------------------------------------------------------------------------


def test_defaults_without_file_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_project(None, {}) == Project()


def test_flags_win_over_the_file_where_given(tmp_path: Path) -> None:
    path = written(tmp_path, 'method = "padim"\nimage_size = 96\nseed = 3\nlayers = ["a", "b"]')
    project = load_project(path, {"method": "patchcore", "image_size": None, "seed": 0, "layers": None})
    assert project == Project(method="patchcore", image_size=96, seed=0, layers=("a", "b"))


def test_the_file_of_the_folder_is_taken_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / FILE).write_text("seed = 5")
    assert load_project(None, {}).seed == 5
    assert load_project(None, {"seed": 6}).seed == 6
    assert load_project(written(tmp_path, "grid = 7"), {}) == Project(grid=7)


def test_paths_are_relative_to_the_file_and_flags_to_here(tmp_path: Path) -> None:
    text = 'data = "images"\nout = "../b"\nweights = "w.onnx"\nbackbone = "nets/Net.ONNX"\ntarget = "board.toml"'
    project = load_project(written(tmp_path, text), {})
    assert project.data == tmp_path / "images" and project.out == tmp_path / "../b"
    assert project.weights == tmp_path / "w.onnx"
    assert project.backbone == str(tmp_path / "nets/Net.ONNX") and project.target == str(tmp_path / "board.toml")
    flags = {"data": "d", "out": Path("o"), "backbone": "n.tflite", "target": "board.toml"}
    assert load_project(written(tmp_path, text), flags) == Project(
        data=Path("d"), out=Path("o"), weights=tmp_path / "w.onnx", backbone="n.tflite", target="board.toml"
    )


def test_names_are_not_paths_and_absolute_paths_stay(tmp_path: Path) -> None:
    text = f'data = "{tmp_path}/x"\nbackbone = "mobilenet_v2_0.35"\ntarget = "cortex-m7"'
    project = load_project(written(tmp_path, text), {})
    assert project == Project(data=tmp_path / "x", backbone="mobilenet_v2_0.35", target="cortex-m7")


def test_every_kind_of_value(tmp_path: Path) -> None:
    text = """
        category = "bottle"
        layers = [" block4", "block7 "]
        mean = [0, 0.5, 1]
        std = [1, 0.5, 0.25]
        grid = 10
        dimensions = 48
        bank_bytes = "160K"
        frame = "320x240-rgb565"
        bit_depth = 12
        threshold = "f1"
        quantile = 1
        on_error = "skip"
    """
    assert load_project(written(tmp_path, text), {}) == Project(
        category="bottle", layers=("block4", "block7"), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25), grid=10, dimensions=48,
        bank_bytes=160 * 1024, frame="320x240-rgb565", bit_depth=12, threshold="f1", quantile=1, on_error="skip",
    )  # fmt: skip


def test_the_template_names_every_setting_and_its_defaults(tmp_path: Path) -> None:
    """Uncommented as a whole it is a valid file, and what it says where it shows a default is the default."""
    assert tomllib.loads(TEMPLATE) == {"data": "data", "target": "cortex-m7"}
    lines = [line.removeprefix("# ") for line in TEMPLATE.splitlines() if " = " in line]
    values = tomllib.loads("\n".join(lines))
    assert sorted(values) == sorted(field.name for field in dataclasses.fields(Project))
    project = load_project(written(tmp_path, "\n".join(lines)), {})
    for name in ("bit_depth", "threshold", "quantile", "seed", "on_error"):
        assert getattr(project, name) == getattr(Project(), name)


# -- wrong values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_size = '96'", "image_size is '96'; expected a whole number"),
        ("image_size = 96.0", "image_size is 96.0; expected a whole number"),
        ("seed = true", "seed is True; expected a whole number"),
        ("quantile = 'high'", "quantile is 'high'; expected a number"),
        ("method = 3", "method is 3; expected text"),
        ("method = ''", "method is ''; expected text"),
        ("data = 5", "data is 5; expected a path"),
        ("out = ['a']", r"out is \['a'\]; expected a path"),
        ("layers = 'a,b'", "layers is 'a,b'; expected layer names"),
        ("layers = []", r"layers is \[\]; expected layer names"),
        ("layers = ['a', ' ']", ".*expected layer names"),
        ("layers = [1]", ".*expected layer names"),
        ("mean = [0.5, 0.5]", r"mean is \[0.5, 0.5\]; expected three numbers"),
        ("mean = [0.5, 0.5, true]", ".*expected three numbers"),
        ("std = 0.5", "std is 0.5; expected three numbers"),
        ("bank_bytes = -1", "bank_bytes is -1; write bytes as 163840, 160K or 2M"),
        ("image_sise = 96", "image_sise is unknown; known are data, target, .*on_error"),
        ("[build]\nseed = 1", "build is unknown; known are"),
    ],
)
def test_wrong_values_name_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}") as caught:
        load_project(path, {})
    assert "\n" not in str(caught.value)


def test_wrong_flags_are_named_as_flags(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--bank-bytes is 'lots'; write bytes as"):
        load_project(written(tmp_path, ""), {"bank_bytes": "lots"})
    with pytest.raises(InputError, match=r"^--image-size is 'x'; expected a whole number"):
        load_project(written(tmp_path, ""), {"image_size": "x"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 31}, "image size 31: choose 32 to 1024 pixels"),
        ({"image_size": 1025}, "image size 1025"),
        ({"grid": 0}, "grid 0: choose 1 to 128"),
        ({"grid": 129}, "grid 129"),
        ({"dimensions": 0}, "dimensions 0: choose 2 or more"),
        ({"quantile": 0.4}, "quantile 0.4: choose 0.5 to 1"),
        ({"quantile": 1.1}, "quantile 1.1"),
        ({"quantile": float("nan")}, "quantile nan"),
        ({"threshold": "best"}, "threshold 'best': choose quantile or f1"),
        ({"on_error": "ignore"}, "on_error 'ignore': choose stop or skip"),
        ({"bank_bytes": 0}, "bank bytes 0: must be positive"),
        ({"bit_depth": 7}, "bit depth 7: choose 8 to 16"),
        ({"bit_depth": 17}, "bit depth 17"),
        ({"mean": (0.0, float("inf"), 0.0)}, r"mean \[0.0, inf, 0.0\]: choose finite numbers$"),
        ({"std": (1.0, 0.0, 1.0)}, r"std \[1.0, 0.0, 1.0\]: choose finite numbers, above 0"),
        ({"seed": -1}, "seed -1: must not be negative"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Project(**values)


@pytest.mark.parametrize("values", [{"image_size": 32}, {"image_size": 1024}, {"grid": 128}, {"quantile": 0.5}])
def test_the_ends_of_the_ranges_are_in(values: dict[str, Any]) -> None:
    Project(**values)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.toml does not exist; `tinyvad init` writes one"):
        load_project(tmp_path / "nothing.toml", {})
    with pytest.raises(InputError, match=r"^cannot read "):
        load_project(tmp_path, {})
    with pytest.raises(InputError, match=r"^cannot read .*settings\.toml: .*line 1"):
        load_project(written(tmp_path, "seed = = 3"), {})
    (tmp_path / "latin.toml").write_bytes(b'method = "\xe9"')
    with pytest.raises(InputError, match=r"^cannot read .*latin\.toml"):
        load_project(tmp_path / "latin.toml", {})


# -- bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (163840, 163840), ("163840", 163840), ("160K", 163840), ("160k", 163840), ("160 KiB", 163840), ("160KB", 163840),
        ("2M", 2 << 20), ("1.5M", 3 << 19), ("0.5 mb", 1 << 19), ("12B", 12), (1024.0, 1024), ("0", 0),
    ],
)  # fmt: skip
def test_bytes(value: Any, wanted: int) -> None:
    assert parse_bytes(value, "x") == wanted


@pytest.mark.parametrize("value", ["", "K", "-1", "1e5", "160i", "1G", "1,5K", "160K 2", "0x10", None, True, [1], "١٦٠"])
def test_no_bytes(value: Any) -> None:
    with pytest.raises(InputError, match=r"^--bank-bytes is .*; write bytes as 163840, 160K or 2M$"):
        parse_bytes(value, "--bank-bytes")
