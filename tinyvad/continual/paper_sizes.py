"""Sizes and MACs that the papers with separate models and the thesis print, by formula; the benchmark's are in ``costs``.

Flows in: nothing but the counts of ``costs.NETWORKS``. Flows out: rows for ``tinyvad bench costs``. MB are 2^20 bytes for
networks and banks, 10^6 bytes for replayed images, for PaDiM's covariances and for ResNet18, as each table has it.
"""

from __future__ import annotations

from typing import Any

from tinyvad.continual.costs import MIB, NETWORKS
from tinyvad.continual.published import figures

_MOBILE, _MCU, _WIDE = (NETWORKS[name] for name in ("MobileNet", "MCUNet", "WideResNet50"))
_MOBILE_10 = 4 * (239_360 + 9438) / MIB  # MobileNetV2 up to features.10: parameters and running statistics
_CODES, _CODEBOOKS = 10_000 * 8, 4 * 256 * 160  # PatchCore-Lite: 8 codes a vector; 256 centroids of 160 float32 in all
_COVARIANCES = 4 * 56 * 56 * 550 * 551 / 1e6  # PaDiM, WideResNet50: mean and inverse covariance, float32
_REPLAY = 100 * 3 * 256 * 256 / 1e6
_COMPRESSED = 100 * 4 * 24 * 32 * 32 / 1e6  # maps of MCUNet's block 5 at 256 pixels, float32
_NO_BACKBONE = "0.95 is MobileNetV2 cut after features.10; the taps need it up to features.13, 2.07"
_NO_SIZE = "no choice of positions and dimensions gives 3.75 and 0.13; 256 positions of 62 come closest"


def _networks(*parameters: int) -> float:
    return 4 * sum(parameters) / MIB


def _tail(net: Any) -> tuple[int, int]:
    """MACs and parameters of PaSTe's student."""
    return net.macs - net.trunk[0], net.parameters - net.trunk[1]


# (source, system, backbone, metric) -> computed value, or why there is none
_COMPUTED: dict[tuple[str, str, str, str], float | str] = {
    ("thesis", "STFPM", "WideResNet50", "mb"): _networks(2 * _WIDE.parameters),
    ("thesis", "STFPM", "WideResNet50", "mmacs"): 2 * _WIDE.macs / 1e6,
    ("thesis", "STFPM", "MobileNetV2", "mb"): _networks(2 * _MOBILE.parameters),
    ("thesis", "STFPM", "MobileNetV2", "mmacs"): 2 * _MOBILE.macs / 1e6,
    ("thesis", "STFPM", "MCUNet-in3", "mb"): _networks(2 * _MCU.parameters),
    ("thesis", "STFPM", "MCUNet-in3", "mmacs"): 2 * _MCU.macs / 1e6,
    ("thesis", "PaSTe", "MobileNetV2", "mb"): _networks(_MOBILE.parameters, _tail(_MOBILE)[1]),
    ("thesis", "PaSTe", "MobileNetV2", "mmacs"): (_MOBILE.macs + _tail(_MOBILE)[0]) / 1e6,
    ("thesis", "PaSTe", "MCUNet-in3", "mb"): _networks(_MCU.parameters, _tail(_MCU)[1]),
    ("thesis", "PaSTe", "MCUNet-in3", "mmacs"): (_MCU.macs + _tail(_MCU)[0]) / 1e6,
    ("thesis", "STFPM Replay", "ResNet18", "mb"): 2 * 4 * 11_689_512 / 1e6,  # whole networks with classifiers
    ("thesis", "STFPM Replay", "ResNet18", "extra_mb"): _REPLAY,
    ("thesis", "STFPM Replay", "MCUNet-in3", "mb"): _networks(2 * _MCU.parameters),
    ("thesis", "STFPM Replay", "MCUNet-in3", "extra_mb"): _REPLAY,
    ("thesis", "PaSTe Finetuning", "MCUNet-in3", "mb"): _networks(_MCU.parameters, _tail(_MCU)[1]),
    ("thesis", "PaSTe Finetuning", "MCUNet-in3", "extra_mb"): 0.0,
    ("thesis", "PaSTe Replay", "MCUNet-in3", "mb"): _networks(_MCU.parameters, _tail(_MCU)[1]),
    ("thesis", "PaSTe Replay", "MCUNet-in3", "extra_mb"): _REPLAY,
    ("thesis", "PaSTe Compressed Replay", "MCUNet-in3", "mb"): _networks(_MCU.parameters, _tail(_MCU)[1]),
    ("thesis", "PaSTe Compressed Replay", "MCUNet-in3", "extra_mb"): _COMPRESSED,
    ("lite", "PatchCore", "WideResNet50", "backbone_mb"): _networks(_WIDE.parameters),
    ("lite", "PatchCore", "WideResNet50", "extra_mb"): 4 * 10_000 * 1792 / MIB,
    ("lite", "PatchCore", "WideResNet50", "mb"): _networks(_WIDE.parameters, 10_000 * 1792),
    ("lite", "PatchCore-Edge", "MobileNetV2", "backbone_mb"): _MOBILE_10,
    ("lite", "PatchCore-Edge", "MobileNetV2", "extra_mb"): 4 * 10_000 * 160 / MIB,
    ("lite", "PatchCore-Edge", "MobileNetV2", "mb"): _MOBILE_10 + 4 * 10_000 * 160 / MIB,
    ("lite", "PatchCore-Lite", "MobileNetV2", "backbone_mb"): _MOBILE_10,
    # codes stored as float32, and the searching library's own copy of them as bytes
    ("lite", "PatchCore-Lite", "MobileNetV2", "extra_mb"): (5 * _CODES + _CODEBOOKS) / MIB,
    ("lite", "PatchCore-Lite", "MobileNetV2", "mb"): _MOBILE_10 + (5 * _CODES + _CODEBOOKS) / MIB,
    ("lite", "PaDiM", "WideResNet50", "backbone_mb"): _networks(_WIDE.parameters),
    ("lite", "PaDiM", "WideResNet50", "extra_mb"): _COVARIANCES,
    ("lite", "PaDiM", "WideResNet50", "mb"): _networks(_WIDE.parameters) + _COVARIANCES,
    ("lite", "PaDiM-Edge", "MobileNetV2", "backbone_mb"): _NO_BACKBONE,
    ("lite", "PaDiM-Edge", "MobileNetV2", "extra_mb"): _NO_SIZE,
    ("lite", "PaDiM-Edge", "MobileNetV2", "mb"): _NO_SIZE,
    ("lite", "PaDiM-Lite", "MobileNetV2", "backbone_mb"): _NO_BACKBONE,
    ("lite", "PaDiM-Lite", "MobileNetV2", "extra_mb"): _NO_SIZE,
    ("lite", "PaDiM-Lite", "MobileNetV2", "mb"): _NO_SIZE,
    ("lite", "STFPM", "WideResNet50", "backbone_mb"): _networks(_WIDE.parameters),
    ("lite", "STFPM", "WideResNet50", "extra_mb"): _networks(_WIDE.parameters),
    ("lite", "STFPM", "WideResNet50", "mb"): _networks(2 * _WIDE.parameters),
    ("lite", "STFPM-Edge", "MobileNetV2", "backbone_mb"): _networks(_MOBILE.parameters),
    ("lite", "STFPM-Edge", "MobileNetV2", "extra_mb"): _networks(_MOBILE.parameters),
    ("lite", "STFPM-Edge", "MobileNetV2", "mb"): _networks(2 * _MOBILE.parameters),
    ("lite", "PaSTe", "MobileNetV2", "backbone_mb"): _networks(_MOBILE.parameters),
    ("lite", "PaSTe", "MobileNetV2", "extra_mb"): _networks(_tail(_MOBILE)[1]),
    ("lite", "PaSTe", "MobileNetV2", "mb"): _networks(_MOBILE.parameters, _tail(_MOBILE)[1]),
}  # fmt: skip


def size_table() -> list[dict[str, Any]]:
    """Every size and MAC count that the thesis and the Lite paper print, and the same by formula.

    Returns:
        Rows with ``source``, ``table``, ``system``, ``backbone``, ``metric`` (mb, backbone_mb, extra_mb or mmacs),
        ``published``, ``computed`` and ``deviation`` (None where no formula fits), and ``note``, why none does.
    """
    rows = []
    for figure in figures():
        if figure.source not in ("thesis", "lite") or figure.metric not in ("mb", "backbone_mb", "extra_mb", "mmacs"):
            continue
        computed = _COMPUTED[figure.source, figure.system, figure.backbone, figure.metric]
        value = computed if isinstance(computed, float) else None
        rows.append({
            "source": figure.source,
            "table": figure.table,
            "system": figure.system,
            "backbone": figure.backbone,
            "metric": figure.metric,
            "published": figure.value,
            "computed": value,
            "deviation": value / figure.value - 1 if value is not None and figure.value else None,
            "note": computed if isinstance(computed, str) else "",
        })  # fmt: skip
    return rows
