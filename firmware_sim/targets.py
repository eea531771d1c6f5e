"""Targets: a name or a TOML file in, a checked description of a chip's memory out.

One TOML file per chip or board lies in ``targets/``; ``aliases.toml`` gives other names ('cortex-m7'). Your own file
has the same fields::

    name = "my-board"
    title = "My board (STM32F746NG)"
    core = "cortex-m7"
    clock_mhz = 216
    flash_erase = 262144    # optional: largest sector that flash erases at once, bytes; default 4096

    [isa]                   # dsp, mve: instruction sets; fpu: "none", "sp" or "dp"; simd: free text
    dsp = true
    mve = false
    fpu = "sp"

    [[regions]]             # kind: tcm, sram, psram, dram (data); itcm (code only); flash, xip
    name = "SRAM"
    base = 0x20010000
    size = 262144           # bytes
    kind = "sram"

    [reserve]               # optional: bytes for the application, an RTOS, start-up code, the stack
    ram = 0
    flash = 32768
    stack = 4096

    [mac_per_cycle]         # optional: latency estimates
    cmsis_nn = 0.24

    [source]                # optional in your own file: where the numbers come from
    regions = "datasheet"

A target without flash and xip regions loads from a file system; its flash has no limit.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyvad.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RAM_KINDS = ("tcm", "sram", "psram", "dram")
FLASH_KINDS = ("flash", "xip")
KINDS = (*RAM_KINDS, "itcm", *FLASH_KINDS)
FLASH_ERASE = 4096  # bytes, of most flash outside the STM32F and H7
FPUS = ("none", "sp", "dp")
ENGINES = ("tflm_reference", "cmsis_nn", "tinyengine_like")

_PRESETS = Path(__file__).parent / "targets"
_ALIASES = "aliases"


@dataclass(frozen=True)
class Region:
    """``size`` bytes from address ``base`` of one kind of memory (see ``KINDS``)."""

    name: str
    base: int
    size: int
    kind: str

    @property
    def end(self) -> int:
        return self.base + self.size


@dataclass(frozen=True)
class Span:
    """Regions that follow each other without a gap, and so are one block of addresses to the core."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    base: int
    size: int

    @property
    def name(self) -> str:
        return "+".join(self.names)


@dataclass(frozen=True)
class Isa:
    """Instruction sets: DSP extension, Helium (MVE), FPU precision 'none', 'sp' or 'dp', other SIMD as text."""

    dsp: bool
    mve: bool
    fpu: str
    simd: str = ""


@dataclass(frozen=True)
class Reserve:
    """Bytes kept for what is not ours: application and RTOS, vector table, start-up and HAL, stack."""

    ram: int = 0
    flash: int = 32768
    stack: int = 4096


@dataclass(frozen=True)
class Target:
    """A chip or board. ``alias`` is the name that the user typed where it is not ``name``.

    Attributes:
        flash_erase: bytes of the largest sector that is erased at once; the bank's slots are whole multiples of it.
    """

    name: str
    title: str
    core: str
    clock_mhz: float
    isa: Isa
    regions: tuple[Region, ...]
    reserve: Reserve = Reserve()
    mac_per_cycle: dict[str, float] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    dma: str = ""
    notes: str = ""
    alias: str | None = None
    flash_erase: int = FLASH_ERASE

    @property
    def label(self) -> str:
        """'stm32f746', or 'cortex-m7 (stm32f746)' where an alias was used."""
        return self.name if self.alias is None else f"{self.alias} ({self.name})"

    @property
    def pointer_bytes(self) -> int:
        return 8 if self.core.startswith("cortex-a") else 4

    @property
    def ram_bytes(self) -> int:
        """All data RAM; an arena needs one span of it (see ``spans``)."""
        return sum(region.size for region in self.regions if region.kind in RAM_KINDS)

    @property
    def flash_bytes(self) -> int | None:
        """All flash, None where programs come from a file system."""
        sizes = [region.size for region in self.regions if region.kind in FLASH_KINDS]
        return sum(sizes) if sizes else None


def spans(target: Target, kinds: Iterable[str] = RAM_KINDS) -> list[Span]:
    """Blocks of adjacent regions of the given kinds, by address.

    An arena may lie across regions in one span: the STM32F746's DTCM and SRAM are one block of 320 KiB to the core,
    which never splits an aligned access over their border. DMA is another matter: its controllers see each region
    through another port, often with and without a cache; ``Target.dma`` says what to keep apart.
    """
    wanted = set(kinds)
    found: list[Span] = []
    for region in sorted(target.regions, key=lambda region: region.base):
        if region.kind not in wanted:
            continue
        last = found[-1] if found else None
        if last is not None and last.base + last.size == region.base:
            names, kinds_ = (*last.names, region.name), (*last.kinds, region.kind)
            found[-1] = Span(names, kinds_, last.base, last.size + region.size)
        else:
            found.append(Span((region.name,), (region.kind,), region.base, region.size))
    return found


def load_target(name_or_path: str | Path) -> Target:
    """A preset or alias by name, or your own file (its name ends in .toml).

    Raises:
        InputError: no such target (with near matches), or a file that cannot be read or has a wrong field.
    """
    name = str(name_or_path)
    if name.endswith(".toml"):
        return _parse(Path(name))
    wanted = name.strip().lower()
    aliases = list_aliases()
    preset = aliases.get(wanted, wanted)
    names = _preset_names()
    if preset not in names:
        near = difflib.get_close_matches(wanted, [*names, *aliases], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"unknown target {name!r}: {hint}`tinyvad targets` lists all, or give a .toml file")
    target = _parse(_PRESETS / f"{preset}.toml")
    return target if wanted == preset else dataclasses.replace(target, alias=wanted)


def list_targets() -> list[Target]:
    """All presets, by name."""
    return [_parse(_PRESETS / f"{name}.toml") for name in _preset_names()]


@functools.cache
def list_aliases() -> dict[str, str]:
    """Other names of presets."""
    return {str(alias): str(name) for alias, name in _read(_PRESETS / f"{_ALIASES}.toml").items()}


@functools.cache
def _preset_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml") if path.stem != _ALIASES))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read target {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid TOML: {' '.join(str(error).split())}") from error


def _parse(path: Path) -> Target:
    fields = _Fields(path, "", _read(path))
    isa = fields.table("isa")
    reserve = fields.table("reserve", required=False)
    rates = fields.table("mac_per_cycle", required=False)
    sources = fields.table("source", required=False)
    regions = fields.tables("regions")
    target = Target(
        name=fields.text("name"),
        title=fields.text("title"),
        core=fields.text("core"),
        clock_mhz=fields.number("clock_mhz"),
        isa=Isa(isa.flag("dsp"), isa.flag("mve"), isa.text("fpu", among=FPUS), isa.text("simd", default="")),
        regions=tuple(
            Region(part.text("name"), part.size("base"), part.size("size", 1), part.text("kind", among=KINDS))
            for part in regions
        ),
        reserve=Reserve(**{key: reserve.size(key) for key in ("ram", "flash", "stack") if key in reserve.values}),
        mac_per_cycle={key: rates.number(key) for key in ENGINES if key in rates.values},
        source={key: sources.text(key) for key in list(sources.values)},
        dma=fields.text("dma", default=""),
        notes=fields.text("notes", default=""),
        flash_erase=fields.size("flash_erase", 1) if "flash_erase" in fields.values else FLASH_ERASE,
    )
    for part in (fields, isa, reserve, rates, *regions):
        part.finish()
    _check_regions(path, target.regions)
    return target


def _check_regions(path: Path, regions: tuple[Region, ...]) -> None:
    if not any(region.kind in RAM_KINDS for region in regions):
        raise InputError(f"{path}: regions has no RAM; add one of kind {', '.join(RAM_KINDS)}")
    names = [region.name for region in regions]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: regions has {name!r} more than once; give each its own name")
    ordered = sorted(regions, key=lambda region: region.base)
    for low, high in itertools.pairwise(ordered):
        if low.end > high.base:
            raise InputError(
                f"{path}: region {low.name} ends at {low.end:#x}, beyond the start of {high.name} at {high.base:#x}"
            )


@dataclass
class _Fields:
    """The fields of one TOML table: takes each once with its type checked; ``finish`` refuses what is left."""

    path: Path
    prefix: str
    values: dict[str, Any]
    taken: set[str] = field(default_factory=set)

    def bad(self, key: str, needs: str) -> InputError:
        return InputError(f"{self.path}: field {self.prefix}{key} needs {needs}, has {self.values.get(key)!r}")

    def take(self, key: str) -> Any:
        self.taken.add(key)
        if key not in self.values:
            raise InputError(f"{self.path}: field {self.prefix}{key} is missing")
        return self.values[key]

    def text(self, key: str, default: str | None = None, among: tuple[str, ...] = ()) -> str:
        if default is not None and key not in self.values:
            return default
        value = self.take(key)
        if among and value not in among:
            raise self.bad(key, f"one of {', '.join(among)}")
        if not isinstance(value, str) or not value.strip():
            raise self.bad(key, "a text")
        return " ".join(value.split())

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def size(self, key: str, smallest: int = 0) -> int:
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise self.bad(key, f"a whole number of at least {smallest}")
        return value

    def number(self, key: str) -> float:
        value = self.take(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.bad(key, "a number above 0")
        return float(value)

    def table(self, key: str, required: bool = True) -> _Fields:
        value = self.take(key) if required or key in self.values else {}
        if not isinstance(value, dict):
            raise self.bad(key, "a table")
        return _Fields(self.path, f"{self.prefix}{key}.", value)

    def tables(self, key: str) -> list[_Fields]:
        value = self.take(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self.bad(key, "at least one table")
        return [_Fields(self.path, f"{self.prefix}{key}[{i}].", item) for i, item in enumerate(value)]

    def finish(self) -> None:
        for key in self.values:
            if key not in self.taken:
                near = difflib.get_close_matches(key, self.taken, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"{self.path}: unknown field {self.prefix}{key}{hint}")
