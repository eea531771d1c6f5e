"""Bytes of scratch that a kernel of the C runtime needs for a node: the planner's twin of every ``tvad_*_scratch``.

Flows in: an int8 Graph and a node. Flows out: bytes, the same for every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable

from tinyvad.graph.ir import Graph, Node


def layer_scratch(graph: Graph, node: Node) -> int:
    """Bytes of scratch of a node's kernel, 0 for kernels that need none."""
    formula = _FORMULAS.get(node.op)
    return 0 if formula is None else formula(graph, node)


_FORMULAS: dict[str, Callable[[Graph, Node], int]] = {}
