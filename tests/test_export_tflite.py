"""The .tflite writer: padding lowered without changing a value, bytes that other readers and kernels agree with."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import reference_interpreter
import tflite
from flatbuffers.number_types import Int32Flags

from tinyvad.engines.litert import LitertEngine
from tinyvad.errors import InputError
from tinyvad.export.tflite import lower_pads, to_tflite
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.tflite_file import read_tflite


def window_graph(op: str, size: tuple[int, int], kernel: tuple[int, int], channels: int = 2, **attributes: Any) -> Graph:
    """One conv, depthwise or pool node on a (1, H, W, channels) map; weights are small whole numbers."""
    rng = np.random.default_rng(7)
    b = GraphBuilder("window", (1, *size, channels))
    inputs = [b.input]
    if op in ("conv2d", "depthwise_conv2d"):
        shape = (3, *kernel, channels) if op == "conv2d" else (1, *kernel, channels)
        out = shape[0] if op == "conv2d" else channels
        inputs.append(b.constant("w", rng.integers(-9, 10, shape).astype(np.float32)))
        inputs.append(b.constant("bias", rng.integers(-9, 10, out).astype(np.float32)))
    else:
        attributes["kernel"] = kernel
    return b.finish([b.add(op, inputs, "out", **attributes)])


def tflite_pads(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """SAME's padding as TFLite's ComputePaddingWithOffset has it: half of the total before, the rest behind."""
    out = (size + stride - 1) // stride
    total = max(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - size)
    return total // 2, total - total // 2


def assert_tflite_can_say(graph: Graph) -> None:
    """Every window op of ``graph`` pads as VALID or as SAME does, on both axes."""
    for node in graph.nodes:
        if "pads" not in node.attributes or node.op == "pad":
            continue
        size = graph.tensors[node.inputs[0]].shape[1:3]
        kernel = node.attributes.get("kernel") or graph.tensors[node.inputs[1]].shape[1:3]
        dilation = node.attributes.get("dilation", (1, 1))
        same = [tflite_pads(*axis) for axis in zip(size, kernel, node.attributes["stride"], dilation, strict=True)]
        assert node.attributes["pads"] in ((0, 0, 0, 0), (*same[0], *same[1]))


@pytest.mark.parametrize("op", ["conv2d", "depthwise_conv2d"])
def test_lowered_pads_keep_every_value(op: str) -> None:
    """All sizes 5 to 24, kernels 3 to 7, strides 1 and 2, pads 0 to 3 before and behind, against the plain sum."""
    rng = np.random.default_rng(0)
    kinds = {"valid": 0, "same": 0, "grown": 0, "pad": 0}
    cases = itertools.product(range(5, 25), (3, 5, 7), (1, 2), range(4), range(4))
    for i, (size, k, stride, before, after) in enumerate(cases):
        if size + before + after < k:
            continue
        # the other axis is one pixel wide, of which SAME and VALID are the same; every third case pads it as well
        pads = (before, after, 1, 1) if i % 3 == 0 else (before, after, 0, 0)
        kernel = (k, 3 if i % 3 == 0 else 1)
        graph = window_graph(op, (size, 1), kernel, stride=(stride, 1), pads=pads)
        lowered = lower_pads(graph)
        assert_tflite_can_say(lowered)
        x = rng.integers(-9, 10, (1, size, 1, 2)).astype(np.float64)
        wanted = reference_interpreter.run(graph, x)["out"]
        np.testing.assert_array_equal(reference_interpreter.run(lowered, x)["out"], wanted)
        grown = lowered.tensors[lowered.nodes[-1].inputs[1]].shape[1] > k
        is_same = any(lowered.nodes[-1].attributes["pads"])
        kinds["pad" if len(lowered.nodes) > 1 else "grown" if grown else "same" if is_same else "valid"] += 1
    assert min(kinds.values()) > 50, kinds


def test_as_few_zeros_as_possible() -> None:
    """No smaller kernel starts SAME's windows where the explicit pads do."""
    for size, k, stride, before, dilation in itertools.product(range(5, 25), (3, 5, 7), (1, 2, 3), range(4), (1, 2)):
        after = (-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size - before
        if after < 0:
            continue
        attributes = {"stride": (stride, stride), "pads": (before, after) * 2, "dilation": (dilation, dilation)}
        lowered = lower_pads(window_graph("depthwise_conv2d", (size, size), (k, k), 1, **attributes))
        fitting = [
            zeros
            for zeros in range(9)
            for front in range(zeros + 1)
            if tflite_pads(size, k + zeros, stride, dilation)[0] == before + front * dilation
        ]
        if lowered.nodes[0].op == "pad":
            assert not fitting
        elif any(lowered.nodes[0].attributes["pads"]):
            assert lowered.tensors[lowered.nodes[0].inputs[1]].shape[1:3] == (k + fitting[0],) * 2


def test_pytorch_stride_2_becomes_an_even_kernel() -> None:
    attributes = {"stride": (2, 2), "pads": (3, 3, 3, 3)}
    graph = window_graph("depthwise_conv2d", (16, 16), (7, 7), **attributes)
    (node,) = lower_pads(graph).nodes
    grown = lower_pads(graph).constants[node.inputs[1]]
    assert grown.shape == (1, 8, 8, 2)
    assert not grown[:, 7].any() and not grown[:, :, 7].any()
    np.testing.assert_array_equal(grown[:, :7, :7], graph.constants["w"])
    assert graph.constants["w"].shape == (1, 7, 7, 2)
    # on an odd size the padding is SAME's already
    odd = lower_pads(window_graph("depthwise_conv2d", (15, 15), (7, 7), **attributes))
    assert odd.constants["w"].shape == (1, 7, 7, 2) and len(odd.nodes) == 1


def test_shared_weights_grow_for_one_reader_only(rng: np.random.Generator) -> None:
    graph = window_graph("depthwise_conv2d", (8, 8), (3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    twin = graph.nodes[0].replace(output="twin").with_attributes(pads=(0, 0, 0, 0))
    tensors = {**graph.tensors, "twin": dataclasses.replace(graph.tensors["out"], name="twin", shape=(1, 3, 3, 2))}
    graph = graph.copy(nodes=[*graph.nodes, twin], tensors=tensors, outputs=["out", "twin"])
    lowered = lower_pads(graph)
    assert {array.shape for array in lowered.constants.values()} == {(1, 4, 4, 2), (1, 3, 3, 2), (2,)}
    x = rng.integers(-9, 10, (1, 8, 8, 2)).astype(np.float64)
    wanted, found = reference_interpreter.run(graph, x), reference_interpreter.run(lowered, x)
    for name in graph.outputs:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_dilated_and_two_dimensional_pads(rng: np.random.Generator) -> None:
    for _ in range(300):
        size, kernel = rng.integers(5, 14, 2), rng.integers(1, 6, 2)
        pads, dilation = rng.integers(0, 4, 4), rng.integers(1, 3, 2)
        stride = rng.integers(1, 4, 2)
        if any(size + pads.reshape(2, 2).sum(1) < dilation * (kernel - 1) + 1):
            continue
        attributes = {"stride": stride, "pads": pads, "dilation": dilation}
        attributes = {key: tuple(int(v) for v in value) for key, value in attributes.items()}
        op = "conv2d" if rng.random() < 0.5 else "depthwise_conv2d"
        graph = window_graph(op, (int(size[0]), int(size[1])), (int(kernel[0]), int(kernel[1])), **attributes)
        lowered = lower_pads(graph)
        assert_tflite_can_say(lowered)
        x = rng.integers(-9, 10, (1, *size, 2)).astype(np.float64)
        wanted = reference_interpreter.run(graph, x)["out"]
        np.testing.assert_array_equal(reference_interpreter.run(lowered, x)["out"], wanted)


@pytest.mark.parametrize("op", ["average_pool", "max_pool"])
@pytest.mark.parametrize("counted", [False, True])
def test_pools_are_lowered_or_refused(op: str, counted: bool, rng: np.random.Generator) -> None:
    refused = 0
    for size, k, stride, before, after in itertools.product(range(5, 12), (2, 3), (1, 2), range(2), range(2)):
        attributes: dict[str, Any] = {"stride": (stride, stride), "pads": (before, after, before, after)}
        if op == "average_pool":
            attributes["count_include_pad"] = counted
        graph = window_graph(op, (size, size), (k, k), **attributes)
        try:
            lowered = lower_pads(graph)
        except InputError as error:
            assert "out" in str(error) and f"{size}x{size}" in str(error)
            refused += 1
            continue
        assert_tflite_can_say(lowered)
        x = rng.integers(-9, 10, (1, size, size, 2)).astype(np.float64)
        wanted = reference_interpreter.run(graph, x)["out"]
        np.testing.assert_allclose(reference_interpreter.run(lowered, x)["out"], wanted, rtol=1e-12, atol=1e-12)
    assert (refused == 0) == (op == "average_pool" and counted)


def test_max_pool_after_relu_may_pad_with_zeros(rng: np.random.Generator) -> None:
    """ResNet's stem: 3x3 stride 2 pad 1 on an even size is not SAME, but zeros cannot win where nothing is negative."""
    b = GraphBuilder("stem", (1, 8, 8, 2))
    rectified = b.add("relu", [b.input], "rectified")
    pool = b.add("max_pool", [rectified], "out", kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1), activation="none")
    graph = b.finish([pool])
    assert [node.op for node in lower_pads(graph).nodes] == ["relu", "pad", "max_pool"]
    x = rng.normal(size=(1, 8, 8, 2)).astype(np.float32)
    (maps,) = LitertEngine(to_tflite(graph)).features(x)
    np.testing.assert_array_equal(maps, reference_interpreter.run(graph, x)["out"].astype(np.float32))


def float_network() -> Graph:
    """Every op that a float file can hold, two taps."""
    rng = np.random.default_rng(3)
    b = GraphBuilder("net", (1, 12, 10, 3), "image")

    def weights(name: str, *shape: int) -> str:
        return b.constant(name, rng.normal(0, 0.5, shape).astype(np.float32))

    x = b.add(
        "conv2d", [b.input, weights("w1", 8, 3, 3, 3), weights("b1", 8)], "stem",
        stride=(2, 2), pads=(1, 1, 1, 1), dilation=(1, 1), activation="relu6",
    )  # fmt: skip
    y = b.add(
        "depthwise_conv2d", [x, weights("w2", 1, 5, 5, 8), weights("b2", 8)], "dw",
        stride=(1, 1), pads=(4, 4, 4, 4), dilation=(2, 2), activation="relu",
    )  # fmt: skip
    z = b.add("add", [x, y], "sum", activation="none")
    gate = b.add("logistic", [b.add("mean", [z], "squeeze")], "gate")
    z = b.add("mul", [z, gate], "gated", activation="none")
    z = b.add("hard_swish", [z], "swish")
    pooled = b.add(
        "average_pool", [z], "pooled",
        kernel=(3, 3), stride=(1, 1), pads=(1, 1, 1, 1), count_include_pad=False, activation="none",
    )  # fmt: skip
    z = b.add("concat", [z, pooled], "both", axis=3)
    z = b.add("pad", [z], "framed", pads=(1, 0, 2, 3))
    z = b.add("max_pool", [z], "peaks", kernel=(2, 2), stride=(2, 2), pads=(0, 0, 0, 0), activation="none")
    z = b.add("resize_nearest", [z], "large", size=(6, 10))
    flat = b.add("reshape", [b.add("mean", [b.add("relu6", [z], "clipped")], "gap")], "flat", shape=(1, 16))
    head = b.add("fully_connected", [flat, weights("w3", 5, 16), weights("b3", 5)], "head", activation="relu")
    return b.finish(["sum", head, "large"])


def test_litert_computes_what_the_float_graph_means(rng: np.random.Generator) -> None:
    graph = float_network()
    x = rng.normal(size=(1, 12, 10, 3)).astype(np.float32)
    wanted = reference_interpreter.run(graph, x)
    for kernels in ("reference", "default"):
        maps = LitertEngine(to_tflite(graph), kernels).features(x)  # type: ignore[arg-type]
        for name, found in zip(graph.outputs, maps, strict=True):
            np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-4)


def test_same_graph_same_bytes_and_nothing_changed_in_it() -> None:
    graph = float_network()
    before = graph.copy()
    data = to_tflite(graph, "demo")
    assert data == to_tflite(graph, "demo")
    assert (graph.nodes, graph.outputs, set(graph.tensors)) == (before.nodes, before.outputs, set(before.tensors))
    assert all(graph.constants[name] is array for name, array in before.constants.items())


def test_the_file_says_what_readers_expect() -> None:
    graph = float_network()
    data = to_tflite(graph, "demo")
    assert data[4:8] == b"TFL3"
    model = tflite.Model.GetRootAs(data, 0)
    assert (model.Version(), model.Description()) == (3, b"demo")
    assert model.Buffers(0).DataLength() == 0
    start = np.frombuffer(data, np.uint8).ctypes.data
    for i in range(1, model.BuffersLength()):
        assert (model.Buffers(i).DataAsNumpy().ctypes.data - start) % 16 == 0
    for i in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(i)
        # not through the package's BuiltinCode(), which falls back on the old field
        assert code._tab.GetSlot(10, 0, Int32Flags) == code.DeprecatedBuiltinCode()
    file = read_tflite(data)
    assert [file.tensors[i].name for i in file.inputs] == graph.inputs
    assert [file.tensors[i].name for i in file.outputs] == graph.outputs
    made = [file.tensors[operator.outputs[0]].name for operator in file.operators]
    assert [name for name in made if name in graph.tensors] == [node.output for node in graph.nodes]
    order = [operator.outputs[0] for operator in file.operators]
    assert order == sorted(order)
    by_name = {tensor.name: tensor for tensor in file.tensors}
    for name in ("b1", "w2", "w3"):
        np.testing.assert_array_equal(by_name[name].data, graph.constants[name])
    versions = {operator.op: operator.version for operator in file.operators}
    assert versions["DEPTHWISE_CONV_2D"] == 2  # dilated
    assert versions["CONV_2D"] == versions["ADD"] == versions["PAD"] == 1


def quantized(graph: Graph, **quantizations: tuple[float, int]) -> Graph:
    """The graph with its activations int8 and the given (scale, zero point)."""
    tensors = dict(graph.tensors)
    for name, (scale, zero_point) in quantizations.items():
        quantization = Quantization.per_tensor(scale, zero_point)
        tensors[name] = dataclasses.replace(tensors[name], dtype="int8", quantization=quantization)
    return graph.copy(tensors=tensors)


def small_int8(op: str, x: tuple[float, int], out: tuple[float, int], **attributes: Any) -> Graph:
    b = GraphBuilder("one", (1, 4, 4, 2))
    inputs = [b.input, b.input] if op == "concat" else [b.input]
    return quantized(b.finish([b.add(op, inputs, "out", **attributes)]), input=x, out=out)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (small_int8("pad", (0.1, 3), (0.1, 4), pads=(1, 1, 1, 1)), "pad -> out: input must have the output's scale"),
        (small_int8("concat", (0.1, 3), (0.2, 3), axis=3), "concat -> out: input must have the output's scale"),
        (small_int8("relu6", (0.1, 3), (0.2, 3)), "relu6 -> out: input must have the output's scale"),
        (small_int8("logistic", (0.1, 3), (0.1, 3)), "logistic -> out: int8 output must have scale 1/256"),
    ],
)
def test_scales_that_kernels_would_ignore_are_refused(graph: Graph, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_tflite(graph)


def test_what_a_tflite_cannot_hold_is_named() -> None:
    b = GraphBuilder("bn", (1, 4, 4, 2))
    ones = b.constant("ones", np.ones(2, np.float32))
    graph = b.finish([b.add("batch_norm", [b.input, ones, ones], "normed")])
    with pytest.raises(InputError, match=r"normed to a \.tflite: fold it first"):
        to_tflite(graph)
    graph = small_int8("hard_swish", (0.1, 3), (0.1, 3))
    graph.tensors["out"] = dataclasses.replace(graph.tensors["out"], quantization=None)
    with pytest.raises(InputError, match="out is int8 without scale"):
        to_tflite(graph)
    graph.tensors["out"] = dataclasses.replace(graph.tensors["out"], dtype="float64")
    with pytest.raises(InputError, match="out is float64"):
        to_tflite(graph)


def test_names_that_the_writer_would_use_may_be_taken() -> None:
    b = GraphBuilder("names", (1, 6, 6, 2), "x_paddings")
    x = b.add("pad", [b.input], "x", pads=(1, 1, 1, 1))
    graph = b.finish([b.add("mean", [x], "x_axes")])
    names = [tensor.name for tensor in read_tflite(to_tflite(graph)).tensors]
    assert len(set(names)) == len(names) and {"x_paddings", "x", "x_axes"} < set(names)
