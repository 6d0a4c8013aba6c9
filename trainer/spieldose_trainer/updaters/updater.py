"""What every updater answers to beyond PyTorch's optimisers."""

import torch


class Updater(torch.optim.Optimizer):
    """Move the values of supports whose entries may be exchanged between two steps."""

    def moments(self, values: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Return what travels with each entry, each [Z]; by itself, nothing."""
        return {}

    def seed(
        self,
        values: torch.nn.Parameter,
        where: torch.Tensor,
        *,
        mean: torch.Tensor,
        mean_square: torch.Tensor,
        age: int,
    ) -> None:
        """Start the entries at the mask `where` as if they had seen `age` gradients of these means.

        By itself, does nothing: there is no state per entry to start.
        """
