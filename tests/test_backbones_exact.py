"""Every backbone that can be named, as int8: each tensor equal to TFLM's and LiteRT's, the plan equal to TFLM's arena."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_firmware_sim_memory import tflm_arenas

from tinyvad.backbones import BACKBONES
from tinyvad.backbones.source import open_backbone
from tinyvad.calibration import quantize_on
from tinyvad.demo import render_part
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.litert import LitertEngine
from tinyvad.engines.tflm import TflmEngine
from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.memory import arena
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Preprocessing, apply_table

SIZE = 96


@pytest.mark.parametrize("name", BACKBONES)
def test_every_tensor_and_the_arena(name: str, tmp_path: Path) -> None:
    """With the weights that come with it, or random ones; calibrated on two good parts, run on a bad one and on noise."""
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT")
    pytest.importorskip("tflite_micro", reason="needs TFLM")
    backbone = open_backbone(name, weights="random" if BACKBONES[name].weights == "none" else None)
    preprocessing = Preprocessing(SIZE, SIZE, backbone.mean, backbone.std)
    defects = (None, None, "scratch")
    parts = [render_part(np.random.default_rng(seed), SIZE, defect)[0] for seed, defect in enumerate(defects)]
    calibrated = quantize_on(backbone.graph_at(SIZE), preprocessing, parts[:2])
    graph = calibrated.graph
    model = to_tflite(graph.copy(outputs=[node.output for node in graph.nodes]))
    engine, litert = Int8Engine(import_tflite(model), 1), LitertEngine(model)
    assert litert.exact
    noise = np.random.default_rng(9).integers(-128, 128, (SIZE, SIZE, 3)).astype(np.int8)
    batch = np.stack([apply_table(parts[2], calibrated.table), noise])
    ours, tflm, reference = (e.features(batch) for e in (engine, TflmEngine(model), litert))
    for tensor, a, b, c in zip(engine.graph.outputs, ours, tflm, reference, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"TFLM: {tensor}")
        np.testing.assert_array_equal(a, c, err_msg=f"LiteRT: {tensor}")
    cut = to_tflite(graph)
    ((head, tail),) = tflm_arenas(tmp_path, [cut])
    figures = arena(read_tflite(cut))
    assert (figures.head_kind, figures.head_bytes, figures.tail_bytes(8)) == ("exact", head, tail)
