"""The engine bridge: requests in, tokens out, over transformers' continuous batching.

Nothing else in the server knows transformers' engine. Its generation thread owns the model, the KV
cache and what its layers play; it is told of requests and cancellations through the manager's
queues, and each step's tokens cross to the event loop once. transformers is pinned: this file leans
on its insides.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

from spieldose_kernels.base import Base
from spieldose_kernels.delta_matmul import delta_matmul
from spieldose_kernels.linear import ServedLayers
from spieldose_kernels.slab import Slab
from spieldose_kernels.token_groups import TokenGroups
from spieldose_server import prefix_cache
from spieldose_server.config import ServerConfig
from spieldose_server.errors import EngineStopped
from spieldose_server.request import GenerationRequest, SamplingParams
from spieldose_server.sampling import TokenLogprob, penalise, perturb

PAGE_TOKENS = 64  # tokens per page of KV cache: the rest of a request's last page lies idle


@dataclass(frozen=True, slots=True)
class Step:
    """Record one forward pass."""

    slots: frozenset[int]  # adapters in it
    requests: int
    base_requests: int
    tokens: int
    prefilling: int  # requests whose prompt was not finished by this pass


class Record:
    """Count what the engine has done; written by its thread, read by anyone."""

    def __init__(self) -> None:
        self.steps = 0
        self.max_adapters = 0
        self.max_requests = 0
        self.generated_tokens = 0
        self.cached_tokens = 0  # of prompts, found in the KV cache
        self.recent: deque[Step] = deque(maxlen=4096)

    def add(self, batch: list[FutureRequestState]) -> None:
        """Count a forward pass over these requests."""
        slots = [_slot(future) for future in batch]
        step = Step(
            slots=frozenset(slot for slot in slots if slot is not None),
            requests=len(batch),
            base_requests=slots.count(None),
            tokens=sum(future.query_length for future in batch),
            prefilling=sum(not future.has_new_token for future in batch),
        )
        self.steps += 1
        self.max_adapters = max(self.max_adapters, len(step.slots))
        self.max_requests = max(self.max_requests, step.requests)
        self.generated_tokens += step.requests - step.prefilling
        self.recent.append(step)


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
        self._end_ids = _end_ids(base.model.generation_config)
        self._manager = self._make_manager(base, config)
        cache = self._manager.batch_processor.cache
        window = getattr(base.model.config, "max_position_embeddings", None) or config.kv_tokens
        self.max_context: int = min(infer_max_single_request_tokens(cache), window)

    def start(self) -> None:
        """Start the generation thread."""
        self._manager.start()

    def stop(self) -> None:
        """Stop the generation thread; requests still running fail."""
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
        ends = self._end_ids.union(request.sampling.stop_token_ids)
        try:
            self._submit(request)
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
            if not gone.is_set():
                self._cancelled.add(request.id)
                self._manager.cancel_request(request.id)
                await self._let_go(gone)
                self._cancelled.discard(request.id)
            self._manager.output_router.result_handlers.pop(request.id, None)
            del self._gone[request.id]
            self._logprobs.pop(request.id, None)

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
            eos_token_id=sorted(self._end_ids.union(request.sampling.stop_token_ids)),
            prompt_length=len(request.tokens),
            slot=request.slot,
            plays=request.plays,
            sampling=request.sampling,
            seed=secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed,
        )
        if accepted is None:
            raise EngineStopped("the engine takes no more requests")

    def _make_manager(self, base: Base, config: ServerConfig) -> Any:
        scheduler = f"spieldose-{id(self)}"
        registry: dict[str, Any] = SCHEDULER_MAPPING
        registry[scheduler] = partial(_Scheduler, self._cancelled, self._released, self.record)
        settings = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-config.kv_tokens // PAGE_TOKENS),
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=min(config.max_batch_requests, config.max_batch_tokens),
            allow_block_sharing=True,  # safe only as _Scheduler and prefix_cache make it
            # slots are regrouped on the host before every step
            use_cuda_graph=False,
            use_async_batching=False,
            scheduler_type=scheduler,
        )
        prefix_cache.install()
        # the largest score is the sample: noise is added per request, by _Processors
        greedy = GenerationConfig(do_sample=False, eos_token_id=sorted(self._end_ids))
        model: Any = base.model
        manager = model.init_continuous_batching(greedy, settings)
        manager.logit_processor = _Processors(self._prepare, self._end_ids, self._logprobs)
        manager.warmup()  # creates the KV cache now, so that its capacity is known
        del registry[scheduler]
        cache: Any = manager.batch_processor.cache
        cache.mark_complete_blocks = partial(_mark_pages, cache.mark_complete_blocks)
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
        slots = [_slot(future) for future in batch]
        lengths = [future.query_length for future in batch]
        self._layers.play(TokenGroups.of(slots, lengths, self.slab.arena.memory.device))


class _Processors(ContinuousBatchingLogitsProcessorList):
    """Tell of every batch before its forward pass, and choose tokens by its sampling parameters.

    The list's own method is overridden because it alone sees every request of the batch; a single
    processor's sees those that get a token, and would miss requests in chunked prefill.
    """

    TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED_LOW, SEED_HIGH, POSITION = range(7)

    def __init__(
        self,
        prepare: Callable[[list[FutureRequestState]], None],
        end_ids: frozenset[int],
        logprobs: dict[str, deque[TokenLogprob]],
    ) -> None:
        super().__init__(LogitsProcessorList())
        self.tensors_required = 7
        self.do_processing = True
        self._prepare = prepare
        self._end_ids = end_ids
        self._logprobs = logprobs
        self._choosing: list[RequestState] = []  # who gets a token in this pass, a row each
        self._sampled = False  # whether any of them is not greedy

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Accept: the engine alone sets them."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Let unused places be greedy."""
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Write the sampling parameters of the requests that get a token, [7, requests] int32."""
        self._prepare(requests_in_batch)
        self._choosing = [future.state for future in requests_in_batch if future.has_new_token]
        rows = [_sampling_row(state) for state in self._choosing]
        self._sampled = any(row[0] > 0 for row in rows)
        if self._sampled:
            floats = torch.tensor([row[:3] for row in rows], dtype=torch.float32).view(torch.int32)
            integers = torch.tensor([row[3:] for row in rows], dtype=torch.int64).int()
            packed = torch.cat([floats, integers], dim=1).t()
            arg_storage[:, : len(rows)] = packed.to(arg_storage.device)
        return arg_storage

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        logits_processor_args: torch.Tensor,
    ) -> torch.Tensor:
        """Return scores whose argmax is the next token; a plainly greedy batch passes untouched."""
        raw, scores = scores, self._edit(scores)
        if self._sampled:
            scores = self._perturb(scores, logits_processor_args)
        self._note(raw, scores)
        return scores

    def _edit(self, scores: torch.Tensor) -> torch.Tensor:
        """Apply penalties, and keep answers from ending too early."""
        edited = [
            (row, state)
            for row, state in enumerate(self._choosing)
            if state.logit_processor_kwargs["sampling"].edits
        ]
        if not edited:
            return scores
        scores = scores.clone()
        for row, state in edited:
            sampling: SamplingParams = state.logit_processor_kwargs["sampling"]
            prompt, answer = _history(state)
            scores[row] = penalise(
                scores[row],
                prompt=prompt,
                answer=answer,
                repetition=sampling.repetition_penalty,
                presence=sampling.presence_penalty,
                frequency=sampling.frequency_penalty,
            )
            if len(answer) < sampling.min_tokens:
                scores[row, sorted(self._end_ids.union(sampling.stop_token_ids))] = -torch.inf
        return scores

    def _note(self, raw: torch.Tensor, scores: torch.Tensor) -> None:
        """Keep the log-probabilities of those who asked for them."""
        for row, state in enumerate(self._choosing):
            count = state.logit_processor_kwargs["sampling"].logprobs
            wanted = self._logprobs.get(state.request_id)
            if count is not None and wanted is not None:
                logprobs = raw[row].float().log_softmax(-1)
                values, tokens = logprobs.topk(count)
                likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
                chosen = logprobs[scores[row].argmax()].item()
                wanted.append(TokenLogprob(chosen, likeliest))

    def _perturb(self, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:
        rows = logits_processor_args[:, : scores.shape[0]]
        low, high = rows[self.SEED_LOW].long(), rows[self.SEED_HIGH].long()
        return perturb(
            scores,
            temperature=rows[self.TEMPERATURE].contiguous().view(torch.float32),
            top_p=rows[self.TOP_P].contiguous().view(torch.float32),
            min_p=rows[self.MIN_P].contiguous().view(torch.float32),
            top_k=rows[self.TOP_K].long(),
            seed=(high << 32) | (low & 0xFFFFFFFF),
            position=rows[self.POSITION].long(),
        )


class _Scheduler(FIFOScheduler):
    """First in, first out; shares prefixes within a version; tells when cancelled ones are out.

    The manager drains new requests and cancellations one after the other from two queues. A
    cancellation that overtakes its request would be lost, so cancelled requests are not let in.
    """

    def __init__(
        self,
        cancelled: set[str],
        released: Callable[[str], None],
        record: Record,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._cancelled = cancelled
        self._released = released
        self._record = record

    def add_waiting_request(self, state: RequestState) -> None:
        """Queue a request unless it is cancelled already."""
        if state.request_id in self._cancelled:
            self._released(state.request_id)
        else:
            super().add_waiting_request(state)

    def _infer_request_tokens(self, state: RequestState, *arguments: Any) -> list[int]:
        """Look for the beginning of a prompt among pages that the same adapter version made."""
        before = state.position_offset
        with prefix_cache.playing(_plays(state)):
            tokens: list[int] = super()._infer_request_tokens(state, *arguments)
        self._record.cached_tokens += state.position_offset - before
        return tokens

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Free cancelled requests, between two steps."""
        states: list[RequestState] = super().clear_cancelled_requests()
        for state in states:
            self._released(state.request_id)
        return states


def _plays(state: RequestState) -> bytes:
    plays: bytes = state.logit_processor_kwargs["plays"]
    return plays


def _mark_pages(mark: Callable[..., None], state: RequestState, *arguments: Any) -> None:
    """Offer pages that a request has filled to those that play the same."""
    with prefix_cache.playing(_plays(state)):
        mark(state, *arguments)


def _slot(future: FutureRequestState) -> int | None:
    slot: int | None = future.state.logit_processor_kwargs["slot"]
    return slot


def _history(state: RequestState) -> tuple[list[int], list[int]]:
    """Return prompt and answer so far; a request begun anew has its answer in its prompt."""
    length: int = state.logit_processor_kwargs["prompt_length"]
    tokens: list[int] = state.initial_tokens + state.generated_tokens
    return tokens[:length], tokens[length:]


def _sampling_row(state: RequestState) -> tuple[float, float, float, int, int, int, int]:
    sampling: SamplingParams = state.logit_processor_kwargs["sampling"]
    seed: int = state.logit_processor_kwargs["seed"]
    # the position in the sequence, not a count of tokens: it survives a request's re-prefill
    return (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.top_k,
        seed & 0xFFFFFFFF,
        seed >> 32,
        state.position_offset,
    )


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
