"""The client of programs that run on an event loop."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.client.attempts import RETRIES, Attempts
from spieldose_server.client.channel import CALL_SECONDS, call_metadata, channel_options
from spieldose_server.client.errors import CLOSED, Cancelled, ClientError, translating
from spieldose_server.client.reply import Reply, replies
from spieldose_server.client.requests import Prompt, generate_request, message, tokenize_request
from spieldose_server.config import DEFAULT_ADDRESS

Answer = TypeVar("Answer")


class AsyncClient:
    """Talk to a Spieldose server from an event loop; every call raises ClientError.

    Cancelling a task cancels the call it waits for, on the server, too.

    >>> async with AsyncClient("127.0.0.1:50051") as client:
    ...     async for text in client.stream("Date: 3 May 1994\\nISO:", adapter="dates"):
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
        """Connect as `Client` does, for the running event loop. Raises RuntimeError without one."""
        asyncio.get_running_loop()
        self._metadata = call_metadata(tenant, token)
        self._timeout = timeout
        self._retries = retries
        self._closed = asyncio.Event()
        options = channel_options()
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self.inference = rpc.InferenceStub(self._channel)
        self._adapters = rpc.AdaptersStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that run end as Cancelled."""
        self._closed.set()
        await self._channel.close(None)  # no grace

    async def wait(self, seconds: float) -> None:
        """Wait until the server answers. Raises TimeoutError."""
        try:
            async with asyncio.timeout(seconds):
                await self._channel.channel_ready()
        except TimeoutError:
            raise TimeoutError(f"no server answered within {seconds:g} s") from None

    async def stream(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[str, None]:
        """Yield the answer as it comes; closing the generator (`aclosing`) cancels."""
        async with aclosing(self._responses(prompt, adapter, sampling, timeout)) as responses:
            async for response in responses:
                if response.chunk.text:
                    yield response.chunk.text

    async def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """Return the whole answer to a text, or to chat messages."""
        found = await self.answers(prompt, adapter=adapter, sampling=sampling, timeout=timeout)
        return found[0]

    async def answers(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> list[Reply]:
        """Return all `sampling.n` answers."""
        async with aclosing(self._responses(prompt, adapter, sampling, timeout)) as responses:
            return replies([response async for response in responses])

    async def tokenize(
        self, prompt: Prompt, *, adapter: str = "", timeout: float | None = None
    ) -> list[int]:
        """Return the tokens that an answer would be to."""
        request = tokenize_request(prompt, adapter)
        found = await self._call(self.inference.Tokenize, request, pb.TokenizeResponse, timeout)
        return list(found.token_ids)

    async def model(self, *, timeout: float | None = None) -> pb.ModelInfo:
        """Return what the server runs."""
        request = pb.GetModelInfoRequest()
        return await self._call(self.inference.GetModelInfo, request, pb.ModelInfo, timeout)

    async def adapters(self, *, timeout: float | None = None) -> list[pb.Adapter]:
        """Return every adapter version the server knows; `timeout` is for each page of 1000."""
        found: list[pb.Adapter] = []
        request = pb.ListAdaptersRequest()
        while True:
            page = await self._call(self._adapters.List, request, pb.ListAdaptersResponse, timeout)
            found.extend(page.adapters)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def adapter(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Return one adapter."""
        request = message(pb.GetAdapterRequest, adapter_id=name)
        return await self._call(self._adapters.Get, request, pb.Adapter, timeout)

    async def load(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Have the server take up NAME.safetensors now."""
        request = message(pb.LoadAdapterRequest, adapter_id=name)
        return await self._call(self._adapters.Load, request, pb.Adapter, timeout)

    async def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Have the server stop serving an adapter."""
        request = message(pb.UnloadAdapterRequest, adapter_id=name)
        await self._call(self._adapters.Unload, request, pb.UnloadAdapterResponse, timeout)

    async def pin(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Have the server bring an adapter to the device and keep it there."""
        request = message(pb.PinAdapterRequest, adapter_id=name)
        return await self._call(self._adapters.Pin, request, pb.Adapter, timeout)

    async def unpin(self, name: str, *, timeout: float | None = None) -> pb.Adapter:
        """Let the server evict an adapter again."""
        request = message(pb.UnpinAdapterRequest, adapter_id=name)
        return await self._call(self._adapters.Unpin, request, pb.Adapter, timeout)

    def watch(self, *, timeout: float | None = None) -> AsyncGenerator[pb.AdapterEvent, None]:
        """Yield every version's state, then changes, until it is closed."""
        return self._stream(self._adapters.Watch, pb.WatchAdaptersRequest(), timeout)

    def _responses(
        self,
        prompt: Prompt,
        adapter: str,
        sampling: pb.SamplingParams | None,
        timeout: float | None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        request = generate_request(prompt, adapter, sampling)
        return self._stream(self.inference.Generate, request, timeout)

    async def _call(
        self, method: Any, request: object, answer: type[Answer], timeout: float | None
    ) -> Answer:
        attempts = Attempts(self._retries, self._timeout if timeout is None else timeout)
        while True:
            try:
                self._check_open()
                with _translating():
                    call = method(request, timeout=attempts.timeout, metadata=self._metadata)
                    response = await call
            except ClientError as error:
                await self._sleep(attempts.wait(error))
            else:
                assert isinstance(response, answer)
                return response

    async def _stream(
        self, method: Any, request: object, timeout: float | None
    ) -> AsyncGenerator[Any, None]:
        """Yield a call's responses; it begins with the first that is asked for."""
        attempts, begun = Attempts(self._retries, timeout), False
        while True:
            self._check_open()
            call = method(request, timeout=attempts.timeout, metadata=self._metadata)
            try:
                with _translating():
                    async for response in call:
                        begun = True
                        yield response
                return
            except ClientError as error:
                if begun:
                    raise
                await self._sleep(attempts.wait(error))
            finally:
                call.cancel()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Cancelled(CLOSED)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
            raise Cancelled(CLOSED)


@contextmanager
def _translating() -> Iterator[None]:
    """Turn gRPC's errors into ours; what ends a call as its client closes looks cancelled."""
    try:
        with translating():
            yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Cancelled(CLOSED) from None
