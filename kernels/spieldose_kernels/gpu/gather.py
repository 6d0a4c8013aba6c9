"""Δ[slot]·x on the GPU: one launch per layer, whatever mix of adapters it serves."""

import torch
import triton
import triton.language as tl

from spieldose_kernels.delta import index_dtype
from spieldose_kernels.gpu.configs import Configuration, gather_configuration
from spieldose_kernels.gpu.slices import COLUMNS, LANES, ROWS, STARTS, VALUES, array, counts


def gather(
    y: torch.Tensor,
    x: torch.Tensor,
    *,
    memory: torch.Tensor,
    table: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    dtype: torch.dtype,
    configuration: Configuration | None = None,
) -> None:
    """Add Δ[slot of t]·x[t] to y[t] in place, for the tokens of the groups that play a slot.

    x is [T, C], y [T, R], both float32, bfloat16 or float16 with every row in one piece. memory and
    table are a `LayerSlab`'s, order, starts and slots `TokenGroups`' (a negative slot is skipped),
    dtype the values'. Sums are float32, rounded to y once, and the same from run to run.
    """
    assert x.dtype == y.dtype and x.stride(1) == y.stride(1) == 1 and table.is_contiguous()
    groups = slots.numel()
    if groups == 0:
        return
    chosen = configuration or gather_configuration(order.numel(), groups)
    row_dtype, column_dtype = index_dtype(y.shape[1]), index_dtype(x.shape[1])
    # only the device knows how many slices a delta has; none is without a row
    per_token = max(1, min(chosen.programs // (groups * chosen.tokens), y.shape[1]))
    gather_kernel[per_token, groups, chosen.tokens](
        y,
        x,
        order,
        starts,
        slots,
        table,
        memory.view(torch.int32),
        memory.view(row_dtype),
        memory.view(column_dtype),
        memory.view(dtype),
        y.stride(0),
        x.stride(0),
        BLOCK_V=chosen.block_vectors,
        num_warps=chosen.warps,
        maxnreg=chosen.registers,
        enable_fp_fusion=True,
    )


# one build whatever the batch: of the arena alone the compiler is to know the alignment
@triton.jit(
    do_not_specialize=[
        *("y", "x", "order", "group_starts", "slots", "table"),
        *("y_stride", "x_stride"),
    ]
)
def gather_kernel(
    y,
    x,
    order,
    group_starts,
    slots,
    table,
    slice_starts,
    rows,
    columns,
    values,
    y_stride,
    x_stride,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.program_id(1)
    slot = tl.load(slots + group)
    if slot < 0:
        return
    slices, wide, stored = counts(table, slot)
    if program >= slices:
        return

    slice_starts = array(slice_starts, table, slot, STARTS)
    rows = array(rows, table, slot, ROWS)
    columns = array(columns, table, slot, COLUMNS)
    values = array(values, table, slot, VALUES)
    first = tl.load(group_starts + group) + tl.program_id(2)
    last = tl.load(group_starts + group + 1)
    lane = tl.arange(0, LANES)
    # a tile is flat: then the compiler gives every load in it one layout, and nothing moves
    # through shared memory between them
    entry = tl.arange(0, BLOCK_V * LANES)
    vector = entry // LANES

    for t in range(first, last, tl.num_programs(2)):
        token = tl.load(order + t).to(tl.int64)
        source = x + token * x_stride
        target = y + token * y_stride

        for s in range(program, slices, tl.num_programs(0)):
            begin = tl.load(slice_starts + s)
            end = tl.load(slice_starts + s + 1)
            is_wide = s < wide
            place = tl.where(is_wide, s, wide + (s - wide) * LANES + lane)
            owns = tl.where(is_wide, lane == 0, place < stored)
            row = tl.load(rows + place, mask=owns, other=0).to(tl.int32)
            before = tl.load(target + row, mask=owns, other=0.0).to(tl.float32)
            products = tl.zeros([BLOCK_V * LANES], tl.float32)

            for v in range(begin, end, BLOCK_V):
                inside = v + vector < end
                at = tl.cast(v, tl.int64) * LANES
                column = tl.load(columns + at + entry, mask=inside, other=0).to(tl.int32)
                value = tl.load(values + at + entry, mask=inside, other=0.0).to(tl.float32)
                # never x where no entry is: 0 times infinity is no 0
                activation = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
                products += value * activation

            sums = tl.sum(tl.reshape(products, [BLOCK_V, LANES]), axis=0)
            sums = tl.where(is_wide, tl.sum(sums, axis=0), sums)
            tl.store(target + row, before + sums, mask=owns)
