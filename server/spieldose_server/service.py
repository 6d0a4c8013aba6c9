"""The gRPC service that generates. Wire types stop here: behind this file are the server's own."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from spieldose_kernels.base import Base
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server import wire
from spieldose_server.access import CALLER
from spieldose_server.admission import Admission, Tenant, Turn
from spieldose_server.config import ServerConfig
from spieldose_server.constraint import Constraint, Grammars
from spieldose_server.engine import Engine
from spieldose_server.errors import InvalidRequest
from spieldose_server.merged import merged
from spieldose_server.metrics import Metrics, Observed
from spieldose_server.prompts import Prompts
from spieldose_server.request import GenerationRequest, fit
from spieldose_server.sampling_params import MAX_ANSWERS, SamplingParams
from spieldose_server.statuses import Context, answering
from spieldose_server.store import AdapterStore, Lease
from spieldose_server.text import TextStream
from spieldose_server.versions import Version

log = logging.getLogger(__name__)

MAX_REQUEST_ID = 128  # characters; every chunk carries it


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold what a request asks for."""

    id: str  # for people; the client's own need not be unique
    tokens: list[int]
    template: str  # that messages went through
    sampling: SamplingParams
    constraint: Constraint | None  # of one answer
    max_tokens: int


class InferenceService(rpc.InferenceServicer):
    """Generate text with any adapter."""

    def __init__(
        self,
        base: Base,
        engine: Engine,
        store: AdapterStore,
        admission: Admission,
        metrics: Metrics,
        config: ServerConfig,
    ) -> None:
        table: Any = base.model.get_input_embeddings()
        self._vocabulary = int(table.num_embeddings)
        self._base = base
        self._engine = engine
        self._store = store
        self._admission = admission
        self._metrics = metrics
        self._prompts = Prompts(
            base.tokenizer, vocabulary=self._vocabulary, max_bytes=config.max_prompt_bytes
        )
        self._grammars = Grammars(
            base.tokenizer, vocabulary=self._vocabulary, end_ids=engine.end_ids
        )

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream chunks, then one completion."""
        caller = CALLER.get()
        async with answering(context):
            with (
                self._metrics.request() as observed,
                self._admission.accept(caller.tenant) as tenant,
                ExitStack() as stack,
            ):
                caller.check_play(request.adapter_id)
                count = max(1, min(request.sampling_params.n, MAX_ANSWERS))
                leases = [
                    stack.enter_context(self._store.lease(request.adapter_id)) for _ in range(count)
                ]
                held = leases[0].version if leases[0] else None
                observed.plays(held.name if held else "")
                asked = await self._read(request, template=_template(held))
                answers = [
                    self._answer(tenant, lease, request, asked, index, observed)
                    for index, lease in enumerate(leases)
                ]
                async with aclosing(merged(answers)) as responses:
                    async for response in responses:
                        yield response

    async def _answer(
        self,
        tenant: Tenant,
        lease: Lease | None,
        request: pb.GenerateRequest,
        asked: Asked,
        index: int,
        observed: Observed,
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Wait for a turn; yield an answer's chunks as its tokens come, then its completion."""
        began = time.perf_counter()
        async with self._admission.turn(tenant, lease, tokens=len(asked.tokens)) as turn:
            if _template(turn.version) != asked.template:  # replaced while it waited
                asked = await self._read(request, template=_template(turn.version))
            observed.began(len(asked.tokens))
            generation = GenerationRequest(
                id=secrets.token_hex(8),
                tokens=asked.tokens,
                slot=None if turn.version is None else turn.version.slot,
                plays=b"" if turn.version is None else turn.version.digest.encode(),
                sampling=asked.sampling,
                seed=asked.sampling.seed_of(index),
                max_tokens=asked.max_tokens,
                constraint=asked.constraint and asked.constraint.another(),
            )
            async with aclosing(self._play(generation, turn)) as responses:
                async for response in responses:
                    if tokens := len(response.chunk.token_ids):
                        observed.got(index, tokens)
                    response.request_id, response.index = asked.id, index
                    yield response
        log.info(
            "request %s adapter %s: %d + %d tokens in %.2f s",
            asked.id,
            turn.version or "(base)",
            response.complete.prompt_tokens,
            response.complete.completion_tokens,
            time.perf_counter() - began,
        )

    async def _play(
        self, generation: GenerationRequest, turn: Turn
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Yield an answer's chunks as its tokens come, then its completion."""
        sampling = generation.sampling
        text = TextStream(self._base.tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
        count, ended = 0, False
        async with aclosing(self._engine.generate(generation)) as stream:
            async for tokens in stream:
                turn.charge(len(tokens.ids))
                silent = 1 if tokens.hit_end else 0  # what ends the answer is not part of its text
                piece, taken = text.push(tokens.ids, silent=silent)
                if tokens.finished:
                    piece += text.finish()
                count += len(taken)
                ended = text.stopped or tokens.hit_end
                logprobs = map(wire.logprob, tokens.logprobs[: len(taken)])
                chunk = pb.Chunk(text=piece, token_ids=taken, logprobs=logprobs)
                yield pb.GenerateResponse(chunk=chunk)
                if text.stopped:
                    break
        if generation.constraint is not None:
            generation.constraint.check()
        yield pb.GenerateResponse(
            complete=wire.completion(generation, turn.version, count=count, ended=ended)
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the tokens Generate would see."""
        async with answering(context):
            field, prompt = wire.prompt(request)
            if asked := request.adapter_id:
                CALLER.get().check_play(asked)
            template = _template(self._store.resolve(asked) if asked else None)
            tokens = await self._prompts.tokens(field, prompt, template=template)
            return pb.TokenizeResponse(token_ids=tokens)
        raise AssertionError("aborted")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        """Describe the base and what the engine has done."""
        record = self._engine.record
        return pb.ModelInfo(
            model=self._base.spec.name,
            fingerprint=self._base.spec.fingerprint,
            max_context=self._engine.max_context,
            vocabulary=self._vocabulary,
            has_chat_template=self._base.tokenizer.chat_template is not None,
            engine=pb.EngineRecord(
                steps=record.steps,
                max_adapters_in_step=record.max_adapters,
                max_requests_in_step=record.max_requests,
                generated_tokens=record.generated_tokens,
                cached_tokens=record.cached_tokens,
            ),
        )

    async def _read(self, request: pb.GenerateRequest, *, template: str) -> Asked:
        """Convert and check a request. Raises InvalidRequest."""
        if (length := len(request.request_id)) > MAX_REQUEST_ID:
            raise InvalidRequest(
                "request_id", f"expected at most {MAX_REQUEST_ID} characters, got {length}"
            )
        sampling = wire.sampling(request.sampling_params)
        field, prompt = wire.prompt(request)
        tokens = await self._prompts.tokens(field, prompt, template=template)
        limit = fit(len(tokens), sampling, max_context=self._engine.max_context, field=field)
        if max(sampling.stop_token_ids, default=0) >= self._vocabulary:
            raise InvalidRequest(
                "sampling_params.stop_token_ids",
                f"expected ids below {self._vocabulary}, got {max(sampling.stop_token_ids)}",
            )
        constraint = await asyncio.to_thread(self._grammars.constraint, sampling)
        name = request.request_id or secrets.token_hex(8)
        return Asked(name, tokens, template, sampling, constraint, limit)


def _template(version: Version | None) -> str:
    """Return an adapter's own chat template, "" if it has none."""
    description = None if version is None else version.description
    return "" if description is None else description.info.chat_template
