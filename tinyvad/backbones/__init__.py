"""The backbones that tinyvad can build by name: ``BACKBONES[name].build(input_size=...)`` gives a Graph.

``filter-bank`` holds its weights. The others are definitions with placeholders, to count and to plan with; some have
weights of ours (``tinyvad.backbones.cards``), all can take those of a file (``tinyvad.backbones.source``). Any other
network is used by importing its file as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tinyvad.backbones import cards, filter_bank, mcunet, mobilenet_v2, mobilenet_v3, phinet
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneInfo:
    """What there is to know about a backbone before it is built.

    Attributes:
        name: what ``--backbone`` takes.
        build: ``build(input_size=...)`` -> Graph without classifier.
        input_size: pixels, the published resolution.
        layers: the default taps, the last block ends at strides 4, 8 and 16 (MobileNetV3-small: 8 and 16).
        mean, std: RGB, of pixels in [0, 1]; the network sees (pixel - mean) / std.
        parameters, mmacs: published figures at ``input_size``, ImageNet head included (10^6 multiply-accumulates).
        source: where weights, figures or formulas come from.
        built_in: ``build`` gives the network's values too.
    """

    name: str
    build: Callable[..., Graph]
    input_size: int
    layers: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    mmacs: float
    source: str
    built_in: bool = False

    @property
    def weights(self) -> str:
        """"built in", "trained" (tinyvad brings along weights of its own) or "none"."""
        if self.built_in:
            return "built in"
        return "trained" if cards.has_weights(self.name) else "none"


def _mcunet(net: str, *layers: str) -> BackboneInfo:
    published = mcunet.table()[net]
    return BackboneInfo(
        name=f"mcunet-{net}",
        build=partial(mcunet.build, net),
        input_size=published["resolution"],
        layers=layers,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        parameters=published["parameters"],
        mmacs=published["mmacs"],
        source="MCUNet (NeurIPS 2020), github.com/mit-han-lab/mcunet",
    )


def _mobilenet_v3(variant: str, parameters: int, mmacs: float, *layers: str) -> BackboneInfo:
    return BackboneInfo(
        name=f"mobilenet-v3-{variant}",
        build=partial(mobilenet_v3.build, variant),
        input_size=224,
        layers=layers,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        parameters=parameters,
        mmacs=mmacs,
        source="MobileNetV3 (ICCV 2019), torchvision",
    )


BACKBONES: dict[str, BackboneInfo] = {
    "filter-bank": BackboneInfo(
        name="filter-bank",
        build=filter_bank.build,
        input_size=128,
        layers=("block1", "block2", "block3"),
        mean=filter_bank.MEAN,
        std=filter_bank.STD,
        parameters=9_525,
        mmacs=14.299,
        source="closed form: steerable Gaussian derivatives, scattering (tinyvad/backbones/filter_bank.py); no head",
        built_in=True,
    ),
    "mcunet-in0": _mcunet("in0", "block3", "block6", "block11"),
    "mcunet-in1": _mcunet("in1", "block2", "block4", "block9"),
    "mcunet-in2": _mcunet("in2", "block4", "block7", "block12"),
    "mcunet-in3": _mcunet("in3", "block4", "block7", "block13"),
    "mcunet-in4": _mcunet("in4", "block3", "block6", "block12"),
    "mobilenet-v2": BackboneInfo(
        name="mobilenet-v2",
        build=partial(mobilenet_v2.build, 1.0),
        input_size=224,
        layers=("features.3", "features.6", "features.13"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        parameters=3_504_872,
        mmacs=300.774,
        source="MobileNetV2 (CVPR 2018), torchvision",
    ),
    "mobilenet-v2-0.35": BackboneInfo(
        name="mobilenet-v2-0.35",
        build=partial(mobilenet_v2.build, 0.35, head_channels=448),
        input_size=144,
        layers=("features.3", "features.6", "features.13"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        parameters=750_280,
        mmacs=23.499,
        source="MobileNetV2 (CVPR 2018), baseline mbv2-w0.35 of github.com/mit-han-lab/mcunet (448 head channels)",
    ),
    # not features.1: the small network has a single block at stride 4, whose maps explain only 37 % of the teacher's there,
    # and which costs the deeper ones of their quality where it is trained as a tap, too
    "mobilenet-v3-small": _mobilenet_v3("small", 2_542_856, 56.510, "features.3", "features.8"),
    "mobilenet-v3-large": _mobilenet_v3("large", 5_483_032, 216.590, "features.3", "features.6", "features.12"),
    "phinet-1.2-0.5-6": BackboneInfo(
        name="phinet-1.2-0.5-6",
        build=partial(
            phinet.build,
            alpha=1.2,
            beta=0.5,
            t_zero=6,
            downsampling_layers=(4, 5, 7),
            name="phinet-1.2-0.5-6",
        ),
        input_size=224,
        layers=("block4", "block5", "block6"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        parameters=2_074_035,
        mmacs=249.290,
        source="PhiNets (ACM TECS 2022), github.com/micromind-toolkit/micromind",
    ),
    "phinet-mcu": BackboneInfo(
        name="phinet-mcu",
        build=phinet.build_mcu,
        input_size=144,
        layers=("block4", "block7", "block11"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        parameters=160_008,
        mmacs=21.297,
        source="PhiNets (ACM TECS 2022), our own sizes for 200 KB of arena (tinyvad/backbones/phinet.py)",
    ),
}


def list_backbones() -> list[BackboneInfo]:
    """All backbones, the one with built-in weights first."""
    return list(BACKBONES.values())


def get_backbone(name: str) -> BackboneInfo:
    """The backbone of that name; underscores count as hyphens.

    Raises:
        InputError: there is none (the names that there are, are listed).
    """
    key = name.replace("_", "-")
    if key not in BACKBONES:
        raise InputError(
            f"no backbone called {name}; choose one of {', '.join(BACKBONES)}, or give a .onnx or .tflite file"
        )
    return BACKBONES[key]
