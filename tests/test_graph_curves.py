"""Logistic and hard-swish tables: all 256 values on many grids, against plain integers, real functions, TFLM and LiteRT.

Then: on which grids TFLM and LiteRT's reference kernels agree, found out by running both.
"""

from __future__ import annotations

import dataclasses

import integer_interpreter
import numpy as np
import pytest

from tinyvad.engines import Engine
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.errors import InputError
from tinyvad.export.tflite import to_tflite
from tinyvad.graph.agreement import logistic_agrees, mul_agrees, relu_agrees
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.curves import hard_swish_table, logistic_table
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.tflite_import import import_tflite

VALUES = np.arange(-128, 128)
FIXED = Quantization.per_tensor(1 / 256, -128)


def grid(rng: np.random.Generator, low: float, high: float) -> Quantization:
    scale = np.float32(np.exp(rng.uniform(np.log(low), np.log(high))))
    return Quantization.per_tensor(float(scale), int(rng.integers(-128, 128)))


def in_order(table: np.ndarray) -> np.ndarray:
    """A table's entries for -128 to 127."""
    return table[VALUES.astype(np.int8).view(np.uint8)]


def real(x: Quantization) -> np.ndarray:
    return (VALUES - int(x.zero_point[0])) * float(x.scale[0])


def one_op(op: str, grids: list[Quantization], shape: tuple[int, ...] = (1, 1, 256, 1)) -> bytes:
    """A file of one op whose last grid is the output's; a second operand is a constant of all 256 values."""
    b = GraphBuilder("one", shape)
    inputs = [b.input]
    if op == "mul":
        inputs.append(b.constant("other", VALUES.astype(np.int8).reshape(1, 1, 1, 256)))
    graph = b.finish([b.add(op, inputs, "out", **({"activation": "none"} if op == "mul" else {}))])
    for name, quantization in zip([*inputs, "out"], grids, strict=True):
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=quantization)
    return to_tflite(graph)


def by_engines(model: bytes) -> dict[str, np.ndarray]:
    """What the exact engine, TFLM and LiteRT make of all values; a product is run with each value in every channel."""
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
    pytest.importorskip("tflite_micro", reason="needs TFLM")
    exact = Int8Engine(import_tflite(model), 1)
    shape = exact.graph.tensors[exact.graph.inputs[0]].shape
    image = np.broadcast_to(VALUES.astype(np.int8).reshape(1, 1, 256, 1) if shape[3] == 1 else
                            VALUES.astype(np.int8).reshape(1, 256, 1, 1), shape)  # fmt: skip
    engines: dict[str, Engine] = {"int8": exact, "tflm": TflmEngine(model), "litert": LitertEngine(model)}
    return {name: engine.features(np.ascontiguousarray(image))[0].ravel() for name, engine in engines.items()}


# --- tables ---


def test_logistic_is_the_plain_fixed_point_and_within_half_a_step(rng: np.random.Generator) -> None:
    for _ in range(150):
        x = grid(rng, 1e-7, 15)
        found = in_order(logistic_table(x))
        scale, zero_point = float(x.scale[0]), int(x.zero_point[0])
        assert found.tolist() == [integer_interpreter.logistic(int(v) - zero_point, scale) - 128 for v in VALUES]
        wanted = np.minimum(256 / (1 + np.exp(-np.clip(real(x), -50, 50))), 255) - 128
        assert np.abs(found - wanted).max() < 0.50001 or scale > 1  # where it saturates early
        assert (np.diff(found.astype(int)) >= 0).all()


def test_hard_swish_is_the_plain_16_bits_and_within_a_step(rng: np.random.Generator) -> None:
    ranges = set()
    for _ in range(150):
        x = grid(rng, 1e-4, 2)
        scale = float(np.float32(float(x.scale[0]) * np.exp(rng.uniform(np.log(1 / 60), np.log(50)))))
        y = Quantization.per_tensor(scale, int(rng.integers(-128, 128)))
        found = in_order(hard_swish_table(x, y, "y"))
        zero_point, out = int(x.zero_point[0]), int(y.zero_point[0])
        plain = [integer_interpreter.hard_swish(int(v) - zero_point, float(x.scale[0]), scale) + out for v in VALUES]
        assert found.tolist() == np.clip(plain, -128, 127).tolist()
        wanted = np.clip(real(x) * np.clip(real(x) + 3, 0, 6) / 6 / scale + out, -128, 127)
        assert np.abs(found - wanted).max() <= 1.01 * max(1.0, float(x.scale[0]) / scale / 8)
        ranges.add(len(set(found.tolist())) > 100)
    assert ranges == {False, True}


def test_closed_forms() -> None:
    x = Quantization.per_tensor(1 / 16, 0)
    sigmoid, swish = in_order(logistic_table(x)), in_order(hard_swish_table(x, x, "y"))
    assert (sigmoid[128], sigmoid[0], sigmoid[255]) == (0, -128, 127)
    assert (swish[VALUES <= -48] == 0).all() and (swish[VALUES >= 48] == VALUES[VALUES >= 48]).all()
    assert (swish[128], swish.min(), VALUES[swish.argmin()] in range(-32, -15)) == (0, -6, True)


def test_hard_swish_beyond_16_bits_is_refused() -> None:
    x = Quantization.per_tensor(0.1, 0)
    for scale in (0.1 / 129, 0.1 * 600):
        with pytest.raises(InputError, match=r"hard_swish -> y: scales 0\.1 and .* beyond hard-swish's 16 bits; quantise"):
            hard_swish_table(x, Quantization.per_tensor(scale, 0), "hard_swish -> y")
    with pytest.raises(InputError, match="16 bits"):
        hard_swish_table(Quantization.per_tensor(1e-8, 0), Quantization.per_tensor(1e-8, 0), "y")


# --- the engines ---


@pytest.mark.parametrize("op", ["logistic", "hard_swish"])
def test_all_values_on_many_grids_in_every_engine(op: str, rng: np.random.Generator) -> None:
    agreeing = 0
    for _ in range(60):
        x = grid(rng, 1e-3, 1)
        scale = float(np.float32(float(x.scale[0]) * rng.uniform(0.05, 5)))
        y = FIXED if op == "logistic" else Quantization.per_tensor(scale, int(rng.integers(-128, 128)))
        model = one_op(op, [x, y])
        found = by_engines(model)
        np.testing.assert_array_equal(found["int8"], found["tflm"])
        agrees = op == "hard_swish" or logistic_agrees(x)
        assert LitertEngine(model).exact == agrees
        if agrees:
            np.testing.assert_array_equal(found["int8"], found["litert"])
            agreeing += 1
    assert agreeing > 50


def test_all_pairs_of_values_where_a_product_is_said_to_agree(rng: np.random.Generator) -> None:
    for _ in range(6):
        a, b = grid(rng, 0.01, 0.1), grid(rng, 1 / 256, 6 / 255)
        scale = float(a.scale[0]) * float(b.scale[0]) * rng.uniform(30, 255)
        y = Quantization.per_tensor(float(np.float32(scale)), int(rng.integers(-128, 128)))
        model = one_op("mul", [a, b, y], (1, 256, 1, 256))
        found = by_engines(model)
        np.testing.assert_array_equal(found["int8"], found["tflm"])
        assert LitertEngine(model).exact == mul_agrees(a, b, y)
        if mul_agrees(a, b, y):
            np.testing.assert_array_equal(found["int8"], found["litert"])


# Grids on which the two differ, found by search: (scale, zero point) of the inputs and the output.
DIFFERING = {
    "logistic": [
        [(0.03466019034385681, -86), (1 / 256, -128)],
        [(0.03703639656305313, -11), (1 / 256, -128)],
        [(0.028814053162932396, -2), (1 / 256, -128)],
    ],
    "relu": [
        [(0.037044573575258255, -128), (0.025007419288158417, -128)],
        [(0.36579838395118713, -128), (0.9485530257225037, -128)],
    ],
}  # fmt: skip


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 0.9, 2.01, 4.4, 7.5, 8.0, 14.0, 15.5, 16.0, 40.0, 1000.0])
def test_extreme_scales_of_a_logistic(scale: float) -> None:
    """With coarse steps TFLM saturates early: from 16 on at once, 0 included."""
    for zero_point in (-128, 3, 127):
        x = Quantization.per_tensor(scale, zero_point)
        found = by_engines(one_op("logistic", [x, FIXED]))
        np.testing.assert_array_equal(found["int8"], found["tflm"])
        assert np.array_equal(found["int8"], found["litert"]) or not logistic_agrees(x)


@pytest.mark.parametrize("op", DIFFERING)
def test_grids_on_which_litert_differs_are_known(op: str) -> None:
    for pairs in DIFFERING[op]:
        grids = [Quantization.per_tensor(*pair) for pair in pairs]
        model = one_op(op, grids)
        found = by_engines(model)
        np.testing.assert_array_equal(found["int8"], found["tflm"])
        assert (found["int8"] != found["litert"]).any() and not LitertEngine(model).exact
        assert not (logistic_agrees(grids[0]) if op == "logistic" else relu_agrees(*grids))


def test_products_on_which_litert_differs_are_known(rng: np.random.Generator) -> None:
    """Drawn until two grids disagree: a few of a hundred do."""
    differing = 0
    for _ in range(300):
        a, b = grid(rng, 0.01, 0.1), grid(rng, 1 / 256, 6 / 255)
        scale = float(a.scale[0]) * float(b.scale[0]) * rng.uniform(30, 255)
        y = Quantization.per_tensor(float(np.float32(scale)), int(rng.integers(-128, 128)))
        if mul_agrees(a, b, y):
            continue
        model = one_op("mul", [a, b, y], (1, 256, 1, 256))
        found = by_engines(model)
        np.testing.assert_array_equal(found["int8"], found["tflm"])
        assert (found["int8"] != found["litert"]).any() and not LitertEngine(model).exact
        differing += 1
        if differing == 2:
            return
    raise AssertionError(f"only {differing} found")


def test_power_of_two_factors_agree_and_shifts_beyond_32_bits_do_not() -> None:
    a, b = Quantization.per_tensor(0.0371, 5), Quantization.per_tensor(1 / 256, -128)
    assert mul_agrees(a, b, Quantization.per_tensor(float(np.float32(0.0371)) / 2, 0))
    assert not mul_agrees(a, b, Quantization.per_tensor(1e-13, 0))
    assert not relu_agrees(a, Quantization.per_tensor(1e-9, 0))


def float_graph() -> Graph:
    b = GraphBuilder("f", (1, 4, 4, 2))
    return b.finish([b.add("mul", [b.input, b.add("logistic", [b.input], "gate")], "out", activation="none")])


def test_float_files_are_not_called_exact() -> None:
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
    assert not LitertEngine(to_tflite(float_graph())).exact
