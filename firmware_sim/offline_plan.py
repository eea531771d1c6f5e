"""A better plan for TFLM's users: a .tflite file in, the offset of every tensor out, to be written into the file.

TFLM takes a tensor's place from the metadata ``OfflineMemoryAllocation`` where a file has it (``to_tflite`` writes it), and
plans the rest, its kernels' scratch, around. Its rules stay: an operator's inputs and outputs live at once, nothing is done
in place, tapped tensors live to the end. What can be gained is what its greedy planner loses: it places the largest
buffers first, which may leave holes.
"""

from __future__ import annotations

from dataclasses import replace

from tinyvad.export.tflite import to_tflite
from tinyvad.firmware_sim.cmsis_nn_kernels import INSTRUCTION_SETS
from tinyvad.firmware_sim.memory import Buffer, lower_bound, plan_tflm_greedy, tflite_buffers
from tinyvad.firmware_sim.plan_places import place
from tinyvad.firmware_sim.plan_steps import Piece
from tinyvad.graph.ir import Graph
from tinyvad.graph.tflite_file import TfliteFile, read_tflite


def planned_tflite(graph: Graph, description: str = "") -> bytes:
    """``to_tflite`` with an offline plan in the file where that is smaller than TFLM's own.

    Raises:
        InputError: as ``to_tflite``.
    """
    plain = to_tflite(graph, description)
    offsets = offline_plan(read_tflite(plain))
    return plain if offsets is None else to_tflite(graph, description, offsets)


def offline_plan(file: TfliteFile) -> dict[str, int] | None:
    """Offsets by tensor name with which TFLM's head is smaller than by its own plan; None where none were found.

    It is smaller with TFLM's reference kernels, and not larger with those for Arm, whose scratch TFLM puts around it.

    Raises:
        InputError: as ``memory.tflite_buffers``.
    """
    runs = [tflite_buffers(file), *(tflite_buffers(file, "cmsis_nn", isa) for isa in INSTRUCTION_SETS)]
    if plan_tflm_greedy(runs[0]).head_bytes == lower_bound(runs[0]) or len(set(_names(file))) < len(_names(file)):
        return None
    best, gain = None, 0
    for run in runs:  # a plan that keeps room for one's scratch may suit all
        pieces = [
            Piece(str(i), buffer.nbytes, first_use=max(buffer.first_use, 0), last_use=max(buffer.last_use, 0))
            for i, buffer in enumerate(run)
        ]
        placed = place(pieces, lower_bound(run)).offsets
        offsets = {buffer.name: placed[str(i)] for i, buffer in enumerate(run) if buffer.owner == "activations"}
        saved = [_saved(other, offsets) for other in runs]
        if saved[0] > gain and min(saved) >= 0:
            best, gain = offsets, saved[0]
    return best


def _names(file: TfliteFile) -> list[str]:
    return [tensor.name for tensor in file.tensors]


def _saved(buffers: list[Buffer], offsets: dict[str, int]) -> int:
    """Bytes by which TFLM's head is smaller with the tensors at these offsets."""
    fixed = [replace(b, offset=offsets[b.name]) if b.owner == "activations" else b for b in buffers]
    return plan_tflm_greedy(buffers).head_bytes - plan_tflm_greedy(fixed).head_bytes
