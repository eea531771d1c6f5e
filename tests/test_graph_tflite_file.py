"""The .tflite reader against what was written, against LiteRT's own view of a file, and against damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import tflite
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_builder import TfliteBuilder

from tinyvad.errors import InputError
from tinyvad.graph.tflite_file import read_tflite


def small_model() -> bytes:
    """conv2d (per channel, stride 2x1, SAME, ReLU6) -> average pool -> reshape, with metadata and a variable."""
    rng = np.random.default_rng(0)
    b = TfliteBuilder()
    x = b.tensor((1, 8, 6, 3), scale=0.5, zero_point=-7)
    w = b.tensor((4, 3, 3, 3), data=rng.integers(-127, 128, (4, 3, 3, 3), dtype=np.int8), scale=[0.1, 0.2, 0.3, 0.4])
    bias = b.tensor((4,), "int32", np.array([1, -2, 3, -4], np.int32), scale=[0.05, 0.1, 0.15, 0.2])
    y = b.tensor((1, 4, 6, 4))
    p = b.tensor((1, 2, 3, 4))
    shape = b.tensor((2,), "int32", np.array([1, 24], np.int32), scale=None)
    r = b.tensor((1, 24))
    b.tensor((1, 5), variable=True)
    b.op(
        "CONV_2D", [x, w, bias], [y], "Conv2DOptions",
        padding=0, strideH=2, strideW=1, dilationHFactor=1, dilationWFactor=1, fusedActivationFunction=3,
    )  # fmt: skip
    b.op(
        "AVERAGE_POOL_2D", [y], [p], "Pool2DOptions",
        padding=1, strideH=2, strideW=2, filterHeight=2, filterWidth=3, fusedActivationFunction=0,
    )  # fmt: skip
    b.op("RESHAPE", [p, shape], [r], "ReshapeOptions", newShape=[1, 24])
    b.metadata("note", b"abc")
    return b.finish([x], [r])


def test_reads_back_what_was_written() -> None:
    file = read_tflite(small_model())
    assert (file.inputs, file.outputs, file.n_subgraphs) == ([0], [6], 1)
    assert file.description == "synthetic"
    assert file.metadata == {"note": b"abc"}
    assert file.size == len(small_model())

    x, w, bias = file.tensors[:3]
    assert (x.shape, x.dtype, x.data, x.is_variable) == ((1, 8, 6, 3), "int8", None, False)
    assert x.quantization is not None
    assert (x.quantization.scale[0], x.quantization.zero_point[0], x.quantization.axis) == (0.5, -7, None)
    expected = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3), dtype=np.int8)
    assert w.data is not None
    np.testing.assert_array_equal(w.data, expected)
    assert w.buffer_nbytes == 108
    with pytest.raises(ValueError, match="read-only"):
        w.data[0, 0, 0, 0] = 1
    assert w.quantization is not None and w.quantization.axis == 0
    np.testing.assert_array_equal(w.quantization.scale, np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    np.testing.assert_array_equal(bias.data, [1, -2, 3, -4])
    assert file.tensors[5].quantization is None
    assert file.tensors[7].is_variable

    conv, pool, reshape = file.operators
    assert (conv.op, conv.inputs, conv.outputs) == ("CONV_2D", (0, 1, 2), (3,))
    assert conv.options == {
        "padding": "SAME", "stride_h": 2, "stride_w": 1, "dilation_h": 1, "dilation_w": 1,
        "activation": "RELU6", "quantized_bias_type": 0,
    }  # fmt: skip
    assert pool.options == {
        "padding": "VALID", "stride_h": 2, "stride_w": 2, "filter_h": 2, "filter_w": 3, "activation": "NONE",
    }  # fmt: skip
    assert reshape.options == {"new_shape": (1, 24)}


@pytest.mark.parametrize(
    ("op", "options", "fields", "expected"),
    [
        (
            "DEPTHWISE_CONV_2D",
            "DepthwiseConv2DOptions",
            {"depthMultiplier": 2, "dilationHFactor": 3, "strideW": 1, "strideH": 1, "dilationWFactor": 1},
            {"depth_multiplier": 2, "dilation_h": 3, "activation": "NONE", "padding": "SAME"},
        ),
        ("MEAN", "ReducerOptions", {"keepDims": True}, {"keep_dims": True}),
        ("CONCATENATION", "ConcatenationOptions", {"axis": -1}, {"axis": -1, "activation": "NONE"}),
        ("SOFTMAX", "SoftmaxOptions", {"beta": 1.5}, {"beta": 1.5}),
        (
            "RESIZE_NEAREST_NEIGHBOR",
            "ResizeNearestNeighborOptions",
            {"alignCorners": True, "halfPixelCenters": False},
            {"align_corners": True, "half_pixel_centers": False},
        ),
        ("SQUEEZE", "SqueezeOptions", {"squeezeDims": [1, 2]}, {"squeeze_dims": (1, 2)}),
        ("PAD", "PadOptions", {}, {}),
    ],
)
def test_options_of_any_operator(op: str, options: str, fields: dict, expected: dict) -> None:
    b = TfliteBuilder()
    x, y = b.tensor((1, 4)), b.tensor((1, 4))
    b.op(op, [x, -1], [y], options, **fields)
    (operator,) = read_tflite(b.finish([x], [y])).operators
    assert operator.inputs == (0, -1)
    assert {key: operator.options[key] for key in expected} == expected


def test_custom_operator_keeps_its_code() -> None:
    b = TfliteBuilder()
    x = b.tensor((1, 4))
    b.op("MyOp", [x], [x])
    b.graph.operators[0].customOptions = [1, 2, 3]
    (operator,) = read_tflite(b.finish([x], [x])).operators
    assert (operator.op, operator.options) == ("MyOp", {"custom_options": b"\x01\x02\x03"})


@pytest.mark.parametrize(("new", "old"), [(3, 0), (0, 3), (3, 3), (150, 127)])
def test_operator_code_in_either_field(new: int, old: int) -> None:
    b = TfliteBuilder()
    x = b.tensor((1, 4))
    b.op("CONV_2D", [x], [x])
    b.model.operatorCodes[0].builtinCode, b.model.operatorCodes[0].deprecatedBuiltinCode = new, old
    (operator,) = read_tflite(b.finish([x], [x])).operators
    assert operator.op == ("GELU" if new == 150 else "CONV_2D")


def test_int4_is_unpacked_low_nibble_first() -> None:
    b = TfliteBuilder()
    w = b.tensor((3,), "int4", np.array([0x8F, 0x07], np.uint8))
    (tensor,) = read_tflite(b.finish([w], [w])).tensors
    assert tensor.dtype == "int4" and tensor.data is not None
    np.testing.assert_array_equal(tensor.data, [-1, -8, 7])


def test_first_of_several_subgraphs_is_read() -> None:
    b = TfliteBuilder()
    x = b.tensor((1, 4))
    b.model.subgraphs.append(b.model.subgraphs[0])
    assert read_tflite(b.finish([x], [x])).n_subgraphs == 2


def test_path_and_bytes_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(small_model())
    assert read_tflite(path).path_name == str(path)
    assert read_tflite(str(path)).operators == read_tflite(small_model()).operators


@pytest.mark.parametrize("name", ["ml_kws", "ml_vww96", "te_vww"])
def test_agrees_with_litert(shared: Path, name: str) -> None:
    interpreter_module = pytest.importorskip("ai_edge_litert.interpreter", reason="needs ai-edge-litert")
    path = shared / "weights" / "zoo" / f"{name}.tflite"
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    file = read_tflite(path)
    interpreter = interpreter_module.Interpreter(
        str(path), experimental_op_resolver_type=interpreter_module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    assert file.inputs == [d["index"] for d in interpreter.get_input_details()]
    assert file.outputs == [d["index"] for d in interpreter.get_output_details()]
    details = {d["index"]: d for d in interpreter.get_tensor_details()}
    for tensor in file.tensors:
        detail = details[tensor.index]
        assert tensor.name == detail["name"]
        assert tensor.shape == tuple(detail["shape"])
        assert np.dtype(tensor.dtype) == detail["dtype"]
        parameters = detail["quantization_parameters"]
        scale: Any = [] if tensor.quantization is None else tensor.quantization.scale
        zero_point: Any = [] if tensor.quantization is None else tensor.quantization.zero_point
        np.testing.assert_array_equal(scale, parameters["scales"])
        np.testing.assert_array_equal(zero_point, parameters["zero_points"])
        if tensor.quantization is not None and tensor.quantization.axis is not None:
            assert tensor.quantization.axis == parameters["quantized_dimension"]
        if tensor.data is not None:
            np.testing.assert_array_equal(tensor.data, interpreter.get_tensor(tensor.index))
    ops = [d["op_name"] for d in interpreter._get_ops_details()]
    assert [op.op for op in file.operators] == ops


def check_bad(data: bytes, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_tflite(data)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_files_that_are_no_tflite(tmp_path: Path) -> None:
    check_bad(b"", "<bytes>", "empty")
    check_bad(b"TFL3", "no .tflite")
    check_bad(b"\x89PNG\r\n\x1a\n" * 10, "no .tflite")
    with pytest.raises(InputError, match=r"nothing\.tflite: No such file"):
        read_tflite(tmp_path / "nothing.tflite")
    with pytest.raises(InputError, match="cannot read"):
        read_tflite(tmp_path)
    (tmp_path / "bad.tflite").write_bytes(b"\x10\x00\x00\x00TFL3" + bytes(8))
    with pytest.raises(InputError, match=r"bad\.tflite is a damaged"):
        read_tflite(tmp_path / "bad.tflite")


def test_references_out_of_range() -> None:
    def model(**change: int) -> bytes:
        b = TfliteBuilder()
        x = b.tensor((1, 4))
        b.op("RELU", [change.get("input", x)], [change.get("output", x)])
        b.graph.operators[0].opcodeIndex = change.get("code", 0)
        b.graph.tensors[0].buffer = change.get("buffer", 0)
        b.model.version = change.get("version", 3)
        return b.finish([change.get("graph_input", x)], [x])

    read_tflite(model())
    check_bad(model(input=1), "tensor 1 of 1")
    check_bad(model(input=-2), "tensor -2 of 1")
    check_bad(model(output=-1), "tensor -1 of 1")
    check_bad(model(code=1), "code of operator 0")
    check_bad(model(buffer=9), "buffer of tensor 0")
    check_bad(model(version=2), "version 2")
    check_bad(model(graph_input=4), "tensor 4 of 1")


def test_constant_of_wrong_size() -> None:
    b = TfliteBuilder()
    w = b.tensor((5, 1 << 20, 1 << 20, 1 << 30), data=np.zeros(4, np.int8))
    check_bad(b.finish([w], [w]), "needs", "has 4")


def test_every_truncation_is_an_error_or_harmless() -> None:
    data = small_model()
    whole = read_tflite(data)
    for length in range(len(data)):
        try:
            file = read_tflite(data[:length])
        except InputError as error:
            assert "\n" not in str(error)
        else:  # only trailing padding was cut
            assert file.operators == whole.operators


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=12))
def test_flipped_bytes_never_crash(flips: list[tuple[int, int]]) -> None:
    data = bytearray(MODEL)
    for position, value in flips:
        data[8 + position % (len(data) - 8)] = value
    try:
        read_tflite(bytes(data))
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.binary(min_size=8, max_size=300))
def test_random_bytes_never_crash(root: int, tail: bytes) -> None:
    data = root.to_bytes(4, "little") + b"TFL3" + tail
    try:
        read_tflite(data)
    except InputError as error:
        assert "\n" not in str(error)


def test_shared_vectors_cannot_exhaust_the_reader() -> None:
    """20,000 operators that share one vector of 20,000 inputs: 400 million indices in 0.6 MB."""
    n = 20_000
    b = flatbuffers.Builder(1 << 20)
    inputs = b.CreateNumpyVector(np.full(n, -1, np.int32))
    operators = []
    for _ in range(n):
        tflite.OperatorStart(b)
        tflite.OperatorAddInputs(b, inputs)
        operators.append(tflite.OperatorEnd(b))
    tflite.SubGraphStartOperatorsVector(b, n)
    for operator in operators:
        b.PrependUOffsetTRelative(operator)
    vector = b.EndVector()
    tflite.SubGraphStart(b)
    tflite.SubGraphAddOperators(b, vector)
    graph = tflite.SubGraphEnd(b)
    tflite.ModelStartSubgraphsVector(b, 1)
    b.PrependUOffsetTRelative(graph)
    graphs = b.EndVector()
    tflite.OperatorCodeStart(b)
    code = tflite.OperatorCodeEnd(b)
    tflite.ModelStartOperatorCodesVector(b, 1)
    b.PrependUOffsetTRelative(code)
    codes = b.EndVector()
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    tflite.ModelAddOperatorCodes(b, codes)
    tflite.ModelAddSubgraphs(b, graphs)
    b.Finish(tflite.ModelEnd(b), b"TFL3")
    check_bad(bytes(b.Output()), "times the file")


MODEL = small_model()
