"""Online PatchCore: one image at a time, compare with the bank, add what is new, forget the image.

Flows in: a stream of embeddings; flows out: distances to the nearest bank vector. Peak memory is the bank and one image.

The bank grows by ``GrowingBank``'s rule. Without labels all images share one bank; with ``per_task`` each task has its own,
of an equal share of the capacity, and an image is scored by the bank of the nearest prototype. With a quantiser the patches
are quantised before anything else, so that everything said about the bank is true of the decoded vectors that it stores;
``nbytes`` counts codes, while the working copy is decoded.

An anomalous image that is learnt is never seen as one again. The optional gate holds an image back whose score is above
twice the median of the last ``GATE_WINDOW``: ``skip`` forgets it, ``quarantine`` keeps up to ``QUARANTINE`` of them for a
person. It finds gross defects only: on six products in random order it held back no good image of five and 11 % of those
of the sixth, and of defects mixed in 9 of 10 of one product, 8 of 15 of another and none of the other four.

``merge`` with tau 0 is the default: on good images held out from six products it came as close as batch PatchCore's
coreset of the same size (mean largest distance 0.99 to 1.00 of it; ``doubling``, which gives up most of its rows with each
step, 1.2 to 1.4).

Source: online PatchCore with incremental k-center, whose stopping rule its paper leaves open; gate and per-task form ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tinyvad.continual.base import Context, Scored
from tinyvad.continual.growing_bank import GrowingBank
from tinyvad.continual.patchcore import common_unit, score_bank
from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.product_quantizer import ProductQuantizer, pack_codes, unpack_codes
from tinyvad.detectors.routing import nearest_prototype, prototype, signatures
from tinyvad.detectors.task_memory import shares
from tinyvad.errors import InputError

GATES = (None, "skip", "quarantine")
QUARANTINE = 8  # images
GATE_WINDOW = 16  # scores, those of images held back too: when half of the last ones are high, the product has changed
GATE_AFTER = 8  # images of a task that are learnt unseen
GATE_FACTOR = 2.0  # limit = factor * median score


class OnlinePatchCore:
    """See the module's text; the protocol is ``ContinualMethod``'s.

    Args:
        context: embeddings need one step for all channels.
        capacity: rows in all, None for no limit (then ``per_task`` banks grow freely too).
        when_full: 'freeze', 'doubling' or 'merge'.
        tau: novelty distance in real units; 'auto': what ``auto_points`` patches of a bank's first image, chosen farthest
            first, still leave uncovered.
        per_image: most rows that an image may add.
        gate: None, 'skip' or 'quarantine'.
        quantizer: codebooks given beforehand; None stores plain vectors.
        per_task: a bank a task instead of one for all.

    Attributes:
        arrived: images offered so far.
        growth: (images arrived, rows in all banks) whenever the rows changed: the bank's growth curve.
        held_back: numbers (from 0, in the order of arrival) of the images that the gate held back.
        quarantine: those of them that are kept: (number, task, (H, W, D) embedding).
    """

    def __init__(
        self,
        context: Context,
        capacity: int | None = 1000,
        when_full: str = "merge",
        tau: float | str = 0.0,
        per_image: int | None = None,
        gate: str | None = None,
        quantizer: ProductQuantizer | None = None,
        per_task: bool = False,
        auto_points: int = 25,
    ) -> None:
        wrong_tau = tau != "auto" if isinstance(tau, str) else not tau >= 0
        if gate not in GATES or wrong_tau or (per_image is not None and per_image < 1) or auto_points < 1:
            raise InputError(f"online: gate {gate!r}, tau {tau!r}, per_image {per_image}; see OnlinePatchCore")
        self.context, self.capacity, self.when_full = context, capacity, when_full
        self.tau, self.per_image, self.gate, self.quantizer = tau, per_image, gate, quantizer
        self.per_task, self.auto_points = per_task, auto_points
        self._unit = common_unit(context)
        self.task_names: list[str] = []
        self.arrived = 0
        self.growth: list[tuple[int, int]] = []
        self.held_back: list[int] = []
        self.quarantine: list[tuple[int, str, np.ndarray]] = []
        self._images: list[int] = []  # learnt, of each task
        self._totals: list[np.ndarray] = []  # (C,) sums of signatures of each task
        self._banks: list[GrowingBank] = []
        self._scores: list[list[float]] = []  # of each bank's last images, for the gate

    def learn(self, task: str, embeddings: Iterable[np.ndarray]) -> None:
        """Learn every image of a stream of (n, H, W, D) batches, one by one; a known task's name goes on with it."""
        for batch in embeddings:
            for image in batch:
                self.learn_image(task, image)

    def learn_image(self, task: str, image: np.ndarray) -> int:
        """Learn one (H, W, D) image; returns the rows that it added, 0 where the gate held it back.

        Raises:
            InputError: an embedding of another shape or dtype than the bank's, or no room for a further task.
        """
        if image.ndim != 3 or image.dtype not in (np.int8, np.float32):
            raise InputError(f"image embedding is {image.dtype}{image.shape}; give (H, W, D) int8 or float32")
        new = task not in self.task_names
        number = len(self.task_names) if new else self.task_names.index(task)
        place = number if self.per_task else 0  # of the bank
        patches = image.reshape(-1, image.shape[2])
        if self.quantizer is not None:
            patches = self.quantizer.decode(self.quantizer.encode(patches))
        self.arrived += 1
        if place < len(self._banks) and self._held_back(self._banks[place], self._scores[place], task, image, patches):
            return 0
        bank = self._banks[place] if place < len(self._banks) else self._new_bank(patches)
        added, novelty = bank.add(patches, self.per_image)  # what can't be learnt ends here, before anything changed
        if place == len(self._banks):
            for other in self._banks:
                other.shrink(bank.capacity)
            self._banks.append(bank)
            self._scores.append([])
        if new:
            self.task_names.append(task)
            self._images.append(0)
            self._totals.append(np.zeros_like(signatures(image[None], self.context.last_channels)[0]))
        self._images[number] += 1
        self._totals[number] = self._totals[number] + signatures(image[None], self.context.last_channels)[0]
        if self.gate is not None and (self._seen_by(place) > 1):
            self._scores[place] = [*self._scores[place], math.sqrt(novelty)][-GATE_WINDOW:]
        rows = sum(bank.count for bank in self._banks)
        if not self.growth or self.growth[-1][1] != rows:
            self.growth.append((self.arrived, rows))
        return added

    def release(self, number: int) -> int:
        """Learn an image from quarantine after all, however far it is; returns the rows that it added.

        Raises:
            InputError: no image of that number is in quarantine.
        """
        found = [entry for entry in self.quarantine if entry[0] == number]
        if not found:
            raise InputError(f"image {number} is not in quarantine; there are {[entry[0] for entry in self.quarantine]}")
        self.quarantine = [entry for entry in self.quarantine if entry[0] != number]
        gate, self.gate = self.gate, None
        try:
            return self.learn_image(found[0][1], found[0][2])
        finally:
            self.gate = gate

    def score(self, embeddings: np.ndarray, task: int | None = None) -> Scored:
        """Distances to the one bank (``tasks`` is -1: none was chosen), or to the known or nearest task's bank."""
        if not self._banks:
            raise InputError("nothing learnt yet; call learn first")
        rows = [bank.rows for bank in self._banks]
        if not self.per_task:
            return Scored(score_bank(embeddings, rows[0], self._unit), np.full(len(embeddings), -1))
        chosen = np.full(len(embeddings), task, np.int64) if task is not None else self._route(embeddings)
        maps = np.empty(embeddings.shape[:3])
        for number in np.unique(chosen):
            maps[chosen == number] = score_bank(embeddings[chosen == number], rows[number], self._unit)
        return Scored(maps, chosen)

    def nbytes(self) -> int:
        """Rows or codes with their codebooks, tau, prototype sums, scores of the gate, merge partners, quarantine."""
        total = 0 if self.quantizer is None else self.quantizer.codebooks.nbytes + self.quantizer.indices.nbytes
        for bank, scores in zip(self._banks, self._scores, strict=True):
            row = bank.rows.itemsize * bank.rows.shape[1] if self.quantizer is None else self._codes(bank.rows[:1]).nbytes
            partners = 12 if self.when_full == "merge" else 0  # int32 distance, int64 number
            total += bank.count * (row + partners) + 8 + 8 * len(scores)
        if self.per_task:
            total += sum(values.nbytes + 8 for values in self._totals)
        return total + sum(image.nbytes for _, _, image in self.quarantine)

    def state(self) -> dict[str, np.ndarray]:
        """All that is learnt; see ``ContinualMethod``."""
        arrays: dict[str, np.ndarray] = {
            "task_names": np.array(self.task_names, np.str_),
            "images": np.array(self._images, np.int64),
            "totals": np.array(self._totals),
            "arrived": np.array(self.arrived),
            "growth": np.array(self.growth, np.int64).reshape(-1, 2),
            "held_back": np.array(self.held_back, np.int64),
            "held_numbers": np.array([number for number, _, _ in self.quarantine], np.int64),
            "held_tasks": np.array([task for _, task, _ in self.quarantine], np.str_),
        }
        for i, (_, _, image) in enumerate(self.quarantine):
            arrays[f"held_{i}"] = image
        for i, (bank, scores) in enumerate(zip(self._banks, self._scores, strict=True)):
            arrays[f"bank_{i}"] = bank.rows if self.quantizer is None else self._codes(bank.rows)
            arrays[f"tau2_{i}"] = np.array(bank.tau2)
            arrays[f"scores_{i}"] = np.array(scores, np.float64)
        return arrays

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over a ``state()``."""
        self.task_names = state["task_names"].tolist()
        self._images = state["images"].tolist()
        self._totals = list(state["totals"])
        self.arrived = int(state["arrived"])
        self.growth = [(images, rows) for images, rows in state["growth"].tolist()]
        self.held_back = state["held_back"].tolist()
        held = zip(state["held_numbers"].tolist(), state["held_tasks"].tolist(), strict=True)
        self.quarantine = [(number, task, state[f"held_{i}"]) for i, (number, task) in enumerate(held)]
        self._banks, self._scores = [], []
        count = sum(name.startswith("tau2_") for name in state)
        for i in range(count):
            rows = state[f"bank_{i}"]
            if self.quantizer is not None:
                codes = unpack_codes(rows, len(self.quantizer.codebooks), self.quantizer.bits)
                rows = self.quantizer.decode(codes)
            bank = GrowingBank(rows.shape[1], rows.dtype, self._share(count), self.when_full, state[f"tau2_{i}"].item())
            bank.load(rows)
            self._banks.append(bank)
            self._scores.append(state[f"scores_{i}"].tolist())

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        assert self.quantizer is not None
        return pack_codes(self.quantizer.encode(rows), self.quantizer.bits)

    def _seen_by(self, place: int) -> int:
        return self._images[place] if self.per_task else sum(self._images)

    def _share(self, banks: int) -> int | None:
        return None if self.capacity is None else shares(self.capacity, banks)

    def _new_bank(self, patches: np.ndarray) -> GrowingBank:
        """An empty bank for a first image's (P, D) patches."""
        tau2: float = 0
        if isinstance(self.tau, str):
            tau2 = farthest_first(patches, self.auto_points, start=0).radii[-1].item()
        else:
            tau2 = (self.tau / self._unit) ** 2
            tau2 = math.floor(tau2) if patches.dtype == np.int8 else tau2
        capacity = self._share(len(self._banks) + 1)
        return GrowingBank(patches.shape[1], patches.dtype, capacity, self.when_full, tau2)

    def _held_back(self, bank: GrowingBank, scores: list[float], task: str, image: np.ndarray, patches: np.ndarray) -> bool:
        """Whether the gate holds an image back; if so it is noted."""
        if self.gate is None or len(scores) < GATE_AFTER:
            return False
        novelty = math.sqrt(bank.novelty(patches))
        if novelty <= GATE_FACTOR * float(np.median(scores)):
            return False
        scores[:] = [*scores, novelty][-GATE_WINDOW:]
        number = self.arrived - 1
        self.held_back.append(number)
        if self.gate == "quarantine" and len(self.quarantine) < QUARANTINE:
            self.quarantine.append((number, task, image.copy()))
        return True

    def _route(self, embeddings: np.ndarray) -> np.ndarray:
        prototypes = np.stack([prototype(t, n) for t, n in zip(self._totals, self._images, strict=True)])
        return nearest_prototype(signatures(embeddings, self.context.last_channels), prototypes)
