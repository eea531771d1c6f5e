"""A whole build of a random student and teacher behind one trunk, made in a second: two tails, three pairs of maps."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tiny_build import SAME, SIZE, images, images_of_task

from tinyvad.bank import Header
from tinyvad.calibration import quantize_on
from tinyvad.detectors import parts_scratch
from tinyvad.detectors.bank_tasks import BankTask, bank_of_tasks
from tinyvad.detectors.routing import prototype, signatures
from tinyvad.detectors.student_teacher import StudentTeacherScorer, choose_shift, golden_of, pairs_of
from tinyvad.engines.int8 import Int8Engine
from tinyvad.export.c import firmware_files
from tinyvad.export.onnx import to_onnx
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.chips import chip_of
from tinyvad.firmware_sim.plans import plan
from tinyvad.firmware_sim.runtimes import packing_of
from tinyvad.firmware_sim.targets import load_target
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.scratch import scratch_of
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Preprocessing, apply_table
from tinyvad.model import BACKBONES, BANKS, FORMAT, MANIFEST


def network(rng: np.random.Generator) -> Graph:
    """Float: a trunk, and behind it two tails of the same layers; outputs s1 s2 s3 t1 t2 t3, each read by later layers.

    The first pair has linear maps, as blocks of inverted residuals have; the second ends in an add; the third in ReLU6. The
    student's weights are the teacher's with some noise.
    """
    builder = GraphBuilder("tiny student", (1, SIZE, SIZE, 3))

    def layer(x: str, name: str, weights: np.ndarray, stride: int = 1, activation: str = "none") -> str:
        deep = weights.shape[0] == 1
        out = weights.shape[3 if deep else 0]
        inputs = [x, builder.constant(f"{name}.w", weights), builder.constant(f"{name}.b", np.full(out, 0.1, np.float32))]
        attributes = {
            "stride": (stride, stride), "pads": SAME[weights.shape[1]], "dilation": (1, 1), "activation": activation,
        }  # fmt: skip
        return builder.add("depthwise_conv2d" if deep else "conv2d", inputs, name, **attributes)

    def weights(out: int, kernel: int, channels: int) -> np.ndarray:
        return (rng.normal(size=(out, kernel, kernel, channels)) * np.sqrt(2 / kernel**2 / (1 if out == 1 else channels)))

    trunk = layer(builder.input, "stem", weights(8, 3, 3).astype(np.float32), 2, "relu6")
    teacher = {
        "expand": weights(20, 1, 8), "deep": weights(1, 3, 20), "one": weights(10, 1, 20), "wide": weights(24, 1, 10),
        "deeper": weights(1, 5, 24), "two": weights(14, 1, 24), "back": weights(14, 1, 14), "three": weights(21, 3, 14),
    }  # fmt: skip
    taps = []
    for who, noise in (("s", 0.3), ("t", 0.0)):
        w = {name: (a + noise * a.std() * rng.normal(size=a.shape)).astype(np.float32) for name, a in teacher.items()}
        x = layer(trunk, f"{who}.expand", w["expand"], 1, "relu6")
        one = layer(layer(x, f"{who}.deep", w["deep"], 1, "relu6"), f"{who}1", w["one"])
        x = layer(one, f"{who}.wide", w["wide"], 1, "relu6")
        x = layer(layer(x, f"{who}.deeper", w["deeper"], 2, "relu6"), f"{who}.two", w["two"])
        two = builder.add("add", [x, layer(x, f"{who}.back", w["back"])], f"{who}2", activation="none")
        taps += [one, two, layer(two, f"{who}3", w["three"], 2, "relu6")]
    return builder.finish(taps)


def student_build(folder: Path, target: str | None, strategy: str = "patch", tasks: int = 1) -> Path:
    """Write a build for a target into ``folder``; without one, firmware for any C compiler.

    Args:
        tasks: up to 3 products, ``part 0`` and so on, whose images are those of ``images_of_task``.
    """
    rng = np.random.default_rng(11)
    preprocessing, graph = Preprocessing(SIZE, SIZE), network(rng)
    calibrated = quantize_on(graph, preprocessing, images(rng, 8))
    files = {
        BACKBONES["int8"]: to_tflite(calibrated.graph),
        BACKBONES["onnx"]: to_onnx(graph).SerializeToString(),
    }
    read = import_tflite(files[BACKBONES["int8"]])
    pairs = pairs_of([read.tensors[name] for name in read.outputs])
    engine = Int8Engine(read, threads=1)
    good = [images_of_task(rng, 6, task) if tasks > 1 else images(rng, 12) for task in range(tasks)]
    maps = [engine.features(apply_table(some, calibrated.table)) for some in good]
    scorer = StudentTeacherScorer(pairs.layers, pairs.grid, choose_shift(pairs, maps))
    channels = pairs.taps[-1].channels
    rows = []
    for task, some in enumerate(maps):
        threshold = int(np.median(scorer.score(pairs.integer(some)).max((1, 2))))
        mean = prototype(signatures(some[-1], channels).sum(0), len(some[-1]))
        rows.append(BankTask(f"part {task}", len(some[-1]), threshold, "median", mean))
    golden = golden_of(pairs, scorer, [q[0] for q in maps[0]], [0, pairs.grid[1] + 3])
    for name in BANKS:
        header = Header("STFP", zlib.crc32(files[BACKBONES[name]]), (SIZE, SIZE), pairs.grid, len(pairs.taps))
        shared = {"LUT ": calibrated.table, **pairs.sections()}
        files[BANKS[name]] = bank_of_tasks(header, shared, [scorer] * tasks, rows, golden, {"layers": read.outputs})
    kernels = scratch_of("scalar" if target is None else packing_of(load_target(target)))
    parts = [tap.size[0] * tap.size[1] * tap.channels for tap in pairs.taps]
    needed = parts_scratch(pairs.sections()["TAPS"], scorer)
    schedule = plan(read, pairs.grid, strategy, None, needed, layer_scratch=kernels, parts=parts)
    chip = None if target is None else chip_of(load_target(target), schedule.arena_bytes, 0)
    firmware = firmware_files(read, schedule, files[BANKS["int8"]], chip)
    files |= {f"firmware/{name}": data for name, data in firmware.items()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest: dict[str, Any] = {
        "format": FORMAT, "tinyvad": "0", "task": "tiny", "method": {"name": "paste", "settings": {}},
        "backbone": {
            "layers": read.outputs,
            "input_quantization": {"scale": calibrated.scale, "zero_point": calibrated.zero_point},
        },
        "thresholds": {"int8": {"raw": rows[0].threshold}}, "preprocessing": preprocessing.to_dict(),
        "target": None if target is None else {"name": target, "alias": None}, "settings": {"frame": None},
        "learning": {"tasks": 1, "slot_bytes": len(files[BANKS["int8"]])},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder
