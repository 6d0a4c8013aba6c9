"""NF4(W)·x for few tokens: the weight is read packed and dequantised on its way into the product.

The format is bitsandbytes': two weights to a byte, the first in the high half; every 64 weights of
a row share a scale; scales are bytes that name one of 256 numbers, and every 256 of them share a
scale of their own; to all of them is added one offset. No layer multiplies by this
yet: whether it is faster than bitsandbytes' own product is not measured.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Hold a launch's sizes."""

    tokens: int
    rows: int
    columns: int  # a multiple of 64
    stages: int  # tiles of the weight in flight
    warps: int = 4


# by the tokens up to which it serves, more take several rounds over the weight; not measured yet
TILES: Final = {
    16: Tile(tokens=16, rows=32, columns=128, stages=5),
    32: Tile(tokens=32, rows=32, columns=128, stages=4),
    64: Tile(tokens=64, rows=32, columns=128, stages=3),
}
FLOAT32_TILE: Final = Tile(tokens=16, rows=32, columns=64, stages=3)


def nf4_matmul(x: torch.Tensor, packed: torch.Tensor, *, quant_state: Any) -> torch.Tensor:
    """Return x·Wᵀ, [T, R] in x's dtype, for x [T, C] float32, bfloat16 or float16, T to about 64.

    packed and quant_state are a `Params4bit`'s data and state, of an NF4 weight [R, C] with double
    quantisation. C must be a multiple of 64, so that no block of weights runs on into another row.
    Weights are rounded to x's dtype, as bitsandbytes rounds them; sums are float32.
    """
    (tokens, width), height = x.shape, quant_state.shape[0]
    _check(x, packed, quant_state)
    y = torch.empty(tokens, height, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    tile = _tile(x)
    nf4_kernel[(triton.cdiv(height, tile.rows), triton.cdiv(tokens, tile.tokens))](
        y,
        x,
        packed.view(torch.uint8),
        quant_state.code,
        quant_state.absmax,
        quant_state.state2.code,
        quant_state.state2.absmax,
        quant_state.offset,
        tokens,
        height,
        width,
        BLOCK_T=tile.tokens,
        BLOCK_R=tile.rows,
        BLOCK_C=tile.columns,
        STAGES=tile.stages,
        WIDEN=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    return y


@triton.jit(do_not_specialize=["tokens"])
def nf4_kernel(
    y_ptr,
    x_ptr,
    packed_ptr,
    code_ptr,
    scales_ptr,
    scale_code_ptr,
    outer_scales_ptr,
    offset_ptr,
    tokens,
    height,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (row < height)[:, None]
    present = (t < tokens)[:, None]
    code = tl.load(code_ptr + tl.arange(0, 16))
    offset = tl.load(offset_ptr)
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)

    for first in tl.range(0, width, BLOCK_C, num_stages=STAGES):
        byte = (first // 2 + tl.arange(0, BLOCK_C // 2))[None, :]
        pair_ptrs = packed_ptr + row[:, None] * (width // 2) + byte
        pair = tl.load(pair_ptrs, mask=inside & (byte < width // 2), other=0)

        block = (first // 64 + tl.arange(0, BLOCK_C // 64))[None, :]
        scaled = inside & (block < width // 64)
        block = row[:, None] * (width // 64) + block
        number = tl.load(scales_ptr + block, mask=scaled, other=0).to(tl.int32)
        inner = tl.load(scale_code_ptr + number, mask=scaled, other=0.0)
        outer = tl.load(outer_scales_ptr + block // 256, mask=scaled, other=0.0)
        scale = inner * outer + offset

        # looked up among 16 numbers in the program's own memory, all of a tile at once
        index = tl.join(pair >> 4, pair & 15).to(tl.int32).reshape(BLOCK_R * BLOCK_C)
        w = tl.gather(code, index, 0).reshape(BLOCK_R, BLOCK_C // 64, 64) * scale[:, :, None]
        w = w.reshape(BLOCK_R, BLOCK_C).to(x_ptr.dtype.element_ty)

        column = (first + tl.arange(0, BLOCK_C))[None, :]
        x_ptrs = x_ptr + t[:, None] * width + column
        x = tl.load(x_ptrs, mask=present & (column < width), other=0.0)
        if WIDEN:  # triton's interpreter multiplies bfloat16 as the integers of its bits
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    y_ptrs = y_ptr + t[:, None] * height + row[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=present & (row < height)[None, :])


def _tile(x: torch.Tensor) -> Tile:
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    return next((TILES[limit] for limit in TILES if x.shape[0] <= limit), TILES[max(TILES)])


def _check(x: torch.Tensor, packed: torch.Tensor, state: Any) -> None:
    kind = state.quant_type, state.nested, state.blocksize, state.nested and state.state2.blocksize
    assert kind == ("nf4", True, 64, 256), f"expected double-quantised nf4, got {kind}"
    assert state.shape[1] % 64 == 0, f"expected a width divisible by 64, got {state.shape[1]}"
    assert packed.is_contiguous() and x.is_contiguous() and x.shape[1] == state.shape[1]
