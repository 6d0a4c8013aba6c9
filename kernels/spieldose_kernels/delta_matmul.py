"""Δ[slot]·x for a batch of tokens that play different adapters."""

from dataclasses import dataclass
from functools import cached_property

import torch

from spieldose_kernels import cpu
from spieldose_kernels.slab import LayerSlab


@dataclass(frozen=True)
class TokenGroups:
    """Say which tokens of a forward pass play which slot; made once per step, not per layer."""

    order: torch.Tensor  # [T'] int64, the tokens that play an adapter, grouped by slot
    starts: torch.Tensor  # [G + 1] int32, group g is order[starts[g]:starts[g + 1]]
    slots: torch.Tensor  # [G] int32

    @classmethod
    def of(cls, slots: torch.Tensor) -> "TokenGroups | None":
        """Group tokens by slot, [T] int32 with negative for the base; None if all play the base."""
        order = torch.argsort(slots, stable=True)
        order = order[int((slots < 0).sum()) :]
        if not order.numel():
            return None
        active, counts = torch.unique_consecutive(slots[order], return_counts=True)
        starts = torch.zeros(active.numel() + 1, dtype=torch.int32, device=slots.device)
        starts[1:] = counts.cumsum(0)
        return cls(order, starts, active.int())

    @cached_property
    def host(self) -> tuple[cpu.Array, cpu.Array, cpu.Array]:
        """Return order, starts and slots as numpy arrays; for tensors on the CPU."""
        return self.order.numpy(), self.starts.numpy(), self.slots.numpy()


def delta_matmul(y: torch.Tensor, x: torch.Tensor, layer: LayerSlab, groups: TokenGroups) -> None:
    """Add Δ[slot of t]·x[t] to y[t] in place, for the tokens of `groups`; the others are untouched.

    x is [T, C], y [T, R], both float32 or both bfloat16. Sums are float32, rounded to y once.
    """
    compiled = y.device.type == "cpu" and y.dtype in _BITS and y.is_contiguous()
    if not compiled:
        delta_matmul_reference(y, x, layer, groups)
        return
    bits = _BITS[y.dtype]
    cpu.gather_add(
        x.contiguous().view(bits).numpy(),
        y.view(bits).numpy(),
        arena=layer.host_arena,
        table=layer.host_table,
        order=groups.host[0],
        starts=groups.host[1],
        slots=groups.host[2],
    )


def delta_matmul_reference(
    y: torch.Tensor, x: torch.Tensor, layer: LayerSlab, groups: TokenGroups
) -> None:
    """Define `delta_matmul`, in any floating dtype; float64 sums in float64."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    starts = groups.starts.tolist()
    for slot, first, last in zip(groups.slots.tolist(), starts, starts[1:], strict=False):
        delta = layer.delta(slot)
        if delta is not None:
            tokens = groups.order[first:last]
            taken = x[tokens][:, delta.columns.long()].to(dtype) * delta.values.to(dtype)
            y[tokens] = y[tokens].to(dtype).index_add_(1, delta.rows(), taken).to(y.dtype)


# numpy has no bfloat16: its bits travel as uint16
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
