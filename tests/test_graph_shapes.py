"""Shapes of every op, and nearest-neighbour indices, against closed forms and LiteRT."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference_interpreter

from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Node, Quantization, Tensor, node_macs
from tinyvad.graph.shapes import Shape, infer_shape, nearest_indices, window_size


def shape_of(op: str, inputs: list[Shape], **attributes: Any) -> Shape:
    return infer_shape(Node(op, tuple(f"x{i}" for i in range(len(inputs))), "y", attributes), inputs)


# -- windows ------------------------------------------------------------------------------------------------------------


def test_window_size_counts_the_windows() -> None:
    for size in range(1, 12):
        for kernel in range(1, 6):
            for stride in range(1, 4):
                for dilation in (1, 2, 3):
                    for before, after in ((0, 0), (1, 0), (0, 2), (3, 1)):
                        reach = dilation * (kernel - 1) + 1
                        wanted = len(range(0, size + before + after - reach + 1, stride))
                        found = window_size(size, kernel, stride, before, after, dilation)
                        assert max(found, 0) == wanted


def test_window_ops() -> None:
    window = {"stride": (2, 1), "pads": (1, 0, 2, 1), "dilation": (1, 2)}
    # rows: (9 + 1 - 3) // 2 + 1 = 4; columns: 8 + 3 - (2 * 1 + 1) + 1 = 9
    assert shape_of("conv2d", [(1, 9, 8, 5), (7, 3, 2, 5), (7,)], **window) == (1, 4, 9, 7)
    assert shape_of("depthwise_conv2d", [(1, 9, 8, 5), (1, 3, 2, 5), (5,)], **window) == (1, 4, 9, 5)
    pool = {"kernel": (3, 2), "stride": (2, 1), "pads": (1, 0, 2, 1)}
    assert shape_of("average_pool", [(1, 9, 8, 5)], **pool) == (1, 4, 10, 5)
    assert shape_of("max_pool", [(1, 9, 8, 5)], **pool) == (1, 4, 10, 5)


def test_other_ops() -> None:
    x = (1, 9, 8, 5)
    assert shape_of("fully_connected", [(1, 5), (7, 5), (7,)]) == (1, 7)
    assert shape_of("add", [x, x]) == x
    assert shape_of("mul", [x, (1, 1, 1, 5)]) == x
    assert shape_of("mul", [x, x]) == x
    assert shape_of("mean", [x]) == (1, 1, 1, 5)
    assert shape_of("pad", [x], pads=(1, 2, 3, 4)) == (1, 12, 15, 5)
    assert shape_of("resize_nearest", [x], size=(3, 4)) == (1, 3, 4, 5)
    assert shape_of("concat", [x, (1, 9, 8, 2), x], axis=3) == (1, 9, 8, 12)
    assert shape_of("reshape", [x], shape=[1, 360]) == (1, 360)
    for op in ("batch_norm", "relu", "relu6", "logistic", "hard_swish", "quantize", "dequantize"):
        assert shape_of(op, [x]) == x


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("conv2d", [(1, 9, 8, 5), (7, 3, 3, 4), (7,)], {}, "conv2d -> y: 5 channels in, but weights for 4"),
        ("conv2d", [(1, 40), (7, 1, 1, 40), (7,)], {}, r"conv2d -> y: needs a map \(1, H, W, C\).* is \(1, 40\)"),
        ("mean", [(1, 40)], {}, r"mean -> y: needs a map"),
        ("fully_connected", [(1, 5), (7, 6), (7,)], {}, r"fully_connected -> y: \(5,\) values in, but weights for \(6,\)"),
        ("fully_connected", [(1, 2, 2, 5), (7, 5), (7,)], {}, r"fully_connected -> y: \(2, 2, 5\) values in"),
        ("add", [(1, 9, 8, 5), (1, 9, 8, 4)], {}, r"add -> y: shapes \(1, 9, 8, 5\) and \(1, 9, 8, 4\) differ"),
        ("add", [(1, 9, 8, 5), (1, 1, 1, 5)], {}, "add -> y: shapes"),
        ("mul", [(1, 9, 8, 5), (1, 1, 8, 5)], {}, "mul -> y: shapes"),
        ("concat", [(1, 9, 8, 5), (1, 9, 7, 5)], {}, "concat -> y: shapes .* differ in more than channels"),
        ("reshape", [(1, 9, 8, 5)], {"shape": (1, 361)}, r"reshape -> y: \(1, 9, 8, 5\) has 360 values, .* has 361"),
        ("softmax", [(1, 5)], {}, r"unknown operation softmax \(tensor y\)"),
        (
            "max_pool", [(1, 2, 8, 5)], {"kernel": (3, 3), "stride": (1, 1), "pads": (0, 0, 0, 0)},
            "max_pool -> y: a 3x3 window does not fit the 2x8 map; use a larger --image-size",
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_go_together(op: str, inputs: list[Shape], attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        shape_of(op, inputs, **attributes)


# -- whole graphs -------------------------------------------------------------------------------------------------------


def small_graph() -> Graph:
    b = GraphBuilder("small", (1, 16, 16, 3))
    w, bias = b.constant("w", np.zeros((4, 3, 3, 3), np.float32)), b.constant("b", np.zeros(4, np.float32))
    x = b.add("conv2d", [b.input, w, bias], "conv", stride=(2, 2), pads=(1, 1, 1, 1))
    w, bias = b.constant("dw", np.zeros((1, 3, 3, 4), np.float32)), b.constant("db", np.zeros(4, np.float32))
    x = b.add("depthwise_conv2d", [x, w, bias], "dwconv", stride=(1, 1), pads=(1, 1, 1, 1))
    x = b.add("reshape", [b.add("mean", [x], "mean")], "flat", shape=(1, 4))
    w, bias = b.constant("fw", np.zeros((5, 4), np.float32)), b.constant("fb", np.zeros(5, np.float32))
    return b.finish([b.add("fully_connected", [x, w, bias], "logits")])


def test_the_builder_infers_every_shape() -> None:
    graph = small_graph()
    assert graph.tensors["conv"].shape == graph.tensors["dwconv"].shape == (1, 8, 8, 4)
    assert graph.tensors["flat"].shape == (1, 4) and graph.tensors["logits"].shape == (1, 5)



def test_macs_and_parameters() -> None:
    graph = small_graph()
    assert [node_macs(graph, node) for node in graph.nodes] == [8 * 8 * 4 * 27, 8 * 8 * 4 * 9, 0, 0, 20]
    assert graph.macs() == 8 * 8 * 4 * 36 + 20
    assert graph.parameters() == 4 * 27 + 4 + 36 + 4 + 20 + 5


def test_check_names_what_is_wrong() -> None:
    graph = small_graph()
    graph.check()
    bad = graph.copy(nodes=graph.nodes[1:])
    with pytest.raises(InputError, match="depthwise_conv2d -> dwconv reads conv, which nothing makes"):
        bad.check()
    with pytest.raises(InputError, match="conv is produced twice"):
        graph.copy(nodes=[graph.nodes[0], graph.nodes[0]]).check()
    with pytest.raises(InputError, match="output nowhere is not made"):
        graph.copy(outputs=["nowhere"]).check()
    without = {name: tensor for name, tensor in graph.tensors.items() if name != "mean"}
    with pytest.raises(InputError, match="tensor mean has no description"):
        graph.copy(tensors=without).check()


def test_graph_helpers() -> None:
    graph = small_graph()
    assert graph.activations == ["input", "conv", "dwconv", "mean", "flat", "logits"]
    producer = graph.producer("conv")
    assert producer is graph.nodes[0] and graph.producer("input") is None
    assert [node.output for node in graph.consumers("conv")] == ["dwconv"]
    assert Tensor("t", (1, 3, 5, 7), "int32").nbytes == 3 * 5 * 7 * 4
    changed = graph.nodes[0].with_attributes(activation="relu")
    assert changed.attributes["activation"] == "relu" and "activation" not in graph.nodes[0].attributes


# -- nearest neighbours ---------------------------------------------------------------------------------------------------


def test_nearest_indices_follow_float32_arithmetic() -> None:
    """All sizes up to 64 onto up to 128, against the formula row by row; they aren't always i * size // out."""
    unlike_integers = 0
    for size in range(1, 65):
        for out in range(1, 129):
            found = nearest_indices(size, out)
            assert found.tolist() == reference_interpreter.nearest_rows(size, out, {})
            unlike_integers += not np.array_equal(found, np.arange(out) * size // out)
    assert unlike_integers > 50
    assert nearest_indices(6, 74)[37] == 2 and 37 * 6 // 74 == 3


@pytest.mark.parametrize("flags", [{}, {"align_corners": True}, {"half_pixel_centers": True}])
def test_nearest_indices_are_litert_s(flags: dict[str, bool]) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
    pytest.importorskip("tflite_micro", reason="needs TFLM")
    from tinyvad.engines.litert import LitertEngine
    from tinyvad.engines.tflm import TflmEngine

    quantization = Quantization.per_tensor(0.1, 0)
    for size, out in ((6, 74), (49, 7), (7, 49), (1, 5), (5, 1), (22, 11), (11, 22), (3, 41), (64, 99), (8, 8)):
        b = GraphBuilder("resize", (1, size, out, 1))
        graph = b.finish([b.add("resize_nearest", [b.input], "y", size=(out, size), **flags)])
        for name in ("input", "y"):
            graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=quantization)
        image = (np.arange(size)[:, None] * 37 + np.arange(out)).astype(np.int8)[..., None]  # (size, out, 1)
        rows, columns = nearest_indices(size, out, **flags), nearest_indices(out, size, **flags)
        wanted = image[rows][:, columns]
        for engine in (LitertEngine(to_tflite(graph)), TflmEngine(to_tflite(graph))):
            np.testing.assert_array_equal(engine.features(image[None])[0][0], wanted, err_msg=f"{engine.name} {size} {out}")
        np.testing.assert_array_equal(reference_interpreter.run(graph, image[None])["y"][0], wanted)
