"""Which network at which input size a build takes: settings, a target and good images in, a ``Choice`` out that says why.

The rule, which never looks at a defect:

1. Network (``--backbone auto``, the default). Candidates are the filter bank and every network that tinyvad brings trained
   weights for. Out are those whose memory plan fits the target's RAM only with less than ``MIN_AUTO_SIZE`` pixels, that
   would take longer than ``max_ms`` even there (estimated; not set: a second, doubled until something fits), or whose
   weights leave no room for any bank in flash. Among the rest the highest feature quality wins, at equal quality the least
   flash. Feature quality is on the network's card: the share of a large network's features that can be read linearly off
   its taps. Where nothing is left, the candidates are tried again cut after the last tap but one. Where nothing is left
   then, the one with the largest input is taken.
2. Input size. Sizes that fit RAM and time are tried on the good images: how well do held-out ones score below copies with a
   made-up defect (``tinyvad.probing``)? The smallest size within ``TOLERANCE`` of the best is taken: more pixels that show
   nothing more only cost memory and time. Below ``probing.FEWEST_IMAGES`` images the largest size that fits is taken.
3. Method, grid and bank follow in ``tinyvad.fitting``, under what this leaves of the flash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tinyvad import fitting, fitting_trained
from tinyvad.backbones.source import (
    AUTO,
    DEFAULT_BACKBONE,
    Backbone,
    auto_candidates,
    check_auto,
    open_backbone,
)
from tinyvad.errors import CheckFailed, TinyvadError
from tinyvad.firmware_sim.targets import Target, list_targets
from tinyvad.probing import Probe
from tinyvad.project import Project
from tinyvad.sizing import SIZES, Trial, bank_in_flash

MIN_AUTO_SIZE = 96  # pixels: below, small defects are gone before any network sees them
DEFAULT_MAX_MS = 1000
LONGEST_MS = 64_000
PROBE_STEP = 32  # pixels between the sizes that are tried on images
TOLERANCE = 0.005  # of the probe's AUROC: what a smaller input may cost


@dataclass(frozen=True)
class Candidate:
    """A network that ``auto`` looked at.

    Attributes:
        quality: of its card.
        image_size: the largest that fits, pixels; None if no size does, or if none was tried.
        arena_bytes: planned at that size (at the smallest that is tried where none fits). None without a target.
        flash_bytes: planned, all of the flash with its bank. None without a target, and where no bank was planned.
        ms: estimated time at that size, None where it is not known.
        why_not: one line, "" for the one that was chosen by the rule.
        chosen: True for one.
    """

    name: str
    quality: float
    image_size: int | None
    arena_bytes: int | None = None
    flash_bytes: int | None = None
    ms: float | None = None
    why_not: str = ""
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SizeTried:
    """An input size that was tried on the good images: the probe's AUROC, arena and time (None where not known)."""

    image_size: int
    probe_auroc: float
    arena_bytes: int | None
    ms: float | None
    chosen: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """A network, its input size in pixels, and what was tried (nothing where the user decided)."""

    backbone: Backbone
    size: int
    tried: tuple[Candidate, ...] = ()
    sizes: tuple[SizeTried, ...] = ()


Tell = Callable[[str, int, int], None]  # stage, done, total


class Chooser:
    """Chooses for one target; plans that several categories share are made once.

    Args:
        n_good: number of good images, on which the size of a bank depends.

    Raises:
        InputError: a wrong backbone, layers or weights (see ``open_backbone``).
        CheckFailed: no size fits: region, number, limit and a remedy that works.
    """

    def __init__(self, project: Project, target: Target | None, n_good: int, tell: Tell | None = None) -> None:
        self.project, self.target, self.n_good = project, target, n_good
        self.tell = tell or (lambda stage, done, total: None)
        self._trials: dict[tuple[str, tuple[str, ...], int], Trial] = {}
        self.tried: tuple[Candidate, ...] = ()
        self.max_ms = float(project.max_ms or DEFAULT_MAX_MS)
        self.backbone = self._choose_backbone()
        while project.max_ms is None and not self._settled() and self.max_ms < LONGEST_MS:
            self.max_ms *= 2
            self.backbone = self._choose_backbone()
        self.largest = project.image_size or self._largest(self.backbone)
        if self.largest is None or (target is not None and self.trial(self.backbone, self.largest).ram.problems):
            self._refuse()
        if project.max_ms is not None and project.image_size is not None:
            slow = self.trial(self.backbone, project.image_size).too_slow(project.max_ms)
            if slow:
                raise CheckFailed(f"{self.backbone.name} at {project.image_size} px: {slow}: use a smaller --image-size")

    def _settled(self) -> bool:
        """True if more time would not help: a network passed the rule, or a network by name has a size."""
        if self.tried:
            return any(one.chosen and not one.why_not for one in self.tried)
        return self.project.image_size is not None or self._largest(self.backbone) is not None

    def trial(self, backbone: Backbone, size: int) -> Trial:
        key = (backbone.name, backbone.layers, size)
        if key not in self._trials:
            self._trials[key] = Trial(fitting_trained.outlined(backbone, self.project), size, self.project, self.target)
        return self._trials[key]

    def choose(self, probe: Callable[[], Probe] | None = None) -> Choice:
        """The choice for one category; ``probe`` makes its good images ready, None takes the largest size that fits."""
        assert self.largest is not None
        if probe is None or self.project.image_size is not None:
            return Choice(self.backbone, self.largest, self.tried)
        sizes = [s for s in range(self.largest, MIN_AUTO_SIZE - 1, -PROBE_STEP) if self._fits(self.backbone, s)]
        if len(sizes) < 2:
            return Choice(self.backbone, self.largest, self.tried)
        images, scores = probe(), {}
        for n, size in enumerate(sizes):
            scores[size] = images.score(self.backbone, size)
            self.tell("try sizes", n + 1, len(sizes))
        best = max(scores.values())
        size = min(s for s in sizes if scores[s] >= best - TOLERANCE)
        return Choice(self.backbone, size, self.tried, tuple(self._size_tried(s, scores[s], s == size) for s in sizes))

    def _size_tried(self, size: int, score: float, chosen: bool) -> SizeTried:
        trial = self.trial(self.backbone, size)
        arena = None if self.target is None else trial.arena_bytes
        return SizeTried(size, round(score, 4), arena, trial.milliseconds, chosen)

    # --- networks

    def _choose_backbone(self) -> Backbone:
        project, spec = self.project, self.project.backbone or DEFAULT_BACKBONE
        if spec != AUTO:
            layers = list(project.layers) if project.layers else None
            return open_backbone(spec, layers, project.weights, project.mean, project.std)
        check_auto(project.layers, project.weights, project.mean, project.std)
        backbones = [open_backbone(name) for name in auto_candidates()]  # the highest quality first
        tried = self._candidates(backbones)
        if all(one.why_not for one in tried):
            cut = [open_backbone(b.name, list(b.layers[:-1])) for b in backbones if len(b.layers) > 1]
            backbones, tried = [*backbones, *cut], [*tried, *self._candidates(cut)]
        best = min(range(len(tried)), key=lambda i: _order(tried[i]))
        for i, one in enumerate(tried):
            if i == best:
                tried[i] = replace(one, chosen=True)
            elif not one.why_not:
                tie = one.quality == tried[best].quality
                tried[i] = replace(one, why_not="same quality, more flash" if tie else "lower quality")
        self.tried = tuple(tried)
        return backbones[best]

    def _candidates(self, backbones: list[Backbone]) -> list[Candidate]:
        """Planned in the order of quality; what is below the first that fits is not planned."""
        found: list[Candidate] = []
        best: float | None = None
        for n, backbone in enumerate(backbones):
            quality = backbone.quality if backbone.quality is not None else 0.0
            if best is not None and quality < best:
                found.append(Candidate(backbone.name, quality, None, why_not="lower quality"))
                continue
            found.append(self._candidate(backbone, quality))
            if not found[-1].why_not:
                best = quality
            self.tell("plan networks", n + 1, len(backbones))
        return found

    def _candidate(self, backbone: Backbone, quality: float) -> Candidate:
        """What a network takes on the target, and why it is out if it is."""
        project = self.project
        size = project.image_size
        if self.target is None:
            return Candidate(backbone.name, quality, size or SIZES[0])
        fitting_size = size if size and not self.trial(backbone, size).ram.problems else None
        fitting_size = fitting_size or (None if size else self._largest(backbone))
        trial = self.trial(backbone, fitting_size or size or SIZES[-1])
        found = Candidate(backbone.name, quality, fitting_size, trial.arena_bytes, ms=trial.milliseconds)
        if trial.ram.problems:
            return replace(found, why_not=f"at {trial.size} px {trial.ram.problems[0]}")
        if fitting_size is None:
            return replace(found, why_not=f"at {trial.size} px {trial.too_slow(self.max_ms)}")
        if size is None and fitting_size < MIN_AUTO_SIZE:
            return replace(found, why_not=f"no more than {fitting_size} px fit, wanted are {MIN_AUTO_SIZE}")
        try:
            bank = fitting.plan_method(
                project.method, trial.taps, fitting_size, self.n_good, trial.bank_limit(), project.grid,
                project.dimensions, project.seed, project.tasks,
            )  # fmt: skip
        except TinyvadError as error:
            return replace(found, why_not=str(error).split(": use ")[0])
        others = sum(item.nbytes for item in trial.needs.flash if item.owner != "bank.tvb")
        return replace(found, flash_bytes=others + bank_in_flash(bank.bank_bytes, project.device_tasks, self.target))

    # --- sizes

    def _largest(self, backbone: Backbone) -> int | None:
        return next((size for size in SIZES if self._fits(backbone, size)), None)

    def _fits(self, backbone: Backbone, size: int) -> bool:
        if self.target is None:
            return True
        trial = self.trial(backbone, size)
        return not trial.too_slow(self.max_ms) and not trial.ram.problems

    def _refuse(self) -> None:
        """Raise CheckFailed with the limit that is broken and what would help."""
        project = self.project
        assert self.target is not None
        trial = self.trial(self.backbone, project.image_size or SIZES[-1])
        if not trial.ram.problems:
            what = f"{self.backbone.name} at {trial.size} px on {self.target.label}: {trial.too_slow(self.max_ms)}"
            remedy = f"use --max-ms {int(trial.milliseconds or 0) + 1}, a smaller --backbone or a faster --target"
            raise CheckFailed(f"{what}: {remedy}")
        smaller = next((s for s in SIZES if not self.trial(self.backbone, s).ram.problems), None)
        remedies = [] if smaller is None else [f"--image-size {smaller} or less"]
        remedies += ["a smaller --frame"] if project.frame is not None else []
        remedies += self._other_target(trial.size)
        if not trial.ram.problems[0].startswith("camera frame"):
            remedies += ["a smaller --backbone"]
        trial.ram.check("use " + " or ".join([", ".join(remedies[:-1]), remedies[-1]] if len(remedies) > 1 else remedies))

    def _other_target(self, size: int) -> list[str]:
        """'--target NAME' of the preset with the least RAM on which this size fits, if there is one."""
        outlined = fitting_trained.outlined(self.backbone, self.project)
        for target in sorted(list_targets(), key=lambda target: target.ram_bytes):
            if not Trial(outlined, size, self.project, target).ram.problems:
                return [f"--target {target.name}"]
        return []


def _order(one: Candidate) -> tuple[float, ...]:
    """The smallest is chosen: by the rule; among those that it excludes the largest input, then the least RAM."""
    if not one.why_not:
        return 0, -one.quality, one.flash_bytes or 0
    if one.image_size is not None:
        return 1, -one.image_size, -one.quality
    return 2, one.arena_bytes or 0
