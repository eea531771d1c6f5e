"""What a training leaves: float16 weights, a card that says where they come from and how good they are, a loss picture.

Flows in: a ``Trained`` student. Flows out: ``NAME.npz``, ``NAME.toml`` and ``NAME.svg``. All figures are measured on the
weights as they are stored, rounded to float16, on views of held-out images.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.backbones import get_backbone
from tinyvad.calibration import quantize_on
from tinyvad.distill.keras_graph import import_keras
from tinyvad.distill.picture import loss_picture
from tinyvad.distill.readout import explained
from tinyvad.distill.teacher import Teachers, map_sizes, real_input
from tinyvad.distill.train import Progress, Recipe, Trained
from tinyvad.distill.views import Pictures, views
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.files import write_bytes, write_text
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise
from tinyvad.graph.taps import layer_table
from tinyvad.images import Preprocessing, apply_table

CALIBRATION, CHECK, CHECK_VIEWS = 21, 22, 64  # second parts of the views' keys, and their number


def finish(
    recipe: Recipe,
    trained: Trained,
    out: Path,
    command: str,
    notes: Sequence[str],
    quantised_check: bool,
    threads: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and write weights, card and picture.

    Args:
        out: the .npz; card and picture stand beside it.
        command: that made it, for the card.
        notes: lines on licences and sources, for the card.
        quantised_check: also measure int8 features against float ones.

    Returns:
        The card, as a dict.

    Raises:
        InputError: a weight beyond float16, or a file that can't be written.
    """
    tell = progress or (lambda stage, done, total: None)
    tell("measuring", 0, 2)
    info = get_backbone(recipe.student)
    graph = normalise(trained.definition)
    with np.errstate(over="ignore"):  # told below
        stored: dict[str, Any] = {name: array.astype(np.float16) for name, array in graph.constants.items()}
    for name, array in stored.items():
        if not np.isfinite(array).all():
            raise InputError(f"{recipe.student}: {name} holds values beyond float16; train with a lower --learning-rate")
    graph = graph.copy(constants={name: array.astype(np.float32) for name, array in stored.items()})
    engine = OnnxEngine(to_onnx(graph).SerializeToString(), threads)

    sizes = map_sizes(graph)
    strides = {row.name: row.stride for row in layer_table(graph)}
    specs = [(spec, list(layers) if layers else None) for spec, layers in recipe.teachers]
    teachers = Teachers(specs, recipe.image_size, sizes, threads)
    shares = explained(
        lambda images: engine.features(real_input(images, info.mean, info.std)),
        teachers, trained.training, trained.held_out, recipe.image_size, recipe.seed,
    )  # fmt: skip
    tell("measuring", 1, 2)
    buffer = io.BytesIO()
    np.savez(buffer, **stored)
    card: dict[str, Any] = {
        "architecture": recipe.student,
        "input_size": recipe.image_size,
        "parameters": int(sum(array.size for array in stored.values())),
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "command": command,
        "licence": list(notes),
        "quality": round(float(np.mean(shares)), 4),
        "layers": [
            {"name": name, "stride": strides[name], "channels": graph.tensors[name].shape[3],
             "teacher": targets, "explained": round(share, 4)}
            for name, targets, share in zip(graph.outputs, trained.targets, shares)
        ],
        "training": {
            "teachers": [f"{name} (SHA-256 {digest})" if digest else name for name, digest in trained.teachers],
            "images": len({*trained.training.paths, *trained.held_out.paths}),
            "folders": [Path(folder).name for folder in recipe.folders],
            "generated": recipe.generated,
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "loss": recipe.loss,
            "final_loss": [round(value, 4) for value in trained.history[-1][1:]],
            "seed": recipe.seed,
            "minutes": round(trained.seconds / 60, 1),
            "keras": f"{import_keras().__version__}, {import_keras().backend.backend()}",
        },
    }  # fmt: skip
    if quantised_check:
        preprocessing = Preprocessing(recipe.image_size, recipe.image_size, info.mean, info.std)
        ratios = signal_to_noise(graph, engine, preprocessing, trained.training, trained.held_out, recipe.seed)
        for layer, ratio in zip(card["layers"], ratios):
            layer["int8_snr_db"] = round(ratio, 2)
    tell("measuring", 2, 2)
    write_text(out.with_suffix(".svg"), loss_picture(recipe.student, trained.layers, trained.history))
    write_text(out.with_suffix(".toml"), _toml(card))
    write_bytes(out, buffer.getvalue())  # last: where weights are, the others are
    return card


def signal_to_noise(
    graph: Graph, engine: OnnxEngine, preprocessing: Preprocessing, training: Pictures, held_out: Pictures, seed: int
) -> list[float]:
    """dB of each tap: variance of the float features over mean square error of the exact int8 engine's, held-out views."""
    size = preprocessing.height
    calibrated = quantize_on(graph, preprocessing, views(training, (seed, CALIBRATION), CHECK_VIEWS, size))
    images = views(held_out, (seed, CHECK), CHECK_VIEWS, size)
    exact = Int8Engine(calibrated.graph).features(apply_table(images, calibrated.table))
    floats = engine.features(preprocessing.float_input(images))
    ratios = []
    for name, q, real in zip(graph.outputs, exact, floats):
        grid = calibrated.graph.tensors[name].quantization
        assert grid is not None
        error = (q.astype(np.float64) - grid.zero_point[0]) * grid.scale[0] - real
        signal = np.square(real - real.mean((0, 1, 2))).mean()
        ratios.append(float(10 * np.log10(signal / np.square(error).mean())))
    return ratios


def _toml(card: Mapping[str, Any]) -> str:
    """A card as TOML: plain keys, then one [[layers]] table each, then [training]."""
    lines = [f"{key} = {_value(value)}" for key, value in card.items() if key not in ("layers", "training")]
    for layer in card["layers"]:
        lines += ["", "[[layers]]", *(f"{key} = {_value(value)}" for key, value in layer.items())]
    lines += ["", "[training]", *(f"{key} = {_value(value)}" for key, value in card["training"].items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """Numbers, texts and lists of them: JSON's form of these is TOML's too, but for DEL and bytes that are no UTF-8."""
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode("utf-8", "replace").decode("utf-8")
