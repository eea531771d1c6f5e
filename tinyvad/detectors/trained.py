"""The protocol of the detectors that are trained by gradients (STFPM, PaSTe, CFA, SimpleNet); the training room holds it.

How they are used::

    detector = Paste(graph)                                       # tinyvad.detectors.student
    items = FrozenItems(detector.trunk, detector.targets, images)  # tinyvad.training.items; images (H, W, 3), normalised
    trained = train(detector, items, held_out, detector.recipe)    # tinyvad.training.loop; puts the best network in
    maps = detector.maps(items.take(np.arange(8)))                 # (8, H, W), higher is more anomalous
    graph = detector.graph()                                       # float, from the image, to quantise and export
"""

from __future__ import annotations

from tinyvad.training.trainable import Items, TrainedDetector

__all__ = ["Items", "TrainedDetector"]
