"""How weights move when Adam's moments are kept compressed (SGC)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_kernels.support_product import GradientProbe
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.updaters.chunked_gradient import ChunkedGradient
from spieldose_trainer.updaters.compression import Compression
from spieldose_trainer.updaters.lifted_step import entries_that_matter
from spieldose_trainer.updaters.low_rank import LowRank
from spieldose_trainer.updaters.recovery import recover_step
from spieldose_trainer.updaters.sketch import Sketch
from spieldose_trainer.updaters.updater import Updater

Entries = tuple[torch.Tensor, torch.Tensor]  # flat row-major positions [n] int64, numbers [n]


class CompressedAdam(Updater):
    """Keep Adam's moments of each chunk of d weights in 2k numbers, whatever d is.

    Our reading of Sparse Gradient Compression (arXiv 2502.00311; its formulae were not found): with
    g̃ the s largest entries of a chunk's gradient, p and q are the moments of A·g̃ and A·(g̃∘g̃), and
    the step is recovered from them at s positions. MESGC compresses the gradient itself; with a
    rank, CESGC compresses its projection to that rank, and starts the moments anew with each.

    `watch` sees a layer's backward passes. A step leaves in `changes` how the layer's weights are
    to move, wherever they are: a selector decides which of them the support has room for. Of the
    values themselves it only decays (decoupled). Clipping never sees the gradients; Adam's step
    does not depend on their scale.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        *,
        lr: float,
        compression: Compression,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= betas[0] ** 2 < betas[1] < 1:
            raise ConfigError(f"expected betas with beta1² < beta2 < 1, got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings = {"compression": dataclasses.asdict(compression)}  # a state belongs to them
        super().__init__([layer.values for layer in layers.values()], defaults | settings)
        self.layers = layers
        self.compression = compression
        chunk, device = compression.chunk, self.param_groups[0]["params"][0].device
        self.sketch = Sketch(chunk, compression.width, seed=compression.seed, device=device)
        self._gradients = {
            name: ChunkedGradient(
                compression.size(layer.shape), chunk=chunk, count=compression.kept, device=device
            )
            for name, layer in layers.items()
        }
        self.changes: dict[str, Entries] = {}  # of the latest step; positions ascending
        self.omitted: dict[str, float] = {}  # squared norm of what `changes` leaves out

    def watch(self, name: str) -> GradientProbe:
        """Return the probe that shows a layer's backward passes to this updater."""
        if self.compression.rank is None:
            return self._gradients[name].observe
        return partial(self._observe_projected, name)

    def move(self) -> None:
        """Advance the moments of every layer that was watched and say how its weights move."""
        group = self.param_groups[0]
        self.changes, self.omitted = {}, {}
        for name, layer in self.layers.items():
            largest = self._gradients[name].take()
            if largest is not None:
                layer.values.mul_(1 - group["lr"] * group["weight_decay"])
                self._spread(name, *self._advance(name, *largest))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` taken between two updates.

        Raises ConfigError if that state was compressed otherwise.
        """
        expected = dataclasses.asdict(self.compression)
        found = state_dict["param_groups"][0].get("compression")
        if found != expected:
            raise ConfigError(f"expected an optimizer state compressed by {expected}, got {found}")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def _observe_projected(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Take in a backward pass; a new space is that of an update's first."""
        state, gradient = self._state(name), self._gradients[name]
        x, dy = x.float(), dy.float()  # there is no decomposition of bfloat16
        if gradient.empty and state.get("updates", 0) % self.compression.refresh == 0:
            assert self.compression.rank is not None
            state.clear()  # moments of the old space mean nothing in the new one
            state["projection"] = LowRank.of(x, dy, rank=self.compression.rank).vectors
        gradient.observe(*self._low_rank(name).project(x, dy))

    def _advance(self, name: str, positions: torch.Tensor, gradient: torch.Tensor) -> Entries:
        """Take in every chunk's largest, [n, s]; return the step of what is compressed."""
        state, group = self._state(name), self.param_groups[0]
        if "p" not in state:
            size = positions.shape[0], self.compression.width
            state.update(p=gradient.new_zeros(size), q=gradient.new_zeros(size), updates=0)
        state["updates"] += 1
        project = partial(self.sketch.project, positions)
        state["p"].lerp_(project(gradient), 1 - group["betas"][0])
        state["q"].lerp_(project(gradient.square()), 1 - group["betas"][1])
        found, step = recover_step(
            state["p"],
            state["q"],
            self.sketch,
            count=self.compression.kept,
            updates=state["updates"],
            betas=group["betas"],
            eps=group["eps"],
        )
        starts = torch.arange(found.shape[0], device=found.device) * self.compression.chunk
        return (found + starts[:, None]).flatten(), -group["lr"] * step.flatten()

    def _spread(self, name: str, positions: torch.Tensor, change: torch.Tensor) -> None:
        """Leave in `changes` what a step of the compressed gradient is for the layer's weights."""
        size = self.compression.size(self.layers[name].shape)
        real = (positions < size) & (change != 0)  # the last chunk is padded
        positions, order = positions[real].sort()
        change = change[real][order]
        self.changes[name], self.omitted[name] = (positions, change), 0.0
        if self.compression.rank is not None and positions.numel():
            step = change.new_zeros(size).index_put_((positions,), change)
            lifted = self._low_rank(name).lift(step)
            entries = entries_that_matter(*lifted, self.layers[name])
            # P is orthonormal: the lifted step is as long as the step itself
            missing = change.double().square().sum() - entries[1].double().square().sum()
            self.changes[name], self.omitted[name] = entries, max(0.0, missing.item())

    def _low_rank(self, name: str) -> LowRank:
        height, width = self.layers[name].shape
        return LowRank(self._state(name)["projection"], on_rows=height <= width)

    def _state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self.state[self.layers[name].values]
        return state
