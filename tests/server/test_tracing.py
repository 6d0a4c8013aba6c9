"""A collector that speaks OTLP gets the spans of a real server process."""

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as otlp,
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2_grpc as otlp_rpc,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError
from spieldose_server.config import TENANT

from ..conftest import eventually
from .test_process import free_port, process

SHORT = pb.SamplingParams(max_tokens=6, temperature=0.5, seed=1)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FAULT = 2  # opentelemetry.proto.trace.v1.Status.STATUS_CODE_ERROR


class Collector(otlp_rpc.TraceServiceServicer):
    """Keep what is exported."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.resources.append(attributes(resource.resource))
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return otlp.ExportTraceServiceResponse()

    def requests(self) -> list[Span]:
        """Return the spans that stand for requests, in the order of their beginning."""
        found = [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def inside(self, parent: Span) -> list[Span]:
        """Return the spans inside another, in the order of their beginning."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(one) for one in value.array_value.values]
        return getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in holder.attributes}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Run a collector; yield it and its endpoint."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    otlp_rpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def asked(client: Client, request: pb.GenerateRequest, parent: str = "") -> None:
    metadata = [(TENANT, "red")] + ([("traceparent", parent)] if parent else [])
    for _ in client.inference.Generate(request, metadata=metadata):
        pass


@pytest.fixture
def adapters(tmp_path: Path, make_adapter: Callable[..., Any]) -> Path:
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    return tmp_path


def test_a_collector_gets_every_request(tiny_directory: Path, adapters: Path) -> None:
    http = f"127.0.0.1:{free_port()}"
    with collecting() as (collector, endpoint):
        options = ["--otlp-endpoint", endpoint, "--http-listen", http, "--log-format", "json"]
        with (
            process(tiny_directory, adapters, *options) as (server, address),
            Client(address) as client,
            openai.OpenAI(base_url=f"http://{http}/v1", api_key="none") as other,
        ):
            request = pb.GenerateRequest(
                adapter_id="a1", text="the secret", request_id="r1", sampling_params=SHORT
            )
            asked(client, request, f"00-{TRACE}-{PARENT}-01")
            several = pb.SamplingParams(max_tokens=3, n=2)
            client.answers([pb.ChatMessage(role="user", content="secret")], sampling=several)
            with pytest.raises(ClientError, match="NOT_FOUND"):
                client.generate("secret", adapter="nobody")
            other.chat.completions.create(
                model="a1",
                messages=[{"role": "user", "content": "secret"}],
                max_tokens=4,
                extra_headers={"traceparent": f"00-{TRACE[::-1]}-{PARENT}-01"},
            )
            server.send_signal(signal.SIGTERM)  # what was not sent yet is sent now
            assert server.wait(30) == 0
            assert server.stderr is not None
            logged = [json.loads(line) for line in server.stderr]
        first, second, third, fourth = collector.requests()

    assert first.trace_id.hex() == TRACE and first.parent_span_id.hex() == PARENT
    assert first.name.startswith("text_completion ")
    found = attributes(first)
    assert found["gen_ai.request.model"] == "a1"
    assert found["gen_ai.response.model"].startswith("a1@")
    assert found["gen_ai.usage.input_tokens"] == len("the secret")
    assert found["gen_ai.usage.output_tokens"] == 6
    assert found["gen_ai.request.max_tokens"] == 6
    assert found["gen_ai.request.temperature"] == 0.5
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["spieldose.request_id"] == "r1" and found["spieldose.tenant"] == "red"
    assert found["rpc.response.status_code"] == "OK" and "error.type" not in found
    queue, prefill, decode = collector.inside(first)
    assert (queue.name, prefill.name, decode.name) == ("queue", "prefill", "decode")
    assert [event.name for event in queue.events] == ["adapter resident"]
    moments = [
        first.start_time_unix_nano,
        queue.start_time_unix_nano,
        queue.events[0].time_unix_nano,
        queue.end_time_unix_nano,
        prefill.start_time_unix_nano,
        prefill.end_time_unix_nano,
        decode.start_time_unix_nano,
        decode.end_time_unix_nano,
        first.end_time_unix_nano,
    ]
    assert moments == sorted(moments)
    assert decode.start_time_unix_nano < decode.end_time_unix_nano

    assert second.name.startswith("chat ") and not second.parent_span_id
    assert attributes(second)["gen_ai.request.choice.count"] == 2
    children = [(span.name, attributes(span)["spieldose.answer"]) for span in collector.spans
                if span.parent_span_id == second.span_id]  # fmt: skip
    assert sorted(children) == [(k, i) for k in ("decode", "prefill", "queue") for i in (0, 1)]

    assert "gen_ai.response.finish_reasons" not in attributes(third)
    assert attributes(third)["error.type"] == "NOT_FOUND"
    assert third.status.code != FAULT and not collector.inside(third)
    assert "gen_ai.response.model" not in attributes(third)

    assert fourth.trace_id.hex() == TRACE[::-1] and fourth.parent_span_id.hex() == PARENT
    assert attributes(fourth)["spieldose.wire"] == "http"

    assert collector.resources[0]["service.name"] == "spieldose"
    assert not any(b"secret" in span.SerializeToString() for span in collector.spans)
    traces = {line["request_id"]: line["trace_id"] for line in logged if "request_id" in line}
    assert traces["r1"] == TRACE
    assert len(traces) == 4


def test_a_collector_that_is_not_there_harms_nothing(tiny_directory: Path, adapters: Path) -> None:
    options = ["--otlp-endpoint", f"http://127.0.0.1:{free_port()}"]
    with (
        process(tiny_directory, adapters, *options) as (server, address),
        Client(address) as client,
    ):
        for _ in range(3):
            assert client.generate("hello", adapter="a1", sampling=SHORT).adapter
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_a_share_is_traced_unless_the_caller_says(tiny_directory: Path, adapters: Path) -> None:
    with collecting() as (collector, endpoint):
        options = ["--otlp-endpoint", endpoint, "--trace-ratio", "0"]
        with (
            process(tiny_directory, adapters, *options) as (server, address),
            Client(address) as client,
        ):
            request = pb.GenerateRequest(text="hello", sampling_params=SHORT)
            asked(client, request)
            asked(client, request, f"00-{TRACE}-{PARENT}-01")
            asked(client, request, "00-nonsense")
            eventually(lambda: collector.requests())
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        assert [span.trace_id.hex() for span in collector.requests()] == [TRACE]
