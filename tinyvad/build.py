"""``tinyvad build``: good images and a target in, a checked build out.

The order, with what each step hands on:

1. images and target           -> datasets, limits
2. backbone, input size        -> a float graph whose memory plan fits the target's RAM
3. calibration, quantisation   -> backbone.tflite, read back by the exact engine; backbone.onnx
4. features of all good images -> tapped int8 maps on disk
5. method, embedding, fit      -> the integer scorer, within the flash that is left
6. cross-fitting               -> thresholds from held-out good images
7. bank, budget, manifest      -> the folder, under a temporary name until it is whole
8. engines compared, test images scored, report
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyvad import fitting
from tinyvad.backbones.source import Backbone, open_backbone
from tinyvad.bank import Header, pack_meta, write_bank
from tinyvad.detectors import METHODS, Scorer
from tinyvad.embedding import Embedding
from tinyvad.engines import threads
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.onnx import OnnxEngine, calibrate
from tinyvad.errors import CheckFailed, InputError
from tinyvad.evaluate import Evaluation, evaluate
from tinyvad.export.onnx import to_onnx
from tinyvad.export.tflite import to_tflite
from tinyvad.files import new_folder, write_bytes, write_text
from tinyvad.firmware_sim import budget as budgets
from tinyvad.firmware_sim.latency import estimate
from tinyvad.firmware_sim.memory import Arena, arena
from tinyvad.firmware_sim.targets import Target, list_targets, load_target
from tinyvad.graph.ir import Graph, node_macs
from tinyvad.graph.quantize import (
    ChannelStatistics,
    affine_range,
    equalize,
    quantize,
)
from tinyvad.graph.tflite_file import read_tflite
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import Dataset, Preprocessing, apply_table, find_datasets, input_table, load_images
from tinyvad.model import FORMAT, MANIFEST, Model, batches, load, upsample
from tinyvad.project import Project
from tinyvad.report.html import write_report
from tinyvad.report.pictures import Case
from tinyvad.verify import SAMPLES, verify
from tinyvad.version import __version__

SIZES = tuple(range(224, 63, -16))  # input sizes that are tried when none is given, largest first
CALIBRATION_IMAGES = 64
SAMPLE_IMAGES = 8
CASES_OF_A_KIND = 3
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Built:
    """Where a build is, and its report (the content of report.json)."""

    folder: Path
    report: dict[str, Any]


def build(project: Project, progress: Progress | None = None) -> list[Built]:
    """Make one build a category; see the module's text.

    Raises:
        InputError: wrong settings or images. CheckFailed: over budget, or engines that differ. Nothing is left behind.
    """
    if project.data is None:
        raise InputError("no data: give --data DIR or data = ... in tinyvad.toml")
    datasets = find_datasets(project.data)
    if project.category is not None:
        names = [dataset.name for dataset in datasets]
        if project.category not in names:
            raise InputError(f"{project.data} has no category {project.category}; it has {', '.join(names)}")
        datasets = [dataset for dataset in datasets if dataset.name == project.category]
    target = load_target(project.target) if project.target is not None else None
    backbone = open_backbone(
        project.backbone, list(project.layers) if project.layers else None, project.weights, project.mean, project.std
    )
    several = len(datasets) > 1
    return [
        _build_one(project, dataset, target, backbone, project.out / dataset.name if several else project.out, progress)
        for dataset in datasets
    ]


def fit(images: str | Path, out: str | Path = "build", **settings: Any) -> Model:
    """Fit on a folder of images and load the result, for notebooks.

    Args:
        images: a folder in any layout that ``tinyvad build --data`` takes.
        out: where the build goes.
        settings: fields of ``Project``: method, backbone, target, image_size, ...
    """
    built = build(replace(Project(data=Path(images), out=Path(out)), **settings))
    return load(built[0].folder)


# --- step 2: input size ---------------------------------------------------------------------------------------------


def plan_arena(graph: Graph) -> tuple[Arena, int]:
    """Arena and .tflite bytes of a float graph once quantised; neither depends on the numbers, so none are needed."""
    blank = {
        name: ChannelStatistics(*(np.full(graph.tensors[name].shape[-1], v) for v in (-1.0, 1.0, 0.0)))
        for name in graph.activations
    }
    model = to_tflite(quantize(graph, blank, affine_range(-1, 1), bias_correction=False))
    return arena(read_tflite(model)), len(model)


def ram_budget(graph: Graph, target: Target, frame: str | None, scorer_bytes: int = 4096) -> budgets.Budget:
    """RAM of a graph on a target, before anything is fitted."""
    plan, _ = plan_arena(graph)
    return budgets.make_budget(target, budgets.ram_items(plan, scorer_bytes, target, frame), [])


def choose_size(project: Project, backbone: Backbone, target: Target | None) -> int:
    """The given input size if it fits, else the largest of ``SIZES`` that does.

    Raises:
        CheckFailed: region, number, limit and a remedy that works.
    """
    if target is None:
        return project.image_size or SIZES[0]
    if project.image_size is None:
        size = _largest_fitting(backbone, target, project.frame)
        if size is not None:
            return size
        budget = ram_budget(backbone.graph_at(SIZES[-1]), target, project.frame)
        budget.check(f"even at {SIZES[-1]} pixels; use {_other_target(backbone, SIZES[-1], project)}or a smaller --backbone")
    size = project.image_size or SIZES[-1]
    budget = ram_budget(backbone.graph_at(size), target, project.frame)
    if budget.problems:
        smaller = _largest_fitting(backbone, target, project.frame)
        first = f"--image-size {smaller} or less, " if smaller is not None else ""
        budget.check(f"use {first}{_other_target(backbone, size, project)}or a smaller --backbone")
    return size


def _largest_fitting(backbone: Backbone, target: Target, frame: str | None) -> int | None:
    return next((s for s in SIZES if not ram_budget(backbone.graph_at(s), target, frame).problems), None)


def _other_target(backbone: Backbone, size: int, project: Project) -> str:
    """'--target NAME, ' of the preset with the least RAM on which this size fits, or nothing."""
    for target in sorted(list_targets(), key=lambda target: target.ram_bytes):
        if not ram_budget(backbone.graph_at(size), target, project.frame).problems:
            return f"--target {target.name}, "
    return ""


# --- steps 3 to 8 ---------------------------------------------------------------------------------------------------


def _build_one(
    project: Project, dataset: Dataset, target: Target | None, backbone: Backbone, out: Path, progress: Progress | None
) -> Built:
    tell = progress or (lambda stage, done, total: None)
    size = choose_size(project, backbone, target)
    preprocessing = Preprocessing(size, size, backbone.mean, backbone.std, bit_depth=project.bit_depth)
    graph = backbone.graph_at(size)
    skipped: list[tuple[Path, str]] = []
    quantized, table = _quantized(graph, dataset, preprocessing, project, tell)
    tflite, onnx = to_tflite(quantized, f"tinyvad backbone {backbone.name}"), _onnx_bytes(graph, preprocessing)
    engine = Int8Engine(import_tflite(tflite), threads())
    tensors = [engine.graph.tensors[name] for name in engine.graph.outputs]
    stores, samples = _features(dataset, preprocessing, engine, OnnxEngine(onnx, threads()), table, project, skipped, tell)

    depth = sum(tensor.shape[3] for tensor in tensors)
    deepest = (min(tensor.shape[1] for tensor in tensors), min(tensor.shape[2] for tensor in tensors))
    grid = (project.grid, project.grid) if project.grid is not None else deepest
    limit = _bank_limit(project, target, len(tflite))
    plan = fitting.plan_method(
        project.method, depth, grid, stores[0].count, limit, project.grid is not None, project.dimensions, project.seed
    )
    embedding = fitting.make_embedding(stores[0], tensors, plan)
    tell("fit", 0, 1)
    scorer: Scorer = fitting.make_detector(plan, embedding).fit(stores[0].embeddings(embedding)).to_scorer()
    tell("fit", 1, 1)
    held_out = fitting.held_out_scores(
        stores[0], stores[1:], embedding, plan, lambda done, total: tell("threshold", done, total)
    )
    thresholds = _thresholds(held_out, scorer, project)

    with new_folder(out, MANIFEST) as folder:
        write_bytes(folder / "backbone.tflite", tflite)
        write_bytes(folder / "backbone.onnx", onnx)
        bank = _bank(tflite, preprocessing, embedding, scorer, thresholds["int8"]["raw"], table, stores[0], dataset, plan)
        write_bytes(folder / "bank.tvb", bank)
        (folder / SAMPLES).mkdir()
        for index, image in enumerate(samples):
            write_bytes(folder / SAMPLES / f"{index:02d}.png", _png(image))
        plan_of_arena = arena(read_tflite(tflite))
        budget = None
        if target is not None:
            ram = budgets.ram_items(plan_of_arena, scorer.ram_bytes(plan.grid), target, project.frame)
            budget = budgets.make_budget(target, ram, budgets.flash_items(len(tflite), len(bank), target))
            budget.check("use a smaller --image-size, --bank-bytes or a larger --target")
        manifest = _manifest(
            project, dataset, target, backbone, engine.graph, preprocessing, plan, embedding, thresholds, held_out, skipped
        )
        manifest["files"] = _hashes(folder)
        _write_json(folder / MANIFEST, manifest)
        verification = verify(folder, progress=lambda done, total: tell("compare engines", done, total))
        if not verification["ok"]:
            raise CheckFailed(f"{dataset.root}: {verification['problems'][0]}; please report this build")
        if project.threshold == "f1" or dataset.test:
            model, evaluation = _evaluate(folder, dataset, project, tell)
        else:
            model, evaluation = load(folder), None
        if project.threshold == "f1" and evaluation is not None:
            # the bank holds the threshold: written anew, and the verdicts with it
            raw = _best_f1(evaluation, dataset)
            thresholds["int8"] = _threshold_entry(raw, scorer, "best F1 on labelled defects", project, len(held_out[0]))
            bank = _bank(tflite, preprocessing, embedding, scorer, raw, table, stores[0], dataset, plan)
            write_bytes(folder / "bank.tvb", bank)
            manifest["files"] = _hashes(folder)
            _write_json(folder / MANIFEST, manifest)
            model, evaluation = _evaluate(folder, dataset, project, tell)
        report = _report(
            manifest, dataset, engine.graph, plan_of_arena, budget, target, scorer, plan, held_out[0], evaluation, model,
            skipped, verification,
        )  # fmt: skip
        _write_json(folder / "report.json", report)
        write_report(folder / "report.html", report, _cases(model, evaluation, dataset, held_out[0], preprocessing))
    return Built(out, report)


def _quantized(
    graph: Graph, dataset: Dataset, preprocessing: Preprocessing, project: Project, tell: Progress
) -> tuple[Graph, np.ndarray]:
    """The int8 graph from evenly chosen good images, and the (3, 256) int8 table of the network's input."""
    n = min(CALIBRATION_IMAGES, len(dataset.train_good))
    chosen = [dataset.train_good[i] for i in np.linspace(0, len(dataset.train_good) - 1, n).round().astype(int)]
    every = graph.copy(outputs=[node.output for node in graph.nodes])
    # one image a batch: every activation of the whole network is kept
    engine = OnnxEngine(to_onnx(every).SerializeToString(), threads())
    seen: list[np.ndarray] = []

    def inputs() -> Any:
        ignored: list[tuple[Path, str]] = []
        loaded = load_images(chosen, preprocessing, on_error=project.on_error, skipped=ignored)
        for done, batch in enumerate(batches(loaded, threads())):
            floats = np.stack([preprocessing.float_input(image) for _, image in batch])
            seen.append(floats.mean((1, 2), dtype=np.float64))
            tell("calibrate", min((done + 1) * threads(), n), n)
            yield floats

    statistics = calibrate(engine, inputs())
    extremes = preprocessing.float_input(np.array([[[0] * 3, [255] * 3]], np.uint8))[0].astype(np.float64)  # (2, 3)
    mean = np.concatenate(seen).mean(0)
    statistics[graph.inputs[0]] = ChannelStatistics(extremes.min(0), extremes.max(0), mean)
    first = affine_range(float(extremes.min()), float(extremes.max()))
    table = input_table(preprocessing.mean, preprocessing.std, float(first.scale[0]), int(first.zero_point[0]))
    return quantize(*equalize(graph, statistics), first), table


def _onnx_bytes(graph: Graph, preprocessing: Preprocessing) -> bytes:
    facts = {"mean": list(preprocessing.mean), "std": list(preprocessing.std), "colour": preprocessing.colour}
    data: bytes = to_onnx(graph, metadata=facts).SerializeToString(deterministic=True)
    return data


def _features(
    dataset: Dataset,
    preprocessing: Preprocessing,
    exact: Int8Engine,
    floating: OnnxEngine,
    table: np.ndarray,
    project: Project,
    skipped: list[tuple[Path, str]],
    tell: Progress,
) -> tuple[list[fitting.TapStore], list[np.ndarray]]:
    """Tapped int8 maps of all good images by the exact and by the float engine, and a few images to verify with."""
    tensors = [exact.graph.tensors[name] for name in exact.graph.outputs]
    stores = [fitting.TapStore(tensors), fitting.TapStore(tensors)]
    total = len(dataset.train_good)
    kept = set(np.linspace(0, total - 1, min(SAMPLE_IMAGES, total)).round().astype(int).tolist())
    samples: list[np.ndarray] = []
    seen = 0
    for batch in batches(load_images(dataset.train_good, preprocessing, on_error=project.on_error, skipped=skipped)):
        images = np.stack([image for _, image in batch])
        samples.extend(image for i, image in enumerate(images) if seen + i in kept)
        stores[0].append(exact.features(apply_table(images, table)))
        floats = floating.features(np.stack([preprocessing.float_input(image) for image in images]))
        stores[1].append([_on_grid(values, tensor) for values, tensor in zip(floats, tensors, strict=True)])
        seen += len(batch)
        tell("features", seen, total)
    return stores, samples


def _on_grid(values: np.ndarray, tensor: Any) -> np.ndarray:
    scale, zero = float(tensor.quantization.scale[0]), int(tensor.quantization.zero_point[0])
    return np.clip(np.rint(values / scale) + zero, -128, 127).astype(np.int8)


def _bank_limit(project: Project, target: Target | None, model_bytes: int) -> int | None:
    """Bytes that the bank may take: the user's bound and what the target's flash leaves, whichever is less."""
    limits = [] if project.bank_bytes is None else [project.bank_bytes]
    if target is not None and target.flash_bytes is not None:
        rest = sum(item.nbytes for item in budgets.flash_items(model_bytes, 0, target))
        left = target.flash_bytes - rest
        if left <= 0:
            problem = budgets.make_budget(target, [], budgets.flash_items(model_bytes, 0, target)).problems[0]
            raise CheckFailed(f"{problem}: use a smaller --backbone, earlier --layers or a larger --target")
        limits.append(left)
    return min(limits) if limits else None


def _thresholds(held_out: list[np.ndarray], scorer: Scorer, project: Project) -> dict[str, Any]:
    rule = f"{project.quantile:g} quantile of held-out good images"
    return {
        name: _threshold_entry(fitting.threshold_of(scores, project.quantile), scorer, rule, project, len(scores))
        for name, scores in zip(("int8", "onnx"), held_out, strict=True)
    }


def _threshold_entry(raw: int, scorer: Scorer, rule: str, project: Project, n: int) -> dict[str, Any]:
    raw = min(raw, (1 << 32) - 1)
    return {
        "raw": raw, "score": float(np.sqrt(raw)) * scorer.unit, "rule": rule, "quantile": project.quantile, "n_held_out": n,
    }  # fmt: skip


def _best_f1(evaluation: Evaluation, dataset: Dataset) -> int:
    from tinyvad.metrics import f1_max

    labels = np.array([verdict.sample.label for verdict in evaluation.verdicts])
    if not labels.any() or labels.all():
        raise InputError(f"{dataset.root}: --threshold f1 needs good and defective test images; it has only one kind")
    return int(f1_max(labels, np.array([verdict.raw_score for verdict in evaluation.verdicts]))[1])


def _bank(
    tflite: bytes,
    preprocessing: Preprocessing,
    embedding: Embedding,
    scorer: Scorer,
    threshold: int,
    table: np.ndarray,
    store: fitting.TapStore,
    dataset: Dataset,
    plan: fitting.MethodPlan,
) -> bytes:
    header = Header(
        kind=scorer.kind,
        backbone_crc32=zlib.crc32(tflite),
        input_size=(preprocessing.height, preprocessing.width),
        grid_size=embedding.grid,
        taps=len(embedding.taps),
    )
    first = next(iter(store.embeddings(embedding, np.arange(1))))  # (1, H, W, D)
    scores = scorer.score(first)[0]
    cells = np.unique(np.linspace(0, scores.size - 1, 4).round().astype(int))
    gold = np.array([[0, cell, scores.flat[cell]] for cell in cells], np.uint32)
    needed = {"LUT ": table, **embedding.sections(), "THRS": np.array([threshold], np.uint32), **scorer.sections()}
    needed["TEST"] = first[0].reshape(-1, embedding.depth)[cells]
    needed["GOLD"] = gold
    meta = {"method": plan.method, "task": dataset.name, "layers": [tap.name for tap in embedding.taps], "unit": scorer.unit}
    required = ("LUT ", "TAPS", "THRS", *scorer.required)
    return write_bank(header, {**needed, "META": pack_meta(meta)}, required)


def _manifest(
    project: Project,
    dataset: Dataset,
    target: Target | None,
    backbone: Backbone,
    graph: Graph,
    preprocessing: Preprocessing,
    plan: fitting.MethodPlan,
    embedding: Embedding,
    thresholds: dict[str, Any],
    held_out: list[np.ndarray],
    skipped: list[tuple[Path, str]],
) -> dict[str, Any]:
    first = graph.tensors[graph.inputs[0]].quantization
    assert first is not None
    return {
        "format": FORMAT,
        "tinyvad": __version__,
        "task": dataset.name,
        "method": {"name": plan.method, "settings": plan.settings},
        "backbone": {
            "name": backbone.name,
            "source": backbone.source,
            "sha256": backbone.sha256,
            "layers": [tap.name for tap in embedding.taps],
            "macs": graph.macs(),
            "parameters": graph.parameters(),
            "input_quantization": {"scale": float(first.scale[0]), "zero_point": int(first.zero_point[0])},
        },
        "preprocessing": preprocessing.to_dict(),
        "grid": list(embedding.grid),
        "thresholds": thresholds,
        "target": None if target is None else {"name": target.name, "alias": target.alias},
        "training": {
            "n_good": len(held_out[0]),
            "n_calibration": min(CALIBRATION_IMAGES, len(dataset.train_good)),
            "skipped": [[str(path), reason] for path, reason in skipped],
        },
        "settings": {
            "seed": project.seed, "frame": project.frame, "bank_bytes": project.bank_bytes,
            "image_size": project.image_size, "grid": project.grid,
        },
    }  # fmt: skip


def _evaluate(folder: Path, dataset: Dataset, project: Project, tell: Progress) -> tuple[Model, Evaluation]:
    model = load(folder)
    result = evaluate(model, dataset, project.on_error, lambda done, total: tell("test images", done, total))
    return model, result


def _report(
    manifest: dict[str, Any],
    dataset: Dataset,
    graph: Graph,
    plan_of_arena: Arena,
    budget: budgets.Budget | None,
    target: Target | None,
    scorer: Scorer,
    plan: fitting.MethodPlan,
    held_out: np.ndarray,
    evaluation: Evaluation | None,
    model: Model,
    skipped: list[tuple[Path, str]],
    verification: dict[str, Any],
) -> dict[str, Any]:
    engine = "cmsis_nn"
    known = target is not None and engine in target.mac_per_cycle
    macs = graph.macs() + scorer.macs(plan.grid)
    latency = estimate(macs, target, engine) if target is not None and known else None
    metrics = None
    if evaluation is not None:
        metrics = {key: value for key, value in evaluation.metrics.items() if key != "seconds_per_image"}
    return {
        "title": dataset.name,
        "tinyvad": manifest["tinyvad"],
        "method": {"name": plan.method, "description": METHODS[plan.method], "settings": plan.settings,
                   "macs": scorer.macs(plan.grid)},
        "backbone": {**manifest["backbone"]},
        "preprocessing": manifest["preprocessing"],
        "grid": manifest["grid"],
        "thresholds": manifest["thresholds"]["int8"],
        "dataset": {
            "name": dataset.name,
            "n_train": len(held_out),
            "n_test_good": sum(sample.label == 0 for sample in dataset.test),
            "n_test_anomalous": sum(sample.label == 1 for sample in dataset.test),
            "skipped": [[str(path), reason] for path, reason in skipped],
        },
        "scores": {
            "held_out": [float(score) for score in model.real(held_out)],
            "test": [
                {"image_path": _relative(verdict.sample.path, dataset.root), "label": verdict.sample.label,
                 "defect": verdict.sample.defect, "pred_score": verdict.pred_score, "pred_label": verdict.pred_label}
                for verdict in (evaluation.verdicts if evaluation is not None else [])
            ],
        },
        "metrics": metrics,
        "budget": None if budget is None else budget.to_dict(),
        "memory": {
            "head_bytes": plan_of_arena.head_bytes,
            "head_kind": plan_of_arena.head_kind,
            "lower_bound_bytes": plan_of_arena.lower_bound_bytes,
            "tail_bytes": plan_of_arena.tail_bytes(4),
            "tail": plan_of_arena.tail_bytes_modelled[4],
            "n_ops": plan_of_arena.n_ops,
            "buffers": [vars(buffer) for buffer in plan_of_arena.buffers],
        },
        "layers": _layers(graph, plan_of_arena),
        "latency": latency,
        "verification": verification,
        "files": manifest["files"],
    }  # fmt: skip


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _layers(graph: Graph, plan: Arena) -> list[dict[str, Any]]:
    placed = {buffer.name: buffer for buffer in plan.buffers}
    rows = []
    for node in graph.nodes:
        buffer = placed.get(node.output)
        rows.append({
            "name": node.output,
            "op": node.op,
            "shape": list(graph.tensors[node.output].shape),
            "macs": node_macs(graph, node),
            "weights_bytes": sum(graph.tensors[name].nbytes for name in node.inputs if name in graph.constants),
            "output_bytes": graph.tensors[node.output].nbytes,
            "first_use": buffer.first_use if buffer else None,
            "last_use": buffer.last_use if buffer else None,
            "offset": buffer.offset if buffer else None,
            "tap": node.output in graph.outputs,
        })  # fmt: skip
    return rows


def _cases(
    model: Model, evaluation: Evaluation | None, dataset: Dataset, held_out: np.ndarray, preprocessing: Preprocessing
) -> list[Case]:
    """Pictures for the report: the highest and lowest scores of defective and of good test images."""
    from tinyvad.images import read_mask, resize_mask

    if evaluation is None:
        return []
    chosen = []
    for label in (1, 0):
        ranked = sorted(
            (verdict for verdict in evaluation.verdicts if verdict.sample.label == label), key=lambda v: -v.raw_score
        )
        ends = ranked[:CASES_OF_A_KIND] + ranked[max(CASES_OF_A_KIND, len(ranked) - CASES_OF_A_KIND) :]
        chosen.extend(ends)
    size = (preprocessing.height, preprocessing.width)
    cases = []
    for verdict in chosen:
        mask = verdict.sample.mask
        cases.append(
            Case(
                image=preprocessing.uint8_input(verdict.sample.path),
                anomaly_map=upsample(model.real(verdict.grid_map)[None], size)[0],
                mask=None if mask is None else resize_mask(read_mask(mask), *size),
                pred_score=verdict.pred_score,
                pred_label=verdict.pred_label,
                label=verdict.sample.label,
                defect=verdict.sample.defect,
                image_path=_relative(verdict.sample.path, dataset.root),
            )
        )
    return cases


def _hashes(folder: Path) -> dict[str, Any]:
    names = ["backbone.tflite", "backbone.onnx", "bank.tvb"]
    names += sorted(f"{SAMPLES}/{path.name}" for path in (folder / SAMPLES).iterdir())
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in names
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
