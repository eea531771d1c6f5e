"""``tinyvad build``: good images and a target in, a checked build out.

The order, with what each step hands on:

1. images and target           -> datasets, limits
2. network, input size         -> a float graph whose memory plan fits the target's RAM (``tinyvad.choosing``); a method
                                  that trains one adds its own part to it (``tinyvad.fitting_trained``)
3. calibration, quantisation   -> backbone.tflite, read back by the exact engine; backbone.onnx
4. features of all good images -> tapped int8 maps on disk, of the exact and of the float engine
5. method, embedding, fit      -> an integer scorer, within the flash that is left, and thresholds from held-out good
                                  images by cross-fitting (``tinyvad.fitting``)
6. banks, memory plan, budget  -> the folder, under a temporary name until it is whole, with firmware/ (C sources)
7. engines compared, test images scored, report (``tinyvad.build_report``)

A bank belongs to the very file whose features it was fitted on: bank.tvb to backbone.tflite, which is what the device
has, bank_onnx.tvb to backbone.onnx. Both are read by the same integer scorer.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyvad import fitting, fitting_trained
from tinyvad.bank import Header, read_bank
from tinyvad.build_report import BuildFacts, make_cases, make_report
from tinyvad.calibration import CALIBRATION_IMAGES, quantize_on
from tinyvad.choosing import Choice, Chooser
from tinyvad.continual.learn import KEYS, image_key, pack_state, read_state, state_name
from tinyvad.continual.next_bank import HELD
from tinyvad.continual.trained import TrainedMethod
from tinyvad.continual.trained_build import STATE, Known, PicturedItems, merged, open_stream, read_products, state_arrays
from tinyvad.detectors import METHODS, Scorer, real_scores
from tinyvad.detectors.bank_tasks import BankTask, Learning, bank_of_tasks
from tinyvad.detectors.device_learning import workspace_bytes
from tinyvad.detectors.nearest import PatchCoreScorer
from tinyvad.detectors.routing import prototype, signatures
from tinyvad.detectors.student_teacher import Pairs, StudentTeacherScorer, golden_of
from tinyvad.detectors.task_gaussians import TaskStatistics
from tinyvad.detectors.task_memory import novelty
from tinyvad.embedding import Embedding, on_grid
from tinyvad.engines import Engine, threads
from tinyvad.engines.int8 import Int8Engine
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import CheckFailed, InputError
from tinyvad.evaluate import Evaluation, evaluate
from tinyvad.export.c import firmware_files
from tinyvad.export.c_model import Camera
from tinyvad.export.onnx import to_onnx
from tinyvad.files import new_folder, write_bytes, write_text
from tinyvad.firmware_sim import budget as budgets
from tinyvad.firmware_sim.chips import chip_of
from tinyvad.firmware_sim.offline_plan import planned_tflite
from tinyvad.firmware_sim.targets import Target, load_target
from tinyvad.firmware_sim.training_step import adaptation_figures
from tinyvad.graph.ir import Graph
from tinyvad.graph.schedule import Schedule
from tinyvad.images import Dataset, Preprocessing, apply_table, find_datasets, load_images
from tinyvad.metrics import f1_max
from tinyvad.model import BACKBONES, BANKS, FORMAT, MANIFEST, Model, batches, load
from tinyvad.probing import FEWEST_IMAGES, Probe
from tinyvad.project import TRAINED, Project, make_project
from tinyvad.report.html import write_report
from tinyvad.sizing import (
    ScorerMemory,
    bank_in_flash,
    bank_limit,
    expected_scorer_memory,
    needs,
    plan_memory,
    read_network,
    scorer_memory,
)
from tinyvad.slots import SLOTS, STATES, look
from tinyvad.verify import SAMPLES, verify
from tinyvad.version import __version__

SAMPLE_IMAGES = 8
SELF_TEST_CELLS = 4
IMAGES_TO_FILL = 8  # images of a new product that may fill its share of a memory bank on the device
FIRMWARE = "firmware"
# what lies in firmware/ after `make` there; it is all made again
FIRMWARE_SUFFIXES = (".c", ".h", ".S", ".ld", ".md", ".tvb", ".o", ".su", ".d", ".elf", ".map")
REPORTS = ("report.json", "report.html")
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Built:
    """Where a build is, and its report (the content of report.json)."""

    folder: Path
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A detector fitted on one engine's features: what goes into one bank.

    Attributes:
        golden: TEST and GOLD, some cells of the first image.
        known: of products that were learnt before, what the new network makes of them.
    """

    embedding: Embedding | Pairs
    scorer: Scorer
    held_out: np.ndarray
    golden: tuple[np.ndarray, np.ndarray]
    threshold: int
    rule: str
    images: int
    prototype: np.ndarray
    statistics: TaskStatistics | None
    ladder: np.ndarray | None
    known: tuple[BankTask, ...] = ()


def build(project: Project, progress: Progress | None = None) -> list[Built]:
    """Make one build a category; see the module's text.

    Raises:
        InputError: wrong settings or images. CheckFailed: over budget, or engines that differ. Nothing is left behind.
    """
    if project.data is None:
        raise InputError("no data: give --data DIR or data = ... in tinyvad.toml")
    datasets = find_datasets(project.data)
    if project.category is not None:
        names = [dataset.name for dataset in datasets]
        if project.category not in names:
            raise InputError(f"{project.data} has no category {project.category}; it has {', '.join(names)}")
        datasets = [dataset for dataset in datasets if dataset.name == project.category]
    if project.method is not None and project.method not in METHODS:
        raise InputError(f"no method called {project.method}; choose one of {', '.join(METHODS)}")
    fitting_trained.check_settings(project)
    target = load_target(project.target) if project.target is not None else None
    if target is not None and project.frame is not None:
        _check_frame(project.frame, target)
    several = len(datasets) > 1
    for dataset in datasets:
        if any("\ud800" <= letter <= "\udfff" for letter in dataset.name):
            raise InputError(f"folder {dataset.name!a}: its name is no text, and so no name of a product; rename it")
        if several and (Path(dataset.name).name != dataset.name or dataset.name in (".", "..")):
            raise InputError(f"{dataset.root}: category {dataset.name!r} is no plain folder name; rename it")
        _check_out(project.out / dataset.name if several else project.out, project.data)
    tell = progress or (lambda stage, done, total: None)
    chooser = Chooser(project, target, min(len(dataset.train_good) for dataset in datasets), tell)
    return [
        Build(project, dataset, target, _choose(chooser, project, dataset), tell).run(
            project.out / dataset.name if several else project.out
        )
        for dataset in datasets
    ]


def _check_frame(frame: str, target: Target) -> None:
    """Before any work: a camera frame that is larger than the target's memory. Raises CheckFailed."""
    item = budgets.Item("camera frame", budgets.frame_bytes(frame), "exact")
    budgets.make_budget(target, [item], []).check("use a smaller --frame or a larger --target")


def _choose(chooser: Chooser, project: Project, dataset: Dataset) -> Choice:
    """Network and size for one category, sizes tried on its good images where there are enough."""
    enough = len(dataset.train_good) >= FEWEST_IMAGES
    probe = lambda: Probe(dataset.train_good, project.seed, project.on_error, project.bit_depth)  # noqa: E731
    return chooser.choose(probe if enough else None)


def fit(images: str | Path, out: str | Path = "build", **settings: Any) -> Model:
    """Fit on a folder of images and load the result, for notebooks.

    Args:
        images: a folder in any layout that ``tinyvad build --data`` takes.
        out: where the build goes.
        settings: fields of ``Project``: method, backbone, target, image_size, ...
    """
    built = build(make_project({"data": str(images), "out": str(out), **settings}))
    return load(built[0].folder)


def _check_out(out: Path, data: Path) -> None:
    """Before any work: a build replaces nothing but an empty folder or an earlier build that nobody added files to.

    Raises:
        InputError: ``out`` is a file, lies in the folder of images, or holds something that a build does not write.
    """
    if out.resolve().is_relative_to(data.resolve()):
        raise InputError(f"{out} lies in {data}, whose pictures the next build would read; choose an --out beside it")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a folder; choose another --out")
    check_only_ours(out)
    generation = max((slot.bank.header.generation for slot in look(out, "int8") if slot.bank is not None), default=0)
    learnt = out / STATE
    if generation or (learnt.is_file() and len(read_products(read_state(learnt), learnt)[2]) > 1):
        which = f" (generation {generation})" if generation else ""
        raise InputError(f"{out} has learnt since it was built{which}; remove it, or use another --out")


def check_only_ours(out: Path) -> None:
    """Raise InputError if a folder that is to be replaced holds something that a build does not write."""
    ours = {MANIFEST, *BACKBONES.values(), *REPORTS, *(name for pair in SLOTS.values() for name in pair)}
    for path in sorted(out.rglob("*")) if out.is_dir() else []:
        name = path.relative_to(out)
        if name.as_posix() in ours or (name.parts[0] == SAMPLES and (path.is_dir() or path.suffix == ".png")):
            continue
        if name.parts[0] == STATES:
            continue
        if name.parts[0] == FIRMWARE and (path.is_dir() or path.suffix in FIRMWARE_SUFFIXES or path.name == "Makefile"):
            continue
        raise InputError(f"{out} holds {name}, which is no part of a build; choose an empty or new --out")


class Build:
    """The state that the steps of one build share.

    Args:
        known: products that the network has learnt already, by task number. stream: what learnt them.
    """

    def __init__(
        self, project: Project, dataset: Dataset, target: Target | None, choice: Choice, tell: Progress,
        known: Sequence[Known] = (), stream: TrainedMethod | None = None,
    ) -> None:  # fmt: skip
        self.project, self.dataset, self.target, self.choice, self.tell = project, dataset, target, choice, tell
        self.known, self.stream = list(known), stream
        self.backbone = choice.backbone
        mean, std = choice.backbone.mean, choice.backbone.std
        self.preprocessing = Preprocessing(choice.size, choice.size, mean, std, bit_depth=project.bit_depth)
        self.skipped: list[tuple[Path, str]] = []
        self.keys: list[int] = []  # of the good images, so that none is learnt a second time
        self.training: fitting_trained.Training | None = None
        self.samples: list[np.ndarray] = []  # of the dataset's product, for ``Known``

    def run(self, out: Path) -> Built:
        graph = self.backbone.graph_at(self.preprocessing.height)
        if self.project.method in TRAINED:
            self.training = self.train(graph, out)
            graph = self.training.detector.graph()
        quantized = self.quantize(graph)
        files = {
            "int8": planned_tflite(quantized, f"tinyvad backbone {self.backbone.name}"),
            "onnx": _onnx_bytes(graph, self.preprocessing),
        }
        self.network = read_network(files["int8"])
        self.engine = Int8Engine(self.network.graph, threads())
        self.tensors = [self.engine.graph.tensors[name] for name in self.engine.graph.outputs]
        self.engines: dict[str, Engine] = {"int8": self.engine, "onnx": OnnxEngine(files["onnx"], threads())}
        stores, samples = self.features()
        if self.training is not None and stores["int8"].count != self.training.count:
            raise InputError(
                f"{self.dataset.root}: {self.training.count} images were trained on, {stores['int8'].count} can be read "
                "now; run the command again"
            )
        self.n_good = stores["int8"].count
        self.limit = self.bank_limit()
        self.plan = fitting.plan_method(
            self.project.method, self.tensors, self.preprocessing.height, self.n_good, self.limit, self.project.grid,
            self.project.dimensions, self.project.seed, self.project.tasks, self.limit != self.project.bank_bytes,
        )  # fmt: skip
        fitted = {name: self.fit(name, store, samples) for name, store in stores.items()}
        with new_folder(out, MANIFEST) as folder:
            for name, data in files.items():
                write_bytes(folder / BACKBONES[name], data)
            if self.stream is not None:
                arrays = state_arrays(self.network_graph, self.stream, self.products())
                if self.project.target is not None and self.project.target.lower().endswith(".toml"):
                    arrays["target"] = np.frombuffer(Path(self.project.target).read_bytes(), np.uint8)
                write_bytes(folder / STATE, pack_state(arrays))
            (folder / SAMPLES).mkdir()
            for index, image in enumerate(samples):
                write_bytes(folder / SAMPLES / f"{index:02d}.png", _png(image))
            report = self.finish(folder, files, fitted)
        for left in out.parent.glob(f".{out.name}.training-*.npz"):  # of this training, and of any that was given up
            left.unlink(missing_ok=True)
        return Built(out, report)

    def schedule(self, memory: ScorerMemory, learning: int = 0) -> Schedule | None:
        """The memory plan of our runtime beside the workspace of learning; None where TFLM runs the network."""
        if self.project.runtime == "tflm":
            return None
        return plan_memory(self.network, memory, self.project, self.target, learning)

    def bank_limit(self) -> int | None:
        """Bytes that the bank may take, before the scorer is known."""
        flash: list[budgets.Item] = []
        if self.target is not None:
            memory = expected_scorer_memory(self.tensors, self.project.grid, self.project.method)
            flash = needs(self.network, memory, self.schedule(memory), 0, self.target, self.project.frame).flash
        return bank_limit(flash, self.target, self.project.bank_bytes, self.project.device_tasks)

    def slot_bytes(self) -> int:
        """Bytes that the bank may have as it learns: the user's bound, else what the planned products take at most.

        Never more than the target's flash leaves; a build for one product may use all of that.
        """
        if self.project.device_tasks > 1 and self.project.bank_bytes is None:
            return self.plan.bank_bytes
        return self.limit or fitting.DEFAULT_BANK_BYTES

    def quantize(self, graph: Graph) -> Graph:
        """The int8 graph, calibrated on evenly chosen good images; sets ``table``, the network's input of every pixel."""
        paths = self.dataset.train_good
        n = min(CALIBRATION_IMAGES, len(paths))
        chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, n).round().astype(int)]

        def images() -> Iterator[np.ndarray]:
            loaded = load_images(chosen, self.preprocessing, on_error=self.project.on_error, skipped=[])
            for done, (_, image) in enumerate(loaded, 1):
                yield image
                self.tell("calibrate", done, n)
            for product in self.known:
                yield from product.samples

        calibrated = quantize_on(graph, self.preprocessing, images())
        self.table = calibrated.table
        self.input_quantization = {"scale": calibrated.scale, "zero_point": calibrated.zero_point}
        return calibrated.graph

    def features(self) -> tuple[dict[str, fitting.TapStore], list[np.ndarray]]:
        """Tapped int8 maps of all good images by both engines, and a few images to verify with."""
        stores = {name: fitting.TapStore(self.tensors) for name in self.engines}
        paths = self.dataset.train_good
        kept = set(np.linspace(0, len(paths) - 1, min(SAMPLE_IMAGES, len(paths))).round().astype(int).tolist())
        samples: list[np.ndarray] = []
        sampled = set() if self.training is None else set(fitting_trained.samples_of(self.training).tolist())
        loaded = load_images(paths, self.preprocessing, on_error=self.project.on_error, skipped=self.skipped)
        seen = 0
        for batch in batches(loaded):
            images = np.stack([image for _, image in batch])
            samples.extend(image for i, image in enumerate(images) if seen + i in kept)
            self.samples.extend(image for i, image in enumerate(images) if seen + i in sampled)
            self.keys.extend(image_key(image) for image in images)
            for name, store in stores.items():
                store.append(self.taps(name, images))
            seen += len(batch)
            self.tell("features", seen + len(self.skipped), len(paths))
        return stores, samples

    def taps(self, name: str, images: np.ndarray) -> list[np.ndarray]:
        """Tapped int8 maps of (n, S, S, 3) uint8 images by one engine."""
        if name == "int8":
            return self.engine.features(apply_table(images, self.table))
        floats = self.engines[name].features(np.stack([self.preprocessing.float_input(image) for image in images]))
        grids = [tensor.quantization for tensor in self.tensors if tensor.quantization is not None]
        return [
            on_grid(values, float(grid.scale[0]), int(grid.zero_point[0]))
            for values, grid in zip(floats, grids, strict=True)
        ]

    def train(self, graph: Graph, out: Path) -> fitting_trained.Training:
        """The method's own network, trained on the good images; one that was stopped goes on where it was."""
        project, size = self.project, self.preprocessing.height
        checkpoint = fitting_trained.checkpoint_name(out, project, self.backbone, size, self.dataset.name)
        if project.tasks == 1:
            training = fitting_trained.train_on(
                graph, self.dataset.train_good, self.preprocessing, project, checkpoint, self.tell
            )
            return self.with_adaptation(training, 0)
        self.network_graph = graph
        if self.stream is None:
            self.stream = open_stream(graph, self.preprocessing, project, len(self.dataset.train_good))
        number, items = len(self.stream.task_names), PicturedItems(self.stream.detector, self.images(), self.preprocessing)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        trained = self.stream.learn(self.dataset.name, items, checkpoint, self.tell)
        recipe = self.stream.recipe(number)
        held = fitting_trained.held_out(len(items), recipe.held_out, project.seed)
        training = fitting_trained.training_of(self.stream.detector, recipe, trained, held, len(items))
        return self.with_adaptation(training, self.stream.replay_nbytes())

    def with_adaptation(self, training: fitting_trained.Training, replay_bytes: int) -> fitting_trained.Training:
        """With what such a training takes on a device; half of a batch is replayed where anything is."""
        times = 2 if replay_bytes else 1
        batch, images = training.facts["recipe"]["batch"] * times, (training.count - len(training.held_out)) * times
        figures = adaptation_figures(training.detector, None, batch, replay_bytes, images)
        return replace(training, facts={**training.facts, "adaptation": figures})

    def images(self) -> Iterator[np.ndarray]:
        """(S, S, 3) uint8 of every good image that can be read, one in memory at a time."""
        paths = self.dataset.train_good
        loaded = load_images(paths, self.preprocessing, on_error=self.project.on_error, skipped=[])
        for done, (_, image) in enumerate(loaded, 1):
            yield image
            self.tell("frozen layers", done, len(paths))

    def fit(self, name: str, store: fitting.TapStore, samples: list[np.ndarray]) -> Fitted:
        """Embedding, scorer and threshold from one engine's features of the good images."""
        embedding: Embedding | Pairs
        if self.training is not None:
            embedding, fit = fitting_trained.fit_scorer(self.training, store, self.tensors, self.plan)
            rule = fitting_trained.rule_of(self.training, self.project.quantile)
        else:
            embedding = fitting.make_embedding(store, self.tensors, self.plan)
            copies, rule = None, f"{self.project.quantile:g} quantile of held-out good images"
            if store.count == 1:
                copies, rule = fitting.TapStore(self.tensors), "shifted copies of the only good image"
                copies.append(self.taps(name, fitting.shifted_copies(samples[0])))
            tell = lambda done, total: self.tell(f"fit ({name})", done, total)  # noqa: E731
            fit = fitting.fit_and_hold_out(store, embedding, self.plan, self.project.quantile, copies, tell)
        # images that hardly differ make every fold's scores alike: the images that were fitted must pass as well
        seen = fitting.image_scores(fit.scorer, store.embeddings(embedding))
        threshold = max(fitting.threshold_of(scores, self.project.quantile) for scores in (fit.held_out, seen))
        channels = embedding.taps[-1].channels
        total = sum(signatures(batch, channels).sum(0) for batch in _routed(embedding, store))
        golden = _golden(embedding, fit.scorer, [m[0] for m in next(store.batches(np.arange(1)))])
        return Fitted(embedding, fit.scorer, fit.held_out, golden, threshold, rule, store.count,
                      prototype(np.asarray(total), store.count), fit.statistics, fit.ladder,
                      tuple(self.known_task(name, product, embedding, fit.scorer) for product in self.known))  # fmt: skip

    def products(self) -> list[Known]:
        """Every product that the network knows now, by task number."""
        name, samples, keys = self.dataset.name, np.stack(self.samples), np.array(self.keys, np.uint64)
        names = [product.name for product in self.known]
        if name not in names:
            return [*self.known, Known(name, self.n_good, samples, keys)]
        at = names.index(name)
        return [*self.known[:at], self.known[at].with_more(samples, keys), *self.known[at + 1 :]]

    def known_task(self, name: str, product: Known, embedding: Embedding | Pairs, scorer: Scorer) -> BankTask:
        """Threshold and prototype of a product that was learnt before, by the network as it is now."""
        store = fitting.TapStore(self.tensors)
        for batch in batches(product.samples):
            store.append(self.taps(name, np.stack(batch)))
        scores = fitting.image_scores(scorer, store.embeddings(embedding))
        channels = embedding.taps[-1].channels
        total = signatures(np.concatenate(list(_routed(embedding, store))), channels).sum(0)
        threshold = fitting.threshold_of(scores, self.project.quantile)
        rule = f"{self.project.quantile:g} quantile of {store.count} good images that were kept"
        return BankTask(product.name, product.images, threshold, rule, prototype(total, store.count))

    def finish(self, folder: Path, files: dict[str, bytes], fitted: dict[str, Fitted]) -> dict[str, Any]:
        """Banks, budget, manifest, comparison of engines, evaluation and report into ``folder``; the report's content."""
        self.write_banks(folder, files, fitted)
        if self.project.threshold == "f1":
            fitted = {name: self.best_f1(folder, name, one) for name, one in fitted.items()}
            self.write_banks(folder, files, fitted)
        exact = fitted["int8"]
        taps = [(*tap.size, tap.channels) for tap in exact.embedding.taps]
        memory = scorer_memory(taps, self.plan.grid, exact.scorer, exact.embedding.pool)
        bank = (folder / BANKS["int8"]).read_bytes()
        learning = workspace_bytes(read_bank(bank, BANKS["int8"]))
        schedule, budget = self.schedule(memory, learning), None
        if self.target is not None:
            size = len(bank) if self.project.device_tasks == 1 else self.slot_bytes()
            stored = bank_in_flash(size, self.project.device_tasks, self.target)
            all_needs = needs(self.network, memory, schedule, stored, self.target, self.project.frame, learning)
            budget = all_needs.on(self.target)
            budget.check("use a smaller --image-size, --grid or --bank-bytes, or a larger --target")
        if schedule is not None:
            self.write_firmware(folder / FIRMWARE, schedule, bank, learning)
        manifest = _read_json(folder / MANIFEST)
        verification = verify(folder, progress=lambda done, total: self.tell("compare engines", done, total))
        if not verification["ok"]:
            raise CheckFailed(f"{self.dataset.root}: {verification['problems'][0]}; please report this")
        model = load(folder)
        evaluation = self.evaluate(model) if self.dataset.test else None
        facts = BuildFacts(manifest, self.dataset, self.network, schedule, budget, self.target, exact.held_out,
                           self.skipped, verification, self.project.frame)  # fmt: skip
        report = make_report(facts, model, evaluation)
        _write_json(folder / REPORTS[0], report)
        write_report(folder / REPORTS[1], report, make_cases(model, evaluation, self.dataset))
        _write_json(folder / MANIFEST, {**manifest, "files": _hashes(folder)})
        return report

    def write_firmware(self, folder: Path, schedule: Schedule, bank: bytes, learning: int) -> None:
        """The C project, and the same bank once more, so that it compiles wherever it is copied to."""
        frame = self.project.frame
        chip = None
        if self.target is not None:
            slot = self.slot_bytes() if self.project.device_tasks > 1 else 0
            chip = chip_of(self.target, schedule.arena_bytes, budgets.frame_bytes(frame), slot, learning)
        camera = None
        if frame is not None:
            height, width, form = budgets.parse_frame(frame)
            camera = Camera(width, height, form)
        for name, data in firmware_files(self.network.graph, schedule, bank, chip, camera).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / name, data)

    def write_banks(self, folder: Path, files: dict[str, bytes], fitted: dict[str, Fitted]) -> None:
        for name, one in fitted.items():
            state = self.state(folder, name, one)
            write_bytes(folder / BANKS[name], self.bank(files[name], one, state))
        _write_json(folder / MANIFEST, self.manifest(folder, fitted))

    def state(self, folder: Path, name: str, fitted: Fitted) -> str | None:
        """Keep what more images of the same product need (see ``tinyvad.continual.learn``); the file's name."""
        if self.project.device_tasks == 1:
            return None
        arrays = {} if fitted.statistics is None else fitted.statistics.arrays()
        if fitted.statistics is not None and self.project.threshold != "f1":
            folds = fitting.deal(fitted.images)  # as ``fit_and_hold_out`` deals them; a single image has shifted copies
            knew = np.full(len(fitted.held_out), 1)
            for fold in folds if fitted.images > 1 else ():
                knew[fold] = fitted.images - len(fold)
            arrays[HELD] = np.stack([knew, fitted.held_out], 1).astype(np.int64)
        if name == "int8":
            arrays[KEYS] = np.unique(np.array(self.keys, np.uint64))
        if not arrays:
            return None
        path = state_name(name, 0)
        write_bytes(folder / path, pack_state(arrays))
        return path

    def bank(self, backbone: bytes, fitted: Fitted, state: str | None) -> bytes:
        header = Header(
            kind=fitted.scorer.kind,
            backbone_crc32=zlib.crc32(backbone),
            input_size=(self.preprocessing.height, self.preprocessing.width),
            grid_size=fitted.embedding.grid,
            taps=len(fitted.embedding.taps),
            updatable=self.project.device_tasks > 1,
        )
        meta = {
            "method": self.plan.method,
            "layers": [tap.name for tap in fitted.embedding.taps],
            "unit": fitted.scorer.unit,
        }
        shared = {"LUT ": self.table, **fitted.embedding.sections()}
        tasks = self.tasks(fitted, state)
        scorers = [fitted.scorer] * len(tasks)
        return bank_of_tasks(header, shared, scorers, tasks, fitted.golden, meta, self.learning(fitted.scorer))

    def tasks(self, fitted: Fitted, state: str | None = None) -> list[BankTask]:
        """The bank's products: those that were known, and the dataset's."""
        ladder = fitted.ladder
        if ladder is not None:  # a task that is cut keeps at least the threshold that it had
            rising = np.maximum(np.maximum.accumulate(ladder[:, 1]), fitted.threshold)
            ladder = np.stack([ladder[:, 0], rising], 1)
        task = BankTask(self.dataset.name, fitted.images, fitted.threshold, fitted.rule, fitted.prototype, ladder, state)
        tasks = [merged(known, task) if known.name == task.name else known for known in fitted.known]
        return tasks if task.name in [known.name for known in fitted.known] else [*tasks, task]

    def learning(self, scorer: Scorer) -> Learning | None:
        """What a device must know to learn; None where the build is for one product."""
        tasks = self.project.device_tasks
        if tasks == 1:
            return None
        rows = self.plan.rows
        if not isinstance(scorer, PatchCoreScorer):
            return Learning(self.slot_bytes(), tasks, rows)
        share = max(rows // tasks, 1)
        return Learning(self.slot_bytes(), tasks, rows, max(share // IMAGES_TO_FILL, 1), novelty(scorer.bank, share))

    def manifest(self, folder: Path, fitted: dict[str, Fitted]) -> dict[str, Any]:
        graph, project = self.engine.graph, self.project
        return {
            "format": FORMAT,
            "tinyvad": __version__,
            "task": self.dataset.name,
            "method": {"name": self.plan.method, "settings": self.plan.settings},
            "backbone": {
                "name": self.backbone.name,
                "source": self.backbone.source,
                "sha256": self.backbone.sha256,
                "random": self.backbone.random,
                "quality": self.backbone.quality,
                "tried": [one.to_dict() for one in self.choice.tried],
                "sizes_tried": [one.to_dict() for one in self.choice.sizes],
                "layers": [tensor.name for tensor in self.tensors],
                "macs": graph.macs(),
                "parameters": graph.parameters(),
                "input_quantization": self.input_quantization,
            },
            "preprocessing": self.preprocessing.to_dict(),
            "grid": list(self.plan.grid),
            "thresholds": {
                name: {
                    "raw": first.threshold,
                    "score": float(real_scores(one.scorer, first.threshold)),
                    "rule": first.rule,
                    "n_held_out": len(one.held_out),
                }
                for name, one in fitted.items()
                for first in self.tasks(one)[:1]
            },
            "target": None if self.target is None else {"name": self.target.name, "alias": self.target.alias},
            "learning": {"tasks": project.tasks, "slot_bytes": self.slot_bytes()},
            "training": {
                "n_good": self.n_good,
                "skipped": [[str(path), reason] for path, reason in self.skipped],
                **({} if self.training is None else self.training.facts),
            },
            "settings": {
                "seed": project.seed, "epochs": project.epochs, "shared": project.shared, "strategy": project.strategy,
                "replay": project.replay, "replay_form": project.replay_form, "frame": project.frame,
                "layers": None if project.layers is None else list(project.layers), "bank_bytes": project.bank_bytes,
                "image_size": project.image_size, "grid": project.grid, "quantile": project.quantile,
                "runtime": project.runtime, "plan": project.plan, "max_ms": project.max_ms,
            },
            "files": _hashes(folder),
        }  # fmt: skip

    def best_f1(self, folder: Path, name: str, fitted: Fitted) -> Fitted:
        """The same detector with the threshold of the best F1 on the labelled test images."""
        labels = [sample.label for sample in self.dataset.test]
        if len(set(labels)) < 2:
            raise InputError(f"{self.dataset.root}: --threshold f1 needs good and defective test images")
        verdicts = self.evaluate(load(folder, name)).verdicts
        scores = np.array([verdict.raw_score for verdict in verdicts])
        threshold = int(f1_max(np.array([verdict.sample.label for verdict in verdicts]), scores)[1])
        return replace(fitted, threshold=threshold, rule="best F1 on the labelled test images")

    def evaluate(self, model: Model) -> Evaluation:
        progress = lambda done, total: self.tell(f"test ({model.engine.name})", done, total)  # noqa: E731
        return evaluate(model, self.dataset, self.project.on_error, progress)


def _routed(embedding: Embedding | Pairs, store: fitting.TapStore) -> Iterator[np.ndarray]:
    """What images are routed by, in batches (n, H, W, channels): embeddings, or the last tap where there are none."""
    if embedding.native:
        yield from (maps[-1] for maps in store.batches())
    else:
        yield from store.embeddings(embedding)


def _golden(embedding: Embedding | Pairs, scorer: Scorer, maps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """TEST (n, depth) int8 and GOLD (n, 3) uint32 (task, cell, score) of one image's tapped maps [(h, w, C)]."""
    cells = np.unique(np.linspace(0, embedding.grid[0] * embedding.grid[1] - 1, SELF_TEST_CELLS).round().astype(int))
    if isinstance(embedding, Pairs):
        assert isinstance(scorer, StudentTeacherScorer)
        return golden_of(embedding, scorer, maps, cells.tolist())
    vectors = embedding.integer([m[None] for m in maps])  # (1, H, W, D)
    scores = scorer.score(vectors)
    rows = np.array([[0, cell, scores.flat[cell]] for cell in cells], np.uint32)
    return vectors.reshape(-1, embedding.depth)[cells], rows


def _onnx_bytes(graph: Graph, preprocessing: Preprocessing) -> bytes:
    facts = {"mean": list(preprocessing.mean), "std": list(preprocessing.std), "colour": preprocessing.colour}
    data: bytes = to_onnx(graph, metadata=facts).SerializeToString(deterministic=True)
    return data


def _hashes(folder: Path) -> dict[str, Any]:
    """Of every file but the manifest and what learning keeps for itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    result = {}
    for path in paths:
        if path.is_relative_to(folder / STATES):
            continue
        data = path.read_bytes()
        result[path.relative_to(folder).as_posix()] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return result


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
