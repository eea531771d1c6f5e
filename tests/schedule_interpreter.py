"""Follow a Schedule as the firmware does, over one arena, and check at every step that what is read is what was made.

Two ways. ``check_rows`` follows where rows lie: every byte of the arena has a token that says which row of which tensor it
belongs to. ``run`` computes: real int8 values in one byte array, each step on the rows that it asks for.

In both, whatever is not live at a step is garbage, a kernel's scratch and the rows it writes are garbage before it reads
its input (unless it may write in that place), and an operand's rows are found from the op's definition, not by the planner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tinyvad.embedding import Embedding
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.int8_steps import make_step
from tinyvad.graph.ir import Graph, Node
from tinyvad.graph.schedule import EMBED, FRAME, INPUT_PIXELS, MAP, MOVE, NODE, SCORE, Schedule, Step, Window, part_name
from tinyvad.graph.shapes import nearest_indices

IN_PLACE = ("add", "mul", "relu", "relu6", "logistic", "hard_swish")
GARBAGE = -1


def rows_of(graph: Graph, name: str) -> int:
    shape = graph.tensors[name].shape
    return shape[1] if len(shape) == 4 else 1


def rows_read(graph: Graph, node: Node, name: str, row: int, rows: int) -> tuple[int, int]:
    """First and past the last row of operand ``name`` that output rows row .. row + rows - 1 read, by definition."""
    size = rows_of(graph, name)
    if node.op in ("conv2d", "depthwise_conv2d", "average_pool", "max_pool"):
        kernel = node.attributes["kernel"][0] if "kernel" in node.attributes else graph.tensors[node.inputs[1]].shape[1]
        stride, top = node.attributes["stride"][0], node.attributes["pads"][0]
        dilation = node.attributes.get("dilation", (1, 1))[0]
        taps = {r * stride - top + k * dilation for r in range(row, row + rows) for k in range(kernel)}
    elif node.op == "pad":
        taps = {r - node.attributes["pads"][0] for r in range(row, row + rows)}
    elif node.op == "resize_nearest":
        flags = [bool(node.attributes.get(key)) for key in ("align_corners", "half_pixel_centers")]
        taps = set(nearest_indices(size, rows_of(graph, node.output), *flags)[row : row + rows].tolist())
    elif node.op in (*IN_PLACE, "concat") and size == rows_of(graph, node.output):
        taps = set(range(row, row + rows))
    else:
        taps = set(range(size))
    inside = [r for r in taps if 0 <= r < size]
    return (min(inside), max(inside) + 1) if inside else (0, 0)


class Layout:
    """Where rows lie, by the schedule."""

    def __init__(self, graph: Graph, schedule: Schedule) -> None:
        self.graph, self.schedule = graph, schedule
        for place in schedule.places.values():
            assert place.offset % 16 == 0 and 0 <= place.offset <= schedule.arena_bytes - place.nbytes, place
        assert schedule.arena_bytes % 32 == 0
        assert schedule.lower_bound_bytes <= schedule.arena_bytes
        assert schedule.activation_bytes <= schedule.arena_bytes

    def row_bytes(self, name: str) -> int:
        if name == INPUT_PIXELS:
            name = self.graph.inputs[0]
        if name in self.graph.tensors:
            return self.graph.tensors[name].nbytes // rows_of(self.graph, name)
        return self.schedule.places[name].nbytes

    def span(self, window: Window, row: int, past: int, now: int) -> slice:
        """Bytes of rows row .. past - 1; they must lie in the buffer, which must be live now."""
        place, row_bytes = self.schedule.places[window.tensor], self.row_bytes(window.tensor)
        assert place.first_use <= now <= place.last_use, (now, place)
        if row == past:  # only padding
            return slice(place.offset, place.offset)
        start = (row - window.first) * row_bytes
        stop = (past - window.first) * row_bytes
        assert 0 <= start <= stop <= place.nbytes, (now, window, row, past, place)
        return slice(place.offset + start, place.offset + stop)

    def reads(self, step: Step) -> list[tuple[Window, int, int]]:
        """(window, first row, past the last row) of every operand of a step."""
        if step.kind == NODE:
            node = self.graph.nodes[step.index]
            names = [name for name in node.inputs if name not in self.graph.constants]
            if node.op == "concat":
                names = [node.inputs[step.operand]]
            assert [window.tensor for window in step.inputs] == names
            return [(w, *rows_read(self.graph, node, w.tensor, step.row, step.rows)) for w in step.inputs]
        if step.kind == FRAME:
            return [(w, step.row, step.row + step.rows) for w in step.inputs]
        if step.kind == EMBED:
            assert [w.tensor for w in step.inputs] == [self.graph.outputs[step.index]]
            return [(w, 0, rows_of(self.graph, w.tensor)) for w in step.inputs]
        assert [w.tensor for w in step.inputs] == [part_name(tap) for tap in self.graph.outputs]
        return [(w, 0, 1) for w in step.inputs]

    def output(self, step: Step) -> str:
        return {
            NODE: lambda: self.graph.nodes[step.index].output,
            FRAME: lambda: self.graph.inputs[0],
            EMBED: lambda: part_name(self.graph.outputs[step.index]),
            SCORE: lambda: MAP,
        }[step.kind]()

    def written(self, step: Step, now: int) -> slice:
        assert step.output.tensor == self.output(step)
        if step.kind in (EMBED, SCORE):
            return self.span(step.output, 0, 1, now)
        return self.span(step.output, step.row, step.row + step.rows, now)

    def may_write_over(self, step: Step, read: slice, written: slice) -> bool:
        """Is writing these bytes while reading those allowed? Only in place of an operand, byte on byte."""
        if step.kind == FRAME:
            return read == written
        if step.kind != NODE:
            return False
        node = self.graph.nodes[step.index]
        if node.op == "depthwise_conv2d":  # all rows at once, the output from the input's first byte on
            whole = step.row == 0 and step.rows == rows_of(self.graph, node.output)
            place = self.schedule.places[step.inputs[0].tensor]
            return whole and place.offset == written.start and written.stop <= place.offset + place.nbytes
        return node.op in IN_PLACE and read == written


def overlap(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop


def check_rows(graph: Graph, schedule: Schedule, scratch: Callable[[Step], int]) -> None:
    """Every row is made once, in order, and what a step reads lies where the step looks for it.

    Args:
        scratch: bytes of scratch of a step.
    """
    layout = Layout(graph, schedule)
    arena = np.full(schedule.arena_bytes, GARBAGE, np.int64)
    names = [INPUT_PIXELS, *graph.activations, *(part_name(tap) for tap in graph.outputs), MAP]
    base = {name: 100_000 * (i + 1) for i, name in enumerate(names)}
    made = dict.fromkeys(graph.activations, 0)
    copied: dict[str, set[int]] = {}  # of a concat, the operands of the newest rows

    def tokens(name: str, row: int, past: int) -> np.ndarray:
        return np.repeat(np.arange(row, past) + base[name], layout.row_bytes(name))

    if INPUT_PIXELS in schedule.places:
        window, rows = Window(INPUT_PIXELS), rows_of(graph, graph.inputs[0])
        arena[layout.span(window, 0, rows, 0)] = tokens(INPUT_PIXELS, 0, rows)
    for now, step in enumerate(schedule.steps):
        if step.kind == MOVE:
            name = step.output.tensor
            assert step.inputs == (Window(name, step.row),)
            source = layout.span(step.output, step.row, step.row + step.rows, now)
            start = schedule.places[name].offset
            assert (arena[source] == tokens(name, step.row, step.row + step.rows)).all(), (now, step)
            arena[start : start + source.stop - source.start] = arena[source].copy()
            continue
        nbytes = scratch(step)
        assert (step.scratch is None) == (nbytes == 0)
        written = layout.written(step, now)
        if step.scratch is not None:
            room = slice(step.scratch, step.scratch + nbytes)
            assert room.start % 16 == 0 and room.stop <= schedule.arena_bytes and not overlap(room, written), (now, step)
            arena[room] = GARBAGE
        spans = [(w, row, past, layout.span(w, row, past, now)) for w, row, past in layout.reads(step)]
        if not any(overlap(span, written) and layout.may_write_over(step, span, written) for *_, span in spans):
            concat = step.kind == NODE and graph.nodes[step.index].op == "concat"
            if not (concat and copied.get(step.output.tensor)):
                arena[written] = GARBAGE
        for window, row, past, span in spans:
            name = window.tensor
            assert (arena[span] == tokens(name, row, past)).all(), f"step {now} {step}: {name} is not what was made"
        name = step.output.tensor
        if step.kind in (EMBED, SCORE):
            arena[written] = tokens(name, 0, 1)
            continue
        if step.kind == NODE and graph.nodes[step.index].op == "concat":
            copied.setdefault(name, set()).add(step.operand)
            if len(copied[name]) < len(graph.nodes[step.index].inputs):
                arena[written] = tokens(name, step.row, step.row + step.rows)
                continue
            copied[name] = set()
        assert step.row == made[name] and step.rows > 0, (now, step)
        made[name] += step.rows
        arena[written] = tokens(name, step.row, step.row + step.rows)
    assert made == {name: rows_of(graph, name) for name in graph.activations}
    assert [step.kind for step in schedule.steps].count(EMBED) == len(graph.outputs)
    last = schedule.steps[-1]
    assert last.kind == SCORE and (arena[layout.written(last, len(schedule.steps) - 1)] == tokens(MAP, 0, 1)).all()


def crop(graph: Graph, node: Node, step: Step, shapes: dict[str, tuple[int, int]]) -> tuple[Graph, Node]:
    """A graph of one node that makes the rows of a step from the rows that it reads: (first, past) by operand."""
    tensors = dict(graph.tensors)
    for name, (row, past) in (*shapes.items(), (node.output, (step.row, step.row + step.rows))):
        shape = tensors[name].shape
        if len(shape) == 4:
            tensors[name] = dataclasses.replace(tensors[name], shape=(1, past - row, *shape[2:]))
    if "pads" in node.attributes:
        top, bottom, left, right = node.attributes["pads"]
        row, past = shapes[node.inputs[0]]
        if node.op == "pad":
            before = max(top - step.row, 0)
            after = step.rows - before - (past - row)
        else:
            kernel = node.attributes["kernel"][0] if "kernel" in node.attributes else tensors[node.inputs[1]].shape[1]
            stride, dilation = node.attributes["stride"][0], node.attributes.get("dilation", (1, 1))[0]
            first = step.row * stride - top
            end = (step.row + step.rows - 1) * stride - top + dilation * (kernel - 1) + 1
            before, after = row - first, end - past
        node = node.with_attributes(pads=(before, after, left, right))
    return Graph(graph.name, [], [node.output], [node], tensors, graph.constants), node


def run(
    graph: Graph, schedule: Schedule, image: np.ndarray, embedding: Embedding, scratch: Callable[[Step], int],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Compute an image step by step in one arena; every row made and every part must equal the exact engine's.

    Args:
        image: (H, W, 3) int8, the network's input; it stands for the pixels, too.
    """
    layout = Layout(graph, schedule)
    expected = Int8Engine(graph, 1).all_tensors(image)
    parts = embedding.integer([expected[tap][None] for tap in graph.outputs])[0]  # (grid_h, grid_w, D)
    ends = np.cumsum([tap.channels for tap in embedding.taps])
    part_of = dict(zip(graph.outputs, np.split(parts, ends[:-1], axis=-1), strict=True))
    arena = rng.integers(0, 256, schedule.arena_bytes, np.uint8)
    steps: dict[tuple[object, ...], Callable[[dict[str, np.ndarray]], np.ndarray]] = {}

    if INPUT_PIXELS in schedule.places:
        arena[layout.span(Window(INPUT_PIXELS), 0, len(image), 0)] = image.view(np.uint8).ravel()
    for now, step in enumerate(schedule.steps):
        live = np.zeros(schedule.arena_bytes, bool)
        for place in schedule.places.values():
            if place.first_use <= now <= place.last_use:
                live[place.offset : place.offset + place.nbytes] = True
        noise = rng.integers(0, 256, schedule.arena_bytes, np.uint8)
        arena[~live] = noise[~live]
        if step.kind == MOVE:
            source = layout.span(step.output, step.row, step.row + step.rows, now)
            start = schedule.places[step.output.tensor].offset
            arena[start : start + source.stop - source.start] = arena[source].copy()
            continue
        written = layout.written(step, now)
        if step.scratch is not None:
            arena[step.scratch : step.scratch + scratch(step)] ^= 0x5A
        spans = {w.tensor: (row, past, layout.span(w, row, past, now)) for w, row, past in layout.reads(step)}
        concat = step.kind == NODE and graph.nodes[step.index].op == "concat"
        if not concat and not any(layout.may_write_over(step, span, written) for *_, span in spans.values()):
            arena[written] ^= 0xA5
        values = {}
        for name, (row, past, span) in spans.items():
            shape = graph.tensors[name].shape if name in graph.tensors else None
            read = arena[span].view(np.int8)
            if shape is not None:
                read = read.reshape((past - row, *shape[2:]) if len(shape) == 4 else shape[1:])
            values[name] = read.copy()
        if step.kind == FRAME:
            made = values[INPUT_PIXELS] if values else image[step.row : step.row + step.rows]
            if values:
                made = made.reshape(step.rows, *image.shape[1:])
        elif step.kind == EMBED:
            tap = embedding.taps[step.index]
            made = Embedding((tap,), embedding.grid, embedding.pool).integer([values[tap.name][None]])[0]
            np.testing.assert_array_equal(made, part_of[tap.name])
        elif step.kind == SCORE:
            for name in graph.outputs:
                np.testing.assert_array_equal(values[part_name(name)], part_of[name].ravel())
            made = np.zeros(written.stop - written.start, np.int8)
        elif concat:
            node = graph.nodes[step.index]
            sizes = [graph.tensors[name].shape[-1] for name in node.inputs]
            at = sum(sizes[: step.operand])
            made = arena[written].view(np.int8).reshape(step.rows, -1, sum(sizes)).copy()
            made[..., at : at + sizes[step.operand]] = values[node.inputs[step.operand]]
            if step.operand < len(sizes) - 1:
                arena[written] = made.view(np.uint8).ravel()
                continue
        else:
            node = graph.nodes[step.index]
            shapes = {name: (row, past) for name, (row, past, _) in spans.items()}
            key = (step.index, step.rows, *((past - row, row - step.row) for row, past in shapes.values()))
            if node.op == "resize_nearest":
                flags = [bool(node.attributes.get(k)) for k in ("align_corners", "half_pixel_centers")]
                size, out = graph.tensors[node.inputs[0]].shape[1:3], node.attributes["size"]
                down, across = (nearest_indices(size[i], int(out[i]), *flags) for i in range(2))
                row = shapes[node.inputs[0]][0]
                made = values[node.inputs[0]][down[step.row : step.row + step.rows] - row][:, across]
            else:
                cropped, small = crop(graph, node, step, shapes)
                key = (*key, *small.attributes.get("pads", ()))
                if key not in steps:
                    steps[key] = make_step(cropped, small)
                made = steps[key](values)
        arena[written] = np.ascontiguousarray(made).view(np.uint8).ravel()
        if step.kind in (NODE, FRAME):
            name, shape = step.output.tensor, graph.tensors[step.output.tensor].shape
            want = expected[name][step.row : step.row + step.rows] if len(shape) == 4 else expected[name]
            np.testing.assert_array_equal(made.reshape(want.shape), want, err_msg=f"step {now} {step}")
