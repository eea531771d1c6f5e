"""MobileNetV3 against torchvision's published figures, the paper's formulas and onnxruntime."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_interpreter import run
from test_graph_onnx_import import Onnx, assert_same, ops

from tinyvad.backbones import mobilenet_v3
from tinyvad.backbones.assign import random_weights, with_weights_from
from tinyvad.backbones.blocks import bottleneck, conv_bn, parameters, squeeze_excite
from tinyvad.errors import InputError
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.onnx_import import import_onnx
from tinyvad.graph.passes import default_layers, normalise, resolve_layer, tap_candidates, truncate

# torchvision's model cards: parameters, 10^9 operations; the paper's tables say 2.5 and 5.4 M, 56 and 219 M
PUBLISHED = {"small": (2_542_856, 0.057), "large": (5_483_032, 0.217)}
# the paper's tables 1 and 2, what each bneck row says: output channels and size of its input
PAPER = {
    "small": "16@112 16@56 24@28 24@28 40@14 40@14 40@14 48@14 48@14 96@7 96@7 96@7 576@7",
    "large": "16@112 16@112 24@56 24@56 40@28 40@28 40@28 80@14 80@14 80@14 80@14 112@14 112@14 160@7 160@7 160@7 960@7",
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_totals_are_the_published_ones(variant: str) -> None:
    graph = mobilenet_v3.build(variant, include_top=True)
    assert (parameters(graph), round(graph.macs() / 1e9, 3)) == PUBLISHED[variant]


@pytest.mark.parametrize("variant", PAPER)
def test_shapes_are_the_papers(variant: str) -> None:
    graph = mobilenet_v3.build(variant)
    for index, text in enumerate(PAPER[variant].split()):
        channels, size = map(int, text.split("@"))
        assert graph.tensors[f"features.{index}"].shape == (1, size, size, channels)
    assert graph.outputs == [f"features.{len(PAPER[variant].split()) - 1}"]


def test_taps_of_the_normalised_network() -> None:
    graph = normalise(random_weights(mobilenet_v3.build("small"), seed=0))
    assert [candidate.name for candidate in tap_candidates(graph)] == [f"features.{i}" for i in range(1, 12)]
    assert default_layers(graph) == ["features.1", "features.3", "features.8"]
    assert resolve_layer(graph, "block:3") == "features.4"
    cut = truncate(graph, ["features.3"])
    assert cut.nodes[-1].output == "features.3" and cut.nodes[-1].op == "add"
    assert not any(name.startswith("features.4") for name in cut.constants)


def test_a_gated_block_when_normalised() -> None:
    graph = normalise(random_weights(mobilenet_v3.build("small"), seed=0))
    assert {node.op for node in graph.nodes} == {"conv2d", "depthwise_conv2d", "add", "mul", "mean", "hard_swish"}
    block = [node for node in graph.nodes if f"{node.output}.".startswith("features.5.")]
    assert [(node.op, node.output.removeprefix("features.5"), node.attributes.get("activation")) for node in block] == [
        ("conv2d", ".expand.norm", "none"),
        ("hard_swish", ".expand", None),
        ("depthwise_conv2d", ".depthwise.norm", "none"),
        ("hard_swish", ".depthwise", None),
        ("mean", ".excite.pool", None),
        ("conv2d", ".excite.squeeze", "relu"),
        ("conv2d", ".excite.gate", "relu6"),
        ("mul", ".excite", "none"),
        ("conv2d", ".project", "none"),
        ("add", "", "none"),
    ]
    assert np.all(graph.constants["features.5.excite.gate.bias"] == 3)
    assert not graph.constants["features.5.excite.squeeze.bias"].any()


def test_the_gate_is_six_times_a_hard_sigmoid(rng: np.random.Generator) -> None:
    b = GraphBuilder("gate", (1, 5, 5, 16))
    graph = random_weights(b.finish([squeeze_excite(b, b.input, "se", 8)]), seed=0)
    x = rng.normal(0, 50, (1, 5, 5, 16))
    squeezed = np.maximum(graph.constants["se.squeeze.weights"][:, 0, 0] @ x.mean((0, 1, 2)), 0)
    logits = graph.constants["se.gate.weights"][:, 0, 0] @ squeezed
    assert logits.min() < -3 < 3 < logits.max()  # both ends of the clip are reached
    hard_sigmoid = np.clip(logits / 6 + 0.5, 0, 1)  # PyTorch's
    np.testing.assert_allclose(run(graph, x)["se"], 6 * x * hard_sigmoid, rtol=1e-5, atol=1e-5)


def test_width_and_unknown_variant() -> None:
    graph = mobilenet_v3.build("large", width=0.75, input_size=96)
    assert graph.name == "mobilenet-v3-large-0.75" and graph.tensors["features.16"].shape == (1, 3, 3, 720)
    with pytest.raises(InputError, match=r"no MobileNetV3 called tiny; choose one of small, large"):
        mobilenet_v3.build("tiny")


def one_block() -> Graph:
    """A stem and a gated block with a shortcut."""
    b = GraphBuilder("one block", (1, 10, 10, 3))
    x = conv_bn(b, b.input, "features.0", 8, 3, 2, "hard_swish")
    excite = partial(squeeze_excite, channels=8)
    return b.finish([bottleneck(b, x, "features.1", 5, 24, 8, 1, "hard_swish", excite)])


def test_weights_of_a_file_with_hard_sigmoid_gates(tmp_path: Path) -> None:
    n = Onnx((1, 3, 10, 10))

    def conv(x: str, channels: int, out: int, kernel: int = 1, **more: Any) -> str:
        weights = n.random(out, 1 if "group" in more else channels, kernel, kernel)
        return n.add("Conv", x, weights, n.random(out), pads=[kernel // 2] * 4, **more)

    stem = n.add("HardSwish", conv("x", 3, 8, 3, strides=[2, 2]))
    deep = n.add("HardSwish", conv(n.add("HardSwish", conv(stem, 8, 24)), 24, 24, 5, group=24))
    squeezed = n.add("Relu", conv(n.add("GlobalAveragePool", deep), 24, 8))
    gate = n.add("HardSigmoid", conv(squeezed, 8, 24), alpha=1 / 6)
    n.add("Add", conv(n.add("Mul", gate, deep), 24, 8), stem, out="features.1")
    path = n.save(tmp_path, "features.1")

    graph = with_weights_from(one_block(), import_onnx(path))
    assert set(ops(graph)) == {"conv2d", "depthwise_conv2d", "hard_swish", "mean", "mul", "add"}
    assert_same(path, graph)
