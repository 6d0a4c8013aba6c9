"""Δ·x for a delta that stays as it is: no gradient of its values, hence no x kept for one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from spieldose_kernels.cpu import training
from spieldose_kernels.support_product import features_first, in_blocks, product


class Entries(NamedTuple):
    """Hold a delta's entries in rows."""

    row_starts: torch.Tensor  # [R + 1] int32
    columns: torch.Tensor  # [Z] int32
    values: torch.Tensor  # [Z] float32


def add_frozen_product(
    y: torch.Tensor, x: torch.Tensor, entries: Entries, transposed: Entries
) -> torch.Tensor:
    """Return y + Δ·x for y [..., R] and x [..., C], summed in float32, rounded to y's dtype once.

    Differentiable in both; backward needs Δᵀ's entries and nothing of forward's.
    """
    apply: Callable[..., torch.Tensor] = _AddFrozenProduct.apply
    return apply(y, x, entries, transposed)


class _AddFrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, entries: Entries, transposed: Entries
    ) -> torch.Tensor:
        ctx.transposed, ctx.dtype = transposed, x.dtype
        return _added(y, x, entries)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy, dx = upstream[0], None
        if ctx.needs_input_grad[1]:
            width = ctx.transposed.row_starts.numel() - 1
            zeros = dy.new_zeros(*dy.shape[:-1], width, dtype=ctx.dtype)
            dx = _added(zeros, dy, ctx.transposed)
        return dy, dx, None, None


def _added(y: torch.Tensor, x: torch.Tensor, entries: Entries) -> torch.Tensor:
    row_starts, columns, values = entries
    flat = x.reshape(-1, x.shape[-1])
    if in_blocks(y, x, values):
        out = y.clone(memory_format=torch.contiguous_format)
        training.add_product(
            out.view(-1, out.shape[-1]),
            flat.contiguous(),
            values,
            row_starts=row_starts,
            columns=columns,
        )
        return out
    delta: torch.Tensor = product(features_first(flat, values.dtype), values, row_starts, columns)
    return (y + delta.t().reshape(y.shape)).to(y.dtype)  # promotes to float32 first
