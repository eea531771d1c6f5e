"""The papers' figures and protocols as data: ``published.toml`` in, ``Figure`` and ``Protocol`` out.

Only figures that stand beside our own tables are there; each says where it is printed, so that a reader can look it up.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tinyvad.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Figure(NamedTuple):
    """One printed number.

    Attributes:
        source: short name, see ``source_title``.
        table: 'Table 1', 'benchmark' (a table without number) or 'running text'.
        protocol: in words, or an X-YxN of the incremental protocols.
        metric: image_f1, pixel_f1, image_roc, pixel_roc, pixel_ap, pixel_aupro, forgetting (fractions), image_acc_pct,
            image_fm_pct and so on (percent), gflops, mmacs, mb, backbone_mb, extra_mb.
        note: what to know about the whole table, often empty.
    """

    source: str
    table: str
    dataset: str
    protocol: str
    system: str
    backbone: str
    metric: str
    value: float
    note: str


class Protocol(NamedTuple):
    """A published order: ``base`` classes as step 0, then ``increment`` classes a step; classes in order."""

    name: str
    source: str
    classes: tuple[str, ...]
    base: int
    increment: int
    task_identity: bool


def figures(
    source: str | None = None,
    dataset: str | None = None,
    system: str | None = None,
    backbone: str | None = None,
    metric: str | None = None,
    table: str | None = None,
    protocol: str | None = None,
) -> list[Figure]:
    """The figures whose fields equal all that are given, in the order of the file."""
    wanted = {
        name: value
        for name, value in (
            ("source", source), ("dataset", dataset), ("system", system), ("backbone", backbone), ("metric", metric),
            ("table", table), ("protocol", protocol),
        )
        if value is not None
    }  # fmt: skip
    return [figure for figure in _figures() if all(getattr(figure, name) == value for name, value in wanted.items())]


def source_title(source: str) -> str:
    """What a short name stands for.

    Raises:
        InputError: no such source.
    """
    titles: dict[str, str] = _data()["source"]
    if source not in titles:
        raise InputError(f"no source {source!r}; there are {', '.join(titles)}")
    return titles[source]


def protocols() -> dict[str, Protocol]:
    """Name -> published protocol."""
    return {
        name: Protocol(
            name,
            values["source"],
            tuple(values["classes"]),
            values["base"],
            values["increment"],
            values.get("task_identity", False),
        )
        for name, values in _data()["protocol"].items()
    }


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text("utf-8"))


@cache
def _figures() -> tuple[Figure, ...]:
    found = []
    for table in _data()["table"]:
        where = (table["source"], table["table"], table["dataset"], table["protocol"])
        metrics = table["columns"][2:]  # the first two are system and backbone
        for system, backbone, *values in table["rows"]:
            for metric, value in zip(metrics, values):
                if value != "":
                    found.append(Figure(*where, system, backbone, metric, float(value), table.get("note", "")))
    return tuple(found)
