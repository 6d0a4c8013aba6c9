"""Sparse products on the CPU, compiled; one call per layer, whatever mix of adapters it serves.

Single-threaded on purpose: torch's own worker threads spin between its products, and a second pool
beside them competes for the same cores.
"""

from typing import Any

import numba
import numpy as np

STORE_BLOCK = 16  # rows gathered before they are written: one cache line of float32 per token

# sums may be reordered and fused, but NaN and infinity stay what they are
_compiled = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"})

Array = np.ndarray[Any, np.dtype[Any]]


def gather_add(
    x: Array,
    y: Array,
    *,
    arena: tuple[Array, Array],
    table: Array,
    order: Array,
    starts: Array,
    slots: Array,
) -> None:
    """Add Δ[slot of t] · x[t] to y[t], in place, for tokens grouped by slot.

    x is [T, C], y [T, R], float32 or the bits of bfloat16 as uint16; sums are float32 and rounded
    once. `arena` is one memory seen as int32 and as float32; `table` [A, 3] int64 says where a
    slot's row starts, columns and values begin in it, or -1 if it does not touch this layer.
    Group g is the tokens order[starts[g]:starts[g + 1]], all of slot slots[g].
    """
    _gather_add(x, y, arena[0], arena[1], table, order, starts, slots, x.dtype == np.uint16)


@_compiled
def product(x, y, row_starts, columns, values):
    """Write y = Δ · x, [R, T] from [C, T]."""
    for row in range(y.shape[0]):
        out = y[row]
        out[:] = 0
        for j in range(row_starts[row], row_starts[row + 1]):
            value, source = values[j], x[columns[j]]
            for t in range(out.shape[0]):
                out[t] += value * source[t]


@_compiled
def transposed_product(y, x, row_starts, columns, values):
    """Write x = Δᵀ · y, [C, T] from [R, T]."""
    x[:] = 0
    for row in range(y.shape[0]):
        source = y[row]
        for j in range(row_starts[row], row_starts[row + 1]):
            value, out = values[j], x[columns[j]]
            for t in range(out.shape[0]):
                out[t] += value * source[t]


@_compiled
def sampled_product(y, x, out, row_starts, columns):
    """Write out[j] = Σ_t y[row of j, t] · x[column of j, t], [Z], from [R, T] and [C, T]."""
    for row in range(y.shape[0]):
        left = y[row]
        for j in range(row_starts[row], row_starts[row + 1]):
            total = out.dtype.type(0)
            right = x[columns[j]]
            for t in range(left.shape[0]):
                total += left[t] * right[t]
            out[j] = total


@_compiled
def _gather_add(x, y, integers, floats, table, order, starts, slots, bits):
    height = y.shape[1]
    for group in range(slots.shape[0]):
        row_starts, columns, values = table[slots[group]]
        if row_starts < 0:
            continue
        tokens = order[starts[group] : starts[group + 1]]
        features = _features(x, tokens, bits)
        sums = np.empty((STORE_BLOCK, tokens.shape[0]), np.float32)
        for first in range(0, height, STORE_BLOCK):
            rows = min(STORE_BLOCK, height - first)
            for i in range(rows):
                low = integers[row_starts + first + i]
                count = integers[row_starts + first + i + 1] - low
                _row(sums, i, features, integers, floats, columns + low, values + low, count)
            _store(sums, rows, y, tokens, first, bits)


@_compiled
def _features(x, tokens, bits):
    """Return the tokens' activations as [C, T'] float32."""
    out = np.empty((x.shape[1], tokens.shape[0]), np.float32)
    raw = out.view(np.uint32)
    for t in range(tokens.shape[0]):
        for c in range(x.shape[1]):
            if bits:
                raw[c, t] = np.uint32(x[tokens[t], c]) << np.uint32(16)
            else:
                out[c, t] = x[tokens[t], c]
    return out


@_compiled
def _row(sums, i, features, integers, floats, columns, values, count):
    """Write sums[i, t] = Σ_j floats[values + j] · features[integers[columns + j], t]."""
    if sums.shape[1] == 1:
        total = np.float32(0)
        for j in range(count):
            total += floats[values + j] * features[integers[columns + j], 0]
        sums[i, 0] = total
        return
    sums[i] = 0
    for j in range(count):
        value = floats[values + j]
        column = integers[columns + j]
        for t in range(sums.shape[1]):
            sums[i, t] += value * features[column, t]


@_compiled
def _store(sums, rows, y, tokens, first, bits):
    """Add sums[:rows] to y[tokens, first:], rounding to nearest even."""
    value = np.empty(1, np.float32)
    raw = value.view(np.uint32)
    for t in range(tokens.shape[0]):
        for i in range(rows):
            if bits:
                raw[0] = np.uint32(y[tokens[t], first + i]) << np.uint32(16)
                value[0] += sums[i, t]
                odd = (raw[0] >> np.uint32(16)) & np.uint32(1)
                y[tokens[t], first + i] = (raw[0] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            else:
                y[tokens[t], first + i] += sums[i, t]
