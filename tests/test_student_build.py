"""A whole build of a student and a teacher: every engine, the C runtime and emulated chips give Python's integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from schedule_interpreter import check_rows
from tiny_build import images, images_of_task
from tiny_student_build import network, student_build

from tinyvad.detectors.student_teacher import Pairs
from tinyvad.embedding import align
from tinyvad.engines.int8 import Int8Engine
from tinyvad.firmware_sim import host
from tinyvad.firmware_sim.board_build import missing_tools
from tinyvad.firmware_sim.compare import compare_firmware
from tinyvad.firmware_sim.plans import STRATEGIES, plan
from tinyvad.firmware_sim.targets import load_target
from tinyvad.graph.scratch import layer_scratch
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import apply_table
from tinyvad.inspection import inspect
from tinyvad.model import load, upsample
from tinyvad.profiling import profile
from tinyvad.sizing import expected_scorer_memory, scorer_memory
from tinyvad.verify import verify

POSITIONS = 17 * 17 * 10 + 9 * 9 * 14 + 5 * 5 * 21  # values of one tail's maps


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_build(tmp_path_factory.mktemp("student"), "stm32h743")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return images(np.random.default_rng(3), 3)


def test_every_engine_that_needs_no_compiler_says_the_same(build: Path) -> None:
    result = verify(build, engines=["litert", "tflm", "onnx"])
    assert result["ok"] and result["bank_self_test"] == "passed", result["problems"]
    assert result["taps"] == ["s1", "s2", "s3", "t1", "t2", "t3"]
    for name in ("litert", "tflm"):
        assert result["engines"][name]["status"] == "equal"
        assert result["engines"][name]["values_compared"] == 2 * POSITIONS * result["n_images"]


def test_predictions_are_products_of_distances(build: Path, pictures: np.ndarray) -> None:
    """Real scores are unit * raw, no root; the map is not smoothed; a mask stands where the threshold is reached."""
    model = load(build)
    pairs = model.embedding
    assert isinstance(pairs, Pairs) and model.scorer.kind == "STFP" and pairs.grid == (17, 17)
    maps, tasks = model.grid_maps(pictures)
    assert maps.max() > 0 and not tasks.any()
    distances = pairs.integer(model.taps(pictures)).astype(float) / 2**pairs.bits
    np.testing.assert_allclose(model.real(maps), distances.prod(-1), atol=model.scorer.unit)
    for picture, grid in zip(pictures, maps, strict=True):
        found = model.predict(picture)
        assert not isinstance(found, list)
        assert found.pred_score == found.raw_score * model.scorer.unit == model.real(grid).max()
        assert found.threshold == model.threshold * model.scorer.unit
        np.testing.assert_array_equal(found.anomaly_map, upsample(model.real(grid)[None], (33, 33), 0.0)[0])
        assert found.pred_mask.any() == (found.raw_score >= model.threshold) == bool(found.pred_label)


def test_the_c_runtime_on_this_machine_under_the_sanitizers(build: Path, pictures: np.ndarray) -> None:
    run, model = host.run(build, pictures, sanitize=True), load(build)
    maps, _ = model.grid_maps(pictures)
    np.testing.assert_array_equal(run.maps, maps)
    for name, tap in zip(run.tensors, model.taps(pictures), strict=True):
        np.testing.assert_array_equal(run.tensors[name], tap)
    np.testing.assert_array_equal(run.scores, maps.max((1, 2)))


@pytest.mark.parametrize(("target", "strategy", "tasks"), [
    ("stm32h743", "inplace-dw", 1), ("stm32h743", "patch", 3), ("rp2040", "patch", 1), ("corstone-300", "layerwise", 3),
])  # fmt: skip
def test_every_core_computes_pythons_integers(target: str, strategy: str, tasks: int, tmp_path: Path) -> None:
    if line := missing_tools():
        pytest.skip(line)
    folder = student_build(tmp_path, target, strategy, tasks)
    rng = np.random.default_rng(2)
    pictures = np.concatenate([images_of_task(rng, 1, task) for task in (2, 0, 1)])
    model = load(folder)
    assert model.grid_maps(pictures)[1].tolist() == ([2, 0, 1] if tasks == 3 else [0, 0, 0])
    found = compare_firmware(folder, model, pictures, "firmware", load_target(target))
    assert found["status"] == "equal", found.get("problem")
    assert found["values_compared"] == 3 * 2 * POSITIONS
    assert not any(found["differing_values"].values()) and found["differing_grid_scores"] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_keep_both_tails_maps_until_they_are_scored(build: Path, strategy: str) -> None:
    graph = import_tflite((build / "backbone.tflite").read_bytes())
    shapes = [graph.tensors[name].shape[1:] for name in graph.outputs]
    parts = [h * w * c for h, w, c in shapes]
    schedule = plan(graph, (17, 17), strategy, None, 4000, parts=parts)
    check_rows(graph, schedule, lambda step: layer_scratch(graph, graph.nodes[step.index]) if step.kind == "node"
               else 4000 if step.kind == "score" else 0)  # fmt: skip
    last = len(schedule.steps) - 1
    for name, nbytes in zip(graph.outputs, parts, strict=True):
        place = schedule.places[f"embedding of {name}"]
        assert place.nbytes == nbytes and place.last_use == last
    assert schedule.arena_bytes >= sum(map(align, parts)) + align(4 * 17 * 17) + 4000


def test_memory_is_known_before_anything_is_fitted(build: Path) -> None:
    """Shapes alone say what scoring takes: the float outline gives what the fitted bank does."""
    graph, model = network(np.random.default_rng(0)), load(build)
    taps = [(*tap.size, tap.channels) for tap in model.embedding.taps]
    expected = expected_scorer_memory([graph.tensors[name] for name in graph.outputs], None, "paste")
    assert expected == scorer_memory(taps, model.embedding.grid, model.scorer, model.embedding.pool)
    assert expected.embed == (0,) * 6 and sum(expected.parts) == 2 * POSITIONS
    assert expected.alone == align(4 * 17 * 17) + expected.scorer


def test_profile_and_inspect(build: Path) -> None:
    problems, figures = profile(build, ["stm32h743"], "both")
    assert not problems
    ours, tflm = figures["profiles"]
    assert ours["latency"]["by_kernel"]["pairs"] > 0 and "embed" not in ours["latency"]["by_kernel"]
    assert tflm["runtime"] == "tflm"
    value, text = inspect(build / "bank.tvb")
    assert value["tasks"][0]["rows"] == 1 and "STFP" in text


def test_the_two_tails_differ_by_the_noise_of_the_student(build: Path, pictures: np.ndarray) -> None:
    """The trunk is computed once, and the maps of a pair are near each other: the test's scores are no accident."""
    graph = import_tflite((build / "backbone.tflite").read_bytes())
    assert sum(node.inputs[0] == graph.nodes[0].output for node in graph.nodes) == 2
    model = load(build)
    maps = Int8Engine(graph, 1).features(apply_table(pictures, model.table))
    distances = model.embedding.integer(maps) / 2**20
    assert 0.001 < np.median(distances) < 0.5
