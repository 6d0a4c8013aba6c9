"""The engine bridge: requests in, tokens out, over transformers' continuous batching.

Only this file and what runs inside the engine's steps (`scheduler`, `token_choice`, `batch`,
`prefix_cache`) know transformers' engine. Its generation thread owns the model, the KV
cache and what its layers play; it is told of requests and cancellations through the manager's
queues, and each step's tokens cross to the event loop once. transformers is pinned: all of
them lean on its insides.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from spieldose_kernels.base import Base
from spieldose_kernels.delta_matmul import delta_matmul
from spieldose_kernels.linear import ServedLayers
from spieldose_kernels.slab import Slab
from spieldose_kernels.token_groups import TokenGroups
from spieldose_server import prefix_cache
from spieldose_server.batch import Record, asked
from spieldose_server.config import ServerConfig
from spieldose_server.errors import EngineStopped
from spieldose_server.request import GenerationRequest
from spieldose_server.sampling import TokenLogprob
from spieldose_server.scheduler import Scheduler, mark_pages
from spieldose_server.token_choice import TokenChoice

PAGE_TOKENS = 64  # tokens per page of KV cache: the rest of a request's last page lies idle


@dataclass(frozen=True, slots=True)
class Tokens:
    """Hold what one request got since the last time."""

    ids: list[int]
    finished: bool
    hit_end: bool  # finished by an end-of-sequence or stop token, not by the limit
    logprobs: list[TokenLogprob]  # one for each, if asked for


class Engine:
    """Generate tokens for many requests at once, each playing its own slot of the slab."""

    def __init__(self, base: Base, config: ServerConfig) -> None:
        self.record = Record()
        self.slab = Slab(
            base.spec.shapes,
            slots=config.max_adapters,
            budget=config.adapter_memory,
            dtype=base.model.dtype,
            device=base.model.device,
        )
        self._layers = ServedLayers(base, self.slab)
        self._compile(base.model.dtype)
        self._cancelled: set[str] = set()  # adding and discarding are atomic: both threads use it
        self._gone: dict[str, Callable[[], object]] = {}
        self._logprobs: dict[str, deque[TokenLogprob]] = {}  # not yet delivered, by request
        table: Any = base.model.get_input_embeddings()
        self.end_ids = _end_ids(base.model.generation_config) & frozenset(
            range(int(table.num_embeddings))  # what lies beyond is never made, nor can be banned
        )
        self._started = False
        self._manager = self._make_manager(base, config)
        cache = self._manager.batch_processor.cache
        window = getattr(base.model.config, "max_position_embeddings", None) or config.kv_tokens
        self.max_context: int = min(infer_max_single_request_tokens(cache), window)

    def start(self) -> None:
        """Start the generation thread."""
        self._started = True
        self._manager.start()

    def stop(self) -> None:
        """Stop the generation thread; requests still running fail."""
        if self._started:
            self._manager.stop(block=True, hard_stop=True)

    @property
    def running(self) -> bool:
        """Say whether the generation thread is alive and takes requests."""
        alive: bool = self._manager.is_running()
        return alive and self._manager.background_thread_status.can_accept_new_requests() is None

    @property
    def held_pages(self) -> int:
        """Return the pages of KV cache that requests hold; pages kept for later ones are free."""
        allocators = self._manager.batch_processor.cache.cache_allocators.values()
        return sum(len(set().union(*a.block_table.copy().values())) for a in allocators)

    @property
    def pages(self) -> int:
        """Return the pages of KV cache there are."""
        return int(self._manager.batch_processor.cache.num_blocks)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Tokens]:
        """Yield tokens as they are made, all that are ready at once; ends after the last.

        Closing it early cancels the request. It does not end before the engine is done with the
        request: afterwards no step reads its slot. Raises EngineStopped.
        """
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        gone = asyncio.Event()

        def deliver(output: GenerationOutput) -> None:
            outputs.put_nowait(output)
            if output.is_finished():
                gone.set()

        loop = asyncio.get_running_loop()
        self._gone[request.id] = lambda: loop.call_soon_threadsafe(gone.set)
        self._manager.register_result_handler(request.id, deliver)
        logprobs: deque[TokenLogprob] = deque()
        if request.sampling.logprobs is not None:
            self._logprobs[request.id] = logprobs
        ends = self.end_ids.union(request.sampling.stop_token_ids)
        submitted = False
        try:
            self._submit(request)
            submitted = True
            seen, finished = 0, False
            while not finished:
                output = await _latest(outputs)
                finished = output.is_finished()
                if output.status == RequestStatus.FAILED:
                    raise EngineStopped(f"the engine stopped: {output.error}")
                ids = output.generated_tokens[seen:]
                seen += len(ids)
                given = [logprobs.popleft() for _ in ids] if logprobs else []
                yield Tokens(ids, finished, finished and ids[-1] in ends, given)
        finally:
            try:
                if submitted and not gone.is_set():
                    self._cancelled.add(request.id)
                    self._manager.cancel_request(request.id)
                    await self._let_go(gone)
            finally:
                self._forget(request.id)

    def _forget(self, request: str) -> None:
        """Drop what was kept for a request."""
        self._cancelled.discard(request)
        self._manager.output_router.result_handlers.pop(request, None)
        del self._gone[request]
        self._logprobs.pop(request, None)

    async def _let_go(self, gone: asyncio.Event) -> None:
        """Wait until the engine is done with a request, however often this task is cancelled."""
        cancelled = False
        while not gone.is_set() and self._manager.is_running():
            try:
                await asyncio.wait_for(gone.wait(), timeout=0.1)
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def _submit(self, request: GenerationRequest) -> None:
        accepted = self._manager.add_request(
            request.tokens,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(self.end_ids.union(request.sampling.stop_token_ids)),
            request=request,
        )
        if accepted is None:
            raise EngineStopped("the engine takes no more requests")

    def _make_manager(self, base: Base, config: ServerConfig) -> Any:
        scheduler = f"spieldose-{id(self)}"
        registry: dict[str, Any] = SCHEDULER_MAPPING
        registry[scheduler] = partial(Scheduler, self._cancelled, self._released, self.record)
        settings = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-config.kv_tokens // PAGE_TOKENS),
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=min(config.max_batch_requests, config.max_batch_tokens),
            allow_block_sharing=True,  # safe only as Scheduler and prefix_cache make it
            # slots are regrouped on the host before every step
            use_cuda_graph=False,
            use_async_batching=False,
            # flash-attn 2 reads single tokens' pages by itself, but none of PAGE_TOKENS, and its
            # kernels take no float32
            max_blocks_per_request=0,
            auto_switch_to_flash=base.model.dtype != torch.float32,
            scheduler_type=scheduler,
        )
        prefix_cache.install()
        # the largest score is the sample: noise is added per request, by TokenChoice
        greedy = GenerationConfig(do_sample=False, eos_token_id=sorted(self.end_ids))
        model: Any = base.model
        manager = model.init_continuous_batching(greedy, settings)
        manager.logit_processor = TokenChoice(self._prepare, self.end_ids, self._logprobs)
        manager.warmup()  # creates the KV cache now, so that its capacity is known
        del registry[scheduler]
        inputs: Any = manager.batch_processor.inputs_and_outputs
        if inputs.compute_stream is not None:
            inputs.get_model_kwargs = partial(
                _after_copies, inputs.compute_stream, inputs.get_model_kwargs
            )
        cache: Any = manager.batch_processor.cache
        cache.mark_complete_blocks = partial(mark_pages, cache.mark_complete_blocks)
        return manager

    def _compile(self, dtype: torch.dtype) -> None:
        """Have every layer's product compiled before the first request waits for it."""
        device = self.slab.arena.memory.device
        nobody = TokenGroups.of([0], [1], device)
        assert nobody is not None
        for layer in map(self.slab.layer, self.slab.modules):
            x, y = (torch.zeros(1, size, dtype=dtype, device=device) for size in layer.shape[::-1])
            delta_matmul(y, x, layer, nobody)

    def _released(self, request_id: str) -> None:
        if listener := self._gone.get(request_id):
            listener()

    def _prepare(self, batch: list[FutureRequestState]) -> None:
        """Take note of the coming forward pass: its tokens lie in the order of these requests."""
        self.record.add(batch)
        slots = [asked(future.state).slot for future in batch]
        lengths = [future.query_length for future in batch]
        self._layers.play(TokenGroups.of(slots, lengths, self.slab.arena.memory.device))


def _after_copies(stream: torch.cuda.Stream, arguments: Callable[..., Any], **which: Any) -> Any:
    """Return a forward pass's arguments once its stream waits for the copies that made them.

    transformers (5.23) makes them on the thread's own stream, and orders the two by chance.
    """
    stream.wait_stream(torch.cuda.current_stream())
    return arguments(**which)


def _end_ids(config: GenerationConfig | None) -> frozenset[int]:
    end = None if config is None else config.eos_token_id
    if end is None:
        return frozenset()
    return frozenset([end] if isinstance(end, int) else end)


async def _latest(outputs: asyncio.Queue[GenerationOutput]) -> GenerationOutput:
    """Wait for an output and return the newest; each holds all tokens so far."""
    output = await outputs.get()
    while not outputs.empty():
        output = outputs.get_nowait()
    return output
