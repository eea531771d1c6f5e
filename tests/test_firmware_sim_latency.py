"""Latency: work counted by hand, the method against published measurements, tables that cover every kernel and core."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tinyvad.backbones import mcunet
from tinyvad.backbones.assign import random_weights
from tinyvad.detectors.centres import CentresScorer
from tinyvad.detectors.linear import LinearScorer
from tinyvad.detectors.nearest import PatchCoreLiteScorer, PatchCoreScorer
from tinyvad.detectors.product_quantizer import ProductQuantizer
from tinyvad.embedding import tap_matrix
from tinyvad.firmware_sim import latency
from tinyvad.firmware_sim.latency import Work
from tinyvad.firmware_sim.targets import Target, list_targets, load_target
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise
from tinyvad.resize import resize_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(latency.__file__).with_name("instructions.toml")
# TFLM with CMSIS-NN, and TinyEngine, on an STM32H743: milliseconds, TinyEngine's README
PUBLISHED = {"in0": (51, 25), "in1": (103, 56), "in2": (642, 280), "in3": (770, 336)}
# CMSIS-NN on a Cortex-M7: (instructions a multiply-accumulate, an output value), fitted to counts of MCUNet-in3's layers
CMSIS_NN = {
    "conv": (4.80, 0.0), "conv_1x1": (1.44, 40.2), "depthwise": (8.04, 8.0), "depthwise_strided": (9.27, 0.0),
    "add": (0.0, 80.0),
}  # fmt: skip


def trunk(net: str) -> Graph:
    return normalise(random_weights(mcunet.build(net), 0))


def test_work_of_a_small_network_by_hand() -> None:
    b = GraphBuilder("small", (1, 8, 8, 3))
    weights = np.zeros((4, 3, 3, 3), np.float32)
    x = b.add("conv2d", [b.input, b.constant("w", weights), b.constant("wb", np.zeros(4, np.float32))], "c",
             stride=(2, 2), pads=(0, 1, 0, 1), dilation=(1, 1), activation="relu6")  # fmt: skip
    dw = np.zeros((1, 3, 3, 4), np.float32)
    y = b.add("depthwise_conv2d", [x, b.constant("dw", dw), b.constant("db", np.zeros(4, np.float32))], "d",
             stride=(1, 1), pads=(1, 1, 1, 1), dilation=(1, 1), activation="none")  # fmt: skip
    z = b.add("add", [x, y], "a", activation="none")
    graph = b.finish([z])
    assert latency.network_work(graph) == {
        "conv": Work(4 * 4 * 4 * 27, 64), "depthwise": Work(64 * 9, 64), "add": Work(0, 64),
    }  # fmt: skip


def test_macs_are_the_graphs() -> None:
    graph = trunk("in1")
    assert sum(done.macs for done in latency.network_work(graph).values()) == graph.macs()


@pytest.mark.parametrize("net", PUBLISHED)
def test_instructions_times_cycles_are_near_the_published_measurements(net: str) -> None:
    """The cycles per instruction come from in3; in0 to in2 are independent of it. Stated: within 20 %."""
    per_instruction = tomllib.loads(TABLE.read_text())["cycles_per_instruction"]["cortex-m7"]["value"]
    work = latency.network_work(trunk(net))
    counted = sum(CMSIS_NN[kernel][0] * done.macs + CMSIS_NN[kernel][1] * done.outputs for kernel, done in work.items())
    assert counted * per_instruction / 480e3 == pytest.approx(PUBLISHED[net][0], rel=0.2)


@pytest.mark.parametrize("net", PUBLISHED)
def test_our_kernels_are_in_tinyengines_class(net: str) -> None:
    """Another engine's figures bound ours: no more than TFLM with CMSIS-NN takes, no less than half of TinyEngine."""
    found = latency.estimate_runtime(latency.network_work(trunk(net)), load_target("stm32h743"))
    assert found is not None
    assert PUBLISHED[net][1] / 2 < found["ms"] < PUBLISHED[net][0]
    assert found["kind"] == "estimated"


def test_estimate_by_hand() -> None:
    target = load_target("stm32h743")
    table = tomllib.loads(TABLE.read_text())
    rate, cycles = table["dsp"]["conv_1x1"], table["cycles_per_instruction"]["cortex-m7"]
    found = latency.estimate_runtime({"conv_1x1": Work(1_000_000, 10_000)}, target)
    assert found is not None
    instructions = round(rate["per_mac"] * 1e6 + rate["per_output"] * 1e4)
    assert found["instructions"] == instructions == found["by_kernel"]["conv_1x1"]
    assert found["ms"] == pytest.approx(instructions * cycles["value"] / 480e3)
    assert found["mac_per_cycle"] == pytest.approx(1e6 / (instructions * cycles["value"]))
    assert cycles["source"] in found["source"]
    assert {"ms", "kind", "engine", "mac_per_cycle", "source"} <= set(found)


def test_every_core_uses_its_instructions() -> None:
    kinds = {target.name: latency.instruction_set(target) for target in list_targets()}
    assert (kinds["stm32f746"], kinds["stm32u575"], kinds["rp2040"]) == ("dsp", "dsp", "thumb")
    assert (kinds["stm32n657"], kinds["esp32-s3"]) == ("mve", "plain")
    for target in list_targets():
        found = latency.estimate_runtime({"add": Work(0, 10)}, target)
        assert (found is not None) == target.core.startswith("cortex-m")


def test_tables_cover_every_kernel() -> None:
    table = tomllib.loads(TABLE.read_text())
    speeds = table.pop("cycles_per_instruction")
    assert all(one["value"] > 0 and one["source"] for one in speeds.values())
    names = {key for key in table["dsp"] if key != "source"}
    assert {"conv_1x1", "frame", "embed", "project", "factor", "search", "table", "scan"} <= names
    for rates in table.values():
        assert {key for key in rates if key != "source"} == names
        assert all(set(rate) <= {"per_mac", "per_output", "counted"} for name, rate in rates.items() if name != "source")


def test_frame_work_is_the_resizes() -> None:
    assert latency.frame_work((96, 96), None) == {"lookup": Work(0, 3 * 96 * 96)}
    work = latency.frame_work((96, 96), (240, 320))["frame"]
    taps_h, taps_w = (resize_weights(size, 96)[1].shape[1] for size in (240, 320))
    exact = 3 * 240 * 96 * taps_w + 3 * 96 * 96 * taps_h
    assert work.outputs == 3 * 96 * 96
    assert exact * 0.8 <= work.macs <= exact * 1.2


def test_embedding_work_counts_the_matrices() -> None:
    rows, _ = tap_matrix(12, 5)
    columns, _ = tap_matrix(9, 4)
    work = latency.embedding_work([(12, 9, 7)], (5, 4))["embed"]
    expected = sum(int(np.count_nonzero(row)) * 9 for row in rows) + 5 * int(np.count_nonzero(columns))
    assert work == Work(7 * expected, 7 * 5 * 4)


def test_scorer_work_matches_the_scorers_macs() -> None:
    grid, depth = (3, 4), 20
    core = PatchCoreScorer(np.zeros((50, depth), np.int8))
    assert latency.scorer_work(core, depth, grid) == {"search": Work(core.macs(grid), 12 * 50)}
    quantizer = ProductQuantizer(np.zeros((5, 16, 4), np.int8), np.arange(depth, dtype=np.uint16), 4)
    lite = PatchCoreLiteScorer(quantizer, np.zeros((50, 5), np.uint8))
    work = latency.scorer_work(lite, depth, grid)
    assert sum(done.macs for done in work.values()) == lite.macs(grid)
    centres = CentresScorer(np.zeros((50, depth), np.int8), np.zeros((7, depth), np.int16), np.zeros(512, np.uint32), grid)
    assert latency.scorer_work(centres, depth, grid) == {"centres": Work(12 * 50 * depth, 12)}
    layer = LinearScorer(np.zeros(depth, np.int8), 0)
    assert latency.scorer_work(layer, depth, grid) == {"linear": Work(12 * depth, 12)}
    gaussian = latency.gaussian_work(12, depth, 8, 4, projected=True)
    assert gaussian == {"project": Work(12 * depth * 8, 12 * 8), "factor": Work(12 * 28, 12 * 8)}


def test_workloads_add_up() -> None:
    parts = ({"add": Work(0, 3), "conv": Work(5, 1)}, {"add": Work(0, 4)})
    assert latency.combined(*parts) == {"add": Work(0, 7), "conv": Work(5, 1)}


def test_unknown_core_gets_no_estimate() -> None:
    target: Target = load_target("jetson-orin-nano")
    assert latency.estimate_runtime({"add": Work(0, 1)}, target) is None
