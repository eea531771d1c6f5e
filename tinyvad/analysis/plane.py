"""Products as points in a plane: t-SNE of their most important features, by scikit-learn where it is installed.

Every image becomes a vector of the features (a channel of a cell) that are among the most important ``PERCENT`` of any
product, each standardised over all images. Source: van der Maaten and Hinton 2008; the thesis behind PaSTe, chapter 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvad.analysis.facts import masks_of
from tinyvad.analysis.products import Product, spaced

PERCENT = 1.0  # of a cell's channels; at least one
MOST_IMAGES = 1200  # of all products together: t-SNE's time grows faster than their number
FEWEST_IMAGES = 10
PERPLEXITY = 30.0
MISSING = "t-SNE needs scikit-learn: pip install 'tinyvad[analyse]'"


def features(products: Sequence[Product], percent: float = PERCENT) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, F) float32 of up to ``MOST_IMAGES`` images, an equal number of each product, and their products (n,)."""
    chosen = [np.any(masks, axis=0) for masks in masks_of(products, percent)]
    rows = [product.features(chosen, spaced(product.count, MOST_IMAGES // len(products))) for product in products]
    return np.concatenate(rows), np.repeat(np.arange(len(products)), [len(row) for row in rows])


def plane(products: Sequence[Product], seed: int) -> dict[str, Any]:
    """``{features, images, perplexity, points {product: [[x, y]]}}``, or ``{left_out: why}``."""
    if len(products) < 2:
        return {"left_out": "t-SNE compares products: there is one"}
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return {"left_out": MISSING}
    vectors, owners = features(products)
    if len(vectors) < FEWEST_IMAGES:
        return {"left_out": f"t-SNE needs {FEWEST_IMAGES} images in all, there are {len(vectors)}"}
    deviation = vectors.std(0)
    vectors = (vectors - vectors.mean(0)) / np.where(deviation > 0, deviation, 1)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    return {
        "features": vectors.shape[1],
        "images": len(vectors),
        "perplexity": round(perplexity, 3),
        "points": {
            product.name: [[round(float(x), 3), round(float(y), 3)] for x, y in points[owners == i]]
            for i, product in enumerate(products)
        },
    }
