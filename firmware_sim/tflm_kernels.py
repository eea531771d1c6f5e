"""What TFLM's reference kernels ask the arena for: one operator of a .tflite file in, byte counts out.

Three kinds of request decide a TensorFlow Lite Micro arena beyond the tensors themselves:

* scratch buffers, planned into the head beside the activations while their operator runs;
* persistent arrays in the tail, above all two int32 per output channel of every convolution;
* two structs per operator in the tail: its parsed options, and the kernel's own data.

Source: the kernels' ``Prepare`` functions (tensorflow/lite/micro/kernels of tflite-micro), and for the struct
sizes single-operator models in the recording interpreter of pip ``tflite-micro`` (x86-64, 2026-10). The 32-bit
sizes follow from the structs' fields: pointers of 4 bytes, and no USE_TFLM_COMPRESSION, which that package sets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tinyvad.errors import InputError
from tinyvad.graph.tflite_file import TfliteFile, TfliteOperator, TfliteTensor


class Kernel(NamedTuple):
    """Struct sizes in bytes: parsed options, kernel data on a 64-bit host, kernel data on a 32-bit target."""

    options: int
    data_64: int
    data_32: int


# An operator that is missing here may run in TFLM all the same; its scratch is then unknown to us.
KERNELS: dict[str, Kernel] = {
    "ABS": Kernel(0, 28, 28),
    "ADD": Kernel(8, 60, 60),
    "ADD_N": Kernel(0, 0, 0),
    "ARG_MAX": Kernel(4, 0, 0),
    "ARG_MIN": Kernel(4, 0, 0),
    "AVERAGE_POOL_2D": Kernel(40, 32, 32),
    "BATCH_MATMUL": Kernel(3, 32, 16),
    "BATCH_TO_SPACE_ND": Kernel(0, 0, 0),
    "BROADCAST_TO": Kernel(0, 0, 0),
    "CAST": Kernel(8, 0, 0),
    "CEIL": Kernel(0, 0, 0),
    "CONCATENATION": Kernel(8, 80, 24),
    "CONV_2D": Kernel(28, 80, 56),
    "COS": Kernel(0, 0, 0),
    "DEPTHWISE_CONV_2D": Kernel(28, 80, 56),
    "DEPTH_TO_SPACE": Kernel(4, 20, 20),
    "DEQUANTIZE": Kernel(0, 32, 32),
    "DIV": Kernel(4, 28, 28),
    "ELU": Kernel(0, 256, 256),
    "EQUAL": Kernel(0, 32, 32),
    "EXP": Kernel(0, 0, 0),
    "EXPAND_DIMS": Kernel(0, 0, 0),
    "FLOOR": Kernel(0, 0, 0),
    "FULLY_CONNECTED": Kernel(32, 72, 48),
    "GATHER": Kernel(8, 20, 20),
    "GREATER": Kernel(0, 32, 32),
    "GREATER_EQUAL": Kernel(0, 32, 32),
    "HARD_SWISH": Kernel(0, 20, 20),
    "L2_NORMALIZATION": Kernel(4, 4, 4),
    "L2_POOL_2D": Kernel(40, 20, 20),
    "LEAKY_RELU": Kernel(4, 24, 24),
    "LESS": Kernel(0, 32, 32),
    "LESS_EQUAL": Kernel(0, 32, 32),
    "LOG": Kernel(0, 0, 0),
    "LOGISTIC": Kernel(0, 16, 16),
    "LOG_SOFTMAX": Kernel(0, 0, 0),
    "MAXIMUM": Kernel(0, 0, 0),
    "MAX_POOL_2D": Kernel(40, 32, 32),
    "MEAN": Kernel(1, 44, 44),
    "MINIMUM": Kernel(0, 0, 0),
    "MIRROR_PAD": Kernel(4, 20, 20),
    "MUL": Kernel(4, 36, 36),
    "NEG": Kernel(0, 0, 0),
    "NOT_EQUAL": Kernel(0, 32, 32),
    "PACK": Kernel(8, 0, 0),
    "PAD": Kernel(0, 56, 56),
    "PADV2": Kernel(0, 56, 56),
    "PRELU": Kernel(0, 28, 28),
    "QUANTIZE": Kernel(0, 32, 32),
    "REDUCE_MAX": Kernel(1, 44, 44),
    "REDUCE_MIN": Kernel(1, 44, 44),
    "RELU": Kernel(0, 28, 28),
    "RELU6": Kernel(0, 8, 8),
    "RESHAPE": Kernel(36, 0, 0),
    "RESIZE_BILINEAR": Kernel(2, 0, 0),
    "RESIZE_NEAREST_NEIGHBOR": Kernel(2, 0, 0),
    "ROUND": Kernel(0, 0, 0),
    "RSQRT": Kernel(0, 28, 28),
    "SHAPE": Kernel(4, 0, 0),
    "SIN": Kernel(0, 0, 0),
    "SLICE": Kernel(0, 0, 0),
    "SOFTMAX": Kernel(4, 80, 56),
    "SPACE_TO_BATCH_ND": Kernel(0, 4, 4),
    "SPACE_TO_DEPTH": Kernel(4, 20, 20),
    "SPLIT": Kernel(4, 0, 0),
    "SPLIT_V": Kernel(4, 0, 0),
    "SQRT": Kernel(0, 0, 0),
    "SQUARE": Kernel(0, 0, 0),
    "SQUARED_DIFFERENCE": Kernel(0, 112, 112),
    "SQUEEZE": Kernel(36, 0, 0),
    "STRIDED_SLICE": Kernel(24, 84, 84),
    "SUB": Kernel(8, 52, 52),
    "SUM": Kernel(1, 44, 44),
    "SVDF": Kernel(12, 36, 36),
    "TANH": Kernel(0, 16, 16),
    "TRANSPOSE": Kernel(0, 0, 0),
    "TRANSPOSE_CONV": Kernel(20, 88, 72),
    "UNPACK": Kernel(8, 0, 0),
    "ZEROS_LIKE": Kernel(0, 0, 0),
}

# Stands in for an operator that is not in the table (a middling one of those that are).
UNKNOWN = Kernel(8, 32, 32)

_ITEM_BITS = {"int4": 4, "bfloat16": 16, "resource": 32}


def tensor_nbytes(file: TfliteFile, tensor: TfliteTensor) -> int:
    """Bytes of a tensor's values in memory.

    Raises:
        InputError: a dynamic dimension (-1), or strings, whose size depends on their content.
    """
    if any(size < 0 for size in tensor.shape):
        raise InputError(
            f"{file.path_name}: tensor {tensor.index} ({tensor.name}) has the dynamic shape "
            f"{list(tensor.shape)}; convert the model with fixed input shapes"
        )
    if tensor.dtype in ("string", "variant") or tensor.dtype.startswith("type"):
        raise InputError(
            f"{file.path_name}: tensor {tensor.index} ({tensor.name}) is of type {tensor.dtype}, which has no "
            "fixed size; only numeric models can be planned"
        )
    bits = _ITEM_BITS.get(tensor.dtype) or 8 * np.dtype(tensor.dtype).itemsize
    return (math.prod(tensor.shape) * bits + 7) // 8


def operand(file: TfliteFile, op: TfliteOperator, position: int, rank: int | None = None) -> TfliteTensor:
    """Input tensor ``position`` of ``op``; InputError if it is left out or not of ``rank`` dimensions."""
    where = f"{file.path_name}: operator {op.index} ({op.op})"
    if position >= len(op.inputs) or op.inputs[position] < 0:
        raise InputError(f"{where} has no input {position}; the file is damaged, convert it again")
    tensor = file.tensors[op.inputs[position]]
    if rank is not None and len(tensor.shape) != rank:
        raise InputError(f"{where}: input {position} has {len(tensor.shape)} dimensions, needs {rank}")
    return tensor


def result(file: TfliteFile, op: TfliteOperator) -> TfliteTensor:
    """First output tensor of ``op``."""
    if not op.outputs:
        raise InputError(f"{file.path_name}: operator {op.index} ({op.op}) has no output; convert it again")
    return file.tensors[op.outputs[0]]


def scratch_nbytes(file: TfliteFile, op: TfliteOperator) -> list[int]:
    """Scratch buffers that the reference kernel requests, in order of request.

    Optimised kernels ask for more: CMSIS-NN's convolutions for an im2col row each, for example.
    """
    if op.op in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
        weights = operand(file, op, 1)
        return [math.prod(weights.shape)] if weights.dtype == "int4" else []  # unpacked to int8
    if op.op in ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN"):
        values, axes = operand(file, op, 0), operand(file, op, 1)
        sums = []
        if op.op in ("MEAN", "SUM") and values.dtype in ("int8", "int16"):
            sums = [4 * math.prod(result(file, op).shape)]
        return [*sums, 4 * len(values.shape), 4 * math.prod(axes.shape)]  # index, resolved axes
    if op.op == "SVDF":
        values, features = operand(file, op, 0, rank=2), operand(file, op, 1, rank=2)
        batch, filters = values.shape[0], features.shape[0]
        units = filters // max(int(op.options.get("rank", 1)), 1)
        return [4 * batch * filters, 4 * batch * units] if values.dtype == "int8" else [4 * batch * filters]
    if op.op == "TRANSPOSE_CONV":
        accumulator = {"int8": 4, "int16": 8}.get(operand(file, op, 2).dtype, 0)
        return [accumulator * math.prod(result(file, op).shape)] if accumulator else []
    if op.op == "MIRROR_PAD":
        return [4 * len(operand(file, op, 0).shape)] * 2
    if op.op == "ADD_N":
        return [8 * len(op.inputs)]  # a pointer each, those of a 64-bit host as in the package
    return []


def persistent_nbytes(file: TfliteFile, op: TfliteOperator, pointer: int) -> list[int]:
    """Arrays that the reference kernel keeps in the tail beside its data, in order of allocation."""
    if op.op in ("CONV_2D", "TRANSPOSE_CONV"):
        return [4 * operand(file, op, 1, rank=4).shape[0]] * 2  # multipliers, shifts
    if op.op == "DEPTHWISE_CONV_2D":
        return [4 * operand(file, op, 1, rank=4).shape[3]] * 2
    if op.op == "FULLY_CONNECTED":
        weights = operand(file, op, 1, rank=2)
        per_channel = weights.quantization is not None and len(weights.quantization.scale) > 1
        return [4 * weights.shape[0]] * 2 if per_channel else []
    if op.op in ("ADD_N", "LOG_SOFTMAX"):
        return [40] if operand(file, op, 0).dtype == "int8" else []
    if op.op == "SOFTMAX":
        return [2 * 513] * 2 if operand(file, op, 0).dtype == "int16" else []  # exp and 1/(1+x) tables
    if op.op == "BATCH_MATMUL":
        left, right = operand(file, op, 0), operand(file, op, 1)
        eval_tensor = 3 * pointer
        arrays = [28] if left.dtype in ("int8", "int16") else []
        for tensor, transposed in ((left, op.options.get("adj_x")), (right, not op.options.get("adj_y"))):
            if transposed:
                arrays += [eval_tensor, 4 + 4 * len(tensor.shape), tensor_nbytes(file, tensor)]
        return [*arrays, 4 + 4 * len(result(file, op).shape)]
    return []


def macs(file: TfliteFile, op: TfliteOperator) -> int:
    """Multiply-accumulates of one operator, padding counted; 0 for all but convolutions and fully connected."""
    if op.op == "CONV_2D":
        return math.prod(result(file, op).shape) * math.prod(operand(file, op, 1, rank=4).shape[1:])
    if op.op == "DEPTHWISE_CONV_2D":
        return math.prod(result(file, op).shape) * math.prod(operand(file, op, 1, rank=4).shape[1:3])
    if op.op == "FULLY_CONNECTED":
        return math.prod(result(file, op).shape) * operand(file, op, 1, rank=2).shape[1]
    if op.op == "TRANSPOSE_CONV":  # every input value meets the whole kernel of every output channel
        return math.prod(operand(file, op, 2).shape) * math.prod(operand(file, op, 1, rank=4).shape[:3])
    return 0
