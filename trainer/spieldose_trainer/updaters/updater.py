"""What every updater answers to beyond PyTorch's optimisers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch


class Updater(torch.optim.Optimizer, ABC):
    """Move the values of supports whose entries may be exchanged between two steps."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one update; returns the loss of `closure` if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` taken between two updates."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for values, number in zip(group["params"], saved["params"], strict=True):
                for key, entry in state_dict["state"].get(number, {}).items():
                    if isinstance(entry, torch.Tensor):  # PyTorch has given it the values' dtype
                        self.state[values][key] = entry.to(values.device, copy=True)

    @abstractmethod
    def move(self) -> None:
        """Make one update."""

    def gradients(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, dict[str, Any]]]:
        """Yield every parameter that has a gradient, that in float32, and the settings for it."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    yield values, values.grad.float(), group

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
        age: torch.Tensor | float,
    ) -> None:
        """Start the entries at the mask `where` as if they had seen `age` gradients of these means.

        By itself, does nothing: there is no state per entry to start.
        """
