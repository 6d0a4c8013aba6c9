"""Δ[slot]·x on the CPU: one call per layer, whatever mix of adapters it serves."""

from typing import Any

import numba
import numpy as np

from spieldose_kernels.cpu.bfloat16 import narrow, widen
from spieldose_kernels.cpu.team import Work, array_at, compiled
from spieldose_kernels.cpu.vector import BLOCK, LANES, add_block, dot_lanes, dot_tokens, load_block
from spieldose_kernels.sliced import FIELDS

FEW = 8  # tokens of one slot up to which they are multiplied one by one


def gather(x_type: Any, value_type: Any, row_type: Any, column_type: Any) -> Work:
    """Return the compiled product for these numpy types; bfloat16 is uint16, its bits.

    Its arguments: R, C, T, the addresses of x [T, C] and y [T, R], the number of groups, and the
    addresses of order, starts and slots, of the arena, and of the layer's table.
    """

    def body(arguments, thread, threads):
        height, width, tokens = arguments[0], arguments[1], arguments[2]
        x = numba.carray(array_at(arguments[3]), (tokens, width), x_type)
        y = numba.carray(array_at(arguments[4]), (tokens, height), x_type)
        groups = arguments[5]
        order = numba.carray(array_at(arguments[6]), tokens, np.int32)
        starts = numba.carray(array_at(arguments[7]), groups + 1, np.int32)
        slots = numba.carray(array_at(arguments[8]), groups, np.int32)
        arena, table = arguments[9], arguments[10]
        item = 0
        for group in range(groups):
            if slots[group] < 0:
                continue
            at = table + slots[group] * FIELDS * 8
            record = numba.carray(array_at(at), FIELDS, np.int64)
            slices, wide, stored = record[0], record[1], record[2]
            if slices == 0:
                continue
            slice_starts = numba.carray(array_at(arena + record[3]), slices + 1, np.int32)
            rows = numba.carray(array_at(arena + record[4]), stored, row_type)
            shape = (np.int64(slice_starts[slices]), LANES)
            columns = numba.carray(array_at(arena + record[5]), shape, column_type)
            values = numba.carray(array_at(arena + record[6]), shape, value_type)
            delta = wide, slice_starts, rows, columns, values
            members = order[starts[group] : starts[group + 1]]
            block = 1 if members.size <= FEW else BLOCK
            for first in range(0, members.size, block):
                # whole tokens go to a thread: two that write one token's rows share cache lines
                if item % threads == thread:
                    if block == 1:
                        _one(x[members[first]], y[members[first]], delta)
                    else:
                        _many(x, y, members[first : first + BLOCK], delta)
                item += 1

    return Work(body, 11)


@compiled
def _one(x, y, delta):
    """Multiply one token, a slice's 16 lanes at once."""
    wide, slice_starts, rows, columns, values = delta
    source = np.empty(x.size, np.float32)
    for c in range(x.size):
        source[c] = widen(x[c])
    lanes = np.empty(LANES, np.float32)
    sums = np.zeros(y.size, np.float32)
    for s in range(slice_starts.size - 1):
        dot_lanes(values, columns, source, slice_starts[s], slice_starts[s + 1], lanes)
        if s < wide:
            sums[rows[s]] = lanes.sum()
        else:
            first = wide + (s - wide) * LANES
            if first + LANES <= rows.size:  # of known length, the loop is unrolled
                for lane in range(LANES):
                    sums[rows[first + lane]] = lanes[lane]
            else:
                for lane in range(rows.size - first):
                    sums[rows[first + lane]] = lanes[lane]
    for r in range(y.size):
        y[r] = narrow(widen(y[r]) + sums[r], y[r])


@compiled
def _many(x, y, tokens, delta):
    """Multiply up to BLOCK tokens, row by row."""
    wide, slice_starts, rows, columns, values = delta
    tile = np.zeros((x.shape[1], BLOCK), np.float32)
    load(x, tokens, tile)
    sums = np.zeros((y.shape[1], BLOCK), np.float32)
    flat_columns, flat_values = columns.ravel(), values.ravel()
    for place in range(rows.size):
        if place < wide:
            first, step = slice_starts[place] * LANES, 1
            count = (slice_starts[place + 1] - slice_starts[place]) * LANES
        else:
            s, lane = wide + (place - wide) // LANES, (place - wide) % LANES
            first, step = slice_starts[s] * LANES + lane, LANES
            count = slice_starts[s + 1] - slice_starts[s]
        dot_tokens(flat_values, flat_columns, tile, first, step, count, sums[rows[place]])
    store(sums, tokens, y)


@compiled
def load(x, tokens, tile):
    """Write the tokens' activations as columns of the tile."""
    width, whole = x.shape[1], tokens.size // LANES * LANES
    for c in range(0, width // LANES * LANES, LANES):
        for t in range(0, whole, LANES):
            load_block(x, tokens, t, c, tile)
    for t in range(tokens.size):
        for c in range(0 if t >= whole else width // LANES * LANES, width):
            tile[c, t] = widen(x[tokens[t], c])


@compiled
def store(sums, tokens, y):
    """Add the columns of sums to the tokens' outputs."""
    height, whole = y.shape[1], tokens.size // LANES * LANES
    for r in range(0, height // LANES * LANES, LANES):
        for t in range(0, whole, LANES):
            add_block(sums, y, tokens, t, r)
    for t in range(tokens.size):
        for r in range(0 if t >= whole else height // LANES * LANES, height):
            y[tokens[t], r] = narrow(widen(y[tokens[t], r]) + sums[r, t], y[0, 0])
