"""From what a person names as ``--backbone`` to a float Graph at any input size, cut after the tapped layers.

Flows in: a built-in name, or a ``.onnx`` or ``.tflite`` file. Flows out: a ``Backbone`` with its preprocessing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyvad.backbones import IMAGENET_MEAN, IMAGENET_STD, get_backbone
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise, truncate
from tinyvad.graph.taps import default_layers, resolve_layer

DEFAULT_BACKBONE = "filter-bank"
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Backbone:
    """A network to tap.

    Attributes:
        name: the built-in name or the file's name.
        source: where its weights come from, one line for reports.
        sha256: of the weights file, None for built-in weights.
        mean, std: the network reads (pixel / 255 - mean) / std, RGB.
        layers: tensor names of the taps, in the order of the graph's outputs.
        graph_at: input size in pixels -> float Graph, normalised and cut after the last tap.
    """

    name: str
    source: str
    sha256: str | None
    mean: Triple
    std: Triple
    layers: tuple[str, ...]
    graph_at: Callable[[int], Graph]


def open_backbone(
    spec: str | Path | None,
    layers: list[str] | None = None,
    weights: str | Path | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Backbone:
    """Resolve a backbone.

    Args:
        spec: built-in name or file; None takes ``DEFAULT_BACKBONE``.
        layers: taps (see ``resolve_layer``); None takes the last block end at strides 4, 8 and 16.
        weights: file with the weights of a built-in definition.
        mean, std: override what the file says or what its layout suggests.

    Raises:
        InputError: no such name or file, a definition without weights, an unknown layer.
    """
    name = str(spec) if spec is not None else DEFAULT_BACKBONE
    path = Path(name)
    if path.suffix.lower() in (".onnx", ".tflite"):
        if weights is not None:
            raise InputError(f"--weights {weights}: {name} has its own weights; leave --weights out")
        return _from_file(path, layers, mean, std)
    return _built_in(name, layers, weights, mean, std)


def _built_in(
    name: str, layers: list[str] | None, weights: str | Path | None, mean: Triple | None, std: Triple | None
) -> Backbone:
    from tinyvad.backbones.weights import with_weights_from

    info = get_backbone(name)
    if info.weights != "built in" and weights is None:
        raise InputError(
            f"backbone {info.name} is a definition without weights: give them with --weights FILE, or give the .onnx or "
            f".tflite file itself as --backbone; {DEFAULT_BACKBONE} needs none"
        )
    wanted = layers if layers is not None else list(info.layers)
    trained = None if weights is None else _import(Path(weights), info.input_size, None)[0]

    @lru_cache(maxsize=4)
    def graph_at(size: int) -> Graph:
        graph = info.build(input_size=size)
        if trained is not None:
            graph = with_weights_from(graph, trained)
        graph = normalise(graph)
        return truncate(graph, [resolve_layer(graph, layer) for layer in wanted])

    source = f"{info.name}, built in" if weights is None else f"{info.name} with weights of {Path(weights).name}"
    digest = None if weights is None else _sha256(Path(weights))
    taps = tuple(graph_at(info.input_size).outputs)
    return Backbone(info.name, source, digest, mean or info.mean, std or info.std, taps, graph_at)


def _from_file(path: Path, layers: list[str] | None, mean: Triple | None, std: Triple | None) -> Backbone:
    first, guess = _import(path, 224, layers)
    if layers is None:
        layers = default_layers(first)
    wanted = list(layers)

    @lru_cache(maxsize=4)
    def graph_at(size: int) -> Graph:
        graph, _ = _import(path, size, wanted)
        return graph

    taps = tuple(graph_at(224).outputs)
    return Backbone(
        path.stem, f"file {path.name}", _sha256(path), mean or guess[0], std or guess[1], taps, graph_at
    )


def open_network(path: Path, size: int = 224) -> Graph:
    """The normalised float graph of a whole .onnx or .tflite file, to look at."""
    return _import(path, size, None)[0]


def _import(path: Path, size: int, layers: list[str] | None) -> tuple[Graph, tuple[Triple, Triple]]:
    """The normalised float graph of a file, and the (mean, std) that it or its layout tells; ``size`` with layers only
    for .tflite."""
    if path.suffix.lower() == ".onnx":
        from tinyvad.graph.onnx_import import load_onnx

        loaded = load_onnx(path, size, layers)
        guess = loaded.preprocessing
        return loaded.graph, (_triple(guess.mean), _triple(guess.std))
    if path.suffix.lower() == ".tflite":
        from tinyvad.graph.tflite_file import read_tflite
        from tinyvad.graph.tflite_import import import_tflite, trunk_outputs

        # a whole trunk may end in a pool of the file's own size: it is looked at as it is
        wanted = trunk_outputs(read_tflite(path)) if layers is None else layers
        at = None if layers is None else (size, size)
        graph = import_tflite(path, dequantize=True, input_size=at, outputs=wanted)
        graph = normalise(graph)
        return graph, _tflite_preprocessing(path)
    raise InputError(f"{path}: weights come from .onnx or .tflite files")


def _tflite_preprocessing(path: Path) -> tuple[Triple, Triple]:
    """A quantised input says which real values its pixels mean; a float one is taken as [-1, 1], Keras' habit."""
    from tinyvad.graph.tflite_file import read_tflite

    file = read_tflite(path)
    tensor = file.tensors[file.inputs[0]]
    if tensor.quantization is None or tensor.dtype not in ("int8", "uint8"):
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    scale, zero = float(tensor.quantization.scale[0]), int(tensor.quantization.zero_point[0])
    low = (0 if tensor.dtype == "uint8" else -128) - zero
    span = 255 * scale
    if span > 4:  # wider than [-1, 1] can be: ImageNet's mean and standard deviation
        return IMAGENET_MEAN, IMAGENET_STD
    # pixel 0 is low * scale, pixel 255 is low * scale + span: (p / 255 - mean) / std with std = 1 / span
    return _triple([-low / 255]), _triple([1 / span])


def _triple(values: Any) -> Triple:
    numbers = [float(value) for value in values]
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise InputError(f"the backbone takes {len(numbers)} channels; tinyvad feeds three (RGB)")
    return (numbers[0], numbers[1], numbers[2])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
