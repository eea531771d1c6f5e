"""Continual methods by name: what ``tinyvad bench continual`` and its grid file call them, and which settings each takes.

Flows in: a name, a ``Context`` and settings. Flows out: a method that has learnt nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyvad.continual.base import Context, ContinualMethod
from tinyvad.continual.online import OnlinePatchCore
from tinyvad.continual.padim import Form, PadimMulti, PadimSeparate, PadimUni
from tinyvad.continual.padim_bounds import PadimFineTuning, PadimJoint
from tinyvad.continual.padim_original import PadimOriginal
from tinyvad.continual.patchcore import (
    Budget,
    Codes,
    PatchCoreCL,
    PatchCoreFineTune,
    PatchCoreJoint,
    PatchCorePlus,
    PatchCoreSeparate,
)
from tinyvad.continual.replay import COMPOSITIONS
from tinyvad.continual.trained import TrainedMethod
from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.product_quantizer import fit_quantizer
from tinyvad.detectors.task_memory import draw_candidates
from tinyvad.errors import InputError
from tinyvad.project import TRAINED, parse_bytes

COMPACT_DIMENSIONS = 40  # the fewest at which compact PaDiM keeps its quality
ROWS = 1000  # of a memory bank, all tasks together
CODEBOOK_CANDIDATES = 50_000  # patch vectors
REPLAYED = 100  # items, all tasks together: the thesis and the edge benchmark


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        text: what it is, one line.
        settings: those it takes, with the default of each.
        make: (context, all settings) -> the method.
    """

    text: str
    settings: Mapping[str, Any]
    make: Callable[[Context, dict[str, Any]], ContinualMethod]


def _padim(form: str, kind: Callable[..., ContinualMethod], text: str, **more: Any) -> Entry:
    """An entry of the PaDiM family; ``more``: settings beyond those of the form."""

    def make(context: Context, settings: dict[str, Any]) -> ContinualMethod:
        own = {name: settings[name] for name in more}
        return kind(context, Form(form, settings["dimensions"], settings["bits"]), **own)

    shared = {"dimensions": COMPACT_DIMENSIONS if form == "padim-compact" else None, "bits": None}
    return Entry(text, {**shared, **more}, make)


def _patchcore(kind: Callable[..., ContinualMethod], text: str, lite: bool = False, **more: Any) -> Entry:
    """An entry of the PatchCore family; ``rows`` or ``budget`` (bytes, such as "256K") is of all tasks together."""

    def make(context: Context, settings: dict[str, Any]) -> ContinualMethod:
        codes = Codes(_subspaces(context, settings), settings["bits"], settings["codebooks"]) if lite else None
        own = {name: settings[name] for name in more}
        return kind(context, _budget(settings), codes, max_candidates=settings["max_candidates"], **own)

    codes = {"subspaces": None, "bits": 4, "codebooks": "own"} if lite else {}
    return Entry(text, {"rows": None, "budget": None, "max_candidates": 50_000, **codes, **more}, make)


def _subspaces(context: Context, settings: Mapping[str, Any]) -> int:
    """As set, or of two channels each."""
    return settings["subspaces"] or len(context.steps) // 2


def _budget(settings: Mapping[str, Any]) -> Budget:
    rows, nbytes = settings["rows"], settings["budget"]
    if nbytes is not None:
        return Budget(rows, parse_bytes(nbytes, "setting budget"))
    return Budget(ROWS if rows is None else rows)


class _CodedOnline(OnlinePatchCore):
    """Online PatchCore whose codebooks come from the first task."""

    def __init__(self, context: Context, subspaces: int, bits: int, **settings: Any) -> None:
        super().__init__(context, **settings)
        self.subspaces, self.bits = subspaces, bits

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        if self.quantizer is None:
            candidates, _ = draw_candidates(embeddings, CODEBOOK_CANDIDATES, self.context.seed)
            bank = candidates[farthest_first(candidates, min(len(candidates), self.capacity or ROWS), 0).order]
            rng = np.random.default_rng(self.context.seed)
            self.quantizer = fit_quantizer(bank, self.subspaces, self.bits, rng, candidates)
        super().learn(task, embeddings)


def _online(text: str, lite: bool = False) -> Entry:
    def make(context: Context, settings: dict[str, Any]) -> ContinualMethod:
        settings = {"capacity": settings.pop("rows"), **settings}
        if not lite:
            return OnlinePatchCore(context, **settings)
        return _CodedOnline(context, **{**settings, "subspaces": _subspaces(context, settings)})

    codes = {"subspaces": None, "bits": 4} if lite else {}
    rule = {"when_full": "merge", "tau": 0.0, "per_image": None, "gate": None, "per_task": False, "auto_points": 25}
    return Entry(text, {"rows": ROWS, **rule, **codes}, make)


def _trained(detector: str, way: str) -> Entry:
    """A detector that is trained, and how it is kept from forgetting."""

    def make(context: Context, settings: dict[str, Any]) -> ContinualMethod:
        return TrainedMethod(context, detector, way, settings)

    recipe = dict.fromkeys(("epochs", "batch", "learning_rate", "patience", "held_out", "images"))
    shared = {"shared": None} if detector == "paste" else {}
    return Entry(_WAYS[way][0], {**recipe, **shared, **_WAYS[way][1]}, make)


# Strengths: the largest power of ten at which the springs of six tasks, as stiff as they get in PaSTe, let the steps of its
# recipe (rate 0.4, momentum 0.9) settle: rate * stiffness below 2 * (1 + momentum). MAS sums over all cells of all maps.
_REPLAY = {"size": REPLAYED, "mode": COMPOSITIONS[0]}
_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning": ("bound: trained on each task alone", {}),
    "joint": ("bound: trained anew on the images of all tasks", {}),
    "replay": ("some images of every task are trained on again", _REPLAY),
    "compressed-replay": ("some of the frozen trunk's maps are trained on again", {**_REPLAY, "form": "float32"}),
    "ewc": ("parameters are held by the Fisher information of old tasks", {"strength": 100.0, "decay": 1.0}),
    "si": ("parameters are held by what they did for old tasks' losses", {"strength": 0.1}),
    "mas": ("parameters are held by how much outputs depend on them", {"strength": 1e-4}),
    "lwf": ("outputs are held near the old network's", {"strength": 1.0}),
}
_SELECT = {"select": "patch", "log_determinant": False}
_PADIM_TEXTS = {
    "uni": "one Gaussian a cell for all tasks, merged exactly",
    "multi": "a Gaussian a cell and task",
    "joint": "bound: fitted on all images of all tasks at once",
    "fine-tuning": "bound: the last task's model only",
    "separate": "bound: a batch detector a task",
}
_BANKS = {
    "cl": "banks of M / c rows selected anew, the lowest image score chooses",
    "cl-mean-nn": "the same banks, the lowest mean distance chooses",
    "cl++": "banks cut to their first M / c rows, the nearest prototype chooses",
    "joint": "bound: one coreset of all tasks' patches, which are kept",
    "fine-tuning": "bound: the last task's bank only",
    "separate": "bound: M / T rows a task from the beginning",
    "online": "one image at a time into one bank, incremental k-center",
}
_CODED = ", product-quantised"
METHODS: dict[str, Entry] = {
    "padim-original": _padim("padim", PadimOriginal, "the published running mean, biased", of="inverse"),
    "padim-uni": _padim("padim", PadimUni, _PADIM_TEXTS["uni"]),
    "padim-multi": _padim("padim", PadimMulti, _PADIM_TEXTS["multi"], **_SELECT),
    "padim-joint": _padim("padim", PadimJoint, _PADIM_TEXTS["joint"]),
    "padim-fine-tuning": _padim("padim", PadimFineTuning, _PADIM_TEXTS["fine-tuning"]),
    "padim-separate": _padim("padim", PadimSeparate, _PADIM_TEXTS["separate"]),
    "padim-lite-original": _padim("padim-lite", PadimOriginal, "its running mean of variances, biased", of="inverse"),
    "padim-lite-uni": _padim("padim-lite", PadimUni, _PADIM_TEXTS["uni"]),
    "padim-lite-multi": _padim("padim-lite", PadimMulti, _PADIM_TEXTS["multi"], **_SELECT),
    "padim-lite-joint": _padim("padim-lite", PadimJoint, _PADIM_TEXTS["joint"]),
    "padim-lite-fine-tuning": _padim("padim-lite", PadimFineTuning, _PADIM_TEXTS["fine-tuning"]),
    "padim-lite-separate": _padim("padim-lite", PadimSeparate, _PADIM_TEXTS["separate"]),
    "padim-compact-uni": _padim("padim-compact", PadimUni, _PADIM_TEXTS["uni"]),
    "padim-compact-multi": _padim("padim-compact", PadimMulti, _PADIM_TEXTS["multi"], **_SELECT),
    "padim-compact-joint": _padim("padim-compact", PadimJoint, _PADIM_TEXTS["joint"]),
    "padim-compact-fine-tuning": _padim("padim-compact", PadimFineTuning, _PADIM_TEXTS["fine-tuning"]),
    "padim-compact-separate": _padim("padim-compact", PadimSeparate, _PADIM_TEXTS["separate"]),
    "patchcore-cl": _patchcore(PatchCoreCL, _BANKS["cl"], route="score", start="fixed"),
    "patchcore-cl-mean-nn": _patchcore(PatchCoreCL, _BANKS["cl-mean-nn"], route="mean_nn", start="fixed"),
    "patchcore-cl++": _patchcore(PatchCorePlus, _BANKS["cl++"], route="prototype"),
    "patchcore-joint": _patchcore(PatchCoreJoint, _BANKS["joint"]),
    "patchcore-fine-tuning": _patchcore(PatchCoreFineTune, _BANKS["fine-tuning"]),
    "patchcore-separate": _patchcore(PatchCoreSeparate, _BANKS["separate"], route="prototype"),
    "patchcore-online": _online(_BANKS["online"]),
    "patchcore-lite-cl": _patchcore(PatchCoreCL, _BANKS["cl"] + _CODED, True, route="score", start="fixed"),
    "patchcore-lite-cl-mean-nn": _patchcore(
        PatchCoreCL, _BANKS["cl-mean-nn"] + _CODED, True, route="mean_nn", start="fixed"
    ),
    "patchcore-lite-cl++": _patchcore(PatchCorePlus, _BANKS["cl++"] + _CODED, True, route="prototype"),
    "patchcore-lite-joint": _patchcore(PatchCoreJoint, _BANKS["joint"] + _CODED, True),
    "patchcore-lite-fine-tuning": _patchcore(PatchCoreFineTune, _BANKS["fine-tuning"] + _CODED, True),
    "patchcore-lite-separate": _patchcore(PatchCoreSeparate, _BANKS["separate"] + _CODED, True, route="prototype"),
    "patchcore-lite-online": _online(_BANKS["online"] + _CODED, True),
    **{f"{detector}-{way}": _trained(detector, way) for detector in TRAINED for way in _WAYS},
}


_NUMBER, _REAL, _TEXT = (int,), (int, float), (str,)
KINDS: dict[str, tuple[type, ...]] = {
    "dimensions": _NUMBER, "bits": _NUMBER, "rows": _NUMBER, "max_candidates": _NUMBER, "subspaces": _NUMBER,
    "per_image": _NUMBER, "auto_points": _NUMBER, "budget": (int, str), "tau": (int, float, str), "select": _TEXT,
    "of": _TEXT, "route": _TEXT, "start": _TEXT, "codebooks": _TEXT, "when_full": _TEXT, "gate": _TEXT,
    "log_determinant": (bool,), "per_task": (bool,), "epochs": _NUMBER, "batch": _NUMBER, "learning_rate": _REAL,
    "patience": _NUMBER, "held_out": _REAL, "images": _NUMBER, "shared": _TEXT, "size": _NUMBER, "mode": _TEXT,
    "form": _TEXT, "strength": _REAL, "decay": _REAL,
}  # fmt: skip
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def settings_of(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings of a method: what is given, defaults for the rest.

    Raises:
        InputError: no such method, a setting that it does not take or of another type; ``where`` says whose it is.
    """
    if name not in METHODS:
        raise InputError(f"{where}: no continual method called {name!r}; there are {', '.join(METHODS)}")
    known = METHODS[name].settings
    for key in given:
        if key not in known:
            raise InputError(f"{where}: {name} takes no setting {key!r}; it takes {', '.join(known)}")
        kinds, value = KINDS[key], given[key]
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,)):
            raise InputError(f"{where}: {key} is {value!r}; expected {' or '.join(_WORDS[kind] for kind in kinds)}")
    return {**known, **given}


def make_method(name: str, context: Context, settings: Mapping[str, Any]) -> ContinualMethod:
    """A method that has learnt nothing yet; ``settings`` as ``settings_of`` gives them."""
    return METHODS[name].make(context, dict(settings))


def is_trained(name: str) -> bool:
    """True if it learns from float maps and images (``TaskItems``), not from int8 embeddings."""
    return name.partition("-")[0] in TRAINED


def needs_one_step(name: str) -> bool:
    """True if distances between vectors count, so that all taps of its embedding must share one unit."""
    return name.startswith("patchcore")
