"""Imported networks compute what onnxruntime computes on the original file.

Small networks are built with onnx.helper the way PyTorch and tf2onnx spell them, and run by the brute-force
interpreter; the real files of ../shared are exported again and run by onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from reference_interpreter import run

from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.ir import Graph
from tinyvad.graph.onnx_import import guess_preprocessing, import_onnx, load_onnx
from tinyvad.graph.taps import default_layers, tap_candidates


class Onnx:
    """Collects ONNX nodes; ``x`` is the image input, (1, 3, 16, 16) unless told."""

    def __init__(
        self, shape: tuple[Any, ...] = (1, 3, 16, 16), opset: int = 17, dtype: int = TensorProto.FLOAT
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("x", dtype, list(shape))
        self.opset = opset

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"const{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def random(self, *shape: int, low: float = -1.0) -> str:
        return self.const(self.rng.uniform(low, 1, shape))

    def add(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"node/{out}", **attributes))
        return out

    def conv(
        self, x: str, channels: int, out: int, kernel: int = 1, stride: int = 1, group: int = 1, **more: Any
    ) -> str:
        if "auto_pad" not in more:
            more.setdefault("pads", [kernel // 2] * 4)
        weights = self.random(out, channels // group, kernel, kernel)
        return self.add("Conv", x, weights, kernel_shape=[kernel] * 2, strides=[stride] * 2, group=group, **more)

    def norm(self, x: str, channels: int) -> str:
        parameters = [self.random(channels, low=0.5), self.random(channels), self.random(channels)]
        return self.add("BatchNormalization", x, *parameters, self.random(channels, low=0.2), epsilon=1e-3)

    def relu6(self, x: str) -> str:
        return self.add("Clip", x, self.const(0), self.const(6))

    def model(self, *outputs: str, **metadata: str) -> onnx.ModelProto:
        described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", [self.input], described, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        helper.set_model_props(model, metadata)
        return model

    def save(self, folder: Path, *outputs: str, **metadata: str) -> Path:
        path = folder / "net.onnx"
        onnx.save(self.model(*outputs, **metadata), str(path))
        return path


def oracle(path: Path, names: list[str], x: np.ndarray) -> list[np.ndarray]:
    """onnxruntime's values of ``names``, whether they are outputs of the file or not."""
    model = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: x}))


def nhwc(value: np.ndarray) -> np.ndarray:
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def assert_same(path: Path, graph: Graph, image: np.ndarray | None = None, nchw: bool = True) -> None:
    """Every output of ``graph`` equals the file's value of that name (whose own layout is ``nchw`` or NHWC)."""
    shape = graph.tensors[graph.inputs[0]].shape
    if image is None:
        image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    got = run(graph, image)
    expected = oracle(path, graph.outputs, image.transpose(0, 3, 1, 2) if nchw else image)
    for name, value in zip(graph.outputs, expected):
        close(got[name], nhwc(value) if nchw else value)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


# --- whole networks as the exporters write them -------------------------------------------------------------------


def test_resnet_as_pytorch_exports_it(tmp_path: Path) -> None:
    n = Onnx(("batch", 3, "height", "width"))
    x = n.add("Relu", n.norm(n.conv("x", 3, 4, 7, 2), 4))
    x = n.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for i, stride in enumerate((1, 2)):
        y = n.add("Relu", n.norm(n.conv(x, 4, 4, 3, stride), 4))
        y = n.norm(n.conv(y, 4, 4, 3), 4)
        skip = n.norm(n.conv(x, 4, 4, 1, stride), 4) if stride == 2 else x
        x = n.add("Relu", n.add("Add", y, skip), out=f"/layer{i + 1}/layer{i + 1}.0/relu/Relu_output_0")
    x = n.add("Flatten", n.add("GlobalAveragePool", x), axis=1)
    n.add("Gemm", x, n.random(5, 4), n.random(5), out="logits", transB=1, alpha=0.5, beta=2.0)
    path = n.save(tmp_path, "logits")
    taps = ["layer1", "layer2", "logits"]
    result = load_onnx(path, 32, taps)
    assert result.graph.outputs[0] == "/layer1/layer1.0/relu/Relu_output_0"
    assert result.skipped == [] and result.preprocessing.mean == (0.485, 0.456, 0.406)
    assert ops(result.graph).count("conv2d") == 6 and "batch_norm" not in ops(result.graph)
    assert [c.stride for c in tap_candidates(result.graph)] == [4, 8]
    assert_same(path, result.graph)
    assert_same(path, import_onnx(path, (33, 50), taps))  # another size, not square
    with pytest.raises(InputError, match="no fixed height and width; give --image-size"):
        import_onnx(path)


def hard_sigmoid(n: Onnx, x: str, spelling: str) -> str:
    """relu6(x + 3) / 6 as exporters spell it; torchvision and timm write "op" from opset 14 on, and "divided" before."""
    if spelling == "op":
        return n.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    gate = n.relu6(n.add("Add", x, n.const(3)))
    return n.add("Div", gate, n.const(6)) if spelling == "divided" else n.add("Mul", gate, n.const(1 / 6))


def hard_swish(n: Onnx, x: str, spelling: str) -> str:
    if spelling == "op":
        return n.add("HardSwish", x)
    if spelling == "product first":
        return n.add("Div", n.add("Mul", x, n.relu6(n.add("Add", x, n.const(3)))), n.const(6))
    return n.add("Mul", x, hard_sigmoid(n, x, spelling))


@pytest.mark.parametrize(
    ("swish", "gate"),
    [("op", "op"), ("divided", "divided"), ("multiplied", "multiplied"), ("product first", "op"), ("op", "multiplied")],
)
@pytest.mark.parametrize("biases", [True, False])
def test_mobilenet_v3_as_pytorch_exports_it(tmp_path: Path, swish: str, gate: str, biases: bool) -> None:
    """Each gate ends as ReLU6 of its convolution, with the 3 in the bias and the 1/6 in the projection's weights."""
    n = Onnx(opset=17 if "op" in (swish, gate) else 13)

    def pointwise(x: str, channels: int, out: int) -> str:
        return n.add("Conv", x, n.random(out, channels, 1, 1), *([n.random(out)] if biases else []))

    x = hard_swish(n, n.norm(n.conv("x", 3, 4, 3, 2), 4), swish)
    for i, stride in enumerate((1, 2)):
        y = hard_swish(n, n.norm(n.conv(x, 4, 8), 8), swish)
        y = n.add("Relu", n.norm(n.conv(y, 8, 8, 5, stride, group=8), 8))
        squeezed = n.add("ReduceMean", y, axes=[2, 3], keepdims=1) if i else n.add("GlobalAveragePool", y)
        excited = pointwise(n.add("Relu", pointwise(squeezed, 8, 2)), 2, 8)
        factor = hard_sigmoid(n, excited, gate)
        y = n.add("Mul", factor, y) if i else n.add("Mul", y, factor)
        y = n.norm(n.conv(y, 8, 4), 4)
        x = n.add("Add", x, y, out="end") if stride == 1 else y
    path = n.save(tmp_path, x, "end")
    graph = import_onnx(path)
    block = ["conv2d", "hard_swish", "depthwise_conv2d", "mean", "conv2d", "conv2d", "mul", "conv2d"]
    assert ops(graph) == ["conv2d", "hard_swish", *block, "add", *block]
    gates = [graph.producer(node.inputs[1]) for node in graph.nodes if node.op == "mul"]
    assert [node.attributes["activation"] for node in gates if node is not None] == ["relu6", "relu6"]
    assert "end" in [c.name for c in tap_candidates(graph)]
    assert_same(path, graph)


def test_gates_of_vectors_as_the_original_code_exports_them(tmp_path: Path) -> None:
    """Fully connected squeeze and excite layers: the gate is a vector, turned into a map before the product."""
    n = Onnx(opset=13)
    x = n.conv("x", 3, 8, 3)
    vector = n.add("Flatten", n.add("GlobalAveragePool", x), axis=1)
    vector = n.add("Relu", n.add("Gemm", vector, n.random(2, 8), n.random(2), transB=1))
    vector = hard_sigmoid(n, n.add("Gemm", vector, n.random(8, 2), n.random(8), transB=1), "divided")
    gate = n.add("Reshape", vector, n.const([1, 8, 1, 1], np.int64))
    end = n.conv(n.add("Mul", x, gate), 8, 4)
    path = n.save(tmp_path, end)
    graph = import_onnx(path)
    middle = ["mean", "reshape", "fully_connected", "fully_connected", "reshape", "mul"]
    assert ops(graph) == ["conv2d", *middle, "conv2d"]
    assert_same(path, graph)


def test_a_gated_value_that_is_tapped_keeps_its_scale(tmp_path: Path) -> None:
    n = Onnx()
    x = n.conv("x", 3, 8, 3)
    gate = hard_sigmoid(n, n.conv(n.add("GlobalAveragePool", x), 8, 8), "op")
    gated = n.add("Mul", x, gate, out="gated")
    end = n.conv(gated, 8, 4)
    path = n.save(tmp_path, end)
    graph = import_onnx(path, outputs=["gated", end])
    assert graph.outputs == ["gated", end] and ops(graph).count("depthwise_conv2d") == 1
    assert_same(path, graph)
    assert "gated" not in import_onnx(path).tensors  # six times it has another name


def test_mobilenet_as_tf2onnx_exports_it(tmp_path: Path) -> None:
    n = Onnx(("batch", 16, 16, 3))
    x = n.add("Transpose", "x", perm=[0, 3, 1, 2])
    x = n.relu6(n.conv(x, 3, 4, 3, 2, pads=[0, 0, 1, 1]))
    x = n.add("Pad", x, n.const([0, 0, 0, 0, 0, 0, 1, 1], np.int64))
    x = n.conv(x, 4, 4, 3, 2, group=4, pads=[0, 0, 0, 0])
    x = n.add("Add", n.add("Mul", x, n.random(1, 4, 1, 1)), n.random(1, 4, 1, 1))
    x = n.relu6(x)
    x = n.conv(x, 4, 6, 3, 1, auto_pad="SAME_UPPER")
    n.add("Transpose", x, out="Identity:0", perm=[0, 2, 3, 1])
    path = n.save(tmp_path, "Identity:0")
    result = load_onnx(path)
    assert ops(result.graph) == ["conv2d", "depthwise_conv2d", "conv2d"]
    assert result.preprocessing.layout == "NHWC" and result.preprocessing.mean == (0.5, 0.5, 0.5)
    image = np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype(np.float32)
    expected = oracle(path, ["Identity:0"], image)[0]
    close(run(result.graph, image)[result.graph.outputs[0]], expected)
    assert result.aliases["Identity:0"] == result.graph.outputs[0] == x
    named = import_onnx(path, outputs=["Identity:0"])
    close(run(named, image)[named.outputs[0]], expected)


def test_squeeze_and_excite_as_keras_exports_it(tmp_path: Path) -> None:
    n = Onnx((1, 8, 8, 3))
    x = n.conv(n.add("Transpose", "x", perm=[0, 3, 1, 2]), 3, 6, 3)
    vector = n.add("Squeeze", n.add("GlobalAveragePool", x), n.const([2, 3], np.int64))
    pixel = n.add("Reshape", vector, n.const([-1, 1, 1, 6], np.int64))  # NHWC
    gate = n.add("Sigmoid", n.conv(n.add("Transpose", pixel, perm=[0, 3, 1, 2]), 6, 6))
    n.add("Transpose", n.add("Mul", x, gate), out="y", perm=[0, 2, 3, 1])
    path = n.save(tmp_path, "y")
    result = load_onnx(path)
    image = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype(np.float32)
    close(run(result.graph, image)[result.graph.outputs[0]], oracle(path, ["y"], image)[0])


# --- single ops ---------------------------------------------------------------------------------------------------


def mean_vector(n: Onnx) -> str:
    return n.add("ReduceMean", "x", axes=[-1, -2], keepdims=0)


SINGLE: dict[str, tuple[Callable[[Onnx], str], list[str]]] = {
    "conv dilated": (lambda n: n.conv("x", 3, 5, 3, dilations=[2, 1], pads=[2, 0, 1, 3]), ["conv2d"]),
    "conv SAME_LOWER": (lambda n: n.conv("x", 3, 5, 4, 3, auto_pad="SAME_LOWER"), ["conv2d"]),
    "conv VALID": (lambda n: n.conv("x", 3, 5, 4, 3, auto_pad="VALID"), ["conv2d"]),
    "max pool ceil": (
        lambda n: n.add("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        ["max_pool"],
    ),
    "average pool ceil": (
        lambda n: n.add("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 0, 0], ceil_mode=1),
        ["average_pool"],
    ),
    "average pool counting": (
        lambda n: n.add("AveragePool", "x", kernel_shape=[2, 3], pads=[1, 1, 0, 1], count_include_pad=1),
        ["pad", "average_pool"],
    ),
    "concat": (lambda n: n.add("Concat", n.conv("x", 3, 2), "x", axis=-3), ["conv2d", "concat"]),
    "silu": (lambda n: n.add("Mul", "x", n.add("Sigmoid", "x")), ["logistic", "mul"]),
    "sum": (lambda n: n.add("Sum", n.conv("x", 3, 3), "x", n.conv("x", 3, 3)), ["conv2d", "conv2d", "add", "add"]),
    "constant minus x": (lambda n: n.add("Sub", n.random(3, 1, 1), n.conv("x", 3, 3)), ["conv2d"]),
    "division": (lambda n: n.add("Div", n.conv("x", 3, 3), n.random(1, 3, 1, 1, low=0.5)), ["conv2d"]),
    "clip without upper": (lambda n: n.add("Clip", n.conv("x", 3, 3), n.const(0)), ["conv2d"]),
    "clip without bounds": (lambda n: n.add("Clip", n.conv("x", 3, 3)), ["conv2d"]),
    "dropout": (lambda n: n.add("Dropout", n.conv("x", 3, 3)), ["conv2d"]),
    "keras hard-sigmoid": (lambda n: n.add("HardSigmoid", n.conv("x", 3, 3)), ["conv2d", "depthwise_conv2d"]),
    "resize": (
        lambda n: n.add("Resize", n.conv("x", 3, 3), "", n.const([1, 1, 2, 3]), mode="nearest"),
        ["conv2d", "resize_nearest"],
    ),
    "resize floor": (
        lambda n: n.add(
            "Resize", n.conv("x", 3, 3), "", "", n.const([1, 3, 24, 9], np.int64), mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        ),
        ["conv2d", "resize_nearest"],
    ),
    "flattened map": (
        lambda n: n.add("Gemm", n.add("Flatten", n.conv("x", 3, 2, 3, 4)), n.random(32, 5), n.random(1, 5)),
        ["conv2d", "reshape", "fully_connected"],
    ),
    "matmul and add": (
        lambda n: n.add("Add", n.add("MatMul", mean_vector(n), n.random(3, 5)), n.random(5)),
        ["mean", "reshape", "fully_connected"],
    ),
    "pointwise matmul": (
        lambda n: n.add(
            "Transpose", n.add("MatMul", n.add("Transpose", "x", perm=[0, 2, 3, 1]), n.random(3, 5)), perm=[0, 3, 1, 2]
        ),
        ["conv2d"],
    ),
    "unsqueezed vector": (
        lambda n: n.add(
            "Mul", "x", n.add("Unsqueeze", n.add("Sigmoid", mean_vector(n)), n.const([2, 3], np.int64))
        ),
        ["mean", "reshape", "logistic", "reshape", "mul"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_single_ops(tmp_path: Path, name: str) -> None:
    recipe, expected = SINGLE[name]
    n = Onnx()
    output = recipe(n)
    path = n.save(tmp_path, output)
    result = load_onnx(path)
    assert ops(result.graph) == expected
    image = np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype(np.float32)
    value = oracle(path, [output], image.transpose(0, 3, 1, 2))[0]
    close(run(result.graph, image)[result.graph.outputs[0]], nhwc(value))


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
def test_old_and_new_opsets(tmp_path: Path, opset: int) -> None:
    n = Onnx(("b", 3, 16, 16), opset=opset)
    x = n.conv("x", 3, 4, 3)
    if opset < 11:
        x = n.add("Clip", x, min=0.0, max=6.0)
        x = n.add("Pad", x, pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0)
    else:
        x = n.relu6(x)
        pads = [1, 1, 1, 1] if opset >= 18 else [0, 0, 1, 1, 0, 0, 1, 1]
        axes = [n.const([2, 3], np.int64)] if opset >= 18 else []
        x = n.add("Pad", x, n.const(pads, np.int64), "" if axes else n.const(0), *axes)
    x = n.conv(x, 4, 4, 3)
    # batch and channels read back from the shape, as view(x.size(0), -1) exports
    size = n.add("Gather", n.add("Shape", x), n.const(0, np.int64), axis=0)
    if opset < 13:
        size = n.add("Unsqueeze", size, axes=[0])
    else:
        size = n.add("Unsqueeze", size, n.const([0], np.int64))
    shape = n.add("Concat", size, n.const([-1], np.int64), axis=0)
    if opset >= 18:
        mean = n.add("ReduceMean", x, n.const([2, 3], np.int64), keepdims=1)
    else:
        mean = n.add("ReduceMean", x, axes=[2, 3], keepdims=1)
    y = n.add("Gemm", n.add("Reshape", mean, shape), n.random(4, 3), n.random(3))
    path = n.save(tmp_path, y)
    graph = import_onnx(path)
    assert ops(graph) == ["conv2d", "conv2d", "mean", "reshape", "fully_connected"]
    assert_same(path, graph)


# --- what a person asks for ---------------------------------------------------------------------------------------


def exotic(tmp_path: Path) -> Path:
    """conv, batch norm, ReLU6, 1x1 conv, then a LeakyRelu that nothing here supports, then a head."""
    n = Onnx()
    x = n.add("Relu", n.norm(n.conv("x", 3, 4, 3, 4), 4), out="early")
    x = n.conv(x, 4, 4)
    n.add("Identity", x, out="same")
    leaky = n.add("LeakyRelu", x, out="leaky")
    return n.save(tmp_path, n.conv(leaky, 4, 2))


def test_unsupported_heads_are_dropped_and_remembered(tmp_path: Path) -> None:
    path = exotic(tmp_path)
    result = load_onnx(path)
    assert ops(result.graph) == ["conv2d", "conv2d"]
    assert len(result.skipped) == 1 and result.skipped[0].startswith("node node/leaky (LeakyRelu): not among")
    assert default_layers(result.graph) == result.graph.outputs
    assert_same(path, result.graph)
    last = onnx.load(str(path)).graph.output[0].name
    message = r"needs node node/leaky \(LeakyRelu\): .*Conv.*; tap a layer before it"
    with pytest.raises(InputError, match=message) as caught:
        import_onnx(path, outputs=["early", last])
    assert "\n" not in str(caught.value)


def test_any_onnx_value_can_be_an_output(tmp_path: Path) -> None:
    path = exotic(tmp_path)
    before_norm = onnx.load(str(path)).graph.node[0].output[0]
    graph = import_onnx(path, outputs=["early", before_norm, "block:0"])
    assert graph.outputs[:2] == ["early", before_norm]
    assert_same(path, graph)
    assert import_onnx(path, outputs=["same"]).outputs == import_onnx(path, outputs=["block:0"]).outputs
    assert import_onnx(path, outputs=["node/early"]).outputs == ["early"]
    with pytest.raises(InputError, match="no layer earlie; nearest: early"):
        import_onnx(path, outputs=["earlie"])


UNSUPPORTED: dict[str, tuple[Callable[[Onnx], str], str]] = {
    "grouped": (
        lambda n: n.conv(n.conv("x", 3, 4), 4, 4, 3, group=2), r"\(Conv\): group 2 with 4 channels in and 4 out"
    ),
    "multiplier": (lambda n: n.conv("x", 3, 6, 3, group=3), "group 3 with 3 channels in and 6 out"),
    "reflection": (
        lambda n: n.add("Pad", "x", n.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64), mode="reflect"), "mode reflect"
    ),
    "pad of minus infinity": (
        lambda n: n.add("Pad", "x", n.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64), n.const(-np.inf)), "value -inf"
    ),
    "clip": (lambda n: n.add("Clip", "x", n.const(-1), n.const(1)), "bounds -1 and 1"),
    "spatial gate": (lambda n: n.add("Mul", "x", n.add("Sigmoid", n.conv("x", 3, 1))), "shapes"),
    "map of numbers": (lambda n: n.add("Mul", "x", n.random(1, 3, 16, 16)), "one number, or one a channel"),
    "channel mean": (lambda n: n.add("ReduceMean", "x", axes=[1]), "mean over H and W"),
    "shuffle": (lambda n: n.add("Reshape", "x", n.const([1, 3, 256], np.int64)), "flattening"),
    "weights from the image": (lambda n: n.add("Conv", "x", n.add("Sigmoid", "x")), "where a constant is supported"),
    "broken weights": (lambda n: n.add("Conv", "x", n.const(np.full((2, 3, 1, 1), np.nan))), "not finite"),
    "wrong channels": (lambda n: n.conv("x", 4, 2), "3 channels in, but weights for 4"),
    "too small a map": (lambda n: n.conv("x", 3, 2, 99, pads=[0] * 4), "does not fit"),
    "other domain": (lambda n: n.add("Gelu", n.const(1.0), "x", domain="com.microsoft"), "not among"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(tmp_path: Path, name: str) -> None:
    recipe, message = UNSUPPORTED[name]
    n = Onnx()
    output = recipe(n)
    path = n.save(tmp_path, output)
    with pytest.raises(InputError, match=message) as caught:
        import_onnx(path, outputs=[output])
    assert f"node/{output}" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_left_is_an_input_error(tmp_path: Path) -> None:
    n = Onnx()
    path = n.save(tmp_path, n.conv(n.add("LeakyRelu", "x"), 3, 2))
    with pytest.raises(InputError, match=r"nothing can be converted: node node/LeakyRelu_0 \(LeakyRelu\)"):
        import_onnx(path)


# --- files --------------------------------------------------------------------------------------------------------


def test_bad_files_are_input_errors(tmp_path: Path) -> None:
    n = Onnx()
    path = n.save(tmp_path, n.conv("x", 3, 2))
    whole = path.read_bytes()
    with pytest.raises(InputError, match="no such file"):
        import_onnx(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="no such file"):
        import_onnx(tmp_path)
    for broken in (b"", b"not a model at all", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="not a readable ONNX model"):
            import_onnx(path)
    path.write_bytes(whole)
    with pytest.raises(InputError, match="image size 0x0"):
        import_onnx(path, 0)


def test_flipped_bytes_never_leak_another_error(tmp_path: Path) -> None:
    n = Onnx()
    x = n.relu6(n.norm(n.conv("x", 3, 4, 3, 2), 4))
    x = n.add("Concat", x, n.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), axis=1)
    x = n.add("Reshape", n.add("GlobalAveragePool", x), n.const([1, -1], np.int64))
    path = n.save(tmp_path, n.add("Gemm", x, n.random(8, 2)))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            import_onnx(path).check()
        except InputError as error:
            assert "\n" not in str(error)


def test_oversized_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(InputError, match="2147483648 bytes, but one ONNX file holds 2147483647 at most"):
        import_onnx(path)


def test_external_weights(tmp_path: Path) -> None:
    n = Onnx()
    model = n.model(n.conv("x", 3, 40, 3))
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="net.bin", size_threshold=0)
    graph = import_onnx(path)
    weights = numpy_helper.to_array(n.initializers[0])
    assert np.array_equal(graph.constants[graph.nodes[0].inputs[1]], weights.transpose(0, 2, 3, 1))
    (tmp_path / "net.bin").unlink()
    with pytest.raises(InputError, match="not a readable ONNX model"):
        import_onnx(path)


def test_models_that_are_no_image_networks(tmp_path: Path) -> None:
    n = Onnx((1, 10))
    with pytest.raises(InputError, match="not 4-D"):
        import_onnx(n.save(tmp_path, n.add("Relu", "x")))
    n = Onnx(opset=6)
    with pytest.raises(InputError, match="opset 6 < 7"):
        import_onnx(n.save(tmp_path, n.add("Relu", "x")))
    n = Onnx()
    model = n.model(n.add("Add", "x", "z"))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3, 16, 16]))
    onnx.save(model, str(tmp_path / "two.onnx"))
    with pytest.raises(InputError, match="2 inputs"):
        import_onnx(tmp_path / "two.onnx")


# --- preprocessing ------------------------------------------------------------------------------------------------


def test_guesses() -> None:
    def guess(shape: tuple[Any, ...], dtype: int = TensorProto.FLOAT, **metadata: str) -> Any:
        n = Onnx(shape, dtype=dtype)
        return guess_preprocessing(n.model(n.add("Relu", "x"), **metadata))

    nchw, nhwc_ = guess(("n", 3, "h", "w")), guess(("n", "h", "w", 3))
    assert (nchw.layout, nchw.mean, nchw.std) == ("NCHW", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (nhwc_.layout, nhwc_.mean, nhwc_.std) == ("NHWC", (0.5,) * 3, (0.5,) * 3)
    assert nchw.source == "guess" and nchw.dtype == "float32"
    assert guess((1, 1, 8, 8)).mean == (0.449,)
    pixels = guess((1, 8, 8, 3), TensorProto.UINT8)
    assert (pixels.mean, pixels.std, pixels.source) == ((0, 0, 0), (1 / 255,) * 3, "graph")
    own = guess((1, 3, 8, 8), mean="[0.1, 0.2, 0.3]", std="0.5")
    assert (own.mean, own.std, own.source) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "metadata")
    with pytest.raises(InputError, match="metadata mean is a, b"):
        guess((1, 3, 8, 8), mean="a, b", std="1")
    with pytest.raises(InputError, match="std is 0"):
        guess((1, 3, 8, 8), mean="0", std="0")


@pytest.mark.parametrize("case", ["uint8", "rescaling", "imagenet of [0, 1]", "metadata"])
def test_arithmetic_on_the_image_becomes_preprocessing(tmp_path: Path, case: str) -> None:
    """The graph, fed (pixel / 255 - mean) / std, equals the file fed what it wants, at the padded border too."""
    n = Onnx((1, 12, 12, 3), dtype=TensorProto.UINT8 if case == "uint8" else TensorProto.FLOAT)
    metadata = {}
    pixels = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3)).astype(np.uint8)
    fed: np.ndarray = pixels
    if case == "uint8":
        x = n.add("Mul", n.add("Sub", n.add("Cast", "x", to=1), n.const(117)), n.const(0.02))
    elif case == "rescaling":
        x = n.add("Add", n.add("Mul", "x", n.const(1 / 127.5)), n.const(-1))
        fed = pixels.astype(np.float32)
    elif case == "imagenet of [0, 1]":
        x = n.add("Div", n.add("Sub", "x", n.const([0.485, 0.456, 0.406])), n.const([0.229, 0.224, 0.225]))
        fed = (pixels / 255).astype(np.float32)
    else:
        x = n.add("Mul", "x", n.const([2, 3, 4]))
        metadata = {"mean": "0.1", "std": "0.2"}
        fed = ((pixels / 255 - 0.1) / 0.2).astype(np.float32)
    n.conv(n.add("Transpose", x, perm=[0, 3, 1, 2]), 3, 4, 3)
    output = n.nodes[-1].output[0]
    path = n.save(tmp_path, output, **metadata)
    result = load_onnx(path)
    assert ops(result.graph) == ["conv2d"]
    assert result.preprocessing.source == ("metadata" if case == "metadata" else "graph")
    expected_mean = {"uint8": 117 / 255, "rescaling": 0.5, "imagenet of [0, 1]": 0.485, "metadata": 0.1}[case]
    assert result.preprocessing.mean[0] == pytest.approx(expected_mean)
    image = (pixels / 255 - np.array(result.preprocessing.mean)) / np.array(result.preprocessing.std)
    close(run(result.graph, image)[output], nhwc(oracle(path, [output], fed)[0]))


def test_a_batch_norm_on_the_image_is_part_of_the_network(tmp_path: Path) -> None:
    n = Onnx()
    path = n.save(tmp_path, n.conv(n.norm("x", 3), 3, 2))
    result = load_onnx(path)
    assert ops(result.graph) == ["depthwise_conv2d", "conv2d"] and result.preprocessing.source == "guess"
    assert_same(path, result.graph)


# --- real files ---------------------------------------------------------------------------------------------------

REAL = {
    "mcunet_in3_imagenet_f32": (176, 18, [4, 7, 13], "NCHW", 81_785_520),
    "mobilenet_v2_0.35_imagenet_f32": (None, 17, [2, 5, 12], "NHWC", None),
    "mobilenet_v2_1.0_imagenet_dequant": (None, 17, [2, 5, 12], "NHWC", None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_networks_at_every_block(shared: Path, name: str) -> None:
    """embedded.md 3.1 gives MCUNet-in3's blocks and multiply-accumulates."""
    size, blocks, defaults, layout, macs = REAL[name]
    path = shared / "weights" / f"{name}.onnx"
    result = load_onnx(path, size)
    graph, wanted = result.graph, result.preprocessing
    taps = [candidate.name for candidate in tap_candidates(graph)]
    assert len(taps) == blocks and default_layers(graph) == [taps[i] for i in defaults]
    assert wanted.layout == layout
    assert macs in (None, graph.macs())
    assert "batch_norm" not in ops(graph) and "pad" not in ops(graph)
    outputs = [*taps, *graph.outputs]
    cut = import_onnx(path, size, outputs)
    _, height, width, _ = graph.tensors[graph.inputs[0]].shape
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3)).astype(np.uint8)
    image = ((pixels / 255 - np.array(wanted.mean)) / np.array(wanted.std)).astype(np.float32)
    nchw = image.transpose(0, 3, 1, 2)
    fed = pixels if wanted.dtype == "uint8" else nchw if layout == "NCHW" else image
    exported = to_onnx(cut).SerializeToString()
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    for tap, got, expected in zip(outputs, session.run(None, {"input": nchw}), oracle(path, outputs, fed)):
        close(got, expected, 1e-4)
        assert tap in cut.outputs
