"""The planner against its definition, and every arena figure against the real TFLM interpreter.

TFLM prints its arena to C's stderr, so it runs in a subprocess, each model in a fork of its own: some models that we
build on purpose make it abort.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_builder import TfliteBuilder

from tinyvad.errors import InputError
from tinyvad.firmware_sim.memory import (
    Buffer,
    align,
    arena,
    lower_bound,
    plan_tflm_greedy,
    summary,
    tflite_buffers,
)
from tinyvad.graph.tflite_file import read_tflite

_RUN_TFLM = """
import os, sys
from tflite_micro import runtime
for path in sys.argv[1:]:
    os.write(2, b"\\n=== \\n")
    if os.fork() == 0:
        try:
            runtime.Interpreter.from_file(path, arena_size=8 << 20).print_allocations()
        except BaseException as error:
            os.write(2, str(error).encode())
        os._exit(0)
    os.wait()
"""


def tflm_arenas(folder: Path, models: list[bytes]) -> list[tuple[int, int] | str]:
    """(head, tail) bytes of each model in the real interpreter, or what TFLM said when it could not allocate."""
    if importlib.util.find_spec("tflite_micro") is None:
        pytest.skip("needs tflite-micro, the TFLM interpreter")
    paths = []
    for i, model in enumerate(models):
        paths.append(folder / f"{i}.tflite")
        paths[-1].write_bytes(model)
    run = subprocess.run([sys.executable, "-c", _RUN_TFLM, *map(str, paths)], capture_output=True, text=True)
    answers: list[tuple[int, int] | str] = []
    for part in run.stderr.split("\n=== \n")[1:]:
        head, tail = (re.search(rf"Arena allocation {word} (\d+)", part) for word in ("head", "tail"))
        answers.append((int(head[1]), int(tail[1])) if head and tail else " ".join(part.split()))
    assert len(answers) == len(models), run.stderr
    return answers


def check_against_tflm(folder: Path, models: dict[str, bytes]) -> int:
    """Heads equal, tails within 3 %; returns the number of models that TFLM could allocate."""
    compared = 0
    for (name, model), answer in zip(models.items(), tflm_arenas(folder, list(models.values()))):
        if isinstance(answer, str):
            continue
        ours = arena(read_tflite(model))
        assert (name, ours.head_kind, ours.head_bytes) == (name, "exact", answer[0])
        assert abs(ours.tail_bytes(8) - answer[1]) <= 0.03 * answer[1], name
        compared += 1
    return compared


# --- the planner ---


def test_greedy_goes_by_size_and_the_later_first_among_equals() -> None:
    same = [Buffer("a", 16, 0, 0), Buffer("b", 16, 0, 0), Buffer("c", 32, 0, 0), Buffer("d", 16, 0, 0)]
    assert plan_tflm_greedy(same) == ([64, 48, 0, 32], 80)


def test_greedy_takes_the_first_gap_that_is_large_enough() -> None:
    buffers = [
        Buffer("long", 64, 0, 9),  # first, at 0
        Buffer("early", 48, 0, 4),  # at 64
        Buffer("late", 32, 5, 9),  # at 64, where "early" is over
        Buffer("gap", 16, 5, 9),  # behind "late", inside what "early" had
    ]
    assert plan_tflm_greedy(buffers) == ([0, 64, 64, 96], 112)
    assert lower_bound(buffers) == 112


def test_greedy_can_be_worse_than_the_bound() -> None:
    buffers = [Buffer("a", 16, 0, 1), Buffer("b", 16, 1, 2), Buffer("c", 16, 0, 0), Buffer("d", 16, 2, 2)]
    # d and c go to 0, so b goes to 16, so a finds no place below 32; a at 0 and b at 16 would do
    assert plan_tflm_greedy(buffers) == ([32, 16, 0, 0], 48)
    assert lower_bound(buffers) == 32


def test_offline_offsets_are_kept_and_go_first() -> None:
    buffers = [Buffer("a", 100, 0, 1), Buffer("fixed", 16, 0, 1, offset=32), Buffer("b", 32, 0, 1)]
    assert plan_tflm_greedy(buffers) == ([48, 32, 0], 160)


def test_no_buffers() -> None:
    assert plan_tflm_greedy([]) == ([], 0)
    assert lower_bound([]) == 0


lifetimes = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)
random_buffers = st.lists(
    st.builds(lambda n, life: Buffer("x", n, life[0], life[1]), st.integers(0, 400), lifetimes), max_size=24
)


@settings(max_examples=300, deadline=None)
@given(random_buffers)
def test_plan_never_overlaps_and_bound_is_the_brute_force_peak(buffers: list[Buffer]) -> None:
    plan = plan_tflm_greedy(buffers)
    ends = [offset + align(buffer.nbytes) for offset, buffer in zip(plan.offsets, buffers)]
    for i in range(len(buffers)):
        assert plan.offsets[i] % 16 == 0
        for j in range(i):
            if buffers[i].overlaps(buffers[j]):
                assert ends[i] <= plan.offsets[j] or ends[j] <= plan.offsets[i]
    peak = max(sum(align(b.nbytes) for b in buffers if b.first_use <= t <= b.last_use) for t in range(13))
    assert lower_bound(buffers) == peak
    assert plan.head_bytes == max(ends, default=0) >= peak


# --- whole files against TFLM ---

ZOO = {  # head bytes as the interpreter of pip tflite-micro prints them
    "mcunet_in3_imagenet_int8": 416_832,
    "mcunet_in4_imagenet_int8": 662_208,
    "mobilenet_v2_1.0_imagenet_ptq": 1_505_280,
    "zoo/ml_vww96": 73_728,
    "zoo/ml_kws": 16_000,
    "zoo/te_vww": 161_472,
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo_heads(shared: Path, name: str) -> None:
    path = shared / "weights" / f"{name}.tflite"
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    figures = summary(path)
    assert (figures["arena_head_bytes"], figures["arena_head_kind"]) == (ZOO[name], "exact")
    assert figures["lower_bound_bytes"] <= figures["arena_head_bytes"]


def test_zoo_against_the_interpreter(shared: Path, tmp_path: Path) -> None:
    paths = sorted((shared / "weights").rglob("*.tflite"))
    models = {path.name: path.read_bytes() for path in paths}
    assert check_against_tflm(tmp_path, models) == len(models)


def test_published_macs(shared: Path) -> None:
    """81.8 M of MCUNet-in3 (its paper's Table) and 7.49 M of MLPerf Tiny's visual wake words."""
    in3 = shared / "weights" / "mcunet_in3_imagenet_int8.tflite"
    vww = shared / "weights" / "zoo" / "ml_vww96.tflite"
    if not (in3.exists() and vww.exists()):
        pytest.skip("needs the zoo")
    assert round(summary(in3)["macs"] / 1e6, 1) == 81.8
    assert round(summary(vww)["macs"] / 1e6, 2) == 7.49


def add_conv(b: TfliteBuilder, x: int, channels: int, kernel: int, stride: int, depthwise: bool = False) -> int:
    """SAME convolution, per channel; returns the output tensor."""
    _, height, width, depth = b.graph.tensors[x].shape
    channels = depth if depthwise else channels
    shape = (1, kernel, kernel, channels) if depthwise else (channels, kernel, kernel, depth)
    w = b.tensor(shape, data=np.ones(shape, np.int8), scale=[0.01] * channels, axis=3 if depthwise else 0)
    bias = b.tensor((channels,), "int32", np.zeros(channels, np.int32), scale=[0.0005] * channels)
    y = b.tensor((1, -(-height // stride), -(-width // stride), channels))
    fields: dict[str, Any] = {"padding": 0, "strideH": stride, "strideW": stride}
    fields |= {"dilationHFactor": 1, "dilationWFactor": 1} | ({"depthMultiplier": 1} if depthwise else {})
    op = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
    b.op(op[0], [x, w, bias], [y], op[1], **fields)
    return y


def add_gate(b: TfliteBuilder, x: int, squeezed: int) -> int:
    """Squeeze and excite: a mean, two 1x1 convolutions, a logistic, a product; returns the output tensor."""
    shape = b.graph.tensors[x].shape
    axes = b.tensor((2,), "int32", np.array([1, 2], np.int32), scale=None)
    mean, gate = b.tensor((1, 1, 1, shape[3])), b.tensor((1, 1, 1, shape[3]), scale=1 / 256, zero_point=-128)
    b.op("MEAN", [x, axes], [mean], "ReducerOptions", keepDims=True)
    excited = add_conv(b, add_conv(b, mean, squeezed, 1, 1), shape[3], 1, 1)
    b.op("LOGISTIC", [excited], [gate])
    y = b.tensor(tuple(shape))
    b.op("MUL", [x, gate], [y], "MulOptions")
    return y


def random_graph(seed: int) -> bytes:
    """Convolutions, pools, residual adds, concatenations, gates and a mean, wired at random, several outputs."""
    rng = np.random.default_rng(seed)
    b = TfliteBuilder()
    x = b.tensor((1, int(rng.integers(5, 24)), int(rng.integers(5, 24)), int(rng.integers(1, 9))))
    made = [x]
    for _ in range(int(rng.integers(3, 14))):
        source = int(made[int(rng.integers(max(0, len(made) - 4), len(made)))])
        shape = b.graph.tensors[source].shape
        kind = int(rng.integers(8))
        if kind == 0:
            y = add_conv(b, source, int(rng.integers(1, 20)), int(rng.choice([1, 3])), int(rng.choice([1, 2])))
        elif kind == 1:
            y = add_conv(b, source, 0, 3, int(rng.choice([1, 2])), depthwise=True)
        elif kind == 2 and min(shape[1], shape[2]) >= 2:
            y = b.tensor((1, shape[1] // 2, shape[2] // 2, shape[3]))
            fields = {"padding": 1, "strideH": 2, "strideW": 2, "filterHeight": 2, "filterWidth": 2}
            b.op(str(rng.choice(["MAX_POOL_2D", "AVERAGE_POOL_2D"])), [source], [y], "Pool2DOptions", **fields)
        elif kind == 3:
            same = [t for t in made if list(b.graph.tensors[t].shape) == list(shape)]
            y = b.tensor(tuple(shape))
            b.op("ADD", [source, int(rng.choice(same))], [y], "AddOptions")
        elif kind == 4:
            same = [t for t in made if list(b.graph.tensors[t].shape[:3]) == list(shape[:3])]
            other = int(rng.choice(same))
            y = b.tensor((*shape[:3], shape[3] + b.graph.tensors[other].shape[3]))
            b.op("CONCATENATION", [source, other], [y], "ConcatenationOptions", axis=3)
        elif kind == 5:
            y = add_gate(b, source, int(rng.integers(1, 9)))
        else:
            y = b.tensor(tuple(shape))
            b.op("RELU" if kind == 6 else "HARD_SWISH", [source], [y])
        made.append(y)
    shape = b.graph.tensors[made[-1]].shape
    axes = b.tensor((2,), "int32", np.array([1, 2], np.int32), scale=None)
    y = b.tensor((1, shape[3]))
    b.op("MEAN", [made[-1], axes], [y], "ReducerOptions", keepDims=False)
    extra = [int(t) for t in rng.choice(made[1:], size=int(rng.integers(0, 3)), replace=False)]
    return b.finish([x], [y, *extra])


def test_random_graphs_against_the_interpreter(tmp_path: Path) -> None:
    models = {f"seed {seed}": random_graph(seed) for seed in range(24)}
    assert check_against_tflm(tmp_path, models) == 24


def scratch_models() -> dict[str, bytes]:
    """One operator each: those whose kernels ask for scratch or tables, and odd graphs."""
    models = {}

    def constant(b: TfliteBuilder, *values: int) -> int:
        return b.tensor((len(values),), "int32", np.array(values, np.int32), scale=None)

    for dtype in ("int8", "int16", "float32"):
        for name in ("MEAN", "SUM", "REDUCE_MAX"):
            b = TfliteBuilder()
            x, axes, y = b.tensor((1, 4, 5, 40), dtype), constant(b, 1, 2), b.tensor((1, 1, 1, 40), dtype)
            b.op(name, [x, axes], [y], "ReducerOptions", keepDims=True)
            models[f"{name} {dtype}"] = b.finish([x], [y])
    for dtype in ("int8", "float32"):
        b = TfliteBuilder()
        x, out, y = b.tensor((1, 4, 4, 8), dtype), constant(b, 1, 8, 8, 5), b.tensor((1, 8, 8, 5), dtype)
        w = b.tensor((5, 3, 3, 8), dtype, np.ones((5, 3, 3, 8), dtype), scale=[0.01] * 5)
        b.op("TRANSPOSE_CONV", [out, w, x], [y], "TransposeConvOptions", strideH=2, strideW=2)
        models[f"TRANSPOSE_CONV {dtype}"] = b.finish([x], [y])
        b = TfliteBuilder()
        a, c, y = (b.tensor((1, 4, 4, 8), dtype) for _ in range(3))
        b.op("ADD_N", [a, c], [y])
        models[f"ADD_N {dtype}"] = b.finish([a, c], [y])
        for adjoint in (False, True):
            b = TfliteBuilder()
            a, c, y = b.tensor((1, 4, 8), dtype), b.tensor((1, 8, 8), dtype), b.tensor((1, 4, 8), dtype)
            b.op("BATCH_MATMUL", [a, c], [y], "BatchMatMulOptions", adjY=adjoint)
            models[f"BATCH_MATMUL {dtype} {adjoint}"] = b.finish([a, c], [y])
    for state in ("int8", "int16"):
        b = TfliteBuilder()
        x = b.tensor((1, 32), scale=0.1)
        feature = b.tensor((16, 32), data=np.ones((16, 32), np.int8), scale=0.1)
        time = b.tensor((16, 10), state, np.ones((16, 10), state), scale=0.1)
        bias = b.tensor((8,), "int32", np.zeros(8, np.int32), scale=0.01)
        memory, y = b.tensor((1, 160), state, variable=True, scale=0.1), b.tensor((1, 8), scale=0.1)
        b.op("SVDF", [x, feature, time, bias, memory], [y], "SVDFOptions", rank=2)
        models[f"SVDF {state}"] = b.finish([x], [y])
    b = TfliteBuilder()
    x, y = b.tensor((1, 4, 4, 8)), b.tensor((1, 6, 6, 8))
    pads = b.tensor((4, 2), "int32", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32), scale=None)
    b.op("MIRROR_PAD", [x, pads], [y], "MirrorPadOptions")
    models["MIRROR_PAD"] = b.finish([x], [y])
    b = TfliteBuilder()
    x, y = b.tensor((1, 16)), b.tensor((1, 10))
    w = b.tensor((10, 16), "int4", np.zeros(80, np.uint8))
    b.op("FULLY_CONNECTED", [x, w, -1], [y], "FullyConnectedOptions")
    models["FULLY_CONNECTED int4"] = b.finish([x], [y])
    b = TfliteBuilder()
    x, y = b.tensor((1, 16)), b.tensor((1, 10))
    w = b.tensor((10, 16), data=np.ones((10, 16), np.int8), scale=[0.1] * 10)
    b.op("FULLY_CONNECTED", [x, w, -1], [y], "FullyConnectedOptions")
    models["FULLY_CONNECTED per channel"] = b.finish([x], [y])
    b = TfliteBuilder()
    x, _, y = b.tensor((1, 4)), b.tensor((1, 1000)), b.tensor((1, 4))
    b.op("RELU", [x], [y])
    models["a tensor that nothing touches"] = b.finish([x], [y])
    models["an input that is an output"] = b.finish([x], [y, x])
    return models


def test_scratch_and_odd_graphs_against_the_interpreter(tmp_path: Path) -> None:
    models = scratch_models()
    assert check_against_tflm(tmp_path, models) == len(models)


def plain_models() -> dict[str, bytes]:
    """One operator each, of those that need no tables: their structs are what differs."""
    models = {}
    unary = ["ABS", "COS", "ELU", "FLOOR", "HARD_SWISH", "LOG", "NEG", "RELU", "RELU6", "RSQRT", "SIN", "SQRT"]
    binary = {"ADD": "Add", "DIV": "Div", "EQUAL": "Equal", "GREATER": "Greater", "LESS": "Less", "MUL": "Mul"}
    binary |= {"MAXIMUM": "MaximumMinimum", "MINIMUM": "MaximumMinimum", "SUB": "Sub"}
    binary |= {"SQUARED_DIFFERENCE": "SquaredDifference"}
    for dtype in ("int8", "float32"):
        for name in (*unary, "CONCATENATION", *binary):
            b = TfliteBuilder()
            inputs = [b.tensor((1, 3, 5, 7), dtype) for _ in range(1 if name in unary else 2)]
            y = b.tensor((1, 3, 5, 14 if name == "CONCATENATION" else 7), dtype)
            options = f"{binary[name]}Options" if name in binary else ""
            if name == "CONCATENATION":
                b.op(name, inputs, [y], "ConcatenationOptions", axis=3)
            else:
                b.op(name, inputs, [y], options)
            models[f"{name} {dtype}"] = b.finish(inputs, [y])
    for name, dtypes in {"QUANTIZE": ("float32", "int8"), "DEQUANTIZE": ("int8", "float32")}.items():
        b = TfliteBuilder()
        x, y = (b.tensor((1, 3, 5, 7), dtype) for dtype in dtypes)
        b.op(name, [x], [y])
        models[name] = b.finish([x], [y])
    return models


def test_plain_operators_against_the_interpreter(tmp_path: Path) -> None:
    models = plain_models()
    assert check_against_tflm(tmp_path, models) == len(models)


def offline_model(offsets: list[int]) -> bytes:
    b = TfliteBuilder()
    tensors = [b.tensor((1, 4, 4, 8)) for _ in range(4)]
    for source, target in itertools.pairwise(tensors):
        b.op("RELU", [source], [target])
    b.metadata("OfflineMemoryAllocation", np.array([1, 1, len(offsets), *offsets], np.int32).tobytes())
    return b.finish([tensors[0]], [tensors[-1]])


def test_offline_plan_against_the_interpreter(tmp_path: Path) -> None:
    plans = {"all": [0, 128, 512, 1024], "some": [-1, 384, -1, -1], "none": [-1] * 4}
    models = {name: offline_model(offsets) for name, offsets in plans.items()}
    assert check_against_tflm(tmp_path, models) == 3
    heads = [arena(read_tflite(model)).head_bytes for model in models.values()]
    assert heads == [1152, 512, 256]


def test_32_bit_tail_against_tflms_own_log() -> None:
    """person_detect on a Cortex-M4, as printed in tflite-micro's tools/benchmarking/README.md.

    89 tensors 1,068 B, 31 nodes 992 B, two I/O tensors 64 B and their quantisation 40 B; 29,140 B in all, of which
    two 1,026-byte tables belong to CMSIS-NN's softmax alone.
    """
    b = TfliteBuilder()
    x = first = b.tensor((1, 96, 96, 1), scale=0.02)
    x = add_conv(b, x, 8, 3, 2)
    pairs = [(1, 16), (2, 32), (1, 32), (2, 64), (1, 64), (2, 128), *[(1, 128)] * 5, (2, 256), (1, 256)]
    for stride, channels in pairs:
        x = add_conv(b, add_conv(b, x, 0, 3, stride, depthwise=True), channels, 1, 1)
    pooled = b.tensor((1, 1, 1, 256))
    fields = {"padding": 1, "strideH": 3, "strideW": 3, "filterHeight": 3, "filterWidth": 3}
    b.op("AVERAGE_POOL_2D", [x], [pooled], "Pool2DOptions", **fields)
    logits = add_conv(b, pooled, 2, 1, 1)
    shape = b.tensor((2,), "int32", np.array([1, 2], np.int32), scale=None)
    flat, scores = b.tensor((1, 2)), b.tensor((1, 2), scale=1 / 256, zero_point=-128)
    b.op("RESHAPE", [logits, shape], [flat], "ReshapeOptions")
    b.op("SOFTMAX", [flat], [scores], "SoftmaxOptions", beta=1.0)
    figures = arena(read_tflite(b.finish([first], [scores])))
    tail = figures.tail_bytes_modelled[4]
    assert (figures.head_bytes, figures.n_ops) == (55_296, 31)
    assert (tail["eval_tensors"], tail["node_registrations"]) == (1068, 992)
    assert 64 + 40 <= tail["persistent_tensors"] <= 64 + 40 + 2 * 16 + 8
    expected = 29_140 - 2 * 1026
    assert abs(figures.tail_bytes(4) - expected) <= 0.01 * expected


# --- figures known by hand, and bad files ---


def test_macs_and_weights_by_hand() -> None:
    b = TfliteBuilder()
    x = b.tensor((1, 8, 8, 3))
    y = add_conv(b, x, 5, 3, 2)
    z = add_conv(b, y, 0, 3, 1, depthwise=True)
    figures = arena(read_tflite(b.finish([x], [z])))
    assert figures.macs == 4 * 4 * 5 * 27 + 4 * 4 * 5 * 9
    assert figures.weights_bytes == (5 * 27 + 4 * 5) + (9 * 5 + 4 * 5)
    assert [(b.first_use, b.last_use) for b in figures.buffers] == [(0, 1), (1, 2), (2, 2)]
    assert figures.head_bytes == 192 + 80
    assert figures.tail_bytes_modelled[8]["channel_multipliers"] == 2 * 2 * 32

    b = TfliteBuilder()
    x, y = b.tensor((2, 4, 4, 3)), b.tensor((2, 8, 8, 6))
    out = b.tensor((4,), "int32", np.array([2, 8, 8, 6], np.int32), scale=None)
    w = b.tensor((6, 2, 2, 3), data=np.ones((6, 2, 2, 3), np.int8))
    b.op("TRANSPOSE_CONV", [out, w, x], [y], "TransposeConvOptions", strideH=2, strideW=2)
    assert arena(read_tflite(b.finish([x], [y]))).macs == 2 * 16 * 3 * 4 * 6


def test_shared_constant_counts_once_and_unknown_operators_are_modelled() -> None:
    b = TfliteBuilder()
    x, y = b.tensor((1, 4)), b.tensor((1, 4))
    w = b.tensor((4, 4), data=np.ones((4, 4), np.int8))
    twin = b.tensor((4, 4))
    b.graph.tensors[twin].buffer = b.graph.tensors[w].buffer
    b.op("SomethingNew", [x, w, twin], [y])
    figures = arena(read_tflite(b.finish([x], [y])))
    assert (figures.weights_bytes, figures.macs, figures.head_kind) == (16, 0, "modelled")


def test_summary_is_json_with_the_promised_keys(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(random_graph(1))
    figures = json.loads(json.dumps(summary(path)))
    assert {"arena_head_bytes", "lower_bound_bytes", "n_ops", "macs", "weights_bytes"} <= figures.keys()
    assert figures["file_bytes"] == path.stat().st_size
    assert sum(figures["ops"].values()) == figures["n_ops"]
    assert figures["inputs"][0]["dtype"] == "int8"
    assert sum(figures["tail_32bit"].values()) == figures["arena_tail_bytes_modelled"]


def test_bad_files_name_the_tensor_or_operator() -> None:
    b = TfliteBuilder()
    x, y = b.tensor((-1, 4)), b.tensor((1, 4))
    b.op("RELU", [x], [y])
    with pytest.raises(InputError, match=r"tensor 0 \(t0\) has the dynamic shape \[-1, 4\]"):
        tflite_buffers(read_tflite(b.finish([x], [y])))

    b = TfliteBuilder()
    x = b.tensor((1, 4), "string", scale=None)
    with pytest.raises(InputError, match="type string"):
        tflite_buffers(read_tflite(b.finish([x], [x])))

    for inputs, words in (([0], "has no input 1"), ([0, 0], "input 1 has 2 dimensions, needs 4")):
        b = TfliteBuilder()
        x = b.tensor((1, 4))
        b.op("CONV_2D", inputs, [x], "Conv2DOptions")
        with pytest.raises(InputError, match=rf"operator 0 \(CONV_2D\).*{words}"):
            arena(read_tflite(b.finish([x], [x])))

    b = TfliteBuilder()
    x = b.tensor((1, 4))
    b.op("MEAN", [x, x], [], "ReducerOptions")
    with pytest.raises(InputError, match="has no output"):
        arena(read_tflite(b.finish([x], [x])))

    for offsets in ([0, 0], [-5, 0, 0, 0]):
        with pytest.raises(InputError, match="OfflineMemoryAllocation"):
            tflite_buffers(read_tflite(offline_model(offsets)))
