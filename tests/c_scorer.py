"""The bank and scorer half of the C runtime through ctypes: open a bank, score tapped maps, in guarded buffers."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from c_runtime import Guarded, library
from c_structs import CBank, CResult

SOURCES = (
    "tvad_bank", "tvad_bank_kind", "tvad_crc", "tvad_embed", "tvad_input", "tvad_route", "tvad_score", "tvad_score_centres",
    "tvad_score_core", "tvad_score_linear", "tvad_score_padim", "tvad_score_pairs", "tvad_score_pq", "tvad_status",
    "tvad_triangle",
)  # fmt: skip
NATIVE = int.from_bytes(b"STFP", "little")  # a kind whose parts are the tapped maps
DSP = ("-DTVAD_DSP_EMULATE=1",)  # the SMLAD paths, their instructions written out in C
STATUS = ("OK", "MAGIC", "SIZE", "CRC", "FIELD", "SECTION", "BACKBONE", "ARENA", "FRAME", "ALIGNMENT", "LEARN",
          "FULL", "STORE")  # fmt: skip


@functools.lru_cache
def scorer_library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The bank and scorer sources alone: what who keeps another engine for the network compiles."""
    lib = library(SOURCES, flags)
    lib.tvad_open.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(CBank))
    lib.tvad_score_bytes.restype = ctypes.c_size_t
    lib.tvad_self_test.argtypes = (ctypes.POINTER(CBank), ctypes.c_void_p, ctypes.c_size_t)
    lib.tvad_score.argtypes = (
        ctypes.POINTER(CBank), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(CResult)
    )  # fmt: skip
    lib.tvad_embed.argtypes = (ctypes.POINTER(CBank), ctypes.c_uint32, *(ctypes.c_void_p,) * 3)
    lib.tvad_score_parts.argtypes = (ctypes.POINTER(CBank), *(ctypes.c_void_p,) * 3, ctypes.POINTER(CResult))
    lib.tvad_input.argtypes = (ctypes.POINTER(CBank), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    lib.tvad_status_text.restype = ctypes.c_char_p
    return lib


class OpenBank:
    """A bank that lies at a multiple of 4096, as opened by ``tvad_open``; ``status`` is one of ``STATUS``."""

    def __init__(self, data: bytes, flags: tuple[str, ...] = (), size: int | None = None, shift: int = 0) -> None:
        self.lib = scorer_library(flags)
        self.block = np.zeros(len(data) + 8192, np.uint8)
        start = -self.block.ctypes.data % 4096 + shift
        self.bytes = self.block[start : start + len(data)]
        self.bytes[:] = np.frombuffer(data, np.uint8)
        self.bank = CBank()
        code = self.lib.tvad_open(self.bytes.ctypes.data, len(data) if size is None else size, ctypes.byref(self.bank))
        self.status = STATUS[code]

    def score(self, taps: list[np.ndarray]) -> tuple[np.ndarray, CResult]:
        """(grid_h, grid_w) uint32 and the result of [(h, w, C)] int8, with exactly the scratch that is asked for."""
        work = Guarded(self.lib.tvad_score_bytes(ctypes.byref(self.bank)))
        buffers = [_guarded(tap) for tap in taps]
        result = CResult()
        pointers = (ctypes.c_void_p * len(taps))(*(buffer.address for buffer in buffers))
        status = self.lib.tvad_score(ctypes.byref(self.bank), pointers, work.address, work.nbytes, ctypes.byref(result))
        assert STATUS[status] == "OK"
        return self._finish(result, [work, *buffers], work), result

    def score_parts(self, taps: list[np.ndarray]) -> tuple[np.ndarray, CResult, list[np.ndarray]]:
        """The same in the two steps of ``tvad_run``; the parts, (grid_h, grid_w, C) int8 or the maps themselves, too."""
        cells, native = self.bank.grid_h * self.bank.grid_w, self.bank.kind == NATIVE
        parts, kept = [], []
        for i, tap in enumerate(taps):
            part, source = Guarded(tap.size if native else cells * tap.shape[2]), _guarded(tap)
            scratch = Guarded(self.lib.tvad_embed_scratch(ctypes.byref(self.bank), i))
            self.lib.tvad_embed(ctypes.byref(self.bank), i, source.address, part.address, scratch.address)
            kept += [part, source, scratch]
            parts.append(part)
        grid, work = Guarded(4 * cells), Guarded(self.lib.tvad_score_parts_scratch(ctypes.byref(self.bank)))
        result = CResult()
        pointers = (ctypes.c_void_p * len(taps))(*(part.address for part in parts))
        self.lib.tvad_score_parts(
            ctypes.byref(self.bank), pointers, grid.address, work.address, ctypes.byref(result)
        )  # fmt: skip
        shape = (self.bank.grid_h, self.bank.grid_w, -1)
        arrays = [
            part.bytes.view(np.int8).reshape(tap.shape if native else shape).copy()
            for part, tap in zip(parts, taps, strict=True)
        ]
        return self._finish(result, [*kept, grid, work], grid), result, arrays

    def _finish(self, result: CResult, guarded: list[Guarded], holder: Guarded) -> np.ndarray:
        for buffer in guarded:
            buffer.check()
        assert (result.grid_h, result.grid_w) == (self.bank.grid_h, self.bank.grid_w)
        cells = result.grid_h * result.grid_w
        assert result.map == holder.address
        return holder.bytes[: 4 * cells].copy().view(np.uint32).reshape(result.grid_h, result.grid_w)

    def self_test(self) -> str:
        work = Guarded(self.lib.tvad_score_bytes(ctypes.byref(self.bank)))
        status = self.lib.tvad_self_test(ctypes.byref(self.bank), work.address, work.nbytes)
        work.check()
        return STATUS[status]


def _guarded(array: np.ndarray) -> Guarded:
    buffer = Guarded(array.size)
    buffer.bytes[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
    return buffer
