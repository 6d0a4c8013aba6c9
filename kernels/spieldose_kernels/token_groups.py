"""Which tokens of a forward pass play which slot; made once per step, not per layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import torch

# Tokens of one slot from which its delta is written out densely and multiplied as such (scatter)
# instead of entry by entry (gather), by device type; where none is named, gather wins throughout.
# CPU: `make bench-cpu` prints by how much. CUDA: not measured yet; `make bench-gpu` prints it.
SCATTER_FROM: Final[Mapping[str, int]] = {}

SKIPPED: Final = -1  # a group that gather leaves to scatter; kernels skip negative slots


@dataclass(frozen=True)
class TokenGroups:
    """Hold a forward pass's tokens grouped by slot; tokens that play the base are in no group."""

    order: torch.Tensor  # [T'] int32, the tokens of all groups, one group after the other
    starts: torch.Tensor  # [G + 1] int32, group g is order[starts[g]:starts[g + 1]]
    slots: torch.Tensor  # [G] int32
    long: tuple[tuple[int, torch.Tensor], ...] = ()  # slot and tokens of groups left to scatter

    @classmethod
    def of(
        cls, slots: Sequence[int | None], lengths: Sequence[int], device: torch.device
    ) -> "TokenGroups | None":
        """Group a batch's tokens: request i plays slots[i] in lengths[i] tokens.

        Slot None is the base; returns None if all play it.
        """
        played = np.array([-1 if slot is None else slot for slot in slots], np.int32)
        tokens = np.repeat(played, lengths)
        order = np.argsort(tokens, kind="stable").astype(np.int32)
        order = order[np.count_nonzero(tokens < 0) :]
        if not order.size:
            return None
        active, counts = np.unique(tokens[order], return_counts=True)
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        is_long = counts >= SCATTER_FROM.get(device.type, tokens.size + 1)
        long = tuple(
            (int(active[g]), torch.from_numpy(order[starts[g] : starts[g + 1]]).to(device))
            for g in np.flatnonzero(is_long)
        )
        left = np.where(is_long, np.int32(SKIPPED), active)
        arrays = [torch.from_numpy(array).to(device) for array in (order, starts, left)]
        return cls(arrays[0], arrays[1], arrays[2], long)

    @cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Return the number of groups and where the arrays lie, for compiled code on the CPU."""
        arrays = self.order.data_ptr(), self.starts.data_ptr(), self.slots.data_ptr()
        return self.slots.numel(), *arrays
