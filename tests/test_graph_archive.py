"""A Graph as arrays and back is the same Graph, through a file too."""

from __future__ import annotations

import io

import numpy as np
import pytest

from tinyvad.backbones.source import open_backbone
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.archive import from_arrays, to_arrays
from tinyvad.sizing import plan_network


@pytest.mark.parametrize("name", ["mcunet-in1", "mobilenet-v3-small", "phinet-mcu"])
def test_a_graph_comes_back_exactly(name: str) -> None:
    graph = open_backbone(name).graph_at(64)
    file = io.BytesIO()
    np.savez(file, **to_arrays(graph))
    file.seek(0)
    again = from_arrays(np.load(file, allow_pickle=False))
    assert (again.name, again.inputs, again.outputs) == (graph.name, graph.inputs, graph.outputs)
    assert again.nodes == graph.nodes  # ops, names, attributes and their types
    assert list(again.constants) == list(graph.constants)
    for key, array in graph.constants.items():
        assert again.constants[key].dtype == array.dtype and again.constants[key].tobytes() == array.tobytes()
    assert to_onnx(again).SerializeToString(deterministic=True) == to_onnx(graph).SerializeToString(deterministic=True)


def test_what_is_no_float_graph_is_refused() -> None:
    with pytest.raises(InputError, match="quantised"):
        to_arrays(plan_network(open_backbone("mcunet-in1").graph_at(64)).graph)
    arrays = to_arrays(open_backbone("mcunet-in1").graph_at(64))
    del arrays["constants/3"]
    with pytest.raises(InputError, match="hold no graph"):
        from_arrays(arrays)
    with pytest.raises(InputError, match="hold no graph"):
        from_arrays({})
