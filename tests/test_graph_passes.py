"""Passes keep what a graph computes (brute-force float64 interpreter) and find the layers that papers tap."""

from __future__ import annotations

import numpy as np
import pytest
from reference_interpreter import run

from tinyvad.errors import InputError
from tinyvad.graph import passes
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.taps import default_layers, layer_table, resolve_layer, tap_candidates


class Net(GraphBuilder):
    """A GraphBuilder with random weights and short words for the layers used here."""

    def __init__(self, size: int = 8, channels: int = 3, seed: int = 0, random: bool = True) -> None:
        super().__init__("net", (1, size, size, channels))
        self.rng = np.random.default_rng(seed)
        self.random = random

    def array(self, name: str, *shape: int) -> str:
        value = self.rng.normal(size=shape) if self.random else np.zeros(shape)
        return self.constant(name, value.astype(np.float32))

    def conv(
        self, x: str, out: int, name: str, kernel: int = 1, stride: int = 1, act: str = "none", pad: int | None = None
    ) -> str:
        p = kernel // 2 if pad is None else pad
        names = [self.array(f"{name}/w", out, kernel, kernel, self.shape(x)[3]), self.array(f"{name}/b", out)]
        return self.add(
            "conv2d", [x, *names], name, stride=(stride, stride), pads=(p, p, p, p), dilation=(1, 1), activation=act
        )

    def depthwise(self, x: str, name: str, kernel: int = 3, stride: int = 1, act: str = "none") -> str:
        channels, p = self.shape(x)[3], kernel // 2
        names = [self.array(f"{name}/w", 1, kernel, kernel, channels), self.array(f"{name}/b", channels)]
        attributes = {"stride": (stride, stride), "pads": (p, p, p, p), "dilation": (1, 1), "activation": act}
        return self.add("depthwise_conv2d", [x, *names], name, **attributes)

    def norm(self, x: str, name: str, act: str = "none") -> str:
        channels = self.shape(x)[-1]
        names = [self.array(f"{name}/s", channels), self.array(f"{name}/o", channels)]
        return self.add("batch_norm", [x, *names], name, activation=act)

    def affine(self, x: str, scale: float, offset: float, name: str, act: str = "none") -> str:
        channels = self.shape(x)[-1]
        names = [
            self.constant(f"{name}/s", np.full(channels, scale, np.float32)),
            self.constant(f"{name}/o", np.full(channels, offset, np.float32)),
        ]
        return self.add("batch_norm", [x, *names], name, activation=act)


def assert_equal_values(before: Graph, after: Graph) -> None:
    """Every value that ``after`` still names is what it was in ``before``; those that lost a factor have a new name."""
    image = np.random.default_rng(1).normal(size=before.tensors[before.inputs[0]].shape)
    expected, got = run(before, image), run(after, image)
    assert after.outputs == before.outputs
    for name in (name for name in after.activations if not name.endswith(":unscaled")):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    after.check()


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_batch_norm_folds_into_each_kind_of_producer() -> None:
    b = Net()
    x = b.norm(b.conv(b.input, 5, "conv", kernel=3), "n1", act="relu")
    x = b.norm(b.norm(b.depthwise(x, "dw"), "n2"), "n3")
    x = b.add("mean", [x], "mean")
    x = b.add("reshape", [x], "vector", shape=(1, 5))
    x = b.add("fully_connected", [x, b.array("fc/w", 4, 5), b.array("fc/b", 4)], "fc", activation="none")
    graph = b.finish([b.norm(x, "n4", act="relu6")])
    weights_before = {name: array.copy() for name, array in graph.constants.items()}
    folded = passes.fold_batchnorm(graph)
    assert ops(folded) == ["conv2d", "depthwise_conv2d", "mean", "reshape", "fully_connected"]
    assert [node.output for node in folded.nodes] == ["n1", "n3", "mean", "vector", "n4"]
    assert [node.attributes.get("activation") for node in folded.nodes] == ["relu", "none", None, None, "relu6"]
    assert all(array.dtype == np.float32 for array in folded.constants.values())
    assert_equal_values(graph, folded)
    assert len(graph.nodes) == 9 and ops(graph).count("batch_norm") == 4  # the graph that went in is untouched
    assert all(np.array_equal(graph.constants[name], array) for name, array in weights_before.items())


def test_shared_weights_are_not_folded_twice() -> None:
    b = Net()
    one = b.conv(b.input, 3, "one")
    attributes = dict(b.graph.nodes[-1].attributes)
    two = b.add("conv2d", [b.input, "one/w", "one/b"], "two", **attributes)
    graph = b.finish([b.add("add", [b.norm(one, "n1"), b.norm(two, "n2")], "sum", activation="none")])
    folded = passes.fold_batchnorm(graph)
    assert ops(folded) == ["conv2d", "conv2d", "add"]
    assert_equal_values(graph, folded)


def test_batch_norm_stays_where_it_cannot_fold() -> None:
    b = Net()
    tapped = b.conv(b.input, 3, "tapped")
    shared = b.conv(b.input, 3, "shared")
    active = b.conv(b.input, 3, "active", act="relu")
    joined = b.add("concat", [shared, active], "joined", axis=3)
    graph = b.finish([b.norm(tapped, "n1"), b.norm(shared, "n2"), b.norm(active, "n3"), b.norm(joined, "n4"), "tapped"])
    assert ops(passes.fold_batchnorm(graph)).count("batch_norm") == 4


def test_left_over_batch_norms_become_depthwise() -> None:
    b = Net()
    joined = b.add("concat", [b.input, b.conv(b.input, 2, "conv")], "joined", axis=3)
    graph = b.finish([b.norm(joined, "norm", act="relu")])
    simpler = passes.normalise(graph)
    assert ops(simpler) == ["conv2d", "concat", "depthwise_conv2d"]
    assert_equal_values(graph, simpler)


def test_activations_fuse_only_into_a_free_producer() -> None:
    b = Net()
    added = b.add("add", [b.input, b.input], "added", activation="none")
    r1 = b.add("relu", [added], "r1")
    tapped = b.conv(r1, 3, "tapped")
    r2 = b.add("relu6", [tapped], "r2")  # its producer is an output
    padded = b.add("pad", [r2], "padded", pads=(1, 1, 1, 1))
    r3 = b.add("relu", [padded], "r3")  # a pad carries no activation
    active = b.conv(r3, 3, "active", act="relu6")
    r4 = b.add("relu", [active], "r4")  # its producer is active already
    graph = b.finish([r4, tapped])
    fused = passes.fuse_activations(graph)
    assert [node.output for node in fused.nodes] == ["r1", "tapped", "r2", "padded", "r3", "active", "r4"]
    assert fused.nodes[0].op == "add" and fused.nodes[0].attributes["activation"] == "relu"
    assert_equal_values(graph, fused)


def test_quantised_activations_are_left_alone() -> None:
    b = Net()
    graph = b.finish([b.add("relu", [b.conv(b.input, 2, "conv")], "relu")])
    for name in ("conv", "relu"):
        tensor = graph.tensors[name]
        graph.tensors[name] = type(tensor)(name, tensor.shape, "int8", Quantization.per_tensor(0.1, -3))
    assert ops(passes.fuse_activations(graph)) == ["conv2d", "relu"]


@pytest.mark.parametrize("spelling", ["scaled gate", "scaled product", "scaled input"])
def test_hard_swish_is_recognised(spelling: str) -> None:
    b = Net()
    x = b.conv(b.input, 4, "x")
    gate = b.affine(x, 1, 3, "gate", act="relu6")
    if spelling == "scaled gate":
        y = b.add("mul", [x, b.affine(gate, 1 / 6, 0, "sixth")], "y", activation="none")
    elif spelling == "scaled product":
        y = b.affine(b.add("mul", [gate, x], "product", activation="none"), 1 / 6, 0, "y")
    else:
        y = b.add("mul", [b.affine(x, 1 / 6, 0, "sixth"), gate], "y", activation="none")
    graph = b.finish([y])
    fused = passes.fuse_hard_swish(graph)
    assert ops(fused) == ["conv2d", "hard_swish"]
    assert_equal_values(graph, fused)


@pytest.mark.parametrize("offset, sixth", [(2.0, 1 / 6), (3.0, 1 / 5)])
def test_other_gates_are_not_hard_swish(offset: float, sixth: float) -> None:
    b = Net()
    x = b.conv(b.input, 4, "x")
    gate = b.affine(x, 1, offset, "gate", act="relu6")
    graph = b.finish([b.add("mul", [x, b.affine(gate, sixth, 0, "sixth")], "y", activation="none")])
    fused = passes.normalise(graph)
    assert "hard_swish" not in ops(fused)
    assert_equal_values(graph, fused)


def test_gate_of_another_value_is_not_hard_swish() -> None:
    b = Net()
    x, other = b.conv(b.input, 4, "x"), b.conv(b.input, 4, "other")
    gate = b.affine(b.affine(other, 1, 3, "gate", act="relu6"), 1 / 6, 0, "sixth")
    graph = b.finish([b.add("mul", [x, gate], "y", activation="none")])
    fused = passes.normalise(graph)
    assert "hard_swish" not in ops(fused)
    assert_equal_values(graph, fused)


def gated(b: Net, reader: str = "conv2d", *, scale_behind: bool = False, vector: bool = False) -> str:
    """x * relu6(g + 3) / 6, read by a convolution or depthwise convolution."""
    x = b.conv(b.input, 4, "x")
    gate = b.conv(b.add("mean", [x], "mean"), 4, "g")
    gate = b.affine(gate, 1, 3, "six", act="relu6")
    if vector:
        gate = b.add("reshape", [gate], "flat", shape=(1, 4))
    if not scale_behind:
        gate = b.affine(gate, 1 / 6, 0, "gate")
    if vector:
        gate = b.add("reshape", [gate], "map", shape=(1, 1, 1, 4))
    y = b.add("mul", [x, gate], "product", activation="none")
    if scale_behind:
        y = b.affine(y, 1 / 6, 0, "gated")
    return b.conv(y, 5, "end", kernel=3) if reader == "conv2d" else b.depthwise(y, "end", act="relu")


@pytest.mark.parametrize("reader", ["conv2d", "depthwise_conv2d"])
@pytest.mark.parametrize("scale_behind", [False, True])
@pytest.mark.parametrize("vector", [False, True])
def test_hard_sigmoids_cost_nothing(reader: str, scale_behind: bool, vector: bool) -> None:
    b = Net()
    graph = b.finish([gated(b, reader, scale_behind=scale_behind, vector=vector)])
    simpler = passes.normalise(graph)
    moved = ["reshape", "reshape"] if vector else []
    assert ops(simpler) == ["conv2d", "mean", "conv2d", *moved, "mul", reader]
    gate = simpler.producer("six")
    assert gate is not None and gate.op == "conv2d" and gate.attributes["activation"] == "relu6"
    np.testing.assert_allclose(simpler.constants[gate.inputs[2]], graph.constants["g/b"] + 3, rtol=1e-6)
    weights = simpler.constants[simpler.nodes[-1].inputs[1]]
    np.testing.assert_allclose(weights, graph.constants["end/w"] / 6, rtol=1e-6)
    assert_equal_values(graph, simpler)
    assert "product" not in simpler.activations or scale_behind


def test_each_channel_of_a_gate_may_have_its_own_scale() -> None:
    b = Net()
    x = b.conv(b.input, 4, "x")
    gate = b.add("logistic", [b.conv(b.add("mean", [x], "mean"), 4, "g")], "sigmoid")
    names = [b.array("s", 4), b.constant("o", np.zeros(4, np.float32))]
    gate = b.add("batch_norm", [gate, *names], "gate", activation="none")
    product = b.add("mul", [b.add("mul", [x, gate], "p", activation="none"), x], "q", activation="none")
    graph = b.finish([b.conv(product, 3, "end")])
    simpler = passes.normalise(graph)
    assert ops(simpler) == ["conv2d", "mean", "conv2d", "logistic", "mul", "mul", "conv2d"]
    assert_equal_values(graph, simpler)


def test_shared_weights_behind_a_gate_are_scaled_for_one_reader() -> None:
    b = Net()
    end = gated(b)
    other = b.add("conv2d", ["x", "end/w", "end/b"], "other", **b.graph.nodes[-1].attributes)
    graph = b.finish([end, other])
    simpler = passes.fuse_hard_sigmoid(graph)
    np.testing.assert_array_equal(simpler.constants["end/w"], graph.constants["end/w"])
    assert len(simpler.nodes) == len(graph.nodes) - 1
    assert_equal_values(graph, simpler)


@pytest.mark.parametrize("why", ["tapped", "read twice", "clamped", "no weights behind", "squared", "offset", "not linear"])
def test_scales_that_cannot_move_stay(why: str) -> None:
    b = Net()
    x = b.conv(b.input, 4, "x")
    gate = b.affine(b.conv(b.add("mean", [x], "mean"), 4, "g"), 1, 3, "six", act="relu6")
    gate = b.affine(gate, 1 / 6, 1 if why == "offset" else 0, "gate", act="relu" if why == "not linear" else "none")
    operands = [gate, gate] if why == "squared" else [x, gate]
    y = b.add("mul", operands, "product", activation="relu" if why == "clamped" else "none")
    end = b.add("hard_swish", [y], "end") if why == "no weights behind" else b.conv(y, 3, "end")
    outputs = [end, "product"] if why == "tapped" else [end]
    if why == "read twice":
        outputs.append(b.add("add", [y, x], "sum", activation="none"))
    graph = b.finish(outputs)
    assert ops(passes.fuse_hard_sigmoid(graph)) == ops(graph)
    assert_equal_values(graph, passes.normalise(graph))


def test_pad_fuses_into_convolutions_only() -> None:
    b = Net()
    padded = b.add("pad", [b.input], "padded", pads=(0, 1, 2, 3))
    conv = b.conv(padded, 2, "conv", kernel=3, stride=2)
    depthwise = b.depthwise(padded, "depthwise", stride=2)
    pool = {"kernel": (2, 2), "stride": (1, 1), "pads": (0, 0, 0, 0), "activation": "none"}
    largest = b.add("max_pool", [padded], "largest", **pool)
    average = b.add("average_pool", [padded], "average", count_include_pad=False, **pool)
    graph = b.finish([conv, depthwise, largest, average])
    fused = passes.fuse_pad(graph)
    readers = {node.output: node.inputs[0] for node in fused.nodes}
    assert readers == {
        "padded": "input", "conv": "input", "depthwise": "input", "largest": "padded", "average": "padded"
    }  # fmt: skip
    assert fused.producer("conv").attributes["pads"] == (1, 2, 3, 4)  # type: ignore[union-attr]
    assert_equal_values(graph, fused)
    convs_only = passes.fuse_pad(passes.truncate(graph, ["conv", "depthwise"]))
    assert ops(convs_only) == ["conv2d", "depthwise_conv2d"] and "padded" not in convs_only.tensors


def test_stacked_pads_fuse() -> None:
    b = Net()
    padded = b.add("pad", [b.add("pad", [b.input], "p1", pads=(1, 0, 0, 0))], "p2", pads=(1, 0, 2, 0))
    graph = b.finish([b.conv(padded, 2, "conv", kernel=3, pad=0)])
    fused = passes.normalise(graph)
    assert ops(fused) == ["conv2d"] and fused.nodes[0].attributes["pads"] == (2, 0, 2, 0)
    assert_equal_values(graph, fused)


@pytest.mark.parametrize("zero_point, nodes", [(5, ["conv2d"]), (6, ["pad", "conv2d"])])
def test_quantised_pad_fuses_only_on_the_same_grid(zero_point: int, nodes: list[str]) -> None:
    b = Net()
    graph = b.finish([b.conv(b.add("pad", [b.input], "padded", pads=(1, 1, 1, 1)), 2, "conv", kernel=3, pad=0)])
    for name, zero in (("input", 5), ("padded", zero_point)):
        tensor = graph.tensors[name]
        graph.tensors[name] = type(tensor)(name, tensor.shape, "int8", Quantization.per_tensor(0.1, zero))
    assert ops(passes.fuse_pad(graph)) == nodes


def test_truncate_keeps_what_the_layers_need_in_their_order() -> None:
    b = Net()
    one = b.conv(b.input, 2, "one")
    two = b.conv(one, 3, "two")
    b.conv(two, 4, "three")
    graph = b.finish([b.conv(one, 5, "side")])
    cut = passes.truncate(graph, ["two", "one"])
    assert cut.outputs == ["two", "one"]
    assert [node.output for node in cut.nodes] == ["one", "two"]
    assert set(cut.constants) == {"one/w", "one/b", "two/w", "two/b"}
    assert set(cut.tensors) == {"input", "one", "two", *cut.constants}
    with pytest.raises(InputError, match=r"no layer tow; nearest: two.*tinyvad backbones PATH"):
        passes.truncate(graph, ["tow"])
    with pytest.raises(InputError, match="one is given twice"):
        passes.truncate(graph, ["one", "one"])
    with pytest.raises(InputError, match="at least one"):
        passes.truncate(graph, [])


@pytest.mark.parametrize("seed", range(12))
def test_normalise_keeps_the_values_of_random_networks(seed: int) -> None:
    b = Net(size=7, seed=seed)
    values = [b.conv(b.input, 4, "c")]
    for i in range(14):
        x = values[int(b.rng.integers(len(values)))]
        name = f"v{i}"
        match int(b.rng.integers(8)):
            case 0:
                y = b.norm(x, name)
            case 1:
                y = b.add(str(b.rng.choice(["relu", "relu6"])), [x], name)
            case 2:
                y = b.conv(b.add("pad", [x], f"{name}/p", pads=(1, 0, 0, 1)), 4, name, kernel=2, pad=0)
            case 3:
                y = b.depthwise(x, name)
            case 4:
                y = b.add("add", [x, values[-1]], name, activation="none")
            case 5:
                gate = b.affine(b.add("relu6", [b.affine(x, 1, 3, f"{name}/3")], f"{name}/6"), 1 / 6, 0, f"{name}/g")
                y = b.add("mul", [x, gate], name, activation="none")
            case 6:
                y = b.norm(b.conv(x, 4, f"{name}/c", kernel=3), name)
            case _:
                y = b.affine(x, 0.5, 0.25, name)
        values.append(y)
    graph = b.finish([values[-1], values[5]])
    simpler = passes.normalise(graph)
    assert len(simpler.nodes) <= len(graph.nodes) and "batch_norm" not in ops(simpler)
    assert_equal_values(graph, simpler)
    assert [node.output for node in passes.normalise(simpler).nodes] == [node.output for node in simpler.nodes]


# --- layers -------------------------------------------------------------------------------------------------------


def mobilenet_v2(size: int = 224) -> Graph:
    """MobileNetV2 (Sandler et al. 2018, table 2) at a small width; names as torchvision's features.i."""
    b = Net(size, random=False)
    x = b.conv(b.input, 8, "stem", kernel=3, stride=2, act="relu6")
    index = 0
    stages = [(1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 3, 2), (6, 8, 4, 2), (6, 12, 3, 1), (6, 20, 3, 2), (6, 40, 1, 1)]
    for t, c, n, s in stages:
        for i in range(n):
            index += 1
            name, before, stride = f"features.{index}", x, s if i == 0 else 1
            x = x if t == 1 else b.conv(x, t * b.shape(x)[3], f"{name}/expand", act="relu6")
            x = b.depthwise(x, f"{name}/dw", stride=stride, act="relu6")
            residual = stride == 1 and b.shape(before)[3] == c
            x = b.conv(x, c, f"{name}/project" if residual else name)
            x = b.add("add", [before, x], name, activation="none") if residual else x
    x = b.add("mean", [b.conv(x, 64, "features.18", act="relu6")], "pool")
    return b.finish([b.conv(x, 10, "head")])


def test_mobilenet_v2_taps_are_its_blocks() -> None:
    graph = mobilenet_v2()
    candidates = tap_candidates(graph)
    assert [candidate.name for candidate in candidates] == [f"features.{i}" for i in range(1, 18)]
    assert candidates[0] == ("features.1", 2, 2, 112, 112)
    assert candidates[16] == ("features.17", 32, 40, 7, 7)
    assert default_layers(graph) == ["features.3", "features.6", "features.13"]
    assert resolve_layer(graph, "block:12") == "features.13"
    cut = passes.truncate(graph, default_layers(graph))
    assert default_layers(cut) == cut.outputs  # truncation does not move the defaults


def test_strides_hold_where_sizes_are_odd() -> None:
    candidates = tap_candidates(mobilenet_v2(97))
    assert [c.stride for c in candidates] == [2, 4, 4, 8, 8, 8, *[16] * 7, *[32] * 4]
    assert [c.height for c in candidates if c.stride == 32] == [4] * 4


def test_mobilenet_v3_gates_and_expansions_are_no_block_ends() -> None:
    b = Net(32, random=False)
    x = b.add("hard_swish", [b.conv(b.input, 4, "stem", kernel=3, stride=2)], "stem/hs")
    for i, stride in enumerate([2, 1, 2]):
        before = x
        y = b.add("hard_swish", [b.conv(x, 8, f"b{i}/expand")], f"b{i}/hs")
        y = b.depthwise(y, f"b{i}/dw", stride=stride, act="relu")
        gate = b.conv(b.add("mean", [y], f"b{i}/mean"), 2, f"b{i}/reduce", act="relu")
        gate = b.add("logistic", [b.conv(gate, 8, f"b{i}/grow")], f"b{i}/gate")
        y = b.conv(b.add("mul", [y, gate], f"b{i}/scaled", activation="none"), 4, f"b{i}/project")
        x = b.add("add", [before, y], f"b{i}/add", activation="none") if stride == 1 else y
    graph = b.finish([b.add("hard_swish", [b.conv(x, 16, "last")], "last/hs")])
    assert [c.name for c in tap_candidates(graph)] == ["b0/project", "b1/add", "b2/project"]
    assert default_layers(graph) == ["b1/add", "b2/project"]


def resnet() -> Graph:
    """Four stages of two basic blocks (He et al. 2016), names as torchvision's modules in an ONNX export."""
    b = Net(64, random=False)
    x = b.conv(b.input, 4, "/conv1", kernel=7, stride=2, act="relu")
    x = b.add("max_pool", [x], "/maxpool", kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1), activation="none")
    for stage, channels in enumerate((4, 8, 16, 32), 1):
        for i in range(2):
            name, stride = f"/layer{stage}/layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = b.conv(x, channels, f"{name}/conv1", kernel=3, stride=stride, act="relu")
            y = b.conv(y, channels, f"{name}/conv2", kernel=3)
            x = b.conv(x, channels, f"{name}/downsample", stride=stride) if stride == 2 else x
            x = b.add("add", [y, x], f"{name}/relu_1", activation="relu")
    return b.finish([b.add("mean", [x], "/pool")])


def test_resnet_taps_are_its_blocks_and_modules_resolve() -> None:
    graph = resnet()
    assert len(tap_candidates(graph)) == 8
    assert default_layers(graph) == [f"/layer{i}/layer{i}.1/relu_1" for i in (1, 2, 3)]
    assert resolve_layer(graph, "layer2") == "/layer2/layer2.1/relu_1"
    assert resolve_layer(graph, "layer2/layer2.0") == "/layer2/layer2.0/relu_1"
    assert resolve_layer(graph, "block:7") == "/layer4/layer4.1/relu_1"
    assert resolve_layer(graph, "logits", {"logits": "/pool"}) == "/pool"
    with pytest.raises(InputError, match="block:0 to block:7"):
        resolve_layer(graph, "block:8")
    with pytest.raises(InputError, match="no layer input"):
        resolve_layer(graph, "input")
    with pytest.raises(InputError, match="no layer layer;"):
        resolve_layer(graph, "layer")


def test_plain_networks_have_a_block_a_layer() -> None:
    b = Net(32, random=False)
    x = b.input
    for i in range(5):
        x = b.conv(x, 4, f"conv{i}", kernel=3, act="relu")
        x = b.add("max_pool", [x], f"pool{i}", kernel=(2, 2), stride=(2, 2), pads=(0,) * 4, activation="none")
    graph = b.finish([x])
    assert [c.name for c in tap_candidates(graph)] == [f"conv{i}" for i in range(5)]
    assert default_layers(graph) == ["conv2", "conv3", "conv4"]


def test_no_default_layers_is_an_input_error() -> None:
    b = Net(8)
    with pytest.raises(InputError, match=r"no block ends at stride 4, 8 or 16.*--layers"):
        default_layers(b.finish([b.conv(b.input, 2, "conv")]))


def test_long_names_are_offered_by_number() -> None:
    b = Net(8)
    graph = b.finish([b.conv(b.input, 2, "x" * 100)])
    with pytest.raises(InputError, match="nearest: block:0;"):
        resolve_layer(graph, "x" * 99)


def test_layer_table_counts_what_the_graph_counts() -> None:
    graph = mobilenet_v2(96)
    rows = layer_table(graph)
    assert sum(row.macs for row in rows) == graph.macs()
    assert sum(row.parameters for row in rows) == graph.parameters()
    assert rows[0] == ("stem", "conv2d", (1, 48, 48, 8), 2, 48 * 48 * 8 * 27, 8 * 27 + 8, None)
    assert [row.name for row in rows if row.block == 2] == ["features.3"]
    assert rows[-1].stride is None  # after global pooling
