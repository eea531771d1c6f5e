"""Modelled training steps: against tracemalloc on real steps, closed forms of small nets, and what the papers quote."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("autograd", reason="training needs autograd: pip install 'tinyvad[train]'")

from tinyvad.backbones.source import open_backbone
from tinyvad.detectors.cfa import Cfa
from tinyvad.detectors.simplenet import SimpleNet
from tinyvad.detectors.student import Paste, Stfpm
from tinyvad.errors import InputError
from tinyvad.firmware_sim.targets import load_target
from tinyvad.firmware_sim.training_memory import training_memory
from tinyvad.firmware_sim.training_step import adaptation_figures, figures_table, float_rate, training_macs
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.training import blocks
from tinyvad.training.tape import value_and_gradients

DETECTORS = {"stfpm": Stfpm, "paste": Paste, "cfa": Cfa, "simplenet": SimpleNet}


@pytest.fixture(scope="module")
def backbone() -> Graph:
    return open_backbone("mcunet-in3", weights="random").graph_at(64)


@pytest.fixture(scope="module")
def mobilenet() -> Graph:
    layers = ["features.7", "features.10", "features.14"]  # the papers'
    return open_backbone("mobilenet-v2", layers, "random").graph_at(224)


def chain() -> Graph:
    """conv 3x3 (4 -> 8) -> a, conv 1x1 (8 -> 8) -> b, b + a -> c, conv 1x1 (8 -> 6) -> d; 10 x 10."""
    rng = np.random.default_rng(0)
    builder = GraphBuilder("chain", (1, 10, 10, 3), "image")

    def conv(x: str, out: int, kernel: int, name: str, activation: str) -> str:
        shape = (out, kernel, kernel, builder.shape(x)[3])
        weights = builder.constant(f"{name}/w", rng.normal(size=shape).astype(np.float32))
        bias = builder.constant(f"{name}/b", np.zeros(out, np.float32))
        settings = {"stride": (1, 1), "pads": (kernel // 2,) * 4, "dilation": (1, 1)}
        return builder.add("conv2d", [x, weights, bias], name, **settings, activation=activation)

    a = conv(conv("image", 4, 1, "start", "relu6"), 8, 3, "a", "relu6")
    c = builder.add("add", [conv(a, 8, 1, "b", "none"), a], "c", activation="none")
    return builder.finish([conv(c, 6, 1, "d", "none")])


def measured(detector: Any, batch: int) -> tuple[int, int]:
    """Bytes that tracemalloc sees at the end of the way forward, and at most, besides parameters and the batch."""
    rng = np.random.default_rng(1)
    graph, targets = detector.network.graph, detector.targets
    shapes = [graph.tensors[name].shape[1:] for name in graph.inputs]
    shapes += [] if targets is None else [targets.tensors[name].shape[1:] for name in targets.outputs]
    arrays = [rng.normal(size=(batch, *shape)).astype(np.float32) for shape in shapes]
    if detector.method == "cfa":
        detector.centres_ = rng.normal(size=detector.centres_.shape).astype(np.float32)
    at_end = 0

    def loss(parameters: Any) -> Any:
        nonlocal at_end
        found = detector.loss(parameters, detector.network.statistics, arrays, np.random.default_rng(2))
        at_end = tracemalloc.get_traced_memory()[0]
        return found

    with blocks.threads(1):
        value_and_gradients(loss, detector.network.parameters)  # compiles
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            value_and_gradients(loss, detector.network.parameters)
            return at_end - before, tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("method", DETECTORS)
def test_bytes_are_those_of_a_real_step(backbone: Graph, method: str) -> None:
    """Within 8 %, mostly from below: small arrays (moments, factors) and Python's own objects are not modelled."""
    detector = DETECTORS[method](backbone)
    memory = training_memory(detector, 6)
    kept, peak = measured(detector, 6)
    assert 0.92 < memory.kept / kept <= 1.03
    assert 0.92 < (memory.kept + memory.passing) / peak <= 1.03


def test_what_is_kept_of_a_small_network_by_hand() -> None:
    """Student behind 'start': BN inputs, conv inputs; h itself belongs to the batch."""
    detector = Paste(chain(), ["d"], "start")
    memory = training_memory(detector, 2)
    cell = 4 * 2 * 100  # bytes of a channel: float32, 2 images, 100 positions
    # sum of a (for its batch norm), a (for b), sum of b, c (for d), sum of d, d (for the loss); the loss: 24 a position
    kept = [8, 8, 8, 8, 6, 6]
    assert memory.kept == sum(kept) * cell + 24 * 200
    assert memory.batch == (4 + 6) * cell  # h and the target
    trained = 4 * 9 * 8 + 2 * 8 + 8 * 8 + 2 * 8 + 8 * 6 + 2 * 6  # weights, scales and offsets
    statistics = 2 * (8 + 8 + 6)
    assert memory.parameters == 4 * (trained + statistics)
    assert memory.optimiser == 4 * trained
    assert memory.total == memory.parameters + memory.optimiser + memory.batch + memory.kept + memory.passing


def test_multiply_accumulates_of_a_small_network_by_hand() -> None:
    macs = training_macs(Paste(chain(), ["d"], "start"))
    a, b, d = 100 * 4 * 9 * 8, 100 * 64, 100 * 48
    assert macs.trunk == 100 * 12
    assert macs.teacher == macs.forward == a + b + d
    assert macs.backward == 2 * (a + b + d) - a  # the first layer's input gets no gradient
    assert macs.step == macs.teacher + macs.forward + macs.backward + macs.loss


def test_memory_grows_with_the_batch_alone_in_its_maps(backbone: Graph) -> None:
    detector = Paste(backbone)
    one, two, four = (training_memory(detector, batch) for batch in (1, 2, 4))
    assert one.parameters == four.parameters and one.optimiser == four.optimiser
    assert two.batch == 2 * one.batch
    assert four.kept - two.kept == 2 * (two.kept - one.kept)
    with pytest.raises(InputError, match="give at least 1"):
        training_memory(detector, 0)


def test_an_optimisers_memory(backbone: Graph) -> None:
    detector = Paste(backbone)
    parameters = 4 * sum(array.size for array in detector.network.parameters.values())
    for recipe, states in (
        ({"optimiser": "sgd"}, 1), ({"optimiser": "sgd", "momentum": 0.0}, 0), ({"optimiser": "adamw"}, 3),
        ({"optimiser": "stable-adamw"}, 2),
    ):  # fmt: skip
        detector.recipe = replace(detector.recipe, **recipe)
        assert training_memory(detector, 1).optimiser == states * parameters


def test_the_savings_that_are_quoted_for_paste(mobilenet: Graph) -> None:
    """MobileNetV2 (methods.md 7): inference -24.9 %, training compute -33.3 %, training RAM -76.2 %.

    Multiply-accumulates here are those of convolutions alone, and a way back costs twice a way forward: the quoted compute
    comes out if both cost the same. The quoted RAM is that of the maps which the way back reads.
    """
    stfpm, paste = Stfpm(mobilenet), Paste(mobilenet)
    assert paste.shared == "features.6"
    whole, tail = training_macs(stfpm), training_macs(paste)
    assert paste.graph().macs() / stfpm.graph().macs() - 1 == pytest.approx(-0.249, abs=0.003)
    same_both_ways = (tail.trunk + tail.teacher + 2 * tail.forward) / (whole.teacher + 2 * whole.forward)
    assert same_both_ways - 1 == pytest.approx(-0.333, abs=0.003)
    assert (tail.step + tail.trunk) / whole.step - 1 == pytest.approx(-0.374, abs=0.002)
    ram = [training_memory(detector, 8) for detector in (stfpm, paste)]
    assert ram[1].kept / ram[0].kept - 1 == pytest.approx(-0.762, abs=0.001)
    assert ram[1].total / ram[0].total - 1 == pytest.approx(-0.742, abs=0.002)


def test_a_step_that_fits_and_one_that_does_not(mobilenet: Graph) -> None:
    paste = Paste(mobilenet)
    large = adaptation_figures(paste, load_target("rpi4"), replay_bytes=1 << 20, images=81)
    assert large["fits"] and not large["problems"] and large["kind"] == "modelled"
    assert paste.trunk is not None and paste.targets is not None
    weights = {name: array.size for part in (paste.trunk, paste.targets) for name, array in part.constants.items()}
    assert large["ram_needed"] == large["ram"]["total"] + (1 << 20) + 4 * sum(weights.values())  # no flash there
    assert large["seconds_an_epoch"] == pytest.approx(11 * large["ms_a_step"] / 1e3)
    small = adaptation_figures(paste, load_target("stm32h743"), replay_bytes=1 << 20)
    assert not small["fits"] and small["seconds_an_epoch"] is None
    assert small["ram_needed"] == small["ram"]["total"] + (1 << 20)
    (problem,) = small["problems"]
    assert "at batch 8 needs" in problem and "KiB of RAM > 988 KiB of stm32h743: share more layers" in problem
    assert "does not fit stm32h743" in figures_table(small) and "fits rpi4" in figures_table(large)


def limited(ram: int) -> Any:
    """An STM32H743 whose RAM is one region of ``ram`` bytes beside what is reserved."""
    target = load_target("stm32h743")
    data, flash = (region for region in target.regions if region.name in ("AXI_SRAM", "FLASH"))
    reserve = target.reserve.ram + target.reserve.stack
    return replace(target, regions=(replace(data, size=ram + reserve), flash))


def test_the_remedy_holds(backbone: Graph) -> None:
    """The batch that is named fits, and one image more does not; images get smaller only where one does not fit."""
    paste = Paste(backbone)
    needs = {batch: training_memory(paste, batch).total for batch in (1, 4, 5)}
    assert adaptation_figures(paste, limited(needs[4]), 4)["fits"]
    (problem,) = adaptation_figures(paste, limited(needs[5] - 1), 8)["problems"]
    assert problem.endswith("use batches of 4")
    (problem,) = adaptation_figures(paste, limited(needs[1] - 1), 8)["problems"]
    assert problem.endswith("use batches of 1 and images of about 32 pixels")
    smaller = Paste(open_backbone("mcunet-in3", weights="random").graph_at(32))
    assert adaptation_figures(smaller, limited(needs[1] - 1), 1)["fits"]
    (problem,) = adaptation_figures(paste, limited(10_000), 1, replay_bytes=5000)["problems"]
    assert "share more layers, a smaller replay memory or use a larger target" in problem


def test_without_a_target_there_is_no_time(backbone: Graph) -> None:
    figures = adaptation_figures(SimpleNet(backbone), None, images=50)
    assert figures["fits"] is None and "ms_a_step" not in figures
    assert figures["batch"] == 8 and "time" not in figures_table(figures)


def test_float_rates_follow_the_core() -> None:
    rates = [float_rate(load_target(name))[0] for name in ("rp2040", "stm32h743", "stm32n657", "rpi4")]
    assert rates == sorted(set(rates))
    figures = adaptation_figures(Paste(chain(), ["d"], "start"), load_target("stm32h743"), 2)
    expected = 2 * figures["macs"]["step"] / rates[1] / 480e3
    assert figures["ms_a_step"] == pytest.approx(expected) and figures["source"].startswith("assumed")
