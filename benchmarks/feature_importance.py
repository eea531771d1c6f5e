"""What PCA feature importance finds on real products: components, shared features, and whether these tell products apart.

    python benchmarks/feature_importance.py --build BUILD --data DIR [--out FILE.md]

BUILD is any build, DIR a folder of several products with test images. Importance comes from the good training images by
the exact int8 engine. A random forest (scikit-learn, 100 trees) learns the product from at most 100 good training images of
each and names it for every test image, good and defective. Nothing is written without --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from machine import machine
from sklearn.ensemble import RandomForestClassifier
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier

from tinyvad.analysis.facts import layer_facts, masks_of
from tinyvad.analysis.plane import features as plane_features
from tinyvad.analysis.products import Product, chosen_layers, read_product, spaced
from tinyvad.detectors.feature_importance import without_clashing, without_shared
from tinyvad.files import write_text
from tinyvad.images import Dataset, find_datasets, load_images
from tinyvad.model import Model, batches, load

LEARNT = 100  # images a product that the forest learns from
DRAWS = 20  # of random features
Chosen = list[np.ndarray]  # a bool (H, W, C) a layer


def quiet(stage: str, done: int, total: int) -> None:
    pass


def tested(model: Model, datasets: list[Dataset], places: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Maps of all test images, [(n, H, W, C) int8], and their products."""
    maps: list[list[np.ndarray]] = [[] for _ in places]
    for dataset in datasets:
        for batch in batches(load_images([sample.path for sample in dataset.test], model.preprocessing)):
            taps = model.taps(np.stack([image for _, image in batch]))
            for found, place in zip(maps, places, strict=True):
                found.append(taps[place])
    owners = np.repeat(np.arange(len(datasets)), [len(dataset.test) for dataset in datasets])
    return [np.concatenate(found) for found in maps], owners


def values_of(products: list[Product], chosen: Chosen) -> tuple[np.ndarray, np.ndarray]:
    rows = [product.features(chosen, spaced(product.count, LEARNT)) for product in products]
    return np.concatenate(rows), np.repeat(np.arange(len(products)), [len(row) for row in rows])


def at_random(shapes: list[tuple[int, ...]], count: int, rng: np.random.Generator) -> Chosen:
    """``count`` features of all layers together."""
    edges = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    flat = np.zeros(edges[-1], bool)
    flat[rng.choice(edges[-1], count, replace=False)] = True
    return [flat[a:b].reshape(shape) for a, b, shape in zip(edges, edges[1:], shapes)]


def most_important(products: list[Product], count: int) -> Chosen:
    """The ``count`` features with the largest importance before it is normalised within a cell, of any product.

    A layer's importance counts relative to its own most varying cell.
    """
    layers = range(len(products[0].layers))
    raw = [
        np.max([p.layers[i].values * p.layers[i].totals[..., None] / p.layers[i].totals.max() for p in products], axis=0)
        for i in layers
    ]
    limit = np.sort(np.concatenate([values.ravel() for values in raw]))[-count]
    return [values >= limit for values in raw]


def classified(products: list[Product], chosen: Chosen, maps: list[np.ndarray], owners: np.ndarray) -> float:
    """Share of the test images whose product the forest names."""
    values, names = values_of(products, chosen)
    held = np.concatenate([m[:, mask] for m, mask in zip(maps, chosen, strict=True)], axis=1)
    return float(RandomForestClassifier(100, random_state=0, n_jobs=1).fit(values, names).score(held, owners))


def forest_table(products: list[Product], maps: list[np.ndarray], owners: np.ndarray) -> list[str]:
    shapes = [m.shape[1:] for m in maps]
    top = [np.any(masks, axis=0) for masks in masks_of(products, 1.0)]
    count = int(sum(mask.sum() for mask in top))
    total = sum(int(np.prod(shape)) for shape in shapes)
    rng = np.random.default_rng(0)
    rows = [
        ("all", total, [classified(products, [np.ones(shape, bool) for shape in shapes], maps, owners)]),
        ("each product's top 1 % of a cell's channels", count, [classified(products, top, maps, owners)]),
        ("as many, at random", count, [classified(products, at_random(shapes, count, rng), maps, owners)]),
    ]
    for few in (total // 100, 100, 10, 3):
        rows.append(("the most important of all", few, [classified(products, most_important(products, few), maps, owners)]))
        drawn = [classified(products, at_random(shapes, few, rng), maps, owners) for _ in range(DRAWS)]
        rows.append((f"at random, {DRAWS} draws", few, drawn))
    lines = ["| features | how many | accuracy on test images: mean | min | max |", "|---|---|---|---|---|"]
    for name, few, found in rows:
        lines.append(f"| {name} | {few:,} | {np.mean(found):.4f} | {min(found):.4f} | {max(found):.4f} |")
    return lines


def components_table(products: list[Product], names: list[str]) -> list[str]:
    head = [f"{name}: r, mean, most of {products[0].layers[i].values.shape[2]}" for i, name in enumerate(names)]
    lines = [f"| product | good images | {' | '.join(head)} |", "|" + "---|" * (len(names) + 2)]
    for p in products:
        cells = [f"{found.components}, {found.counts.mean():.1f}, {found.counts.max()}" for found in p.layers]
        lines.append(f"| {p.name} | {p.count} | {' | '.join(cells)} |")
    return lines


def shared_table(products: list[Product], names: list[str]) -> list[str]:
    """Of a product's kept features (mean), and of those that any product keeps, what each rule drops."""
    head = "| keep | products | layer | rule 1: of a product's, of all | rule 2, overlap | rule 2, apart |"
    lines = [head, "|---|---|---|---|---|---|"]
    for keep in (10.0, 20.0):
        for few in (4, len(products)):
            masks = masks_of(products[:few], keep)
            for i, name in enumerate(names):
                facts = layer_facts(products[:few], i, masks[i])
                lows, highs = [p.lows[i] for p in products[:few]], [p.highs[i] for p in products[:few]]
                rules = {
                    "1": without_shared(masks[i]),
                    "2_overlap": without_clashing(masks[i], lows, highs, apart=False),
                    "2_apart": without_clashing(masks[i], lows, highs, apart=True),
                }
                every = np.any(masks[i], axis=0)
                cells = []
                for rule, kept in rules.items():
                    whole = every & np.all(_kept(masks[i], kept), axis=0)
                    cells.append(f"{facts[f'dropped_by_rule_{rule}']:.1%}, {1 - whole.sum() / every.sum():.1%}")
                lines.append(f"| {keep:g} % | {few} | {name} | {' | '.join(cells)} |")
    return lines


def _kept(before: list[np.ndarray], after: list[np.ndarray]) -> list[np.ndarray]:
    """Where a rule took nothing from a product."""
    return [~a | b for a, b in zip(before, after, strict=True)]


def plane_lines(products: list[Product]) -> list[str]:
    """How well the plane of t-SNE keeps the products apart: the nearest neighbour's product, leave one out."""
    vectors, owners = plane_features(products)
    deviation = vectors.std(0)
    vectors = (vectors - vectors.mean(0)) / np.where(deviation > 0, deviation, 1)
    points = TSNE(2, init="pca", random_state=0).fit_transform(vectors)
    nearest = KNeighborsClassifier(2).fit(points, owners).kneighbors(points, return_distance=False)[:, 1]
    same = float((owners[nearest] == owners).mean())
    return [f"t-SNE of {len(vectors):,} training images: the nearest other point is of the same product for {same:.2%}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.build)
    datasets = find_datasets(arguments.data)
    layers = chosen_layers(model, None)
    places, names = list(layers.values()), list(layers)
    products = [read_product(model, dataset, places, None, "stop", 0, quiet) for dataset in datasets]
    maps, owners = tested(model, datasets, places)
    backbone, size = model.manifest["backbone"], model.preprocessing.height
    lines = [
        "# PCA feature importance on real products",
        "",
        machine(["numpy", "scikit-learn"]),
        "",
        f"`python benchmarks/feature_importance.py --build BUILD --data DIR`: {backbone.get('name')}, {size} px, taps "
        f"{', '.join(names)}, exact int8 engine; importance from all good training images.",
        "",
        "## Components for 80 % of a cell's variance",
        "",
        *components_table(products, names),
        "",
        "## What the products' masks share",
        "",
        *shared_table(products, names),
        "",
        "## Does a random forest tell the products apart?",
        "",
        f"{len(products)} products, at most {LEARNT} good training images each; {len(owners):,} test images, good and "
        "defective.",
        "",
        *forest_table(products, maps, owners),
        "",
        *plane_lines(products),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out is not None:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
