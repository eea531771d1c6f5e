"""Backbone definitions against published tables, onnxruntime and closed forms."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from reference_interpreter import run
from scipy.ndimage import correlate

from tinyvad.backbones import (
    BACKBONES,
    BackboneInfo,
    filter_bank,
    get_backbone,
    list_backbones,
    mcunet,
    mobilenet_v2,
    mobilenet_v3,
)
from tinyvad.backbones.assign import random_weights, with_weights, with_weights_from
from tinyvad.backbones.blocks import divisible, parameters
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import default_layers, fold_batchnorm

# network: (parameters, 10^6 multiply-accumulates), MCUNet's README and its configurations, ImageNet head included
MCUNETS = {
    "in0": (749_840, 6.364),
    "in1": (636_232, 12.790),
    "in2": (729_392, 67.287),
    "in3": (737_408, 81.786),
    "in4": (1_732_640, 125.874),
}

# MCUNet-in3 at 176 pixels: name, height out, parameters, multiply-accumulates
IN3 = [
    ("stem", 88, 464, 3_345_408),
    ("block0", 88, 320, 2_106_368),
    ("block1", 44, 1_880, 4_507_008),
    ("block2", 44, 3_632, 6_350_080),
    ("block3", 44, 6_832, 12_545_280),
    ("block4", 44, 3_936, 7_062_528),
    ("block5", 22, 5_568, 4_375_360),
    ("block6", 22, 9_288, 4_239_840),
    ("block7", 22, 9_288, 4_239_840),
    ("block8", 11, 9_320, 2_105_400),
    ("block9", 11, 32_000, 3_746_160),
    ("block10", 11, 17_520, 2_032_800),
    ("block11", 11, 23_496, 2_734_600),
    ("block12", 11, 35_856, 4_210_800),
    ("block13", 11, 26_256, 3_049_200),
    ("block14", 6, 45_408, 2_761_344),
    ("block15", 6, 117_792, 4_164_480),
    ("block16", 6, 78_912, 2_778_624),
    ("block17", 6, 148_640, 5_270_400),
    ("classifier", 1, 161_000, 160_000),
]

# MobileNetV2 at 224 pixels: features index, channels, height, cumulative 10^6 MACs, cumulative parameters
MOBILENET_V2 = [
    (0, 32, 112, 10.84, 928),
    (1, 16, 112, 20.87, 1_824),
    (2, 24, 56, 50.08, 6_960),
    (3, 24, 56, 75.82, 15_792),
    (4, 32, 28, 91.28, 25_792),
    (5, 32, 28, 102.27, 40_640),
    (6, 32, 28, 113.26, 55_488),
    (7, 64, 14, 120.82, 76_544),
    (8, 64, 14, 131.13, 130_816),
    (9, 64, 14, 141.45, 185_088),
    (10, 64, 14, 151.76, 239_360),
    (11, 96, 14, 164.48, 305_984),
    (12, 96, 14, 187.17, 424_256),
    (13, 96, 14, 209.86, 542_528),
    (14, 160, 7, 225.47, 697_792),
    (17, 320, 7, 279.42, 1_811_712),
]


def part(graph: Graph, name: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the layers called ``name`` or ``name.something``."""
    nodes = [node for node in graph.nodes if node.output == name or node.output.startswith(f"{name}.")]
    names = {name for node in nodes for name in node.inputs} & {*graph.constants}
    inside = graph.copy(nodes=nodes, constants={name: graph.constants[name] for name in names})
    return parameters(inside), inside.macs()


@pytest.mark.parametrize("net", MCUNETS)
def test_mcunet_totals_are_the_published_ones(net: str) -> None:
    graph = mcunet.build(net, include_top=True)
    assert parameters(graph) == MCUNETS[net][0]
    assert round(graph.macs() / 1e6, 3) == MCUNETS[net][1]


def test_mcunet_in3_block_by_block() -> None:
    graph = mcunet.build("in3", include_top=True)
    for name, height, count, macs in IN3:
        assert part(graph, name) == (count, macs), name
        assert graph.tensors[name].shape[1] == height or name == "classifier"


def test_mcunet_table_is_the_published_configuration(shared: Path) -> None:
    for net, row in mcunet.table().items():
        config = json.loads((shared / "reference" / "mcunet_configs" / f"{net}.json").read_text())
        graph = mcunet.build(net)
        assert (row["resolution"], row["stem"]) == (config["resolution"], config["first_conv"]["out_channels"])
        for i, (mine, block) in enumerate(zip(row["blocks"], config["blocks"], strict=True)):
            conv = block["mobile_inverted_conv"]
            assert mine == [conv[key] for key in ("kernel_size", "expand_ratio", "out_channels", "stride")]
            producer = graph.producer(f"block{i}")
            assert producer is not None and (producer.op == "add") == (block["shortcut"] is not None)


def test_mobilenet_v2_cumulative_table() -> None:
    graph = mobilenet_v2.build()
    counted, total_parameters, total_macs = -1, 0, 0
    for index, channels, height, mmacs, count in MOBILENET_V2:
        while counted < index:
            counted += 1
            more_parameters, more_macs = part(graph, f"features.{counted}")
            total_parameters, total_macs = total_parameters + more_parameters, total_macs + more_macs
        assert graph.tensors[f"features.{index}"].shape == (1, height, height, channels)
        assert total_parameters == count
        assert abs(total_macs / 1e6 - mmacs) < 0.006


def test_mobilenet_v2_totals() -> None:
    assert parameters(mobilenet_v2.build(include_top=True)) == 3_504_872  # torchvision
    narrow = mobilenet_v2.build(0.35, 144, include_top=True, head_channels=448)
    assert (parameters(narrow), round(narrow.macs() / 1e6, 2)) == (750_280, 23.50)


def test_channel_rule() -> None:
    assert [divisible(c) for c in (3, 8, 11.2, 12, 33.6, 22.4, 27.2)] == [8, 8, 16, 16, 32, 24, 32]


@pytest.mark.parametrize("info", list_backbones(), ids=lambda info: info.name)
def test_listed_backbones_keep_their_word(info: BackboneInfo) -> None:
    graph = info.build(input_size=info.input_size)
    assert graph.inputs == ["input"] and graph.tensors["input"].shape == (1, info.input_size, info.input_size, 3)
    heights = [graph.tensors[layer].shape[1] for layer in info.layers]
    strides = (8, 16) if info.name == "mobilenet-v3-small" else (4, 8, 16)
    assert heights == [info.input_size // stride for stride in strides]
    if not info.built_in:
        assert list(info.layers) == default_layers(fold_batchnorm(graph))[-len(strides) :]
        full = info.build(input_size=info.input_size, include_top=True)
        started = {name: array.flat[0] for name, array in full.constants.items() if array.any()}
        assert set(started.values()) <= {3} and all(name.endswith("gate.bias") for name in started)
    else:
        full = graph
        assert all(array.any() for name, array in full.constants.items() if name.endswith("weights"))
    assert parameters(full) == info.parameters
    assert round(full.macs() / 1e6, 3) == info.mmacs


def test_names() -> None:
    assert list(BACKBONES) == [info.name for info in list_backbones()]
    assert get_backbone("mobilenet_v2") is BACKBONES["mobilenet-v2"]
    with pytest.raises(InputError, match=r"resnet.*filter-bank"):
        get_backbone("resnet")
    with pytest.raises(InputError, match=r"in9.*in0"):
        mcunet.build("in9")


def test_placeholders_occupy_no_memory() -> None:
    for graph in (mcunet.build("in4", include_top=True), mobilenet_v3.build("small", include_top=True)):
        for array in graph.constants.values():
            assert array.strides == (0,) * array.ndim


def test_inner_names() -> None:
    values = mcunet.build("in3").activations
    assert {"stem", "block0", "block0.depthwise", "block3.expand", "block3.depthwise", "block3.project"} <= {*values}
    assert not {"block0.expand", "block0.project", "block5.project"} & {*values}


def test_random_weights_are_he_initialised() -> None:
    graph = random_weights(mcunet.build("in3"), seed=1)
    weights = graph.constants["block17.project.weights"]  # (160, 1, 1, 480)
    assert abs(weights.std() / np.sqrt(2 / 480) - 1) < 0.02 and abs(weights.mean()) < 1e-3
    depthwise = graph.constants["block15.depthwise.weights"]  # (1, 7, 7, 480)
    assert abs(depthwise.std() / np.sqrt(2 / 49) - 1) < 0.02
    assert np.all(graph.constants["block3.expand.scale"] == 1) and not graph.constants["block3.expand.bias"].any()
    assert not graph.constants["block3.expand.offset"].any()
    again = random_weights(mcunet.build("in3"), seed=1)
    assert all(np.array_equal(array, again.constants[name]) for name, array in graph.constants.items())


def test_weights_by_name() -> None:
    donor = random_weights(mcunet.build("in0"), seed=0)
    graph = mcunet.build("in0", weights=donor.constants)
    assert all(np.array_equal(array, donor.constants[name]) for name, array in graph.constants.items())
    with pytest.raises(InputError, match=r"no array stem\.bias \(24,\)"):
        with_weights(graph, {"stem.weights": donor.constants["stem.weights"]})
    with pytest.raises(InputError, match=r"stem\.weights has shape \(2, 2\), the definition \(24, 3, 3, 3\)"):
        with_weights(graph, {"stem.weights": np.zeros((2, 2))})


def test_weights_from_a_graph() -> None:
    donor = random_weights(mcunet.build("in0", include_top=True), seed=0)
    graph = with_weights_from(mcunet.build("in0"), donor)  # the donor's head is ignored
    assert {node.op for node in graph.nodes} == {"conv2d", "depthwise_conv2d", "add"}
    by_output = {node.output: node for node in graph.nodes}
    for name in ("stem", "block3.depthwise", "block14"):
        weights = donor.constants[f"{name}.project.weights" if name == "block14" else f"{name}.weights"]
        assert np.array_equal(graph.constants[by_output[name].inputs[1]], weights)


def test_weights_from_another_network_name_the_layer() -> None:
    other = random_weights(mcunet.build("in4", input_size=176), seed=0)
    with pytest.raises(InputError, match=r"layer 0 is stem, conv2d \(16, 3, 3, 3\).*conv2d \(32, 3, 3, 3\)"):
        with_weights_from(mcunet.build("in3"), other)
    same = random_weights(mcunet.build("in3"), seed=0)  # padded as TFLite's SAME, one pixel later
    same.nodes[0] = same.nodes[0].with_attributes(pads=(0, 1, 0, 1))
    with pytest.raises(InputError, match=r"layer 0 is stem.*pads \(1, 1, 1, 1\).*pads \(0, 1, 0, 1\)"):
        with_weights_from(mcunet.build("in3"), same)
    short = random_weights(mcunet.build("in3"), seed=0)
    short = short.copy(nodes=short.nodes[:4], outputs=[short.nodes[3].output])
    with pytest.raises(InputError, match=r"layer 2 is block0, conv2d .* no layer at all"):
        with_weights_from(mcunet.build("in3"), short)


def test_mcunet_in3_with_the_published_weights_equals_onnxruntime(shared: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx_import = pytest.importorskip("tinyvad.graph.onnx_import")
    path = shared / "weights" / "mcunet_in3_imagenet_f32.onnx"
    size = 72  # stride 2 five times, odd on the way: 36, 18, 9, 5, 3
    graph = with_weights_from(mcunet.build("in3", size), onnx_import.import_onnx(path, input_size=size))
    image = np.random.default_rng(0).normal(0, 1, (1, size, size, 3)).astype(np.float32)
    values = run(graph, image)

    model = onnx.load(path)
    theirs = {"stem": "/first_conv/Clip_output_0"}
    for i in range(18):  # a block's value is the last that its module makes
        theirs[f"block{i}"] = [n.output[0] for n in model.graph.node if n.name.startswith(f"/blocks.{i}/")][-1]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in theirs.values())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(list(theirs.values()), {"image": image.transpose(0, 3, 1, 2)})
    for mine, value in zip(theirs, expected):
        np.testing.assert_allclose(values[mine].transpose(0, 3, 1, 2), value, rtol=1e-3, atol=1e-3, err_msg=mine)


# The filter bank


def test_filter_bank_fits_small_chips() -> None:
    graph = filter_bank.build(128)
    sizes = [int(np.prod(graph.tensors[name].shape)) for name in graph.activations]  # int8: a byte a value
    assert max(a + b for a, b in pairwise(sizes)) < 160_000
    assert graph.parameters() < 30_000 and graph.macs() < 30e6
    assert [graph.tensors[f"block{i}"].shape for i in (1, 2, 3)] == [
        (1, 32, 32, 27),
        (1, 16, 16, 33),
        (1, 8, 8, 39),
    ]
    assert {node.op for node in graph.nodes} == {"conv2d", "depthwise_conv2d"}
    assert not any(array.any() for name, array in graph.constants.items() if name.endswith("bias"))


def test_gaussian_derivatives_on_polynomials() -> None:
    y, x = np.mgrid[-3.0:4.0, -3.0:4.0]
    filters = filter_bank.gaussian_derivatives()
    answers = {name: [(window * p).sum() for p in (x, y, x * x, x * y, y * y)] for name, window in filters.items()}
    assert abs(filters["g"].sum() - 1) < 1e-12
    for name, window in filters.items():
        assert name == "g" or abs(window.sum()) < 1e-12
    assert answers["gx"][0] > 1 and np.allclose(answers["gx"][1:], 0)
    assert np.allclose(answers["gx"][0], answers["gy"][1])
    assert answers["gxx"][2] > 1 and np.allclose(np.array(answers["gxx"])[[0, 1, 3]], 0)
    assert answers["gxy"][3] > 1 and np.allclose(np.array(answers["gxy"])[[0, 1, 2, 4]], 0)


def test_filters_are_steered_to_their_angle() -> None:
    filters = filter_bank.gaussian_derivatives()
    y, x = np.mgrid[-3.0:4.0, -3.0:4.0]
    for k in range(3):
        along = x * np.cos(np.pi * k / 3) + y * np.sin(np.pi * k / 3)
        for kind, wave in (("edge", np.sin(along)), ("line", -np.cos(1.4 * along))):
            answers = []
            for j in range(3):
                terms = filter_bank.responses()[f"{kind}{j}"].items()
                answers.append(abs(sum(weight * (filters[key] * wave).sum() for key, weight in terms)))
            assert int(np.argmax(answers)) == k and 0.3 < answers[k] <= 2


def test_filter_bank_stem_keeps_the_signed_value(rng: np.random.Generator) -> None:
    image = rng.uniform(-2, 2, (1, 64, 64, 3)).astype(np.float32)
    stem = run(filter_bank.build(64), image)["stem"][0]
    y, x = np.mgrid[-3:4, -3:4]
    gaussian = np.exp(-(x**2 + y**2) / 2)
    gaussian /= gaussian.sum()
    red, green, blue = image[0].transpose(2, 0, 1).astype(np.float64)
    planes = ((red + green + blue) / 3, (red - green) / 2, (red + green) / 4 - blue / 2)
    for channel, plane in enumerate(planes):
        expected = 3 * correlate(plane, gaussian, mode="constant")[::2, ::2]
        np.testing.assert_allclose(stem[..., 2 * channel] - stem[..., 2 * channel + 1], expected, atol=1e-4)


def test_filter_bank_on_a_flat_grey_image() -> None:
    values = run(filter_bank.build(128), np.full((1, 128, 128, 3), 0.5, np.float32))
    for name, margin in (("stem", 2), ("block1", 4), ("block2", 5)):  # cells that the border doesn't reach
        inner = values[name][0, margin:-margin, margin:-margin]
        np.testing.assert_allclose(inner[..., 0], 1.5, atol=1e-5)
        np.testing.assert_allclose(inner[..., 1:], 0, atol=1e-5)


def test_filter_bank_mirrors_its_angles(rng: np.random.Generator) -> None:
    image = rng.uniform(-2, 2, (1, 65, 65, 3)).astype(np.float32)  # odd: the grids of a mirrored image coincide
    graph = filter_bank.build(65)
    straight, mirrored = run(graph, image), run(graph, image[:, :, ::-1])
    # opponent 0..5; angle k: edge+ edge- line+ line- from 6 + 4k; second order+- from 18 + 2k; moduli in threes.
    # A mirror turns 0 degrees into 180 (edges change sign) and swaps 60 and 120.
    order = [*range(6), 7, 6, 8, 9, 14, 15, 16, 17, 10, 11, 12, 13]
    for name, channels in (("stem", 18), ("block1", 27)):
        full = order if name == "stem" else [*order, 18, 19, 22, 23, 20, 21, 24, 26, 25]
        assert len(full) == channels
        np.testing.assert_allclose(mirrored[name], straight[name][:, :, ::-1][..., full], atol=1e-4)


def test_filter_bank_answers_stay_in_range_and_grey_has_no_colour(rng: np.random.Generator) -> None:
    grey = np.repeat(rng.uniform(-2, 2, (1, 64, 64, 1)), 3, axis=3).astype(np.float32)
    values = run(filter_bank.build(64), grey)
    for name in ("block1", "block2", "block3"):
        assert values[name].min() >= 0 and values[name].max() <= 6
        assert np.abs(values[name][..., 2:6]).max() < 1e-5
        assert (values[name][..., 6:].max(axis=(0, 1, 2)) > 0).all()
