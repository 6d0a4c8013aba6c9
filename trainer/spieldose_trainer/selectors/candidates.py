"""Gradients of weights that may join the support, accumulated over one selection phase."""

import torch

from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.support_product import gradient_tiles, sampled_product
from spieldose_kernels.top_k import TopK
from spieldose_trainer.ranks import mean_over_ranks


class Candidates:
    """Accumulate one layer's gradient at its most promising positions.

    The positions are the largest |dW| of the phase's whole first update, found tile by tile: a
    dense dW never exists. With several forward passes per update, running sums are kept at `spare`
    times as many positions until its end: a position is missed only if it is not even among those
    after some pass. Sums are float32. Under data parallelism every rank sees the mean gradient,
    hence the same positions.
    """

    def __init__(self, shape: tuple[int, int], *, count: int, spare: int = 1) -> None:
        self.shape = shape
        self.spare = spare
        self.count = min(count, shape[0] * shape[1])
        self.samples = 0  # updates accumulated
        self.positions = torch.empty(0, dtype=torch.int64)  # [M] flat row-major, ascending
        self._support: SparseDelta | None = None  # the same positions in rows, for sampling
        self._update = torch.empty(0)  # [M] gradient of the running update
        self.total = torch.empty(0)  # [M] Σ g
        self.total_square = torch.empty(0)  # [M] Σ g²

    @torch.no_grad()
    def observe(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take in one backward pass, x [C, T] and dy [R, T]."""
        if self.samples == 0:
            self._choose(x, dy)
        else:
            assert self._support is not None
            self._update += sampled_product(
                dy, x, row_starts=self._support.row_starts, columns=self._support.columns.int()
            ).float()

    @torch.no_grad()
    def finish_update(self) -> None:
        """Count the gradient gathered since the last call as one sample."""
        if self.samples == 0:
            largest = TopK(self.count)
            largest.show(self._update, first=0)
            chosen, self._update = largest.largest()
            self.positions = self.positions[chosen]
            self.total = torch.zeros_like(self._update)
            self.total_square = torch.zeros_like(self._update)
            self._support = SparseDelta.from_flat(self.positions, self._update, shape=self.shape)
        else:
            mean_over_ranks(self._update)
        self.total += self._update
        self.total_square += self._update.square()
        self._update.zero_()
        self.samples += 1

    def _choose(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        largest = TopK(self.spare * self.count)
        for row, tile in gradient_tiles(dy, x):
            gradient, first = mean_over_ranks(tile.float()).flatten(), row * self.shape[1]
            if self.positions.numel():
                ends = self.positions.new_tensor([first, first + gradient.numel()])
                inside = slice(*torch.searchsorted(self.positions, ends).tolist())
                gradient[self.positions[inside] - first] += self._update[inside]
            largest.show(gradient, first=first)
        self.positions, self._update = largest.largest()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs, between two updates."""
        return {
            "positions": self.positions,
            "total": self.total,
            "total_square": self.total_square,
            "samples": torch.tensor(self.samples),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        self.positions, self.total = state["positions"], state["total"]
        self.total_square = state["total_square"]
        self.samples = int(state["samples"])
        self._update = torch.zeros_like(self.total)
        self._support = SparseDelta.from_flat(self.positions, self._update, shape=self.shape)
