"""model.h and model.c: a network and its memory plan as C constants, from a Graph and a Schedule.

Flows in: an int8 Graph, the plan, the score map's grid. Flows out: two texts, the same bytes for the same input. Layer 0
turns a frame into the network's input, then come the nodes in the graph's order (a concat has a layer an operand), then
every tap's way into the embedding, then the scorer. ``layer_slots`` is that order, for whoever reads a trace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tinyvad.embedding import POOL
from tinyvad.errors import InputError
from tinyvad.export.layers import Layer, layer_of, map_shape
from tinyvad.graph.ir import Graph, node_macs
from tinyvad.graph.schedule import EMBED, FRAME, MOVE, NODE, SCORE, Schedule, Step, part_name
from tinyvad.images import FRAME_FORMATS
from tinyvad.resize import MAX_SIDE

MAX_TAPS = 16  # TVAD_MAX_TAPS
FORMATS = {"rgb888": "TVAD_RGB888", "rgb565": "TVAD_RGB565", "grey": "TVAD_GREY8"}
_C_TYPES = {"int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "uint16": "uint16_t", "int32": "int32_t"}
_ALIGN = 16  # bytes: word loads of every core, and the buffers' own alignment
_WIDTH = 124


@dataclass(frozen=True)
class Camera:
    """Frames of ``width`` x ``height`` pixels in one of ``FORMATS``, rows without a gap."""

    width: int
    height: int
    format: str

    def __post_init__(self) -> None:
        if max(self.width, self.height) > MAX_SIDE:
            raise InputError(f"camera frame {self.width}x{self.height}: sides must be at most {MAX_SIDE} pixels")

    @property
    def nbytes(self) -> int:
        return self.width * self.height * FRAME_FORMATS[self.format]


@dataclass(frozen=True)
class Slot:
    """One entry of the model's list of layers; kind and index as in ``Step``."""

    kind: str
    index: int
    operand: int
    layer: Layer
    macs: int = 0


def layer_slots(
    graph: Graph, grid: tuple[int, int], packed_for: str = "scalar", camera: Camera | None = None, pool: int = POOL,
    native: bool = False,
) -> list[Slot]:
    """The layers of model.c in order; see the module's text.

    Args:
        pool: width of the embedding's pooling. native: a tap's part of what is scored is the tap itself.

    Raises:
        InputError: an op that the C runtime does not have, or too many taps.
    """
    if len(graph.outputs) > MAX_TAPS:
        raise InputError(f"{len(graph.outputs)} tapped layers; the C runtime takes {MAX_TAPS}: give fewer --layers")
    entry = map_shape(graph, graph.inputs[0])
    frame = entry if camera is None else (camera.height, camera.width, 3)
    slots = [Slot(FRAME, 0, 0, Layer("FRAME", graph.inputs[0], frame, entry))]
    for index, node in enumerate(graph.nodes):
        for operand in range(len(node.inputs) if node.op == "concat" else 1):
            slots.append(Slot(NODE, index, operand, layer_of(graph, node, packed_for, operand), node_macs(graph, node)))
    for index, tap in enumerate(graph.outputs):
        shape = map_shape(graph, tap)
        part_shape = shape if native else (*grid, shape[2])
        part = Layer("EMBED", part_name(tap), shape, part_shape, kernel=(pool, pool), channel=index)
        slots.append(Slot(EMBED, index, 0, part))
    slots.append(Slot(SCORE, 0, 0, Layer("SCORE", "score map", (*grid, 1), (*grid, 1))))
    return slots


def model_header(
    graph: Graph, schedule: Schedule, backbone_crc32: int, camera: Camera | None = None, slot_bytes: int = 0,
    learning_bytes: int = 0,
) -> str:  # fmt: skip
    """model.h: what an application needs to know of the model; ``slot_bytes`` and ``learning_bytes`` as in ``Chip``."""
    height, width, _ = map_shape(graph, graph.inputs[0])
    frame = Camera(0, 0, "rgb888") if camera is None else camera
    name, pixel = FORMATS[frame.format], FRAME_FORMATS[frame.format]
    return f"""\
/* {plain(graph.name)}: what an application needs to know of the model in model.c. Made by tinyvad; do not edit. */
#ifndef TVAD_MODEL_DATA_H
#define TVAD_MODEL_DATA_H

#include "tvad_model.h"

#define TVAD_ARENA_BYTES {schedule.arena_bytes}u /* all that tvad_run writes, aligned to TVAD_ARENA_ALIGN */
#define TVAD_INPUT_HEIGHT {height}u
#define TVAD_INPUT_WIDTH {width}u
#define TVAD_INPUT_BYTES {height * width * 3}u /* RGB888 of the network's size */

/* The camera's frame; 0 bytes: the camera writes the network's input to tvad_input_pixels. */
#define TVAD_FRAME_HEIGHT {frame.height}u
#define TVAD_FRAME_WIDTH {frame.width}u
#define TVAD_FRAME_FORMAT {name}
#define TVAD_FRAME_STRIDE {frame.width * pixel}u
#define TVAD_FRAME_BYTES {frame.nbytes}u

#define TVAD_BACKBONE_CRC32 {backbone_crc32:#010x}u /* of backbone.tflite; the bank names the same */

extern const tvad_model tvad_model_data;
extern const uint8_t tvad_bank_bin[]; /* bank.S */
extern const uint32_t tvad_bank_bin_size;
{_learning_header(slot_bytes, learning_bytes) if slot_bytes else ""}
#endif
"""


def _learning_header(slot_bytes: int, learning_bytes: int) -> str:
    return f"""
/* Learning on the device. */
#define TVAD_SLOT_BYTES {slot_bytes}u /* of each slot of flash, whole erase sectors */
#define TVAD_LEARN_BYTES {learning_bytes}u /* workspace of a session; 0: others write the slots */
extern const uint8_t tvad_slot_0[], tvad_slot_1[]; /* link.ld */
"""


def model_source(
    graph: Graph,
    schedule: Schedule,
    backbone_crc32: int,
    grid: tuple[int, int],
    packed_for: str = "scalar",
    camera: Camera | None = None,
    pool: int = POOL,
    native: bool = False,
) -> str:
    """model.c: constants of every layer, the list of layers, the steps with their places in the arena, the model.

    Args:
        pool, native: as for ``layer_slots``.

    Raises:
        InputError: what ``layer_slots`` refuses, or a number that the runtime's structs cannot hold.
    """
    slots = layer_slots(graph, grid, packed_for, camera, pool, native)
    number = {(slot.kind, slot.index, slot.operand): i for i, slot in enumerate(slots)}
    flash = sum(slot.layer.nbytes for slot in slots)
    parts = [_overview(graph, slots, schedule, flash), '#include "model.h"\n']
    parts.append(f"#define ALIGNED __attribute__((aligned({_ALIGN})))\n")
    if packed_for == "mve":
        parts.append("#if !defined(__ARM_FEATURE_MVE)\n#error weights and plan are for Helium\n#endif\n")
    else:
        parts.append("#if defined(__ARM_FEATURE_MVE)\n#error weights and plan are for plain C and SMLAD\n#endif\n")
    parts += [_constants(i, slot) for i, slot in enumerate(slots) if slot.layer.arrays]
    parts += ["static const tvad_layer layers[] = {", *(_layer(i, slot) for i, slot in enumerate(slots)), "};\n"]
    parts += [
        "/* layer, row, rows, first rows of operands and output, their offsets in the arena, scratch */",
        "static const tvad_step steps[] = {",
        *(_step(graph, schedule, step, slots, number) for step in schedule.steps),
        "};\n",
        _model(graph, schedule, backbone_crc32, grid, slots, camera),
    ]
    return "\n".join(parts)


def _overview(graph: Graph, slots: list[Slot], schedule: Schedule, flash: int) -> str:
    macs = sum(slot.macs for slot in slots if slot.operand == 0)
    lines = [
        f"/* {plain(graph.name)}, made by tinyvad; do not edit. All of it is constant and stays in flash.",
        " *",
        f" * {macs:,} multiply-accumulates and {schedule.extra_macs:,} more of the plan '{schedule.strategy}';"
        f" {flash:,} bytes of weights and other constants.",
        " *",
        f" * {'layer':>5} {'op':<15} {'in':<13} {'out':<13} {'kernel':<9} {'MACs':>11} {'bytes':>8}  name",
    ]
    for i, slot in enumerate(slots):
        one = slot.layer
        kernel = f"{one.kernel[0]}x{one.kernel[1]}/{one.stride[0]}" if slot.kind == NODE else ""
        lines.append(
            f" * {i:>5} {one.op:<15} {_size(one.in_shape):<13} {_size(one.out_shape):<13} {kernel:<9} "
            f"{slot.macs:>11,} {one.nbytes:>8,}  {plain(one.name)}"
        )
    lines += [
        " *",
        f" * Memory plan: {schedule.arena_bytes:,} bytes of arena, {schedule.activation_bytes:,} of them for the network.",
        " *",
        f" * {'offset':>8} {'bytes':>8} {'rows':>5}  {'steps':<11} buffer",
    ]
    for place in schedule.places.values():
        shared = f" (in place of {plain(place.alias_of)})" if place.alias_of else ""
        steps = f"{place.first_use}..{place.last_use}"
        lines.append(
            f" * {place.offset:>8} {place.nbytes:>8} {place.rows or '':>5}  {steps:<11} {plain(place.name)}{shared}"
        )
    return "\n".join([*lines, " */"])


def _constants(number: int, slot: Slot) -> str:
    one = slot.layer
    lines = [f"/* {number}: {plain(one.name)} */"]
    for name, array in one.arrays.items():
        kind = _C_TYPES.get(array.dtype.name)
        if kind is None:
            raise InputError(f"layer {one.name}: {name} is {array.dtype}, for which C code has no type here")
        lines.append(f"static const {kind} layer_{number}_{name}[{array.size}] ALIGNED = {{")
        lines += _rows([str(value) for value in array.ravel().tolist()])
        lines.append("};")
    return "\n".join(lines) + "\n"


def _rows(values: list[str]) -> list[str]:
    """Comma separated lines of equally many values."""
    step = max(1, (_WIDTH - 4) // (max(map(len, values)) + 2))
    return [f"    {', '.join(values[i : i + step])}," for i in range(0, len(values), step)]


def _layer(number: int, slot: Slot) -> str:
    one = slot.layer
    fields: dict[str, tuple[int, int]] = {  # value and largest value
        "kernel_h": (one.kernel[0], 255), "kernel_w": (one.kernel[1], 255),
        "stride_h": (one.stride[0], 255), "stride_w": (one.stride[1], 255),
        "pad_top": (one.pad[0], 255), "pad_left": (one.pad[1], 255), "dilation": (one.dilation, 255),
        "in_h": (one.in_shape[0], 65535), "in_w": (one.in_shape[1], 65535), "in_c": (one.in_shape[2], 65535),
        "out_h": (one.out_shape[0], 65535), "out_w": (one.out_shape[1], 65535), "out_c": (one.out_shape[2], 65535),
        "channel": (one.channel, 65535),
        "in_zero": (one.zeros[0], 127), "in2_zero": (one.zeros[1], 127), "out_zero": (one.zeros[2], 127),
        "low": (one.limits[0], 127), "high": (one.limits[1], 127), "broadcast": (int(one.broadcast), 1),
    }  # fmt: skip
    for name, (value, limit) in fields.items():
        if not -128 <= value <= limit:
            raise InputError(f"layer {one.name}: {name} is {value}, the C runtime takes up to {limit}")
    texts = [f".op = TVAD_OP_{one.op}", *(f".{name} = {int(value)}" for name, (value, _) in fields.items())]
    texts += [f".{name} = layer_{number}_{name}" for name in one.arrays]
    lines = [f"    {{ /* {number}: {plain(one.name)} */"]
    line = ""
    for text in texts:
        if len(line) + len(text) + 10 > _WIDTH:
            lines.append(f"        {line}")
            line = ""
        line += f"{' ' if line else ''}{text},"
    return "\n".join([*lines, f"        {line}", "    },"])


def _step(graph: Graph, schedule: Schedule, step: Step, slots: list[Slot], number: dict[tuple[str, int, int], int]) -> str:
    places = schedule.places
    inputs = [(window.first, f"{places[window.tensor].offset}u") for window in step.inputs]
    inputs = ([] if step.kind == SCORE else inputs) + [(0, "TVAD_NONE")] * 2
    out = places[step.output.tensor].offset
    scratch = "TVAD_NONE" if step.scratch is None else f"{step.scratch}u"
    if step.kind == MOVE:  # the bytes from row `first` on move to the buffer's front
        (kept,) = step.inputs
        shape = map_shape(graph, kept.tensor)
        row_bytes = shape[1] * shape[2]
        source = out + (kept.first - step.output.first) * row_bytes
        layer, inputs, scratch = "TVAD_MOVE", [(0, f"{source}u"), (0, "TVAD_NONE")], f"{step.rows * row_bytes}u"
        name = f"move {kept.tensor}"
        numbers = (0, step.rows, 0, 0, 0)
    else:
        slot = number[(step.kind, step.index, step.operand)]
        layer, name = str(slot), slots[slot].layer.name
        numbers = (step.row, step.rows, inputs[0][0], inputs[1][0], step.output.first)
    if not all(0 <= value <= 65535 for value in numbers):
        raise InputError(f"step for {name}: row numbers {numbers} do not fit 16 bits; use a smaller --image-size")
    row, rows, first, second, out_first = numbers
    window = f"{layer}, {row}, {rows}, {{ {first}, {second} }}, {out_first}"
    return f"    {{ {window}, {{ {inputs[0][1]}, {inputs[1][1]} }}, {out}u, {scratch} }}, /* {plain(name)} */"


def _model(
    graph: Graph, schedule: Schedule, crc: int, grid: tuple[int, int], slots: list[Slot], camera: Camera | None
) -> str:
    height, width, _ = map_shape(graph, graph.inputs[0])
    frame = [step for step in schedule.steps if step.kind == FRAME]
    pixels = frame[0].inputs if frame else ()
    if (camera is None) != bool(pixels):
        raise InputError("the memory plan and the camera frame do not go together; plan with the same frame")
    start = f"{schedule.places[pixels[0].tensor].offset}u" if pixels else "TVAD_NONE"
    parts = ", ".join(f"{schedule.places[part_name(tap)].offset}u" for tap in graph.outputs)
    return f"""\
static const uint32_t parts[] = {{ {parts} }};

const tvad_model tvad_model_data = {{
    .name = "{plain(graph.name)}",
    .backbone_crc32 = {crc:#010x}u,
    .layers = layers, .steps = steps, .n_layers = {len(slots)}, .n_steps = {_bounded(len(schedule.steps))},
    .input_h = {height}, .input_w = {width},
    .frame_h = TVAD_FRAME_HEIGHT, .frame_w = TVAD_FRAME_WIDTH, .frame_format = TVAD_FRAME_FORMAT,
    .taps = {len(graph.outputs)}, .grid_h = {grid[0]}, .grid_w = {grid[1]},
    .input = {start}, .parts = parts, .arena_bytes = TVAD_ARENA_BYTES,
}};
"""


def _bounded(steps: int) -> int:
    if steps > 65534:
        raise InputError(f"the memory plan has {steps} steps, the C runtime takes 65534; plan with larger bands")
    return steps


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def plain(name: str) -> str:
    """A name as it may stand in a C comment or string."""
    return re.sub(r"[^A-Za-z0-9_.:;+\- ]", "_", name)
