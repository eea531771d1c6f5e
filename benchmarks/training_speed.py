"""Speed of a PaSTe training step against the same step in TensorFlow/Keras, in interleaved rounds, on all cores.

    python benchmarks/training_speed.py [--sizes 160,224] [--batch 8] [--rounds 20] [--out FILE.md]

One step is forward, backward and SGD's update (momentum, weight decay) of MCUNet-in3's tail from block 5's output to block
14, in float32, with a batch norm behind every convolution and the normalised-feature loss at blocks 6, 10 and 14. The Keras
twin has the same layers and the same first weights and runs in a tf.function. Before anything is timed, the losses of the
two must agree, and in float64 all gradients too. (In float32 a value within a rounding error of a ReLU6's corner may get a
gradient on one side only, which shows in the third digit of all gradients before it.) Both sit in one process, have warmed
up, and take turns. Stored maps and teacher's maps are random numbers: their values don't change the work.

The start is timed in a process of its own a side, from its first line to the end of the first step: for tinyvad with its
compiled kernels kept from an earlier run, and with none. Sizes are those of the installed packages that were imported.
Without TensorFlow its rows are left out. Nothing is written without --out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from tinyvad.files import write_text
from tinyvad.graph.onnx_import import import_onnx
from tinyvad.graph.passes import normalise, tap_candidates
from tinyvad.training.network import EPSILON, MOMENTUM, Arrays, Network

GOAL = 2.5
AGREE = 1e-4  # of the loss, and of each gradient's length
RATE, SGD_MOMENTUM, DECAY = 0.04, 0.9, 1e-4
MODEL = Path(__file__).resolve().parents[2] / "shared" / "weights" / "mcunet_in3_imagenet_f32.onnx"
START, TAPS = 5, (6, 10, 14)
OURS, THEIRS = "tinyvad", "TensorFlow/Keras"


def tail(model: Path, size: int) -> Network:
    """The student of a PaSTe detector at ``size`` pixels, with random weights."""
    from tinyvad.training.student import student_of

    teacher = normalise(import_onnx(model, size))
    blocks = [tap.name for tap in tap_candidates(teacher)]
    return student_of(teacher, [blocks[i] for i in TAPS], blocks[START], np.random.default_rng(0))


def batch_of(network: Network, batch: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Stored maps (batch, h, w, c) and the teacher's maps, float32."""
    rng, tensors = np.random.default_rng(1), network.graph.tensors
    x, *maps = (
        rng.normal(size=(batch, *tensors[name].shape[1:])).astype(np.float32)
        for name in (*network.graph.inputs, *network.graph.outputs)
    )
    return x, maps


def ours(network: Network, x: np.ndarray, maps: list[np.ndarray]) -> tuple[Callable[[], float], Callable[[], Any]]:
    """A step that returns its loss, and what gives the loss and gradients of the first weights."""
    from tinyvad.training import forward, losses
    from tinyvad.training.optimisers import SGD
    from tinyvad.training.tape import value_and_gradients

    optimiser = SGD(RATE, SGD_MOMENTUM, DECAY)
    state = [network.parameters, network.statistics]

    def differentiated(parameters: Arrays, running: Arrays) -> tuple[float, Arrays, Arrays]:
        def loss(values: Any) -> tuple[Any, Arrays]:
            outputs, moved = forward.run(network.graph, values, running, [x], True)
            return losses.normalised_feature_loss(outputs, maps), moved

        return value_and_gradients(loss, parameters)

    def step() -> float:
        value, state[1], gradients = differentiated(*state)
        state[0] = optimiser.step(state[0], gradients)
        return value

    def first() -> tuple[float, Arrays]:
        value, _, gradients = differentiated(network.parameters, network.statistics)
        return value, gradients

    return step, first


def keras_model(network: Network) -> tuple[Any, dict[str, Any]]:
    """The same layers in Keras with the same weights, and its variables by the parameter's name."""
    import keras

    graph = network.graph
    kind = {"dtype": next(iter(network.parameters.values())).dtype.name}
    entry = keras.Input(graph.tensors[graph.inputs[0]].shape[1:], **kind)
    values = {graph.inputs[0]: entry}
    variables: dict[str, Any] = {}
    for node in graph.nodes:
        x = values[node.inputs[0]]
        if node.op == "batch_norm":
            layer = keras.layers.BatchNormalization(momentum=1 - MOMENTUM, epsilon=EPSILON, **kind)
            y = layer(x)
            variables.update(zip(node.inputs[1:], (layer.gamma, layer.beta), strict=True))
            if node.attributes["activation"] == "relu6":
                y = keras.layers.ReLU(6.0, **kind)(y)
        elif node.op == "add":
            y = keras.layers.Add(**kind)([x, values[node.inputs[1]]])
        else:
            weights = network.parameters[node.inputs[1]]
            top, bottom, left, right = node.attributes["pads"]
            padding = "same" if any(node.attributes["pads"]) and node.attributes["stride"] == (1, 1) else "valid"
            if any(node.attributes["pads"]) and padding == "valid":
                x = keras.layers.ZeroPadding2D(((top, bottom), (left, right)), **kind)(x)
            settings = {"strides": node.attributes["stride"], "padding": padding, "use_bias": False, **kind}
            if node.op == "conv2d":
                layer = keras.layers.Conv2D(len(weights), weights.shape[1:3], **settings)
            else:
                layer = keras.layers.DepthwiseConv2D(weights.shape[1:3], **settings)
            y = layer(x)
            layer.set_weights([weights.transpose(1, 2, 3, 0)])
            variables[node.inputs[1]] = layer.kernel
        values[node.output] = y
    return keras.Model(entry, [values[name] for name in graph.outputs]), variables


def theirs(network: Network, x: np.ndarray, maps: list[np.ndarray]) -> tuple[Callable[[], float], Callable[[], Any]]:
    """As ``ours``, in a tf.function."""
    import keras
    import tensorflow as tf

    model, variables = keras_model(network)
    names, trained = list(variables), list(variables.values())
    optimiser = keras.optimizers.SGD(RATE, momentum=SGD_MOMENTUM)
    optimiser.build(trained)
    batch, teacher = tf.constant(x), [tf.constant(array) for array in maps]

    def differentiated() -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            pairs = zip(model(batch, training=True), teacher, strict=True)
            distances = [tf.math.l2_normalize(s, -1) - tf.math.l2_normalize(t, -1) for s, t in pairs]
            loss = tf.add_n([tf.reduce_mean(tf.reduce_sum(d * d, -1)) for d in distances])
        values = [variable.value for variable in trained]
        return loss, tape.gradient(loss, values)

    @tf.function
    def one_step() -> Any:
        loss, gradients = differentiated()
        optimiser.apply([g + DECAY * v for g, v in zip(gradients, trained, strict=True)], trained)
        return loss

    def first() -> tuple[float, Arrays]:
        value, gradients = tf.function(differentiated)()
        arrays = {}
        for name, gradient in zip(names, gradients, strict=True):
            array = gradient.numpy()
            arrays[name] = array.transpose(3, 0, 1, 2) if array.ndim == 4 else array
        return float(value), arrays

    return (lambda: float(one_step())), first


def check(network: Network, batch: int) -> str:
    """End the run unless both sides give the same loss and gradients; says how near they are."""
    x, maps = batch_of(network, batch)
    off, worst = [], []
    for dtype in (np.float64, np.float32):
        parameters = {name: array.astype(dtype) for name, array in network.parameters.items()}
        exact = network.with_values(parameters, network.statistics)
        data = x.astype(dtype), [array.astype(dtype) for array in maps]
        (value, gradients), (expected, wanted) = (side(exact, *data)[1]() for side in (ours, theirs))
        lengths = {name: float(np.linalg.norm(array)) for name, array in wanted.items()}
        least = 1e-3 * max(lengths.values())  # an offset in front of a batch norm has no influence: its gradient is noise
        errors = (float(np.linalg.norm(gradients[name] - wanted[name])) / max(lengths[name], least) for name in wanted)
        off.append(abs(value / expected - 1))
        worst.append(max(errors))
    if max(off) > AGREE or worst[0] > AGREE:
        raise SystemExit(f"the sides differ: losses by {off} of their size, gradients by {worst} of their length")
    return (
        f"in float64 losses agree to {off[0]:.0e} and each gradient to {worst[0]:.0e} of its length, in float32 to "
        f"{off[1]:.0e} and {worst[1]:.0e}"
    )


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each side's step by the clock and of processor, in turn; three rounds to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(rounds + 3):
        for name, step in sides.items():
            start, busy = time.perf_counter(), time.process_time()
            step()
            if i >= 3:
                seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    return seconds


def imported_megabytes() -> tuple[float, list[str]]:
    """Size on disk of the installed packages of which this process has imported something, and the largest's names."""
    owners = metadata.packages_distributions()
    names = {owner for module in list(sys.modules) for owner in owners.get(module.partition(".")[0], [])}
    sizes = {}
    for name in names:
        files = metadata.files(name) or []
        paths = [Path(str(file.locate())) for file in files]
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    return sum(sizes.values()) / 1e6, [f"{name} {sizes[name] / 1e6:.0f}" for name in largest]


def start_of(side: str, model: Path, size: int, batch: int, keep_kernels: bool = True) -> tuple[float, str]:
    """Seconds of a new process to the end of its first step, and what it says about its packages."""
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ if keep_kernels else {**os.environ, "NUMBA_CACHE_DIR": empty}
        command = [sys.executable, __file__, "--first", side, "--model", str(model), "--sizes", str(size)]
        begin = time.perf_counter()
        done = subprocess.run(
            [*command, "--batch", str(batch)], env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - begin
    if done.returncode != 0:
        raise SystemExit(f"the first step of {side} failed: {done.stderr.strip().splitlines()[-1]}")
    measured, _, said = done.stdout.strip().splitlines()[-1].partition(" ")
    return seconds - float(measured), said


def first_step(side: str, model: Path, size: int, batch: int) -> None:
    """What ``start_of`` runs: one step, then how long the rest took, and the packages."""
    network = tail(model, size)
    step, _ = (ours if side == OURS else theirs)(network, *batch_of(network, batch))
    step()
    start = time.perf_counter()
    megabytes, largest = imported_megabytes()
    print(f"{time.perf_counter() - start} {megabytes:.0f} MB ({', '.join(largest)})")


def tensorflow_is_there() -> bool:
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        print(f"left out: {THEIRS}: {error}")
        return False
    return True


def table(model: Path, sizes: list[int], batch: int, rounds: int) -> str:
    with_tensorflow = tensorflow_is_there()
    rows, agreements, medians = [], [], []
    for size in sizes:
        network = tail(model, size)
        data = batch_of(network, batch)
        if with_tensorflow:
            agreements.append(f"{size} px: {check(network, batch)}")
        makers = {OURS: ours, **({THEIRS: theirs} if with_tensorflow else {})}
        seconds = measure({name: make(network, *data)[0] for name, make in makers.items()}, rounds)
        for name, times in seconds.items():
            ratios = sorted(own[0] / other[0] for own, other in zip(seconds[OURS], times, strict=True))
            middle = statistics.median(ratios)
            if name == THEIRS:
                medians.append(middle)
            shown = "1" if name == OURS else f"{ratios[0]:.2f}, {middle:.2f}, {ratios[-1]:.2f}"
            macs = f"{network.graph.macs() / 1e6:.1f}"
            clock, processor = zip(*times, strict=True)
            shown_times = min(clock), statistics.median(clock), statistics.median(processor)
            best, median, busy = (f"{1e3 * value:.1f}" for value in shown_times)
            rows.append(f"| {size} px, {macs} million MACs | {name} | {best}, {median} | {shown} | {busy} |")
    lines = [
        "# A training step of PaSTe's tail against TensorFlow/Keras",
        "",
        f"{model.name}, block {START} to block {TAPS[-1]}, batch {batch}, float32: forward, backward, SGD update; {rounds} "
        "interleaved rounds.",
        machine(("numpy", "numba", "autograd", "tensorflow-cpu", "keras")) + ".",
        f"Load of the machine over these minutes, {os.cpu_count()} being all of it: {os.getloadavg()[1]:.1f}.",
        "",
        "| image, forward of one | side | ms a step: best, median | tinyvad's time over it: min, median, max "
        "| processor ms a step, median |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *(f"{line}." for line in agreements),
        "",
        "| new process | seconds to the end of the first step | size of the packages imported, the largest in MB |",
        "|---|---|---|",
    ]
    start_of(OURS, model, sizes[0], batch)  # its kernels are compiled now
    for name, side, keep in (
        (f"{OURS}, kernels compiled before", OURS, True), (f"{OURS}, first run ever", OURS, False), (THEIRS, THEIRS, True),
    ):  # fmt: skip
        if side == OURS or with_tensorflow:
            took, packages = start_of(side, model, sizes[0], batch, keep)
            lines.append(f"| {name} | {took:.1f} | {packages} |")
    if medians:
        verdict = "met" if max(medians) <= GOAL else "missed"
        worse = f"{max(medians):.2f} in the worse median"
        lines += ["", f"Goal: at most {GOAL:g} times TensorFlow's time: {verdict} ({worse})."]
    return "\n".join([*lines, "", "    python benchmarks/training_speed.py --out benchmarks/results/training_speed.md", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="MCUNet-in3 as .onnx  [default: the one in ../shared]")
    parser.add_argument("--sizes", default="160,224", help="pixels, with commas between  [default: 160,224]")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    parser.add_argument("--first", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.rounds < 1 or arguments.batch < 1:
        parser.error("--rounds and --batch must be 1 or more")
    if not arguments.model.is_file():
        parser.error(f"no model at {arguments.model}; give one with --model")
    if arguments.first:
        first_step(arguments.first, arguments.model, sizes[0], arguments.batch)
        return
    text = table(arguments.model, sizes, arguments.batch, arguments.rounds)
    print(text, end="")
    if arguments.out is not None:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
