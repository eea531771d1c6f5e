"""Bytes of scratch of the Helium kernels where plain C and DSP may need less: see ``export/runtime/tvad_depthwise_mve.c``.

Flows in: an int8 Graph and a node. Flows out: bytes. The matrix kernels (conv2d, fully_connected) and add never need more
than plain C and DSP do (``tinyvad.graph.scratch``).
"""

from __future__ import annotations

from tinyvad.graph.ir import Graph, Node

GROUP = 8  # channels at once, fewer where they would not fit LIMIT
LIMIT = 8192
SPARE = 32  # bytes behind the last plane that are read and not used


def depthwise_scratch_mve(graph: Graph, node: Node) -> int:
    """Sums of an output row, weights and planes of a group of channels; a multiple of 16."""
    _, kernel_h, kernel_w, _ = graph.tensors[node.inputs[1]].shape
    _, out_h, out_w, channels = graph.tensors[node.output].shape
    stride_h, stride_w = node.attributes["stride"]
    dilation_h, dilation_w = node.attributes.get("dilation", (1, 1))
    rows, columns = (kernel_h - 1) * dilation_h + 1, (kernel_w - 1) * dilation_w + 1
    taps, step = rows * columns, rows * stride_w
    pairs = taps + step <= 32  # the windows of two outputs in two vectors
    vectors = -(-(taps + step) // 16) if pairs else -(-taps // 16)
    if not pairs and vectors < 5:
        vectors = 2 if vectors < 3 else 4
    weights = 16 * vectors * (1 + pairs)
    sums = -(-out_w // 4) * 16
    plane = ((out_w - 1) * stride_w + columns) * rows + (out_h - 1) * (stride_h if stride_h < rows else 0)
    group = max(1, min((LIMIT - sums - SPARE) // (plane + weights), channels, GROUP))
    return -(-(sums + group * (weights + plane) + SPARE) // 16) * 16
