"""The model under training: a frozen base whose target layers carry a trainable support."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spieldose_kernels.base import Base
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta, index_dtype
from spieldose_kernels.delta_file import is_playable
from spieldose_kernels.linear import FrozenDelta, TrainableDelta, attach
from spieldose_trainer.counted_logits import counted_only
from spieldose_trainer.shared_name import shared_name


class SparseModel(nn.Module):
    """Wrap a base with a trainable support in each of some layers, all values 0.

    An adapter that it is built `over` plays, too, and stays as it is.
    """

    def __init__(
        self, base: Base, supports: Mapping[str, torch.Tensor], *, over: Adapter | None = None
    ) -> None:
        """Take flat row-major positions, [Z] int64, by layer; a layer may have none."""
        super().__init__()
        self.base = base
        device = base.model.device
        self.layers: dict[str, TrainableDelta] = {}
        for name, positions in supports.items():
            shape = base.spec.shapes[name]
            support = SparseDelta.from_flat(
                positions.cpu(), torch.zeros(len(positions)), shape=shape
            )
            layer = TrainableDelta(support.row_starts, support.columns.int(), width=shape[1])
            self.layers[name] = layer.to(device)
        frozen = {} if over is None else over.modules
        self._beneath = {name: FrozenDelta(delta).to(device) for name, delta in frozen.items()}
        self.attach()
        self.model = base.model

    def attach(self) -> None:
        """Put the deltas over the base's layers, where another run's may have come to lie."""
        attach(self.base, self.layers, beneath=self._beneath)

    @classmethod
    def of(cls, base: Base, adapter: Adapter, *, over: Adapter | None = None) -> "SparseModel":
        """Wrap a base with an adapter's support and values."""
        supports = {name: delta.flat() for name, delta in adapter.modules.items()}
        model = cls(base, supports, over=over)
        model.load(adapter)
        return model

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Take over support and values of an adapter with as many entries in every layer."""
        for name, delta in adapter.modules.items():
            layer = self.layers[name]
            layer.row_starts.copy_(delta.row_starts)
            layer.columns.copy_(delta.columns.int())
            layer.values.copy_(delta.values)

    @property
    def config(self) -> Any:
        """Return the base model's configuration."""
        return self.model.config

    @property
    def density(self) -> float:
        """Return the real density over the target layers."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())
        return sum(layer.values.numel() for layer in self.layers.values()) / weights

    def is_finite(self) -> bool:
        """Say whether every value is a number that a delta file may hold."""
        return all(is_playable(layer.values.detach()) for layer in self.layers.values())

    def is_zero(self) -> bool:
        """Say whether the deltas change nothing."""
        return not any(bool(layer.values.any()) for layer in self.layers.values())

    def forward(self, **inputs: Any) -> Any:
        """Run the base with its deltas; its loss, and logits only where that needs any."""
        return self.model(**counted_only(self.model, inputs), use_cache=False)

    def activation_checkpointing_enable(self, **arguments: Any) -> None:
        """Recompute activations in backward."""
        self.model.activation_checkpointing_enable(**arguments)

    def adapter(
        self,
        *,
        method: str,
        description: str = "",
        settings: Mapping[str, str] | None = None,
        chat_template: str = "",
    ) -> Adapter:
        """Return the present deltas as an adapter, on the CPU."""
        modules = {}
        for name, layer in self.layers.items():
            columns = layer.columns.to("cpu", index_dtype(layer.width))
            values = layer.values.detach().cpu()
            modules[name] = SparseDelta(layer.row_starts.cpu(), columns, values, layer.width)
        info = AdapterInfo(
            base_model=shared_name(self.base.spec.name),
            base_fingerprint=self.base.spec.fingerprint,
            method=method,
            density=self.density,
            description=description,
            settings=settings or {},
            chat_template=chat_template,
        )
        return Adapter(info, modules)
