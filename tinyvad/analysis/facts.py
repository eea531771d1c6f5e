"""Importance as plain values: how many components, which channels, what the products share. Products in, JSON out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvad.analysis.products import Product
from tinyvad.detectors.feature_importance import (
    chosen_by,
    mask_bytes,
    top_mask,
    without_clashing,
    without_shared,
)

MOST_NAMED = 5  # channels of a layer that are named


def masks_of(products: Sequence[Product], keep: float) -> list[list[np.ndarray]]:
    """Masks (H, W, C) of the ``keep`` percent most important channels of each cell: [layer][product]."""
    layers = range(len(products[0].layers))
    return [[top_mask(product.layers[layer].values, keep) for product in products] for layer in layers]


def product_facts(product: Product, names: Sequence[str], masks: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of one product: images, bytes of its masks, and for each layer components and its most important channels."""
    layers = {}
    for name, found, mask in zip(names, product.layers, masks, strict=True):
        share = found.values.mean((0, 1))  # (C,) of the layer's importance; sum 1 unless cells are constant
        order = np.argsort(-share, kind="stable")[:MOST_NAMED]
        layers[name] = {
            "components": found.components,
            "components_mean": round(float(found.counts.mean()), 3),
            "components_max": int(found.counts.max()),
            "constant_cells": int((found.totals == 0).sum()),
            "kept": round(float(mask.mean()), 6),
            "top_channels": [{"channel": int(c), "share": round(float(share[c]), 6)} for c in order],
        }
    return {"images": product.count, "mask_bytes": mask_bytes(masks), "layers": layers}


def layer_facts(products: Sequence[Product], layer: int, masks: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of one layer: its size, and what the products' masks share.

    ``shared[i][j]``: share of what product i keeps that j keeps too. ``chosen_by[k]``: share of all features (a channel of
    a cell) that k products keep. ``dropped_by_rule_1``, ``_2_overlap``, ``_2_apart``: share of what the masks keep that the
    rules against conflicts would drop, mean over products; the second rule in both readings (``without_clashing``).
    """
    height, width, channels = masks[0].shape
    facts: dict[str, Any] = {"height": height, "width": width, "channels": channels}
    if len(products) < 2:
        return facts
    both = [[int((a & b).sum()) for b in masks] for a in masks]
    counts = np.bincount(chosen_by(masks).ravel(), minlength=len(products) + 1) / masks[0].size
    lows, highs = [p.lows[layer] for p in products], [p.highs[layer] for p in products]
    return facts | {
        "shared": [[round(n / max(row[i], 1), 6) for n in row] for i, row in enumerate(both)],
        "chosen_by": [round(float(share), 6) for share in counts],
        "dropped_by_rule_1": _dropped(masks, without_shared(masks)),
        "dropped_by_rule_2_overlap": _dropped(masks, without_clashing(masks, lows, highs, apart=False)),
        "dropped_by_rule_2_apart": _dropped(masks, without_clashing(masks, lows, highs, apart=True)),
    }


def _dropped(masks: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> float:
    shares = [1 - after.sum() / max(before.sum(), 1) for before, after in zip(masks, kept, strict=True)]
    return round(float(np.mean(shares)), 6)
