"""A frozen linear layer with a sparse delta beside it: y = W·x + Δ·x, never merged."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from spieldose_kernels.base import Base
from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.delta_matmul import delta_matmul
from spieldose_kernels.frozen_product import Entries, add_frozen_product
from spieldose_kernels.slab import LayerSlab, Slab
from spieldose_kernels.support_product import GradientProbe, add_support_product
from spieldose_kernels.token_groups import TokenGroups


class Delta(Protocol):
    """Add Δ·x to a layer's output; x is [..., C], y is [..., R], both in the model's dtype."""

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y + Δ·x, summed in float32 and rounded once to y's dtype."""
        ...


class DeltaLinear(nn.Module):
    """Put a delta over a frozen linear layer, or over one that carries a delta already."""

    def __init__(self, base: nn.Module, delta: Delta) -> None:
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
    born: torch.Tensor  # [Z] int16, the change of support in which each entry joined; at first 0

    def __init__(self, row_starts: torch.Tensor, columns: torch.Tensor, *, width: int) -> None:
        super().__init__()
        self.width = width  # C
        self.register_buffer("row_starts", row_starts)
        self.register_buffer("columns", columns)
        self.register_buffer("born", torch.zeros_like(columns, dtype=torch.int16))
        self.values = nn.Parameter(torch.zeros_like(columns, dtype=torch.float32))  # [Z]
        self.probe: GradientProbe | None = None
        self.shift: Callable[[], torch.Tensor] | None = None  # [Z], added to the values if given

    @property
    def shape(self) -> tuple[int, int]:
        """Return (R, C), the shape of the layer's weight."""
        return self.row_starts.numel() - 1, self.width

    def dense(self) -> torch.Tensor:
        """Return Δ as a dense [R, C] tensor, float32."""
        delta = SparseDelta(self.row_starts, self.columns, self.values.detach(), self.width)
        return delta.dense(torch.float32)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y + Δ·x, differentiable in x and in the values."""
        return add_support_product(
            y,
            x,
            self.values if self.shift is None else self.values + self.shift(),
            row_starts=self.row_starts,
            columns=self.columns,
            probe=self.probe,
        )


class FrozenDelta(nn.Module):
    """Hold one layer's delta as it is; x gets a gradient, the values get none."""

    def __init__(self, delta: SparseDelta) -> None:
        super().__init__()
        for side, entries in (("forward", delta), ("backward", delta.transposed())):
            self.register_buffer(f"{side}_row_starts", entries.row_starts)
            self.register_buffer(f"{side}_columns", entries.columns.int())
            self.register_buffer(f"{side}_values", entries.values.float())

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y + Δ·x, differentiable in y and x."""
        return add_frozen_product(y, x, self._entries("forward"), self._entries("backward"))

    def _entries(self, side: str) -> Entries:
        return Entries(*(self.get_buffer(f"{side}_{name}") for name in Entries._fields))


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


def attach(
    base: Base, deltas: Mapping[str, Delta], *, beneath: Mapping[str, Delta] | None = None
) -> None:
    """Put deltas over a base's layers, by module name, and others beneath them.

    Whatever lay over the layers before is gone.
    """
    layers: dict[str, nn.Module] = dict(base.layers)
    for given in (beneath or {}, deltas):
        layers |= {path: DeltaLinear(layers[path], delta) for path, delta in given.items()}
    replace(base.model, layers)


def replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put these layers into a model, by path."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
