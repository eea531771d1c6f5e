"""What training on a device takes: multiply-accumulates, bytes, time, and whether a step would fit. Always modelled.

Flows in: a detector that is trained (``tinyvad.training.trainable``: frozen trunk and teacher, network, recipe), a batch
size, a target. Flows out: plain figures for JSON and a table. Bytes: ``training_memory``.

Multiply-accumulates are those of convolutions and linear layers: forward; backward, once for the weights and once for the
input where anything in front of it is trained (the first layer's input gets no gradient); the teacher's; those of the loss.

PaSTe against STFPM, MobileNetV2, batch 8, as quoted by its author and here: inference -24.9 %, here -25.1 % (convolutions);
training RAM -76.2 %, here -76.2 % of the maps kept for the way back, -74.2 % of all; training compute -33.3 %, here -33.5 %
if the way back is taken to cost as much as the way forward, -37.4 % as it is, nearly twice as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tinyvad.firmware_sim.budget import kib
from tinyvad.firmware_sim.targets import Target
from tinyvad.firmware_sim.training_memory import FLOAT, copies_of, moving_values, positions_of, training_memory
from tinyvad.graph.ir import node_macs
from tinyvad.training.network import Network

MODELLED = "modelled"
LEAST_SIDE = 32  # pixels of the smallest image that a remedy names, and its steps
# float32 multiply-accumulates a cycle and core: assumptions, good to a factor of 2 or 3
RATES = (
    ("cortex-a", 1.0, "NEON with NumPy's matrix products, loads and depthwise layers included; peak is 4 to 8"),
    ("mve", 0.5, "Helium floats, two beats a vector, loads included"),
    ("fpu", 0.15, "one fused multiply-add, two loads and the loop"),
    ("none", 0.02, "software floats, some 50 cycles for a product and a sum"),
)  # fmt: skip


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image in a training step; ``trunk`` is run once an image and its map may be stored."""

    trunk: int
    teacher: int
    forward: int
    backward: int
    loss: int

    @property
    def step(self) -> int:
        """Of an image whose trunk map is stored: teacher's tail, forward, loss, backward."""
        return self.teacher + self.forward + self.backward + self.loss


def training_macs(detector: Any) -> Macs:
    """Multiply-accumulates an image of a ``TrainedDetector``."""
    network: Network = detector.network
    graph, moving = network.graph, moving_values(network)
    copies = copies_of(detector)
    forward = backward = 0
    for node in graph.nodes:
        macs = node_macs(graph, node) * copies.get(node.output, 1)
        forward += macs
        backward += macs * ((node.inputs[0] in moving) + (len(node.inputs) > 1 and node.inputs[1] in network.parameters))
    frozen = [0 if part is None else part.macs() for part in (detector.trunk, detector.targets)]
    return Macs(frozen[0], frozen[1], forward, backward, _loss_macs(detector))


def adaptation_figures(
    detector: Any, target: Target | None, batch: int | None = None, replay_bytes: int = 0, images: int = 0
) -> dict[str, Any]:
    """What training on a device takes, as plain values: of an image, a step and an epoch, and whether it fits.

    Weights of trunk and teacher count as RAM on a target that loads programs from a file system, else they lie in flash.
    The replay memory counts as RAM.

    Args:
        detector: trunk, targets, network and recipe of a ``TrainedDetector``; trained or not.
        target: None leaves out time and fit. batch: images a step, replayed ones included; None takes the recipe's.
        replay_bytes: of the replay memory. images: of an epoch; 0 leaves out its seconds.

    Returns:
        'macs' an image, 'ram' of a step by owner, 'frozen_bytes' of the weights that are not trained, 'replay_bytes',
        'problems' and 'fits' (None without a target); with a target 'ram_needed', 'ram_limit', 'ms_a_step',
        'seconds_an_epoch' and the assumption behind them ('source').

    Raises:
        InputError: a batch of no image.
    """
    batch = detector.recipe.batch if batch is None else batch
    macs, memory = training_macs(detector), training_memory(detector, batch)
    frozen = [part for part in (detector.trunk, detector.targets) if part is not None]
    weights = FLOAT * sum({name: array.size for part in frozen for name, array in part.constants.items()}.values())
    one = training_memory(detector, 1)
    first = detector.network.graph if detector.trunk is None else detector.trunk
    figures: dict[str, Any] = {
        "kind": MODELLED,
        "method": detector.method,
        "batch": batch,
        "images": images,
        "image_size": int(first.tensors[first.inputs[0]].shape[1]),
        "macs": {**vars(macs), "step": macs.step, "kind": MODELLED},
        "ram": {**vars(memory), "total": memory.total, "kind": MODELLED},
        "ram_of_one": {**vars(one), "total": one.total, "kind": MODELLED},
        "ram_by_batch": [training_memory(detector, b).total for b in range(1, batch + 1)],
        "frozen_bytes": weights,
        "replay_bytes": replay_bytes,
        "problems": [],
        "fits": None,
    }
    return figures if target is None else on_target(figures, target)


def on_target(figures: dict[str, Any], target: Target) -> dict[str, Any]:
    """``adaptation_figures`` that were made without a target, with time and fit on one."""
    batch, replay_bytes, weights = figures["batch"], figures["replay_bytes"], figures["frozen_bytes"]
    figures = {**figures, **_time(figures["macs"]["step"] * batch, target, -(-figures["images"] // batch))}
    in_ram = replay_bytes + (weights if target.flash_bytes is None else 0)
    limit = target.ram_bytes - target.reserve.ram - target.reserve.stack
    needed = figures["ram"]["total"] + in_ram
    figures |= {"target": target.name, "ram_needed": needed, "ram_limit": limit, "fits": needed <= limit}
    if needed > limit:
        figures["problems"] = [
            f"training {figures['method']} at batch {batch} needs {kib(needed)} of RAM > {kib(limit)} of {target.label}: "
            f"{_remedy(figures, in_ram, limit)}"
        ]
    return figures


def figure_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures as (what, value), for people."""
    ram, macs = figures["ram"], figures["macs"]
    rows = [
        ("parameters, running statistics", kib(ram["parameters"])),
        ("optimiser", kib(ram["optimiser"])),
        ("batch: inputs and targets", kib(ram["batch"])),
        ("maps kept for the way back", kib(ram["kept"])),
        ("gradients and passing values", kib(ram["passing"])),
        ("a step in all", kib(ram["total"])),
        ("replay memory", kib(figures["replay_bytes"])),
        ("frozen weights", kib(figures["frozen_bytes"])),
        ("teacher", _millions(macs["teacher"])),
        ("student forward and loss", _millions(macs["forward"] + macs["loss"])),
        ("student backward", _millions(macs["backward"])),
        ("trunk, once a new image", _millions(macs["trunk"])),
    ]
    if figures.get("ms_a_step") is not None:
        rows.append(("time of a step", f"{figures['ms_a_step']:.0f} ms"))
    if figures.get("seconds_an_epoch") is not None:
        rows.append(("time of an epoch", f"{figures['seconds_an_epoch']:.0f} s"))
    if figures["fits"] is not None:
        told = "fits" if figures["fits"] else "does not fit"
        rows.append((f"{told} {figures['target']}", f"{kib(figures['ram_needed'])} of {kib(figures['ram_limit'])}"))
    return rows


def figures_table(figures: dict[str, Any]) -> str:
    """The figures as lines of text."""
    title = f"A training step of {figures['method']}, batch {figures['batch']} ({figures['kind']})"
    lines = [title, *(f"  {name:<32}{value:>14}" for name, value in figure_rows(figures))]
    return "\n".join([*lines, *(f"  {problem}" for problem in figures["problems"])])


def float_rate(target: Target) -> tuple[float, str]:
    """float32 multiply-accumulates a cycle of one core, and why; an assumption."""
    if target.core.startswith("cortex-a"):
        key = "cortex-a"
    elif target.isa.fpu == "none":
        key = "none"
    else:
        key = "mve" if target.isa.mve else "fpu"
    return next((rate, why) for name, rate, why in RATES if name == key)


def _time(macs: int, target: Target, steps: int) -> dict[str, Any]:
    rate, why = float_rate(target)
    ms = macs / rate / (target.clock_mhz * 1e3)
    return {
        "ms_a_step": ms,
        "seconds_an_epoch": ms * steps / 1e3 if steps else None,
        "float_macs_per_cycle": rate,
        "source": f"assumed: {rate} float32 multiply-accumulates a cycle on one core ({why}); good to a factor of 2 or 3",
    }


def _remedy(figures: dict[str, Any], in_ram: int, limit: int) -> str:
    """A smaller batch; else a smaller image, whose maps take a share of what one image takes; else less to train."""
    fitting = [batch for batch, total in enumerate(figures["ram_by_batch"], 1) if total + in_ram <= limit]
    if fitting:
        return f"use batches of {fitting[-1]}"
    one, side = figures["ram_of_one"], figures["image_size"]
    gradients = one["parameters"]
    maps = one["kept"] + one["batch"] + max(one["passing"] - gradients, 0)
    fixed = one["total"] - maps + in_ram
    smaller = int(side * math.sqrt(max(limit - fixed, 0) / maps)) // LEAST_SIDE * LEAST_SIDE
    if smaller >= LEAST_SIDE:
        return f"use batches of 1 and images of about {smaller} pixels"
    replay = ", a smaller replay memory" if in_ram else ""
    return f"share more layers{replay} or use a larger target ({kib(fixed)} go without any map)"


def _loss_macs(detector: Any) -> int:
    """Distances to all centres, way forward only; or three sums a value of every map, both ways."""
    outputs = list(positions_of(detector.network.graph))
    if detector.method == "cfa":
        return sum(positions * channels * len(detector.centres_) for positions, channels in outputs)
    return sum(6 * positions * channels for positions, channels in outputs) if detector.targets is not None else 0


def _millions(macs: int) -> str:
    return f"{macs / 1e6:.1f} M MAC"
