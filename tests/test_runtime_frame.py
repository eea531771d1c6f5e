"""tvad_frame.c against tinyvad.resize and the table: every format, many sizes, any rows, in place."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from c_runtime import CLayer, CWindow, Guarded, library
from c_structs import FORMATS, CBank, CFrame

from tinyvad.graph.scratch import frame_scratch
from tinyvad.images import apply_table, frame_to_rgb
from tinyvad.resize import resize

BYTES = {"rgb888": 3, "rgb565": 2, "grey": 1}


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    lib = library(("tvad_frame", "tvad_input"))
    lib.tvad_frame_scratch.restype = ctypes.c_uint32
    return lib


def a_table(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-128, 128, (3, 256)).astype(np.int8)


def rows_of(
    lib: ctypes.CDLL, frame: np.ndarray, form: str, out: tuple[int, int], table: np.ndarray, row: int, rows: int,
    gap: int = 0,
) -> np.ndarray:  # fmt: skip
    """tvad_frame_rows: frame (H, bytes of a row) uint8 -> (rows, out width, 3) int8; ``gap`` bytes between frame rows."""
    height, width = len(frame), frame.shape[1] // BYTES[form]
    stride = frame.shape[1] + gap
    pixels = Guarded(height * stride - gap, 0xEE)
    for y, line in enumerate(frame):
        pixels.bytes[y * stride : y * stride + line.size] = line
    work = Guarded(lib.tvad_frame_scratch(height, width, *out))
    result = Guarded(rows * out[1] * 3)
    bank = CBank(input_table=table.ctypes.data)
    camera = CFrame(pixels.address, width, height, stride, FORMATS[form])
    layer = CLayer(in_h=height, in_w=width, in_c=3, out_h=out[0], out_w=out[1], out_c=3)
    window = CWindow(out=result.address, out_first=row, row=row, rows=rows, scratch=work.address)
    lib.tvad_frame_rows(*map(ctypes.byref, (layer, window, bank, camera)))
    for buffer in (pixels, work, result):
        buffer.check()
    return result.bytes.copy().view(np.int8).reshape(rows, out[1], 3)


def check(lib: ctypes.CDLL, rng: np.random.Generator, size: tuple[int, int], out: tuple[int, int], form: str) -> None:
    """Whole and in two parts: (h, w) frame of random pixels, or of the extremes."""
    height, width = size
    frame = rng.integers(0, 256, (height, width * BYTES[form]), dtype=np.uint8)
    if rng.random() < 0.3:
        frame = np.where(frame < 128, 0, 255).astype(np.uint8)
    table = a_table(rng)
    wanted = apply_table(resize(frame_to_rgb(frame, width, height, form), *out), table)
    cut = int(rng.integers(0, out[0]))
    for row, rows in ((0, out[0]), (0, cut), (cut, out[0] - cut)):
        found = rows_of(lib, frame, form, out, table, row, rows, int(rng.integers(0, 3))) if rows else wanted[:0]
        assert np.array_equal(found, wanted[row : row + rows]), (size, out, form, row)
    assert frame_scratch(*size, *out) == lib.tvad_frame_scratch(*size, *out)


@pytest.mark.parametrize("form", FORMATS)
def test_small_frames_of_every_shape(lib: ctypes.CDLL, rng: np.random.Generator, form: str) -> None:
    for _ in range(250):
        height, width, out_h, out_w = (int(side) for side in rng.integers(1, 28, 4))
        check(lib, rng, (height, width), (out_h, out_w), form)


@pytest.mark.parametrize(("size", "out"), [
    ((240, 320), (176, 176)), ((480, 640), (224, 224)), ((120, 160), (160, 160)), ((97, 131), (96, 96)),
    ((61, 67), (61, 40)), ((61, 67), (40, 67)), ((1, 1), (33, 35)), ((300, 1), (7, 50)), ((1, 900), (50, 3)),
    ((7, 16384), (5, 11)), ((7, 16000), (5, 1)), ((16384, 1), (9, 1)), ((600, 400), (1, 1)), ((64, 48), (64, 48)),
])  # fmt: skip
def test_frames_of_cameras_and_at_the_limits(
    lib: ctypes.CDLL, rng: np.random.Generator, size: tuple[int, int], out: tuple[int, int]
) -> None:
    for form in FORMATS:
        check(lib, rng, size, out, form)


def test_row_by_row_as_a_plan_may_ask(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    frame = rng.integers(0, 256, (37, 53 * 2), dtype=np.uint8)
    table = a_table(rng)
    wanted = apply_table(resize(frame_to_rgb(frame, 53, 37, "rgb565"), 24, 20), table)
    for row in range(24):
        assert np.array_equal(rows_of(lib, frame, "rgb565", (24, 20), table, row, 1)[0], wanted[row])


def test_the_same_size_needs_no_scratch(lib: ctypes.CDLL) -> None:
    assert lib.tvad_frame_scratch(96, 80, 96, 80) == 0


def test_scratch_is_small_for_a_qvga_frame(lib: ctypes.CDLL) -> None:
    """176 columns of 4 weights and a start, 3 weights down, a line of 320 pixels, 3 rows of 176 pixels."""
    assert lib.tvad_frame_scratch(240, 320, 176, 176) == 2 * (176 * 5 + 3) + 3 * (320 + 3 * 176)


@pytest.mark.parametrize("in_place", [True, False])
def test_pixels_in_the_arena_pass_the_table_alone(lib: ctypes.CDLL, rng: np.random.Generator, in_place: bool) -> None:
    height, width, first, row, rows = 9, 7, 2, 4, 3
    table = a_table(rng)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = Guarded((height - first) * width * 3)
    pixels.bytes[:] = image[first:].ravel()
    out = pixels if in_place else Guarded(rows * width * 3)
    start = (row - first) * width * 3 if in_place else 0
    window = CWindow(out=out.address, out_first=first if in_place else row, row=row, rows=rows)
    window.inputs[0], window.in_first[0] = pixels.address, first
    bank = CBank(input_table=table.ctypes.data)
    layer = CLayer(in_h=height, in_w=width, in_c=3, out_h=height, out_w=width, out_c=3)
    lib.tvad_frame_rows(*map(ctypes.byref, (layer, window, bank)), None)
    pixels.check()
    out.check()
    wanted = apply_table(image[row : row + rows], table)
    assert np.array_equal(out.bytes[start : start + wanted.size].view(np.int8), wanted.ravel())
    if in_place:  # the rows around it stay pixels
        assert np.array_equal(out.bytes[:start], image[first:row].ravel())
        assert np.array_equal(out.bytes[start + wanted.size :], image[row + rows :].ravel())
