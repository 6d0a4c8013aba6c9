"""The model under training: a frozen 4-bit base whose target layers carry a trainable support."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spieldose_kernels.base import Base
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta, index_dtype
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.linear import TrainableDelta, attach
from spieldose_trainer.errors import ConfigError


class SparseModel(nn.Module):
    """Wrap a base with a random support of `density` in every target layer, all values 0.

    Density counts the target layers' weights only; every layer gets its own share, at least one.
    """

    def __init__(self, base: Base, *, density: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.layers: dict[str, TrainableDelta] = {}
        generator = torch.Generator().manual_seed(seed)
        device = base.model.device
        for name, (height, width) in base.spec.shapes.items():
            count = max(1, int(density * height * width))
            positions = torch.randperm(height * width, generator=generator)[:count]
            support = SparseDelta.from_flat(positions, torch.zeros(count), shape=(height, width))
            self.layers[name] = TrainableDelta(
                support.row_starts.to(device), support.columns.int().to(device)
            )
        attach(base, self.layers.__getitem__)
        self.model = base.model

    @property
    def config(self) -> Any:
        """Return the base model's configuration."""
        return self.model.config

    @property
    def density(self) -> float:
        """Return the real density over the target layers."""
        weights = sum(height * width for height, width in self.base.spec.shapes.values())
        return sum(layer.values.numel() for layer in self.layers.values()) / weights

    def forward(self, **inputs: Any) -> Any:
        """Run the base with its deltas; arguments and result are the base model's."""
        return self.model(**inputs, use_cache=False)

    def adapter(self, *, method: str, description: str, settings: Mapping[str, str]) -> Adapter:
        """Return the present deltas as an adapter, on the CPU."""
        modules = {}
        for name, layer in self.layers.items():
            width = self.base.spec.shapes[name][1]
            columns = layer.columns.to("cpu", index_dtype(width))
            values = layer.values.detach().cpu()
            modules[name] = SparseDelta(layer.row_starts.cpu(), columns, values, width)
        info = AdapterInfo(
            base_model=self.base.spec.name,
            base_fingerprint=self.base.spec.fingerprint,
            method=method,
            density=self.density,
            description=description,
            settings=settings,
        )
        return Adapter(info, modules)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Take over support and values of an adapter with as many entries in every layer."""
        for name, layer in self.layers.items():
            delta = adapter.modules.get(name)
            found = 0 if delta is None else delta.nnz
            if delta is None or found != layer.values.numel():
                raise ConfigError(
                    f"{name}: expected {layer.values.numel()} entries at this density, got {found}"
                )
            layer.row_starts.copy_(delta.row_starts)
            layer.columns.copy_(delta.columns.int())
            layer.values.copy_(delta.values)

    def save_checkpoint(self, directory: Path) -> None:
        """Write support and values to a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter(method="checkpoint", description="", settings={})
        write_delta(directory / "delta.safetensors", adapter)

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from `save_checkpoint`."""
        self.load(read_delta((directory / "delta.safetensors").read_bytes(), self.base.spec))
