"""Δ·x for one adapter under training, and its gradients, in blocks of tokens."""

from functools import cache
from typing import Any

import numba
import numpy as np
import torch

from spieldose_kernels.cpu.gather import load, store
from spieldose_kernels.cpu.team import Work, array_at, threads_for
from spieldose_kernels.cpu.vector import BLOCK, back_tokens, dot_tokens

# numpy has no bfloat16: its bits travel as uint16
NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16}


def add_product(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    *,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
) -> None:
    """Add Δ·x to y in place: y [T, R], x [T, C], float32 or bfloat16; values [Z] float32.

    Sums are float32, rounded to y once.
    """
    tokens = torch.arange(x.shape[0], dtype=torch.int32)
    arrays = x, y, row_starts, columns, values, tokens
    sizes = y.shape[1], x.shape[1], x.shape[0], values.numel()
    _forward(NUMPY[x.dtype], NUMPY[y.dtype])(
        *sizes, *(array.data_ptr() for array in arrays), threads=_threads(x, values)
    )


def gradients(
    x: torch.Tensor,
    dy: torch.Tensor,
    values: torch.Tensor,
    *,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Δᵀ·dy [T, C] in x's dtype and Σ_t dy[t, row of j]·x[t, column of j], [Z] float32."""
    dx, threads = torch.zeros_like(x), _threads(x, values)
    parts = values.new_zeros(threads, values.numel())  # of dvalues, one per thread
    tokens = torch.arange(x.shape[0], dtype=torch.int32)
    arrays = x, dy, row_starts, columns, values, tokens, dx, parts
    sizes = dy.shape[1], x.shape[1], x.shape[0], values.numel()
    _backward(NUMPY[x.dtype], NUMPY[dy.dtype])(
        *sizes, *(array.data_ptr() for array in arrays), threads=threads
    )
    return dx, parts.sum(0)


def _threads(x: torch.Tensor, values: torch.Tensor) -> int:
    blocks = -(-x.shape[0] // BLOCK)
    return max(1, min(threads_for(x.shape[0] * values.numel()), blocks))


@cache
def _forward(x_type: Any, y_type: Any) -> Work:
    def body(arguments, thread, threads):
        height, width, tokens, count = arguments[0], arguments[1], arguments[2], arguments[3]
        x = numba.carray(array_at(arguments[4]), (tokens, width), x_type)
        y = numba.carray(array_at(arguments[5]), (tokens, height), y_type)
        row_starts = numba.carray(array_at(arguments[6]), height + 1, np.int32)
        columns = numba.carray(array_at(arguments[7]), count, np.int32)
        values = numba.carray(array_at(arguments[8]), count, np.float32)
        order = numba.carray(array_at(arguments[9]), tokens, np.int32)
        for block in range(thread * BLOCK, tokens, threads * BLOCK):
            members = order[block : block + BLOCK]
            tile = np.zeros((width, BLOCK), np.float32)
            load(x, members, tile)
            sums = np.zeros((height, BLOCK), np.float32)
            for row in range(height):
                first = row_starts[row]
                entries = row_starts[row + 1] - first
                dot_tokens(values, columns, tile, first, 1, entries, sums[row])
            store(sums, members, y)

    return Work(body, 10)


@cache
def _backward(x_type: Any, y_type: Any) -> Work:
    def body(arguments, thread, threads):
        height, width, tokens, count = arguments[0], arguments[1], arguments[2], arguments[3]
        x = numba.carray(array_at(arguments[4]), (tokens, width), x_type)
        dy = numba.carray(array_at(arguments[5]), (tokens, height), y_type)
        row_starts = numba.carray(array_at(arguments[6]), height + 1, np.int32)
        columns = numba.carray(array_at(arguments[7]), count, np.int32)
        values = numba.carray(array_at(arguments[8]), count, np.float32)
        order = numba.carray(array_at(arguments[9]), tokens, np.int32)
        dx = numba.carray(array_at(arguments[10]), (tokens, width), x_type)
        part = numba.carray(array_at(arguments[11]), (threads, count), np.float32)[thread]
        for block in range(thread * BLOCK, tokens, threads * BLOCK):
            members = order[block : block + BLOCK]
            tile = np.zeros((width, BLOCK), np.float32)
            load(x, members, tile)
            dy_tile = np.zeros((height, BLOCK), np.float32)
            load(dy, members, dy_tile)
            dtile = np.zeros((width, BLOCK), np.float32)
            for row in range(height):
                first = row_starts[row]
                entries = row_starts[row + 1] - first
                if entries:
                    back_tokens(values, columns, tile, dy_tile[row], first, entries, dtile, part)
            store(dtile, members, dx)

    return Work(body, 12)
