"""What a build needs in RAM and flash under each of two runtimes, item by item.

* ``tinyvad``: our C runtime. Arena, model and plan are known to the byte; code and stack of a core are in ``runtime.toml``.
* ``tflm``: TensorFlow Lite Micro runs backbone.tflite, our scorer the rest.

Flows in: a memory plan, file sizes and a target. Flows out: ``Needs``, whose items ``budget.make_budget`` places.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tinyvad.export.c_model import layer_slots
from tinyvad.firmware_sim.budget import (
    COLUMNS,
    Budget,
    Item,
    bank_item,
    flash_items,
    make_budget,
    ram_items,
    reserved_ram,
)
from tinyvad.firmware_sim.cmsis_nn_kernels import instruction_set
from tinyvad.firmware_sim.memory import Arena, align, arena
from tinyvad.firmware_sim.targets import Target
from tinyvad.graph.ir import Graph
from tinyvad.graph.schedule import Schedule
from tinyvad.graph.tflite_file import TfliteFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUNTIMES = ("tinyvad", "tflm")
# sizeof of the structs of export/runtime/tvad_model.h with 32-bit pointers; a test compiles the header to compare
LAYER_BYTES, STEP_BYTES, MODEL_BYTES, POINTER_BYTES = 44, 28, 48, 4
ARRAY_ALIGN = 16  # of every array in model.c
_TABLE = Path(__file__).with_name("runtime.toml")


class Needs(NamedTuple):
    """Items of RAM and of flash, not yet placed."""

    ram: list[Item]
    flash: list[Item]

    def on(self, target: Target) -> Budget:
        """Placed on a target."""
        return make_budget(target, self.ram, self.flash)


class ModelFlash(NamedTuple):
    """Bytes of the constants that model.c defines.

    Attributes:
        weights: packed weights and lookup tables.
        requantisation: biases, multipliers, shifts.
        plan: the tables of layers and steps, and the model itself.
    """

    weights: int
    requantisation: int
    plan: int

    @property
    def nbytes(self) -> int:
        return sum(self)


def packing_of(target: Target) -> str:
    """How weights are packed for a target, one of ``tinyvad.export.layers.PACKINGS``."""
    return "mve" if target.isa.mve else "scalar"


def model_flash_bytes(graph: Graph, schedule: Schedule, packed_for: str = "scalar") -> ModelFlash:
    """Bytes of model.c's constants for 32-bit pointers, every array rounded up to its alignment.

    Raises:
        InputError: an operation that the C runtime does not have.
    """
    slots = layer_slots(graph, (1, 1), packed_for)  # the grid changes no size
    weights = requantisation = 0
    for slot in slots:
        sizes = {name: align(array.nbytes, ARRAY_ALIGN) for name, array in slot.layer.arrays.items()}
        weights += sizes.pop("weights", 0)
        requantisation += sum(sizes.values())
    tables = LAYER_BYTES * len(slots) + STEP_BYTES * len(schedule.steps) + POINTER_BYTES * len(graph.outputs)
    return ModelFlash(weights, requantisation, tables + MODEL_BYTES + align(len(graph.name) + 1, 4))


def tinyvad_needs(
    schedule: Schedule, model: ModelFlash, bank_bytes: int, target: Target, frame: str | None = None, learning: int = 0
) -> Needs:
    """What our C runtime keeps in RAM and flash.

    Args:
        frame: as for ``budget.frame_bytes``. learning: bytes of workspace of a device that learns, 0 of one that does not.
    """
    own = core_figures(target)
    flash = [
        Item("weights", model.weights, "exact", "packed for the kernels, read in place", column=COLUMNS[2]),
        Item("requantisation", model.requantisation, "exact", "biases, multipliers, shifts", column=COLUMNS[2]),
        Item("layers and memory plan", model.plan, "exact", "tables of model.c", column=COLUMNS[3]),
        bank_item(bank_bytes),
        Item("runtime code", own["code"], own["kind"], f"all kernels on a {own['core']}: {own['source']}"),
        *([learning_code()] if learning else []),
        Item("start-up", own["startup"], own["kind"], f"vectors, main, C library: {own['source']}"),
        Item("application", target.reserve.flash, "estimated", "reserve of the target preset"),
    ]
    return Needs([arena_item(schedule), *ram_besides_arena(target, frame, learning)], flash)


def arena_item(schedule: Schedule) -> Item:
    """The arena of our C runtime."""
    network = min(schedule.activation_bytes, schedule.arena_bytes)
    parts = (
        Item("activations", network, "exact", "tensors, input and kernel scratch", column=COLUMNS[0]),
        Item("embedding and scorer", schedule.arena_bytes - network, "exact", "what does not share their place"),
    )
    note = f"{schedule.strategy} plan, {schedule.lower_bound_bytes:,} B live at once"
    return Item("arena", schedule.arena_bytes, "exact", note, parts=parts)


def learning_code() -> Item:
    """Flash of what a firmware needs more to learn on the device."""
    own = _read_table()["learning"]
    return Item("learning code", own["code"], "modelled", f"tvad_learn.h: {own['source']}")


def ram_besides_arena(target: Target, frame: str | None = None, learning: int = 0) -> list[Item]:
    """What else a build with our C runtime keeps in RAM."""
    own = core_figures(target)
    more = _read_table()["learning"] if learning else {"stack": 0, "static": 0}
    stack, static = own["stack"] + more["stack"], own["static"] + more["static"]
    workspace = Item("learning", learning, "exact", "rows of a new product, distances, signature: tvad_learn_bytes")
    return [
        *([workspace] if learning else []),
        Item("runtime stack", stack, own["kind"], f"of tvad_run on a {own['core']}: {own['source']}"),
        Item("static data", static, own["kind"], f".data and .bss besides: {own['source']}"),
        *reserved_ram(target, frame, "application stack"),
    ]


def tflm_needs(
    planned: Arena, model_bytes: int, scorer_bytes: int, bank_bytes: int, target: Target, frame: str | None = None
) -> Needs:
    """What TFLM with our scorer keeps in RAM and flash; ``model_bytes`` of backbone.tflite, ``scorer_bytes`` of RAM."""
    return Needs(ram_items(planned, scorer_bytes, target, frame), flash_items(model_bytes, bank_bytes, target))


def plan_facts(schedule: Schedule) -> dict[str, Any]:
    """The memory plan of our runtime as plain values, with the keys of ``arena_facts``; steps count as operators."""
    return {
        "strategy": schedule.strategy,
        "head_bytes": schedule.arena_bytes,
        "head_kind": "exact",
        "activation_bytes": schedule.activation_bytes,
        "lower_bound_bytes": schedule.lower_bound_bytes,
        "tail_bytes": 0,
        "tail": {},
        "n_ops": len(schedule.steps),
        "extra_macs": schedule.extra_macs,
        "stages": [list(stage) for stage in schedule.stages],
    }


def arena_facts(planned: Arena, pointer: int = 4) -> dict[str, Any]:
    """TFLM's arena as plain values, for pointers of 4 or 8 bytes."""
    return {
        "head_bytes": planned.head_bytes,
        "head_kind": planned.head_kind,
        "lower_bound_bytes": planned.lower_bound_bytes,
        "tail_bytes": planned.tail_bytes(pointer),
        "tail": planned.tail_bytes_modelled[pointer],
        "n_ops": planned.n_ops,
    }


def tflm_arena(file: TfliteFile, target: Target) -> Arena:
    """TFLM's arena with the kernels that a target's builds use: CMSIS-NN on a Cortex-M, else the reference ones."""
    if not target.core.startswith("cortex-m"):
        return arena(file)
    return arena(file, "cmsis_nn", instruction_set(target.isa))


def core_figures(target: Target) -> dict[str, Any]:
    """The entry of ``runtime.toml`` for a target's core, which is its 'core'; 'default' for an unknown one."""
    table = _read_table()
    core = target.core if target.core in table else "default"
    return {**table[core], "core": core}


@functools.cache
def _read_table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))
