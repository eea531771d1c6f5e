"""The page of an analysis: its facts and pictures in, one HTML file out that needs nothing beside itself."""

from __future__ import annotations

import base64
from pathlib import Path
from string import Template
from typing import Any

import tinyvad.report
from tinyvad.bench.canvas import SCALE
from tinyvad.report.html_parts import card, facts, section
from tinyvad.report.text import count, escape, table

DRAWN = ("shared", "tsne")  # pictures with several pixels a unit
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title – tinyvad analysis</title>
<style>
$style
.sheet { display: block; max-width: max(100%, 900px); height: auto; border-radius: 4px; }
</style>
</head>
<body>
<header class="page">
<p class="brand">tinyvad<span> $version</span></p>
<h1>$title</h1>
<p class="lead">$lead</p>
</header>
<main>
$body
</main>
<footer class="page"><p>The figures are in <code>analysis.json</code>, the pictures beside it as PNG.</p></footer>
</body>
</html>
""")


def render(value: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page as text.

    Args:
        value: what ``analysis.json`` holds.
        pictures: PNG bytes by file name, in the order in which they are shown.
    """
    style = Path(tinyvad.report.__path__[0]) / "report.css"
    products, settings = value["products"], value["settings"]
    words = "product" if len(products) == 1 else "products"

    def shown(first: str) -> str:
        return "".join(_shown(name, png) for name, png in pictures.items() if name.startswith(first))

    body = [
        section("summary", "Products", "", card("Images and components", _products(value))),
        section("components", "Components", "", shown("components")),
        section("importance", "Importance over the object", "", shown("importance")),
        section(
            "channels", "Channels", f"The {settings['keep']:g} % most important channels of each cell are kept.",
            card("Most important channels, by their share of a layer's importance", _channels(value)),
            shown("channels"),
        ),
        section(
            "shared", "What the products share", "",
            card("Features (a channel of a cell)", _shared(value)) if len(products) > 1 else "",
            f'<div class="grid two">{shown("shared_")}</div>' if len(products) > 1 else "",
        ),
        section("plane", "The products in a plane", "", _left_out(value["tsne"]), shown("tsne")),
        section("facts", "How it was made", "", card("Settings", facts([("build", value["build"]), *settings.items()]))),
    ]  # fmt: skip
    return PAGE.substitute(
        title=escape(f"Feature importance: {value['build']}"),
        version=escape(value["tinyvad"]),
        lead=escape(f"{len(products)} {words}, {len(value['layers'])} layers of {value['method']} on {value['backbone']}"),
        style=style.read_text(encoding="utf-8").strip(),
        body="\n".join(part for part in body if part),
    )


def _shown(name: str, png: bytes) -> str:
    uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    width = int.from_bytes(png[16:20], "big") // (SCALE if name.startswith(DRAWN) else 1)
    image = f'<img class="sheet" width="{width}" src="{uri}" alt="{escape(name)}">'
    return f'<div class="card"><div class="scroll">{image}</div></div>'


def _products(value: dict[str, Any]) -> str:
    rows = []
    for name, product in value["products"].items():
        cells = [f"{layer['components']} (mean {layer['components_mean']:.1f})" for layer in product["layers"].values()]
        rows.append([escape(name), count(product["images"]), *cells, count(product["mask_bytes"])])
    head = ["product", "good images", *(f"components, {name}" for name in value["layers"]), "bytes of masks"]
    return table(head, rows, range(1, len(head)), caption="Products")


def _channels(value: dict[str, Any]) -> str:
    rows = []
    for name, product in value["products"].items():
        for layer, found in product["layers"].items():
            best = ", ".join(f"{one['channel']} ({one['share']:.1%})" for one in found["top_channels"])
            rows.append([escape(name), f"<code>{escape(layer)}</code>", escape(best)])
    return table(["product", "layer", "channels"], rows, caption="Most important channels")


def _shared(value: dict[str, Any]) -> str:
    rows = []
    for name, layer in value["layers"].items():
        alone, several = layer["chosen_by"][1], sum(layer["chosen_by"][2:])
        shares = (alone, several, *(layer[f"dropped_by_rule_{rule}"] for rule in ("1", "2_overlap", "2_apart")))
        rows.append([f"<code>{escape(name)}</code>", *(f"{share:.1%}" for share in shares)])
    head = ["layer", "of all: kept by one product", "kept by several", "of kept ones: shared", "shared, values overlap"]
    head.append("shared, values lie apart")
    return table(head, rows, range(1, len(head)), caption="What the products' masks share")


def _left_out(tsne: dict[str, Any]) -> str:
    return f'<p class="muted">{escape(tsne["left_out"])}</p>' if "left_out" in tsne else ""
