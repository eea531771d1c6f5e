"""What a finished build has to say: facts in, the content of report.json and the pictures of report.html out.

No dates and no timings: the same input gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.backbones.source import warnings_about
from tinyvad.detectors import METHODS
from tinyvad.evaluate import Evaluation, Verdict
from tinyvad.firmware_sim import latency, runtimes
from tinyvad.firmware_sim.budget import Budget, parse_frame
from tinyvad.firmware_sim.targets import Target
from tinyvad.firmware_sim.training_step import on_target
from tinyvad.graph.ir import node_macs
from tinyvad.graph.schedule import Schedule
from tinyvad.images import Dataset, read_mask, resize_mask
from tinyvad.model import Model
from tinyvad.report.pictures import Case
from tinyvad.sizing import Network

CASES_OF_A_KIND = 3
LATENCY_ENGINE = "cmsis_nn"


@dataclass(frozen=True, eq=False)
class BuildFacts:
    """What the build knows: its manifest, data, network, memory plan (None under TFLM), budget and checks."""

    manifest: dict[str, Any]
    dataset: Dataset
    network: Network
    schedule: Schedule | None
    budget: Budget | None
    target: Target | None
    held_out: np.ndarray
    skipped: list[tuple[Path, str]]
    verification: dict[str, Any]
    frame: str | None = None


def make_report(facts: BuildFacts, model: Model, evaluation: Evaluation | None) -> dict[str, Any]:
    """The content of report.json, plain values."""
    manifest, dataset = facts.manifest, facts.dataset
    name = manifest["method"]["name"]
    scorer_macs = model.scorer.macs(model.embedding.grid)
    return {
        "title": dataset.name,
        "tinyvad": manifest["tinyvad"],
        "warnings": warnings_about(manifest["backbone"]),
        "method": {**manifest["method"], "description": METHODS[name], "macs": scorer_macs},
        "backbone": manifest["backbone"],
        "preprocessing": manifest["preprocessing"],
        "grid": manifest["grid"],
        "thresholds": manifest["thresholds"]["int8"],
        "dataset": {
            "name": dataset.name,
            "n_train": manifest["training"]["n_good"],
            "n_test_good": sum(sample.label == 0 for sample in dataset.test),
            "n_test_anomalous": sum(sample.label == 1 for sample in dataset.test),
            "skipped": [[str(path), reason] for path, reason in facts.skipped],
        },
        "scores": {
            "held_out": [float(score) for score in model.real(facts.held_out)],
            "test": [_score_row(verdict, dataset) for verdict in (evaluation.verdicts if evaluation else [])],
        },
        "metrics": _without_timing(evaluation.metrics) if evaluation else None,
        "budget": None if facts.budget is None else facts.budget.to_dict(),
        "runtime": "tflm" if facts.schedule is None else "tinyvad",
        "memory": _memory(facts),
        "layers": _layers(facts),
        "latency": _latency(facts, model),
        **_training(facts),
        "verification": facts.verification,
        "files": manifest["files"],
    }


def _training(facts: BuildFacts) -> dict[str, Any]:
    """What a step of training would take on the target, where the network was trained."""
    figures = facts.manifest["training"].get("adaptation")
    if figures is None:
        return {}
    return {"training": figures if facts.target is None else on_target(figures, facts.target)}


def make_cases(model: Model, evaluation: Evaluation | None, dataset: Dataset) -> list[Case]:
    """Pictures: the highest and the lowest scores of defective and of good test images."""
    cases = []
    for label in (1, 0):
        verdicts = [verdict for verdict in (evaluation.verdicts if evaluation else []) if verdict.sample.label == label]
        ranked = sorted(verdicts, key=lambda verdict: -verdict.raw_score)
        lowest = ranked[max(CASES_OF_A_KIND, len(ranked) - CASES_OF_A_KIND) :]
        cases += [_case(model, verdict, dataset) for verdict in ranked[:CASES_OF_A_KIND] + lowest]
    return cases


def _case(model: Model, verdict: Verdict, dataset: Dataset) -> Case:
    size = (model.preprocessing.height, model.preprocessing.width)
    mask = verdict.sample.mask
    return Case(
        image=model.preprocessing.uint8_input(verdict.sample.path),
        anomaly_map=model.heat(verdict.grid_map[None])[0],
        mask=None if mask is None else resize_mask(read_mask(mask), *size),
        pred_score=verdict.pred_score,
        pred_label=verdict.pred_label,
        label=verdict.sample.label,
        defect=verdict.sample.defect,
        image_path=_relative(verdict.sample.path, dataset.root),
        pred_mask=model.mask(verdict.grid_map),
    )


def _score_row(verdict: Verdict, dataset: Dataset) -> dict[str, Any]:
    return {
        "image_path": _relative(verdict.sample.path, dataset.root),
        "label": verdict.sample.label,
        "defect": verdict.sample.defect,
        "pred_score": verdict.pred_score,
        "pred_label": verdict.pred_label,
    }


def _without_timing(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "seconds_per_image"}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _latency(facts: BuildFacts, model: Model) -> dict[str, Any] | None:
    """The estimate for one image, None without a target or without figures for it."""
    if facts.target is None:
        return None
    graph, embedding = facts.network.graph, model.embedding
    if facts.schedule is None:
        known = LATENCY_ENGINE in facts.target.mac_per_cycle
        macs = graph.macs() + model.scorer.macs(embedding.grid)
        return latency.estimate(macs, facts.target, LATENCY_ENGINE) if known else None
    size = (model.preprocessing.height, model.preprocessing.width)
    work = latency.combined(
        latency.frame_work(size, None if facts.frame is None else parse_frame(facts.frame)[:2]),
        latency.network_work(graph),
        latency.embedding_work(
            [(*tap.size, tap.channels) for tap in embedding.taps], embedding.grid, embedding.pool, embedding.native
        ),
        latency.scorer_work(model.scorer, embedding.depth, embedding.grid),
    )
    return latency.estimate_runtime(work, facts.target)


def _memory(facts: BuildFacts) -> dict[str, Any]:
    """Figures of the arena and every buffer in it."""
    if facts.schedule is None:
        buffers = [vars(buffer) for buffer in facts.network.arena.buffers]
        return {**runtimes.arena_facts(facts.network.arena), "buffers": buffers}
    places = facts.schedule.places
    buffers = []
    for place in places.values():
        first = place.first_use
        if place.alias_of:  # it takes over from the operand, which is drawn up to then
            first = min(places[place.alias_of].last_use + 1, place.last_use)
        owner = "scratch" if place.name.startswith("scratch") else "activations"
        buffers.append({**vars(place), "first_use": first, "owner": owner})
    return {**runtimes.plan_facts(facts.schedule), "buffers": buffers}


def _layers(facts: BuildFacts) -> list[dict[str, Any]]:
    graph = facts.network.graph
    buffers = facts.network.arena.buffers if facts.schedule is None else facts.schedule.places.values()
    placed = {buffer.name: buffer for buffer in buffers}
    rows = []
    for node in graph.nodes:
        buffer = placed.get(node.output)
        weights = [graph.tensors[name].nbytes for name in node.inputs if name in graph.constants]
        rows.append({
            "name": node.output,
            "op": node.op,
            "shape": list(graph.tensors[node.output].shape),
            "macs": node_macs(graph, node),
            "weights_bytes": sum(weights),
            "output_bytes": graph.tensors[node.output].nbytes,
            "first_use": buffer.first_use if buffer else None,
            "last_use": buffer.last_use if buffer else None,
            "offset": buffer.offset if buffer else None,
            "tap": node.output in graph.outputs,
        })  # fmt: skip
    return rows
