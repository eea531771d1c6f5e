"""A Graph that can be trained: its parameters, and the running statistics of its batch norms, beside it.

In such a graph a ``batch_norm`` node normalises first: y = scale * (x - mean) / sqrt(variance + ``EPSILON``) + offset,
over the batch, height and width while training, by the running statistics otherwise. ``tinyvad.training.student`` folds
them into the plain scale and offset that the rest of tinyvad knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tinyvad.graph.ir import Graph

EPSILON = 1e-5  # of a batch norm, and
MOMENTUM = 0.1  # how fast its running statistics follow the batch's; both PyTorch's defaults, as in the papers
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Network:
    """What is trained; never changed in place.

    Attributes:
        graph: nodes with ``batch_norm`` as above; its constants are the parameters' first values.
        parameters: float32 by the constant's name; the constants of the graph that are missing here stay as they are.
        statistics: '<batch_norm output>.mean' and '.variance', (C,) float32 each.
    """

    graph: Graph
    parameters: Arrays
    statistics: Arrays

    def with_values(self, parameters: Arrays, statistics: Arrays) -> Network:
        return replace(self, parameters=parameters, statistics=statistics)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.parameters.values(), *self.statistics.values()))
