"""The sides of a comparison, each in a process of its own: two OpenMP teams in one slow each other.

Tokens end no text on any side: every request runs to its last token.
"""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from spieldose_kernels.base import load_base, pick_compute_dtype
from spieldose_kernels.quiet import quiet_libraries
from spieldose_server.config import ServerConfig
from spieldose_server.engine import PAGE_TOKENS
from spieldose_server.request import GenerationRequest
from spieldose_server.sampling_params import SamplingParams
from spieldose_server.server import Server, load
from spieldose_server.threads import apart

CPU = torch.device("cpu")


class Side:
    """Run one side's measurements in a process of its own, on request."""

    def __init__(self, kind: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, kind, arguments), daemon=True)
        self._process.start()
        self._pipe.recv()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def __call__(self, name: str, **arguments: Any) -> Any:
        """Return what the side's method of this name measures."""
        self._pipe.send((name, arguments))
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe: Any, kind: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    quiet_libraries()
    side = kind(*arguments)
    pipe.send("ready")
    while True:
        name, given = pipe.recv()
        pipe.send(getattr(side, name)(**given))


class Timed:
    """Tell how much processor time this process has used."""

    def processor_seconds(self) -> float:
        """Return the seconds, over all threads."""
        return time.process_time()


class Serving(Timed):
    """Run a server as `spieldose serve` does."""

    def __init__(self, base: str, adapters: Path, settings: dict[str, Any]) -> None:
        self._config = ServerConfig(
            base=base,
            adapters=adapters,
            listen="127.0.0.1:0",
            admin_listen="127.0.0.1:0",
            device="cpu",
            **settings,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server: Server = self._do(self._start())
        self._asked = 0

    def addresses(self) -> tuple[str, str]:
        """Return where it listens to clients, and to administrators."""
        return f"127.0.0.1:{self._server.port}", f"127.0.0.1:{self._server.admin_port}"

    def evictions(self) -> int:
        """Return how often an adapter has left the device for another."""
        return self._server.store.residency.evictions

    def budgets(self) -> dict[str, int]:
        """Return how much room there is for adapters."""
        names = ("max_adapters", "adapter_memory", "host_memory")
        return {name: getattr(self._server.config, name) for name in names}

    def generate(self, *, prompts: Sequence[list[int]], tokens: int) -> float:
        """Return the seconds that the engine takes for these prompts of the base, without gRPC."""
        begin = time.perf_counter()
        self._do(self._together(prompts, tokens))
        return time.perf_counter() - begin

    async def _together(self, prompts: Sequence[list[int]], tokens: int) -> None:
        await asyncio.gather(*(self._one(prompt, tokens) for prompt in prompts))

    async def _one(self, prompt: list[int], tokens: int) -> None:
        self._asked += 1
        request = GenerationRequest(
            id=str(self._asked),
            tokens=prompt,
            slot=None,
            plays=b"",
            sampling=SamplingParams(),
            seed=0,
            max_tokens=tokens,
        )
        async for _ in self._server.engine.generate(request):
            pass

    async def _start(self) -> Server:
        base = await asyncio.to_thread(apart, lambda: load(self._config))
        server = Server(base, self._config)
        server.engine.end_ids = frozenset()
        await server.start()
        return server

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Bare(Timed):
    """Run transformers' own loop over the same base, with the server's settings and none of it."""

    def __init__(self, base: str) -> None:
        dtype = pick_compute_dtype("auto", CPU)
        loaded = apart(lambda: load_base(base, device=CPU, compute_dtype=dtype, fused=True))
        config = ServerConfig(base=base, adapters=Path(base))
        settings = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-config.kv_tokens // PAGE_TOKENS),
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=config.max_batch_requests,
            allow_block_sharing=True,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        model: Any = loaded.model
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = model.init_continuous_batching(greedy, settings)
        self._manager.start()

    def generate(self, *, prompts: Sequence[list[int]], tokens: int) -> float:
        """Return the seconds that these prompts take."""
        begin = time.perf_counter()
        left = set(self._manager.add_requests(list(prompts), max_new_tokens=tokens))
        while left:
            output = self._manager.get_result()
            assert len(output.generated_tokens) == tokens
            left.remove(output.request_id)
        return time.perf_counter() - begin
