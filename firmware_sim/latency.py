"""How long an image takes on a target: the work of every kernel in, an estimate in milliseconds out.

tinyvad's own runtime: instructions a kernel (``instructions.toml``, counted in an emulator where it says so) times cycles
per instruction of the core. The step from instructions to cycles is known for one chip and one network, so an estimate is
good to some 20 % on a Cortex-M7 and less well known elsewhere. TFLM: one number, MACs per cycle, after measurements of
seven networks (targets/*.toml, mac_per_cycle), whose spread inside one engine and core is about 15 %. Neither is ever a
measurement: ``kind`` is always 'estimated'.

``Work`` counts what the runtime does by kernel. Multiply-accumulates of kernels that have none: pool and mean count the
values that they add up, ``frame`` and ``embed`` the weighted sums of their two passes, ``search`` and ``scan`` the
comparisons of values and of codes, ``pairs`` three products a channel of every position.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvad.embedding import POOL, tap_matrix
from tinyvad.errors import InputError
from tinyvad.firmware_sim.targets import Target
from tinyvad.graph.ir import Graph, Node, node_macs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENGINE = "tinyvad"
_TABLE = Path(__file__).with_name("instructions.toml")
_CPI = "cycles_per_instruction"


class Work(NamedTuple):
    """Multiply-accumulates and output values of one kernel."""

    macs: int
    outputs: int


Workload = dict[str, Work]


def estimate(macs: int, target: Target, engine: str = "cmsis_nn") -> dict[str, Any]:
    """``{'ms', 'kind': 'estimated', 'engine', 'mac_per_cycle', 'source'}`` for one inference of ``macs`` under TFLM.

    Raises:
        InputError: the target has no figure for ``engine``.
    """
    rate = target.mac_per_cycle.get(engine)
    if rate is None:
        known = ", ".join(target.mac_per_cycle) or "none"
        raise InputError(f"target {target.label} has no mac_per_cycle for engine {engine!r} (known: {known})")
    return {
        "ms": macs / rate / (target.clock_mhz * 1e3),
        "kind": "estimated",
        "engine": engine,
        "mac_per_cycle": rate,
        "source": target.source.get("mac_per_cycle", ""),
    }


def estimate_runtime(work: Mapping[str, Work], target: Target) -> dict[str, Any] | None:
    """One image under tinyvad's own runtime, None for a core without a figure.

    Returns:
        The keys of ``estimate``, and 'instructions', 'cycles_per_instruction', 'by_kernel' (instructions of each).
    """
    table = _table()
    speed = table[_CPI].get(target.core)
    if speed is None:
        return None
    rate = rates(instruction_set(target))
    by_kernel = {
        kernel: round(rate[kernel].get("per_mac", 0.0) * done.macs + rate[kernel]["per_output"] * done.outputs)
        for kernel, done in work.items()
    }
    instructions = sum(by_kernel.values())
    cycles = max(instructions * speed["value"], 1.0)
    return {
        "ms": cycles / (target.clock_mhz * 1e3),
        "kind": "estimated",
        "engine": ENGINE,
        "mac_per_cycle": sum(done.macs for done in work.values()) / cycles,
        "source": f"instructions: {rate['source']}; {speed['value']} cycles an instruction: {speed['source']}",
        "instructions": instructions,
        "cycles_per_instruction": speed["value"],
        "by_kernel": by_kernel,
    }


def rates(instructions: str) -> dict[str, Any]:
    """kernel -> per_mac, per_output, counted; and 'source'. ``instructions`` as ``instruction_set`` names them."""
    found: dict[str, Any] = _table()[instructions]
    return found


def instruction_set(target: Target) -> str:
    """The table of ``instructions.toml`` that goes with a core: 'mve', 'dsp', 'thumb' or 'plain'."""
    if target.isa.mve:
        return "mve"
    if target.isa.dsp:
        return "dsp"
    return "thumb" if target.core.startswith("cortex-m0") else "plain"


def network_work(graph: Graph) -> Workload:
    """What an int8 network (or the float one that it comes from) does, by kernel."""
    work: Workload = {}
    for node in graph.nodes:
        kernel, done = node_work(graph, node)
        _add(work, kernel, done)
    return work


_COPIES = ("pad", "resize_nearest", "concat", "reshape", "quantize", "dequantize")
_LOOKUPS = ("logistic", "hard_swish", "relu", "relu6")


def node_work(graph: Graph, node: Node) -> tuple[str, Work]:
    """The kernel of a node and its work.

    Raises:
        InputError: an operation that the runtime does not have.
    """
    outputs = int(np.prod(graph.tensors[node.output].shape))
    inputs = int(np.prod(graph.tensors[node.inputs[0]].shape))
    macs = node_macs(graph, node)
    if node.op == "conv2d":
        return "conv_1x1" if _is_plain_1x1(graph, node) else "conv", Work(macs, outputs)
    if node.op == "depthwise_conv2d":
        strided = max(node.attributes["stride"]) > 1
        return "depthwise_strided" if strided else "depthwise", Work(macs, outputs)
    if node.op in ("average_pool", "max_pool"):
        return "pool", Work(outputs * int(np.prod(node.attributes["kernel"])), outputs)
    if node.op == "mean":
        return "mean", Work(inputs, outputs)
    if node.op in _LOOKUPS:
        return "lookup", Work(0, outputs)
    if node.op in _COPIES:
        return "copy", Work(0, outputs)
    if node.op in ("add", "mul", "fully_connected"):
        return node.op, Work(macs, outputs)
    raise InputError(f"{node.op} -> {node.output}: no instruction count for this operation; tap an earlier layer")


def _is_plain_1x1(graph: Graph, node: Node) -> bool:
    kernel = graph.tensors[node.inputs[1]].shape[1:3]
    return kernel == (1, 1) and tuple(node.attributes["stride"]) == (1, 1) and not any(node.attributes["pads"])


def frame_work(size: tuple[int, int], frame: tuple[int, int] | None) -> Workload:
    """Making the network's input of ``size`` (h, w) pixels from a camera frame of (h, w), or from pixels of its size.

    Source: tinyvad/resize.py, two passes of 2 max(1, in / out) weighted pixels; then a table of 256 values a channel.
    """
    height, width = size
    values = 3 * height * width
    if frame is None or frame == size:
        return {"lookup": Work(0, values)}
    taps_h, taps_w = (2 * max(1, -(-was // becomes)) for was, becomes in zip(frame, size))
    return {"frame": Work(3 * frame[0] * width * taps_w + values * taps_h, values)}


def embedding_work(
    taps: Sequence[tuple[int, int, int]], grid: tuple[int, int], pool: int = POOL, native: bool = False
) -> Workload:
    """Pooling and aligning tapped maps of (h, w, C) to a grid: the non-zero entries of its two matrices.

    ``native``: the scorer reads the maps themselves, which are only copied.
    """
    if native:
        return {"copy": Work(0, sum(math.prod(tap) for tap in taps))}
    macs = outputs = 0
    for height, width, channels in taps:
        rows, columns = (int(np.count_nonzero(tap_matrix(s, g, pool)[0])) for s, g in zip((height, width), grid))
        macs += channels * (rows * width + grid[0] * columns)
        outputs += channels * grid[0] * grid[1]
    return {"embed": Work(macs, outputs)}


def gaussian_work(cells: int, depth: int, values: int, bits: int, projected: bool) -> Workload:
    """Scoring with Gaussians (PADM, PADF, PADC): D -> d values a cell, then a triangular factor of ``bits`` (0: none)."""
    work = {"project": Work(cells * depth * values, cells * values)} if projected else {}
    return {**work, "factor": Work(cells * values * (values - 1) // 2 if bits else 0, cells * values)}


def nearest_work(cells: int, depth: int, rows: int, subspaces: int, centroids: int) -> Workload:
    """Scoring with a memory bank: a search of K rows (CORE), or distance tables and a scan of codes (PQPC)."""
    if not subspaces:
        return {"search": Work(cells * rows * depth, cells * rows)}
    return {
        "table": Work(cells * centroids * depth, cells * subspaces * centroids),
        "scan": Work(cells * rows * subspaces, cells * rows),
    }


def scorer_work(scorer: Any, depth: int, grid: tuple[int, int]) -> Workload:
    """The work of a fitted scorer (``tinyvad.detectors.Scorer``) on embeddings of ``depth`` values."""
    cells = grid[0] * grid[1]
    if scorer.kind == "CORE":
        return nearest_work(cells, depth, len(scorer.bank), 0, 0)
    if scorer.kind == "PQPC":
        subspaces, centroids, _ = scorer.quantizer.codebooks.shape
        return nearest_work(cells, depth, len(scorer.codes), subspaces, centroids)
    if scorer.kind == "STFP":
        return {"pairs": Work(scorer.macs(grid), scorer.positions())}
    if scorer.kind in ("LINR", "CFAS"):
        return {"linear" if scorer.kind == "LINR" else "centres": Work(scorer.macs(grid), cells)}
    return gaussian_work(cells, depth, scorer.mean.shape[-1], scorer.bits, scorer.projection is not None)


def combined(*parts: Workload) -> Workload:
    """The sum of several workloads."""
    total: Workload = {}
    for part in parts:
        for kernel, done in part.items():
            _add(total, kernel, done)
    return total


def _add(work: Workload, kernel: str, done: Work) -> None:
    before = work.get(kernel, Work(0, 0))
    work[kernel] = Work(before.macs + done.macs, before.outputs + done.outputs)


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))
