"""The gRPC services. Wire types stop here: behind this file are the server's own."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from jinja2.exceptions import TemplateError

from spieldose_kernels.base import Base
from spieldose_kernels.errors import SpieldoseError
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.admission import Admission, Tenant, Turn
from spieldose_server.config import TENANT, ServerConfig
from spieldose_server.directory import AdapterDirectory
from spieldose_server.engine import Engine
from spieldose_server.errors import Busy, InvalidRequest, ServerError
from spieldose_server.merged import merged
from spieldose_server.request import (
    MAX_ANSWERS,
    ROLES,
    GenerationRequest,
    Message,
    Prompt,
    SamplingParams,
    fit,
)
from spieldose_server.sampling import TokenLogprob
from spieldose_server.store import AdapterStore, Lease
from spieldose_server.text import TextStream
from spieldose_server.versions import State, Version

log = logging.getLogger(__name__)

MAX_TENANT = 128  # characters

Context = grpc.aio.ServicerContext[Any, Any]

STATES = {
    State.FOUND: pb.ADAPTER_STATE_FOUND,
    State.VALIDATING: pb.ADAPTER_STATE_VALIDATING,
    State.ON_HOST: pb.ADAPTER_STATE_ON_HOST,
    State.LOADING: pb.ADAPTER_STATE_LOADING,
    State.RESIDENT: pb.ADAPTER_STATE_RESIDENT,
    State.DRAINING: pb.ADAPTER_STATE_DRAINING,
    State.REJECTED: pb.ADAPTER_STATE_REJECTED,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold what a request asks for."""

    id: str  # for people; the client's own need not be unique
    tokens: list[int]
    sampling: SamplingParams
    max_tokens: int


class InferenceService(rpc.InferenceServicer):
    """Generate text with any adapter."""

    def __init__(
        self,
        base: Base,
        engine: Engine,
        store: AdapterStore,
        admission: Admission,
        config: ServerConfig,
    ) -> None:
        self._base = base
        self._engine = engine
        self._store = store
        self._admission = admission
        self._config = config

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream chunks, then one completion."""
        async with _answering(context):
            with self._admission.accept(_tenant(context)) as tenant, ExitStack() as stack:
                count = max(1, min(request.sampling_params.n, MAX_ANSWERS))
                leases = [
                    stack.enter_context(self._store.lease(request.adapter_id)) for _ in range(count)
                ]
                asked = await self._read(request)
                answers = [
                    self._answer(tenant, lease, asked, index) for index, lease in enumerate(leases)
                ]
                async with aclosing(merged(answers)) as responses:
                    async for response in responses:
                        yield response

    async def _answer(
        self, tenant: Tenant, lease: Lease | None, asked: Asked, index: int
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Wait for a turn; yield an answer's chunks as its tokens come, then its completion."""
        began = time.perf_counter()
        async with self._admission.turn(tenant, lease, tokens=len(asked.tokens)) as turn:
            generation = GenerationRequest(
                id=secrets.token_hex(8),
                tokens=asked.tokens,
                slot=None if turn.version is None else turn.version.slot,
                plays=b"" if turn.version is None else turn.version.digest.encode(),
                sampling=asked.sampling.of_answer(index),
                max_tokens=asked.max_tokens,
            )
            async with aclosing(self._play(generation, turn)) as responses:
                async for response in responses:
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
                logprobs = map(_logprob, tokens.logprobs[: len(taken)])
                chunk = pb.Chunk(text=piece, token_ids=taken, logprobs=logprobs)
                yield pb.GenerateResponse(chunk=chunk)
                if text.stopped:
                    break
        yield pb.GenerateResponse(
            complete=_completion(generation, turn.version, count=count, ended=ended)
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the tokens Generate would see."""
        async with _answering(context):
            field, prompt = _prompt(request)
            return pb.TokenizeResponse(token_ids=await self._tokenise(field, prompt))
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

    async def _read(self, request: pb.GenerateRequest) -> Asked:
        """Convert and check a request. Raises InvalidRequest."""
        sampling = _sampling(request.sampling_params)
        field, prompt = _prompt(request)
        tokens = await self._tokenise(field, prompt)
        limit = fit(len(tokens), sampling, max_context=self._engine.max_context, field=field)
        if max(sampling.stop_token_ids, default=0) >= self._vocabulary:
            raise InvalidRequest(
                "sampling_params.stop_token_ids",
                f"expected ids below {self._vocabulary}, got {max(sampling.stop_token_ids)}",
            )
        return Asked(request.request_id or secrets.token_hex(8), tokens, sampling, limit)

    @property
    def _vocabulary(self) -> int:
        table: Any = self._base.model.get_input_embeddings()
        return int(table.num_embeddings)

    async def _tokenise(self, field: str, prompt: Prompt) -> list[int]:
        tokenizer = self._base.tokenizer
        if isinstance(prompt, str):
            self._check_size(field, prompt)
            encoded = await asyncio.to_thread(tokenizer, prompt)
            return list(encoded["input_ids"])
        if not prompt:
            raise InvalidRequest(field, "expected at least one entry, got none")
        if isinstance(prompt[0], Message):
            return await self._apply_template(field, [m for m in prompt if isinstance(m, Message)])
        tokens = [token for token in prompt if isinstance(token, int)]
        if max(tokens) >= self._vocabulary:
            raise InvalidRequest(field, f"expected ids below {self._vocabulary}, got {max(tokens)}")
        return tokens

    async def _apply_template(self, field: str, messages: list[Message]) -> list[int]:
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequest(
                    field, f"expected a role of {', '.join(ROLES)}, got {message.role!r}"
                )
        self._check_size(field, "".join(message.content for message in messages))
        if self._base.tokenizer.chat_template is None:
            raise InvalidRequest(
                field, "expected text or token_ids: the model has no chat template"
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return list(
                await asyncio.to_thread(
                    self._base.tokenizer.apply_chat_template,
                    turns,
                    add_generation_prompt=True,
                    return_dict=False,
                )
            )
        except TemplateError as error:
            raise InvalidRequest(field, f"the chat template refuses it: {error}") from error

    def _check_size(self, field: str, text: str) -> None:
        size, limit = len(text.encode()), self._config.max_prompt_bytes
        if size > limit:
            raise InvalidRequest(field, f"expected at most {limit} bytes, got {size}")


class AdaptersService(rpc.AdaptersServicer):
    """Show, load and unload adapters."""

    def __init__(self, store: AdapterStore, directory: AdapterDirectory) -> None:
        self._store = store
        self._directory = directory

    async def List(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """Return every version the server knows."""
        return pb.ListAdaptersResponse(adapters=map(_adapter, self._store.list()))

    async def Get(self, request: pb.GetAdapterRequest, context: Context) -> pb.Adapter:
        """Return one adapter."""
        async with _answering(context):
            return _adapter(self._store.get(request.adapter_id))
        raise AssertionError("aborted")

    async def Load(self, request: pb.LoadAdapterRequest, context: Context) -> pb.Adapter:
        """Take up an adapter's file now."""
        async with _answering(context):
            await self._directory.load(request.adapter_id)
            return _adapter(self._store.newest(request.adapter_id))
        raise AssertionError("aborted")

    async def Unload(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Stop serving an adapter."""
        async with _answering(context):
            await self._directory.unload(request.adapter_id)
            return pb.UnloadAdapterResponse()
        raise AssertionError("aborted")

    async def Watch(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.AdapterEvent]:
        """Stream every version's state, then what changes."""
        with self._store.watching() as watcher:
            async for version, gone in watcher:
                yield pb.AdapterEvent(adapter=_adapter(version), gone=gone)

    async def Pin(self, request: pb.PinAdapterRequest, context: Context) -> pb.Adapter:
        """Bring an adapter to the device and keep it there."""
        async with _answering(context):
            with self._store.lease(_named(request.adapter_id)) as lease:
                assert lease is not None
                version = await lease.ready()
                self._store.pin(version.name, pinned=True)
            return _adapter(version)
        raise AssertionError("aborted")

    async def Unpin(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.Adapter:
        """Let an adapter be evicted again."""
        async with _answering(context):
            version = self._store.get(_named(request.adapter_id))
            self._store.pin(version.name, pinned=False)
            return _adapter(version)
        raise AssertionError("aborted")


@asynccontextmanager
async def _answering(context: Context) -> AsyncIterator[None]:
    """Turn our errors into gRPC statuses; any other is logged, and its text stays inside."""
    try:
        yield
    except SpieldoseError as error:
        code = error.code if isinstance(error, ServerError) else grpc.StatusCode.INTERNAL
        await context.abort(code, str(error), trailing_metadata=_details(error, code))
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("unexpected error")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")


def _details(error: SpieldoseError, code: grpc.StatusCode) -> tuple[tuple[str, bytes], ...]:
    """Return google.rpc details as trailing metadata, as clients of rich errors expect them."""
    detail = any_pb2.Any()
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.problem
        )
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, Busy):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * error.retry))
        detail.Pack(retry)
    else:
        return ()
    status = status_pb2.Status(code=code.value[0], message=str(error), details=[detail])
    return (("grpc-status-details-bin", status.SerializeToString()),)


def _tenant(context: Context) -> str:
    """Return who asks, from the call's metadata; "" is a tenant too. Raises InvalidRequest."""
    given = [value for key, value in context.invocation_metadata() or () if key == TENANT]
    name = str(given[0]) if given else ""
    if len(name) > MAX_TENANT:
        raise InvalidRequest(TENANT, f"expected at most {MAX_TENANT} characters, got {len(name)}")
    return name


def _named(adapter_id: str) -> str:
    """Return an adapter's name, which the base has none of. Raises InvalidRequest."""
    if not adapter_id:
        raise InvalidRequest("adapter_id", "expected an adapter's name, got none")
    return adapter_id


def _sampling(message: pb.SamplingParams) -> SamplingParams:
    given = {field.name: value for field, value in message.ListFields()}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    return SamplingParams(**given)


def _logprob(found: TokenLogprob) -> pb.TokenLogprob:
    likeliest = [pb.Likely(token_id=token, logprob=value) for token, value in found.likeliest]
    return pb.TokenLogprob(logprob=found.logprob, likeliest=likeliest)


def _prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> tuple[str, Prompt]:
    """Return the prompt and the name of its field. Raises InvalidRequest."""
    match field := request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise InvalidRequest(field, "expected a prompt, got an empty one")
            return field, request.text
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            return field, list(request.token_ids.ids)
        case "messages":
            return field, [Message(m.role, m.content) for m in request.messages.messages]
    raise InvalidRequest("prompt", "expected one of text, token_ids or messages, got none")


def _completion(
    request: GenerationRequest, version: Version | None, *, count: int, ended: bool
) -> pb.Completion:
    played = (
        None if version is None else pb.AdapterVersion(name=version.name, digest=version.digest)
    )
    return pb.Completion(
        finish_reason=pb.FINISH_REASON_STOP if ended else pb.FINISH_REASON_LENGTH,
        prompt_tokens=len(request.tokens),
        completion_tokens=count,
        adapter=played,
    )


def _adapter(version: Version) -> pb.Adapter:
    description = version.description
    info = description.info if description else None
    return pb.Adapter(
        name=version.name,
        digest=version.digest,
        state=STATES[version.state],
        reason=version.reason,
        method=info.method if info else "",
        description=info.description if info else "",
        density=info.density if info else 0.0,
        nnz=description.nnz if description else 0,
        memory_bytes=version.nbytes,
        running=version.leases,
        pinned=version.pinned,
    )
