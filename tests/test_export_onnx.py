"""Exported models, run by onnxruntime, against the brute-force float64 interpreter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from reference_interpreter import dequantized, run

from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx, to_onnx_qdq
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization, Tensor

SHAPE = (1, 7, 6, 4)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(
    b: GraphBuilder, x: str, output: str, out: int = 5, kernel: int = 3, act: str = "none", **changes: object
) -> str:
    names = [
        b.constant(f"{output}/w", normal(len(output), out, kernel, kernel, b.shape(x)[3]) / 4),
        b.constant(f"{output}/b", normal(out, out)),
    ]
    attributes = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "activation": act, **changes}
    return b.add("conv2d", [x, *names], output, **attributes)


def depthwise(b: GraphBuilder, x: str, output: str, **changes: object) -> str:
    channels = b.shape(x)[3]
    names = [
        b.constant(f"{output}/w", normal(3, 1, 3, 2, channels)),
        b.constant(f"{output}/b", normal(4, channels)),
    ]
    attributes = {"stride": (2, 1), "pads": (0, 1, 1, 2), "dilation": (1, 1), "activation": "relu6", **changes}
    return b.add("depthwise_conv2d", [x, *names], output, **attributes)


def pool(b: GraphBuilder, op: str, output: str, **changes: object) -> str:
    attributes = {"kernel": (3, 2), "stride": (2, 1), "pads": (1, 2, 1, 0), "activation": "none", **changes}
    return b.add(op, [b.input], output, **attributes)


def gate(b: GraphBuilder) -> str:
    return b.add("logistic", [b.add("mean", [b.input], "mean")], "gate")


def fully_connected(b: GraphBuilder, x: str, output: str) -> str:
    vector = b.add("reshape", [x], f"{output}/flat", shape=(1, int(np.prod(b.shape(x)))))
    names = [b.constant(f"{output}/w", normal(5, 3, b.shape(vector)[1])), b.constant(f"{output}/b", normal(6, 3))]
    return b.add("fully_connected", [vector, *names], output, activation="relu")


def batch_norm(b: GraphBuilder, x: str, output: str) -> str:
    names = [b.constant(f"{output}/{word}", normal(i, b.shape(x)[-1])) for i, word in enumerate("so")]
    return b.add("batch_norm", [x, *names], output, activation="relu")


NETWORKS = {
    "conv2d": lambda b: conv(b, b.input, "y", stride=(2, 1), pads=(0, 1, 2, 1), act="relu6"),
    "conv2d dilated": lambda b: conv(b, b.input, "y", dilation=(2, 1), pads=(1, 1, 1, 1), act="relu"),
    "depthwise_conv2d": lambda b: depthwise(b, b.input, "y"),
    "depthwise_conv2d dilated": lambda b: depthwise(b, b.input, "y", dilation=(1, 3), activation="none"),
    "fully_connected": lambda b: fully_connected(b, b.input, "y"),
    "fully_connected after mean": lambda b: fully_connected(b, b.add("mean", [b.input], "mean"), "y"),
    "add": lambda b: b.add("add", [conv(b, b.input, "x", 4, 1), b.input], "y", activation="relu"),
    "mul": lambda b: b.add("mul", [conv(b, b.input, "x", 4, 1), b.input], "y", activation="none"),
    "mul by a gate": lambda b: b.add("mul", [b.input, gate(b)], "y", activation="none"),
    "mul by a constant": lambda b: b.add("mul", [b.input, b.constant("k", normal(1, 1, 1, 1, 4))], "y"),
    "average_pool": lambda b: pool(b, "average_pool", "y", pads=(0, 0, 0, 0), count_include_pad=False),
    "average_pool padded": lambda b: pool(b, "average_pool", "y", count_include_pad=False, activation="relu"),
    "average_pool counting": lambda b: pool(b, "average_pool", "y", count_include_pad=True),
    "max_pool": lambda b: pool(b, "max_pool", "y"),
    "mean": lambda b: b.add("mean", [b.input], "y"),
    "pad": lambda b: b.add("pad", [b.input], "y", pads=(1, 2, 3, 0)),
    "resize_nearest whole": lambda b: b.add("resize_nearest", [b.input], "y", size=(14, 18)),
    "resize_nearest": lambda b: b.add("resize_nearest", [b.input], "y", size=(10, 4)),
    "concat": lambda b: b.add("concat", [b.input, conv(b, b.input, "x", 3, 1), b.input], "y", axis=3),
    "reshape to map": lambda b: b.add("reshape", [b.input], "y", shape=(1, 6, 2, 14)),
    "reshape to pixel": lambda b: b.add("reshape", [b.input], "y", shape=(1, 1, 1, 168)),
    "relu": lambda b: b.add("relu", [b.input], "y"),
    "relu6": lambda b: b.add("relu6", [b.input], "y"),
    "logistic": lambda b: b.add("logistic", [b.input], "y"),
    "hard_swish": lambda b: b.add("hard_swish", [b.input], "y"),
}
FLOAT_ONLY = {
    "batch_norm": lambda b: batch_norm(b, b.input, "y"),
    "batch_norm of a vector": lambda b: batch_norm(b, fully_connected(b, b.input, "fc"), "y"),
}


def built(recipe: object) -> Graph:
    b = GraphBuilder("net", SHAPE)
    return b.finish([recipe(b)])  # type: ignore[operator]


def block() -> Graph:
    """An inverted bottleneck with a squeeze-and-excite gate and a head."""
    b = GraphBuilder("block", SHAPE, "image")
    x = conv(b, b.input, "stem", 6, pads=(1, 1, 1, 1), act="relu6")
    y = depthwise(b, x, "dw", stride=(1, 1), pads=(1, 1, 0, 1))
    g = b.add("logistic", [conv(b, b.add("mean", [y], "mean"), "squeeze", 6, 1)], "gate")
    y = conv(b, b.add("mul", [y, g], "scaled", activation="none"), "project", 6, 1)
    z = b.add("add", [x, y], "end", activation="none")
    return b.finish([fully_connected(b, z, "head"), z])


def session(model: onnx.ModelProto, plain: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def outputs(graph: Graph, model: onnx.ModelProto, images: np.ndarray, plain: bool = False) -> dict[str, np.ndarray]:
    """What onnxruntime makes of NHWC images, back in NHWC."""
    results = session(model, plain).run(None, {"input": images.transpose(0, 3, 1, 2).astype(np.float32)})
    nhwc = [result.transpose(0, 2, 3, 1) if result.ndim == 4 else result for result in results]
    return dict(zip(graph.outputs, nhwc))


def quantised(graph: Graph, image: np.ndarray) -> Graph:
    """``graph`` on int8 grids that cover the values of one image; weights per channel, biases int32."""
    seen = run(graph, image)
    tensors, constants = dict(graph.tensors), dict(graph.constants)
    for name in graph.activations:
        low, high = min(float(seen[name].min()), 0.0), max(float(seen[name].max()), 0.0)
        scale = (high - low) / 255
        grid = Quantization.per_tensor(scale, round(-128 - low / scale))
        tensors[name] = dataclasses.replace(tensors[name], dtype="int8", quantization=grid)
    for node in graph.nodes:
        moves = node.op in ("average_pool", "max_pool", "pad", "reshape", "resize_nearest")
        if moves:
            grid = tensors[node.inputs[0]].quantization  # type: ignore[assignment]
            tensors[node.output] = dataclasses.replace(tensors[node.output], quantization=grid)
        parameters = [name for name in node.inputs if name in constants]
        if not parameters:
            continue
        weights = constants[parameters[0]]
        axis = 0 if node.op in ("conv2d", "fully_connected") else 3
        scales = np.abs(weights).max(tuple(i for i in range(weights.ndim) if i != axis)) / 127  # (C,)
        shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
        zeros = np.zeros(scales.size, np.int64)
        constants[parameters[0]] = np.rint(weights / scales.reshape(shape)).astype(np.int8)
        weight_grid = Quantization(scales.astype(np.float32), zeros, axis)
        tensors[parameters[0]] = Tensor(parameters[0], weights.shape, "int8", weight_grid)
        if len(parameters) == 2:
            bias_scales = scales * tensors[node.inputs[0]].quantization.scale[0]  # type: ignore[union-attr]
            constants[parameters[1]] = np.rint(constants[parameters[1]] / bias_scales).astype(np.int32)
            bias_grid = Quantization(bias_scales.astype(np.float32), zeros, 0)
            tensors[parameters[1]] = Tensor(parameters[1], bias_scales.shape, "int32", bias_grid)
    return graph.copy(tensors=tensors, constants=constants)


@pytest.mark.parametrize("name", [*NETWORKS, *FLOAT_ONLY])
def test_float_export_equals_the_reference(name: str) -> None:
    graph = built({**NETWORKS, **FLOAT_ONLY}[name])
    image = normal(9, *SHAPE) * 3
    got = outputs(graph, to_onnx(graph), image)["y"]
    expected = run(graph, image)["y"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_every_value_and_every_image_of_a_batch() -> None:
    graph = block()
    graph = graph.copy(outputs=[node.output for node in graph.nodes])
    images = normal(2, 3, *SHAPE[1:])
    got = outputs(graph, to_onnx(graph), images)
    for i, image in enumerate(images):
        expected = run(graph, image[None])
        for name in graph.outputs:
            np.testing.assert_allclose(got[name][i], expected[name][0], rtol=1e-5, atol=1e-5, err_msg=name)


# onnxruntime 1.18, when it optimises, replaces the two grids around a lone ReLU by a third one
OPTIMISED = [(name, False) for name in NETWORKS if name not in ("relu", "relu6")]


@pytest.mark.parametrize("name, plain", [*OPTIMISED, *((name, True) for name in NETWORKS)])
def test_qdq_export_is_within_one_step(name: str, plain: bool) -> None:
    image = normal(9, *SHAPE) * 3
    graph = quantised(built(NETWORKS[name]), image)
    got = outputs(graph, to_onnx_qdq(graph), image, plain)["y"]
    expected = run(graph, image, on_grid=True)["y"]
    grid = graph.tensors["y"].quantization
    assert grid is not None
    step = float(grid.scale[0])
    np.testing.assert_allclose(got, expected, atol=step * 1.001)
    on_grid = got / step
    np.testing.assert_allclose(on_grid, np.rint(on_grid), atol=1e-3)  # the output is on the tap's own grid
    assert np.ptp(np.rint(on_grid)) > 20  # and the test could fail


def test_qdq_of_a_network_is_within_one_step_at_its_taps() -> None:
    image = normal(3, *SHAPE)
    graph = quantised(block(), image)
    got = outputs(graph, to_onnx_qdq(graph), image, plain=True)
    expected = run(graph, image, on_grid=True)
    for name in graph.outputs:
        step = float(graph.tensors[name].quantization.scale[0])  # type: ignore[union-attr]
        np.testing.assert_allclose(got[name], expected[name], atol=step * 1.001, err_msg=name)


def test_qdq_keeps_the_integers_of_the_graph() -> None:
    graph = quantised(block(), normal(3, *SHAPE))
    model = to_onnx_qdq(graph)
    stored = {array.name: onnx.numpy_helper.to_array(array) for array in model.graph.initializer}
    assert set(stored) <= {name for node in model.graph.node for name in node.input}  # nothing is left over
    assert np.array_equal(stored["stem/w"], graph.constants["stem/w"].transpose(0, 3, 1, 2))
    assert np.array_equal(stored["dw/w"], graph.constants["dw/w"].transpose(3, 0, 1, 2))
    assert stored["stem/b"].dtype == np.int32 and np.array_equal(stored["stem/b"], graph.constants["stem/b"])
    np.testing.assert_allclose(
        dequantized(graph.constants["stem/w"], graph.tensors["stem/w"].quantization)[2],
        stored["stem/w"][2].transpose(1, 2, 0) * stored["stem/w:scale"][2].astype(np.float64),
    )


def test_uint8_input_and_quantize_ends() -> None:
    b = GraphBuilder("ends", SHAPE)
    x = b.add("quantize", [b.input], "q")
    graph = b.finish([b.add("dequantize", [b.add("relu", [x], "r")], "y")])
    grids = {"input": ("uint8", 128), "q": ("int8", 0), "r": ("int8", 0)}
    for name, (dtype, zero_point) in grids.items():
        grid = Quantization.per_tensor(1 / 64, zero_point)
        graph.tensors[name] = Tensor(name, SHAPE, dtype, grid)
    image = np.linspace(-3, 3, int(np.prod(SHAPE))).reshape(SHAPE).astype(np.float32)
    got = outputs(graph, to_onnx_qdq(graph), image)["y"]
    np.testing.assert_allclose(got, np.clip(np.rint(image * 64), 0, 127) / 64, atol=1e-6)


def test_interface_metadata_and_bytes(tmp_path: Path) -> None:
    graph = block()
    path = tmp_path / "new" / "net.onnx"
    metadata = {"mean": [0.5, 0.25, 0.125], "colour": "RGB"}
    model = to_onnx(graph, path, metadata)
    assert path.read_bytes() == to_onnx(block(), None, metadata).SerializeToString(deterministic=True)
    s = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in s.get_inputs()] == [("input", ["N", 4, 7, 6], "tensor(float)")]
    assert [(o.name, o.shape) for o in s.get_outputs()] == [("head", ["N", 3]), ("end", ["N", 6, 7, 6])]
    entries = s.get_modelmeta().custom_metadata_map
    assert json.loads(entries["layers"]) == ["head", "end"]
    assert json.loads(entries["mean"]) == [0.5, 0.25, 0.125] and entries["colour"] == "RGB"
    assert entries["tinyvad"]
    assert model.ir_version <= 9 and model.opset_import[0].version == 17
    onnx.checker.check_model(model, full_check=True)


def test_wrong_graphs_are_named() -> None:
    graph = block()
    with pytest.raises(InputError, match="to_onnx_qdq"):
        to_onnx(quantised(graph, normal(3, *SHAPE)))
    with pytest.raises(InputError, match="nothing is quantised"):
        to_onnx_qdq(graph)
    with pytest.raises(InputError, match="softmax -> head"):
        to_onnx(graph.copy(nodes=[*graph.nodes[:-1], graph.nodes[-1].replace(op="softmax")]))
    with pytest.raises(InputError, match="input image is also an output"):
        to_onnx(graph.copy(outputs=["image"]))
    b = GraphBuilder("clash", SHAPE, "image")
    with pytest.raises(InputError, match="other than the input is called input"):
        to_onnx(b.finish([b.add("relu", ["image"], "input")]))
    with pytest.raises(InputError, match="end is given twice"):
        to_onnx(graph.copy(outputs=["end", "head", "end"]))
