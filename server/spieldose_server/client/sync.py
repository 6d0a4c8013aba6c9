"""The client of programs that wait for an answer in the thread that asked."""

import threading
from collections.abc import Generator
from contextlib import closing
from typing import Any, Self, TypeVar

import grpc

from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.client.attempts import RETRIES, Attempts
from spieldose_server.client.channel import CALL_SECONDS, call_metadata, channel_options
from spieldose_server.client.errors import CLOSED, Cancelled, ClientError, translating
from spieldose_server.client.reply import Reply, replies
from spieldose_server.client.requests import Prompt, generate_request, message, tokenize_request
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
        timeout: float | None = CALL_SECONDS,
        retries: int = RETRIES,
    ) -> None:
        """Connect, by TLS if there are credentials (`grpc.ssl_channel_credentials`).

        A token proves who asks; `tenant` just says so to a server without tokens. `timeout` is in
        seconds, for calls that set none of their own; those that make text or watch have none
        otherwise. A server that is away or full is asked again, `retries` times at most, as long as
        nothing of the answer is there and the timeout allows for it.
        """
        self._metadata = call_metadata(tenant, token)
        self._timeout = timeout
        self._retries = retries
        self._closed = threading.Event()
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that run end as Cancelled."""
        self._closed.set()
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

    def tokenize(
        self, prompt: Prompt, *, adapter: str = "", timeout: float | None = None
    ) -> list[int]:
        """Return the tokens that an answer would be to."""
        request = tokenize_request(prompt, adapter)
        found = self._call(self.inference.Tokenize, request, pb.TokenizeResponse, timeout)
        return list(found.token_ids)

    def model(self, *, timeout: float | None = None) -> pb.ModelInfo:
        """Return what the server runs."""
        request = pb.GetModelInfoRequest()
        return self._call(self.inference.GetModelInfo, request, pb.ModelInfo, timeout)

    def adapters(self, *, timeout: float | None = None) -> list[pb.Adapter]:
        """Return every adapter version the server knows; `timeout` is for each page of 1000."""
        found: list[pb.Adapter] = []
        request = pb.ListAdaptersRequest()
        while True:
            page = self._call(self._adapters.List, request, pb.ListAdaptersResponse, timeout)
            found.extend(page.adapters)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def adapter(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Return one adapter."""
        request = message(pb.GetAdapterRequest, adapter_id=name)
        return self._call(self._adapters.Get, request, pb.Adapter, timeout)

    def load(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Have the server take up NAME.safetensors now."""
        request = message(pb.LoadAdapterRequest, adapter_id=name)
        return self._call(self._adapters.Load, request, pb.Adapter, timeout)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Have the server stop serving an adapter."""
        request = message(pb.UnloadAdapterRequest, adapter_id=name)
        self._call(self._adapters.Unload, request, pb.UnloadAdapterResponse, timeout)

    def pin(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Have the server bring an adapter to the device and keep it there."""
        request = message(pb.PinAdapterRequest, adapter_id=name)
        return self._call(self._adapters.Pin, request, pb.Adapter, timeout)

    def unpin(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Let the server evict an adapter again."""
        request = message(pb.UnpinAdapterRequest, adapter_id=name)
        return self._call(self._adapters.Unpin, request, pb.Adapter, timeout)

    def watch(self, *, timeout: float | None = None) -> Generator[pb.AdapterEvent, None, None]:
        """Yield every version's state, then changes, until it is closed."""
        return self._stream(self._adapters.Watch, pb.WatchAdaptersRequest(), timeout)

    def _responses(
        self,
        prompt: Prompt,
        adapter: str,
        sampling: pb.SamplingParams | None,
        timeout: float | None,
    ) -> Generator[pb.GenerateResponse, None, None]:
        request = generate_request(prompt, adapter, sampling)
        return self._stream(self.inference.Generate, request, timeout)

    def _call(
        self, method: Any, request: object, answer: type[Answer], timeout: float | None = None
    ) -> Answer:
        attempts = Attempts(self._retries, self._timeout if timeout is None else timeout)
        while True:
            try:
                self._check_open()
                with translating():
                    response = method(request, timeout=attempts.timeout, metadata=self._metadata)
            except ClientError as error:
                self._sleep(attempts.wait(error))
            else:
                assert isinstance(response, answer)
                return response

    def _stream(
        self, method: Any, request: object, timeout: float | None
    ) -> Generator[Any, None, None]:
        """Yield a call's responses; it begins with the first that is asked for."""
        attempts, begun = Attempts(self._retries, timeout), False
        while True:
            self._check_open()
            call = method(request, timeout=attempts.timeout, metadata=self._metadata)
            try:
                with translating():
                    for response in call:
                        begun = True
                        yield response
                return
            except ClientError as error:
                if begun:
                    raise
                self._sleep(attempts.wait(error))
            finally:
                call.cancel()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Cancelled(CLOSED)

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise Cancelled(CLOSED)
