"""The C runtime as a host library, for tests: compile sources, call one kernel on arrays through ctypes.

Structs mirror ``export/runtime/tvad_model.h`` and ``tvad_kernels.h``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tinyvad.export.layers import OPS, Layer

RUNTIME = Path(__file__).resolve().parents[1] / "export" / "runtime"
WARNINGS = (
    "-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Wundef", "-Werror",
)  # fmt: skip
KERNELS = {
    "CONV_1X1": "tvad_conv_1x1", "CONV": "tvad_conv", "DEPTHWISE": "tvad_depthwise",
    "FULLY_CONNECTED": "tvad_fully_connected", "ADD": "tvad_add", "MUL": "tvad_mul", "AVERAGE_POOL": "tvad_pool",
    "MAX_POOL": "tvad_pool", "MEAN": "tvad_mean", "LOOKUP": "tvad_lookup", "COPY": "tvad_copy", "PAD": "tvad_pad",
    "RESIZE_NEAREST": "tvad_resize_nearest",
}  # fmt: skip
GUARD = 64  # bytes around every buffer that must stay as they are


class CLayer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint8) for name in (
            "op", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left", "dilation")),
        *((name, ctypes.c_uint16) for name in ("in_h", "in_w", "in_c", "out_h", "out_w", "out_c", "channel")),
        *((name, ctypes.c_int8) for name in ("in_zero", "in2_zero", "out_zero", "low", "high")),
        ("broadcast", ctypes.c_uint8),
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "multiplier", "shift")),
    )  # fmt: skip


class CWindow(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p * 2), ("out", ctypes.c_void_p), ("in_first", ctypes.c_int32 * 2),
        ("out_first", ctypes.c_int32), ("row", ctypes.c_int32), ("rows", ctypes.c_int32), ("scratch", ctypes.c_void_p),
    )  # fmt: skip


def compiler() -> str:
    """A C compiler of this machine; skips the test without one."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler (cc, gcc or clang) on this machine")
    return found


@functools.lru_cache
def library(sources: tuple[str, ...] | None = None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The runtime (or some of its files, without .c) as a shared library, compiled once a process.

    Args:
        flags: more compiler flags, e.g. ``-DTVAD_DSP_EMULATE=1``.
    """
    names = sorted(path.stem for path in RUNTIME.glob("*.c")) if sources is None else list(sources)
    digest = hashlib.sha256(repr((names, flags)).encode()).hexdigest()[:12]
    out = Path(tempfile.mkdtemp(prefix="tvad-")) / f"tvad-{digest}.so"
    files = [str(RUNTIME / f"{name}.c") for name in names]
    command = [compiler(), *WARNINGS, "-O1", "-shared", "-fPIC", *flags, "-I", str(RUNTIME), "-o", str(out), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def c_layer(layer: Layer) -> CLayer:
    """The struct of a layer; it keeps the arrays alive."""
    kept = {name: np.ascontiguousarray(array) for name, array in layer.arrays.items()}
    fields = dict(zip(("in_h", "in_w", "in_c", "out_h", "out_w", "out_c"), (*layer.in_shape, *layer.out_shape)))
    fields |= dict(zip(("kernel_h", "kernel_w", "stride_h", "stride_w"), (*layer.kernel, *layer.stride)))
    fields |= dict(zip(("pad_top", "pad_left", "in_zero", "in2_zero", "out_zero", "low", "high"),
                       (*layer.pad, *layer.zeros, *layer.limits)))  # fmt: skip
    struct = CLayer(op=OPS[layer.op], dilation=layer.dilation, channel=layer.channel, broadcast=layer.broadcast, **fields)
    for name, array in kept.items():
        setattr(struct, name, array.ctypes.data)
    struct.kept = kept
    return struct


class Guarded:
    """A buffer, 16-aligned, with bytes around it that must not change."""

    def __init__(self, nbytes: int, fill: int = 0x5A) -> None:
        self.block = np.full(nbytes + 2 * GUARD + 16, 0xA5, np.uint8)
        self.start = GUARD + (-(self.block.ctypes.data + GUARD)) % 16
        self.nbytes = nbytes
        self.bytes[:] = fill

    @property
    def bytes(self) -> np.ndarray:
        return self.block[self.start : self.start + self.nbytes]

    @property
    def address(self) -> int:
        return self.block.ctypes.data + self.start

    def check(self) -> None:
        around = np.concatenate([self.block[: self.start], self.block[self.start + self.nbytes :]])
        assert (around == 0xA5).all(), "a kernel wrote outside its buffer"


def run_layer(
    layer: Layer, inputs: list[np.ndarray], *, lib: ctypes.CDLL | None = None, scratch: int | None = None,
    row: int = 0, rows: int | None = None, in_rows: tuple[int, int] | None = None, in_place: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Run one kernel on (h, w, C) int8 operands; output rows ``row`` to ``row + rows - 1``, (rows, w, C) int8.

    Args:
        lib: default: all of the runtime. scratch: bytes; default: what the kernel's sibling says.
        in_rows: rows of the first operand that its buffer holds; default: all.
        in_place: the operand in whose place the output lies.
    """
    lib = lib or library()
    struct = c_layer(layer)
    name = KERNELS[layer.op]
    if scratch is None:
        sibling = getattr(lib, f"{name}_scratch", None)
        if sibling is not None:
            sibling.restype = ctypes.c_uint32
        scratch = 0 if sibling is None else sibling(ctypes.byref(struct))
    rows = layer.out_shape[0] if rows is None else rows
    low, high = in_rows or (0, inputs[0].shape[0])
    held = [inputs[0][low:high], *inputs[1:]]
    out_bytes = rows * layer.out_shape[1] * layer.out_shape[2]
    buffers = []
    for i, array in enumerate(held):
        buffer = Guarded(max(array.size, out_bytes) if in_place == i else array.size)
        buffer.bytes[: array.size] = np.ascontiguousarray(array).view(np.uint8).ravel()
        buffers.append(buffer)
    out = buffers[in_place] if in_place is not None else Guarded(out_bytes)
    work = Guarded(scratch)
    window = CWindow(out=out.address, row=row, rows=rows, scratch=work.address, out_first=row)
    for i, buffer in enumerate(buffers):
        window.inputs[i] = buffer.address
        window.in_first[i] = low if i == 0 else 0
    getattr(lib, name)(ctypes.byref(struct), ctypes.byref(window))
    for buffer in (*buffers, out, work):
        buffer.check()
    for i, (buffer, array) in enumerate(zip(buffers, held)):
        if i != in_place:
            assert (buffer.bytes == np.ascontiguousarray(array).view(np.uint8).ravel()).all(), "a kernel changed its input"
    return out.bytes[:out_bytes].copy().view(np.int8).reshape(rows, *layer.out_shape[1:])
