"""A whole server with four adapters, on a real socket, in this process; and a shelf without one."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.slab import Slab
from spieldose_server.directory import AdapterDirectory
from spieldose_server.files import AdapterFiles
from spieldose_server.residency import Residency
from spieldose_server.store import AdapterStore
from spieldose_server.threads import loaders
from spieldose_server.trusted_keys import TrustedKeys

from ..conftest import Running
from .fake_server import FakeServer, fake_server
from .shelf import ONE, SHAPE, SPEC, Shelf, Test


@pytest.fixture
def running(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, make_adapter: Callable[..., Any]
) -> Iterator[Running]:
    """A server with the adapters a1 to a4."""
    directory = tmp_path / "adapters"
    directory.mkdir()
    for seed in range(1, 5):
        write_delta(directory / f"a{seed}.safetensors", make_adapter(seed))
    yield from serve_tiny(directory, max_batch_tokens=64)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A server that does as it is told."""
    with fake_server() as fake:
        yield fake


@pytest.fixture
def on_shelf(tmp_path: Path) -> Callable[..., Callable[[Test], None]]:
    """Run a test on a shelf with these adapters and this much room, in adapters."""

    def settings(
        *names: str,
        slots: int = 2,
        room: float = 16.0,
        host: float = 10.0,
        keys: TrustedKeys | None = None,
    ) -> Callable[[Test], None]:
        def run(test: Test) -> None:
            slab = Slab(
                {"layer": SHAPE},
                slots=slots,
                budget=int(room * ONE),
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
            workers = loaders()
            files = AdapterFiles(tmp_path, SPEC, dtype=torch.float32, keys=keys)
            residency = Residency(slab, files, workers, host_memory=int(host * ONE))
            store = AdapterStore(residency)
            directory = AdapterDirectory(files, store, workers, keys=keys)
            shelf = Shelf(tmp_path, slab, residency, store, directory)
            for seed, name in enumerate(names):
                shelf.write(name, seed=seed)
            for file in tmp_path.iterdir():
                os.utime(file, (1e9, 1e9), follow_symlinks=False)  # long settled

            async def whole() -> None:
                await directory.take_up()
                await test(shelf)

            asyncio.run(asyncio.wait_for(whole(), 60))
            workers.shutdown()

        return run

    return settings
