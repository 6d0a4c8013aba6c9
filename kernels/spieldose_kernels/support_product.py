"""Δ·x for one adapter under training, with gradients at the support only."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from spieldose_kernels.cpu import support, training
from spieldose_kernels.delta import entry_rows

TILE = 1 << 20  # weights of a dense gradient that exist at once: 4 MB in float32

# called in backward with x [C, T] and dy [R, T], contiguous or not, in the dtype of the values: all
# a selector needs to know of dW = dy·xᵀ
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


def add_support_product(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    *,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    probe: GradientProbe | None = None,
) -> torch.Tensor:
    """Return y + Δ·x for y [..., R] and x [..., C], summed in float32, rounded to y's dtype once.

    Differentiable in all three; values [Z] are float32.
    """
    if in_blocks(y, x, values):
        apply: Callable[..., torch.Tensor] = _AddSupportProduct.apply
        return apply(y, x, values, row_starts, columns, probe)
    flat = x.reshape(-1, x.shape[-1])
    delta = support_product(flat, values, row_starts=row_starts, columns=columns, probe=probe)
    return (y + delta.reshape(y.shape)).to(y.dtype)  # promotes to float32 first


def support_product_reference(
    x: torch.Tensor, values: torch.Tensor, *, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Define `support_product` by autograd through a dense Δ."""
    height, width = row_starts.numel() - 1, x.shape[1]
    rows = entry_rows(row_starts)
    dense = torch.zeros(height, width, dtype=values.dtype, device=values.device)
    dense = dense.index_put((rows, columns.long()), values)
    return x.to(values.dtype) @ dense.t()


def gradient_tiles(y: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield dW = y·xᵀ, [R, C] from [R, T] and [C, T], in tiles of whole rows, with the first row.

    A tile has at most TILE weights, or one row: what a step needs of a dense gradient is bounded by
    it, not by the largest layer.
    """
    height = max(1, TILE // x.shape[0])
    for first in range(0, y.shape[0], height):
        yield first, y[first : first + height] @ x.t()


@torch.library.custom_op("spieldose::product", mutates_args=())
def product(
    x: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return Δ·x, [R, T] from [C, T], in x's dtype; values [Z] of the same."""
    if x.is_cuda:
        from spieldose_kernels.gpu import sampled

        return sampled.product(x, values, row_starts=row_starts, columns=columns)
    out = x.new_empty(row_starts.numel() - 1, x.shape[1])
    support.product(*(t.numpy() for t in (x, out, row_starts, columns, values)))
    return out


@product.register_fake
def _(
    x: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(row_starts.numel() - 1, x.shape[1])


@torch.library.custom_op("spieldose::transposed_product", mutates_args=())
def transposed_product(
    y: torch.Tensor,
    values: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Return Δᵀ·y, [C, T] from [R, T], in y's dtype; values [Z] of the same."""
    if y.is_cuda:
        from spieldose_kernels.gpu import sampled

        starts, rows, places = sampled.transpose_support(row_starts, columns, width=width)
        return sampled.product(y, values[places], row_starts=starts, columns=rows)
    out = y.new_empty(width, y.shape[1])
    support.transposed_product(*(t.numpy() for t in (y, out, row_starts, columns, values)))
    return out


@transposed_product.register_fake
def _(
    y: torch.Tensor,
    values: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    width: int,
) -> torch.Tensor:
    return y.new_empty(width, y.shape[1])


@torch.library.custom_op("spieldose::sampled_product", mutates_args=())
def sampled_product(
    y: torch.Tensor, x: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return Σ_t y[row of j, t]·x[column of j, t] for every support entry j, [Z].

    y is [R, T], x is [C, T], of one dtype, contiguous.
    """
    if y.is_cuda:
        from spieldose_kernels.gpu import sampled

        return sampled.sampled_product(y, x, row_starts=row_starts, columns=columns)
    out = y.new_empty(columns.numel())
    support.sampled_product(*(t.numpy() for t in (y, x, out, row_starts, columns)))
    return out


@sampled_product.register_fake
def _(
    y: torch.Tensor, x: torch.Tensor, row_starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    return y.new_empty(columns.numel())


def in_blocks(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> bool:
    """Say whether the CPU's own training products take these tensors."""
    dtypes = x.dtype in training.NUMPY and y.dtype in training.NUMPY
    real = not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)
    return x.is_cpu and dtypes and values.dtype == torch.float32 and real


class _AddSupportProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        values: torch.Tensor,
        row_starts: torch.Tensor,
        columns: torch.Tensor,
        probe: GradientProbe | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values, row_starts, columns)
        ctx.probe = probe
        out = y.clone(memory_format=torch.contiguous_format)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        training.add_product(
            out.view(-1, out.shape[-1]), flat, values, row_starts=row_starts, columns=columns
        )
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, row_starts, columns = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        dy = upstream[0].reshape(-1, upstream[0].shape[-1]).contiguous()
        if ctx.probe is not None:
            ctx.probe(flat.to(values.dtype).t(), dy.to(values.dtype).t())
        dx, dvalues = training.gradients(flat, dy, values, row_starts=row_starts, columns=columns)
        return upstream[0], dx.view(x.shape), dvalues, None, None, None


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
        source = features_first(x, values.dtype)
        out: torch.Tensor = product(source, values.detach(), row_starts, columns)
        return out.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, row_starts, columns = ctx.saved_tensors
        dy = features_first(gradients[0], values.dtype)
        source = features_first(x, values.dtype)
        if ctx.probe is not None:
            ctx.probe(source, dy)
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = transposed_product(dy, values.detach(), row_starts, columns, x.shape[1])
            dx = dx.t().to(x.dtype)
        if ctx.needs_input_grad[1]:
            dvalues = sampled_product(dy, source, row_starts, columns)
        return dx, dvalues, None, None, None


def features_first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x [T, C] as [C, T] of this dtype, without its history."""
    return x.detach().to(dtype).t().contiguous()
