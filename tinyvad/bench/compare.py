"""Our figures beside the published ones: groups of runs in, rows with both numbers and what differs out.

Which system of the papers a method stands beside is a table that can be read. Data, backbone, size and precision nearly
always differ; each row says so, and none claims to reproduce the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyvad.bench.tables import Group, Row
from tinyvad.continual.methods import is_trained
from tinyvad.continual.published import Figure, figures, protocols, source_title

COUNTERPARTS: Mapping[str, tuple[str, ...]] = {
    "padim-original": ("PaDiM CL (original)",),
    "padim-uni": ("PaDiM cl uni", "PaDiM CL (ours)"),
    "padim-multi": ("PaDiM cl multi",),
    "padim-lite-uni": ("PaDiM Lite cl uni",),
    "padim-lite-multi": ("PaDiM Lite cl multi",),
    "padim-compact-uni": ("PaDiM cl uni",),
    "padim-compact-multi": ("PaDiM Lite cl multi", "PaDiM cl multi"),
    "padim-separate": ("PaDiM-Edge",),
    "padim-lite-separate": ("PaDiM-Lite",),
    "patchcore-cl": ("PatchCore cl 10k", "PatchCore cl 30k"),
    "patchcore-cl-mean-nn": ("PatchCore cl 10k", "PatchCore cl 30k"),
    "patchcore-cl++": ("PatchCore clpp 10k", "PatchCore clpp 30k"),
    "patchcore-lite-cl++": ("PatchCore clpp 10k", "PatchCore clpp 30k"),
    "patchcore-separate": ("PatchCore-Edge",),
    "patchcore-lite-separate": ("PatchCore-Lite",),
    "stfpm-replay": ("STFPM cl 100", "STFPM Replay"),
    "paste-fine-tuning": ("PaSTe Finetuning",),
    "paste-replay": ("paSTe cl 100", "PaSTe Replay"),
    "paste-compressed-replay": ("PaSTe Compressed Replay",),
    "cfa-replay": ("CFA cl 100",),
    "simplenet-replay": ("SimpleNet cl 100",),
}
# published metric -> ours, its summary, and what ours is multiplied by
METRICS = {
    "image_f1": ("image_F1Max", "average_final", 1),
    "pixel_f1": ("pixel_F1Max", "average_final", 1),
    "image_roc": ("image_AUROC", "average_final", 1),
    "pixel_roc": ("pixel_AUROC", "average_final", 1),
    "image_acc_pct": ("image_AUROC", "ACC", 100),
    "pixel_acc_pct": ("pixel_AUROC", "ACC", 100),
    "image_fm_pct": ("image_AUROC", "FM", 100),
    "pixel_fm_pct": ("pixel_AUROC", "FM", 100),
}
FAMILIES = ("MCUNet", "MobileNet", "PhiNet")
SIDES = {"thesis": 256}  # pixels; 224 elsewhere
DATASETS = {"mvtec": "MVTec AD", "visa": "VisA"}


def published_rows(places: Mapping[tuple[str, str, int], Sequence[Group]]) -> list[Row]:
    """A row a method and published system and backbone: both figures, memory, what differs.

    ``nearest``: the published backbone is the one to look at first.
    """
    rows = []
    for (stream, backbone, size), of_place in places.items():
        dataset, same = _dataset(of_place[0])
        for group in of_place:
            for found in _systems(group, dataset):
                row: Row = {"stream": stream, "method": group.label, "published": f"{found[0].system}, {found[0].backbone}"}
                for column, wanted in _COLUMNS.items():
                    row[column] = _both(group, [figure for figure in found if figure.metric in wanted])
                row["differs"] = "; ".join(_differences(group, found[0], backbone, size, same))
                row["table"] = f"{source_title(found[0].source)}, {found[0].table}, {found[0].dataset}"
                row["note"] = found[0].note
                family = found[0].backbone.removesuffix("-in3")
                row["nearest"] = family in (nearest(backbone), "unstated", "EfficientNet-B4")
                rows.append(row)
    return rows


def nearest(backbone: str) -> str:
    """The published backbone of the same family, MobileNet for any other."""
    return next((name for name in FAMILIES if name.lower() in backbone.lower()), "MobileNet")


def published_points(backbone: str, metric: str, methods: Iterable[str]) -> list[tuple[str, float, float]]:
    """(system, bytes, value) of the benchmark on MVTec AD with the nearest backbone, for the picture of memory."""
    systems = {system for name in methods for system in COUNTERPARTS.get(name, ())}
    points = []
    for figure in figures(source="edge", table="benchmark", dataset="MVTec AD", metric=metric):
        if figure.system in systems and figure.backbone == nearest(backbone):
            mb = _benchmark_mb(figure)
            unit = 1e6 if figure.system.startswith("PaDiM") else 2**20  # PatchCore's are with the backbone, PaDiM's without
            points.append((f"{figure.system}, {figure.backbone}", mb * unit, figure.value))
    return points


def _benchmark_mb(figure: Figure) -> float:
    found = figures(source="edge", table="benchmark", dataset="MVTec AD", metric="mb", system=figure.system)
    return next(one.value for one in found if one.backbone == figure.backbone)


_COLUMNS = {
    "image AUROC": ("image_roc", "image_acc_pct"),
    "image F1": ("image_f1",),
    "pixel AUROC": ("pixel_roc", "pixel_acc_pct"),
    "pixel F1": ("pixel_f1",),
    "MB": ("mb", "extra_mb"),
}


def _systems(group: Group, dataset: str) -> list[list[Figure]]:
    """The figures of each system and backbone to stand beside; X-YxN tables stand beside the same protocol only."""
    wanted, tables = COUNTERPARTS.get(group.method, ()), set()
    if protocol := re.fullmatch(r"(?:[a-z]+-)?(\d+-\d+x\d+)", str(group.runs[0].values["protocol"])):
        tables = {protocol[1]}
        wanted = () if is_trained(group.method) else ("PaDiM" if group.method.startswith("padim") else "PatchCore", "IUF")
    found: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures(dataset=dataset):
        of_steps = re.fullmatch(r"\d+-\d+x\d+", figure.protocol) is not None
        if figure.system in wanted and (figure.protocol in tables or not (tables or of_steps)):
            found.setdefault((figure.source, figure.table, figure.system, figure.backbone), []).append(figure)
    return list(found.values())


def _dataset(group: Group) -> tuple[str, bool]:
    """The published data set to stand beside, and whether our categories have the names of its."""
    units = {_plain(name) for name in next(iter(group.runs[0].matrices.values())).units}
    for protocol in protocols().values():
        if units == {_plain(name) for name in protocol.classes}:
            return next((title for key, title in DATASETS.items() if protocol.name.startswith(key)), "MVTec AD"), True
    return "MVTec AD", False


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def _both(group: Group, found: Sequence[Figure]) -> str | None:
    """'0.93 / 0.91', ours first; None where the paper prints nothing."""
    for figure in found:
        if figure.metric == "mb":
            nbytes, theirs = group.last("bytes"), sum(one.value for one in found)  # with replay, if that is apart
            return None if nbytes is None else f"{nbytes / 1e6:.3g} / {theirs:g}"
        metric, summary, factor = METRICS[figure.metric]
        ours = group.mean(metric, summary) if metric in group.runs[0].matrices else None
        return f"{'–' if ours is None else f'{factor * ours:.3g}'} / {figure.value:g}"
    return None


def _differences(group: Group, figure: Figure, backbone: str, size: int, same: bool) -> list[str]:
    """What a reader must know before comparing."""
    values: Mapping[str, Any] = group.runs[0].values
    units = len(next(iter(group.runs[0].matrices.values())).units)
    found = [f"{figure.dataset} by category names" if same else f"{units} products, not {figure.dataset}'s"]
    found.append(f"{backbone} at {size} px for {figure.backbone} at {SIDES.get(figure.source, 224)} px")
    if not is_trained(values["method"]):
        found.append("int8 for float")
    elif values["settings"].get("images") is not None:
        found += [f"at most {values['settings']['images']} images a product", "ours without the teacher's bytes"]
    if values["method"].startswith("padim-compact"):
        found.append("compact form, not published")
    if "lite" in values["method"] and "lite" not in figure.system.lower():
        found.append("product-quantised")
    if "separate" in figure.protocol:
        found.append(figure.protocol)
    elif values["task_identity"]:
        found.append("task known at test time")
    return found
