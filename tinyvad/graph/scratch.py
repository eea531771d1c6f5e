"""Bytes of scratch that a kernel of the C runtime needs for a node: the planner's twin of every ``tvad_*_scratch``.

Flows in: an int8 Graph and a node. Flows out: bytes: of plain C and DSP, of which a plan has the larger, or of Helium,
whose depthwise kernel lays its planes otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.scratch_mve import depthwise_scratch_mve


def layer_scratch(graph: Graph, node: Node) -> int:
    """Bytes of scratch of a node's kernel in plain C and with DSP, 0 for kernels that need none."""
    formula = _FORMULAS.get(node.op)
    return 0 if formula is None else formula(graph, node)


def layer_scratch_mve(graph: Graph, node: Node) -> int:
    """The same with Helium."""
    return depthwise_scratch_mve(graph, node) if node.op == "depthwise_conv2d" else layer_scratch(graph, node)


def scratch_of(packed_for: str) -> Callable[[Graph, Node], int]:
    """The formula for kernels whose weights are packed for 'scalar' or 'mve' (``tinyvad.export.layers.PACKINGS``)."""
    return layer_scratch_mve if packed_for == "mve" else layer_scratch


def frame_scratch(frame_h: int, frame_w: int, out_h: int, out_w: int) -> int:
    """Bytes of scratch of ``tvad_frame_rows`` for a camera's frame of frame_h x frame_w; 0 where nothing is resized.

    Weights of both axes, 16 bits each: a start and its taps for every output column, the taps of one output row. Then a row
    of the frame as RGB888 and a ring of resized rows. An output pixel has at most 2 * max(in / out, 1) taps.
    """
    if (frame_h, frame_w) == (out_h, out_w):
        return 0
    taps_h, taps_w = (min(size, -(-2 * max(size, out) // out)) for size, out in ((frame_h, out_h), (frame_w, out_w)))
    return 2 * (out_w * (1 + taps_w) + taps_h) + 3 * (frame_w + taps_h * out_w)


def _matrix(length: int) -> int:
    """Plain C and DSP: fours of pixels of ``length`` values, int16 and in fours; longer ones lie as they are."""
    tile = 32 * -(-length // 4)
    return 0 if length > 1024 else tile * max(1, 3072 // tile)


def _conv2d(graph: Graph, node: Node) -> int:
    """1x1: the matrix product's own. Else also the values under the kernel of some output pixels, of one beyond 680.

    Helium gathers twelve pixels where the others have four and their int16, one from 680 on, and needs nothing for 1x1.
    """
    _, kernel_h, kernel_w, channels = graph.tensors[node.inputs[1]].shape
    if (kernel_h, kernel_w) == (1, 1) and tuple(node.attributes["stride"]) == (1, 1) and not any(node.attributes["pads"]):
        return _matrix(channels)
    length = kernel_h * kernel_w * channels
    four = 4 * length
    return _up_to_16(length) if length > 680 else _up_to_16(four * max(1, 1536 // four)) + _matrix(length)


def _depthwise(graph: Graph, node: Node) -> int:
    """Planes of row pairs of up to four channels and their taps, if that fits in 8 KiB, but at least what plain C needs.

    Planes hold the whole map, or else a ring of the row pairs under the kernel (``runtime/tvad_depthwise.c``).
    """
    _, kernel_h, kernel_w, channels = graph.tensors[node.inputs[1]].shape
    in_h = graph.tensors[node.inputs[0]].shape[1]
    _, out_h, out_w, _ = graph.tensors[node.output].shape
    stride_h, stride_w = node.attributes["stride"]
    top, _, left, _ = node.attributes["pads"]
    dilation = node.attributes.get("dilation", (1, 1))[0]
    ring = ((kernel_h - 1) * dilation + 1) * ((max(out_w, 4) - 1) * stride_w + (kernel_w - 1) * dilation + 1)
    plain = kernel_h * (8 + 4 * kernel_w) + -(-ring // 4) * 4
    covered = top < kernel_h and left < kernel_w and (out_h - 1) * stride_h < in_h + top
    if kernel_w not in (3, 5, 7) or stride_w > 2 or dilation != 1 or out_w < 3 or not covered:
        return int(plain)
    phases = 1 + stride_h % 2
    pairs, in_map = (kernel_h + phases) // 2, (top + in_h - 1) // 2 - top // 2 + 1
    columns = max((out_w - 1) * stride_w, 3) + kernel_w
    for at_once in (min(4, channels), 1):
        for slots, blocks in ((in_map, pairs), (min(pairs, in_map), 2 * pairs - 1)):
            nbytes = at_once * (72 + 4 * phases * blocks * (kernel_w + 1) + 4 * slots * columns)
            if nbytes <= 8192:
                return int(max(nbytes, plain))
    return int(plain)


def _add(graph: Graph, node: Node) -> int:
    """Two tables of 256 int32 where there are enough elements."""
    return 2048 if math.prod(graph.tensors[node.output].shape) >= 256 else 0


def _up_to_16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


_FORMULAS: dict[str, Callable[[Graph, Node], int]] = {"conv2d": _conv2d, "depthwise_conv2d": _depthwise, "add": _add}
