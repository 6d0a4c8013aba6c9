"""A client for Python programs; the command line uses it too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from spieldose_kernels.errors import SpieldoseError
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.config import DEFAULT_ADDRESS, MESSAGE_BYTES, TENANT

Answer = TypeVar("Answer")


class ClientError(SpieldoseError):
    """The server refused or could not be reached; `code` is the gRPC status."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        super().__init__(f"{self.code.name}: {error.details()}")


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold a whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]  # one for each, if asked for
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    adapter: str  # name@digest of the version that played, empty for the base


class Client:
    """Talk to a Spieldose server.

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
        self._metadata = ((TENANT, tenant), *_bearer(token))
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
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
        """Close the connection."""
        self._channel.close()

    def wait(self, seconds: float) -> None:
        """Wait until the server answers. Raises TimeoutError."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise TimeoutError(f"no server answered within {seconds:g} s") from None

    def stream(
        self,
        prompt: str | Sequence[pb.ChatMessage],
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> Iterator[str]:
        """Yield the answer as it comes; closing the iterator cancels. Raises ClientError."""
        for response in self._responses(prompt, adapter, sampling, timeout):
            if response.chunk.text:
                yield response.chunk.text

    def generate(
        self,
        prompt: str | Sequence[pb.ChatMessage],
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """Return the whole answer to a text, or to chat messages. Raises ClientError."""
        return self.answers(prompt, adapter=adapter, sampling=sampling, timeout=timeout)[0]

    def answers(
        self,
        prompt: str | Sequence[pb.ChatMessage],
        *,
        adapter: str = "",
        sampling: pb.SamplingParams | None = None,
        timeout: float | None = None,
    ) -> list[Reply]:
        """Return all `sampling.n` answers. Raises ClientError."""
        parts: dict[int, list[pb.GenerateResponse]] = {}
        for response in self._responses(prompt, adapter, sampling, timeout):
            parts.setdefault(response.index, []).append(response)
        return [_reply(parts[index]) for index in sorted(parts)]

    def model(self) -> pb.ModelInfo:
        """Return what the server runs. Raises ClientError."""
        return self._call(self.inference.GetModelInfo, pb.GetModelInfoRequest(), pb.ModelInfo)

    def adapters(self) -> list[pb.Adapter]:
        """Return every adapter version the server knows. Raises ClientError."""
        found: list[pb.Adapter] = []
        request = pb.ListAdaptersRequest()
        while True:
            page = self._call(self._adapters.List, request, pb.ListAdaptersResponse)
            found.extend(page.adapters)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def adapter(self, name: str) -> pb.Adapter:
        """Return one adapter. Raises ClientError."""
        return self._call(self._adapters.Get, pb.GetAdapterRequest(adapter_id=name), pb.Adapter)

    def load(self, name: str) -> pb.Adapter:
        """Have the server take up NAME.safetensors now. Raises ClientError."""
        return self._call(self._adapters.Load, pb.LoadAdapterRequest(adapter_id=name), pb.Adapter)

    def unload(self, name: str) -> None:
        """Have the server stop serving an adapter. Raises ClientError."""
        self._call(
            self._adapters.Unload,
            pb.UnloadAdapterRequest(adapter_id=name),
            pb.UnloadAdapterResponse,
        )

    def pin(self, name: str) -> pb.Adapter:
        """Have the server bring an adapter to the device and keep it there. Raises ClientError."""
        return self._call(self._adapters.Pin, pb.PinAdapterRequest(adapter_id=name), pb.Adapter)

    def unpin(self, name: str) -> pb.Adapter:
        """Let the server evict an adapter again. Raises ClientError."""
        return self._call(self._adapters.Unpin, pb.UnpinAdapterRequest(adapter_id=name), pb.Adapter)

    def watch(self) -> Iterator[pb.AdapterEvent]:
        """Yield every version's state, then changes, until it is closed. Raises ClientError."""
        return _streaming(self._adapters.Watch(pb.WatchAdaptersRequest(), metadata=self._metadata))

    def _call(self, method: Any, request: object, answer: type[Answer]) -> Answer:
        try:
            response = method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise ClientError(error) from None
        assert isinstance(response, answer)
        return response

    def _responses(
        self,
        prompt: str | Sequence[pb.ChatMessage],
        adapter: str,
        sampling: pb.SamplingParams | None,
        timeout: float | None,
    ) -> Iterator[pb.GenerateResponse]:
        request = pb.GenerateRequest(adapter_id=adapter, sampling_params=sampling)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.messages.messages.extend(prompt)
        return _streaming(
            self.inference.Generate(request, timeout=timeout, metadata=self._metadata)
        )


def _reply(responses: Sequence[pb.GenerateResponse]) -> Reply:
    complete = responses[-1].complete
    played = complete.adapter
    return Reply(
        text="".join(response.chunk.text for response in responses),
        token_ids=tuple(token for r in responses for token in r.chunk.token_ids),
        logprobs=tuple(found for r in responses for found in r.chunk.logprobs),
        finish_reason=pb.FinishReason.Name(complete.finish_reason).rpartition("_")[2].lower(),
        prompt_tokens=complete.prompt_tokens,
        adapter=f"{played.name}@{played.digest}" if played.name else "",
    )


def _streaming(call: Any) -> Iterator[Any]:
    try:
        yield from call
    except grpc.RpcError as error:
        raise ClientError(error) from None
    finally:
        call.cancel()


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()
