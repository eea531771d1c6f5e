"""PhiNet against the figures that its authors and users publish, and the reference code's quirks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_backbones import part

from tinyvad.backbones import get_backbone, phinet
from tinyvad.backbones.assign import random_weights
from tinyvad.backbones.blocks import parameters
from tinyvad.firmware_sim.memory import plan_tflm_greedy, tflite_buffers
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.passes import default_layers, normalise, truncate
from tinyvad.sizing import plan_network

# phinet_1.2_0.5_6_downsampling at 224 pixels: name, channels inside and of the gate, channels, height, parameters, MACs
TABLE = [
    ("stem", None, None, 56, 112, 307, 2.446),
    ("block2", 56, None, 32, 112, 2_472, 28.801),
    ("block3", 176, 32, 32, 56, 24_880, 93.288),
    ("block4", 168, 32, 32, 56, 23_752, 38.471),
    ("block5", 152, 24, 56, 28, 22_760, 23.007),
    ("block6", 240, 40, 112, 14, 62_864, 16.248),
    ("block7", 432, 72, 232, 7, 216_896, 14.647),
    ("block8", 792, 136, 232, 7, 593_672, 18.572),
    ("block9", 696, 120, 464, 4, 661_432, 13.346),
]
# alpha, beta, t_zero, layers, downsampling: parameters and 10^6 MACs at 224 pixels, 1000 classes
Preset = tuple[float, float, float, int, tuple[int, ...]]
PRESETS: dict[Preset, tuple[int, float]] = {
    (1.2, 0.5, 6, 7, (4, 5, 7)): (2_074_035, 249.29),
    (2.3, 0.75, 5, 7, (5, 7)): (2_527_219, 793.5),
    (0.8, 0.75, 8, 7, (4, 5, 7)): (1_972_891, 196.1),
    (1.3, 0.5, 7, 7, (4, 5, 7)): (2_775_083, 307.4),
    (0.9, 0.5, 4, 7, (4, 5, 7)): (897_267, 100.6),
    (0.9, 0.5, 4, 9, (4, 5, 7)): (2_402_107, 123.6),
}
# modules that are tapped: sum of their channels
TAPPED: dict[tuple[int, ...], int] = {(4, 5, 6): 200, (5, 6, 7): 400, (6, 7, 8): 576, (2, 6, 7): 376}


def node(graph: Graph, output: str) -> Node:
    found = graph.producer(output)
    assert found is not None, output
    return found


def reference(input_size: int = 224) -> Graph:
    return get_backbone("phinet-1.2-0.5-6").build(input_size=input_size)


def test_the_reference_codes_doctest() -> None:
    graph = phinet.build(divisor=1)  # its PhiNet((3, 224, 224)) rounds to multiples of 1
    assert parameters(graph) == 30_917
    # its 9,817,670 operations count 1,880 batch norm terms too: one for each scale and offset
    norms = sum(graph.constants[name].size for n in graph.nodes if n.op == "batch_norm" for name in n.inputs[1:])
    assert (graph.macs() + norms, norms) == (9_817_670, 1_880)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_totals_of_the_presets(preset: Preset) -> None:
    graph = phinet.build(*preset, include_top=True)
    count, mmacs = PRESETS[preset]
    assert parameters(graph) == count
    assert abs(graph.macs() / 1e6 - mmacs) < 0.051


def test_block_by_block() -> None:
    graph = reference()
    for name, middle, reduced, channels, height, count, mmacs in TABLE:
        assert graph.tensors[name].shape == (1, height, height, channels), name
        if middle is not None:
            assert graph.tensors[f"{name}.depthwise"].shape[3] == middle, name
        if reduced is not None:
            assert graph.tensors[f"{name}.excite.squeeze"].shape == (1, 1, 1, reduced), name
        found = part(graph, name)
        assert (found[0], round(found[1] / 1e6, 3)) == (count, mmacs), name
    assert graph.outputs == ["block9"]
    shortcuts = [n.output for n in graph.nodes if n.op == "add"]
    assert shortcuts == ["block4", "block8"]


@pytest.mark.parametrize("modules", TAPPED, ids=str)
def test_channels_of_the_taps_that_others_use(modules: tuple[int, ...]) -> None:
    graph = normalise(reference())
    cut = truncate(graph, [f"block{module}" for module in modules])
    assert sum(cut.tensors[name].shape[3] for name in cut.outputs) == TAPPED[modules]


def test_default_layers_of_the_normalised_network() -> None:
    graph = normalise(random_weights(reference(), seed=0))
    assert default_layers(graph) == ["block4", "block5", "block6"]
    assert {n.op for n in graph.nodes} == {
        "conv2d", "depthwise_conv2d", "hard_swish", "logistic", "mean", "mul", "add",
    }  # fmt: skip


def test_quirks_of_the_reference_code() -> None:
    for size, before in ((224, 0), (225, 1)):
        graph = reference(size)
        stem = node(graph, "stem.depthwise")
        assert stem.attributes["pads"] == (before, 1, before, 1)
        assert graph.tensors["stem"].shape[1] == -(-size // 2)
        assert stem.attributes["activation"] == "none" and graph.consumers(stem.output)[0].op == "conv2d"
    assert not [name for name in graph.constants if ".excite." in name and name.endswith(".bias")]
    gate = node(graph, "block3.excite.gate")
    assert gate.op == "logistic" and node(graph, "block3.excite.squeeze").op == "hard_swish"

    wide = phinet.build(conv5_percent=0.3, divisor=1)  # the last share above 0.7 of 7 ids: 5, 6 and 7, modules 7 to 9
    kernels = {i: wide.tensors[f"block{i}.depthwise.weights"].shape[1] for i in range(2, 10)}
    assert kernels == {2: 3, 3: 3, 4: 3, 5: 3, 6: 3, 7: 5, 8: 5, 9: 5}
    assert node(wide, "block7.depthwise.conv").attributes["pads"] == (1, 1, 1, 1)  # stride 2
    assert node(wide, "block8.depthwise.conv").attributes["pads"] == (2, 2, 2, 2)
    assert [wide.tensors[f"block{i}"].shape[1] for i in (6, 7, 8, 9)] == [28, 13, 13, 6]


def test_expansion_runs_from_t_zero_to_beta_t_zero() -> None:
    assert [round(phinet.expansion(i, 7, 0.5, 6), 3) for i in range(1, 8)] == [
        5.571, 5.143, 4.714, 4.286, 3.857, 3.429, 3.0,
    ]  # fmt: skip


def test_compatibility_needs_no_gates_and_no_curves() -> None:
    graph = normalise(phinet.build(compatibility=True))
    assert {n.op for n in graph.nodes} == {"conv2d", "depthwise_conv2d", "add"}
    assert {n.attributes["activation"] for n in graph.nodes} == {"none", "relu6"}


def test_biases_that_the_network_lacks_stay_zero() -> None:
    graph = random_weights(reference(), seed=0)
    lacking = [name for name in graph.constants if name.endswith(".no_bias")]
    assert len(lacking) == 1 + 2 * 7  # the stem's depthwise convolution, two convolutions a gate
    assert not any(graph.constants[name].any() for name in lacking)


def test_the_preset_for_small_chips_fits_its_word() -> None:
    for size, arena, mmacs in ((144, 176_256, 21), (128, 139_264, 17)):
        graph = phinet.build_mcu(size)
        layers = default_layers(normalise(graph))
        cut = truncate(normalise(graph), layers)
        assert [cut.tensors[name].shape[1:] for name in layers] == [
            (size // stride, size // stride, channels) for stride, channels in ((4, 16), (8, 32), (16, 56))
        ]
        assert round(cut.macs() / 1e6) == mmacs
        network = plan_network(cut)
        greedy = plan_tflm_greedy([replace(buffer, offset=None) for buffer in tflite_buffers(network.file)])
        assert greedy.head_bytes == arena <= 180_000  # as TFLM plans by itself
        assert network.arena.head_bytes == network.arena.lower_bound_bytes <= arena  # with the plan in the file
        reach = jump = 1  # pixels that the last tap sees
        for n in cut.nodes:
            if n.op in ("conv2d", "depthwise_conv2d"):
                reach += (cut.tensors[n.inputs[1]].shape[1] - 1) * jump
                jump *= n.attributes["stride"][0]
        assert (reach, jump) == (267, 16)


def test_names_are_the_same_at_every_size() -> None:
    small, large = phinet.build_mcu(96), phinet.build_mcu(160)
    assert small.activations == large.activations
    assert all(np.array_equal(small.constants[name], large.constants[name]) for name in small.constants)
