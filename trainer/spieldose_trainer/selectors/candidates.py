"""Gradients of weights that may join the support, accumulated over one selection phase."""

import torch

from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.support_product import gradient_tiles, sampled_product
from spieldose_kernels.top_k import TopK
from spieldose_trainer.ranks import mean_over_ranks

CPU = torch.device("cpu")


class Norms:
    """Hold the norms of a layer's inputs and output gradients, whose products are its gradient."""

    def __init__(self, shape: tuple[int, int], *, device: torch.device) -> None:
        sides = zip(("rows", "columns"), shape, strict=True)
        # float64: float32 squares vanish below 1e-23, as of a row behind a closed gate
        self.squares = {
            name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sides
        }

    def add(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take in one backward pass, x [C, T] and dy [R, T]; under data parallelism all ranks'."""
        reached = dy.any(0)  # [T]: no padding, of which a batch may hold any amount
        for name, side in (("rows", dy), ("columns", x[:, reached])):
            norms = torch.linalg.vector_norm(side, dim=1, dtype=torch.float64)
            self.squares[name] += mean_over_ranks(norms.square())

    def divide_rows(self, gradients: torch.Tensor, *, first: int) -> None:
        """Divide the gradients of some rows by both norms in place, flat [n·C] float32."""
        rows, columns = self._norm("rows"), self._norm("columns")
        tile = gradients.view(-1, columns.numel())
        tile /= rows[first : first + tile.shape[0], None]  # a product of both might underflow
        tile /= columns

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norms of row and column at flat positions, each [n] float32."""
        rows, columns = self._norm("rows"), self._norm("columns")
        return rows[positions // columns.numel()], columns[positions % columns.numel()]

    def _norm(self, name: str) -> torch.Tensor:
        norm = self.squares[name].sqrt().float()
        return norm.clamp(min=torch.finfo(torch.float32).tiny)  # of nothing: 0 / tiny is 0


class Candidates:
    """Accumulate one layer's gradient at its most promising positions.

    The positions are the largest |dW| of the phase's whole first update, found tile by tile: a
    dense dW never exists. With several forward passes per update, running sums are kept at `room`
    positions until its end. A layer of at most as many weights is exact; in a larger one a position
    is missed that is not among those after some pass, and of one that joins them late the update
    does not count, as it lacks the passes before: unless it is the phase's only one. Sums are
    float32. Under data parallelism every rank sees the mean gradient, hence the same positions.

    If `normalised`, |dW| is measured against the norms of its row's output gradients and of its
    column's inputs in that update: that is, by how far the two are correlated.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        count: int,
        room: int | None = None,
        normalised: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.shape = shape
        self.count = min(count, shape[0] * shape[1])
        self.room = room or self.count
        self.samples = 0  # updates taken in
        # [M] flat row-major, ascending
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self._support: SparseDelta | None = None  # the same positions in rows, for sampling
        self._update = torch.empty(0, device=device)  # [M] gradient of the running update
        self._late = torch.empty(0, dtype=torch.bool, device=device)  # [M] joined after a pass
        self.total = torch.empty(0, device=device)  # [M] Σ g
        self.total_square = torch.empty(0, device=device)  # [M] Σ g²
        self._norms = Norms(shape, device=device) if normalised else None

    @torch.no_grad()
    def observe(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take in one backward pass, x [C, T] and dy [R, T]."""
        if self.samples == 0:
            self._choose(x, dy)
        else:
            assert self._support is not None
            self._update += sampled_product(
                dy.contiguous(),
                x.contiguous(),
                row_starts=self._support.row_starts,
                columns=self._support.columns.int(),
            ).float()

    def scale_update(self, factor: float) -> None:
        """Scale the gradient gathered since the last sample."""
        self._update *= factor

    @torch.no_grad()
    def finish_update(self) -> None:
        """Count the gradient gathered since the last call as one sample, if there was any."""
        if self.samples == 0 and not self.positions.numel():
            return  # this part of the model did not run: the next update may open the phase
        if self.samples == 0:
            largest = TopK(self.count)
            largest.show(self._relative(self._update), first=0)
            chosen, _ = largest.largest()
            self.positions, self._update = self.positions[chosen], self._update[chosen]
            self._late = self._late[chosen]
            self.total = torch.zeros_like(self._update)
            self.total_square = torch.zeros_like(self._update)
            self._support = SparseDelta.from_flat(self.positions, self._update, shape=self.shape)
        else:
            mean_over_ranks(self._update)
            if self.samples == 1:
                self.total[self._late] = self.total_square[self._late] = 0.0
        self.total += self._update
        self.total_square += self._update.square()
        self._update.zero_()
        self.samples += 1

    def counts(self) -> torch.Tensor:
        """Return of how many updates each position's sums are, [M] float32."""
        late = self._late if self.samples > 1 else torch.zeros_like(self._late)
        return self.samples - late.float()

    def scores(self) -> torch.Tensor:
        """Return what the positions are compared by, [M]."""
        return self._relative(self.total * (self.samples / self.counts()))

    def _relative(self, gradients: torch.Tensor) -> torch.Tensor:
        if self._norms is None:
            return gradients
        rows, columns = self._norms.at(self.positions)
        return gradients / rows / columns

    def _choose(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        if self._norms is not None:
            self._norms.add(x, dy)
        largest = TopK(self.room)
        for row, tile in gradient_tiles(dy, x):
            gradient, first = mean_over_ranks(tile.float()).flatten(), row * self.shape[1]
            if self.positions.numel():
                ends = self.positions.new_tensor([first, first + gradient.numel()])
                inside = slice(*torch.searchsorted(self.positions, ends).tolist())
                gradient[self.positions[inside] - first] += self._update[inside]
            if self._norms is not None:
                self._norms.divide_rows(gradient, first=row)
            largest.show(gradient, first=first)
        before = self.positions
        self.positions, self._update = largest.largest()
        known = torch.isin(self.positions, before[~self._late])
        self._late = ~known if before.numel() else torch.zeros_like(known)
        if self._norms is not None:
            for norms in self._norms.at(self.positions):
                self._update *= norms

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs, between two updates."""
        return {
            "positions": self.positions,
            "total": self.total,
            "total_square": self.total_square,
            "late": self._late,
            "samples": torch.tensor(self.samples),
        } | ({} if self._norms is None else self._norms.squares)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        self.positions, self.total = state["positions"], state["total"]
        self.total_square, self._late = state["total_square"], state["late"]
        self.samples = int(state["samples"])
        if self._norms is not None:
            self._norms.squares = {name: state[name] for name in self._norms.squares}
        self._update = torch.zeros_like(self.total)
        self._support = SparseDelta.from_flat(self.positions, self._update, shape=self.shape)
