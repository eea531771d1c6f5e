"""A build, loaded: images in, predictions out, by the one scoring rule that the device follows too.

    image file --decode, integer resize--> uint8 (S, S, 3) --table--> int8 --engine--> tapped maps
    --embedding--> int8 vectors --prototypes--> task --its part of the bank--> squared distances, integers (H, W)
    --maximum--> score --the task's threshold--> label

Flows in: a build folder and images. Flows out: ``Prediction``s. Whatever the engine, everything behind the tapped maps
is the same integer code; the float engine's maps are first put on the taps' int8 grids.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvad.bank import Bank
from tinyvad.detectors import Scorer, check_bank, open_embedding, real_scores
from tinyvad.detectors.bank_tasks import task_entries
from tinyvad.detectors.tasks import TaskScorers
from tinyvad.embedding import Embedding, align_matrix
from tinyvad.engines import Engine, open_engine
from tinyvad.errors import CheckFailed, InputError
from tinyvad.images import Preprocessing, apply_table, input_table, load_images
from tinyvad.slots import SLOTS, current

if TYPE_CHECKING:
    from tinyvad.continual.learn import Learner, Learnt
    from tinyvad.detectors.student_teacher import Pairs

MANIFEST = "manifest.json"
FORMAT = "tinyvad-build/1"
BACKBONES = {"int8": "backbone.tflite", "onnx": "backbone.onnx"}
BANKS = {name: slots[0] for name, slots in SLOTS.items()}  # of a new build; each fitted on its own backbone's features
SMOOTHING_SIGMA = 4.0  # pixels of the network's input, the value of the PaDiM and PatchCore papers
BATCH = 16


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one image. A higher score is more anomalous (scikit-learn's sign is the opposite).

    Attributes:
        pred_score: distance of the most anomalous grid cell, real units of the detector; never rescaled.
        pred_label: 1 anomalous, 0 normal.
        anomaly_map: (S, S) float32, the distances on the network's input size, smoothed.
        pred_mask: (S, S) bool, where the unsmoothed distance reaches the threshold.
        image_path: the file, or None for an array.
        raw_score: the integer that the device compares with its threshold.
        grid_map: (H, W) uint32, the device's integers a cell.
        task: name of the product that the image was taken for, and scored by.
        threshold: that task's, in the units of ``pred_score``.
    """

    pred_score: float
    pred_label: int
    anomaly_map: np.ndarray
    pred_mask: np.ndarray
    image_path: Path | None
    raw_score: int
    grid_map: np.ndarray
    task: str
    threshold: float


class Model:
    """A loaded build; make one with ``load``.

    Attributes:
        manifest: the build's manifest.json.
        preprocessing, embedding, scorers, engine, bank: the parts, in the order in which an image meets them.
        task_names: of the products, by task number.
        folder: of the build.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        preprocessing: Preprocessing,
        table: np.ndarray,
        embedding: Embedding | Pairs,
        scorers: TaskScorers,
        engine: Engine,
        bank: Bank,
        folder: Path,
    ) -> None:
        self.manifest, self.preprocessing, self.table, self.folder = manifest, preprocessing, table, folder
        self.embedding, self.scorers, self.engine, self.bank = embedding, scorers, engine, bank
        self.task_names = [entry["name"] for entry in task_entries(bank)]
        self._learner: Learner | None = None

    @property
    def scorer(self) -> Scorer:
        """The scorer of the task that takes longest; its unit and its scratch are those of every task."""
        return self.scorers.largest

    @property
    def threshold(self) -> int:
        """The first task's: a raw score at or above it is anomalous. ``scorers.thresholds`` has all."""
        return int(self.scorers.thresholds[0])

    @property
    def threshold_score(self) -> float:
        """The first task's threshold in the units of ``pred_score``."""
        return self.task_threshold(0)

    def task_threshold(self, task: int) -> float:
        """The threshold of a task number in the units of ``pred_score``."""
        return float(self.real(self.scorers.thresholds[task]))

    def task_number(self, name: str) -> int:
        """The number of a task. Raises InputError if the build has none of that name."""
        if name not in self.task_names:
            raise InputError(f"the build has no task {name!r}; it has {', '.join(self.task_names)}")
        return self.task_names.index(name)

    def real(self, raw: np.ndarray) -> np.ndarray:
        """Integer scores -> the detector's real units, float64."""
        return real_scores(self.scorers.scorers[0], raw)

    def taps(self, images: np.ndarray) -> list[np.ndarray]:
        """Tapped int8 maps [(n, h, w, c)] of (n, S, S, 3) uint8 images."""
        if self.engine.exact:
            return self.engine.features(apply_table(images, self.table))
        floats = np.stack([self.preprocessing.float_input(image) for image in images])
        return self.embedding.quantize_maps(self.engine.features(floats))

    def grid_maps(self, images: np.ndarray, task: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The device's integers for (n, S, S, 3) uint8 images.

        Args:
            task: score by this one; None: by the one that each image is nearest to.

        Returns:
            maps (n, H, W) uint32, task numbers (n,) int64.
        """
        return self.score_taps(self.taps(images), task)

    def score_taps(self, taps: Sequence[np.ndarray], task: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``grid_maps`` of images whose tapped int8 maps [(n, h, w, c)] are known."""
        embeddings = self.embedding.integer(taps)
        if task is None:
            tasks = self.scorers.route(taps[-1] if self.embedding.native else embeddings)
        else:
            tasks = np.full(len(embeddings), self.task_number(task))
        return self.scorers.score(embeddings, tasks), tasks

    def predict(
        self, images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray], task: str | None = None
    ) -> Prediction | list[Prediction]:
        """Predict one image (a file or an (H, W, 3) uint8 array) or a list of them.

        Args:
            task: name of the product, where it is known; None: found for every image.

        Raises:
            InputError: an image that can't be read, by name; no such task.
        """
        single = isinstance(images, (str, Path)) or (isinstance(images, np.ndarray) and images.ndim in (2, 3))
        sources: Sequence[Any] = [images] if single else images  # type: ignore[list-item, assignment]
        results = []
        for batch in batches(sources):
            grids = self.grid_maps(np.stack([self.preprocessing.uint8_input(source) for source in batch]), task)
            for source, grid, number in zip(batch, *grids, strict=True):
                results.append(self._finish(Path(source) if isinstance(source, (str, Path)) else None, grid, int(number)))
        return results[0] if single else results

    def stream(
        self, paths: Sequence[Path], on_error: str = "stop", skipped: list[tuple[Path, str]] | None = None,
        task: str | None = None,
    ) -> Iterator[Prediction]:  # fmt: skip
        """``predict`` of files in order, a batch in memory at a time; see ``load_images`` for ``on_error``."""
        loaded = load_images(paths, self.preprocessing, on_error=on_error, skipped=skipped)
        for batch in batches(loaded):
            grids = self.grid_maps(np.stack([image for _, image in batch]), task)
            for (path, _), grid, number in zip(batch, *grids, strict=True):
                yield self._finish(path, grid, int(number))

    def learn(self, task: str, images: Iterable[str | Path | np.ndarray], on_error: str = "stop") -> Learnt:
        """Learn good images of a product: the build on disk first, safe against a power cut, then this model.

        Args:
            task: name of the product, a new one or one that the build knows.
            images: files or (H, W, 3) uint8 arrays, one in memory at a time. on_error: 'stop', or 'skip' unreadable ones.

        Raises:
            InputError: no images, an unreadable one, a bad name, another learner at work. CheckFailed: no room for it.
        """
        from tinyvad.continual.learn import Learner

        if self._learner is None:
            own = {self.engine.name: self} if self.engine.name in SLOTS else {}
            self._learner = Learner(self.folder, own)
        result = self._learner.learn(task, images, on_error)
        self.refresh()
        return result

    def refresh(self) -> bool:
        """Take over the build's current bank if another one was learnt since; whether there was one."""
        bank = current(self.folder, "onnx" if self.engine.name == "onnx" else "int8")
        if bank.crc32 == self.bank.crc32:
            return False
        _, self.scorers = check_bank(bank)
        self.bank = bank
        self.task_names = [entry["name"] for entry in task_entries(bank)]
        return True

    def heat(self, grids: np.ndarray) -> np.ndarray:
        """(n, H, W) integer maps -> (n, S, S) float32 anomaly maps, smoothed as the detector's paper does."""
        size = (self.preprocessing.height, self.preprocessing.width)
        return upsample(self.real(grids), size, self.scorers.scorers[0].sigma)

    def mask(self, grid: np.ndarray, task: int = 0) -> np.ndarray:
        """(S, S) bool: where the unsmoothed distance reaches the task's threshold; a cell that does is masked whole."""
        size = (self.preprocessing.height, self.preprocessing.width)
        sharp = upsample(self.real(grid)[None], size, 0.0)[0]
        return (sharp >= self.task_threshold(task)) | upsample_nearest(grid >= self.scorers.thresholds[task], size)

    def _finish(self, path: Path | None, grid: np.ndarray, task: int) -> Prediction:
        raw = int(grid.max())
        return Prediction(
            pred_score=float(self.real(np.array(raw))),
            pred_label=int(raw >= self.scorers.thresholds[task]),
            anomaly_map=self.heat(grid[None])[0],
            pred_mask=self.mask(grid, task),
            image_path=path,
            raw_score=raw,
            grid_map=grid,
            task=self.task_names[task],
            threshold=self.task_threshold(task),
        )


def batches(items: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    """Lists of up to ``size`` items, in order."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def upsample_matrix(size: int, out: int, sigma: float) -> np.ndarray:
    """(out, size) float64: bilinear interpolation (half-pixel centres), then a Gaussian of ``sigma`` output pixels.

    The Gaussian has int(4 * sigma + 0.5) taps a side, borders mirrored with the edge repeated (scipy's "reflect").
    """
    bilinear, denominator = align_matrix(size, out)
    matrix = bilinear / denominator
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return matrix
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    blurred = np.zeros_like(matrix)
    for offset, tap in zip(range(-radius, radius + 1), taps, strict=True):
        mirrored = (np.arange(out) + offset) % (2 * out)
        blurred += tap * matrix[np.where(mirrored < out, mirrored, 2 * out - 1 - mirrored)]
    return blurred


def upsample(maps: np.ndarray, size: tuple[int, int], sigma: float = SMOOTHING_SIGMA) -> np.ndarray:
    """(n, H, W) -> (n, *size) float32 anomaly maps."""
    rows, columns = (upsample_matrix(s, o, sigma) for s, o in zip(maps.shape[1:], size, strict=True))
    return (rows @ maps @ columns.T).astype(np.float32)


def upsample_nearest(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) -> size, each cell's value over its area."""
    rows, columns = (np.arange(o) * g // o for g, o in zip(grid.shape, size, strict=True))
    return grid[rows][:, columns]


def read_manifest(folder: Path) -> dict[str, Any]:
    """A build's manifest.json.

    Raises:
        InputError: no build there, or one of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a build: it has no {MANIFEST}; make one with `tinyvad build`") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; make the build again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"{path}: format {found!r}, this tinyvad reads {FORMAT!r}; make the build again")
    _check_fields(path, "", manifest, _MANIFEST_FIELDS)
    for name, facts in manifest["files"].items():
        _check_fields(path, f"files.{name}.", facts, {"bytes": int, "sha256": str})
    return manifest


# What a reader takes from a manifest: a type (or several), or the fields of an object.
_MANIFEST_FIELDS: dict[str, Any] = {
    "tinyvad": str,
    "task": str,
    "method": {"name": str, "settings": dict},
    "backbone": {"layers": list, "input_quantization": {"scale": float, "zero_point": int}},
    "thresholds": {"int8": {"raw": int}},
    "preprocessing": {"height": int, "width": int, "mean": list, "std": list},
    "target": (dict, type(None)),
    "learning": {"tasks": int, "slot_bytes": int},
    "settings": {"frame": (str, type(None))},
    "files": dict,
}


def _check_fields(path: Path, where: str, value: Any, fields: dict[str, Any]) -> None:
    """Raise InputError for the first field that is missing or of another type."""
    if not isinstance(value, dict):
        raise InputError(f"{path}: field {where.rstrip('.')} is {value!r}, expected an object; make the build again")
    for name, kind in fields.items():
        if name not in value:
            raise InputError(f"{path}: field {where}{name} is missing; make the build again")
        if isinstance(kind, dict):
            _check_fields(path, f"{where}{name}.", value[name], kind)
        elif not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise InputError(f"{path}: field {where}{name} is {value[name]!r}, of a wrong type; make the build again")


def load(build: str | Path, engine: str = "int8") -> Model:
    """Load a build.

    Args:
        build: the folder that ``tinyvad build`` wrote.
        engine: 'int8' (exact, what the device computes), 'onnx' (float), 'litert' or 'tflm' (other exact oracles).

    Raises:
        InputError: not a build, a malformed or changed file (named), an engine that is not installed.
        CheckFailed: the bank was fitted on another backbone.
    """
    folder = Path(build)
    manifest = read_manifest(folder)
    features = "onnx" if engine == "onnx" else "int8"
    bank, backbone_path = current(folder, features), folder / BACKBONES[features]
    try:
        crc = zlib.crc32(backbone_path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {backbone_path}: {error.strerror}; make the build again") from error
    if crc != bank.header.backbone_crc32:
        raise CheckFailed(
            f"{bank.name} was fitted on backbone {bank.header.backbone_crc32:08x}, but {backbone_path.name} is {crc:08x}; "
            "use the files of one build"
        )
    preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
    quantization = manifest["backbone"]["input_quantization"]
    table = input_table(preprocessing.mean, preprocessing.std, quantization["scale"], quantization["zero_point"])
    _, scorers = check_bank(bank)
    if not np.array_equal(bank.sections["LUT "], table):
        raise CheckFailed(
            f"{folder / MANIFEST}: preprocessing gives another input table than {Path(bank.name).name} holds; "
            "use the files of one build"
        )
    names = manifest["backbone"]["layers"]
    embedding = open_embedding(bank, names)
    return Model(manifest, preprocessing, table, embedding, scorers, open_engine(engine, folder), bank, folder)

