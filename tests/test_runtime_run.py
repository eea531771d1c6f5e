"""tvad_run follows a plan written by hand (bands, moved halos, in-place steps) and refuses what does not go together."""

from __future__ import annotations

import ctypes
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from c_runtime import KERNELS, CLayer, c_layer, library
from c_structs import (
    ARENA,
    BACKBONE,
    FORMATS,
    FRAME,
    MOVE,
    NONE,
    OBSERVER,
    OK,
    CBank,
    CFrame,
    CModel,
    CObserver,
    CResult,
    CStep,
)

from tinyvad.bank import Header, write_bank
from tinyvad.detectors import parts_scratch
from tinyvad.detectors.padim import PadimCompact
from tinyvad.detectors.triangular import TriangularScorer
from tinyvad.embedding import Embedding, align, make_taps
from tinyvad.engines.int8 import Int8Engine
from tinyvad.export.c_model import Camera, layer_slots
from tinyvad.firmware_sim.harness import STATUS
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph, Quantization
from tinyvad.graph.scratch import frame_scratch
from tinyvad.images import apply_table, frame_to_rgb, rgb_to_frame
from tinyvad.resize import resize

HEIGHT, WIDTH = 14, 11
GRID = (5, 4)
CAMERA = Camera(23, 17, "rgb565")
GUARD = 64


def network(rng: np.random.Generator) -> Graph:
    """Input -> max pool -> conv -> squeeze-excite -> 1x1 -> depthwise; taps: after squeeze-excite, and a concat."""
    builder = GraphBuilder("by hand", (1, HEIGHT, WIDTH, 3))
    graph = builder.graph

    def quantized(name: str, scale: float, zero_point: int) -> str:
        grid = Quantization.per_tensor(float(np.float32(scale)), zero_point)
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], dtype="int8", quantization=grid)
        return name

    def weighted(op: str, x: str, shape: tuple[int, ...], name: str, **attributes: Any) -> str:
        scales = rng.uniform(0.002, 0.01, shape[-1] if op == "depthwise_conv2d" else shape[0]).astype(np.float32)
        w = builder.constant(f"w {name}", rng.integers(-127, 128, shape).astype(np.int8))
        b = builder.constant(f"b {name}", rng.integers(-500, 500, len(scales)).astype(np.int32))
        for constant, axis in ((w, 3 if op == "depthwise_conv2d" else 0), (b, 0)):
            grid = Quantization(scales, np.zeros(len(scales), np.int64), axis)
            graph.tensors[constant] = dataclasses.replace(graph.tensors[constant], quantization=grid)
        return builder.add(op, [x, w, b], name, stride=attributes.pop("stride", (1, 1)), **attributes)

    quantized(builder.input, 0.02, -3)
    ones = (1, 1, 1, 1)
    x = quantized(builder.add("max_pool", [builder.input], "pool", kernel=(3, 3), stride=(1, 1), pads=ones), 0.02, -3)
    x = quantized(weighted("conv2d", x, (8, 3, 3, 3), "conv", stride=(2, 2), pads=ones), 0.08, 5)
    x = quantized(builder.add("hard_swish", [x], "swish"), 0.05, -60)
    gate = quantized(builder.add("mean", [x], "mean"), 0.04, -40)
    gate = quantized(builder.add("logistic", [gate], "gate"), 1 / 256, -128)
    tap = quantized(builder.add("mul", [x, gate], "excited"), 0.03, -50)
    x = quantized(weighted("conv2d", tap, (8, 1, 1, 8), "project", pads=(0, 0, 0, 0)), 0.03, -50)
    x = quantized(weighted("depthwise_conv2d", x, (1, 3, 3, 8), "depthwise", pads=ones, activation="relu"), 0.03, -50)
    both = quantized(builder.add("concat", [tap, x], "both", axis=3), 0.03, -50)
    return builder.finish([tap, both])


class Made:
    """Network, bank and a model whose steps are written here, with what the exact engine makes of a frame."""

    def __init__(self, rng: np.random.Generator, camera: Camera | None) -> None:
        self.camera, self.graph = camera, network(rng)
        self.table = rng.integers(-128, 128, (3, 256)).astype(np.int8)
        self.engine = Int8Engine(self.graph, threads=1)
        size = (HEIGHT, WIDTH) if camera is None else (camera.height, camera.width)
        good = [self.maps(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(30)]
        stacked = [np.stack(maps) for maps in zip(*good, strict=True)]
        taps = make_taps([self.graph.tensors[name] for name in self.graph.outputs], [1.0, 1.0], False)
        self.embedding = Embedding(taps, GRID)
        self.scorer: TriangularScorer = PadimCompact(6, bits=8).fit([self.embedding.integer(stacked)]).to_scorer()
        self.lib = library()
        self._open(int(np.median(self.scorer.score(self.embedding.integer(stacked)).max((1, 2)))))
        self._build()

    def pixels(self, rgb: np.ndarray) -> np.ndarray:
        """What the device sees of an image: (H, W, 3) uint8 at the network's size."""
        if self.camera is not None:
            width, height, form = self.camera.width, self.camera.height, self.camera.format
            rgb = frame_to_rgb(rgb_to_frame(rgb, form), width, height, form)
        return resize(rgb, HEIGHT, WIDTH)

    def maps(self, rgb: np.ndarray) -> list[np.ndarray]:
        return [maps[0] for maps in self.engine.features(apply_table(self.pixels(rgb), self.table)[None])]

    def _open(self, threshold: int) -> None:
        header = Header(self.scorer.kind, zlib.crc32(b"network"), (HEIGHT, WIDTH), GRID, len(self.graph.outputs))
        sections = {
            "LUT ": self.table, **self.embedding.sections(), "THRS": np.array([threshold], np.uint32),
            **self.scorer.sections(),
        }  # fmt: skip
        data = write_bank(header, sections, ("LUT ", "TAPS", "THRS", *self.scorer.required))
        block = np.zeros(len(data) + 16, np.uint8)
        start = -block.ctypes.data % 16
        self.bank_bytes = block[start : start + len(data)]
        self.bank_bytes[:] = np.frombuffer(data, np.uint8)
        self.bank = CBank()
        self.lib.tvad_open.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert self.lib.tvad_open(self.bank_bytes.ctypes.data, len(data), ctypes.byref(self.bank)) == OK
        self.threshold = threshold

    def _build(self) -> None:
        slots = layer_slots(self.graph, GRID, camera=self.camera)
        self.names, self.ops = [slot.layer.name for slot in slots], [slot.layer.op for slot in slots]
        self.number = {(slot.kind, slot.index, slot.operand): i for i, slot in enumerate(slots)}
        self.layers = (CLayer * len(slots))()
        self.structs = [c_layer(slot.layer) for slot in slots]
        for i, struct in enumerate(self.structs):
            self.layers[i] = struct
        self.end = 0
        self.steps: list[CStep] = []
        self._plan()
        array = (CStep * len(self.steps))(*self.steps)
        frame = self.camera or Camera(0, 0, "rgb888")
        parts = (ctypes.c_uint32 * 2)(*self.parts)
        self.model = CModel(
            b"by hand", zlib.crc32(b"network"), self.layers, array, len(slots), len(array), HEIGHT, WIDTH, frame.height,
            frame.width, FORMATS[frame.format], 2, *GRID, self.input, parts, align(self.end, 32),
        )  # fmt: skip
        self.kept = (array, parts)

    def place(self, nbytes: int) -> int:
        start = self.end
        self.end = align(start + nbytes)
        return start

    def step(
        self, layer: int, row: int, rows: int, inputs: list[tuple[int, int]], out: tuple[int, int], scratch: int = 0
    ) -> None:
        """inputs, out: (offset, first row). scratch: bytes."""
        both = [*inputs, (NONE, 0), (NONE, 0)][:2]
        self.steps.append(CStep(
            layer, row, rows, (both[0][1], both[1][1]), out[1], (both[0][0], both[1][0]), out[0],
            self.place(scratch) if scratch else NONE,
        ))  # fmt: skip

    def move(self, offset: int, row_bytes: int, kept: range, first: int) -> None:
        """Rows ``kept`` of a buffer whose first row is ``first`` to its front."""
        if len(kept) and kept.start > first:
            source = offset + (kept.start - first) * row_bytes
            self.steps.append(CStep(MOVE, 0, 0, (0, 0), 0, (source, NONE), offset, len(kept) * row_bytes))

    def node(self, name: str, operand: int = 0) -> tuple[int, int]:
        """Number of the node's layer, bytes of its scratch."""
        index = next(i for i, node in enumerate(self.graph.nodes) if node.output == name)
        layer = self.number["node", index, operand]
        sibling = getattr(self.lib, f"{KERNELS[self.ops[layer]]}_scratch", None)
        return layer, 0 if sibling is None else sibling(ctypes.byref(self.structs[layer]))

    def whole(self, name: str, inputs: list[int], out: int, operand: int = 0) -> int:
        """A step that makes a whole map."""
        layer, scratch = self.node(name, operand)
        self.step(layer, 0, self.structs[layer].out_h, [(offset, 0) for offset in inputs], (out, 0), scratch)
        return out

    def _plan(self) -> None:
        conv = self.place(7 * 6 * 8)
        if self.camera is None:
            self.input = pixels = self.place(HEIGHT * WIDTH * 3)
            self.step(0, 0, HEIGHT, [(pixels, 0)], (pixels, 0))
            self.whole("conv", [self.whole("pool", [pixels], self.place(HEIGHT * WIDTH * 3))], conv)
        else:
            self.input = NONE
            self._bands(conv)
        swish = self.whole("swish", [conv], conv)
        gate = self.place(8)
        self.whole("gate", [self.whole("mean", [swish], gate)], gate)
        excited = self.whole("excited", [swish, gate], swish)
        project = self.whole("project", [excited], self.place(7 * 6 * 8))
        depthwise = self.whole("depthwise", [project], self.place(7 * 6 * 8))
        both = self.place(7 * 6 * 16)
        self.whole("both", [excited], both, 0)
        self.whole("both", [depthwise], both, 1)
        self.parts = [self.place(GRID[0] * GRID[1] * channels) for channels in (8, 16)]
        for index, (tap, part) in enumerate(zip((excited, both), self.parts, strict=True)):
            scratch = self.embedding.scratch_bytes(self.embedding.taps[index])
            self.step(self.number["embed", index, 0], 0, GRID[0], [(tap, 0)], (part, 0), scratch)
        score_map = self.place(4 * GRID[0] * GRID[1])
        scratch = parts_scratch(self.embedding.sections()["TAPS"], self.scorer)
        self.step(self.number["score", 0, 0], 0, GRID[0], [], (score_map, 0), scratch)

    def _bands(self, conv: int) -> None:
        """Frame, pool and conv together, two conv rows at a time: of pixels and pooled rows only what is needed is held."""
        assert self.camera is not None
        row_bytes = WIDTH * 3
        pixels, pooled = self.place(7 * row_bytes), self.place(5 * row_bytes)
        frame_bytes = frame_scratch(self.camera.height, self.camera.width, HEIGHT, WIDTH)
        held_x, held_p = range(0), range(0)
        for row in range(0, 7, 2):
            rows = min(2, 7 - row)
            need_p = range(max(0, 2 * row - 1), min(HEIGHT, 2 * (row + rows - 1) + 2))
            new_p = range(held_p.stop, need_p.stop)
            need_x = range(max(0, new_p.start - 1), min(HEIGHT, new_p.stop + 1))
            self.move(pixels, row_bytes, range(need_x.start, held_x.stop), held_x.start)
            self.step(0, held_x.stop, need_x.stop - held_x.stop, [], (pixels, need_x.start), frame_bytes)
            held_x = need_x
            self.move(pooled, row_bytes, range(need_p.start, held_p.stop), held_p.start)
            window = [(pixels, held_x.start)]
            self.step(self.node("pool")[0], new_p.start, len(new_p), window, (pooled, need_p.start))
            held_p = need_p
            assert len(held_x) <= 7 and len(held_p) <= 5
            layer, scratch = self.node("conv")
            self.step(layer, row, rows, [(pooled, held_p.start)], (conv, 0), scratch)
        assert sum(step.layer == MOVE for step in self.steps) >= 6

    def run(
        self, frame: CFrame | None, nbytes: int | None = None, shift: int = 0, pixels: np.ndarray | None = None,
        observe: Callable[[int, np.ndarray], None] | None = None,
    ) -> tuple[int, CResult, np.ndarray]:  # fmt: skip
        """Status, result and the arena, which starts as garbage; nothing around it may change."""
        size = self.model.arena_bytes
        block = np.full(size + 2 * GUARD + 64, 0xA5, np.uint8)
        start = GUARD + -(block.ctypes.data + GUARD) % 32
        arena = block[start : start + size]
        arena[:] = np.random.default_rng(1).integers(0, 256, size)
        if pixels is not None:
            self.lib.tvad_input_pixels.restype = ctypes.c_void_p
            address = self.lib.tvad_input_pixels(ctypes.byref(self.model), ctypes.c_void_p(arena.ctypes.data))
            assert address == arena.ctypes.data + self.input
            arena[self.input : self.input + pixels.size] = pixels.ravel()
        result = CResult(score=12345)
        callback = OBSERVER(lambda user, model, step, base: observe(step, arena)) if observe else OBSERVER()
        watcher = ctypes.byref(CObserver(callback, None)) if observe else None
        status = self.lib.tvad_run_observed(
            ctypes.byref(self.model), ctypes.byref(self.bank), ctypes.byref(frame) if frame else None,
            ctypes.c_void_p(arena.ctypes.data + shift), ctypes.c_size_t(size if nbytes is None else nbytes),
            ctypes.byref(result), watcher,
        )  # fmt: skip
        assert (block[:start] == 0xA5).all() and (block[start + size :] == 0xA5).all()
        return status, result, arena

    def frame(self, rgb: np.ndarray) -> CFrame:
        camera = self.camera or Camera(WIDTH, HEIGHT, "rgb888")
        data = np.frombuffer(rgb_to_frame(rgb, camera.format), np.uint8)
        stride = len(data) // camera.height
        frame = CFrame(data.ctypes.data, camera.width, camera.height, stride, FORMATS[camera.format])
        frame.kept = data
        return frame

    def check(self, rgb: np.ndarray, frame: CFrame | None, pixels: np.ndarray | None = None) -> None:
        """Every step's rows, the map and the result equal the exact engine's."""
        wanted = self.engine.all_tensors(apply_table(self.pixels(rgb), self.table))
        maps = [wanted[name] for name in self.graph.outputs]
        e = self.embedding.integer([tensor[None] for tensor in maps])
        parts = np.split(e[0], [maps[0].shape[2]], axis=2)
        wanted |= {f"embedding of {name}": part for name, part in zip(self.graph.outputs, parts, strict=True)}
        scores = self.scorer.score(e)[0]
        seen, wrong = [], []  # an assertion in a callback from C would be lost

        def observe(number: int, arena: np.ndarray) -> None:
            seen.append(number)
            step = self.steps[number]
            if step.layer == MOVE or self.names[step.layer] == "score map":
                return
            name, last = self.names[step.layer], self.steps[number + 1].layer
            if last != MOVE and self.names[last] == name == "both":
                return  # the other operand of the concat comes next
            rows = wanted[name][step.row : step.row + step.rows] if wanted[name].ndim == 3 else wanted[name]
            start = step.out + (step.row - step.out_first) * rows[0].size
            if not np.array_equal(arena[start : start + rows.size].view(np.int8), rows.ravel()):
                wrong.append((number, name, step.row))

        status, result, arena = self.run(frame, pixels=pixels, observe=observe)
        assert status == OK and seen == list(range(len(self.steps))) and not wrong
        start = self.steps[-1].out
        assert np.array_equal(arena[start : start + 4 * scores.size].view(np.uint32), scores.ravel())
        assert result.map == arena.ctypes.data + start and (result.grid_h, result.grid_w) == GRID
        assert (result.score, result.label) == (scores.max(), scores.max() >= self.threshold)
        assert (result.row, result.column) == np.unravel_index(scores.argmax(), GRID)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made(np.random.default_rng(7), CAMERA)


def picture(rng: np.random.Generator, made: Made) -> np.ndarray:
    size = (HEIGHT, WIDTH) if made.camera is None else (made.camera.height, made.camera.width)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def test_every_step_of_a_banded_plan_equals_the_engine(made: Made, rng: np.random.Generator) -> None:
    for _ in range(4):
        rgb = picture(rng, made)
        made.check(rgb, made.frame(rgb))


def test_pixels_that_the_camera_writes_into_the_arena(rng: np.random.Generator) -> None:
    made = Made(rng, None)
    rgb = picture(rng, made)
    made.check(rgb, None, pixels=rgb)
    made.check(rgb, made.frame(rgb))  # a frame of the network's size from elsewhere does too


@pytest.mark.parametrize("field", ["backbone_crc32", "input_h", "input_w", "grid_h", "grid_w", "taps"])
def test_a_bank_of_another_network_is_refused(made: Made, rng: np.random.Generator, field: str) -> None:
    value = getattr(made.bank, field)
    setattr(made.bank, field, value ^ 1)
    try:
        status, result, _ = made.run(made.frame(picture(rng, made)))
    finally:
        setattr(made.bank, field, value)
    assert status == BACKBONE and result.score == 12345


def test_a_bank_whose_taps_have_other_shapes_is_refused(made: Made, rng: np.random.Generator) -> None:
    rows = made.embedding.sections()["TAPS"]
    address = made.bank.tap_rows
    for field in range(3):
        other = rows.copy()
        other[1, field] += 1
        made.bank.tap_rows = other.ctypes.data
        try:
            assert made.run(made.frame(picture(rng, made)))[0] == BACKBONE
        finally:
            made.bank.tap_rows = address


def test_a_bank_that_needs_more_scratch_than_planned_is_refused(made: Made, rng: np.random.Generator) -> None:
    """The scorer's scratch must end within the arena and leave the map and the parts alone."""
    step = made.model.steps[made.model.n_steps - 1]
    planned = step.scratch
    for place in (made.model.arena_bytes - 16, step.out, made.parts[0] - 16, made.parts[1], NONE):
        step.scratch = place
        try:
            assert made.run(made.frame(picture(rng, made)))[0] == ARENA, place
        finally:
            step.scratch = planned


def test_arenas_too_small_or_not_aligned_are_refused(made: Made, rng: np.random.Generator) -> None:
    frame = made.frame(picture(rng, made))
    assert made.run(frame, nbytes=made.model.arena_bytes - 1)[0] == ARENA
    assert made.run(frame, shift=16)[0] == ARENA
    assert made.run(frame)[0] == OK


@pytest.mark.parametrize("changes", [
    {"width": 24}, {"height": 16}, {"stride": 2 * 23 - 1}, {"format": FORMATS["grey"]}, {"format": FORMATS["rgb888"]},
    {"pixels": None},
])  # fmt: skip
def test_frames_of_another_kind_are_refused(made: Made, rng: np.random.Generator, changes: dict[str, Any]) -> None:
    frame = made.frame(picture(rng, made))
    for field, value in changes.items():
        setattr(frame, field, value)
    assert made.run(frame)[0] == FRAME


def test_a_model_with_a_camera_needs_a_frame(made: Made) -> None:
    made.lib.tvad_input_pixels.restype = ctypes.c_void_p
    assert made.run(None)[0] == FRAME
    assert made.lib.tvad_input_pixels(ctypes.byref(made.model), None) is None


def test_every_status_has_its_own_line() -> None:
    text = library().tvad_status_text
    text.restype = ctypes.c_char_p
    lines = [text(status).decode() for status in range(len(STATUS))]
    assert lines[0] == "ok" and len(set(lines)) == len(STATUS) and text(len(STATUS)) == b"unknown status"
    assert all(line.isascii() and "\n" not in line for line in lines)
