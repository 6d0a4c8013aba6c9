"""AdamW in which every value has its own age."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from spieldose_trainer.updaters.updater import Updater


class SparseAdamW(Updater):
    """Update deltas with Adam, bias-corrected by each value's own number of gradients seen.

    A value grown in the middle of a run starts young (`seed`), so its first steps are as well
    calibrated as those of the first support. Weight decay is decoupled and pulls the *delta* to 0.
    After the SpIEL authors' optimiser (PAPERS: arXiv 2401.16405); moments and ages are float32
    whatever the gradient's dtype.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def moments(self, values: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Return a parameter's exp_avg, exp_avg_sq and age, [Z] float32, created as zeros."""
        state: dict[str, torch.Tensor] = self.state[values]
        if not state:
            for name in ("exp_avg", "exp_avg_sq", "age"):
                state[name] = torch.zeros_like(values, dtype=torch.float32)
        return state

    def seed(
        self,
        values: torch.nn.Parameter,
        where: torch.Tensor,
        *,
        mean: torch.Tensor,
        mean_square: torch.Tensor,
        age: torch.Tensor | float,
    ) -> None:
        """Start the values at `where` as if they had seen `age` gradients of these means.

        The moments are biased exactly as bias correction at that age will undo.
        """
        beta1, beta2 = self.param_groups[0]["betas"]
        state = self.moments(values)
        state["exp_avg"][where] = mean * _correction(beta1, age)
        state["exp_avg_sq"][where] = mean_square * _correction(beta2, age)
        state["age"][where] = age

    def move(self) -> None:
        """Make one update of every value that has a gradient."""
        for values, gradient, group in self.gradients():
            _adamw(values, gradient, self.moments(values), group)


def _adamw(
    values: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
) -> None:
    beta1, beta2 = group["betas"]
    age = state["age"].add_(1)
    first = state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
    mean = first / _correction(beta1, age)
    spread = (second / _correction(beta2, age)).sqrt_().add_(group["eps"])
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.addcdiv_(mean, spread, value=-group["lr"])


def _correction(beta: float, age: torch.Tensor | float) -> torch.Tensor:
    """Return 1 - beta^age; as a plain difference it would lose 2e-5 of itself in float32."""
    age = torch.as_tensor(age, dtype=torch.float32)
    return -torch.expm1(age * math.log(beta)) if beta else torch.ones_like(age)
