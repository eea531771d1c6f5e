"""A trainable Graph on a batch: arrays in, arrays and the new running statistics of its batch norms out.

Flows in: a Graph whose ``batch_norm`` nodes normalise (``tinyvad.training.network``), parameters that may be on the tape,
and maps (n, H, W, C). Flows out: the graph's outputs, on the tape where a parameter has influence. What the graph holds
besides the parameters is frozen: no gradient of it is worked out, nor of what it alone makes.

Shapes in the Graph say one image; arrays have n. A value is let go after its last reader. The same bytes come out on any
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, Node
from tinyvad.training import ops
from tinyvad.training.blocks import one_blas_thread
from tinyvad.training.network import MOMENTUM, Arrays


def run(
    graph: Graph, parameters: Mapping[str, Any], statistics: Arrays, inputs: Sequence[Any], train: bool
) -> tuple[list[Any], Arrays]:
    """The graph's outputs for a batch.

    Args:
        graph: trainable Graph; not quantised.
        parameters: arrays by the constant's name, in place of the graph's; may be on the tape.
        statistics: '<batch_norm output>.mean' and '.variance' of every batch norm, (C,).
        inputs: (n, ...) float32 (or float64) in the order of the graph's inputs.
        train: batch norms by the batch's own moments; False: by ``statistics``.

    Returns:
        outputs in the graph's order, (n, ...); the statistics after this batch (as given when not training).

    Raises:
        InputError: inputs that are not the graph's, an op that cannot be trained, missing statistics, or a batch norm that
            sees a single value a channel.
    """
    _check(graph, inputs)
    values: dict[str, Any] = dict(zip(graph.inputs, inputs, strict=True))
    dtype = ops.plain(inputs[0]).dtype
    moved = dict(statistics)
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    with one_blas_thread():
        for i, node in enumerate(graph.nodes):
            arguments = [
                values[name] if name in values else _constant(graph, parameters, name, dtype) for name in node.inputs
            ]
            if node.op == "batch_norm":
                values[node.output] = _batch_norm(node, arguments, statistics, moved, train)
            elif node.op in OPS:
                values[node.output] = OPS[node.op](node, *arguments)
            else:
                raise InputError(f"graph {graph.name}: {node.op} -> {node.output} cannot be trained; leave it in the trunk")
            del arguments
            for name in set(node.inputs):
                if last_use[name] == i and name in values and name not in graph.outputs:
                    del values[name]
    return [values[name] for name in graph.outputs], moved


def _check(graph: Graph, inputs: Sequence[Any]) -> None:
    if len(inputs) != len(graph.inputs):
        raise InputError(f"graph {graph.name} takes {len(graph.inputs)} inputs, not {len(inputs)}")
    for name, x in zip(graph.inputs, inputs, strict=True):
        x = ops.plain(x)
        if x.shape[1:] != graph.tensors[name].shape[1:] or x.dtype.kind != "f" or len(x) == 0:
            raise InputError(
                f"graph {graph.name}: {name} takes float arrays (n, {', '.join(map(str, graph.tensors[name].shape[1:]))}), "
                f"not {x.dtype} {x.shape}"
            )


def _constant(graph: Graph, parameters: Mapping[str, Any], name: str, dtype: np.dtype) -> Any:
    """A parameter as it is; anything frozen in the batch's own type."""
    return parameters[name] if name in parameters else graph.constants[name].astype(dtype, copy=False)


def _batch_norm(node: Node, arguments: list[Any], statistics: Arrays, moved: Arrays, train: bool) -> Any:
    """Normalise, and move the running statistics of this node in ``moved``."""
    names = f"{node.output}.mean", f"{node.output}.variance"
    missing = [name for name in names if name not in statistics]
    if missing:
        raise InputError(f"batch_norm -> {node.output} has no statistics {missing[0]}; give its mean and variance")
    x, scale, offset = arguments
    activation = _activation(node)
    if not train:
        return ops.batch_norm_eval(x, scale, offset, statistics[names[0]], statistics[names[1]], activation)
    mean, variance = ops.moments(x)
    count = ops.plain(x).size // mean.size
    if count < 2:
        raise InputError(f"batch_norm -> {node.output} sees 1 value a channel and needs 2; use larger batches or images")
    for name, now in zip(names, (mean, variance * (count / (count - 1))), strict=True):
        old = statistics[name]
        moved[name] = ((1 - MOMENTUM) * old + MOMENTUM * now).astype(old.dtype)
    return ops.batch_norm_train(x, scale, offset, activation, (mean, variance))


def _activation(node: Node) -> str:
    return str(node.attributes.get("activation", "none"))


def _geometry(node: Node, *names: str) -> dict[str, Any]:
    return {name: node.attributes[name] for name in names if name in node.attributes}


def _conv(function: Callable[..., Any]) -> Callable[..., Any]:
    def convolve(node: Node, x: Any, weights: Any, bias: Any = None) -> Any:
        y = function(x, weights, _unless_zero(bias), **_geometry(node, "stride", "pads", "dilation"))
        return ops.activate(y, _activation(node))

    return convolve


def _unless_zero(bias: Any) -> Any:
    """None for a frozen bias of zeros, which a convolution in front of a batch norm has."""
    return None if isinstance(bias, np.ndarray) and not bias.any() else bias


def _fully_connected(node: Node, x: Any, weights: Any, bias: Any = None) -> Any:
    return ops.activate(ops.fully_connected(x, weights, _unless_zero(bias)), _activation(node))


def _average_pool(node: Node, x: Any) -> Any:
    geometry = _geometry(node, "kernel", "stride", "pads", "count_include_pad")
    return ops.activate(ops.average_pool(x, **geometry), _activation(node))


def _max_pool(node: Node, x: Any) -> Any:
    return ops.activate(ops.max_pool(x, **_geometry(node, "kernel", "stride", "pads")), _activation(node))


OPS: dict[str, Callable[..., Any]] = {
    "conv2d": _conv(ops.conv2d),
    "depthwise_conv2d": _conv(ops.depthwise_conv2d),
    "fully_connected": _fully_connected,
    "add": lambda node, x, y: ops.activate(ops.add(x, y), _activation(node)),
    "mul": lambda node, x, y: ops.activate(ops.mul(x, y), _activation(node)),
    "average_pool": _average_pool,
    "max_pool": _max_pool,
    "mean": lambda node, x: ops.mean(x),
    "pad": lambda node, x: ops.pad(x, node.attributes["pads"]),
    "resize_nearest": lambda node, x: ops.resize_nearest(
        x, **_geometry(node, "size", "align_corners", "half_pixel_centers")
    ),
    "concat": lambda node, *maps: ops.concat(*maps),
    "reshape": lambda node, x: ops.reshape(x, (len(ops.plain(x)), *node.attributes["shape"][1:])),
    "relu": lambda node, x: ops.relu(x),
    "relu6": lambda node, x: ops.relu6(x),
    "logistic": lambda node, x: ops.logistic(x),
    "hard_swish": lambda node, x: ops.hard_swish(x),
}
