"""Real objects at toy size: a tiny random model, and the demo's base where language matters."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes begun here inherit it

if not torch.cuda.is_available():  # before anything imports triton: it is read where kernels are
    os.environ.setdefault("TRITON_INTERPRET", "1")

from spieldose_kernels.base import Base, load_base
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.quiet import quiet_libraries
from spieldose_server.client import Client
from spieldose_server.config import ServerConfig
from spieldose_server.metrics import NONE
from spieldose_server.server import Server

from .tiny_base import save_tiny_base

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("demo", "benchmarks")]

quiet_libraries()


def pytest_collection_finish() -> None:
    """Leave what the libraries made out of garbage collection.

    A run collects as it begins, an engine as it starts and stops: each looks at all there is.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter take down what was left out."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, saved as a checkpoint."""
    directory = tmp_path_factory.mktemp("tiny-base")
    save_tiny_base(directory)
    return directory


@pytest.fixture
def tiny_base(tiny_directory: Path) -> Base:
    """The tiny model in NF4, computing in float32; fresh, because tests put deltas over it."""
    return load_base(
        str(tiny_directory), device=torch.device("cpu"), compute_dtype=torch.float32, fused=False
    )


@pytest.fixture
def make_adapter(tiny_base: Base) -> Callable[..., Adapter]:
    """Make a random adapter for the tiny model; different seeds give different texts."""

    def make(seed: int, *, density: float = 0.05, scale: float = 0.5) -> Adapter:
        return random_adapter(tiny_base, seed=seed, density=density, scale=scale)

    return make


@pytest.fixture(scope="session")
def real_directory() -> Path:
    """The demo's base model as a checkpoint."""
    from fetch_base import fetch

    return fetch()


@dataclass(frozen=True)
class Running:
    """Hold a running server, a client and an administrator of it, and its adapter directory."""

    server: Server
    client: Client
    admin: Client
    directory: Path
    base: Base
    loop: asyncio.AbstractEventLoop

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def refused(self) -> int:
        """Return how many calls were refused because nobody knew the caller."""
        labels = {"adapter": NONE, "code": "UNAUTHENTICATED"}
        registry = self.server.metrics.registry
        return int(registry.get_sample_value("spieldose_requests_total", labels) or 0)

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
        settings = {
            "admin_listen": "127.0.0.1:0",
            "kv_tokens": 4096,
            "adapter_memory": 1 << 22,
            "drain_seconds": 5.0,
        } | settings
        config = ServerConfig(base="tiny", adapters=directory, listen="127.0.0.1:0", **settings)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def begin() -> Server:
            server = Server(base, config)
            await server.start()
            return server

        try:
            server = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
            try:
                with (  # no retries: tests see what the server does with a call
                    Client(f"127.0.0.1:{server.port}", retries=0) as client,
                    Client(f"127.0.0.1:{server.admin_port}", retries=0) as admin,
                ):
                    yield Running(server, client, admin, directory, base, loop)
            finally:
                asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    return start


def eventually(holds: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def random_adapter(base: Base, *, seed: int, density: float, scale: float) -> Adapter:
    """Make an adapter with random entries in every target layer."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (height, width) in base.spec.shapes.items():
        count = max(1, int(height * width * density))
        positions = torch.randperm(height * width, generator=generator)[:count]
        values = torch.randn(count, generator=generator) * scale
        modules[name] = SparseDelta.from_flat(positions, values, shape=(height, width))
    info = AdapterInfo(
        base_model=base.spec.name,
        base_fingerprint=base.spec.fingerprint,
        method="random",
        density=density,
    )
    return Adapter(info, modules)
