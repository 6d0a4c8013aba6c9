"""Measure what it costs to know who asks and what goes on: metrics, log, tokens, traces.

`make bench-overhead`. The bare server observes nothing, logs nothing and lets everybody in; each of
the others adds something to it. All of them run at once, each in a process of its own, and take
turns under the same load, in one order and then in the other; the base plays, because deltas would
only make the steps longer that the rest is compared with. Every turn's figures go into a JSON file.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import grpc
import grpc.aio
import torch
import tyro
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_rpc
from rich.console import Console
from rich.table import Table

from demo_base import demo_base
from neighbours import Neighbours
from sides import Serving, Side, Timed
from spieldose_kernels.quiet import quiet_libraries
from spieldose_server import port, server
from spieldose_server.access import CALLER, Caller, hashed, make_token
from spieldose_server.log_format import set_up_logging
from traffic import Answer, Clients

LOAD = {"prompt": 16, "tokens": 64}
SCRAPE_SECONDS = 1.0  # between two looks at the metrics; Prometheus is usually content with 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Measure what metrics, log, tokens and traces cost."""

    base: str = ""  # directory or hub name; empty takes the demo's
    rounds: int = 8  # each is two turns of every server
    clients: int = 8
    requests: int = 2  # of each client in a turn
    out: Path = Path("build/overhead.jsonl")  # gets every turn's figures


@dataclass(frozen=True, slots=True)
class Kind:
    """Hold what a server does besides answering."""

    name: str
    observes: bool = False  # metrics, scraped, and a log in JSON
    asks: bool = False  # for tokens
    traces: bool = False  # every request


KINDS = (
    Kind("bare"),
    Kind("metrics and log", observes=True),
    Kind("tokens", asks=True),
    Kind("metrics, log and tokens", observes=True, asks=True),
    Kind("the same and traces", observes=True, asks=True, traces=True),
)


class Blind:
    """Take the place of an observed request and of its observer, and see nothing."""

    def request(self, *arguments: object, **more: object) -> Self:
        """Follow no request."""
        return self

    def asks(self, *arguments: object, **more: object) -> None:
        """Take no note of anything; so do the others."""

    plays = began = got = finished = asks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Everybody(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Let everybody in, as nobody in particular."""

    def __init__(self, *arguments: object) -> None:
        pass

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Go on."""
        CALLER.set(Caller(""))
        return await continuation(details)


class Observing(Serving):
    """Run a server that does no more than its kind says."""

    def __init__(self, kind: Kind, *arguments: Any) -> None:
        blind: Any = Blind()
        if kind.observes:
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # the log's formatting counts, not its terminal
            set_up_logging("json")
        else:
            server.Observer = lambda *_: blind  # type: ignore[misc,assignment]
            server.measure = lambda *_: None
        if not kind.asks:
            port.Authenticate = Everybody  # type: ignore[misc,assignment]
        super().__init__(*arguments)

    def metrics_port(self) -> int:
        """Return where the metrics are."""
        return self._server.metrics_port


class Collector(Timed, otlp_rpc.TraceServiceServicer):
    """Take spans, count them and forget them."""

    def __init__(self) -> None:
        self._spans = 0
        self._server = grpc.server(ThreadPoolExecutor(1))
        otlp_rpc.add_TraceServiceServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        """Take some."""
        scopes = [scope for r in request.resource_spans for scope in r.scope_spans]
        self._spans += sum(len(scope.spans) for scope in scopes)
        return otlp.ExportTraceServiceResponse()

    def endpoint(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def spans(self) -> int:
        """Return how many came."""
        return self._spans


class Subject:
    """Hold a server of a kind, and clients of it."""

    def __init__(self, kind: Kind, base: str, root: Path, collector: str, stack: ExitStack) -> None:
        self.kind = kind
        settings: dict[str, Any] = {}
        token = make_token()
        if kind.observes:
            settings["metrics_listen"] = "127.0.0.1:0"
        if kind.asks:
            settings["access"] = str(root / f"{kind.name}.toml")
            entry = (
                f'[[tenant]]\nname = "t"\nbase = true\ntokens = [{{sha256 = "{hashed(token)}"}}]\n'
            )
            Path(settings["access"]).write_text(entry)
        if kind.traces:
            settings["otlp_endpoint"] = collector
        (adapters := root / kind.name).mkdir()
        self.side = Side(Observing, kind, base, adapters, settings)
        stack.callback(self.side.close)
        metadata = (("authorization", f"Bearer {token}"),) if kind.asks else ()
        self._clients = Clients(*self.side("addresses"), metadata=metadata)
        self._metrics = self.side("metrics_port")

    async def turn(self, clients: int, requests: int) -> dict[str, float]:
        """Return what a turn takes, in seconds of the clock and of the server's processors."""

        async def client() -> None:
            for _ in range(requests):
                await self._clients.ask("", Answer(), **LOAD)

        async with self._scraped():
            worked, begin = self.side("processor_seconds"), time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            taken = time.perf_counter() - begin
            return {"seconds": taken, "cpu": self.side("processor_seconds") - worked}

    @asynccontextmanager
    async def _scraped(self) -> AsyncIterator[None]:
        async def scrape() -> None:
            url = f"http://127.0.0.1:{self._metrics}/metrics"
            while True:
                await asyncio.to_thread(lambda: urlopen(url, timeout=5).read())
                await asyncio.sleep(SCRAPE_SECONDS)

        if not self.kind.observes:
            yield
            return
        scraping = asyncio.create_task(scrape())
        try:
            yield
        finally:
            scraping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scraping


async def measure(arguments: Arguments, base: str, root: Path) -> dict[str, Any]:
    """Return every turn's figures, by kind of server."""
    figures: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        collector = Side(Collector)
        stack.callback(collector.close)
        endpoint = collector("endpoint")
        subjects = [Subject(kind, base, root, endpoint, stack) for kind in KINDS]
        for subject in subjects:  # warm up
            await subject.turn(arguments.clients, 1)
        others = Neighbours([collector.pid, *(subject.side.pid for subject in subjects)])
        for _ in range(arguments.rounds):
            taken: dict[str, float] = defaultdict(float)
            for subject in (*subjects, *reversed(subjects)):
                turn = await subject.turn(arguments.clients, arguments.requests)
                for what, value in turn.items():
                    taken[f"{subject.kind.name}: {what}"] += value
            for name, value in taken.items():
                figures[name].append(round(value, 4))
        share = others.share()
        await asyncio.sleep(6)  # longer than spans are kept together
        spans = collector("spans")
    asked = arguments.clients * arguments.requests
    settings = {"clients": arguments.clients, "requests a turn": asked, **LOAD, "spans": spans}
    machine = {"threads": torch.get_num_threads(), "others": round(share, 3)}
    return {**machine, **settings, "figures": figures}


def show(result: dict[str, Any]) -> None:
    """Print what each server reaches of the bare one's."""
    table = Table(
        "the server has", "tokens a second of bare's", "lowest", "highest", "cpu of bare's"
    )
    figures = result["figures"]
    for kind in KINDS[1:]:
        rates = _ratios(figures["bare: seconds"], figures[f"{kind.name}: seconds"])
        cpu = _ratios(figures[f"{kind.name}: cpu"], figures["bare: cpu"])
        numbers = statistics.median(rates), min(rates), max(rates), statistics.median(cpu)
        table.add_row(kind.name, *(f"{number:.3f}" for number in numbers))
    Console(width=120).print(table)
    tokens = 2 * result["requests a turn"] * result["tokens"]
    rate = tokens / statistics.median(figures["bare: seconds"])
    print(f"bare: {rate:.0f} tokens a second; {result['spans']} spans were collected;")
    print(f"{result['threads']} threads; others took {result['others']:.0%} of the machine")


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def main() -> None:
    """Measure, keep the figures, print a table."""
    arguments = tyro.cli(Arguments)
    quiet_libraries()
    base = arguments.base or demo_base()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        result = asyncio.run(measure(arguments, base, Path(root)))
    with open(arguments.out, "a") as out:
        out.write(json.dumps(result) + "\n")
    show(result)


if __name__ == "__main__":
    main()
