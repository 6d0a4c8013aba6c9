"""Inner loops over vectors of 16, written in LLVM's own terms.

From the same loops in numba LLVM makes scalar code with the sums in memory: 1.0 to 1.2 ns an entry,
where these take 0.3 to 0.4 (EPYC with AVX-512; its gather instruction would take 0.4 to 0.6).
Processors with narrower vectors run the same code in pieces.
"""

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spieldose_kernels.cpu.bfloat16 import narrowed, widened

LANES: Final = 16  # a 512-bit vector of float32, half a warp
BLOCK: Final = 64  # tokens of a tile: four vectors of sums stay in registers

_INDEX, _LANE = ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_FAST = ("contract", "reassoc", "nsz")


@intrinsic
def dot_lanes(
    _: Any, values: Any, columns: Any, source: Any, first: Any, last: Any, out: Any
) -> Any:
    """Write out[l] = Σ values[v, l]·source[columns[v, l]] over the vectors first <= v < last."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value_data, column_data, source_data, out_data = (
            _data(context, builder, signature, arguments, i) for i in (0, 1, 2, 5)
        )
        total = cgutils.alloca_once_value(builder, _zeros())
        with cgutils.for_range(builder, builder.sub(arguments[4], arguments[3])) as loop:
            start = builder.mul(builder.add(arguments[3], loop.index), _INDEX(LANES))
            taken = ir.Constant(_VECTOR, ir.Undefined)
            for lane in range(LANES):
                column = _element(builder, column_data, builder.add(start, _INDEX(lane)))
                activation = _element(builder, source_data, builder.zext(column, _INDEX))
                taken = builder.insert_element(taken, activation, _LANE(lane))
            value = widened(builder, _vector(builder, value_data, start))
            _add_product(builder, total, value, taken)
        builder.store(builder.load(total), _pointer(builder, out_data, _INDEX(0)), align=4)
        return context.get_dummy_value()

    return types.void(values, columns, source, types.int64, types.int64, out), generate


@intrinsic
def dot_tokens(
    _: Any, values: Any, columns: Any, tile: Any, first: Any, step: Any, count: Any, out: Any
) -> Any:
    """Write out[t] = Σ values[e]·tile[columns[e], t] for t < BLOCK.

    Entries are e = first + k·step, k < count; values and columns flat, tile [C, BLOCK] float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value_data, column_data, tile_data, out_data = (
            _data(context, builder, signature, arguments, i) for i in (0, 1, 2, 6)
        )
        first, step, count = arguments[3:6]
        totals = [cgutils.alloca_once_value(builder, _zeros()) for _ in range(0, BLOCK, LANES)]
        with cgutils.for_range(builder, count) as loop:
            entry = builder.add(first, builder.mul(loop.index, step))
            value = _splat(builder, widened(builder, _element(builder, value_data, entry)))
            column = builder.zext(_element(builder, column_data, entry), _INDEX)
            start = builder.mul(column, _INDEX(BLOCK))
            for i, total in enumerate(totals):
                source = _vector(builder, tile_data, builder.add(start, _INDEX(i * LANES)))
                _add_product(builder, total, value, source)
        for i, total in enumerate(totals):
            target = _pointer(builder, out_data, _INDEX(i * LANES))
            builder.store(builder.load(total), target, align=4)
        return context.get_dummy_value()

    numbers = types.int64, types.int64, types.int64
    return types.void(values, columns, tile, *numbers, out), generate


@intrinsic
def back_tokens(
    _: Any,
    values: Any,
    columns: Any,
    tile: Any,
    dy: Any,
    first: Any,
    count: Any,
    dtile: Any,
    dvalues: Any,
) -> Any:
    """Go back over one row's entries e = first + k, k < count, for BLOCK tokens.

    Adds values[e]·dy[t] to dtile[columns[e], t], and Σ_t dy[t]·tile[columns[e], t] to dvalues[e].
    tile and dtile are [C, BLOCK], dy is [BLOCK], all float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value_data, column_data, tile_data, dy_data, dtile_data, dvalue_data = (
            _data(context, builder, signature, arguments, i) for i in (0, 1, 2, 3, 6, 7)
        )
        parts = range(0, BLOCK, LANES)
        upstream = [_vector(builder, dy_data, _INDEX(i)) for i in parts]
        with cgutils.for_range(builder, arguments[5]) as loop:
            entry = builder.add(arguments[4], loop.index)
            value = _splat(builder, _element(builder, value_data, entry))
            column = builder.zext(_element(builder, column_data, entry), _INDEX)
            start = builder.mul(column, _INDEX(BLOCK))
            total = _zeros()
            for i, gradient in zip(parts, upstream, strict=True):
                at = builder.add(start, _INDEX(i))
                taken = builder.fmul(gradient, _vector(builder, tile_data, at), flags=_FAST)
                total = builder.fadd(total, taken, flags=_FAST)
                given = builder.fmul(gradient, value, flags=_FAST)
                after = builder.fadd(_vector(builder, dtile_data, at), given, flags=_FAST)
                builder.store(after, _pointer(builder, dtile_data, at), align=4)
            target = builder.gep(dvalue_data, [entry])
            builder.store(builder.fadd(builder.load(target), _sum(builder, total)), target)
        return context.get_dummy_value()

    numbers = types.int64, types.int64
    return types.void(values, columns, tile, dy, *numbers, dtile, dvalues), generate


@intrinsic
def load_block(_: Any, x: Any, tokens: Any, t: Any, c: Any, tile: Any) -> Any:
    """Write tile[c + j, t + i] = x[tokens[t + i], c + j] for i, j < 16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_data = _data(context, builder, signature, arguments, 4)
        t, c = arguments[2:4]
        sources = _token_rows(context, builder, signature, arguments, (0, 1), t, c)
        block = _transposed(builder, [widened(builder, builder.load(s, align=2)) for s in sources])
        for j, vector in enumerate(block):
            row = builder.mul(builder.add(c, _INDEX(j)), _INDEX(BLOCK))
            target = _pointer(builder, tile_data, builder.add(row, t))
            builder.store(vector, target, align=4)
        return context.get_dummy_value()

    return types.void(x, tokens, types.int64, types.int64, tile), generate


@intrinsic
def add_block(_: Any, sums: Any, y: Any, tokens: Any, t: Any, r: Any) -> Any:
    """Add sums[r + j, t + i] to y[tokens[t + i], r + j] for i, j < 16, rounding once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_data = _data(context, builder, signature, arguments, 0)
        t, r = arguments[3:5]
        rows = [builder.mul(builder.add(r, _INDEX(j)), _INDEX(BLOCK)) for j in range(LANES)]
        block = [_vector(builder, sums_data, builder.add(row, t)) for row in rows]
        targets = _token_rows(context, builder, signature, arguments, (1, 2), t, r)
        for target, vector in zip(targets, _transposed(builder, block), strict=True):
            before = builder.load(target, align=2)
            after = builder.fadd(widened(builder, before), vector)
            builder.store(narrowed(builder, after, before.type.element), target, align=2)
        return context.get_dummy_value()

    return types.void(sums, y, tokens, types.int64, types.int64), generate


def _token_rows(
    context: Any, builder: Any, signature: Any, arguments: Any, at: tuple[int, int], t: Any, c: Any
) -> list[Any]:
    """Return where 16 features from `c` on of the tokens t to t + 15 lie, as vector pointers."""
    matrix = context.make_array(signature.args[at[0]])(context, builder, arguments[at[0]])
    width = cgutils.unpack_tuple(builder, matrix.shape)[1]
    tokens = _data(context, builder, signature, arguments, at[1])
    pointers = []
    for i in range(LANES):
        token = builder.sext(_element(builder, tokens, builder.add(t, _INDEX(i))), _INDEX)
        start = builder.add(builder.mul(token, width), c)
        pointers.append(_pointer(builder, matrix.data, start))
    return pointers


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of 16 vectors, by exchanging ever larger blocks."""
    for step in (1, 2, 4, 8):
        keep = [j if not j & step else LANES + j - step for j in range(LANES)]
        give = [j + step if not j & step else LANES + j for j in range(LANES)]
        exchanged = list(rows)
        for i in range(LANES):
            if not i & step:
                pair = rows[i], rows[i + step]
                exchanged[i] = builder.shuffle_vector(*pair, _mask(keep))
                exchanged[i + step] = builder.shuffle_vector(*pair, _mask(give))
        rows = exchanged
    return rows


def _sum(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector's lanes, by adding its halves."""
    for half in (8, 4, 2, 1):
        swapped = builder.shuffle_vector(vector, vector, _mask([i ^ half for i in range(LANES)]))
        vector = builder.fadd(vector, swapped, flags=_FAST)
    return builder.extract_element(vector, _LANE(0))


def _mask(lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_LANE, LANES), lanes)


def _data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


def _zeros() -> Any:
    return ir.Constant(_VECTOR, [0.0] * LANES)


def _element(builder: Any, data: Any, index: Any) -> Any:
    return builder.load(builder.gep(data, [index]))


def _pointer(builder: Any, data: Any, index: Any) -> Any:
    vector = ir.VectorType(data.type.pointee, LANES)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _vector(builder: Any, data: Any, index: Any) -> Any:
    element_bytes = 4 if data.type.pointee == ir.FloatType() else data.type.pointee.width // 8
    return builder.load(_pointer(builder, data, index), align=element_bytes)


def _splat(builder: Any, number: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, _LANE(0))
    return builder.shuffle_vector(first, undefined, _mask([0] * LANES))


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> None:
    product = builder.fmul(left, right, flags=_FAST)
    builder.store(builder.fadd(builder.load(total), product, flags=_FAST), total)
