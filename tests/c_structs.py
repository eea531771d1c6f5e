"""The structs of ``export/runtime/tvad.h`` and ``tvad_model.h`` for ctypes, beside those of ``c_runtime``."""

from __future__ import annotations

import ctypes

from c_runtime import CLayer

OK, BACKBONE, ARENA, FRAME = 0, 6, 7, 8  # tvad_status
FORMATS = {"rgb888": 0, "rgb565": 1, "grey": 2}  # tvad_format
NONE, MOVE = 0xFFFFFFFF, 0xFFFF


class CSection(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("nbytes", ctypes.c_uint32), ("dim", ctypes.c_uint32 * 3), ("dtype", ctypes.c_uint8),
        ("ndim", ctypes.c_uint8),
    )  # fmt: skip


class CBank(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in (
            "nbytes", "kind", "backbone_crc32", "header_crc32", "generation")),
        *((name, ctypes.c_uint16) for name in ("input_h", "input_w", "grid_h", "grid_w", "depth", "values")),
        ("rows", ctypes.c_uint32), ("subspaces", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("bits", "mode", "taps", "shift", "tasks")),
        *((name, ctypes.c_void_p) for name in ("tap_rows", "input_table", "thresholds", "task_rows", "prototypes")),
        *((name, CSection) for name in (
            "mean", "codes", "tables", "factor", "indices", "projection", "bias", "vectors", "codebook", "test", "gold")),
    )  # fmt: skip


class CResult(ctypes.Structure):
    _fields_ = (
        ("score", ctypes.c_uint32),
        *((name, ctypes.c_uint16) for name in ("row", "column", "grid_h", "grid_w")),
        ("label", ctypes.c_uint8), ("task", ctypes.c_uint8), ("map", ctypes.c_void_p),
    )  # fmt: skip


class CFrame(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p), ("width", ctypes.c_uint16), ("height", ctypes.c_uint16), ("stride", ctypes.c_uint32),
        ("format", ctypes.c_uint),
    )  # fmt: skip


class CStep(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint16) for name in ("layer", "row", "rows")),
        ("in_first", ctypes.c_uint16 * 2), ("out_first", ctypes.c_uint16), ("inputs", ctypes.c_uint32 * 2),
        ("out", ctypes.c_uint32), ("scratch", ctypes.c_uint32),
    )  # fmt: skip


class CModel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("backbone_crc32", ctypes.c_uint32), ("layers", ctypes.POINTER(CLayer)),
        ("steps", ctypes.POINTER(CStep)),
        *((name, ctypes.c_uint16) for name in ("n_layers", "n_steps", "input_h", "input_w", "frame_h", "frame_w")),
        ("frame_format", ctypes.c_uint8), ("taps", ctypes.c_uint8), ("grid_h", ctypes.c_uint16),
        ("grid_w", ctypes.c_uint16), ("input", ctypes.c_uint32), ("parts", ctypes.POINTER(ctypes.c_uint32)),
        ("arena_bytes", ctypes.c_uint32),
    )  # fmt: skip


# void call(user, model, step, arena)
OBSERVER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CModel), ctypes.c_uint32, ctypes.c_void_p)


class CObserver(ctypes.Structure):
    _fields_ = (("call", OBSERVER), ("user", ctypes.c_void_p))
