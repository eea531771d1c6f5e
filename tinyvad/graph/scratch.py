"""Bytes of scratch that a kernel of the C runtime needs for a node: the planner's twin of every ``tvad_*_scratch``.

Flows in: an int8 Graph and a node. Flows out: bytes that are enough for every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable

from tinyvad.graph.ir import Graph, Node


def layer_scratch(graph: Graph, node: Node) -> int:
    """Bytes of scratch of a node's kernel, 0 for kernels that need none."""
    formula = _FORMULAS.get(node.op)
    return 0 if formula is None else formula(graph, node)


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


def _up_to_16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


_FORMULAS: dict[str, Callable[[Graph, Node], int]] = {"conv2d": _conv2d}
