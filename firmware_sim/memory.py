"""Plan the memory of a .tflite model as TensorFlow Lite Micro does: file in, arena figures and placed buffers out.

TFLM keeps everything in one arena. The *head* (from the low end) holds activations and scratch buffers, which
share memory when their lifetimes do not overlap; the *tail* (from the high end) holds what lives for ever: structs
per tensor and operator, and two int32 per output channel of every convolution.

The head is exact: lifetimes, order and placement are TFLM's own (``micro_allocation_info.cc``,
``greedy_memory_planner.cc``), checked to the byte against the interpreter of pip ``tflite-micro``. The tail is
modelled: the same sequence of allocations with struct sizes from ``tflm_kernels``; TFLM's versions differ by some
hundred bytes. Neither counts the temporary memory above the head while planning (40 bytes per buffer). With TFLM's
kernels for Arm (``cmsis_nn_kernels``) the head is modelled, too: no interpreter that runs here has them.
"""

from __future__ import annotations

import dataclasses
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tinyvad.errors import InputError
from tinyvad.firmware_sim import cmsis_nn_kernels, tflm_kernels
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator, TfliteTensor, read_tflite

ALIGNMENT = 16  # MicroArenaBufferAlignment()
KERNELS = ("reference", "cmsis_nn")
_OFFLINE_PLAN = "OfflineMemoryAllocation"
_NEVER = -1  # the lifetime of a tensor that no operator touches; TFLM plans it all the same


@dataclass(frozen=True)
class Buffer:
    """A piece of memory that is needed from step ``first_use`` to step ``last_use``, both included.

    Attributes:
        name: tensor or scratch name.
        nbytes: size before alignment.
        first_use, last_use: step 0 is when inputs are written, step i + 1 runs operator i.
        offset: place from the arena's base in bytes; None lets the planner choose.
        owner: what the memory is for, to add up by ('activations', 'scratch', ...).
    """

    name: str
    nbytes: int
    first_use: int
    last_use: int
    offset: int | None = None
    owner: str = "activations"

    def overlaps(self, other: Buffer) -> bool:
        """True if both are needed at some step."""
        return self.first_use <= other.last_use and other.first_use <= self.last_use


class Plan(NamedTuple):
    """Offsets in the order of the buffers, and the bytes up to the end of the highest one."""

    offsets: list[int]
    head_bytes: int


@dataclass(frozen=True)
class Arena:
    """Memory figures of one .tflite file.

    Attributes:
        head_bytes: activations and scratch as TFLM places them.
        head_kind: 'exact', or 'modelled' if an operator or a second subgraph may need scratch unknown to us, and with
            kernels other than TFLM's reference.
        lower_bound_bytes: no plan that keeps whole buffers can need less.
        tail_bytes_modelled: for a pointer size of 4 or 8, persistent bytes by bucket.
        n_ops: operators.
        macs: multiply-accumulates of one inference, padding counted.
        weights_bytes: bytes of all constants, each shared buffer once.
        buffers: every planned buffer with its offset.
    """

    head_bytes: int
    head_kind: str
    lower_bound_bytes: int
    tail_bytes_modelled: dict[int, dict[str, int]]
    n_ops: int
    macs: int
    weights_bytes: int
    buffers: list[Buffer]

    def tail_bytes(self, pointer: int = 4) -> int:
        return sum(self.tail_bytes_modelled[pointer].values())


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def plan_tflm_greedy(buffers: Sequence[Buffer], alignment: int = ALIGNMENT) -> Plan:
    """Place buffers as TFLM's GreedyMemoryPlanner does.

    Buffers with an offset keep it and go first. The others go by size, largest first, later ones first among
    equals, each into the lowest gap between the buffers that live at the same time.
    """
    sizes = [align(buffer.nbytes, alignment) for buffer in buffers]
    fixed = [i for i, buffer in enumerate(buffers) if buffer.offset is not None]
    free = [i for i, buffer in enumerate(buffers) if buffer.offset is None]
    free.reverse()  # TFLM fills its list from the back before it sorts, and its sort is stable
    free.sort(key=lambda i: -sizes[i])

    offsets = [0] * len(buffers)
    placed: list[int] = []  # buffer numbers by offset; among equal offsets the earlier placed first
    placed_offsets: list[int] = []
    for i in [*fixed, *free]:
        buffer = buffers[i]
        if buffer.offset is not None:
            offset = buffer.offset
        else:
            offset = 0
            for j in placed:
                if not buffer.overlaps(buffers[j]):
                    continue
                if offsets[j] - offset >= sizes[i]:
                    break
                offset = max(offset, offsets[j] + sizes[j])
        offsets[i] = offset
        at = bisect_right(placed_offsets, offset)
        placed.insert(at, i)
        placed_offsets.insert(at, offset)
    head = max((offset + size for offset, size in zip(offsets, sizes)), default=0)
    return Plan(offsets, head)


def lower_bound(buffers: Sequence[Buffer], alignment: int = ALIGNMENT) -> int:
    """The most bytes, each buffer aligned, that are live at one step."""
    change: Counter[int] = Counter()
    for buffer in buffers:
        change[buffer.first_use] += align(buffer.nbytes, alignment)
        change[buffer.last_use + 1] -= align(buffer.nbytes, alignment)
    live = peak = 0
    for step in sorted(change):
        live += change[step]
        peak = max(peak, live)
    return peak


def tflite_buffers(file: TfliteFile, kernels: str = "reference", isa: str = "scalar") -> list[Buffer]:
    """What TFLM plans for a file, in the order in which it hands it to the planner: tensors, then scratch.

    Constants, variables and tensors without bytes are not planned. An operator's inputs and outputs live at once.

    Args:
        kernels, isa: as for ``arena``.

    Raises:
        InputError: a tensor has a dynamic shape or no fixed size; the offline plan in the metadata is damaged.
    """
    first = [_NEVER] * len(file.tensors)
    last = [_NEVER] * len(file.tensors)
    for i in (*file.inputs, *file.outputs):
        first[i] = last[i] = 0
    for op in file.operators:
        for i in op.outputs:
            first[i] = op.index + 1
        for i in (*op.inputs, *op.outputs):
            if i >= 0:
                last[i] = op.index + 1
    for i in file.outputs:
        last[i] = len(file.operators)

    offline = _offline_offsets(file)
    buffers = []
    for tensor in file.tensors:
        if tensor.data is not None or tensor.is_variable:
            continue
        nbytes = tflm_kernels.tensor_nbytes(file, tensor)
        if nbytes > 0:
            name = tensor.name or f"tensor {tensor.index}"
            buffers.append(Buffer(name, nbytes, first[tensor.index], last[tensor.index], offline[tensor.index]))
    for op in file.operators:
        for n, nbytes in enumerate(_scratch(file, op, kernels, isa)):
            name = f"scratch {n} of {op.op} {op.index}"
            buffers.append(Buffer(name, nbytes, op.index + 1, op.index + 1, owner="scratch"))
    return buffers


def arena(file: TfliteFile, kernels: str = "reference", isa: str = "scalar") -> Arena:
    """Plan a file: head, lower bound, tail, counts (see ``Arena``).

    Args:
        kernels: that TFLM was built with, one of ``KERNELS``.
        isa: that ``cmsis_nn`` was built for, one of ``cmsis_nn_kernels.INSTRUCTION_SETS``.

    Raises:
        InputError: as ``tflite_buffers``; unknown kernels or instruction set.
    """
    if kernels not in KERNELS or isa not in cmsis_nn_kernels.INSTRUCTION_SETS:
        sets = ", ".join(cmsis_nn_kernels.INSTRUCTION_SETS)
        raise InputError(f"kernels {kernels!r} for {isa!r}: use {' or '.join(KERNELS)}, for one of {sets}")
    buffers = tflite_buffers(file, kernels, isa)
    plan = plan_tflm_greedy(buffers)
    known = kernels == "reference" and file.n_subgraphs == 1 and all(op.op in tflm_kernels.KERNELS for op in file.operators)
    constants = {tensor.buffer: tensor.buffer_nbytes for tensor in file.tensors if tensor.data is not None}
    return Arena(
        head_bytes=plan.head_bytes,
        head_kind="exact" if known else "modelled",
        lower_bound_bytes=lower_bound(buffers),
        tail_bytes_modelled={pointer: _tail(file, pointer, kernels, isa) for pointer in (4, 8)},
        n_ops=len(file.operators),
        macs=sum(tflm_kernels.macs(file, op) for op in file.operators),
        weights_bytes=sum(constants.values()),
        buffers=[dataclasses.replace(b, offset=offset) for b, offset in zip(buffers, plan.offsets)],
    )


def summary(path: str | Path) -> dict[str, Any]:
    """Figures of a .tflite file as plain values, ready for JSON. Raises InputError as ``arena``."""
    file = read_tflite(path)
    figures = arena(file)
    return {
        "file": file.path_name,
        "file_bytes": file.size,
        "description": file.description,
        "arena_head_bytes": figures.head_bytes,
        "arena_head_kind": figures.head_kind,
        "lower_bound_bytes": figures.lower_bound_bytes,
        "arena_tail_bytes_modelled": figures.tail_bytes(4),
        "tail_32bit": figures.tail_bytes_modelled[4],
        "tail_64bit": figures.tail_bytes_modelled[8],
        "n_ops": figures.n_ops,
        "ops": dict(Counter(op.op for op in file.operators).most_common()),
        "macs": figures.macs,
        "weights_bytes": figures.weights_bytes,
        "n_tensors": len(file.tensors),
        "n_subgraphs": file.n_subgraphs,
        "inputs": [_describe(file.tensors[i]) for i in file.inputs],
        "outputs": [_describe(file.tensors[i]) for i in file.outputs],
    }


def _describe(tensor: TfliteTensor) -> dict[str, Any]:
    quantization = tensor.quantization
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "scale": None if quantization is None else [float(scale) for scale in quantization.scale],
        "zero_point": None if quantization is None else [int(zero) for zero in quantization.zero_point],
    }


def _offline_offsets(file: TfliteFile) -> list[int | None]:
    """Per tensor the offset that the file's metadata fixes, None where it leaves the choice to the planner.

    The metadata is int32: version, subgraphs, n, then n offsets with -1 for 'choose' (TFLM memory_management.md).
    """
    data = file.metadata.get(_OFFLINE_PLAN)
    if data is None:
        return [None] * len(file.tensors)
    values = struct.unpack(f"<{len(data) // 4}i", data[: len(data) // 4 * 4])
    n = values[2] if len(values) >= 3 else -1
    if n < len(file.tensors) or len(values) < 3 + n or (file.n_subgraphs == 1 and n != len(file.tensors)):
        raise InputError(
            f"{file.path_name}: metadata {_OFFLINE_PLAN} has {max(len(values) - 3, 0)} offsets for "
            f"{len(file.tensors)} tensors; remove it or plan again"
        )
    offsets = values[3 : 3 + len(file.tensors)]
    if min(offsets, default=0) < -1:
        raise InputError(f"{file.path_name}: metadata {_OFFLINE_PLAN} has the offset {min(offsets)}; plan again")
    return [None if offset == -1 else offset for offset in offsets]


# Bytes of the allocator, planner and builtin-data objects that TFLM puts at the end of the arena: measured on
# x86-64, and read off TFLM's own Cortex-M log (tools/benchmarking/README.md: 29,140 persistent bytes in all).
_ALLOCATORS = {8: 472, 4: 232}


def _scratch(file: TfliteFile, op: TfliteOperator, kernels: str, isa: str) -> list[int]:
    own = tflm_kernels.scratch_nbytes(file, op)
    return own if kernels == "reference" else [*own, *cmsis_nn_kernels.scratch_nbytes(file, op, isa)]


def _tail(file: TfliteFile, pointer: int, kernels: str, isa: str) -> dict[str, int]:
    """Persistent bytes by bucket for ``pointer``-byte pointers, in TFLM's order because alignment depends on it."""
    used: dict[str, int] = {}
    top = 0  # bytes from the end of the arena, which is taken as 16-aligned

    def allocate(bucket: str, nbytes: int, alignment: int = ALIGNMENT) -> None:
        nonlocal top
        if nbytes == 0:
            return
        grown = align(top + nbytes, alignment)
        used[bucket] = used.get(bucket, 0) + grown - top
        top = grown

    structs = [tflm_kernels.KERNELS.get(op.op, tflm_kernels.UNKNOWN) for op in file.operators]
    arm = kernels == "cmsis_nn"
    allocate("allocator_structs", _ALLOCATORS[pointer] + 2 * pointer * file.n_subgraphs, pointer)
    allocate("eval_tensors", 3 * pointer * len(file.tensors), pointer)
    allocate("node_registrations", 8 * pointer * len(file.operators), pointer)
    for kernel in structs:
        allocate("op_options", kernel.options, 4 if kernel.options >= 4 else 1)
    for kernel, op in zip(structs, file.operators, strict=True):
        more = cmsis_nn_kernels.more_data_nbytes(op) if arm else 0
        allocate("op_data", (kernel.data_64 if pointer == 8 else kernel.data_32) + more)
    for op in file.operators:
        bucket = "op_data" if op.op in ("ADD_N", "BATCH_MATMUL", "LOG_SOFTMAX", "SOFTMAX") else "channel_multipliers"
        for nbytes in tflm_kernels.persistent_nbytes(file, op, pointer):
            allocate(bucket, nbytes)
        for nbytes in cmsis_nn_kernels.persistent_nbytes(file, op, isa) if arm else []:
            allocate("channel_multipliers", nbytes)
    n_scratch = sum(len(_scratch(file, op, kernels, isa)) for op in file.operators)
    allocate("scratch_handles", pointer * n_scratch, pointer)
    for tensor in file.tensors:
        if tensor.is_variable:
            allocate("variables", tflm_kernels.tensor_nbytes(file, tensor))
    for ends in (file.inputs, file.outputs):
        allocate("persistent_tensors", pointer * len(ends))
        for i in ends:
            allocate("persistent_tensors", 8 * pointer, pointer)
            quantization = file.tensors[i].quantization
            if quantization is not None:
                allocate("persistent_tensors", 3 * pointer, pointer)
                allocate("persistent_tensors", 4 + 4 * len(quantization.scale), 4)
    return used
