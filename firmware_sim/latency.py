"""How long a network takes on a target: multiply-accumulates in, an estimate in milliseconds out.

A model of one number, MACs per cycle, after measurements of seven networks (targets/*.toml, mac_per_cycle). Inside
one engine and core the spread is about 15 %, so an estimate is good to some 20 %; it is never a measurement.
"""

from __future__ import annotations

from typing import Any

from tinyvad.errors import InputError
from tinyvad.firmware_sim.targets import Target


def estimate(macs: int, target: Target, engine: str = "cmsis_nn") -> dict[str, Any]:
    """``{'ms', 'kind': 'estimated', 'engine', 'mac_per_cycle', 'source'}`` for one inference of ``macs``.

    Raises:
        InputError: the target has no figure for ``engine``.
    """
    rate = target.mac_per_cycle.get(engine)
    if rate is None:
        known = ", ".join(target.mac_per_cycle) or "none"
        raise InputError(f"target {target.label} has no mac_per_cycle for engine {engine!r} (known: {known})")
    return {
        "ms": macs / rate / (target.clock_mhz * 1e3),
        "kind": "estimated",
        "engine": engine,
        "mac_per_cycle": rate,
        "source": target.source.get("mac_per_cycle", ""),
    }
