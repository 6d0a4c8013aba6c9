"""Measure a server under many adapters: overhead, thrash, cold loads, a thousand of them.

`make bench-traffic`. The sides of every ratio are interleaved, A B B A, each in a process of its
own. Clients share the machine with the servers, which they reach over a real socket. Every run's
figures go into a JSON file, a line a part, with the share of the machine that others took; the
table is made of that.
"""

import asyncio
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal

import grpc
import grpc.aio
import torch
import tyro
from rich.console import Console
from rich.table import Table

from cpu import random_adapter, random_prompt
from demo_base import demo_base
from neighbours import Neighbours
from sides import Bare, Serving, Side
from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.checkpoint import checkpoint_spec
from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.quiet import quiet_libraries
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc

Part = Literal["overhead", "thrash", "cold", "thousand"]
Figures = dict[str, list[float]]  # a value for each run, by what it is
LOADS = 12  # in a run of `cold`
SUPPORTS = 2  # different supports among the adapters; values differ everywhere

# part, what is shown, the figure, what it is divided by run by run, what the median should be
LINES = (
    ("overhead", "8 requests: engine / transformers' loop, time", "engine 8", "bare 8", "<= 1.05"),
    ("overhead", "the same in processor time", "engine 8 cpu", "bare 8 cpu", ""),
    ("overhead", "1 request: engine / transformers' loop, time", "engine 1", "bare 1", "<= 1.05"),
    ("overhead", "the same in processor time", "engine 1 cpu", "bare 1 cpu", ""),
    ("overhead", "8 requests: gRPC streaming, us a token", "streaming 8", "", ""),
    ("overhead", "the same of the server's processor time", "streaming 8 cpu", "", ""),
    ("overhead", "1 request: gRPC streaming, us a token", "streaming 1", "", ""),
    ("overhead", "the same of the server's processor time", "streaming 1 cpu", "", ""),
    ("overhead", "8 requests: over gRPC / engine, time", "gRPC 8", "engine 8", ""),
    ("thrash", "first token, median: 16 adapters / 8, room for 8", "median 16", "median 8", "<= 3"),
    ("thrash", "the same, 8 clients over the 8", "median 16", "median 8 alone", "<= 3"),
    ("thrash", "first token, mean: 16 adapters / 8", "mean 16", "mean 8", ""),
    ("thrash", "first token, 95th percentile: the same", "p95 16", "p95 8", ""),
    ("thrash", "answers a second: the same", "rate 16", "rate 8", ""),
    ("thrash", "first token, median: 16 clients over 8, s", "median 8", "", ""),
    ("thrash", "first token, median: 8 clients over 8, s", "median 8 alone", "", ""),
    ("thrash", "adapters evicted in a run, 16 adapters", "evictions 16", "", ""),
    ("cold", "between tokens, p99: while one loads / otherwise", "p99 load", "p99", "<= 1.2"),
    ("cold", "between tokens, median: the same", "median load", "median", ""),
    ("cold", "between tokens, p99: otherwise, s", "p99", "", ""),
    ("cold", "a cold load of the largest adapter, s", "load", "", ""),
    ("thousand", "tokens a second: all registered / 1", "rate all", "rate 1", ">= 0.95"),
    ("thousand", "tokens a second: all registered / 16", "rate all", "rate 16", ""),
    ("thousand", "tokens per processor second: all / 1", "economy all", "economy 1", ""),
    ("thousand", "tokens per processor second: 16 / 1", "economy 16", "economy 1", ""),
    ("thousand", "tokens a second: 1 registered", "rate 1", "", ""),
    ("thousand", "adapters evicted in a run, all registered", "evictions all", "", ""),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Measure a server under many adapters."""

    parts: tuple[Part, ...] = ("overhead", "thrash", "cold", "thousand")
    base: str = ""  # directory or hub name; empty takes the demo's
    rounds: int = 4  # of A B B A
    seconds: float = 10.0  # of traffic in each of a round's turns
    density: float = 0.01  # of adapters
    largest: float = 0.03  # density of those that are loaded cold
    registered: int = 1000
    adapter_memory: int = 0  # bytes on the device in `thousand`; 0: the server's default
    out: Path = Path("build/traffic.jsonl")  # gets every run's figures, a line a part


@dataclass(slots=True)
class Answer:
    """Hold when a request was sent and when each of its tokens came."""

    sent: float = field(default_factory=time.perf_counter)
    came: list[float] = field(default_factory=list)

    @property
    def wait(self) -> float:
        """Return the seconds to the first token."""
        return self.came[0] - self.sent


class Clients:
    """Send requests to one server, many at once."""

    def __init__(
        self, address: str, admin: str, *, metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._metadata = metadata
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._inference = rpc.InferenceStub(self._channel)
        self._adapters = rpc.AdaptersStub(grpc.aio.insecure_channel(admin))
        self._asked = 0

    async def ask(self, adapter: str, answer: Answer, *, prompt: int, tokens: int) -> None:
        """Make one request with a random prompt of so many tokens; note when its tokens come."""
        self._asked += 1
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=random_prompt(self._asked, prompt)),
            adapter_id=adapter,
            sampling_params=pb.SamplingParams(max_tokens=tokens),
        )
        async for response in self._inference.Generate(request, metadata=self._metadata):
            answer.came += [time.perf_counter()] * len(response.chunk.token_ids)
        assert len(answer.came) == tokens

    async def traffic(
        self,
        pick: Callable[[int], str],
        *,
        clients: int,
        seconds: float,
        prompt: int,
        tokens: Sequence[int],
    ) -> list[Answer]:
        """Let every client send its next request as soon as the last is answered.

        Answers have so many tokens by turns. Nobody sends any more after so many seconds; what was
        sent is waited for and counts.
        """
        answers: list[Answer] = []
        end = time.perf_counter() + seconds

        async def client(number: int) -> None:
            while time.perf_counter() < end:
                length = tokens[len(answers) % len(tokens)]
                answers.append(Answer())
                await self.ask(pick(number), answers[-1], prompt=prompt, tokens=length)

        await asyncio.gather(*map(client, range(clients)))
        return answers

    async def fetch(self, adapter: str) -> tuple[float, float]:
        """Have an adapter brought to the device; return when that began and ended."""
        begin = time.perf_counter()
        await self._adapters.Pin(pb.PinAdapterRequest(adapter_id=adapter))
        end = time.perf_counter()
        await self._adapters.Unpin(pb.UnpinAdapterRequest(adapter_id=adapter))
        return begin, end


class Discs:
    """Write many adapters of different content cheaply: few supports, values of their own."""

    def __init__(self, spec: BaseSpec, root: Path) -> None:
        self._spec = spec
        self._root = root
        self._drawn: dict[tuple[float, int], Adapter] = {}

    def write(self, kind: str, count: int, density: float) -> Path:
        """Return a directory of so many new adapters, `kind`0 and on, none of them in memory."""
        directory = self._root / f"{kind}{count}"
        directory.mkdir()
        for i in range(count):
            self.add(directory, f"{kind}{i}", density)
        return directory

    def add(self, directory: Path, name: str, density: float) -> None:
        """Write one more adapter."""
        file = directory / f"{name}.safetensors"
        write_delta(file, self._make(name, density))
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _make(self, name: str, density: float) -> Adapter:
        generator = torch.Generator().manual_seed(Random(name).getrandbits(60))
        drawn = self._support(density, Random(name).randrange(SUPPORTS))

        def fresh(delta: SparseDelta) -> SparseDelta:
            return replace(delta, values=1e-4 * torch.randn(delta.nnz, generator=generator))

        modules = {module: fresh(delta) for module, delta in drawn.modules.items()}
        info = replace(drawn.info, base_fingerprint=self._spec.fingerprint)
        return Adapter(info, modules)

    def _support(self, density: float, seed: int) -> Adapter:
        if (density, seed) not in self._drawn:
            shapes = dict(self._spec.shapes)
            self._drawn[density, seed] = random_adapter(shapes, seed, density=density)
        return self._drawn[density, seed]


class Bench:
    """Measure the parts."""

    def __init__(self, arguments: Arguments, base: str, root: Path) -> None:
        self._arguments = arguments
        self._base = base
        self._discs = Discs(checkpoint_spec(base), root)

    async def measure(self, part: Part) -> dict[str, Any]:
        """Return a part's settings, its figures, and how busy others were meanwhile."""
        figures: Figures = defaultdict(list)
        with ExitStack() as stack:
            settings, others = await getattr(self, f"_{part}")(stack, figures)
        rounded = {name: [round(value, 5) for value in values] for name, values in figures.items()}
        machine = {"threads": torch.get_num_threads(), "others": round(others, 3)}
        return {"part": part, **machine, **settings, "figures": rounded}

    async def _overhead(self, stack: ExitStack, figures: Figures) -> Any:
        """Compare the bare loop, the engine, and the engine behind gRPC, playing the base alone."""
        load = {"prompt": 16, "tokens": 64}
        bare = _opened(stack, Side(Bare, self._base))
        serving = self._serve(stack, self._discs.write("none", 0, 0.0))
        clients = Clients(*serving("addresses"))
        seeds = count()

        async def generate(kind: str, requests: int) -> None:
            if kind == "gRPC":
                asked = (clients.ask("", Answer(), **load) for _ in range(requests))
                await asyncio.gather(*asked)
                return
            prompts = [random_prompt(next(seeds), load["prompt"]) for _ in range(requests)]
            (bare if kind == "bare" else serving)(
                "generate", prompts=prompts, tokens=load["tokens"]
            )

        async def run(requests: int) -> None:
            taken: dict[str, float] = defaultdict(float)
            for kind in ("bare", "engine", "gRPC", "gRPC", "engine", "bare"):
                side = bare if kind == "bare" else serving
                worked, begin = side("processor_seconds"), time.perf_counter()
                await generate(kind, requests)
                taken[f"{kind} {requests}"] += (time.perf_counter() - begin) / 2
                taken[f"{kind} {requests} cpu"] += (side("processor_seconds") - worked) / 2
            for kind, value in taken.items():
                figures[kind].append(value)
            for clock in ("", " cpu"):
                more = taken[f"gRPC {requests}{clock}"] - taken[f"engine {requests}{clock}"]
                streaming = 1e6 * more / (requests * load["tokens"])
                figures[f"streaming {requests}{clock}"].append(streaming)

        await run(8)  # warms up
        figures.clear()
        others = Neighbours([bare.pid, serving.pid])
        for _ in range(2 * self._arguments.rounds):
            await run(1)
            await run(8)
        return load, others.share()

    async def _thrash(self, stack: ExitStack, figures: Figures) -> Any:
        """Compare 16 clients over 16 adapters with 16, and with 8, over 8, where 8 have room."""
        arguments = self._arguments
        load: dict[str, Any] = {"prompt": 64, "tokens": [16]}
        kinds = {"8 alone": (8, 8), "8": (16, 8), "16": (16, 16)}  # clients, adapters
        directory = self._discs.write("thrash", 16, arguments.density)
        serving = self._serve(stack, directory, max_adapters=8)
        clients = Clients(*serving("addresses"))

        async def run(kind: str) -> None:
            number, adapters = kinds[kind]
            evicted = serving("evictions")
            begin = time.perf_counter()
            answers = await clients.traffic(
                lambda client: f"thrash{client % adapters}",
                clients=number,
                seconds=arguments.seconds,
                **load,
            )
            waits = [answer.wait for answer in answers]
            figures[f"median {kind}"].append(statistics.median(waits))
            figures[f"mean {kind}"].append(statistics.mean(waits))
            figures[f"p95 {kind}"].append(quantile(waits, 0.95))
            figures[f"rate {kind}"].append(len(answers) / (time.perf_counter() - begin))
            figures[f"answers {kind}"].append(len(answers))
            figures[f"evictions {kind}"].append(serving("evictions") - evicted)

        for kind in reversed(kinds):  # warm up
            await run(kind)
        figures.clear()
        others = Neighbours([serving.pid])
        for _ in range(arguments.rounds):
            for kind in (*kinds, *reversed(kinds)):
                await run(kind)
        return load | {"room": 8, "density": arguments.density}, others.share()

    async def _cold(self, stack: ExitStack, figures: Figures) -> Any:
        """Compare the time between tokens while an adapter loads and while none does, in turns."""
        arguments = self._arguments
        directory = self._discs.write("plays", 8, arguments.density)
        for number in range(LOADS * (arguments.rounds + 1)):
            self._discs.add(directory, f"cold{number}", arguments.largest)
        serving = self._serve(stack, directory)
        clients = Clients(*serving("addresses"))
        numbers = count()

        async def run() -> None:
            answers = [Answer() for _ in range(8)]
            streams = [
                asyncio.create_task(clients.ask(f"plays{i}", answer, prompt=16, tokens=1500))
                for i, answer in enumerate(answers)
            ]
            while min(len(answer.came) for answer in answers) < 10:
                await asyncio.sleep(0.05)
            begin, loads = time.perf_counter(), []
            for _ in range(LOADS):
                loads.append(await clients.fetch(f"cold{next(numbers)}"))
                await asyncio.sleep(max(0.5, loads[-1][1] - loads[-1][0]))
            assert not any(stream.done() for stream in streams)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            gaps = [gap for a in answers for gap in pairwise(a.came) if gap[0] > begin]
            for name, during in (("", False), (" load", True)):
                times = [end - start for start, end in gaps if _meets(start, end, loads) is during]
                figures[f"p99{name}"].append(quantile(times, 0.99))
                figures[f"median{name}"].append(statistics.median(times))
                figures[f"count{name}"].append(len(times))
            figures["load"].append(statistics.median(end - start for start, end in loads))

        await run()  # warms up
        figures.clear()
        others = Neighbours([serving.pid])
        for _ in range(arguments.rounds):
            await run()
        settings = {"streams": 8, "density": arguments.density, "largest": arguments.largest}
        return settings | {"loads": LOADS}, others.share()

    async def _thousand(self, stack: ExitStack, figures: Figures) -> Any:
        """Compare servers with 1, 16 and all adapters under the same number of requests."""
        arguments = self._arguments
        # of one length, clients would march in step, and any load that breaks the step would count
        tokens = [16 + 10 * i % 33 for i in range(33)]  # 16 to 48, neighbours far apart
        load: dict[str, Any] = {"clients": 16, "prompt": 32, "tokens": tokens}
        kinds = {"1": 1, "16": 16, "all": arguments.registered}
        density, memory = arguments.density, arguments.adapter_memory
        room = {"adapter_memory": memory} if memory else {}
        servers = {
            kind: self._serve(stack, self._discs.write(f"of{kind}-", number, density), **room)
            for kind, number in kinds.items()
        }
        clients = {kind: Clients(*serving("addresses")) for kind, serving in servers.items()}
        draw = Random(0)

        def zipf(kind: str) -> Callable[[int], str]:
            weights = list(accumulate(1 / rank for rank in range(1, kinds[kind] + 1)))
            return lambda _: f"of{kind}-{draw.choices(range(kinds[kind]), cum_weights=weights)[0]}"

        async def run(kind: str) -> None:
            serving, begin = servers[kind], time.perf_counter()
            evicted, worked = serving("evictions"), serving("processor_seconds")
            answers = await clients[kind].traffic(zipf(kind), seconds=arguments.seconds, **load)
            start, end = begin + 0.1 * arguments.seconds, begin + arguments.seconds
            came = [moment for answer in answers for moment in answer.came]
            waits = [answer.wait for answer in answers]
            within = sum(start < moment <= end for moment in came)
            figures[f"rate {kind}"].append(within / (end - start))
            figures[f"median {kind}"].append(statistics.median(waits))
            figures[f"p95 {kind}"].append(quantile(waits, 0.95))
            figures[f"answers {kind}"].append(len(answers))
            figures[f"evictions {kind}"].append(serving("evictions") - evicted)
            worked = serving("processor_seconds") - worked
            figures[f"economy {kind}"].append(len(came) / worked)

        for kind, number in kinds.items():  # none is read for the first time in what counts
            for rank in reversed(range(number)):
                await clients[kind].fetch(f"of{kind}-{rank}")
            await run(kind)
        figures.clear()
        others = Neighbours(serving.pid for serving in servers.values())
        for _ in range(arguments.rounds):
            for kind in (*kinds, *reversed(kinds)):
                await run(kind)
        settings = {"registered": arguments.registered, "density": arguments.density}
        return load | settings | servers["all"]("budgets"), others.share()

    def _serve(self, stack: ExitStack, adapters: Path, **settings: Any) -> Side:
        time.sleep(0.5)  # files younger than that would be read in full when the server starts
        return _opened(stack, Side(Serving, self._base, adapters, settings))


def _opened(stack: ExitStack, side: Side) -> Side:
    stack.callback(side.close)
    return side


def _meets(start: float, end: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(start < last and first < end for first, last in spans)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of the values that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print a table of parts' figures."""
    table = Table("part", "what", "median", "lowest", "highest", "goal")
    for result in results:
        figures = result["figures"]
        for part, what, above, below, goal in LINES:
            if part == result["part"]:
                values = figures[above]
                if below:
                    values = [a / b for a, b in zip(values, figures[below], strict=True)]
                numbers = statistics.median(values), min(values), max(values)
                table.add_row(part, what, *(f"{number:.3g}" for number in numbers), goal)
        table.add_row("", f"{result['threads']} threads; others took {result['others']:.0%} of all")
    Console(width=120).print(table)


def main() -> None:
    """Measure the parts asked for, keep their figures, print a table."""
    arguments = tyro.cli(Arguments)
    quiet_libraries()
    base = arguments.base or demo_base()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as root:
            results.append(asyncio.run(Bench(arguments, base, Path(root)).measure(part)))
        with open(arguments.out, "a") as out:
            out.write(json.dumps(results[-1]) + "\n")
    show(results)


if __name__ == "__main__":
    main()
