"""The course of one request, told as it happens: to metrics at once, as a whole at its end."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from spieldose_server.access import CALLER
from spieldose_server.errors import ServerError
from spieldose_server.metrics import NONE, Metrics
from spieldose_server.request import Question
from spieldose_server.versions import Version

# What ends a request whose client is gone.
GONE = (asyncio.CancelledError, GeneratorExit, ConnectionError)


@dataclass(slots=True)
class Answer:
    """Hold one answer's course; times are `time.perf_counter_ns`, 0 means not yet."""

    ready: int  # its adapter was on the device
    began: int  # it had a place in the engine
    prompt_tokens: int
    first: int = 0  # token
    last: int = 0
    tokens: int = 0
    finish: str = ""  # stop or length, as clients call it; empty: not complete


class Observed:
    """Follow one request; leaving it as a context ends it, once."""

    def __init__(
        self,
        wire: str,
        metrics: Metrics,
        ended: Callable[["Observed"], None],
        *,
        request_id: str,
        carrier: Mapping[str, str],
        seconds: float | None,
    ) -> None:
        """Begin; `carrier` may say whose trace it is part of, `seconds` how long it may take."""
        self.wire = wire
        self.request_id = request_id
        self.carrier = carrier
        self.tenant = CALLER.get().tenant
        self.arrived = time.perf_counter_ns()
        self.ended = 0
        self.question: Question | None = None  # None: it could not be understood
        self.resolved = False  # what it plays is known, and allowed
        self.version: Version | None = None  # that plays once resolved; None: the base
        self.label = NONE
        self.answers: dict[int, Answer] = {}
        self.code = grpc.StatusCode.OK
        self.error = ""
        self.trace_id = ""
        self._metrics = metrics
        self._tell = ended
        self._expires = None if seconds is None else self.arrived + round(seconds * 1e9)

    def asks(self, question: Question) -> None:
        """Say what is asked."""
        self.question, self.request_id = question, question.id

    def plays(self, version: Version | None) -> None:
        """Say what the request plays; None: the base."""
        self.resolved, self.version = True, version
        self.label = self._metrics.label(version.name if version else "")

    def began(self, index: int, version: Version | None, *, ready: int, prompt_tokens: int) -> None:
        """Take note that an answer has a place in the engine, its adapter there since `ready`."""
        now = time.perf_counter_ns()
        self.version = version
        self.answers[index] = Answer(ready, now, prompt_tokens)
        self._metrics.queue.observe((now - self.arrived) / 1e9)
        self._metrics.prompt(self.label, prompt_tokens)

    def got(self, index: int, tokens: int) -> None:
        """Take note of an answer's new tokens, which may have come several at once."""
        now = time.perf_counter_ns()
        answer = self.answers[index]
        if not answer.tokens:
            answer.first = now
            self._metrics.first.observe((now - self.arrived) / 1e9)
        else:
            for _ in range(tokens):
                self._metrics.between.observe((now - answer.last) / tokens / 1e9)
        answer.last = now
        answer.tokens += tokens
        self._metrics.answer(self.label, tokens)

    def finished(self, index: int, *, stopped: bool) -> None:
        """Take note that an answer is complete."""
        self.answers[index].finish = "stop" if stopped else "length"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ended:
            return
        self.ended = time.perf_counter_ns()
        if error is not None:
            self.code = self._code(error)
            self.error = str(error) if isinstance(error, ServerError) else type(error).__name__
        self._tell(self)

    def _code(self, error: BaseException) -> grpc.StatusCode:
        if isinstance(error, ServerError):
            return error.code
        if not isinstance(error, GONE):
            return grpc.StatusCode.INTERNAL
        late = self._expires is not None and self.ended >= self._expires
        return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
