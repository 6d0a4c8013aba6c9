"""A frozen linear layer with a sparse delta beside it: y = NF4(W)·x + Δ·x, never merged."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from spieldose_kernels.base import Base
from spieldose_kernels.delta_matmul import delta_matmul
from spieldose_kernels.slab import LayerSlab, Slab
from spieldose_kernels.support_product import GradientProbe, support_product
from spieldose_kernels.token_groups import TokenGroups


class Delta(Protocol):
    """Add Δ·x to a layer's output; x is [..., C], y is [..., R], both in the model's dtype."""

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y + Δ·x, summed in float32 and rounded once to y's dtype."""
        ...


class DeltaLinear(nn.Module):
    """Put a delta over a frozen linear layer."""

    def __init__(self, base: Linear4bit, delta: Delta) -> None:
        super().__init__()
        self.base = base
        self.delta = delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return NF4(W)·x + Δ·x, [..., R] from [..., C]."""
        return self.delta.add_to(self.base(x), x)


class TrainableDelta(nn.Module):
    """Hold one layer's support and its values as a parameter."""

    row_starts: torch.Tensor  # [R + 1] int32
    columns: torch.Tensor  # [Z] int32

    def __init__(self, row_starts: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("row_starts", row_starts)
        self.register_buffer("columns", columns)
        zeros = torch.zeros(columns.numel(), dtype=torch.float32, device=columns.device)
        self.values = nn.Parameter(zeros)  # [Z] float32
        self.probe: GradientProbe | None = None

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y + Δ·x, differentiable in x and in the values."""
        delta = support_product(
            x.reshape(-1, x.shape[-1]),
            self.values,
            row_starts=self.row_starts,
            columns=self.columns,
            probe=self.probe,
        )
        return (y + delta.reshape(y.shape)).to(y.dtype)  # promotes to float32 first


class Playing:
    """Say which adapter every token of the running step plays; all layers read this one object."""

    groups: TokenGroups | None = None  # None: all tokens play the base


class ServedDelta:
    """Add each token's own adapter's delta, from the slab."""

    def __init__(self, layer: LayerSlab, playing: Playing) -> None:
        self.layer = layer
        self.playing = playing

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add Δ[slot]·x to y in place where a token plays an adapter; the rest is untouched."""
        if self.playing.groups is not None:
            delta_matmul(y, x, self.layer, self.playing.groups)
        return y


class ServedLayers:
    """Put a slab's deltas over a base's layers for the steps that play any.

    A step that plays the base alone runs the base's own layers, as if there were no adapters.
    """

    def __init__(self, base: Base, slab: Slab) -> None:
        self._model = base.model
        self._own: dict[str, nn.Module] = dict(base.layers)
        self._playing = Playing()
        self._over: dict[str, nn.Module] = {
            path: DeltaLinear(layer, ServedDelta(slab.layer(path), self._playing))
            for path, layer in base.layers.items()
        }

    def play(self, groups: TokenGroups | None) -> None:
        """Say which token of the coming forward pass plays which slot; None plays the base."""
        if (groups is None) != (self._playing.groups is None):
            replace(self._model, self._own if groups is None else self._over)
        self._playing.groups = groups


def attach(base: Base, make: Callable[[str], Delta]) -> None:
    """Put a delta over every target layer of a base, for good."""
    over = {path: DeltaLinear(layer, make(path)) for path, layer in base.layers.items()}
    replace(base.model, over)


def replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put these layers into a model, by path."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
