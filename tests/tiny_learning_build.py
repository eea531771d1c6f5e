"""The tiny build of ``tiny_build`` with a CORE bank of one product and two slots: its device can learn more."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import tiny_build
from tiny_build import GRID, SIZE, images_of_task, network

from tinyvad.bank import Header, pack_meta, write_bank
from tinyvad.calibration import quantize_on
from tinyvad.detectors import parts_scratch
from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.device_learning import learning_bytes
from tinyvad.detectors.distances import nearest
from tinyvad.detectors.nearest import PatchCoreScorer
from tinyvad.detectors.routing import prototype, signatures
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
from tinyvad.graph.scratch import scratch_of
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Preprocessing, apply_table
from tinyvad.model import BACKBONES, BANKS

ROWS, PER_IMAGE, NEW_ROWS, SLOT_BYTES = 60, 8, 24, 8192
REQUIRED = ("LUT ", "TAPS", "THRS", "CFG ", "BANK", "TASK", "PROT")


def learning_build(folder: Path, target: str, strategy: str = "patch", frame: str | None = None) -> Path:
    """Write the build into ``folder``: product 0 of ``images_of_task`` is known, ROWS rows are shared by up to 4."""
    rng = np.random.default_rng(7)
    preprocessing = Preprocessing(SIZE, SIZE)
    some = np.concatenate([images_of_task(rng, 3, task) for task in range(3)])
    calibrated = quantize_on(network(rng), preprocessing, some)
    backbone = to_tflite(calibrated.graph)
    graph = import_tflite(backbone)
    embedding = Embedding(make_taps([graph.tensors[name] for name in graph.outputs], [2.0, 2.0], False), GRID)
    maps = Int8Engine(graph, threads=1).features(apply_table(images_of_task(rng, 6, 0), calibrated.table))
    known = embedding.integer(maps)
    patches = known.reshape(-1, embedding.depth)
    scorer = PatchCoreScorer(patches[farthest_first(patches, 40).order])
    golden = rng.integers(-128, 128, (2, embedding.depth)).astype(np.int8)
    gold = np.column_stack([[0, 0], [3, 17], nearest(golden, scorer.bank)[0]]).astype(np.uint32)
    total = signatures(known, embedding.taps[-1].channels).sum(0)
    threshold = 1500
    sections = {
        "LUT ": calibrated.table, **embedding.sections(), "THRS": np.array([threshold], np.uint32), **scorer.sections(),
        "TASK": np.array([[0, 40, 6, 0]], np.int32), "PROT": prototype(total, 6)[None],
        "LADR": np.array([[[40, 1500], [28, 1700], [20, 2100], [14, 2600]]], np.uint32),
        "LRN ": np.array([SLOT_BYTES, 4, ROWS, PER_IMAGE, 300, 0, 0, 0], np.uint32),
        "TEST": golden, "GOLD": gold, "META": pack_meta({"tasks": [{"name": "part 0"}]}),
    }  # fmt: skip
    header = Header("CORE", zlib.crc32(backbone), (SIZE, SIZE), GRID, len(graph.outputs), updatable=True)
    bank = write_bank(header, sections, REQUIRED)
    scratch = [embedding.scratch_bytes(tap) for tap in embedding.taps]
    chosen = load_target(target)
    needed = parts_scratch(embedding.sections()["TAPS"], scorer)
    schedule = plan(graph, GRID, strategy, frame, needed, scratch, layer_scratch=scratch_of(packing_of(chosen)))
    camera = None
    if frame is not None:
        height, width, form = parse_frame(frame)
        camera = Camera(width, height, form)
    cells, channels = GRID[0] * GRID[1], embedding.taps[-1].channels
    workspace = learning_bytes(cells, embedding.depth, channels, len(sections), NEW_ROWS)
    frame_bytes = 0 if camera is None else camera.nbytes
    chip = chip_of(chosen, schedule.arena_bytes, frame_bytes, SLOT_BYTES, workspace)
    files = {BACKBONES["int8"]: backbone, BANKS["int8"]: bank}
    files |= dict.fromkeys((BACKBONES["onnx"], BANKS["onnx"]), b"a build has one; these tests never read it")
    files |= {f"firmware/{name}": data for name, data in firmware_files(graph, schedule, bank, chip, camera).items()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    tiny_build._write_manifest(folder, files, preprocessing, calibrated, graph.outputs, threshold, target, frame)
    return folder
