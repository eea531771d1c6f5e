"""The report of a build as one page: a report's plain values and a few cases in, ``report.html`` out.

The page needs nothing beside itself: styles, charts and pictures are inside, there is no script, no date and no timing,
so the same build gives the same bytes. Every key of the report may be missing; its part is then left out or says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from tinyvad.files import write_text
from tinyvad.report import svg
from tinyvad.report.html_memory import budget_section, layers_section, memory_section
from tinyvad.report.html_parts import card, details, facts, kind_mark, section
from tinyvad.report.html_results import pictures_section, scores_section, tested_images, threshold_score
from tinyvad.report.pictures import Case
from tinyvad.report.profile import verdict
from tinyvad.report.text import NONE, count, escape, millions, number, ratio, size, table, target_label

MOST_SKIPPED = 12  # files named; the rest is in report.json


def write_report(path: Path, report: dict[str, Any], cases: Sequence[Case]) -> None:
    """Write the page.

    Args:
        path: report.html.
        report: plain values: ``title``, ``tinyvad``, ``warnings [text]``, ``method {name, description, settings}``,
            ``backbone {name, source, layers, macs, parameters, quality, tried [{name, quality, image_size, arena_bytes,
            flash_bytes, ms, why_not, chosen}], sizes_tried [{image_size, probe_auroc, arena_bytes, ms, chosen}], note}``,
            ``preprocessing``, ``grid``, ``thresholds {raw, score, rule, quantile, n_held_out}``,
            ``dataset {name, n_train, n_test_good, n_test_anomalous, skipped}``, ``scores
            {held_out, test [{image_path, label, defect, pred_score, pred_label}]}``, ``metrics``, ``budget``
            (``Budget.to_dict``), ``memory`` (see ``svg_memory.memory_map``; also ``tail_bytes``, ``tail``), ``layers
            [{name, op, shape, macs, weights_bytes, output_bytes, first_use, last_use, offset}]``, ``latency {ms,
            kind, engine, source}``, ``files {name: {bytes, sha256}}``.
        cases: images to show, some dozen.

    Raises:
        InputError: a case's image, map and mask differ in size; the file can't be written.
    """
    write_text(path, render(report, cases))


def render(report: dict[str, Any], cases: Sequence[Case]) -> str:
    """The page as text; arguments as for ``write_report``."""
    here = Path(__file__).parent
    parts = [
        ("summary", "Summary", _headline(report)),
        ("budget", "RAM and flash", budget_section(report)),
        ("scores", "Scores", scores_section(report)),
        ("pictures", "Pictures", pictures_section(report, cases)),
        ("memory", "Memory over time", memory_section(report)),
        ("layers", "Layers", layers_section(report)),
        ("facts", "How it was built", _facts(report)),
        ("files", "Files", _files(report)),
        ("reading", "What the numbers mean", _reading()),
    ]
    shown = [(anchor, name, body) for anchor, name, body in parts if body]
    return Template((here / "report.html").read_text(encoding="utf-8")).substitute(
        version=escape(f" {report['tinyvad']}" if report.get("tinyvad") else ""),
        title=escape(report.get("title") or "tinyvad build"),
        lead=_lead(report),
        style=(here / "report.css").read_text(encoding="utf-8").strip(),
        patterns=svg.patterns(),
        nav="".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in shown),
        body="\n".join(body for _, _, body in shown),
    )


def _lead(report: dict[str, Any]) -> str:
    backbone, preprocessing = report.get("backbone") or {}, report.get("preprocessing") or {}
    parts = [(report.get("method") or {}).get("name"), backbone.get("name")]
    if preprocessing.get("height") and preprocessing.get("width"):
        parts.append(f"{preprocessing['height']} × {preprocessing['width']} pixels in")
    if report.get("grid"):
        parts.append(f"{' × '.join(str(side) for side in report['grid'])} cells out")
    return escape(", ".join(str(part) for part in parts if part))


def _headline(report: dict[str, Any]) -> str:
    budget, metrics = report.get("budget") or {}, report.get("metrics") or {}
    thresholds, latency = report.get("thresholds") or {}, report.get("latency") or {}
    words = verdict(budget)
    css, mark = {"fits": ("fits", "✓ "), "does not fit": ("over", "✕ ")}.get(words, ("", ""))
    used = [
        f"{name} {size(budget.get(f'{key}_used'))}"
        + (f" of {size(budget[f'{key}_available'])}" if budget.get(f"{key}_available") is not None else "")
        for name, key in (("RAM", "ram"), ("flash", "flash"))
        if budget.get(f"{key}_used") is not None
    ]
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in budget.get("problems") or [])
    cells = [
        f'<div class="{css}"><p class="label">{escape(target_label(budget) or "Target")}</p>'
        f'<p class="value">{mark}{words.capitalize()}</p><p class="note">{escape(", ".join(used))}</p>'
        + (f'<ul class="problems">{problems}</ul>' if problems else "")
        + "</div>",
        _cell("Image AUROC", ratio(metrics.get("image_AUROC")), _verdict_counts(report)),
        _cell("Threshold", number(threshold_score(report)), _rule(thresholds)),
    ]
    if latency.get("ms") is not None:
        milliseconds = latency["ms"]
        value = f"{milliseconds:,.{0 if milliseconds >= 10 else 1}f} <small>ms</small>"
        note = f"engine {latency.get('engine') or NONE}; not measured on silicon"
        cells.append(_cell(f"Latency{kind_mark(latency.get('kind') or 'estimated')}", value, note, raw=True))
    else:
        cells.append(
            _cell("Multiply-accumulates", millions((report.get("backbone") or {}).get("macs")), "an image")
        )
    warnings = "".join(f'<p class="card warning">{escape(text)}</p>' for text in report.get("warnings") or [])
    return f'<section id="summary">{warnings}<div class="card headline">{"".join(cells)}</div></section>'


def _cell(label: str, value: str, note: str, raw: bool = False) -> str:
    label, value = (label, value) if raw else (escape(label), escape(value))
    return f'<div><p class="label">{label}</p><p class="value">{value}</p><p class="note">{escape(note)}</p></div>'


def _rule(thresholds: dict[str, Any]) -> str:
    words = [str(thresholds.get("rule") or "")]
    if thresholds.get("quantile") is not None and thresholds.get("n_held_out") is not None:
        words.append(f"{thresholds['quantile']:g} of {count(thresholds['n_held_out'])}")
    if thresholds.get("raw") is not None:
        words.append(f"{count(thresholds['raw'])} on the device")
    return ", ".join(word for word in words if word)


def _verdict_counts(report: dict[str, Any]) -> str:
    good = [item for item in tested_images(report) if item.get("label") == 0]
    bad = [item for item in tested_images(report) if item.get("label") == 1]
    if not good and not bad:
        return "needs labelled test images, good and defective"
    words = []
    if bad:
        words.append(f"{sum(not item['pred_label'] for item in bad)} of {count(len(bad))} defects missed")
    if good:
        alarms = sum(bool(item["pred_label"]) for item in good)
        words.append(f"{alarms} false alarm{'s' * (alarms != 1)} in {count(len(good))} good images")
    return "at the threshold " + ", ".join(words)


def _facts(report: dict[str, Any]) -> str:
    method, backbone, data = (report.get(key) or {} for key in ("method", "backbone", "dataset"))
    budget, latency, thresholds = (report.get(key) or {} for key in ("budget", "latency", "thresholds"))
    description = f'<p class="muted small">{escape(method["description"])}</p>' if method.get("description") else ""
    network: list[tuple[str, Any]] = [(key, backbone.get(key)) for key in ("name", "source", "layers")]
    network += [
        ("MACs", millions(backbone.get("macs")) if backbone.get("macs") is not None else None),
        ("parameters", count(backbone.get("parameters")) if backbone.get("parameters") is not None else None),
        ("feature quality", ratio(backbone["quality"]) if backbone.get("quality") is not None else None),
        ("grid", " × ".join(map(str, report["grid"])) if report.get("grid") else None),
        ("note", backbone.get("note")),
    ]
    numbers = [
        ("good, to learn from", "n_train"),
        ("good, test", "n_test_good"),
        ("defects, test", "n_test_anomalous"),
    ]
    images: list[tuple[str, Any]] = [("name", data.get("name"))]
    images += [(name, count(data[key])) for name, key in numbers if data.get(key) is not None]
    target: list[tuple[str, Any]] = [
        ("name", target_label(budget) or None),
        ("RAM", size(budget["ram_available"]) if budget.get("ram_available") is not None else None),
        ("flash", size(budget["flash_available"]) if budget.get("flash_available") is not None else None),
        ("latency's engine", latency.get("engine")),
        ("MACs a cycle", latency.get("mac_per_cycle")),
        ("latency's source", latency.get("source") or None),
    ]
    cards = [
        card("Method", description, facts([("name", method.get("name")), *(method.get("settings") or {}).items()])),
        card("Backbone", facts(network), _tried(backbone.get("tried") or []), _sizes(backbone.get("sizes_tried") or [])),
        card("Target", facts(target)),
        card("Preprocessing", facts((report.get("preprocessing") or {}).items())),
        card("Threshold", facts(thresholds.items())),
        card("Images", facts(images), _skipped(data.get("skipped") or [])),
    ]
    body = "".join(cards)
    grid = f'<div class="grid three">{body}</div>' if body else ""
    return section("facts", "How it was built", "", grid)


def _tried(tried: Sequence[dict[str, Any]]) -> str:
    """What ``--backbone auto`` chose among."""
    if not tried:
        return ""
    rows = [
        [
            escape(one.get("name")),
            ratio(one.get("quality")),
            count(one.get("image_size")),
            size(one.get("arena_bytes")),
            size(one.get("flash_bytes")),
            _whole(one.get("ms")),
            escape(", ".join(word for word in ("chosen" if one.get("chosen") else "", one.get("why_not")) if word)),
        ]
        for one in tried
    ]
    head = ["network", "quality", "px", "arena", "flash", "ms", ""]
    networks = "1 network" if len(tried) == 1 else f"{len(tried)} networks"
    return details(f"chosen among {networks}", table(head, rows, (1, 2, 3, 4, 5), caption="Networks that were planned"))


def _whole(value: float | None) -> str:
    return count(None if value is None else round(value))


def _sizes(tried: Sequence[dict[str, Any]]) -> str:
    """Input sizes that were tried on good images with made-up defects."""
    if not tried:
        return ""
    rows = [
        [
            count(one.get("image_size")),
            ratio(one.get("probe_auroc")),
            size(one.get("arena_bytes")),
            _whole(one.get("ms")),
            "chosen" if one.get("chosen") else "",
        ]
        for one in tried
    ]
    head = ["px", "AUROC, made-up defects", "arena", "ms", ""]
    body = table(head, rows, (0, 1, 2, 3), caption="Input sizes that were tried")
    return details(f"size chosen among {len(tried)}", body)


def _skipped(skipped: Sequence[Sequence[str]]) -> str:
    if not skipped:
        return ""
    rows = [[f"<code>{escape(path)}</code>", escape(reason)] for path, reason in skipped[:MOST_SKIPPED]]
    rest = len(skipped) - len(rows)
    more = f'<p class="small muted">and {count(rest)} more, in report.json</p>' if rest else ""
    files = "1 file" if len(skipped) == 1 else f"{count(len(skipped))} files"
    return details(f"{files} skipped", table(["file", "why"], rows, caption="Skipped files") + more)


def _files(report: dict[str, Any]) -> str:
    files = report.get("files") or {}
    rows = [
        [
            f"<code>{escape(name)}</code>",
            count(file.get("bytes")),
            f"<code>{escape(file.get('sha256') or NONE)}</code>",
        ]
        for name, file in sorted(files.items())
    ]
    body = table(["file", "bytes", "SHA-256"], rows, (1,), caption="Files of the build") if rows else ""
    intro = "What the build consists of. <code>tinyvad verify BUILD</code> checks that nothing has changed."
    return section("files", "Files", intro, f'<div class="card">{body}</div>' if body else "")


TERMS = (
    ("pred_score", "The distance of the most anomalous grid cell, in the detector's own units. Higher is more "
     "anomalous. It is never rescaled by image or by batch, so scores of two days can be compared."),
    ("threshold", "Comes from good images that were held out of the fit. An image at or above it is called anomalous. "
     "The device compares integers; the integer is given beside it."),
    ("AUROC", "The chance that a defective image (or pixel) scores above a good one. 0.5 is guessing, 1 is perfect."),
    ("AP", "Average precision: the area under the precision-recall curve."),
    ("F1-max, F1 floor", "The best F1 over all thresholds, chosen on the very labels that it is judged by: an upper "
     "bound. The floor is what calling everything anomalous would reach."),
    ("AUPRO", "The mean share of each marked region that is found, up to a false positive rate of 0.3."),
    ("arena, head, tail", "The arena is the one block that the runtime works in. Under TensorFlow Lite Micro its head "
     "holds activations that share addresses, its tail structures that live for ever; our runtime has no tail."),
    ("lower bound", "The most bytes alive at once. No placing of the same buffers can need less."),
    ("latency", "Instructions of each kernel, counted in an emulator, times assumed cycles an instruction; under "
     "TensorFlow Lite Micro multiply-accumulates divided by a published rate. Never a measurement."),
)  # fmt: skip


def _reading() -> str:
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in TERMS)
    commands = (
        "<pre><code>tinyvad eval BUILD --data DIR      # the metrics, from the images\n"
        "tinyvad verify BUILD               # every engine gives the same scores, every file is whole\n"
        "tinyvad profile BUILD              # RAM and flash by owner and region</code></pre>"
    )
    return section(
        "reading",
        "What the numbers mean",
        "",
        f'<div class="card"><dl class="terms">{terms}</dl></div>',
        card("To reproduce them", commands),
    )
