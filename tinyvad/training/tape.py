"""The tape that gradients run back along: autograd's, with the two things that training a Graph needs besides.

Flows in: a function of named arrays, made of the primitives in ``tinyvad.training.ops`` and of anything in
``autograd.numpy``. Flows out: its value and the gradient of every array. Each array is a root of the tape of its own (a
dict as one root costs autograd a pass over the whole dict for every parameter), and what a step of the way back has used
is let go at once, so that memory falls while the gradients come in.

This is the only place of tinyvad that imports autograd. Source: HIPS autograd, ``autograd.core``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvad.errors import InputError
from tinyvad.training.network import Arrays

try:
    from autograd.core import VJPNode, add_outgrads
    from autograd.extend import defvjp_argnums, primitive, vspace
    from autograd.tracer import getval, isbox, new_box, trace_stack
    from autograd.util import toposort
except ImportError as error:
    raise InputError("training needs autograd: pip install 'tinyvad[train]'") from error

__all__ = ["differentiable", "plain", "value_and_gradients"]

# (indices of the arguments that need a gradient, result, arguments, keywords) -> (gradient of the result -> theirs)
Backward = Callable[[tuple[int, ...], Any, tuple[Any, ...], dict[str, Any]], Callable[[Any], tuple[Any, ...]]]


def differentiable(backward: Backward) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function of arrays becomes a primitive whose derivative is ``backward``.

    ``backward`` is called right after the function, and should keep hold only of what the way back will read: what it
    returns lives until then. Only arguments by position can have a gradient; keywords never do.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = primitive(function)
        defvjp_argnums(wrapped, backward)
        return wrapped

    return decorate


def plain(value: Any) -> Any:
    """The array behind a value on the tape, cut off from it: no gradient flows through what is made of it."""
    return getval(value)


def value_and_gradients(
    function: Callable[[Any], tuple[Any, Any]], parameters: Arrays
) -> tuple[float, Any, Arrays]:
    """Value, extra result and gradients of ``function`` at ``parameters``.

    Args:
        function: arrays by name -> (scalar, anything): the scalar is differentiated, the rest is handed back.
        parameters: arrays of float32 or float64 by name.

    Returns:
        the scalar; what came with it; the gradients, shaped and typed like the parameters (0 where one has no influence).

    Raises:
        InputError: the first result is not a scalar.
    """
    with trace_stack.new_trace() as trace:
        roots = {name: VJPNode.new_root() for name in parameters}
        boxes = {name: new_box(array, trace, roots[name]) for name, array in parameters.items()}
        value, extra = function(boxes)
        del boxes
    if np.ndim(plain(value)) != 0:
        raise InputError(f"a loss of shape {np.shape(plain(value))} cannot be differentiated; return one number")
    found = {root: name for name, root in roots.items()}
    gradients: Arrays = {}
    if isbox(value) and value._trace == trace:
        _walk_back(value._node, vspace(plain(value)).ones(), found, gradients)
    result = {
        name: np.asarray(gradients[name], array.dtype) if name in gradients else np.zeros_like(array)
        for name, array in parameters.items()
    }
    return float(plain(value)), extra, result


def _walk_back(end: Any, gradient: Any, roots: dict[Any, str], gradients: Arrays) -> None:
    """Fill in the gradients of ``roots``, last operation first."""
    pending = {end: (gradient, False)}
    for node in toposort(end):
        gradient = pending.pop(node)[0]
        if node in roots:
            gradients[roots[node]] = gradient
            continue
        for parent, part in zip(node.parents, node.vjp(gradient), strict=True):
            pending[parent] = add_outgrads(pending.get(parent), part)
        node.vjp = None  # with it go the arrays that it kept
