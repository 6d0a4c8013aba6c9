"""SGC: which weights are in the support when an update may move any of them."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.selectors.selector import Selector
from spieldose_trainer.support import LAST_BIRTH, flat_positions
from spieldose_trainer.updaters.compressed_adam import CompressedAdam


class LargestDeltas(Selector):
    """Keep the N largest |delta| of every layer, N being the size of its first support.

    A frozen 4-bit base has no room for a step outside the support. So each update's changes are
    added to the deltas, a weight without one starting from zero, and the smallest are evicted, that
    is forgotten.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        *,
        updater: CompressedAdam,
    ) -> None:
        self.layers = layers
        self.updater = updater
        self.lost = 0.0  # ‖evicted‖ / ‖deltas before eviction‖ of the latest update, all layers
        # the same with all that was evicted so far: each counts for itself, also if it comes back
        self.lost_over_run = 0.0
        self._evicted = 0.0  # Σ ‖evicted‖² over the run

    def begin_update(self, update: int) -> None:
        """Let the updater watch the backward passes of this update."""
        for name, layer in self.layers.items():
            layer.probe = self.updater.watch(name)

    @torch.no_grad()
    def end_update(self, update: int) -> int:
        """Take in what the updater's step changed; return how many positions were replaced."""
        replaced, evicted, kept = 0, sum(self.updater.omitted.values()), 0.0
        for name, layer in self.layers.items():
            layer.probe = None
            if name in self.updater.changes:
                fresh, gone = add_changes(layer, *self.updater.changes[name], number=update)
                replaced += fresh
                evicted += gone
            kept += layer.values.double().square().sum().item()
        self.lost = _share(evicted, kept)
        self._evicted += evicted
        self.lost_over_run = _share(self._evicted, kept)
        return replaced

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, between two updates."""
        return {"evicted": self._evicted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._evicted = state["evicted"]


@torch.no_grad()
def add_changes(
    layer: TrainableDelta,
    positions: torch.Tensor,
    change: torch.Tensor,
    *,
    number: int,
) -> tuple[int, float]:
    """Add changes [n] at flat ascending positions to a layer's deltas, in place; keep the largest.

    Newcomers are marked as born in change `number` of the support. Returns how many positions are
    new in it, and the squared norm of what was evicted.
    """
    active = flat_positions(layer)
    where = torch.searchsorted(active, positions).clamp_(max=active.numel() - 1)
    held = active[where] == positions
    values = layer.values.float()
    values[where[held]] += change[held]
    competing = torch.cat([values, change[~held]])
    everywhere = torch.cat([active, positions[~held]])
    born = torch.full_like(everywhere, min(number, LAST_BIRTH), dtype=layer.born.dtype)
    born[: active.numel()] = layer.born
    stay = torch.zeros_like(competing, dtype=torch.bool)
    stay[competing.abs().topk(active.numel()).indices] = True
    order = everywhere[stay].argsort()
    support = SparseDelta.from_flat(everywhere[stay], competing[stay], shape=layer.shape)
    layer.row_starts.copy_(support.row_starts)
    layer.columns.copy_(support.columns)
    layer.values.copy_(support.values)
    layer.born.copy_(born[stay][order])
    fresh = int(stay[active.numel() :].sum())
    return fresh, float(competing[~stay].double().square().sum())


def _share(evicted: float, kept: float) -> float:
    return math.sqrt(evicted / (evicted + kept)) if evicted else 0.0
