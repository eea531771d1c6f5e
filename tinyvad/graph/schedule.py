"""When each row of each tensor is made, and where it lies: the plan that the planner finds and the firmware follows.

Flows in: an int8 Graph and the choices of ``tinyvad.firmware_sim.memory``. Flows out: a ``Schedule``, which
``tinyvad.export.c`` writes into model.c and ``tvad_run`` executes step by step.

A stage is a run of consecutive nodes that are computed together, ``band`` output rows of the last one at a time, so that of
the tensors between them only the rows are held that are still needed (a kernel's halo stays, nothing is computed twice).
A stage of one node, or with a band of all rows, is the usual layer after layer. Every row of every tensor is made once, in
order.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAME, EMBED, SCORE, MOVE, NODE = "frame", "embed", "score", "move", "node"
INPUT_PIXELS = "input pixels"  # buffer: RGB888 of the network's size, where no camera frame is kept
MAP = "score map"  # buffer: uint32 (grid_h, grid_w)


def part_name(tap: str) -> str:
    """Name of the buffer with a tap's part of the embedding, int8 (grid_h, grid_w, C), or where there is none its copy."""
    return f"embedding of {tap}"


@dataclass(frozen=True)
class Place:
    """A buffer of the arena.

    Attributes:
        name: the tensor whose rows it holds, ``INPUT_PIXELS``, ``MAP``, ``part_name(tap)`` or 'scratch ...'.
        nbytes: its size; ``offset``: from the arena's base, a multiple of 16.
        first_use, last_use: steps, both included. In a stage of several bands a buffer that carries no rows from band to
            band is idle in between; another of the same stage may then have its bytes.
        rows: rows of the tensor that it holds, 0 where it is no map.
        alias_of: the buffer in whose place it lies, '' for none: at the same offset for what works in place, at another
            where a stage's output follows behind the rows of its input that are no longer needed.
    """

    name: str
    nbytes: int
    offset: int
    first_use: int
    last_use: int
    rows: int = 0
    alias_of: str = ""


@dataclass(frozen=True)
class Window:
    """The rows of a tensor in a buffer: row ``first`` lies at its offset."""

    tensor: str
    first: int = 0


@dataclass(frozen=True)
class Step:
    """Make output rows ``row`` to ``row + rows - 1``.

    Attributes:
        kind: NODE, FRAME, EMBED, SCORE, or MOVE (the kept rows of a buffer to its front).
        index: of the node in ``graph.nodes`` (NODE), of the tap in ``graph.outputs`` (EMBED), else 0.
        row, rows: of the output. EMBED: all of the tap's. MOVE: those that are kept. SCORE: 0.
        inputs: NODE: its non-constant operands; of a concat only the one that is copied. FRAME: the pixels' buffer,
            or nothing where there is a camera frame. EMBED: the tap. SCORE: every tap's part. MOVE: the buffer, ``first``
            is the first row that is kept.
        output: what it writes. MOVE: the same buffer, ``first`` as before the move.
        scratch: offset of its scratch, None without.
        operand: NODE concat only: which operand this step copies.
    """

    kind: str
    index: int
    row: int
    rows: int
    inputs: tuple[Window, ...]
    output: Window
    scratch: int | None = None
    operand: int = 0


@dataclass(frozen=True)
class Schedule:
    """Steps in order, every buffer with its place.

    Attributes:
        strategy: 'layerwise', 'inplace-dw' or 'patch'.
        arena_bytes: a multiple of 32, at least the end of every buffer.
        activation_bytes: peak of what the network itself needs: tensors, input and kernel scratch, without the embedding's
            parts, the map and the scorer's scratch.
        lower_bound_bytes: the most bytes that are live at one step.
        stages: (first node, past the last node, band) each.
        extra_macs: multiply-accumulates beyond those of the graph.
    """

    strategy: str
    steps: tuple[Step, ...]
    places: dict[str, Place]
    arena_bytes: int
    activation_bytes: int
    lower_bound_bytes: int
    stages: tuple[tuple[int, int, int], ...]
    extra_macs: int = 0
