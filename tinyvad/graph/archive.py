"""A float Graph as named arrays and back, exactly: for what must be kept whole beside a build.

Flows in: a Graph without quantisation. Flows out: what ``np.savez`` takes: 'graph' (JSON: nodes and shapes) and
'constants/<number>'; and the same Graph again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node, Tensor


def to_arrays(graph: Graph) -> dict[str, np.ndarray]:
    """All of a float Graph. Raises InputError for a quantised one."""
    if any(tensor.quantization is not None for tensor in graph.tensors.values()):
        raise InputError(f"graph {graph.name} is quantised; keep its .tflite instead")
    facts = {
        "name": graph.name,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "nodes": [[node.op, node.inputs, node.output, node.attributes] for node in graph.nodes],
        "tensors": [[tensor.name, tensor.shape, tensor.dtype] for tensor in graph.tensors.values()],
        "constants": list(graph.constants),
    }
    text = np.frombuffer(json.dumps(facts, default=_plain).encode(), np.uint8)
    return {"graph": text, **{f"constants/{i}": array for i, array in enumerate(graph.constants.values())}}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Graph:
    """The Graph that ``to_arrays`` was given. Raises InputError for arrays that hold none."""
    try:
        facts = json.loads(arrays["graph"].tobytes().decode())
        nodes = [Node(op, tuple(inputs), output, _tuples(attributes)) for op, inputs, output, attributes in facts["nodes"]]
        tensors = {name: Tensor(name, tuple(shape), dtype) for name, shape, dtype in facts["tensors"]}
        constants = {name: arrays[f"constants/{i}"] for i, name in enumerate(facts["constants"])}
        graph = Graph(facts["name"], facts["inputs"], facts["outputs"], nodes, tensors, constants)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"these arrays hold no graph ({error!r}); make the build again") from error
    graph.check()
    return graph


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item()


def _tuples(attributes: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone; attributes are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
