"""A killed server, a full disk, a directory that vanishes: nothing to repair, others play on."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError

from ..conftest import Running, eventually
from .test_adapters import Stream
from .test_process import process

NAMES = ("a1", "a2", "a3")
SHORT = pb.SamplingParams(max_tokens=24)
LONG = pb.SamplingParams(max_tokens=120)  # what a Stream asks for
# one slot and no host memory: whoever plays next is read from its file
NARROW = ("--max-adapters", "1", "--host-memory", "1")


@pytest.fixture
def adapters(tmp_path: Path, make_adapter: Callable[..., Any]) -> Path:
    for seed, name in enumerate(NAMES):
        write_delta(tmp_path / f"{name}.safetensors", make_adapter(seed))
    return tmp_path


@pytest.fixture
def narrow(serve_tiny: Callable[..., Iterator[Running]], adapters: Path) -> Iterator[Running]:
    """A server with room for one adapter."""
    yield from serve_tiny(adapters, max_adapters=1, host_memory=1)


def test_killed_while_it_serves_and_loads_it_serves_again_and_no_file_has_changed(
    tiny_directory: Path, adapters: Path
) -> None:
    (adapters / ".a4.safetensors.1.tmp").write_bytes(b"half")  # of a writer killed with it
    files = contents(adapters)
    with process(tiny_directory, adapters, *NARROW) as (server, address), Client(address) as client:
        before = [client.generate("hello", adapter=name, sampling=SHORT) for name in NAMES]
        with ThreadPoolExecutor(len(NAMES)) as pool:
            asking = [pool.submit(ask_until_it_fails, client, name) for name in NAMES]
            events = client.watch()
            while next(events).adapter.state != pb.ADAPTER_STATE_LOADING:
                pass
            server.kill()
            assert [ask.result() for ask in asking] == [grpc.StatusCode.UNAVAILABLE] * len(NAMES)
    assert contents(adapters) == files
    with process(tiny_directory, adapters, *NARROW) as (_, address), Client(address) as client:
        assert {adapter.name for adapter in client.adapters()} == set(NAMES)
        assert [client.generate("hello", adapter=n, sampling=SHORT) for n in NAMES] == before
    assert contents(adapters) == files


def test_a_server_that_can_write_nothing_serves(
    tiny_directory: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compiled = tmp_path_factory.mktemp("compiled")  # nothing there, nothing will be
    environment = os.environ | {"NUMBA_CACHE_DIR": str(compiled)}
    no_byte = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))  # as if disks were full
    with (
        process(tiny_directory, adapters, preexec_fn=no_byte, env=environment) as (_, address),
        Client(address) as client,
    ):
        for name in NAMES:
            assert client.generate("hello", adapter=name, sampling=SHORT).adapter.startswith(name)


def test_files_cut_short_by_a_full_disk_are_rejected_and_taken_up_once_they_are_whole(
    running: Running,
) -> None:
    payload = (running.directory / "a1.safetensors").read_bytes()
    sizes = (0, 5, 300, len(payload) // 2, len(payload) - 1)
    whole = running.client.generate("hello", adapter="a1", sampling=LONG)
    with Stream(running, "a1") as stream:
        for size in sizes:
            (running.directory / f"cut{size}.safetensors").write_bytes(payload[:size])
        eventually(lambda: all(running.state(f"cut{s}").startswith("rejected") for s in sizes))
        for size in sizes:
            reason = running.client.adapter(f"cut{size}").reason
            assert "expected at least 8 bytes" in reason or "header declares" in reason
            with pytest.raises(ClientError) as caught:
                running.client.generate("hello", adapter=f"cut{size}")
            assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION
        assert stream.rest() == whole.token_ids
    for size in sizes:
        with open(running.directory / f"cut{size}.safetensors", "ab") as file:
            file.write(payload[size:])
    eventually(lambda: all(running.state(f"cut{s}") == "resident" for s in sizes))
    for size in sizes:
        again = running.client.generate("hello", adapter=f"cut{size}", sampling=LONG)
        assert again.token_ids == whole.token_ids


def test_while_the_directory_is_gone_what_is_resident_plays_and_all_comes_back_with_it(
    narrow: Running, make_adapter: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spieldose_server.store.NOTICE_SECONDS", 0.1)
    before = {n: narrow.client.generate("hello", adapter=n, sampling=LONG) for n in NAMES}
    resident, away = NAMES[-1], narrow.directory.with_name("away")
    with Stream(narrow, resident) as stream:
        narrow.directory.rename(away)
        assert stream.rest() == before[resident].token_ids
    time.sleep(1.5)  # longer than the directory's own rescan
    with pytest.raises(ClientError) as caught:
        narrow.client.generate("hello", adapter="a1")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert narrow.client.generate("hello", adapter=resident, sampling=LONG) == before[resident]
    write_delta(away / "new.safetensors", make_adapter(9))
    away.rename(narrow.directory)
    eventually(lambda: narrow.state("new") in ("found", "on host", "resident"))
    for name, reply in before.items():
        assert narrow.client.generate("hello", adapter=name, sampling=LONG) == reply
    assert narrow.client.generate("hello", adapter="new").adapter.startswith("new@")


def ask_until_it_fails(client: Client, name: str) -> grpc.StatusCode:
    while True:
        try:
            client.generate("hello", adapter=name, sampling=SHORT)
        except ClientError as error:
            return error.code


def contents(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return every file's bytes, time and inode."""
    found = {path.name: (path.read_bytes(), path.stat()) for path in directory.iterdir()}
    return {name: (data, s.st_mtime_ns, s.st_ino) for name, (data, s) in found.items()}
