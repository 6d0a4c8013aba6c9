"""A directory of adapters for a base of one layer, and what serves them, without engine or gRPC."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.slab import Slab
from spieldose_server.directory import AdapterDirectory
from spieldose_server.residency import Residency
from spieldose_server.store import AdapterStore
from spieldose_server.versions import Version

SHAPE = (32, 64)
SPEC = BaseSpec("toy", "f" * 64, {"layer": SHAPE})
ENTRIES = 512
ONE = 4096  # a little more than the bytes that an adapter of so many takes

Test = Callable[["Shelf"], Coroutine[Any, Any, None]]


@dataclass
class Shelf:
    """A directory of adapters for a base of one layer, and what serves them."""

    path: Path
    slab: Slab
    residency: Residency
    store: AdapterStore
    directory: AdapterDirectory

    def write(self, name: str, *, seed: int = 0, entries: int = ENTRIES) -> None:
        """Write an adapter's file; another seed gives another content of the same size."""
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randperm(SHAPE[0] * SHAPE[1], generator=generator)[:entries]
        values = torch.randn(entries, generator=generator)
        delta = SparseDelta.from_flat(positions, values, shape=SHAPE)
        info = AdapterInfo(
            base_model=SPEC.name,
            base_fingerprint=SPEC.fingerprint,
            method="random",
            density=entries / (SHAPE[0] * SHAPE[1]),
        )
        write_delta(self.path / f"{name}.safetensors", Adapter(info, {"layer": delta}))

    async def settle(self) -> None:
        """Let the directory take up what has changed."""
        while await self.directory.reconcile():
            await asyncio.sleep(0.05)

    def state(self, name: str) -> str:
        """Return the states of a name's versions."""
        return ", ".join(v.state.value for v in self.store.list() if v.name == name)

    async def use(self, adapter_id: str) -> Version:
        """Bring an adapter to the device, as a request does, and let it go."""
        with self.store.lease(adapter_id) as lease:
            assert lease is not None
            return await lease.ready()
