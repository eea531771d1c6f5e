"""The .tflite importer: files made by another writer, published networks, and what must be refused with one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_interpreter
from tflite_builder import TfliteBuilder

from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.graph.ir import Graph
from tinyvad.graph.tflite_conversion import same_pads
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.graph.tflite_import import import_tflite, trunk_outputs

SAME, VALID = 0, 1
RELU6 = 3


def conv_file(
    dtype: str = "int8",
    size: int = 8,
    channels: int = 3,
    weight_zero: int = 0,
    padding: int = SAME,
    with_bias: bool = True,
    tail: str = "",
    scale: float = 0.05,
    weight_scales: tuple[float, ...] = (0.01, 0.02, 0.03, 0.04),
) -> bytes:
    """conv 3x3 stride 2 (t3), then what ``tail`` names; activations of ``dtype``, weights of the same."""
    rng = np.random.default_rng(1)
    f = TfliteBuilder()
    zero = 128 if dtype == "uint8" else 0
    per_channel = dtype == "int8"
    scales = np.array(weight_scales, np.float32) if per_channel else np.float32(0.02)
    low, high = (0, 256) if dtype == "uint8" else (-127, 128)
    w_data = rng.integers(low, high, (4, 3, 3, channels)).astype("float32" if dtype == "float32" else dtype)
    b_data = rng.integers(-2000, 2000, 4).astype("float32" if dtype == "float32" else "int32")
    x = f.tensor((1, size, size, channels), dtype, scale=scale, zero_point=zero - 7)
    w = f.tensor(w_data.shape, dtype, w_data, scale=scales, zero_point=weight_zero)
    bias = f.tensor((4,), b_data.dtype.name, b_data, scale=np.float32(0.05) * scales)
    out = -(-size // 2) if padding == SAME else (size - 3) // 2 + 1
    y = f.tensor((1, out, out, 4), dtype, scale=0.4, zero_point=zero + 5)
    f.op(
        "CONV_2D", [x, w, bias] if with_bias else [x, w, -1], [y], "Conv2DOptions",
        padding=padding, strideH=2, strideW=2, dilationHFactor=1, dilationWFactor=1,
    )  # fmt: skip
    if tail == "SOFTMAX":
        f.op("SOFTMAX", [y], [f.tensor((1, out, out, 4), dtype)], "SoftmaxOptions")
    elif tail == "MEAN":
        axes = f.tensor((2,), "int32", np.array([2, 1], np.int32), scale=None)
        f.op("MEAN", [y, axes], [f.tensor((1, 4), dtype, scale=0.4, zero_point=zero + 5)], "ReducerOptions")
    elif tail == "RESHAPE":
        shape = f.tensor((2,), "int32", np.array([1, 4 * out * out], np.int32), scale=None)
        f.op("RESHAPE", [y, shape], [f.tensor((1, 4 * out * out), dtype, scale=0.4)], "ReshapeOptions")
    elif tail:
        f.op(tail, [y], [f.tensor((1, out, out, 4), dtype)])
    return f.finish([x], [len(f.graph.tensors) - 1])


def test_same_becomes_explicit_pads() -> None:
    assert [same_pads(8, 3, 2), same_pads(7, 3, 2), same_pads(8, 3, 1), same_pads(9, 3, 1, 2)] == [
        (0, 1), (1, 1), (1, 1), (2, 2),
    ]  # fmt: skip
    assert import_tflite(conv_file()).nodes[0].attributes["pads"] == (0, 1, 0, 1)
    assert import_tflite(conv_file(size=7)).nodes[0].attributes["pads"] == (1, 1, 1, 1)
    assert import_tflite(conv_file(padding=VALID)).nodes[0].attributes["pads"] == (0, 0, 0, 0)


@pytest.mark.parametrize("tail", ["", "MEAN", "RESHAPE"])
@pytest.mark.parametrize("padding", [SAME, VALID])
def test_int8_file_is_kept_as_it_is(tail: str, padding: int, rng: np.random.Generator) -> None:
    data = conv_file(padding=padding, tail=tail)
    graph = import_tflite(data)
    np.testing.assert_array_equal(graph.constants["t1"], read_tflite(data).tensors[1].data)
    assert graph.tensors["t1"].quantization.axis == 0  # type: ignore[union-attr]
    images = rng.integers(-128, 128, (2, 8, 8, 3)).astype(np.int8)
    np.testing.assert_array_equal(LitertEngine(to_tflite(graph)).features(images), LitertEngine(data).features(images))


def test_negative_weight_scales_are_kept(rng: np.random.Generator) -> None:
    """Published files have them where a batch norm's factor was negative."""
    data = conv_file(weight_scales=(0.01, -0.02, 0.03, -0.04))
    graph = import_tflite(data)
    images = rng.integers(-128, 128, (4, 8, 8, 3)).astype(np.int8)
    for engine in (LitertEngine, TflmEngine):
        np.testing.assert_array_equal(engine(to_tflite(graph)).features(images), engine(data).features(images))
    within_one_rounding(data, images, 0)


def test_bias_that_is_left_out_is_zero() -> None:
    graph = import_tflite(conv_file(with_bias=False))
    bias = graph.nodes[0].inputs[2]
    assert graph.constants[bias].dtype == np.int32 and not graph.constants[bias].any()
    scale = graph.tensors[bias].quantization.scale  # type: ignore[union-attr]
    np.testing.assert_allclose(scale, [0.0005, 0.001, 0.0015, 0.002], rtol=1e-6)


def within_one_rounding(data: bytes, images: np.ndarray, sign: int) -> None:
    """The dequantised graph and LiteRT on the quantised file differ by the output's rounding, no more."""
    graph = import_tflite(data, dequantize=True)
    assert all(tensor.dtype == "float32" and tensor.quantization is None for tensor in graph.tensors.values())
    (found,) = LitertEngine(data).features(images)
    real = (images.astype(float) - (sign - 7)) * np.float32(0.05)
    for image, steps in zip(real, found, strict=True):
        wanted = reference_interpreter.run(graph, image[None])[graph.outputs[0]][0]
        low, high = np.iinfo(found.dtype).min, np.iinfo(found.dtype).max
        exact = np.clip(wanted / np.float32(0.4) + sign + 5, low, high)
        assert np.abs(exact - steps).max() < 0.51


def test_dequantized_int8_graph_is_the_real_function(rng: np.random.Generator) -> None:
    within_one_rounding(conv_file(), rng.integers(-128, 128, (3, 8, 8, 3)).astype(np.int8), 0)


def test_uint8_file_of_tf1_only_dequantized(rng: np.random.Generator) -> None:
    data = conv_file("uint8", weight_zero=131)
    with pytest.raises(InputError, match="CONV_2D -> t3 has uint8 inputs and uint8 weights; import it with dequantize"):
        import_tflite(data)
    within_one_rounding(data, rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8), 128)


def test_float_file_stays_float(rng: np.random.Generator) -> None:
    data = conv_file("float32")
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    graph = import_tflite(data)
    wanted = np.stack([reference_interpreter.run(graph, image[None])["t3"][0] for image in images])
    np.testing.assert_allclose(LitertEngine(data).features(images)[0], wanted, rtol=1e-4, atol=1e-3)
    (again,) = LitertEngine(to_tflite(graph)).features(images)
    np.testing.assert_array_equal(again, LitertEngine(data).features(images)[0])


def test_float16_weights_are_float_constants() -> None:
    f = TfliteBuilder()
    half = np.arange(2 * 9 * 3).reshape(2, 3, 3, 3).astype(np.float16)
    x, w16 = f.tensor((1, 5, 5, 3), "float32"), f.tensor(half.shape, "float16", half, scale=None)
    w, bias = f.tensor(half.shape, "float32"), f.tensor((2,), "float32", np.ones(2, np.float32))
    y = f.tensor((1, 3, 3, 2), "float32")
    f.op("DEQUANTIZE", [w16], [w], "DequantizeOptions")
    f.op(
        "CONV_2D", [x, w, bias], [y], "Conv2DOptions",
        padding=VALID, strideH=1, strideW=1, dilationHFactor=1, dilationWFactor=1,
    )  # fmt: skip
    graph = import_tflite(f.finish([x], [y]))
    assert [node.op for node in graph.nodes] == ["conv2d"]
    np.testing.assert_array_equal(graph.constants[graph.nodes[0].inputs[1]], half.astype(np.float32))


def depthwise_file(channels: int, multiplier: int) -> bytes:
    rng = np.random.default_rng(2)
    f = TfliteBuilder()
    out = channels * multiplier
    scales = np.linspace(0.01, 0.05, out).astype(np.float32)
    x = f.tensor((1, 6, 6, channels), scale=0.1, zero_point=4)
    w = f.tensor((1, 3, 3, out), "int8", rng.integers(-127, 128, (1, 3, 3, out)).astype(np.int8), scales, axis=3)
    bias = f.tensor((out,), "int32", rng.integers(-99, 99, out).astype(np.int32), np.float32(0.1) * scales)
    y = f.tensor((1, 6, 6, out), scale=0.5, zero_point=-3)
    f.op(
        "DEPTHWISE_CONV_2D", [x, w, bias], [y], "DepthwiseConv2DOptions",
        padding=SAME, strideH=1, strideW=1, depthMultiplier=multiplier, dilationHFactor=1, dilationWFactor=1,
        fusedActivationFunction=RELU6,
    )  # fmt: skip
    return f.finish([x], [y])


@pytest.mark.parametrize(("channels", "multiplier", "op"), [(4, 1, "depthwise_conv2d"), (1, 5, "conv2d")])
def test_depthwise(channels: int, multiplier: int, op: str, rng: np.random.Generator) -> None:
    data = depthwise_file(channels, multiplier)
    graph = import_tflite(data)
    assert [node.op for node in graph.nodes] == [op] and graph.nodes[0].attributes["activation"] == "relu6"
    images = rng.integers(-128, 128, (2, 6, 6, channels)).astype(np.int8)
    np.testing.assert_array_equal(LitertEngine(to_tflite(graph)).features(images), LitertEngine(data).features(images))


def test_depth_multiplier_over_several_channels_is_refused() -> None:
    with pytest.raises(InputError, match="DEPTHWISE_CONV_2D -> t3 has a depth multiplier of 2"):
        import_tflite(depthwise_file(3, 2))


def test_ops_behind_the_wanted_output_do_not_matter() -> None:
    data = conv_file(tail="SOFTMAX")
    with pytest.raises(InputError, match="SOFTMAX -> t4 is not supported; tap an earlier tensor"):
        import_tflite(data)
    graph = import_tflite(data, outputs=["t3"])
    assert graph.outputs == ["t3"] and "t4" not in graph.tensors


def test_another_input_size() -> None:
    graph = import_tflite(conv_file(dtype="float32"), input_size=(9, 12))
    assert graph.tensors["t0"].shape == (1, 9, 12, 3) and graph.tensors["t3"].shape == (1, 5, 6, 4)
    assert graph.nodes[0].attributes["pads"] == (1, 1, 0, 1)
    with pytest.raises(InputError, match=r"RESHAPE -> t5 cannot turn \(1, 5, 6, 4\) into \(1, 64\); tap an earlier"):
        import_tflite(conv_file(dtype="float32", tail="RESHAPE"), input_size=(9, 12))
    assert import_tflite(conv_file(tail="RESHAPE"), outputs=["t3"], input_size=(9, 12)).outputs == ["t3"]
    assert import_tflite(conv_file(dtype="float32", tail="MEAN"), input_size=(9, 12)).tensors["t5"].shape == (1, 4)


def test_repeated_and_missing_names_are_made_unique() -> None:
    f = TfliteBuilder()
    x = f.tensor((1, 4, 4, 2), "float32")
    y, z = f.tensor((1, 4, 4, 2), "float32"), f.tensor((1, 4, 4, 2), "float32")
    for index, name in ((x, "a"), (y, "a"), (z, "")):
        f.graph.tensors[index].name = name
    f.op("RELU", [x], [y])
    f.op("LOGISTIC", [y], [z])
    graph = import_tflite(f.finish([x], [z]))
    assert [node.output for node in graph.nodes] == ["a#1", "tensor_2"]


def pad_file(paddings: list[list[int]], shape: tuple[int, ...]) -> bytes:
    f = TfliteBuilder()
    x = f.tensor((1, 4, 4, 2), scale=0.1)
    p = f.tensor((4, 2), "int32", np.array(paddings, np.int32), scale=None)
    y = f.tensor(shape, scale=0.1)
    f.op("PAD", [x, p], [y], "PadOptions")
    return f.finish([x], [y])


def test_pad_nodes_stay() -> None:
    graph = import_tflite(pad_file([[0, 0], [1, 2], [0, 3], [0, 0]], (1, 7, 7, 2)))
    assert [(node.op, node.attributes["pads"]) for node in graph.nodes] == [("pad", (1, 2, 0, 3))]
    with pytest.raises(InputError, match=r"PAD -> t2 has paddings .* only rows and columns"):
        import_tflite(pad_file([[0, 0], [0, 0], [0, 0], [1, 1]], (1, 4, 4, 4)))


def scalar_mul_file() -> bytes:
    f = TfliteBuilder()
    half = f.tensor((), "float32", np.array(0.5, np.float32))
    x, y = f.tensor((1, 4, 4, 2), "float32"), f.tensor((1, 4, 4, 2), "float32")
    f.op("MUL", [half, x], [y], "MulOptions")
    return f.finish([x], [y])


def test_product_with_a_scalar(rng: np.random.Generator) -> None:
    graph = import_tflite(scalar_mul_file())
    x = rng.normal(size=(1, 4, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(LitertEngine(to_tflite(graph)).features(x)[0], x / 2)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (conv_file(tail="RELU_N1_TO_1"), {}, "RELU_N1_TO_1 -> t4 is not supported"),
        (conv_file(scale=0.0), {}, "t0 is int8 but has no scale"),
        (conv_file(scale=np.nan), {}, "t0 is int8 but has no scale"),
        (conv_file(weight_zero=3), {}, "CONV_2D -> t3 has int8 weights whose zero point is not 0"),
        (conv_file(), {"outputs": ["t9"]}, "has no tensor t9; it has t3"),
        (conv_file(), {"outputs": ["t1"]}, "output t1 is not computed from the input"),
        (conv_file(size=2, padding=VALID), {}, "window does not fit"),
    ],
)
def test_one_line_says_what_is_wrong(data: bytes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        import_tflite(data, **options)
    assert "\n" not in str(caught.value)


def test_shape_that_contradicts_the_file_is_named() -> None:
    with pytest.raises(InputError, match=r"PAD -> t2 has shape \(1, 9, 9, 2\) in the file"):
        import_tflite(pad_file([[0, 0], [1, 2], [0, 3], [0, 0]], (1, 9, 9, 2)))


@pytest.mark.parametrize("dequantize", [False, True])
def test_damaged_files_give_one_error_or_a_graph(dequantize: bool) -> None:
    """Every byte of a small file, set to three other values: a Graph or an InputError, nothing else."""
    whole = conv_file(tail="MEAN")
    for i in range(len(whole)):
        for value in (0, 255, whole[i] ^ 1):
            damaged = bytearray(whole)
            damaged[i] = value
            try:
                assert isinstance(import_tflite(bytes(damaged), dequantize), Graph)
            except InputError as error:
                assert "\n" not in str(error)


PUBLISHED = [
    ("mcunet_in3_imagenet_int8", None),
    ("mcunet_in4_imagenet_int8", None),
    ("mobilenet_v2_1.0_imagenet_ptq", "SOFTMAX"),
    ("zoo/ml_vww96", "SOFTMAX"),
    ("zoo/ml_kws", "SOFTMAX"),
    ("zoo/te_vww", "TRANSPOSE"),
]


@pytest.mark.parametrize(("name", "unsupported"), PUBLISHED)
def test_published_networks_survive_the_round_trip(
    name: str, unsupported: str | None, shared: Path, rng: np.random.Generator
) -> None:
    """Import, export, import: equal bytes, and every tensor of the new file equals the published one's."""
    path = shared / f"weights/{name}.tflite"
    outputs = None
    if unsupported is not None:
        with pytest.raises(InputError, match=f"{unsupported} -> .* is not supported; tap an earlier tensor"):
            import_tflite(path)
        file = read_tflite(path)
        outputs = [file.tensors[next(o for o in file.operators if o.op == unsupported).inputs[0]].name]
    graph = import_tflite(path, outputs=outputs)
    data = to_tflite(graph)
    assert to_tflite(import_tflite(data)) == data
    image_tensor = graph.tensors[graph.inputs[0]]
    image = rng.integers(-100, 100, image_tensor.shape).astype(image_tensor.dtype)
    wanted, engine = LitertEngine(path).all_tensors(image[0]), LitertEngine(data)
    found = engine.all_tensors(image[0])
    common = [tensor for tensor in found if tensor in wanted]
    assert len(common) > 0.9 * len(found)
    for tensor in common:
        np.testing.assert_array_equal(found[tensor], wanted[tensor], err_msg=tensor)
    np.testing.assert_array_equal(TflmEngine(data).features(image)[0], engine.features(image)[0])


def test_published_network_dequantized_and_resized(shared: Path, rng: np.random.Generator) -> None:
    """MobileNetV2's taps as float at another size: close to what its int8 form computes at its own."""
    path = shared / "weights/mobilenet_v2_1.0_imagenet_ptq.tflite"
    file = read_tflite(path)
    adds = [o.outputs[0] for o in file.operators if o.op == "ADD"][:2]
    tap = file.tensors[adds[0]]
    graph = import_tflite(path, dequantize=True, outputs=[tap.name])
    assert "quantize" not in {node.op for node in graph.nodes}
    image = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)
    quantization, first = tap.quantization, file.tensors[file.inputs[0]].quantization
    assert quantization is not None and first is not None
    steps = LitertEngine(path).all_tensors(image)[tap.name].astype(float)
    wanted = (steps - quantization.zero_point[0]) * quantization.scale[0]
    real = ((image.astype(float) - first.zero_point[0]) * first.scale[0]).astype(np.float32)
    (found,) = LitertEngine(to_tflite(graph), "default").features(real[None])
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.98
    other = import_tflite(path, dequantize=True, outputs=[tap.name], input_size=(96, 160))
    assert other.tensors[other.outputs[0]].shape == (1, 24, 40, tap.shape[3])
    (small,) = LitertEngine(to_tflite(other), "default").features(real[None, :96, :160])
    # far from the cut, a crop's features are the picture's
    np.testing.assert_allclose(small[0, 1:15, 1:30], found[0, 1:15, 1:30], rtol=1e-3, atol=1e-3)


def test_file_with_two_inputs_is_refused() -> None:
    f = TfliteBuilder()
    a, b, y = (f.tensor((1, 2, 2, 1), "float32") for _ in range(3))
    f.op("ADD", [a, b], [y], "AddOptions")
    with pytest.raises(InputError, match="2 inputs; only networks with one image input"):
        import_tflite(f.finish([a, b], [y]))


def test_requantisation_in_the_middle_needs_dequantize() -> None:
    f = TfliteBuilder()
    x, y, z = f.tensor((1, 2, 2, 1), scale=0.1), f.tensor((1, 2, 2, 1), scale=0.1), f.tensor((1, 2, 2, 1), scale=0.2)
    f.op("RELU", [x], [y])
    f.op("QUANTIZE", [y], [z], "QuantizeOptions")
    data = f.finish([x], [z])
    with pytest.raises(InputError, match="QUANTIZE -> t2 changes the scale in the middle"):
        import_tflite(data)
    assert import_tflite(data, dequantize=True).outputs == ["t1"]


def test_graph_can_be_changed_without_touching_the_file() -> None:
    data = conv_file()
    graph = import_tflite(data)
    graph.tensors["t3"] = dataclasses.replace(graph.tensors["t3"], name="other")
    assert import_tflite(data).tensors["t3"].name == "t3"


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0_imagenet_ptq", "mcunet_in3_imagenet_int8", "mcunet_in4_imagenet_int8"])
def test_the_trunk_ends_before_the_classifier(shared, name):
    """SOFTMAX, RESHAPE and the last FULLY_CONNECTED are heads; what is left is one map of the published width."""
    file = read_tflite(shared / "weights" / f"{name}.tflite")
    outputs = trunk_outputs(file)
    graph = import_tflite(shared / "weights" / f"{name}.tflite", dequantize=True, outputs=outputs)
    assert len(graph.tensors[graph.outputs[0]].shape) == 4
