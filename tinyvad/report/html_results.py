"""The page's parts on results: how scores lie about the threshold, metrics, wrong verdicts, pictures.

Flows in: the report's ``scores``, ``metrics`` and ``thresholds``, and cases. Flows out: markup, '' without data.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tinyvad.report import svg
from tinyvad.report.html_parts import card, section
from tinyvad.report.pictures import FOUND, MAGMA, MARKED, Case, encode_cases, scale_limit
from tinyvad.report.text import NONE, count, escape, number, ratio, table

PICTURE_BYTES = 1_000_000  # of all data URIs together
MOST_CASES = 24
MOST_NAMED = 8  # wrong images of a kind; the rest is in report.json


def threshold_score(report: dict[str, Any]) -> float | None:
    """The threshold in the units of ``pred_score``."""
    score = (report.get("thresholds") or {}).get("score")
    return (report.get("metrics") or {}).get("threshold") if score is None else score


def tested_images(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The scored test images, [{image_path, label, defect, pred_score, pred_label}]."""
    return (report.get("scores") or {}).get("test") or []


def scores_section(report: dict[str, Any]) -> str:
    """Histogram, metrics, a table by kind of image, and the images with a wrong verdict."""
    items = tested_images(report)
    held = (report.get("scores") or {}).get("held_out") or []

    def of(label: int | None) -> list[float]:
        return [item["pred_score"] for item in items if item.get("label") == label]

    chart = svg.histogram(
        [
            svg.Series("Good, held out", "held", held),
            svg.Series("Good, test", "normal", of(0), "above", "false alarms"),
            svg.Series("Defects, test", "defect", of(1), "below", "missed"),
            svg.Series("Unlabelled, test", "held", of(None)),
        ],
        threshold_score(report),
    )
    return section(
        "scores",
        "Scores",
        "One score an image: the distance of its most anomalous cell. At or above the threshold an image is called "
        "anomalous. Red bars lie on the wrong side.",
        card("Distribution", chart),
        _metrics(report.get("metrics")),
        _by_defect(items),
        _wrong(items),
    )


def _metrics(metrics: dict[str, Any] | None) -> str:
    def grid(pairs: Sequence[tuple[str, Any]]) -> str:
        cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{ratio(value)}</dd></div>" for name, value in pairs)
        return f'<dl class="metrics">{cells}</dl>'

    if not metrics:
        return card(
            "Metrics",
            "<p>None: there are no labelled test images. Put good and defective ones beside the training images "
            "(<code>test/good</code>, <code>test/DEFECT</code>) and run <code>tinyvad eval BUILD --data DIR</code>.</p>",
        )
    pixel = [("AUROC", "pixel_AUROC"), ("AUPRO", "pixel_AUPRO"), ("AP", "pixel_AP"), ("F1-max", "pixel_F1Max")]
    image = [
        ("AUROC", "image_AUROC"),
        ("AP", "image_AP"),
        ("F1-max", "image_F1Max"),
        ("F1 floor", "image_F1_floor"),
    ]
    cards = [card("Image level", grid([(name, metrics.get(key)) for name, key in image]))]
    if any(metrics.get(key) is not None for _, key in pixel):
        cards.append(card("Pixel level", grid([(name, metrics.get(key)) for name, key in pixel])))
    else:
        cards.append(card("Pixel level", '<p class="muted">No figures: the test images have no masks.</p>'))
    return f'<div class="grid two">{"".join(cards)}</div>'


def _by_defect(tested: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for item in tested:
        label = item.get("label")
        groups.setdefault((2 if label is None else label, str(item.get("defect") or NONE)), []).append(item)
    rows = []
    for (label, defect), items in sorted(groups.items()):
        flagged = sum(bool(item["pred_label"]) for item in items)
        scores = [item["pred_score"] for item in items]
        rows.append(
            [
                escape(defect),
                ("good", "defect", "unlabelled")[label],
                count(len(items)),
                count(flagged),
                f"{100 * flagged / len(items):.1f} %",
                *(number(value) for value in (min(scores), statistics.median(scores), max(scores))),
            ]
        )
    head = ["kind", "label", "images", "called anomalous", "share", "lowest", "median", "highest"]
    return card("By kind of image", table(head, rows, range(2, 8), caption="Scores by kind")) if rows else ""


def _wrong(items: Sequence[dict[str, Any]]) -> str:
    missed = [item for item in items if item.get("label") == 1 and not item["pred_label"]]
    alarms = [item for item in items if item.get("label") == 0 and item["pred_label"]]
    missed.sort(key=lambda item: (item["pred_score"], item["image_path"]))
    alarms.sort(key=lambda item: (-item["pred_score"], item["image_path"]))
    rows = [
        [f"<code>{escape(item['image_path'])}</code>", _tag(name, "wrong"), number(item["pred_score"])]
        for name, found in (("missed", missed), ("false alarm", alarms))
        for item in found[:MOST_NAMED]
    ]
    rest = max(0, len(missed) - MOST_NAMED) + max(0, len(alarms) - MOST_NAMED)
    more = f'<p class="small muted">and {count(rest)} more, in report.json</p>' if rest else ""
    body = table(["image", "verdict", "score"], rows, (2,), caption="Wrong verdicts")
    return card("Wrong verdicts", body, more) if rows else ""


def _tag(name: str, css: str) -> str:
    return f'<span class="tag {css}">{escape(name)}</span>'


def pictures_section(report: dict[str, Any], cases: Sequence[Case]) -> str:
    """The first ``MOST_CASES`` cases by kind, on one scale of colours.

    Raises:
        InputError: a case's image, map and mask differ in size.
    """
    if not cases:
        return ""
    threshold = threshold_score(report)
    shown = list(cases)[:MOST_CASES]
    limit = scale_limit(threshold, [case.anomaly_map for case in shown])
    uris = dict(zip(map(id, shown), encode_cases(shown, threshold, limit, PICTURE_BYTES)))
    groups = []
    for label, title in ((1, "Defects"), (0, "Good images"), (None, "Unlabelled")):
        group = sorted(
            (case for case in shown if case.label == label), key=lambda case: (-case.pred_score, case.image_path)
        )
        if not group:
            continue
        marked = any(len(uris[id(case)]) > 2 for case in group)
        figures = "\n".join(_case(case, uris[id(case)], threshold, marked) for case in group)
        groups.append(
            f'<h3 class="group">{title} <span>highest score first</span></h3>'
            f'<div class="cases{"" if marked else " pairs"}">{figures}</div>'
        )
    outlines = (
        f'<ul class="legend"><li>{_line_swatch(FOUND)}outline of what was found</li>'
        f"<li>{_line_swatch(MARKED)}outline of what a person marked</li></ul>"
    )
    return section(
        "pictures",
        "Pictures",
        "The highest and the lowest scores of each kind: what the network saw, the heat map over it, and the outlines. "
        "All pictures share one scale; none is stretched to look dramatic.",
        f'<div class="card"><div class="scale-box"><div>{svg.colour_bar(MAGMA, limit, threshold)}</div>{outlines}</div>'
        f"{''.join(groups)}</div>",
    )


def _line_swatch(colour: tuple[int, int, int]) -> str:
    return (
        '<svg class="swatch" width="26" height="14" aria-hidden="true"><rect width="26" height="14" rx="3" '
        f'fill="#30353d"/><line x1="4" x2="22" y1="7" y2="7" stroke="#{bytes(colour).hex()}" stroke-width="3"/></svg>'
    )


def _case(case: Case, uris: Sequence[str], threshold: float | None, marked: bool) -> str:
    name = escape(case.image_path)
    shots = [
        f'<img src="{uri}" alt="{what}: {name}" loading="lazy">'
        for uri, what in zip(uris, ("Photo", "Heat map", "Outlines of what was found and what was marked"))
    ]
    if marked and len(uris) < 3:
        shots.append('<div class="unmarked">not marked</div>')
    word = "anomalous" if case.pred_label else "normal"
    wrong = case.label is not None and bool(case.pred_label) != bool(case.label)
    if wrong:
        tag = _tag("missed" if case.label else "false alarm", "wrong")
    else:
        tag = _tag(word, "right")
    # rounded down, so that a score below the threshold never reads as 1.00 times it
    times = f"{math.floor(100 * case.pred_score / threshold) / 100:.2f} × threshold" if threshold else ""
    return (
        f'<figure class="card case{" bad" if wrong else ""}"><div class="shots">{"".join(shots)}</div><figcaption>'
        f'<span class="score">{number(case.pred_score)}</span>{tag}<span class="muted">{times}</span>'
        f"<span>{escape(case.defect)}</span>"
        f'<code class="path">{name}</code></figcaption></figure>'
    )
