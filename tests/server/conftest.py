"""A whole server on a real socket, in this process, around the tiny model."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from spieldose_kernels.base import Base, load_base
from spieldose_kernels.delta_file import write_delta
from spieldose_server.client import Client
from spieldose_server.config import ServerConfig
from spieldose_server.server import Server


@dataclass(frozen=True)
class Running:
    """Hold a running server, a client of it, and its adapter directory."""

    server: Server
    client: Client
    directory: Path
    base: Base
    loop: asyncio.AbstractEventLoop

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def state(self, name: str) -> str:
        """Return the states of an adapter's versions, the reason behind a rejection included."""
        return ", ".join(
            f"{version.state.value} {version.reason}".strip()
            for version in self.server.store.list()
            if version.name == name
        )


@pytest.fixture(scope="session")
def serve_tiny(tiny_directory: Path) -> Callable[..., Any]:
    """Return a context manager's maker: `serve_tiny(directory, **settings)` runs a server."""

    def start(directory: Path, **settings: Any) -> Iterator[Running]:
        base = load_base(
            settings.pop("base", str(tiny_directory)),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            fused=False,
        )
        settings = {"kv_tokens": 4096, "adapter_memory": 1 << 22, "drain_seconds": 5.0} | settings
        config = ServerConfig(base="tiny", adapters=directory, listen="127.0.0.1:0", **settings)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def begin() -> Server:
            server = Server(base, config)
            await server.start()
            return server

        server = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
        try:
            with Client(f"127.0.0.1:{server.port}") as client:
                yield Running(server, client, directory, base, loop)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    return start


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


def eventually(holds: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
