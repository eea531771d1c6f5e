"""A .tflite file into a Graph: float files to float Graphs, int8 files to int8 Graphs as they are, or dequantised.

Only what the wanted outputs need is converted, so that a network with a head that tinyvad does not know can be tapped
before it. SAME padding becomes explicit pads for the input's size; constants keep the file's bytes.

With ``dequantize`` an int8 or uint8 file becomes a float Graph: weights and biases as the real numbers that they stand
for, QUANTIZE and DEQUANTIZE left out. The clipping to each tensor's range goes with the quantisation; fused ReLUs stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph
from tinyvad.graph.tflite_conversion import Conversion
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator, read_tflite
from tinyvad.graph.tflite_nodes import CONVERTERS

_HEAD = ("RESHAPE", "FULLY_CONNECTED")  # what comes here has a fixed size, and no map behind it

# What a damaged file makes the converters stumble over: options or inputs that are not there, shapes without axes.
_DAMAGED = (KeyError, IndexError, ValueError, ZeroDivisionError)


def import_tflite(
    source: str | Path | bytes,
    dequantize: bool = False,
    outputs: Sequence[str] | None = None,
    input_size: tuple[int, int] | None = None,
) -> Graph:
    """Read a .tflite file, or its bytes, as a Graph.

    Args:
        source: path or bytes.
        dequantize: give a float Graph of an int8 or uint8 file.
        outputs: names of the wanted tensors, the file's outputs by default; the rest of the file is not converted.
        input_size: (H, W) to run at instead of the file's own; padding and shapes follow.

    Returns:
        Graph with the file's tensor names (made unique where the file repeats one).

    Raises:
        InputError: the file can't be read, an output does not exist, or needs an operator, a dtype or an option that
            the Graph does not have (operator and tensor are named).
    """
    file = read_tflite(source)
    if len(file.inputs) != 1:
        raise InputError(f"{file.path_name}: {len(file.inputs)} inputs; only networks with one image input can be used")
    conversion = Conversion(file, dequantize, input_size)
    wanted = file.outputs if outputs is None else [conversion.find(name) for name in outputs]
    for operator in _needed(file, wanted):
        convert = CONVERTERS.get(operator.op)
        if convert is None:
            raise conversion.error(operator, "is not supported; tap an earlier tensor")
        try:
            convert(conversion, operator)
        except _DAMAGED as error:
            raise conversion.error(operator, f"is damaged ({type(error).__name__}: {error})") from error
    for index in wanted:
        if index not in conversion.values:
            raise InputError(f"{file.path_name}: output {conversion.names[index]} is not computed from the input")
    graph = conversion.graph
    graph.outputs = list(dict.fromkeys(conversion.values[index] for index in wanted))
    graph.check()
    return graph


def trunk_outputs(file: TfliteFile) -> list[str]:
    """The last maps before the head: outputs of supported operators that no other supported operator reads on."""
    reached = set(file.inputs)
    leaves: dict[int, str] = {}
    for operator in file.operators:
        fed = [i for i in operator.inputs if i >= 0 and file.tensors[i].data is None]
        if operator.op not in CONVERTERS or operator.op in _HEAD or not fed or not reached.issuperset(fed):
            continue
        reached.update(operator.outputs)
        for index in fed:
            leaves.pop(index, None)
        leaves.update({index: file.tensors[index].name for index in operator.outputs})
    if not leaves:
        raise InputError(f"{file.path_name}: no operator after the image is supported")
    return list(leaves.values())


def _needed(file: TfliteFile, wanted: list[int]) -> list[TfliteOperator]:
    """The operators that the wanted tensors depend on, in the file's order."""
    needed = set(wanted)
    operators = []
    for operator in reversed(file.operators):
        if needed.intersection(operator.outputs):
            operators.append(operator)
            # a reshape's target may be computed from shapes alone; the conversion infers it
            needed.update(operator.inputs[:1] if operator.op == "RESHAPE" else operator.inputs)
    return operators[::-1]
