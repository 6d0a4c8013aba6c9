"""The largest entries of a vector too long to be held."""

import numpy as np
import torch


class TopK:
    """Keep the `count` largest |values| of a vector that is shown block by block.

    Holds at most 2·count entries beside the block. Of equal ones the first shown win; what is not
    a number is never among the largest.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._least = -1.0  # what cannot be among the largest is not even kept for comparison
        self._positions: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._held = 0

    def show(self, values: torch.Tensor, *, first: int) -> None:
        """Take in the entries from position `first` on, [n]."""
        magnitudes = values.abs().nan_to_num_(-1.0, float("inf"))
        chosen = magnitudes > self._least
        if int(chosen.sum()) > self._count:
            chosen = _largest(magnitudes, self._count)
        positions = chosen.nonzero().flatten()
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
            magnitudes = values.abs()
            kept = _largest(magnitudes, self._count)
            positions, values = positions[kept], values[kept]
            self._least = float(magnitudes[kept].min()) if self._count else float("inf")
        self._positions, self._values, self._held = [positions], [values], values.numel()


def _largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the `count` largest of more numbers; of equal ones the first."""
    if not count:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    if magnitudes.is_cuda:
        least = magnitudes.topk(count).values[-1]
    else:  # NumPy compares many numbers at a time, PyTorch's topk one after the other
        least = torch.from_numpy(np.partition(magnitudes.numpy(), -count)[-count, None])
    mask = magnitudes > least
    equal = (magnitudes == least).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask
