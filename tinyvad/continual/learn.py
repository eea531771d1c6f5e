"""``tinyvad learn``: new good images in, a build that has learnt them out, safe against a power cut at any moment.

The order, with what each step hands on; everything under the build's lock (``tinyvad.slots``):

1. leftovers of a writer that died  -> finished or removed
2. images, one in memory at a time  -> tapped int8 maps of every engine of the build, on disk; known ones are left out
3. every bank and those maps        -> the next bank (``tinyvad.continual.next_bank``), within the bytes of a slot
4. states, then the bank slots      -> the new generation is current from the int8 slot's rename on
5. firmware/bank.tvb, old states    -> brought up to date, removed; what a cut leaves undone here, the next learner does

A task's state is a file beside the bank, named in META: the exact sums of its images, so that more of them can be merged
(PaDiM family), and a key of each image that was learnt, so that none counts twice. It is not needed to score or to add
other products, and is no part of the bank's bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad import slots
from tinyvad.bank import Bank
from tinyvad.continual.next_bank import HELD, check_room, forget_task, learn_task
from tinyvad.continual.opened_bank import NewImages, Next, Opened, Settings, open_tasks
from tinyvad.detectors.bank_tasks import task_entries
from tinyvad.errors import InputError, TinyvadError
from tinyvad.files import write_bytes
from tinyvad.fitting import TapStore, shifted_copies
from tinyvad.graph.ir import Tensor
from tinyvad.model import BACKBONES, Model, load
from tinyvad.project import TRAINED

LONGEST_NAME = 64
FIRMWARE_BANK = Path("firmware") / "bank.tvb"
KEYS = "keys"  # of a state: the images that were learnt
Source = str | Path | np.ndarray
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Learnt:
    """What a call has done; plain values.

    Attributes:
        generation: of the current bank. tasks: name and images of every product. new_task: the build did not have it.
        images: new ones that were learnt. known: images that had been learnt before and were left out.
        threshold_raw, threshold: of the task, as an integer and in real units.
        bank_bytes, slot_bytes: of the int8 bank. gives_way: what other products lost for it, '' if nothing.
        skipped: files that could not be read, and why.
    """

    build: str
    task: str
    generation: int
    tasks: list[dict[str, Any]]
    bank_bytes: int
    slot_bytes: int
    new_task: bool = False
    images: int = 0
    known: int = 0
    threshold_raw: int = 0
    threshold: float = 0.0
    gives_way: str = ""
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Learner:
    """A build that learns; holds its engines, so that one image after another can be learnt.

    Args:
        folder: of the build. models: of its engines that are loaded already, by kind of features.

    Raises:
        InputError: not a build, or not a sound one.
    """

    def __init__(self, folder: str | Path, models: Mapping[str, Model] | None = None) -> None:
        self.folder = Path(folder)
        given = dict(models or {})
        self.models = {"int8": given.get("int8") or load(self.folder, "int8")}
        if (self.folder / BACKBONES["onnx"]).exists():
            self.models["onnx"] = given.get("onnx") or load(self.folder, "onnx")
        manifest = self.models["int8"].manifest
        if manifest["method"]["name"] in TRAINED:
            raise InputError(
                f"{folder} has a trained network: it learns by `tinyvad learn BUILD --data DIR --task NAME` alone, without "
                "--watch, --forget or --undo"
            )
        self.layers: list[str] = manifest["backbone"]["layers"]
        self.settings = Settings.of(manifest)
        self.slot_bytes: int = manifest["learning"]["slot_bytes"]

    def learn(
        self, task: str, images: Iterable[Source], on_error: str = "stop", tell: Tell | None = None, total: int = 0,
        need_new: bool = True,
    ) -> Learnt:  # fmt: skip
        """Learn good images of a product, a new one or one that the build knows.

        Args:
            images: files or (H, W, 3) uint8 arrays. total: how many, for ``tell(stage, done, total)``.
            on_error: 'stop' at the first unreadable image, with nothing changed, or 'skip' it.
            need_new: having no readable image is an error.

        Raises:
            InputError: no images, a name that is no plain one, an unreadable image, another learner at work.
            CheckFailed: the bank would pass the bytes of its slot.
        """
        self.check_name(task)
        if on_error not in ("stop", "skip"):
            raise InputError(f"on_error is {on_error!r}, must be 'stop' or 'skip'")
        with self._writing():
            opened = self._open()
            number = opened["int8"].number(task)
            if number is None:
                for one in opened.values():
                    check_room(one, task, self.slot_bytes)
            saved = {name: self._saved(one, number) for name, one in opened.items()}
            seen = saved["int8"].get(KEYS, np.zeros(0, np.uint64))
            if seen.dtype != np.uint64 or seen.ndim != 1:
                raise InputError(f"learning state of {task!r}: {KEYS} is {seen.dtype}{seen.shape}; learn the product anew")
            skipped: list[tuple[str, str]] = []
            new, keys, known = self._features(images, on_error, set(seen.tolist()), skipped, tell, total, number is None)
            if need_new and not keys and not known:
                reason = f"the first of {len(skipped)} unreadable ones: {skipped[0][1]}" if skipped else "give at least one"
                raise InputError(f"no images to learn; {reason}")
            if not keys:
                return self._told(opened["int8"].bank, task, known=known, skipped=skipped)
            found: dict[str, Next] = {}
            for name, one in opened.items():
                if tell is not None:
                    tell("fit", len(found), len(opened))
                path = state_name(name, one.bank.header.generation + 1) if one.of_gaussians or name == "int8" else None
                made = learn_task(one, task, new[name], saved[name] or None, self.settings, self.slot_bytes, path)
                found[name] = made
                arrays = {} if made.statistics is None else made.statistics.arrays()
                if made.held is not None:
                    arrays[HELD] = made.held
                if name == "int8":
                    arrays[KEYS] = np.union1d(seen, np.array(keys, np.uint64))
                if path is not None:
                    write_bytes(self.folder / path, pack_state(arrays))
            self._commit({name: one.data for name, one in found.items()})
            made = found["int8"]
            now = slots.current(self.folder)
            return self._told(now, task, number is None, len(keys), known, made.task, made.gives_way, skipped)

    def check_name(self, task: str) -> None:
        """Raise InputError unless the build knows the product, whatever its folder was called, or the name is plain."""
        if task not in [entry["name"] for entry in task_entries(slots.current(self.folder))]:
            check_name(task)

    def forget(self, task: str) -> Learnt:
        """Remove a product. Raises InputError if the build does not know it, or knows no other."""
        with self._writing():
            opened = self._open()
            self._commit({name: forget_task(one, task).data for name, one in opened.items()})
            return self._told(slots.current(self.folder), task)

    def undo(self) -> Learnt:
        """Go back one generation. Raises InputError if there is none to go back to."""
        with self._writing():
            slots.undo(self.folder)
            self._follow()
            return self._told(slots.current(self.folder), "")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with slots.locked(self.folder):
            slots.recover(self.folder)
            self._tidy()
            try:
                yield
            except BaseException:  # as the next learner would: half of a bank takes room, and the disk may be full
                with contextlib.suppress(TinyvadError, OSError):
                    slots.recover(self.folder)
                    self._tidy()
                raise

    def _open(self) -> dict[str, Opened]:
        return {name: open_tasks(slots.current(self.folder, name), self.layers) for name in self.models}

    def _features(
        self, images: Iterable[Source], on_error: str, seen: set[int], skipped: list[tuple[str, str]], tell: Tell | None,
        total: int, new_task: bool = True,
    ) -> tuple[dict[str, NewImages], list[int], int]:  # fmt: skip
        """Features of the images that are new by every engine, their keys, and how many were known.

        Of the only image of a new task shifted copies too.
        """
        model = self.models["int8"]
        stores = {name: TapStore(self._tensors()) for name in self.models}
        keys: list[int] = []
        known, only = 0, None
        for done, source in enumerate(images, 1):
            try:
                image = model.preprocessing.uint8_input(source)
            except InputError as error:
                if on_error == "stop":
                    raise InputError(f"{error} (or leave unreadable images out with --on-error skip)") from error
                skipped.append((str(source) if isinstance(source, (str, Path)) else "an array", str(error)))
                continue
            key = image_key(image)
            if key in seen:
                known += 1
                continue
            seen.add(key)
            keys.append(key)
            only = image if new_task and len(keys) == 1 else None
            for name, store in stores.items():
                store.append(self.models[name].taps(image[None]))
            if tell is not None:
                tell("features", done, max(total, done))
        copies: dict[str, TapStore] = {}
        if only is not None:
            moved = shifted_copies(only)
            copies = {name: TapStore(self._tensors()) for name in self.models}
            for name, store in copies.items():
                store.append(self.models[name].taps(moved))
        return {name: NewImages(store, copies.get(name)) for name, store in stores.items()}, keys, known

    def _tensors(self) -> list[Tensor]:
        graph = self.models["int8"].engine.graph  # type: ignore[attr-defined]
        return [graph.tensors[name] for name in graph.outputs]

    def _saved(self, opened: Opened, number: int | None) -> dict[str, np.ndarray]:
        """The state of an old task, {} of a new one; a memory bank does without, as its rows are all it needs."""
        if number is None:
            return {}
        task = opened.tasks[number]
        path = None if task.state is None else self.folder / task.state
        if path is not None and (path.exists() or opened.of_gaussians):
            return read_state(path)
        if opened.of_gaussians:
            raise InputError(
                f"{opened.bank.name}: {task.name!r} was learnt without a state, so it can't take more images; build with "
                "--tasks 2 or more, or learn all its images under another name and forget this one"
            )
        return {}

    def _commit(self, banks: Mapping[str, bytes]) -> None:
        slots.write_next(self.folder, banks)
        self._follow()

    def _follow(self) -> None:
        """``_tidy`` behind a new generation, which stays whatever happens to the rest."""
        try:
            self._tidy()
        except (InputError, OSError) as error:
            generation = slots.current(self.folder).header.generation
            raise InputError(f"generation {generation} is learnt, but {error}; the next `tinyvad learn` ends it") from error

    def _tidy(self) -> None:
        """Bring the firmware's bank up to date, and remove the states that no slot names."""
        now = Path(slots.current(self.folder).name).read_bytes()
        firmware = self.folder / FIRMWARE_BANK
        if firmware.exists() and firmware.read_bytes() != now:
            write_bytes(firmware, now)
        for path in firmware.parent.glob(f".{firmware.name}.*"):  # left by a writer that died
            path.unlink()
        banks = [slot.bank for name in self.models for slot in slots.look(self.folder, name) if slot.bank is not None]
        named = {entry.get("state") for bank in banks for entry in task_entries(bank)}
        for path in (self.folder / slots.STATES).glob("*.npz"):
            if f"{slots.STATES}/{path.name}" not in named:
                path.unlink()

    def _told(
        self, bank: Bank, task: str, new_task: bool = False, images: int = 0, known: int = 0, number: int | None = None,
        gives_way: str = "", skipped: list[tuple[str, str]] | None = None,
    ) -> Learnt:  # fmt: skip
        raw = 0 if number is None else int(bank.sections["THRS"][number])
        tasks = [
            {"name": entry["name"], "images": int(row[2])}
            for entry, row in zip(task_entries(bank), bank.sections["TASK"], strict=True)
        ]
        return Learnt(str(self.folder), task, bank.header.generation, tasks, bank.nbytes, self.slot_bytes, new_task, images,
                      known, raw, float(self.models["int8"].real(np.array(raw))), gives_way, skipped or [])  # fmt: skip


def check_name(task: str) -> None:
    """Raise InputError unless a product's name is plain: 1 to 64 printable characters, no slash, no space at the ends."""
    if not 1 <= len(task) <= LONGEST_NAME or not task.isprintable() or task != task.strip() or set(task) & set("/\\"):
        raise InputError(
            f"task {task[: LONGEST_NAME + 1]!r}: give 1 to {LONGEST_NAME} printable characters, no slashes, no space at "
            "the ends"
        )


def image_key(image: np.ndarray) -> int:
    """64 bits that tell one (S, S, 3) uint8 image, at the network's size, from all others."""
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")


def state_name(features: str, generation: int) -> str:
    """Where the state of the task that a generation has learnt lies, from the build's folder."""
    return f"{slots.STATES}/{features}-{generation}.npz"


def pack_state(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A state file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a state file. Raises InputError if it is not there or damaged (its members have CRCs)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: the product's learning state can't be read ({error}); restore the file, or learn all its images "
            "under another name and forget this one"
        ) from error
