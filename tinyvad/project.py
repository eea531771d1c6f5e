"""The settings of one build: tinyvad.toml first, flags win over it.

Flows in: a ``tinyvad.toml`` (optional) and the flags that were given. Flows out: a ``Project``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvad.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "tinyvad.toml"
RANDOM_WEIGHTS = "random"
RUNTIMES = ("tinyvad", "tflm")
TRAINED = ("stfpm", "paste", "cfa", "simplenet")  # methods whose network is trained on the good images
PAIRED = ("stfpm", "paste")  # of them those with a student and a teacher, compared tap by tap
MAX_TASKS = 255  # of one bank (TVAD_MAX_TASKS)
PLANS = ("auto", "layerwise", "inplace-dw", "patch")
TEMPLATE = """\
# Settings of one tinyvad build. Flags of `tinyvad build` win over this file. Paths are relative to this file.

data = "data"                  # a folder of images: MVTec or VisA layout, plain folders (good/...), or only good images
target = "cortex-m7"           # `tinyvad targets` lists them; a path to your own .toml works too
# out = "build"
# category = "bottle"          # when data holds several

# backbone = "auto"            # .onnx, .tflite or a name of `tinyvad backbones`; auto takes the best that fits the target
# weights = "weights.npz"      # weights for a backbone that is given by name: .npz, .onnx, .tflite, or the word random
# layers = ["block4", "block7", "block13"]   # default: the last block end at strides 4, 8 and 16
# mean = [0.485, 0.456, 0.406] # the network reads (pixel / 255 - mean) / std; default: what the file says or suggests
# std = [0.229, 0.224, 0.225]

# method = "padim-compact"     # `tinyvad methods` lists them; default: by rule
# shared = "block5"            # paste: the last layer that teacher and student share; default: by rule
# epochs = 10                  # stfpm, paste, cfa, simplenet: passes over the good images; default: the paper's
# strategy = "compressed-replay"  # and with tasks: what keeps them from forgetting (`tinyvad learn --help`)
# replay = 100                 # items of all products together that are trained on again
# replay_form = "int8"         # how compressed replay stores them: float32, int8, rotated-4, ...
# image_size = 160             # default: chosen on the good images among the sizes that fit (`tinyvad build --help`)
# max_ms = 500                 # estimated milliseconds an image on the target; default: 1000, doubled until something fits
# grid = 10                    # cells a side of the score map; default: the deepest tap's map
# dimensions = 48              # padim-compact: directions kept; default: the most that fits
# bank_bytes = "160K"          # upper bound; default: what the target's flash leaves
# tasks = 6                    # products that the bank must have room for (`tinyvad learn`); flash then holds two slots
# frame = "320x240-rgb565"     # a camera frame to keep in RAM; default: the camera writes the network's input
# runtime = "tinyvad"          # what runs the network on the target: tinyvad's own C runtime, or "tflm"
# plan = "auto"                # its memory plan: layerwise, inplace-dw, patch, or auto: the fastest of them that fits
# bit_depth = 16               # bits that a 16-bit file holds (12 for many cameras)
# threshold = "quantile"       # or "f1": the best F1 on labelled defects in data's test folder
# quantile = 0.99              # share of held-out good images below the threshold
# seed = 0
# on_error = "stop"            # or "skip" unreadable files
"""


@dataclass(frozen=True)
class Project:
    """One build's settings; see ``TEMPLATE`` for what each means."""

    data: Path | None = None
    target: str | None = None
    out: Path = Path("build")
    category: str | None = None
    backbone: str | None = None
    weights: Path | None = None
    layers: tuple[str, ...] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    method: str | None = None
    shared: str | None = None
    epochs: int | None = None
    strategy: str | None = None
    replay: int = 100
    replay_form: str = "int8"
    image_size: int | None = None
    grid: int | None = None
    dimensions: int | None = None
    bank_bytes: int | None = None
    tasks: int = 1
    frame: str | None = None
    runtime: str = "tinyvad"
    plan: str = "auto"
    max_ms: int | None = None
    bit_depth: int = 16
    threshold: str = "quantile"
    quantile: float = 0.99
    seed: int = 0
    on_error: str = "stop"

    @property
    def device_tasks(self) -> int:
        """Products that a bank has room for which learns on the device; a network learns on a PC, and is flashed whole."""
        return 1 if self.method in TRAINED else self.tasks

    def __post_init__(self) -> None:
        if self.image_size is not None and not 32 <= self.image_size <= 1024:
            raise InputError(f"image size {self.image_size}: choose 32 to 1024 pixels")
        if self.grid is not None and not 1 <= self.grid <= 128:
            raise InputError(f"grid {self.grid}: choose 1 to 128 cells a side")
        if not 0.5 <= self.quantile <= 1:
            raise InputError(f"quantile {self.quantile}: choose 0.5 to 1")
        if self.threshold not in ("quantile", "f1"):
            raise InputError(f"threshold {self.threshold!r}: choose quantile or f1")
        if self.runtime not in RUNTIMES:
            raise InputError(f"runtime {self.runtime!r}: choose {' or '.join(RUNTIMES)}")
        if self.plan not in PLANS:
            raise InputError(f"plan {self.plan!r}: choose one of {', '.join(PLANS)}")
        if self.max_ms is not None and self.max_ms < 1:
            raise InputError(f"max ms {self.max_ms}: choose 1 or more")
        if self.on_error not in ("stop", "skip"):
            raise InputError(f"on_error {self.on_error!r}: choose stop or skip")
        if self.bank_bytes is not None and self.bank_bytes < 1:
            raise InputError(f"bank bytes {self.bank_bytes}: must be positive")
        if not 1 <= self.tasks <= MAX_TASKS:
            raise InputError(f"tasks {self.tasks}: choose 1 to {MAX_TASKS}")
        if self.dimensions is not None and self.dimensions < 2:
            raise InputError(f"dimensions {self.dimensions}: choose 2 or more")
        if not 8 <= self.bit_depth <= 16:
            raise InputError(f"bit depth {self.bit_depth}: choose 8 to 16")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not (all(map(math.isfinite, values)) and (name == "mean" or min(values) > 0)):
                raise InputError(f"{name} {list(values)}: choose finite numbers{', above 0' if name == 'std' else ''}")
        if self.replay < 1:
            raise InputError(f"replay {self.replay}: choose 1 item or more")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"epochs {self.epochs}: choose 1 or more")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: must not be negative")


def load_project(file: Path | None, flags: dict[str, Any]) -> Project:
    """Settings of ``file`` (default: ./tinyvad.toml if it is there), overridden by the flags that are not None.

    Raises:
        InputError: no such file, not TOML, an unknown key or a value of the wrong type (file and key are named).
    """
    path = file if file is not None else Path(FILE)
    values: dict[str, Any] = {}
    if file is not None or path.is_file():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist; `tinyvad init` writes one") from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    values = {key: _converted(path, key, value) for key, value in values.items()}
    values.update({key: _converted(None, key, value) for key, value in flags.items() if value is not None})
    return Project(**values)


_KINDS: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(Project)}
def make_project(settings: dict[str, Any]) -> Project:
    """A ``Project`` from plain values, the same as in tinyvad.toml. Raises InputError naming the one that is wrong."""
    return Project(**{key: _converted(None, key, value) for key, value in settings.items() if value is not None})


_FILES = (".onnx", ".tflite", ".toml")  # a backbone or target that ends so is a file, anything else a name


def _converted(file: Path | None, key: str, value: Any) -> Any:
    """``value`` as ``Project`` wants it; ``file`` is None for a flag."""
    where = f"{file}: {key}" if file is not None else f"--{key.replace('_', '-')}"
    kind = _KINDS.get(key)
    if kind is None:
        raise InputError(f"{where} is unknown; known are {', '.join(_KINDS)}")
    base = kind.split(" | ")[0]
    if key == "bank_bytes":
        return parse_bytes(value, where)
    if base.startswith("tuple"):
        return _several(base, value, where)
    expected: dict[str, tuple[type, ...]] = {
        "Path": (str, Path), "str": (str,), "int": (int,), "float": (int, float)
    }  # fmt: skip
    if not isinstance(value, expected[base]) or isinstance(value, bool) or value == "":
        what = {"Path": "a path", "str": "text", "int": "a whole number", "float": "a number"}[base]
        raise InputError(f"{where} is {value!r}; expected {what}")
    folder: Path = file.parent if file is not None else Path()
    if key == "weights" and str(value) == RANDOM_WEIGHTS:
        return Path(RANDOM_WEIGHTS)  # a word, not a file
    if base == "Path":
        return folder / str(value)
    if key in ("backbone", "target") and str(value).lower().endswith(_FILES):
        return str(folder / str(value))
    return value


def _several(base: str, value: Any, where: str) -> tuple[Any, ...]:
    """Layer names, or three numbers."""
    items = tuple(value) if isinstance(value, (list, tuple)) else ()
    if "str" in base:
        if not items or not all(isinstance(item, str) and item.strip() for item in items):
            raise InputError(f"{where} is {value!r}; expected layer names")
        return tuple(item.strip() for item in items)
    are_numbers = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items)
    if len(items) != 3 or not are_numbers:
        raise InputError(f"{where} is {value!r}; expected three numbers")
    return tuple(float(item) for item in items)


def parse_bytes(value: Any, where: str) -> int:
    """160000, "160K" or "2M" (1024s) as a number of bytes.

    Raises:
        InputError: anything else; ``where`` says whose value it is.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KM])i?)?B?", str(value), re.IGNORECASE)
    if match is None:
        raise InputError(f"{where} is {value!r}; write bytes as 163840, 160K or 2M")
    return int(float(match[1]) * {"": 1, "K": 1024, "M": 1 << 20}[(match[2] or "").upper()])
