"""Zeroth-order SGD: two forward passes say how far to go along one random direction."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.ranks import mean_over_ranks
from spieldose_trainer.updaters.updater import Updater


class ZerothOrder(Updater):
    """Move along z ~ N(0, I) by the loss's slope there, (L(δ + εz) − L(δ − εz)) / 2ε.

    SPSA as in MeZO (arXiv 2305.17333), on the support alone (arXiv 2406.02913). z is made anew from
    the seed whenever it is needed; perturbed values exist while their layer computes. There is
    neither gradient nor state: a step needs no more memory than inference.
    """

    def __init__(
        self,
        layers: Iterable[TrainableDelta],
        *,
        lr: float,
        epsilon: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._layers = list(layers)
        self._seed = seed
        self._slope = 0.0  # summed over the forward passes of the running update
        values = [layer.values for layer in self._layers]
        super().__init__(
            values, {"lr": lr, "epsilon": epsilon, "weight_decay": weight_decay, "updates": 0}
        )

    @contextmanager
    def perturbed(self, sign: int) -> Iterator[None]:
        """Let the layers compute with δ + sign·ε·z while the block runs."""
        scale = sign * self.param_groups[0]["epsilon"]
        for index, layer in enumerate(self._layers):
            layer.shift = partial(self._scaled, index, scale)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.shift = None

    def observe(self, plus: float, minus: float) -> None:
        """Take in one batch's share of the losses at δ + εz and δ − εz."""
        self._slope += (plus - minus) / (2 * self.param_groups[0]["epsilon"])

    def move(self) -> None:
        """Make one update of all values by the losses observed; forgets these."""
        group = self.param_groups[0]
        slope = float(mean_over_ranks(torch.tensor(self._slope, dtype=torch.float64)))
        for index, layer in enumerate(self._layers):
            layer.values.mul_(1 - group["lr"] * group["weight_decay"])
            layer.values.add_(self.direction(index), alpha=-group["lr"] * slope)
        group["updates"] += 1
        self._slope = 0.0

    def direction(self, index: int) -> torch.Tensor:
        """Return the running update's z for one layer, [Z] float32."""
        values = self._layers[index].values
        generator = torch.Generator(values.device)
        # a stream per run, update and layer: the order of calls does not matter. On the CPU PyTorch
        # reads 32 bits of a seed, so that two of some 65,000 streams may be one
        stream = np.random.SeedSequence([self._seed, self.param_groups[0]["updates"], index])
        generator.manual_seed(int(stream.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return torch.randn(values.numel(), generator=generator, device=values.device)

    def _scaled(self, index: int, scale: float) -> torch.Tensor:
        return scale * self.direction(index)
