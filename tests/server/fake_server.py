"""A gRPC server that does as it is told, attempt by attempt, and counts them."""

import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc

FOR_EVER = 1e9  # seconds; gRPC gives some calls without a deadline one of billions of years
Act = Callable[[Any], Iterator[str]]  # what a server does with a call: says texts, or aborts


class _Status(namedtuple("_Status", "code details trailing_metadata"), grpc.Status):
    """What ends a call."""


@dataclass(frozen=True)
class Attempt:
    """What a server was asked, and when."""

    request: Any
    moment: float  # seconds
    left: float | None  # seconds until its deadline, if it has one


class FakeServer(rpc.InferenceServicer, rpc.AdaptersServicer):
    """Do the acts of a plan, one for each attempt; after the last one, answer."""

    def __init__(self) -> None:
        self.plan: list[Act] = []
        self.attempts: list[Attempt] = []
        self.address = ""

    def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=map(ord, self._act(request, context)))

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        for text in self._act(request, context):
            yield pb.GenerateResponse(chunk=pb.Chunk(text=text))
        yield pb.GenerateResponse(complete=pb.Completion(finish_reason=pb.FINISH_REASON_STOP))

    def GetModelInfo(self, request: Any, context: Any) -> pb.ModelInfo:
        return pb.ModelInfo(model="".join(self._act(request, context)))

    def Get(self, request: Any, context: Any) -> pb.Adapter:
        "".join(self._act(request, context))
        return pb.Adapter(name=request.adapter_id)

    Load = Pin = Unpin = Get

    def Unload(self, request: Any, context: Any) -> pb.UnloadAdapterResponse:
        "".join(self._act(request, context))
        return pb.UnloadAdapterResponse()

    def List(self, request: Any, context: Any) -> pb.ListAdaptersResponse:
        "".join(self._act(request, context))
        return pb.ListAdaptersResponse()

    def Watch(self, request: Any, context: Any) -> Iterator[pb.AdapterEvent]:
        for text in self._act(request, context):
            yield pb.AdapterEvent(adapter=pb.Adapter(name=text))

    def _act(self, request: Any, context: Any) -> Iterator[str]:
        left = context.time_remaining()
        known = left is not None and left < FOR_EVER
        self.attempts.append(Attempt(request, time.monotonic(), left if known else None))
        act = self.plan.pop(0) if self.plan else says("h")
        return act(context)


def says(*texts: str) -> Act:
    """Say these texts."""
    return lambda context: iter(texts)


def fails(code: grpc.StatusCode, *said: str, **metadata: str | bytes) -> Act:
    """Say these texts, then fail with this trailing metadata; its keys' _ stand for -."""
    trailers = tuple((key.replace("_", "-"), value) for key, value in metadata.items())

    def act(context: Any) -> Iterator[str]:
        yield from said
        context.abort_with_status(_Status(code, "as planned", trailers))

    return act


def hangs(context: Any) -> Iterator[str]:
    """Say nothing until the call is over."""
    over = threading.Event()
    if context.add_callback(over.set):  # which is refused, and never called, if it is over already
        over.wait(60)
    yield from ()


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Run a fake server on a port of its own."""
    fake = FakeServer()
    server = grpc.server(ThreadPoolExecutor(8))
    rpc.add_InferenceServicer_to_server(fake, server)
    rpc.add_AdaptersServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield fake
    finally:
        server.stop(None).wait()
