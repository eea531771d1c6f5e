"""Trained weights and their cards, files of weights, random weights, and the choice of ``auto``."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tinyvad.backbones import BACKBONES, cards, get_backbone, list_backbones
from tinyvad.backbones.assign import random_weights
from tinyvad.backbones.cards import read_card, trained_weights
from tinyvad.backbones.source import auto_candidates, open_backbone, warnings_about
from tinyvad.choosing import MIN_AUTO_SIZE, Choice, Chooser
from tinyvad.cli import main
from tinyvad.demo import render_demo
from tinyvad.errors import CheckFailed, InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.memory import summary
from tinyvad.firmware_sim.targets import Target, load_target
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise, truncate
from tinyvad.graph.quantize import ChannelStatistics, affine_range, quantize
from tinyvad.project import Project

CARD = """\
architecture = "{name}"
input_size = 112
parameters = {parameters}
sha256 = "{sha256}"
command = "tinyvad distill --student {name}"
licence = ["Teacher: MIT", "Images: research"]
quality = {quality}

[[layers]]
name = "{layer}"
stride = 16
channels = 8
teacher = ["big:block1", "big:block2"]
explained = 0.5
int8_snr_db = 30

[training]
steps = 100
"""


def student(name: str, layers: list[str] | None = None, seed: int = 7) -> Graph:
    """What a training leaves: a definition with weights, cut after its taps, batch norms folded."""
    info = get_backbone(name)
    definition = random_weights(info.build(input_size=info.input_size), seed)
    return normalise(truncate(definition, layers or list(info.layers)))


def save(path: Path, graph: Graph) -> Path:
    np.savez(path, **{name: array.astype(np.float16) for name, array in graph.constants.items()})
    return path


def put(name: str, quality: float) -> None:
    """Trained weights and card of that quality where tinyvad looks for its own."""
    graph = student(name)
    path = save(cards.FOLDER / f"{name}.npz", graph)
    text = CARD.format(
        name=name, parameters=graph.parameters(), quality=quality, layer=graph.outputs[-1],
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip
    path.with_suffix(".toml").write_text(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty stand-in for tinyvad's own weights, with the filter bank's card (quality 0.3)."""
    made = tmp_path / "own"
    made.mkdir()
    text = (cards.FOLDER / "filter-bank.toml").read_text()
    (made / "filter-bank.toml").write_text(re.sub(r"(?m)^quality = .*", "quality = 0.3", text))
    monkeypatch.setattr(cards, "FOLDER", made)
    return made


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- cards and trained weights


@pytest.mark.parametrize("info", list_backbones(), ids=lambda info: info.name)
def test_what_tinyvad_brings_along_is_whole(info) -> None:
    card = read_card(info.name)
    assert (info.weights == "none") == (card is None)
    if info.weights != "trained":
        return
    assert card is not None and card.licence and card.command and card.layers
    backbone = open_backbone(info.name)
    assert backbone.sha256 == card.sha256 and backbone.quality == card.quality
    assert [layer.name for layer in card.layers] == list(backbone.layers)
    assert sum(array.size for array in trained_weights(info.name).values()) == card.parameters


@pytest.mark.parametrize("name", [name for name, info in BACKBONES.items() if not info.built_in])
def test_stored_arrays_are_the_constants_of_the_cut_definition(name: str, tmp_path: Path) -> None:
    graph = student(name)
    opened = open_backbone(name, weights=save(tmp_path / "w.npz", graph))
    for size in (64, 96):
        found = opened.graph_at(size)
        assert found.outputs == list(opened.layers) == list(get_backbone(name).layers)
        assert found.constants.keys() == graph.constants.keys()
        for key, array in graph.constants.items():
            assert found.constants[key].dtype == np.float32
            assert np.array_equal(found.constants[key], array.astype(np.float16).astype(np.float32))


def test_trained_weights_are_found_by_name(folder: Path) -> None:
    assert get_backbone("mcunet-in0").weights == "none" and auto_candidates() == ["filter-bank"]
    put("mcunet-in0", 0.5)
    assert get_backbone("mcunet_in0").weights == "trained" and get_backbone("filter-bank").weights == "built in"
    card = read_card("mcunet-in0")
    assert card is not None and card.sha256 is not None
    assert card.layers[0].teacher == ("big:block1", "big:block2") and card.training == {"steps": 100}
    backbone = open_backbone("mcunet_in0")
    assert (backbone.sha256, backbone.quality, backbone.random) == (card.sha256, 0.5, False)
    assert backbone.source == f"mcunet-in0, tinyvad's own weights (quality 0.50, SHA-256 {card.sha256[:8]})"
    expected = student("mcunet-in0").constants["stem.weights"].astype(np.float16)
    assert np.array_equal(backbone.graph_at(64).constants["stem.weights"], expected)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    put("mcunet-in0", 0.5)
    data = bytearray((folder / "mcunet-in0.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "mcunet-in0.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"mcunet-in0\.npz is damaged: its SHA-256 begins \w{8}, not \w{8}; install"):
        open_backbone("mcunet-in0")
    (folder / "mcunet-in0.toml").unlink()
    with pytest.raises(InputError, match=r"mcunet-in0\.npz has no card"):
        open_backbone("mcunet-in0")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("quality = 0.5", "quality = 'good'", "field quality is 'good', expected float"),
    ("quality = 0.5", "quality = 1.5", "quality 1.5"),
    ("quality = 0.5", "quality = nan", "quality nan"),
    ("quality = 0.5", "", "field quality is None"),
    ("quality = 0.5", "quality = true", "field quality is True"),
    ("steps = 100", "steps = = 1", "cannot read"),
    ('architecture = "mcunet-in0"', 'architecture = "other"', "is of other"),
    ("stride = 16", "stride = 'x'", r"field layers\[0\].stride is 'x', expected int"),
    ('["Teacher: MIT", "Images: research"]', "[1]", r"field licence is \[1\]"),
    ("parameters = ", "parameters = 0.5 # ", "field parameters is 0.5"),
])  # fmt: skip
def test_a_damaged_card_names_file_and_field(folder: Path, old: str, new: str, message: str) -> None:
    put("mcunet-in0", 0.5)
    path = folder / "mcunet-in0.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=rf"{message}.*install tinyvad again") as caught:
        read_card("mcunet-in0")
    assert "mcunet-in0.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_layer_beyond_the_trained_ones_is_named(folder: Path) -> None:
    put("mcunet-in0", 0.5)
    last = get_backbone("mcunet-in0").layers[-1]
    assert open_backbone("mcunet-in0", layers=["block2", "block:4"]).layers == ("block2", "block4")
    with pytest.raises(InputError, match=rf"tinyvad's weights for mcunet-in0 reach up to layer {last}, .*block13"):
        open_backbone("mcunet-in0", layers=["block2", "block13"])
    with pytest.raises(InputError, match="no layer nix"):
        open_backbone("mcunet-in0", layers=["nix"])


# --- files of weights


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", student("mcunet-in0")).read_bytes()
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "whole_numbers.npz", **{"stem.weights": np.zeros((2, 2), int)})
    np.savez(tmp_path / "nan.npz", **{"stem.weights": np.full((2, 2), np.nan)})
    np.savez(tmp_path / "objects.npz", **{"stem.weights": np.array([{}])})
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    for name, data in (("empty", b""), ("text", b"weights"), ("half", whole[: len(whole) // 2]), ("flipped", flipped)):
        (tmp_path / f"{name}.npz").write_bytes(data)
    for name in ("empty", "text", "half", "single", "flipped", "none", "whole_numbers", "nan", "objects", "missing"):
        with pytest.raises(InputError, match=name) as caught:
            open_backbone("mcunet-in0", weights=tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="weights come from"):
        open_backbone("mcunet-in0", weights=tmp_path / "w.pt")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = save(tmp_path / "other.npz", student("mcunet-in3"))
    with pytest.raises(InputError, match=r"other\.npz: weights for mcunet-in0: stem\.weights has shape"):
        open_backbone("mcunet-in0", weights=other)
    with pytest.raises(InputError, match=r"other\.npz: weights for mobilenet-v2-0.35: no array features"):
        open_backbone("mobilenet-v2-0.35", weights=other)


def test_without_weights_a_definition_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"mcunet-in0 is a definition without weights.*--weights FILE.*--weights random"):
        open_backbone("mcunet-in0")


def test_random_weights_are_those_of_seed_0_and_say_so(folder: Path) -> None:
    put("mcunet-in0", 0.5)  # the word wins over what tinyvad brings along
    backbone = open_backbone("mcunet-in0", weights=Path("random"))
    assert backbone.random and backbone.quality is None and backbone.sha256 is None
    assert backbone.source == "mcunet-in0, random weights (seed 0), untrained"
    expected = student("mcunet-in0", seed=0).constants
    assert all(np.array_equal(array, expected[name]) for name, array in backbone.graph_at(64).constants.items())
    assert warnings_about({"name": "x", "random": True}) and not warnings_about({"random": "x"}) and not warnings_about({})


# --- auto


def choose_network(project: Project, target: Target | None, n_good: int) -> Choice:
    """The choice that looks at no image."""
    return Chooser(project, target, n_good).choose()


def chosen(target: Target | str | None, **settings) -> tuple[str, int, dict[str, str]]:
    """Name and size that auto chooses, and why not for each candidate."""
    choice = choose_network(Project(**settings), load_target(target) if isinstance(target, str) else target, 50)
    assert [one.name for one in choice.tried if one.chosen] == [choice.backbone.name]
    qualities = [one.quality for one in choice.tried]
    assert qualities == sorted(qualities, reverse=True)
    return choice.backbone.name, choice.size, {one.name: one.why_not for one in choice.tried}


def test_auto_takes_the_best_that_fits_the_target(folder: Path) -> None:
    assert chosen("stm32f746")[0] == "filter-bank"
    put("mcunet-in1", 0.6)
    put("mcunet-in3", 0.7)
    put("mcunet-in4", 0.2)
    assert open_backbone("auto").name == open_backbone(None).name == chosen(None)[0] == "mcunet-in3"
    name, size, why_not = chosen("stm32f746")
    assert (name, why_not["mcunet-in1"], why_not["mcunet-in3"]) == ("mcunet-in3", "lower quality", "")
    assert size >= MIN_AUTO_SIZE
    # the better network fits only with too few pixels
    name, size, why_not = chosen("nrf52840", frame="464x465-grey")
    assert name == "mcunet-in1" and size >= MIN_AUTO_SIZE
    assert re.fullmatch(r"no more than \d+ px fit, wanted are 96", why_not["mcunet-in3"])


def test_auto_gives_the_size_of_a_build_by_name(folder: Path) -> None:
    put("mcunet-in1", 0.6)
    automatic = choose_network(Project(target="stm32f746"), load_target("stm32f746"), 50)
    named = choose_network(Project(target="stm32f746", backbone="mcunet-in1"), load_target("stm32f746"), 50)
    assert (automatic.backbone.name, automatic.size, named.tried) == ("mcunet-in1", named.size, ())


def test_at_equal_quality_auto_takes_the_smaller_flash(folder: Path) -> None:
    put("mcunet-in1", 0.3)  # 176 KiB of flash, the filter bank 22
    for limit in (40_000, None):
        name, _, why_not = chosen("stm32f746", bank_bytes=limit, image_size=96)
        assert (name, why_not["mcunet-in1"]) == ("filter-bank", "same quality, more flash")


def test_auto_leaves_out_what_leaves_no_flash_for_a_bank(folder: Path) -> None:
    put("mcunet-in4", 0.9)  # 481 KiB of flash with code, start-up and application
    put("mcunet-in1", 0.6)  # 172 KiB
    board = load_target("stm32h743")

    def with_flash(kib: int) -> Target:
        regions = [replace(r, size=kib * 1024) if r.kind == "flash" else r for r in board.regions if r.kind != "xip"]
        return replace(board, regions=type(board.regions)(regions))

    assert with_flash(900).flash_bytes == 900 * 1024
    assert chosen(with_flash(900))[0] == "mcunet-in4"
    name, _, why_not = chosen(with_flash(400))
    assert name == "mcunet-in1" and why_not["mcunet-in4"].startswith("flash ")
    name, _, why_not = chosen(with_flash(490), method="padim-lite", grid=28)  # room for the network, none for its bank
    assert name == "mcunet-in1" and why_not["mcunet-in4"].startswith("bank ")


def test_auto_where_nothing_fits_says_what_would(folder: Path) -> None:
    put("mcunet-in1", 0.6)
    with pytest.raises(CheckFailed, match=r"KiB.*--image-size \d+") as caught:
        choose_network(Project(target="rp2040", image_size=512), load_target("rp2040"), 50)
    size = int(str(caught.value).split("--image-size ")[1].split()[0])
    assert chosen("rp2040", image_size=size)[1] == size


@pytest.mark.parametrize("settings", [
    {"layers": ("block1",)}, {"weights": Path("w.npz")}, {"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)},
])  # fmt: skip
def test_settings_of_one_network_need_its_name(settings) -> None:
    for backbone in (None, "auto"):
        with pytest.raises(InputError, match=r"belongs to one network.*--backbone"):
            choose_network(Project(backbone=backbone, **settings), None, 50)


# --- builds and tables


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_demo(tmp_path_factory.mktemp("data") / "part", n_train=6, n_good=2, n_defect=4, size=96)


def test_an_automatic_build_says_what_it_tried(folder: Path, part: Path, tmp_path: Path) -> None:
    put("mcunet-in0", 0.6)
    arguments = ("build", "--data", part, "--target", "cortex-m7", "--image-size", "64", "--out", tmp_path / "b")
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    figures = r"quality 0.600, 64 px, arena [\d,]+ B, flash [\d,]+ B, about [\d,]+ ms"
    assert re.search(rf"auto +mcunet-in0: {figures}: chosen", result.output)
    assert re.search(r"auto +filter-bank: quality 0.300: lower quality", result.output)
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    card = read_card("mcunet-in0")
    assert card is not None and report["backbone"]["sha256"] == card.sha256
    assert report["warnings"] == [] and report["backbone"]["quality"] == 0.6
    tried = {one["name"]: one for one in report["backbone"]["tried"]}
    arena = next(item["nbytes"] for item in report["budget"]["ram"] if item["owner"] == "arena")
    assert tried["mcunet-in0"]["arena_bytes"] == arena  # planned is what came out
    assert "chosen among 2 networks" in (tmp_path / "b" / "report.html").read_text()


def test_random_weights_are_marked_everywhere(part: Path, tmp_path: Path) -> None:
    built, mark = tmp_path / "b", "random weights and was never trained"
    result = cli("build", "--data", part, "--backbone", "mcunet-in0", "--weights", "random", "--target", "cortex-m7",
                 "--image-size", "64", "--out", built)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert mark in result.stdout and "random weights (seed 0), untrained" in result.stdout
    assert mark in (built / "report.html").read_text()
    assert mark in json.loads((built / "report.json").read_text())["warnings"][0]
    assert json.loads((built / "manifest.json").read_text())["backbone"]["random"] is True
    for arguments in (("eval", built, "--data", part), ("predict", built, part / "test"), ("inspect", built),
                      *(("profile", built, "--format", form) for form in ("table", "markdown", "junit"))):  # fmt: skip
        result = cli(*arguments)
        assert result.exit_code == 0 and mark in result.output, arguments
        if "--format" not in arguments:
            assert mark in json.loads(cli(*arguments, "--json").stdout)["warnings"][0]
    assert mark in json.loads(cli("profile", built, "--json").stdout)["warnings"][0]


def test_random_stays_a_word_in_a_project_file(part: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "tinyvad.toml").write_text('backbone = "mcunet-in0"\nweights = "random"\nimage_size = 64\n')
    result = cli("build", "--project", tmp_path / "p" / "tinyvad.toml", "--data", part, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output


def test_the_table_holds_what_the_files_would_take(folder: Path, tmp_path: Path) -> None:
    put("mcunet-in0", 0.5)
    rows = {row["name"]: row for row in json.loads(cli("backbones", "--json").stdout)["backbones"]}
    assert list(rows)[:2] == ["mcunet-in0", "filter-bank"] and rows.keys() == BACKBONES.keys()
    row, graph = rows["mcunet-in0"], student("mcunet-in0")
    assert (row["weights"], row["quality"], rows["mcunet-in1"]["quality"]) == ("trained", 0.5, None)
    assert (row["parameters"], row["mmacs"]) == (BACKBONES["mcunet-in0"].parameters, BACKBONES["mcunet-in0"].mmacs)
    assert (row["cut_parameters"], row["cut_mmacs"]) == (graph.parameters(), round(graph.macs() / 1e6, 3))
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-2.0, 3.0, 1.0)))
        for name in graph.activations
    }  # another network, other ranges: neither counts
    (tmp_path / "n.tflite").write_bytes(to_tflite(quantize(graph, blank, affine_range(-1, 1))))
    planned = summary(tmp_path / "n.tflite")
    assert row["arena_bytes"] >= planned["arena_head_bytes"]
    assert abs(row["flash_bytes"] - (tmp_path / "n.tflite").stat().st_size) < 1024


def test_a_network_by_name_shows_its_card(folder: Path) -> None:
    put("mcunet-in0", 0.5)
    text = cli("backbones", "mcunet_in0").stdout
    last = BACKBONES["mcunet-in0"].layers[-1]
    assert "Teacher: MIT" in text and "tinyvad distill --student mcunet-in0" in text and "big:block1, big:block2" in text
    lines = text.splitlines()
    assert f" {last}" in next(line for line in reversed(lines) if "beyond" not in line and line.startswith(" *"))
    assert lines[-1].endswith("(beyond the trained weights)")
    value = json.loads(cli("backbones", "mcunet-in0", "--json").stdout)
    assert value["card"]["quality"] == 0.5 and value["card"]["licence"] == ["Teacher: MIT", "Images: research"]
    assert json.loads(cli("backbones", "mcunet-in2", "--json").stdout)["card"] is None
    assert cli("backbones", "nosuch").exit_code == 2
    shutil.rmtree(folder)  # even without the filter bank's card
    assert cli("backbones").exit_code == 0
