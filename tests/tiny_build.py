"""A whole build of a random network of a few thousand weights, made in a second: for tests of what goes onto a device."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.bank import Header, pack_meta, write_bank
from tinyvad.calibration import Calibrated, quantize_on
from tinyvad.detectors import parts_scratch
from tinyvad.detectors.padim import PadimCompact
from tinyvad.detectors.routing import prototype, signatures
from tinyvad.detectors.tasks import join_tasks
from tinyvad.detectors.triangular import TriangularScorer
from tinyvad.embedding import Embedding, make_taps
from tinyvad.engines.int8 import Int8Engine
from tinyvad.export.c import firmware_files
from tinyvad.export.c_model import Camera
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.budget import parse_frame
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

SIZE, GRID = 33, (6, 6)
SAME = {1: (0, 0, 0, 0), 3: (1, 1, 1, 1), 5: (2, 2, 2, 2), 7: (3, 3, 3, 3)}


def network(rng: np.random.Generator) -> Graph:
    """Float: convolutions 1x1, 3x3 and depthwise 3x3, 5x5, 7x7, squeeze-excite, hard-swish, an add, a pool; two taps."""
    builder = GraphBuilder("tiny", (1, SIZE, SIZE, 3))

    def layer(
        x: str, name: str, out: int, kernel: int, stride: int = 1, activation: str = "relu6", deep: bool = False
    ) -> str:
        channels = builder.shape(x)[3]
        shape = (1, kernel, kernel, channels) if deep else (out, kernel, kernel, channels)
        fan_in = kernel * kernel * (1 if deep else channels)
        weights = builder.constant(f"{name}.w", (rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32))
        bias = builder.constant(f"{name}.b", rng.normal(size=out, scale=0.2).astype(np.float32))
        op = "depthwise_conv2d" if deep else "conv2d"
        attributes = {"stride": (stride, stride), "pads": SAME[kernel], "dilation": (1, 1), "activation": activation}
        return builder.add(op, [x, weights, bias], name, **attributes)

    x = layer(builder.input, "stem", 12, 3, 2)
    x = layer(x, "dw3", 12, 3, deep=True)
    tap = layer(x, "tap_a", 8, 1, activation="none")
    x = layer(tap, "expand", 20, 1, activation="none")
    x = builder.add("hard_swish", [x], "swish")
    x = layer(x, "dw5", 20, 5, 2, deep=True)
    gate = builder.add("mean", [x], "mean")
    gate = builder.add("logistic", [layer(gate, "gate.conv", 20, 1, activation="none")], "gate")
    x = builder.add("mul", [x, gate], "excited", activation="none")
    short = layer(x, "project", 12, 1, activation="none")
    x = layer(layer(short, "dw7", 12, 7, deep=True), "back", 12, 1, activation="none")
    x = builder.add("add", [short, x], "sum", activation="none")
    x = builder.add(
        "max_pool", [x], "tap_b", kernel=(3, 3), stride=(1, 1), pads=SAME[3], activation="none"
    )
    return builder.finish([tap, x])


def images(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, SIZE, SIZE, 3) uint8 noise on ramps."""
    ramp = np.linspace(0, 160, SIZE)[:, None, None] + rng.integers(0, 60, (n, 1, 1, 3))
    return (ramp + rng.integers(0, 40, (n, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)


def images_of_task(rng: np.random.Generator, n: int, task: int) -> np.ndarray:
    """(n, SIZE, SIZE, 3) uint8 of three products that differ in colour: noise on dark, on red, on bright blue."""
    colour = np.array([(30, 30, 30), (200, 40, 40), (120, 180, 215)][task])
    return (colour + rng.integers(0, 40, (n, SIZE, SIZE, 3))).astype(np.uint8)


def tiny_build(
    folder: Path, target: str | None, strategy: str = "patch", frame: str | None = None, tasks: int = 1
) -> Path:
    """Write a build for a target into ``folder``; without one, firmware for any C compiler.

    Args:
        tasks: up to 3 products, ``part 0`` and so on, whose images are those of ``images_of_task``.
    """
    rng = np.random.default_rng(7)
    preprocessing = Preprocessing(SIZE, SIZE)
    calibrated = quantize_on(network(rng), preprocessing, images(rng, 8))
    backbone = to_tflite(calibrated.graph)
    graph = import_tflite(backbone)
    embedding, scorer, threshold = _fit(graph, calibrated, rng)
    header = Header(scorer.kind, zlib.crc32(backbone), (SIZE, SIZE), GRID, len(graph.outputs))
    golden = rng.integers(-128, 128, (2, embedding.depth)).astype(np.int8)
    sections = {
        "LUT ": calibrated.table, **embedding.sections(), "THRS": np.array([threshold], np.uint32), **scorer.sections(),
        "TEST": golden, "GOLD": _gold(scorer, golden), "META": pack_meta({"task": "tiny"}),
    }  # fmt: skip
    if tasks > 1:
        sections |= _several(graph, calibrated, embedding, scorer, threshold, tasks)
    bank = write_bank(header, sections, ("LUT ", "TAPS", "THRS", *scorer.required))
    scratch = [embedding.scratch_bytes(tap) for tap in embedding.taps]
    kernels = scratch_of("scalar" if target is None else packing_of(load_target(target)))
    needed = parts_scratch(embedding.sections()["TAPS"], scorer)
    schedule = plan(graph, GRID, strategy, frame, needed, scratch, layer_scratch=kernels)
    camera = None
    if frame is not None:
        height, width, form = parse_frame(frame)
        camera = Camera(width, height, form)
    chip = None
    if target is not None:
        chip = chip_of(load_target(target), schedule.arena_bytes, 0 if camera is None else camera.nbytes)
    files = {BACKBONES["int8"]: backbone, BANKS["int8"]: bank}
    files |= dict.fromkeys((BACKBONES["onnx"], BANKS["onnx"]), b"a build has one; these tests never read it")
    files |= {f"firmware/{name}": data for name, data in firmware_files(graph, schedule, bank, chip, camera).items()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    _write_manifest(folder, files, preprocessing, calibrated, graph.outputs, threshold, target, frame)
    return folder


def _fit(graph: Graph, calibrated: Calibrated, rng: np.random.Generator) -> tuple[Embedding, TriangularScorer, int]:
    maps = Int8Engine(graph, threads=1).features(apply_table(images(rng, 24), calibrated.table))
    embedding = Embedding(make_taps([graph.tensors[name] for name in graph.outputs], [2.0, 2.0], False), GRID)
    scorer = PadimCompact(6, bits=8).fit([embedding.integer(maps)]).to_scorer()
    return embedding, scorer, int(np.median(scorer.score(embedding.integer(maps)).max((1, 2))))


def _several(
    graph: Graph, calibrated: Calibrated, embedding: Embedding, scorer: TriangularScorer, threshold: int, tasks: int
) -> dict[str, np.ndarray]:
    """Sections of several tasks: the first one's Gaussians, moved a little, and prototypes of each one's images."""
    rng = np.random.default_rng(5)
    scorers, prototypes = [], []
    for task in range(tasks):
        maps = Int8Engine(graph, threads=1).features(apply_table(images_of_task(rng, 6, task), calibrated.table))
        total = signatures(embedding.integer(maps), embedding.taps[-1].channels).sum(0)
        prototypes.append(prototype(total, 6))
        moved = np.clip(scorer.mean.astype(int) + 3 * task, -127, 127).astype(np.int8)
        scorers.append(replace(scorer, mean=moved))
    names = [{"name": f"part {task}"} for task in range(tasks)]
    return {
        **join_tasks(scorers, [6] * tasks, np.stack(prototypes)),
        "THRS": np.array([threshold // (task + 1) for task in range(tasks)], np.uint32),
        "META": pack_meta({"tasks": names}),
    }


def _gold(scorer: TriangularScorer, golden: np.ndarray) -> np.ndarray:
    """(n, 3) uint32: task, cell and score of every golden vector, each in a cell of its own."""
    rows = []
    for cell, vector in enumerate(golden):
        cells = np.zeros((1, *GRID, len(vector)), np.int8)
        cells[0, cell // GRID[1], cell % GRID[1]] = vector
        rows.append([0, cell, scorer.score(cells).reshape(-1)[cell]])
    return np.array(rows, np.uint32)


def _write_manifest(
    folder: Path, files: dict[str, bytes], preprocessing: Preprocessing, calibrated: Calibrated, layers: list[str],
    threshold: int, target: str | None, frame: str | None,
) -> None:  # fmt: skip
    manifest: dict[str, Any] = {
        "format": FORMAT, "tinyvad": "0", "task": "tiny", "method": {"name": "padim-compact", "settings": {}},
        "backbone": {
            "layers": layers,
            "input_quantization": {"scale": calibrated.scale, "zero_point": calibrated.zero_point},
        },
        "thresholds": {"int8": {"raw": threshold}}, "preprocessing": preprocessing.to_dict(),
        "target": None if target is None else {"name": target, "alias": None}, "settings": {"frame": frame},
        "learning": {"tasks": 1, "slot_bytes": len(files[BANKS["int8"]])},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
