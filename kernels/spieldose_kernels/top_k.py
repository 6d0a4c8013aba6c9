"""The largest entries of a vector too long to be held."""

import torch


class TopK:
    """Keep the `count` largest |values| of a vector that is shown block by block.

    Holds at most 2·count entries beside the block.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._least = -1.0  # what cannot be among the largest is not even kept for comparison
        self._positions: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._held = 0

    def show(self, values: torch.Tensor, *, first: int) -> None:
        """Take in the entries from position `first` on, [n]."""
        positions = (values.abs() > self._least).nonzero().flatten()
        self._positions.append(positions + first)
        self._values.append(values[positions])
        self._held += positions.numel()
        if self._held > 2 * self._count:
            self._drop()

    def largest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions, ascending int64, and values of the largest entries."""
        self._drop()
        positions, order = self._positions[0].sort()
        return positions, self._values[0][order]

    def _drop(self) -> None:
        positions, values = torch.cat(self._positions), torch.cat(self._values)
        if values.numel() > self._count:
            kept = values.abs().topk(self._count)
            self._least = kept.values[-1].item() if self._count else float("inf")
            positions, values = positions[kept.indices], values[kept.indices]
        self._positions, self._values, self._held = [positions], [values], values.numel()
