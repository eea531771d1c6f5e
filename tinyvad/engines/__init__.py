"""Engines run a backbone: quantised images in, the tapped maps out. One protocol, so that they can be compared."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """What every engine offers.

    Attributes:
        name: 'int8', 'onnx', 'litert' or 'tflm'.
        exact: True if its tapped int8 tensors are those of the device, bit for bit.
    """

    name: str
    exact: bool

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """The tapped maps of some images.

        Args:
            images: (n, H, W, 3), int8 network input for the exact engines.

        Returns:
            One (n, h, w, c) array a tapped tensor, in the order of the network's outputs.

        Raises:
            InputError: the images' shape or dtype is not the network's.
        """
        ...
