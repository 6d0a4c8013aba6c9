"""Adapters come, change and go while requests run."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_server.adapters_service import PAGE_SIZE
from spieldose_server.client import ClientError

from ..conftest import Running, eventually

MakeAdapter = Callable[..., Adapter]
SHORT = pb.SamplingParams(max_tokens=8)


def test_a_file_dropped_in_is_served(running: Running, make_adapter: MakeAdapter) -> None:
    write_delta(running.directory / "new.safetensors", make_adapter(9))
    eventually(lambda: running.state("new") == "resident")
    assert running.client.generate("x", adapter="new").adapter.startswith("new@")


def test_a_directory_that_cannot_be_watched_is_looked_at_every_second(
    serve_tiny: Callable[..., Iterator[Running]],
    tmp_path: Path,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_many(*_: object, **__: object) -> None:
        raise RuntimeError("Too many open files")  # as of inotify's instances

    monkeypatch.setattr("spieldose_server.directory.awatch", too_many)
    with contextmanager(serve_tiny)(tmp_path) as running:
        write_delta(tmp_path / "a1.safetensors", make_adapter(1))
        eventually(lambda: running.state("a1") == "resident")
        assert running.client.generate("x", adapter="a1", sampling=SHORT).token_ids


def test_a_file_being_written_is_not_touched_until_it_is_complete(
    running: Running, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    write_delta(tmp_path / "whole.safetensors", make_adapter(9))
    payload = (tmp_path / "whole.safetensors").read_bytes()
    with open(running.directory / "slow.safetensors", "wb") as file:
        for part in _parts(payload, 8):
            file.write(part)
            file.flush()
            time.sleep(0.3)
            if file.tell() < len(payload):
                assert running.state("slow") == ""
    eventually(lambda: running.state("slow") == "resident")


def test_adapters_are_listed_in_pages_that_part_no_names_versions(
    running: Running, make_adapter: MakeAdapter
) -> None:
    with Stream(running, "a2"):
        write_delta(running.directory / "a2.safetensors", make_adapter(9))
        eventually(lambda: "draining" in running.state("a2") and "resident" in running.state("a2"))
        everything = [(each.name, each.digest) for each in running.client.adapters()]
        assert sorted({name for name, _ in everything}) == ["a1", "a2", "a3", "a4"]
        for size in range(1, 7):
            assert [pair for page in pages(running, size) for pair in page] == everything
            for page in pages(running, size):
                assert len(page) <= size + 1
                assert len({name for name, _ in page} & {"a2"}) * 2 <= len(page)


def test_a_page_of_long_descriptions_fits_into_a_message_of_grpcs_own_limit(
    running: Running, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(5)
    info = replace(adapter.info, description="long\n" * 400, method="m" * 2_000)
    write_delta(running.directory / "wordy.safetensors", Adapter(info, adapter.modules))
    eventually(lambda: running.state("wordy") == "resident")
    shown = running.client.adapter("wordy")
    assert shown.ByteSize() * PAGE_SIZE < 4 << 20
    assert shown.description.startswith("long\\nlong") and shown.method.startswith("mmm")


def pages(running: Running, size: int) -> list[list[tuple[str, str]]]:
    found, token = [], ""
    while not found or token:
        request = pb.ListAdaptersRequest(page_size=size, page_token=token)
        response = running.client._adapters.List(request)
        found.append([(each.name, each.digest) for each in response.adapters])
        token = response.next_page_token
    return found


def test_too_short_a_digest_names_no_version(running: Running) -> None:
    running.client.generate("x", adapter="a1", sampling=SHORT)
    digest = running.client.adapter("a1").digest
    assert running.client.adapter(f"a1@{digest[:12]}").digest == digest
    for short in ("", digest[:11]):
        with pytest.raises(ClientError) as caught:
            running.client.adapter(f"a1@{short}")
        assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_a_removed_file_is_unloaded_once_its_requests_are_done(running: Running) -> None:
    with Stream(running, "a1") as stream:
        free = running.server.engine.slab.arena.free_bytes
        (running.directory / "a1.safetensors").unlink()
        eventually(lambda: running.state("a1") == "draining")
        with pytest.raises(ClientError) as caught:
            running.client.generate("x", adapter="a1")
        assert caught.value.code == grpc.StatusCode.NOT_FOUND
        stream.next()
    eventually(lambda: running.state("a1") == "")
    assert running.server.engine.slab.arena.free_bytes > free


def test_a_replaced_adapter_finishes_its_running_requests_on_the_old_version(
    running: Running, make_adapter: MakeAdapter
) -> None:
    sampling = pb.SamplingParams(max_tokens=120)
    old = running.client.generate("hello", adapter="a1", sampling=sampling)
    with Stream(running, "a1") as stream:
        write_delta(running.directory / "a1.safetensors", make_adapter(77))
        eventually(lambda: running.state("a1") == "resident, draining")
        new = running.client.generate("hello", adapter="a1", sampling=sampling)
        assert new.adapter != old.adapter
        assert stream.rest() == old.token_ids
    assert new.token_ids != old.token_ids
    eventually(lambda: running.state("a1") == "resident")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "header declares a file of"),
        ("pickle", "got a pickle"),
        ("foreign base", "got a delta for base"),
        ("out of range", "expected indices below"),
        ("duplicate index", "expected strictly ascending rows"),
        ("nan", "expected finite values"),
        ("text", "expected a safetensors file"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason_while_streams_go_on(
    running: Running,
    make_adapter: MakeAdapter,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    reason: str,
) -> None:
    sampling = pb.SamplingParams(max_tokens=120)
    alone = running.client.generate("hello", adapter="a1", sampling=sampling)
    with Stream(running, "a1") as stream:
        write_bad(running.directory / "bad.safetensors", make_adapter(9), kind)
        eventually(lambda: reason in running.state("bad"))
        assert reason in running.client.adapter("bad").reason
        assert reason in caplog.text
        with pytest.raises(ClientError) as caught:
            running.client.generate("x", adapter="bad")
        assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION
        assert stream.rest() == alone.token_ids
    assert running.client.generate("x", adapter="a2").adapter.startswith("a2@")


def test_a_bad_replacement_leaves_the_good_version_in_service(running: Running) -> None:
    before = running.client.generate("x", adapter="a1")
    (running.directory / "a1.safetensors").write_bytes(b"\x80\x02nonsense")
    eventually(lambda: "rejected" in running.state("a1"))
    assert running.client.generate("x", adapter="a1") == before


def test_load_and_unload(running: Running) -> None:
    running.admin.unload("a1")
    assert running.state("a1") == ""
    time.sleep(1.5)  # longer than the directory's own rescan
    assert running.state("a1") == ""
    assert running.admin.load("a1").state == pb.ADAPTER_STATE_RESIDENT
    assert running.client.generate("x", adapter="a1").adapter.startswith("a1@")


@pytest.mark.parametrize("name", ["nobody", "../a1", "", "/etc/passwd"])
def test_loading_what_is_not_in_the_directory_is_not_found(running: Running, name: str) -> None:
    with pytest.raises(ClientError) as caught:
        running.admin.load(name)
    assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_more_adapters_than_there_is_room_for_are_all_served(
    running: Running, make_adapter: MakeAdapter
) -> None:
    names = [f"big{seed}" for seed in range(10, 22)]
    for seed, name in enumerate(names):  # 4 MiB have room for about five of them
        write_delta(running.directory / f"{name}.safetensors", make_adapter(seed, density=0.9))
    eventually(lambda: all(running.state(name) in ("on host", "resident") for name in names))
    alone = [running.client.generate("x", adapter=name, sampling=SHORT) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        ask = partial(running.client.generate, "x", sampling=SHORT)
        crowd = list(pool.map(lambda name: ask(adapter=name), 3 * names))
    assert crowd == 3 * alone
    assert running.server.store.residency.evictions > 0
    assert all(version.leases == 0 for version in running.server.store.list())


def test_a_request_may_name_a_version(running: Running) -> None:
    played = running.client.generate("x", adapter="a1").adapter
    assert running.client.generate("x", adapter=played).adapter == played
    with pytest.raises(ClientError) as caught:
        running.client.generate("x", adapter="a1@" + "0" * 64)
    assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_pin_and_unpin(running: Running) -> None:
    pinned = running.admin.pin("a1")
    assert (pinned.state, pinned.pinned) == (pb.ADAPTER_STATE_RESIDENT, True)
    assert not running.admin.unpin("a1").pinned
    for method in (running.admin.pin, running.admin.unpin):
        with pytest.raises(ClientError) as caught:
            method("nobody")
        assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_a_pin_is_taken_back_even_if_its_file_is_gone(
    running: Running, make_adapter: MakeAdapter
) -> None:
    running.admin.pin("a1")
    (running.directory / "a1.safetensors").unlink()
    eventually(lambda: not running.state("a1"))
    assert running.admin.unpin("a1") == pb.Adapter(name="a1")
    with pytest.raises(ClientError, match="NOT_FOUND"):
        running.admin.unpin("a1")  # again
    write_delta(running.directory / "a1.safetensors", make_adapter(1))
    eventually(lambda: running.state("a1"))
    assert not running.client.adapter("a1").pinned


def test_watching_shows_an_adapter_come_and_go(running: Running, make_adapter: MakeAdapter) -> None:
    events = running.client.watch()
    assert {next(events).adapter.name for _ in range(4)} == {"a1", "a2", "a3", "a4"}
    write_delta(running.directory / "new.safetensors", make_adapter(9))
    while (event := next(events)).adapter.state != pb.ADAPTER_STATE_RESIDENT:
        assert event.adapter.name == "new"
    (running.directory / "new.safetensors").unlink()
    while not (event := next(events)).gone:
        pass
    assert event.adapter.name == "new"
    events.close()


class Stream:
    """A request that is running while the block is: its stream is not read to the end."""

    def __init__(self, running: Running, adapter: str) -> None:
        sampling = pb.SamplingParams(max_tokens=120)
        request = pb.GenerateRequest(text="hello", adapter_id=adapter, sampling_params=sampling)
        # the server is held up by a gate in front of the model, so the request cannot end early
        self._gate = threading.Event()
        self._hook = running.base.model.register_forward_pre_hook(self._wait)
        self._call: Any = running.client.inference.Generate(request)
        self._tokens: list[int] = []

    def __enter__(self) -> "Stream":
        self.next()  # it has its version now
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.set()
        self._call.cancel()
        self._hook.remove()

    def _wait(self, *_: object) -> None:
        if not self._gate.is_set():
            time.sleep(0.05)

    def next(self) -> None:
        self._tokens += next(self._call).chunk.token_ids

    def rest(self) -> tuple[int, ...]:
        self._gate.set()
        return (*self._tokens, *(t for r in self._call for t in r.chunk.token_ids))


def write_bad(path: Path, adapter: Adapter, kind: str) -> None:
    """Write a delta file that is wrong in one way."""
    delta = next(delta for delta in adapter.modules.values() if delta.nnz > 2)
    if kind == "pickle":
        torch.save({"weights": torch.zeros(3)}, path)
        return
    if kind == "text":
        path.write_text("this is no delta file, but it is quite long")
        return
    if kind == "foreign base":
        object.__setattr__(adapter.info, "base_fingerprint", "0" * 64)
    elif kind == "out of range":
        delta.columns[int(delta.row_starts[1:].max()) - 1] = delta.width
    elif kind == "duplicate index":
        row = int((delta.row_starts.diff() > 1).nonzero()[0])
        first = int(delta.row_starts[row])
        delta.columns[first + 1] = delta.columns[first]
    write_delta(path, adapter)
    if kind in ("truncated", "nan"):
        scratch = path.with_suffix(".part")
        shutil.copy(path, scratch)
        path.unlink()
        scratch.write_bytes(spoilt(scratch.read_bytes(), kind))
        scratch.rename(path)


def spoilt(payload: bytes, kind: str) -> bytes:
    """Return a delta file cut short, or with what `write_delta` does not write."""
    if kind == "truncated":
        return payload[:-100]
    start = 8 + int.from_bytes(payload[:8], "little")
    entries = json.loads(payload[8:start])
    first = next(entry for name, entry in entries.items() if name.endswith(".values"))
    at = start + first["data_offsets"][0]
    return payload[:at] + b"\xff" * 4 + payload[at + 4 :]


def _parts(payload: bytes, count: int) -> list[bytes]:
    size = -(-len(payload) // count)
    return [payload[i : i + size] for i in range(0, len(payload), size)]
