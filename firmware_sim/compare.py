"""Does the C runtime say what Python says? The same images through both, every tapped value and every score compared.

Flows in: a build, its exact model and images. Flows out: a dict of the form that ``tinyvad.verify`` has for every engine.
On a difference the first differing image runs again with every tensor traced, and the first that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.firmware_sim import board, host
from tinyvad.firmware_sim.board_build import Board, build_board
from tinyvad.firmware_sim.firmware import Firmware, seen
from tinyvad.firmware_sim.harness import Run
from tinyvad.firmware_sim.targets import Target, load_target
from tinyvad.images import apply_table
from tinyvad.model import Model

ENGINES = ("host", "firmware")
Trace = Callable[[np.ndarray, "set[str]"], Run]  # images and tensors -> the same images once more, with these tensors


def compare_firmware(
    build: Path, model: Model, images: np.ndarray, engine: str, target: Target | None = None
) -> dict[str, Any]:
    """Compare the C runtime with the exact engine.

    Args:
        build: with firmware/. model: the same build, loaded. images: (n, S, S, 3) uint8 at the network's size.
        engine: 'host', the sources compiled for this PC, or 'firmware', under QEMU with the target's memory.
        target: None: the build's own.

    Returns:
        ``status`` 'equal' or 'differs', ``values_compared``, ``differing_values`` by tap, ``differing_grid_scores``; on a
        difference ``problem``; of the firmware also ``machine``, ``instructions`` (of one image), ``stack_bytes``,
        ``code_bytes`` and ``sections``.

    Raises:
        InputError: no firmware, tools or target. CheckFailed: it does not link, or it faults.
    """
    if engine == "host":
        with host.build_host(build) as program:
            run = host.execute(program, images)
            again: Trace = lambda image, names: host.execute(program, image, names)  # noqa: E731
            return _compare(engine, program.firmware, model, images, run, again)
    with build_board(build, target or _own_target(model)) as linked:
        return compare_board(linked, model, images)


def compare_board(linked: Board, model: Model, images: np.ndarray) -> dict[str, Any]:
    """``compare_firmware`` for firmware that is linked already."""
    result = board.execute(linked, images)
    again: Trace = lambda image, names: board.execute(linked, image, names, count=False).run  # noqa: E731
    return {
        **_compare("firmware", linked.firmware, model, images, result.run, again),
        "machine": result.machine, "instructions": result.instructions, "stack_bytes": result.stack_bytes,
        "code_bytes": result.code_bytes, "sections": result.sections,
    }  # fmt: skip


def _own_target(model: Model) -> Target:
    target = model.manifest["target"]
    if target is None:
        raise InputError("the build has no target for QEMU to enforce; build with --target, or use --engine host")
    return load_target(target["name"])


def _compare(
    engine: str, firmware: Firmware, model: Model, images: np.ndarray, run: Run, again: Trace
) -> dict[str, Any]:
    inputs = apply_table(seen(firmware, images), model.table)
    taps = model.engine.features(inputs)
    maps, tasks = model.score_taps(taps)  # (n, H, W), (n,)
    wrong = [mine != run.tensors[name] for name, mine in zip(firmware.taps, taps, strict=True)]
    wrong_cells = maps != run.maps
    peaks = maps.reshape(len(maps), -1)
    wrong_results = (
        (run.scores != peaks.max(1))
        | (run.tasks != tasks)
        | (run.labels != (peaks.max(1) >= model.scorers.thresholds[tasks]))
        | (run.places[:, 0] * maps.shape[2] + run.places[:, 1] != peaks.argmax(1))
    )
    result: dict[str, Any] = {
        "status": "equal",
        "values_compared": int(sum(tap.size for tap in taps)),
        "differing_values": {name: int(one.sum()) for name, one in zip(firmware.taps, wrong, strict=True)},
        "differing_grid_scores": int(wrong_cells.sum()) + int(wrong_results.sum()),
    }
    by_image = np.stack([one.reshape(len(images), -1).any(1) for one in (*wrong, wrong_cells, wrong_results)]).any(0)
    if by_image.any():
        first = int(by_image.argmax())
        values = f"{sum(result['differing_values'].values())} of {result['values_compared']} tapped values"
        scores = f"{result['differing_grid_scores']} scores"
        where = _first_difference(model, images[first : first + 1], inputs[first], firmware, again)
        result["status"] = "differs"
        result["problem"] = f"{engine} differs from the exact engine in {values} and {scores}, first in {where}"
    return result


def _first_difference(
    model: Model, image: np.ndarray, inputs: np.ndarray, firmware: Firmware, again: Trace
) -> str:
    mine = model.engine.all_tensors(inputs)  # type: ignore[attr-defined]
    theirs = again(image, {slot.layer.name for slot in firmware.slots}).tensors
    for name, value in mine.items():
        if name in theirs and (value.ravel() != theirs[name][0].ravel()).any():
            return f"tensor {name}"
    return "the scores (every tensor of the network is equal)"
