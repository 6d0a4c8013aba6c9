"""Play many canaries at once while they are loaded, replaced, removed, evicted and cancelled.

`make soak SECONDS=600`. A server process has 64 adapters and room, in bytes, for 8. Each makes the
model say its version's own marker, so a token of another version, of another adapter or of the base
is seen at once. The last line printed is a JSON object; the exit status says whether all was well.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import torch
import tyro

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from canary import SIZES, make_canary
from spieldose_kernels.base import Base, load_base
from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.quiet import quiet_libraries
from spieldose_kernels.sliced import pack
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from tiny_base import save_tiny_base

HUNG_SECONDS = 60.0
MARKERS = 250  # of the tiny base's 256 byte tokens
FLAT = 0.02  # growth of memory that is none
Status = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Arguments:
    """Play many canaries at once while everything happens to them."""

    seconds: float = 600.0
    adapters: int = 64
    room: int = 8  # adapters of the middle size on the device at once
    clients: int = 32
    seed: int = 0


@dataclass(slots=True)
class Tally:
    """Count what happened."""

    requests: int = 0
    tokens: int = 0
    foreign_tokens: int = 0
    lost: int = 0  # ended without an answer, and without a reason we gave
    hung: int = 0
    cancelled: int = 0
    happened: Counter[str] = field(default_factory=Counter)  # to the adapters
    complaints: list[str] = field(default_factory=list)

    def lose(self, why: str) -> None:
        """Count a lost request; keep the first reasons."""
        self.lost += 1
        if len(self.complaints) < 5:
            self.complaints.append(why)


class Discs:
    """The adapter directory, what each version says, and which adapters are away on purpose."""

    def __init__(self, directory: Path, base: Base) -> None:
        self.directory = directory
        self.marker: dict[str, int] = {}  # by digest
        self.said: dict[str, set[int]] = {}  # by name: what any of its versions says
        self.away: Counter[str] = Counter()  # names that need not be found now
        self.absences: Counter[str] = Counter()  # how often a name was away so far
        self._base = base
        self._made = 0

    def write(self, name: str) -> None:
        """Write an adapter's next version."""
        self._made += 1
        marker = self._made % MARKERS
        self.said.setdefault(name, set()).add(marker)
        scratch = self.directory.parent / "next.safetensors"
        write_delta(scratch, make_canary(self._base, marker, seed=self._made))
        self.marker[hashlib.sha256(scratch.read_bytes()).hexdigest()] = marker
        os.replace(scratch, self.file(name))

    def file(self, name: str) -> Path:
        """Return where an adapter's file lies."""
        return self.directory / f"{name}.safetensors"

    def leave(self, name: str) -> None:
        """From now on the adapter need not be found."""
        self.away[name] += 1
        self.absences[name] += 1

    def come_back(self, name: str) -> None:
        """From now on the adapter has to be found."""
        self.away[name] -= 1


class Soak:
    """Clients, and what happens to the adapters meanwhile."""

    def __init__(self, arguments: Arguments, address: str, admin: str, discs: Discs) -> None:
        self.tally = Tally()
        self._arguments = arguments
        self._discs = discs
        self._draw = random.Random(arguments.seed)
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self._inference = rpc.InferenceStub(self.channel)
        self.admin = grpc.aio.insecure_channel(admin)
        self._adapters = rpc.AdaptersStub(self.admin)
        self._names = [f"canary{i}" for i in range(arguments.adapters)]
        self._weights = [1 / (1 + i) for i in range(arguments.adapters)]  # Zipf's
        self._base_answer: list[int] = []

    async def run(self, seconds: float) -> None:
        """Let everything happen for so long, then wait for all requests to end."""
        if not self._base_answer:
            self._base_answer = await self._tokens("", 40)
        end = time.monotonic() + seconds
        clients = [self._client(end) for _ in range(self._arguments.clients)]
        await asyncio.gather(*clients, self._disturb(end))

    async def settled(self) -> None:
        """Wait until every adapter is served again and nobody plays one."""
        while True:
            adapters = (await self._adapters.List(pb.ListAdaptersRequest())).adapters
            served = {a.name for a in adapters if a.state != pb.ADAPTER_STATE_REJECTED}
            if served >= set(self._names) and not any(a.running for a in adapters):
                return
            await asyncio.sleep(0.1)

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            if self._draw.random() < 0.1:
                name = ""
            else:
                [name] = self._draw.choices(self._names, self._weights)
            patience = self._draw.uniform(0, 0.3) if self._draw.random() < 0.15 else None
            await self._ask(name, self._draw.randint(1, 40), patience)

    async def _ask(self, name: str, count: int, patience: float | None) -> None:
        """Make one request and judge it; after `patience` seconds cancel it."""
        tally, discs = self.tally, self._discs
        tally.requests += 1
        absences, away = discs.absences[name], discs.away[name] > 0
        got: list[int] = []
        try:
            async with asyncio.timeout(patience or HUNG_SECONDS):
                digest = await self._collect(name, count, got)
        except TimeoutError:
            if patience is None:
                tally.hung += 1
            else:
                tally.cancelled += 1
                self._judge(name, got, digest=None)
        except grpc.aio.AioRpcError as error:
            excused = away or discs.absences[name] > absences
            if error.code() != Status.NOT_FOUND or not excused:
                tally.lose(f"{name}: {error.code().name}: {error.details()}")
            self._judge(name, got, digest=None)
        else:
            if digest is None or len(got) != count:
                tally.lose(f"{name}: {len(got)} of {count} tokens, completion: {digest}")
            self._judge(name, got, digest)

    async def _collect(self, name: str, count: int, got: list[int]) -> str | None:
        """Fill `got` with an answer's tokens; return the digest of what played, None at no end."""
        sampling = pb.SamplingParams(max_tokens=count)
        # prompts of several lengths that begin alike: the prefix cache is in play
        repeats = self._draw.randint(1, 6)
        prompt = "A prompt that many requests have in common, and pages of it. " * repeats
        request = pb.GenerateRequest(text=prompt, adapter_id=name, sampling_params=sampling)
        if not name:
            request.text = "base"
        call = self._inference.Generate(request)
        try:
            async for response in call:
                if response.HasField("complete"):
                    return str(response.complete.adapter.digest)
                got += response.chunk.token_ids
        finally:
            call.cancel()
        return None

    def _judge(self, name: str, got: list[int], digest: str | None) -> None:
        """Count the tokens that are not what was asked for."""
        self.tally.tokens += len(got)
        if not name:
            expected = self._base_answer[: len(got)]
            wrong = sum(a != b for a, b in zip(got, expected, strict=True))
        elif digest is not None:
            wrong = sum(token != self._discs.marker[digest] for token in got)
        else:  # cut off: one version's marker, whichever it was
            markers = set(got)
            wrong = 0 if len(markers) <= 1 and markers <= self._discs.said[name] else len(got)
        self.tally.foreign_tokens += wrong

    async def _tokens(self, name: str, count: int) -> list[int]:
        got: list[int] = []
        await self._collect(name, count, got)
        return got

    async def _disturb(self, end: float) -> None:
        """Replace, remove, unload and spoil adapters, one after the other."""
        acts = (self._replace, self._replace, self._remove, self._unload, self._spoil)
        while time.monotonic() < end:
            act = self._draw.choice(acts)
            await act(self._draw.choice(self._names))
            self.tally.happened[act.__name__.strip("_")] += 1
            await asyncio.sleep(self._draw.uniform(0.05, 0.3))

    async def _replace(self, name: str) -> None:
        await asyncio.to_thread(self._discs.write, name)

    async def _remove(self, name: str) -> None:
        self._discs.leave(name)
        self._discs.file(name).unlink()
        await asyncio.sleep(self._draw.uniform(0, 0.5))
        await asyncio.to_thread(self._discs.write, name)
        await self._served(name)

    async def _unload(self, name: str) -> None:
        self._discs.leave(name)
        try:
            await self._adapters.Unload(pb.UnloadAdapterRequest(adapter_id=name))
        except grpc.aio.AioRpcError as error:
            if error.code() != Status.NOT_FOUND:
                self.tally.lose(f"unload {name}: {error.details()}")
        await self._adapters.Load(pb.LoadAdapterRequest(adapter_id=name))
        self._discs.come_back(name)

    async def _spoil(self, name: str) -> None:
        """Put half a file in an adapter's place: the version before goes on being served."""
        whole = self._discs.file(name).read_bytes()
        part = self._discs.directory / f".{name}.part"
        part.write_bytes(whole[: len(whole) // 2])
        part.replace(self._discs.file(name))
        await asyncio.sleep(self._draw.uniform(0, 0.5))
        await asyncio.to_thread(self._discs.write, name)

    async def _served(self, name: str) -> None:
        """Wait until the directory's newest file is what a request gets."""
        digest = hashlib.sha256(self._discs.file(name).read_bytes()).hexdigest()
        deadline = time.monotonic() + HUNG_SECONDS
        while time.monotonic() < deadline:
            try:
                adapter = await self._adapters.Get(pb.GetAdapterRequest(adapter_id=name))
            except grpc.aio.AioRpcError:
                adapter = pb.Adapter()
            if adapter.digest == digest:
                self._discs.come_back(name)
                return
            await asyncio.sleep(0.02)
        self.tally.hung += 1


def main() -> None:
    """Run a server, soak it, print one JSON object."""
    arguments = tyro.cli(Arguments)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "base").mkdir()
        (root / "adapters").mkdir()
        save_tiny_base(root / "base")
        base = load_base(
            str(root / "base"),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            fused=False,
        )
        discs = Discs(root / "adapters", base)
        for i in range(arguments.adapters):
            discs.write(f"canary{i}")
        sizes = [pack(make_canary(base, 0, seed=i), torch.float32).nbytes for i in range(SIZES)]
        memory = round(arguments.room * sum(sizes) / SIZES)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        admin = f"unix:{root}/admin.sock"
        command = [
            *(str(Path(sys.executable).with_name("spieldose")), "serve"),
            *("--base", str(root / "base"), "--adapters", str(root / "adapters")),
            *("--listen", address, "--admin-listen", admin, "--adapter-memory", str(memory)),
            *("--compute-dtype", "float32", "--kv-tokens", "16384"),
        ]
        with open(root / "log", "w") as log, subprocess.Popen(command, stderr=log) as server:
            try:
                result = asyncio.run(soak(arguments, address, admin, discs, server.pid))
            finally:
                server.send_signal(signal.SIGTERM)
            result["exit"] = server.wait(60)
    print(json.dumps(result))
    bad = [key for key in ("foreign_tokens", "lost", "hung", "exit") if result[key]]
    sys.exit(bool(bad) or result["memory_growth"] > FLAT)


async def soak(
    arguments: Arguments, address: str, admin: str, discs: Discs, pid: int
) -> dict[str, object]:
    """Warm the server up, measure, soak it, measure again."""
    soak = Soak(arguments, address, admin, discs)
    await asyncio.wait_for(soak.channel.channel_ready(), 120)
    await soak.run(min(15.0, arguments.seconds / 4))
    await soak.settled()
    before = resident_bytes(pid)
    await soak.run(arguments.seconds)
    await soak.settled()
    after = resident_bytes(pid)
    await soak.channel.close()
    await soak.admin.close()
    tally = soak.tally
    for complaint in tally.complaints:
        print(complaint)
    return {
        "requests": tally.requests,
        "tokens": tally.tokens,
        "foreign_tokens": tally.foreign_tokens,
        "lost": tally.lost,
        "hung": tally.hung,
        "cancelled": tally.cancelled,
        **tally.happened,
        "memory_mb": round(after / 1e6, 1),
        "memory_growth": round(after / before - 1, 4),
    }


def resident_bytes(pid: int) -> int:
    """Return the memory a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"expected a running process {pid}, got none")


if __name__ == "__main__":
    main()
