"""Plan the arena of our own runtime: an int8 Graph and a strategy in, a ``Schedule`` out that ``tvad_run`` follows.

Strategies, each with less memory than the one before:

* ``layerwise``: a buffer a tensor, layer after layer.
* ``inplace-dw``: depthwise, add, mul and table lookups write in the place of an operand that dies.
* ``patch``: parts of the network are made a few rows at a time (``plan_stages``), with the least arena, and among
  plans of that arena the fewest bands.
* ``auto``: in place where that fits a limit, which costs no time; else the plan of row bands with the fewest that fits.

In all of them a tap is turned into its part of the embedding as soon as its last row is made, and lives on only if another
layer reads it. TFLM can do none of this: see ``memory`` for its plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tinyvad.errors import InputError
from tinyvad.firmware_sim.budget import parse_frame
from tinyvad.firmware_sim.memory import align
from tinyvad.firmware_sim.plan_choice import choose
from tinyvad.firmware_sim.plan_places import live_bytes, place
from tinyvad.firmware_sim.plan_rows import Network, read_network
from tinyvad.firmware_sim.plan_stages import Extras, Stage, Stages
from tinyvad.firmware_sim.plan_steps import Program, Scorer, make_program
from tinyvad.graph import scratch as kernels
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.schedule import Place, Schedule

STRATEGIES = ("layerwise", "inplace-dw", "patch")
AUTO = "auto"
ARENA_ALIGNMENT = 32
NARROWER = 4  # times that a limit is lowered because buffers could not be packed to the peak of their stages


def plan(
    graph: Graph,
    grid: tuple[int, int],
    strategy: str = "patch",
    frame: str | None = None,
    scorer_scratch: int = 0,
    embed_scratch: Sequence[int] = (),
    limit: int | None = None,
    layer_scratch: Callable[[Graph, Node], int] | None = None,
    parts: Sequence[int] = (),
) -> Schedule:
    """Plan a network whose outputs are the taps.

    Args:
        graph: int8, as read back from the .tflite.
        grid: (grid_h, grid_w) of the score map.
        strategy: one of ``STRATEGIES``, or ``auto``, which looks at ``limit``.
        frame: 'WIDTHxHEIGHT-FORMAT' of the camera, whose frames have their own memory; None: RGB888 pixels of the
            network's size lie in the arena.
        scorer_scratch: bytes of scratch of the scorer; embed_scratch: of making each tap's part, in the graph's order.
        limit: bytes that the arena may take (``auto`` and ``patch``); with none, ``patch`` takes the least.
        layer_scratch: bytes of scratch that a node's kernel needs, by default those of our runtime.
        parts: bytes of each tap's part of what is scored, in the graph's order; by default cells of the grid by channels.

    Returns:
        The schedule; above the limit if no plan fits it.

    Raises:
        InputError: an unknown strategy, or a graph that cannot be planned.
    """
    net, scorer = _read(graph, grid, frame, scorer_scratch, embed_scratch, layer_scratch, parts)
    if strategy not in (*STRATEGIES, AUTO):
        raise InputError(f"unknown memory strategy {strategy!r}: use {', '.join(STRATEGIES)} or {AUTO}")
    if strategy == AUTO:
        found = _layer_by_layer(net, scorer, "inplace-dw")
        if limit is None or found.arena_bytes <= limit:
            return found
        strategy = "patch"
    return _patch(net, scorer, limit) if strategy == "patch" else _layer_by_layer(net, scorer, strategy)


def _read(
    graph: Graph, grid: tuple[int, int], frame: str | None, scorer_scratch: int, embed_scratch: Sequence[int],
    layer_scratch: Callable[[Graph, Node], int] | None, parts: Sequence[int],
) -> tuple[Network, Scorer]:  # fmt: skip
    frame_scratch = 0
    if frame is not None:
        height, width, _ = parse_frame(frame)
        frame_scratch = kernels.frame_scratch(height, width, *graph.tensors[graph.inputs[0]].shape[1:3])
    net = read_network(graph, frame is not None, frame_scratch, layer_scratch or kernels.layer_scratch)
    for tap in net.taps:
        if len(graph.tensors[tap].shape) != 4:
            raise InputError(f"layer {tap} is no map but {graph.tensors[tap].shape}; tap an earlier layer")
    cells = grid[0] * grid[1]
    sizes = tuple(parts) or tuple(cells * graph.tensors[tap].shape[3] for tap in net.taps)
    scratch = tuple(embed_scratch) or (0,) * len(net.taps)
    if not len(scratch) == len(sizes) == len(net.taps):
        given = f"scratch for {len(scratch)} taps and parts of {len(sizes)}"
        raise InputError(f"graph {graph.name}: {given} given, it has {len(net.taps)}")
    return net, Scorer(sizes, scratch, 4 * cells, scorer_scratch)


def _extras(scorer: Scorer) -> Extras:
    return Extras(tuple(align(n) for n in scorer.parts), tuple(align(n) for n in scorer.embed_scratch))


def _layer_by_layer(net: Network, scorer: Scorer, strategy: str) -> Schedule:
    stages = Stages(net, _extras(scorer), in_place=strategy != "layerwise")
    return _schedule(net, scorer, [stages.single(i) for i in range(len(net.works))], strategy)


def _patch(net: Network, scorer: Scorer, limit: int | None) -> Schedule:
    """The cheapest plan that fits, or the smallest."""
    stages = Stages(net, _extras(scorer), in_place=True)
    if limit is not None:
        aim = limit
        for _ in range(NARROWER):
            chosen = choose(stages, aim)
            if chosen is None:
                break
            found = _schedule(net, scorer, chosen, "patch", limit // ARENA_ALIGNMENT * ARENA_ALIGNMENT)
            if found.arena_bytes <= limit:
                return found
            aim -= found.arena_bytes - limit
    smallest = choose(stages)
    assert smallest is not None  # each layer alone is always possible
    bands, whole = _schedule(net, scorer, smallest, "patch"), _layer_by_layer(net, scorer, "inplace-dw")
    return whole if whole.arena_bytes <= bands.arena_bytes else bands  # bands gain nothing on small maps


def _schedule(net: Network, scorer: Scorer, stages: list[Stage], strategy: str, enough: int = 0) -> Schedule:
    """Steps with places; an arena of ``enough`` bytes need not be made smaller."""
    program = make_program(net, stages, scorer)
    pieces = list(program.pieces.values())
    bound = live_bytes(pieces, program.at)
    placed = place(pieces, max(bound, enough))
    return Schedule(
        strategy=strategy,
        steps=tuple(
            replace(step, scratch=placed.offsets[name]) if name else step
            for step, name in zip(program.steps, program.scratch, strict=True)
        ),
        places=_places(program, placed.offsets),
        arena_bytes=align(placed.nbytes, ARENA_ALIGNMENT),
        activation_bytes=live_bytes([piece for piece in pieces if piece.network], program.at),
        lower_bound_bytes=bound,
        stages=tuple((max(stage.first - 1, 0), stage.past - 1, stage.band) for stage in stages if stage.past > 1),
    )


def _places(program: Program, offsets: dict[str, int]) -> dict[str, Place]:
    places = {}
    for name, piece in program.pieces.items():
        offset = offsets[piece.base if piece.inside else name]
        places[name] = Place(name, piece.nbytes, offset, piece.first_use, piece.last_use, piece.rows, piece.base)
    return places
