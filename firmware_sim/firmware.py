"""What lies in a build's firmware/ folder: its layers in order, its camera, and pictures as that camera would write them.

Flows in: a build folder. Flows out: a ``Firmware``, which the emulated board and the PC's build of the same sources use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyvad.bank import open_bank
from tinyvad.detectors import NATIVE
from tinyvad.errors import InputError
from tinyvad.export.c_model import FORMATS, Camera, Slot, layer_slots
from tinyvad.graph.tflite_import import import_tflite
from tinyvad.images import frame_to_rgb, rgb_to_frame
from tinyvad.model import BACKBONES, BANKS
from tinyvad.resize import resize

FOLDER = "firmware"


@dataclass(frozen=True, eq=False)
class Firmware:
    """A build's C sources.

    Attributes:
        folder: with model.c. slots: its layers in order, and what each is. taps: names of the tapped tensors.
        camera: None where it writes the network's input itself.
        arena_bytes: RAM that tvad_run takes. packed_for: 'scalar' or 'mve', as ``layer_of`` has it.
        slot_bytes, learning_bytes: of a slot and of learning's workspace; 0 where the device does not learn.
    """

    folder: Path
    slots: list[Slot]
    taps: tuple[str, ...]
    camera: Camera | None
    arena_bytes: int
    packed_for: str
    slot_bytes: int = 0
    learning_bytes: int = 0


def read_firmware(build: Path) -> Firmware:
    """The firmware of a build.

    Raises:
        InputError: the build has none, or it is not as ``tinyvad build`` writes it.
    """
    folder = build / FOLDER
    try:
        header, source = ((folder / name).read_text(encoding="utf-8") for name in ("model.h", "model.c"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} holds no firmware (model.h, model.c); make the build again, with --target") from error
    packed_for = "mve" if "#if !defined(__ARM_FEATURE_MVE)" in source else "scalar"
    facts = dict(re.findall(r"^#define (TVAD_\w+) (\w+)", header, re.MULTILINE))
    numbers = {name: int(value.rstrip("u"), 0) for name, value in facts.items() if value[0].isdigit()}
    try:
        arena_bytes = numbers["TVAD_ARENA_BYTES"]
        width, height = numbers["TVAD_FRAME_WIDTH"], numbers["TVAD_FRAME_HEIGHT"]
        slot_bytes, learning = (numbers.get(name, 0) for name in ("TVAD_SLOT_BYTES", "TVAD_LEARN_BYTES"))
        form = next(name for name, constant in FORMATS.items() if constant == facts["TVAD_FRAME_FORMAT"])
    except (KeyError, StopIteration) as error:
        raise InputError(f"{folder / 'model.h'}: {error} is missing; make the build again") from error
    camera = Camera(width, height, form) if width else None
    graph = import_tflite((build / BACKBONES["int8"]).read_bytes())
    bank = open_bank(build / BANKS["int8"])
    grid = (int(bank.header.grid_size[0]), int(bank.header.grid_size[1]))
    slots = layer_slots(graph, grid, "scalar", camera, int(bank.sections["TAPS"][0][6]), bank.header.kind in NATIVE)
    return Firmware(folder, slots, tuple(graph.outputs), camera, arena_bytes, packed_for, slot_bytes, learning)


def pictures(firmware: Firmware, images: np.ndarray) -> np.ndarray:
    """(n, nbytes) uint8: (n, S, S, 3) uint8 images of the network's size as the device's camera would deliver them."""
    if firmware.camera is None:
        return images.reshape(len(images), -1)
    camera = firmware.camera
    frames = (rgb_to_frame(resize(image, camera.height, camera.width), camera.format) for image in images)
    return np.stack([np.frombuffer(frame, np.uint8) for frame in frames])


def seen(firmware: Firmware, images: np.ndarray) -> np.ndarray:
    """(n, S, S, 3) uint8: what the network gets of those pictures, worked out in Python."""
    camera = firmware.camera
    if camera is None:
        return images
    size = images.shape[1:3]
    frames = (frame_to_rgb(picture, camera.width, camera.height, camera.format) for picture in pictures(firmware, images))
    return np.stack([resize(frame, *size) for frame in frames])
