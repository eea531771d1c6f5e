"""The float engine against the plain interpreter, and what calibration collects against NumPy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from reference_interpreter import run

from tinyvad.engines.onnx import OnnxEngine, calibrate
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph


def network(rng: np.random.Generator) -> Graph:
    """conv, depthwise, conv, mean, flat; taps: the second map, the first, the vector."""
    b = GraphBuilder("net", (1, 8, 6, 3))

    def constants(name: str, shape: tuple[int, ...], out: int) -> list[str]:
        weights, bias = rng.normal(0, 0.5, shape), rng.normal(0, 0.5, out)
        return [b.constant(f"{name}.w", weights.astype(np.float32)), b.constant(f"{name}.b", bias.astype(np.float32))]

    stem = {"stride": (2, 1), "pads": (1, 1, 0, 1), "activation": "relu6"}
    a = b.add("conv2d", [b.input, *constants("a", (4, 3, 3, 3), 4)], "a", **stem)
    c = b.add("depthwise_conv2d", [a, *constants("c", (1, 3, 3, 4), 4)], "c", stride=(1, 1), pads=(1, 1, 1, 1))
    flat = b.add("reshape", [b.add("mean", [c], "mean")], "flat", shape=(1, 4))
    return b.finish([c, a, flat])


def model_of(graph: Graph) -> bytes:
    return to_onnx(graph).SerializeToString()


def test_maps_are_those_of_the_plain_interpreter(rng: np.random.Generator) -> None:
    graph = network(rng)
    images = rng.normal(0, 1, (3, 8, 6, 3)).astype(np.float32)
    engine = OnnxEngine(model_of(graph))
    assert engine.outputs == ["c", "a", "flat"] and engine.name == "onnx" and not engine.exact
    maps = engine.features(images)
    for name, found in zip(engine.outputs, maps, strict=True):
        wanted = np.concatenate([run(graph, image[None])[name] for image in images])
        assert found.dtype == np.float32 and found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_result_depends_on_threads_or_company(rng: np.random.Generator) -> None:
    model = model_of(network(rng))
    images = rng.normal(0, 1, (5, 8, 6, 3)).astype(np.float32)
    alone = [OnnxEngine(model, 1).features(image[None]) for image in images]
    for threads in (1, 2, 4):
        for i, found in enumerate(OnnxEngine(model, threads).features(images)):
            np.testing.assert_array_equal(found, np.concatenate([maps[i] for maps in alone]))


def test_a_file_does_as_well_as_bytes(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = network(rng)
    to_onnx(graph, tmp_path / "net.onnx")
    image = rng.normal(0, 1, (1, 8, 6, 3)).astype(np.float32)
    for path in (tmp_path / "net.onnx", str(tmp_path / "net.onnx")):
        np.testing.assert_array_equal(OnnxEngine(path).features(image)[0], OnnxEngine(model_of(graph)).features(image)[0])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 6, 8, 3), "float32"), ((1, 8, 6, 1), "float32"), ((1, 8, 6, 3), "float64"),
        ((0, 8, 6, 3), "float32"), ((8, 6, 3), "float32"),
    ],
)  # fmt: skip
def test_wrong_images_are_refused(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> None:
    engine = OnnxEngine(model_of(network(rng)))
    with pytest.raises(InputError, match=rf"takes float32 images of \(8, 6, 3\), not {dtype} \("):
        engine.features(np.zeros(shape, dtype))


def test_models_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    cases = ((tmp_path / "broken.onnx", r"broken\.onnx"), (b"nothing", "the model"), (tmp_path / "no.onnx", r"no\.onnx"))
    for model, name in cases:
        with pytest.raises(InputError, match=f"onnxruntime does not accept .*{name}") as caught:
            OnnxEngine(model)
        assert "\n" not in str(caught.value)


def identity(inputs: list[Any]) -> bytes:
    nodes = [helper.make_node("Identity", [i.name], [f"{i.name}_out"]) for i in inputs]
    outputs = [helper.make_tensor_value_info(f"{i.name}_out", i.type.tensor_type.elem_type, None) for i in inputs]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_models_of_another_kind_are_refused() -> None:
    def image(name: str, kind: int = TensorProto.FLOAT, shape: Any = ("N", 3, 4, 4)) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    two, uint8, vector = [image("a"), image("b")], [image("a", TensorProto.UINT8)], [image("a", shape=("N", 5))]
    for inputs in (two, uint8, vector):
        with pytest.raises(InputError, match=r"the model must have one float32 image input \(N, C, H, W\)"):
            OnnxEngine(identity(inputs))
    free = OnnxEngine(identity([image("a", shape=("N", 3, "H", "W"))]))
    x = np.arange(2 * 5 * 7 * 3, dtype=np.float32).reshape(2, 5, 7, 3)
    np.testing.assert_array_equal(free.features(x)[0], x)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        OnnxEngine(b"")


# -- calibration --------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_values(rng: np.random.Generator) -> None:
    """Whatever the batches: minimum, maximum and mean of each channel over images and positions."""
    graph = network(rng)
    every = graph.copy(outputs=[node.output for node in graph.nodes])
    images = rng.normal(0, 1, (6, 8, 6, 3)).astype(np.float32)
    engine = OnnxEngine(model_of(every))
    runs = [run(graph, image[None]) for image in images]
    for batches in ([images], [images[:1], images[1:]], [image[None] for image in images]):
        found = calibrate(engine, iter(batches))
        assert list(found) == ["a", "c", "mean", "flat"]
        for name, statistics in found.items():
            values = np.concatenate([values[name].reshape(-1, 4) for values in runs])  # (n*h*w, C)
            assert statistics.low.dtype == statistics.high.dtype == statistics.mean.dtype == np.float64
            np.testing.assert_allclose(statistics.low, values.min(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(statistics.high, values.max(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-4, atol=1e-5)


def test_calibration_needs_an_image(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="calibration needs at least one good image"):
        calibrate(OnnxEngine(model_of(network(rng))), iter([]))
