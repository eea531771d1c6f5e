"""What TFLM's kernels for Arm ask the arena for beyond the reference kernels: one operator of a .tflite file in, bytes out.

With ``OPTIMIZED_KERNEL_DIR=cmsis_nn`` TFLM runs int8 operators in CMSIS-NN, whose convolutions gather their windows in
scratch. How much depends on the instruction set: 'scalar' (M0, M3), 'dsp' (M4, M7, M33) or 'mve' (Helium: M55).

Source: CMSIS-NN's ``*_get_buffer_sizes_s8.c`` (99f736a, built with GCC) and TFLM's ``kernels/cmsis_nn``. The tests hold the
figures against those that the library itself gave for the layers of MCUNet-in3.
"""

from __future__ import annotations

from tinyvad.firmware_sim.targets import Isa
from tinyvad.firmware_sim.tflm_kernels import operand, result
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator

INSTRUCTION_SETS = ("scalar", "dsp", "mve")

_CHANNELS_AT_ONCE = 124  # CH_IN_BLOCK_MVE: channels of a depthwise block under Helium
# the index of the scratch buffer in a kernel's data; a fully connected kernel keeps six numbers and a pointer more
_MORE_DATA = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 4, "AVERAGE_POOL_2D": 4, "MAX_POOL_2D": 4, "FULLY_CONNECTED": 28}


def instruction_set(isa: Isa) -> str:
    """Which of CMSIS-NN's three code paths a core runs."""
    return "mve" if isa.mve else "dsp" if isa.dsp else "scalar"


def scratch_nbytes(file: TfliteFile, op: TfliteOperator, isa: str) -> list[int]:
    """Scratch buffers of an int8 operator in CMSIS-NN, none for operators that need none or are not int8."""
    if op.op not in _SCRATCH or operand(file, op, 0).dtype != "int8":
        return []
    nbytes = _SCRATCH[op.op](file, op, isa)
    return [nbytes] if nbytes else []


def persistent_nbytes(file: TfliteFile, op: TfliteOperator, isa: str) -> list[int]:
    """Arrays that an operator keeps in the tail: under Helium the sums of a fully connected layer's weights."""
    if op.op != "FULLY_CONNECTED" or isa != "mve" or operand(file, op, 0).dtype != "int8":
        return []
    return [4 * operand(file, op, 1, rank=2).shape[0]]


def more_data_nbytes(op: TfliteOperator) -> int:
    """Bytes by which the kernel's own data is larger than the reference kernel's (32-bit pointers)."""
    return _MORE_DATA.get(op.op, 0)


def _conv(file: TfliteFile, op: TfliteOperator, isa: str) -> int:
    """Windows side by side: two of int16, or under Helium four of int8. None for 1x1, which reads the map as it is."""
    _, height, width, channels = operand(file, op, 1, rank=4).shape
    if (height, width) == (1, 1) and _dilation(op) == (1, 1):
        return 0
    values = height * width * channels
    return 4 * _round_up(values, 16) if isa == "mve" else 2 * 2 * _round_up(values, 4)


def _depthwise(file: TfliteFile, op: TfliteOperator, isa: str) -> int:
    """A window of int16, or under Helium four of int8 of a block of channels. 3x3 has a path of its own without Helium."""
    _, height, width, _ = operand(file, op, 1, rank=4).shape
    batch, _, _, channels = operand(file, op, 0, rank=4).shape
    if result(file, op).shape[3] != channels or batch != 1 or _dilation(op) != (1, 1):
        return 0
    if isa == "mve":
        return 4 * _CHANNELS_AT_ONCE * height * width
    return 2 * channels * height * width if isa == "dsp" and (height, width) != (3, 3) else 0


def _average_pool(file: TfliteFile, op: TfliteOperator, isa: str) -> int:
    """Sums of one position."""
    return 4 * operand(file, op, 0, rank=4).shape[3] if isa == "dsp" else 0


def _dilation(op: TfliteOperator) -> tuple[int, int]:
    return int(op.options.get("dilation_h", 1)), int(op.options.get("dilation_w", 1))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


_SCRATCH = {"CONV_2D": _conv, "DEPTHWISE_CONV_2D": _depthwise, "AVERAGE_POOL_2D": _average_pool}
