"""bfloat16 in compiled code: numpy and numba have none, so its bits travel as uint16.

All of it leaves float32 as it is, so that one source serves both dtypes.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT, _WORD, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)


@intrinsic
def widen(_: Any, number: Any) -> Any:
    """Return float32, or bfloat16's bits, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, arguments[0])

    return types.float32(number), generate


@intrinsic
def narrow(_: Any, value: Any, like: Any) -> Any:
    """Return a float32 in the type of `like`, rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return narrowed(builder, arguments[0], arguments[1].type)

    return like(types.float32, like), generate


def widened(builder: Any, number: Any) -> Any:
    """Emit what `widen` does, for a number or a vector of them."""
    if _element(number.type) == _FLOAT:
        return number
    word = _like(number.type, _WORD)
    shifted = builder.shl(builder.zext(number, word), _constant(word, 16))
    return builder.bitcast(shifted, _like(number.type, _FLOAT))


def narrowed(builder: Any, value: Any, element: Any) -> Any:
    """Emit what `narrow` does, for a number or a vector of them."""
    if element == _FLOAT:
        return value
    word = _like(value.type, _WORD)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, _constant(word, 16)), _constant(word, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(word, 0x7FFF)))
    return builder.trunc(builder.lshr(rounded, _constant(word, 16)), _like(value.type, _HALF))


def _element(kind: Any) -> Any:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _like(kind: Any, element: Any) -> Any:
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind: Any, number: int) -> Any:
    vector = isinstance(kind, ir.VectorType)
    return ir.Constant(kind, [number] * kind.count if vector else number)
