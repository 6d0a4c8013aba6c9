"""SM3 over a sparse support: one accumulator per row and per column, none per value."""

from collections.abc import Iterable

import torch

from spieldose_kernels.delta import entry_rows
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.updaters.updater import Updater


class SM3(Updater):
    """Update deltas by SM3-II (arXiv 1901.11150) over the active entries of each layer.

    ν = min(row[r], column[c]) + g², the accumulators take the largest ν they cover, and
    δ ← δ − lr·g/√(ν + ε). They keep their own maximum, as in the SpIEL authors' optimiser: a row
    that lost all its entries is remembered. Weight decay is decoupled and pulls the *delta* to 0.
    """

    def __init__(
        self,
        layers: Iterable[TrainableDelta],
        *,
        lr: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._layer_of = {layer.values: layer for layer in layers}
        super().__init__(list(self._layer_of), {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def accumulators(self, values: torch.nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's row and column accumulators, [R] and [C] float32, zeros at first."""
        state: dict[str, torch.Tensor] = self.state[values]
        if not state:
            layer = self._layer_of[values]
            state["row"] = values.new_zeros(layer.row_starts.numel() - 1, dtype=torch.float32)
            state["column"] = values.new_zeros(layer.width, dtype=torch.float32)
        return state["row"], state["column"]

    def move(self) -> None:
        """Make one update of every value that has a gradient."""
        for values, gradient, group in self.gradients():
            self._move(values, gradient, group)

    def _move(
        self, values: torch.nn.Parameter, gradient: torch.Tensor, group: dict[str, float]
    ) -> None:
        layer = self._layer_of[values]
        row, column = self.accumulators(values)
        rows, columns = entry_rows(layer.row_starts), layer.columns.long()
        spread = torch.minimum(row[rows], column[columns]).addcmul_(gradient, gradient)
        row.scatter_reduce_(0, rows, spread, "amax")
        column.scatter_reduce_(0, columns, spread, "amax")
        values.mul_(1 - group["lr"] * group["weight_decay"])
        values.addcdiv_(gradient, spread.add_(group["eps"]).sqrt_(), value=-group["lr"])
