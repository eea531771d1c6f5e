"""The choice of network and size: what the rule says, on stand-ins whose figures are known beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyvad import choosing
from tinyvad.backbones.source import open_backbone
from tinyvad.choosing import TOLERANCE, Chooser
from tinyvad.demo import render_demo
from tinyvad.errors import CheckFailed, InputError
from tinyvad.firmware_sim.targets import load_target
from tinyvad.metrics import auroc
from tinyvad.probing import FEWEST_IMAGES, Probe
from tinyvad.project import Project
from tinyvad.sizing import Trial, arena_limit


class Told:
    """A probe that says what it is told, and remembers which sizes it was asked for."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores, self.asked = scores, []

    def score(self, backbone, size, tell=None) -> float:
        self.asked.append(size)
        return self.scores[size]


def choose(scores: dict[int, float], **settings):
    target = load_target("stm32f746")
    probe = Told(scores)
    return Chooser(Project(target="stm32f746", **settings), target, 50).choose(lambda: probe), probe


def test_the_smallest_size_that_is_nearly_the_best_is_taken() -> None:
    scores = {224: 0.90, 192: 0.91, 160: 0.91 - 0.9 * TOLERANCE, 128: 0.91 - 1.1 * TOLERANCE, 96: 0.7}
    choice, probe = choose(scores, max_ms=10_000)
    assert probe.asked == sorted(scores, reverse=True)
    assert choice.size == 160
    assert [(one.image_size, one.probe_auroc, one.chosen) for one in choice.sizes] == [
        (size, round(score, 4), size == 160) for size, score in scores.items()
    ]
    assert all(one.ms and one.arena_bytes for one in choice.sizes)


def test_a_size_that_the_user_gives_is_not_tried() -> None:
    choice, probe = choose({}, image_size=112)
    assert choice.size == 112 and probe.asked == [] and choice.sizes == ()


def test_time_bounds_the_size() -> None:
    target = load_target("stm32f746")
    free = Chooser(Project(target="stm32f746", max_ms=60_000), target, 50)
    assert free.largest == 224
    whole = free.trial(free.backbone, 224).milliseconds
    bound = int(0.5 * whole)
    short = Chooser(Project(target="stm32f746", max_ms=bound, backbone=free.backbone.name), target, 50)
    assert short.largest < 224 and short.trial(short.backbone, short.largest).milliseconds <= bound
    assert short.trial(short.backbone, short.largest + 16).milliseconds > bound
    with pytest.raises(CheckFailed, match=r"about \d+ ms an image, allowed are 1: use --max-ms \d+"):
        Chooser(Project(target="stm32f746", max_ms=1, backbone=free.backbone.name), target, 50)


def test_without_a_limit_a_slow_chip_gets_more_time_until_something_fits() -> None:
    chooser = Chooser(Project(target="rp2040"), load_target("rp2040"), 50)
    assert chooser.largest >= 96
    assert chooser.trial(chooser.backbone, chooser.largest).milliseconds <= chooser.max_ms


def test_a_network_that_does_not_fit_is_tried_cut_before_its_last_tap(monkeypatch) -> None:
    monkeypatch.setattr(choosing, "auto_candidates", lambda: ["mcunet-in3"])
    board, project = load_target("stm32h743"), Project(target="stm32h743", method="patchcore")
    full = Trial(open_backbone("mcunet-in3"), 96, project, board)
    cut = Trial(open_backbone("mcunet-in3", list(full.backbone.layers[:-1])), 96, project, board)
    sizes = [sum(item.nbytes for item in trial.needs.flash) for trial in (full, cut)]
    room = (sizes[1] + 20_000) // 1024 * 1024  # for the cut network and a small bank, not for the whole one
    assert room < sizes[0]
    regions = type(board.regions)(replace(r, size=room) if r.kind == "flash" else r for r in board.regions)
    chooser = Chooser(project, replace(board, regions=regions), 50)
    assert chooser.backbone.layers == cut.backbone.layers
    assert [(one.name, one.chosen) for one in chooser.tried] == [("mcunet-in3", False), ("mcunet-in3", True)]


def test_the_arena_limit_is_the_largest_span_without_what_else_lies_there() -> None:
    target = load_target("stm32f412")  # one block of 256 KiB
    free = arena_limit(target, None)
    assert free < 256 * 1024 - target.reserve.stack
    assert free - arena_limit(target, "320x240-rgb565") == pytest.approx(320 * 240 * 2, abs=64)


# --- the probe


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> list[Path]:
    folder = render_demo(tmp_path_factory.mktemp("data") / "part", n_train=18, n_good=1, n_defect=1, size=128)
    return sorted((folder / "train" / "good").iterdir())


def test_the_probe_is_an_auroc_of_held_out_images_against_defective_copies(good: list[Path]) -> None:
    probe = Probe(good, seed=1)
    assert probe.held.shape[0] == 6 and probe.fitted.shape[0] == 12 and probe.defective.shape[1] == 6
    assert (probe.defective != probe.held[None]).any((2, 3, 4)).mean() > 0.9
    backbone = open_backbone("filter-bank")
    first = probe.score(backbone, 64)
    assert 0.5 < first <= 1
    assert Probe(good, seed=1).score(backbone, 64) == first  # repeats
    # without a defect there is nothing to find
    probe.defective = np.repeat(probe.held[None], 2, 0)
    assert probe.score(backbone, 64) == pytest.approx(0.5)


def test_defects_that_cover_the_picture_are_always_found(good: list[Path]) -> None:
    probe = Probe(good)
    probe.defective = 255 - probe.held[None]
    assert probe.score(open_backbone("filter-bank"), 64) == 1.0


def test_too_few_images_for_a_probe(good: list[Path]) -> None:
    with pytest.raises(InputError, match=rf"needs {FEWEST_IMAGES} good images"):
        Probe(good[: FEWEST_IMAGES - 1])


def test_unreadable_images_are_skipped_where_asked(good: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "small.png")
    probe = Probe([broken, tmp_path / "small.png", *good], on_error="skip")
    assert len(probe.held) + len(probe.fitted) == len(good) + 1
    with pytest.raises(InputError, match="broken"):
        Probe([broken, *good])


def test_auroc_of_equal_scores_is_a_half() -> None:
    assert auroc(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 1.0, 2.0])) == 0.5
