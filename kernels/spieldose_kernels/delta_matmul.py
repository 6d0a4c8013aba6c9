"""Δ[slot]·x for a batch of tokens that play different adapters."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from spieldose_kernels.cpu.gather import gather
from spieldose_kernels.cpu.team import Work, threads_for
from spieldose_kernels.slab import LayerSlab
from spieldose_kernels.token_groups import TokenGroups


def delta_matmul(y: torch.Tensor, x: torch.Tensor, layer: LayerSlab, groups: TokenGroups) -> None:
    """Add Δ[slot of t]·x[t] to y[t] in place, for the tokens of `groups`; the others are untouched.

    x is [..., C], y [..., R], both of one floating dtype, tokens counted over the leading
    dimensions. Sums are float32, rounded to y once.
    """
    if y.is_cpu and not torch.compiler.is_compiling():
        _on_cpu(y, x, layer, groups)  # the operator's dispatch costs twice what the call does
        return
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    arrays = groups.order, groups.starts, groups.slots
    _gather(y, x, layer.memory, layer.table, *arrays, layer.dtype)
    if groups.long:
        slots, tokens = zip(*groups.long, strict=True)
        _scatter(y, x, layer.memory, layer.table, slots, tokens, layer.dtype)


def delta_matmul_reference(
    y: torch.Tensor, x: torch.Tensor, layer: LayerSlab, groups: TokenGroups
) -> None:
    """Define `delta_matmul`, in any floating dtype; float64 sums in float64."""
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    dtype = torch.promote_types(y.dtype, torch.float32)
    starts = groups.starts.tolist()
    for slot, first, last in zip(groups.slots.tolist(), starts, starts[1:], strict=False):
        delta = layer.delta(slot) if slot >= 0 else None
        if delta is not None:
            tokens = groups.order[first:last].long()
            rows, columns, values = delta.entries()
            taken = x[tokens][:, columns].to(dtype) * values.to(dtype)
            y[tokens] = y[tokens].to(dtype).index_add_(1, rows, taken).to(y.dtype)


@torch.library.custom_op("spieldose::gather", mutates_args=("y",))
def _gather(
    y: torch.Tensor,
    x: torch.Tensor,
    memory: torch.Tensor,
    table: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    if y.is_cuda:
        from spieldose_kernels.gpu import gather as gpu

        gpu.gather(
            y,
            x,
            memory=memory,
            table=table,
            order=order,
            starts=starts,
            slots=slots,
            dtype=dtype,
        )
    else:
        layer = LayerSlab(memory, table, (y.shape[1], x.shape[1]), dtype)
        _on_cpu(y, x, layer, TokenGroups(order, starts, slots))


@torch.library.custom_op("spieldose::scatter", mutates_args=("y",), device_types="cuda")
def _scatter(
    y: torch.Tensor,
    x: torch.Tensor,
    memory: torch.Tensor,
    table: torch.Tensor,
    slots: Sequence[int],
    tokens: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    from spieldose_kernels.gpu import scatter as gpu

    segments = list(zip(slots, tokens, strict=True))
    gpu.scatter_matmul(y, x, memory=memory, table=table, segments=segments, dtype=dtype)


@_gather.register_fake
@_scatter.register_fake
def _(*arguments: object) -> None: ...


def _on_cpu(y: torch.Tensor, x: torch.Tensor, layer: LayerSlab, groups: TokenGroups) -> None:
    if y.dtype not in _NUMPY or not y.is_contiguous():
        delta_matmul_reference(y, x, layer, groups)
        return
    x, size = x.contiguous(), y.numel()
    height, width = layer.shape
    work = _compiled(y.dtype, layer.dtype, *layer.index_dtypes)
    work(
        height,
        width,
        size // height,
        x.data_ptr(),
        y.data_ptr(),
        *groups.addresses,
        *layer.addresses,
        threads=threads_for(size),
    )


@cache
def _compiled(*dtypes: torch.dtype) -> Work:
    return gather(*(_NUMPY[dtype] for dtype in dtypes))


# numpy has no bfloat16: its bits travel as uint16
_NUMPY = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.uint16: np.uint16,
    torch.int32: np.int32,
}
