"""What a continual method costs: the papers' MB and GFLOPs by formula, and our own honest ones beside them.

Flows in: a network's counts and a method's sizes. Flows out: a ``Cost``, or the rows of ``tinyvad bench costs``.

The papers print figures without saying how they were counted. Every formula of the convention ``published`` was found by
trying until all figures of a table fitted; no constant of a network is fitted, all are counted from its layers (a test
counts them again). The paper's habits, which the honest conventions drop:

* PaDiM inverts every covariance at test time and is stored in float64 without the backbone, in MB of 10^6 bytes; all
  others are float32 in MiB with the backbone. PatchCoreCL++ runs the backbone twice. Fifteen tasks, for VisA's twelve too.
* 33 x 33 blur of every task's map as one dense kernel in PatchCore; PaDiM's and the others' is separable or left out.
* PaSTe's bytes: the student's tail and everybody's running statistics, not the teacher that it needs to score.
* Dinomaly: the unused head and last two blocks are stored; the softmax of attention costs nothing.

Honest: one pass of the backbone, inverses and norms worked out beforehand, separable blur, pooling and map included, all
that must be stored to score, and replayed images. ``float32``: 4 bytes a value. ``int8``: as docs/SPEC.md stores banks; a
network's weights take 1 byte each, its biases and scales 4.
1 MAC = 2 FLOPs, an addition alone is 1. Images are 224 x 224.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinyvad.continual.published import figures
from tinyvad.errors import InputError

CONVENTIONS = ("published", "float32", "int8")
SIDE = 224
POSITIONS = 56 * 56  # P: the grid of all first taps, at stride 4
REPLAY_BYTES = 3 * SIDE * SIDE  # of one stored image
DENSE_BLUR = 2 * 33 * 33 * SIDE * SIDE  # FLOPs
SEPARABLE_BLUR = 2 * 2 * 33 * SIDE * SIDE
UPSAMPLE = 2 * 2 * (56 * SIDE + SIDE * SIDE)  # bilinear, two passes of two taps: FLOPs
# FLOPs, fitted (as the 4 of PatchCore's 2 D + 4 is): close to 143 a pixel, a separable blur (132) and an interpolation
PADIM_MAP = 0.0072e9
MIB = 2**20


class Cost(NamedTuple):
    """``gflops`` of scoring one image; ``mb`` stored: the paper's own MB if published, else MiB."""

    gflops: float
    mb: float


@dataclass(frozen=True)
class Network:
    """Counts of a backbone cut after its last tap, for 224 x 224.

    Attributes:
        macs, parameters: of the convolutions; the parameters include batch norm's scale and offset.
        channels, norms: outputs of all batch norms, and how many there are: 2 running values a channel, one counter each.
        taps: (channels, side) of each tap; the embedding has D = the sum of channels, PatchCore's grid the largest side.
        padim_dims: channels that PaDiM keeps.
        trunk: the same counts of the part that PaSTe shares: (macs, parameters, channels, norms).
    """

    macs: int
    parameters: int
    channels: int
    norms: int
    taps: tuple[tuple[int, int], ...]
    padim_dims: int
    trunk: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def dims(self) -> int:
        return sum(channels for channels, _ in self.taps)

    @property
    def buffers(self) -> int:
        return 2 * self.channels + self.norms


# MobileNetV2 cut after features.14, MCUNet-in3 after block 14, PhiNet 1.2/0.5/6 after block 6, WideResNet50-2 after layer3
NETWORKS = {
    "MobileNet": Network(
        225_468_992, 697_792, 9376, 42, ((24, 56), (64, 14), (160, 7)), 62, (113_259_776, 55_488, 1760, 18)
    ),  # PaSTe shares features.0 to 6
    "MCUNet": Network(
        112_154_336, 231_064, 4648, 45, ((16, 56), (24, 28), (96, 7)), 34, (65_266_432, 22_632, 784, 18)
    ),  # blocks 0 to 5
    "PhiNet": Network(
        202_260_928, 137_035, 1848, 15, ((32, 56), (56, 28), (112, 14)), 50, (124_535_552, 27_659, 528, 6)
    ),  # blocks 1 to 3
    "WideResNet50": Network(9_186_623_488, 24_862_528, 19_776, 43, ((256, 56), (512, 28), (1024, 14)), 550),
}
# width, patch side, tokens with the class token, whether it is DeiT (a head) or DINOv2's ViT (layer scales, a mask token)
TRANSFORMERS = {"DeiT Tiny": (192, 16, 197, True), "ViT Base": (768, 14, 257, False)}


def network(name: str) -> Network:
    """Counts of a backbone by its name in the tables.

    Raises:
        InputError: not one of ``NETWORKS``.
    """
    if name not in NETWORKS:
        raise InputError(f"no counts of a backbone {name}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def padim(net: Network, tasks: int, convention: str, full: bool = True, multi: bool = True) -> Cost:
    """PaDiM-CL: ``full`` covariance or its diagonal (Lite), a Gaussian a task (``multi``) or one for all.

    Published: B + n P (d^3 + d^2) (Lite: 3 P d) + the map, 8 n P d (d + 1) bytes (Lite: 16 n P d), n = tasks or 1. Honest:
    d (d + 1) / 2 MACs for the whitened difference, d for its length (Lite: 2 d); ``int8`` is the bank's PADF or PADM.
    """
    d, n = net.padim_dims, tasks if multi else 1
    if _is_published(convention):
        values = d * (d + 1) if full else 2 * d
        flops = POSITIONS * (d**3 + d**2 if full else 3 * d) + PADIM_MAP
        return Cost((2 * net.macs + n * flops) / 1e9, 8 * n * POSITIONS * values / 1e6)
    flops = n * POSITIONS * (d + (d * (d + 1) if full else 2 * d) + 2 * d)
    if convention == "int8":  # mean, codes of one or two scales, factor; tables of 256 values of 4 bytes
        stored = POSITIONS * (3 * d + d * (d - 1) // 2 if full else 2 * d) + (2048 if full else 1024)
    else:
        stored = 4 * POSITIONS * (d + (d * (d + 1) // 2 if full else d))
    return _honest(net, convention, flops, n * stored)


def patchcore(net: Network, tasks: int, vectors: int, convention: str, plus: bool = False) -> Cost:
    """PatchCoreCL, every bank searched, or CL++ (``plus``), one bank by its prototype; floor(vectors / tasks) a bank.

    Published: B + T dense blurs + P M (2 D + 4); CL++: 2 B + one blur + P floor(M / T) (2 D + 4); backbone + 4 M D bytes.
    """
    bank = vectors // tasks
    kept = tasks * bank
    searched = bank if plus else kept
    if _is_published(convention):
        passes, blurs = (2, 1) if plus else (1, tasks)
        flops = 2 * passes * net.macs + blurs * DENSE_BLUR + POSITIONS * searched * (2 * net.dims + 4)
        return Cost(flops / 1e9, 4 * (net.parameters + kept * net.dims) / MIB)
    flops = _pooling(net) + POSITIONS * searched * (2 * net.dims + 2)
    prototypes = 4 * tasks * net.taps[-1][0] if plus else 0
    if plus:
        flops += net.taps[-1][0] * (net.taps[-1][1] ** 2 + 3 * tasks)
    stored = kept * net.dims if convention == "int8" else 4 * kept * (net.dims + 1)
    return _honest(net, convention, flops, stored + prototypes)


def cfa(net: Network, replay: int, convention: str) -> Cost:
    """CFA with replayed images: a 1x1 layer over D + 2 channels, one bank of P centres for all tasks.

    Published: B + 2 P (D + 2) D + 2 P^2 D; backbone + bank + the layer + a layer of the same kind that is never used.
    """
    d = net.dims
    flops = 2 * POSITIONS * (d + 2) * d + 2 * POSITIONS * POSITIONS * d
    if _is_published(convention):
        values = net.parameters + POSITIONS * d + (d + 2) * d + d + d * d + d
        return Cost((2 * net.macs + flops) / 1e9, (4 * values + replay * REPLAY_BYTES) / MIB)
    stored = POSITIONS * d * (1 if convention == "int8" else 4) + _dense(d + 2, d, convention)
    return _honest(net, convention, flops + _pooling(net), stored, replay)


def simplenet(net: Network, replay: int, convention: str) -> Cost:
    """SimpleNet with replayed images: D -> D, D -> h, h -> 1 with h = floor(D / 1.5).

    Published: B + 2 P (D^2 + D h + h) + a dense blur; backbone + layers + the batch norm between them.
    """
    d = net.dims
    hidden = int(d / 1.5)
    flops = 2 * POSITIONS * (d * d + d * hidden + hidden)
    if _is_published(convention):
        values = net.parameters + d * d + d + d * hidden + hidden + 3 * hidden
        total = 2 * net.macs + flops + DENSE_BLUR
        return Cost(total / 1e9, (4 * values + replay * REPLAY_BYTES) / MIB)
    stored = sum(_dense(*layer, convention) for layer in ((d, d), (d, hidden), (hidden, 1)))
    return _honest(net, convention, flops + _pooling(net), stored, replay)


def stfpm(net: Network, replay: int, convention: str, shared: bool = False) -> Cost:
    """STFPM with replayed images, a teacher and a student; ``shared``: PaSTe, whose student is the tail behind a trunk.

    Published: 2 (MACs of both); STFPM's bytes count both networks with their running statistics, PaSTe's the tail alone and
    the statistics of both.
    """
    macs, parameters, channels, norms = net.trunk if shared else (0, 0, 0, 0)
    tail = (net.macs - macs, net.parameters - parameters, net.channels - channels)
    if _is_published(convention):
        tail_values = tail[1] + 2 * tail[2] + net.norms - norms
        values = tail_values + net.buffers + (0 if shared else net.parameters)
        return Cost(2 * (net.macs + tail[0]) / 1e9, (4 * values + replay * REPLAY_BYTES) / MIB)
    # a tap: lengths of both vectors and their product, a root and a quotient a position; enlarged, then multiplied
    flops = 2 * tail[0] + sum(side * side * (6 * width + 4) for width, side in net.taps) + 3 * (UPSAMPLE + SIDE * SIDE)
    return _honest(net, convention, flops, _folded(tail[1], tail[2], convention), replay, blur=False)


def dinomaly(name: str, replay: int, convention: str) -> Cost:
    """Dinomaly with replayed images, of ``TRANSFORMERS``: 10 of 12 blocks read, a bottleneck, 8 decoder blocks.

    Published: 10 * 24 d^2 N + 8 (24 d^2 N + 4 * 64 N d) + 16 d^2 N + patches; all 12 blocks and DeiT's head are stored.
    Honest: with 4 N^2 d a block for the encoder's attention, without what is never used.
    """
    if name not in TRANSFORMERS:
        raise InputError(f"no counts of a transformer {name}; there are {', '.join(TRANSFORMERS)}")
    d, patch, tokens, is_deit = TRANSFORMERS[name]
    flops = 18 * 24 * d * d * tokens + 8 * 4 * tokens * d * 64 + 16 * d * d * tokens
    flops += 2 * 3 * patch * patch * d * (tokens - 1)
    embedding, block, bottleneck = (3 * patch * patch * d, (1 + 1 + tokens) * d), (12 * d * d, 13 * d), (8 * d * d, 5 * d)
    if _is_published(convention):
        # DeiT: a head of 1000 classes; ViT: two layer scales a block and a mask token
        unused = 1000 * d + 1000 if is_deit else 12 * 2 * d + d
        values = sum(embedding) + 20 * sum(block) + 2 * d + unused + sum(bottleneck)
        return Cost(flops / 1e9, (4 * values + replay * REPLAY_BYTES) / MIB)
    layer_scales = 0 if is_deit else 10 * 2 * d
    matrices = embedding[0] + 18 * block[0] + bottleneck[0]
    vectors = embedding[1] + 18 * block[1] + bottleneck[1] + layer_scales
    side = math.isqrt(tokens - 1)
    flops += 10 * 4 * tokens * tokens * d + side * side * 6 * d + UPSAMPLE
    stored = matrices * (1 if convention == "int8" else 4) + 4 * vectors + replay * REPLAY_BYTES
    return Cost(flops / 1e9, stored / MIB)


def system_cost(system: str, backbone: str, convention: str, tasks: int = 15) -> Cost:
    """The cost of a system by its name in the edge benchmark's table, such as "PaDiM Lite cl multi" or "CFA cl 40".

    Args:
        backbone: of ``NETWORKS``, or of ``TRANSFORMERS`` for Dinomaly.
        convention: 'published', 'float32' or 'int8'.
        tasks: products learnt.

    Raises:
        InputError: an unknown system, backbone or convention.
    """
    family, _, variant = system.replace(" cl ", " ").replace(" clpp ", "++ ").rpartition(" ")
    if family in ("PaDiM", "PaDiM Lite") and variant in ("uni", "multi"):
        return padim(network(backbone), tasks, convention, full=family == "PaDiM", multi=variant == "multi")
    if family in ("PatchCore", "PatchCore++") and variant in ("10k", "30k"):
        return patchcore(network(backbone), tasks, 1000 * int(variant[:-1]), convention, plus=family == "PatchCore++")
    if variant.isdigit():  # replayed images
        if family in ("CFA", "SimpleNet"):
            return (cfa if family == "CFA" else simplenet)(network(backbone), int(variant), convention)
        if family in ("STFPM", "paSTe"):
            return stfpm(network(backbone), int(variant), convention, shared=family == "paSTe")
        if family == "Dinomaly":
            return dinomaly(backbone, int(variant), convention)
    raise InputError(f"no cost formula for {system!r}; a system is named as in the table of `tinyvad bench costs`")


def cost_table(dataset: str = "MVTec AD") -> list[dict[str, Any]]:
    """Every row of the edge benchmark for ``dataset``: printed figures, ours by formula, and the honest ones.

    Args:
        dataset: 'MVTec AD' (15 tasks) or 'VisA' (12 tasks; the paper printed the costs of 15).

    Returns:
        Rows with ``system``, ``backbone``; ``published_gflops``, ``computed_gflops``, ``gflops_deviation`` and the same of
        ``mb`` (deviation: computed / published - 1); ``float32_mib``, ``int8_mib`` and ``gmacs``, the honest ones.
    """
    tasks = {"MVTec AD": 15, "VisA": 12}.get(dataset)
    if tasks is None:
        raise InputError(f"no published costs for {dataset!r}; choose 'MVTec AD' or 'VisA'")
    rows = []
    for figure in figures(source="edge", dataset=dataset, metric="gflops"):
        mb = figures(source="edge", dataset=dataset, metric="mb", system=figure.system, backbone=figure.backbone)[0]
        computed = system_cost(figure.system, figure.backbone, "published")
        honest = {name: system_cost(figure.system, figure.backbone, name, tasks) for name in CONVENTIONS[1:]}
        rows.append({
            "system": figure.system,
            "backbone": figure.backbone,
            "published_gflops": figure.value,
            "computed_gflops": computed.gflops,
            "gflops_deviation": computed.gflops / figure.value - 1,
            "published_mb": mb.value,
            "computed_mb": computed.mb,
            "mb_deviation": computed.mb / mb.value - 1,
            "gmacs": honest["float32"].gflops / 2,
            "float32_mib": honest["float32"].mb,
            "int8_mib": honest["int8"].mb,
        })  # fmt: skip
    return rows


def _is_published(convention: str) -> bool:
    if convention not in CONVENTIONS:
        raise InputError(f"convention is {convention!r}, must be one of {', '.join(CONVENTIONS)}")
    return convention == "published"


def _folded(parameters: int, channels: int, convention: str) -> int:
    """Bytes of convolutions with folded batch norms: weights, and a bias (int8: and a float32 scale) a channel."""
    weights = parameters - 2 * channels
    return weights + 8 * channels if convention == "int8" else 4 * (weights + channels)


def _dense(inputs: int, outputs: int, convention: str) -> int:
    """Bytes of one dense layer."""
    return inputs * outputs + 8 * outputs if convention == "int8" else 4 * (inputs + 1) * outputs


def _pooling(net: Network) -> int:
    """FLOPs of the 3x3 mean of every tap: two passes of two additions, and a multiplication."""
    return sum(5 * width * side * side for width, side in net.taps)


def _honest(net: Network, convention: str, flops: int, stored: int, replay: int = 0, blur: bool = True) -> Cost:
    """The backbone once, the method, its map; the backbone's bytes, the method's, the replayed images."""
    finish = UPSAMPLE + SEPARABLE_BLUR if blur else 0
    total = _folded(net.parameters, net.channels, convention) + stored + replay * REPLAY_BYTES
    return Cost((2 * net.macs + flops + finish) / 1e9, total / MIB)
