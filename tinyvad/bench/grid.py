"""A grid file (TOML) in, the cells to run out: every stream x order x backbone x method x seed.

Everything is checked before anything runs: names, settings, folders, backbones. A cell is plain data, so that it can travel
to another process or machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvad.backbones.source import open_backbone
from tinyvad.bench.features import identity
from tinyvad.continual.base import Context
from tinyvad.continual.methods import is_trained, make_method, settings_of
from tinyvad.continual.streams import Stream, make_stream
from tinyvad.errors import InputError
from tinyvad.images import Dataset, find_datasets
from tinyvad.project import PAIRED
from tinyvad.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METRICS = ("image_AUROC", "image_F1Max", "image_AP", "pixel_AUROC", "pixel_F1Max", "pixel_AP", "pixel_AUPRO")
TEMPLATE = """\
# A grid of `tinyvad bench continual`: every stream x order x backbone x method x seed is a cell. Paths are relative to this
# file. A stopped run goes on where it was; remove `out` to start anew.

data = "data"                       # a folder of categories (MVTec, VisA or plain layout)
out = "bench-continual"             # cells, tables and plots
# cache = "bench-continual/features"  # int8 features, shared by all cells
seeds = [0]                         # of the methods' random choices, and of drift's noise
metrics = ["image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max", "pixel_AUPRO"]   # also image_AP, pixel_AP

[[streams]]
protocol = "class"                  # one category a task; or X-YxN such as "4-1x2", a published one such as "mvtec-10-1x5"
orders = ["alphabetical", "shuffled 1", "shuffled 2"]   # or "given" (as in categories), or a list of names
# categories = ["bottle", "toothbrush"]                 # default: all
# task_identity = true              # methods are told the task at test time

# [[streams]]
# protocol = "drift"                # one category, changed with every task; or "variants": several that are one product
# categories = ["bottle"]
# schedule = [[], [["brightness", 0.3]], [["blur", 0.5], ["rotation", 0.1]]]

[[backbones]]
name = "mcunet-in3"                 # `tinyvad backbones` lists them; or an .onnx or .tflite file
image_size = 160
# layers = ["block6", "block10"]    # what is tapped; default: the backbone's own choice

[[methods]]                         # a list as a value tries each
name = "padim-compact-multi"
select = ["prototype", "patch"]     # what chooses the task: prototype, patch or image
dimensions = 40
# grid = 10                         # cells a side; default: the coarsest tapped map

[[methods]]
name = "padim-lite-uni"

[[methods]]
name = "patchcore-cl++"
budget = "256K"                     # bytes of all tasks together; or rows = 1000

# also padim-original, padim[-lite]-uni|multi, padim-compact-uni, patchcore[-lite]-cl|cl-mean-nn|cl++|online; bounds of each
# family: -fine-tuning, -joint, -separate
#
# detectors that are trained (pip install 'tinyvad[train]'): stfpm-, paste-, cfa-, simplenet- with fine-tuning, joint,
# replay, compressed-replay, ewc, si, mas or lwf, such as
#
# [[methods]]
# name = "paste-compressed-replay"
# form = ["float32", "int8"]        # how maps are stored; size = 100 items of all tasks, mode = "concat" or "replace"
# images = 100                      # at most so many a task; epochs, learning_rate, batch, patience, held_out: the recipe's
"""


@dataclass(frozen=True)
class StreamSpec:
    """A stream but for its order; ``name`` is what tables call it."""

    name: str
    protocol: str
    categories: tuple[str, ...] | None
    task_identity: bool
    schedule: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True)
class MethodSpec:
    """A method with all its settings as JSON; ``label`` names it with those that were given."""

    name: str
    label: str
    settings: str
    grid: int | None


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone; ``label`` is its name without folders, ``source`` tells its weights apart.

    Attributes:
        layers: what is tapped; None: the backbone's own choice.
    """

    name: str
    label: str
    source: str
    image_size: int
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One run: plain values.

    Attributes:
        order: 'alphabetical', 'given', 'shuffled N', or the categories.
        data, cache: folders. data_key: hash of the images' names, lengths and times of change.
    """

    stream: StreamSpec
    order: str | tuple[str, ...]
    method: MethodSpec
    backbone: BackboneSpec
    seed: int
    metrics: tuple[str, ...]
    data: str
    cache: str
    data_key: str

    @property
    def order_name(self) -> str:
        return self.order if isinstance(self.order, str) else " ".join(self.order)

    @property
    def name(self) -> str:
        """Of its file: readable words, and a hash of all that its result depends on."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("data", "cache")}
        facts["backbone"] = {**facts["backbone"], "name": ""}  # its file's place says nothing
        if self.backbone.layers is None:
            del facts["backbone"]["layers"]
        key = hashlib.sha256(json.dumps([__version__, facts], sort_keys=True).encode()).hexdigest()[:12]
        words = f"{self.stream.name} {self.method.label} {self.backbone.label} {self.order_name} {self.seed}"
        return f"{re.sub('[^a-z0-9.+]+', '-', words.lower())[:100].strip('-')}-{key}"


@dataclass(frozen=True)
class Grid:
    """A grid file, checked."""

    file: Path
    out: Path
    metrics: tuple[str, ...]
    cells: tuple[Cell, ...]


def load_grid(path: Path) -> Grid:
    """Read and check a grid file.

    Raises:
        InputError: no such file, not TOML, or a value that is unknown, missing or wrong (file and field are named).
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; `tinyvad bench continual --init {path}` writes one") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    known = ("data", "out", "cache", "seeds", "metrics", "streams", "backbones", "methods")
    _check_keys(path, "", values, known)
    data = path.parent / _take(path, values, "data", str)
    out = path.parent / _take(path, values, "out", str, "bench-continual")
    cache = path.parent / values["cache"] if isinstance(values.get("cache"), str) else out / "features"
    seeds = _take(path, values, "seeds", list, [0])
    metrics = tuple(_take(path, values, "metrics", list, list(METRICS)))
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"{path}: metrics has {metric!r}; choose among {', '.join(METRICS)}")
    if not metrics or not seeds or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds):
        raise InputError(f"{path}: seeds must be whole numbers from 0 on, metrics at least one name")
    datasets = find_datasets(data.resolve())
    streams = [_stream(path, i, table) for i, table in enumerate(_tables(path, values, "streams"))]
    backbones = [_backbone(path, i, table) for i, table in enumerate(_tables(path, values, "backbones"))]
    methods = [m for i, table in enumerate(_tables(path, values, "methods")) for m in _methods(path, i, table)]
    for what, names in (("streams", [s.name for s, _ in streams]), ("methods", [m.label for m in methods])):
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{path}: {what} has {name!r} twice; leave one out, or give streams a name each")
    cells = []
    for stream, orders in streams:
        made = [open_stream(stream, order, seed, datasets) for order in orders for seed in seeds]
        places = metrics, str(data.resolve()), str(cache.resolve()), data_key_of(data.resolve(), made[0])  # of any order
        for backbone, method, order, seed in itertools.product(backbones, methods, orders, seeds):
            cells.append(Cell(stream, order, method, backbone, seed, *places))
    return Grid(path, out, metrics, tuple(cells))


def open_stream(spec: StreamSpec, order: str | tuple[str, ...], seed: int, datasets: Sequence[Dataset]) -> Stream:
    """The stream of a cell over the categories of its data folder.

    Raises:
        InputError: a category that is not there, or a stream that can't be made of them.
    """
    by_name = {dataset.name: dataset for dataset in datasets}
    names = spec.categories or tuple(by_name)
    if not isinstance(order, str):
        if sorted(order) != sorted(names):
            raise InputError(f"stream {spec.name}: order {', '.join(order)} must name each of {', '.join(names)} once")
        names, order = order, "given"
    for name in names:
        if name not in by_name:
            raise InputError(f"stream {spec.name}: no category {name!r} in the data; there are {', '.join(by_name)}")
    kind, _, number = order.partition(" ")
    chosen = [by_name[name] for name in names]
    of_order = int(number) if number.isdigit() else seed
    return make_stream(spec.protocol, chosen, kind, of_order, spec.task_identity, spec.schedule)


def _stream(path: Path, number: int, table: dict[str, Any]) -> tuple[StreamSpec, list[str | tuple[str, ...]]]:
    where = f"streams[{number}]"
    _check_keys(path, where, table, ("name", "protocol", "orders", "categories", "task_identity", "schedule"))
    protocol = _take(path, table, "protocol", str, where=where)
    categories = tuple(_take(path, table, "categories", list, [], where))
    orders = _take(path, table, "orders", list, ["alphabetical"], where)
    identity = _take(path, table, "task_identity", bool, False, where)
    schedule = _take(path, table, "schedule", list, [], where)
    for order in orders:
        if not _are_names(order) and re.fullmatch(r"alphabetical|given|shuffled \d+", str(order)) is None:
            raise InputError(
                f"{path}: {where}.orders has {order!r}; write alphabetical, given, a list of names, or shuffled and a "
                "number, such as 'shuffled 1'"
            )
    if not orders:
        raise InputError(f"{path}: {where}.orders is empty; leave it out for alphabetical")
    if not _are_names(categories):
        raise InputError(f"{path}: {where}.categories is {list(categories)}; expected a list of names")
    for task in schedule:
        if not isinstance(task, list) or not all(isinstance(step, list) and len(step) == 2 for step in task):
            raise InputError(f"{path}: {where}.schedule has {task!r}; write a list of [name, strength] a task")
    default = f"{protocol} {categories[0]}" if protocol in ("drift", "variants") and categories else protocol
    name = _take(path, table, "name", str, default + (", task known" if identity else ""), where)
    steps = tuple(tuple((str(step[0]), step[1]) for step in task) for task in schedule)
    spec = StreamSpec(name, protocol, categories or None, identity, steps)
    return spec, [order if isinstance(order, str) else tuple(order) for order in orders]


def _backbone(path: Path, number: int, table: dict[str, Any]) -> BackboneSpec:
    where = f"backbones[{number}]"
    _check_keys(path, where, table, ("name", "image_size", "layers"))
    name = _take(path, table, "name", str, where=where)
    layers = tuple(_take(path, table, "layers", list, [], where)) or None
    if layers is not None and not _are_names(layers):
        raise InputError(f"{path}: {where}.layers is {list(layers)}; expected a list of names")
    size = _take(path, table, "image_size", int, where=where)
    if not 32 <= size <= 1024:
        raise InputError(f"{path}: {where}.image_size is {size}; choose 32 to 1024 pixels")
    if name.lower().endswith((".onnx", ".tflite")):
        name = str((path.parent / name).resolve())
    backbone = open_backbone(name, None if layers is None else list(layers))
    return BackboneSpec(backbone.name if name == "auto" else name, backbone.name, backbone.sha256 or "", size, layers)


def _methods(path: Path, number: int, table: dict[str, Any]) -> list[MethodSpec]:
    """The methods of one table: a list as a value tries each."""
    where = f"methods[{number}]"
    name = _take(path, table, "name", str, where=where)
    given = {key: value if isinstance(value, list) else [value] for key, value in table.items() if key != "name"}
    specs = []
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values))
        words = ", ".join(f"{key} {_word(value)}" for key, value in chosen.items())
        grid = chosen.pop("grid", None)
        if grid is not None and not (isinstance(grid, int) and 1 <= grid <= 128):
            raise InputError(f"{path}: {where}.grid is {grid!r}; choose 1 to 128 cells a side")
        if grid is not None and is_trained(name) and name.startswith(PAIRED):
            raise InputError(f"{path}: {where}.grid does not go with {name}: its map has the cells of the finest layer")
        settings = settings_of(name, chosen, f"{path}: {where}")
        try:
            make_method(name, Context(np.ones(1), 1), settings)
        except InputError as error:
            raise InputError(f"{path}: {where}: {error}") from error
        label = f"{name} ({words})" if words else name
        specs.append(MethodSpec(name, label, json.dumps(settings, sort_keys=True), grid))
    return specs


def _are_names(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def data_key_of(root: Path, stream: Stream) -> str:
    """Hash of the identities of all files that a stream looks at, in whatever order it does."""
    files = {path for unit in stream.units for path in unit.dataset.train_good}
    files |= {sample.path for unit in stream.units for sample in unit.dataset.test}
    files |= {sample.mask for unit in stream.units for sample in unit.dataset.test if sample.mask is not None}
    return hashlib.sha256("\n".join(identity(path, root) for path in sorted(files)).encode()).hexdigest()[:16]


def _check_keys(path: Path, where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise InputError(f"{path}: {f'{where}.' if where else ''}{key} is unknown; known are {', '.join(known)}")


def _tables(path: Path, values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    tables = values.get(key)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path}: {key} is missing; write a table [[{key}]] each")
    return tables


def _take(
    path: Path, table: Mapping[str, Any], key: str, kind: type, default: Any = None, where: str = ""
) -> Any:
    """A field of ``kind``; without a default it must be there."""
    place = f"{where}.{key}" if where else key
    value = table.get(key, default)
    if value is None:
        raise InputError(f"{path}: {place} is missing; `tinyvad bench continual --init` shows what it may be")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "text", int: "a whole number", list: "a list", bool: "true or false"}
        raise InputError(f"{path}: {place} is {value!r}; expected {names[kind]}")
    return value
