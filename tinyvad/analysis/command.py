"""``tinyvad analyse``: a build and a folder of products in, a folder with facts, pictures and a page out.

    good images --the build's network--> tapped maps --sums a cell--> components, importance --> masks, pictures, t-SNE

The build is only read. The folder holds ``analysis.json``, ``analysis.html`` and the pictures as PNG; the same input and
seed give the same files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from tinyvad.analysis.facts import layer_facts, masks_of, product_facts
from tinyvad.analysis.page import render
from tinyvad.analysis.pictures import channel_sheet, component_sheet, importance_sheet, scatter
from tinyvad.analysis.plane import PERCENT, plane
from tinyvad.analysis.products import Product, Tell, chosen_layers, read_product
from tinyvad.bench.canvas import to_png
from tinyvad.bench.plots import heat_map
from tinyvad.detectors.feature_importance import KEEP, VARIANCE
from tinyvad.errors import InputError
from tinyvad.files import new_folder, write_bytes, write_text
from tinyvad.images import find_datasets
from tinyvad.model import load
from tinyvad.version import __version__

FACTS, HTML = "analysis.json", "analysis.html"


def analyse(
    build: Path,
    data: Path,
    out: Path | None = None,
    layers: Sequence[str] | None = None,
    keep: float = KEEP,
    limit: int | None = None,
    seed: int = 0,
    on_error: str = "stop",
    tell: Tell = lambda stage, done, total: None,
) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
    """Analyse the features of a build on products, and write the folder.

    Args:
        build: only read. data: good images of one or several products, in any layout that ``tinyvad build`` takes.
        out: None writes beside the build, with '-analysis' behind its name.
        layers: of the tapped ones; None takes all. keep: percent of a cell's channels. limit: images a product.

    Returns:
        What ``analysis.json`` holds, with ``out``; and the skipped files with reasons.

    Raises:
        InputError: no build, no such layer, a product with fewer than two good images, an unreadable image, no place for
            the folder (in the build, or a folder that holds something else).
    """
    if not 0 < keep <= 100:
        raise InputError(f"--keep {keep:g}: percent of the channels, above 0 and at most 100")
    folder = _folder(build, out)
    model = load(build)
    places = chosen_layers(model, layers)
    datasets = find_datasets(data)
    products = [
        read_product(model, dataset, list(places.values()), limit, on_error, seed, tell) for dataset in datasets
    ]
    names = list(places)
    masks = masks_of(products, keep)
    value: dict[str, Any] = {
        "tinyvad": __version__,
        "build": build.resolve().name,
        "method": model.manifest["method"]["name"],
        "backbone": model.manifest["backbone"].get("name", ""),
        "settings": {"variance": VARIANCE, "keep": keep, "layers": names, "limit": limit, "seed": seed},
        "layers": {name: layer_facts(products, i, masks[i]) for i, name in enumerate(names)},
        "products": {
            product.name: product_facts(product, names, [layer[i] for layer in masks])
            for i, product in enumerate(products)
        },
        "tsne": plane(products, seed),
    }
    skipped = [item for product in products for item in product.skipped]
    value["skipped"] = [path.name for path, _ in skipped]
    pictures = _pictures(value, products, masks)
    value["pictures"] = list(pictures)
    with new_folder(folder, FACTS) as temporary:
        write_text(temporary / FACTS, json.dumps(value, indent=1) + "\n")
        write_text(temporary / HTML, render(value, pictures))
        for name, png in pictures.items():
            write_bytes(temporary / name, png)
    return {"out": str(folder), **value}, skipped


def _folder(build: Path, out: Path | None) -> Path:
    home = build.resolve()
    folder = home.with_name(f"{home.name}-analysis") if out is None else out
    if folder.resolve() == home or home in folder.resolve().parents:
        raise InputError(f"{folder} lies in the build {build}, which is never changed; choose another --out")
    return folder


def _pictures(value: dict[str, Any], products: Sequence[Product], masks: Sequence[Any]) -> dict[str, bytes]:
    """PNG bytes by file name, in the page's order."""
    names, keep = value["settings"]["layers"], value["settings"]["keep"]
    note = f"build {value['build']}, tinyvad {value['tinyvad']}"
    found = {
        "components.png": _png(component_sheet(products, names), note),
        "importance.png": _png(importance_sheet(products, names), note),
        "channels.png": _png(channel_sheet(products, names, masks, keep), note),
    }
    if len(products) > 1:
        ids = [product.name for product in products]
        for i, name in enumerate(names):
            words = f"Share of the row's {keep:g} % most important channels of each cell that the column keeps too; {note}"
            matrix = value["layers"][name]["shared"]
            found[f"shared_{i + 1}.png"] = to_png(heat_map(matrix, ids, ids, f"Shared features of {name}", words))
    if "points" in value["tsne"]:
        tsne = value["tsne"]
        which = f"each cell's most important channels of each product, {PERCENT:g} % and at least one"
        words = f"t-SNE of {tsne['features']:,} features: {which}; {note}"
        found["tsne.png"] = to_png(scatter(tsne["points"], "Products by their most important features", words))
    return found


def _png(picture: Image.Image, note: str) -> bytes:
    facts = PngImagePlugin.PngInfo()
    facts.add_itxt("Description", note)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, pnginfo=facts)
    return file.getvalue()


def summary(value: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = []
    for name, product in value["products"].items():
        parts = [f"{layer} {found['components']}" for layer, found in product["layers"].items()]
        lines.append(f"{name}: {product['images']} good images; components {', '.join(parts)}")
    if len(value["products"]) > 1:
        for name, layer in value["layers"].items():
            lines.append(f"{name}: {layer['dropped_by_rule_1']:.0%} of the kept features are kept by another product too")
    lines.append(f"page: {Path(value['out']) / HTML}")
    return "\n".join(lines)
