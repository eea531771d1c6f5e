"""Continual methods by name: what ``tinyvad bench continual`` and its grid file call them, and which settings each takes.

Flows in: a name, a ``Context`` and settings. Flows out: a method that has learnt nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinyvad.continual.base import Context, ContinualMethod
from tinyvad.continual.padim import Form, PadimFineTuning, PadimJoint, PadimMulti, PadimSeparate, PadimUni
from tinyvad.continual.padim_original import PadimOriginal
from tinyvad.errors import InputError

COMPACT_DIMENSIONS = 40  # the fewest at which compact PaDiM keeps its quality


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


_SELECT = {"select": "patch", "log_determinant": False}
_PADIM_TEXTS = {
    "uni": "one Gaussian a cell for all tasks, merged exactly",
    "multi": "a Gaussian a cell and task",
    "joint": "bound: fitted on all images of all tasks at once",
    "fine-tuning": "bound: the last task's model only",
    "separate": "bound: a batch detector a task",
}
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
}


def settings_of(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings of a method: what is given, defaults for the rest.

    Raises:
        InputError: no such method, or a setting that it does not take; ``where`` says whose it is.
    """
    if name not in METHODS:
        raise InputError(f"{where}: no continual method called {name!r}; there are {', '.join(METHODS)}")
    known = METHODS[name].settings
    for key in given:
        if key not in known:
            raise InputError(f"{where}: {name} takes no setting {key!r}; it takes {', '.join(known)}")
    return {**known, **given}


def make_method(name: str, context: Context, settings: Mapping[str, Any]) -> ContinualMethod:
    """A method that has learnt nothing yet; ``settings`` as ``settings_of`` gives them."""
    return METHODS[name].make(context, dict(settings))


def needs_one_step(name: str) -> bool:
    """True if distances between vectors count, so that all taps of its embedding must share one unit."""
    return name.startswith("patchcore")
