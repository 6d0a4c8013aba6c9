"""Δ·x for one adapter under training, with gradients at the support only."""

from collections.abc import Callable
from typing import Any

import torch

from spieldose_kernels import cpu
from spieldose_kernels.delta import entry_rows

# support entries multiplied at once where there is no compiled kernel: bounds the extra memory
PIECE = 1 << 16

# called in backward with x [C, T] and dy [R, T]: all a selector needs to know of dW = dy·xᵀ
GradientProbe = Callable[[torch.Tensor, torch.Tensor], None]


def support_product(
    x: torch.Tensor,
    values: torch.Tensor,
    *,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    probe: GradientProbe | None = None,
) -> torch.Tensor:
    """Return Δ·x for x [T, C], as [T, R] in the dtype of `values` (float32 or float64).

    Differentiable in x and in values [Z]; a dense dW is never built. row_starts is [R + 1] int32,
    columns [Z] int32.
    """
    apply: Callable[..., torch.Tensor] = _SupportProduct.apply
    return apply(x, values, row_starts, columns, probe)


def support_product_reference(
    x: torch.Tensor, values: torch.Tensor, *, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Define `support_product` by autograd through a dense Δ."""
    height, width = row_starts.numel() - 1, x.shape[1]
    rows = entry_rows(row_starts)
    dense = torch.zeros(height, width, dtype=values.dtype, device=values.device)
    dense = dense.index_put((rows, columns.long()), values)
    return x.to(values.dtype) @ dense.t()


def sampled_product(
    y: torch.Tensor, x: torch.Tensor, *, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return Σ_t y[row of j, t]·x[column of j, t] for every support entry j, [Z].

    y is [R, T], x is [C, T], of one dtype, contiguous.
    """
    if y.device.type != "cpu":
        rows = entry_rows(row_starts)
        pieces = zip(rows.split(PIECE), columns.long().split(PIECE), strict=True)
        return torch.cat([(y[r] * x[c]).sum(1) for r, c in pieces])
    out = torch.empty(columns.numel(), dtype=y.dtype)
    cpu.sampled_product(y.numpy(), x.numpy(), out.numpy(), row_starts.numpy(), columns.numpy())
    return out


class _SupportProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        row_starts: torch.Tensor,
        columns: torch.Tensor,
        probe: GradientProbe | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values, row_starts, columns)
        ctx.probe = probe
        source = _features_first(x, values.dtype)
        return _multiply(source, values, row_starts, columns).t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, row_starts, columns = ctx.saved_tensors
        dy = _features_first(gradients[0], values.dtype)
        source = _features_first(x, values.dtype)
        if ctx.probe is not None:
            ctx.probe(source, dy)
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = (
                _multiply_transposed(dy, values, row_starts, columns, width=x.shape[1])
                .t()
                .to(x.dtype)
            )
        if ctx.needs_input_grad[1]:
            dvalues = sampled_product(dy, source, row_starts=row_starts, columns=columns)
        return dx, dvalues, None, None, None


def _features_first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.detach().to(dtype).t().contiguous()


def _multiply(
    x: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    height = row_starts.numel() - 1
    if x.device.type != "cpu":
        contributions = x[columns.long()] * values.detach()[:, None]
        out = x.new_zeros(height, x.shape[1])
        return out.index_add_(0, entry_rows(row_starts), contributions)
    out = x.new_empty(height, x.shape[1])
    support = row_starts.numpy(), columns.numpy(), values.detach().numpy()
    cpu.product(x.numpy(), out.numpy(), *support)
    return out


def _multiply_transposed(
    y: torch.Tensor,
    values: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    *,
    width: int,
) -> torch.Tensor:
    if y.device.type != "cpu":
        contributions = y[entry_rows(row_starts)] * values.detach()[:, None]
        return y.new_zeros(width, y.shape[1]).index_add_(0, columns.long(), contributions)
    out = y.new_empty(width, y.shape[1])
    support = row_starts.numpy(), columns.numpy(), values.detach().numpy()
    cpu.transposed_product(y.numpy(), out.numpy(), *support)
    return out
