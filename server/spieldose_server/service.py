"""The gRPC service that generates. Wire types stop here: behind this file are the server's own."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from spieldose_kernels.base import Base
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server import wire
from spieldose_server.authenticate import WIRE
from spieldose_server.engine import Engine
from spieldose_server.generation import Generation
from spieldose_server.observer import Observer
from spieldose_server.statuses import Context, answering


class InferenceService(rpc.InferenceServicer):
    """Generate text with any adapter."""

    def __init__(
        self, base: Base, engine: Engine, generation: Generation, observer: Observer
    ) -> None:
        self._base = base
        self._engine = engine
        self._generation = generation
        self._observer = observer

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream chunks, then one completion."""
        async with answering(context):
            carrier = {key: str(value) for key, value in context.invocation_metadata() or ()}
            left = context.time_remaining()
            with self._observer.request(
                WIRE, request.request_id, carrier, seconds=left
            ) as observed:
                question = wire.question(request, max_tokens=self._generation.max_prompt)
                async with aclosing(self._generation.answers(question, observed)) as events:
                    async for event in events:
                        yield wire.response(question.id, event)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the tokens Generate would see."""
        async with answering(context):
            field, prompt = wire.prompt(request, max_tokens=self._generation.max_prompt)
            tokens = await self._generation.tokens(request.adapter_id, field, prompt)
            return pb.TokenizeResponse(token_ids=tokens)
        raise AssertionError("aborted")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        """Describe the base and what the engine has done."""
        record = self._engine.record
        return pb.ModelInfo(
            model=self._base.spec.name,
            fingerprint=self._base.spec.fingerprint,
            max_context=self._engine.max_context,
            vocabulary=self._generation.vocabulary,
            has_chat_template=self._base.tokenizer.chat_template is not None,
            engine=pb.EngineRecord(
                steps=record.steps,
                max_adapters_in_step=record.max_adapters,
                max_requests_in_step=record.max_requests,
                generated_tokens=record.generated_tokens,
                cached_tokens=record.cached_tokens,
            ),
        )
