"""The products of a training step, on the support alone: Δ·x, Δᵀ·dy, and dΔ sampled from dy·xᵀ.

All features-first, [R, T] and [C, T]: an entry meets T values that lie side by side, and loads them
16 bytes at once: where T is no multiple of 16, tokens of zeros are added first, in a copy.
"""

from typing import Final

import torch
import triton
import triton.language as tl

# not measured yet
BLOCK_J: Final = 32  # entries multiplied at once
BLOCK_T: Final = 128  # tokens at once, fewer where there are fewer
WARPS: Final = 4
STAGES: Final = 3  # of a row's loop over its entries

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def sampled_product(
    y: torch.Tensor, x: torch.Tensor, *, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return Σ_t y[row of j, t]·x[column of j, t] for every support entry j, [Z] float32.

    y is [R, T], x is [C, T], both of one dtype: float32, bfloat16 or float16. row_starts is
    [R + 1] int32, columns [Z] int32.
    """
    height, entries, tokens = row_starts.numel() - 1, columns.numel(), x.shape[1]
    _check_support(row_starts, columns)
    _check_floats("x", x, (x.shape[0], tokens))
    _check_floats("y", y, (height, tokens))
    assert y.dtype == x.dtype, f"expected x and y of one dtype, got {x.dtype} and {y.dtype}"
    x, y = _whole(x), _whole(y)
    out = torch.empty(entries, dtype=torch.float32, device=x.device)
    if entries:
        sampled_product_kernel[(triton.cdiv(entries, BLOCK_J),)](
            out,
            y,
            x,
            row_starts,
            columns,
            entries,
            height,
            x.shape[1],
            height.bit_length(),
            BLOCK_J=BLOCK_J,
            BLOCK_T=_token_block(x.shape[1]),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out


def product(
    x: torch.Tensor, values: torch.Tensor, *, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return Δ·x, [R, T] float32, from x [C, T] and values [Z], each float32, bfloat16 or float16.

    row_starts is [R + 1] int32, columns [Z] int32.
    """
    height, entries, tokens = row_starts.numel() - 1, columns.numel(), x.shape[1]
    _check_support(row_starts, columns)
    _check_floats("x", x, (x.shape[0], tokens))
    _check_floats("values", values, (entries,))
    x = _whole(x)
    out = torch.empty(height, tokens, dtype=torch.float32, device=x.device)
    if out.numel():
        block = _token_block(tokens)
        product_kernel[(height, triton.cdiv(tokens, block))](
            out,
            x,
            values,
            row_starts,
            columns,
            tokens,
            x.shape[1],
            BLOCK_J=BLOCK_J,
            BLOCK_T=block,
            STAGES=STAGES,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out


def transpose_support(
    row_starts: torch.Tensor, columns: torch.Tensor, *, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Δᵀ's row_starts [C + 1] int32 and columns [Z] int32, and its entries' places in Δ.

    Δᵀ·dy is `product(dy, values[places], row_starts=..., columns=...)`. To add into dx instead
    would take atomics; what it costs to turn a support around, backward pays each time.
    """
    ordered, places = torch.sort(columns, stable=True)
    entries = torch.arange(columns.numel(), dtype=torch.int32, device=columns.device)
    rows = torch.searchsorted(row_starts, entries, right=True, out_int32=True) - 1
    bounds = torch.arange(width + 1, dtype=torch.int32, device=columns.device)
    return torch.searchsorted(ordered, bounds, out_int32=True), rows[places], places


@triton.jit(do_not_specialize=["entries", "height", "steps"])
def sampled_product_kernel(
    out_ptr,
    y_ptr,
    x_ptr,
    row_starts_ptr,
    columns_ptr,
    entries,
    height,
    tokens,
    steps,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # entries are dealt out evenly, whatever their rows: no row is long enough to be waited for
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    stored = j < entries
    row = _row_of(j, stored, row_starts_ptr, height, steps).to(tl.int64)
    column = tl.load(columns_ptr + j, mask=stored, other=0).to(tl.int64)
    y_row_ptrs = y_ptr + row[:, None] * tokens
    x_row_ptrs = x_ptr + column[:, None] * tokens
    acc = tl.zeros([BLOCK_J, BLOCK_T], tl.float32)
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)[None, :]
        mask = stored[:, None] & (t < tokens)
        y = tl.load(y_row_ptrs + t, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_row_ptrs + t, mask=mask, other=0.0).to(tl.float32)
        acc += y * x
    tl.store(out_ptr + j, tl.sum(acc, 1), mask=stored)


@triton.jit
def _row_of(j, stored, row_starts_ptr, height, steps):
    """Return the last row that starts at or before each entry, by halving `steps` times."""
    low = tl.zeros_like(j).to(tl.int32)
    high = low + height
    for _ in range(steps):
        middle = (low + high) >> 1
        start = tl.load(row_starts_ptr + middle, mask=stored, other=0)
        high = tl.where(start <= j, high, middle)
        low = tl.where(start <= j, middle, low)
    return low


@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    out_ptr,
    x_ptr,
    values_ptr,
    row_starts_ptr,
    columns_ptr,
    tokens,
    x_tokens,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    # rows run fastest: programs that run at one time share a block of tokens, which stays in cache
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.load(row_starts_ptr + row)
    end = tl.load(row_starts_ptr + row + 1)
    acc = tl.zeros([BLOCK_J, BLOCK_T], tl.float32)
    for first in tl.range(begin, end, BLOCK_J, num_stages=STAGES):
        j = first + tl.arange(0, BLOCK_J)
        stored = j < end
        column = tl.load(columns_ptr + j, mask=stored, other=0).to(tl.int64)
        value = tl.load(values_ptr + j, mask=stored, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + column[:, None] * x_tokens + t[None, :]
        mask = stored[:, None] & (t < x_tokens)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += value[:, None] * x
    tl.store(out_ptr + row * tokens + t, tl.sum(acc, 0), mask=t < tokens)


def _check_support(row_starts: torch.Tensor, columns: torch.Tensor) -> None:
    for name, indices in (("row_starts", row_starts), ("columns", columns)):
        assert indices.dtype == torch.int32, f"expected {name} int32, got {indices.dtype}"
        assert indices.is_contiguous(), f"expected {name} contiguous"


def _check_floats(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert tensor.dtype in FLOATS, f"expected {name} of 16 or 32 bits, got {tensor.dtype}"
    assert tensor.shape == shape, f"expected {name} {shape}, got {tuple(tensor.shape)}"
    assert tensor.is_contiguous(), f"expected {name} contiguous"


def _token_block(tokens: int) -> int:
    enough: int = triton.next_power_of_2(tokens)
    return min(BLOCK_T, max(16, enough))


def _whole(x: torch.Tensor) -> torch.Tensor:
    """Return x with tokens of zeros added up to a multiple of 16; they add nothing to any sum."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 16)) if x.shape[1] % 16 else x
