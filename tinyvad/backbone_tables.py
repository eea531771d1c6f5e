"""``tinyvad backbones``: what each network by name takes and is worth, and one network's layers and card.

Flows in: nothing, a name, or a file. Flows out: (value for JSON, text), as in ``tinyvad.inspection``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyvad.backbones import BackboneInfo, get_backbone, list_backbones
from tinyvad.backbones.cards import Card, read_card
from tinyvad.backbones.source import open_backbone, open_network
from tinyvad.errors import InputError
from tinyvad.firmware_sim.budget import kib
from tinyvad.firmware_sim.memory import align
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise
from tinyvad.graph.taps import default_layers, tap_candidates
from tinyvad.project import RANDOM_WEIGHTS
from tinyvad.sizing import plan_network

Shown = tuple[dict[str, Any], str]
FILES = (".onnx", ".tflite")
POINTER_BYTES = 4  # of a 32-bit chip, in TFLM's persistent structures


def backbones_table() -> Shown:
    """All networks by name, best feature quality first among those that have weights."""
    rows = [_row(info) for info in list_backbones()]
    rows.sort(key=lambda row: (row["weights"] == "none", -(row["quality"] or 0)))
    lines = [
        f"{'':<28}{'cut after its default layers, int8':^50}  {'published':>18}",
        f"{'name':<18} {'weights':<9}{'px':>4} {'parameters':>11} {'M MACs':>7} {'arena':>9} {'flash':>9} {'quality':>7}  "
        f"{'parameters':>10} {'M MACs':>7}",
    ]
    for r in rows:
        quality = "-" if r["quality"] is None else f"{r['quality']:.3f}"
        lines.append(
            f"{r['name']:<18} {r['weights']:<9}{r['input_size']:>4} {r['cut_parameters']:>11,} {r['cut_mmacs']:>7.1f} "
            f"{kib(r['arena_bytes']):>9} {kib(r['flash_bytes']):>9} {quality:>7}  {r['parameters']:>10,} {r['mmacs']:>7.1f}"
        )
    lines += [
        "px: the published input size, any other works. arena: TFLM's, planned at that size. flash: the .tflite alone.",
        "quality: share of a large network's features that can be read off the taps. published: the whole network at px.",
        "trained: weights that come with tinyvad. none: a definition, for --weights FILE, or --weights random to try it.",
    ]
    return {"backbones": rows}, "\n".join(lines)


def backbone_facts(name_or_file: str) -> Shown:
    """One network: the layers that can be tapped, and for a name what it takes and its card.

    Raises:
        InputError: no such name or file.
    """
    path = Path(name_or_file)
    if path.suffix.lower() in FILES:
        return _of_file(path)
    return _of_name(get_backbone(name_or_file))


def _row(info: BackboneInfo) -> dict[str, Any]:
    """Figures of a network cut after its default layers at its published size, and the published ones of the whole."""
    card = read_card(info.name)
    # neither plan nor counts depend on the values, so that none need to be read
    graph = open_backbone(info.name, weights=RANDOM_WEIGHTS).graph_at(info.input_size)
    plan = plan_network(graph)
    return {
        "name": info.name,
        "weights": info.weights,
        "input_size": info.input_size,
        "layers": list(info.layers),
        "cut_parameters": graph.parameters(),
        "cut_mmacs": round(graph.macs() / 1e6, 3),
        "arena_bytes": align(plan.arena.head_bytes) + plan.arena.tail_bytes(POINTER_BYTES),
        "flash_bytes": plan.file.size,
        "quality": None if card is None else card.quality,
        "parameters": info.parameters,
        "mmacs": info.mmacs,
        "source": info.source,
    }


def _of_name(info: BackboneInfo) -> Shown:
    row, card = _row(info), read_card(info.name)
    graph = normalise(info.build(input_size=info.input_size))
    trained = card.layers[-1].name if card is not None and card.sha256 is not None else ""
    text, layers = _layers(graph, list(info.layers), trained)
    value = {**row, "card": None if card is None else card.to_dict(), "tappable": layers}
    lines = [
        f"{info.name}: {info.source}",
        f"  weights     {info.weights}",
        f"  cut         {row['cut_parameters']:,} parameters and {row['cut_mmacs']:.1f} M MACs at {info.input_size} px; "
        f"arena {row['arena_bytes']:,} B, flash {row['flash_bytes']:,} B as int8",
        f"  published   {info.parameters:,} parameters and {info.mmacs:.1f} M MACs, the whole network",
        f"  layers      {', '.join(info.layers)} by default",
        *(_card_lines(card) if card is not None else []),
        f"layers that --layers can name (* = default), at {info.input_size} px",
        *text,
    ]
    return value, "\n".join(lines)


def _card_lines(card: Card) -> list[str]:
    lines = [f"  quality     {card.quality:.3f}, measured at {card.input_size} px"]
    for layer in card.layers:
        snr = "" if layer.int8_snr_db is None else f", int8 {layer.int8_snr_db:.1f} dB"
        lines.append(f"    {layer.name:<14} explains {layer.explained:.3f} of {', '.join(layer.teacher)}{snr}")
    lines += [f"  {key.replace('_', ' '):<11} {_plain(item)}" for key, item in card.training.items()]
    lines += [f"  licence     {line}" for line in card.licence]
    lines += [f"  SHA-256     {card.sha256}"] if card.sha256 else []
    return [*lines, f"  command     {card.command}"]


def _plain(item: Any) -> str:
    if isinstance(item, list):
        return ", ".join(_plain(one) for one in item)
    return f"{item:,}" if isinstance(item, int) else str(item)


def _of_file(path: Path) -> Shown:
    graph = open_network(path)
    try:
        defaults = default_layers(graph)
    except InputError:  # no block end at the usual strides: the layers can be named all the same
        defaults = []
    text, rows = _layers(graph, defaults)
    size = graph.tensors[graph.inputs[0]].shape[1]
    lines = [f"{path}: layers that --layers can name (* = default), at {size} px", *text]
    return {"file": str(path), "default_layers": defaults, "layers": rows}, "\n".join(lines)


def _layers(graph: Graph, defaults: list[str], last: str = "") -> tuple[list[str], list[dict[str, Any]]]:
    """Lines and rows of the layers that can be tapped; those behind ``last`` are marked as beyond the weights."""
    rows = [candidate._asdict() for candidate in tap_candidates(graph)]
    lines, beyond = [], ""
    for index, r in enumerate(rows):
        mark = "*" if r["name"] in defaults else " "
        shape = f"{r['channels']:>4} x {r['height']} x {r['width']}"
        lines.append(f" {mark} block:{index:<3} stride {r['stride']:>3}  {shape}  {r['name']}{beyond}")
        beyond = "  (beyond the trained weights)" if r["name"] == last else beyond
    return lines, rows
