"""Sixteen numbers at a time: LLVM's portable vectors as values that Numba kernels can hold.

Flows in: flat C-ordered int8, int32 or float32 arrays. Flows out: ``Lanes`` values for +, - and the like. LLVM turns them
into whatever vector registers the processor has (one of AVX-512, two of AVX2, four of NEON). Sums have one stated order
and products are never fused into them, so results are the same to the last bit on every processor, floats too. Numba's
own vectoriser can't promise that, nor does it vectorise short inner loops over arrays that may overlap.

Numba's cache does not see changes of this file in the kernels that use it: delete ``__pycache__`` after one.

No function here checks bounds: a load or store at ``index`` touches elements ``index`` to ``index + 15``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.extending import models, register_model

LANES = 16


class Lanes(types.Type):
    """Numba type of sixteen int32 or float32 values."""

    def __init__(self, element: types.Type) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = manager.lookup(lanes.element).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(element, LANES))


def intrinsic(generator: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's decorator; what it makes is called with other arguments than the generator, so type checkers look away."""
    return extending.intrinsic(generator)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to sixteen elements of a flat array from ``index`` on."""
    data = context.make_array(array_type)(context, builder, array).data
    vector = ir.VectorType(context.get_value_type(array_type.dtype), LANES)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16] as Lanes; int8 is widened to int32."""
    narrow = array.dtype == types.int8
    lanes = Lanes(types.int32 if narrow else array.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = builder.load(_address(context, builder, array, args[0], args[1]), align=array.dtype.bitwidth // 8)
        return builder.sext(values, context.get_value_type(lanes)) if narrow else values

    return lanes(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, values: Any) -> Any:
    """array[index : index + 16] = values."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, array, args[0], args[1])
        builder.store(args[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, values), generate


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Sixteen times the int32 or float32 ``value``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(signature.return_type)
        nothing, zero = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        first = builder.insert_element(nothing, args[0], zero)
        return builder.shuffle_vector(first, nothing, _positions([0] * LANES))

    return Lanes(value)(value), generate


def _positions(lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def _elementwise(operation: str) -> Callable[..., Any]:
    def typed(typing: Any, a: Any, b: Any) -> Any:
        name = "f" + operation if isinstance(a.element, types.Float) else operation

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return a(a, a), generate

    typed.__name__ = operation
    return intrinsic(typed)


add = _elementwise("add")
sub = _elementwise("sub")
mul = _elementwise("mul")


@intrinsic
def where_less(typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """Lane by lane, x where a < b, y elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        compare = builder.fcmp_ordered if isinstance(a.element, types.Float) else builder.icmp_signed
        return builder.select(compare("<", args[0], args[1]), args[2], args[3])

    return x(a, a, x, x), generate


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """Sum of the lanes: the upper half is added to the lower one until one lane is left."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        plus = builder.fadd if isinstance(a.element, types.Float) else builder.add
        values, width = args[0], LANES
        while width > 1:
            width //= 2
            nothing = ir.Constant(values.type, ir.Undefined)
            low = builder.shuffle_vector(values, nothing, _positions(list(range(width))))
            high = builder.shuffle_vector(values, nothing, _positions(list(range(width, 2 * width))))
            values = plus(low, high)
        return builder.extract_element(values, ir.Constant(ir.IntType(32), 0))

    return a.element(a), generate


@njit(cache=True, nogil=True)
def add_square(accumulator: Any, a: Any, b: Any) -> Any:
    """accumulator + (a - b)**2."""
    difference = sub(a, b)
    return add(accumulator, mul(difference, difference))
