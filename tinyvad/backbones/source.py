"""From what a person names as ``--backbone`` to a float Graph at any input size, cut after the tapped layers.

Flows in: a name and where its weights come from, or a ``.onnx`` or ``.tflite`` file. Flows out: a ``Backbone`` with its
preprocessing.

A name gets its weights from, in this order: ``weights`` (a ``.npz`` that ``tinyvad distill`` wrote, an ``.onnx`` or
``.tflite`` of the same network, or the word ``random``), itself (the filter bank), the ones that tinyvad brings along.
``auto`` is the network with the highest feature quality; ``tinyvad.sizing`` has the rule for a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.backbones import IMAGENET_MEAN, IMAGENET_STD, BackboneInfo, get_backbone, list_backbones
from tinyvad.backbones.assign import random_weights, with_weights, with_weights_from
from tinyvad.backbones.cards import parse_weights, read_card, trained_weights
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise, truncate
from tinyvad.graph.taps import default_layers, tap_candidates
from tinyvad.project import RANDOM_WEIGHTS

AUTO = "auto"
DEFAULT_BACKBONE = AUTO
RANDOM_SEED = 0
Triple = tuple[float, float, float]
Fill = Callable[[Graph], Graph]  # a definition -> the normalised graph with values, cut after its taps


@dataclass(frozen=True)
class Backbone:
    """A network to tap.

    Attributes:
        name: the built-in name or the file's name.
        source: where its weights come from, one line for reports.
        sha256: of the weights file, None for built-in and random weights.
        mean, std: the network reads (pixel / 255 - mean) / std, RGB.
        layers: tensor names of the taps, in the order of the graph's outputs.
        graph_at: input size in pixels -> float Graph, normalised and cut after the last tap.
        random: the weights are random: good for sizes and timings, not for finding anything.
        quality: 0 to 1 where a card tells it (see ``tinyvad.backbones.cards``), else None.
    """

    name: str
    source: str
    sha256: str | None
    mean: Triple
    std: Triple
    layers: tuple[str, ...]
    graph_at: Callable[[int], Graph]
    random: bool = False
    quality: float | None = None


def open_backbone(
    spec: str | Path | None,
    layers: list[str] | None = None,
    weights: str | Path | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Backbone:
    """Resolve a backbone.

    Args:
        spec: name, file or "auto"; None takes ``DEFAULT_BACKBONE``.
        layers: taps (see ``resolve_layer``); None takes the last block end at strides 4, 8 and 16.
        weights: for a name: a .npz, .onnx or .tflite file with its weights, or "random".
        mean, std: override what the file says or what its layout suggests.

    Raises:
        InputError: no such name or file, a definition without weights, weights of another network or damaged ones, an
            unknown layer or one that the weights do not reach.
    """
    name = str(spec) if spec is not None else DEFAULT_BACKBONE
    path = Path(name)
    if path.suffix.lower() in (".onnx", ".tflite"):
        if weights is not None:
            raise InputError(f"--weights {weights}: {name} has its own weights; leave --weights out")
        return _from_file(path, layers, mean, std)
    if name == AUTO:
        check_auto(layers, weights, mean, std)
        name = auto_candidates()[0]
    return _by_name(get_backbone(name), layers, weights, mean, std)


def auto_candidates() -> list[str]:
    """Names of the networks that have weights and a card, the highest feature quality first."""
    cards = [read_card(info.name) for info in list_backbones() if info.weights != "none"]
    return [card.architecture for card in sorted((c for c in cards if c is not None), key=lambda card: -card.quality)]


def check_auto(
    layers: Any = None, weights: str | Path | None = None, mean: Triple | None = None, std: Triple | None = None
) -> None:
    """Raise InputError if anything is set that only makes sense for one known network."""
    for flag, value in (("layers", layers), ("weights", weights), ("mean", mean), ("std", std)):
        if value is not None:
            raise InputError(f"--{flag} belongs to one network: name it with --backbone (`tinyvad backbones` lists them)")


def warnings_about(facts: Mapping[str, Any]) -> list[str]:
    """What everybody who reads a build's results must know about its backbone; ``facts`` is the manifest's "backbone"."""
    if facts.get("random") is not True:
        return []
    return [
        f"{facts.get('name')} has random weights and was never trained: memory and speed are as with trained ones, scores "
        "and metrics say nothing about what it could find"
    ]


def _by_name(
    info: BackboneInfo, layers: list[str] | None, weights: str | Path | None, mean: Triple | None, std: Triple | None
) -> Backbone:
    wanted = layers if layers is not None else list(info.layers)
    is_random, quality, digest = str(weights) == RANDOM_WEIGHTS, None, None
    if weights is None:
        card = read_card(info.name)
        quality = None if card is None else card.quality
        if info.weights == "none":
            raise InputError(
                f"backbone {info.name} is a definition without weights: give them with --weights FILE, or --weights random "
                f"to try it untrained; --backbone {AUTO} takes one that has weights"
            )
        if info.weights == "built in":
            source, fill = f"{info.name}, built in", _own(wanted)
        else:
            fill = _arrays(trained_weights(info.name), wanted, f"tinyvad's weights for {info.name}")
            assert card is not None and card.sha256 is not None  # trained_weights has looked
            digest = card.sha256
            source = f"{info.name}, tinyvad's own weights (quality {card.quality:.2f}, SHA-256 {digest[:8]})"
    elif is_random:
        source, fill = f"{info.name}, random weights (seed {RANDOM_SEED}), untrained", _random(wanted)
    else:
        path = Path(weights)
        source, fill = f"{info.name} with weights of {path.name}", _of_file(path, info.input_size, wanted)
        digest = _sha256(path)

    @lru_cache(maxsize=4)
    def graph_at(size: int) -> Graph:
        return fill(info.build(input_size=size))

    taps = tuple(graph_at(info.input_size).outputs)
    return Backbone(
        info.name, source, digest, mean or info.mean, std or info.std, taps, graph_at, is_random, quality
    )


def _own(wanted: list[str]) -> Fill:
    return lambda definition: truncate(normalise(definition), wanted)


def _random(wanted: list[str]) -> Fill:
    return lambda definition: truncate(normalise(random_weights(definition, RANDOM_SEED)), wanted)


def _of_file(path: Path, size: int, wanted: list[str]) -> Fill:
    if path.suffix.lower() == ".npz":
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        return _arrays(parse_weights(data, str(path)), wanted, str(path))
    imported = _import(path, size, None)[0]
    return lambda definition: truncate(normalise(with_weights_from(definition, imported)), wanted)


def _arrays(arrays: Mapping[str, np.ndarray], wanted: list[str], where: str) -> Fill:
    """``arrays`` are the constants of a normalised definition that was cut after its trained layers."""

    def fill(definition: Graph) -> Graph:
        whole = normalise(definition)
        graph = truncate(whole, wanted)
        if not graph.constants.keys() <= arrays.keys():
            reach = [
                candidate.name
                for candidate in tap_candidates(whole)
                if truncate(whole, [candidate.name]).constants.keys() <= arrays.keys()
            ]
            if reach:
                raise InputError(
                    f"{where} reach up to layer {reach[-1]}, not to all of {', '.join(graph.outputs)}; choose --layers up "
                    f"to {reach[-1]}"
                )
        try:
            return with_weights(graph, arrays)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    return fill


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
    raise InputError(f"{path}: weights come from .npz, .onnx or .tflite files, or are the word {RANDOM_WEIGHTS}")


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
    if 4 < span < 6:  # wider than [-1, 1], and not pixels as they are: ImageNet's mean and standard deviation
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
