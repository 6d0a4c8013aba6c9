"""A gRPC server that does as it is told, attempt by attempt, and counts them."""

from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc

Act = Callable[[Any], Iterator[str]]  # what a server does with a call: says texts, or aborts


class _Status(namedtuple("_Status", "code details trailing_metadata"), grpc.Status):
    """What ends a call."""


class FakeServer(rpc.InferenceServicer, rpc.AdaptersServicer):
    """Do the acts of a plan, one for each attempt; after the last one, answer."""

    def __init__(self) -> None:
        self.plan: list[Act] = []
        self.attempts: list[Any] = []  # the requests
        self.address = ""

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        for text in self._act(request)(context):
            yield pb.GenerateResponse(chunk=pb.Chunk(text=text))
        yield pb.GenerateResponse(complete=pb.Completion(finish_reason=pb.FINISH_REASON_STOP))

    def GetModelInfo(self, request: Any, context: Any) -> pb.ModelInfo:
        return pb.ModelInfo(model="".join(self._act(request)(context)))

    def Get(self, request: Any, context: Any) -> pb.Adapter:
        "".join(self._act(request)(context))
        return pb.Adapter(name=request.adapter_id)

    Load = Pin = Unpin = Get

    def Unload(self, request: Any, context: Any) -> pb.UnloadAdapterResponse:
        "".join(self._act(request)(context))
        return pb.UnloadAdapterResponse()

    def List(self, request: Any, context: Any) -> pb.ListAdaptersResponse:
        "".join(self._act(request)(context))
        return pb.ListAdaptersResponse()

    def Watch(self, request: Any, context: Any) -> Iterator[pb.AdapterEvent]:
        for text in self._act(request)(context):
            yield pb.AdapterEvent(adapter=pb.Adapter(name=text))

    def _act(self, request: Any) -> Act:
        self.attempts.append(request)
        return self.plan.pop(0) if self.plan else says("hello")


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
