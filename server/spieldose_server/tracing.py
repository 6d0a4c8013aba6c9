"""OpenTelemetry traces: a span for each request, with one for each thing it waited for.

Spans are made when the request has ended, from the times noted meanwhile, and sent by a thread of
their own: no token waits for it. Names follow OpenTelemetry's conventions for generative
AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/); prompts and answers are not
recorded. Certificates and headers of the collector come from OTEL_EXPORTER_OTLP_* as usual.
"""

import logging
import os
import threading
import time
from importlib.metadata import version
from typing import Any, Self

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from spieldose_server.config import ServerConfig
from spieldose_server.observed import Answer, Observed
from spieldose_server.request_log import MAX_SHOWN

log = logging.getLogger(__name__)

EXPORT_SECONDS = 5.0  # that a collector has to take a batch
FLUSH_SECONDS = 5.0  # that the last spans have to leave before the process does
PARENT = TraceContextTextMapPropagator()  # W3C's traceparent, in metadata or headers
# As OpenTelemetry's conventions for RPC have it, the rest are the client's own faults.
FAULTS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Tracing:
    """Make spans of requests and send them to a collector."""

    def __init__(self, endpoint: str, *, ratio: float, base: str) -> None:
        """Send to an OTLP collector; `ratio` of requests are traced unless their caller says."""
        name = os.environ.get("OTEL_SERVICE_NAME", "spieldose")
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: version("spieldose")})
        self._base = base
        self._exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=resource,
            shutdown_on_exit=False,  # close() has a limit
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("spieldose_server", version("spieldose"))

    @classmethod
    def of(cls, config: ServerConfig, *, base: str) -> Self | None:
        """Return what a configuration asks for, if it asks for traces."""
        if not config.otlp_endpoint:
            return None
        return cls(config.otlp_endpoint, ratio=config.trace_ratio, base=base)

    def trace(self, observed: Observed) -> None:
        """Make a request's spans, and tell it the trace's id."""
        since = time.time_ns() - time.perf_counter_ns()
        operation = _operation(observed)
        span = self._tracer.start_span(
            f"{operation} {self._base}",
            PARENT.extract(observed.carrier),
            SpanKind.SERVER,
            self._attributes(operation, observed),
            start_time=since + observed.arrived,
        )
        observed.trace_id = format_trace_id(span.get_span_context().trace_id)
        if not span.is_recording():
            return
        inside = set_span_in_context(span)
        for index, answer in sorted(observed.answers.items()):
            self._answer(inside, index, answer, observed, since)
        if observed.code in FAULTS:
            span.set_status(StatusCode.ERROR, observed.code.name)
        span.end(since + observed.ended)

    def close(self) -> None:
        """Send what is left; a collector that does not answer delays this by a few seconds."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)
        if last.is_alive():
            log.warning("the last traces were not taken within %g s", FLUSH_SECONDS)
            self._exporter.shutdown()

    def _answer(
        self, inside: Context, index: int, answer: Answer, observed: Observed, since: int
    ) -> None:
        """Make the spans of what an answer waited for: its place, its first token, its last."""

        def child(name: str, start: int, end: int, *, resident: int = 0) -> None:
            number = {"spieldose.answer": index}
            span = self._tracer.start_span(
                name, inside, attributes=number, start_time=since + start
            )
            if resident:
                span.add_event("adapter resident", timestamp=since + resident)
            span.end(since + end)

        resident = answer.ready if observed.version else 0
        child("queue", observed.arrived, answer.began, resident=resident)
        child("prefill", answer.began, answer.first or observed.ended)
        if answer.first:
            child("decode", answer.first, answer.last)

    def _attributes(self, operation: str, observed: Observed) -> dict[str, Any]:
        answers = [answer for _, answer in sorted(observed.answers.items())]
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "spieldose",
            "gen_ai.usage.input_tokens": max((a.prompt_tokens for a in answers), default=0),
            "gen_ai.usage.output_tokens": sum(answer.tokens for answer in answers),
            "rpc.response.status_code": observed.code.name,
            "spieldose.request_id": observed.request_id[:MAX_SHOWN],
            "spieldose.tenant": observed.tenant,
            "spieldose.wire": observed.wire,
        }
        if finished := [answer.finish for answer in answers if answer.finish]:
            found["gen_ai.response.finish_reasons"] = finished
        if observed.resolved:
            found["gen_ai.response.model"] = str(observed.version or self._base)
        if (question := observed.question) is not None:
            found["gen_ai.request.model"] = question.adapter_id[:MAX_SHOWN] or self._base
            sampling = question.sampling
            found |= {
                "gen_ai.request.choice.count": sampling.n,
                "gen_ai.request.temperature": sampling.temperature,
            }
            if sampling.max_tokens is not None:
                found["gen_ai.request.max_tokens"] = sampling.max_tokens
        if observed.code is not grpc.StatusCode.OK:
            found["error.type"] = observed.code.name
        return found


def _operation(observed: Observed) -> str:
    """Return what OpenTelemetry calls an operation of this kind."""
    return "chat" if observed.question and observed.question.is_chat else "text_completion"
