"""The client of programs that wait for an answer in the thread that asked."""

from collections.abc import Generator
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.client.channel import call_metadata, channel_options
from spieldose_server.client.errors import translating
from spieldose_server.client.reply import Reply, replies
from spieldose_server.client.requests import Prompt, generate_request, tokenize_request
from spieldose_server.config import DEFAULT_ADDRESS

Answer = TypeVar("Answer")


class Client:
    """Talk to a Spieldose server; every call raises ClientError. Threads may share a client.

    >>> with Client("127.0.0.1:50051") as client:
    ...     for text in client.stream("Date: 3 May 1994\\nISO:", adapter="dates"):
    ...         print(text, end="")
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tenant: str = "",
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Connect, by TLS if there are credentials (`grpc.ssl_channel_credentials`).

        A token proves who asks; `tenant` just says so to a server without tokens.
        """
        self._metadata = call_metadata(tenant, token)
        options = channel_options()
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self.inference = rpc.InferenceStub(self._channel)
        self._adapters = rpc.AdaptersStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that run end as Cancelled."""
        self._channel.close()

    def wait(self, seconds: float) -> None:
        """Wait until the server answers. Raises TimeoutError."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise TimeoutError(f"no server answered within {seconds:g} s") from None

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer as it comes; closing the generator cancels."""
        with closing(self._responses(prompt, adapter, sampling, timeout)) as responses:
            for response in responses:
                if response.chunk.text:
                    yield response.chunk.text

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """Return the whole answer to a text, or to chat messages."""
        return self.answers(prompt, adapter=adapter, sampling=sampling, timeout=timeout)[0]

    def answers(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> list[Reply]:
        """Return all `sampling.n` answers."""
        return replies(self._responses(prompt, adapter, sampling, timeout))

    def tokenize(self, prompt: Prompt, *, adapter: str = "") -> list[int]:
        """Return the tokens that an answer would be to."""
        request = tokenize_request(prompt, adapter)
        found = self._call(self.inference.Tokenize, request, pb.TokenizeResponse)
        return list(found.token_ids)

    def model(self) -> pb.ModelInfo:
        """Return what the server runs."""
        return self._call(self.inference.GetModelInfo, pb.GetModelInfoRequest(), pb.ModelInfo)

    def adapters(self) -> list[pb.Adapter]:
        """Return every adapter version the server knows."""
        found: list[pb.Adapter] = []
        request = pb.ListAdaptersRequest()
        while True:
            page = self._call(self._adapters.List, request, pb.ListAdaptersResponse)
            found.extend(page.adapters)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def adapter(self, name: str) -> pb.Adapter:
        """Return one adapter."""
        return self._call(self._adapters.Get, pb.GetAdapterRequest(adapter_id=name), pb.Adapter)

    def load(self, name: str) -> pb.Adapter:
        """Have the server take up NAME.safetensors now."""
        return self._call(self._adapters.Load, pb.LoadAdapterRequest(adapter_id=name), pb.Adapter)

    def unload(self, name: str) -> None:
        """Have the server stop serving an adapter."""
        request = pb.UnloadAdapterRequest(adapter_id=name)
        self._call(self._adapters.Unload, request, pb.UnloadAdapterResponse)

    def pin(self, name: str) -> pb.Adapter:
        """Have the server bring an adapter to the device and keep it there."""
        return self._call(self._adapters.Pin, pb.PinAdapterRequest(adapter_id=name), pb.Adapter)

    def unpin(self, name: str) -> pb.Adapter:
        """Let the server evict an adapter again."""
        return self._call(self._adapters.Unpin, pb.UnpinAdapterRequest(adapter_id=name), pb.Adapter)

    def watch(self) -> Generator[pb.AdapterEvent, None, None]:
        """Yield every version's state, then changes, until it is closed."""
        return self._stream(self._adapters.Watch, pb.WatchAdaptersRequest())

    def _responses(
        self,
        prompt: Prompt,
        adapter: str,
        sampling: pb.SamplingParams | None,
        timeout: float | None,
    ) -> Generator[pb.GenerateResponse, None, None]:
        request = generate_request(prompt, adapter, sampling)
        return self._stream(self.inference.Generate, request, timeout)

    def _call(self, method: Any, request: object, answer: type[Answer]) -> Answer:
        with translating():
            response = method(request, metadata=self._metadata)
        assert isinstance(response, answer)
        return response

    def _stream(
        self, method: Any, request: object, timeout: float | None = None
    ) -> Generator[Any, None, None]:
        """Yield a call's responses; it begins with the first that is asked for."""
        call = method(request, timeout=timeout, metadata=self._metadata)
        try:
            with translating():
                yield from call
        finally:
            call.cancel()
